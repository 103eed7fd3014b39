"""The landscape: its plane is NumPy's SVD, and its surface what evaluation gives at each point."""

import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from runs import assert_same_bits, snapshot

from know_jax import kinds as kinds_
from know_jax import landscape, predict, seeds, trees
from know_jax.data.base import part_of
from know_jax.errors import UserError
from know_jax.io.sealed import read_sealed
from know_jax.runs import workdir as workdirs
from know_jax.tasks import load_task
from know_jax.training import loop
from know_jax.training.steps import Data


def small_landscape(**fields):
  config = landscape.default_config()
  small = {
    'predictors': ('task_vector', 'shrink'), 'steps': 2, 'neighbours': 3, 'grid': (4, 3),
    'examples': 60,
  }  # fmt: skip
  config.update(small | fields)
  return config


@pytest.fixture(scope='module')
def drawn(finished, tmp_path_factory):
  """A workdir with a landscape, and what `run` returned."""
  workdir = tmp_path_factory.mktemp('landscape') / 'run'
  shutil.copytree(finished, workdir)
  return workdir, landscape.run(small_landscape(), workdir, show_progress=False)


@pytest.fixture(scope='module')
def stages(finished):
  return [workdirs.restore_stage(finished, i) for i in range(4, -1, -1)]


@pytest.fixture(scope='module')
def task(finished):
  return load_task(workdirs.finished_record(finished)['config'])


# -- the plane -----------------------------------------------------------------------------------


@pytest.mark.parametrize(('count', 'size'), [(3, 7), (5, 4), (12, 900)])
def test_the_plane_equals_a_singular_value_decomposition(count, size):
  rng = np.random.default_rng(count)
  points = rng.normal(2.0, 1.0, (count, size)) * rng.uniform(0.1, 2.0, size)
  plane = landscape.fit_plane(points)
  _, s, vt = np.linalg.svd(points - points.mean(0), full_matrices=False)
  signs = np.sign((plane.axes * vt[:2]).sum(1))
  np.testing.assert_allclose(plane.axes, signs[:, None] * vt[:2], atol=1e-8)
  np.testing.assert_allclose(plane.shares, s[:2] ** 2 / (s**2).sum(), atol=1e-10)
  np.testing.assert_allclose(plane.axes @ plane.axes.T, np.eye(2), atol=1e-10)
  others = rng.normal(size=(6, size))
  offsets = others - points.mean(0)
  projected = offsets @ (signs[:, None] * vt[:2]).T
  np.testing.assert_allclose(plane.coordinates(others), projected, atol=1e-8)
  # Pythagoras: what is not along the axes is off the plane.
  expected = np.sqrt((offsets**2).sum(1) - (projected**2).sum(1))
  np.testing.assert_allclose(plane.distances(others), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
  'points', [np.eye(4)[:2], np.outer(np.arange(5.0), np.ones(3)), np.ones((4, 3))]
)
def test_points_on_a_line_span_no_plane(points):
  with pytest.raises(UserError, match='the weights lie on a line; a plane needs more stages'):
    landscape.fit_plane(points)


def test_flattening_and_back(stages):
  vector = kinds_.flatten(stages[0])
  kinds = kinds_.leaf_kinds(stages[0])
  moved = [path for path, kind in kinds.items() if kind != 'keep']
  named = trees.named_leaves(stages[0])
  assert vector.shape == (sum(named[path].size for path in moved),)
  assert_same_bits(kinds_.unflatten(vector, stages[0]), stages[0])
  # Leaves that predictors keep are those of the other stage.
  mixed = trees.named_leaves(kinds_.unflatten(vector, stages[-1]))
  for path, leaf in trees.named_leaves(stages[-1]).items():
    expected = named[path] if path in moved else leaf
    assert mixed[path].tobytes() == np.asarray(expected).tobytes(), path


