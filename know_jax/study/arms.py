"""The arms of a transfer study, written as data: what is transferred, from which source run."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from know_jax.errors import UserError, unknown_name
from know_jax.forgetting import SourceFields
from know_jax.kinds import KINDS
from know_jax.nowcast import api
from know_jax.predictors.parameters import load_known
from know_jax.predictors.registry import REGISTRY, resolve
from know_jax.recalibration import BATCH_NORM_POLICIES
from know_jax.study.parts import HISTORIES, PARTS, SCALED_BIASES

MAIN = 'main'
"""The group of `config.arms`; those of `config.ablations` name their own."""

LARGER = 'larger'
"""Trained as Theta^0 was, on r^-n times its data: the truth of what predictions stand for."""

TRAINED = ('incremental', 'extra', LARGER)
"""Arms that are trained on the source task: see `know_jax.study.sources`."""

UNPREDICTED = ('scratch', *TRAINED)
"""Arms that no predictor makes."""

ANSWER = 'known_leaf'
"""The arm that reports answer about; it stands out in pictures."""

STRENGTHS = (-0.2, -0.1, 0.1, 0.2, 0.35, 0.5, 0.7)
"""Of the shrink sweep; negative ones grow, as task vectors and fits do."""

_FIELDS = {
  *('predictor', 'group', 'name', 'steps', 'options', 'kinds', 'history', 'rate', 'batch_norm'),
  *('theta', 'lr_scale', 'part', 'order'),
}

_OF_PREDICTORS = {'steps', 'options', 'kinds', 'theta', 'batch_norm', 'part', 'order'}


@dataclasses.dataclass(frozen=True)
class Arm:
  """One start for transfer, and the source run it comes from."""

  group: str  # 'main', or what is varied, as in 'history'.
  name: str  # Of its line in tables.
  predictor: str  # A name in `PREDICTORS` or `UNPREDICTED`.
  step: int  # n of Theta^-n; 0 where nothing is predicted.
  history: int  # S, how many of the newest stages are read, or, for trained arms, cost.
  rate: float  # r of the source run.
  options: tuple[tuple[str, Any], ...] = ()  # The predictor's own.
  kinds: tuple[str, ...] = ()  # The kinds of leaf that are predicted, others are kept; empty: all.
  batch_norm: str = 'keep'  # What happens to BatchNorm after the prediction.
  theta: str | None = None  # Where the parameters of KNOWN come from; None: those shipped.
  # Times this the learning rate of fine-tuning: shrinking weights that BatchNorm follows does
  # little but raise it.
  lr_scale: float = 1.0
  # Which part of the prediction is transferred, a name in `PARTS`, or `SCALED_BIASES`; empty: all.
  part: str = ''
  order: str = ''  # The order of the stages, a name in `HISTORIES`; empty: oldest first.

  @property
  def multiple(self) -> float:
    """r^-n, how many times the data it stands for; 0 for a network from scratch."""
    return 0.0 if self.predictor == 'scratch' else self.rate**-self.step

  @property
  def option(self) -> str:
    """The predictor's options in one cell, as in `c=0.2`."""
    return ' '.join(f'{name}={_shown(value)}' for name, value in self.options)


def _shown(value: Any) -> str:
  if isinstance(value, tuple):
    return ','.join(f'{key}:{entry:g}' for key, entry in value)
  return f'{value:g}' if isinstance(value, float) else str(value)


def default_arms() -> tuple[Any, ...]:
  """The main arms: all there is to compare with, every predictor, and shrink in many strengths."""
  predictors = [name for name in api.PREDICTORS if name != 'persistence']
  return (
    'scratch',
    'persistence',
    {'predictor': 'persistence', 'batch_norm': 'reset'},
    'incremental',
    'extra',
    *predictors,
    *shrink_sweep(STRENGTHS),
  )


def shrink_sweep(strengths: Sequence[float]) -> tuple[dict[str, Any], ...]:
  """One step of shrink in each strength, the same for convolutions and dense kernels."""
  return tuple(
    {
      'predictor': 'shrink',
      'name': f'shrink c={c:g}',
      'steps': (1,),
      'options': {'c': {'conv': c, 'fc': c}},
    }
    for c in strengths
  )


