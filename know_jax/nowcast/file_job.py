"""A prediction from files, checked before any weight is read and anything is written."""

import dataclasses
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from know_jax import kinds as kinds_
from know_jax import trees
from know_jax.errors import PredictionWarning, UserError, unknown_name
from know_jax.io import safetensors
from know_jax.io.files import local_path
from know_jax.io.formats import open_weights
from know_jax.io.weights import Leaf, Shard, Weights
from know_jax.nowcast import api
from know_jax.nowcast import lora as lora_
from know_jax.nowcast import stages as stages_
from know_jax.nowcast.job import grouped
from know_jax.nowcast.plan import check_steps, multiple_of, plan_of
from know_jax.predictors import base
from know_jax.predictors.registry import given_theta, resolve_all

SHARD_BYTES = 1 << 30
MEMORY = 1 << 30
"""Bytes for what cannot be taken in slices: leaves of `tsv`, chunks of Orbax."""

_STATISTICS = re.compile(r'(^|/)running_mean$')
_RECIPE = (
  'BatchNorm keeps the statistics of the newest stage. To settle them on your data in PyTorch: '
  'for m in model.modules(): hasattr(m, "reset_running_stats") and m.reset_running_stats(); then '
  'set m.momentum = None, call model.train(), and run some batches under torch.no_grad().'
)
_TIED = re.compile(r'(^|/)(lm_head|embed_out|output_projection|decoder)/weight$')
"""Output layers that many models share with their embedding, and that savers then leave out."""


@dataclasses.dataclass(frozen=True)
class Job:
  """A prediction that has been checked; `write` carries it out."""

  stages: list[Weights]  # The history, oldest first.
  kinds: dict[str, str]  # Path -> kind.
  predictors: dict[str, Any]  # Name -> predictor.
  steps: int  # How far; the weights of every step from 1 on are written.
  rate: float  # r.
  on_bad: str  # What becomes of bad leaves, a choice of `guards.ON_BAD`.
  theta: dict[str, Any]  # Name -> the user's parameters, of the predictors that take them.
  options: dict[str, Any]  # Of the predictors.
  leaves: dict[str, Leaf]  # Path -> leaf of the newest stage, with the dtype that is written.
  shards: tuple[Shard, ...] | None  # The files of the newest stage, None where others are written.
  format: str  # Of what is written.
  # The name of that which floating-point leaves are written in, None for their own.
  dtype: str | None
  notes: tuple[str, ...]  # What to tell about the history.
  stacked: frozenset[str]  # The paths of leaves that hold layers on their first axis.


