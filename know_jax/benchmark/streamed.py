"""A history in files, larger than memory if need be, predicted by bin/nowcast.py; and a kill."""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.flax

from know_jax.benchmark.child import status
from know_jax.benchmark.children import environment
from know_jax.benchmark.settings import STAGES, Settings
from know_jax.io.safetensors import INDEX
from know_jax.system.progress import progress

PREDICTOR = 'known_leaf'

_SCRIPT = Path(__file__).parents[2] / 'bin' / 'nowcast.py'
_ITEM = jnp.bfloat16.dtype.itemsize
_POLL_SECONDS = 0.05


def measure(settings: Settings, *, show: bool = True) -> dict[str, Any]:
  """Writes a history in bfloat16 to the temporary folder; there the script predicts one step of it.

  As soon as it has finished a file it is killed, and the same command goes on.

  Returns:
    `weights`, `leaves`, `inputs` and `outputs` (bytes); `calls`, one or two, with `seconds` and
    `peak`, bytes of resident memory; `files` written, and how many the last call had `kept`; and
    `weights_a_second` of the last call, from its start to its end. Where the script or room for all
    that is missing: `{'unmeasured': why}`.
  """
  if not _SCRIPT.is_file():
    return {'unmeasured': f'there is no {_SCRIPT.name}.'}
  outputs = _ITEM * settings.streamed
  inputs = STAGES * outputs
  with tempfile.TemporaryDirectory(prefix='know_jax-') as name:
    folder = Path(name)
    # What a kill leaves half written is there once more.
    wanted, free = inputs + 2 * outputs, shutil.disk_usage(folder).free
    if free < wanted:
      return {'unmeasured': f'{folder.parent} has {free:,} bytes free; wanted {wanted:,}.'}
    leaves = write_history(folder, settings.streamed, settings.streamed_leaf, show=show)
    sizes = {'weights': settings.streamed, 'leaves': leaves, 'inputs': inputs, 'outputs': outputs}
    return {**sizes, **_predict(folder)}


def write_history(folder: Path, weights: int, leaf: int, *, show: bool = True) -> int:
  """Writes random walks: for each stage a folder `0`, `1`, ... of shards with their index.

  Args:
    folder: where they are written.
    weights: of each stage.
    leaf: the most of one leaf; leaves are kernels of dense layers, a file each.
    show: whether a bar is shown.

  Returns:
    How many leaves there are.
  """
  sizes = [min(leaf, weights - start) for start in range(0, weights, leaf)]
  names = {f'dense{i}.kernel': f'model-{i:05}.safetensors' for i in range(len(sizes))}
  index = {'metadata': {'total_size': _ITEM * weights}, 'weight_map': names}
  stages = [folder / str(stage) for stage in range(STAGES)]
  for stage in stages:
    stage.mkdir()
    (stage / INDEX).write_text(json.dumps(index))
  with progress(len(sizes), 'write history', 'leaf', show=show) as bar:
    for seed, (size, (name, file)) in enumerate(zip(sizes, names.items(), strict=True)):
      for stage, walked in zip(stages, _walk(seed, size), strict=True):
        safetensors.flax.save_file({name: walked}, stage / file)
      bar.update()
  return len(sizes)


def _walk(seed: int, size: int) -> Iterator[Any]:
  """The stages of one leaf, bfloat16 `[1, size]`."""
  rng = np.random.default_rng(seed)
  position = np.zeros((1, size), np.float32)
  for scale in (0.05, *[0.005] * (STAGES - 1)):
    position += scale * rng.standard_normal(position.shape, np.float32)
    yield jnp.asarray(position, jnp.bfloat16)


def _predict(folder: Path) -> dict[str, Any]:
  output = folder / 'predicted'
  history = ','.join(str(folder / str(stage)) for stage in range(STAGES))
  command = [
    sys.executable, str(_SCRIPT), f'--history={history}', f'--output={output}', '--steps=1',
    f'--predictor={PREDICTOR}',
  ]  # fmt: skip
  calls = [call(command, folder / 'log', kill_at=lambda: _files(output))]
  before: set[tuple[str, int, int]] = set()
  if calls[0]['killed']:
    before = _files(output)
    calls.append(call(command, folder / 'log'))
  after = _files(output)
  written = sum(size for *_, size in after - before)
  return {
    'predictor': PREDICTOR,
    'calls': calls,
    'files': len(after),
    'kept': len(after & before),
    # Headers are counted as weights: some hundred bytes of a gigabyte.
    'weights_a_second': written / _ITEM / calls[-1]['seconds'],
  }


def _files(output: Path) -> set[tuple[str, int, int]]:
  """Name, inode and size of the finished files: one that is written anew has another inode."""
  found = set()
  for path in (output / PREDICTOR / '1').glob('*.safetensors'):
    about = path.stat()
    found.add((path.name, about.st_ino, about.st_size))
  return found


def call(
  command: Sequence[str], log: Path, kill_at: Callable[[], Any] = lambda: False
) -> dict[str, Any]:
  """Runs a program on the host to its end, or kills it.

  Args:
    command: the program and its arguments.
    log: a file for what it prints.
    kill_at: what is asked again and again; as soon as it is true, the program gets SIGKILL.

  Returns:
    `seconds`; `peak`, the bytes of resident memory at the peak; and whether it was `killed`.

  Raises:
    RuntimeError: the program failed; what it printed is given.
  """
  began, peak, killed = time.perf_counter(), 0, False
  with log.open('w') as file:
    process = subprocess.Popen(command, env=environment(), stdout=file, stderr=file)
    try:
      while process.poll() is None:
        peak = max(peak, peak_memory(process.pid))
        if kill_at():
          killed = True
          break
        time.sleep(_POLL_SECONDS)
    finally:
      process.kill()
      process.wait()
  if not killed and process.returncode:
    raise RuntimeError(f'exit code {process.returncode}: {" ".join(command)}\n{log.read_text()}')
  return {'seconds': time.perf_counter() - began, 'peak': peak, 'killed': killed}


def peak_memory(pid: int) -> int:
  """The most resident memory that a process has had, in bytes; 0 where it is no longer there."""
  try:
    return status('VmHWM', pid)
  except OSError:
    return 0
