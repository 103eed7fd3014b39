"""Hostile files: whatever a reader is given, it reads it or refuses it by name.

Every input is given to a reader in another process, with bounds on its time and address space: this
file, run as a script, forks once for every batch, so that a crash or a hang is a finding. No input
may make a reader open a file outside the input's own folder; the kernel tells (inotify).
"""

import ast
import base64
import contextlib
import ctypes
import functools
import hashlib
import io
import json
import math
import os
import re
import select
import shutil
import signal
import stat
import struct
import subprocess
import sys
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from know_jax import jsonable
from know_jax.errors import UserError
from know_jax.io import checkpoints, formats, hdf5, journal, sealed
from know_jax.meta import collect, mat, windows
from know_jax.predictors import parameters
from know_jax.runs.record import RunRecord
from know_jax.study import results

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='inotify and limits are of Linux')

SECONDS = 30
"""How long a reader may take for one input, on a busy machine."""

HDF5_SECONDS = 8.0
"""In place of `hdf5.SECONDS`, so that the bound itself is tested."""

MEMORY = 3 * 2**30
"""Address space that a reader may add to what its process has."""

CANARY = b'canary-0123456789abcdef-canary--'

JUNK = (
  None, True, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**30, 1.5, -0.0, 'NaN', 'Infinity', '',
  'x', '../../canary', '/etc/passwd', '\0', '\ud800', 'a' * 5000, [], {}, [[]], [0], [-1],
  [2**63, 0], [2**32, 2**32], {'a': 1}, '<f4', '|O', 'F32', 'keep',
)  # fmt: skip


class Reader(NamedTuple):
  """How a reader is tested.

  Attributes:
    make: writes a good input into a folder.
    read: reads the input there; returns what it read.
    names: what a refusal must name, one of them.
    amend: gives the files the checksums that they state, where an attacker could.
    short: the number of random inputs of the short form.
    long: of the thorough form.
  """

  make: Callable[[Path], None]
  read: Callable[[Path], Any]
  names: tuple[str, ...]
  amend: Callable[[Path], None]
  short: int
  long: int


# -- random changes ------------------------------------------------------------------------------


def changed_bytes(rng: np.random.Generator, data: bytes) -> bytes:
  """A few bytes flipped, set, removed, inserted, or copied from elsewhere."""
  found = bytearray(data or b'\0')
  for _ in range(int(rng.integers(1, 5))):
    size = max(len(found), 1)
    at, other, count = (int(rng.integers(size)) for _ in range(3))
    width = (1, 2, 4, 8)[rng.integers(4)]
    way = rng.integers(7)
    if way == 0 and found:
      found[at] ^= 1 << int(rng.integers(8))
    elif way == 1:
      found[at : at + width] = (b'\xff', b'\0', b'\x80', b'\x7f')[rng.integers(4)] * width
    elif way == 2:
      found[at : at + width] = rng.bytes(width)
    elif way == 3:
      del found[at : at + 1 + count % 64]
    elif way == 4:
      found[at:at] = rng.bytes(width)
    elif way == 5:
      found[at : at + count % 128] = found[other : other + count % 128]
    else:
      del found[at:]
  return bytes(found)


def changed_json(rng: np.random.Generator, value: Any) -> Any:
  """JSON data with one entry, anywhere, replaced, removed or doubled."""
  value = json.loads(json.dumps(value))
  node = value
  while True:
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    if not keys:
      return value
    key = keys[rng.integers(len(keys))]
    if not isinstance(node[key], (dict, list)) or not node[key] or rng.random() < 0.2:
      break
    node = node[key]
  way = rng.integers(6)
  if way == 0:
    del node[key]
  elif way == 1 and isinstance(node, dict):
    node[(*map(str, JUNK), *map(str, keys))[rng.integers(len(JUNK) + len(keys))]] = node[key]
  elif way == 2 and isinstance(node[key], int):
    node[key] = int(node[key]) + int(rng.integers(-2, 3))
  else:
    node[key] = JUNK[rng.integers(len(JUNK))]
  return value


def changed_file(rng: np.random.Generator, path: Path) -> None:
  """One file changed, in its bytes or, where it has them, its header or its JSON."""
  data = path.read_bytes()
  if rng.random() < 0.6:
    with contextlib.suppress(ValueError, KeyError, IndexError, struct.error):
      if path.suffix == '.json' or path.name in ('_METADATA', '_CHECKPOINT_METADATA'):
        path.write_text(json.dumps(changed_json(rng, json.loads(data)), indent=1) + '\n')
        return
      if path.suffix == '.safetensors':
        header, body = split_safetensors(data)
        path.write_bytes(join_safetensors(json.dumps(changed_json(rng, header)), body))
        return
      if is_ocdbt(data):
        path.write_bytes(join_ocdbt(changed_bytes(rng, split_ocdbt(data))))
        return
  path.write_bytes(changed_bytes(rng, data))


# -- safetensors ---------------------------------------------------------------------------------


def split_safetensors(data: bytes) -> tuple[dict[str, Any], bytes]:
  (size,) = struct.unpack('<Q', data[:8])
  return json.loads(data[8 : 8 + size]), data[8 + size :]


def join_safetensors(header: str | bytes, body: bytes, size: int | None = None) -> bytes:
  text = header.encode('utf-8', 'surrogatepass') if isinstance(header, str) else header
  return struct.pack('<Q', len(text) if size is None else size) + text + body


def crafted_headers(data: bytes) -> Iterator[tuple[str, bytes]]:
  """Name -> a hostile safetensors file, from a good one."""
  header, body = split_safetensors(data)
  first, second = [name for name in header if name != '__metadata__'][:2]

  def tensor(**changes: Any) -> bytes:
    return join_safetensors(json.dumps(header | {first: header[first] | changes}), body)

  for size in (0, 1, len(data), 2**26, 100_000_001, 2**31, 2**32, 2**63, 2**64 - 1, 2**64 - 8):
    yield f'header of {size} bytes', join_safetensors(json.dumps(header), body, size)
  start, end = header[first]['data_offsets']
  offsets = ([end, start], [start, end + 4], [start, end - 4], [-1, end], [start, 2**64 - 1])
  offsets += ([2**63, 2**63 + 4], [start, 2**64 + end], header[second]['data_offsets'], [0], [])
  offsets += ([start, end, end], [0.5, 1.5], ['0', '4'], None, [len(body), len(body) + 4])
  for found in offsets:
    yield f'offsets {found}', tensor(data_offsets=found)
  shapes = ([2**32, 2**32], [2**63, 2], [2**64 - 1, 2**64 - 1], [-1], [2**62], [0], [2**63, 0], [])
  shapes += ([1] * 100, [1] * 10000, None, 'x', [1.0], [[1]], [2**64], [0, 2**64 - 1, 2**64 - 1])
  for shape in shapes:
    yield f'shape {str(shape)[:40]}', tensor(shape=shape)
    empty = {'dtype': 'F32', 'shape': shape, 'data_offsets': [len(body), len(body)]}
    yield (
      f'no bytes of shape {str(shape)[:40]}',
      join_safetensors(json.dumps(header | {'x': empty}), body),
    )
  dtypes = ('BOOL', 'U8', 'F8_E4M3', 'F8_E5M2', 'F8_E8M0', 'F4', 'F6_E2M3', 'BF16', 'F16', 'F64')
  for dtype in (*dtypes, 'C64', 'I64', 'O', 'f32', '', None, 4):
    yield f'dtype {dtype}', tensor(dtype=dtype)
    wide = {'dtype': dtype, 'shape': [2], 'data_offsets': [len(body), len(body) + 16]}
    yield (
      f'a tensor of dtype {dtype}',
      join_safetensors(json.dumps(header | {'x': wide}), body + bytes(16)),
    )
  for name in (
    '../../canary',
    '/etc/passwd',
    'a\0b',
    '',
    '\ud800',
    'conv',
    'conv/',
    '/',
    'é' * 999,
  ):
    moved = {key: value for key, value in header.items() if key != first}
    yield f'name {name!a}'[:40], join_safetensors(json.dumps(moved | {name: header[first]}), body)
  metadata = (
    None,
    [],
    {},
    'x',
    {'format': 1},
    {'format': None},
    {'format': 'x' * 10**6},
    {'a': {}},
  )
  for found in metadata:
    yield (
      f'metadata {str(found)[:40]}',
      join_safetensors(json.dumps(header | {'__metadata__': found}), body),
    )
  for card in ('', '[]', '3', '{', '[' * 10**5, '{"a":' * 10**5, '"\\ud800"', 'NaN', '9' * 5000):
    changed = header['__metadata__'] | {'card': card}
    changed.pop('sha256', None)
    yield (
      f'card {card[:40]}',
      join_safetensors(json.dumps(header | {'__metadata__': changed}), body),
    )
  text = json.dumps(header)
  double = f'{{{json.dumps(first)}: {json.dumps(header[second])}, {text[1:]}'
  yield 'a name twice', join_safetensors(double, body)
  yield 'metadata twice', join_safetensors('{"__metadata__": {}, ' + text[1:], body)
  for deep in ('[' * 10**6, '{"a":' * 10**5, '[' * 1000 + ']' * 1000, '{"x": ' + '[' * 200):
    yield f'nested {deep[:10]}', join_safetensors(deep, body)
  for other in ('', '[]', 'null', '3', '"x"', '\ufeff' + text, text + 'x', text.replace('"', "'")):
    yield f'header {other[:10]}', join_safetensors(other, body)
  yield 'another encoding', join_safetensors(text.encode('utf-16'), body)
  yield 'no valid text', join_safetensors(b'\xff\xfe' + text.encode(), body)
  yield 'no tensors', join_safetensors(json.dumps({'__metadata__': header['__metadata__']}), b'')
  yield 'a hole', join_safetensors(text, body + bytes(64))
  many = {f'n{i}': {'dtype': 'F32', 'shape': [0], 'data_offsets': [0, 0]} for i in range(10**4)}
  yield 'many tensors', join_safetensors(json.dumps(header | many), body)
  yield 'nothing', b''


