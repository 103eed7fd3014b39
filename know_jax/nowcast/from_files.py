"""Predicts histories in files that are larger than memory, leaf by leaf and slice by slice.

What is written for every predictor, and what a killed run goes on from:

```
<output>/<predictor>/record.json   the run: options, digests of the history, finished shards
<output>/<predictor>/<step>/model-00001-of-00002.safetensors ...   the predicted weights
<output>/<predictor>/<step>/model.safetensors.index.json           which tensor is in which file
<output>/<predictor>/<step>/nowcast.json                           what this is, with checksums
```

Predictors that work coordinate by coordinate take `nowcast.forecast` a slice at a time. KNOWN
conditioned on the leaf needs the leaf's moments: a leaf is read once for them and once more for the
linear combination that they choose. `tsv` needs a leaf as a whole, which must fit into memory.
Predictions are looked at leaf by leaf, as `nowcast.predict` does, and bad ones replaced.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from know_jax import kinds as kinds_
from know_jax import trees
from know_jax.errors import UserError, reason, unknown_name
from know_jax.io.files import locked, write_atomic
from know_jax.io.sealed import write_sealed
from know_jax.io.weight_files import (
  INDEX,
  Leaf,
  Reader,
  Sink,
  Weights,
  file_order,
  open_weights,
  writing,
)
from know_jax.jsonable import digest
from know_jax.nowcast import api, engine
from know_jax.nowcast import health as health_
from know_jax.predictors import known_leaf
from know_jax.predictors.methods import METHODS
from know_jax.predictors.parameters import load_known, theta_digest, trained_range
from know_jax.runs.record import RunRecord
from know_jax.system.progress import Bar, progress

FORMAT = 'know_jax nowcast of files/1'
CARD = 'nowcast.json'
SHARD_BYTES = 1 << 30
MEMORY = 1 << 30
"""Bytes for what cannot be taken in slices: leaves of `tsv`, chunks of Orbax."""

_RECORD = 'record.json'
# Beside the stages of a leaf, in float32: the two factors and the workspace of its decomposition.
_TSV_COPIES = 16


@dataclasses.dataclass(frozen=True)
class Job:
  """A prediction that has been checked; `write` carries it out.

  Attributes:
    stages: the history, oldest first.
    kinds: path -> kind.
    predictors: names in `PREDICTORS`.
    steps: how far; the weights of every step from 1 on are written.
    rate: r.
    on_bad: what becomes of bad leaves, a choice of `guards.ON_BAD`.
    known: file or folder with the parameters of KNOWN; None: those shipped.
  """

  stages: list[Weights]
  kinds: dict[str, str]
  predictors: tuple[str, ...]
  steps: int
  rate: float
  on_bad: str
  known: str | None

  @property
  def leaves(self) -> dict[str, Leaf]:
    """Path -> leaf of the newest stage, by whose names predictions are written."""
    return self.stages[-1].leaves


def prepare(
  history: Sequence[str | os.PathLike],
  *,
  predictors: Sequence[str] = ('known',),
  steps: int = 3,
  rate: float = 0.5,
  kinds: Mapping[str, str] | None = None,
  known: str | None = None,
  on_bad: str = 'keep',
  memory: int = MEMORY,
) -> Job:
  """Checks a history in files and what is asked of it; reads headers and metadata, no weights.

  Args:
    history: the stages, oldest (smallest subset) first; each what `weight_files.open_weights`
      takes.
    predictors: names in `PREDICTORS`.
    steps: how far; the weights of every step from 1 on will be written.
    rate: r, as in `nowcast.predict`.
    kinds: regular expression -> kind, see `kinds.find_kinds`.
    known: file or folder with the parameters of KNOWN, as `load_known` takes; None: those shipped.
    on_bad: what becomes of bad leaves, as in `nowcast.predict`.
    memory: bytes that may be taken for what must be whole: leaves of `tsv`, chunks of Orbax.

  Raises:
    UserError: a stage cannot be read, differs from the newest in names, shapes or dtypes, a leaf
      has no kind, a predictor is unknown or cannot do the steps with this history, or something
      that must be whole is too large; the leaf is named.
  """
  if not predictors:
    raise UserError(f'no predictor is given; wanted some of {", ".join(METHODS)}.')
  for name in predictors:
    if name not in METHODS:
      raise unknown_name('predictor', name, METHODS)
  if not history:
    raise UserError('the history is empty; wanted the weights of at least one stage.')
  stages = [open_weights(path) for path in history]
  newest = _structs(stages[-1])
  for number, stage in enumerate(stages[:-1]):
    names = (f'the newest stage ({stages[-1].path})', f'stage {number} ({stage.path})')
    trees.check_same(newest, _structs(stage), names=names)
  job = Job(
    stages, kinds_.find_kinds(newest, kinds or {}), tuple(dict.fromkeys(predictors)), steps, rate,
    on_bad, known,
  )  # fmt: skip
  for name in job.predictors:
    _check_predictor(job, name)
    _check_memory(job, name, memory)
  return job


def _structs(stage: Weights) -> dict[str, jax.ShapeDtypeStruct]:
  return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in stage.leaves.items()}


def _own_known(job: Job, predictor: str) -> str | None:
  """The user's parameters in place of the shipped default; 'known_paper' is always shipped."""
  return job.known if METHODS[predictor].shipped == 'known' else None


