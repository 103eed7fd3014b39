"""What this machine has: processors and memory."""

import ctypes
import os


def memory_bytes() -> int:
  """The memory of this machine: what says to be larger is not read."""
  if hasattr(os, 'sysconf'):
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  # Windows: GlobalMemoryStatusEx fills MEMORYSTATUSEX, 64 bytes, whose third field is the total.
  status = (ctypes.c_uint64 * 8)(64)
  ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
  return int(status[1])


def give_back_memory() -> None:
  """Returns what was freed to the system, where the C library keeps it for later."""
  if not hasattr(os, 'sysconf'):
    return  # Windows has no handle of the program itself.
  trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
  if trim is not None:  # glibc has it.
    trim(0)


def processors() -> int:
  """How many processors this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
