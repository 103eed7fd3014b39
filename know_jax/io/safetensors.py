"""safetensors: one file, shards with an index, or a Hugging Face folder with either.

Files are not mapped into memory as the safetensors library does, because every page that it has
touched counts as resident. Format: https://github.com/huggingface/safetensors#format.
"""

import contextlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from know_jax.errors import UserError, os_errors
from know_jax.io.files import replacing
from know_jax.io.weights import (
  Leaf,
  Shard,
  Sink,
  Weights,
  by_path,
  identify_files,
  opener,
  read_json,
  shard_of,
)

DTYPES = {
  'F64': np.dtype(np.float64),
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
  'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
  'F8_E4M3FNUZ': np.dtype(ml_dtypes.float8_e4m3fnuz),
  'F8_E5M2FNUZ': np.dtype(ml_dtypes.float8_e5m2fnuz),
  'C64': np.dtype(np.complex64),
  'I64': np.dtype(np.int64),
  'I32': np.dtype(np.int32),
  'I16': np.dtype(np.int16),
  'I8': np.dtype(np.int8),
  'U64': np.dtype(np.uint64),
  'U32': np.dtype(np.uint32),
  'U16': np.dtype(np.uint16),
  'U8': np.dtype(np.uint8),
  'BOOL': np.dtype(np.bool_),
}
"""The dtypes of safetensors that NumPy has. NumPy's are little-endian wherever JAX runs, as the
format's are."""

INDEX = 'model.safetensors.index.json'

_BITS = {'F8_E8M0': 8, 'F6_E2M3': 6, 'F6_E3M2': 6, 'F4': 4}
"""Dtypes whose tensors can only be copied: scales, and several numbers to a byte."""

_SINGLE = ('model.safetensors', 'adapter_model.safetensors', 'diffusion_pytorch_model.safetensors')
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000


def detect(path: Path) -> bool:
  """Whether a path is a safetensors file, an index, or a folder with either."""
  if path.is_dir():
    return bool(_index_in(path) or any(path.glob('*.safetensors')))
  if path.name.endswith('.index.json'):
    return b'.safetensors"' in path.read_bytes()
  with path.open('rb') as file:
    head = file.read(9)
  return head[8:9] == b'{' and int.from_bytes(head[:8], 'little') <= _MAX_HEADER


def _index_in(folder: Path) -> Path | None:
  result = sorted(folder.glob('*.safetensors.index.json'))
  if folder / INDEX in result or len(result) > 1:
    return folder / INDEX
  return result[0] if result else None


def open(path: Path) -> Weights:
  """Reads the headers of a stage.

  Raises:
    UserError: a file is damaged; a folder has several files and no index.
  """
  if not path.is_dir():
    if path.name.endswith('.json'):
      return _open_index(path, path)
    return _open_files(path, [path], None)
  index = _index_in(path)
  if index is not None:
    return _open_index(index, path)
  files = sorted(path.glob('*.safetensors'))
  known = [path / name for name in _SINGLE if path / name in files]
  if len(files) > 1 and not known:
    raise UserError(
      f'{path} has {len(files)} safetensors files and no {INDEX}; expected an index, or the path '
      'of one file.'
    )
  return _open_files(path, (known or files)[:1], path)


def _open_index(index: Path, given: Path) -> Weights:
  content = read_json(index.read_bytes(), f'{index}')
  weight_map = content.get('weight_map')
  if not isinstance(weight_map, dict) or not weight_map:
    raise UserError(f'{index}: no index of safetensors files: it has no weight_map.')
  files: dict[Path, set[str]] = {}
  for name, file in weight_map.items():
    # A plain name: an index must not lead to files of other folders.
    if not isinstance(file, str) or file in ('', '.', '..') or Path(file).name != file:
      raise UserError(
        f'{index}: tensor {name!r} is said to be in {file!r}; expected the name of a file beside '
        'it.'
      )
    files.setdefault(index.with_name(file), set()).add(name)
  return _open_files(given, sorted(files), index.parent, files, (index.name, content))


def _open_files(
  given: Path,
  files: Sequence[Path],
  home: Path | None,
  expected: Mapping[Path, set[str]] | None = None,
  index: tuple[str, dict[str, Any]] | None = None,
) -> Weights:
  """Files and, where an index says so, the tensors that each must have."""
  leaves: list[Leaf] = []
  metadata: dict[str, str] = {}
  shards, notes = [], []
  for number, file in enumerate(files):
    tensors, of_file = _read_header(file)
    metadata = of_file if number == 0 else metadata
    if expected is not None:
      if missing := sorted(expected[file] - tensors.keys()):
        raise UserError(f'{given}: {file} lacks tensor {missing[0]!r}, which the index has.')
      if extra := sorted(tensors.keys() - expected[file]):
        notes.append(
          f'{file} has tensor {extra[0]!r}'
          + (f' and {len(extra) - 1} more' if len(extra) > 1 else '')
          + ', which the index omits: copied from the newest stage, not predicted.'
        )
      tensors = {name: leaf for name, leaf in tensors.items() if name in expected[file]}
    ordered = sorted(tensors.values(), key=lambda leaf: leaf.place or 0)
    shards.append(shard_of(file, ordered))
    leaves += ordered
  root = files[0].parent
  return Weights(
    given,
    'safetensors',
    by_path(leaves, given),
    tuple(shards),
    lambda: identify_files(root, files),
    metadata,
    home,
    index,
    tuple(notes),
  )


