"""What training changes and how: state, recipe, optimisers, learning rates."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import numpy as np
import optax

from know_jax import trees
from know_jax.errors import UserError, unknown_name
from know_jax.fields import check_least

OPTIMIZERS: dict[str, Callable[[float, float], optax.GradientTransformation]] = {
  # Without the learning rate, which the step multiplies in.
  'adam': lambda decay, epsilon: _decayed(optax.scale_by_adam(eps=epsilon), 0.0, decay),
  'adamw': lambda decay, epsilon: _decayed(optax.scale_by_adam(eps=epsilon), decay, 0.0),
  'sgd': lambda decay, epsilon: _decayed(optax.trace(decay=0.9), 0.0, decay),
}
"""Name -> (weight decay, epsilon) -> transformation."""

SCHEDULES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
  'constant': np.ones_like,
  'cosine': lambda done: 0.5 * (1 + np.cos(np.pi * done)),
}
"""Name -> (share of the training done, [steps]) -> factor of the learning rate."""


class DivergedError(UserError):
  """The loss is no longer finite."""


@flax.struct.dataclass
class TrainState:
  """What training changes."""

  step: Any  # The number of steps done, int32 scalar.
  params: Any  # The network's parameters.
  collections: Any  # Its other variables, such as 'batch_stats'; `{}` for a network without.
  opt_state: Any  # The optimiser's state.

  @property
  def variables(self) -> dict[str, Any]:
    """`{'params': ...}` and the other collections."""
    return {'params': self.params, **self.collections}


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How weights are updated; one of the things that a compiled train step depends on."""

  optimizer: str = 'adam'  # A name in `OPTIMIZERS`.
  weight_decay: float = 0.0  # L2 penalty for adam and sgd, decoupled for adamw; on kernels only.
  frozen: frozenset[str] = frozenset()  # Paths of the parameters that do not move.
  # Of Adam; the default is that of Keras, which the authors use, but their released scripts set
  # 1e-8.
  epsilon: float = 1e-7
  accumulate: int = 1  # How many parts a device's batch is taken in, one after the other.
  remat: bool = False  # Whether activations are computed anew for the gradient, not kept.

  def __post_init__(self) -> None:
    if self.optimizer not in OPTIMIZERS:
      raise unknown_name('optimizer', self.optimizer, OPTIMIZERS)
    check_least(self, 0, 'weight_decay', 'epsilon')
    check_least(self, 1, 'accumulate')


class Checkpoint(NamedTuple):
  """Where a training stands between two steps."""

  state: TrainState  # Not replicated.
  # What the task sums over the examples of the unfinished epoch, float64; `{}` between two.
  sums: dict[str, Any] = {}  # noqa: RUF012  (nobody writes to it)


def create_state(variables: Any, recipe: Recipe) -> TrainState:
  """A state at step 0 with a fresh optimiser; not yet replicated."""
  params = variables['params']
  return TrainState(
    step=np.int32(0),
    params=params,
    collections={name: value for name, value in variables.items() if name != 'params'},
    opt_state=_init_optimizer(recipe)(params),
  )


@functools.lru_cache(maxsize=64)
def _init_optimizer(recipe: Recipe) -> Callable[[Any], Any]:
  # As one program: by itself JAX compiles one for every shape of a leaf.
  return jax.jit(optimizer(recipe).init)


def continued(state: TrainState, recipe: Recipe, after: TrainState) -> TrainState:
  """A state at step 0 with the optimiser of another training: its counters and its moments.

  Args:
    state: a fresh state, nothing of which is frozen.
    recipe: of the other training, with the same optimiser; what it froze begins without moments.
    after: the state that it ended in.
  """
  trained = after.opt_state
  if recipe.frozen:
    trained = trained.inner_states['moving'].inner_state
  # What was frozen has no leaves there.
  found = dict(jax.tree_util.tree_flatten_with_path(trained)[0])
  leaves, treedef = jax.tree_util.tree_flatten_with_path(state.opt_state)
  opt_state = jax.tree.unflatten(treedef, [found.get(path, leaf) for path, leaf in leaves])
  return dataclasses.replace(state, opt_state=opt_state)


def to_tree(checkpoint: Checkpoint) -> dict[str, Any]:
  """A checkpoint as nested dicts: the optimiser's named tuples become numbered leaves."""
  state = checkpoint.state
  return {
    'step': state.step,
    'params': state.params,
    'collections': state.collections,
    'opt_state': {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state.opt_state))},
    'sums': checkpoint.sums,
  }


def from_tree(like: TrainState, tree: dict[str, Any]) -> Checkpoint:
  """The inverse of `to_tree`, for a state with an optimiser like that of `like`."""
  leaves = [tree['opt_state'][str(i)] for i in range(len(tree['opt_state']))]
  state = TrainState(
    step=tree['step'],
    params=tree['params'],
    collections=tree.get('collections', {}),
    opt_state=jax.tree.unflatten(jax.tree.structure(like.opt_state), leaves),
  )
  return Checkpoint(state, tree.get('sums', {}))


def learning_rates(schedule: str, lr: float, total_steps: int) -> np.ndarray:
  """The learning rate of every step, float32 `[total_steps]`.

  Cosine decay (Loshchilov and Hutter, 2017) goes from lr at step 0 to 0 at step `total_steps`.

  Raises:
    UserError: there is no such schedule, or lr is negative or not finite.
  """
  if schedule not in SCHEDULES:
    raise unknown_name('schedule', schedule, SCHEDULES)
  if not (np.isfinite(lr) and lr >= 0):
    raise UserError(f'the learning rate is {lr}; expected a finite number of at least 0.')
  done = np.arange(total_steps, dtype=np.float64) / max(total_steps, 1)
  return (lr * SCHEDULES[schedule](done)).astype(np.float32)


def _decayed(
  direction: optax.GradientTransformation, decoupled: float, coupled: float
) -> optax.GradientTransformation:
  """Weight decay of kernels, before the direction (a penalty) or after it (decoupled)."""

  def kernels(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)

  parts = [direction]
  if coupled:
    parts.insert(0, optax.add_decayed_weights(coupled, kernels))
  if decoupled:
    parts.append(optax.add_decayed_weights(decoupled, kernels))
  return optax.chain(*parts)


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
  """The transformation of a recipe, without the learning rate, which the step multiplies in."""
  moving = OPTIMIZERS[recipe.optimizer](recipe.weight_decay, recipe.epsilon)
  if not recipe.frozen:
    return moving

  def labels(params: Any) -> Any:
    paths, treedef = trees.leaf_paths(params), jax.tree.structure(params)
    names = ['frozen' if path in recipe.frozen else 'moving' for path in paths]
    return jax.tree.unflatten(treedef, names)

  return optax.multi_transform({'moving': moving, 'frozen': optax.set_to_zero()}, labels)
