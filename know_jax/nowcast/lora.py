"""LoRA in files: the product of A and B is predicted, in place of each for itself.

A model computes with W + s B A, s being alpha / r (alpha / sqrt(r) by rsLoRA). B and A may turn
against each other from stage to stage without a change of the product; predicted apart they need
not fit each other. Here each pair becomes one leaf, s B A relative to the base, which the engine
predicts like any other; what it writes is taken apart again by the singular value decomposition to
the rank of the pair, and what that loses is told.
"""

import contextlib
import dataclasses
import functools
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from know_jax.errors import UserError, os_errors
from know_jax.io.weights import Leaf, Mark, Opener, Reader, Shard, Sink, Weights, read_json

CHOICES = ('apart', 'merged')
APART = (
  'A and B of LoRA are predicted apart; their product is not predicted itself. --lora=merged '
  'predicts the product and takes it apart to the rank.'
)

_FIRST = re.compile(r'(?<![A-Za-z0-9])lora_(?:embedding_)?[Aa](?=/|$)')
_CONFIG = 'adapter_config.json'
_DIRECT = 256  # Up to this size a whole decomposition is quicker than that of a few values.
_ROWS = 1 << 24  # Bytes of a product that are computed at a time.


def has_factors(leaves: Iterable[str]) -> bool:
  """Whether there is an A of LoRA."""
  return any(map(_FIRST.search, leaves))


@dataclasses.dataclass(frozen=True)
class _Product(Leaf):
  """s B A as a leaf; on the disk it takes what B and A take."""

  stored: int = 0

  @property
  def nbytes(self) -> int:
    return self.stored


@dataclasses.dataclass(frozen=True)
class _Pair:
  """The leaves whose product, `[n, r] @ [r, m]`, is predicted: B and A, or Flax's a and b."""

  path: str
  left: str
  right: str


def _pairs(leaves: Mapping[str, Leaf]) -> list[_Pair]:
  pairs = []
  for path in leaves:
    if not (result := _FIRST.search(path)):
      continue
    letter = path[result.end() - 1]
    other = f'{path[: result.end() - 1]}{chr(ord(letter) + 1)}{path[result.end() :]}'
    if other not in leaves:
      raise UserError(f'lora: leaf {path!r} has no {other!r} beside it; expected A and B.')
    # PEFT's layers have their outputs first, kernels of Flax last.
    left, right = (other, path) if letter == 'A' else (path, other)
    product = f'{path[: result.end() - 1]}{"BA" if letter == "A" else "ab"}{path[result.end() :]}'
    before, after = leaves[left].shape, leaves[right].shape
    fit = len(before) > 1 and len(after) > 1 and before[1] == after[0]
    if not fit or math.prod(before[2:]) != 1 or product in leaves:
      raise UserError(
        f'lora: {left!r} with shape {before} and {right!r} with shape {after} have no product of a '
        'common rank.'
      )
    pairs.append(_Pair(product, left, right))
  if not pairs:
    raise UserError(
      f"lora is 'merged', but no leaf is called lora_A; the first is {next(iter(leaves))!r}."
    )
  return pairs


def _scale(stage: Weights, pair: _Pair) -> float:
  """What the product is multiplied by, as PEFT does; 1 where no config says it.

  Raises:
    UserError: the config cannot be read, or has no number for alpha.
  """
  if stage.home is None or not (path := stage.home / _CONFIG).is_file():
    return 1.0
  config = read_json(path.read_bytes(), f'{path}')
  module = pair.left[: pair.left.index('lora_')].rstrip('/').replace('/', '.')
  alpha = config.get('lora_alpha')
  for key, value in (config.get('alpha_pattern') or {}).items():
    if re.match(rf'(.*\.)?({key})$', module):
      alpha = value
      break
  if not isinstance(alpha, (int, float)) or not alpha:
    raise UserError(f'{path}: lora_alpha is {alpha!r}; expected a number.')
  rank = stage.leaves[pair.right].shape[0]
  return alpha / (math.sqrt(rank) if config.get('use_rslora') else rank)


