"""What a run leaves beside its weights: its record, its metrics, and a bar while it runs."""

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import jax

from know_jax.errors import UserError
from know_jax.files import (
  json_line,
  plain,
  read_lines,
  read_sealed,
  reason,
  restored,
  write_atomic,
  write_sealed,
)
from know_jax.processes import from_first, in_all
from know_jax.version import __version__

if TYPE_CHECKING:
  import ml_collections

FORMAT = 'know_jax run'
VERSION = 1

_RECORD = 'record.json'
_METRICS = 'metrics.jsonl'
_HEADER = {
  *('format', 'version', 'kind', 'config', 'environment', 'started', 'resumed_in', 'sha256')
}
_PACKAGES = ('jax', 'jaxlib', 'flax', 'numpy', 'optax', 'orbax-checkpoint', 'tensorflow-datasets')
_SOURCES = ('know_jax', 'bin', 'configs', 'pyproject.toml')
_FLUSH_SECONDS = 10.0
_BAR_SECONDS = {True: 0.1, False: 10.0}


def environment() -> dict[str, Any]:
  """What a run ran on: versions, machine, devices and commit.

  Returns:
    A dict of JSON data: `know_jax`, `python`, the versions of JAX, Flax and other packages (None
    where one is not installed), `platform`, `device` (its kind), `devices` (how many), and
    `commit`: that of the source tree with `-dirty` where sources differ from it, or None if the
    sources are in no git checkout.
  """
  versions: dict[str, str | None] = {}
  for package in _PACKAGES:
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      versions[package] = None
  return {
    'know_jax': __version__,
    'python': platform.python_version(),
    **versions,
    'platform': platform.platform(),
    'device': jax.devices()[0].device_kind,
    'devices': jax.device_count(),
    'commit': _commit(Path(__file__).resolve().parent.parent),
  }


def _commit(root: Path) -> str | None:
  # Set by git for its hooks, these would point it to another repository.
  env = {key: value for key, value in os.environ.items() if not key.startswith('GIT_')}

  def git(*args: str) -> str:
    command = ('git', '-C', str(root), *args)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip()

  try:
    # An installed package may lie inside the checkout of something else, as in its .venv.
    if Path(git('rev-parse', '--show-toplevel')).resolve() != root:
      return None
    commit = git('rev-parse', 'HEAD')
    return f'{commit}-dirty' if git('status', '--porcelain', '--', *_SOURCES) else commit
  except (OSError, subprocess.SubprocessError):
    return None


def config_dict(config: 'ml_collections.ConfigDict') -> dict[str, Any]:
  """An `ml_collections.ConfigDict` as plain JSON data, for `RunRecord.open`.

  Args:
    config: fields of nested ConfigDicts, tuples, lists and scalars.

  Returns:
    Nested dicts; tuples have become lists.

  Raises:
    UserError: a field has no value yet, or one that JSON cannot keep; it is named.
  """
  from ml_collections.config_dict import RequiredValueError

  try:
    return restored(plain(config.to_dict(), 'config'))
  except RequiredValueError as error:
    raise UserError(f'the config is incomplete: {error}') from error


