"""DeepLabV3+ on MobileNetV2, for segmentation.

References:
  Chen et al., Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation,
  2018; Sandler et al., MobileNetV2, 2018. Padding, numbering of the backbone's blocks and dilation
  as in torchvision: a block whose stride is dropped keeps the rate so far, later ones double it.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from know_jax.errors import UserError
from know_jax.models.common import HEAD, Classifier, Family, Layers
from know_jax.models.mobilenet import InvertedResidual

LOW_LEVEL_CHANNELS = 48
"""Channels to which the early map is brought before it joins the late one."""

_STEM = 32
# Expansion, channels, blocks and stride of the first of them; Sandler et al., table 2.
_STAGES = (
  (1, 16, 1, 1),
  (6, 24, 2, 2),
  (6, 32, 3, 2),
  (6, 64, 4, 2),
  (6, 96, 3, 1),
  (6, 160, 3, 2),
  (6, 320, 1, 1),
)
_LOW_LEVEL = 3
_STRIDES = (8, 16, 32)


class DeepLabV3Plus(Classifier):
  """MobileNetV2, atrous spatial pyramid pooling (ASPP), and a decoder that joins an early map.

  Logits are [B, H, W, num_classes]: computed at a quarter of the image and enlarged bilinearly
  with half-pixel centres.

  Attributes:
    width: multiple of MobileNetV2's channels.
    output_stride: how many times smaller the late map is than the image: 8, 16 or 32.
    rates: dilations of the ASPP's 3x3 convolutions; 6 12 18 at stride 16, 12 24 36 at 8. A rate of
      at least the map's side sees nothing but the centre.
    channels: channels of the ASPP and the decoder.
    separable: whether their 3x3 convolutions are depthwise ones followed by 1x1 ones.
    dropout: share of the ASPP's outputs that are dropped in training.
  """

  width: float = 1.0
  output_stride: int = 16
  rates: tuple[int, ...] = (6, 12, 18)
  channels: int = 256
  separable: bool = True
  dropout: float = 0.1

  def feature_map(self, x: jax.Array, layers: Layers) -> jax.Array:
    """Images [B, H, W, C] to the backbone's map [B, h, w, 320 width]."""
    return self.backbone(x, layers)[1]

  def backbone(self, x: jax.Array, layers: Layers) -> tuple[jax.Array, jax.Array]:
    """Images to the early map, at a quarter of their size, and the late one."""
    if self.output_stride not in _STRIDES:
      raise UserError(
        f'output_stride of deeplabv3plus is {self.output_stride}; expected one of {_STRIDES}.'
      )
    x = layers.conv(scaled(_STEM, self.width), 3, 'stem', stride=2, padding=1)(x)
    x = nn.relu6(layers.norm('stem_norm')(x))
    low, number, total, rate = x, 0, 2, 1
    for expansion, features, blocks, first_stride in _STAGES:
      for j in range(blocks):
        stride, dilation = first_stride if j == 0 else 1, rate
        if stride * total > self.output_stride:
          rate, stride = rate * stride, 1
        total *= stride
        number += 1
        x = InvertedResidual(
          features=scaled(features, self.width),
          stride=stride,
          expansion=expansion,
          padding=dilation,
          dilation=dilation,
          layers=layers,
          name=f'block{number}',
        )(x)
        low = x if number == _LOW_LEVEL else low
    return low, x

  def features(self, x: jax.Array, layers: Layers) -> jax.Array:
    """Images [B, H, W, C] to the decoder's map [B, H / 4, W / 4, channels]."""
    low, x = self.backbone(x, layers)

    def conv(x: jax.Array, name: str, kernel: int = 3, **options: Any) -> jax.Array:
      options = {'features': self.channels, 'layers': layers, 'name': name, **options}
      return ConvNorm(kernel=kernel, separable=self.separable and kernel > 1, **options)(x)

    branches = [conv(x, 'aspp0', 1)]
    branches += [conv(x, f'aspp{i}', dilation=rate) for i, rate in enumerate(self.rates, 1)]
    pooled = conv(x.mean(axis=(1, 2), keepdims=True), 'aspp_pool', 1)
    branches.append(jnp.broadcast_to(pooled, branches[0].shape))
    x = conv(jnp.concatenate(branches, axis=-1), 'aspp', 1)
    x = layers.dropout(self.dropout)(x)
    low = conv(low, 'low_level', 1, features=LOW_LEVEL_CHANNELS)
    x = jnp.concatenate([resize(x, low.shape), low], axis=-1)
    return conv(conv(x, 'decoder0'), 'decoder1')

  def logits(self, x: jax.Array, layers: Layers) -> jax.Array:
    """Images [B, H, W, C] to logits [B, H, W, num_classes]."""
    coarse = layers.conv(self.num_classes, 1, HEAD, bias=True)(self.features(x, layers))
    return resize(coarse, x.shape)

  pretrained_styles = ('torchvision', 'mobilenet', 'timm', 'keras', 'keras_3', 'know_jax')
  # What a MobileNetV2 has for classification.
  skippable = (
    r'features/18/|classifier/|conv_head/|bn2/|Conv_1/|Conv_1_bn/|predictions/|params/head/|'
    r'conv2d_34/|batch_normalization_51/|dense/'
  )

  @nn.nowrap
  def is_above_backbone(self, layer: str) -> bool:
    """Whether a layer is none of MobileNetV2's."""
    return not layer.startswith(('stem', 'block'))

  @nn.nowrap
  def pretrained_name(self, style: str, layer: str) -> str:
    """The name of a layer in a DeepLabV3+, or in a MobileNetV2 of torchvision, timm or Keras."""
    if style == 'torchvision' or self.is_above_backbone(layer):
      return self.state_dict_name(layer)
    if style == 'mobilenet':
      return self.state_dict_name(layer).removeprefix('backbone.')
    block, _, part = layer.partition('/')
    kind, norm = part.removesuffix('_norm'), layer.endswith('_norm')
    number = 0 if block.startswith('stem') else int(block.removeprefix('block'))
    if style == 'keras':
      if not number:
        return 'bn_Conv1' if norm else 'Conv1'
      name = 'expanded_conv' if number == 1 else f'block_{number - 1}'
      return f'{name}_{kind}{"_BN" if norm else ""}'
    # The convolutions of a block, in order; the first block has no expansion.
    order = ('expand', 'depthwise', 'project')[number == 1 :]
    place = order.index(kind) if number else 0
    if style == 'timm':
      if not number:
        return 'bn1' if norm else 'conv_stem'
      if norm:
        return f'{_timm_block(number)}.bn{place + 1}'
      names = ('conv_dw', 'conv_pw') if number == 1 else ('conv_pw', 'conv_dw', 'conv_pwl')
      return f'{_timm_block(number)}.{names[place]}'
    # Keras 3 numbers layers of one class in their order: the stem, two, then three a block.
    if norm:
      count = 0 if not number else 3 * number - 3 + place + (number == 1)
      return _numbered('batch_normalization', count)
    if kind == 'depthwise':
      return _numbered('depthwise_conv2d', number - 1)
    return _numbered('conv2d', 0 if not number else 2 * number - 2 + (kind == 'project'))

  @nn.nowrap
  def state_dict_name(self, layer: str) -> str:
    """The layer's name in a state_dict with torchvision's names of the backbone and the ASPP."""
    if layer == HEAD:
      return 'classifier'
    if layer in ('stem', 'stem_norm'):
      return f'backbone.features.0.{int(layer == "stem_norm")}'
    module, _, part = layer.partition('/')
    if module.startswith('block'):
      number = int(module.removeprefix('block'))
      order = ('expand', 'depthwise', 'project')[number == 1 :]
      place, norm = order.index(part.removesuffix('_norm')), part.endswith('_norm')
      # The last convolution and its norm stand alone, the others in a group of theirs.
      within = f'{place + norm}' if part.startswith('project') else f'{place}.{int(norm)}'
      return f'backbone.features.{number}.conv.{within}'
    place = ('depthwise', 'depthwise_norm', '', 'conv', 'norm').index(part)
    if module == 'aspp_pool':
      return f'aspp.convs.{len(self.rates) + 1}.{place - 2}'
    module = {'aspp': 'aspp.project', 'low_level': 'low_level'}.get(
      module, module.replace('aspp', 'aspp.convs.').replace('decoder', 'decoder.')
    )
    plain = not (self.separable and module.startswith(('aspp.convs', 'decoder')))
    plain |= module == 'aspp.convs.0'
    return f'{module}.{place - 3 if plain else place}'


