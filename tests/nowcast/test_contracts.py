"""What holds for every predictor, the user's own among them: one row of `ROWS` enrols another.

References: the contracts themselves, in memory, compiled and from files.
"""

import dataclasses
import functools
import sys
from typing import Any, Literal

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
import safetensors.numpy

import know_jax
from know_jax import UserError, trees
from know_jax.fields import read_config
from know_jax.kinds import KINDS
from know_jax.nowcast import file_job, from_files
from know_jax.predictors import known
from know_jax.predictors.base import WholeLeaf
from know_jax.predictors.networks import Known
from know_jax.predictors.registry import REGISTRY, resolve
from know_jax.study.arms import ArmFields, arms_of


@dataclasses.dataclass(frozen=True)
class Halfway(know_jax.Linear):
  """A part of the last movement once more, for each step."""

  strength: float = 0.5
  way: Literal['on', 'back'] = 'on'

  def stages(self, steps, params):
    return 2

  def coefficients(self, stages, moments, params, rate, steps):
    sign = 1 if self.way == 'on' else -1
    return np.array([[-sign * self.strength * n, 0.0] for n in steps])


@dataclasses.dataclass(frozen=True)
class Median(know_jax.Elementwise):
  """The median of each weight's stages."""

  reads_all = True

  def predict(self, history, params, rate, steps):
    return jnp.stack([jnp.median(history, axis=0)] * len(steps))


class Centred(know_jax.WholeLeaf):
  """The newest leaf with the mean of the oldest."""

  reads_all = True

  def predict(self, history, leaf, params, rate, steps):
    return history[-1] - history[-1].mean() + history[0].mean()


@dataclasses.dataclass(frozen=True)
class Damped(know_jax.Linear):
  """The last movement once more, times the share that the weights' size is of it; with theta."""

  needs_moments = True
  takes_theta = True

  def stages(self, steps, params):
    return 3

  def default_theta(self):
    return {kind: np.float32(0.1 * (1 + i)) for i, kind in enumerate(KINDS)}

  def coefficients(self, stages, moments, params, rate, steps):
    share = params * moments[-1, -1] / (moments[-1, -1] + moments[-2, -2])
    return jnp.stack([jnp.array([0.0, -1.0, 0.0]) * share * n for n in steps])


@dataclasses.dataclass(frozen=True)
class Capped(know_jax.Elementwise):
  """The last movement once more, at most the leaf's root mean square of it."""

  needs_moments = True

  def stages(self, steps, params):
    return 2

  def of_leaf(self, moments, params):
    return jnp.sqrt(jnp.diagonal(moments)[:1])

  def predict(self, history, params, rate, steps, of_leaf):
    (most,) = of_leaf
    move = jnp.clip(history[-1] - history[-2], -most, most)
    return jnp.stack([history[-1] + n * move for n in steps])


class Unscaled(Known):
  """KNOWN on the weights as they are, with untrained parameters of its own."""

  def default_theta(self):
    return known.init_theta(jax.random.key(0))


# Name -> predictor. Whether half a leaf gives half the prediction, the predictor tells.
ROWS: dict[str, Any] = {
  **{name: name for name in REGISTRY},
  'linear of a user': Halfway(0.3),
  'elementwise of a user': Median(),
  'whole leaf of a user': Centred(),
  'moments of a user': Damped(),
  'elementwise with moments of a user': Capped(),
  'known on the weights as they are': Unscaled(),
  'without history of a user': know_jax.history_free(Median()),
}
EVERY = pytest.mark.parametrize('row', ROWS)
SHAPES = {
  'conv/kernel': (3, 3, 2, 2), 'head/kernel': (12, 4), 'head/bias': (4,), 'still/kernel': (4, 3)
}  # fmt: skip


def make_history(seed=0, dtype=np.float32, stages=5):
  """Leaves that move, and one that never does."""
  rng = np.random.default_rng(seed)
  stage = {path: 0.1 * rng.normal(size=shape) for path, shape in SHAPES.items()}
  history = []
  for _ in range(stages):
    history.append({path: np.asarray(leaf, dtype) for path, leaf in stage.items()})
    stage = {
      path: leaf if 'still' in path else leaf + 0.01 * rng.normal(size=leaf.shape)
      for path, leaf in stage.items()
    }
  return history


@functools.cache
def compiled(row):
  return jax.jit(functools.partial(know_jax.predict, steps=2, predictor=ROWS[row]))


