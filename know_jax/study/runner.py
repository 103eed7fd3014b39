"""The transfer study: arms x amounts of source data x source seeds x transfer seeds -> one table.

For one source seed and one transfer seed all arms share the source run, head, labelled examples and
order, so that they are compared in pairs. A workdir holds

  sources/<amount>-<seed>-r<rate>/  forgetting runs, with trained arms beside their stages
  journal.jsonl                     a line for each start and each training, as they come
  results.csv                       a row for each training: `results.COLUMNS`
  timings.csv                       seconds: `results.TIMING_COLUMNS`

The same command runs on after a kill, and gives the same results.csv byte for byte on the same
machine. Several processes may share a workdir, by --workers, by a Dask scheduler or by the same
command started twice: each takes a source that no other is at. Arms and seeds may be added to the
config later; what is done is kept.
"""

import collections
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from know_jax import forgetting
from know_jax.errors import UserError, reason
from know_jax.fields import Given, config_dict, read_config
from know_jax.io.files import hidden_sibling, local_path, locked
from know_jax.io.journal import Journal
from know_jax.jsonable import digest
from know_jax.kinds import KINDS
from know_jax.runs.record import RunRecord
from know_jax.runs.workdir import KIND as KIND_OF_SOURCES
from know_jax.runs.workers import each
from know_jax.study.arms import TRAINED, Arm
from know_jax.study.design import Cell, Config, Study, combined_seed
from know_jax.study.results import (
  COLUMNS,
  RESULTS,
  TIMING_COLUMNS,
  TIMINGS,
  curve_text,
  read_table,
  write_table,
)
from know_jax.study.sources import Run, Source, weights_digest
from know_jax.system.progress import Bar, progress
from know_jax.tasks import domains
from know_jax.training.state import DivergedError
from know_jax.training.steps import Data, put_data
from know_jax.transfer import train_one

KIND = 'study'
_JOURNAL = 'journal.jsonl'
_DIVERGED = {'loss': math.nan, 'seconds': math.nan, 'curve': []}


def run(
  config: Config | Given,
  workdir: str | Path,
  *,
  show_progress: bool = True,
  workers: int = 1,
  scheduler: str | None = None,
) -> str:
  """Runs what is left of a study; says what is done and where it is.

  Where each domain is left out in turn, every one has a folder of its own in the workdir, and they
  share the forgetting runs. `workers` and `scheduler` are as in `runs.workers.each`, which is
  handed the source runs; `show_progress` is then by source.

  Raises:
    UserError: before anything is trained, if a value does not fit, or the workdir is of another
      study; later, if a source run diverges.
  """
  parts = _studies(config, local_path(workdir, 'workdir'))
  return '\n'.join(_run(study, path, show_progress, workers, scheduler) for study, path in parts)


def _studies(config: Config | Given, workdir: Path) -> list[tuple[Study, Path]]:
  """The studies that a config stands for, and where each is."""
  config = read_config(Config, config)
  shared, result = config.sources or str(workdir / 'sources'), []
  for name, leg in domains.legs(config.transfer).items():
    sources = shared if name else config.sources
    one = dataclasses.replace(config, transfer=leg, sources=sources)
    result.append((Study(one), workdir / name))
  return result


def _run(
  study: Study, workdir: Path, show_progress: bool, workers: int, scheduler: str | None
) -> str:
  """One of the studies."""
  record = RunRecord.open(workdir, study.lasting, kind=KIND)
  record.update(study=config_dict(study.config), **study.target.about)
  study.sources_folder(workdir).mkdir(parents=True, exist_ok=True)
  elsewhere = []
  cells = collections.Counter(cell.source for cell in study.cells())
  with progress(cells.total(), 'study', 'training', show=show_progress) as bar:
    make: Callable[[Source], Source | str]
    if here := workers == 1 and scheduler is None:
      target = functools.cache(lambda: put_data(study.target))
      make = functools.partial(_at_source, study, workdir, target, bar, show_progress)
    else:
      make = functools.partial(_in_worker, study.config, workdir)
    for source in each(make, study.sources(), workers=workers, scheduler=scheduler):
      if isinstance(source, str):
        elsewhere.append(source)
      elif not here:
        bar.update(cells[source])
      write_results(study, workdir)
  done = write_results(study, workdir)
  text = f'{done} of {cells.total()} trainings are in {workdir / RESULTS}'
  if elsewhere:
    text += f'\nat work in other processes: {", ".join(elsewhere)}'
  return text


_OPENED: dict[str, tuple[Study, Callable[[], tuple[Data, Data]]]] = {}
"""Of a worker: its studies by the digest of their configs, and their data once they are needed."""


