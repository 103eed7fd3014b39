"""Stopping a run from outside: the exception of SIGTERM, and stretches that no signal breaks."""

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AGAIN_SECONDS = 0.05


class Terminated(BaseException):
  """The process got SIGTERM; raised in the main thread of scripts started through `cli.run`.

  It derives from BaseException, as KeyboardInterrupt does, so that no `except Exception` on the
  way swallows it. A pipeline catches it to save, and raises it again.
  """


def raise_terminated(signum: int, frame: FrameType | None) -> None:
  """A signal handler that raises `Terminated`, once: later SIGTERMs are ignored.

  Whoever sends SIGTERM twice would otherwise break off the very save that the first one asked for.
  """
  signal.signal(signum, signal.SIG_IGN)
  raise Terminated


def raise_again(unraisable: Any) -> None:
  """A `sys.unraisablehook` for which no SIGTERM is lost.

  Python drops what is raised while it collects garbage, as in `__del__`, or in a callback of C
  code. A `Terminated` that was dropped there is raised a moment later.

  Args:
    unraisable: what `sys.unraisablehook` is called with.
  """
  if unraisable.exc_type is not Terminated:
    sys.__unraisablehook__(unraisable)
    return
  signal.signal(signal.SIGTERM, raise_terminated)
  # By another thread, because here it would be dropped as well.
  # On Windows `os.kill` would end the process; elsewhere it wakes the main thread too.
  send = signal.raise_signal if os.name == 'nt' else functools.partial(os.kill, os.getpid())
  again = threading.Timer(_AGAIN_SECONDS, send, (signal.SIGTERM,))
  again.daemon = True
  again.start()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
  """Puts SIGINT and SIGTERM off until the block is left, and then delivers them.

  For stretches that must not be left in the middle: a step that donates its buffers and assigns
  the new ones, or a save. Blocks may be nested. Outside the main thread, where Python runs no
  signal handlers, it does nothing.

  Raises:
    BaseException: on leaving, whatever the handlers of the signals that arrived raise.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  arrived: list[int] = []

  def remember(signum: int, frame: FrameType | None) -> None:
    if signum not in arrived:
      arrived.append(signum)

  before: dict[int, Any] = {}
  try:
    for held in _SIGNALS:
      # A handler that was not set from Python reads as None and could not be put back.
      if signal.getsignal(held) is not None:
        before[held] = signal.signal(held, remember)
    yield
  finally:
    for signum, handler in before.items():
      signal.signal(signum, handler)
    for signum in arrived:
      signal.raise_signal(signum)
