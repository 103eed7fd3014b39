"""Collects the meta-dataset: many small forgetting runs with randomised settings.

The paper, section 4.1: each run draws its sampling rate, learning rate and batch size, and keeps
the weights after each of seven stages. The first stage, pre-training, has its own length and
learning rate, so that its loss has flattened before the rest begins: else the network would go on
learning where it should forget. A run is a function of the config and its own number alone, so that
any run can be made again, and several workers can share one output folder.

A finished run is two files in the output folder (format `know_jax.meta/1`):

  runs/00017.safetensors   every leaf, path -> [7, ...], oldest (smallest subset) first
  runs/00017.json          sealed: hyper-parameters, leaf kinds, accuracy of every stage, SHA-256
                           of the safetensors file

A run that diverged leaves the JSON file alone, with the reason.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from ml_collections import ConfigDict

from know_jax import forgetting, kinds, trees
from know_jax.data.augmentation import PAPER_AUGMENTATION, Augmentation
from know_jax.errors import UserError, unknown_name
from know_jax.fields import Given, check_least, config_dict, editable, read_config
from know_jax.io.files import local_path, locked, write_atomic
from know_jax.io.sealed import read_sealed, write_sealed
from know_jax.models import MODELS
from know_jax.runs.record import RunRecord
from know_jax.runs.workdir import load_trajectory
from know_jax.runs.workers import each
from know_jax.system.compiled import drop_programs
from know_jax.system.machine import memory_bytes
from know_jax.system.progress import progress
from know_jax.training.state import OPTIMIZERS, DivergedError

KIND = 'collect'
FORMAT = 'know_jax.meta/1'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Every config field of a collection. A pair is a range to draw from, ends included."""

  seed: int = 0
  runs: int = 60
  # Run i takes family i mod F and data set (i div F) mod D: every pair as often as any other.
  families: tuple[str, ...] = ('cnn',)
  datasets: tuple[str, ...] = ('digits', 'mnist', 'fashion_mnist')
  data_dir: str | None = None
  # (height, width) to resize images to; (): as they are.
  image_size: tuple[int, ...] = ()
  # What the accuracy of stages is measured on, such as 'test[:2000]'; it is read by people alone.
  test_split: str = 'test'
  # Family -> the widths to draw from; families not named take their own default.
  widths: dict[str, tuple[int, ...]] = dataclasses.field(
    default_factory=lambda: {
      'cnn': (8, 12),
      'densenet': (8,),
      'mobilenetv2': (4,),
      'resnet_small': (8, 12),
      'shufflenetv2': (8,),
      'vit': (32,),
    }
  )
  stages: int = 7
  # Log-uniform: learning rate and steps of pre-training, the first stage.
  pretrain_lr: tuple[float, float] = (1e-3, 3e-3)
  pretrain_steps: tuple[float, float] = (1000, 2000)
  # Uniform, as in the paper; the lower end rises until the smallest subset fills a batch.
  rate: tuple[float, float] = (0.3, 0.9)
  # Of the stages after the first; uniform, as in the paper.
  lr: tuple[float, float] = (1e-5, 4e-3)
  # Uniform up to the smallest subset's size, as in the paper, but at most this and rounded down to
  # a power of two, so that runs share compiled steps.
  batch_size: tuple[int, int] = (32, 128)
  # Log-uniform: examples of D^0, drawn from the training set, and epochs of the later stages.
  train_examples: tuple[int, int] = (2000, 8000)
  epochs: tuple[float, float] = (10, 40)
  # At most this many steps over the later stages; fewer epochs where it would be more.
  max_steps: int = 3000
  # Share of runs with the paper's augmentation (rotation 10, shift 0.15, zoom 0.3).
  augmented: float = 0.5
  optimizers: tuple[str, ...] = ('adam',)
  schedules: tuple[str, ...] = ('cosine', 'constant')

  def __post_init__(self) -> None:
    for name in self.families:
      if name not in MODELS:
        raise unknown_name('model', name, MODELS)
    for name in self.optimizers:
      if name not in OPTIMIZERS:
        raise unknown_name('optimizer', name, OPTIMIZERS)
    for name in ('families', 'datasets', 'optimizers', 'schedules'):
      if not getattr(self, name):
        raise UserError(f'{name} is empty; expected at least one name.')
    for name in (
      'rate', 'lr', 'batch_size', 'train_examples', 'epochs', 'pretrain_lr', 'pretrain_steps'
    ):  # fmt: skip
      ends = getattr(self, name)
      if len(ends) != 2 or not 0 < ends[0] <= ends[1]:
        raise UserError(f'{name} is {ends}; expected a range 0 < low <= high.')
    check_least(self, 0, 'seed')
    if self.runs < 1 or self.stages < 2:
      raise UserError(f'runs is {self.runs} and stages {self.stages}; expected at least 1 and 2.')