# -- OCDBT, the format of Orbax's files ----------------------------------------------------------


@functools.cache
def crc_table() -> list[int]:
  table = []
  for byte in range(256):
    for _ in range(8):
      byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    table.append(byte)
  return table


def crc32c(data: bytes) -> int:
  found = 0xFFFFFFFF
  for byte in data:
    found = crc_table()[(found ^ byte) & 255] ^ found >> 8
  return found ^ 0xFFFFFFFF


def is_ocdbt(data: bytes) -> bool:
  """Whether it is a manifest or a node: magic number, length, version 0, zstd, body, CRC-32C."""
  magics = (b'\x0c\xdb\x3a\x2a', b'\x0c\xdb\x20\xde', b'\x0c\xdb\x1e\xcb')
  return data[:4] in magics and struct.unpack('<Q', data[4:12])[0] == len(data)


OCDBT_MAGIC: list[bytes] = []  # Of the file that was split last.


def split_ocdbt(data: bytes) -> bytes:
  imagecodecs = pytest.importorskip('imagecodecs')
  OCDBT_MAGIC[:] = [data[:4]]
  return imagecodecs.zstd_decode(data[14:-4])


def join_ocdbt(body: bytes) -> bytes:
  imagecodecs = pytest.importorskip('imagecodecs')
  packed = imagecodecs.zstd_encode(body, 0)
  head = OCDBT_MAGIC[0] + struct.pack('<Q', 14 + len(packed) + 4) + b'\0\1'
  return head + packed + struct.pack('<I', crc32c(head + packed))


# -- the readers and their good inputs -----------------------------------------------------------


def make_known(folder: Path) -> None:
  # Without its checksum, as older files are, so that what is behind the checksum is met too.
  header, body = split_safetensors(parameters.SHIPPED['known_leaf'].read_bytes())
  header['__metadata__'].pop('sha256', None)
  (folder / 'known.safetensors').write_bytes(join_safetensors(json.dumps(header), body))


def read_known(folder: Path) -> Any:
  path = folder / 'known.safetensors'
  return parameters.load_known(path), parameters.read_card(path)


def make_keras(folder: Path) -> None:
  import h5py

  rng = np.random.default_rng(0)
  for name in parameters._KERAS_FILES.values():
    with h5py.File(folder / name, 'w') as file:
      for path, shape in parameters.paper_shapes(5).items():
        layer, _, what = path.rpartition('/')
        keras = parameters._KERAS_LAYERS[layer]
        file[f'{keras}/{keras}/{what}:0'] = rng.normal(size=shape).astype(np.float32)


def read_keras(folder: Path) -> Any:
  return parameters.load_known(folder)


MAT = 'cnn_mnist_r0.5.mat'


def make_mat(folder: Path, **options: Any) -> None:
  import h5py

  rng = np.random.default_rng(0)
  shapes = {'ConvWeights': (7, 5, 3, 3), 'FCWeights': (7, 40), 'Bias': (7, 6)}
  options = {'compression': 'gzip', 'shuffle': True, 'fletcher32': True} | options
  with h5py.File(folder / MAT, 'w', userblock_size=512) as file:
    for name, shape in shapes.items():
      data = file.create_dataset(name, data=rng.normal(size=shape).astype(np.float32), **options)
      data.attrs['MATLAB_class'] = np.bytes_('single')
  with (folder / MAT).open('r+b') as file:
    file.write(b'MATLAB 7.3 MAT-file, Platform: GLNXA64'.ljust(126) + b'\x00\x02IM')


def read_mat(folder: Path) -> Any:
  run = mat.read_mat(folder / MAT)
  return run.weights, windows.sample_windows([run], 4, 0).weights


def make_runs(folder: Path) -> None:
  import safetensors.numpy

  (folder / 'runs').mkdir()
  shapes = {'a/kernel': (7, 3, 3, 1, 2), 'b/kernel': (7, 4, 2), 'b/bias': (7, 2)}
  for number in range(2):
    rng = np.random.default_rng(number)
    weights = {name: rng.normal(size=shape).astype('f') for name, shape in shapes.items()}
    data = safetensors.numpy.save(weights, {'format': collect.FORMAT})
    path = folder / 'runs' / f'{number:05d}.json'
    path.with_suffix('.safetensors').write_bytes(data)
    about = {
      'format': collect.FORMAT,
      'number': number,
      'config': {'model': 'cnn', 'dataset': 'digits', 'rate': 0.5, 'stages': 7},
      'kinds': {'a/kernel': 'conv', 'b/kernel': 'fc', 'b/bias': 'bias'},
      'shapes': {name: list(shape) for name, shape in shapes.items()},
      'stages': [{'test_accuracy': 1.0 - 0.1 * stage, 'test_loss': 1.0} for stage in range(7)],
      'pretrain_loss': {'first': 2.0, 'before': 0.5, 'end': 0.4},
      'parameters': 28,
      'weights_sha256': hashlib.sha256(data).hexdigest(),
    }
    sealed.write_sealed(path, about)


def reseal(path: Path, change: Callable[[dict[str, Any]], None] = lambda content: None) -> None:
  """Gives a file, if it is one of JSON still, the checksum of its content."""

  if path.is_symlink() or not path.is_file():
    return
  if path.stat().st_size > 2**30:
    return
  with contextlib.suppress(ValueError, RecursionError, AttributeError, TypeError, KeyError):
    content = json.loads(path.read_bytes())
    content.pop('sha256', None)
    change(content)
    sealed.write_sealed(path, jsonable.restored(content))


def amend_runs(folder: Path) -> None:
  for path in (folder / 'runs').glob('*.json'):
    weights = path.with_suffix('.safetensors')
    readable = weights.is_file() and weights.stat().st_size < 2**30
    digest = hashlib.sha256(weights.read_bytes() if readable else b'').hexdigest()
    reseal(path, lambda about, digest=digest: about.update(weights_sha256=digest))


def read_runs(folder: Path) -> Any:
  runs = list(collect.read_runs(folder))
  collect.summary_of([run.about for run in runs])
  return [run.weights for run in runs], windows.sample_windows(runs, 4, 0).weights


