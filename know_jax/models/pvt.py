"""PVTv2: a pyramid of transformer stages whose attention reads a reduced map.

References:
  Wang et al., PVT v2: Improved Baselines with Pyramid Vision Transformer, 2022; names, padding and
  epsilons as in timm 1.0 (`timm.models.pvt_v2`). Kernels start Glorot-uniform, as in tfimm.
"""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from know_jax.errors import UserError
from know_jax.models.common import Classifier, Family, Layers
from know_jax.models.ops import gelu

POOLED = 7
"""Height and width of the map that the "linear" kind attends to."""

_NAMES = {
  'query': 'attn.q',
  'key_value': 'attn.kv',
  'out': 'attn.proj',
  'reduce': 'attn.sr',
  'reduce_norm': 'attn.norm',
  'dense1': 'mlp.fc1',
  'depthwise': 'mlp.dwconv',
  'dense2': 'mlp.fc2',
}
_KERAS_NAMES = {
  'norm1': 'attn_ln',
  'query': 'attn_query',
  'key_value': 'attn_key_value',
  'out': 'attn_out',
  'reduce': 'attn_kv_sr_conv',
  'reduce_norm': 'attn_kv_sr_ln',
  'norm2': 'mlp_ln',
  'dense1': 'mlp_1_dense',
  'depthwise': 'mlp_mid_dw_conv',
  'dense2': 'mlp_2_dense',
}
_BRANCH_EPSILON = 1e-6
_EMBED_EPSILON = 1e-5


