"""The caption decoder against Keras' layers, the search against all captions there are."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from flax import traverse_util

from know_jax.errors import UserError
from know_jax.models import build_model
from know_jax.models.captioner import CaptionDecoder, Captioner, search
from know_jax.trees import leaf_paths, num_weights


def decoder(**options):
  return CaptionDecoder(**{'vocabulary': 7, 'units': 4, 'layers': 1, 'max_length': 6, **options})


def decoder_shapes(module, features):
  x, tokens = jax.ShapeDtypeStruct((2, 3, features), jnp.float32), np.zeros((2, 5), np.int32)
  return jax.eval_shape(lambda x: module.init(parity.KEY, x, tokens, train=False), x)


@pytest.mark.parametrize(
  ('vocabulary', 'units', 'features', 'count'),
  [(5000, 256, 256, 5_211_016), (5000, 256, 512, 5_735_304), (1000, 64, 128, 331_752)],
)
def test_the_decoder_has_the_tutorials_parameter_count(vocabulary, units, features, count):
  module = CaptionDecoder(vocabulary=vocabulary, units=units)
  assert num_weights(decoder_shapes(module, features)) == count


def test_outputs_and_scores_are_keras():
  arrays, about = parity.load('caption_decoder')
  config = about['meta']['config']
  assert config.pop('mlp_ratio') == 2
  features = config.pop('feature_dim')
  module = CaptionDecoder(**config, log_prior=tuple(arrays['output_log_prior'].tolist()))
  params = traverse_util.unflatten_dict(parity.tensors(arrays), sep='/')
  assert num_weights(params) == about['meta']['parameters']
  made = decoder_shapes(module, features)['params']
  assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, params)
  x = arrays['input/features'].reshape(3, -1, features)
  tokens = arrays['input/tokens']
  logits, state = parity.quickly(
    lambda p: module.apply({'params': p}, x, tokens, train=False, capture_intermediates=True)
  )(params)
  valid = arrays['valid'] > 0
  for name in ('block1', 'block2'):
    parity.check(state['intermediates'][name]['__call__'][0][valid], arrays[name][valid])
  allowed = arrays['output_log_prior'] > -1e8
  parity.check(logits[valid][:, allowed], arrays['logits'][valid][:, allowed])
  assert (np.asarray(logits)[..., ~allowed] < -1e8).all()


def test_nothing_later_reaches_a_token_and_dropout_needs_a_key():
  module = decoder(dropout=0.5)
  rng = np.random.default_rng(0)
  x, tokens = rng.normal(size=(2, 3, 5)).astype(np.float32), rng.integers(1, 7, (2, 6))
  params = parity.quickly(lambda: module.init(parity.KEY, x, tokens, train=False))()
  other = tokens.copy()
  other[:, 3:] = 1 + other[:, 3:] % 6

  @parity.quickly
  def outputs(tokens):
    drop = {'dropout': parity.KEY}
    calls = ((False, None), (True, None), (True, drop))
    return [module.apply(params, x, tokens, train=train, rngs=rngs) for train, rngs in calls]

  (plain, without_key, dropped), (changed, *_) = outputs(tokens), outputs(other)
  np.testing.assert_array_equal(plain, without_key)
  assert np.abs(dropped - plain).max() > 1e-3
  np.testing.assert_allclose(plain[:, :3], changed[:, :3], atol=1e-6)
  assert np.abs(plain[:, 3:] - changed[:, 3:]).max() > 1e-3


@pytest.mark.parametrize('name', ['resnet_small', 'vit', 'cnn'])
def test_any_family_is_an_encoder_with_its_own_names(name):
  encoder = build_model(name, num_classes=3, width=8)
  model = Captioner(encoder, decoder(), axis_name='batch')
  x = jax.ShapeDtypeStruct((2, 16, 24, 3), jnp.float32)
  tokens = np.zeros((2, 5), np.int32)
  made = jax.eval_shape(lambda x: model.init(parity.KEY, x, tokens, train=False), x)
  alone = jax.eval_shape(lambda x: encoder.init(parity.KEY, x, train=False), x)
  above = ('params/head/', 'params/dense/')
  assert {path.replace('/encoder/', '/') for path in leaf_paths(made) if '/encoder/' in path} == {
    path for path in leaf_paths(alone) if not path.startswith(above)
  }
  out, features = jax.eval_shape(
    lambda v, x: (
      model.apply(v, x, tokens, train=False),
      model.apply(v, x, method='encode'),
    ),
    made,
    x,
  )
  assert (out.shape, out.dtype) == ((2, 5, 7), jnp.float32)
  kernel = made['params']['decoder']['block1']['cross_attention']['key']['kernel']
  assert features.shape[0] == 2 and kernel.shape == (features.shape[-1], 2, 4)


@pytest.mark.parametrize('seed', range(4))
def test_a_wide_search_finds_the_best_of_all_captions(seed):
  vocabulary, length, start, end = 5, 5, 3, 4
  table = np.random.default_rng(seed).normal(size=(2, length, vocabulary, vocabulary)) * 2
  table[..., [0, 3]] = -1e9  # Neither padding nor a second start.

  def decode(features, tokens):
    """The next token by the image, the place and the token before."""
    return table[np.asarray(features)[:, 0, 0].astype(int)][
      np.arange(len(tokens))[:, None], np.arange(length), np.asarray(tokens)
    ]

  def log_probability(image, caption):
    total = 0
    for t in range(1, len(caption)):
      row = table[image, t - 1, caption[t - 1]]
      total += row[caption[t]] - np.log(np.exp(row).sum())
    return total / (len(caption) - 1)

  every = [
    (start, *words, end) for n in range(length - 1) for words in itertools.product((1, 2), repeat=n)
  ]
  every = [c for c in every if len(c) <= length]
  every += [(start, *words) for words in itertools.product((1, 2), repeat=length - 1)]
  images = np.arange(2.0).reshape(2, 1, 1)
  result = search(decode, images, start=start, end=end, length=length, beams=64)
  greedy = search(decode, images, start=start, end=end, length=length)
  for image in range(2):
    best = max(every, key=lambda c: log_probability(image, c))
    assert result[image].tolist() == [*best, *[0] * (length - len(best))]
    token, expected = start, [start]
    while token != end and len(expected) < length:
      token = int(table[image, len(expected) - 1, token].argmax())
      expected.append(token)
    assert greedy[image].tolist() == [*expected, *[0] * (length - len(expected))]


def test_captions_that_are_too_long_and_priors_that_do_not_fit_are_refused():
  with pytest.raises(UserError, match='captions have 5 tokens; expected at most max_length, 4'):
    decoder_shapes(decoder(max_length=4), 3)
  with pytest.raises(UserError, match='log_prior has 2 values; expected one for each of the 7'):
    decoder_shapes(decoder(log_prior=(0.0, 1.0)), 3)