def test_neighbours_are_as_far_as_they_should_be(stages):
  found = landscape.neighbours(stages[-1], jax.random.key(3), 400, 0.2)
  centre = kinds_.flatten(stages[-1])
  assert found.shape == (400, centre.size)
  offsets, start = found - centre, 0
  np.testing.assert_allclose(offsets.mean(), 0.0, atol=1e-3)
  for path, leaf in trees.named_leaves(stages[-1]).items():
    if kinds_.leaf_kinds(stages[-1])[path] != 'keep':
      part = offsets[:, start : start + leaf.size]
      size = np.sqrt(np.mean(np.float64(leaf) ** 2))
      assert part.std() == pytest.approx(0.2 * size, rel=0.1), path
      start += leaf.size
  assert start == centre.size
  assert (found == landscape.neighbours(stages[-1], jax.random.key(3), 400, 0.2)).all()
  assert (landscape.neighbours(stages[-1], jax.random.key(3), 2, 0.0) == centre).all()


# -- the surface ---------------------------------------------------------------------------------


@pytest.mark.parametrize('points_per_call', [1, 4])
def test_the_surface_is_what_evaluation_gives(stages, task, points_per_call):
  plane = landscape.fit_plane(np.stack([kinds_.flatten(stage) for stage in stages]))
  tested = part_of(task.test, np.arange(77))
  coordinates = np.random.default_rng(0).normal(size=(6, 2)) * 0.5
  loss, accuracy = landscape.evaluate_points(
    task, plane, stages[-1], coordinates, tested, points_per_call=points_per_call
  )  # fmt: skip
  data = Data(tested, task.prepare)
  for i, place in enumerate(coordinates):
    variables = kinds_.unflatten(plane.mean + place @ plane.axes, stages[-1])
    expected = loop.evaluate(task, variables, data)
    assert loss[i] == pytest.approx(expected['loss'], rel=1e-4)
    assert accuracy[i] == pytest.approx(expected['accuracy'], abs=1e-9)
  assert len(set(loss)) == 6


def test_three_stages_lie_on_their_own_plane(stages, task):
  """Without neighbours and at a place of its own, a stage scores as it is."""
  few = [dict(stage, batch_stats=stages[-1]['batch_stats']) for stage in stages[-3:]]
  few = [kinds_.unflatten(kinds_.flatten(stage), stages[-1]) for stage in few]
  vectors = np.stack([kinds_.flatten(stage) for stage in few])
  plane = landscape.fit_plane(vectors)
  assert plane.shares.sum() == pytest.approx(1.0)
  np.testing.assert_allclose(plane.distances(vectors), 0.0, atol=1e-9)
  loss, accuracy = landscape.evaluate_points(
    task, plane, stages[-1], plane.coordinates(vectors), task.test, points_per_call=2
  )  # fmt: skip
  data = Data(task.test, task.prepare)
  for i, stage in enumerate(few):
    expected = loop.evaluate(task, stage, data)
    assert loss[i] == pytest.approx(expected['loss'], rel=1e-4)
    assert accuracy[i] == pytest.approx(expected['accuracy'], abs=1e-9)


# -- a run ---------------------------------------------------------------------------------------


