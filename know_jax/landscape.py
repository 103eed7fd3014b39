"""The landscape around a trajectory: test accuracy over the plane that shows most of its movement.

The paper, figure 3: principal components of the stages' weights and of many noisy neighbours of
them, test accuracy as a surface over the first two components, the path of the stages and the
predictions on it. Neighbours are there so that the components are not those of five points alone.

Only the leaves that predictors move are in the plane; normalisation layers and their statistics are
those of the newest weights everywhere on the surface.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from know_jax import kinds as kinds_
from know_jax import trees
from know_jax.data.base import Batch, Source, checked_batch, part_of
from know_jax.errors import UserError, os_errors
from know_jax.fields import Given, check_least, config_dict, editable, read_config
from know_jax.io.sealed import write_sealed
from know_jax.models.adapters import Model
from know_jax.nowcast import api
from know_jax.predictors.registry import given_theta, resolve_all
from know_jax.report.plots import new_figure, principal_plane
from know_jax.runs.workdir import load_trajectory
from know_jax.seeds import named_key
from know_jax.system.progress import progress
from know_jax.tasks import load_task
from know_jax.tasks.base import Task
from know_jax.training import loop
from know_jax.training.steps import Data

_BATCH = 500
"""Test examples that are evaluated at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Every config field of a landscape."""

  seed: int = 0
  # Drawn on the surface, `steps` of each.
  predictors: tuple[str, ...] = ('known_leaf', 'task_vector', 'log_fit', 'shrink')
  steps: int = 3
  # Parameters of KNOWN: a file or folder, as `load_known` takes; None: those shipped.
  known: str | None = None
  # Neighbours of each stage, and their noise: the standard deviation over the root mean square of
  # the leaf.
  neighbours: int = 20
  noise: float = 0.05
  # Points of the surface across and up, and how far it goes beyond what lies on it.
  grid: tuple[int, int] = (25, 25)
  margin: float = 0.2
  # Test examples; 0: all.
  examples: int = 0
  # Points that are evaluated in one call; 0: 1 on CPUs, 16 elsewhere.
  points_per_call: int = 0

  def __post_init__(self) -> None:
    resolve_all(self.predictors)
    check_least(self, 0, 'neighbours', 'noise', 'margin', 'points_per_call')
    if len(self.grid) != 2 or min(self.grid) < 2:
      raise UserError(f'grid is {self.grid}; expected two numbers of at least 2.')


def default_config() -> ConfigDict:
  """Every field of a landscape, with the defaults that configs start from: see `Config`."""
  return editable(Config())


@dataclasses.dataclass(frozen=True)
class Plane:
  """A plane in the space of the weights that predictors move."""

  mean: np.ndarray  # The point at (0, 0), float64 `[d]`.
  axes: np.ndarray  # Two orthonormal directions, float64 `[2, d]`.
  shares: np.ndarray  # Of the variance of the points that it was fitted to, `[2]`.

  def coordinates(self, points: np.ndarray) -> np.ndarray:
    """Where points `[n, d]` fall on the plane, `[n, 2]`."""
    return (points - self.mean) @ self.axes.T

  def distances(self, points: np.ndarray) -> np.ndarray:
    """How far points `[n, d]` lie from the plane, `[n]`."""
    inside = self.mean + self.coordinates(points) @ self.axes
    return np.linalg.norm(points - inside, axis=1)


def fit_plane(points: np.ndarray) -> Plane:
  """The plane of the two first principal components of `[n, d]`; n > 2, d may be in millions.

  Raises:
    UserError: the points lie on a line.
  """
  coordinates, shares = principal_plane(points)
  squares = (coordinates**2).sum(axis=0)
  if len(points) < 3 or not squares[1] > 1e-12 * squares[0]:
    raise UserError('the weights lie on a line; a plane needs more stages, or neighbours.')
  mean = points.mean(axis=0, dtype=np.float64)
  # X = U S V' and coordinates = U S, so that V' = (U S)' X / S^2.
  axes = coordinates.T @ (points - mean) / squares[:, None]
  return Plane(mean, axes, shares)


def neighbours(
  variables: Any,
  key: jax.Array,
  count: int,
  noise: float,
  rule: kinds_.Rules | None = None,
) -> np.ndarray:
  """Noisy neighbours of a stage, as `kinds.flatten` gives them, `[count, d]`.

  `noise` is its standard deviation over the root mean square of the leaf.
  """
  kinds, scales = kinds_.leaf_kinds(variables, rule), []
  for path, leaf in trees.named_leaves(jax.device_get(variables)).items():
    if kinds[path] != kinds_.KEEP:
      size = np.sqrt(np.mean(np.square(leaf, dtype=np.float64))) if np.size(leaf) else 0.0
      scales.append(np.full(np.size(leaf), noise * size))
  scale = np.concatenate(scales)
  drawn = np.asarray(jax.random.normal(key, (count, scale.size)), np.float64)
  return kinds_.flatten(variables, rule) + scale * drawn


def evaluate_points(
  task: Task,
  plane: Plane,
  like: Any,
  coordinates: np.ndarray,
  examples: Source,
  *,
  points_per_call: int,
  show_progress: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
  """Loss and score of weights in a plane, float64 `[n]` each; they are only made on the device.

  Args:
    task: whose network and score it is.
    plane: the plane.
    like: variables with the leaves that are the same everywhere.
    coordinates: of the points, `[n, 2]`.
    examples: what is evaluated on.
    points_per_call: how many points a compiled call takes, vectorised.
    show_progress: whether a bar is shown.
  """
  arrays = jax.device_put((plane.mean.astype(np.float32), plane.axes.astype(np.float32)))
  kinds = tuple(kinds_.leaf_kinds(like, task.kinds).items())
  like, batches = jax.device_put(like), []
  for start in range(0, examples.size, _BATCH):
    batch = checked_batch(examples, np.arange(start, min(start + _BATCH, examples.size)))
    batches.append(jax.device_put(task.prepare(jax.tree.map(jnp.asarray, batch), None)))
  padded = -(-len(coordinates) // points_per_call) * points_per_call
  places = np.resize(coordinates, (padded, 2)).astype(np.float32)
  loss, score = np.zeros((2, padded))
  with progress(padded, 'surface', 'point', show=show_progress) as bar:
    for start in range(0, padded, points_per_call):
      chunk = range(start, start + points_per_call)
      rows = jax.device_get(
        [_sums(task.model, task.sums, kinds, arrays, like, places[chunk], b) for b in batches]
      )
      totals = jax.tree.map(lambda *row: np.sum(row, axis=0, dtype=np.float64), *rows)
      for i, point in enumerate(chunk):
        metrics = task.metrics(jax.tree.map(lambda x, i=i: x[i], totals))
        loss[point], score[point] = metrics['loss'], metrics[task.score]
      bar.update(points_per_call)
  return loss[: len(coordinates)], score[: len(coordinates)]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sums(
  model: Model,
  sums: Any,
  kinds: Any,
  arrays: Any,
  like: Any,
  coordinates: jax.Array,
  batch: Batch,
) -> Any:
  """The task's sums over a batch, leaves `[points, ...]`."""

  def at(place: jax.Array) -> Any:
    origin, axes = arrays
    # Products in full precision: on accelerators the default would move every point.
    moved = jnp.matmul(place, axes, precision=jax.lax.Precision.HIGHEST)
    variables = kinds_.unflatten(origin + moved, like, lambda path, _: dict(kinds)[path])
    outputs, _ = model.apply(variables, batch, train=False, key=None)
    return sums(outputs, batch, jnp.ones(len(jax.tree.leaves(batch)[0])))

  # One point needs no vectorised convolutions, which are slow on CPUs.
  if coordinates.shape[0] == 1:
    return jax.tree.map(lambda x: x[None], at(coordinates[0]))
  return jax.vmap(at)(coordinates)