def _in_worker(config: Config, workdir: Path, source: Source) -> Source | str:
  """`_at_source` in a process that has only the config of the study."""
  key = digest(config_dict(config))
  if key not in _OPENED:
    study = Study(config)
    _OPENED[key] = study, functools.cache(lambda: put_data(study.target))
  with progress(0, 'study', 'training', show=False) as bar:
    return _at_source(_OPENED[key][0], workdir, _OPENED[key][1], bar, False, source)


def _at_source(
  study: Study,
  workdir: Path,
  target: Callable[[], tuple[Data, Data]],
  bar: Bar,
  show_progress: bool,
  source: Source,
) -> Source | str:
  """All that starts from a source, unless another process is at it: then its name."""
  path = study.sources_folder(workdir) / source.name
  turn = contextlib.ExitStack()
  try:
    turn.enter_context(locked(hidden_sibling(path, 'turn'), wait_seconds=0.0))
  except TimeoutError:
    return source.name
  except OSError as error:
    raise UserError(f'cannot write in {workdir}: {reason(error)}.') from error
  with turn:
    journal = Journal(workdir / _JOURNAL)
    _run_source(study, source, path, journal, target, bar, show_progress)
  return source


def _run_source(
  study: Study,
  source: Source,
  path: Path,
  journal: Journal,
  target: Callable[[], tuple[Data, Data]],
  bar: Bar,
  show_progress: bool,
) -> None:
  """Forgets, predicts and transfers: all that starts from one source."""
  arms = study.arms_from(source)
  seeds = range(study.config.transfer_seeds)
  if not _is_finished(study, source, path):
    forgetting.run(study.settings(source), path, show_progress=show_progress)

  loaded = functools.cache(functools.partial(Run, path))
  for arm in arms:
    start = journal.get(key := study.start_key(arm, source))
    variables = None
    if start is None:
      start, variables = _start(arm, loaded)
      start = journal.add(key, task='start', **start)
    for seed in seeds:
      key = study.training_key(arm, start['weights'], source.seed, seed)
      if start['weights'] is not None and journal.get(key) is None:
        if variables is None and arm.predictor != 'scratch':
          variables, _ = loaded().start(arm)
        number = combined_seed(source.seed, seed)
        try:
          result = train_one(
            study.target, variables, target(), study.subsets[number], study.transfer_config(arm),
            number, study.curve_epochs(seed), {'training': study.subsets[number]},
          )  # fmt: skip
        except DivergedError:
          # One arm's failure is a result, and no reason to lose the others'.
          result = _DIVERGED
        journal.add(key, task='transfer', **result)
      bar.set_postfix(source=source.name, arm=f'{arm.name} x{arm.multiple:.3g}')
      bar.update(1)


def _is_finished(study: Study, source: Source, path: Path) -> bool:
  """Whether a source's run is there and complete, without loading its data."""
  if not (path / 'record.json').exists():
    return False
  stages = RunRecord.read(path, KIND_OF_SOURCES).get('stages', [])
  return len(stages) == study.config.source.stages


def _start(arm: Arm, loaded: Callable[[], Run]) -> tuple[dict[str, Any], Any]:
  """What is noted of an arm's start, and its variables."""
  if arm.predictor == 'scratch':
    return {'weights': 'scratch', 'retrodiction': {}, 'seconds': 0.0}, None
  try:
    variables, seconds = loaded().start(arm)
  except DivergedError:
    return {'weights': None, 'retrodiction': {}, 'seconds': math.nan}, None
  about = {'weights': weights_digest(variables, loaded().head), 'seconds': seconds}
  return about | loaded().scores(arm, variables), variables


def _outcomes(study: Study, journal: Journal) -> Iterator[tuple[Cell, str, dict, str, Any]]:
  """Of every cell whose start is made: key and entry of start and training, None if not trained."""
  for cell in study.cells():
    start = journal.get(start_key := study.start_key(cell.arm, cell.source))
    if start is not None:
      key = study.training_key(cell.arm, start['weights'], cell.source.seed, cell.transfer_seed)
      yield cell, start_key, start, key, journal.get(key) if start['weights'] else _DIVERGED


