"""A history in files, larger than memory if need be, predicted by bin/nowcast.py, beside a copy."""

import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.flax

from know_jax.benchmark.memory import MIB, environment, status
from know_jax.benchmark.settings import STAGES, Settings
from know_jax.benchmark.timing import goal
from know_jax.io.safetensors import INDEX
from know_jax.system.progress import progress

PREDICTORS = ('known_leaf', 'known')

SCRIPT = Path(__file__).parents[2] / 'bin' / 'nowcast.py'
_ITEM = jnp.bfloat16.dtype.itemsize
_POLL_SECONDS = 0.05
_GOAL = 'resident memory of a prediction from files, MiB'


def measure(settings: Settings, *, show: bool = True) -> dict[str, Any]:
  """Writes a history in bfloat16 to the temporary folder; there the script predicts one step of it.

  Where the script or room for all that is missing: `{'unmeasured': why, 'goals': ...}`.
  """

  def unmeasured(why: str) -> dict[str, Any]:
    return {'unmeasured': why, 'goals': [goal(_GOAL, None, most=512)]}

  if not SCRIPT.is_file():
    return unmeasured(f'there is no {SCRIPT.name}.')
  outputs = _ITEM * settings.streamed
  needed = (STAGES + len(PREDICTORS) + 1) * outputs
  with tempfile.TemporaryDirectory(prefix='know_jax-') as name:
    folder = Path(name)
    if (free := shutil.disk_usage(folder).free) < needed:
      return unmeasured(f'{folder.parent} has {free:,} bytes free; expected {needed:,}.')
    leaves = write_history(folder, settings.streamed, settings.streamed_leaf, show=show)
    stages = [folder / str(stage) for stage in range(STAGES)]
    calls = {}
    for predictor in PREDICTORS:
      copied = copy_seconds(stages, folder / 'copy')
      result = call([
        sys.executable, str(SCRIPT), f'--history={",".join(map(str, stages))}', '--steps=1',
        f'--output={folder / "predicted"}', f'--predictor={predictor}',
      ], folder / 'log')  # fmt: skip
      shutil.rmtree(folder / 'copy')
      calls[predictor] = {**result, 'copy_seconds': copied}
    start = call([sys.executable, str(SCRIPT), '--help'], folder / 'log')['seconds']
  return {
    'note': f'`bin/nowcast.py --history=... --output=...` predicts one step of '
    f'{settings.streamed:,} weights in {leaves} leaves, bfloat16 in sharded safetensors: '
    f'{STAGES} times {outputs / 1e9:.3g} GB are read and, as of one stage, written. *copy* reads '
    f'the same and writes one stage. Start-up (`--help`) takes {start:.1f} s of the seconds.',
    'weights': settings.streamed,
    'leaves': leaves,
    'start_seconds': start,
    'calls': calls,
    'tables': {'': [
      {
        '': predictor, 'copy, s': entry['copy_seconds'],
        'seconds': entry['seconds'],
        'over the copy, start-up apart': (entry['seconds'] - start) / entry['copy_seconds'],
        'memory, MiB': entry['peak'] / MIB,
      }
      for predictor, entry in calls.items()
    ]},
    'goals': [
      goal(_GOAL, max(entry['peak'] for entry in calls.values()) / MIB, most=512),
      *(
        goal(
          f'time of `{predictor}` from files over that of a copy, start-up apart',
          (entry['seconds'] - start) / entry['copy_seconds'], most=1.5,
        )
        for predictor, entry in calls.items()
      ),
    ],
  }  # fmt: skip


def copy_seconds(stages: Sequence[Path], target: Path) -> float:
  """Seconds to read all files of stages, and to write those of the last."""
  target.mkdir()
  began = time.perf_counter()
  for stage in stages:
    for path in sorted(stage.glob('*.safetensors')):
      with path.open('rb') as source, (target / path.name).open('wb') as out:
        while block := source.read(2**24):
          if stage == stages[-1]:
            out.write(block)
  return time.perf_counter() - began


def write_history(folder: Path, weights: int, leaf: int, *, show: bool = True) -> int:
  """Writes a history: for each stage a folder `0`, `1`, ... of shards with their index.

  Leaves are kernels of dense layers of at most `leaf` weights, a file each; says how many.
  """
  sizes = [min(leaf, weights - start) for start in range(0, weights, leaf)]
  shards = {
    f'model-{i:05}.safetensors': {f'dense{i}.kernel': (1, size)} for i, size in enumerate(sizes)
  }
  write_stages([folder / str(stage) for stage in range(STAGES)], shards, show=show)
  return len(sizes)


def write_stages(
  stages: Sequence[Path], shards: Mapping[str, Mapping[str, tuple[int, ...]]], *, show: bool = True
) -> None:
  """Writes random walks in bfloat16: for each stage a folder of shards with their index.

  Args:
    stages: the folders, oldest first.
    shards: file -> name -> shape.
    show: whether progress is shown.
  """
  places = {name: file for file, shapes in shards.items() for name in shapes}
  weights = sum(math.prod(shape) for shapes in shards.values() for shape in shapes.values())
  index = {'metadata': {'total_size': _ITEM * weights}, 'weight_map': places}
  for stage in stages:
    stage.mkdir()
    (stage / INDEX).write_text(json.dumps(index))
  with progress(len(shards), 'write history', 'file', show=show) as bar:
    for seed, (file, shapes) in enumerate(shards.items()):
      rng = np.random.default_rng(seed)
      walks = {name: _walk(rng, shape, len(stages)) for name, shape in shapes.items()}
      named = [
        dict(zip(walks, leaves, strict=True)) for leaves in zip(*walks.values(), strict=True)
      ]
      for stage, leaves in zip(stages, named, strict=True):
        safetensors.flax.save_file(leaves, stage / file, {'format': 'pt'})
      bar.update()


def _walk(rng: np.random.Generator, shape: tuple[int, ...], stages: int) -> list[jax.Array]:
  """The stages of one leaf, in bfloat16."""
  position, result = np.zeros(shape, np.float32), []
  for scale in (0.05, *[0.005] * (stages - 1)):
    position += scale * rng.standard_normal(shape, np.float32)
    result.append(jnp.asarray(position, jnp.bfloat16))
  return result


def call(command: Sequence[str], log: Path) -> dict[str, Any]:
  """Runs a program on the host to its end; gives its `seconds` and, in bytes, memory's `peak`.

  Raises:
    RuntimeError: the program failed; what it printed is given.
  """
  began, peak = time.perf_counter(), 0
  with log.open('w') as file:
    process = subprocess.Popen(command, env=environment(), stdout=file, stderr=file)
    try:
      while process.poll() is None:
        peak = max(peak, peak_memory(process.pid))
        time.sleep(_POLL_SECONDS)
    finally:
      process.kill()
      process.wait()
  if process.returncode:
    raise RuntimeError(f'exit code {process.returncode}: {" ".join(command)}\n{log.read_text()}')
  return {'seconds': time.perf_counter() - began, 'peak': peak}


def peak_memory(pid: int) -> int:
  """The most resident memory that a process has had, in bytes; 0 where it is no longer there."""
  try:
    return status('VmHWM', pid)
  except OSError:
    return 0
