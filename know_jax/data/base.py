"""What data are to the rest: a source of batches, in memory or not."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from know_jax.errors import UserError

Batch = dict[str, Any]
"""Name -> array with the examples on axis 0."""


class Source(Protocol):
  """Where examples come from.

  A source that also has `arrays`, a dict of all examples like a batch, is copied to every device
  once; of any other each batch is read on the host when its step comes, so that the data may be
  larger than the memory of a device, or of the host.
  """

  @property
  def size(self) -> int:
    """How many examples there are."""
    ...

  @property
  def strata(self) -> np.ndarray | None:
    """The class of every example, integers `[size]`, for subsets that keep the classes' shares.

    None where there are no classes.
    """
    ...

  def batch(self, indices: np.ndarray) -> Batch:
    """The examples at `indices`, int32 `[n]`: a dict of arrays `[n, ...]`, always of one shape."""
    ...


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
  """A source in memory: name -> array with the examples on axis 0, and the class of each."""

  arrays: Mapping[str, np.ndarray]
  strata: np.ndarray | None = None

  def __post_init__(self) -> None:
    sizes = {name: len(array) for name, array in self.arrays.items()}
    if self.strata is not None:
      sizes['strata'] = len(self.strata)
    if not self.arrays or len(set(sizes.values())) > 1 or not self.size:
      raise UserError(f'the arrays of a source have {sizes} examples; expected one number above 0.')

  @property
  def size(self) -> int:
    """How many examples there are."""
    return len(next(iter(self.arrays.values())))

  def batch(self, indices: np.ndarray) -> Batch:
    """The examples at `indices`."""
    return {name: array[indices] for name, array in self.arrays.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
  """Those examples of another source, `whole`, that are at `indices`, int32 `[size]`; no copy."""

  whole: Source
  indices: np.ndarray

  @property
  def size(self) -> int:
    """How many examples there are."""
    return len(self.indices)

  @functools.cached_property
  def strata(self) -> np.ndarray | None:
    """The class of every example, where the whole has classes."""
    return None if self.whole.strata is None else np.asarray(self.whole.strata)[self.indices]

  def batch(self, indices: np.ndarray) -> Batch:
    """The examples at `indices`."""
    return self.whole.batch(self.indices[indices])


def part_of(source: Source, indices: np.ndarray) -> Source:
  """Some examples of a source: in memory where the source is, as a view where it is not."""
  arrays = getattr(source, 'arrays', None)
  if arrays is None:
    return Part(source, np.asarray(indices, np.int32))
  strata = None if source.strata is None else np.asarray(source.strata)[indices]
  return Arrays({name: array[indices] for name, array in arrays.items()}, strata)


def checked_batch(source: Source, indices: np.ndarray) -> Batch:
  """A batch of a source, checked.

  Raises:
    UserError: it is no dict of arrays with the examples on axis 0; the array is named.
  """
  batch = source.batch(indices)
  if not isinstance(batch, Mapping) or not batch:
    raise UserError(f'a source gave a batch of {type(batch)}; expected a dict of arrays.')
  for name, array in batch.items():
    if np.shape(array)[:1] != (len(indices),):
      raise UserError(
        f'array {name!r} of a batch has shape {np.shape(array)}; expected [{len(indices)}, ...], '
        'one row for each example that was asked for.'
      )
  return dict(batch)