def _theta(job: Job, predictor: str) -> Any:
  """The parameters of KNOWN in NumPy, None for predictors without."""
  method = METHODS[predictor]
  if method.leaf_fn is not None:
    return None
  return jax.device_get(load_known(_own_known(job, predictor), shipped=method.shipped))


def _check_predictor(job: Job, predictor: str) -> None:
  """Whatever `forecast` refuses in the whole history, one weight of each kind and dtype shows."""
  first: dict[tuple[str, np.dtype], str] = {}
  for path, kind in job.kinds.items():
    if kind != kinds_.KEEP:
      first.setdefault((kind, job.leaves[path].dtype), path)
  stage = {path: np.zeros(1, dtype) for (_, dtype), path in first.items()}
  # Where all leaves are kept, the other arguments are looked at still.
  stage = stage or {'bias': np.zeros(1, np.float32)}
  engine.plan_of(
    [stage] * len(job.stages),
    engine.check_steps(job.steps, least=1),
    predictor,
    _theta(job, predictor),
    job.rate,
    lambda path, _: job.kinds.get(path),  # type: ignore[arg-type, return-value]
    job.on_bad,
    {},
  )


def _check_memory(job: Job, predictor: str, memory: int) -> None:
  for path, leaf in job.leaves.items():
    if predictor == 'tsv' and _is_matrix(leaf, job.kinds[path]):
      needed = leaf.size * 4 * (len(job.stages) + job.steps + _TSV_COPIES)
      if needed > memory:
        raise UserError(
          f"leaf {path!r} has {leaf.size} weights, which 'tsv' must decompose as a whole: about "
          f'{needed} bytes are needed, at most {memory} are allowed. Give it the kind '
          f"{kinds_.KEEP!r}, or more memory, or leave 'tsv' out."
        )
    for stage in job.stages:
      # Compressed, decompressed, and in the form that is handed out.
      needed = 3 * stage.leaves[path].chunk_bytes
      if needed > memory:
        raise UserError(
          f'leaf {path!r} of {stage.path} is stored in chunks of '
          f'{stage.leaves[path].chunk_bytes} bytes, of which one at a time must be held: about '
          f'{needed} bytes are needed, at most {memory} are allowed. Allow more, or save it in '
          'smaller chunks (chunk_byte_size of orbax.checkpoint.SaveArgs).'
        )


def _is_matrix(leaf: Leaf, kind: str) -> bool:
  return kind in ('conv', 'fc') and len(leaf.shape) > 1


# --- writing --------------------------------------------------------------------------------------


def write(
  job: Job,
  output: str | os.PathLike,
  *,
  shard_bytes: int = SHARD_BYTES,
  show_progress: bool = True,
) -> list[Path]:
  """Predicts and writes; the same call goes on with what a killed one left, to the same bytes.

  Args:
    job: as `prepare` gives it.
    output: the folder; made if missing.
    shard_bytes: the size of a file from which on another is begun; a tensor is in one file.
    show_progress: whether bars are shown.

  Returns:
    The folders written: for each predictor those of the steps 1, 2, ...

  Raises:
    UserError: the output holds something else, or cannot be written; there is NaN or infinity in
      the history, or, with `on_bad='raise'`, in a prediction: the leaf is named. Shards finished
      before stay.
  """
  output = Path(output).expanduser()
  for stage in job.stages:
    for name in job.predictors:
      if stage.path.resolve().is_relative_to((output / name).resolve()):
        raise UserError(f'the history {stage.path} lies in {output / name}, which is written to.')
  shards = _shards(job.leaves, shard_bytes)
  for name in job.predictors:
    folder = output / name
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _RECORD).exists():
      raise UserError(f'{folder} holds something else, without {_RECORD}; give another --output.')
  history = []
  with progress(len(job.stages), 'read history', 'stage', show=show_progress) as bar:
    for stage in job.stages:
      history.append({'path': str(stage.path), 'files': stage.identify()})
      bar.update()
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


