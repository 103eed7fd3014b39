"""Forgetting by a training loop of one's own: any framework, any pytree of arrays, no config."""

import functools
import hashlib
import operator
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from know_jax import trees
from know_jax.data import subsets as subsets_
from know_jax.errors import UserError
from know_jax.runs.metrics import tell
from know_jax.seeds import named_key
from know_jax.trajectory import Trajectory

Train = Callable[[Any, np.ndarray, int, jax.Array], Any]


def nested_subsets(
  labels_or_size: Any, rate: float = 0.5, stages: int = 5, seed: Any = 0
) -> list[np.ndarray]:
  """Which examples each stage of a forgetting run is trained on.

      subsets = know_jax.nested_subsets(labels)       # keeps the shares of the classes
      subsets = know_jax.nested_subsets(50_000)       # there are no classes

  Each set is a random part of the one before, of `floor(rate n + 1/2)` of its n examples. The
  result is a function of the arguments alone, on every machine.

  Args:
    labels_or_size: the class of every example, `[N]` (numbers or strings, in an array or a list),
      or the number of examples.
    rate: the sampling rate r, between 0 and 1, both excluded.
    stages: how many sets.
    seed: decides the sets; a whole number of at least 0, or a key of JAX.

  Returns:
    `stages` sorted int32 arrays of indices, all examples first.

  Raises:
    UserError: an argument is not as described.
  """
  phases, size = _whole(stages), _whole(labels_or_size)
  if phases is None or phases < 1:
    raise UserError(f'stages is {stages!r}; expected a whole number of at least 1.')
  if (number := _whole(seed)) is not None and number < 0:
    raise UserError(f'seed is {seed!r}; expected a whole number of at least 0, or a key of JAX.')
  if size is not None:
    if size < 1:
      raise UserError(f'the number of examples is {size}; expected at least 1.')
    labels = np.zeros(size, np.int32)
  else:
    labels = np.asarray(labels_or_size)
    if labels.ndim != 1 or not labels.size or labels.dtype.kind not in 'iubUSTO':
      raise UserError(
        f'labels have shape {labels.shape} and dtype {labels.dtype}; expected [N] whole numbers or '
        'strings, N > 0, or the number of examples.'
      )
    try:
      labels = np.unique(labels, return_inverse=True)[1].astype(np.int32)
    except TypeError as error:
      raise UserError(f'labels are of types that cannot be compared ({error}).') from error
  key = _as_key(seed, 'seed')
  key = key if _is_typed_key(key) else jax.random.wrap_key_data(key)
  return subsets_.nested_subsets(
    named_key(key, 'subsets'), labels, rate=rate, phases=phases,
    stratified=size is None,
  )  # fmt: skip


def forget(
  train: Train,
  start: Any,
  subsets: Sequence[Any],
  *,
  key: Any = 0,
  workdir: str | Path | None = None,
  on_metrics: Callable[[int, dict[str, float]], Any] | None = None,
) -> Trajectory:
  """Trains on all data, then fine-tunes on each smaller subset; gives the weights of all stages.

      history = know_jax.forget(train, params, know_jax.nested_subsets(labels), key=0)
      params = know_jax.predict(history)              # and train on from there

  Args:
    train: `train(params, indices, stage, key) -> params`: the weights after a training on the
      examples at `indices` that starts from `params`, with a fresh optimizer and schedule. `stage`
      is 0 for all data. It may write to what it is given. No randomness but that of `key` is
      reproducible.
    start: the weights that stage 0 starts from: any pytree, as of linen, NNX (`nnx.state`),
      Equinox, Haiku, NumPy. What is no array, such as a function, is handed through.
    subsets: index arrays, all data first, each smaller than the one before.
    key: a seed or a key of JAX; each stage is given one of its own.
    workdir: where each stage is saved as it ends; the same call resumes at the first stage that is
      not there. `bin/nowcast.py --workdir` reads it too.
    on_metrics: called as `on_metrics(stage, {'examples': n, 'train_seconds': s})` as each stage
      ends, for a tracker such as W&B or MLflow; losses are told by `train` itself.

  Returns:
    The trajectory, oldest (smallest subset) first.

  Raises:
    UserError: before any training, if an argument is not as described or the workdir is of another
      run; after a stage, if its weights have another structure, shape or dtype than before or are
      no longer finite; the leaf is named. The stages before it are kept. `on_metrics` fails.
  """
  if not callable(train):
    raise UserError(f'train is {type(train)}; expected a function (params, indices, stage, key).')
  _check_start(start)
  parts = _checked_subsets(subsets)
  key = _as_key(key)
  run = None if workdir is None else _Workdir(Path(workdir).expanduser(), start, parts, key)
  stages: list[Any] = []
  for stage, indices in enumerate(parts):
    if run is not None and stage < run.done:
      stages.append(run.restore(stage))
      continue
    before, began = stages[-1] if stages else start, time.monotonic()
    params = train(_copy(before), indices.copy(), stage, jax.random.fold_in(key, stage))
    _check_stage(before, params, stage)
    # The next stage may write to these, or give their memory away.
    stages.append(_copy(params))
    seconds = time.monotonic() - began
    if run is not None:
      run.keep(stage, stages[-1], seconds)
    tell(on_metrics, stage, {'examples': len(indices), 'train_seconds': seconds})
  return Trajectory.from_sequence(stages[::-1])


