"""Errors that are the user's to mend, and the wording they share."""

import contextlib
import difflib
import inspect
import warnings
from collections.abc import Iterable, Iterator


class UserError(ValueError):
  """A mistake in what the user gave: a flag, a file, a tree, a name.

  The message names the thing, its value and what is expected. Scripts print it without a
  traceback and exit with a non-zero code; library users catch it as a `ValueError`.
  """


class KindsWarning(UserWarning):
  """What is kept, or changed by a rule, where a user might not expect it."""


class PredictionWarning(UserWarning):
  """Leaves whose prediction is bad, and which keep their newest weights instead."""


def unknown_name(what: str, name: str, known: Iterable[str]) -> UserError:
  """The error for a name that is not in a registry, with the nearest names that are.

  Args:
    what: what the name stands for, in the singular: 'predictor', 'dataset', 'model'.
    name: the name found.
    known: the names that exist.

  Returns:
    The error, to be raised by the caller.
  """
  names = sorted(known)
  near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
  hint = f' Did you mean {" or ".join(repr(n) for n in near)}?' if near else ''
  return UserError(f'unknown {what} {name!r}.{hint} Known: {", ".join(names)}.')


def reason(error: OSError) -> str:
  """The operating system's own words for an error, such as 'No space left on device'."""
  return error.strerror or str(error)


def first_line(error: Exception) -> str:
  """The first line of an error's text; its type where it has none."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def os_errors(what: str) -> Iterator[None]:
  """Raises a `UserError` for an `OSError` of the block: what failed ('cannot read x'), and why."""
  try:
    yield
  except OSError as error:
    raise UserError(f'{what}: {reason(error)}.') from error


def warn(text: str, category: type[Warning] = KindsWarning) -> None:
  """Warns at the line outside this package from which it was called."""
  frame, level = inspect.currentframe(), 1
  while frame is not None and frame.f_globals.get('__name__', '').startswith('know_jax.'):
    frame, level = frame.f_back, level + 1
  warnings.warn(text, category, stacklevel=level)