def make_checkpoint(folder: Path) -> None:
  rng = np.random.default_rng(0)
  tree = {'params': {'w': rng.normal(size=(40, 100)), 'b': np.ones(4, 'f')}, 'step': np.int32(3)}
  checkpoints.save(folder / 'c', tree, metadata={'accuracy': 0.5})


def amend_checkpoint(folder: Path) -> None:
  import tensorstore as ts

  home = folder / 'c'
  nodes = list((home / 'weights' / 'd').glob('*'))
  with contextlib.suppress(Exception):  # A manifest that cannot be read is left as it is.
    base = ts.KvStore.open({'driver': 'file', 'path': f'{home}/weights/'}).result()
    found = ts.ocdbt.dump(base).result()
    root = found['versions'][0]['root']
    sort, base_path, file, start, _ = root['location'].split(':')
    if len(nodes) == 1 and start == '0' and not base_path:
      length = nodes[0].stat().st_size
      root['location'] = f'{sort}:{base_path}:{file}:0:{length}'
      (home / 'weights' / 'manifest.ocdbt').write_bytes(ts.ocdbt.undump_manifest(found))
  (home / 'manifest.json').rename(folder / 'manifest.json')
  if all(stat.S_ISREG(s.st_mode) and s.st_size < 2**30 for _, s in checkpoints._walk(home)):
    files = checkpoints._checksums(home)
    reseal(folder / 'manifest.json', lambda content: content.update(files=files))
  (folder / 'manifest.json').rename(home / 'manifest.json')


def read_checkpoint(folder: Path) -> Any:
  checkpoints.weights_digest(folder / 'c')
  return checkpoints.restore(folder / 'c'), checkpoints.read_metadata(folder / 'c')


def make_record(folder: Path) -> None:
  RunRecord.open(folder, {'seed': 0, 'rates': [0.5, 1.0], 'deep': {'a': None}}, kind='forget')


def read_record(folder: Path) -> Any:
  record = RunRecord.read(folder, 'forget')
  return [dict(record['config']), dict(record['environment']), list(record['resumed_in'])]


def make_lines(folder: Path) -> None:
  for number in range(4):
    journal.append_line(
      folder / 'rows.jsonl', {'key': f'k{number}', 'loss': float('nan'), 'n': [1]}
    )


def read_lines(folder: Path) -> Any:
  journal.Journal(folder / 'rows.jsonl').get('k1')
  return journal.read_lines(folder / 'rows.jsonl')


def make_table(folder: Path) -> None:
  row = {name: kind(3) for name, kind in results.COLUMNS.items()} | {'curve': '0:0.1 5:0.25'}
  results.write_table(folder / 'results.csv', results.COLUMNS, [row, row | {'loss': None}])


def read_table(folder: Path) -> Any:
  return results.read_table(folder / 'results.csv', results.COLUMNS)


def make_weights(suffix: str, folder: Path) -> None:
  """A stage of a history in files."""
  rng = np.random.default_rng(0)
  tree = {'a': {'kernel': rng.normal(size=(7, 6)).astype('f'), 'bias': np.ones(6, 'f')}}
  path = folder / f'weights.{suffix}'
  if suffix == 'safetensors':
    import safetensors.numpy

    named = {f'a.{name}': leaf for name, leaf in tree['a'].items()}
    path.write_bytes(safetensors.numpy.save(named, {'format': 'pt'}))
  elif suffix == 'npz':
    np.savez(path, **tree['a'])
  elif suffix == 'eqx':
    with path.open('wb') as file:
      for leaf in tree['a'].values():
        np.save(file, leaf)
  elif suffix == 'msgpack':
    import flax.serialization

    path.write_bytes(flax.serialization.to_bytes(tree))
  else:
    import h5py

    with h5py.File(path, 'w') as file:
      for name, leaf in tree['a'].items():
        file[f'layers/dense/{name}'] = leaf


def read_weights(folder: Path) -> Any:
  (path,) = folder.glob('weights.*')
  found = {}
  weights = formats.open_weights(path)
  for name, leaf in weights.leaves.items():
    with leaf.open(folder) as reader:
      found[name] = reader.read(0, leaf.size)
  return found, weights.metadata, weights.identify()


def leave(folder: Path) -> None:
  """There is nothing to amend."""


READERS = {
  'known_leaf': Reader(make_known, read_known, ('known.safetensors',), leave, 15, 2500),
  'keras': Reader(make_keras, read_keras, ('KNOWN_', 'in'), leave, 1, 40),
  'mat': Reader(make_mat, read_mat, (MAT,), leave, 1, 120),
  'runs': Reader(make_runs, read_runs, ('0000', 'run 0', 'run 1'), amend_runs, 15, 2500),
  'checkpoint': Reader(make_checkpoint, read_checkpoint, ('in/c',), amend_checkpoint, 8, 800),
  'record': Reader(
    make_record, read_record, ('record.json', 'kind'), lambda f: reseal(f / 'record.json'), 15, 2000
  ),
  'lines': Reader(make_lines, read_lines, ('rows.jsonl',), leave, 15, 2000),
  'table': Reader(make_table, read_table, ('results.csv',), leave, 15, 2000),
  **{
    suffix: Reader(
      functools.partial(make_weights, suffix), read_weights, ('weights.',), leave, short, long
    )
    for suffix, short, long in (
      ('safetensors', 15, 2500), ('npz', 15, 2500), ('eqx', 15, 2500),
      ('msgpack', 15, 2500), ('h5', 1, 40),
    )
  },
}  # fmt: skip


# -- crafted inputs ------------------------------------------------------------------------------

Change = Callable[[Path], Any]


def outside(folder: Path) -> Path:
  """The folder beside an input's own, which no reader may look into."""
  return folder.parent / 'outside'


def make_outside(folder: Path) -> None:
  """Files that a hostile input may lead to; they would be readable if they were opened."""
  import h5py

  folder.mkdir()
  (folder / 'canary').write_bytes(CANARY * 64)
  values = np.frombuffer(CANARY * 64, '<f4')
  with h5py.File(folder / 'canary.h5', 'w') as file:
    file['mat'] = values[:42].reshape(7, 6)
    file['keras'] = values[:64]


def crafted(name: str, good: Path) -> dict[str, Change]:
  """What is done to a copy of a good input: name -> function of the folder."""
  return {
    'known_leaf': crafted_known,
    'keras': functools.partial(crafted_hdf5, _in_keras, 'keras', (64,)),
    'mat': functools.partial(crafted_hdf5, _in_mat, 'mat', (7, 6)),
    'runs': crafted_runs,
    'checkpoint': crafted_checkpoint,
    'record': functools.partial(crafted_text, 'record.json'),
    'lines': functools.partial(crafted_text, 'rows.jsonl'),
    'table': functools.partial(crafted_text, 'results.csv'),
    'safetensors': functools.partial(crafted_weights, 'weights.safetensors'),
    'npz': functools.partial(crafted_weights, 'weights.npz'),
    'eqx': functools.partial(crafted_weights, 'weights.eqx'),
    'msgpack': functools.partial(crafted_weights, 'weights.msgpack'),
    'h5': functools.partial(crafted_hdf5, _in_weights, 'mat', (7, 6)),
  }[name](good)


def writes(path: str, data: bytes) -> Change:
  return lambda folder: (folder / path).write_bytes(data)


def crafted_known(good: Path) -> dict[str, Change]:
  path = 'known.safetensors'
  data = (good / path).read_bytes()
  return {name: writes(path, found) for name, found in crafted_headers(data)} | {
    'a link loop': functools.partial(replaced_by_link, path, path),
    'a pipe': functools.partial(replaced_by_pipe, path),
    'a large file': functools.partial(lengthened, path),
  }