def merged(stages: Sequence[Weights]) -> list[Weights]:
  """The stages with a leaf for every product, in place of its factors.

  Raises:
    UserError: a stage has no pairs, a factor is alone, two do not fit each other, or the adapter's
      config has no alpha; they are named.
  """
  result = []
  for stage in stages:
    pairs = _pairs(stage.leaves)
    factors = {path for pair in pairs for path in (pair.left, pair.right)}
    products = {pair.path: _product(stage, pair) for pair in pairs}
    leaves = {path: leaf for path, leaf in stage.leaves.items() if path not in factors}
    result.append(dataclasses.replace(stage, leaves=dict(sorted((leaves | products).items()))))
  return result


def _product(stage: Weights, pair: _Pair) -> Leaf:
  left, right = stage.leaves[pair.left], stage.leaves[pair.right]
  shape = (left.shape[0], *right.shape[1:])
  nbytes = math.prod(shape) * np.dtype(np.float32).itemsize
  # While it is taken apart it is held in float32 and float64.
  return _Product(
    pair.path, shape, np.dtype(np.float32), _opener(stage, pair, _scale(stage, pair)),
    chunk_bytes=nbytes, stored=left.nbytes + right.nbytes,
  )  # fmt: skip


def _factor(leaf: Leaf, folder: Path, axis: int) -> np.ndarray:
  """A factor as a matrix of float64, the rank on the given axis."""
  with leaf.open(folder) as reader:
    values = reader.read(0, leaf.size).astype(np.float64)
  return values.reshape((-1, leaf.shape[1]) if axis else (leaf.shape[0], -1))


