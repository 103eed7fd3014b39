"""Reads meta-datasets in the form that the paper's authors publish: one `.mat` file a run.

A file is HDF5 (MATLAB v7.3) and holds, with the axes as MATLAB shows them and the oldest stage
(smallest subset) first:

  ConvWeights (3, 3, N, 7)   the 3 x 3 kernels, N of them over all layers
  FCWeights   (M, 7)         the weights of fully connected layers
  Bias        (K, 7)         the biases

MATLAB stores arrays by column, so that HDF5 shows the axes of its files reversed: `(7, N, 3, 3)`,
`(7, M)`, `(7, K)`. Both orders are read. FCWeights with M = 7 looks the same in either, ConvWeights
never does: its kernel axes are at one end and its stages at the other. Its shape therefore decides
for the whole file, and a file that says to be MATLAB's (by its header or by `MATLAB_class`
attributes) where that shape says otherwise is refused rather than guessed at.

The hyper-parameters are in the file's name; those that can be told there are kept (see
`name_fields`). The sampling rate must be: predictors depend on it. Reference: the paper, section
4.1.
"""

import collections
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from know_jax.errors import UserError
from know_jax.io import hdf5
from know_jax.jsonable import digest
from know_jax.meta import collect
from know_jax.runs.record import RunRecord

FORMAT = 'mat'
STAGES = 7
KERNEL = (3, 3)
DATASETS = {'ConvWeights': ('conv', 4), 'FCWeights': ('fc', 2), 'Bias': ('bias', 2)}
"""Name -> kind of leaf, number of axes."""

MAX_WEIGHTS = 2**22
"""More weights in a data set are refused unread; the paper's networks are under 3 M in all."""

UNKNOWN = 'unknown'
"""The model or data set of a file whose name does not tell it."""

# What file names call a thing -> our field. Not sizes of nets: `resnet18` is a model.
_FIELDS = {
  'rate': ('rate', 'r'),
  'stage_lr': ('learningrate', 'lr'),
  'batch_size': ('batchsize', 'batch', 'bs'),
  'stage_epochs': ('epochs', 'epoch', 'ep'),
  'seed': ('seed',),
}
_WHOLE = ('batch_size', 'stage_epochs', 'seed')
_NUMBER = r'(\d+(?:\.\d+)?(?:e[+-]?\d+)?)'
# Longer names first: fashion_mnist is not mnist, cifar100 not cifar10.
_NAMES = {
  'dataset': {
    'fashion[-_ ]?mnist': 'fashion_mnist',
    'cifar[-_ ]?100': 'cifar100',
    'cifar[-_ ]?10': 'cifar10',
    'mnist': 'mnist',
  },
  'model': {
    'resnet': 'resnet',
    'densenet': 'densenet',
    'shufflenet': 'shufflenetv2',
    'mobilenet': 'mobilenetv2',
    'cnn': 'cnn',
  },
}


def read_mat(path: str | Path, *, number: int = 0, rate: float | None = None) -> collect.Run:
  """Reads one run; the sampling rate is, without one, what the file's name says.

  Its weights are float32 (MATLAB's doubles are rounded to it): `ConvWeights` `[7, 3, 3, N]`,
  `FCWeights` `[7, M]` and `Bias` `[7, K]`, oldest first. `about` has `kinds`, `file`, and as
  `config` `stages` and what the file's name tells: see `name_fields`.

  Raises:
    UserError: the file cannot be read, or a data set is missing, is a link or keeps its values
      in another file, or has other axes, stages, numbers or sizes than described; file and data
      set are named. Or the name tells no rate between 0 and 1, and none is given.
  """
  path = Path(path).expanduser()
  if not path.is_file():
    raise UserError(f'{path}: no such file; expected a .mat file of a meta-dataset.')
  config = {'stages': STAGES, **name_fields(path.stem), **({} if rate is None else {'rate': rate})}
  if not 0.0 < config.get('rate', 0.0) < 1.0:
    raise UserError(
      f'{path}: the sampling rate is {config.get("rate", "not in the name")}; expected one between '
      "0 and 1, in the file's name as in `_r0.5_`, or as `rate`."
    )
  result = hdf5.read_arrays(
    path, list(DATASETS), limit=MAX_WEIGHTS * STAGES, sort='HDF5 (MATLAB v7.3)'
  )
  with path.open('rb') as raw:
    marked = raw.read(10) == b'MATLAB 7.3'
  marked = marked or any('MATLAB_class' in data.attributes for data in result.values())
  by_column = _by_column(result['ConvWeights'].values.shape, marked, f'{path}: ConvWeights')
  for name, data in result.items():
    _check_axes(name, data.values.shape, by_column, f'{path}: {name}')
  weights = {
    name: _oldest_first(data.values, by_column, f'{path}: {name}') for name, data in result.items()
  }
  about = {
    'format': FORMAT,
    'number': number,
    'file': path.name,
    'config': config,
    'kinds': {name: kind for name, (kind, _) in DATASETS.items()},
    'shapes': {name: list(leaf.shape) for name, leaf in weights.items()},
  }
  return collect.Run(number, about, weights)


