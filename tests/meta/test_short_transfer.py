"""Short transfers: the search on a function with a known minimum, the rest on tiny real runs."""

import json

import numpy as np
import pytest
import references
import test_collect
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

import know_jax
from know_jax import forgetting, transfer
from know_jax.data.sources import load_dataset, mean_image
from know_jax.errors import UserError
from know_jax.meta import collect, short_transfer
from know_jax.meta.evaluation import Arm, predict_stage
from know_jax.predictors.parameters import load_known, read_card, save_known
from know_jax.runs.record import config_dict
from know_jax.seeds import named_key
from know_jax.training import loop
from know_jax.training.loop import Checkpoint, Recipe

THETA = references.random_conditioned_theta()


def tiny_config() -> ConfigDict:
  config = short_transfer.default_config()
  config.targets = {'digits': 'digits'}
  config.target_classes = 5
  config.labels_per_class, config.batch_size, config.epochs = 16, 40, 2
  config.test_examples = 50
  config.predictors, config.shrink = ('task_vector',), (0.2,)
  config.generations, config.pairs, config.runs_per_generation = 1, 1, 1
  config.validation_share = config.test_share = 0.34
  config.resamples = 100
  return config


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
  folder = tmp_path_factory.mktemp('collected')
  config = test_collect.tiny_config()
  config.runs = 3
  collect.run(config, folder)
  return folder


def test_the_search_finds_the_minimum_of_a_parabola():
  config = {
    **config_dict(short_transfer.default_config()),
    'generations': 60,
    'pairs': 8,
    'runs_per_generation': 3,
    'search_lr': 0.15,
  }
  wanted = np.array([1.0, -0.5, 0.0, 0.5, -1.0, 0.3])
  found, path = short_transfer.evolve(
    config, 5, lambda direction, run: 0.2 * ((direction - wanted) ** 2).sum() + run
  )
  np.testing.assert_allclose(found, wanted, atol=0.15)
  assert len(path) == 61 and path[0]['direction'] == [0.0] * 6
  again, _ = short_transfer.evolve(
    config, 5, lambda direction, run: 0.2 * ((direction - wanted) ** 2).sum() + run
  )
  np.testing.assert_array_equal(found, again)