def _whole(value: Any) -> int | None:
  """A whole number of Python, or of any library's arrays without axes; None for something else."""
  if isinstance(value, (bool, np.bool_)) or getattr(value, 'shape', ()) != ():
    return None
  try:
    return operator.index(value)
  except TypeError:
    return None


def _as_key(key: Any, name: str = 'key') -> jax.Array:
  if (number := _whole(key)) is not None:
    return jax.random.key(number)
  try:
    data = key if _is_typed_key(key) else jax.random.wrap_key_data(jnp.asarray(key))
    if data.shape == ():
      return key if _is_typed_key(key) else jnp.asarray(key)
  except (TypeError, ValueError):
    pass
  raise UserError(f'{name} is {key!r}; expected a whole number or one key of JAX.')


def _is_typed_key(leaf: Any) -> bool:
  return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _is_numeric(leaf: Any) -> bool:
  """Whether a leaf is an array of numbers, which is trained and saved."""
  return isinstance(leaf, (np.ndarray, np.generic, jax.Array)) and (
    jnp.issubdtype(leaf.dtype, np.number) or leaf.dtype == np.bool_
  )


def _arrays(tree: Any) -> dict[str, Any]:
  return {path: leaf for path, leaf in trees.named_leaves(tree).items() if _is_numeric(leaf)}


def _copy(tree: Any) -> Any:
  def copy(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array) and not _is_typed_key(leaf):
      return jnp.array(leaf, copy=True)
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf

  return jax.tree.map(copy, tree)


def _check_start(start: Any) -> None:
  named = trees.named_leaves(start)
  for path, leaf in named.items():
    if hasattr(leaf, 'new_tensor'):
      raise UserError(
        f'leaf {path!r} of start is a tensor of PyTorch; give NumPy arrays, x.numpy(force=True), '
        'and have train take and give such (torch.from_numpy).'
      )
  if not any(_is_numeric(leaf) and trees.is_floating(leaf) for leaf in named.values()):
    raise UserError('start has no floating-point arrays; expected a pytree of weights.')
  for path, leaf in named.items():
    if _is_numeric(leaf) and (narrow := jax.dtypes.canonicalize_dtype(leaf.dtype)) != leaf.dtype:
      raise UserError(
        f'leaf {path!r} of start is {leaf.dtype}, which JAX would narrow to {narrow}; cast it or '
        'set jax_enable_x64.'
      )


def _checked_subsets(subsets: Sequence[Any]) -> list[np.ndarray]:
  try:
    parts = [np.asarray(indices) for indices in subsets]
  except TypeError as error:
    raise UserError(
      f'subsets are {subsets!r}; expected an array of indices for each stage, as nested_subsets '
      'gives them.'
    ) from error
  if not parts:
    raise UserError('subsets are empty; expected an array of indices for each stage.')
  for stage, part in enumerate(parts):
    if part.ndim != 1 or not part.size or not np.issubdtype(part.dtype, np.integer):
      raise UserError(
        f'subset {stage} has shape {part.shape} and dtype {part.dtype}; expected [n] whole '
        'numbers, n > 0, as nested_subsets gives them.'
      )
    if stage and not (part.size < parts[stage - 1].size and np.isin(part, parts[stage - 1]).all()):
      raise UserError(
        f'subset {stage} has {part.size} examples and is no smaller part of subset {stage - 1} '
        f'with {parts[stage - 1].size}; expected all data first, and each a part of the one before.'
      )
  return parts


