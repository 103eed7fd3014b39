"""Rate, reset or trajectory: the authors' ResNet18 with their networks as arms, on one GPU.

From a share of CIFAR-100 to a share of CIFAR-10, with the authors' recipe and cut epochs: it
answers where a gain comes from in such a regime, and is no reproduction of a published table. One
compiled program trains everything, images stay on the device, and a journal has a line for each
training, so that a later run continues.

What the result decides was fixed before the first run. A difference is one of test accuracy in
points, paired by source, with the 95 % t-interval over sources; it *matters* if its mean is at
least 0.3 away from zero and the interval does not hold zero.

- no gain: official x8 minus naive does not matter, or is negative. The causes below are then told
  for what differences there are, without a claim about a gain.
- reset: naive with BatchNorm reset minus naive matters, and official minus naive reset does not.
- rate: naive reset at the matched rate (the rate over the share of the norm of the convolutions
  that the prediction keeps) and the radial part alone are both within 0.3 of official, and the
  tangential part alone minus naive reset does not matter.
- trajectory: official minus its radial part matters, or the tangential part alone minus naive reset
  does, and is positive.
- at equal tuning: the best of three rates of official (0.4, 1, 2.5 times 4e-4) and the best of
  three of naive with BatchNorm kept (1, 2.5, 6.25 times), each chosen by the mean accuracy on
  validation images over sources, are compared; only a difference that matters counts for or
  against. Where the best is at the edge of its grid, that is said. (After three sources naive was
  at its edge: 16 times was added, from the two sources that followed.)
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from know_jax import trees
from know_jax.data.sources import load_dataset, mean_image
from know_jax.data.subsets import nested_subsets
from know_jax.errors import UserError
from know_jax.io.journal import Journal, read_lines
from know_jax.kinds import leaf_kinds
from know_jax.models import HEAD
from know_jax.models.adapters import linen
from know_jax.nowcast import api
from know_jax.predictors.parameters import load_known
from know_jax.seeds import named_key
from know_jax.study.parts import at_norms_of, radial, scaled_biases, tangential
from know_jax.study.trainer import Task, Trainer
from know_jax.training.batch_norm import apply_policy
from know_jax.training.state import learning_rates

STAGES = 5
SOURCE = 'source'  # The arm of the rows that tell of a source itself.
MATCHED = 'matched'
"""In place of a rate: that of fine-tuning over the norm that official x8 leaves to convolutions."""


@dataclasses.dataclass(frozen=True)
class Arm:
  """A start and a rate.

  Attributes:
    start: 'scratch', 'naive', or a key of `STARTS`.
    times: times this the rate of fine-tuning, or `MATCHED`.
    batch_norm: 'keep' or 'reset'.
    core: whether it is run from every source, others only from the first few.
  """

  start: str
  times: float | str = 1.0
  batch_norm: str = 'reset'
  core: bool = True

  @property
  def name(self) -> str:
    """Of its rows."""
    times = self.times if isinstance(self.times, str) else f'x{self.times:g}'
    return f'{self.start}, BatchNorm {self.batch_norm}, rate {times}'


ARMS = (
  Arm('naive', batch_norm='keep'),
  Arm('naive'),
  Arm('official x8'),
  Arm('official x8, radial'),
  Arm('official x8, tangential'),
  Arm('naive', MATCHED),
  Arm('naive', 2.5, 'keep'),
  Arm('naive', 6.25, 'keep'),
  Arm('official x8', 2.5),
  Arm('official x8', 0.4),
  Arm('naive', 16.0, 'keep', core=False),
  Arm('shrink to the norms of official x8', core=False),
  Arm('known x8', core=False),
  Arm('known_leaf x8', core=False),
  Arm('task_vector x8', core=False),
  Arm('official x2', core=False),
  Arm('official x8, scaled biases', core=False),
  Arm('scratch', 2.5, 'keep', core=False),
)


def default_config() -> ConfigDict:
  """Every field of `--config`, set for some twenty minutes of one fast GPU."""
  return ConfigDict(
    {
      # TFDS data sets in data_dir; or a .npz file with source_images, source_labels, target_images,
      # target_labels, test_images, test_labels.
      'source_dataset': 'cifar100',
      'target_dataset': 'cifar10',
      'data_dir': placeholder(str),
      'arrays': placeholder(str),
      'official': placeholder(str),  # A folder with the authors' .h5 files.
      'model': 'resnet18',
      'width': 64,
      'dtype': 'bfloat16',
      'batch_size': 128,
      'epsilon': 1e-8,  # Adam's, as in the authors' scripts.
      'sources': 5,
      'extra_sources': 2,  # From how many the arms are run that are not core.
      'source_examples': 12500,
      'source_epochs': 40,  # The authors: 200.
      'source_lr': 1e-3,
      'labels': 12500,
      'validation': 2500,  # Of the target's training images, chosen among for tuned rates alone.
      'warmup_epochs': 3,  # Of head and BatchNorm; the authors: 10.
      'warmup_lr': 1e-3,
      'epochs': 25,  # The authors: 100.
      'lr': 4e-4,
      'rate': 0.5,
      'seed': 0,
      # No training is begun that would end later, in seconds from the start; 0: no limit.
      'seconds': 0.0,
    }
  )


# --- starts ------------------------------------------------------------------------------------


def _predict(history: Sequence[Any], steps: int, predictor: str, theta: Any = None) -> Any:
  options: dict[str, Any] = {'predictor': predictor, 'theta': theta, 'on_bad': 'ignore'}
  return jax.device_get(api.predict(list(history), steps, **options))


def _official(part: Callable[[Any, Any], Any]) -> Callable[[Sequence[Any], Any], Any]:
  return lambda history, theta: part(history[-1], _predict(history, 3, 'known', theta))


STARTS: dict[str, Callable[[Sequence[Any], Any], Any]] = {
  'naive': lambda history, theta: history[-1],
  'official x2': lambda history, theta: _predict(history, 1, 'known', theta),
  'official x8': _official(lambda newest, predicted: predicted),
  'official x8, radial': _official(radial),
  'official x8, tangential': _official(tangential),
  'shrink to the norms of official x8': _official(at_norms_of),
  'official x8, scaled biases': lambda history, theta: scaled_biases(history, 3, theta),
  'known x8': lambda history, theta: _predict(history, 3, 'known'),
  'known_leaf x8': lambda history, theta: _predict(history, 3, 'known_leaf'),
  'task_vector x8': lambda history, theta: _predict(history, 3, 'task_vector'),
}
"""Name -> (stages of parameters, the authors' theta) -> parameters."""


def geometry(newest: Any, start: Any) -> dict[str, float]:
  """Of convolution kernels: norm over the newest's, and how much of the squared move is radial."""
  named, moved = trees.named_leaves(newest), trees.named_leaves(start)
  kernels = [path for path, kind in leaf_kinds(newest).items() if kind == 'conv']
  pairs = [(np.float64(named[path]).ravel(), np.float64(moved[path]).ravel()) for path in kernels]
  norms = [np.sqrt(sum(pair[i] @ pair[i] for pair in pairs)) for i in (0, 1)]
  moves = [(w, p - w) for w, p in pairs]
  along = sum((w @ d) ** 2 / (w @ w) for w, d in moves)
  total = sum(d @ d for _, d in moves)
  return {'norm': float(norms[1] / norms[0]), 'radial': float(along / total) if total else 0.0}


# --- the run -----------------------------------------------------------------------------------


def run(config: Mapping[str, Any], workdir: str | Path) -> list[dict[str, Any]]:
  """Trains what the journal `rows.jsonl` in the workdir lacks, core arms of all sources first.

  Args:
    config: the fields of `default_config`.
    workdir: for the journal and, as `source-SEED.npz`, the stages of each source.

  Returns:
    A row for each training done so far.

  Raises:
    UserError: the data or the authors' networks cannot be read, or do not suffice.
  """
  began, workdir = time.monotonic(), Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  if not config['official']:
    raise UserError("official is not set; expected a folder with the authors' three .h5 files.")
  theta = load_known(config['official'])
  study = _Study(config, workdir, theta)
  plan = [(seed, arm) for seed in range(config['sources']) for arm in ARMS if arm.core]
  plan += [(s, arm) for s in range(config['extra_sources']) for arm in ARMS if not arm.core]
  for seed, arm in plan:
    if study.journal.get(f'{seed}: {arm.name}') is not None:
      continue
    lacks_source = not study.has_source(seed)
    spent = time.monotonic() - began
    needed = study.seconds(of_source=False) + lacks_source * study.seconds(of_source=True)
    if config['seconds'] and spent + 1.1 * needed > config['seconds']:
      print(f'{spent:.0f} s: no time for {arm.name!r} of source {seed}', flush=True)
      break
    for row in (study.source(seed) if lacks_source else None, study.arm(seed, arm)):
      if row is not None:
        print({key: row[key] for key in ('key', 'accuracy', 'training', 'seconds')}, flush=True)
  return read_lines(study.journal_path)


class _Study:
  """The data, the trainer and the journal of one workdir."""

  def __init__(self, config: Mapping[str, Any], workdir: Path, theta: Any):
    self.config, self.workdir, self.theta = config, workdir, theta
    self.journal_path = workdir / 'rows.jsonl'
    self.journal = Journal(self.journal_path)
    parts = _arrays(config)
    sizes = np.cumsum([0, *(len(labels) for _, labels in parts)])
    wanted = config['labels'] + config['validation']
    for have, want, what in (
      (sizes[1], config['source_examples'], 'source images'),
      (sizes[2] - sizes[1], wanted, 'target images'),
    ):
      if have < want:
        raise UserError(f'found {have} {what}; expected at least {want}.')
    labels = np.concatenate([labels for _, labels in parts])
    self.trainer = Trainer(config, np.concatenate([images for images, _ in parts]), labels)
    self.all_sources, self.test = np.arange(sizes[1]), np.arange(sizes[2], sizes[3])
    drawn = np.random.default_rng(config['seed']).permutation(np.arange(sizes[1], sizes[2]))
    chosen, self.validation = np.split(drawn[:wanted], [config['labels']])
    images = np.asarray(self.trainer.images[np.sort(chosen)])
    self.target = Task(np.sort(chosen), mean_image(images), int(parts[1][1].max()) + 1)

  def seconds(self, *, of_source: bool) -> float:
    """How long the last training of this sort took; 0 where there was none."""
    lines = read_lines(self.journal_path)
    return next((x['seconds'] for x in lines[::-1] if (x['arm'] == SOURCE) == of_source), 0.0)

  def has_source(self, seed: int) -> bool:
    """Whether the stages of a source are trained."""
    return self._path(seed).exists() and self.journal.get(f'{seed}: {SOURCE}') is not None

  def _path(self, seed: int) -> Path:
    return self.workdir / f'source-{seed}.npz'

  def source(self, seed: int) -> dict[str, Any]:
    """Trains the stages of a source, and keeps their parameters and the newest's statistics."""
    began, config = time.monotonic(), self.config
    rng = np.random.default_rng([config['seed'], seed])
    order = rng.permutation(self.all_sources)
    chosen, held = np.sort(order[: config['source_examples']]), order[config['source_examples'] :]
    labels = np.asarray(self.trainer.labels)
    mean = mean_image(np.asarray(self.trainer.images[chosen]))
    whole = Task(chosen, mean, int(labels[self.all_sources].max()) + 1)
    key = named_key(config['seed'], 'source', seed)
    drawing = named_key(config['seed'], 'subsets', seed)
    subsets = nested_subsets(drawing, labels[chosen], rate=config['rate'], phases=STAGES)
    variables = self.trainer.fresh(named_key(config['seed'], 'init', seed), whole.classes)
    stages, accuracies, training = [], [], []
    for stage, subset in enumerate(subsets):
      task = dataclasses.replace(whole, train=chosen[subset])
      steps = config['source_epochs'] * (len(subset) // config['batch_size'])
      rates = learning_rates('cosine', config['source_lr'], steps)
      variables, hits = self.trainer.train(variables, task, rates, jax.random.fold_in(key, stage))
      stages.append(variables)
      training.append(hits)
      accuracies.append(self.trainer.score(variables, held, whole)['accuracy'] if len(held) else 0)
    arrays = {
      f'{stage}/{path}': leaf
      for stage, part in enumerate(stages)
      for path, leaf in trees.named_leaves(part).items()
    }
    np.savez(self._path(seed), **arrays)
    return self.journal.add(
      f'{seed}: {SOURCE}', source=seed, arm=SOURCE, accuracy=accuracies[0], held_out=accuracies,
      training=training[0], training_of_stages=training, seconds=time.monotonic() - began,
      device=jax.devices()[0].device_kind,
    )  # fmt: skip

  @functools.lru_cache(maxsize=1)  # noqa: B019 - one study a process.
  def _stages(self, seed: int) -> list[Any]:
    """The variables of a source's stages, oldest (smallest subset) first."""
    from flax.traverse_util import unflatten_dict

    with np.load(self._path(seed), allow_pickle=False) as file:
      flat: list[dict[str, Any]] = [{} for _ in range(STAGES)]
      for name in file.files:
        stage, _, path = name.partition('/')
        flat[int(stage)][path] = file[name]
    return [unflatten_dict(part, sep='/') for part in flat][::-1]

  def arm(self, seed: int, arm: Arm) -> dict[str, Any]:
    """Transfers one start at one rate."""
    began, config, trainer, task = time.monotonic(), self.config, self.trainer, self.target
    key = named_key(config['seed'], 'transfer', seed)
    fresh = trainer.fresh(key, task.classes)
    shape = {'norm': 1.0, 'radial': 0.0}
    if arm.start == 'scratch':
      variables = fresh
    else:
      stages = self._stages(seed)
      history = [stage['params'] for stage in stages]
      params = STARTS[arm.start](history, self.theta)
      shape = geometry(history[-1], params)
      # BatchNorm's scale and shift are no part of a prediction: they are those of the newest stage.
      params = {**params, HEAD: fresh['params'][HEAD]}
      variables = apply_policy(
        arm.batch_norm, linen(trainer.model), {**stages[-1], 'params': params},
        num_batches=1, batch_size=1,
      )  # fmt: skip
    if arm.times == MATCHED:
      history = [stage['params'] for stage in self._stages(seed)]
      official = STARTS['official x8'](history, self.theta)
      lr = config['lr'] / geometry(history[-1], official)['norm']
    else:
      lr = config['lr'] * float(arm.times)
    per_epoch = len(task.train) // config['batch_size']
    warm = np.full(config['warmup_epochs'] * per_epoch, config['warmup_lr'], np.float32)
    rates = learning_rates('cosine', lr, config['epochs'] * per_epoch)
    if arm.start == 'scratch':
      steps = (config['warmup_epochs'] + config['epochs']) * per_epoch
      rates = learning_rates('cosine', lr, steps)
    elif len(warm):
      first = jax.random.fold_in(key, 0)
      variables, _ = trainer.train(variables, task, warm, first, backbone=False)
    variables, hits = trainer.train(variables, task, rates, jax.random.fold_in(key, 1))
    tested = trainer.score(variables, self.test, task)
    return self.journal.add(
      f'{seed}: {arm.name}', source=seed, arm=arm.name, start=arm.start, times=arm.times, lr=lr,
      batch_norm=arm.batch_norm, accuracy=tested['accuracy'], loss=tested['loss'],
      validation=trainer.score(variables, self.validation, task)['accuracy'],
      training=trainer.score(variables, task.train, task)['accuracy'], training_augmented=hits,
      **shape, seconds=time.monotonic() - began, device=jax.devices()[0].device_kind,
    )  # fmt: skip


_ARRAYS = ('source', 'target', 'test')


def _arrays(config: Mapping[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
  """Images and labels of the source's training set, the target's, and its test set."""
  if config['arrays']:
    try:
      with np.load(config['arrays'], allow_pickle=False) as file:
        return [(file[f'{name}_images'], file[f'{name}_labels']) for name in _ARRAYS]
    except (OSError, ValueError, KeyError) as error:
      raise UserError(f'cannot read {config["arrays"]}: {error}.') from error
  wanted = ((config['source_dataset'], 'train'), (config['target_dataset'], 'train'))
  data = [
    load_dataset(name, split, data_dir=config['data_dir'])
    for name, split in (*wanted, (config['target_dataset'], 'test'))
  ]
  return [(entry.images, entry.labels) for entry in data]