def run(
  config: Config | Given, workdir: str | Path, *, show_progress: bool = True
) -> dict[str, Any]:
  """Draws the landscape of a finished forgetting run.

  Writes `landscape/landscape.json` (sealed: see `files.write_sealed`) and
  `landscape/landscape.png` in the workdir.

  Args:
    config: the fields of `Config`.
    workdir: of a finished forgetting run.
    show_progress: whether a bar is shown.

  Returns:
    What the JSON file holds: `config`, `shares` (of the variance, of the two components), `x` and
    `y` (coordinates of the grid's columns and rows), `accuracy` and `loss` (a list a row), and
    `points`: for every stage and prediction its `name`, `steps` (0 for Theta^0, negative for older
    stages), `x`, `y`, `distance` from the plane, and `accuracy` and `loss` as it is.

  Raises:
    UserError: before anything is evaluated, if a value does not fit or the workdir holds no
      finished run.
  """
  config = read_config(Config, config)
  workdir = Path(workdir).expanduser()
  trajectory, record = load_trajectory(workdir)
  task = load_task(record['config'])
  made = resolve_all(config.predictors)
  theta = given_theta(config.known, made)
  forecasts = {
    name: api.forecast(
      trajectory,
      config.steps,
      predictor=predictor,
      theta=theta.get(name),
      rate=record['config']['rate'],
      kinds=task.kinds,
    )
    for name, predictor in made.items()
  }
  examples = config.examples or task.test.size
  if not 1 <= examples <= task.test.size:
    raise UserError(f'examples is {examples}; expected 0 (all) to {task.test.size}.')
  stages = list(jax.device_get(trajectory))
  clouds = []
  for i, stage in enumerate(stages):
    key = named_key(config.seed, 'neighbours', i)
    around = neighbours(stage, key, config.neighbours, config.noise, task.kinds)
    clouds += [kinds_.flatten(stage, task.kinds)[None], around]
  plane, newest = fit_plane(np.concatenate(clouds)), stages[-1]
  tested = part_of(task.test, np.arange(examples, dtype=np.int32))

  weights = [('stage', i - len(stages) + 1, stage) for i, stage in enumerate(stages)]
  for name, forecast in forecasts.items():
    weights += [(name, n, jax.device_get(w)) for n, w in enumerate(forecast, start=1)]
  test = Data(tested, task.prepare)
  vectors = np.stack([kinds_.flatten(variables, task.kinds) for _, _, variables in weights])
  places, distances = plane.coordinates(vectors), plane.distances(vectors)
  points = []
  for (name, steps, variables), place, distance in zip(weights, places, distances, strict=True):
    metrics = loop.evaluate(task, variables, test)
    points.append({
      'name': name, 'steps': steps, 'x': float(place[0]), 'y': float(place[1]),
      'distance': float(distance), 'accuracy': metrics[task.score], 'loss': metrics['loss'],
    })  # fmt: skip
  x, y = _grid_lines(places, config)
  grid = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
  per_call = config.points_per_call or (1 if jax.default_backend() == 'cpu' else 16)
  loss, accuracy = evaluate_points(
    task, plane, newest, grid, tested, points_per_call=per_call, show_progress=show_progress
  )
  result = {
    'config': config_dict(config),
    'shares': plane.shares.tolist(),
    'x': x.tolist(),
    'y': y.tolist(),
    'accuracy': accuracy.reshape(len(y), len(x)).tolist(),
    'loss': loss.reshape(len(y), len(x)).tolist(),
    'points': points,
  }
  folder = workdir / 'landscape'
  with os_errors(f'cannot write in {folder}'):
    folder.mkdir(exist_ok=True)
    write_sealed(folder / 'landscape.json', result)
    _draw(folder / 'landscape.png', result)
  return result