def _shards(leaves: Mapping[str, Leaf], shard_bytes: int) -> dict[str, list[str]]:
  """File name -> the paths of its leaves."""
  groups: list[list[str]] = [[]]
  size = 0
  for path, leaf in leaves.items():
    if groups[-1] and size + leaf.nbytes > shard_bytes:
      groups.append([])
      size = 0
    groups[-1].append(path)
    size += leaf.nbytes
  return {
    f'model-{number:05}-of-{len(groups):05}.safetensors': group
    for number, group in enumerate(groups, 1)
  }


def _check_space(job: Job, output: Path) -> None:
  total = sum(leaf.nbytes for leaf in job.leaves.values()) * job.steps * len(job.predictors)
  there = sum(
    path.stat().st_size
    for name in job.predictors
    for path in (output / name).glob('*/*.safetensors')
  )
  if (free := shutil.disk_usage(output).free) < total - there:
    raise UserError(f'{output} has {free} bytes free; wanted {total - there} for the predictions.')


@dataclasses.dataclass(frozen=True)
class _Run:
  """What one predictor does and has done.

  Attributes:
    theta: its parameters in NumPy, None for predictors without.
    folders: those of the steps.
    shards: file name -> the paths of its leaves.
    about: what the cards say of it.
    record: what is finished.
  """

  predictor: str
  theta: Any
  folders: list[Path]
  shards: dict[str, list[str]]
  about: dict[str, Any]
  record: RunRecord


def _open_run(
  job: Job,
  predictor: str,
  folder: Path,
  shards: dict[str, list[str]],
  history: list[dict[str, Any]],
) -> _Run:
  theta = _theta(job, predictor)
  about = {
    'predictor': predictor,
    'rate': job.rate,
    'on_bad': job.on_bad,
    'known': None if theta is None else theta_digest(theta),
    'kinds': job.kinds,
  }
  config = {
    **about,
    'steps': job.steps,
    'shards': [len(paths) for paths in shards.values()],
    # Files may have been moved since.
    'history': [digest(stage['files']) for stage in history],
  }
  record = RunRecord.open(folder, config, kind='nowcast of files', flag='--output')
  folders = [folder / str(n) for n in range(1, job.steps + 1)]
  for step in folders:
    step.mkdir(exist_ok=True)
  return _Run(predictor, theta, folders, shards, {**about, 'history': history}, record)


def _write_predictor(job: Job, run: _Run, show_progress: bool) -> list[Path]:
  folders, shards, record = run.folders, run.shards, run.record
  finished: dict[str, Any] = {
    name: entry
    for name, entry in record.get('shards', {}).items()
    if all(_is_intact(step / name, entry['files'][i]) for i, step in enumerate(folders))
  }
  sizes = {name: sum(job.leaves[path].size for path in paths) for name, paths in shards.items()}
  done = sum(sizes[name] for name in finished)
  with progress(
    sum(sizes.values()), run.predictor, 'weights', initial=done, show=show_progress, scale=True
  ) as bar:
    for name in shards:
      if name not in finished:
        finished[name] = _write_shard(job, run, name, bar)
        record['shards'] = {name: finished[name] for name in shards if name in finished}
  health = {path: values for name in shards for path, values in finished[name]['health'].items()}
  if health and job.on_bad != 'ignore':
    health_.report(
      np.asarray(list(health.values())),
      predictor=run.predictor,
      leaves=[(path, job.kinds[path]) for path in health],
      steps=range(1, job.steps + 1),
      on_bad=job.on_bad,
      stacklevel=4,
    )
  total = sum(leaf.nbytes for leaf in job.leaves.values())
  weight_map = {job.leaves[path].name: name for name, paths in shards.items() for path in paths}
  index = {'metadata': {'total_size': total}, 'weight_map': dict(sorted(weight_map.items()))}
  for n, step in enumerate(folders, 1):
    write_atomic(step / INDEX, (json.dumps(index, indent=2) + '\n').encode())
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
  return folders


