"""PyTorch: .pt, .pth and .bin as torch.save writes them, shards with an index, folders with either.

PyTorch itself reads the pickle, by `weights_only=True`, which runs no code of the file, and without
the numbers; these are read in their places. Needs torch 2.7 or newer.
"""

import functools
import importlib.util
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from know_jax.errors import UserError, first_line
from know_jax.io import zipped
from know_jax.io.weights import (
  Leaf,
  Shard,
  Weights,
  by_path,
  identify_files,
  opener,
  read_json,
  shard_of,
)

_SINGLE = ('pytorch_model.bin', 'adapter_model.bin', 'diffusion_pytorch_model.bin')
_INDEX = 'pytorch_model.bin.index.json'
_DTYPES = {
  'bfloat16': ml_dtypes.bfloat16,
  'float8_e4m3fn': ml_dtypes.float8_e4m3fn,
  'float8_e5m2': ml_dtypes.float8_e5m2,
  'bool': np.bool_,
}


def detect(path: Path) -> bool:
  """Whether a path is a zip archive of torch.save, an index of them, or a folder with either."""
  if path.is_dir():
    return any((path / name).is_file() for name in (*_SINGLE, _INDEX))
  if path.name.endswith('.bin.index.json'):
    return True
  names = zipped.names(path) or []
  return _prefix(names) is not None and not any(name.endswith('constants.pkl') for name in names)


def _prefix(names: list[str]) -> str | None:
  result = [name.removesuffix('data.pkl') for name in names if name.endswith('data.pkl')]
  return result[0] if len(result) == 1 and result[0].count('/') <= 1 else None


def open(path: Path) -> Weights:
  """Reads what tensors there are.

  Raises:
    UserError: torch is not installed; or a file is damaged, holds more than tensors and plain
      values, or has a tensor that is scattered over its storage.
  """
  if importlib.util.find_spec('torch') is None:
    raise UserError(
      f"{path} is a PyTorch file, which torch must read: pip install 'know_jax[torch]'."
    )
  index = path if path.name.endswith('.json') else path / _INDEX
  content = read_json(index.read_bytes(), f'{index}') if index.is_file() else None
  if content is not None:
    weight_map = content.get('weight_map')
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
      raise UserError(f'{index}: no index of files beside it.')
    files = [index.with_name(name) for name in sorted(names)]
    home: Path | None = index.parent
  elif path.is_dir():
    files, home = [next(path / name for name in _SINGLE if (path / name).is_file())], path
  else:
    files, home = [path], None
  leaves: list[Leaf] = []
  shards: list[Shard] = []
  notes: list[str] = []
  for file in files:
    result, members = _open_file(file, notes)
    leaves += result
    shards.append(shard_of(file, result, functools.partial(zipped.mend, changed=members)))
  return Weights(
    path, 'torch', by_path(leaves, path), tuple(shards),
    lambda: identify_files(files[0].parent, files), home=home,
    index=None if content is None else (index.name, content), notes=tuple(notes),
  )  # fmt: skip


def _open_file(path: Path, notes: list[str]) -> tuple[list[Leaf], list[zipped.Member]]:
  """The tensors of a file in the order of their places, and the members that they lie in."""
  members = zipped.members(path)
  prefix = f'{_prefix(list(members))}data/'
  data = [m for n, m in members.items() if n.startswith(prefix)]
  order = members.get(prefix.removesuffix('data/') + 'byteorder')
  if order is not None and order.size != len('little'):
    raise UserError(f'{path} has its numbers in big-endian order; save it again here.')
  leaves = [_leaf(path, name, tensor, data) for name, tensor in _tensors(_load(path), ())]
  # A whole tensor before its parts, of equal ones the first.
  ordered = sorted(leaves, key=lambda leaf: (leaf.place, -leaf.nbytes))
  apart: list[Leaf] = []
  for leaf in ordered:
    last = apart[-1] if apart else None
    if last is not None and leaf.nbytes and (leaf.place or 0) < (last.place or 0) + last.nbytes:
      notes.append(f'{path}: {leaf.name!r} shares the numbers of {last.name!r}, and follows it.')
    else:
      apart.append(leaf)
  return apart, data


def _load(path: Path) -> Any:
  import torch
  from torch._subclasses.fake_tensor import FakeTensorMode

  try:
    with warnings.catch_warnings(), FakeTensorMode():
      warnings.simplefilter('ignore')
      return torch.load(path, weights_only=True)
  except Exception as error:  # Of many types, as the ways in which it can be damaged.
    raise UserError(
      f'{path}: not a PyTorch file of tensors and plain values ({first_line(error)[:200]}); '
      'expected a state_dict, saved by torch.save(model.state_dict(), path).'
    ) from error


def _tensors(value: Any, keys: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
  import torch

  if isinstance(value, torch.Tensor):
    yield '.'.join(keys), value
  elif isinstance(value, dict):
    for key, part in value.items():
      yield from _tensors(part, (*keys, str(key)))
  elif isinstance(value, (list, tuple)):
    for index, part in enumerate(value):
      yield from _tensors(part, (*keys, str(index)))


def _leaf(path: Path, name: str, tensor: Any, data: list[zipped.Member]) -> Leaf:
  what = f'{path}: tensor {name!r} '
  text = str(tensor.dtype).removeprefix('torch.')
  try:
    dtype = np.dtype(_DTYPES.get(text, text))
  except TypeError as error:
    raise UserError(f'{what}has dtype {text}, which NumPy does not have.') from error
  start = getattr(tensor.untyped_storage(), '_checkpoint_offset', None)
  if start is None or tensor.layout.__repr__() != 'torch.strided':
    raise UserError(
      f'{what}is of layout {tensor.layout}, or torch is older than 2.7; expected a plain tensor.'
    )
  # By falling strides, so that a transposed or channels-last tensor is taken as it lies.
  axes = sorted(range(tensor.ndim), key=lambda axis: (-tensor.stride(axis), axis))
  shape = tuple(int(tensor.shape[axis]) for axis in axes)
  steps = [*itertools.accumulate(shape[:0:-1], lambda a, b: a * b, initial=1)][::-1]
  strides = [tensor.stride(axis) for axis in axes]
  dense = all(n == 1 or a == b for n, a, b in zip(shape, strides, steps[: len(shape)], strict=True))
  place = start + tensor.storage_offset() * dtype.itemsize
  leaf = Leaf(name, shape, dtype, opener(path, place, dtype, name), place=place)
  inside = any(m.start <= place and place + leaf.nbytes <= m.start + m.size for m in data)
  if leaf.size and not (dense and inside):
    raise UserError(
      f'{what}is scattered over its storage, strides {tensor.stride()}; save tensor.contiguous().'
    )
  return leaf
