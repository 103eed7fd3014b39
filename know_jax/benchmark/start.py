"""How long it takes until a process works: imports, a command's help, and a first prediction."""

import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from know_jax.benchmark.memory import environment
from know_jax.benchmark.settings import Settings
from know_jax.benchmark.timing import goal, race, speedups, spread

LIBRARIES = 'import jax, flax'
CALLS = {
  LIBRARIES: ('-c', LIBRARIES),
  'import know_jax': ('-c', 'import know_jax'),
  'know-jax nowcast --help': ('-m', 'know_jax', 'nowcast', '--help'),
}
"""Name -> what Python is given."""

LIMITS = {'import know_jax': 1.1, 'know-jax nowcast --help': 1.25}
"""Times what JAX and Flax need to be imported; at most."""

PREDICTORS = ('known', 'known_leaf')

_FIRST = """
import json, sys, time
import numpy as np
import know_jax
know_jax.keep_compiled(sys.argv[1])
rng = np.random.default_rng(0)
history = [{'dense': {'kernel': rng.normal(size=(100, 40)).astype('f')}} for _ in range(5)]
began = time.process_time()
know_jax.predict(history, predictor=sys.argv[2], on_bad='ignore')
json.dump(time.process_time() - began, sys.stdout)
"""


def measure(settings: Settings, *, show: bool = True) -> dict[str, Any]:
  """Whole processes in turn, and CPU time of first predictions where programs are kept."""
  calls: dict[str, Callable[[], Any]] = {
    name: functools.partial(_run, *arguments) for name, arguments in CALLS.items()
  }
  seconds = race(calls, settings.starts, 'start', show=show)
  # How many times as long as JAX and Flax alone, within each round.
  over = speedups(seconds, LIBRARIES)
  with tempfile.TemporaryDirectory(prefix='know_jax-') as folder:
    cpu = {
      name: [json.loads(_run('-c', _FIRST, folder, name)) for _ in range(settings.starts + 1)]
      for name in PREDICTORS
    }
  return {
    'note': 'Whole processes, in turn. The first prediction of a network of 4,000 weights after '
    '`know_jax.keep_compiled()` is CPU time of all threads, imports apart; a process before has '
    'compiled its programs.',
    'seconds': seconds,
    'cpu_seconds': cpu,
    'tables': {
      '': [
        {'': name, 'seconds': spread(seconds[name]), f'over `{LIBRARIES}`': over.get(name)}
        for name in CALLS
      ],
      'First prediction': [
        {'': name, 'compiled in it, CPU s': first, 'compiled before, CPU s': spread(later)}
        for name, (first, *later) in cpu.items()
      ],
    },
    'goals': [
      *(
        goal(f'time of `{name}` over that of `{LIBRARIES}`', over[name]['median'], most=limit)
        for name, limit in LIMITS.items()
      ),
      *(
        goal(f'CPU seconds of a first prediction by `{name}`', spread(later)['median'], most=1)
        for name, (_, *later) in cpu.items()
      ),
    ],
  }  # fmt: skip


def _run(*arguments: str) -> str:
  """What Python prints."""
  # Programs that are kept are what is measured here.
  env = {**environment(), 'JAX_ENABLE_COMPILATION_CACHE': 'true'}
  return subprocess.run(
    [sys.executable, *arguments], env=env, stdout=subprocess.PIPE, text=True, check=True
  ).stdout
