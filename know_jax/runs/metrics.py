"""The metrics of a run: JSON lines and TensorBoard events."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from know_jax.errors import UserError, os_errors
from know_jax.io.files import write_atomic
from know_jax.io.journal import read_lines
from know_jax.jsonable import json_line, plain, restored
from know_jax.registry import load_object

_METRICS = 'metrics.jsonl'


_FLUSH_SECONDS = 10.0


OnMetrics = Callable[[int, dict[str, float]], Any]
"""Called as `on_metrics(step, metrics)` with each line of a run's metrics, in the process that
writes them, once the line is kept. It is for a tracker of one's own, as in

    run = wandb.init(...)
    forgetting.run(config, workdir, on_metrics=lambda step, metrics: run.log(metrics, step=step))

or `lambda step, metrics: mlflow.log_metrics(metrics, step)`; scripts take `--on_metrics`, a
'package.module:function' of that signature. After a kill, the steps since the last save come again,
with the same numbers. What it raises ends the run, which can be resumed.
"""


def find_callback(given: OnMetrics | str | None) -> OnMetrics | None:
  """What `on_metrics` stands for: a function, or the name of one, 'package.module:function'.

  Raises:
    UserError: it is neither.
  """
  result: Any = load_object(given, 'on_metrics') if isinstance(given, str) else given
  if result is not None and not callable(result):
    raise UserError(f'on_metrics is {result!r}; expected a function of a step and its metrics.')
  return result


def tell(on_metrics: OnMetrics | None, step: int, metrics: dict[str, float]) -> None:
  """Calls `on_metrics`, if there is one.

  Raises:
    UserError: it fails.
  """
  try:
    if on_metrics is not None:
      on_metrics(step, metrics)
  except Exception as error:  # Whatever the user's function raises.
    raise UserError(f'on_metrics fails at step {step}: {type(error).__name__}: {error}') from error


class MetricsLog:
  """The metrics of a run: `metrics.jsonl`, and the same as TensorBoard events.

  One line a call of `write`: `{"step": 3, "loss": 0.25}`. NaN and infinities, which JSON lacks, are
  the strings "NaN", "Infinity" and "-Infinity", which Python's `float` and JavaScript's `Number`
  read. Lines hold no time of day, so that a run that was killed and resumed leaves the same file as
  one that was not. Every line is given to the operating system at once, so that a kill loses none;
  `sync` guards against the loss of power too.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    resume_step: int | None,
    on_metrics: OnMetrics | None = None,
  ):
    """Opens the log for appending.

    Args:
      workdir: an existing directory.
      resume_step: the step of the state that the run resumes from; later lines, and one that was
        cut off, are dropped. None: the run begins, and all lines are dropped.
      on_metrics: is told every line, see `OnMetrics`.

    Raises:
      UserError: the file is damaged, or cannot be read or written.
    """
    from tensorboardX.event_file_writer import EventsWriter

    workdir = Path(workdir).expanduser()
    self._path = workdir / _METRICS
    self._flush_at, self._on_metrics = 0.0, on_metrics
    events = workdir / 'tensorboard'
    with os_errors(f'cannot write metrics in {workdir}'):
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
    """Appends one line: the number of training steps done, and scalars; one of JAX is waited for.

    Raises:
      UserError: a value is no number, the line cannot be written, or `on_metrics` fails.
    """
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    line = restored(plain({'step': step, **scalars}, 'metrics'))
    for name, value in line.items():
      if not isinstance(value, int if name == 'step' else (int, float)):
        raise UserError(f'metrics.{name} is {value!r} of {type(value)}; expected a number.')
    values = {name: value for name, value in line.items() if name != 'step'}
    summary = Summary(value=[Summary.Value(tag=n, simple_value=v) for n, v in values.items()])
    with os_errors(f'cannot write {self._path}'):
      # In one call: a line is there as a whole, or, of a full disk, in part, as the last one.
      self._file.write(json_line(line, 'metrics'))
      self._file.flush()
      self._events.write_event(Event(wall_time=time.time(), step=line['step'], summary=summary))
      if time.monotonic() > self._flush_at:
        self._flush_at = time.monotonic() + _FLUSH_SECONDS
        self._events.flush()
    tell(self._on_metrics, line['step'], values)

  def sync(self) -> None:
    """Makes all lines durable: to be called before the save that a resumption starts from."""
    with os_errors(f'cannot write {self._path}'):
      os.fsync(self._file.fileno())
      self._events.flush()

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