def test_an_adjusted_known_steps_further_and_shrinks_more():
  rng = np.random.default_rng(0)
  stages = rng.normal(0, 0.1, (5, 6, 4)).cumsum(axis=0).astype(np.float32)
  history = [{'a': {'kernel': stage}} for stage in stages]
  theta = {kind: {**params, 'decay': np.float32(0)} for kind, params in THETA.items()}
  newest = stages[-1].astype(np.float64)

  def moved(direction):
    found = know_jax.predict(history, theta=short_transfer.adjusted(theta, np.array(direction)))
    return np.asarray(found['a']['kernel'], np.float64) - newest

  step = moved([0.0] * 6)
  np.testing.assert_allclose(moved([0, 2, 0, 0, 0, 0]), np.e * step, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(moved([1, 0, 1, 1, 0, 1]), step, rtol=1e-4, atol=1e-6)
  shrunk = moved([0, 0, 0, 0, 1, 0])
  np.testing.assert_allclose(shrunk, step - 0.1 * newest, rtol=1e-4, atol=1e-6)


def test_a_short_transfer_is_the_training_it_says(dataset):
  config = config_dict(tiny_config())
  source = next(collect.read_runs(dataset))
  arm = Arm('shrink', 'shrink', {'c': 0.2})
  found = short_transfer.transfer_one(config, source, arm)
  # By hand: the predicted weights with a fresh head for five classes, two epochs of two steps.
  classes = tuple(range(5))
  train, test = (load_dataset('digits', split, classes=classes) for split in ('train', 'test'))
  mean = mean_image(train.images)
  model = forgetting.model_of(source.about['config'], 5)
  fresh = loop.init_variables(model, named_key(source.number, 'head'), train.images.shape[1:])
  weights = predict_stage(source, arm, start=2)
  variables = unflatten_dict(weights, sep='/')
  for path, leaf in weights.items():
    np.testing.assert_allclose(leaf, 0.8 * source.weights[path][6], rtol=1e-5, err_msg=path)
  state = loop.fit(
    model,
    Checkpoint(loop.create_state(transfer.with_head(variables, fresh), Recipe())),
    loop.put_data(train.images, train.labels, mean),
    transfer.labelled_subset(train.labels, 16, source.number),
    recipe=Recipe(),
    epochs=2,
    batch_size=40,
    lr=1e-3,
    schedule='cosine',
    key=named_key(source.number, 'train'),
  )
  wanted = loop.evaluate(
    model, state.variables, loop.put_data(test.images[:50], test.labels[:50], mean)
  )
  assert found == wanted


def test_the_whole_shrunk_runs_on_and_keeps_what_it_says(dataset, tmp_path):
  save_known(tmp_path / 'k.safetensors', THETA, {'what': 'a test'})
  workdir = tmp_path / 'w'
  text = short_transfer.run(tiny_config(), dataset, tmp_path / 'k.safetensors', workdir)
  for arm in ('persistence', 'known', 'known_transfer', 'task_vector', 'shrink 0.2'):
    assert f'| `{arm}` |' in text
  assert '| `persistence` | 1.000 [1.000, 1.000] | +0.00' in text
  lines = (workdir / 'transfers.jsonl').read_text().splitlines()
  # One pair and naive in the search; five arms in the scoring, of which one run is another.
  assert len({json.loads(line)['key'] for line in lines}) == len(lines) == 3 + 5
  assert load_known(workdir / 'known_transfer.safetensors').keys() == THETA.keys()
  card = read_card(workdir / 'known_transfer.safetensors')
  assert len(card['tuned_for_transfer']['path']) == 2 and card['what'] == 'a test'
  assert (workdir / 'gains.png').read_bytes().startswith(b'\x89PNG')
  # Killed in the middle of a line, and run on: the same report, and only what was lost is redone.
  (workdir / 'transfers.jsonl').write_text('\n'.join(lines[:4]) + '\n' + lines[4][:20])
  assert short_transfer.run(tiny_config(), dataset, tmp_path / 'k.safetensors', workdir) == text
  assert (workdir / 'transfers.jsonl').read_text().splitlines() == lines


def test_gains_are_paired_differences_to_the_newest_weights():
  rows = [
    {'run': run, 'arm': arm, 'error': {'overall': 1.0 + run}, 'loss': loss, 'accuracy': accuracy}
    for run, arm, loss, accuracy in [
      (0, 'persistence', 1.0, 0.5),
      (1, 'persistence', 2.0, 0.2),
      (1, 'b', 1.5, 0.3),
      (0, 'b', 0.9, 0.7),
    ]
  ]
  naive, b = short_transfer.gains(rows, resamples=200)
  assert naive['accuracy_gain'] == naive['loss_gain'] == 0
  np.testing.assert_allclose(b['accuracy_gain'], 15.0)
  np.testing.assert_allclose(b['loss_gain'], -0.3)
  np.testing.assert_allclose((b['accuracy_gain_low'], b['accuracy_gain_high']), (10, 20))
  assert b['error'] == 1.5


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'epochs': 0}, 'epochs is 0'),
    ({'sigma': 0.0}, r'sigma is 0\.0'),
    ({'predictors': ('averag',)}, "Did you mean 'average'"),
    ({'pairs': 0}, 'pairs is 0'),
    ({'resamples': 0}, 'resamples is 0'),
    ({'shrink': (0.2, 0.2)}, r"the arm 'shrink 0\.2' is there 2 times"),
    ({'test_share': 0.7}, r'validation_share and test_share are 0\.34 and 0\.7'),
    ({'batch_size': 800}, 'the labelled subset has 80 examples'),
    ({'targets': {'mnist': 'digits'}}, r"no train run is on a data set in targets, \['mnist'\]"),
  ],
)
def test_bad_settings_are_named_before_anything_is_written(dataset, tmp_path, change, message):
  save_known(tmp_path / 'k.safetensors', THETA, {})
  config = tiny_config()
  with config.unlocked():
    for name, value in change.items():
      config[name] = value if not isinstance(value, dict) else ConfigDict(value)
  with pytest.raises(UserError, match=message):
    short_transfer.run(config, dataset, tmp_path / 'k.safetensors', tmp_path / 'w')
  assert not (tmp_path / 'w').exists()


def test_the_paper_known_cannot_be_tuned_so(dataset, tmp_path, known_file):
  with pytest.raises(UserError, match='is of the paper; wanted KNOWN conditioned on the leaf'):
    short_transfer.run(tiny_config(), dataset, known_file, tmp_path / 'w')


def test_a_known_trained_on_what_validates_it_is_refused(dataset, tmp_path):
  card = {'training': {'runs': {'train': [0, 1, 2], 'validation': [], 'test': []}}}
  save_known(tmp_path / 'k.safetensors', THETA, card)
  with pytest.raises(UserError, match=r'k\.safetensors was trained on run \d, which is to'):
    short_transfer.run(tiny_config(), dataset, tmp_path / 'k.safetensors', tmp_path / 'w')
  assert not (tmp_path / 'w').exists()


def test_a_transfer_that_diverges_is_a_bad_one(dataset):
  config = config_dict(tiny_config()) | {'lr': 1e30}
  source = next(collect.read_runs(dataset))
  found = short_transfer.transfer_one(config, source, Arm('persistence', 'persistence'))
  assert found == {'loss': np.inf, 'accuracy': 0.2}
