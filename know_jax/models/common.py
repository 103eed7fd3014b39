"""What the model families share: the classifier around them, layers, and pooling.

Every kernel starts Glorot-uniform and every bias at zero, as in Keras, whose defaults the paper's
networks were trained from: weights are predicted from their raw values, so that another initial
scale would be another distribution of inputs. Parameters and BatchNorm statistics are float32
whatever the compute dtype.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from know_jax.errors import UserError

HEAD = 'head'
"""The name of the final Dense, at the top level of the parameters of every model."""

SMALLEST_IMAGE = 8
"""Height and width, in pixels, below which a model refuses images."""

BATCH_NORM_MOMENTUM = 0.9
"""The share of the old running statistics kept at each training step.

Keras keeps 0.99; the last forgetting stages have too few steps for running statistics that slow.
"""

BATCH_NORM_EPSILON = 1e-5
"""What is added to the variance; Flax's default, PyTorch's too (Keras: 1e-3)."""

Padding = str | int

glorot_uniform = nn.initializers.glorot_uniform()


class Layers(NamedTuple):
  """How one model makes its layers in one call.

  Attributes:
    dtype: the dtype of the computation.
    axis_name: the mapped axis over which BatchNorm averages its statistics in training, or None.
    train: whether BatchNorm uses, and records, the statistics of the batch.
    random: whether units are dropped at random.
  """

  dtype: Any
  axis_name: str | None
  train: bool
  random: bool = False

  def conv(
    self,
    features: int,
    kernel: int,
    name: str,
    *,
    stride: int = 1,
    bias: bool = False,
    padding: Padding = 'SAME',
    dilation: int = 1,
    by_patches: bool = False,
  ) -> nn.Module:
    """A square convolution with zero padding; no bias by default, since BatchNorm follows.

    `by_patches`: on a CPU by `overlapping_product`; only with zeros counted, and not dilated.
    """
    tiles = kernel == stride and (kernel == 1 or dilation == 1)
    is_product = tiles and (padding in ('VALID', 0) or (padding == 'SAME' and kernel == 1))
    by_patches = by_patches and jax.default_backend() == 'cpu'
    convolution = patch_product if is_product else overlapping_product if by_patches else None
    return nn.Conv(
      features,
      (kernel, kernel),
      strides=stride,
      padding=padding,
      kernel_dilation=dilation,
      use_bias=bias,
      dtype=self.dtype,
      kernel_init=glorot_uniform,
      conv_general_dilated=convolution,
      name=name,
    )

  def depthwise(self, name: str, **options: Any) -> nn.Module:
    """A 3x3 depthwise convolution with zero padding; options: see `DepthwiseConv`."""
    return DepthwiseConv(dtype=self.dtype, name=name, **options)

  def norm(self, name: str) -> nn.Module:
    """BatchNorm; in training its statistics are those of the batch over all of `axis_name`."""
    return nn.BatchNorm(
      use_running_average=not self.train,
      momentum=BATCH_NORM_MOMENTUM,
      epsilon=BATCH_NORM_EPSILON,
      dtype=self.dtype,
      # Running averages are the same on every device: evaluation needs no mapped axis.
      axis_name=self.axis_name if self.train else None,
      name=name,
    )

  def dense(self, features: int, name: str) -> nn.Module:
    """A fully connected layer with bias."""
    return nn.Dense(
      features,
      dtype=self.dtype,
      kernel_init=glorot_uniform,
      dot_general=lambda x, kernel, *_, **__: product(x, kernel),
      name=name,
    )

  def layer_norm(self, name: str, epsilon: float = 1e-6) -> nn.Module:
    """LayerNorm over the channels, its statistics in float32; keeps its input alone, as `gelu`."""
    return nn.remat(LayerNorm)(epsilon, dtype=self.dtype, name=name)

  def dropout(self, rate: float, **options: Any) -> nn.Module:
    """Dropout in training, where the caller gives a key named 'dropout'; the identity elsewhere."""
    return nn.Dropout(rate, deterministic=not self.random, **options)


class Classifier(nn.Module):
  """The base of every family: images to a feature map (the family's part) to logits.

  Attributes:
    num_classes: the number of logits.
    width: the family's measure of size; channel counts are multiples of it.
    dtype: the dtype of the computation; parameters are float32.
    axis_name: the mapped axis (of `jax.pmap`) over which BatchNorm averages its statistics in
      training; None: each device for itself. Families without BatchNorm ignore it.
    pretrained_styles: the conventions for names in files that it can start from.
    skippable: a regular expression for the tensors of such files that it has no use for.
    pixels_at_once: of how many pixels the images are that a training step on a CPU does best to
      take at once, the others before and after them; None: all of a batch.
  """

  num_classes: int
  width: Any
  dtype: Any = jnp.float32
  axis_name: str | None = None

  pretrained_styles: ClassVar[tuple[str, ...]] = ('know_jax',)
  skippable: ClassVar[str] = r'params/head/'
  pixels_at_once: ClassVar[int | None] = None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool, spatial: bool = False) -> jax.Array:
    """Classifies images.

    Args:
      x: images [B, H, W, C], floating-point, H and W at least 8.
      train: True: BatchNorm uses the batch's statistics and updates the running ones, so that
        `batch_stats` must be mutable, and dropout works if `rngs` has a key named 'dropout'
        (without one nothing is dropped); False: BatchNorm uses the running statistics.
      spatial: give the feature map in place of logits, as an encoder for another network; the
        layers above it are then not made.

    Returns:
      Logits [B, num_classes], for each pixel [B, H, W, num_classes] where the family segments, or
      the feature map [B, h, w, F]; float32.

    Raises:
      UserError: `x` is not a batch of floating-point images of at least 8x8, or smaller than the
        family can take.
    """
    if x.ndim != 4 or min(x.shape[1:3]) < SMALLEST_IMAGE:
      raise UserError(
        f'images have shape {tuple(x.shape)}; expected [batch, height, width, channels] with '
        f'height and width of at least {SMALLEST_IMAGE}.'
      )
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise UserError(f'images have dtype {x.dtype}; expected normalised floating-point images.')
    layers = Layers(self.dtype, self.axis_name, train, train and self.has_rng('dropout'))
    compute = self.feature_map if spatial else self.logits
    return compute(x.astype(self.dtype), layers).astype(jnp.float32)

  def feature_map(self, x: jax.Array, layers: Layers) -> jax.Array:
    """Images [B, H, W, C] to features [B, h, w, F]: what tells one family from another."""
    raise NotImplementedError

  def features(self, x: jax.Array, layers: Layers) -> jax.Array:
    """Images [B, H, W, C] to features [B, F]: by default the map's mean over its positions."""
    return global_average_pool(self.feature_map(x, layers))

  def logits(self, x: jax.Array, layers: Layers) -> jax.Array:
    """Images [B, H, W, C] to logits; the head is named here, for transfer finds it by its name."""
    return layers.dense(self.num_classes, HEAD)(self.features(x, layers))

  @nn.nowrap
  def is_above_backbone(self, layer: str) -> bool:
    """Whether pre-trained weights may lack a layer: what is for certain classes only."""
    return layer == HEAD

  @nn.nowrap
  def pretrained_name(self, style: str, layer: str) -> str:
    """The name of a layer in files of one of `pretrained_styles`."""
    return self.state_dict_name(layer)

  @nn.nowrap
  def state_dict_name(self, layer: str) -> str:
    """The name that a layer, `block1/conv`, has in PyTorch's version of the family.

    Raises:
      UserError: the family has none.
    """
    raise UserError(
      f'{type(self).__name__} has no counterpart whose state_dict could be converted; expected a '
      'PVTv2 or a DeepLabV3+.'
    )


class LayerNorm(nn.Module):
  """LayerNorm over the last axis, as Flax's, but on a CPU with means that XLA computes faster.

  Attributes:
    epsilon: what is added to the variance.
    dtype: of the result; statistics are float32.
  """

  epsilon: float
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., C] to the same."""
    shape = (x.shape[-1],)
    scale = self.param('scale', nn.initializers.ones, shape, jnp.float32)
    bias = self.param('bias', nn.initializers.zeros, shape, jnp.float32)
    x = x.astype(jnp.float32)
    fast = self.dtype == jnp.float32 and jax.default_backend() == 'cpu'
    mean = _mean_by_products if fast else functools.partial(jnp.mean, axis=-1, keepdims=True)
    x -= mean(x)
    x *= lax.rsqrt(mean(x * x) + self.epsilon)
    return (x * scale + bias).astype(self.dtype)


def _mean_by_products(x: jax.Array) -> jax.Array:
  """[..., C] to as many, all of them the mean over the last axis.

  XLA adds numbers up one after the other, here and for the gradient, but not in products.
  """
  channels = x.shape[-1]
  mean = x.reshape(-1, channels) @ jnp.full((channels, 1), 1 / channels, x.dtype)
  return (mean @ jnp.ones((1, channels), x.dtype)).reshape(x.shape)


class DepthwiseConv(nn.Module):
  """A 3x3 depthwise convolution with zero padding.

  The kernel has the shape and meaning of `nn.Conv(C, (3, 3), feature_group_count=C)`. It is
  computed as nine shifted products: with XLA's grouped convolution a training step of MobileNetV2
  or ShuffleNetV2 takes 4 to 7 times as long on CPU.

  Attributes:
    dtype: of the computation.
    stride: of both axes.
    padding: 'SAME', as TensorFlow has it (more zeros below and to the right), or the number of
      zeros on every side, as PyTorch has it; they differ at stride 2.
    dilation: the distance between the taps.
    bias: whether there is one.
  """

  dtype: Any
  stride: int = 1
  padding: Padding = 'SAME'
  dilation: int = 1
  bias: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, C] to [B, ceil(H / stride), ceil(W / stride), C], if `padding` is the dilation."""
    kernel = self.param('kernel', glorot_uniform, (3, 3, 1, x.shape[-1]), jnp.float32)
    kernel = kernel.astype(self.dtype)[:, :, 0]
    step, apart = self.stride, self.dilation
    if isinstance(self.padding, int):
      pads = [(self.padding, self.padding)] * 2
    else:
      reach = 2 * apart + 1
      pads = lax.padtype_to_pads(x.shape[1:3], (reach, reach), (step, step), self.padding)
    if step > 1 or pads != [(apart, apart)] * 2:
      y = _shifted_products(x, kernel, pads, step, apart)
    elif jax.default_backend() == 'cpu':
      # Image by image what is read nine times stays in the cache, and only images are kept for
      # the gradient: a training step of a PVTv2 takes a half to a third of the time.
      one = jax.checkpoint(
        lambda image: _same_size(image[None], kernel, apart)[0], prevent_cse=False
      )
      y = lax.map(one, x)
    else:
      y = _same_size(x, kernel, apart)
    if self.bias:
      bias = self.param('bias', nn.initializers.zeros, (x.shape[-1],), jnp.float32)
      y += bias.astype(self.dtype)
    return y


