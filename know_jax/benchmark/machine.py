"""The machine that was measured, as far as it can say what it is."""

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

import jax

from know_jax.runs.record import environment
from know_jax.system.machine import memory_bytes, processors

_RIVALS = ('tensorflow', 'keras')
_SETTINGS = ('GLIBC_TUNABLES', 'JAX_NUM_CPU_DEVICES', 'XLA_FLAGS')


def machine() -> dict[str, Any]:
  """Processor, memory, versions, what JAX runs on, and how busy it is."""
  return {
    'processor': _processor('model name') or platform.processor() or platform.machine(),
    'instructions': _instructions(),
    'cores': processors(),
    'memory_bytes': memory_bytes(),
    'backend': jax.default_backend(),
    **environment(),
    **{name: _version(name) for name in _RIVALS},
    'set': {name: os.environ[name] for name in _SETTINGS if os.environ.get(name)},
    'load_average': list(os.getloadavg()),
  }


def _processor(field: str) -> str:
  info = Path('/proc/cpuinfo')
  lines = info.read_text().splitlines() if info.is_file() else []
  result = [line.partition(':')[2].strip() for line in lines if line.startswith(field)]
  return result[0] if result else ''


def _instructions() -> str:
  """The widest vectors that the processor computes with, as far as Linux says so."""
  flags = _processor('flags').split()
  widest = next((name for name in ('avx512f', 'avx2', 'avx', 'asimd') if name in flags), '')
  return widest or 'unknown vector instructions'


def _version(name: str) -> str | None:
  if importlib.util.find_spec(name) is None:
    return None
  # TensorFlow comes in distributions of several names.
  distributions = importlib.metadata.packages_distributions().get(name) or [name]
  return importlib.metadata.version(distributions[0])
