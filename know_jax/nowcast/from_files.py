"""Predicts histories in files that are larger than memory, leaf by leaf and slice by slice.

What is written for every predictor, and what a killed run goes on from:

```
<output>/<predictor>/record.json   the run: options, digests of the history, finished shards
<output>/<predictor>/<step>/...    the newest checkpoint with its weights replaced
<output>/<predictor>/<step>/nowcast.json   what this is, with checksums
<output>/<predictor>/<step>/README.md      the same for people
```

Leaves go through the engine of `nowcast.predict` (`nowcast.chunks`) a stretch at a time. Predictors
that need the leaf's moments have it read once for them, and once more for the prediction; those of
whole leaves need it in memory. Predictions are checked leaf by leaf, and bad ones replaced.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from know_jax import kinds as kinds_
from know_jax import trees
from know_jax.errors import PredictionWarning, UserError, reason, unknown_name
from know_jax.io import safetensors
from know_jax.io.files import local_path, locked, write_atomic
from know_jax.io.formats import open_weights
from know_jax.io.sealed import write_sealed
from know_jax.io.weights import Leaf, Reader, Shard, Sink, Weights
from know_jax.jsonable import digest
from know_jax.nowcast import api, cards, chunks, pieces
from know_jax.nowcast import health as health_
from know_jax.nowcast import stages as stages_
from know_jax.nowcast.job import Job as EngineJob
from know_jax.nowcast.plan import check_steps, checked_theta, plan_of
from know_jax.predictors import base
from know_jax.predictors.parameters import load_known, network_of, theta_digest
from know_jax.predictors.registry import check_used, resolve_all
from know_jax.runs.record import RunRecord
from know_jax.system.progress import Bar, progress

FORMAT = 'know_jax nowcast of files/1'
CARD = 'nowcast.json'
SHARD_BYTES = 1 << 30
MEMORY = 1 << 30
"""Bytes for what cannot be taken in slices: leaves of `tsv`, chunks of Orbax."""

_RECORD = 'record.json'
_STATISTICS = re.compile(r'(^|/)running_mean$')
_RECIPE = (
  'BatchNorm keeps the statistics of the newest stage. To settle them on your data in PyTorch: '
  'for m in model.modules(): hasattr(m, "reset_running_stats") and m.reset_running_stats(); then '
  'set m.momentum = None, call model.train(), and run some batches under torch.no_grad().'
)
_TIED = re.compile(r'(^|/)(lm_head|embed_out|output_projection|decoder)/weight$')
"""Output layers that many models share with their embedding, and that savers then leave out."""


@dataclasses.dataclass(frozen=True)
class Job:
  """A prediction that has been checked; `write` carries it out.

  Attributes:
    stages: the history, oldest first.
    kinds: path -> kind.
    predictors: name -> predictor.
    steps: how far; the weights of every step from 1 on are written.
    rate: r.
    on_bad: what becomes of bad leaves, a choice of `guards.ON_BAD`.
    known: file or folder with the parameters of KNOWN; None: those shipped.
    network: whose parameters these are: 'known' or 'known_leaf'; None where none are given.
    options: of the predictors.
    leaves: path -> leaf of the newest stage, with the dtype that is written.
    shards: the files of the newest stage, None where others are written.
    format: of what is written.
    dtype: the name of that which floating-point leaves are written in, None for their own.
    notes: what to tell about the history.
    stacked: the paths of leaves that hold layers on their first axis.
  """

  stages: list[Weights]
  kinds: dict[str, str]
  predictors: dict[str, Any]
  steps: int
  rate: float
  on_bad: str
  known: str | None
  network: str | None
  options: dict[str, Any]
  leaves: dict[str, Leaf]
  shards: tuple[Shard, ...] | None
  format: str
  dtype: str | None
  notes: tuple[str, ...]
  stacked: frozenset[str]


def prepare(
  history: Sequence[str | os.PathLike],
  *,
  predictors: Sequence[Any] = ('known',),
  steps: int = 3,
  rate: float = 0.5,
  kinds: Mapping[str, str] | None = None,
  known: str | None = None,
  on_bad: str = 'keep',
  memory: int = MEMORY,
  options: Mapping[str, Any] | None = None,
  only: str | None = None,
  skip: str | None = None,
  stacked: str | None = None,
  format: str | None = None,
  dtype: str | None = None,
) -> Job:
  """Checks a history in files and what is asked of it; reads headers and metadata, no weights.

  Args:
    history: the stages, oldest (smallest subset) first; each what `formats.open_weights` takes;
      or one folder that holds them, see `stages.expand`.
    predictors: names in `PREDICTORS`, 'package.module:object', or objects.
    steps: how far; the weights of every step from 1 on will be written.
    rate: r, as in `nowcast.predict`.
    kinds: regular expression -> kind, see `kinds.find_kinds`.
    known: file or folder with the parameters of KNOWN, as `load_known` takes; None: those shipped.
    on_bad: what becomes of bad leaves, as in `nowcast.predict`.
    memory: bytes that may be taken for what must be whole: leaves of `tsv`, chunks of Orbax.
    options: of the predictors, as `nowcast.predict` takes them.
    only: regular expression; leaves in whose path it is not found are kept.
    skip: regular expression; leaves in whose path it is found are kept.
    stacked: regular expression; the leaves hold layers on their first axis, as in `predict`.
    format: 'safetensors' to write that; None: the newest stage's, where it can be written.
    dtype: 'float32', 'bfloat16' or 'float16' to write floating-point leaves in; None: their own.

  Raises:
    UserError: a stage cannot be read, is there twice or out of order, differs from the newest in
      the names, shapes or dtypes of predicted leaves, a leaf has no kind, a predictor is unknown
      or cannot do the steps with this history, or something that must be whole is too large; the
      leaf is named.
  """
  made = resolve_all(predictors, options)
  if not history:
    raise UserError('the history is empty; wanted the weights of at least one stage.')
  stages = [open_weights(path) for path in stages_.expand(history)]
  stages_.check_paths(stages)
  newest = stages[-1]
  chosen = _not_chosen(newest.leaves, only, skip)
  _check_complex(newest.leaves, {**chosen, **(kinds or {})})
  found = kinds_.find_kinds(newest.leaves, {**chosen, **(kinds or {})}, stacked)
  opaque = [path for path, leaf in newest.leaves.items() if leaf.dtype == np.dtype('V1')]
  told = f'of a dtype that is not predicted, and copied: {", ".join(opaque)}.'
  notes = [told] if opaque else []
  notes += [*found.notes, *(note for stage in stages for note in stage.notes)]
  if any(_STATISTICS.search(path) for path in newest.leaves):
    notes.append(_RECIPE)
  _check_stages(stages, found.of, notes, skip)
  for note in notes:
    warnings.warn(note, PredictionWarning, stacklevel=2)
  shards, leaves = _output(newest, format, dtype)
  network = None if known is None else network_of(load_known(known))
  check_used(known, network, made)
  job = Job(
    stages, found.of, made, steps, rate, on_bad, known, network,
    dict(options or {}), leaves, shards, newest.format if shards else 'safetensors', dtype,
    tuple(notes), found.stacked,
  )  # fmt: skip
  for name in job.predictors:
    _check_predictor(job, name)
    _check_memory(job, name, memory)
  _ = job.shards or _new_shards(job, SHARD_BYTES)  # An error, if a dtype cannot be written.
  return job


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
  """Options as given to `--option`, 'name=value': a number or truth where it reads as one.

  Raises:
    UserError: a text is not of that form.
  """
  options = {}
  for text in texts:
    name, equals, value = text.partition('=')
    if not equals or not name.isidentifier():
      raise UserError(f"option: found {text!r}; expected 'name=value', as in 'lam=0.3'.")
    try:
      options[name] = json.loads(value)
    except ValueError:
      options[name] = value
  return options


def plan(job: Job, output: str | os.PathLike) -> str:
  """What `write` would do, in a few lines: weights of each kind, bytes, disk and time.

  The time is that of one slice of weights, which is predicted in memory, taken for all.
  """
  output = local_path(output, 'output')
  place = next(path for path in (output, *output.absolute().parents) if path.is_dir())
  sizes = dict.fromkeys((*kinds_.KINDS, kinds_.KEEP), 0)
  for path, kind in job.kinds.items():
    sizes[kind] += job.leaves[path].size
  predicted = sum(sizes.values()) - sizes[kinds_.KEEP]
  read = sum(leaf.nbytes for stage in job.stages for leaf in stage.leaves.values())
  written = sum(leaf.nbytes for leaf in job.leaves.values())
  seconds = 0.0
  for name in job.predictors if predicted else ():
    stage = {'a/kernel': np.zeros((1 << 9, 1 << 9), np.float32)}
    for _ in range(2):  # The first call compiles.
      began = time.perf_counter()
      api.forecast(
        [stage] * len(job.stages), job.steps, predictor=job.predictors[name],
        theta=_theta(job, name), rate=job.rate, on_bad='ignore',
      )  # fmt: skip
      taken = time.perf_counter() - began
    seconds += taken * predicted / (1 << 18)
  kinds = ', '.join(f'{size:,} {kind}' for kind, size in sizes.items())
  return (
    f'weights: {kinds}\n'
    f'reads {read / 1e6:,.1f} MB; writes {job.steps} x {len(job.predictors)} checkpoints of '
    f'{written / 1e6:,.1f} MB ({job.format}) to {output}, where '
    f'{shutil.disk_usage(place).free / 1e6:,.1f} MB are free\n'
    f'predicting takes about {seconds:,.0f} s on this machine, reading and writing not counted\n'
    'dry run: nothing was written'
  )


def _not_chosen(leaves: Mapping[str, Leaf], only: str | None, skip: str | None) -> dict[str, str]:
  """The rule that keeps the leaves that are not to be predicted, by their full names."""
  # Bytes that NumPy has no dtype for.
  kept = {path for path, leaf in leaves.items() if leaf.dtype == np.dtype('V1')}
  for name, pattern in (('only', only), ('skip', skip)):
    if pattern is None:
      continue
    try:
      found = {path for path in leaves if re.search(pattern, path)}
    except re.error as error:
      raise UserError(f'{name}: {pattern!r} is no regular expression: {error}.') from error
    if not found:
      raise UserError(f'{name}: {pattern!r} is found in no path; the first is {min(leaves)!r}.')
    kept |= found if name == 'skip' else leaves.keys() - found
  return {f'^(?:{"|".join(map(re.escape, sorted(kept)))})$': kinds_.KEEP} if kept else {}


def _check_stages(
  stages: Sequence[Weights], kinds: dict[str, str], notes: list[str], skip: str | None
) -> None:
  """Compares the leaves to be predicted in all stages; changes `kinds` of tied ones that lack."""
  newest = stages[-1]
  lacking = {path for stage in stages[:-1] for path in kinds.keys() - stage.leaves.keys()}
  for path in sorted(lacking):
    if kinds[path] != kinds_.KEEP and _TIED.search(path):
      kinds[path] = kinds_.KEEP
      notes.append(
        f'leaf {path!r} is missing in some stages, as an output layer that is tied to the '
        'embedding is: it is kept as in the newest stage.'
      )
  predicted = {p: leaf for p, leaf in newest.leaves.items() if kinds[p] != kinds_.KEEP}
  for number, stage in enumerate(stages[:-1]):
    extra = {
      path: leaf
      for path, leaf in stage.leaves.items()
      if path not in newest.leaves and not (skip and re.search(skip, path))
    }
    if tied := [path for path in extra if _TIED.search(path)]:
      notes.append(f'leaf {tied[0]!r} of {stage.path} is not in the newest stage: it is left out.')
    there = {path: leaf for path, leaf in stage.leaves.items() if path in predicted} | {
      path: leaf for path, leaf in extra.items() if path not in tied and trees.is_floating(leaf)
    }
    names = (f'the newest stage ({newest.path})', f'stage {number} ({stage.path})')
    trees.check_same(predicted, there, names=names)


def _check_complex(leaves: Mapping[str, Leaf], rules: Mapping[str, str]) -> None:
  for path, leaf in leaves.items():
    told = any(re.search(pattern, path) for pattern, kind in rules.items() if kind == kinds_.KEEP)
    if leaf.dtype.kind == 'c' and not told:
      raise UserError(
        f'leaf {path!r} has dtype {leaf.dtype}, which is not predicted; expected real numbers. '
        f"Keep it as it is, --skip='^{re.escape(path)}$', or save real and imaginary parts as two."
      )


_DTYPES = ('float32', 'bfloat16', 'float16')


def _output(
  newest: Weights, format: str | None, dtype: str | None
) -> tuple[tuple[Shard, ...] | None, dict[str, Leaf]]:
  """The shards of the newest stage if they can be written again, and the leaves to be written."""
  if format not in (None, 'safetensors', newest.format):
    raise UserError(
      f'format is {format!r}; expected safetensors, or nothing for that of the newest stage '
      f'({newest.format}).'
    )
  if dtype is not None and dtype not in _DTYPES:
    raise unknown_name('dtype', dtype, _DTYPES)
  to = jnp.dtype(dtype) if dtype is not None else None
  leaves = {
    path: dataclasses.replace(leaf, dtype=to) if to and trees.is_floating(leaf) else leaf
    for path, leaf in newest.leaves.items()
  }
  if format is None and newest.format != 'safetensors' and newest.shards and to:
    raise UserError(
      f'dtype is {dtype!r}, but a {newest.format} checkpoint is written with its own dtypes; add '
      "format='safetensors'."
    )
  if format == 'safetensors' or not newest.shards:
    return None, leaves
  if to is None:
    return newest.shards, leaves
  return tuple(
    safetensors.rewritten(shard.name, {p: leaves[p] for p in shard.paths}, newest.metadata)
    for shard in newest.shards
  ), leaves


def _theta(job: Job, predictor: str) -> Any:
  """The user's parameters, where they are of the predictor's network; None: its own, if any."""
  fits = job.network is not None and job.predictors[predictor].accepts(job.network)
  return load_known(job.known) if fits else None


def _check_predictor(job: Job, predictor: str) -> None:
  """Whatever `forecast` refuses in the whole history, one weight of each kind and dtype shows."""
  first: dict[tuple[str, np.dtype], str] = {}
  for path, kind in job.kinds.items():
    if kind != kinds_.KEEP:
      first.setdefault((kind, job.leaves[path].dtype), path)
  stage = {path: np.zeros(1, dtype) for (_, dtype), path in first.items()}
  # Where all leaves are kept, the other arguments are checked still.
  stage = stage or {'bias': np.zeros(1, np.float32)}
  plan_of(
    [stage] * len(job.stages),
    check_steps(job.steps, least=1),
    job.predictors[predictor],
    _theta(job, predictor),
    job.rate,
    lambda path, _: job.kinds.get(path),
    job.on_bad,
    {},
  )


def _check_memory(job: Job, predictor: str, memory: int) -> None:
  for path, leaf in job.leaves.items():
    made = job.predictors[predictor]
    if path in job.stacked:
      leaf = dataclasses.replace(leaf, shape=leaf.shape[1:])
    if _is_whole(made, path, leaf, job.kinds[path]):
      needed = leaf.size * 4 * (len(job.stages) + job.steps + made.copies)
      if needed > memory:
        raise UserError(
          f'leaf {path!r} has {leaf.size} weights, which {predictor!r} must decompose as a whole: '
          f'about {needed} bytes are needed, at most {memory} are allowed. Give it the kind '
          f'{kinds_.KEEP!r}, or more memory, or leave {predictor!r} out.'
        )
    for stage in job.stages if job.kinds[path] != kinds_.KEEP else job.stages[-1:]:
      # Compressed, decompressed, and in the form that is handed out.
      needed = 3 * stage.leaves[path].chunk_bytes
      if needed > memory:
        raise UserError(
          f'leaf {path!r} of {stage.path} is stored in chunks of '
          f'{stage.leaves[path].chunk_bytes} bytes, of which one at a time must be held: about '
          f'{needed} bytes are needed, at most {memory} are allowed. Allow more, or save it in '
          'smaller chunks (chunk_byte_size of orbax.checkpoint.SaveArgs).'
        )


def _is_whole(predictor: Any, path: str, leaf: Leaf, kind: str) -> bool:
  """Whether a leaf must be there as a whole to be predicted."""
  return (
    isinstance(predictor, base.WholeLeaf)
    and kind != kinds_.KEEP
    and predictor.is_whole(base.Leaf(path, kind), leaf.shape)
  )


# --- writing --------------------------------------------------------------------------------------


def write(
  job: Job,
  output: str | os.PathLike,
  *,
  shard_bytes: int = SHARD_BYTES,
  show_progress: bool = True,
) -> list[Path]:
  """Predicts and writes; the same call resumes what a killed one left, to the same bytes.

  Args:
    job: as `prepare` gives it.
    output: the folder; made if missing.
    shard_bytes: where the files are not those of the newest stage, the size of one from which on
      another is begun; a tensor is in one file.
    show_progress: whether bars are shown.

  Returns:
    The folders written: for each predictor those of the steps 1, 2, ...

  Raises:
    UserError: the output holds something else, or cannot be written; there is NaN or infinity in
      the history, or, with `on_bad='raise'`, in a prediction: the leaf is named. Shards finished
      before stay.
  """
  output = local_path(output, 'output')
  for stage in job.stages:
    for name in job.predictors:
      if stage.path.resolve().is_relative_to((output / name).resolve()):
        raise UserError(f'the history {stage.path} lies in {output / name}, which is written to.')
  shards = job.shards or _new_shards(job, shard_bytes)
  for name in job.predictors:
    folder = output / name
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _RECORD).exists():
      raise UserError(f'{folder} holds something else, without {_RECORD}; give another --output.')
  history: list[dict[str, Any]] = []
  with progress(len(job.stages), 'read history', 'stage', show=show_progress) as bar:
    for stage in job.stages:
      history.append({'path': str(stage.path), 'files': stage.identify()})
      bar.update()
  stages_.check_content(job.stages, [stage['files'] for stage in history])
  try:
    output.mkdir(parents=True, exist_ok=True)
    _check_space(job, output)
    with contextlib.ExitStack() as locks:
      for name in job.predictors:
        locks.enter_context(locked(output / name))
      # All options are compared with those of a call before, and only then is anything predicted.
      runs = [_open_run(job, name, output / name, shards, history) for name in job.predictors]
      return [folder for run in runs for folder in _write_predictor(job, run, show_progress)]
  except OSError as error:
    raise UserError(f'cannot write {output}: {reason(error)}.') from error


def _new_shards(job: Job, shard_bytes: int) -> tuple[Shard, ...]:
  """Files of safetensors of no more than that many bytes, but for those of one large leaf."""
  groups: list[dict[str, Leaf]] = [{}]
  size = 0
  for path, leaf in job.leaves.items():
    if groups[-1] and size + leaf.nbytes > shard_bytes:
      groups.append({})
      size = 0
    groups[-1][path] = leaf
    size += leaf.nbytes
  return tuple(
    safetensors.rewritten(
      f'model-{number:05}-of-{len(groups):05}.safetensors', group, job.stages[-1].metadata
    )
    for number, group in enumerate(groups, 1)
  )


def _check_space(job: Job, output: Path) -> None:
  total = sum(leaf.nbytes for leaf in job.leaves.values()) * job.steps * len(job.predictors)
  there = sum(
    path.stat().st_size
    for name in job.predictors
    for path in (output / name).glob('*/**/*')
    if path.is_file()
  )
  if (free := shutil.disk_usage(output).free) < total - there:
    raise UserError(f'{output} has {free} bytes free; wanted {total - there} for the predictions.')


@dataclasses.dataclass(frozen=True)
class _Run:
  """What one predictor does and has done.

  Attributes:
    engine: what the engine is told.
    theta: its parameters, None for predictors without.
    folders: those of the steps.
    shards: file name -> what is written there.
    about: what the cards say of it.
    record: what is finished.
  """

  engine: EngineJob
  theta: Any
  folders: list[Path]
  shards: dict[str, Shard]
  about: dict[str, Any]
  record: RunRecord


def _open_run(
  job: Job,
  predictor: str,
  folder: Path,
  shards: tuple[Shard, ...],
  history: list[dict[str, Any]],
) -> _Run:
  made = job.predictors[predictor]
  kinds = {kind for kind in job.kinds.values() if kind != kinds_.KEEP}
  theta, ranges = checked_theta(predictor, made, _theta(job, predictor), kinds, job.steps)
  about = {
    'predictor': predictor,
    'rate': job.rate,
    'on_bad': job.on_bad,
    'known': None if theta is None else theta_digest(theta),
    'options': job.options,
    'kinds': job.kinds,
    **({'stacked': sorted(job.stacked)} if job.stacked else {}),
  }
  config = {
    **about,
    'steps': job.steps,
    'format': job.format,
    'dtype': job.dtype,
    'shards': [[shard.name, len(shard.paths)] for shard in shards],
    # Files may have been moved since.
    'history': [digest(stage['files']) for stage in history],
  }
  record = RunRecord.open(folder, config, kind='nowcast of files', flag='--output')
  folders = [folder / str(n) for n in range(1, job.steps + 1)]
  for step in folders:
    step.mkdir(exist_ok=True)
  engine = EngineJob(predictor, made, (), (), job.rate, job.on_bad, ranges)
  return _Run(
    engine, theta, folders, {shard.name: shard for shard in shards},
    {**about, 'history': history}, record,
  )  # fmt: skip


def _write_predictor(job: Job, run: _Run, show_progress: bool) -> list[Path]:
  folders, shards, record = run.folders, run.shards, run.record
  finished: dict[str, Any] = {
    name: entry
    for name, entry in record.get('shards', {}).items()
    if all(_is_intact(step / name, entry['files'][i]) for i, step in enumerate(folders))
  }
  sizes = {name: sum(job.leaves[path].size for path in s.paths) for name, s in shards.items()}
  done = sum(sizes[name] for name in finished)
  with progress(
    sum(sizes.values()), run.engine.name, 'weights', initial=done, show=show_progress, scale=True
  ) as bar:
    for name in shards:
      if name not in finished:
        finished[name] = _write_shard(job, run, name, bar)
        record['shards'] = {name: finished[name] for name in shards if name in finished}
  health = {path: values for name in shards for path, values in finished[name]['health'].items()}
  if health and job.on_bad != 'ignore':
    health_.report(
      np.asarray(list(health.values())),
      predictor=run.engine.name,
      leaves=[(path, job.kinds[_whole(job, path)]) for path in health],
      steps=range(1, job.steps + 1),
      on_bad=job.on_bad,
      stacklevel=4,
    )
  index = _index(job, shards)
  for n, step in enumerate(folders, 1):
    moved: dict[str, float] = {}
    for path, values in health.items():
      leaf = _whole(job, path)
      moved[leaf] = max(moved.get(leaf, 0.0), float(values[n - 1][0]))
    if index is not None:
      write_atomic(step / index[0], (json.dumps(index[1], indent=2) + '\n').encode())
    bad = {path: values for path, values in health.items() if _is_bad(values)[n - 1]}
    card = {
      'format': FORMAT,
      **run.about,
      'steps': n,
      'multiple': job.rate**-n,
      'files': {name: finished[name]['files'][n - 1] for name in shards},
      # Of these the newest weights stand in the place of a bad prediction.
      'kept_newest': list(bad) if job.on_bad == 'keep' else [],
      'environment': record['environment'],
    }
    write_sealed(step / CARD, card)
    if (home := job.stages[-1].home) is not None:
      cards.copy_side_files(home, step)
    cards.write_readme(
      step, card, sizes={path: leaf.size for path, leaf in job.leaves.items()},
      moved=moved, notes=job.notes,
    )  # fmt: skip
    if job.shards is not None and (seal := job.stages[-1].seal) is not None:
      seal(step, {'predictor': run.engine.name, 'steps': n, 'rate': job.rate})
  return folders


def _index(job: Job, shards: Mapping[str, Shard]) -> tuple[str, dict[str, Any]] | None:
  """Name and content of the index that says which tensor is in which file."""
  newest = job.stages[-1]
  total = {'total_size': sum(leaf.nbytes for leaf in job.leaves.values())}
  if job.shards is None:
    files = {job.leaves[p].name: name for name, shard in shards.items() for p in shard.paths}
    return safetensors.INDEX, {'metadata': total, 'weight_map': dict(sorted(files.items()))}
  if newest.index is None or job.dtype is None:
    return newest.index
  name, content = newest.index
  return name, {**content, 'metadata': {**content.get('metadata', {}), **total}}


def _is_intact(path: Path, wanted: dict[str, Any]) -> bool:
  """Whether a file, or the files of a folder, are as they were when they were finished."""
  if 'files' in wanted:
    return all(_is_intact(path / name, entry) for name, entry in wanted['files'].items())
  if not path.is_file() or path.stat().st_size != wanted['size']:
    return False
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest() == wanted['sha256']


def _whole(job: Job, path: str) -> str:
  """The path of a leaf, or of the leaf of which it names a layer."""
  return path if path in job.kinds else path[: path.rindex('[')]


def _is_bad(health: Any) -> np.ndarray:
  return np.asarray(health_.is_bad(np.asarray(health, np.float64)))


def _write_shard(job: Job, run: _Run, name: str, bar: Bar) -> dict[str, Any]:
  """Writes one file for every step, all or none; returns what the record says of them."""
  shard, files = run.shards[name], [folder / name for folder in run.folders]
  health = {}
  with contextlib.ExitStack() as stack:
    sinks = [stack.enter_context(shard.writing(file)) for file in files]
    for path in shard.paths:
      for sink in sinks:
        sink.begin(job.leaves[path])
      with _history(job, path, files[0].parent) as history:
        if job.kinds[path] == kinds_.KEEP:
          _copy_newest(history, sinks, bar)
        else:
          for one in history.layers() if path in job.stacked else [history]:
            health[one.leaf.path] = _predict_leaf(job, run, one, sinks, bar)
  return {
    'files': [sink.identity() for sink in sinks],
    'health': {path: values.tolist() for path, values in health.items()},
  }


# --- one leaf -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _LeafHistory:
  """The stages of one leaf, open for reading."""

  leaf: base.Leaf
  written: Leaf
  readers: list[Reader]

  def layers(self) -> Iterator['_LeafHistory']:
    """The layers on the first axis, each as a leaf of its own."""
    written = dataclasses.replace(self.written, shape=self.written.shape[1:])
    for layer in range(self.written.shape[0]):
      place = layer * written.size
      readers = [
        dataclasses.replace(reader, offset=reader.offset + place * reader.dtype.itemsize)
        for reader in self.readers
      ]
      leaf = base.Leaf(f'{self.leaf.path}[{layer}]', self.leaf.kind)
      yield _LeafHistory(leaf, written, readers)

  def slices(self, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, self.written.size, size):
      yield start, min(start + size, self.written.size)

  def pieces(self, steps: int, *, whole: bool = False) -> Iterator[pieces.Piece]:
    """All weights, a stretch at a time or as a whole, and room for the predictions of each."""
    for start, stop in self.slices(max(self.written.size, 1) if whole else pieces.STRETCH):
      stages = [reader.read(start, stop) for reader in self.readers]
      for number, stage in enumerate(stages):
        self._check(stage, number, start)
      out = np.empty((steps, stop - start), self.written.dtype)
      yield pieces.Piece(self.leaf, stages, out, self.written.shape if whole else None)

  def _check(self, stage: np.ndarray, number: int, start: int) -> None:
    finite = np.isfinite(stage)
    if not finite.all():
      place = int(finite.argmin())
      raise UserError(
        f'leaf {self.leaf.path!r} has {stage[place]} at weight {start + place} of '
        f'{self.written.size} in stage {number} of {len(self.readers)} (0 is the oldest), '
        f'{self.readers[number].what}; wanted finite weights at every stage.'
      )


@contextlib.contextmanager
def _history(job: Job, path: str, scratch: Path) -> Iterator[_LeafHistory]:
  with contextlib.ExitStack() as stack:
    # Kept leaves may differ in the older stages, which are not read for them.
    stages = job.stages if job.kinds[path] != kinds_.KEEP else job.stages[-1:]
    readers = [stack.enter_context(stage.leaves[path].open(scratch)) for stage in stages]
    yield _LeafHistory(base.Leaf(path, job.kinds[path]), job.leaves[path], readers)


def _copy_newest(history: _LeafHistory, sinks: Sequence[Sink], bar: Bar | None) -> None:
  for start, stop in history.slices(pieces.STRETCH):
    newest = history.readers[-1].read(start, stop)
    if newest.dtype != history.written.dtype:
      newest = newest.astype(history.written.dtype)
    for sink in sinks:
      sink.write(newest)
    if bar is not None:
      bar.update(stop - start)


def _predict_leaf(
  job: Job, run: _Run, history: _LeafHistory, sinks: Sequence[Sink], bar: Bar
) -> np.ndarray:
  """Writes the predictions of one leaf; returns their health `[steps, FIELDS]`."""
  engine, steps, size = run.engine, tuple(range(1, job.steps + 1)), history.written.size
  whole = _is_whole(engine.predictor, history.leaf.path, history.written, history.leaf.kind)
  passes = 2 if getattr(engine.predictor, 'needs_moments', False) else 1

  def counted() -> Iterator[pieces.Piece]:
    for piece in history.pieces(job.steps, whole=whole):
      yield piece
      bar.update(piece.size / passes)

  coefficients, outside = chunks.leaf_coefficients_of(size, counted, run.theta, engine, steps)
  facts = pieces.Facts.none(job.steps)
  marks = [sink.mark() for sink in sinks]
  for piece in counted():
    (seen,) = chunks.predict([piece], run.theta, engine, steps, coefficients, outside)
    facts.add(seen)
    for sink, values in zip(sinks, piece.out, strict=True):
      sink.write(values)
  health = facts.health(lambda: pieces.largest(history.pieces(job.steps)))
  bad = _is_bad(health) if engine.is_watched else np.zeros(job.steps, bool)
  if bad.any() and job.on_bad == 'raise':
    health_.report(
      health[None], predictor=engine.name, leaves=[(history.leaf.path, history.leaf.kind)],
      steps=steps, on_bad='raise',
    )  # fmt: skip
  again = [sink for sink, kept in zip(sinks, bad | facts.still, strict=True) if kept]
  for sink, mark in zip(sinks, marks, strict=True):
    if sink in again:
      sink.go_back(mark)
  _copy_newest(history, again, None)
  return health