def standard_ablations(*, batch_norm: bool) -> tuple[dict[str, Any], ...]:
  """History length, rate, kinds alone, BatchNorm policy (if there is one), rate; few predictors."""
  histories = [
    {'group': 'history', 'predictor': name, 'history': length}
    for length in (2, 3, 4)
    for name in ('log_fit', 'task_vector')
  ]
  rates = [
    {'group': 'rate', 'predictor': name, 'rate': rate}
    for rate in (0.4, 0.7)
    for name in ('task_vector', 'known_leaf')
  ]
  kinds = [
    {'group': 'kinds', 'predictor': name, 'kinds': (kind,), 'steps': steps}
    for name, steps in (('known_leaf', (1, 2)), ('task_vector', (1,)), ('shrink', (1, 2)))
    for kind in KINDS
    if (name, kind) != ('shrink', 'bias')  # It leaves biases as they are.
  ]
  policies = [
    {'group': 'BatchNorm', 'predictor': name, 'batch_norm': policy, 'steps': (1, 2)}
    for policy in ('reset', 'recalibrate')
    for name in ('known_leaf', 'shrink')
    if batch_norm
  ]
  scales = [
    {'group': 'learning rate', 'predictor': 'persistence', 'lr_scale': scale}
    for scale in (0.5, 1.5, 2.0, 3.0)
  ]
  return (*histories, *rates, *kinds, *policies, *scales)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmFields:
  """The config fields of a study that its arms follow from."""

  # The study gives seeds; one stage more than the history, read only to measure retrodiction.
  source: SourceFields = SourceFields(stages=6)  # noqa: RUF009  (it is frozen)
  # S, and the farthest step that is predicted.
  history: int = 5
  steps: int = 3
  # Names of predictors, 'scratch', 'incremental', 'extra', 'larger' (at amounts of which the data
  # set has r^-n times as many examples), or dicts: see `Arm`.
  arms: tuple[Any, ...] = dataclasses.field(default_factory=default_arms)
  # Dicts with a group each; at the first amount only.
  ablations: tuple[Any, ...] = ()
  # A folder with the authors' .h5 files, for the arm 'known_official', whole and in parts.
  official: str | None = None
  official_parts: tuple[str, ...] = (*PARTS, SCALED_BIASES)


def arms_of(config: ArmFields, *, batch_norm: bool) -> list[Arm]:
  """All arms of a study, those of `config.ablations` after the main ones.

  Without BatchNorm in the network, arms that differ from others in its policy alone are left out.

  Raises:
    UserError: an arm is not as described, or asks for what its predictor cannot do.
  """
  entries = [_entry(entry, 'arms') for entry in config.arms]
  if config.official is not None:
    official = {'predictor': 'known', 'theta': config.official}
    steps = tuple(range(1, config.steps + 1))
    entries += [
      {
        **official,
        'name': f'known_official{f" {part}" if part else ""}',
        'part': part,
        'steps': steps,
      }
      for part in ('', *config.official_parts)
    ]
  entries += [_entry(entry, 'ablations') for entry in config.ablations]
  result: list[Arm] = []
  for entry in entries:
    if batch_norm or entry.get('batch_norm', 'keep') == 'keep':
      result += _arms(entry, config)
  names = [(arm.group, arm.name, arm.step) for arm in result]
  if twice := [name for name in names if names.count(name) > 1]:
    raise UserError(
      f'two arms of group {twice[0][0]!r} are called {twice[0][1]!r} at step {twice[0][2]}; give '
      'each a name of its own.'
    )
  if not any(arm.group == MAIN and is_naive(arm) for arm in result):
    raise UserError(
      "arms lack 'persistence'; expected it, because all others are compared with it."
    )
  return result


def is_naive(arm: Arm) -> bool:
  """Whether an arm is naive transfer, which the others are compared with."""
  plain = arm.batch_norm == 'keep' and arm.lr_scale == 1
  return arm.predictor == 'persistence' and plain


def _entry(entry: Any, field: str) -> dict[str, Any]:
  """An entry of the config as a dict with known fields."""
  if isinstance(entry, str):
    entry = {'predictor': entry}
  if not isinstance(entry, Mapping) or 'predictor' not in entry:
    raise UserError(
      f'{field} hold {entry!r}; expected the name of a predictor, or a dict with one as predictor.'
    )
  for name in entry:
    if name not in _FIELDS:
      raise unknown_name(f'field of an entry of {field}', name, _FIELDS)
  if (field == 'ablations') != ('group' in entry):
    raise UserError(f'{field} hold {entry!r}; expected a group in ablations, and none in arms.')
  return dict(entry)


