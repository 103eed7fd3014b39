"""Arithmetic that layers share, and its gradients, where XLA's own are slow on a CPU.

It is jitted, though a whole step is too: JAX then traces it once for each shape, not in every
layer. As traces are kept, whether it is for a CPU is an argument.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Pads = tuple[tuple[int, int], ...]
"""Zeros before and after, of height and of width."""


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
@functools.partial(jax.checkpoint, static_argnums=(3, 4, 5))
def normalised(
  x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, dtype: Any, fast: bool
) -> jax.Array:
  """`common.LayerNorm`, which keeps its input alone; `fast`: by the means that suit a CPU."""
  x = x.astype(jnp.float32)
  mean = _mean_by_products if fast else functools.partial(jnp.mean, axis=-1, keepdims=True)
  x -= mean(x)
  x *= lax.rsqrt(mean(x * x) + epsilon)
  return (x * scale + bias).astype(dtype)


def _mean_by_products(x: jax.Array) -> jax.Array:
  """[..., C] to as many, all of them the mean over the last axis.

  XLA adds numbers up one after the other, here and for the gradient, but not in products.
  """
  channels = x.shape[-1]
  mean = x.reshape(-1, channels) @ jnp.full((channels, 1), 1 / channels, x.dtype)
  return (mean @ jnp.ones((1, channels), x.dtype)).reshape(x.shape)


def depthwise(x: jax.Array, kernel: jax.Array, pads: Pads, step: int, apart: int) -> jax.Array:
  """A depthwise convolution; see `common.DepthwiseConv`.

  Args:
    x: [B, H, W, C].
    kernel: [3, 3, C].
    pads: the zeros around.
    step: the stride of both axes.
    apart: the distance between the taps.

  Returns:
    [B, h, w, C].
  """
  if step > 1 or pads != ((apart, apart),) * 2:
    return _shifted_products(x, kernel, pads, step, apart)
  on_cpu = jax.default_backend() == 'cpu'
  return _at_its_size(x, kernel, apart, on_cpu, on_cpu and x[0].size >= BY_ROWS)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _at_its_size(
  x: jax.Array, kernel: jax.Array, apart: int, by_image: bool, by_rows: bool
) -> jax.Array:
  if not by_image:
    return _same_size(x, kernel, apart, by_rows)

  # What is read nine times stays in the cache, and only images are kept for the gradient: on a CPU
  # a training step of a PVTv2 takes a half to a third of the time.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def one(image: jax.Array) -> jax.Array:
    return _same_size(image[None], kernel, apart, by_rows)[0]

  return lax.map(one, x)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _shifted_products(
  x: jax.Array, kernel: jax.Array, pads: Pads, step: int, apart: int
) -> jax.Array:
  """Depthwise convolution of [B, H, W, C] with [3, 3, C], as nine products of shifted images."""
  x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
  batch, *sides, channels = x.shape
  rows, columns = (size - 2 * apart for size in sides)
  shifted = (
    lax.slice(
      x,
      (0, i * apart, j * apart, 0),
      (batch, i * apart + rows, j * apart + columns, channels),
      (1, step, step, 1),
    )
    * kernel[i, j]
    for i in range(3)
    for j in range(3)
  )
  return sum(shifted, start=jnp.zeros((), x.dtype))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _same_size(x: jax.Array, kernel: jax.Array, apart: int, by_rows: bool) -> jax.Array:
  """`_shifted_products` at stride 1 with as many zeros around as the taps are apart.

  `by_rows`: whether its gradient is `_row_by_row`'s.
  """
  return _shifted_products(x, kernel, ((apart, apart),) * 2, 1, apart)


@_same_size.defjvp
def _same_size_jvp(
  apart: int, by_rows: bool, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
  (x, kernel), (x_tangent, kernel_tangent) = primals, tangents
  # The same linear map as the transpose of that with the kernel turned, so that its own transpose,
  # the gradient, reads shifted images; the plain one's adds padded images up, several times slower.
  pads = ((apart, apart),) * 2
  turned = jax.linear_transpose(
    lambda y: _shifted_products(y, kernel[::-1, ::-1], pads, 1, apart), x
  )
  if by_rows:
    by_kernel = _row_by_row(x, kernel_tangent, apart)
  else:
    by_kernel = _shifted_products(x, kernel_tangent, pads, 1, apart)
  return _same_size(x, kernel, apart, by_rows), turned(x_tangent)[0] + by_kernel


BY_ROWS = 1 << 14
"""Numbers of an image from which on the gradient by the kernel is added up row by row."""


def _row_by_row(x: jax.Array, kernel: jax.Array, apart: int) -> jax.Array:
  """`_same_size`, whose gradient by the kernel adds rows up, and then what is left in their width.

  On a CPU that takes a third of the time of nine sums of all there is.
  """
  padded = jnp.pad(x, ((0, 0), (apart, apart), (apart, apart), (0, 0)))
  width = x.shape[2]
  taps = [jnp.broadcast_to(kernel[i, j], (width, x.shape[3])) for i in range(3) for j in range(3)]

  @jax.checkpoint
  def row(_: None, place: jax.Array) -> tuple[None, jax.Array]:
    rows = [lax.dynamic_index_in_dim(padded, place + i * apart, 1, False) for i in range(3)]
    shifted = (rows[i][:, j * apart : j * apart + width] for i in range(3) for j in range(3))
    return None, sum((a * b for a, b in zip(shifted, taps, strict=True)), jnp.zeros((), x.dtype))

  _, result = lax.scan(row, None, jnp.arange(x.shape[1]))
  return jnp.moveaxis(result, 0, 1)


@jax.custom_jvp
def max_pool(x: jax.Array) -> jax.Array:
  """2x2 max-pooling with stride 2; an odd last row or column is dropped ('VALID' padding).

  Computed by choosing in pairs, and differentiated by the place of what was chosen: on CPU that
  takes less than half as long as the gradient of `lax.reduce_window`, and goes, as there, to the
  first of equal values. (`max` over a reshaped axis finds the place by comparing with the maximum:
  where XLA has computed the values anew with other rounding, none is equal and the gradient is
  wrong or NaN.)

  Args:
    x: [B, H, W, C].

  Returns:
    [B, H // 2, W // 2, C].
  """
  return _choose(_pooled_windows(x))[0]


@max_pool.defjvp
def _max_pool_jvp(
  primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
  (x,), (tangent,) = primals, tangents
  chosen, place = _choose(_pooled_windows(x))
  places = jnp.arange(4, dtype=place.dtype).reshape(2, 1, 2, 1)
  here = place[:, :, None, :, None] == places
  # Its transpose is one pass that writes every gradient once, without pads and additions.
  return chosen, jnp.where(here, _pooled_windows(tangent), 0).sum((2, 4))


def _pooled_windows(x: jax.Array) -> jax.Array:
  """[B, H, W, C] to [B, H // 2, 2, W // 2, 2, C]."""
  batch, height, width, channels = x.shape
  rows, columns = height // 2, width // 2
  return x[:, : 2 * rows, : 2 * columns].reshape(batch, rows, 2, columns, 2, channels)


def _choose(windows: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The first largest value of each window, and its place in it, row by row: 0 to 3, uint8."""
  left, right = windows[..., 0, :], windows[..., 1, :]
  is_left = left >= right
  x = jnp.where(is_left, left, right)
  column = jnp.where(is_left, jnp.uint8(0), jnp.uint8(1))
  top, bottom = x[:, :, 0], x[:, :, 1]
  is_top = top >= bottom
  place = jnp.where(is_top, column[:, :, 0], column[:, :, 1] + jnp.uint8(2))
  return jnp.where(is_top, top, bottom), place


@jax.jit
@jax.checkpoint
def gelu(x: jax.Array) -> jax.Array:
  """The exact GELU, x Phi(x), by `erf` as in PyTorch; by `erfc`, as in JAX, it is slower.

  The gradient computes it anew from x: on a CPU that takes less time than fresh memory for more.
  """
  return x * (0.5 + 0.5 * lax.erf(x * np.sqrt(0.5).astype(x.dtype)))


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """[..., I] @ [I, O]; on a CPU the gradient by the kernel takes a third of the time of XLA's own.

  XLA copies turned what has more than two axes, and is slow with the wider matrix first.
  """
  on_cpu = jax.default_backend() == 'cpu'
  return _traced_product(x, kernel, on_cpu and kernel.shape[0] > kernel.shape[1])


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _product(x: jax.Array, kernel: jax.Array, turned: bool) -> jax.Array:
  return x @ kernel


@_product.defjvp
def _product_jvp(turned: bool, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
  (x, kernel), (x_tangent, kernel_tangent) = primals, tangents
  y, flat = _product(x, kernel, turned), x.reshape(-1, x.shape[-1])
  by_kernel = flat @ kernel_tangent
  if turned:
    # Turned behind a barrier, or XLA would turn the gradient's product back.
    of_columns = lax.optimization_barrier(kernel_tangent.T)
    by_kernel = lax.dot_general(flat, of_columns, (((1,), (1,)), ((), ())))
  return y, x_tangent @ kernel + by_kernel.reshape(y.shape)


_traced_product = jax.jit(_product, static_argnums=2)


def patch_product(x: jax.Array, kernel: jax.Array, strides: Any, *_: Any, **__: Any) -> jax.Array:
  """A convolution of [B, H, W, C] whose windows neither overlap nor leave gaps, as one product.

  For `nn.Conv(conv_general_dilated=...)`; rows and columns that do not fill a window are left out.
  XLA's gradient of such a convolution is slow on CPU.
  """
  (rows, columns), (batch, height, width, channels) = strides, x.shape
  x = x[:, : height - height % rows, : width - width % columns]
  x = x.reshape(batch, height // rows, rows, width // columns, columns, channels)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return product(x.reshape(*x.shape[:3], -1), kernel.reshape(-1, kernel.shape[-1]))


def overlapping_product(
  x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, *_: Any, **__: Any
) -> jax.Array:
  """A convolution of [B, H, W, C], as the product of its windows, copied, with the kernel.

  For `nn.Conv(conv_general_dilated=...)`. With few images or channels XLA's own, and its gradient
  by the kernel, take many times as long on a CPU.
  """
  rows, columns = (
    (size + sum(pads) - reach) // step + 1
    for size, pads, reach, step in zip(x.shape[1:3], padding, kernel.shape, strides, strict=False)
  )
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  (down, right), (height, width) = strides, kernel.shape[:2]
  windows = [
    x[:, i : i + down * (rows - 1) + 1 : down, j : j + right * (columns - 1) + 1 : right]
    for i in range(height)
    for j in range(width)
  ]
  return product(jnp.concatenate(windows, axis=-1), kernel.reshape(-1, kernel.shape[-1]))
