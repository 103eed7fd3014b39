"""What a forgetting step consists of: many branches from one network, and their directions.

From the same Theta^0, trained on n images, branches are trained on a random half of them, on the
other half, on the same images, and on twice as many. Reversed forgetting is tau = Theta^0 - half;
the hypothesis says that it points to more data, more = twice - Theta^0. All branches also train
further, further = same - Theta^0, which is taken out by differences: tau + further = same - half,
and more - further = twice - same, each side of a cosine with its own branches of `same`, because a
branch on both sides would make a cosine of its own noise.
"""

import collections
import dataclasses
import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from know_jax.data.sources import Dataset, load_dataset, mean_image
from know_jax.errors import UserError
from know_jax.fields import Given, editable, read_config
from know_jax.io.files import write_atomic
from know_jax.io.journal import Journal, read_lines
from know_jax.kinds import flatten, unflatten
from know_jax.report import intervals
from know_jax.report.markdown import table
from know_jax.report.plots import new_figure
from know_jax.seeds import named_key
from know_jax.tasks import classification
from know_jax.tasks.base import NetworkFields
from know_jax.training import loop
from know_jax.training.state import Recipe
from know_jax.training.steps import put_data

STRENGTHS = (-1.0, -0.5, -0.25, 0.25, 0.5, 1.0)
"""How far along each direction accuracy is measured."""

_SIZES = ('examples', 'epochs', 'branches', 'branch_epochs', 'batch_size', 'lr')

_KINDS = ('half', 'other half', 'same', 'twice')

_COSINES = {
  'tau, more: one branch': 'cos(tau, more), one branch each',
  'tau, more: means': 'cos(tau, more), means of branches',
  'tau, further: means': 'cos(tau, further), means',
  'contrast, more - further: means': 'cos(same - half, twice - same), means',
  'half, half': 'cos of two branches on halves',
  'half, other half: means': 'cos(half, other half), means',
}
"""Quantity -> its words in the page."""