class RunRecord:
  """The record of a run: `record.json` in its workdir, written anew at every change.

  Behaves as a dict of JSON data with string keys (`record['accuracy'] = 0.9`); numbers come back as
  they went in. It begins with the keys `kind`, `config`, `environment`, `started` (seconds since
  1970) and `resumed_in`, which cannot be set. It carries a checksum: a change by hand is noticed.
  """

  def __init__(self, workdir: Path, content: dict[str, Any]):
    self.workdir = workdir
    self._content = content

  @classmethod
  def open(
    cls,
    workdir: str | os.PathLike,
    config: dict[str, Any],
    *,
    kind: str,
    flag: str = '--workdir',
  ) -> 'RunRecord':
    """Begins a run in a workdir, or goes on with the one that is there.

    Where a run goes on in another environment (a new version, another device), that is added to
    the record under `resumed_in`. Of several processes all call this and what changes the record,
    with the same values; process 0 writes, and its record is that of all.

    Args:
      workdir: the directory; made if missing.
      config: JSON data, as from `config_dict`.
      kind: what the run does: 'forget', 'transfer', ...
      flag: the option that gave the workdir, for errors.

    Returns:
      The record, with what an earlier part of the run wrote.

    Raises:
      UserError: the workdir holds a run of another kind or config (each differing field is
        named), a damaged record, or cannot be written; or a process does not see it.
    """
    workdir = Path(workdir).expanduser()
    content = from_first(lambda: cls._open(workdir, config, kind, flag)._content)

    def check_seen() -> None:
      if not (workdir / _RECORD).exists():
        raise UserError(f'{workdir} has no {_RECORD}; wanted a folder that all processes share.')

    in_all(check_seen)
    return cls(workdir, content)

  @classmethod
  def _open(cls, workdir: Path, config: dict[str, Any], kind: str, flag: str) -> 'RunRecord':
    """`open` in the process that writes."""
    config = restored(plain(config, 'config'))
    path = workdir / _RECORD
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      begun = path.exists()
    except OSError as error:
      raise UserError(f'cannot use workdir {workdir}: {reason(error)}.') from error
    if begun:
      record = cls.read(workdir, kind)
      if differences := _differences(record['config'], config):
        raise UserError(
          f'workdir {workdir} holds a run with another config. '
          + '; '.join(differences)
          + f'. Give another {flag}, or the config found there.'
        )
      here = environment()
      resumed = record['resumed_in']
      if here != (resumed[-1] if resumed else record['environment']):
        record._replace({**record._content, 'resumed_in': [*resumed, here]})
      return record
    content = {
      'format': FORMAT,
      'version': VERSION,
      'kind': kind,
      'config': config,
      'environment': environment(),
      'started': time.time(),
      'resumed_in': [],
    }
    record = cls(workdir, {})
    record._replace(content)
    return record

  @classmethod
  def read(cls, workdir: str | os.PathLike, kind: str) -> 'RunRecord':
    """Reads the record of a run.

    Raises:
      UserError: there is none, it is damaged, or it is of another kind of run or format version.
    """
    workdir = Path(workdir).expanduser()
    path = workdir / _RECORD
    content = read_sealed(path, 'record')
    if content.get('format') != FORMAT or content.get('version') != VERSION:
      raise UserError(
        f'record {path} has format {content.get("format")!r}, version '
        f'{content.get("version")!r}; wanted {FORMAT!r}, version {VERSION}.'
      )
    header = {'config': dict, 'environment': dict, 'resumed_in': list}
    for name, wanted in header.items():
      if not isinstance(content.get(name), wanted):
        raise UserError(f'record {path} is malformed: its {name} is no {wanted.__name__}.')
    if content.get('kind') != kind:
      raise UserError(
        f'workdir {workdir} holds a run of another kind: found {content.get("kind")!r}, wanted '
        f'{kind!r}. Give another --workdir.'
      )
    return cls(workdir, content)

  def __getitem__(self, key: str) -> Any:
    return self._content[key]

  def __contains__(self, key: str) -> bool:
    return key in self._content

  def get(self, key: str, default: Any = None) -> Any:
    """The value of a key, or a default."""
    return self._content.get(key, default)

  def __setitem__(self, key: str, value: Any) -> None:
    self.update(**{key: value})

  def update(self, /, **values: Any) -> None:
    """Sets several keys in one atomic and durable write.

    Raises:
      UserError: a value is not JSON data, or the file cannot be written; the record is as before.
      KeyError: a key is one that the record begins with.
    """
    if taken := _HEADER & values.keys():
      raise KeyError(f'{min(taken)!r} cannot be set.')

    def change() -> dict[str, Any]:
      self._replace({**self._content, **values})
      return self._content

    self._content = from_first(change)

  def _replace(self, content: dict[str, Any]) -> None:
    path = self.workdir / _RECORD
    # As it will be read: no list of the caller's is in it, and tuples are lists.
    content = restored(plain(content, 'record'))
    try:
      write_sealed(path, content)
    except OSError as error:
      raise UserError(f'cannot write {path}: {reason(error)}.') from error
    self._content = content


def _differences(found: Any, wanted: Any, field: str = '') -> list[str]:
  """`field: found X, wanted Y` for every leaf in which two configs differ."""
  if isinstance(found, dict) and isinstance(wanted, dict):
    return [
      difference
      for key in dict.fromkeys((*found, *wanted))
      for difference in _differences(
        found.get(key, _Missing), wanted.get(key, _Missing), f'{field}.{key}' if field else key
      )
    ]
  # As text, because 1 == 1.0 == True.
  same = _show(found) == _show(wanted)
  return [] if same else [f'{field}: found {_show(found)}, wanted {_show(wanted)}']


class _Missing:
  pass


def _show(value: Any) -> str:
  return 'nothing' if value is _Missing else json.dumps(plain(value, 'config'))


