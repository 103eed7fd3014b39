"""What a forgetting step consists of: many branches from one network, and their directions.

From the same Theta^0, trained on n images, branches are trained on a random half of them, on the
other half, on the same images, and on twice as many. Reversed forgetting is tau = Theta^0 - half;
the hypothesis says that it points to more data, more = twice - Theta^0. All branches also train
further, further = same - Theta^0, which is taken out by differences: tau + further = same - half,
and more - further = twice - same, each side of a cosine with its own branches of `same`, because a
branch on both sides would make a cosine of its own noise.
"""

import collections
import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from know_jax import trees
from know_jax.data.augmentation import Augmentation
from know_jax.data.sources import load_dataset, mean_image
from know_jax.errors import UserError
from know_jax.io.files import write_atomic
from know_jax.io.journal import Journal, read_lines
from know_jax.kinds import KEEP, leaf_kinds
from know_jax.report import intervals
from know_jax.report.markdown import table
from know_jax.report.plots import new_figure
from know_jax.seeds import named_key
from know_jax.study.trainer import Task, Trainer
from know_jax.training.state import learning_rates

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


def default_config() -> ConfigDict:
  """Every field of `--config`; a minute or two of two CPU cores for each network and seed."""
  return ConfigDict(
    {
      'dataset': 'digits',
      'data_dir': placeholder(str),
      'models': ('cnn', 'resnet_small', 'vit'),
      'widths': (8, 8, 32),
      'examples': 400,  # n; twice as many are needed.
      'branches': 6,  # Of each kind; even.
      'seeds': 3,
      'epochs': 30,  # Of Theta^0.
      'branch_epochs': 10,
      'batch_size': 32,
      'lr': 1e-3,
      'epsilon': 1e-7,
    }
  )


def run(config: Mapping[str, Any], workdir: str | Path) -> list[dict[str, Any]]:
  """Trains what the journal `rows.jsonl` in the workdir lacks, a line for each network and seed.

  Args:
    config: the fields of `default_config`.
    workdir: of the journal; runs on several data sets may share it.

  Returns:
    The rows so far.

  Raises:
    UserError: too few images, or an odd number of branches.
  """
  data = {
    split: load_dataset(config['dataset'], split, data_dir=config['data_dir'])
    for split in ('train', 'test')
  }
  if (have := len(data['train'].labels)) < 2 * config['examples']:
    raise UserError(f'found {have} training images; expected at least {2 * config["examples"]}.')
  if config['branches'] < 2 or config['branches'] % 2:
    raise UserError(f'branches is {config["branches"]}; expected an even number, 2 or more.')
  Path(workdir).mkdir(parents=True, exist_ok=True)
  journal = Journal(Path(workdir) / 'rows.jsonl')
  images = np.concatenate([data[split].images for split in data])
  labels = np.concatenate([data[split].labels for split in data])
  for model, width in zip(config['models'], config['widths'], strict=True):
    settings = {**config, 'model': model, 'width': width, 'dtype': 'float32'}
    trainer = Trainer(settings, images, labels, Augmentation())
    for seed in range(config['seeds']):
      key = f'{config["dataset"]} {model} {seed}'
      if journal.get(key) is None:
        began = time.monotonic()
        values = measure(trainer, settings, seed, have)
        about = {name: settings[name] for name in ('dataset', 'model', 'width', *_SIZES)}
        journal.add(key, **about, seed=seed, **values, seconds=time.monotonic() - began)
        print(key, f'{time.monotonic() - began:.0f} s', flush=True)
  return read_lines(Path(workdir) / 'rows.jsonl')


