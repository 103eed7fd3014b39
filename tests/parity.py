"""What the networks' tests share: outputs of other libraries, kept beside the repository."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / '..' / 'shared' / 'parity'

KEY = jax.random.key(0, impl='rbg')


def quickly(f):
  """Compiled in little time rather than for speed."""
  return jax.jit(f, compiler_options={'xla_backend_optimization_level': 0})


def load(name):
  """The arrays, and the network's configuration; the test is skipped where they are not kept."""
  if not (FOLDER / f'{name}.npz').is_file():
    pytest.skip(f'{FOLDER}/{name}.npz is absent: outputs of other libraries to compare with')
  with np.load(FOLDER / f'{name}.npz') as file:
    arrays = dict(file)
  return arrays, json.loads((FOLDER / f'{name}.json').read_text())


def tensors(arrays):
  return {name[6:]: value for name, value in arrays.items() if name.startswith('param/')}


def check(result, expected, tolerance=2e-5):
  """The error as a share of the largest value, or of one."""
  error = np.abs(np.asarray(result, np.float64) - expected).max()
  assert error <= tolerance * max(1, np.abs(expected).max())