class PVTv2(Classifier):
  """Four stages, each an overlapping patch embedding, transformer blocks and LayerNorm.

  Attributes:
    width: channels of the first stage, `embed_dims` being scaled to it; None: as they are.
    depths: blocks in each stage.
    embed_dims: channels of each stage.
    num_heads: attention heads of each stage; its channels are a multiple of them.
    sr_ratios: how many times smaller each side is of the map that a stage attends to; 1: itself.
    mlp_ratios: channels inside each stage's MLP, as a multiple of the stage's.
    stem_stride: stride of the first patch embedding; the others have 2.
    linear: the "linear" kind: attention to a map pooled to 7 x 7, and a ReLU more in the MLP.
    drop_path: the share of samples for which the last block's branches are dropped in training;
      the blocks before it drop fewer, in even steps from none. Trained with 0.1 (b0 to b2) and
      0.3 (b3 to b5) on ImageNet; 0 in the transfers of the paper's authors.
  """

  width: int | None = None
  depths: tuple[int, ...] = (2, 2, 2, 2)
  embed_dims: tuple[int, ...] = (32, 64, 160, 256)
  num_heads: tuple[int, ...] = (1, 2, 5, 8)
  sr_ratios: tuple[int, ...] = (8, 4, 2, 1)
  mlp_ratios: tuple[int, ...] = (8, 8, 4, 4)
  stem_stride: int = 4
  linear: bool = False
  drop_path: float = 0.0

  @nn.nowrap
  def dims(self) -> tuple[int, ...]:
    """The channels of each stage.

    Raises:
      UserError: `width` does not scale `embed_dims` to multiples of `num_heads`.
    """
    first = self.embed_dims[0]
    width = first if self.width is None else self.width
    for dim, heads in zip(self.embed_dims, self.num_heads, strict=True):
      if dim * width % (first * heads):
        raise UserError(
          f'width {width} gives a stage of {dim} channels {dim * width / first:g}; expected a '
          f'multiple of its {heads} heads.'
        )
    return tuple(dim * width // first for dim in self.embed_dims)

  def feature_map(self, x: jax.Array, layers: Layers) -> jax.Array:
    """Images [B, H, W, C] to the last stage's map [B, h, w, F]."""
    rates = np.linspace(0, self.drop_path, sum(self.depths)).tolist()
    for i, dim in enumerate(self.dims()):
      stage = f'stage{i + 1}'
      kernel, stride = (7, self.stem_stride) if i == 0 else (3, 2)
      x = layers.conv(
        dim,
        kernel,
        f'{stage}_embed',
        stride=stride,
        padding=kernel // 2,
        bias=True,
        by_patches=True,
      )(x)
      x = layers.layer_norm(f'{stage}_embed_norm', _EMBED_EPSILON)(x)
      for j in range(self.depths[i]):
        x = Block(
          heads=self.num_heads[i],
          reduction=self.sr_ratios[i],
          expansion=self.mlp_ratios[i],
          linear=self.linear,
          drop_path=rates.pop(0),
          layers=layers,
          name=f'{stage}_block{j + 1}',
        )(x)
      x = layers.layer_norm(f'{stage}_norm', _BRANCH_EPSILON)(x)
    return x

  pretrained_styles = ('timm', 'keras', 'know_jax')
  skippable = r'(params/)?head/|predictions/'
  # What passes from layer to layer then stays in a core's cache.
  pixels_at_once = 1 << 15

  @nn.nowrap
  def pretrained_name(self, style: str, layer: str) -> str:
    """The name of a layer in timm, or in keras_cv_attention_models."""
    if style != 'keras':
      return self.state_dict_name(layer)
    stage, _, part = layer.partition('_')
    if not part:
      return 'predictions'
    number = int(stage.removeprefix('stage'))
    if part == 'norm':
      return f'stack{number}_block{self.depths[number - 1]}_output_ln'
    if part.startswith('embed'):
      where = 'stem' if number == 1 else f'stack{number}_downsample'
      return f'{where}_{"ln" if part == "embed_norm" else "conv"}'
    block, _, name = part.partition('/')
    return f'stack{number}_{block}_{_KERAS_NAMES[name]}'

  @nn.nowrap
  def state_dict_name(self, layer: str) -> str:
    """The name of a layer in timm."""
    stage, _, part = layer.partition('_')
    if not part:
      return layer
    number = int(stage.removeprefix('stage')) - 1
    if part.startswith('embed'):
      where = f'stages.{number}.downsample' if number else 'patch_embed'
      return f'{where}.{"norm" if part == "embed_norm" else "proj"}'
    part = re.sub(r'block(\d+)/(\w+)', _block_name, part)
    return f'stages.{number}.{part}'


def _block_name(match: re.Match) -> str:
  number, layer = match.groups()
  return f'blocks.{int(number) - 1}.{_NAMES.get(layer, layer)}'


class Block(nn.Module):
  """Attention to the reduced map, then an MLP with a depthwise convolution; both added to x."""

  heads: int
  reduction: int
  expansion: int
  linear: bool
  drop_path: float
  layers: Layers

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, C] to [B, H, W, C]."""
    layers = self.layers
    # A whole sample's branch is kept or dropped; kept ones are divided by the share kept.
    drop = layers.dropout(self.drop_path, broadcast_dims=(1, 2, 3))
    x += drop(self.attention(layers.layer_norm('norm1', _BRANCH_EPSILON)(x)))
    y = layers.layer_norm('norm2', _BRANCH_EPSILON)(x)
    y = layers.dense(self.expansion * x.shape[-1], 'dense1')(y)
    if self.linear:
      y = nn.relu(y)
    y = layers.depthwise('depthwise', padding=1, bias=True)(y)
    y = layers.dense(x.shape[-1], 'dense2')(gelu(y))
    return x + drop(y)

  def attention(self, x: jax.Array) -> jax.Array:
    """Multi-head attention of every position to the reduced map: [B, H, W, C] to the same."""
    layers, (batch, height, width, channels) = self.layers, x.shape
    small = x
    if self.linear:
      small = layers.conv(channels, 1, 'reduce', bias=True)(adaptive_average_pool(x, POOLED))
    elif self.reduction > 1:
      if min(height, width) < self.reduction:
        raise UserError(
          f'a stage has a map of {height} x {width}, which is reduced {self.reduction} times; '
          'expected larger images, a smaller stem_stride or smaller sr_ratios.'
        )
      # Rows and columns that do not fill a window are left out.
      ratio = self.reduction
      small = layers.conv(channels, ratio, 'reduce', stride=ratio, padding='VALID', bias=True)(x)
    if self.linear or self.reduction > 1:
      small = layers.layer_norm('reduce_norm', _EMBED_EPSILON)(small)
    if self.linear:
      small = gelu(small)
    # One Dense gives keys and values, as in the checkpoints: what is predicted for a checkpoint's
    # leaf is what is predicted for this network's.
    query = layers.dense(channels, 'query')(x)
    key, value = jnp.split(layers.dense(2 * channels, 'key_value')(small), 2, axis=-1)
    by_head = (
      y.reshape(batch, -1, self.heads, channels // self.heads) for y in (query, key, value)
    )
    y = attend(*by_head)
    return layers.dense(channels, 'out')(y.reshape(x.shape))


def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """`jax.nn.dot_product_attention`; of few images on a CPU in half its time.

  Args:
    query: [B, N, heads, D].
    key: [B, K, heads, D].
    value: as `key`.

  Returns:
    As `query`.
  """
  batch, _, heads, _ = query.shape
  if jax.default_backend() != 'cpu' or batch * heads > _APART:
    return jax.nn.dot_product_attention(query, key, value)
  by_image = [
    jnp.stack([_attend(query[i, :, j], key[i, :, j], value[i, :, j]) for j in range(heads)], axis=1)
    for i in range(batch)
  ]
  return jnp.stack(by_image)


_APART = 8  # Matrices, from which on more to compile outweighs the gain.


@jax.jit
def _attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """Attention of one head, [N, D] with [K, D]: the sums of a softmax go along columns."""
  logits = lax.dot_general(key, query, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
  shares = jax.nn.softmax(logits * query.shape[-1] ** -0.5, axis=0)
  return shares.astype(value.dtype).T @ value


def adaptive_average_pool(x: jax.Array, size: int) -> jax.Array:
  """Means over `size` x `size` windows, as PyTorch's `adaptive_avg_pool2d` lays them.

  Window i of a side of n pixels begins at floor(i n / size) and ends before ceil((i + 1) n / size):
  where n is no multiple of `size` windows overlap, and where it is smaller pixels come repeatedly.

  Args:
    x: [B, H, W, C].
    size: height and width of the result.

  Returns:
    [B, size, size, C].
  """

  def means(side: int) -> np.ndarray:
    i, pixel = np.arange(size)[:, None], np.arange(side)
    inside = (pixel >= i * side // size) & (pixel < -((i + 1) * side // -size))
    return inside / inside.sum(axis=1, keepdims=True)

  rows, columns = (jnp.asarray(means(side), x.dtype) for side in x.shape[1:3])
  return jnp.einsum('ih,jw,bhwc->bijc', rows, columns, x)


def _pvt_v2(first: int, depths: tuple[int, ...], *, mlp: int = 8, linear: bool = False) -> Family:
  dims = tuple(first * times for times in (1, 2, 5, 8))
  fixed = {
    'embed_dims': dims,
    'num_heads': (1, 2, 5, 8),
    'depths': depths,
    'sr_ratios': (8, 4, 2, 1),
    'mlp_ratios': (mlp, mlp, 4, 4),
    'linear': linear,
  }
  return Family(PVTv2, fixed)


MODELS = {
  'pvt_v2': Family(PVTv2),
  'pvt_v2_b0': _pvt_v2(32, (2, 2, 2, 2)),
  'pvt_v2_b1': _pvt_v2(64, (2, 2, 2, 2)),
  'pvt_v2_b2': _pvt_v2(64, (3, 4, 6, 3)),
  'pvt_v2_b2_li': _pvt_v2(64, (3, 4, 6, 3), linear=True),
  'pvt_v2_b3': _pvt_v2(64, (3, 4, 18, 3)),
  'pvt_v2_b4': _pvt_v2(64, (3, 8, 27, 3)),
  'pvt_v2_b5': _pvt_v2(64, (3, 6, 40, 3), mlp=4),
}