def crafted_weights(path: str, good: Path) -> dict[str, Change]:
  data = (good / path).read_bytes()
  found = {
    'a link loop': functools.partial(replaced_by_link, path, path),
    'a pipe': functools.partial(replaced_by_pipe, path),
    'a large file': functools.partial(lengthened, path),
    'nothing': writes(path, b''),
    'twice': writes(path, data + data),
  }
  if path.endswith('safetensors'):
    found |= {name: writes(path, hostile) for name, hostile in crafted_headers(data)}
  elif path.endswith('msgpack'):
    deep = (
      b'\x81\xa1a' * 10**5,
      b'\x81\xa1a' + b'\x91' * 10**5,
      b'\x81\xa1a' + b'\xdd\xff\xff\xff\xff',
    )
    hostile = [b'\x81\xa1a' + size for size in (b'\xc9\xff\xff\xff\xff\1', b'\xc6\xff\xff\xff\xff')]
    found |= {f'hostile {i}': writes(path, data) for i, data in enumerate((*deep, *hostile))}
  elif path.endswith('eqx'):
    objects = io.BytesIO()
    np.save(objects, np.array([{}, []], object))
    found['objects'] = writes(path, data + objects.getvalue())
    found['many axes'] = writes(path, data.replace(b'(7, 6)', b'(7, 6,' + b'1,' * 10))
    found['a large shape'] = writes(path, data.replace(b'(7, 6)', b'(9**9,'))
  else:
    for name, change in {
      'objects': lambda: {'a': np.array([{}, []], object)},
      'records': lambda: {'a': np.zeros(3, [('x', 'f4'), ('y', 'O')])},
      'a path': lambda: {'../../outside/canary': np.zeros(3, 'f')},
    }.items():
      packed = io.BytesIO()
      np.savez(packed, **change())
      found[name] = writes(path, packed.getvalue())
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, 'w', zipfile.ZIP_DEFLATED) as archive:
      archive.writestr('a.npy', np.zeros(1, 'f').tobytes() + bytes(2**28))
    found['a bomb'] = writes(path, bomb.getvalue())
  return found


def _in_weights(folder: Path) -> tuple[Path, str]:
  return folder / 'weights.h5', 'layers/dense/kernel'


def replaced_by_link(path: str, target: str, folder: Path) -> None:
  """`target` is relative to the folder; what was there is moved outside if it leads there."""
  (folder / path).unlink()
  (folder / path).symlink_to(folder / target)


def moved_outside(path: str, folder: Path) -> None:
  """The file is as it was, but stands outside, and a link in its place."""
  target = outside(folder) / 'moved'
  target.unlink(missing_ok=True)
  (folder / path).rename(target)
  (folder / path).symlink_to(target)


def replaced_by_pipe(path: str, folder: Path) -> None:
  (folder / path).unlink()
  os.mkfifo(folder / path)


def lengthened(path: str, folder: Path) -> None:
  """A file of 4 TB, of which the disk holds but the beginning."""
  os.truncate(folder / path, 2**42)


def crafted_text(path: str, good: Path) -> dict[str, Change]:
  text = (good / path).read_bytes()
  deep = {f'nested {n}': b'{"key": ' + b'[' * n + b']' * n + b'}\n' for n in (400, 600, 990, 10**5)}
  deep |= {f'dicts {n}': b'{"key": ' * n + b'1' + b'}' * n + b'\n' for n in (400, 600, 990, 10**5)}
  found = deep | {
    'long integer': b'{"key": ' + b'9' * 10**5 + b'}\n',
    'large number': b'{"key": 1e999}\n',
    'utf-16': text.decode().encode('utf-16'),
    'no text': b'\xff\xfe\xfd' + text,
    'surrogate': b'{"key": "\\ud800"}\n',
    'NUL': text.replace(b'3', b'\0').replace(b'1', b'\0'),
    'carriage returns': text.replace(b'\n', b'\r'),
    'long cell': b'"' + b'x' * 200_000,
    'long lines': text.replace(b'3', b'3' * 200_000),
    'no key': b'{}\n',
    'list as key': b'{"key": [1]}\n',
    'nothing': b'',
    'blank': b'\n\n\n',
    'BOM': b'\xef\xbb\xbf' + text,
    'number': b'3\n',
    'curves': text.replace(b'0:0.1', b'0:0.1:2'),
    'curve of words': text.replace(b'0:0.1', b'a b c'),
  }
  return {name: writes(path, data) for name, data in found.items()} | {
    'a link to itself': functools.partial(replaced_by_link, path, path),
    'a pipe': functools.partial(replaced_by_pipe, path),
    'a folder': lambda folder: ((folder / path).unlink(), (folder / path).mkdir()),
    # A record that lies elsewhere is refused; other lines and tables may.
    **({'a link': functools.partial(moved_outside, path)} if path == 'record.json' else {}),
  }


def crafted_runs(good: Path) -> dict[str, Change]:
  path, about = 'runs/00000.safetensors', 'runs/00000.json'
  header, body = split_safetensors((good / path).read_bytes())
  data = join_safetensors(json.dumps(header | {'__metadata__': {'format': 'x'}}), body)
  found = {name: writes(path, hostile) for name, hostile in crafted_headers(data)}

  def edited(change: Callable[[dict[str, Any]], Any]) -> Change:
    return lambda folder: reseal(folder / about, change)

  return found | {
    'weights by a link': functools.partial(moved_outside, path),
    'JSON by a link': functools.partial(moved_outside, about),
    'a pipe': functools.partial(replaced_by_pipe, path),
    'a piped JSON': functools.partial(replaced_by_pipe, about),
    'a large JSON': functools.partial(lengthened, about),
    'large weights': functools.partial(lengthened, path),
    'a path for a number': edited(lambda a: a.update(number='../../outside/canary')),
    'a rate beyond': edited(lambda a: a['config'].update(rate=1e9)),
    'no number': edited(lambda a: a.pop('number')),
    'no kinds': edited(lambda a: a.pop('kinds')),
    'other kinds': edited(lambda a: a.update(kinds={})),
    'kinds in a list': edited(lambda a: a.update(kinds=['conv', 'fc', 'bias'])),
    'fewer stages': edited(lambda a: a['stages'].pop()),
    'no config': edited(lambda a: a.update(config=None)),
    'diverged': edited(lambda a: a.update(diverged=3)),
  }


def _in_mat(folder: Path) -> tuple[Path, str]:
  return folder / MAT, 'Bias'


def _in_keras(folder: Path) -> tuple[Path, str]:
  return folder / 'KNOWN_FC.h5', 'dense/dense/bias:0'


