"""A plain convolutional network."""

import flax.linen as nn
import jax

from know_jax.models.common import Classifier, Family, Layers
from know_jax.models.ops import max_pool


class CNN(Classifier):
  """Convolutions 3x3 with ReLU and 2x2 max-pooling, one hidden Dense, and the head.

  The channels are `width` in the first convolution and `2 width` in the others, the hidden Dense
  has `8 width` units. Without BatchNorm every layer has a bias; with it the convolutions have
  none, as BatchNorm takes it away again.

  Attributes:
    width: channels of the first convolution.
    convs: number of convolutions; pooling follows each, while there is something left to pool.
    batch_norm: whether BatchNorm stands between each convolution and its ReLU.
  """

  width: int = 24
  convs: int = 3
  batch_norm: bool = False

  def feature_map(self, x: jax.Array, layers: Layers) -> jax.Array:
    """Images [B, H, W, C] to [B, h, w, C]."""
    for i in range(1, self.convs + 1):
      channels = self.width if i == 1 else 2 * self.width
      x = layers.conv(channels, 3, f'conv{i}', bias=not self.batch_norm)(x)
      if self.batch_norm:
        x = layers.norm(f'norm{i}')(x)
      x = nn.relu(x)
      if min(x.shape[1:3]) > 1:
        x = max_pool(x)
    return x

  def features(self, x: jax.Array, layers: Layers) -> jax.Array:
    """Images [B, H, W, C] to [B, 8 width]."""
    x = self.feature_map(x, layers).reshape(x.shape[0], -1)
    return nn.relu(layers.dense(8 * self.width, 'dense')(x))


MODELS = {
  'cnn': Family(CNN, {'batch_norm': False}),
  'cnn_bn': Family(CNN, {'batch_norm': True}),
}
