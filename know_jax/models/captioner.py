"""Captions of images: a transformer decoder over the feature map of any family.

References:
  The decoder is that of TensorFlow's tutorial "Image captioning with visual attention", with its
  names, post-normalisation and epsilon; Vaswani et al., Attention Is All You Need, 2017.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from know_jax.errors import UserError
from know_jax.models.common import Classifier, Layers, glorot_uniform

PADDING = 0
"""The token that fills captions up."""

_EPSILON = 1e-3
_uniform = nn.initializers.uniform(0.1)


def _embedding(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
  """Keras' default: uniform between -0.05 and 0.05."""
  return _uniform(key, shape, dtype) - 0.05


class CaptionDecoder(nn.Module):
  """Tokens so far and an image's features to logits of the next token.

  Attributes:
    vocabulary: number of tokens.
    units: size of a token, and of each attention head.
    heads: attention heads.
    layers: blocks.
    max_length: the most tokens of a caption that are fed in.
    dropout: share of attention weights and of the MLP's outputs dropped in training.
    log_prior: for each token what is added to its logit, such as the log of its frequency; -1e9
      bans a token. None: nothing.
    dtype: the dtype of the computation; parameters are float32.
  """

  vocabulary: int
  units: int = 256
  heads: int = 2
  layers: int = 2
  max_length: int = 50
  dropout: float = 0.5
  log_prior: tuple[float, ...] | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, features: jax.Array, tokens: jax.Array, *, train: bool) -> jax.Array:
    """[B, N, F] features and int [B, T] tokens to float32 logits [B, T, vocabulary].

    With `train` units are dropped, if `rngs` has a key named 'dropout'.

    Raises:
      UserError: there are more tokens than `max_length`, or the prior is not one for each token.
    """
    length, units = tokens.shape[1], self.units
    if length > self.max_length:
      raise UserError(
        f'captions have {length} tokens; expected at most max_length, {self.max_length}.'
      )
    if self.log_prior is not None and len(self.log_prior) != self.vocabulary:
      raise UserError(
        f'log_prior has {len(self.log_prior)} values; expected one for each of the '
        f'{self.vocabulary} tokens.'
      )
    table = self.param('token_embedding', _embedding, (self.vocabulary, units), jnp.float32)
    places = self.param('position_embedding', _embedding, (self.max_length, units), jnp.float32)
    x = (table[tokens] + places[:length]).astype(self.dtype)
    features = features.astype(self.dtype)
    layers = Layers(self.dtype, None, train, train and self.has_rng('dropout'))
    for i in range(1, self.layers + 1):
      x = DecoderBlock(self.heads, self.dropout, layers, name=f'block{i}')(x, features)
    logits = layers.dense(self.vocabulary, 'output')(x).astype(jnp.float32)
    return logits if self.log_prior is None else logits + np.asarray(self.log_prior, np.float32)


class DecoderBlock(nn.Module):
  """Self-attention, attention to the image and an MLP, each added and then normalised."""

  heads: int
  dropout: float
  layers: Layers

  @nn.compact
  def __call__(self, x: jax.Array, features: jax.Array) -> jax.Array:
    """[B, T, U] tokens and [B, N, F] features to [B, T, U]."""
    units, layers = x.shape[-1], self.layers

    def attend(x: jax.Array, to: jax.Array, name: str, mask: jax.Array | None) -> jax.Array:
      return nn.MultiHeadDotProductAttention(
        self.heads,
        qkv_features=self.heads * units,
        out_features=units,
        dropout_rate=self.dropout,
        broadcast_dropout=False,
        deterministic=not layers.random,
        kernel_init=glorot_uniform,
        dtype=layers.dtype,
        name=name,
      )(x, to, mask=mask)

    def norm(x: jax.Array, name: str) -> jax.Array:
      return layers.layer_norm(name, _EPSILON)(x)

    # Captions are padded at their end: what counts never attends to padding, and no other mask is
    # needed.
    x = norm(x + attend(x, x, 'self_attention', nn.make_causal_mask(x[..., 0])), 'norm1')
    x = norm(x + attend(x, features, 'cross_attention', None), 'norm2')
    y = layers.dense(units, 'dense2')(nn.relu(layers.dense(2 * units, 'dense1')(x)))
    return norm(x + layers.dropout(self.dropout)(y), 'norm3')