def crafted_hdf5(
  place: Callable[[Path], tuple[Path, str]], canary: str, shape: tuple[int, ...], good: Path
) -> dict[str, Change]:
  """One data set of a file replaced by something else."""
  import h5py

  def create(*args: Any, **options: Any) -> Callable[[Any, str, Path], Any]:
    return lambda file, name, there: file.create_dataset(name, *args, **options)

  def virtual(file: Any, name: str, there: Path) -> None:
    layout = h5py.VirtualLayout(shape, 'f4')
    layout[:] = h5py.VirtualSource(there / 'canary.h5', canary, shape)
    file.create_virtual_dataset(name, layout)

  def link(target: Any) -> Callable[[Any, str, Path], Any]:
    return lambda file, name, there: file.__setitem__(name, target(there))

  def soft_in_path(file: Any, name: str, there: Path) -> None:
    top = name.split('/')[0]
    file.move(top, 'elsewhere')
    file[top] = h5py.SoftLink('/elsewhere')

  def filtered(number: int, flags: int) -> Callable[[Any, str, Path], Any]:
    def make(file: Any, name: str, there: Path) -> None:
      plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
      plist.set_chunk(shape)
      with contextlib.suppress(ValueError, RuntimeError):
        plist.set_filter(number, flags, (1, 2, 3))
      space = h5py.h5s.create_simple(shape)
      group, _, leaf = name.rpartition('/')
      with contextlib.suppress(ValueError, RuntimeError, OSError):
        found = h5py.h5d.create(
          file[group or '/'].id, leaf.encode(), h5py.h5t.IEEE_F32LE, space, plist
        )
        found.write_direct_chunk(
          (0,) * len(shape), np.linspace(0, 1, math.prod(shape), dtype='<f4').tobytes()
        )

    return make

  def garbage(file: Any, name: str, there: Path) -> None:
    data = file.create_dataset(name, shape, 'f4', chunks=shape, compression='gzip')
    data.id.write_direct_chunk((0,) * len(shape), b'\x78\x9c' + bytes(range(256)))

  def bomb(file: Any, name: str, there: Path) -> None:
    import zlib

    data = file.create_dataset(name, shape, 'f4', chunks=shape, compression='gzip')
    data.id.write_direct_chunk((0,) * len(shape), zlib.compress(bytes(2**28), 9))

  def cycle(file: Any, name: str, there: Path) -> None:
    group = file.create_group(name)
    group['self'] = group

  def odd_float(file: Any, name: str, there: Path) -> None:
    sort = h5py.h5t.IEEE_F32LE.copy()
    sort.set_fields(31, 1, 2, 3, 28)
    space = h5py.h5s.create_simple(shape)
    group, _, leaf = name.rpartition('/')
    h5py.h5d.create(file[group or '/'].id, leaf.encode(), sort, space)

  wide = (*shape[:-1], 2**50)
  ways: dict[str, Callable[[Any, str, Path], Any]] = {
    'nothing': lambda file, name, there: None,
    'a soft link': link(lambda there: h5py.SoftLink('/dense_1/dense_1/bias:0')),
    'a soft link to itself': lambda file, name, there: file.__setitem__(
      name, h5py.SoftLink(f'/{name}')
    ),
    'a soft link on the way': soft_in_path,
    'an external link': link(lambda there: h5py.ExternalLink(there / 'canary.h5', canary)),
    'a relative external link': link(
      lambda there: h5py.ExternalLink('../outside/canary.h5', canary)
    ),
    'external storage': lambda file, name, there: file.create_dataset(
      name, shape, 'f4', external=[(there / 'canary', 0, 4096)]
    ),
    'virtual': virtual,
    'a petabyte': create(wide, 'f4', chunks=(*[1] * (len(shape) - 1), 1024)),
    'a petabyte, compressed': create(
      wide, 'f4', chunks=(*[1] * (len(shape) - 1), 1024), compression='gzip'
    ),
    'large chunks': create(
      shape, 'f4', chunks=(*[1] * (len(shape) - 1), 2**29), maxshape=(*shape[:-1], None)
    ),
    'a large scale': create((2**22,), 'f8', chunks=(2**22,), compression='gzip', fillvalue=np.nan),
    'many axes': create((1,) * 32, 'f4'),
    'references': create(shape, h5py.ref_dtype),
    'regions': create(shape, h5py.regionref_dtype),
    'compound': create(shape, np.dtype([('r', '<f4'), ('i', '<f4')])),
    'rows of any length': create(shape, h5py.vlen_dtype(np.float32)),
    'strings': create(shape, h5py.string_dtype()),
    'opaque': create(shape, np.dtype('V4')),
    'enum': create(shape, h5py.enum_dtype({'a': 1})),
    'long double': create(shape, np.longdouble),
    'an array type': create(shape, np.dtype(('<f4', (3,)))),
    'odd floats': odd_float,
    'no space': create(shape=None, dtype='f4'),
    'a scalar': create(data=np.float32(3)),
    'NaN that is nowhere stored': create(shape, 'f4', fillvalue=np.nan),
    'a group': lambda file, name, there: file.create_group(name),
    'a cycle': cycle,
    'a type': lambda file, name, there: file.__setitem__(name, np.dtype('<f4')),
    'no deflate stream': garbage,
    'a deflate bomb': bomb,
    'scale and offset': create(data=np.ones(shape, 'f4'), scaleoffset=2),
  }
  for number in (1, 2, 3, 4, 5, 6, 307, 32015, 65535):
    ways[f'filter {number}'] = filtered(number, h5py.h5z.FLAG_OPTIONAL)

  def change(way: Callable[[Any, str, Path], Any], folder: Path) -> None:
    path, name = place(folder)
    with h5py.File(path, 'r+') as file:
      if way is not soft_in_path:
        del file[name]
      way(file, name, outside(folder))

  found: dict[str, Change] = {name: functools.partial(change, w) for name, w in ways.items()}
  found |= {
    'a text': lambda folder: place(folder)[0].write_bytes(b'#!/bin/sh\n' * 99),
    'a pickle': lambda folder: place(folder)[0].write_bytes(b'\x80\x04cos\nsystem\n(S"x"\ntR.'),
    'a folder': lambda folder: (place(folder)[0].unlink(), place(folder)[0].mkdir()),
    'a pipe': lambda folder: (place(folder)[0].unlink(), os.mkfifo(place(folder)[0])),
  }
  return found


# -- crafted checkpoints -------------------------------------------------------------------------