def _is_intact(path: Path, wanted: dict[str, Any]) -> bool:
  """Whether a file is as it was when it was finished."""
  if not path.is_file() or path.stat().st_size != wanted['size']:
    return False
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest() == wanted['sha256']


def _is_bad(health: Any) -> np.ndarray:
  return np.asarray(health_.is_bad(np.asarray(health, np.float64)))


def _write_shard(job: Job, run: _Run, name: str, bar: Bar) -> dict[str, Any]:
  """Writes one file for every step, all or none; returns what the record says of them."""
  paths, files = run.shards[name], [folder / name for folder in run.folders]
  leaves = file_order([job.leaves[path] for path in paths])
  path_of = {job.leaves[path].name: path for path in paths}
  metadata = job.stages[-1].metadata
  health = {}
  with contextlib.ExitStack() as stack:
    sinks = [stack.enter_context(writing(file, leaves, metadata)) for file in files]
    for leaf in leaves:
      path = path_of[leaf.name]
      with _history(job, path, files[0].parent) as history:
        if job.kinds[path] == kinds_.KEEP:
          _copy_newest(history, sinks, bar)
        else:
          health[path] = _predict_leaf(job, run, history, sinks, bar)
  return {
    'files': [{'size': sink.size, 'sha256': sink.checksum.hexdigest()} for sink in sinks],
    'health': {path: values.tolist() for path, values in health.items()},
  }


# --- one leaf -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _LeafHistory:
  """The stages of one leaf, open for reading."""

  path: str
  kind: str
  leaf: Leaf
  readers: list[Reader]

  @property
  def width(self) -> np.dtype:
    """The dtype to compute in."""
    return np.dtype(jnp.promote_types(self.leaf.dtype, jnp.float32))

  def slices(self, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, self.leaf.size, size):
      yield start, min(start + size, self.leaf.size)

  def read(self, start: int, stop: int) -> np.ndarray:
    """A stretch of all stages in the dtype to compute in, `[T, stop - start]`, all finite."""
    found = np.empty((len(self.readers), stop - start), self.width)
    for stage, reader in enumerate(self.readers):
      found[stage] = reader.read(start, stop)
    self.check(found, start)
    return found

  def check(self, stages: np.ndarray, start: int) -> None:
    finite = np.isfinite(stages)
    if not finite.all():
      stage, place = np.argwhere(~finite)[0]
      raise UserError(
        f'leaf {self.path!r} has {stages[stage, place]} at weight {start + place} of '
        f'{self.leaf.size} in stage {stage} of {len(stages)} (0 is the oldest), '
        f'{self.readers[stage].what}; wanted finite weights at every stage.'
      )


@contextlib.contextmanager
def _history(job: Job, path: str, scratch: Path) -> Iterator[_LeafHistory]:
  with contextlib.ExitStack() as stack:
    readers = [stack.enter_context(stage.leaves[path].open(scratch)) for stage in job.stages]
    yield _LeafHistory(path, job.kinds[path], job.leaves[path], readers)


def _copy_newest(history: _LeafHistory, sinks: Sequence[Sink], bar: Bar | None) -> None:
  for start, stop in history.slices(engine.BATCH):
    if trees.is_floating(history.leaf):
      history.read(start, stop)
    newest = history.readers[-1].read(start, stop)
    for sink in sinks:
      sink.write(newest)
    if bar is not None:
      bar.update(stop - start)


