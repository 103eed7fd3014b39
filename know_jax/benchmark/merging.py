"""Task arithmetic on two checkpoints of a large model: by bin/nowcast.py, mergekit, a copy."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from know_jax.benchmark.memory import MIB
from know_jax.benchmark.predicting import check_equal
from know_jax.benchmark.settings import Llama, Settings
from know_jax.benchmark.streamed import SCRIPT, call, copy_seconds, write_stages
from know_jax.benchmark.timing import goal, speedups, spread
from know_jax.system.progress import progress

COPY, OURS, RIVAL = 'copy', 'know_jax', 'mergekit'
PROGRAM = 'mergekit-yaml'
_ROUNDED = 2.0**-7  # Of a bfloat16, whose last bit may be rounded otherwise.


def measure(settings: Settings, *, show: bool = True) -> dict[str, Any]:
  """Both as programs, from their start to their end; mergekit where its program is on the PATH."""
  rival = shutil.which(PROGRAM)
  merged, goals, rows = [], list[Any](), list[Any]()
  needed = 5 * 2 * max(model.weights for model in settings.merged)  # With a copy and both results.
  free = shutil.disk_usage(tempfile.gettempdir()).free
  if not SCRIPT.is_file() or free < needed:
    why = f'{tempfile.gettempdir()} has {free:,} bytes free; expected {needed:,}, and {SCRIPT}.'
    return {'unmeasured': why, 'goals': [goal(f'merging, over {RIVAL}', None, least=2)]}
  for model in settings.merged:
    with tempfile.TemporaryDirectory(prefix='know_jax-') as name:
      found = _merged(model, Path(name), rival, settings.starts, show)
    merged.append(found)
    times, peaks, start = found['seconds'], found['peak'], found['start_seconds']
    apart = {
      name: spread(seconds)['median'] - start.get(name, 0) for name, seconds in times.items()
    }
    over = apart[OURS] / apart[COPY]
    faster = speedups(times, OURS)
    what = f'{model.weights / 1e9:.2g} billion weights'
    rows += [
      {
        '': name, 'weights': f'{model.weights:,}', 'seconds': spread(seconds),
        'start-up, s': start.get(name), 'over the copy, start-up apart': over if name == OURS
        else None, 'know_jax is faster by': faster.get(name),
        'the same, start-up apart': None if name == OURS else apart[name] / apart[OURS],
        'memory, MiB': peaks[name] / MIB if name in peaks else None,
      }
      for name, seconds in times.items()
    ]  # fmt: skip
    goals += [
      goal(f'merging {what}: time over that of a copy, start-up apart', over, most=1.5),
      goal(f'merging {what}: memory, MiB', peaks[OURS] / MIB, most=512),
      goal(
        f'merging {what}, over {RIVAL}', faster[RIVAL]['median'] if rival else None, least=2
      ),
    ]  # fmt: skip
  return {
    'note': 'Two checkpoints in bfloat16 with the names of a Llama, two shards each, give one by '
    'task arithmetic (`bin/nowcast.py --predictor=task_vector`), the embedding included. *copy* '
    'reads both and writes one. Programs run in turn, each from its start to its end; start-up is '
    'that of `--help`, the shortest of all rounds.'
    + (
      f' {RIVAL} is version {_version(rival)}.'
      if rival
      else f' {RIVAL} is not compared with: there is no {PROGRAM} on the PATH.'
    ),
    'merged': merged,
    'tables': {'': rows},
    'goals': goals,
  }


def _merged(
  model: Llama, folder: Path, rival: str | None, repetitions: int, show: bool
) -> dict[str, Any]:
  """`seconds` by name, and `start_seconds` and `peak` of programs."""
  old, new = stages = [folder / 'old', folder / 'new']
  write_checkpoints(model, old, new, show=show)
  config, log = folder / 'merge.yml', folder / 'log'
  # Theta^0 + (Theta^0 - Theta^1) is twice the way from Theta^1.
  config.write_text(json.dumps({
    'merge_method': 'task_arithmetic', 'base_model': str(old), 'dtype': 'bfloat16',
    'models': [{'model': str(new), 'parameters': {'weight': 2.0}}],
  }))  # fmt: skip
  programs: dict[str, tuple[list[str], list[str], Path]] = {
    OURS: (
      [sys.executable, str(SCRIPT)],
      [
        f'--history={old},{new}', '--steps=1', f'--output={folder / OURS}', '--kinds=embed=fc',
        '--predictor=task_vector',
      ],
      folder / OURS / 'task_vector' / '1',
    )
  }  # fmt: skip
  if rival:
    target = folder / RIVAL
    options = [str(config), str(target), '--no-write-model-card', '--no-copy-tokenizer']
    programs[RIVAL] = ([rival], options, target)
  starts: dict[str, list[float]] = {name: [] for name in programs}
  seconds: dict[str, list[float]] = {name: [] for name in (COPY, *programs)}
  peak = dict.fromkeys(programs, 0)
  with progress(repetitions * len(seconds), 'merge', 'run', show=show) as bar:
    for _ in range(repetitions):
      seconds[COPY].append(copy_seconds(stages, folder / COPY))
      shutil.rmtree(folder / COPY)
      bar.update()
      for name, (program, options, _) in programs.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        starts[name].append(call([*program, '--help'], log)['seconds'])
        result = call([*program, *options], log)
        seconds[name].append(result['seconds'])
        peak[name] = max(peak[name], result['peak'])
        bar.update()
  if rival:
    ours, theirs = (_leaf(path) for _, _, path in programs.values())
    check_equal(RIVAL, float((np.abs(ours - theirs) / np.abs(ours).max()).max()), _ROUNDED)
  # The first one may have read a program from the disk.
  start = {name: min(times) for name, times in starts.items()}
  return {'weights': model.weights, 'seconds': seconds, 'start_seconds': start, 'peak': peak}


def _version(program: str) -> str:
  """Of a program of Python's, as the Python beside it says."""
  asked = f'import importlib.metadata as m; print(m.version({RIVAL!r}))'
  python = Path(program).parent / 'python'
  if not python.exists():
    return 'unknown'
  done = subprocess.run([python, '-c', asked], capture_output=True, text=True, check=False)
  return done.stdout.strip() or 'unknown'


def write_checkpoints(model: Llama, old: Path, new: Path, *, show: bool = True) -> None:
  """Writes two: folders of two shards with their index, and the model's config."""
  leaves = list(model.shapes.items())
  half = len(leaves) // 2
  shards = {
    'model-00001-of-00002.safetensors': dict(leaves[:half]),
    'model-00002-of-00002.safetensors': dict(leaves[half:]),
  }
  write_stages([old, new], shards, show=show)
  for folder in (old, new):
    (folder / 'config.json').write_text(json.dumps(model.config))


def _leaf(folder: Path) -> np.ndarray:
  """One of the matrices of a merged checkpoint, `[H, H]`."""
  name = 'model.layers.0.self_attn.q_proj.weight'
  for path in sorted(folder.glob('*.safetensors')):
    with safetensors.safe_open(path, 'flax') as file:
      names = file.keys()  # It cannot be asked itself.
      if name in names:
        return np.asarray(file.get_tensor(name), np.float32)
  raise FileNotFoundError(f'no {name} in {folder}')
