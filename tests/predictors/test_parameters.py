import json
import shutil

import h5py
import jax
import numpy as np
import pytest
import references
import safetensors.numpy

from know_jax import PREDICTORS, kinds, load_known, trees
from know_jax.errors import UserError
from know_jax.predictors import known, known_leaf, parameters

CARD = {'data': 'none', 'seeds': [1, 2]}


@pytest.fixture(scope='module')
def theta():
  return references.random_theta()


@pytest.fixture
def saved(theta, tmp_path):
  """A good file, and a function that writes it again with tensors or metadata changed."""
  path = tmp_path / 'known.safetensors'
  parameters.save_known(path, theta, CARD)
  good = safetensors.numpy.load_file(path)

  def rewrite(metadata=None, **changes):
    tensors = {name: leaf for name, leaf in (good | changes).items() if leaf is not None}
    if metadata is None:
      metadata = {'format': parameters.FORMAT}
    safetensors.numpy.save_file(tensors, path, metadata)
    return path

  return path, rewrite


def assert_same(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize('history_length', [5, 3])
def test_theta_and_card_come_back_as_they_were_saved(history_length, tmp_path):
  theta = references.random_theta(history_length)
  parameters.save_known(tmp_path / 'a.safetensors', theta, CARD)
  found = load_known(str(tmp_path / 'a.safetensors'))
  assert_same(found, theta)
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found))
  assert parameters.read_card(tmp_path / 'a.safetensors') == CARD


def test_equal_weights_are_equal_files(tmp_path):
  theta = references.random_theta()
  for name, given in (('a', theta), ('b', dict(reversed(theta.items())))):
    parameters.save_known(tmp_path / name, given, CARD)
  data = (tmp_path / 'a').read_bytes()
  assert (tmp_path / 'b').read_bytes() == data
  header = json.loads(data[8 : 8 + int.from_bytes(data[:8], 'little')])
  # The library would shuffle these from process to process.
  assert list(header['__metadata__']) == ['card', 'format', 'sha256']


def test_where_weights_cannot_be_written_it_says_so(tmp_path):
  theta = references.random_theta()
  with pytest.raises(UserError, match=r'cannot write .*/none/a: No such file or directory'):
    parameters.save_known(tmp_path / 'none' / 'a', theta, {})


def test_what_init_theta_makes_can_be_saved(tmp_path):
  theta = known.init_theta(jax.random.key(0))
  parameters.save_known(tmp_path / 'a.safetensors', theta, {})
  assert_same(load_known(tmp_path / 'a.safetensors'), theta)


def test_a_path_may_start_at_home(theta, tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  parameters.save_known(tmp_path / 'a.safetensors', theta, CARD)
  assert_same(load_known('~/a.safetensors'), theta)
  assert parameters.read_card('~/a.safetensors') == CARD


@pytest.fixture
def as_shipped(theta, tmp_path, monkeypatch):
  path = tmp_path / 'shipped.safetensors'
  parameters.save_known(path, theta, CARD)
  monkeypatch.setitem(parameters.SHIPPED, 'known', path)
  parameters._shipped.cache_clear()
  yield path
  parameters._shipped.cache_clear()


def test_the_shipped_weights_are_read_once_and_nobody_can_spoil_them(as_shipped, theta):
  first = load_known()
  as_shipped.unlink()
  first['conv']['residual']['bias'] = None
  with pytest.raises(ValueError, match='read-only'):
    first['bias']['residual']['bias'][0] = 1
  del first['fc']
  assert_same(load_known(), theta)


def test_the_shipped_weights_may_be_loaded_first_by_a_traced_function(as_shipped, theta):
  found = jax.jit(lambda: load_known()['fc']['residual']['bias'])()
  np.testing.assert_array_equal(found, theta['fc']['residual']['bias'])
  assert_same(load_known(), theta)


@pytest.mark.parametrize('history_length', [5, 3])
def test_theta_conditioned_on_the_leaf_comes_back_too(history_length, tmp_path):
  theta = references.random_conditioned_theta(history_length)
  mixed = theta | {'fc': references.random_theta()['fc']}
  for saved in (theta, mixed):
    parameters.save_known(tmp_path / 'a.safetensors', saved, CARD)
    assert_same(load_known(tmp_path / 'a.safetensors'), saved)


@pytest.mark.parametrize(
  ('name', 'init'), [('known_leaf', known_leaf.init_theta), ('known', known.init_scaled_theta)]
)
def test_the_package_ships_weights_with_a_card(name, init):
  theta = load_known(shipped=name)
  expected = jax.eval_shape(init, jax.random.key(0))
  trees.check_same(expected, theta, names=('KNOWN', 'the shipped weights'))
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(theta))
  card = parameters.read_card(parameters.SHIPPED[name])
  for part in ('meta_dataset', 'training'):
    assert isinstance(card[part]['config']['seed'], int)
    assert len(card[part]['environment']['commit']) >= 40
  for kind in kinds.KINDS:
    assert 0 < card['validation_error'][kind] < np.inf


def test_what_is_shipped_is_small_and_has_names():
  files = [*parameters.SHIPPED.values(), parameters.LEAST_SQUARES]
  assert sum(path.stat().st_size for path in files) < 2**20
  with pytest.raises(UserError, match=r"shipped KNOWN 'knowns'\. Did you mean 'known'"):
    load_known(shipped='knowns')


