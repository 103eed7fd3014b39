"""Predicts histories in files that are larger than memory, leaf by leaf and slice by slice.

What is written for every predictor, and what a killed run resumes from:

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

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from know_jax import kinds as kinds_
from know_jax import trees
from know_jax.errors import UserError, os_errors
from know_jax.io import safetensors
from know_jax.io.files import file_checksum, local_path, locked, write_atomic
from know_jax.io.sealed import write_sealed
from know_jax.io.weights import Leaf, Reader, Shard, Sink
from know_jax.jsonable import digest
from know_jax.nowcast import cards, chunks, pieces
from know_jax.nowcast import health as health_
from know_jax.nowcast import stages as stages_
from know_jax.nowcast.file_job import SHARD_BYTES, Job, is_whole, new_shards
from know_jax.nowcast.job import Job as EngineJob
from know_jax.nowcast.job import grouped
from know_jax.nowcast.linear import Room
from know_jax.nowcast.pieces import Facts, Piece
from know_jax.nowcast.plan import checked_theta, multiple_of
from know_jax.predictors import base
from know_jax.predictors.parameters import theta_digest
from know_jax.runs.record import RunRecord
from know_jax.system.machine import processors
from know_jax.system.progress import Bar, progress

FORMAT = 'know_jax nowcast of files/1'
CARD = 'nowcast.json'
_RECORD = 'record.json'


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
  shards = job.shards or new_shards(job, shard_bytes)
  for name in job.predictors:
    folder = output / name
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _RECORD).exists():
      raise UserError(f'{folder} holds something else, without {_RECORD}; give another --output.')
  history: list[dict[str, Any]] = []
  with (
    progress(len(job.stages), 'read history', 'stage', show=show_progress) as bar,
    concurrent.futures.ThreadPoolExecutor(processors()) as pool,
  ):
    identities = pool.map(lambda stage: stage.identify(), job.stages)
    for stage, files in zip(job.stages, identities, strict=True):
      history.append({'path': str(stage.path), 'files': files})
      bar.update()
  stages_.check_content(job.stages, [stage['files'] for stage in history])
  with os_errors(f'cannot write {output}'), contextlib.ExitStack() as locks:
    output.mkdir(parents=True, exist_ok=True)
    _check_space(job, output)
    for name in job.predictors:
      locks.enter_context(locked(output / name))
    # All options are compared with those of a call before, and only then is anything predicted.
    rooms = [Room() for _ in range(processors())]
    runs = [_open_run(job, name, output / name, shards, history, rooms) for name in job.predictors]
    return [folder for run in runs for folder in _write_predictor(job, run, show_progress)]


def _check_space(job: Job, output: Path) -> None:
  total = sum(leaf.nbytes for leaf in job.leaves.values()) * job.steps * len(job.predictors)
  there = sum(
    path.stat().st_size
    for name in job.predictors
    for path in (output / name).glob('*/**/*')
    if path.is_file()
  )
  if (free := shutil.disk_usage(output).free) < total - there:
    raise UserError(
      f'{output} has {free} bytes free; expected {total - there} for the predictions.'
    )


@dataclasses.dataclass(frozen=True)
class _Run:
  """What one predictor does and has done."""

  engine: EngineJob  # What the engine is told.
  theta: Any  # Its parameters, None for predictors without.
  folders: list[Path]  # Those of the steps.
  shards: dict[str, Shard]  # File name -> what is written there.
  about: dict[str, Any]  # What the cards say of it.
  record: RunRecord  # What is finished.
  rooms: list[Room]  # Those of the threads, for all predictors and leaves.


def _open_run(
  job: Job,
  predictor: str,
  folder: Path,
  shards: tuple[Shard, ...],
  history: list[dict[str, Any]],
  rooms: list[Room],
) -> _Run:
  kinds = {kind for kind in job.kinds.values() if kind != kinds_.KEEP}
  made, theta = checked_theta(
    predictor, job.predictors[predictor], job.theta.get(predictor), kinds, job.steps
  )
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
  engine = EngineJob(predictor, made, (), (), job.rate, job.on_bad)
  return _Run(
    engine, theta, folders, {shard.name: shard for shard in shards},
    {**about, 'history': history}, record, rooms,
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
      np.asarray(list(health.values())), predictor=run.engine.name,
      leaves=[(path, job.kinds[_whole(job, path)]) for path in health],
      steps=range(1, job.steps + 1), on_bad=job.on_bad, stacklevel=4,
    )  # fmt: skip
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
      'multiple': multiple_of(job.rate, n),
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


def _is_intact(path: Path, expected: dict[str, Any]) -> bool:
  """Whether a file, or the files of a folder, are as they were when they were finished."""
  if 'files' in expected:
    return all(_is_intact(path / name, entry) for name, entry in expected['files'].items())
  if not path.is_file() or path.stat().st_size != expected['size']:
    return False
  return file_checksum(path) == expected['sha256']


def _whole(job: Job, path: str) -> str:
  """The path of a leaf, or of the leaf whose layer it names."""
  return path if path in job.kinds else path[: path.rindex('[')]


def _is_bad(health: Any) -> np.ndarray:
  return np.asarray(health_.is_bad(np.asarray(health, np.float64)))


def _write_shard(job: Job, run: _Run, name: str, bar: Bar) -> dict[str, Any]:
  """Writes one file for every step, all or none; returns what the record says of them."""
  shard, files = run.shards[name], [folder / name for folder in run.folders]
  health: dict[str, np.ndarray] = {}
  with contextlib.ExitStack() as stack:
    sinks = [stack.enter_context(shard.writing(file)) for file in files]
    # A batch costs about as much as a leaf.
    sizes = [(path, job.leaves[path].size) for path in shard.paths]
    for paths in grouped(sizes, pieces.STRETCH):
      if job.leaves[paths[0]].size <= pieces.STRETCH:
        health |= _write_batch(job, run, paths, sinks, files[0].parent)
        bar.update(sum(job.leaves[path].size for path in paths))
        continue
      (path,) = paths
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

  def pieces(self, steps: int, *, whole: bool = False) -> Iterator[Piece]:
    """All weights, a stretch at a time or as a whole, and room for the predictions of each."""
    for start, out in self.stretches(steps, whole=whole):
      yield self.piece(start, out, whole=whole)

  def piece(self, start: int, out: np.ndarray, *, whole: bool, room: Room | None = None) -> Piece:
    """The weights from a place on, read into a thread's own memory where that is given."""
    size, stages = out.shape[1], []
    for number, reader in enumerate(self.readers):
      into = None
      if room and not whole:  # What has one length for all leaves.
        into = room.rows(f'read {number}', 1, reader.dtype, pieces.STRETCH)[0, :size]
      stages.append(reader.read(start, start + size, into))
    return Piece(self.leaf, stages, out, self.written.shape if whole else None)

  def stretches(self, steps: int, *, whole: bool) -> Iterator[tuple[int, np.ndarray]]:
    """Where the pieces start, and room for the predictions of each."""
    for start, stop in self.slices(max(self.written.size, 1) if whole else pieces.STRETCH):
      yield start, np.empty((steps, stop - start), self.written.dtype)

  def as_written(self, newest: np.ndarray) -> np.ndarray:
    """Newest weights in the dtype that is written."""
    return pieces.cast(newest, self.written.dtype, self.leaf.path)

  def check(self, piece: Piece, start: int, facts: Facts) -> None:
    """Raises a `UserError` where NaN or infinity was seen in a piece that begins at `start`."""
    for number, stage in enumerate(piece.stages) if not facts.finite.all() else ():
      finite = np.isfinite(stage)
      if not finite.all():
        place = int(finite.argmin())
        raise UserError(
          f'leaf {self.leaf.path!r} has {stage[place]} at weight {start + place} of '
          f'{self.written.size} in stage {number} of {len(self.readers)} (0 is the oldest), '
          f'{self.readers[number].what}; expected finite weights at every stage.'
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
    newest = history.as_written(history.readers[-1].read(start, stop))
    for sink in sinks:
      sink.write(newest)
    if bar is not None:
      bar.update(stop - start)


_T = TypeVar('_T')


def _worked(
  function: Callable[[Room, Piece, int], _T],
  history: _LeafHistory,
  steps: int,
  whole: bool,
  rooms: Sequence[Room],
) -> Iterator[tuple[Piece, _T]]:
  """Pieces of a leaf and what a function gives for each and its start, in their order.

  Each processor reads and works on its own, so that none waits for another at the end of each. Of
  a piece that is given only `out` lasts: others are read into the memory of its stages.
  """

  def work(room: Room, start: int, out: np.ndarray) -> tuple[Piece, _T]:
    piece = history.piece(start, out, whole=whole, room=room)
    return piece, function(room, piece, start)

  own, threads = iter(rooms), chunks.threads_for(trees.wide(history.readers[-1].dtype))
  stretches = history.stretches(steps, whole=whole)
  yield from chunks.in_threads(work, stretches, threads, lambda: (next(own),), ahead=1)


def _predict_leaf(
  job: Job, run: _Run, history: _LeafHistory, sinks: Sequence[Sink], bar: Bar
) -> np.ndarray:
  """Writes the predictions of a leaf of several stretches; returns its health `[steps, FIELDS]`."""
  engine, steps, leaf = run.engine, tuple(range(1, job.steps + 1)), history.leaf
  whole = is_whole(engine.predictor, leaf.path, history.written, leaf.kind)
  passes = 2 if engine.predictor.needs_moments else 1

  def worked(function: Callable[[Room, Piece, int], _T]) -> Iterator[tuple[Piece, _T]]:
    for piece, result in _worked(function, history, job.steps, whole, run.rooms):
      yield piece, result
      bar.update(piece.size / passes)

  of_leaf = None
  if passes == 2 and history.written.size:
    _, count = engine.window(leaf.kind, run.theta, len(history.readers), steps)
    sums: Any = 0.0
    for piece, of_piece in worked(lambda room, piece, _: chunks.moment_sums([piece], count, room)):
      sums, width = sums + of_piece, piece.width
    of_leaf = chunks.from_moments(
      sums, [history.written.size], leaf.kind, width, run.theta, engine, steps
    )
  facts = Facts.none(1, job.steps)
  marks = [sink.mark() for sink in sinks]

  def predict(room: Room, piece: Piece, start: int) -> Facts:
    seen = chunks.predict([piece], run.theta, engine, steps, of_leaf, room)
    history.check(piece, start, seen)
    return seen

  for piece, seen in worked(predict):
    facts.add(seen)
    for sink, values in zip(sinks, piece.out, strict=True):
      sink.write(values)
  (health,) = facts.health(lambda _: pieces.largest(history.pieces(job.steps)))
  kept = _to_keep(job, run, facts, health[None], [leaf])[0]
  again = [sink for sink, is_kept in zip(sinks, kept, strict=True) if is_kept]
  for sink, mark in zip(sinks, marks, strict=True):
    if sink in again:
      sink.go_back(mark)
  _copy_newest(history, again, None)
  return health


def _to_keep(
  job: Job, run: _Run, facts: Facts, health: np.ndarray, leaves: Sequence[base.Leaf]
) -> np.ndarray:
  """Which leaves keep their newest weights, at which steps: `[leaves, steps]`.

  Raises:
    UserError: a prediction is bad, and that is an error.
  """
  bad = _is_bad(health) & run.engine.is_watched
  if bad.any() and job.on_bad == 'raise':
    i = int(bad.any(1).argmax())
    health_.report(
      health[[i]], predictor=run.engine.name, leaves=[(leaves[i].path, leaves[i].kind)],
      steps=range(1, job.steps + 1), on_bad='raise',
    )  # fmt: skip
  return bad | facts.still[:, None]


def _write_batch(
  job: Job, run: _Run, paths: Sequence[str], sinks: Sequence[Sink], scratch: Path
) -> dict[str, np.ndarray]:
  """Writes leaves that are small together; returns the health of those that are predicted."""
  engine, steps = run.engine, tuple(range(1, job.steps + 1))
  written: list[tuple[str, Sequence[np.ndarray]]] = []
  predicted: list[tuple[_LeafHistory, Piece]] = []
  health: dict[str, np.ndarray] = {}
  for path in paths:
    with _history(job, path, scratch) as history:
      if job.kinds[path] == kinds_.KEEP:
        newest = history.readers[-1].read(0, history.written.size)
        written.append((path, [history.as_written(newest)] * len(sinks)))
        continue
      for one in history.layers() if path in job.stacked else [history]:
        health[one.leaf.path] = np.zeros((job.steps, health_.FIELDS))
        whole = is_whole(engine.predictor, one.leaf.path, one.written, one.leaf.kind)
        for piece in one.pieces(job.steps, whole=whole):
          predicted.append((one, piece))
          written.append((path, list(piece.out)))
  if predicted:
    batch = [piece for _, piece in predicted]
    leaves = [piece.leaf for piece in batch]
    facts = chunks.predict(batch, run.theta, engine, steps)
    for i in np.flatnonzero(~facts.finite).tolist():
      predicted[i][0].check(batch[i], 0, facts)
    result = facts.health(lambda i: pieces.largest([batch[i]]))
    kept = _to_keep(job, run, facts, result, leaves)
    for i in np.flatnonzero(kept.any(1)).tolist():
      batch[i].out[kept[i]] = predicted[i][0].as_written(batch[i].stages[-1])
    health |= {leaf.path: of_leaf for leaf, of_leaf in zip(leaves, result, strict=True)}
  last = None
  for path, values in written:
    for sink, of_step in zip(sinks, values, strict=True):
      if path != last:
        sink.begin(job.leaves[path])
      sink.write(of_step)
    last = path
  return health
