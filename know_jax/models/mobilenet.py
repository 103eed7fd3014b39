"""A small MobileNetV2.

References:
  Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, 2018.
"""

import flax.linen as nn
import jax

from know_jax.models.common import Classifier, Family, Layers, Padding

_STAGES = 3


class MobileNetV2(Classifier):
  """Stem, three stages of inverted residuals whose channels double, a 1x1 convolution, pooling.

  Attributes:
    width: channels of the stem; the stages have 2, 4 and 8 times as many.
    blocks: inverted residuals in each stage but the first, which has one, as in the publication.
      The first of a stage halves the image.
  """

  width: int = 8
  blocks: int = 2

  def feature_map(self, x: jax.Array, layers: Layers) -> jax.Array:
    """Images [B, H, W, C] to [B, h, w, 32 width]."""
    x = layers.conv(self.width, 3, 'stem', stride=2)(x)
    x = nn.relu6(layers.norm('stem_norm')(x))
    for i in range(1, _STAGES + 1):
      for j in range(1, (1 if i == 1 else self.blocks) + 1):
        x = InvertedResidual(
          features=self.width * 2**i,
          stride=2 if j == 1 else 1,
          layers=layers,
          name=f'stage{i}_block{j}',
        )(x)
    x = layers.conv(self.width * 2 ** (_STAGES + 2), 1, 'last')(x)
    return nn.relu6(layers.norm('last_norm')(x))


class InvertedResidual(nn.Module):
  """1x1 up to more channels, depthwise 3x3, and 1x1 down again without activation.

  Attributes:
    features: channels that come out.
    stride: of the depthwise convolution.
    layers: how layers are made.
    expansion: how many times the channels there are in between; 1: no 1x1 convolution upwards.
    padding: of the depthwise convolution, as its dilation is.
  """

  features: int
  stride: int
  layers: Layers
  expansion: int = 6
  padding: Padding = 'SAME'
  dilation: int = 1

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, C] to [B, ceil(H / stride), ceil(W / stride), features]."""
    layers = self.layers
    y = x
    if self.expansion > 1:
      y = layers.conv(self.expansion * x.shape[-1], 1, 'expand')(y)
      y = nn.relu6(layers.norm('expand_norm')(y))
    y = layers.depthwise(
      'depthwise', stride=self.stride, padding=self.padding, dilation=self.dilation
    )(y)
    y = nn.relu6(layers.norm('depthwise_norm')(y))
    y = layers.norm('project_norm')(layers.conv(self.features, 1, 'project')(y))
    return x + y if self.stride == 1 and x.shape == y.shape else y


MODELS = {'mobilenetv2': Family(MobileNetV2)}