class MetricsLog:
  """The metrics of a run: `metrics.jsonl`, and the same as TensorBoard events.

  One line a call of `write`: `{"step": 3, "loss": 0.25}`. NaN and infinities, which JSON lacks, are
  the strings "NaN", "Infinity" and "-Infinity", which Python's `float` and JavaScript's `Number`
  read. Lines hold no time of day, so that a run that was killed and resumed leaves the same file as
  one that was not. Every line is given to the operating system at once, so that a kill loses none;
  `sync` guards against the loss of power too.
  """

  def __init__(self, workdir: str | os.PathLike, *, resume_step: int | None):
    """Opens the log for appending.

    Args:
      workdir: an existing directory.
      resume_step: the step of the state that the run goes on from; later lines, and one that was
        cut off, are dropped. None: the run begins, and all lines are dropped.

    Raises:
      UserError: the file is damaged, or cannot be read or written.
    """
    from tensorboardX.event_file_writer import EventsWriter

    workdir = Path(workdir).expanduser()
    self._path = workdir / _METRICS
    self._flush_at = 0.0
    events = workdir / 'tensorboard'
    try:
      kept = self._kept(resume_step)
      write_atomic(self._path, ''.join(kept).encode())
      events.mkdir(exist_ok=True)
      # By number, because the name holds the time in seconds only, and a file of the same name
      # would be overwritten.
      number = sum(1 for _ in events.iterdir())
      self._file = self._path.open('a', encoding='utf-8')
      self._events = EventsWriter(str(events / 'events'), f'.{number:04d}')
      if number:
        self._purge(0 if resume_step is None else resume_step + 1)
    except OSError as error:
      raise UserError(f'cannot write metrics in {workdir}: {reason(error)}.') from error

  def _kept(self, resume_step: int | None) -> list[str]:
    lines = [] if resume_step is None else read_lines(self._path)
    for number, line in enumerate(lines, 1):
      if type(line.get('step')) is not int:
        raise UserError(f'{self._path} is damaged: line {number} has no step.')
    return [json_line(line, 'metrics') for line in lines if line['step'] <= resume_step]

  def _purge(self, step: int) -> None:
    """Tells TensorBoard to forget what earlier files say of this step and later ones."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    start = SessionLog(status=SessionLog.START)
    self._events.write_event(Event(wall_time=time.time(), step=step, session_log=start))

  def write(self, step: int, **scalars: Any) -> None:
    """Appends one line.

    Args:
      step: the number of training steps done, or whatever `resume_step` counts.
      **scalars: numbers, NumPy or JAX scalars; a JAX scalar is waited for.

    Raises:
      UserError: a value is no number, or the line cannot be written.
    """
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    line = restored(plain({'step': step, **scalars}, 'metrics'))
    for name, value in line.items():
      if not isinstance(value, int if name == 'step' else (int, float)):
        raise UserError(f'metrics.{name} is {value!r} of {type(value)}; wanted a number.')
    values = {name: value for name, value in line.items() if name != 'step'}
    summary = Summary(value=[Summary.Value(tag=n, simple_value=v) for n, v in values.items()])
    try:
      # In one call: a line is there as a whole, or, of a full disk, in part, as the last one.
      self._file.write(json_line(line, 'metrics'))
      self._file.flush()
      self._events.write_event(Event(wall_time=time.time(), step=line['step'], summary=summary))
      if time.monotonic() > self._flush_at:
        self._flush_at = time.monotonic() + _FLUSH_SECONDS
        self._events.flush()
    except OSError as error:
      raise UserError(f'cannot write {self._path}: {reason(error)}.') from error

  def sync(self) -> None:
    """Makes all lines durable: to be called before the save that a resumption starts from."""
    try:
      os.fsync(self._file.fileno())
      self._events.flush()
    except OSError as error:
      raise UserError(f'cannot write {self._path}: {reason(error)}.') from error

  def close(self) -> None:
    """Ends the log; it may be called twice."""
    if not self._file.closed:
      self.sync()
      self._file.close()
      self._events.close()

  def __enter__(self) -> 'MetricsLog':
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


class Bar(Protocol):
  """What `progress` yields."""

  def update(self, n: float = 1) -> Any:
    """Counts `n` more units."""

  def set_postfix(self, *args: Any, **kwargs: Any) -> Any:
    """Shows values by name at the end of the bar, from the next update on."""


class _Lines:
  """A text file in which a bar leaves lines, in place of carriage returns that only add up."""

  def __init__(self, file: TextIO):
    self._file = file

  def write(self, text: str) -> None:
    # tqdm pads the new state to the length of the old one, and ends the bar with a line's end.
    if text := text.strip():
      self._file.write(f'{text}\n')

  def flush(self) -> None:
    self._file.flush()


@contextlib.contextmanager
def progress(
  total: int,
  desc: str,
  unit: str,
  *,
  initial: float = 0,
  show: bool = True,
  scale: bool = False,
) -> Iterator[Bar]:
  """A progress bar on stderr with rate and time left.

  Args:
    total: how many units there are.
    desc: what is being done.
    unit: what is counted, as in 'step'.
    initial: units done before, which the rate leaves out.
    show: False: count in silence.
    scale: whether large numbers are shown as 1.23M.

  Yields:
    The bar, with `update(n=1)` and `set_postfix(name=value)`, which the next update shows. Where
    stderr is no terminal it prints a line every 10 seconds.
  """
  from tqdm import tqdm

  terminal = sys.stderr.isatty()
  bar = tqdm(
    total=total,
    desc=desc,
    unit=f' {unit}',
    initial=initial,
    unit_scale=scale,
    disable=not show,
    mininterval=_BAR_SECONDS[terminal],
    maxinterval=10.0,
    dynamic_ncols=terminal,
    file=sys.stderr if terminal else _Lines(sys.stderr),
  )
  # By default it draws the bar at once, however lately that was done.
  bar.set_postfix = functools.partial(bar.set_postfix, refresh=False)
  with bar:
    yield bar
