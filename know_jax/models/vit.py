"""A small vision transformer.

References:
  Dosovitskiy et al., An Image is Worth 16x16 Words, 2021; average pooling in place of a class
  token as in Beyer et al., Better plain ViT baselines for ImageNet-1k, 2022.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from know_jax.models.common import Classifier, Family, Layers, glorot_uniform

HEADS = 4
"""Attention heads in every block; `width` must be a multiple of it."""


class ViT(Classifier):
  """Patch embedding, learned positions, pre-norm transformer blocks, the mean over the tokens.

  Attributes:
    width: size of a token; the hidden layer of each block's MLP has twice as many units.
    depth: transformer blocks.
    grid: patches along the longer side of the image, so that the cost is that of `grid^2` tokens
      at any size. Patches are square; images are padded with zeros to a multiple of them.
  """

  width: int = 64
  depth: int = 3
  grid: int = 4

  def feature_map(self, x: jax.Array, layers: Layers) -> jax.Array:
    """Images [B, H, W, C] to [B, h, w, width]."""
    patch = -(-max(x.shape[1:3]) // self.grid)
    x = layers.conv(self.width, patch, 'embed', stride=patch, bias=True)(x)
    shape = x.shape
    x = x.reshape(x.shape[0], -1, self.width)
    x = Position(name='position')(x)
    for i in range(1, self.depth + 1):
      x = Block(layers=layers, name=f'block{i}')(x)
    return layers.layer_norm('norm')(x).reshape(shape)


class Position(nn.Module):
  """Adds a learned vector to each token."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, N, D] to [B, N, D]."""
    # Named bias because it is one: a learned offset, added to a layer's output whatever the input.
    # So it has a leaf kind and is predicted as the other biases are.
    bias = self.param('bias', nn.initializers.normal(0.02), x.shape[1:], jnp.float32)
    return x + bias.astype(x.dtype)


class Block(nn.Module):
  """Self-attention and an MLP, each on its normalised input and added to it."""

  layers: Layers

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, N, D] to [B, N, D]."""
    layers, width = self.layers, x.shape[-1]
    y = layers.layer_norm('norm1')(x)
    x += nn.MultiHeadDotProductAttention(
      num_heads=HEADS, dtype=layers.dtype, kernel_init=glorot_uniform, name='attention'
    )(y)
    y = layers.layer_norm('norm2')(x)
    y = nn.gelu(layers.dense(2 * width, 'dense1')(y))
    return x + layers.dense(width, 'dense2')(y)


MODELS = {'vit': Family(ViT, width_multiple=HEADS)}