def from_file(history, row, folder):
  files = []
  for number, stage in enumerate(history):
    files.append(folder / f'{number}.safetensors')
    safetensors.numpy.save_file({p.replace('/', '.'): leaf for p, leaf in stage.items()}, files[-1])
  job = file_job.prepare(files, predictors=[ROWS[row]], steps=2)
  *_, last = from_files.write(job, folder / 'out', show_progress=False)
  (file,) = last.glob('*.safetensors')
  return {p.replace('.', '/'): leaf for p, leaf in safetensors.numpy.load_file(file).items()}


@pytest.mark.filterwarnings('ignore::know_jax.errors.PredictionWarning')
@pytest.mark.parametrize(
  ('row', 'dtype'),
  [(row, np.float32) for row in ROWS]
  + [(row, jnp.bfloat16) for row in ('linear_fit', 'shrink', 'magmax', 'moments of a user')],
)
def test_memory_compiled_and_files_agree_and_what_never_moved_is_left_alone(row, dtype, tmp_path):
  history = make_history(dtype=dtype)
  result = know_jax.predict(history, 2, predictor=ROWS[row])
  trees.check_same(history[-1], result, names=('a stage', 'the result'))
  keeps = resolve(ROWS[row])[1].keeps_unmoved
  tolerance = {'rtol': 1e-5, 'atol': 1e-6} if dtype == np.float32 else {'rtol': 0.01, 'atol': 1e-4}
  for other in (compiled(row)(history), from_file(history, row, tmp_path)):
    for path, leaf in result.items():
      assert leaf.dtype == other[path].dtype == dtype
      numbers = (np.asarray(x, np.float32) for x in (other[path], leaf))
      np.testing.assert_allclose(*numbers, **tolerance, err_msg=path)
    still = np.asarray(other['still/kernel']).tobytes()
    assert (still == history[-1]['still/kernel'].tobytes()) is keeps
  assert (np.asarray(result['still/kernel']).tobytes() == still) is True
  moved = [(np.asarray(result[p]) != history[-1][p]).any() for p in ('conv/kernel', 'head/kernel')]
  # In units of a leaf that has not moved, no step is all that KNOWN can take.
  unmoved = ('persistence', 'without history of a user', 'known_history_free')
  assert any(moved) is (row not in unmoved)


@EVERY
def test_no_step_gives_the_newest_bits(row):
  history = make_history()
  history[-1]['head/bias'][:] = [-0.0, 0.0, 1e-45, 3e38]
  result = know_jax.predict(history, 0, predictor=ROWS[row])
  assert all(np.asarray(result[p]).tobytes() == leaf.tobytes() for p, leaf in history[-1].items())


