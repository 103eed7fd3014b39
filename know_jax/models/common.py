"""What the model families share: the classifier around them, layers, and pooling.

Every kernel starts Glorot-uniform and every bias at zero, as in Keras, whose defaults the paper's
networks were trained from: weights are predicted from their raw values, so that another initial
scale would be another distribution of inputs. Parameters and BatchNorm statistics are float32
whatever the compute dtype.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from know_jax.errors import UserError
from know_jax.models.ops import (
  Pads,
  depthwise,
  normalised,
  overlapping_product,
  patch_product,
  product,
)

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
    return LayerNorm(epsilon, dtype=self.dtype, name=name)

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
    fast = self.dtype == jnp.float32 and jax.default_backend() == 'cpu'
    return normalised(x, scale, bias, self.epsilon, self.dtype, fast)


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
    pads: Pads
    if isinstance(self.padding, int):
      pads = ((self.padding, self.padding),) * 2
    else:
      reach = 2 * apart + 1
      pads = tuple(lax.padtype_to_pads(x.shape[1:3], (reach, reach), (step, step), self.padding))
    y = depthwise(x, kernel, pads, step, apart)
    if self.bias:
      bias = self.param('bias', nn.initializers.zeros, (x.shape[-1],), jnp.float32)
      y += bias.astype(self.dtype)
    return y


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
