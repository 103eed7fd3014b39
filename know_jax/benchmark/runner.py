"""The whole benchmark: sections measured one after the other, and what is written of them."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from know_jax.benchmark import (
  accelerator,
  growing,
  memory,
  merging,
  networks,
  predicting,
  report,
  start,
  streamed,
  training_speed,
)
from know_jax.benchmark.machine import machine
from know_jax.benchmark.settings import FULL, QUICK
from know_jax.errors import UserError, os_errors, unknown_name
from know_jax.io.files import local_path, write_atomic
from know_jax.io.sealed import write_sealed

SECTIONS: dict[str, Callable[..., dict[str, Any]]] = {
  'predict': predicting.measure,
  'linear': predicting.linear,
  'leaves': predicting.many_leaves,
  'compile': memory.compilation,
  'memory': memory.measure,
  'growth': growing.measure,
  'streaming': streamed.measure,
  'merging': merging.measure,
  'start': start.measure,
  'training': training_speed.measure,
  'networks': networks.measure,
  'gpu': accelerator.measure,
}
"""Name -> (settings, show) -> JSON data, in the order that they are measured.

Each has `note` (how it was measured), `tables` (title -> rows, which are column -> text, number or
spread of numbers), `goals` (as `timing.goal` makes them) and the numbers that these are made of; or
`unmeasured`, why, and its goals.
"""

_OF_LINUX = ('compile', 'memory', 'streaming', 'merging')


def run(
  path: str | Path,
  *,
  only: Sequence[str] = (),
  quick: bool = False,
  show_progress: bool = True,
) -> dict[str, Any]:
  """Measures, and writes a Markdown file, JSON and a plot of the same name beside it.

  Gives what the JSON file holds: `machine`, `quick`, `seconds`, `load_average_after`, `sections`.

  Raises:
    UserError: before anything is measured, if a section is unknown or wants Linux, or `path` is no
      Markdown file that can be written.
  """
  for name in only:
    if name not in SECTIONS:
      raise unknown_name('section', name, SECTIONS)
  chosen = [name for name in SECTIONS if not only or name in only]
  if not os.access('/proc/self/clear_refs', os.W_OK):
    for name in _OF_LINUX:
      if name in chosen:
        others = ','.join(name for name in SECTIONS if name not in _OF_LINUX)
        raise UserError(
          f'section {name!r} reads memory from /proc, which is not there; expected Linux, or '
          f'--only={others}.'
        )
  path = local_path(path, 'output')
  if path.suffix != '.md':
    raise UserError(f'the output is {str(path)!r}; expected a Markdown file, as in benchmark.md.')
  with os_errors(f'cannot write in {path.parent}'):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
      raise UserError(f'cannot write in {path.parent}: permission denied.')
  settings = QUICK if quick else FULL
  about, began = machine(), time.perf_counter()
  sections = {name: SECTIONS[name](settings, show=show_progress) for name in chosen}
  result = {
    'machine': about,
    'quick': quick,
    'only': list(only),
    'seconds': time.perf_counter() - began,
    'load_average_after': list(os.getloadavg()),
    'sections': sections,
  }
  _write(path, result)
  return result


def _write(path: Path, found: dict[str, Any]) -> None:
  with os_errors(f'cannot write in {path.parent}'):
    write_sealed(path.with_suffix('.json'), found)
    for name, (end, _, draw) in report.PLOTS.items():
      if name in found['sections']:
        draw(path.with_name(path.stem + end), found['sections'][name])
    text = report.markdown(found, path.stem)
    write_atomic(path, text.encode())