def crafted_checkpoint(good: Path) -> dict[str, Change]:
  def values(change: Callable[[str, Path], Any]) -> Change:
    """Something done to the largest file, which holds the leaves' values."""

    def apply(folder: Path) -> None:
      found = max((folder / 'c').rglob('d/*'), key=lambda path: path.stat().st_size)
      change(found.relative_to(folder).as_posix(), folder)

    return apply

  def described(change: Callable[[dict[str, Any]], Any]) -> Change:
    def apply(folder: Path) -> None:
      path = folder / 'c' / 'weights' / '_METADATA'
      found = json.loads(path.read_text())
      change(found)
      path.write_text(json.dumps(found))

    return apply

  def leaf(**values: Any) -> Change:
    return described(lambda m: m['tree_metadata']["('step',)"]['value_metadata'].update(values))

  def key(value: Any, sort: int = 2) -> Change:
    """The leaf `step` by another key, in the manifest as well."""

    def apply(folder: Path) -> None:
      described(
        lambda m: m['tree_metadata']["('step',)"].update(
          key_metadata=[{'key': value, 'key_type': sort}]
        )
      )(folder)
      described(
        lambda m: m['tree_metadata'].update({f'({value!r},)': m['tree_metadata'].pop("('step',)")})
      )(folder)
      edit_leaves(folder, lambda leaves: leaves.update({str(value): leaves.pop('step')}))

    return apply

  def chunks(**changes: Any) -> Change:
    return lambda folder: store(folder, 'params.b', changes, {})

  def shaped(shape: list[int], chunk: list[int], **changes: Any) -> Change:
    """A leaf of another shape, in the manifest as well, of whose chunks none is there."""

    def apply(folder: Path) -> None:
      described(lambda m: m.update(store_array_data_equal_to_fill_value=False))(folder)
      zarr = {'shape': shape, 'chunks': chunk, 'fill_value': 0.0} | changes
      store(folder, 'params.b', zarr, {'params.b/0': None})
      edit_leaves(folder, lambda leaves: leaves['params/b'].update(shape=shape))

    return apply

  def no_ocdbt(name: str) -> Change:
    """Files of zarr without a database around them, named by the leaf's key."""

    def apply(folder: Path) -> None:
      described(lambda m: m.update(use_ocdbt=False))(folder)
      key(name)(folder)
      target = folder / 'c' / 'weights' / name
      if '\0' not in name:
        target.mkdir(parents=True, exist_ok=True)
        zarr = {'chunks': [], 'compressor': None, 'dtype': '<i4', 'fill_value': None}
        zarr |= {'filters': None, 'order': 'C', 'shape': [], 'zarr_format': 2}
        (target / '.zarray').write_text(json.dumps(zarr))
        (target / '0').write_bytes(np.int32(3).tobytes())

    return apply

  found: dict[str, Change] = {
    'the manifest by a link': functools.partial(moved_outside, 'c/manifest.json'),
    'the description by a link': functools.partial(moved_outside, 'c/weights/_METADATA'),
    'values by a link': values(moved_outside),
    'all weights by a link': functools.partial(moved_outside, 'c/weights'),
    'a folder by a link': functools.partial(moved_outside, 'c/weights/ocdbt.process_0'),
    'a pipe': values(replaced_by_pipe),
    'a file of 4 TB': values(lengthened),
    'a file of 4 TB, and a manifest that says so': values(stated_long),
    'the tree elsewhere': functools.partial(root_elsewhere, '../../outside/', 'd/{}'),
    'the tree elsewhere, by its file': functools.partial(root_elsewhere, '', '../../outside/d/{}'),
    'the tree elsewhere, absolute': functools.partial(root_elsewhere, '/', '{absolute}'),
    'values elsewhere': values_elsewhere,
    'the tree in itself': tree_in_itself,
    'huge node': functools.partial(edit_root, lambda root: root.update(root_height=200)),
    'counts': functools.partial(
      edit_root, lambda root: root['root']['statistics'].update(num_keys=2**62)
    ),
    'huge chunks': chunks(chunks=[2**40]),
    'huger chunks': chunks(chunks=[2**62]),
    'chunks beyond': chunks(chunks=[2**63]),
    'no chunks': chunks(chunks=[0]),
    'another shape': chunks(shape=[2**40]),
    'negative shape': chunks(shape=[-1]),
    'other axes': chunks(shape=[4, 1], chunks=[4, 1]),
    'structured': chunks(dtype=[['a', '<f4'], ['b', '<f4']]),
    'objects': chunks(dtype='|O'),
    'strings': chunks(dtype='<U4'),
    'big-endian': chunks(dtype='>f4'),
    'other compressor': chunks(compressor={'id': 'blosc', 'cname': 'lz4', 'clevel': 1}),
    'compressor that is not': chunks(compressor={'id': 'pickle'}),
    'filters': chunks(filters=[{'id': 'pickle'}]),
    'zarr of another version': chunks(zarr_format=3),
    'separator': chunks(dimension_separator='/../'),
    'a leaf of 4 PB': shaped([2**50], [4]),
    'a leaf of 4 PB in one chunk': shaped([2**50], [2**50]),
    'a leaf of 2**64 numbers': shaped([2**32, 2**32], [1, 1]),
    'a leaf of a billion chunks': shaped([2**30], [1]),
    'a leaf of a billion chunks of one axis': shaped([2**15, 2**15], [1, 1]),
    'a chunk larger than the leaf': shaped([4], [2**33]),
    'no zstd stream': lambda folder: store(folder, 'params.b', {}, {'params.b/0': CANARY}),
    'a zstd bomb': lambda folder: store(folder, 'params.b', {}, {'params.b/0': zstd_bomb()}),
    'a key that leads out': key('../../outside/canary'),
    'an absolute key': key('/etc/passwd'),
    'a key with NUL': key('a\0b'),
    'no key': key(''),
    'a number as key': key(3),
    'a place as key': key('0', 1),
    'files of zarr': no_ocdbt('step'),
    'files of zarr that lead out': no_ocdbt('../../../outside/zarr'),
    'files of zarr with NUL': no_ocdbt('a\0b'),
    'zarr 3': described(lambda m: m.update(use_zarr3=True)),
    'custom': described(lambda m: m.update(custom_metadata={'a': '__import__("os")'})),
    'empty tree': described(lambda m: m.update(tree_metadata={})),
    'no tree': described(lambda m: m.pop('tree_metadata')),
    'deep': lambda folder: (folder / 'c/weights/_METADATA').write_text('[' * 10**5),
    'no JSON': lambda folder: (folder / 'c/weights/_METADATA').write_bytes(b'\x80\x04K\x01.'),
    'a sharding': lambda folder: (
      leaf(value_type='jax.Array')(folder),
      (folder / 'c/weights/_sharding').write_text('{"c3RlcA==": "{\\"sharding_type\\": \\"x\\"}"}'),
    ),
    'another handler': lambda folder: (folder / 'c/weights/_CHECKPOINT_METADATA').write_text(
      json.dumps({'item_handlers': 'os.system', 'metrics': {}, 'custom_metadata': {}})
    ),
    'no manifest of OCDBT': lambda folder: (folder / 'c/weights/manifest.ocdbt').unlink(),
    'skipped': leaf(skip_deserialize=True),
  }
  sorts = ('jax.Array', 'string', 'scalar', 'float', 'int', 'None', 'Dict', 'List', 'pickle', 'x')
  for sort in (*sorts, 'NamedTuple', '', None, 3, 'os.system'):
    found[f'leaf of type {sort}'] = leaf(value_type=sort)
  for dtype in ('f4,f4', 'O', 'datetime64', 'x' * 9999, '', 'int4', '(2,)f4', 'S8', '{', 'V8'):
    found[f'dtype {dtype[:9]}'] = lambda folder, dtype=dtype: edit_leaves(
      folder, lambda leaves: leaves['step'].update(dtype=dtype)
    )
  return found


def stated_long(path: str, folder: Path) -> None:
  lengthened(path, folder)
  reseal(
    folder / 'c' / 'manifest.json',
    lambda content: content['files'][path.removeprefix('c/')].update(size=2**42),
  )