def default_config() -> ConfigDict:
  """Every field of a collection, with the defaults that configs start from: see `Config`."""
  return editable(Config())


@dataclasses.dataclass(frozen=True)
class Run:
  """A run of the meta-dataset: its number, its JSON file's content, and its weights.

  `weights`: path -> `[T, ...]`, oldest first; None if it diverged.
  """

  number: int
  about: dict[str, Any]
  weights: dict[str, np.ndarray] | None


def run_config(config: Config, number: int) -> forgetting.Config:
  """The forgetting config of one run, a function of the collection's seed and the run's number."""
  rng = np.random.default_rng([config.seed, number])
  families, datasets = config.families, config.datasets
  family = families[number % len(families)]
  dataset = datasets[number // len(families) % len(datasets)]
  # Every number is drawn for every run, so that one field's range does not move the others' draws.
  size, rate_at, lr_at, batch_at, epochs_at, augment_at = rng.random(6)
  width_at, optimizer_at, schedule_at, pretrain_lr_at, pretrain_steps_at = rng.random(5)

  available = _TRAIN_SIZES.get(dataset, config.train_examples[1])
  examples = min(round(_log_between(config.train_examples, size)), available)
  stages, smallest_batch = config.stages, config.batch_size[0]
  # Two more than a batch: sizes are rounded at every stage.
  floor = ((smallest_batch + 2) / examples) ** (1 / (stages - 1))
  low, high = config.rate
  rate = max(low, floor) + rate_at * (max(high, floor) - max(low, floor))
  smallest = int(examples * rate ** (stages - 1)) - 2
  largest_batch = min(config.batch_size[1], max(smallest, smallest_batch))
  drawn = smallest_batch + batch_at * (largest_batch - smallest_batch)
  batch_size = max(smallest_batch, 1 << int(math.log2(drawn)))
  steps_an_epoch = sum(int(examples * rate**i) // batch_size for i in range(1, stages))
  pretrain_epochs = _log_between(config.pretrain_steps, pretrain_steps_at) / (
    examples // batch_size
  )
  epochs = min(_log_between(config.epochs, epochs_at), config.max_steps / steps_an_epoch)
  lr_low, lr_high = config.lr

  widths = config.widths.get(family, ())
  return forgetting.Config(
    seed=int(rng.integers(2**31 - 1)), dataset=dataset, data_dir=config.data_dir,
    image_size=config.image_size, test_split=config.test_split, train_examples=examples,
    model=family,
    width=int(widths[int(width_at * len(widths))]) if widths else None,
    stages=stages, rate=float(rate), stratified=True, batch_size=batch_size,
    epochs=max(1, round(pretrain_epochs)), stage_epochs=max(1, round(epochs)),
    lr=_log_between(config.pretrain_lr, pretrain_lr_at),
    stage_lr=float(lr_low + lr_at * (lr_high - lr_low)),
    optimizer=config.optimizers[int(optimizer_at * len(config.optimizers))],
    schedule=config.schedules[int(schedule_at * len(config.schedules))],
    augmentation=PAPER_AUGMENTATION if augment_at < config.augmented else Augmentation(),
  )  # fmt: skip


# Sets with fewer training examples than a range's upper end.
_TRAIN_SIZES = {'digits': 1400}


def _log_between(ends: tuple[float, float], at: float) -> float:
  low, high = ends
  return float(low * (high / low) ** at)


def run(
  config: Config | Given,
  output: str | Path,
  *,
  dry_run: bool = False,
  workers: int = 1,
  scheduler: str | None = None,
) -> str:
  """Collects the runs that the output folder still lacks, or only lists them; gives a summary.

  Several processes and hosts may share the folder; `workers` and `scheduler` are as in
  `runs.workers.each`.

  Raises:
    UserError: a value does not fit, or the folder belongs to another config.
  """
  config = read_config(Config, config)
  output = local_path(output, 'output')
  if dry_run:
    return _listing(config, output)
  RunRecord.open(output, config, kind=KIND)
  (output / 'runs').mkdir(exist_ok=True)
  with progress(config.runs, 'collect', 'run') as bar:
    waiting = set(range(config.runs))
    _sweep(output)
    while waiting:
      # Runs that another process holds come round again, in case it dies.
      make = functools.partial(_collect, config, output)
      for number in each(make, sorted(waiting), workers=workers, scheduler=scheduler):
        if number is not None:
          waiting.remove(number)
          bar.update(1)
  return summary(output)


def _sweep(output: Path) -> None:
  """Removes the workdirs of finished runs: a worker was killed before it did."""
  for workdir in (output / 'running').glob('[0-9]*'):
    path = _about_path(output, int(workdir.name))
    if path.exists():
      # Without the claim, its worker is about to remove it itself.
      with contextlib.suppress(TimeoutError), locked(_claim_path(path), wait_seconds=0.0):
        shutil.rmtree(workdir, ignore_errors=True)


def _collect(config: Config, output: Path, number: int) -> int | None:
  """Makes a run unless it is there, and gives its number; None if another process is at it."""
  path = _about_path(output, number)
  if path.exists():
    return number
  try:
    with locked(_claim_path(path), wait_seconds=1.0):
      # Another worker may have held the claim, and ended, since the file was looked for.
      if not path.exists():
        _make(config, output, number)
  except TimeoutError:
    return None
  return number


def _make(config: Config, output: Path, number: int) -> None:
  """Makes a run that this worker has claimed."""
  path = _about_path(output, number)
  workdir = output / 'running' / path.stem
  settings = run_config(config, number)
  about = {'format': FORMAT, 'number': number, 'config': config_dict(settings)}
  try:
    record = forgetting.run(settings, workdir, show_progress=False)
  except DivergedError as error:
    write_sealed(path, {**about, 'diverged': str(error)})
  else:
    _pack(path, about, workdir, record)
  shutil.rmtree(workdir)
  drop_programs()  # The next run's network is another.


def _pack(path: Path, about: Mapping[str, Any], workdir: Path, record: RunRecord) -> None:
  """Writes a finished run's two files; the JSON file, last, makes it count."""
  trajectory = jax.device_get(load_trajectory(workdir)[0])
  weights = trees.named_leaves(trajectory.weights)
  data = safetensors.numpy.save(weights, {'format': FORMAT})
  write_atomic(path.with_suffix('.safetensors'), data)
  write_sealed(
    path,
    {
      **about,
      'kinds': kinds.leaf_kinds(trajectory.newest),
      'shapes': {name: list(leaf.shape) for name, leaf in weights.items()},
      'stages': record['stages'],
      'pretrain_loss': _pretrain_loss(workdir),
      'parameters': record['parameters'],
      'weights_sha256': hashlib.sha256(data).hexdigest(),
    },
  )


def _pretrain_loss(workdir: Path) -> dict[str, float]:
  """The training loss of the first epoch of pre-training, a fifth before its end, and the last."""
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text('utf-8').splitlines()]
  losses = [line['loss'] for line in lines if line['stage'] == 0]
  before = max(0, len(losses) - 1 - max(1, len(losses) // 5))
  return {'first': losses[0], 'before': losses[before], 'end': losses[-1]}


def _about_path(output: Path, number: int) -> Path:
  return output / 'runs' / f'{number:05d}.json'


def _claim_path(about_path: Path) -> Path:
  return about_path.with_suffix('.claim')


def read_runs(output: str | Path) -> Iterator[Run]:
  """Reads the finished runs of a meta-dataset, in order of their numbers.

  Raises:
    UserError: there is none, or a file is missing, damaged or foreign; it is named.
  """
  folder = Path(output).expanduser() / 'runs'
  paths = sorted(folder.glob('[0-9]*.json'))
  if not paths:
    raise UserError(f'{folder}: no finished runs; make some with bin/collect.py.')
  for path in paths:
    about = read_sealed(path, 'run')
    if about.get('format') != FORMAT:
      raise UserError(f'{path}: format {about.get("format")!r}; expected {FORMAT!r}.')
    if not _well_formed(about):
      raise UserError(f'{path}: is malformed; expected what bin/collect.py writes.')
    if _about_path(folder.parent, about['number']) != path:
      raise UserError(f'{path}: holds run {about["number"]}; expected the run of its name.')
    yield Run(about['number'], about, None if 'diverged' in about else _read_weights(path, about))


def _well_formed(about: Mapping[str, Any]) -> bool:
  """Whether a run's JSON file has all that is read of it."""

  def is_number(value: Any) -> bool:
    return type(value) in (int, float)

  try:
    config = about['config']
    common = (
      type(about['number']) is int
      and about['number'] >= 0
      and isinstance(config['model'], str)
      and isinstance(config['dataset'], str)
      and is_number(config['rate'])
      and 0 < config['rate'] < 1
    )
    if 'diverged' in about:
      return common
    return (
      common
      and isinstance(about['weights_sha256'], str)
      and all(kind in (*kinds.KINDS, kinds.KEEP) for kind in about['kinds'].values())
      and len(about['stages']) > 0
      and all(is_number(stage['test_accuracy']) for stage in about['stages'])
      and all(is_number(about['pretrain_loss'][when]) for when in ('first', 'before', 'end'))
    )
  except (KeyError, TypeError, AttributeError):
    return False


def _read_weights(path: Path, about: Mapping[str, Any]) -> dict[str, np.ndarray]:
  file = path.with_suffix('.safetensors')
  try:
    status = file.lstat()
    if not stat.S_ISREG(status.st_mode):
      raise UserError(f'{file}: is a link or a device; expected a plain file.')
    if status.st_size > (memory := memory_bytes()):
      raise UserError(f'{file}: has {status.st_size} bytes; this machine has {memory}.')
    data = file.read_bytes()
  except OSError as error:
    raise UserError(
      f'{file}: cannot be read ({error.strerror}); expected the weights of a run.'
    ) from error
  result = hashlib.sha256(data).hexdigest()
  if result != about['weights_sha256']:
    raise UserError(
      f'{file}: sha256 {result[:12]}...; expected {about["weights_sha256"][:12]}..., as in {path}.'
    )
  try:
    # The library gives them in another order in every process.
    weights = dict(sorted(safetensors.numpy.load(data).items()))
  # The library has an error of its own, and passes on those of NumPy for dtypes and shapes.
  except Exception as error:
    raise UserError(f'{file}: not a readable safetensors file ({error}).') from error
  if differing := sorted(weights.keys() ^ about['kinds'].keys()):
    raise UserError(f'{file}: tensor {differing[0]!r} is only in one of it and {path}.')
  stages = len(about['stages'])
  for name, leaf in weights.items():
    predicted = about['kinds'][name] != kinds.KEEP
    if leaf.shape[:1] != (stages,) or not leaf.size or (predicted and leaf.dtype != np.float32):
      raise UserError(
        f'{file}: tensor {name!r} is {leaf.dtype}{list(leaf.shape)}; expected float32, of {stages} '
        'stages, not empty.'
      )
    if not np.isfinite(leaf).all():
      raise UserError(f'{file}: tensor {name!r} holds NaN or infinity.')
  return weights


def forgot(about: Mapping[str, Any]) -> bool:
  """Whether test accuracy fell from every stage to the next smaller one."""
  accuracies = [stage['test_accuracy'] for stage in about['stages']]
  return all(after < before for before, after in itertools.pairwise(accuracies))


def flattened(about: Mapping[str, Any]) -> bool:
  """Whether the last fifth of pre-training gave less than a tenth of its fall in training loss."""
  loss = about['pretrain_loss']
  return loss['before'] - loss['end'] < 0.1 * (loss['first'] - loss['end'])


def summary(output: str | Path) -> str:
  """What a meta-dataset holds: runs by family and data set, and how many of them forgot."""
  return summary_of([run.about for run in read_runs(output)])


def summary_of(abouts: Sequence[Mapping[str, Any]]) -> str:
  """The summary of runs whose JSON files say this."""
  good = [about for about in abouts if 'diverged' not in about]
  falls = [
    after['test_accuracy'] < before['test_accuracy']
    for about in good
    for before, after in itertools.pairwise(about['stages'])
  ]
  lines = [f'{len(good)} runs, {len(abouts) - len(good)} diverged']
  pairs = sorted({(a['config']['model'], a['config']['dataset']) for a in good})
  for pair in pairs:
    group = [a for a in good if (a['config']['model'], a['config']['dataset']) == pair]
    first = np.mean([a['stages'][0]['test_accuracy'] for a in group])
    last = np.mean([a['stages'][-1]['test_accuracy'] for a in group])
    lines.append(
      f'  {pair[0]:<14} {pair[1]:<14} {len(group):>4} runs, accuracy {first:.1%} -> {last:.1%}'
    )
  if good:
    lines.append(
      f'training loss had flattened by the end of pre-training in '
      f'{np.mean([flattened(a) for a in good]):.0%} of runs'
    )
    lines.append(
      f'test accuracy fell in {np.mean(falls):.0%} of stages, and at every stage in '
      f'{np.mean([forgot(a) for a in good]):.0%} of runs'
    )
    fell = [a['stages'][-1]['test_accuracy'] < a['stages'][0]['test_accuracy'] for a in good]
    lines.append(f'it was lower at the last stage than at the first in {np.mean(fell):.0%} of runs')
  return '\n'.join(lines)


def _listing(config: Config, output: Path) -> str:
  header = (
    f'{"run":>5} {"model":<14} {"width":>5} {"data set":<14} {"examples":>8} {"rate":>5} '
    f'{"batch":>5} {"lr":>15} {"epochs":>7} {"optimizer":<9} {"schedule":<9} augmented'
  )
  lines = [header]
  for number in range(config.runs):
    c = run_config(config, number)
    done = ' (done)' if _about_path(output, number).exists() else ''
    lines.append(
      f'{number:>5} {c.model:<14} {c.width or "-":>5} {c.dataset:<14} {c.train_examples:>8} '
      f'{c.rate:>5.2f} {c.batch_size:>5} {c.lr:.1e}/{c.stage_lr:.1e} '
      f'{c.epochs:>3}/{c.stage_epochs:<3} {c.optimizer:<9} '
      f'{c.schedule:<9} {"yes" if c.augmentation.rotation else "no"}{done}'
    )
  return '\n'.join(lines)