def _shifted_products(
  x: jax.Array, kernel: jax.Array, pads: Sequence[tuple[int, int]], step: int, apart: int
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


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _same_size(x: jax.Array, kernel: jax.Array, apart: int) -> jax.Array:
  """`_shifted_products` at stride 1 with as many zeros around as the taps are apart."""
  return _shifted_products(x, kernel, [(apart, apart)] * 2, 1, apart)


@_same_size.defjvp
def _same_size_jvp(
  apart: int, primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  (x, kernel), (x_tangent, kernel_tangent) = primals, tangents
  # The same linear map as the transpose of that with the kernel turned, so that its own transpose,
  # the gradient, reads shifted images; the plain one's adds padded images up, several times slower.
  pads = [(apart, apart)] * 2
  turned = jax.linear_transpose(
    lambda y: _shifted_products(y, kernel[::-1, ::-1], pads, 1, apart), x
  )
  if jax.default_backend() == 'cpu' and x[0].size >= BY_ROWS:
    by_kernel = _row_by_row(x, kernel_tangent, apart)
  else:
    by_kernel = _shifted_products(x, kernel_tangent, pads, 1, apart)
  return _same_size(x, kernel, apart), turned(x_tangent)[0] + by_kernel


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


@jax.checkpoint
def gelu(x: jax.Array) -> jax.Array:
  """The exact GELU, x Phi(x), by `erf` as in PyTorch; by `erfc`, as in JAX, it is slower.

  The gradient computes it anew from x: on a CPU that takes less time than fresh memory for more.
  """
  return x * (0.5 + 0.5 * lax.erf(x * np.sqrt(0.5).astype(x.dtype)))


@jax.custom_jvp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """[..., I] @ [I, O]; on a CPU the gradient by the kernel takes a third of the time of XLA's own.

  XLA copies turned what has more than two axes, and is slow with the wider matrix first.
  """
  return x @ kernel


@product.defjvp
def _product_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
  (x, kernel), (x_tangent, kernel_tangent) = primals, tangents
  y, flat = product(x, kernel), x.reshape(-1, x.shape[-1])
  by_kernel = flat @ kernel_tangent
  if kernel.shape[0] > kernel.shape[1] and jax.default_backend() == 'cpu':
    # Turned behind a barrier, or XLA would turn the gradient's product back.
    turned = lax.optimization_barrier(kernel_tangent.T)
    by_kernel = lax.dot_general(flat, turned, (((1,), (1,)), ((), ())))
  return y, x_tangent @ kernel + by_kernel.reshape(y.shape)


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


def global_average_pool(x: jax.Array) -> jax.Array:
  """[B, H, W, C] to [B, C]."""
  return x.mean(axis=(1, 2))


class Family(NamedTuple):
  """An entry of the registry.

  Attributes:
    module: the Flax module.
    fixed: the module's attributes that this name settles; those left are options.
    width_multiple: what `width` must be a multiple of.
  """

  module: type[Classifier]
  fixed: Mapping[str, Any] = {}
  width_multiple: int = 1
