"""The design of a study: its config, checked, and all that follows from it before a run."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from know_jax import forgetting, transfer
from know_jax.errors import UserError
from know_jax.fields import Given, config_dict, editable, read_config
from know_jax.jsonable import digest
from know_jax.predictors import parameters
from know_jax.study.arms import LARGER, MAIN, Arm, ArmFields, arms_of, theta_of
from know_jax.study.sources import Source, source_config, weights_digest
from know_jax.tasks import load_task
from know_jax.training import batch_norm, loop
from know_jax.transfer import TargetFields
from know_jax.version import __version__

_MOST_TRANSFER_SEEDS = 1000
_LASTING = ('source', 'transfer', 'curve_epochs')


class Cell(NamedTuple):
  """What one row of results.csv is of."""

  arm: Arm
  source: Source
  transfer_seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ArmFields):
  """Every config field of a study."""

  transfer: TargetFields = TargetFields()  # noqa: RUF009  (it is frozen)
  # Shares of the source's training examples, each drawn from the larger by the source's seed.
  amounts: tuple[float, ...] = (1.0,)
  source_seeds: int = 5
  transfer_seeds: int = 3
  # A folder of forgetting runs of this source, used and added to; None: in the workdir.
  sources: str | None = None
  # Fine-tuning epochs after which test accuracy is noted, in the first training of each start
  # (testing is what costs most with few labels); 0 is after the warm-up.
  curve_epochs: tuple[int, ...] = ()

  def __post_init__(self) -> None:
    most = {'source_seeds': math.inf, 'transfer_seeds': _MOST_TRANSFER_SEEDS, 'steps': math.inf}
    for field, limit in most.items():
      if not 1 <= getattr(self, field) <= limit:
        raise UserError(f'{field} is {getattr(self, field)}; expected 1 to {limit:g}.')
    amounts = self.amounts
    if not amounts or len(set(amounts)) < len(amounts) or not all(0 < a <= 1 for a in amounts):
      raise UserError(f'amounts are {amounts}; expected different shares in (0, 1].')
    epochs = self.transfer.epochs
    for epoch in self.curve_epochs:
      if not 0 <= epoch <= epochs:
        raise UserError(f'curve_epochs hold {epoch}; expected 0 to {epochs}, transfer.epochs.')


def default_config() -> ConfigDict:
  """Every field of a study, with the defaults that configs start from: see `Config`."""
  return editable(Config())


class Study:
  """A checked config and what follows from it; nothing is trained or written.

  `target` is the task that is transferred to, `subsets` maps a combined seed to labelled examples.

  Raises:
    UserError: a value does not fit; it is named.
  """

  def __init__(self, config: Config | Given):
    self.config = config = read_config(Config, config)
    source = load_task(config.source)
    self.target = load_task(config.transfer, config.source)
    abstract = jax.eval_shape(lambda: source.init(jax.random.key(0)))
    transfer.check_fits(self.target, [abstract])
    self.arms = arms_of(config, batch_norm=batch_norm.has_batch_norm(abstract))
    self.subsets = {
      seed: transfer.labelled_subset(
        self.target, config.transfer.labels_per_class, seed, config.transfer.validation_examples
      )
      for seed in self.seeds()
    }
    smallest = next(iter(self.subsets.values()))
    loop.check_batch_size(config.transfer.batch_size, len(smallest), 'the labelled subset')
    transfer.phases(self.target, config.transfer)
    forgetting.recipe_of(config.source)
    examples = self._examples = source.train.size
    self._available = examples
    if config.source.train_examples and any(arm.predictor == LARGER for arm in self.arms):
      self._available = load_task(dataclasses.replace(config.source, train_examples=0)).train.size
    self._check_larger()
    self._settings = {
      source: source_config(config.source, source, examples) for source in self.sources()
    }
    self._settings_digests = {
      source: digest(config_dict(settings)) for source, settings in self._settings.items()
    }
    for settings in self._settings.values():
      forgetting.subsets_of(load_task(settings), settings)

  def sources_folder(self, workdir: Path) -> Path:
    """Where the forgetting runs are."""
    given = self.config.sources
    return workdir / 'sources' if given is None else Path(given).expanduser()

  def seeds(self) -> Iterator[int]:
    """The seeds of all transfers."""
    pairs = itertools.product(range(self.config.source_seeds), range(self.config.transfer_seeds))
    return (combined_seed(*pair) for pair in pairs)

  def sources(self) -> list[Source]:
    """All forgetting runs, those of the config's own rate first."""
    result = [
      Source(amount, seed, rate)
      for arm_rate in dict.fromkeys(arm.rate for arm in self.arms)
      for amount in self.config.amounts
      for seed in range(self.config.source_seeds)
      for rate in (arm_rate,)
    ]
    return [source for source in result if self.arms_from(source)]

  def arms_from(self, source: Source) -> list[Arm]:
    """The arms that start from a source run; those of larger sets where there is so much data."""
    first = self.config.amounts[0]
    return [
      arm
      for arm in self.arms
      if arm.rate == source.rate and (arm.group == MAIN or source.amount == first)
      if arm.predictor != LARGER or self._larger_size(arm, source.amount) <= self._available
    ]

  def _larger_size(self, arm: Arm, amount: float) -> int:
    return round(round(amount * self._examples) * arm.multiple)

  def _check_larger(self) -> None:
    """Checks that each arm of a larger set has one, at one amount at least."""
    for arm in self.arms:
      amounts = self.config.amounts if arm.group == MAIN else self.config.amounts[:1]
      needed = self._larger_size(arm, min(amounts))
      if arm.predictor == LARGER and needed > self._available:
        raise UserError(
          f'arm {arm.name!r} x{arm.multiple:.3g} needs {needed} training examples; expected at '
          f'most {self._available}, all that {self.config.source.dataset} has.'
        )

  def settings(self, source: Source) -> forgetting.Config:
    """The config of a source's forgetting run."""
    return self._settings[source]

  def cells(self) -> Iterator[Cell]:
    """What every row of results.csv is of, in their order."""
    amounts, seeds = self.config.amounts, range(self.config.source_seeds)
    for arm in self.arms:
      for amount, seed in itertools.product(amounts, seeds):
        source = Source(amount, seed, arm.rate)
        if arm in self.arms_from(source):
          for transfer_seed in range(self.config.transfer_seeds):
            yield Cell(arm, source, transfer_seed)

  @property
  def lasting(self) -> dict[str, Any]:
    """The part of the config that a workdir is of; arms, amounts and seeds may change."""
    config = config_dict(self.config)
    return {field: config[field] for field in _LASTING}

  def start_key(self, arm: Arm, source: Source) -> str:
    """Identifies what an arm makes of a source: by all that it depends on."""
    about = {
      'what': 'start',
      'version': __version__,
      'parameters': _shipped_digest(),
      'theta': None if arm.theta is None else weights_digest(theta_of(arm.theta)),
      'source': self._settings_digests[source],
      'arm': [arm.predictor, arm.step, arm.history, arm.option, list(arm.kinds), arm.batch_norm],
      # Only where they say something, so that journals from before they existed still count.
      **{name: value for name in ('part', 'order') if (value := getattr(arm, name))},
    }
    return digest(about)

  def transfer_config(self, arm: Arm) -> TargetFields:
    """The config of an arm's trainings."""
    config = self.config.transfer
    return dataclasses.replace(config, lr=config.lr * arm.lr_scale)

  def curve_epochs(self, transfer_seed: int) -> tuple[int, ...]:
    """The fine-tuning epochs after which trainings of a transfer seed are tested."""
    return () if transfer_seed else self.config.curve_epochs

  def training_key(self, arm: Arm, weights: str, source_seed: int, transfer_seed: int) -> str:
    """Identifies a training: arms that start from equal weights share it."""
    about = {
      'what': 'transfer',
      'weights': weights,
      'transfer': config_dict(self.transfer_config(arm)),
      'curve_epochs': self.curve_epochs(transfer_seed),
      'seed': combined_seed(source_seed, transfer_seed),
    }
    return digest(about)


def combined_seed(source_seed: int, transfer_seed: int) -> int:
  """The seed of one transfer: no two pairs share one."""
  return _MOST_TRANSFER_SEEDS * source_seed + transfer_seed


@functools.cache
def _shipped_digest() -> str:
  """Identifies all parameters that predictors find in the package."""
  files = sorted((Path(parameters.__file__).parents[1] / 'weights').glob('*'))
  return weights_digest(
    {
      path.name: np.frombuffer(path.read_bytes(), np.uint8)
      for path in files
      if path.is_file() and path.suffix != '.md'
    }
  )