_DIRECTIONS = {'tau': 'tau', 'contrast': 'same - half', 'more': 'more', 'further': 'further'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Every field of `--config`; a minute or two of two CPU cores for each network and seed."""

  dataset: str = 'digits'
  data_dir: str | None = None
  models: tuple[str, ...] = ('cnn', 'resnet_small', 'vit')
  widths: tuple[int | None, ...] = (8, 8, 32)
  examples: int = 400  # n; twice as many are needed.
  branches: int = 6  # Of each kind; even.
  seeds: int = 3
  epochs: int = 30  # Of Theta^0.
  branch_epochs: int = 10
  batch_size: int = 32
  lr: float = 1e-3
  epsilon: float = 1e-7

  def __post_init__(self) -> None:
    if self.branches < 2 or self.branches % 2:
      raise UserError(f'branches is {self.branches}; expected an even number, 2 or more.')


def default_config() -> ConfigDict:
  """Every field of `--config`, with its default: see `Config`."""
  return editable(Config())


def run(config: Config | Given, workdir: str | Path) -> list[dict[str, Any]]:
  """Trains what the journal `rows.jsonl` in the workdir lacks, a row for each network and seed.

  Runs on several data sets may share a workdir. Gives all rows so far.

  Raises:
    UserError: too few images, or an odd number of branches.
  """
  config = read_config(Config, config)
  train, test = (
    load_dataset(config.dataset, split, data_dir=config.data_dir) for split in ('train', 'test')
  )
  if train.size < 2 * config.examples:
    raise UserError(f'found {train.size} training images; expected at least {2 * config.examples}.')
  Path(workdir).mkdir(parents=True, exist_ok=True)
  journal = Journal(Path(workdir) / 'rows.jsonl')
  for model, width in zip(config.models, config.widths, strict=True):
    for seed in range(config.seeds):
      key = f'{config.dataset} {model} {seed}'
      if journal.get(key) is None:
        began = time.monotonic()
        values = measure(config, NetworkFields(model=model, width=width), train, test, seed)
        about = {'dataset': config.dataset, 'model': model, 'width': width}
        about |= {name: getattr(config, name) for name in _SIZES}
        journal.add(key, **about, seed=seed, **values, seconds=time.monotonic() - began)
        print(key, f'{time.monotonic() - began:.0f} s', flush=True)
  return read_lines(Path(workdir) / 'rows.jsonl')


def measure(
  config: Config, network: NetworkFields, train_set: Dataset, test_set: Dataset, seed: int
) -> dict[str, Any]:
  """Trains one Theta^0 and its branches.

  Returns:
    `start`: the test accuracy of Theta^0; `reached`: kind -> the mean test accuracy of its
    branches; `cosines`; `along`: direction -> test accuracy at each of `STRENGTHS`.
  """
  rng, n = np.random.default_rng(seed), config.examples
  order = rng.permutation(train_set.size).astype(np.int32)
  first, both = order[:n], order[: 2 * n]
  model = classification.network_of(network, train_set.num_classes)
  task = classification.task(model, train_set, test_set, mean=mean_image(train_set.images[first]))
  data, tested = put_data(task)
  recipe = Recipe(epsilon=config.epsilon)

  def train(variables: Any, subset: np.ndarray, epochs: int, *names: str | int) -> Any:
    return loop.train(
      task, variables, data, subset, recipe=recipe, epochs=epochs, lr=config.lr,
      batch_size=config.batch_size, schedule='cosine', key=named_key(seed, *names),
    )  # fmt: skip

  def score(variables: Any) -> float:
    return loop.evaluate(task, variables, tested)['accuracy']

  fresh = jax.device_get(task.init(named_key(seed, 'init')))
  start = train(fresh, first, config.epochs, 'start')
  moves: dict[str, list[np.ndarray]] = collections.defaultdict(list)
  reached: dict[str, list[float]] = collections.defaultdict(list)
  base = flatten(start)
  for branch in range(config.branches):
    shuffled = rng.permutation(first)
    subsets = (shuffled[: n // 2], shuffled[n // 2 :], first, both)
    for kind, subset in zip(_KINDS, subsets, strict=True):
      trained = train(start, subset, config.branch_epochs, kind, branch)
      moves[kind].append(flatten(trained) - base)
      reached[kind].append(score(trained))
  means = {kind: np.mean(vectors, axis=0) for kind, vectors in moves.items()}
  directions = {
    'tau': -means['half'],
    'contrast': means['same'] - means['half'],
    'more': means['twice'],
    'further': means['same'],
  }

  return {
    'start': score(start),
    'reached': {kind: statistics.mean(values) for kind, values in reached.items()},
    'cosines': cosines(moves),
    'along': {
      name: [score(unflatten(base + strength * vector, start)) for strength in STRENGTHS]
      for name, vector in directions.items()
    },
  }


def cosines(moves: Mapping[str, Sequence[np.ndarray]]) -> dict[str, float]:
  """The cosines in `_COSINES` of the moves of branches from Theta^0, kind -> vectors."""
  half, other, same, twice = (np.stack(moves[kind]) for kind in _KINDS)
  even, odd = same[::2].mean(0), same[1::2].mean(0)
  pairs = itertools.combinations(half, 2)
  return {
    'tau, more: one branch': statistics.mean(map(_cosine, -half, twice)),
    'tau, more: means': _cosine(-half.mean(0), twice.mean(0)),
    'tau, further: means': _cosine(-half.mean(0), same.mean(0)),
    'contrast, more - further: means': _cosine(even - half.mean(0), twice.mean(0) - odd),
    'half, half': statistics.mean(_cosine(a, b) for a, b in pairs),
    'half, other half: means': _cosine(half.mean(0), other.mean(0)),
  }


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
  return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def write(workdir: str | Path, path: str | Path) -> Path:
  """Writes a page of the rows in a workdir, and a picture beside it (.png)."""
  path, lines = Path(path), read_lines(Path(workdir) / 'rows.jsonl')
  # Two processes may have trained the same: the first line of a key counts, as in the journal.
  rows = list({row['key']: row for row in lines[::-1]}.values())[::-1]
  if not rows:
    raise UserError(f'{workdir} has no rows yet; run the study first.')
  write_atomic(path, page(rows, path.with_suffix('.png').name).encode())
  _draw(path.with_suffix('.png'), _groups(rows))
  return path


def _groups(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
  """Data set -> network -> its rows."""
  groups: dict[str, Any] = collections.defaultdict(lambda: collections.defaultdict(list))
  for row in rows:
    groups[row['dataset']][row['model']].append(row)
  return groups


def _mean_text(values: Sequence[float], form: str) -> str:
  mean = f'{statistics.mean(values):{form}}'
  if len(values) == 1:
    return f'{mean} (one seed)'
  low, high = intervals.t_interval(values)
  return f'{mean} ({low:{form}} to {high:{form}})'


def _section(dataset: str, groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
  """Of the page: the tables of one data set, with a column for each network."""

  def line(words: str, *place: str | int, gain: bool = True) -> list[str]:
    def value(row: Mapping[str, Any]) -> float:
      reached: Any = row
      for key in place:
        reached = reached[key]
      return 100 * (reached - row['start']) if gain else reached

    return [words, *(_mean_text(list(map(value, group)), '+.2f') for group in groups.values())]

  angles = [line(words, 'cosines', name, gain=False) for name, words in _COSINES.items()]
  gains = [line(f'trained on: {kind}', 'reached', kind) for kind in _KINDS]
  gains += [
    line(f'{words}, {strength:+g}', 'along', name, i)
    for name, words in _DIRECTIONS.items()
    for i, strength in enumerate(STRENGTHS)
  ]
  starts = ', '.join(
    f'{name} {100 * statistics.mean(r["start"] for r in group):.1f} %'
    for name, group in groups.items()
  )
  return [
    f'## {dataset}',
    f'Theta^0 reaches: {starts}.',
    table(['cosine', *groups], angles),
    table(['test accuracy minus that of Theta^0, points', *groups], gains),
  ]


def page(rows: Sequence[Mapping[str, Any]], picture: str) -> str:
  """The page as Markdown."""
  sizes = ', '.join(f'{name} {rows[0][name]:g}' for name in _SIZES)
  return '\n\n'.join(
    [
      '# What a forgetting step consists of',
      'From one trained Theta^0, branches are trained on a random half of its images, the other '
      'half, the same images, and twice as many. tau = Theta^0 - half is forgetting reversed, '
      'more = twice - Theta^0, further = same - Theta^0: averaged over branches '
      f'unless stated. Means over seeds with 95 % t-intervals; {len(rows)} Theta^0 in all. All '
      'branches train further; where `same` gains accuracy, Theta^0 was not finished. '
      f'Sizes: {sizes}; Adam, cosine, no augmentation.',
      'The contrast same - half takes further training out of tau, as twice - same takes it out of '
      'more; each side has its own branches of `same`.',
      f'![Accuracy along directions]({picture})',
      *(part for data_set in _groups(rows).items() for part in _section(*data_set)),
      'Made by `python bin/branches.py --workdir=docs/results/branches '
      '--report=docs/results/branches.md` from `docs/results/branches/rows.jsonl`.\n',
    ]
  )


def _draw(path: Path, groups: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> None:
  columns = max(map(len, groups.values()))
  figure = new_figure(3.6 * columns, 3.4 * len(groups))
  grid = figure.subplots(len(groups), columns, squeeze=False)
  middle = sum(strength < 0 for strength in STRENGTHS)
  places = [*STRENGTHS[:middle], 0.0, *STRENGTHS[middle:]]
  for axes, (dataset, models) in zip(grid, groups.items(), strict=True):
    for axis, (model, group) in zip(axes, models.items(), strict=False):
      for direction, words in _DIRECTIONS.items():
        gains = np.mean([np.array(r['along'][direction]) - r['start'] for r in group], axis=0)
        axis.plot(places, 100 * np.insert(gains, middle, 0.0), marker='o', label=words)
      axis.axhline(0, color='grey', linewidth=0.5)
      axis.set(title=f'{dataset}, {model}', xlabel='times the direction', ylabel='accuracy, points')
    for axis in axes[len(models) :]:
      axis.set_visible(False)
  grid[0, 0].legend()
  figure.savefig(path, dpi=110)
