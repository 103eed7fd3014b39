"""A small ShuffleNetV2.

References:
  Ma et al., ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design, 2018.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from know_jax.models.common import Classifier, Family, Layers

_STAGES = 3


class ShuffleNetV2(Classifier):
  """Stem, three stages whose channels double, a 1x1 convolution, average pooling.

  Attributes:
    width: channels of the stem; the stages have 2, 4 and 8 times as many.
    units: units in each stage; the first halves the image.
  """

  width: int = 16
  units: int = 2

  def feature_map(self, x: jax.Array, layers: Layers) -> jax.Array:
    """Images [B, H, W, C] to [B, h, w, 16 width]."""
    x = layers.conv(self.width, 3, 'stem', stride=2)(x)
    x = nn.relu(layers.norm('stem_norm')(x))
    for i in range(1, _STAGES + 1):
      x = DownUnit(features=self.width * 2**i, layers=layers, name=f'stage{i}_unit1')(x)
      for j in range(2, self.units + 1):
        x = Unit(layers=layers, name=f'stage{i}_unit{j}')(x)
    x = layers.conv(self.width * 2 ** (_STAGES + 1), 1, 'last')(x)
    return nn.relu(layers.norm('last_norm')(x))


class Unit(nn.Module):
  """Half of the channels pass unchanged, half through 1x1, depthwise 3x3, 1x1; then a shuffle."""

  layers: Layers

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, C] to [B, H, W, C], C even."""
    left, right = jnp.split(x, 2, axis=-1)
    return shuffle(left, _branch(right, right.shape[-1], 1, self.layers))


class DownUnit(nn.Module):
  """Two branches of stride 2, each giving half of the channels; then a shuffle."""

  features: int
  layers: Layers

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, C] to [B, ceil(H / 2), ceil(W / 2), features], features even."""
    layers, half = self.layers, self.features // 2
    left = layers.norm('left_norm1')(layers.depthwise('left_depthwise', stride=2)(x))
    left = nn.relu(layers.norm('left_norm2')(layers.conv(half, 1, 'left_conv')(left)))
    return shuffle(left, _branch(x, half, 2, layers))


def _branch(x: jax.Array, features: int, stride: int, layers: Layers) -> jax.Array:
  x = nn.relu(layers.norm('norm1')(layers.conv(features, 1, 'conv1')(x)))
  x = layers.norm('norm2')(layers.depthwise('depthwise', stride=stride)(x))
  return nn.relu(layers.norm('norm3')(layers.conv(features, 1, 'conv2')(x)))


def shuffle(left: jax.Array, right: jax.Array) -> jax.Array:
  """Interleaves the channels of two [B, H, W, C]: left 0, right 0, left 1, ... [B, H, W, 2C]."""
  return jnp.stack([left, right], axis=-1).reshape(*left.shape[:-1], -1)


MODELS = {'shufflenetv2': Family(ShuffleNetV2)}