def read_mat_folder(folder: str | Path) -> Iterator[collect.Run]:
  """Reads the `.mat` files of a folder, one by one; a run's number is its place by file name.

  Raises:
    UserError: there is none, or one is not as described in `read_mat`.
  """
  folder = Path(folder).expanduser()
  paths = sorted(folder.glob('*.mat'))
  if not paths:
    raise UserError(f'{folder}: no .mat files; expected a folder of them, one a run.')
  for number, path in enumerate(paths):
    yield read_mat(path, number=number)


def is_mat_folder(folder: str | Path) -> bool:
  """Whether a folder holds `.mat` files."""
  return any(Path(folder).expanduser().glob('*.mat'))


def read_any(folder: str | Path) -> Iterator[collect.Run]:
  """Reads a meta-dataset: a folder of `.mat` files, or the output of bin/collect.py.

  Raises:
    UserError: see `read_mat` and `collect.read_runs`; a folder with both is refused.
  """
  if not is_mat_folder(folder):
    return collect.read_runs(folder)
  if (Path(folder).expanduser() / 'runs').exists():
    raise UserError(
      f'{folder}: holds .mat files and a folder `runs` of bin/collect.py; expected one of them.'
    )
  return read_mat_folder(folder)


def describe(folder: str | Path, runs: Sequence[collect.Run]) -> dict[str, Any]:
  """What a meta-dataset, whose runs are given, is, for the card of what is trained on it.

  JSON data: `config` (for `.mat` files their number and a digest of their names and sizes),
  `summary` (lines of text) and `environment` (of the collection; empty for `.mat` files).

  Raises:
    UserError: the record of the collection is missing or damaged.
  """
  if not is_mat_folder(folder):
    record = RunRecord.read(folder, collect.KIND)
    lines = collect.summary_of([run.about for run in runs]).splitlines()
    return {'config': record['config'], 'summary': lines, 'environment': record['environment']}
  paths = sorted(Path(folder).expanduser().glob('*.mat'))
  sizes = {path.name: path.stat().st_size for path in paths}
  names = [name_fields(path.stem) for path in paths]
  groups = collections.Counter((fields['model'], fields['dataset']) for fields in names)
  lines = [f'{len(paths)} runs, from .mat files']
  lines += [f'  {model:<14} {data:<14} {n:>4} runs' for (model, data), n in sorted(groups.items())]
  config = {'format': FORMAT, 'files': len(paths), 'names_and_sizes': digest(sizes)}
  return {'config': config, 'summary': lines, 'environment': {}}


def name_fields(stem: str) -> dict[str, Any]:
  """The hyper-parameters that a file's name (without `.mat`) tells.

  Numbers follow a name that stands apart from others, with or without a sign between: `r0.5`,
  `lr=1e-3`, `batch_128`. `model` and `dataset` are 'unknown' where the name has none of those in
  the paper's section 4.1; of the other fields those are given that it has.
  """
  text = stem.lower()
  fields: dict[str, Any] = {}
  for field, names in _NAMES.items():
    fields[field] = next((ours for name, ours in names.items() if re.search(name, text)), UNKNOWN)
  for field, aliases in _FIELDS.items():
    result = re.search(rf'(?<![a-z0-9.])(?:{"|".join(aliases)})[-_= ]?{_NUMBER}(?![a-z0-9])', text)
    if result:
      value = float(result[1])
      fields[field] = int(value) if field in _WHOLE else value
  return fields


def _by_column(shape: tuple[int, ...], marked: bool, what: str) -> bool:
  """Whether the axes are reversed, as in a file that MATLAB wrote, by the shape of the kernels."""
  if len(shape) == 4 and shape[:2] == KERNEL and shape[3] == STAGES:
    if marked:
      raise UserError(
        f"{what}: HDF5 shows shape {shape} in a file marked as MATLAB's, which would show "
        f'{shape[::-1]}; expected (3, 3, N, {STAGES}) in MATLAB.'
      )
    return False
  if len(shape) == 4 and shape[2:] == KERNEL and shape[0] == STAGES:
    return True
  raise UserError(
    f'{what}: HDF5 shows shape {shape}; expected ({STAGES}, N, 3, 3), as MATLAB writes it, or '
    f'(3, 3, N, {STAGES}).'
  )


def _check_axes(name: str, shape: tuple[int, ...], by_column: bool, what: str) -> None:
  shown = shape[::-1] if by_column else shape
  axes = DATASETS[name][1]
  if len(shown) != axes or shown[-1] != STAGES or 0 in shown:
    raise UserError(
      f'{what}: has shape {shown}{" in MATLAB" if by_column else ""}; expected {axes} axes, none '
      f'empty, the last of the {STAGES} stages.'
    )


def _oldest_first(values: np.ndarray, by_column: bool, what: str) -> np.ndarray:
  """The values as float32, stages first, then the other axes as MATLAB shows them."""
  values = np.moveaxis(values.T if by_column else values, -1, 0)
  # Doubles beyond the range of float32 become infinite, and are named below.
  with np.errstate(over='ignore'):
    values = np.ascontiguousarray(values, np.float32)
  if not np.isfinite(values).all():
    stage = int(np.argmin(np.isfinite(values).reshape(STAGES, -1).all(axis=1)))
    raise UserError(
      f'{what}: stage {stage} (0 is the oldest) holds NaN or infinity in float32; expected finite '
      'weights.'
    )
  return values