def edit_leaves(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
  reseal(folder / 'c' / 'manifest.json', lambda content: change(content['leaves']))


def database(folder: Path) -> tuple[Any, Path]:
  """The manifest of the OCDBT database of a checkpoint, as JSON, and its file."""
  import tensorstore as ts

  weights = folder / 'c' / 'weights'
  base = ts.KvStore.open({'driver': 'file', 'path': f'{weights}/'}).result()
  return ts.ocdbt.dump(base).result(), weights / 'manifest.ocdbt'


def edit_root(change: Callable[[dict[str, Any]], Any], folder: Path) -> None:
  import tensorstore as ts

  found, path = database(folder)
  change(found['versions'][0])
  path.write_bytes(ts.ocdbt.undump_manifest(found))


def root_elsewhere(base: str, file: str, folder: Path) -> None:
  """The B-tree's root is moved out of the checkpoint, and the manifest says where it is."""
  (node,) = (folder / 'c' / 'weights' / 'd').iterdir()
  target = outside(folder) / 'd' / node.name
  target.parent.mkdir(exist_ok=True)
  shutil.move(node, target)
  size = target.stat().st_size
  place = f'btreenode:{base}:{file.format(node.name, absolute=str(target)[1:])}:0:{size}'
  edit_root(lambda root: root['root'].update(location=place), folder)


def edit_node(folder: Path, change: Callable[[bytes], bytes]) -> None:
  """Changes the body of the B-tree's root; `amend_checkpoint` mends its length in the manifest."""
  (node,) = (folder / 'c' / 'weights' / 'd').iterdir()
  node.write_bytes(join_ocdbt(change(split_ocdbt(node.read_bytes()))))


def values_elsewhere(folder: Path) -> None:
  """The file of the leaves' values is moved out of the checkpoint, and the B-tree knows where."""
  weights = folder / 'c' / 'weights'
  name = next(n for n in weights.glob('ocdbt.process_0/d/*') if n.name.encode() in node_of(folder))
  target = outside(folder) / 'values000'  # As long as `ocdbt.process_0`, with the dots before it.
  (outside(folder) / 'd').mkdir(exist_ok=True)
  base = b'../../outside/00'
  assert len(base) == len(b'ocdbt.process_0/') and target.parent.is_dir()
  shutil.move(name, outside(folder) / 'd' / name.name)
  edit_node(folder, lambda body: body.replace(b'ocdbt.process_0/d/', b'../../outside///d/'))


def node_of(folder: Path) -> bytes:
  (node,) = (folder / 'c' / 'weights' / 'd').iterdir()
  return split_ocdbt(node.read_bytes())


def tree_in_itself(folder: Path) -> None:
  """A root that says to stand above other nodes, and is itself all of them."""
  edit_node(folder, lambda body: b'\1' + body[1:])
  edit_root(lambda version: version.update(root_height=1), folder)


def store(folder: Path, leaf: str, zarr: dict[str, Any], values: dict[str, bytes | None]) -> None:
  """Rewrites the database with other metadata of zarr for a leaf, and other values."""
  import tensorstore as ts

  weights = folder / 'c' / 'weights'
  url = f'file://{weights}/'
  old = ts.KvStore.open({'driver': 'ocdbt', 'base': url}).result()
  entries = {key: old.read(key).result().value for key in old.list().result()}
  for key, value in values.items():
    del entries[key.encode()]
    if value is not None:
      entries[key.encode()] = value
  about = f'{leaf}/.zarray'.encode()
  entries[about] = json.dumps(json.loads(entries[about]) | zarr).encode()
  for path in (weights / 'manifest.ocdbt', weights / 'd', weights / 'ocdbt.process_0'):
    (shutil.rmtree if path.is_dir() else Path.unlink)(path)
  new = ts.KvStore.open({'driver': 'ocdbt', 'base': url}).result()
  with ts.Transaction() as transaction:
    for key, value in entries.items():
      new.with_transaction(transaction)[key] = value


@functools.cache
def zstd_bomb() -> bytes:
  imagecodecs = pytest.importorskip('imagecodecs')
  return imagecodecs.zstd_encode(bytes(2**28), 9)


# -- the process that reads ----------------------------------------------------------------------


class Watch:
  """Notices, by the kernel's inotify, when a file in a folder is opened or read."""

  OPENED = 0x1 | 0x20  # IN_ACCESS | IN_OPEN

  def __init__(self, folder: Path):
    libc = ctypes.CDLL(None, use_errno=True)
    self._fd = libc.inotify_init1(os.O_NONBLOCK)
    for path in (folder, *(p for p in folder.rglob('*') if p.is_dir())):
      if libc.inotify_add_watch(self._fd, os.fsencode(path), self.OPENED) < 0:
        raise OSError(ctypes.get_errno(), 'inotify')

  def opened(self) -> list[str]:
    """The names of the files opened since; folders that were only listed are left out."""
    names = []
    while select.select([self._fd], [], [], 0)[0]:
      data = os.read(self._fd, 2**16)
      while data:
        _, mask, _, size = struct.unpack('iIII', data[:16])
        if not mask & 0x40000000:  # IN_ISDIR
          names.append(data[16 : 16 + size].rstrip(b'\0').decode())
        data = data[16 + size :]
    return names

  def close(self) -> None:
    os.close(self._fd)


def shown(found: Any) -> Iterator[bytes]:
  """The bytes of everything in a result."""
  if isinstance(found, dict):
    for key, value in found.items():
      yield str(key).encode('utf-8', 'replace')
      yield from shown(value)
  elif isinstance(found, (list, tuple)):
    for value in found:
      yield from shown(value)
  elif isinstance(found, (str, int, float, type(None))):
    yield str(found).encode('utf-8', 'replace')
  else:
    yield np.asarray(found).tobytes()


def outcome(reader: Reader, folder: Path) -> str:
  """'read' or 'refused', or what is wrong with what the reader did."""

  watch = Watch(outside(folder))
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('error')
      try:
        found, result = shown(reader.read(folder)), 'read'
      except UserError as error:
        found, result = iter([str(error).encode('utf-8', 'replace')]), 'refused'
        if not any(name in str(error) for name in reader.names):
          return f'an error that names no file: {error}'
    if opened := watch.opened():
      return f'it opened {opened} outside'
    if any(CANARY[:16] in data for data in found):
      return 'it showed what stands outside'
    return result
  except BaseException as error:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f'{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {error}'[:300]
  finally:
    watch.close()


def run_batch(
  name: str, base: Path, inputs: list[str | int], report: Callable[[str], None]
) -> None:
  """Gives a reader inputs, crafted (by name) or random (by seed), and reports on each."""
  import resource

  from know_jax.io import hdf5

  hdf5.SECONDS = HDF5_SECONDS
  reader = READERS[name]
  good, there = base / 'good', base / 'outside'
  good.mkdir()
  reader.make(good)
  pages = int(Path('/proc/self/statm').read_text().split()[0])
  limit = pages * os.sysconf('SC_PAGE_SIZE') + MEMORY
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  known = crafted(name, good) if any(isinstance(i, str) for i in inputs) else {}
  for what in inputs:
    report('begun')
    signal.alarm(SECONDS)
    if isinstance(what, str) or not there.exists():
      shutil.rmtree(there, ignore_errors=True)
      make_outside(there)
    folder = base / 'in'
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    if isinstance(what, str):
      if known:
        known[what](folder)
      reader.amend(folder)
    else:
      rng = np.random.default_rng(what)
      files = sorted(path for path in folder.rglob('*') if path.is_file())
      changed_file(rng, files[rng.integers(len(files))])
      if rng.random() < 0.8:
        reader.amend(folder)
    report(outcome(reader, folder))
    signal.alarm(0)


def fork(work: Callable[[Callable[[Any], None]], None]) -> tuple[list[Any], int]:
  """What a child process reports, and how it ended; 99: by an exception, which it shows."""
  receive, send = os.pipe()
  pid = os.fork()
  if not pid:
    with os.fdopen(send, 'w', buffering=1) as lines:
      try:
        work(lambda what: print(json.dumps(what), file=lines))
      except BaseException:
        traceback.print_exc()
        os._exit(99)
    os._exit(0)
  os.close(send)
  with os.fdopen(receive) as lines:
    found = [json.loads(line) for line in lines]
  return found, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_children(name: str, base: Path, inputs: list[str | int]) -> list[str]:
  """The outcome of every input; one at which the process died does not stop the others."""
  found: list[str] = []
  while len(found) < len(inputs):
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True)
    said, code = fork(functools.partial(run_batch, name, base, inputs[len(found) :]))
    found += [what for what in said if what != 'begun']
    if code == 99 or (code and said[-1:] != ['begun']):
      raise RuntimeError(f'the test itself fails, with {code}')
    if code:
      ended = {-signal.SIGALRM: f'it took more than {SECONDS} seconds'}
      found.append(ended.get(code, f'the process died of signal {-code}'))
  return found


def names_of_crafted(name: str, base: Path, report: Callable[[Any], None]) -> None:
  base.mkdir(parents=True)
  READERS[name].make(base)
  report(list(crafted(name, base)))


def serve() -> None:
  """Reads lines of [reader, folder, inputs], answers with lines of outcomes."""
  sys.path.insert(0, str(ROOT / 'tests'))
  import h5py  # noqa: F401
  import orbax.checkpoint  # noqa: F401

  # That forks and the threads of JAX do not mix: no backend is started here.
  warnings.filterwarnings('ignore', message='os.fork')
  warnings.filterwarnings('ignore', message='.*multi-threaded.*fork')
  for line in sys.stdin:
    name, base, inputs = json.loads(line)
    answer = (
      fork(functools.partial(names_of_crafted, name, Path(base) / 'names'))[0][0]
      if inputs == 'crafted'
      else in_children(name, Path(base) / 'inputs', inputs)
    )
    print(json.dumps(answer), flush=True)