def test_a_landscape_holds_stages_predictions_and_surface(drawn, stages, task):
  workdir, found = drawn
  assert read_sealed(workdir / 'landscape/landscape.json', 'landscape') == found
  names = [(point['name'], point['steps']) for point in found['points']]
  assert names == [('stage', n) for n in range(-4, 1)] + [
    (name, n) for name in ('task_vector', 'shrink') for n in (1, 2)
  ]
  # Points score as they are, not as their shadow on the plane.
  data = Data(part_of(task.test, np.arange(60)), task.prepare)
  shrunk = jax.device_get(predict(stages, 2, predictor='shrink', rate=0.4))
  for place, variables in ((0, stages[0]), (4, stages[-1]), (8, shrunk)):
    expected = loop.evaluate(task, variables, data)
    assert found['points'][place]['accuracy'] == expected['accuracy']
    assert found['points'][place]['loss'] == expected['loss']
  # The plane is that of stages and neighbours; the points' places are on it.
  cloud = [
    np.concatenate([
      kinds_.flatten(stage)[None],
      landscape.neighbours(stage, seeds.named_key(0, 'neighbours', i), 3, 0.05),
    ])
    for i, stage in enumerate(stages)
  ]  # fmt: skip
  plane = landscape.fit_plane(np.concatenate(cloud))
  assert found['shares'] == plane.shares.tolist()
  vectors = np.stack([kinds_.flatten(v) for v in (stages[0], stages[-1], shrunk)])
  places = [[found['points'][i][axis] for axis in 'xy'] for i in (0, 4, 8)]
  np.testing.assert_allclose(plane.coordinates(vectors), places, atol=1e-9)
  # The grid goes beyond all points, by the same length up and across.
  x, y = np.array(found['x']), np.array(found['y'])
  assert (len(x), len(y)) == (4, 3) and np.shape(found['accuracy']) == (3, 4)
  for axis, line in (('x', x), ('y', y)):
    values = [point[axis] for point in found['points']]
    assert line[0] < min(values) and max(values) < line[-1]
  assert x[-1] - x[0] == pytest.approx(y[-1] - y[0])
  # Row 2 and column 1 of the surface are y[2] and x[1].
  variables = kinds_.unflatten(plane.mean + np.array([x[1], y[2]]) @ plane.axes, stages[-1])
  expected = loop.evaluate(task, variables, data)
  assert found['loss'][2][1] == pytest.approx(expected['loss'], rel=1e-4)
  assert found['accuracy'][2][1] == pytest.approx(expected['accuracy'])


def test_the_picture_and_the_report(drawn):
  workdir, found = drawn
  image = np.asarray(Image.open(workdir / 'landscape/landscape.png').convert('L'))
  assert image.shape[0] > 400 and len(np.unique(image)) > 20
  text = landscape.report(found)
  assert len(text.splitlines()) == 1 + 9 + 1
  assert f'{found["points"][4]["accuracy"]:.2%}' in text
  assert f'explained variance: {found["shares"][0]:.1%}' in text


def test_a_landscape_is_a_function_of_its_config(drawn, tmp_path):
  workdir, found = drawn
  shutil.copytree(workdir, tmp_path / 'run')
  before = snapshot(tmp_path / 'run' / 'landscape')
  assert landscape.run(small_landscape(), tmp_path / 'run', show_progress=False) == found
  assert snapshot(tmp_path / 'run' / 'landscape') == before
  other = landscape.run(small_landscape(seed=1), tmp_path / 'run', show_progress=False)
  assert other['shares'] != found['shares']


def test_parameters_of_known_can_be_given(drawn, known_file, tmp_path):
  workdir, _ = drawn
  shutil.copytree(workdir, tmp_path / 'run')
  config = small_landscape(predictors=('known', 'shrink'), steps=1, known=str(known_file))
  found = landscape.run(config, tmp_path / 'run', show_progress=False)
  shipped = landscape.run(
    small_landscape(predictors=('known', 'shrink'), steps=1),
    tmp_path / 'run',
    show_progress=False,
  )
  assert found['points'][5]['x'] != shipped['points'][5]['x']
  assert found['points'][6]['accuracy'] == shipped['points'][6]['accuracy']


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'predictors': ('shirnk',)}, "unknown predictor 'shirnk'. Did you mean 'shrink'"),
    ({'steps': 5}, "predictor 'task_vector' needs a history of 6 stages for steps=5; found 5"),
    ({'grid': (1, 3)}, r'grid is \(1, 3\); expected two numbers of at least 2'),
    ({'noise': -0.1}, 'noise is -0.1; expected at least 0'),
    ({'examples': 10000}, 'examples is 10000; expected 0'),
    ({'known': '/none/here'}, '/none/here'),
  ],
)
def test_what_does_not_fit_is_told_before_anything_is_written(finished, tmp_path, fields, message):
  shutil.copytree(finished, tmp_path / 'run')
  with pytest.raises(UserError, match=message):
    landscape.run(small_landscape(**fields), tmp_path / 'run', show_progress=False)
  assert not (tmp_path / 'run' / 'landscape').exists()


def test_there_must_be_a_finished_run(tmp_path):
  with pytest.raises(UserError, match='no forgetting run is here'):
    landscape.run(small_landscape(), tmp_path)
