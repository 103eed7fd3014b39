"""Several runs trained at once are what each is alone, and end, diverge and stop by themselves."""

import functools
import signal

import jax
import numpy as np
import pytest
from runs import assert_close, assert_same_bits, sigterm_raises

from know_jax.data.augmentation import Augmentation
from know_jax.data.sources import load_dataset
from know_jax.errors import UserError
from know_jax.models import build_model
from know_jax.system.signals import Terminated
from know_jax.training import loop, together
from know_jax.training.loop import AXIS, Checkpoint, DivergedError, Recipe
from know_jax.training.together import Job, fit_together

MODEL = build_model('cnn_bn', num_classes=5, width=2, convs=1, axis_name=AXIS)
RECIPE = Recipe(
  'adam', weight_decay=1e-3, augmentation=Augmentation(rotation=10.0, shift=0.15, zoom=0.3)
)
BATCH = 8


@pytest.fixture(scope='module')
def digits():
  train = load_dataset('digits', 'train', classes=(0, 1, 2, 3, 4))
  return train.images, train.labels


@pytest.fixture(scope='module')
def make_jobs(digits):
  """Runs that differ in all that they may; of 4, 6, 2 and 1 steps."""

  def start(seed):
    variables = loop.init_variables(MODEL, jax.random.key(seed), (8, 8, 1))
    return Checkpoint(loop.create_state(jax.device_get(variables), RECIPE))

  def make(sizes=(64, 50, 64, 40), lrs=(1e-2, 3e-3, 2e-2, 1e-2), **common):
    rows = [slice(64 * i, 64 * i + size) for i, size in enumerate(sizes)]
    means = [None, np.full((8, 8, 1), 0.25, np.float32), None, np.zeros((8, 8, 1), np.float32)]
    examples, epochs = (16, 24, 17, 8), (2, 2, 1, 1)
    schedules = ('cosine', 'constant', 'cosine', 'constant')
    return [
      Job(
        start(i),
        loop.put_data(digits[0][rows[i]], digits[1][rows[i]], means[i]),
        np.arange(i, i + examples[i], dtype=np.int32),
        epochs[i],
        lrs[i],
        schedules[i],
        jax.random.key(i),
        **common,
      )
      for i in range(4)
    ]

  return make


fit_jobs = functools.partial(fit_together, MODEL, recipe=RECIPE, batch_size=BATCH)


def watched(jobs):
  """The jobs with their metrics and the order in which they end written down."""
  metrics, ended = [{} for _ in jobs], []
  return metrics, ended, [
    job._replace(
      on_epoch=metrics[i].__setitem__,
      on_trained=lambda state, i=i: ended.append((i, state)),
    )
    for i, job in enumerate(jobs)
  ]  # fmt: skip


@pytest.fixture(scope='module')
def alone(make_jobs):
  """State and metrics of each run by `fit`, with data sets of one size, to compile once."""
  found = []
  for job in make_jobs(sizes=(64,) * 4):
    metrics = {}
    options = {k: v for k, v in job._asdict().items() if k != 'on_trained'}
    options['on_epoch'] = metrics.__setitem__
    state = loop.fit(MODEL, **options, recipe=RECIPE, batch_size=BATCH)
    found.append((state, metrics))
  return found


# Some Adam steps in float32 with sums taken in another order; see test_training.
CLOSE = {'rtol': 1e-3, 'atol': 1e-5}


@pytest.mark.parametrize(
  ('how', 'runs', 'order'),
  [('vmap', 4, [3, 2, 0, 1]), ('unroll', 2, [0, 1]), ('one_by_one', 4, [0, 1, 2, 3])],
)
def test_every_way_trains_each_run_as_alone(make_jobs, alone, how, runs, order):
  metrics, ended, jobs = watched(make_jobs()[:runs])
  states = fit_jobs(jobs, how=how)
  for state, found, (wanted, wanted_metrics) in zip(states, metrics, alone[:runs], strict=True):
    assert_close(state, wanted, **CLOSE)
    assert set(found) == set(wanted_metrics)
    for epoch, scores in found.items():
      assert scores == pytest.approx(wanted_metrics[epoch], rel=1e-4)
  # A run that has ended is handed over at once and does not change while others go on.
  assert [i for i, _ in ended] == order
  for i, state in ended:
    assert_same_bits(state, states[i])