def prepare(
  history: Sequence[str | os.PathLike],
  *,
  predictors: Sequence[Any] = ('known',),
  steps: int = 3,
  rate: float = 0.5,
  kinds: Mapping[str, str] | None = None,
  known: str | None = None,
  on_bad: str = 'keep',
  memory: int = MEMORY,
  options: Mapping[str, Any] | None = None,
  only: str | None = None,
  skip: str | None = None,
  stacked: str | None = None,
  format: str | None = None,
  dtype: str | None = None,
  lora: str = 'apart',
) -> Job:
  """Checks a history in files and what is asked of it; reads headers and metadata, no weights.

  Args:
    history: the stages, oldest (smallest subset) first; each what `formats.open_weights` takes;
      or one folder that holds them, see `stages.expand`.
    predictors: names in `PREDICTORS`, 'package.module:object', or objects.
    steps: how far; the weights of every step from 1 on will be written.
    rate: r, as in `nowcast.predict`.
    kinds: regular expression -> kind, see `kinds.find_kinds`.
    known: file or folder with the parameters of KNOWN, as `load_known` takes; None: those shipped.
    on_bad: what becomes of bad leaves, as in `nowcast.predict`.
    memory: bytes that may be taken for what must be whole: leaves of `tsv`, chunks of Orbax.
    options: of the predictors, as `nowcast.predict` takes them.
    only: regular expression; leaves in whose path it is not found are kept.
    skip: regular expression; leaves in whose path it is found are kept.
    stacked: regular expression; the leaves hold layers on their first axis, as in `predict`.
    format: 'safetensors' to write that; None: the newest stage's, where it can be written.
    dtype: 'float32', 'bfloat16' or 'float16' to write floating-point leaves in; None: their own.
    lora: 'merged' to predict the products of A and B in their place, see `nowcast.lora`.

  Raises:
    UserError: a stage cannot be read, is there twice or out of order, differs from the newest in
      the names, shapes or dtypes of predicted leaves, a leaf has no kind, a predictor is unknown
      or cannot do the steps with this history, or something that must be whole is too large; the
      leaf is named.
  """
  made = resolve_all(predictors, options)
  if not history:
    raise UserError('the history is empty; expected the weights of at least one stage.')
  stages = [open_weights(path) for path in stages_.expand(history)]
  stages_.check_paths(stages)
  if lora not in lora_.CHOICES:
    raise unknown_name('lora', lora, lora_.CHOICES)
  real, is_merged = stages[-1], lora == 'merged'
  stages = lora_.merged(stages) if is_merged else stages
  newest = stages[-1]
  chosen = _not_chosen(newest.leaves, only, skip)
  _check_complex(newest.leaves, {**chosen, **(kinds or {})})
  result = kinds_.find_kinds(newest.leaves, {**chosen, **(kinds or {})}, stacked)
  opaque = [path for path, leaf in newest.leaves.items() if leaf.dtype == np.dtype('V1')]
  told = f'of a dtype that is not predicted, and copied: {", ".join(opaque)}.'
  notes = [told] if opaque else []
  notes += dict.fromkeys([*result.notes, *(note for stage in stages for note in stage.notes)])
  if any(_STATISTICS.search(path) for path in newest.leaves):
    notes.append(_RECIPE)
  if lora_.has_factors({path for path, kind in result.of.items() if kind != kinds_.KEEP}):
    notes.append(lora_.APART)
  _check_stages(stages, result.of, notes, skip)
  for note in notes:
    warnings.warn(note, PredictionWarning, stacklevel=2)
  shards, leaves = _output(real, format, dtype)
  if is_merged:
    shards, leaves = lora_.output(real, shards, leaves)
  job = Job(
    stages, result.of, made, steps, rate, on_bad, given_theta(known, made),
    dict(options or {}), leaves, shards, newest.format if shards else 'safetensors', dtype,
    tuple(notes), result.stacked,
  )  # fmt: skip
  multiple_of(rate, steps)
  for name in job.predictors:
    _check_predictor(job, name)
    _check_memory(job, name, memory)
  _ = job.shards or new_shards(job, SHARD_BYTES)  # An error, if a dtype cannot be written.
  return job


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
  """Options as given to `--option`, 'name=value': a number or truth where it reads as one.

  Raises:
    UserError: a text is not of that form.
  """
  options = {}
  for text in texts:
    name, equals, value = text.partition('=')
    if not equals or not name.isidentifier():
      raise UserError(f"option: found {text!r}; expected 'name=value', as in 'lam=0.3'.")
    try:
      options[name] = json.loads(value)
    except ValueError:
      options[name] = value
  return options


def plan(job: Job, output: str | os.PathLike) -> str:
  """What `write` would do, in a few lines: weights of each kind, bytes, disk and time.

  The time is that of one slice of weights, which is predicted in memory, taken for all.
  """
  output = local_path(output, 'output')
  place = next(path for path in (output, *output.absolute().parents) if path.is_dir())
  sizes = dict.fromkeys((*kinds_.KINDS, kinds_.KEEP), 0)
  for path, kind in job.kinds.items():
    sizes[kind] += job.leaves[path].size
  predicted = sum(sizes.values()) - sizes[kinds_.KEEP]
  read = sum(leaf.nbytes for stage in job.stages for leaf in stage.leaves.values())
  written = sum(leaf.nbytes for leaf in job.leaves.values())
  seconds = 0.0
  for name in job.predictors if predicted else ():
    stage = {'a/kernel': np.zeros((1 << 9, 1 << 9), np.float32)}
    for _ in range(2):  # The first call compiles.
      began = time.perf_counter()
      api.forecast(
        [stage] * len(job.stages), job.steps, predictor=job.predictors[name],
        theta=job.theta.get(name), rate=job.rate, on_bad='ignore',
      )  # fmt: skip
      taken = time.perf_counter() - began
    seconds += taken * predicted / (1 << 18)
  kinds = ', '.join(f'{size:,} {kind}' for kind, size in sizes.items())
  return (
    f'weights: {kinds}\n'
    f'reads {read / 1e6:,.1f} MB; writes {job.steps} x {len(job.predictors)} checkpoints of '
    f'{written / 1e6:,.1f} MB ({job.format}) to {output}, where '
    f'{shutil.disk_usage(place).free / 1e6:,.1f} MB are free\n'
    f'predicting takes about {seconds:,.0f} s on this machine, reading and writing not counted\n'
    'dry run: nothing was written'
  )


