"""Residual networks of basic blocks: the paper's ResNet18 for 32 x 32 images and a small one.

References:
  He et al., Deep Residual Learning for Image Recognition, 2016. ResNet18's stem, strides and
  biases are those of the paper's transfer experiments.
"""

import flax.linen as nn
import jax

from know_jax.models.common import Classifier, Family, Layers


class ResNet(Classifier):
  """Stem, stages of basic blocks whose channels double from stage to stage, average pooling.

  Attributes:
    width: channels of the stem and the first stage.
    strides: the stride of each stage's first block; one entry a stage.
    blocks: basic blocks in each stage.
    stem_kernel: kernel size of the stem.
    stem_stride: stride of the stem.
    conv_bias: whether convolutions have a bias, though BatchNorm follows each.
  """

  width: int = 16
  strides: tuple[int, ...] = (1, 2, 2)
  blocks: int = 1
  stem_kernel: int = 3
  stem_stride: int = 2
  conv_bias: bool = False

  def feature_map(self, x: jax.Array, layers: Layers) -> jax.Array:
    """Images [B, H, W, C] to [B, h, w, width 2^(stages - 1)]."""
    stem = layers.conv(
      self.width, self.stem_kernel, 'stem', stride=self.stem_stride, bias=self.conv_bias
    )
    x = nn.relu(layers.norm('stem_norm')(stem(x)))
    for i, stride in enumerate(self.strides):
      for j in range(self.blocks):
        x = BasicBlock(
          features=self.width * 2**i,
          stride=stride if j == 0 else 1,
          conv_bias=self.conv_bias,
          layers=layers,
          name=f'stage{i + 1}_block{j + 1}',
        )(x)
    return x


class BasicBlock(nn.Module):
  """Two 3x3 convolutions with BatchNorm, added to the input, which is projected where it must."""

  features: int
  stride: int
  conv_bias: bool
  layers: Layers

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, C] to [B, ceil(H / stride), ceil(W / stride), features]."""
    layers = self.layers
    y = layers.conv(self.features, 3, 'conv1', stride=self.stride, bias=self.conv_bias)(x)
    y = nn.relu(layers.norm('norm1')(y))
    y = layers.conv(self.features, 3, 'conv2', bias=self.conv_bias)(y)
    y = layers.norm('norm2')(y)
    if x.shape != y.shape:
      x = layers.conv(self.features, 1, 'shortcut', stride=self.stride, bias=self.conv_bias)(x)
      x = layers.norm('shortcut_norm')(x)
    return nn.relu(x + y)


MODELS = {
  # For 32 x 32 images, as in the paper's transfer experiments: no pooling after the stem.
  'resnet18': Family(
    ResNet,
    {
      'width': 64,
      'strides': (1, 1, 2, 2),
      'blocks': 2,
      'stem_kernel': 7,
      'stem_stride': 1,
      'conv_bias': True,
    },
  ),
  'resnet_small': Family(
    ResNet, {'strides': (1, 2, 2), 'stem_kernel': 3, 'stem_stride': 2, 'conv_bias': False}
  ),
}