def test_runs_that_end_make_the_step_smaller(monkeypatch, make_jobs):
  sizes, real = [], together.group_step

  def group_step(*args):
    def step(states, data, index, *rest):
      sizes.append(index.shape)
      return real(*args)(states, data, index, *rest)

    return step

  monkeypatch.setattr(together, 'group_step', group_step)
  fit_jobs(make_jobs(), how='vmap')
  # Four, three and two run; the last one ends by itself.
  assert sizes == [(8, 4, 1), (8, 4, 1), (8, 2, 1), (8, 2, 1)]


def test_a_run_that_diverges_leaves_the_others_alone(make_jobs, alone):
  _, ended, jobs = watched(make_jobs(lrs=(1e-2, 1e30, 2e-2, 1e-2)))
  states = fit_jobs(jobs, how='vmap')
  assert isinstance(states[1], DivergedError)
  assert 'learning rate 1e+30' in str(states[1])
  assert [i for i, _ in ended] == [3, 2, 0]
  for i in (0, 2, 3):
    assert_close(states[i], alone[i][0], **CLOSE)


def test_weights_that_are_not_finite_in_the_end_are_found(make_jobs):
  _, ended, jobs = watched(make_jobs())
  # Running statistics play no part in the loss of training.
  infinite = jax.tree.map(lambda x: x + np.inf, jobs[3].start.state.batch_stats)
  jobs[3] = jobs[3]._replace(start=Checkpoint(jobs[3].start.state.replace(batch_stats=infinite)))
  states = fit_jobs(jobs, how='vmap')
  assert isinstance(states[3], DivergedError)
  assert 'holds NaN or infinity after the last step' in str(states[3])
  assert [i for i, _ in ended] == [2, 0, 1]


def test_runs_go_on_from_what_was_saved_of_each(make_jobs, alone):
  saved = [{}, {}, {}, {}]
  jobs = [
    job._replace(save=lambda c, i=i: saved[i].__setitem__(int(c.state.step), c))
    for i, job in enumerate(make_jobs())
  ]
  fit_jobs(jobs, how='vmap', save_every_seconds=-1.0)
  # Also of a run that has ended, until it is handed over, and of the last one by itself.
  assert [sorted(steps) for steps in saved] == [[1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2], [1]]
  # From different steps; the last two have nothing left to do.
  starts = [saved[0][3], saved[1][1], saved[2][2], saved[3][1]]
  metrics, ended, jobs = watched(make_jobs())
  jobs = [job._replace(start=start) for job, start in zip(jobs, starts, strict=True)]
  states = fit_jobs(jobs, how='vmap')
  assert [i for i, _ in ended] == [2, 3, 0, 1]
  assert [set(found) for found in metrics] == [{2}, {1, 2}, set(), set()]
  for state, found, (wanted, wanted_metrics) in zip(states, metrics, alone, strict=True):
    assert_close(state, wanted, **CLOSE)
    # Of an epoch that was begun before, too.
    for epoch, scores in found.items():
      assert scores == pytest.approx(wanted_metrics[epoch], rel=1e-4)


@pytest.mark.parametrize(
  ('how', 'handed_over', 'left'),
  [('vmap', [1, 2], [(0, 3), (1, 3)]), ('one_by_one', [4], [(1, 3)])],
)
def test_a_signal_saves_all_that_are_not_handed_over(make_jobs, how, handed_over, left):
  saved, ended = [], []
  jobs = [
    job._replace(save=lambda c, i=i: saved.append((i, int(c.state.step))))
    for i, job in enumerate(make_jobs(on_trained=ended.append))
  ]
  jobs[1] = jobs[1]._replace(on_epoch=lambda epoch, metrics: signal.raise_signal(signal.SIGTERM))
  with sigterm_raises(), pytest.raises(Terminated):
    fit_jobs(jobs, how=how)
  assert [int(state.step) for state in ended] == handed_over
  assert saved == left