def _numbered(name: str, count: int) -> str:
  return f'{name}_{count}' if count else name


def _timm_block(number: int) -> str:
  for stage, (_, _, blocks, _) in enumerate(_STAGES):
    if number <= blocks:
      return f'blocks.{stage}.{number - 1}'
    number -= blocks
  raise AssertionError(number)


class ConvNorm(nn.Module):
  """A convolution, BatchNorm and ReLU; a separable one has them after each of its two halves."""

  features: int
  kernel: int
  separable: bool
  layers: Layers
  dilation: int = 1

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, C] to [B, H, W, features]."""
    layers, kernel, dilation = self.layers, self.kernel, self.dilation
    if self.separable:
      x = layers.depthwise('depthwise', padding=dilation, dilation=dilation)(x)
      x, kernel = nn.relu(layers.norm('depthwise_norm')(x)), 1
    x = layers.conv(self.features, kernel, 'conv', dilation=dilation)(x)
    return nn.relu(layers.norm('norm')(x))


def scaled(channels: int, width: float) -> int:
  """MobileNetV2's rule: the multiple of 8 nearest to `width channels`, not under 0.9 of it."""
  result = max(8, int(width * channels + 4) // 8 * 8)
  return result + 8 if result < 0.9 * width * channels else result


def resize(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Enlarges [B, h, w, C] bilinearly to the height and width of `shape`, [B, H, W, any]."""
  return jax.image.resize(x, (*x.shape[:1], *shape[1:3], x.shape[-1]), 'bilinear')


MODELS = {'deeplabv3plus': Family(DeepLabV3Plus)}