def _predict_leaf(
  job: Job, run: _Run, history: _LeafHistory, sinks: Sequence[Sink], bar: Bar
) -> np.ndarray:
  """Writes the predictions of one leaf; returns their health `[steps, FIELDS]`."""
  health = np.zeros((job.steps, health_.FIELDS))
  predictor, theta = run.predictor, run.theta
  is_conditioned = theta is not None and known_leaf.is_conditioned(theta[history.kind])
  if is_conditioned:
    free = predictor == 'known_history_free'
    predict, outside = _conditioned(job, theta[history.kind], history, free, bar)
    health[:, 3] = outside
    size, counted = engine.SMALL, 0.5  # The other half was counted with the moments.
  else:
    predict = _by_forecast(job, predictor, theta, history)
    whole = predictor == 'tsv' and _is_matrix(history.leaf, history.kind)
    size, counted = (history.leaf.size or 1) if whole else engine.BATCH, 1.0
  limits = {}
  if theta is not None and predictor != 'known_history_free' and _own_known(job, predictor) is None:
    limits = trained_range(METHODS[predictor].shipped)
  marks = [sink.mark() for sink in sinks]
  for start, stop in history.slices(size):
    stages = history.read(start, stop)
    with np.errstate(over='ignore', invalid='ignore'):
      predicted = predict(stages)
      found = predicted.astype(history.leaf.dtype)
      moved = np.abs(found.astype(history.width) - stages[-1])
    health[:, 0] = np.maximum(health[:, 0], moved.max(1))
    health[:, 2] = np.maximum(health[:, 2], np.abs(stages).max())
    if theta is not None and not is_conditioned:
      residuals = engine.residuals_on_host(stages[-1], predicted)
      health[:, 1] = np.maximum(health[:, 1], residuals)
      if history.kind in limits:
        window = stages[-engine.known_history_length(theta[history.kind]) :]
        outside = engine.outside_on_host(list(window), limits[history.kind])
        health[:, 3] = np.maximum(health[:, 3], outside)
    for sink, values in zip(sinks, found, strict=True):
      sink.write(values)
    bar.update(counted * (stop - start))
  if job.on_bad != 'ignore' and (bad := _is_bad(health)).any():
    if job.on_bad == 'raise':
      health_.report(
        health[None],
        predictor=predictor,
        leaves=[(history.path, history.kind)],
        steps=range(1, job.steps + 1),
        on_bad='raise',
      )
    again = [sink for sink, is_bad in zip(sinks, bad, strict=True) if is_bad]
    for sink, mark in zip(sinks, marks, strict=True):
      if sink in again:
        sink.go_back(mark)
    _copy_newest(history, again, None)
  return health


def _by_forecast(
  job: Job, predictor: str, theta: Any, history: _LeafHistory
) -> Callable[[np.ndarray], np.ndarray]:
  """`nowcast.forecast` of a stretch of weights `[T, N]` -> `[steps, N]`."""
  shape = history.leaf.shape
  name = history.path.rpartition('/')[2]
  if name == 'weight' and len(shape) > 2:
    # PyTorch has the outputs first where Flax has them last: as a matrix, one is the other's
    # transpose, of which the singular values are the same.
    shape = (shape[0], -1)

  def predict(stages: np.ndarray) -> np.ndarray:
    if predictor == 'tsv' and _is_matrix(history.leaf, history.kind):
      stages = stages.reshape(len(stages), *shape)
    found = api.forecast(
      [{history.path: stage} for stage in stages],
      job.steps,
      predictor=predictor,
      theta=theta,
      rate=job.rate,
      kinds=lambda path, leaf: history.kind,
      on_bad='ignore',
    )
    return np.asarray(found.weights[history.path]).reshape(job.steps, -1)

  return predict


def _conditioned(
  job: Job, params: Any, history: _LeafHistory, free: bool, bar: Bar
) -> tuple[Callable[[np.ndarray], np.ndarray], float]:
  """KNOWN conditioned on the leaf: reads the leaf for its moments.

  Returns:
    Stages `[T, N]` -> predictions `[steps, N]`, and how far outside the meta-dataset the leaf is.
  """
  length = known_leaf.history_length(params)

  def window(stages: np.ndarray) -> np.ndarray:
    return stages[[-1] * length] if free else stages[-length:]

  # As `nowcast._moments_on_host` does, to the bit.
  total = np.zeros((length, length))
  for start, stop in history.slices(engine.SMALL):
    v = known_leaf.host_basis(window(history.read(start, stop)))
    total += v @ v.T
    bar.update(0.5 * (stop - start))
  moments = (total / max(history.leaf.size, 1)).astype(history.width)
  steps = tuple(range(1, job.steps + 1))
  coefficients, outside = (
    np.asarray(found)[0]
    for found in jax.device_get(engine.leaf_coefficients(params, moments[None], job.rate, steps))
  )

  def predict(stages: np.ndarray) -> np.ndarray:
    return engine.combine_on_host(coefficients, window(stages))

  return predict, 0.0 if free else float(outside)