# -- the choice ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('seconds', 'steps', 'way'),
  [
    ((1.0, 2.0, 3.0), (10, 10), 'vmap'),
    ((2.0, 1.0, 3.0), (10, 10), 'unroll'),
    ((2.0, 2.0, 1.0), (10, 10), 'one_by_one'),
    # 10 steps together take 20 seconds, 10 and 1 alone 5.5 steps of 3 seconds.
    ((2.0, 2.5, 3.0), (10, 1), 'one_by_one'),
  ],
)
def test_the_fastest_way_is_chosen(seconds, steps, way):
  assert together.fastest_way(dict(zip(together.WAYS, seconds, strict=True)), steps) == way


def test_steps_are_measured_once_for_each_shape(monkeypatch):
  clock, calls = [0.0], []

  def way(name, seconds):
    def step(state, *rest):
      calls.append(name)
      # The first call compiles.
      clock[0] += seconds if name in calls[:-1] else 100.0
      return state, None

    return step

  monkeypatch.setattr(together, 'train_step', lambda model, recipe: way('one_by_one', 2.0))
  monkeypatch.setattr(
    together, 'group_step', lambda m, r, how: way(how, {'vmap': 3.0, 'unroll': 5.0}[how])
  )
  monkeypatch.setattr(together.time, 'perf_counter', lambda: clock[0])
  monkeypatch.setattr(
    together, 'step_seconds', functools.cache(together.step_seconds.__wrapped__)
  )  # fmt: skip
  measure = functools.partial(together.step_seconds, MODEL, RECIPE, 4, BATCH, 16, (8, 8, 1))
  assert measure() == {'vmap': 3.0, 'unroll': 5.0, 'one_by_one': 8.0}
  assert calls.count('one_by_one') == 4 * calls.count('vmap') == 16
  calls.clear()
  assert measure()['unroll'] == 5.0
  assert calls == []
  together.step_seconds(MODEL, RECIPE, 2, BATCH, 16, (8, 8, 1))
  assert calls


def test_auto_takes_the_way_that_was_measured_to_be_fastest(monkeypatch, make_jobs):
  asked, taken = [], []

  def step_seconds(*args):
    asked.append(args)
    return {'vmap': 3.0, 'unroll': 1.0, 'one_by_one': 9.0}

  monkeypatch.setattr(together, 'step_seconds', step_seconds)
  monkeypatch.setattr(together, 'group_step', lambda model, recipe, how: taken.append(how))
  monkeypatch.setattr(together._Group, 'train', lambda self, seconds: [])
  fit_jobs(make_jobs())
  assert asked == [(MODEL, RECIPE, 4, BATCH, 64, (8, 8, 1))]
  assert taken == ['unroll']


def test_one_run_is_fitted_without_measuring(monkeypatch, make_jobs, alone):
  monkeypatch.delattr(together, 'step_seconds')
  (state,) = fit_jobs(make_jobs()[:1])
  assert_same_bits(state, alone[0][0])


def test_what_does_not_fit_is_told(make_jobs, digits):
  jobs = make_jobs()
  with pytest.raises(UserError, match=r"unknown way to train together 'vmpa'. Did you mean 'vmap'"):
    fit_jobs(jobs, how='vmpa')
  wide = loop.put_data(np.zeros((64, 10, 8, 1), np.uint8), digits[1][:64])
  with pytest.raises(UserError, match=r'shapes \[\(8, 8, 1\), \(10, 8, 1\)\]; wanted one'):
    fit_jobs([jobs[0], jobs[1]._replace(data=wide)])