def test_the_shipped_coefficients_of_least_squares_are_those_of_the_default():
  found = parameters.least_squares_coefficients()
  assert set(found) == set(kinds.KINDS)
  assert all(len(row) == 5 and np.isfinite(row).all() for row in found.values())
  rng = np.random.default_rng(0)
  stages = rng.normal(size=(5, 4, 3)).cumsum(axis=0).astype(np.float32)
  history = [{'a': {'kernel': stage}} for stage in stages]
  default = PREDICTORS['least_squares'](history)['a']['kernel']
  expected = references.least_squares(stages.astype(np.float64), 1, coefficients=found['fc'])
  np.testing.assert_allclose(default, expected, rtol=1e-5, atol=1e-6)


def fails(path, message):
  with pytest.raises(UserError, match=message) as error:
    load_known(path)
  assert str(path) in str(error.value)


def test_a_missing_file_is_an_error_that_says_what_is_wanted(tmp_path):
  fails(
    tmp_path / 'nothing.safetensors', r'no such file; expected .* or a folder with KNOWN_Conv\.h5'
  )


@pytest.mark.parametrize('size', [0, 4, 200, 20_000])
def test_a_truncated_file_is_an_error(size, saved):
  path, _ = saved
  data = path.read_bytes()
  assert size < len(data)
  path.write_bytes(data[:size])
  fails(path, 'not a readable safetensors file')


def test_a_file_of_another_sort_is_an_error(saved):
  path, rewrite = saved
  rewrite({'format': 'pt'})
  fails(path, r"format 'pt' in the header; expected 'know_jax\.known/1'")
  safetensors.numpy.save_file({'a': np.zeros(3, np.float32)}, path)
  fails(path, "format None in the header; expected 'know_jax.known/1'")


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'fc/residual/bias': None}, "lacks tensor 'fc/residual/bias'"),
    ({'conv/weights/embed/kernel': None}, "lacks tensor 'conv/weights/embed/kernel'"),
    ({'fc/extra': np.zeros(1, np.float32)}, "has tensor 'fc/extra', which is no part of KNOWN"),
    (
      {'bias/weights/gate/kernel': np.zeros((64, 8), np.float32)},
      r"tensor 'bias/weights/gate/kernel' is float32\[64, 8\]; expected float32\[8, 64\]",
    ),
    (
      {'fc/weights/embed/kernel': np.zeros((4, 64), np.float32)},
      r"tensor 'fc/differences/embed/kernel' is float32\[4, 64\]; expected float32\[3, 64\]",
    ),
    (
      {'conv/weights/embed/kernel': np.zeros((), np.float32)},
      r"tensor 'conv/weights/embed/kernel' is float32\[\]; expected float32\[5, 64\]",
    ),
    (
      {'bias/residual/bias': np.zeros(1, np.float64)},
      r"tensor 'bias/residual/bias' is float64\[1\]; expected float32\[1\]",
    ),
    (
      {'bias/residual/bias': np.full(1, np.nan, np.float32)},
      "tensor 'bias/residual/bias' holds NaN or infinity",
    ),
    (
      {'fc/weights/embed/bias': np.full(64, np.inf, np.float32)},
      "tensor 'fc/weights/embed/bias' holds NaN or infinity",
    ),
  ],
)
def test_a_file_that_does_not_fit_is_an_error_that_names_the_tensor(changes, message, saved):
  _, rewrite = saved
  fails(rewrite(**changes), message)


def test_what_cannot_be_loaded_is_not_saved(theta, tmp_path):
  path = tmp_path / 'a.safetensors'
  with pytest.raises(UserError, match="lacks tensor 'bias/"):
    parameters.save_known(path, {'conv': theta['conv'], 'fc': theta['fc']}, CARD)
  assert not path.exists()


@pytest.fixture
def keras_folder(official, tmp_path):
  """A copy of the authors' files that a test may damage."""
  folder = tmp_path / 'keras'
  folder.mkdir()
  for file in official.glob('*.h5'):
    shutil.copy(file, folder)
  return folder


def test_the_authors_files_hold_the_weights_of_known(official):
  theta = load_known(official)
  expected = jax.eval_shape(known.init_theta, jax.random.key(0))
  trees.check_same(expected, theta, names=('KNOWN', "the authors' weights"))


def test_a_folder_without_the_authors_files_is_an_error(tmp_path):
  fails(
    tmp_path, r'KNOWN_Conv\.h5: no such file; the folder must hold KNOWN_Conv\.h5, KNOWN_FC\.h5'
  )


def test_one_missing_keras_file_is_named(keras_folder):
  (keras_folder / 'KNOWN_Bias.h5').unlink()
  fails(keras_folder, r'KNOWN_Bias\.h5: no such file')


@pytest.mark.parametrize('size', [0, 100, 3000])
def test_a_truncated_keras_file_is_named(size, keras_folder):
  path = keras_folder / 'KNOWN_FC.h5'
  path.write_bytes(path.read_bytes()[:size])
  fails(keras_folder, r'KNOWN_FC\.h5: not the Keras weights of KNOWN')


def test_a_keras_file_of_another_network_is_named(keras_folder):
  with h5py.File(keras_folder / 'KNOWN_FC.h5', 'w') as file:
    file['dense/dense/kernel:0'] = np.zeros((5, 64), np.float32)
  fails(keras_folder, r'KNOWN_FC\.h5: not the Keras weights of KNOWN')


def test_a_keras_file_of_another_width_is_an_error_that_names_the_tensor(keras_folder):
  with h5py.File(keras_folder / 'KNOWN_FC.h5', 'r+') as file:
    del file['dense_1/dense_1/kernel:0']
    file['dense_1/dense_1/kernel:0'] = np.zeros((64, 16), np.float32)
  fails(
    keras_folder, r"'fc/weights/squeeze/kernel' is float32\[64, 16\]; expected float32\[64, 8\]"
  )