def _not_chosen(leaves: Mapping[str, Leaf], only: str | None, skip: str | None) -> dict[str, str]:
  """The rule that keeps the leaves that are not to be predicted, by their full names."""
  # Bytes that NumPy has no dtype for.
  kept = {path for path, leaf in leaves.items() if leaf.dtype == np.dtype('V1')}
  for name, pattern in (('only', only), ('skip', skip)):
    if pattern is None:
      continue
    try:
      result = {path for path in leaves if re.search(pattern, path)}
    except re.error as error:
      raise UserError(f'{name}: {pattern!r} is no regular expression: {error}.') from error
    if not result:
      raise UserError(f'{name}: {pattern!r} is found in no path; the first is {min(leaves)!r}.')
    kept |= result if name == 'skip' else leaves.keys() - result
  return {f'^(?:{"|".join(map(re.escape, sorted(kept)))})$': kinds_.KEEP} if kept else {}


def _check_stages(
  stages: Sequence[Weights], kinds: dict[str, str], notes: list[str], skip: str | None
) -> None:
  """Compares the leaves to be predicted in all stages; changes `kinds` of tied ones that lack."""
  newest = stages[-1]
  lacking = {path for stage in stages[:-1] for path in kinds.keys() - stage.leaves.keys()}
  for path in sorted(lacking):
    if kinds[path] != kinds_.KEEP and _TIED.search(path):
      kinds[path] = kinds_.KEEP
      notes.append(
        f'leaf {path!r} is missing in some stages, as an output layer that is tied to the '
        'embedding is: it is kept as in the newest stage.'
      )
  predicted = {p: leaf for p, leaf in newest.leaves.items() if kinds[p] != kinds_.KEEP}
  for number, stage in enumerate(stages[:-1]):
    extra = {
      path: leaf
      for path, leaf in stage.leaves.items()
      if path not in newest.leaves and not (skip and re.search(skip, path))
    }
    if tied := [path for path in extra if _TIED.search(path)]:
      notes.append(f'leaf {tied[0]!r} of {stage.path} is not in the newest stage: it is left out.')
    there = {path: leaf for path, leaf in stage.leaves.items() if path in predicted} | {
      path: leaf for path, leaf in extra.items() if path not in tied and trees.is_floating(leaf)
    }
    names = (f'the newest stage ({newest.path})', f'stage {number} ({stage.path})')
    trees.check_same(predicted, there, names=names)


def _check_complex(leaves: Mapping[str, Leaf], rules: Mapping[str, str]) -> None:
  for path, leaf in leaves.items():
    told = any(re.search(pattern, path) for pattern, kind in rules.items() if kind == kinds_.KEEP)
    if leaf.dtype.kind == 'c' and not told:
      raise UserError(
        f'leaf {path!r} has dtype {leaf.dtype}, which is not predicted; expected real numbers. '
        f"Keep it as it is, --skip='^{re.escape(path)}$', or save real and imaginary parts as two."
      )


_DTYPES = ('float32', 'bfloat16', 'float16')


