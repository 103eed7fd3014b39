"""Rate, reset or trajectory: the authors' ResNet18 with their networks as arms, on one GPU.

From a share of CIFAR-100 to a share of CIFAR-10, with the authors' recipe and cut epochs: it
answers where a gain comes from in such a regime, and is no reproduction of a published table. A
journal has a line for each training, so that a later run continues.

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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from know_jax import transfer, trees
from know_jax.data.augmentation import PAPER_AUGMENTATION
from know_jax.data.base import part_of
from know_jax.data.sources import Dataset, load_dataset
from know_jax.errors import UserError
from know_jax.fields import Given, config_dict, editable, read_config
from know_jax.forgetting import recipe_of
from know_jax.io.journal import Journal, read_lines
from know_jax.kinds import leaf_kinds
from know_jax.nowcast import api
from know_jax.predictors.parameters import load_known
from know_jax.seeds import named_key
from know_jax.study.parts import at_norms_of, radial, scaled_biases, tangential
from know_jax.tasks import classification
from know_jax.tasks.base import NetworkFields, Task
from know_jax.training import loop
from know_jax.training.batch_norm import apply_policy
from know_jax.training.steps import Data, put_data
from know_jax.user_loop import forget, nested_subsets

STAGES = 5
SOURCE = 'source'  # The arm of the rows that tell of a source itself.
MATCHED = 'matched'
"""In place of a rate: that of fine-tuning over the norm that official x8 leaves to convolutions."""


@dataclasses.dataclass(frozen=True)
class Arm:
  """A start ('scratch' or a key of `STARTS`) at so many times the fine-tuning rate, or `MATCHED`.

  `core` arms are run from every source, others only from the first few.
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


# The report names the first six by their places.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Every field of `--config`, set for some twenty minutes of one fast GPU."""

  # TFDS data sets in data_dir; or a .npz file with source_images, source_labels, target_images,
  # target_labels, test_images, test_labels.
  source_dataset: str = 'cifar100'
  target_dataset: str = 'cifar10'
  data_dir: str | None = None
  arrays: str | None = None
  official: str | None = None  # A folder with the authors' .h5 files.
  model: str = 'resnet18'
  width: int = 64
  dtype: str = 'bfloat16'
  conv_init: str = 'he_normal'  # As in the authors' scripts.
  batch_size: int = 128
  optimizer: str = 'adam'
  epsilon: float = 1e-8  # As in the authors' scripts.
  weight_decay: float = 0.0
  schedule: str = 'cosine'
  sources: int = 5
  extra_sources: int = 2  # From how many the arms are run that are not core.
  source_examples: int = 12500
  source_epochs: int = 40  # The authors: 200.
  source_lr: float = 1e-3
  labels: int = 12500
  validation: int = 2500  # Of the target's training images, chosen among for tuned rates alone.
  warmup_epochs: int = 3  # Of head and BatchNorm; the authors: 10.
  warmup_lr: float = 1e-3
  keep_optimizer: bool = False  # The authors' scripts may do so.
  epochs: int = 25  # The authors: 100.
  lr: float = 4e-4
  rate: float = 0.5
  seed: int = 0
  # No training is begun that would end later, in seconds from the start; 0: no limit.
  seconds: float = 0.0


def default_config() -> ConfigDict:
  """Every field of `--config`, with its default: see `Config`."""
  return editable(Config())


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


def run(config: Config | Given, workdir: str | Path) -> list[dict[str, Any]]:
  """Trains what the journal `rows.jsonl` in the workdir lacks, core arms of all sources first.

  The stages of each source are kept in `source-SEED`. Gives a row for each training done so far.

  Raises:
    UserError: the data or the authors' networks cannot be read, or do not suffice.
  """
  began, workdir, config = time.monotonic(), Path(workdir), read_config(Config, config)
  workdir.mkdir(parents=True, exist_ok=True)
  if not config.official:
    raise UserError("official is not set; expected a folder with the authors' three .h5 files.")
  study = _Study(config, workdir, load_known(config.official))
  plan = [(seed, arm) for seed in range(config.sources) for arm in ARMS if arm.core]
  plan += [(s, arm) for s in range(config.extra_sources) for arm in ARMS if not arm.core]
  for seed, arm in plan:
    if study.journal.get(f'{seed}: {arm.name}') is not None:
      continue
    lacks_source = study.journal.get(f'{seed}: {SOURCE}') is None
    spent = time.monotonic() - began
    needed = study.seconds(of_source=False) + lacks_source * study.seconds(of_source=True)
    if config.seconds and spent + 1.1 * needed > config.seconds:
      print(f'{spent:.0f} s: no time for {arm.name!r} of source {seed}', flush=True)
      break
    for row in (study.source(seed) if lacks_source else None, study.arm(seed, arm)):
      if row is not None:
        print({key: row[key] for key in ('key', 'accuracy', 'training', 'seconds')}, flush=True)
  return read_lines(study.journal_path)


