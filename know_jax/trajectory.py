"""Trajectory: the weights of one network at successive stages, as one pytree."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import flax.struct
import jax

from know_jax import showing, trees
from know_jax.errors import UserError


@flax.struct.dataclass
class Trajectory:
  """Weights at T successive stages, oldest first.

  Index 0 is the most forgotten weight (the smallest subset), index -1 the one trained on all data;
  for a forecast, index 0 is the nearest prediction. Arithmetic and `jax.tree.map` act on all stages
  at once.

  Attributes:
    weights: a pytree whose leaves are `[T, ...]`.
  """

  weights: Any

  @classmethod
  def from_sequence(cls, stages: Sequence[trees.PyTree]) -> 'Trajectory':
    """Stacks the weights of successive stages, oldest first.

    Args:
      stages: pytrees of equal structure, shapes and dtypes.

    Returns:
      The trajectory; its leaves are JAX arrays `[T, ...]`.

    Raises:
      UserError: there is no stage, a stage differs from the newest, or a leaf's 64-bit dtype would
        be narrowed; the leaf is named.
    """
    check_stages(stages)
    return cls(trees.stack(stages))

  def __len__(self) -> int:
    return stacked_length(self.weights)

  def __getitem__(self, index: int | slice) -> Any:
    """One stage as a pytree, or a slice of the trajectory.

    Of JAX arrays it compiles a program for every shape of a leaf, which `jax.device_get` of the
    trajectory spares.
    """
    if isinstance(index, slice):
      return Trajectory(jax.tree.map(lambda leaf: leaf[index], self.weights))
    if not -len(self) <= index < len(self):
      raise IndexError(f'stage {index} of a trajectory of {len(self)} stages')
    return jax.tree.map(lambda leaf: leaf[index], self.weights)

  def __iter__(self) -> Iterator[trees.PyTree]:
    return (self[index] for index in range(len(self)))

  def __repr__(self) -> str:
    return showing.as_text(*self._about())

  def _repr_html_(self) -> str:
    return showing.as_html(*self._about())

  def _about(self) -> tuple[str, showing.Table]:
    table = showing.leaves_table(self.weights, axes=1)
    leaves = [leaf for leaf in jax.tree.leaves(self.weights) if trees.is_array(leaf)]
    if not leaves or any(leaf.shape[:1] != leaves[0].shape[:1] for leaf in leaves):
      return 'Trajectory without stages', table
    stages = leaves[0].shape[0] if leaves[0].shape else 0
    size = sum(math.prod(leaf.shape[1:]) for leaf in leaves)
    return f'Trajectory of {stages} stages, oldest first, {size:,} weights in each', table

  @property
  def newest(self) -> trees.PyTree:
    """The last stage: trained on all data."""
    return self[-1]


def check_stages(stages: Sequence[trees.PyTree]) -> None:
  """Checks that stages agree in structure, shapes and dtypes with the newest one.

  Raises:
    UserError: there is no stage, or a stage differs; the leaf is named.
  """
  if not stages:
    raise UserError('the history is empty; expected the weights of at least one stage.')
  for index, stage in enumerate(stages[:-1]):
    trees.check_same(
      stages[-1], stage, names=(f'stage {len(stages) - 1} (the newest)', f'stage {index}')
    )


def stacked_length(stacked: trees.PyTree) -> int:
  """The number of stages T of a pytree with leaves `[T, ...]`.

  Raises:
    UserError: there is no leaf, or the leaves disagree on T; the leaf is named.
  """
  named = trees.named_leaves(stacked)
  shapes = {path: tuple(leaf.shape) for path, leaf in named.items() if trees.is_array(leaf)}
  if not shapes:
    raise UserError('the history has no leaves; expected a pytree of weights.')
  length = None
  for path, shape in shapes.items():
    if not shape:
      raise UserError(
        f'leaf {path!r} of the stacked history is a scalar; expected the stages on axis 0 (pass a '
        'list of pytrees if each stage is a pytree of its own).'
      )
    if length is None:
      first, length = path, shape[0]
    if shape[0] != length:
      raise UserError(
        f'leaf {path!r} has {shape[0]} stages on axis 0 (shape {tuple(shape)}); expected {length}, '
        f'as leaf {first!r} has.'
      )
  assert length is not None
  if length == 0:
    raise UserError('the history is empty (0 stages on axis 0); expected at least one stage.')
  return length