def _read_header(path: Path) -> tuple[dict[str, Leaf], dict[str, str]]:
  """The tensors of a file, whose bytes must fill it without gap or overlap, and its metadata."""
  damaged = f'{path}: not a readable safetensors file: '
  with os_errors(f'cannot read {path}'), path.open('rb') as file:
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
      raise UserError(f'{damaged}it is no plain file.')
    length = int.from_bytes(file.read(8), 'little') if status.st_size >= 8 else 0
    if not 2 <= length <= min(_MAX_HEADER, status.st_size - 8):
      raise UserError(
        f'{damaged}its header is said to have {length} bytes; expected 2 to {_MAX_HEADER}, and '
        f'no more than the {max(status.st_size - 8, 0)} that follow.'
      )
    text = file.read(length)
    if not text.startswith(b'{'):
      raise UserError(f'{damaged}its header begins with {text[:1]!r}; expected an opening brace.')
    header = read_json(text, damaged.removesuffix(': '))
  metadata = header.pop('__metadata__', {})
  if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
    raise UserError(f'{damaged}its __metadata__ is no mapping to strings.')
  places = {name: _place(entry, f'{damaged}tensor {name!r} ') for name, entry in header.items()}
  reached, last = 0, ''
  for name, (_, _, begin, end) in sorted(places.items(), key=lambda item: item[1][2:]):
    if begin != reached:
      raise UserError(
        f'{damaged}tensor {name!r} begins at byte {begin}; expected {reached}, where '
        f'{f"tensor {last!r}" if last else "the header"} ends.'
      )
    reached, last = end, name
  if reached != (data := status.st_size - 8 - length):
    raise UserError(f'{damaged}its tensors take {reached} bytes; found {data}.')
  leaves = {}
  for name, (dtype, shape, begin, _) in places.items():
    place = 8 + length + begin
    leaves[name] = Leaf(name, shape, dtype, opener(path, place, dtype, name), place=place)
  return leaves, metadata


def _place(entry: Any, what: str) -> tuple[np.dtype, tuple[int, ...], int, int]:
  """dtype, shape, begin and end of a tensor."""

  def counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)

  if not isinstance(entry, dict) or not entry.keys() >= {'dtype', 'shape', 'data_offsets'}:
    raise UserError(f'{what}is not described by dtype, shape and data_offsets.')
  dtype, shape, offsets = entry['dtype'], entry['shape'], entry['data_offsets']
  if not isinstance(dtype, str) or dtype not in {*DTYPES, *_BITS}:
    raise UserError(f'{what}has dtype {dtype!r}; expected one of {", ".join((*DTYPES, *_BITS))}.')
  if not counts(shape) or not counts(offsets) or len(offsets) != 2:
    raise UserError(f'{what}has shape {shape!r} and data_offsets {offsets!r}; expected counts.')
  begin, end = offsets
  bits = _BITS[dtype] if dtype in _BITS else 8 * DTYPES[dtype].itemsize
  expected = math.prod(shape) * bits
  if (end - begin) * 8 != expected:
    raise UserError(
      f'{what}has {end - begin} bytes; expected {-(-expected // 8)}, for {dtype}{shape}.'
    )
  if dtype in _BITS:
    return np.dtype('V1'), (end - begin,), begin, end
  return DTYPES[dtype], tuple(shape), begin, end


def rewritten(name: str, leaves: Mapping[str, Leaf], metadata: Mapping[str, str]) -> Shard:
  """A shard that is written from its leaves alone.

  Args:
    name: of the file.
    leaves: path -> leaf, with the dtype that is written.
    metadata: free strings for its header.

  Raises:
    UserError: safetensors has no such dtype; the leaf is named.
  """
  for path, leaf in leaves.items():
    if leaf.dtype not in _NAMES:
      raise UserError(
        f'leaf {path!r} has dtype {leaf.dtype}, which safetensors cannot be written in.'
      )
  # Wide dtypes first, which keeps each tensor aligned; then by name.
  order = sorted(leaves.items(), key=lambda item: (-item[1].dtype.itemsize, item[1].name))

  def writing(path: Path) -> contextlib.AbstractContextManager[Sink]:
    return _writing(path, [leaf for _, leaf in order], metadata)

  return Shard(name, tuple(path for path, _ in order), writing)


@contextlib.contextmanager
def _writing(path: Path, leaves: Sequence[Leaf], metadata: Mapping[str, str]) -> Iterator[Sink]:
  header: dict[str, Any] = {'__metadata__': dict(metadata)} if metadata else {}
  end = 0
  for leaf in leaves:
    offsets, end = [end, end + leaf.nbytes], end + leaf.nbytes
    header[leaf.name] = {
      'dtype': _NAMES[leaf.dtype], 'shape': list(leaf.shape), 'data_offsets': offsets
    }  # fmt: skip
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  with replacing(path) as file, Sink(file) as sink:
    sink.write(len(text).to_bytes(8, 'little') + text)
    yield sink
    if sink.size != 8 + len(text) + end:
      raise AssertionError(f'{path}: {sink.size} bytes written for {8 + len(text) + end}')