def _grid_lines(places: np.ndarray, config: Config) -> tuple[np.ndarray, np.ndarray]:
  """Coordinates of the grid's columns and rows, around all finite places."""
  places = places[np.isfinite(places).all(axis=1)]
  low, high = places.min(axis=0), places.max(axis=0)
  # The same length up and across, so that the surface shows true angles.
  middle, half = (low + high) / 2, (0.5 + config.margin) * (high - low).max()
  x, y = (np.linspace(middle[i] - half, middle[i] + half, config.grid[i]) for i in range(2))
  return x, y


def report(found: Mapping[str, Any]) -> str:
  """A line for every stage and prediction, and the explained variance."""
  lines = [f'{"weights":<20} {"step":>4} {"x":>9} {"y":>9} {"off plane":>9} {"accuracy":>9}']
  for point in found['points']:
    lines.append(
      f'{point["name"]:<20} {point["steps"]:>4} {point["x"]:>9.3f} {point["y"]:>9.3f} '
      f'{point["distance"]:>9.3f} {point["accuracy"]:>9.2%}'
    )
  first, second = found['shares']
  lines.append(
    f'explained variance: {first:.1%} and {second:.1%} of stages and neighbours; accuracy on the '
    f'surface: {np.min(found["accuracy"]):.1%} to {np.max(found["accuracy"]):.1%}'
  )
  return '\n'.join(lines)


def _draw(path: Path, found: Mapping[str, Any]) -> None:
  figure = new_figure(9, 7)
  axes = figure.subplots()
  accuracy = 100 * np.array(found['accuracy'])
  surface = axes.contourf(found['x'], found['y'], accuracy, levels=20, cmap='viridis')
  figure.colorbar(surface, ax=axes, label='test accuracy on the plane, %')
  groups: dict[str, list[tuple[float, float]]] = {}
  for point in found['points']:
    groups.setdefault(point['name'], []).append((point['x'], point['y']))
  newest = groups['stage'][-1]
  axes.plot(*zip(*groups.pop('stage'), strict=True), '-o', color='black', label='stages')
  for i, (name, places) in enumerate(groups.items()):
    marker = 'sD^vP*X<>hp'[i % 11]
    axes.plot(
      *zip(newest, *places, strict=True), '--', marker=marker, color=f'C{i % 10}', label=name,
      markeredgecolor='black', markevery=range(1, len(places) + 1),
    )  # fmt: skip
  axes.annotate('$\\Theta^0$', newest, color='black', textcoords='offset points', xytext=(6, 6))
  first, second = found['shares']
  axes.set_xlabel(f'first principal component ({first:.1%} of variance)')
  axes.set_ylabel(f'second principal component ({second:.1%})')
  axes.set_xlim(found['x'][0], found['x'][-1])
  axes.set_ylim(found['y'][0], found['y'][-1])
  figure.legend(loc='outside right upper', fontsize=8)
  figure.savefig(path, dpi=110, metadata={'Software': None})