def write_results(study: Study, workdir: Path) -> int:
  """Writes results.csv and timings.csv from the journal; returns how many rows there are."""
  rows, timings = [], list(_source_timings(study, workdir))
  noted: set[str] = set()
  for cell, start_key, start, key, result in _outcomes(study, Journal(workdir / _JOURNAL)):
    if result is None:
      continue
    rows.append(_row(study, cell, start, result))
    arm, source, seed = cell
    place = {
      'arm': arm.name, 'step': arm.step, 'amount': source.amount, 'rate': source.rate,
      'source_seed': source.seed,
    }  # fmt: skip
    task = arm.predictor if arm.predictor in TRAINED else 'predict'
    if start_key not in noted and (arm.step or task != 'predict'):
      timings.append({'task': task, **place, 'seconds': start['seconds']})
    if key not in noted:
      seconds = result['seconds']
      timings.append({'task': 'transfer', **place, 'transfer_seed': seed, 'seconds': seconds})
    noted |= {start_key, key}
  write_table(workdir / RESULTS, COLUMNS, rows)
  write_table(workdir / TIMINGS, TIMING_COLUMNS, timings)
  return len(rows)


def _row(
  study: Study, cell: Cell, start: Mapping[str, Any], result: Mapping[str, Any]
) -> dict[str, Any]:
  config, retrodiction, (arm, source, seed) = study.config, start['retrodiction'], cell
  same = ('group', 'predictor', 'step', 'option', 'history', 'batch_norm', 'lr_scale')
  return {
    **{name: getattr(arm, name) for name in same},
    **{name: start.get(name) for name in ('source_accuracy', 'source_loss', 'weight_norm')},
    **{f'retrodiction_{kind}': retrodiction.get(kind) for kind in KINDS},
    'arm': arm.name, 'multiple': float(arm.multiple), 'kinds': ' '.join(arm.kinds),
    'rate': float(arm.rate), 'source': config.source.dataset,
    'target': config.transfer.dataset, 'model': config.source.model,
    'labels_per_class': config.transfer.labels_per_class, 'amount': float(source.amount),
    'source_seed': source.seed, 'transfer_seed': seed, 'retrodiction': retrodiction.get('all'),
    'weights': (start['weights'] or '')[:12],
    'accuracy': result.get(study.target.score, math.nan), 'loss': result['loss'],
    **{name: result.get(name) for name in ('mean_accuracy', 'training', 'validation')},
    'curve': curve_text(result['curve']),
  }  # fmt: skip


def _source_timings(study: Study, workdir: Path) -> Iterator[dict[str, Any]]:
  """The seconds of every stage of the source runs that there are."""
  for source in study.sources():
    path = study.sources_folder(workdir) / source.name
    if not (path / 'record.json').exists():
      continue
    for stage in RunRecord.read(path, KIND_OF_SOURCES).get('stages', []):
      yield {
        'task': 'forget' if stage['stage'] else 'pretrain',
        'step': stage['stage'],
        'amount': source.amount,
        'rate': source.rate,
        'source_seed': source.seed,
        'seconds': stage['train_seconds'],
      }


def plan(config: Config | Given, workdir: str | Path) -> str:
  """What `run` would do: how much, how much of it is done, and the time for the rest.

  Nothing is trained or written; the workdir need not exist.

  Raises:
    UserError: a value does not fit.
  """
  parts = _studies(config, local_path(workdir, 'workdir'))
  return '\n'.join(_plan(study, path) for study, path in parts)


def _plan(study: Study, workdir: Path) -> str:
  journal, sources = Journal(workdir / _JOURNAL), study.sources()
  finished = [s for s in sources if _is_finished(study, s, study.sources_folder(workdir) / s.name)]
  total = len(list(study.cells()))
  done = sum(result is not None for *_, result in _outcomes(study, journal))
  groups = [arm.group for arm in study.arms]
  per_group = ', '.join(f'{groups.count(name)} {name}' for name in dict.fromkeys(groups))
  lines = [
    f'forgetting runs: {len(sources)} ({len(finished)} done), '
    f'{study.config.source.stages} stages each',
    f'arms: {per_group}',
    f'trainings: {total} ({done} done); arms with equal weights share theirs',
    _time_left(study, workdir, len(sources) - len(finished), total - done),
  ]
  return '\n'.join(lines)


def _time_left(study: Study, workdir: Path, runs: int, trainings: int) -> str:
  """The time for so many runs and trainings, at the mean rate of those that are done."""
  if not (workdir / TIMINGS).exists():
    return 'time: unmeasured, nothing has run here yet'
  seconds = read_table(workdir / TIMINGS, TIMING_COLUMNS).set_index('task')['seconds'].dropna()
  if not {'transfer', 'pretrain'} <= set(seconds.index):
    return 'time: unmeasured, no training has ended here yet'
  is_training = seconds.index == 'transfer'
  per_training = seconds[is_training].mean()
  per_run = seconds[~is_training].sum() / (seconds.index == 'pretrain').sum()
  left = runs * per_run + trainings * per_training
  return (
    f'time left: about {left / 60:.0f} minutes of one process, at {per_run:.1f} s a source run '
    f'with its predictions and {per_training:.2f} s a training, as measured here'
  )
