"""What transfers from several starts make of test images: the like of the paper's figure 4."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from know_jax.errors import UserError
from know_jax.fields import Given
from know_jax.io.files import local_path
from know_jax.report.plots import new_figure
from know_jax.study.arms import MAIN, Arm, is_naive
from know_jax.study.design import Study, combined_seed
from know_jax.study.sources import Run
from know_jax.tasks import captioning
from know_jax.tasks.metrics import IGNORED
from know_jax.training.steps import put_data
from know_jax.transfer import train_one

SHOWN = ('known_official', 'known', 'known_leaf', 'task_vector')
"""The starts, one step ahead, that are shown beside the naive one."""


def write(config: Given, workdir: str | Path, path: str | Path, *, images: int = 0) -> str:
  """Trains naive and predicted starts of the first source seed anew, and draws what they say.

  Args:
    config: of a study of segmentation or captioning.
    workdir: of the study; the forgetting run of the first seed is finished.
    path: the picture, a PNG file.
    images: how many test images, evenly over the test set; 0: 4 of label maps, 6 of captions.

  Returns:
    The score of each start, and for captions what is said, as Markdown.

  Raises:
    UserError: the task has no such pictures, or there is no forgetting run.
  """
  study, workdir = Study(config), local_path(workdir, 'workdir')
  task, source = study.target, study.sources()[0]
  ways = {'miou': (_label_maps, 4), 'masked_accuracy': (_captions, 6)}
  if task.score not in ways:
    raise UserError(
      f'task {study.config.transfer.task!r} has no pictures; expected segmentation or captioning.'
    )
  draw, usual = ways[task.score]
  run = Run(study.sources_folder(workdir) / source.name)
  data, seed = put_data(task), combined_seed(source.seed, 0)
  trained: dict[str, Any] = {}
  lines = []
  for arm in filter(_is_shown, study.arms_from(source)):
    name = 'naive' if is_naive(arm) else f'{arm.name} x{arm.multiple:.3g}'
    result = train_one(
      task, run.start(arm)[0], data, study.subsets[seed], study.transfer_config(arm), seed,
      on_trained=functools.partial(trained.__setitem__, name),
    )  # fmt: skip
    lines.append(f'- {name}: {task.score} {100 * result[task.score]:.2f} %')
  chosen = np.linspace(0, task.test.size - 1, images or usual).astype(np.int32)
  lines += draw(task, trained, task.test.batch(chosen), Path(path).expanduser())
  return '\n'.join(lines)


def _is_shown(arm: Arm) -> bool:
  if arm.group != MAIN:
    return False
  return is_naive(arm) or (arm.name in SHOWN and arm.step == 1)


def _label_maps(task: Any, trained: dict[str, Any], batch: Any, path: Path) -> list[str]:
  """Image, truth and each start's classes side by side."""
  prepared = task.prepare(jax.tree.map(jax.numpy.asarray, batch), None)
  maps = {'truth': batch['label']}
  for name, variables in trained.items():
    logits, _ = task.model.apply(variables, prepared, train=False, key=None)
    maps[name] = np.asarray(logits).argmax(-1)
  figure = new_figure(2.2 * (len(maps) + 1), 1.8 * len(batch['image']))
  grid = figure.subplots(len(batch['image']), len(maps) + 1, squeeze=False)
  for i, axes in enumerate(grid):
    axes[0].imshow(batch['image'][i])
    for place, (name, labels) in zip(axes[1:], maps.items(), strict=True):
      hidden = np.ma.masked_equal(labels[i], IGNORED)
      place.imshow(hidden, cmap='tab20', vmin=0, vmax=19, interpolation='nearest')
      place.set_facecolor('black')
      place.set_title(name if i == 0 else '', fontsize=9)
    for place in axes:
      place.set(xticks=[], yticks=[])
  figure.savefig(path, dpi=110, metadata={'Software': None})
  return []


def _captions(task: Any, trained: dict[str, Any], batch: Any, path: Path) -> list[str]:
  """Every image with a caption of a person's and those of each start: greedy, and of 3 beams."""
  vocabulary = captioning.Vocabulary(tuple(task.about['vocabulary']), ())
  said = {'a person': [vocabulary.decode(tokens) for tokens in batch['caption']]}
  for name, variables in trained.items():
    for way, beams in (('greedy', 1), ('3 beams', 3)):
      said[f'{name}, {way}'] = captioning.captions_of(task, variables, batch['image'], beams=beams)
  figure = new_figure(9, 2 * len(batch['image']))
  grid = figure.subplots(len(batch['image']), 2, squeeze=False, width_ratios=(1, 4))
  lines = []
  for i, (picture, words) in enumerate(grid):
    text = [f'{name}: {captions[i]}' for name, captions in said.items()]
    picture.imshow(batch['image'][i])
    words.text(0, 0.5, '\n'.join(text), va='center', fontsize=8, wrap=True)
    for place in (picture, words):
      place.set_axis_off()
    lines += [f'\nImage {i + 1}:', *(f'- {line}' for line in text)]
  figure.savefig(path, dpi=110, metadata={'Software': None})
  return lines
