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


def machine() -> dict[str, Any]:
  """Processor, memory, versions, what JAX runs on, and how busy it is."""
  return {
    'processor': _processor(),
    'cores': processors(),
    'memory_bytes': memory_bytes(),
    'backend': jax.default_backend(),
    **environment(),
    **{name: _version(name) for name in _RIVALS},
    'xla_flags': os.environ.get('XLA_FLAGS', ''),
    'load_average': list(os.getloadavg()),
  }


def _processor() -> str:
  info = Path('/proc/cpuinfo')
  lines = info.read_text().splitlines() if info.is_file() else []
  names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
  return names[0] if names else platform.processor() or platform.machine()


def _version(name: str) -> str | None:
  if importlib.util.find_spec(name) is None:
    return None
  # TensorFlow comes in distributions of several names.
  distributions = importlib.metadata.packages_distributions().get(name) or [name]
  return importlib.metadata.version(distributions[0])