def measure(
  trainer: Trainer, config: Mapping[str, Any], seed: int, train_size: int
) -> dict[str, Any]:
  """Trains one Theta^0 and its branches.

  Returns:
    `start`: the test accuracy of Theta^0; `reached`: kind -> the mean test accuracy of its
    branches; `cosines`; `along`: direction -> test accuracy at each of `STRENGTHS`.
  """
  rng, n = np.random.default_rng(seed), config['examples']
  order = rng.permutation(train_size)
  first, both = order[:n], order[: 2 * n]
  test = np.arange(train_size, len(trainer.labels))
  mean = mean_image(np.asarray(trainer.images[first]))
  whole = Task(first, mean, trainer.outputs)

  def train(variables: Any, subset: np.ndarray, epochs: int, *names: str | int) -> Any:
    rates = learning_rates('cosine', config['lr'], epochs * (len(subset) // config['batch_size']))
    return trainer.train(
      variables, Task(subset, mean, trainer.outputs), rates, named_key(seed, *names)
    )[0]

  start = train(trainer.fresh(named_key(seed, 'init'), trainer.outputs), first, config['epochs'])
  moves: dict[str, list[np.ndarray]] = collections.defaultdict(list)
  reached: dict[str, list[float]] = collections.defaultdict(list)
  base = _flat(start)
  for branch in range(config['branches']):
    shuffled = rng.permutation(first)
    subsets = (shuffled[: n // 2], shuffled[n // 2 :], first, both)
    for kind, subset in zip(_KINDS, subsets, strict=True):
      trained = train(start, subset, config['branch_epochs'], kind, branch)
      moves[kind].append(_flat(trained) - base)
      reached[kind].append(trainer.score(trained, test, whole)['accuracy'])
  means = {kind: np.mean(vectors, axis=0) for kind, vectors in moves.items()}
  directions = {
    'tau': -means['half'],
    'contrast': means['same'] - means['half'],
    'more': means['twice'],
    'further': means['same'],
  }

  def accuracy(vector: np.ndarray) -> float:
    return trainer.score(_moved(start, vector), test, whole)['accuracy']

  return {
    'start': trainer.score(start, test, whole)['accuracy'],
    'reached': {kind: statistics.mean(values) for kind, values in reached.items()},
    'cosines': cosines(moves),
    'along': {
      name: [accuracy(strength * vector) for strength in STRENGTHS]
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


def _flat(variables: Any) -> np.ndarray:
  """All weights that a predictor moves, the head's too, as one float64 vector."""
  named, kinds = trees.named_leaves(variables['params']), leaf_kinds(variables['params'])
  return np.concatenate([np.float64(named[p]).ravel() for p, k in kinds.items() if k != KEEP])


def _moved(variables: Any, vector: np.ndarray) -> Any:
  """Variables with a vector like `_flat`'s added."""
  kinds, place = leaf_kinds(variables['params']), 0

  def move(path: Any, leaf: np.ndarray) -> np.ndarray:
    nonlocal place
    if kinds[trees.path_string(path)] == KEEP:
      return leaf
    part = vector[place : place + leaf.size].reshape(leaf.shape)
    place += leaf.size
    return (leaf + part).astype(np.float32)

  params = jax.tree_util.tree_map_with_path(move, variables['params'])
  return {**variables, 'params': params}


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


def _groups(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
  groups: dict[str, list[Mapping[str, Any]]] = collections.defaultdict(list)
  for row in rows:
    groups[f'{row["dataset"]}, {row["model"]}'].append(row)
  return groups


def _mean_text(values: Sequence[float], form: str) -> str:
  mean = f'{statistics.mean(values):{form}}'
  if len(values) == 1:
    return f'{mean} (one seed)'
  low, high = intervals.t_interval(values)
  return f'{mean} ({low:{form}} to {high:{form}})'


def page(rows: Sequence[Mapping[str, Any]], picture: str) -> str:
  """The page as Markdown."""
  groups = _groups(rows)
  angles = [
    [words, *(_mean_text([r['cosines'][name] for r in group], '+.2f') for group in groups.values())]
    for name, words in _COSINES.items()
  ]
  gains = [
    [
      f'trained on: {kind}',
      *(
        _mean_text([100 * (r['reached'][kind] - r['start']) for r in group], '+.2f')
        for group in groups.values()
      ),
    ]
    for kind in _KINDS
  ]
  gains += [
    [
      f'{words}, {strength:+g}',
      *(
        _mean_text([100 * (r['along'][name][i] - r['start']) for r in group], '+.2f')
        for group in groups.values()
      ),
    ]
    for name, words in _DIRECTIONS.items()
    for i, strength in enumerate(STRENGTHS)
  ]
  starts = ', '.join(
    f'{name} {100 * statistics.mean(r["start"] for r in group):.1f} %'
    for name, group in groups.items()
  )
  sizes = ', '.join(f'{name} {rows[0][name]:g}' for name in _SIZES)
  return '\n\n'.join(
    [
      '# What a forgetting step consists of',
      'From one trained Theta^0, branches are trained on a random half of its images, the other '
      'half, the same images, and twice as many. tau = Theta^0 - half is forgetting reversed, '
      'more = twice - Theta^0, further = same - Theta^0: all as means of the branches where not '
      f'said otherwise. Means over seeds with 95 % t-intervals; {len(rows)} Theta^0 in all, whose '
      'training is not finished: further training helps, so that all branches share it. '
      f'Theta^0 reaches: {starts}. Sizes: {sizes}; Adam, cosine, no augmentation.',
      table(['cosine', *groups], angles),
      'The contrast same - half takes further training out of tau, as twice - same takes it out of '
      'more; each side has its own branches of `same`.',
      f'![Accuracy along directions]({picture})',
      table(['test accuracy minus that of Theta^0, points', *groups], gains),
      'Made by `python bin/branches.py --workdir=docs/results/branches '
      '--report=docs/results/branches.md` from `docs/results/branches/rows.jsonl`.\n',
    ]
  )


def _draw(path: Path, groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
  figure = new_figure(3.6 * len(groups), 3.4)
  axes = np.ravel(figure.subplots(1, len(groups), squeeze=False))
  middle = sum(strength < 0 for strength in STRENGTHS)
  places = [*STRENGTHS[:middle], 0.0, *STRENGTHS[middle:]]
  for axis, (name, group) in zip(axes, groups.items(), strict=True):
    for direction, words in _DIRECTIONS.items():
      gains = np.mean([np.array(r['along'][direction]) - r['start'] for r in group], axis=0)
      axis.plot(places, 100 * np.insert(gains, middle, 0.0), marker='o', label=words)
    axis.axhline(0, color='grey', linewidth=0.5)
    axis.set(title=name, xlabel='times the direction', ylabel='accuracy, points')
  axes[0].legend()
  figure.savefig(path, dpi=110)