def _output(
  newest: Weights, format: str | None, dtype: str | None
) -> tuple[tuple[Shard, ...] | None, dict[str, Leaf]]:
  """The shards of the newest stage if they can be written again, and the leaves to be written."""
  if format not in (None, 'safetensors', newest.format):
    raise UserError(
      f'format is {format!r}; expected safetensors, or nothing for that of the newest stage '
      f'({newest.format}).'
    )
  if dtype is not None and dtype not in _DTYPES:
    raise unknown_name('dtype', dtype, _DTYPES)
  to = jnp.dtype(dtype) if dtype is not None else None
  leaves = {
    path: dataclasses.replace(leaf, dtype=to) if to and trees.is_floating(leaf) else leaf
    for path, leaf in newest.leaves.items()
  }
  if format is None and newest.format != 'safetensors' and newest.shards and to:
    raise UserError(
      f'dtype is {dtype!r}, but a {newest.format} checkpoint is written with its own dtypes; add '
      "format='safetensors'."
    )
  if format == 'safetensors' or not newest.shards:
    return None, leaves
  if to is None:
    return newest.shards, leaves
  return tuple(
    safetensors.rewritten(shard.name, {p: leaves[p] for p in shard.paths}, newest.metadata)
    for shard in newest.shards
  ), leaves


def _check_predictor(job: Job, predictor: str) -> None:
  """Whatever `forecast` refuses in the whole history, one weight of each kind and dtype shows."""
  first: dict[tuple[str, np.dtype], str] = {}
  for path, kind in job.kinds.items():
    if kind != kinds_.KEEP:
      first.setdefault((kind, job.leaves[path].dtype), path)
  stage = {path: np.zeros(1, dtype) for (_, dtype), path in first.items()}
  # Where all leaves are kept, the other arguments are checked still.
  stage = stage or {'bias': np.zeros(1, np.float32)}
  plan_of(
    [stage] * len(job.stages),
    check_steps(job.steps, least=1),
    job.predictors[predictor],
    job.theta.get(predictor),
    job.rate,
    lambda path, _: job.kinds.get(path),
    job.on_bad,
    {},
  )


def _check_memory(job: Job, predictor: str, memory: int) -> None:
  for path, leaf in job.leaves.items():
    made = job.predictors[predictor]
    if path in job.stacked:
      leaf = dataclasses.replace(leaf, shape=leaf.shape[1:])
    if is_whole(made, path, leaf, job.kinds[path]):
      needed = leaf.size * 4 * (len(job.stages) + job.steps + made.copies)
      if needed > memory:
        raise UserError(
          f'leaf {path!r} has {leaf.size} weights, which {predictor!r} must decompose as a whole: '
          f'about {needed} bytes are needed, at most {memory} are allowed. Give it the kind '
          f'{kinds_.KEEP!r}, or more memory, or leave {predictor!r} out.'
        )
    for stage in job.stages if job.kinds[path] != kinds_.KEEP else job.stages[-1:]:
      # Compressed, decompressed, and in the form that is handed out.
      needed = 3 * stage.leaves[path].chunk_bytes
      if needed > memory:
        raise UserError(
          f'leaf {path!r} of {stage.path} is stored in chunks of '
          f'{stage.leaves[path].chunk_bytes} bytes, one of them held at a time: about '
          f'{needed} bytes are needed, at most {memory} are allowed. Allow more, or save it in '
          'smaller chunks (chunk_byte_size of orbax.checkpoint.SaveArgs).'
        )


def is_whole(predictor: Any, path: str, leaf: Leaf, kind: str) -> bool:
  """Whether a leaf must be there as a whole to be predicted."""
  return (
    isinstance(predictor, base.WholeLeaf)
    and kind != kinds_.KEEP
    and predictor.is_whole(base.Leaf(path, kind), leaf.shape)
  )


def new_shards(job: Job, shard_bytes: int) -> tuple[Shard, ...]:
  """Files of safetensors of no more than that many bytes, but for those of one large leaf."""
  groups = grouped([(path, leaf.nbytes) for path, leaf in job.leaves.items()], shard_bytes)
  return tuple(
    safetensors.rewritten(
      f'model-{number:05}-of-{len(groups):05}.safetensors',
      {path: job.leaves[path] for path in group},
      job.stages[-1].metadata,
    )
    for number, group in enumerate(groups, 1)
  )