class Captioner(nn.Module):
  """An image's captions: the feature map of a classifier, and a decoder that attends to it.

  Attributes:
    classifier: any family of `MODELS`; its head is not made, its other leaves have the names that
      they have in a classifier, below 'encoder'.
    decoder: gives the next token.
    axis_name: as in `Classifier`, in place of the classifier's own.
  """

  classifier: Classifier
  decoder: CaptionDecoder
  axis_name: str | None = None

  def setup(self) -> None:
    """Makes the encoder."""
    self.encoder = self.classifier.clone(parent=self, name=None, axis_name=self.axis_name)

  def __call__(self, images: jax.Array, tokens: jax.Array, *, train: bool) -> jax.Array:
    """Images [B, H, W, C] and int tokens [B, T] to the logits of the tokens after each [B, T, V].

    `train`: as in `Classifier`.
    """
    return self.decoder(self.encode(images, train=train), tokens, train=train)

  def encode(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Images [B, H, W, C] to features [B, h w, F]."""
    x = self.encoder(images, train=train, spatial=True)
    return x.reshape(x.shape[0], -1, x.shape[-1])

  def decode(self, features: jax.Array, tokens: jax.Array) -> jax.Array:
    """Features [B, N, F] and int tokens [B, T] to logits [B, T, V], as in evaluation."""
    return self.decoder(features, tokens, train=False)


def search(
  decode: Callable[[jax.Array, jax.Array], jax.Array],
  features: jax.Array,
  *,
  start: int,
  end: int,
  length: int,
  beams: int = 1,
) -> np.ndarray:
  """The likeliest captions, by beam search; one beam: greedily.

  Of each image the `beams` likeliest beginnings are kept, word for word; of those that reached
  `end` or the full length the one is given whose tokens have the largest mean log-probability
  (which does not favour short captions, as their sum would).

  Args:
    decode: (features [B, N, F], tokens [B, T]) -> logits [B, T, V]; compile it for speed.
    features: of the images, [B, N, F].
    start: the token that a caption begins with.
    end: the token that ends it.
    length: the most tokens, start and end included.
    beams: how many beginnings are kept.

  Returns:
    Tokens, int32 [B, length]; padding after `end`.
  """
  batch = features.shape[0]
  features = jnp.repeat(features, beams, axis=0)
  tokens = np.full((batch, beams, length), PADDING, np.int32)
  tokens[:, :, 0] = start
  # At first all beams are the same: only one of them may go further.
  scores = np.where(np.arange(beams) == 0, 0.0, -np.inf) * np.ones((batch, 1))
  for t in range(1, length):
    logits = decode(features, jnp.asarray(tokens.reshape(batch * beams, length)))[:, t - 1]
    steps = np.asarray(jax.nn.log_softmax(logits), np.float64).reshape(batch, beams, -1)
    done = (tokens == end).any(-1)
    # A finished caption continues with padding, at no cost.
    only_padding = np.where(np.arange(steps.shape[-1]) == PADDING, 0.0, -np.inf)
    total = scores[..., None] + np.where(done[..., None], only_padding, steps)
    flat = total.reshape(batch, -1)
    best = np.argsort(-flat, axis=1, kind='stable')[:, :beams]
    scores = np.take_along_axis(flat, best, axis=1)
    beam, token = np.divmod(best, steps.shape[-1])
    tokens = np.take_along_axis(tokens, beam[..., None], axis=1)
    tokens[:, :, t] = token
  counts = np.maximum((tokens[:, :, 1:] != PADDING).sum(-1), 1)
  return tokens[np.arange(batch), (scores / counts).argmax(1)]