class _Study:
  """The data, the target and the journal of one workdir."""

  def __init__(self, config: Config, workdir: Path, theta: Any):
    self.config, self.workdir, self.theta = config, workdir, theta
    self.transfer = read_config(transfer.TargetFields, config, only=True)
    self.journal_path = workdir / 'rows.jsonl'
    self.journal = Journal(self.journal_path)
    self.images, target, test = _data(config)
    used = config.labels + config.validation
    for result, least, what in (
      (self.images.size, config.source_examples + 1, 'source images'),
      (target.size, used, 'target images'),
    ):
      if result < least:
        raise UserError(f'found {result} {what}; expected at least {least}.')
    drawn = np.random.default_rng(config.seed).permutation(target.size)[:used]
    labelled, validation = np.split(drawn, [config.labels])
    self.target = self._task(target, np.sort(labelled), test)
    self.data = put_data(self.target)
    chosen_by = Data(part_of(target, validation), self.target.prepare)
    self.also = {'training': self.data[0], 'validation': chosen_by}

  def _task(self, images: Dataset, chosen: np.ndarray, test: Any) -> Task:
    of_network = read_config(NetworkFields, self.config, only=True)
    model = classification.network_of(of_network, images.num_classes)
    task = classification.task(
      model, part_of(images, chosen), test, augmentation=PAPER_AUGMENTATION
    )
    return dataclasses.replace(task, conv_init=self.config.conv_init)

  def seconds(self, *, of_source: bool) -> float:
    """How long the last training of this sort took; 0 where there was none."""
    lines = read_lines(self.journal_path)
    return next((x['seconds'] for x in lines[::-1] if (x['arm'] == SOURCE) == of_source), 0.0)

  @functools.lru_cache(maxsize=1)  # noqa: B019 - one study a process.
  def _source(self, seed: int) -> tuple[Task, list[Any]]:
    """A source's task and stages, oldest (smallest subset) first; trains what it lacks."""
    config = self.config
    order = np.random.default_rng([config.seed, seed]).permutation(self.images.size)
    chosen, held = np.split(order, [config.source_examples])
    task = self._task(self.images, np.sort(chosen), part_of(self.images, held))
    data = functools.cache(lambda: Data(task.train, task.prepare))

    def train(variables: Any, indices: np.ndarray, stage: int, key: jax.Array) -> Any:
      return loop.train(
        task, variables, data(), indices, recipe=recipe_of(self.transfer),
        epochs=config.source_epochs, batch_size=config.batch_size, lr=config.source_lr,
        schedule=config.schedule, key=key,
      )  # fmt: skip

    subsets = nested_subsets(task.train.strata, config.rate, STAGES, seed)
    history = forget(
      train, jax.device_get(task.init(named_key(config.seed, 'init', seed))), subsets,
      key=named_key(config.seed, 'source', seed), workdir=self.workdir / f'source-{seed}',
    )  # fmt: skip
    return task, list(jax.device_get(history))

  def source(self, seed: int) -> dict[str, Any]:
    """Trains the stages of a source."""
    began = time.monotonic()
    task, stages = self._source(seed)
    held, newest = Data(task.test, task.prepare), stages[-1]
    accuracies = [loop.evaluate(task, stage, held)['accuracy'] for stage in stages[::-1]]
    seen = loop.evaluate(task, newest, Data(task.train, task.prepare))
    return self.journal.add(
      f'{seed}: {SOURCE}', source=seed, arm=SOURCE, accuracy=accuracies[0], held_out=accuracies,
      training=seen['accuracy'], seconds=time.monotonic() - began,
      config=config_dict(self.config),
      device=jax.devices()[0].device_kind,
    )  # fmt: skip

  def arm(self, seed: int, arm: Arm) -> dict[str, Any]:
    """Transfers one start at one rate."""
    config, stages = self.transfer, self._source(seed)[-1]
    history = [stage['params'] for stage in stages]
    shape, lr = {'norm': 1.0, 'radial': 0.0}, config.lr
    if arm.start == 'scratch':
      key = named_key(self.config.seed, 'scratch', seed)
      variables = jax.device_get(self.target.init(key))
      epochs = config.warmup_epochs + config.epochs
      config = dataclasses.replace(config, warmup_epochs=0, epochs=epochs)
    else:
      params = STARTS[arm.start](history, self.theta)
      shape = geometry(history[-1], params)
      # BatchNorm's scale and shift are no part of a prediction: they are those of the newest stage.
      variables = apply_policy(
        arm.batch_norm, self.target.model, {**stages[-1], 'params': params},
        num_batches=1, batch_size=1,
      )  # fmt: skip
    if arm.times == MATCHED:
      official = STARTS['official x8'](history, self.theta)
      lr /= geometry(history[-1], official)['norm']
    else:
      lr *= float(arm.times)
    subset = np.arange(self.target.train.size, dtype=np.int32)
    row = transfer.train_one(
      self.target, variables, self.data, subset, dataclasses.replace(config, lr=lr), seed,
      also=self.also,
    )  # fmt: skip
    del row['curve']
    return self.journal.add(
      f'{seed}: {arm.name}', source=seed, arm=arm.name, start=arm.start, times=arm.times, lr=lr,
      batch_norm=arm.batch_norm, **row, **shape, device=jax.devices()[0].device_kind,
    )  # fmt: skip


def _data(config: Config) -> list[Dataset]:
  """The source's training set, the target's, and its test set."""
  source, target, arrays = config.source_dataset, config.target_dataset, config.arrays
  if not arrays:
    sets = ((source, 'train'), (target, 'train'), (target, 'test'))
    return [load_dataset(name, split, data_dir=config.data_dir) for name, split in sets]

  def read(name: str) -> Dataset:
    images, labels = (np.asarray(file[f'{name}_{what}']) for what in ('images', 'labels'))
    classes = tuple(map(str, range(labels.max() + 1)))
    return Dataset(arrays, name, images, labels.astype(np.int32), classes)

  try:
    with np.load(arrays, allow_pickle=False) as file:
      return [read(name) for name in ('source', 'target', 'test')]
  except (OSError, ValueError, KeyError) as error:
    raise UserError(f'cannot read {arrays}: {error}.') from error
