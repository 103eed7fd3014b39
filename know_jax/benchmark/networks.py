"""A training step of each sort of network, its compilation apart, beside PyTorch's."""

import functools
import importlib.util
import runpy
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from know_jax.benchmark.histories import build
from know_jax.benchmark.predicting import check_equal
from know_jax.benchmark.settings import Images, Settings, Target
from know_jax.benchmark.timing import goal, race, rates, speedups
from know_jax.benchmark.training_speed import LR, OURS, epoch_of, random_images
from know_jax.data.base import Arrays
from know_jax.tasks import captioning, classification, segmentation
from know_jax.tasks.base import AXIS, Task

_RIVALS = Path(__file__).parents[2] / 'tests' / 'tools' / 'torch_networks.py'
_CHECKED = 8  # Images whose logits are compared.
_CLASSES = 10
_WORDS, _LENGTH = 1000, 12


def measure(settings: Settings, *, show: bool = True) -> dict[str, Any]:
  """Steps of every network of the settings, by `loop.fit`, and by PyTorch's own of the same."""
  body, goals, seconds = [], [], {}
  for target in settings.networks:
    task = make_task(target, target.batch * target.steps)
    begin, fit = epoch_of(task, target.batch)
    options = {'batch_size': target.batch, 'lr': LR}
    contestants = {OURS: fit, **rivals(task, begin.state.variables, target.image, **options)}
    began = time.perf_counter()
    fit()
    first = time.perf_counter() - began
    name = f'captions by {target.model}' if target.captions else target.model
    times = race(contestants, target.repetitions, name, show=show)
    compiled = max(0.0, first - statistics.median(times[OURS]))
    rate, faster = rates(times, task.train.size), speedups(times, OURS)
    for which in times:
      body.append({
        'network': name, '': which, 'batch': target.batch, 'steps': target.steps,
        'images a second': rate[which],
        'seconds to compile': round(compiled, 1) if which == OURS else None,
        'know_jax is faster by': faster.get(which),
      })  # fmt: skip
    median = min((entry['median'] for entry in faster.values()), default=None)
    goals.append(goal(f'a step of {name}, over the faster PyTorch', median, least=1))
    seconds[name] = {'compile': compiled, **times}
  return {
    'note': 'Epochs of so many steps, Adam, float32; know_jax also reads bytes, '
    'and counts scores, in every step. PyTorch is given numbers ready for it, steps without '
    'torch.compile, and runs the networks of '
    "tests/tools/torch_networks.py, PVTv2 timm's where that is installed, in both orders of images "
    f'in memory. {absent()}',
    'seconds': seconds,
    'tables': {'': body},
    'goals': goals,
  }


def make_task(target: Target, count: int, **options: Any) -> Task:
  """Noise for a network: classification, segmentation or captions (`options`: the decoder's)."""
  images, labels = random_images(count, target.image)
  network = build(target, axis_name=AXIS)
  if target.captions:
    words = np.random.default_rng(1).integers(0, _WORDS, (count, _LENGTH))
    texts = [[' '.join(f'w{word}' for word in row)] for row in words]
    vocabulary = captioning.fit_vocabulary([text for (text,) in texts], _WORDS)
    pairs = captioning.pairs('noise', images, texts, vocabulary, _LENGTH)
    return captioning.task(
      network, pairs, pairs, vocabulary, max_length=_LENGTH, units=64, **options
    )
  if hasattr(network, 'output_stride'):
    rng = np.random.default_rng(1)
    labels = rng.integers(0, _CLASSES, images.shape[:3]).astype(np.uint8)
    source = Arrays({'image': images, 'label': labels})
    return segmentation.task(network, source, source, num_classes=_CLASSES)
  source = Arrays({'image': images, 'label': labels}, labels)
  return classification.task(network, source, source)


def absent() -> str:
  """Why PyTorch is not compared with; '' where it is."""
  if jax.default_backend() != 'cpu':
    return 'PyTorch is compared with on CPUs only.'
  if importlib.util.find_spec('torch') is None:
    return 'PyTorch is not compared with: it is not installed.'
  return '' if _RIVALS.is_file() else f'PyTorch is not compared with: {_RIVALS} is missing.'


def rivals(task: Task, variables: Any, image: Images, **options: Any) -> dict[str, Any]:
  """Epochs of the same network in PyTorch from the same weights, by name; none where it is absent.

  `options`: as of `epochs` in tests/tools/torch_networks.py.

  Raises:
    ArithmeticError: its logits, or the number of its parameters, are others.
  """
  if absent():
    return {}
  torch_networks = runpy.run_path(str(_RIVALS))
  model: Any = task.model
  network = torch_networks['build'](model.module, variables, image)
  if network is None:
    return {}
  batch = task.prepared(np.arange(task.train.size, dtype=np.int32))
  few = {name: value[:_CHECKED] for name, value in batch.items()}
  ours, _ = jax.jit(functools.partial(model.apply, train=False, key=None))(variables, few)
  counts = sum(leaf.size for leaf in jax.tree.leaves(variables['params']))
  check_equal('parameters of PyTorch', abs(torch_networks['count'](network) - counts), 0)
  # Words that are banned have logits of -1e9.
  both = [np.clip(x, -1e6, 1e6) for x in (torch_networks['logits'](network, few), ours)]
  check_equal('logits of PyTorch', float(np.abs(np.subtract(*both)).max()), 1e-3)
  return torch_networks['epochs'](network, batch, **options)