def _opener(stage: Weights, pair: _Pair, scale: float) -> Opener:
  what = f'the product {pair.path!r} of {stage.path}'

  @contextlib.contextmanager
  def opened(folder: Path) -> Iterator[Reader]:
    left = _factor(stage.leaves[pair.left], folder, 1) * scale
    right = _factor(stage.leaves[pair.right], folder, 0)
    rows = max(1, _ROWS // (right.shape[1] * 8))
    with os_errors(f'cannot keep {what} in {folder}'), tempfile.TemporaryFile(dir=folder) as file:
      for row in range(0, len(left), rows):
        file.write((left[row : row + rows] @ right).astype(np.float32).data)
      file.flush()
      yield Reader(file.fileno(), 0, np.dtype(np.float32), what)

  return opened


def take_apart(product: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
  """Two matrices of a rank whose product is nearest to a matrix, by its largest singular values.

  Args:
    product: `[n, m]`, float64.
    rank: r.

  Returns:
    `[n, r]` and `[r, m]`, which share the singular values evenly.

  References:
    Eckart and Young, "The approximation of one matrix by another of lower rank", 1936.
  """
  least = min(product.shape)
  if least <= max(_DIRECT, 4 * rank):
    u, values, v = np.linalg.svd(product, full_matrices=False)
  else:
    from scipy.sparse.linalg import svds

    # A start of its own makes it the same every time.
    u, values, v = svds(product, k=rank, v0=np.random.default_rng(0).normal(size=least))
    u, values, v = u[:, ::-1], values[::-1], v[::-1]
  root = np.sqrt(values[:rank])
  left, right = np.zeros((len(product), rank)), np.zeros((rank, product.shape[1]))
  left[:, : len(root)], right[: len(root)] = u[:, :rank] * root, v[:rank] * root[:, None]
  return left, right


def output(
  real: Weights, shards: Sequence[Shard] | None, leaves: Mapping[str, Leaf]
) -> tuple[tuple[Shard, ...], dict[str, Leaf]]:
  """Shards that are written from products, and the leaves that are written.

  Args:
    real: the newest stage as it lies in its files.
    shards: how A and B are written; None: in another form than the newest.
    leaves: path -> leaf as it is written, A and B among them.

  Raises:
    UserError: A and B lie in different files, or are to be converted.
  """
  if shards is None:
    raise UserError(
      "lora is 'merged', which writes the newest adapter with its A and B replaced; expected no "
      f'format, and arrays that are not compressed. Found {real.path} ({real.format}).'
    )
  pairs = _pairs(real.leaves)
  (virtual,) = merged([real])
  result = []
  for shard in shards:
    inside = [pair for pair in pairs if pair.left in shard.paths]
    for pair in pairs:
      if (pair.left in shard.paths) != (pair.right in shard.paths):
        raise UserError(f'lora: {pair.left!r} and {pair.right!r} of {real.path} lie in two files.')
    factors = {path for pair in inside for path in (pair.left, pair.right)}
    rest = [path for path in shard.paths if path not in factors]
    make = functools.partial(_Factoring, shard, inside, real, virtual, leaves)
    writing = functools.partial(_writing, shard, make)
    result.append(Shard(shard.name, (*(pair.path for pair in inside), *rest), writing))
  kept = {path: leaves.get(path, leaf) for path, leaf in virtual.leaves.items()}
  return tuple(result), kept


@contextlib.contextmanager
def _writing(shard: Shard, make: Callable[..., '_Factoring'], path: Path) -> Iterator[Sink]:
  with shard.writing(path) as inner, tempfile.TemporaryFile(dir=path.parent) as file:
    sink = make(inner, file, path.parent)
    yield sink
    sink.end(len(shard.paths))


class _Factoring(Sink):
  """Takes products apart; they come first, and A and B are written where they stand."""

  def __init__(
    self,
    shard: Shard,
    pairs: Sequence[_Pair],
    real: Weights,
    virtual: Weights,
    leaves: Mapping[str, Leaf],
    inner: Sink,
    file: Any,
    folder: Path,
  ):
    super().__init__(file)
    self._inner, self._order, self._leaves = inner, shard.paths, leaves
    self._pairs = {pair.path: pair for pair in pairs}
    self._real, self._virtual, self._folder = real, virtual, folder
    self._pair: _Pair | None = None
    self._empty = super().mark()
    self._factors: dict[str, np.ndarray] = {}
    self._written = 0
    self.errors: dict[str, float] = {}

  def begin(self, leaf: Leaf) -> None:
    path = leaf.path
    if path in self._pairs:
      self._take_apart()
      self._pair = self._pairs[path]
    else:
      self.end(self._order.index(path))
      self._inner.begin(leaf)
      self._written += 1

  def write(self, data: bytes | np.ndarray) -> None:
    if self._pair:
      super().write(data)
    else:
      self._inner.write(data)

  def mark(self) -> Mark:
    return super().mark() if self._pair else self._inner.mark()

  def go_back(self, mark: Mark) -> None:
    if self._pair:
      super().go_back(mark)
    else:
      self._inner.go_back(mark)

  def identity(self) -> dict[str, Any]:
    return {**self._inner.identity(), 'refactoring_error': self.errors}

  def end(self, stop: int) -> None:
    """Writes the factors that stand before a place in the order of the file."""
    self._take_apart()
    for path in self._order[self._written : stop]:
      self._inner.begin(self._leaves[path])
      self._inner.write(self._factors.pop(path))
    self._written = stop

  def _take_apart(self) -> None:
    if (pair := self._pair) is None:
      return
    self._pair = None
    left, right = (self._real.leaves[path] for path in (pair.left, pair.right))
    self.flush()  # What is written is written by a thread.
    self._file.seek(0)
    product = np.frombuffer(self._file.read(), np.float32).reshape(left.shape[0], -1)
    super().go_back(self._empty)
    with self._virtual.leaves[pair.path].open(self._folder) as reader:
      is_newest = np.array_equal(reader.read(0, product.size), product.reshape(-1))
    if is_newest:
      result = [_factor(left, self._folder, 1), _factor(right, self._folder, 0)]
    else:
      scale = _scale(self._real, pair)
      result = list(take_apart(product.astype(np.float64) / scale, left.shape[1]))
    for n, path in enumerate((pair.left, pair.right)):
      leaf = self._leaves[path]
      self._factors[path] = result[n].astype(leaf.dtype).reshape(leaf.shape)
      result[n] = self._factors[path].astype(np.float64).reshape(result[n].shape)
    self.errors[pair.path] = 0.0
    if not is_newest and (size := float(np.linalg.norm(product))):
      lost = np.linalg.norm(result[0] @ result[1] * scale - product)
      self.errors[pair.path] = float(lost) / size


def report(card: Mapping[str, Any]) -> str:
  """What taking the products apart has lost, from a card; empty where there are none."""
  errors: dict[str, float] = {}
  for file in card['files'].values():
    errors |= file.get('refactoring_error', {})
  if not errors:
    return ''
  worst = max(errors, key=lambda path: errors[path])
  return (
    f'the products of A and B of LoRA were predicted, {len(errors)} of them, and taken apart to '
    f'their rank: that changed them by {errors[worst]:.2g} of their norm at most ({worst!r}).'
  )
