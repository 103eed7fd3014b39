"""A small DenseNet.

References:
  Huang et al., Densely Connected Convolutional Networks, 2017: DenseNet-BC.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from know_jax.models.common import Classifier, Family, Layers
from know_jax.models.ops import max_pool

_BLOCKS = 3


class DenseNet(Classifier):
  """Three dense blocks with bottlenecks, and between them transitions that halve everything.

  The stem takes the image to a quarter of its side (convolution of stride 2, then pooling), where
  dense layers are cheap.

  Attributes:
    width: the growth rate, the channels that each layer adds; the stem has twice as many.
    layers_per_block: layers in each dense block.
  """

  width: int = 16
  layers_per_block: int = 3

  def feature_map(self, x: jax.Array, layers: Layers) -> jax.Array:
    """Images [B, H, W, C] to [B, h, w, F]."""
    x = layers.conv(2 * self.width, 3, 'stem', stride=2)(x)
    x = max_pool(nn.relu(layers.norm('stem_norm')(x)))
    for i in range(1, _BLOCKS + 1):
      for j in range(1, self.layers_per_block + 1):
        x = DenseLayer(growth=self.width, layers=layers, name=f'block{i}_layer{j}')(x)
      if i < _BLOCKS:
        x = Transition(layers=layers, name=f'transition{i}')(x)
    return nn.relu(layers.norm('norm')(x))


class DenseLayer(nn.Module):
  """BatchNorm, ReLU and convolution, 1x1 then 3x3; its output is appended to its input."""

  growth: int
  layers: Layers

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, C] to [B, H, W, C + growth]."""
    y = nn.relu(self.layers.norm('norm1')(x))
    y = self.layers.conv(4 * self.growth, 1, 'conv1')(y)
    y = nn.relu(self.layers.norm('norm2')(y))
    return jnp.concatenate([x, self.layers.conv(self.growth, 3, 'conv2')(y)], axis=-1)


class Transition(nn.Module):
  """BatchNorm, ReLU, a 1x1 convolution to half the channels, and 2x2 average pooling."""

  layers: Layers

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, C] to [B, H // 2, W // 2, C // 2]."""
    y = nn.relu(self.layers.norm('norm')(x))
    y = self.layers.conv(x.shape[-1] // 2, 1, 'conv')(y)
    # Images of 8 x 8 are down to one pixel at the last transition.
    return nn.avg_pool(y, (2, 2), strides=(2, 2)) if min(y.shape[1:3]) > 1 else y


MODELS = {'densenet': Family(DenseNet)}