# -- the tests -----------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def reads(tmp_path_factory):
  """`reads(reader, inputs)`: the outcomes, from a process that stands ready to fork."""
  base = tmp_path_factory.mktemp('hostile')
  with (base / 'stderr').open('w') as errors:
    server = subprocess.Popen(
      [sys.executable, __file__],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=errors,
      text=True,
      env={**os.environ, 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': ''},
    )

  def ask(name: str, inputs: Any) -> Any:
    server.stdin.write(json.dumps([name, str(base / name), inputs]) + '\n')
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, (base / 'stderr').read_text()[-5000:]
    return json.loads(answer)

  with server:
    yield ask
    server.stdin.close()


def judge(inputs: list[Any], outcomes: list[str]) -> None:
  wrong = {i: what for i, what in zip(inputs, outcomes, strict=True) if what not in GOOD}
  assert not wrong, '\n'.join(f'{i}: {what}' for i, what in wrong.items())


GOOD = ('read', 'refused')

HARMLESS = {
  'known_leaf': ('shape []', 'a name twice'),
  # The header of a run's weights has nothing that is looked at but the tensors.
  'runs': ('metadata', 'card', 'a name twice', 'diverged'),
  'checkpoint': ('counts', 'custom', 'another handler', 'leaf of type jax.Array'),
  'record': ('utf-16', 'carriage returns', 'long lines', 'BOM', 'curve'),
  'lines': (
    'surrogate', 'carriage returns', 'long cell', 'long lines', 'nothing', 'BOM', 'curve',
    'a link to itself',
  ),
  'table': ('carriage returns',),
  # HDF5 reads as much of a chunk as it needs, and does without optional filters.
  'mat': ('odd floats', 'a deflate bomb', 'scale and offset', 'filter'),
  'keras': ('odd floats', 'a deflate bomb', 'scale and offset', 'filter'),
  # Names are names: no file is opened by them. An archive after another is the second.
  'safetensors': (
    'no bytes of shape [0]', 'a tensor of dtype', 'name ', 'metadata {', 'card', 'many tensors'
  ),
  'npz': ('twice', 'a path'),
  # Arrays have no names that could stand twice.
  'eqx': ('twice',),
  'msgpack': (),
  # What is no array of numbers is no leaf; numbers of any form are read, or copied.
  'h5': (
    'nothing', 'large chunks', 'a large scale', 'many axes', 'references', 'regions', 'compound',
    'rows of any length', 'strings', 'opaque', 'enum', 'long double', 'an array type', 'odd floats',
    'no space', 'a scalar', 'NaN', 'a group', 'a type', 'a deflate bomb', 'scale and offset',
    'filter',
  ),
}  # fmt: skip
"""Beginnings of the names of crafted inputs that may be read: what they change means nothing, or
what they say is also said by good ones."""


@pytest.mark.parametrize('name', READERS)
def test_crafted_files_are_refused_by_name(reads, thorough, tally, name):
  inputs = reads(name, 'crafted')
  # In the short form only some of those that take a process each, or a database.
  steps = {
    'mat': 24,
    'keras': 40,
    'h5': 20,
    'safetensors': 12,
    'checkpoint': 16,
    'runs': 15,
    'known_leaf': 15,
  }
  inputs = inputs[:: 1 if thorough else steps.get(name, 3)]
  assert len(inputs) > 1
  outcomes = reads(name, inputs)
  judge(inputs, outcomes)
  accepted = [i for i, what in zip(inputs, outcomes, strict=True) if what == 'read']
  assert [i for i in accepted if not i.startswith(HARMLESS[name])] == []
  tally('inputs fuzzed', len(inputs))


@pytest.mark.parametrize('name', READERS)
def test_random_changes_are_read_or_refused_by_name(reads, thorough, tally, name):
  reader = READERS[name]
  inputs = list(range(reader.long if thorough else reader.short))
  outcomes = reads(name, inputs)
  judge(inputs, outcomes)
  if thorough:  # Some changes are harmless, most are not: both ways are tried.
    assert set(outcomes) == set(GOOD)
  tally('inputs fuzzed', len(inputs))


def test_what_is_opened_outside_shows(tmp_path):
  """The watch itself: it sees what NumPy and what HDF5, in another process, open."""
  make_outside(tmp_path / 'outside')
  (tmp_path / 'outside' / 'd').mkdir()
  watch = Watch(tmp_path / 'outside')
  assert watch.opened() == []
  list((tmp_path / 'outside').iterdir())
  assert watch.opened() == []
  np.fromfile(tmp_path / 'outside' / 'canary', np.uint8)
  assert 'canary' in watch.opened()
  script = 'import h5py, sys; h5py.File(sys.argv[1])["mat"][()]'
  subprocess.run([sys.executable, '-c', script, tmp_path / 'outside' / 'canary.h5'], check=True)
  assert 'canary.h5' in watch.opened()
  (tmp_path / 'outside' / 'd' / 'new').write_bytes(b'x')
  assert 'new' in watch.opened()
  watch.close()


# Made by random changes of a good file: the HDF5 library 2.0 dies of a segmentation fault on it.
DEADLY = (
  r'c-rlkJ5K^Z5XWa9;07U)SU`-4S6UivEah>8!Us_j?Udm0NC+k#8arG4CVmhLKMdai?{;V5I3o~4G?Do=e`a=WcXpV)'
  r'%>fXr%xkq=$)vVY+E5B4Y?uLVWP}`UPuuqS8&rn+g8Ig-pXsqY`m;EHJg$E3x?%JvhFxb*8qL#RwvtrcLM_xQ+YhK8'
  r'd^)al*MGe9y6w)u*LI~8wE&9Uh9B+Mc`!(tSZ3|2QE41&7?(g5F`YLqf{qSn$~rq>THJx0g52}?Ii<%r=XybfCqS^^'
  r'r)DUl`KGZl3^GB0f|El1xKO-q_8Pw4_hv9lGO~Za+i&+gv+g2XoSv0gkoB%T@5$Nmm?Su2cAP!ePl?s&=dXQbD$4kD'
  r'Uwx-P@0(%TM7+at`sV0Y>mg%xu=m8m^$=#lb*O2Z347fseN*|JhgK`tm>lP2{I_1K*BDIv0`IXPcF^p2_Xqp7-?7fz'
  r'M(9-KBz1>g<^(|y1VQ{M;deK)-`z`?PsWrW2!bF8g7_bN0#){8Hv'
)


def test_a_file_that_kills_the_hdf5_library_is_refused(tmp_path):
  (tmp_path / MAT).write_bytes(zlib.decompress(base64.b85decode(DEADLY)))
  with pytest.raises(UserError, match=rf'{MAT}: not a readable HDF5 '):
    mat.read_mat(tmp_path / MAT)


def test_a_file_that_takes_for_ever_is_refused(tmp_path, monkeypatch):
  make_mat(tmp_path)
  monkeypatch.setattr(hdf5, 'SECONDS', 0.01)
  with pytest.raises(UserError, match=rf'{MAT}: not a readable .* takes more than 0.01 seconds'):
    mat.read_mat(tmp_path / MAT)


# -- code that is never in a file ----------------------------------------------------------------

FORBIDDEN_MODULES = {'pickle', 'cPickle', 'dill', 'joblib', 'cloudpickle', 'shelve', 'marshal'}
FORBIDDEN_MODULES |= {'torch', 'tensorflow', 'keras'}
FORBIDDEN_CALLS = {'eval', 'exec', 'compile', '__import__'}
# What pandas has of the kind; its frames are harmless.
FORBIDDEN_METHODS = {'read_pickle', 'read_hdf', 'query'}


def forbidden(source: str) -> list[str]:
  """What a module's source has that may run code out of a file."""
  found = []
  for node in ast.walk(ast.parse(source)):
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [node.module or '', *(f'{node.module}.{alias.name}' for alias in node.names)]
    found += [name for name in names if FORBIDDEN_MODULES & set(name.split('.'))]
    if isinstance(node, ast.Name) and node.id in FORBIDDEN_CALLS:
      found.append(node.id)
    if not isinstance(node, ast.Call):
      continue
    called = ast.unparse(node.func)
    if called in ('pd.eval', 'pandas.eval') or called.split('.')[-1] in FORBIDDEN_METHODS:
      found.append(called)
    if called in ('np.load', 'numpy.load', 'jnp.load', 'jax.numpy.load'):
      options = {word.arg: word.value for word in node.keywords}
      safe = options.get('allow_pickle')
      if not (isinstance(safe, ast.Constant) and safe.value is False):
        found.append(ast.unparse(node))
    if any(w.arg == 'allow_pickle' and ast.unparse(w.value) != 'False' for w in node.keywords):
      found.append(ast.unparse(node))
  return found


@pytest.mark.parametrize(
  'path', sorted((ROOT / 'know_jax').rglob('*.py')), ids=lambda path: path.stem
)
def test_no_module_unpickles_or_evaluates(path):
  # The benchmark builds rivals in Keras, and loads no file by it.
  builds = {'benchmark/keras_rivals.py': ['keras']}
  name = path.relative_to(ROOT / 'know_jax').as_posix()
  text = path.read_text()
  if path == ROOT / 'know_jax' / 'io' / 'torch.py':
    # PyTorch reads its own files, by the unpickler that takes tensors and plain values alone.
    assert set(forbidden(text)) == {
      'torch',
      'torch._subclasses.fake_tensor',
      'torch._subclasses.fake_tensor.FakeTensorMode',
    }
    assert re.findall(r'torch\.load\((.*)\)', text) == ['path, weights_only=True']
    return
  assert forbidden(text) == builds.get(name, [])
  assert name not in builds or 'load' not in text


@pytest.mark.parametrize(
  'source',
  [
    'import pickle', 'from joblib import load', 'import numpy as np\nnp.load(f)',
    'np.load(f, allow_pickle=True)', 'np.load(f, allow_pickle=flag)', 'eval(text)', 'torch.load',
    'x = exec', 'from six.moves import cPickle', 'import tensorflow.io', 'pd.read_pickle(f)',
    'pandas.read_hdf(f)', 'frame.query(text)', 'pd.eval(text)',
  ],
)  # fmt: skip
def test_what_is_forbidden_is_found(source):
  assert forbidden(source if source != 'torch.load' else 'import torch\ntorch.load(f)')


if __name__ == '__main__':
  serve()
