"""The stages of a history in files: found in a folder, in their order, each once."""

import itertools
import json
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from know_jax.errors import PredictionWarning, UserError
from know_jax.io import checkpoints, formats
from know_jax.io.files import local_path
from know_jax.io.weights import Weights

_NUMBER = re.compile(r'^(?P<before>.*?)(?P<step>\d+)(?P<after>\D*)$')
_COUNTED = re.compile(r'(?:^|[^a-z])(checkpoint|ckpt|step|steps|epoch|iter|iteration)$', re.I)


def expand(history: Sequence[str | os.PathLike]) -> list[Path]:
  """The paths of the stages: a folder given alone stands for the checkpoints in it, by their steps.

  Args:
    history: as given; `checkpoint-500`, `checkpoint-1000` in one folder, or `epoch_1.safetensors`,
      or the steps of a CheckpointManager, need not be named one by one.

  Raises:
    UserError: a path is of another machine, or the folder has several such series.
  """
  paths = [local_path(path, 'history') for path in history]
  if len(paths) != 1 or not paths[0].is_dir():
    return paths
  whole = formats.detect(paths[0])
  if whole is formats.formats()['orbax']:
    return paths  # The parts of such a folder look like checkpoints.
  series: dict[tuple[str, ...], list[tuple[tuple[int, ...], Path]]] = {}
  for path in paths[0].iterdir():
    if re.search(r'\d', path.name) and not re.search(r'^\.|\d-of-\d', path.name):
      # All numbers, as in `epoch=3-step=400.ckpt` and `step_4.h5`: one of them counts.
      numbers = tuple(map(int, re.findall(r'\d+', path.name)))
      series.setdefault(tuple(re.split(r'\d+', path.name)), []).append((numbers, path))
  # With those that are damaged: an error will name them. A folder that is a checkpoint itself may
  # hold one other beside it.
  result = [
    sorted(one)
    for one in series.values()
    if any(formats.detect(path) for _, path in one) and (whole is None or len(one) > 1)
  ]
  if not result:
    return paths
  if len(result) > 1 or not _counts_up([numbers for numbers, _ in result[0]]):
    shown = (
      [one[0][1].name for one in result] if len(result) > 1 else [p.name for _, p in result[0]]
    )
    raise UserError(
      f'{paths[0]} holds several series of checkpoints: {" ... and ".join(shown[:4])} ... Name the '
      'stages.'
    )
  return [path for _, path in result[0]]


def _counts_up(numbers: Sequence[tuple[int, ...]]) -> bool:
  """Whether, of the numbers of names in their order, one is larger from name to name."""
  return any(all(a < b for a, b in itertools.pairwise(one)) for one in zip(*numbers, strict=True))


def check_paths(stages: Sequence[Weights]) -> None:
  """Checks what paths and records tell of a history.

  Raises:
    UserError: a stage is given twice, or records (the examples of a know_jax checkpoint, the step
      of checkpoints that lie side by side) show that a newer stage comes first; both are named.
  """
  seen: dict[Path, int] = {}
  for number, stage in enumerate(stages):
    _check_new(seen, stage.path.resolve(), number, stages)
  records = [(stage, *_recorded(stage)) for stage in stages]
  for (older, counted, before), (newer, other, after) in itertools.pairwise(records):
    if counted == other and before > after:
      raise UserError(
        f'the history must be given oldest first: {older.path} has {counted[0]} {before}, and '
        f'{newer.path}, given after it, {after}. Give them in the order of their {counted[0]}.'
      )
  if len({counted for _, counted, _ in records}) == 1 and records[0][-1] < records[-1][-1]:
    return  # Names may mean something else: stages of forgetting are numbered from the newest.
  names = [_NUMBER.match(stage.path.stem) for stage in stages]
  steps = [int(n['step']) for n in names if n and names[0] and n['before'] == names[0]['before']]
  if len(steps) == len(stages) > 1 and all(a > b for a, b in itertools.pairwise(steps)):
    warnings.warn(
      f'the history looks reversed: its names count down, from {stages[0].path.name} to '
      f'{stages[-1].path.name}; the oldest stage must come first.',
      PredictionWarning,
      stacklevel=3,
    )


def check_content(stages: Sequence[Weights], identities: Sequence[dict[str, Any]]) -> None:
  """Checks that no two stages have files of the same bytes.

  Raises:
    UserError: two have; both are named.
  """
  seen: dict[Any, int] = {}
  for number, identity in enumerate(identities):
    content = tuple(sorted(file['sha256'] for file in identity.values()))
    _check_new(seen, content, number, stages)


def _check_new(seen: dict[Any, int], what: Any, number: int, stages: Sequence[Weights]) -> None:
  if (other := seen.setdefault(what, number)) != number:
    raise UserError(
      f'stages {other} ({stages[other].path}) and {number} ({stages[number].path}) are the same; '
      'expected a stage of its own for each place in the history.'
    )


def _recorded(stage: Weights) -> tuple[tuple[str, Path | None], float]:
  """What a stage's age is counted by, where that holds, and the count."""
  path = stage.path
  if stage.format == 'orbax' and (path / 'manifest.json').is_file():
    examples = checkpoints.read_metadata(path).get('examples')
    if isinstance(examples, (int, float)):
      return ('examples', None), examples
  folder = path if path.is_dir() else path.parent
  if stage.home is not None and (folder / 'trainer_state.json').is_file():
    try:
      step = json.loads((folder / 'trainer_state.json').read_text('utf-8'))['global_step']
      if isinstance(step, int):
        return ('global_step', folder.resolve().parent), step
    except (OSError, ValueError, KeyError, TypeError):
      pass  # The trainer's file is none of ours: its name may still tell.
  number = _NUMBER.match(path.stem if path.is_file() else path.name)
  if number:
    counted = _COUNTED.search(number['before'].rstrip('-_=. '))
    is_step = stage.format == 'orbax' and (path / '_CHECKPOINT_METADATA').exists()
    if counted or (is_step and not number['before']):
      name = counted[1].lower() if counted else 'step'
      return (name, path.resolve().parent), int(number['step'])
  return ('', None), 0