def _check_stage(before: Any, params: Any, stage: int) -> None:
  """Checks what `train` gave."""
  names = ('the weights that it was given', f'what train gave in stage {stage}')
  given, result = _arrays(before), _arrays(params)
  trees.check_same(given, result, names=names)
  trees.check_containers(before, params, names=names)
  for path, leaf in result.items():
    if not trees.is_floating(leaf) or np.isfinite(np.asarray(leaf, np.float32)).all():
      continue
    if np.isfinite(np.asarray(given[path], np.float32)).all():
      raise UserError(f'leaf {path!r} holds NaN or infinity after stage {stage}; expected neither.')


class _Workdir:
  """The stages of a run on disk, as a forgetting run by config leaves them."""

  def __init__(self, path: Path, start: Any, parts: list[np.ndarray], key: jax.Array):
    # Late, as `import know_jax` is to be light.
    from know_jax.io import checkpoints
    from know_jax.runs import record, workdir

    self._start, self._checkpoints, self._sizes = start, checkpoints, [len(p) for p in parts]
    self._stage_path = functools.partial(workdir.stage_path, path)
    hashed = hashlib.sha256()
    for part in parts:
      hashed.update(np.ascontiguousarray(part, '<i8').tobytes() + b'.')
    shrink = (self._sizes[-1] / self._sizes[0]) ** (1 / max(len(parts) - 1, 1))
    config = {
      'task': None,
      'stages': len(parts),
      'rate': round(shrink, 3) if len(parts) > 1 else 0.5,
      'subsets': hashed.hexdigest()[:16],
      'key': np.asarray(jax.random.key_data(key) if _is_typed_key(key) else key).tolist(),
    }
    self._record = record.RunRecord.open(path, config, kind=workdir.KIND)
    parameters = sum(x.size for x in jax.tree.leaves(start) if _is_numeric(x))
    if 'subset_sizes' not in self._record:
      self._record.update(subset_sizes=self._sizes, parameters=int(parameters))

  @property
  def done(self) -> int:
    """How many stages there are."""
    return len(self._record.get('stages', []))

  def keep(self, stage: int, params: Any, seconds: float) -> None:
    """Saves a stage; Python's own numbers and strings go into the metadata."""
    tree: dict[str, Any] = {}
    others = {}
    for path, leaf in trees.named_leaves(params).items():
      if _is_numeric(leaf) and leaf.size:
        *parents, name = path.split('/')
        functools.reduce(lambda node, k: node.setdefault(k, {}), parents, tree)[name] = leaf
      elif isinstance(leaf, (bool, int, float, str)):
        others[path] = leaf
    about = {'stage': stage, 'examples': self._sizes[stage]}
    self._checkpoints.save(
      self._stage_path(stage), tree, metadata={**about, 'others': others}, overwrite=True
    )
    stages = [*self._record.get('stages', []), {**about, 'train_seconds': seconds}]
    self._record.update(stages=stages)

  def restore(self, stage: int) -> Any:
    """A stage in the form of the start; what was not saved is as there."""
    path = self._stage_path(stage)
    saved = trees.named_leaves(self._checkpoints.restore(path))
    others = self._checkpoints.read_metadata(path)['others']
    leaves = []
    for name, leaf in trees.named_leaves(self._start).items():
      if _is_numeric(leaf) and leaf.size:
        if name not in saved:
          raise UserError(
            f'{path} lacks leaf {name!r}, which start has; expected the same network.'
          )
        result = saved.pop(name)
        leaves.append(jnp.asarray(result) if isinstance(leaf, jax.Array) else result)
      else:
        leaves.append(others.get(name, leaf))
    if saved:
      raise UserError(
        f'{path} has leaf {min(saved)!r}, which start lacks; expected the same network.'
      )
    restored = jax.tree.unflatten(jax.tree.structure(self._start), leaves)
    trees.check_same(_arrays(self._start), _arrays(restored), names=('start', str(path)))
    return restored
