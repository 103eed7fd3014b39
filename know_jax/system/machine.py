"""What this machine has: processors and memory."""

import ctypes
import os


def memory_bytes() -> int:
  """The memory of this machine: what says to be larger is not read."""
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


def give_back_memory() -> None:
  """Returns what was freed to the system, where the C library keeps it for later."""
  trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
  if trim is not None:  # glibc has it.
    trim(0)


def processors() -> int:
  """How many processors this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