@EVERY
@hypothesis.given(seed=st.integers(0, 10**6), cut=st.integers(1, 11))
@hypothesis.settings(max_examples=3, deadline=None)
def test_half_a_leaf_gives_half_the_prediction(row, seed, cut):
  predictor = resolve(ROWS[row])[1]
  if predictor.takes_theta:
    predictor = predictor.for_theta(predictor.default_theta())
  history = [{'a': {'kernel': stage['head/kernel']}} for stage in make_history(seed)]
  half = [{'a': {'kernel': stage['a']['kernel'][:cut]}} for stage in history]
  whole, part = (
    know_jax.predict(h, 2, predictor=ROWS[row], on_bad='ignore')['a']['kernel']
    for h in (history, half)
  )
  if not (predictor.needs_moments or isinstance(predictor, WholeLeaf)):
    np.testing.assert_allclose(whole[:cut], part, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('row', [r for r in ROWS if resolve(ROWS[r])[1].keeps_unmoved])
@pytest.mark.parametrize('value', [0.5, -0.0, 1.0, 1e-30])
def test_constant_leaves_come_back_bit_for_bit(row, value):
  # Masks that are called bias, kernels that are frozen: in half precision and in float32.
  stage = {
    'attn': {'bias': np.full((1, 1, 4, 4), value, np.float16)},
    'frozen': {'kernel': np.full((4, 4), value, np.float32)},
  }
  # The rules of kinds would keep the mask by themselves.
  kinds = {'attn/bias$': 'bias'}
  run = functools.partial(know_jax.predict, steps=2, predictor=ROWS[row], kinds=kinds)
  ways = (run, jax.jit(run)) if value == 0.5 else (run,)
  for way in ways:
    result = way([stage] * 5)
    for path, leaf in trees.named_leaves(stage).items():
      assert np.asarray(trees.named_leaves(result)[path]).tobytes() == leaf.tobytes()


def test_shrink_and_its_wrapper_shrink_what_never_moved():
  history = [{'a': {'kernel': np.ones((2, 2), np.float32)}}] * 5
  for predictor in ('shrink', know_jax.history_free(resolve('shrink')[1])):
    found = know_jax.predict(history, 2, predictor=predictor)['a']['kernel']
    np.testing.assert_allclose(found, 0.94**2, rtol=1e-6)


@pytest.mark.parametrize('shipped', [True, False])
def test_known_is_the_module_mapped_over_every_weight(shipped):
  history = make_history()
  theta = know_jax.load_known() if shipped else known.init_theta(jax.random.key(0))
  result = know_jax.predict(history, theta=None if shipped else theta)
  for path, kind in (('conv/kernel', 'conv'), ('head/kernel', 'fc'), ('head/bias', 'bias')):
    windows = np.stack([stage[path].ravel() for stage in history], axis=1)
    seen, size, newest = windows, 1.0, windows[:, -1:]
    if shipped:  # Those are for weights in units of their leaf.
      moved = np.sqrt((np.diff(windows, axis=1) ** 2).mean())
      bounded = np.clip((windows - newest) / moved, -8, 8)
      seen, size = bounded + newest / np.sqrt((newest**2).mean()), 2 * moved
    residual = jax.vmap(lambda w, k=kind: known.KNOWN().apply({'params': theta[k]}, w))(seen)
    expected = windows[:, -1] + size * np.asarray(residual)
    np.testing.assert_allclose(np.ravel(result[path]), expected, rtol=0, atol=1e-6, err_msg=path)


# --- predictors of the user's own -----------------------------------------------------------------


def test_numbers_of_users_predictors():
  history = make_history()
  stages = np.stack([stage['head/kernel'] for stage in history]).astype(np.float64)
  moved = stages[-1] - stages[-2]
  share = 0.2 * (stages[-1] ** 2).mean() / ((stages[-1] ** 2).mean() + (moved**2).mean())
  for predictor, expected in (
    (Halfway(0.3), stages[-1] + 0.6 * moved),
    (Halfway(way='back'), stages[-1] - moved),
    (Median(), np.median(stages, axis=0)),
    (Centred(), stages[-1] - stages[-1].mean() + stages[0].mean()),
    (Damped(), stages[-1] + 2 * share * moved),
    (know_jax.history_free(Centred()), stages[-1]),
  ):
    found = know_jax.predict(history, 2, predictor=predictor)['head/kernel']
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
  found = know_jax.predict(history, 2, predictor=Halfway, strength=1.0)['head/kernel']
  np.testing.assert_allclose(found, stages[-1] + 2 * moved, rtol=1e-5, atol=1e-7)
  theta = dict.fromkeys(KINDS, np.float32(0.0))
  found = know_jax.predict(history, 2, predictor=Damped(), theta=theta)['head/kernel']
  np.testing.assert_array_equal(found, history[-1]['head/kernel'])


def test_a_registered_predictor_has_a_name_everywhere(monkeypatch):
  monkeypatch.setattr(REGISTRY, '_entries', dict(REGISTRY))
  assert know_jax.register_predictor('halfway', Halfway) is Halfway
  assert 'halfway' in know_jax.PREDICTORS
  history = make_history()
  by_name = know_jax.PREDICTORS['halfway'](history, 2, strength=0.3)
  expected = know_jax.predict(history, 2, predictor=Halfway(0.3))
  for path, leaf in expected.items():
    np.testing.assert_array_equal(by_name[path], leaf)
  for options, message in (
    ({'strenght': 1.0}, "predictor 'halfway' has no option 'strenght'; it has strength, way"),
    ({'strength': 'a'}, "halfway option strength is 'a'; expected a finite Python number"),
    ({'way': 'bakc'}, "unknown way 'bakc'. Did you mean 'back'"),
  ):
    with pytest.raises(UserError, match=message):
      know_jax.predict(history, predictor='halfway', **options)
  with pytest.raises(UserError, match="there is a predictor 'known' already"):
    know_jax.register_predictor('known', Halfway)


class Unhashable(know_jax.Linear):
  __hash__ = None  # type: ignore[assignment]


class Wrong(know_jax.Linear):
  def coefficients(self, stages, moments, params, rate, steps):
    return np.zeros((len(steps), stages + 1))


class WrongElements(know_jax.Elementwise):
  def predict(self, history, params, rate, steps):
    return history[-1]


class WrongLeaf(know_jax.WholeLeaf):
  def predict(self, history, leaf, params, rate, steps):
    return history[-1].ravel()


@pytest.mark.parametrize(
  ('predictor', 'message'),
  [
    (3, r'predictor is 3; expected a know_jax.Linear, Elementwise or WholeLeaf'),
    (dict, r"predictor is <class 'dict'>; expected a know_jax.Linear"),
    (type('Bare', (know_jax.Linear,), {}), "is a Bare without a method 'coefficients'; expected"),
    (type('Bare', (know_jax.WholeLeaf,), {})(), "is a Bare without a method 'predict'; expected"),
    (lambda history: history, r'predictor is <function .*; expected a know_jax.Linear'),
    (Unhashable(), r'predictor is a Unhashable, which cannot be hashed'),
    ('collections:OrderedDict', r"predictor 'collections:OrderedDict' is <class .*; expected a"),
    ('no_such_module:x', "cannot import 'no_such_module'"),
    (Wrong(), r'Wrong gave coefficients of shape \(1, 2\); expected \(1, 1\)'),
    (WrongElements(), r'WrongElements gave predictions of shape \(\d+,\); expected \(1, \d+\)'),
    (WrongLeaf(), r'WrongLeaf gave a leaf of shape \(\d+,\); expected \(.*\)'),
  ],
)
def test_what_is_no_predictor_is_named(predictor, message):
  with pytest.raises(UserError, match=message):
    know_jax.predict(make_history(), predictor=predictor)
  with pytest.raises(UserError, match=message):
    jax.jit(functools.partial(know_jax.predict, predictor=predictor))(make_history())


def test_a_predictor_that_has_options_takes_no_others():
  with pytest.raises(UserError, match="'Halfway' has no option 'strength'; it has none"):
    know_jax.predict(make_history(), predictor=Halfway(), strength=2.0)
  with pytest.raises(UserError, match='theta is for the predictors that run KNOWN'):
    know_jax.predict(make_history(), predictor=Halfway(), theta=references.random_theta())


@pytest.fixture
def own_module(tmp_path, monkeypatch):
  """A module of the user's in the current folder."""
  (tmp_path / 'my_predictors.py').write_text(
    'import dataclasses\n'
    'import numpy as np\n'
    'import know_jax\n'
    '@dataclasses.dataclass(frozen=True)\n'
    'class Grow(know_jax.Linear):\n'
    '  by: float = 0.5\n'
    '  def coefficients(self, stages, moments, params, rate, steps):\n'
    '    return np.array([[self.by * n] for n in steps])\n'
    'grow = Grow(0.25)\n'
  )
  monkeypatch.chdir(tmp_path)
  yield
  sys.modules.pop('my_predictors', None)


def test_a_predictor_of_ones_own_module_from_files_and_in_memory(own_module, tmp_path):
  history = make_history()
  found = know_jax.predict(history, 2, predictor='my_predictors:grow')
  np.testing.assert_allclose(found['head/kernel'], 1.5 * history[-1]['head/kernel'], rtol=1e-6)
  files = []
  for number, stage in enumerate(history):
    files.append(tmp_path / f'{number}.safetensors')
    safetensors.numpy.save_file({p.replace('/', '.'): leaf for p, leaf in stage.items()}, files[-1])
  predictors = ['my_predictors:grow', 'my_predictors:Grow']
  job = file_job.prepare(files, predictors=predictors, steps=1)
  folders = from_files.write(job, tmp_path / 'out', show_progress=False)
  assert [folder.parent.name for folder in folders] == ['grow', 'Grow']
  for folder, factor in zip(folders, (1.25, 1.5), strict=True):
    (file,) = folder.glob('*.safetensors')
    written = safetensors.numpy.load_file(file)['head.kernel']
    np.testing.assert_allclose(written, factor * history[-1]['head/kernel'], rtol=1e-6)
  with pytest.raises(UserError, match="two predictors are called 'grow'"):
    file_job.prepare(files, predictors=[predictors[0], type('grow', (Median,), {})()], steps=1)


def test_a_predictor_of_ones_own_module_is_an_arm_of_a_study(own_module):
  config = {
    'arms': ('persistence', {'predictor': 'my_predictors:Grow', 'options': {'by': 0.1}}),
    'ablations': (), 'official': None, 'steps': 2, 'history': 5,
    'source': {'stages': 5, 'rate': 0.5},
  }  # fmt: skip
  found = arms_of(read_config(ArmFields, config), batch_norm=False)
  assert [(arm.predictor, arm.step) for arm in found[1:]] == [
    ('my_predictors:Grow', 1), ('my_predictors:Grow', 2)
  ]  # fmt: skip
  assert found[1].option == 'by=0.1'
  config['arms'] = ('persistence', {'predictor': 'my_predictors:Grow', 'options': {'bye': 0.1}})
  with pytest.raises(UserError, match="predictor 'Grow' has no option 'bye'; it has by"):
    arms_of(read_config(ArmFields, config), batch_norm=False)
