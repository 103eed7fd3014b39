"""A training step of each sort of network, its compilation apart, beside PyTorch where it is."""

import functools
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from know_jax.benchmark.histories import build
from know_jax.benchmark.predicting import check_equal
from know_jax.benchmark.settings import Settings, Target
from know_jax.benchmark.timing import goal, race, rates, speedups
from know_jax.benchmark.training_speed import OURS, random_images
from know_jax.data.base import Arrays
from know_jax.models import to_state_dict
from know_jax.tasks import captioning, classification, segmentation
from know_jax.tasks.base import AXIS, Task
from know_jax.training import loop
from know_jax.training.state import Checkpoint, Recipe, create_state
from know_jax.training.steps import put_data

TORCH = 'PyTorch'
_RECIPE = Recipe('adam')
_LR = 1e-3
_CLASSES = 10


def measure(settings: Settings, *, show: bool = True) -> dict[str, Any]:
  """Steps of every network of the settings, by `loop.fit`, and by PyTorch's own of the same."""
  body, goals, seconds = [], [], {}
  for target in settings.networks:
    task = make_task(target, settings.network_batch * settings.network_steps)
    data, key = put_data(task)[0], jax.random.key(0)
    begin = Checkpoint(create_state(jax.device_get(task.init(key)), _RECIPE))
    everything = np.arange(task.train.size, dtype=np.int32)
    fit = functools.partial(
      loop.fit, task, begin, data, everything, recipe=_RECIPE, epochs=1,
      batch_size=settings.network_batch, lr=_LR, schedule='constant', key=key,
    )  # fmt: skip
    contestants: dict[str, Callable[[], Any]] = {OURS: fit}
    if rival := _rival(target, task, begin.state.variables, settings):
      contestants[TORCH] = rival
    began = time.perf_counter()
    fit()
    first = time.perf_counter() - began
    name = f'captions by {target.model}' if target.captions else target.model
    times = race(contestants, target.repetitions, name, show=show)
    compiled = max(0.0, first - statistics.median(times[OURS]))
    rate, faster = rates(times, task.train.size), speedups(times, OURS).get(TORCH)
    for which in times:
      body.append(
        {
          'network': name, '': which, 'images a second': rate[which],
          'seconds to compile': round(compiled, 1) if which == OURS else None,
          'know_jax is faster by': faster if which == TORCH else None,
        }
      )  # fmt: skip
    median = None if faster is None else faster['median']
    goals.append(goal(f'a step of {name}, over PyTorch', median, least=1))
    seconds[name] = {'compile': compiled, **times}
  return {
    'note': f'Epochs of {settings.network_steps} steps of {settings.network_batch} images, Adam, '
    'float32; know_jax also reads bytes, and counts scores, in every step. PyTorch is given '
    'numbers ready for it, and steps without torch.compile. A network without a line of PyTorch '
    f'has no independent implementation here. {absent()}',
    'seconds': seconds,
    'tables': {'': body},
    'goals': goals,
  }


def make_task(target: Target, count: int) -> Task:
  """Noise for a network: classification, segmentation or captions, whichever it is for."""
  images, labels = random_images(count, target.image)
  network = build(target, axis_name=AXIS)
  if target.captions:
    vocabulary = captioning.fit_vocabulary(['a red one', 'a green one', 'the blue one'], 20)
    texts = [['a red one', 'a green one', 'the blue one'][i % 3] for i in range(count)]
    pairs = captioning.pairs('noise', images, [[text] for text in texts], vocabulary, 8)
    return captioning.task(network, pairs, pairs, vocabulary, max_length=8, units=64, layers=1)
  if hasattr(network, 'output_stride'):
    rng = np.random.default_rng(1)
    labels = rng.integers(0, _CLASSES, images.shape[:3]).astype(np.uint8)
    source = Arrays({'image': images, 'label': labels})
    return segmentation.task(network, source, source, num_classes=_CLASSES)
  source = Arrays({'image': images, 'label': labels}, labels)
  return classification.task(network, source, source)


def absent() -> str:
  """Why PyTorch is not compared with; '' where it is."""
  missing = [name for name in ('torch', 'timm') if importlib.util.find_spec(name) is None]
  if jax.default_backend() != 'cpu':
    return 'PyTorch is compared with on CPUs only.'
  return f'PyTorch is not compared with: {missing[0]} is not installed.' if missing else ''


def _rival(target: Target, task: Task, variables: Any, settings: Settings) -> Any:
  """An epoch of the same network in PyTorch with the same weights: timm's PVTv2; None: none."""
  if absent() or not target.timm:
    return None
  import torch
  from timm.models.pvt_v2 import PyramidVisionTransformerV2

  model: Any = task.model
  options = {name: getattr(model.module, name) for name in target.timm}
  network = PyramidVisionTransformerV2(num_classes=_CLASSES, **options)
  state = to_state_dict(model.module, variables)
  network.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
  prepared = task.prepared(np.arange(task.train.size, dtype=np.int32))
  images = torch.tensor(np.asarray(prepared['image'])).permute(0, 3, 1, 2).contiguous()
  labels = torch.tensor(np.asarray(prepared['label'])).long()
  size = settings.network_batch
  network.train(False)
  with torch.no_grad():
    logits = network(images[:size]).numpy()
  few = {name: value[:size] for name, value in prepared.items()}
  ours, _ = task.model.apply(variables, few, train=False, key=None)
  check_equal('logits of PyTorch', float(np.abs(logits - np.asarray(ours)).max()), 1e-3)
  network.train()
  optimizer = torch.optim.Adam(network.parameters(), _LR, eps=1e-7)

  def epoch() -> float:
    total = 0.0
    order = torch.randperm(len(images))
    for part in order.split(size):
      optimizer.zero_grad()
      loss = torch.nn.functional.cross_entropy(network(images[part]), labels[part])
      loss.backward()
      optimizer.step()
      total += float(loss)
    return total

  return epoch