def _arms(entry: Mapping[str, Any], config: ArmFields) -> list[Arm]:
  """The arms of one entry, one for each step."""
  predictor, source = entry['predictor'], config.source
  history = entry.get('history', config.history)
  if not 2 <= history <= source.stages:
    raise UserError(
      f'arm {predictor!r} has history {history}; expected 2 to {source.stages}, source.stages.'
    )
  given = {'group': MAIN, 'name': '', 'rate': source.rate, **entry, 'history': history}
  given.pop('steps', None)
  given['options'] = tuple((k, _hashable(v)) for k, v in sorted(entry.get('options', {}).items()))
  given |= {
    'kinds': tuple(entry.get('kinds', ())),
    'lr_scale': float(entry.get('lr_scale', 1.0)),
  }
  arm = Arm(step=0, **given)
  parts = (*PARTS, SCALED_BIASES)
  for what, value, known in (('part', arm.part, parts), ('order', arm.order, HISTORIES)):
    if value and value not in known:
      raise unknown_name(f'{what} of an arm', value, known)
  if arm.part == SCALED_BIASES and (predictor, arm.theta is None) != ('known', False):
    raise UserError(
      f"arm {predictor!r} has part {arm.part!r}; expected it of 'known' with theta, parameters for "
      'weights as they are.'
    )
  if arm.batch_norm not in BATCH_NORM_POLICIES:
    raise unknown_name('BatchNorm policy', arm.batch_norm, BATCH_NORM_POLICIES)
  if not 0 < arm.lr_scale < math.inf:
    raise UserError(f'arm {predictor!r} has lr_scale {arm.lr_scale}; expected a positive number.')
  for kind in arm.kinds:
    if kind not in KINDS:
      raise unknown_name('kind', kind, KINDS)
  if predictor in UNPREDICTED:
    refused = _OF_PREDICTORS - {'steps'} if predictor == LARGER else _OF_PREDICTORS
    if extra := sorted(refused & set(entry)):
      raise UserError(f'arm {predictor!r} has {extra[0]}, which only predictors take.')
    steps: Sequence[int] = entry.get('steps', (1,)) if predictor == LARGER else (0,)
    if predictor == LARGER and not all(isinstance(n, int) and n >= 1 for n in steps):
      raise UserError(f'arm {LARGER!r} has steps {steps}; expected whole numbers of at least 1.')
  else:
    steps = _steps(arm, entry.get('steps'), config.steps)
  name = entry.get('name') or _name(arm, config)
  return [dataclasses.replace(arm, name=name, step=step) for step in steps]


def _hashable(value: Any) -> Any:
  return tuple(sorted(value.items())) if isinstance(value, Mapping) else value


def _steps(arm: Arm, expected: Sequence[int] | None, most: int) -> Sequence[int]:
  """The steps of a predictor: those expected, else all up to `most` that it can do."""
  if ':' not in arm.predictor and arm.predictor not in REGISTRY:
    raise unknown_name('predictor', arm.predictor, (*REGISTRY, *UNPREDICTED))
  resolve(arm.predictor, dict(arm.options))
  if arm.predictor == 'persistence':
    return (0,)
  steps = range(1, most + 1) if expected is None else expected
  possible = [step for step in steps if can_predict(arm, step, arm.history)]
  if not possible or (expected is not None and len(possible) < len(steps)):
    failed = next((step for step in steps if step not in possible), 1)
    obstacle = _obstacle(arm.predictor, arm.options, arm.theta, failed, arm.history)
    raise UserError(f'arm {arm.predictor!r} cannot do step {failed}: {obstacle}')
  return possible


def can_predict(arm: Arm, step: int, length: int) -> bool:
  """Whether the predictor of an arm can do a step with a history of this length."""
  return length > 0 and not _obstacle(arm.predictor, arm.options, arm.theta, step, length)


@functools.cache
def _obstacle(
  predictor: str, options: tuple[tuple[str, Any], ...], theta: str | None, step: int, length: int
) -> str:
  """Why a predictor cannot do a step with a history of this length; empty: it can."""
  # `predict` itself is asked, without computing: what it needs may lie in the parameters of KNOWN.
  arrays = theta_of(theta) if theta is not None else None
  history = {'kernel': jax.ShapeDtypeStruct((length, 1, 1), np.float32)}
  settings: dict[str, Any] = {'steps': step, 'predictor': predictor, 'theta': arrays}
  try:
    jax.eval_shape(functools.partial(api.predict, **settings, **dict(options)), history)
  except UserError as error:
    return str(error)
  return ''


@functools.cache
def theta_of(path: str | None) -> dict[str, Any]:
  """The parameters of KNOWN, read once a process."""
  return load_known(path)


def _name(arm: Arm, config: ArmFields) -> str:
  """The predictor, and what in the arm is not as in the config."""
  parts = [arm.predictor]
  if arm.option:
    parts.append(arm.option)
  if arm.kinds:
    parts.append(f'{" and ".join(arm.kinds)} only')
  if arm.part:
    parts.append(f'{arm.part} part')
  if arm.order:
    parts.append(f'{arm.order} history')
  if arm.history != config.history:
    parts.append(f'S={arm.history}')
  if arm.rate != config.source.rate:
    parts.append(f'r={arm.rate:g}')
  if arm.batch_norm != 'keep':
    parts.append(f'BatchNorm {arm.batch_norm}')
  if arm.theta is not None:
    parts.append(f'theta={arm.theta}')
  if arm.lr_scale != 1:
    parts.append(f'lr x{arm.lr_scale:g}')
  return ' '.join(parts)
