"""The weights of KNOWN: those shipped, a safetensors file, or the authors' Keras files.

Shipped are `known`, the paper's network in units of the leaf (`known.py`), `known_leaf`, a linear
step conditioned on the leaf (`known_leaf.py`), and the coefficients of `least_squares`, all trained
on the same meta-dataset.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import unflatten_dict

from know_jax import kinds, trees
from know_jax.errors import UserError, os_errors, unknown_name
from know_jax.io import hdf5
from know_jax.io.files import write_atomic
from know_jax.io.sealed import read_sealed
from know_jax.predictors import known, known_leaf
from know_jax.predictors.known import HISTORY_LENGTH

FORMAT = 'know_jax.known/1'
_WEIGHTS = Path(__file__).parents[1] / 'weights'
SHIPPED = {
  'known': _WEIGHTS / 'known.safetensors',
  'known_leaf': _WEIGHTS / 'known_leaf.safetensors',
}
"""Name -> file of the parameters in the package."""

LEAST_SQUARES = _WEIGHTS / 'least_squares.json'

# The files of the authors' release and, for each of our layers, the Keras layer that holds it.
_KERAS_FILES = {'conv': 'KNOWN_Conv.h5', 'fc': 'KNOWN_FC.h5', 'bias': 'KNOWN_Bias.h5'}
_KERAS_LAYERS = {
  'weights/embed': 'dense',
  'weights/squeeze': 'dense_1',
  'weights/offset': 'dense_2',
  'weights/amplitude': 'dense_3',
  'weights/gate': 'dense_4',
  'weights/project': 'dense_5',
  'differences/embed': 'dense_6',
  'differences/squeeze': 'dense_7',
  'differences/offset': 'dense_8',
  'differences/amplitude': 'dense_9',
  'differences/gate': 'dense_10',
  'differences/project': 'dense_11',
  'residual': 'dense_12',
}
_HIDDEN = {'squeeze': (64, 8), 'offset': (8, 64), 'amplitude': (8, 64), 'gate': (8, 64)}
_HIDDEN |= {'project': (64, 32)}
_MAX_NUMBERS = 2**20  # In a tensor; those of KNOWN have under 2**12.
_MAX_BYTES = 2**26


def load_known(path: str | Path | None = None, *, shipped: str = 'known') -> dict[str, Any]:
  """Loads the parameters of KNOWN for the three kinds of leaf.

  Args:
    path: None for weights shipped with the package; else a safetensors file written by
      `save_known`, or a folder with the authors' `KNOWN_Conv.h5`, `KNOWN_FC.h5`, `KNOWN_Bias.h5`.
    shipped: which of the shipped weights where `path` is None: 'known', the paper's network, or
      'known_leaf', the linear step conditioned on the leaf.

  Returns:
    theta: `{'conv': ..., 'fc': ..., 'bias': ...}`, each the Flax parameters of one
    `ConditionedKNOWN` or one `KNOWN` (the paper's), in arrays of NumPy that cannot be changed.

  Raises:
    UserError: the file is missing, cannot be read, or holds something else; it is named.
  """
  if path is None:
    if shipped not in SHIPPED:
      raise unknown_name('shipped KNOWN', shipped, SHIPPED)
    return jax.tree.map(lambda leaf: leaf, _shipped(shipped))  # callers may change their own dicts
  path = Path(path).expanduser()
  if path.is_dir():
    return _load_keras(path)
  return _load_safetensors(path)


@functools.cache
def _shipped(name: str) -> dict[str, Any]:
  return _load_safetensors(SHIPPED[name])


@functools.cache
def least_squares_coefficients() -> dict[str, tuple[float, ...]]:
  """The shipped coefficients of `least_squares`: kind -> those of d_0 .. d_3 and of theta^0."""
  result = read_sealed(LEAST_SQUARES, 'coefficients')['coefficients']
  return {kind: tuple(result[kind]) for kind in kinds.KINDS}


def save_known(path: str | Path, theta: Mapping[str, Any], card: Mapping[str, Any]) -> None:
  """Writes theta to one safetensors file that `load_known` reads.

  Args:
    path: the file to write.
    theta: kind -> Flax parameters of one network; the kinds may be of different sorts.
    card: what the weights are and where they come from; JSON-able, kept in the file's header.

  Raises:
    UserError: theta is not of the networks, or the file cannot be written; an old one is intact.
  """
  tensors = {
    name: np.array(leaf, np.float32, order='C') for name, leaf in trees.named_leaves(theta).items()
  }
  _check_theta(tensors, str(path))
  metadata = {'format': FORMAT, 'card': json.dumps(card, sort_keys=True)}
  metadata['sha256'] = _checksum(tensors, metadata)
  data = _with_sorted_header(safetensors.numpy.save(tensors, metadata))
  with os_errors(f'cannot write {path}'):
    write_atomic(Path(path), data)


def _with_sorted_header(data: bytes) -> bytes:
  """A safetensors file whose bytes are the same in every process: the library shuffles metadata."""
  end = 8 + int.from_bytes(data[:8], 'little')
  header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(',', ':')).encode()
  header += b' ' * (-len(header) % 8)
  return len(header).to_bytes(8, 'little') + header + data[end:]


def network_of(theta: Mapping[str, Any]) -> str:
  """Whose parameters these are: 'known', the paper's network, 'known_scaled' or 'known_leaf'.

  Raises:
    UserError: kinds of leaf have parameters of different networks.
  """
  result = dict.fromkeys(theta, 'known')
  for kind, params in theta.items():
    if known_leaf.is_conditioned(params):
      result[kind] = 'known_leaf'
    elif known.is_scaled(params):
      result[kind] = 'known_scaled'
  if len(set(result.values())) != 1:
    raise UserError(f'theta has parameters of different networks: {result}; expected one for all.')
  return next(iter(result.values()))


def theta_digest(theta: Mapping[str, Any]) -> str:
  """Identifies parameters of KNOWN, by a checksum of their values."""
  hashed = hashlib.sha256()
  for name, leaf in sorted(trees.named_leaves(theta).items()):
    hashed.update(name.encode())
    hashed.update(np.asarray(leaf, np.float32).tobytes())
  return hashed.hexdigest()


def read_card(path: str | Path | None = None) -> dict[str, Any]:
  """The card of a safetensors file of KNOWN; None for the shipped weights."""
  path = SHIPPED['known'] if path is None else Path(path).expanduser()
  text = _read(path)[1].get('card', '{}')
  try:
    card = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path}: the card in the header is no JSON ({error}).') from error
  if not isinstance(card, dict):
    raise UserError(f'{path}: the card in the header is {type(card)}; expected a JSON object.')
  return card


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  if not path.is_file():
    raise UserError(
      f'{path}: no such file; expected a safetensors file of KNOWN, or a folder with '
      f'{", ".join(_KERAS_FILES.values())}.'
    )
  if (size := path.stat().st_size) > _MAX_BYTES:
    raise UserError(f'{path}: {size} bytes; expected a file of KNOWN, of at most {_MAX_BYTES}.')
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      metadata = file.metadata() or {}
      tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
  # The library has an error of its own, and passes on those of NumPy for dtypes and shapes.
  except Exception as error:
    raise UserError(f'{path}: not a readable safetensors file ({error}).') from error
  if metadata.get('format') != FORMAT:
    raise UserError(
      f'{path}: format {metadata.get("format")!r} in the header; expected {FORMAT!r}, as '
      'bin/meta_train.py writes.'
    )
  # Files written before there were checksums have none. One that is damaged still has three keys.
  if unknown := metadata.keys() - {'format', 'card', 'sha256'}:
    raise UserError(f'{path}: is damaged: {min(unknown)!r} in the header is no part of the format.')
  if 'sha256' in metadata and (result := _checksum(tensors, metadata)) != metadata['sha256']:
    raise UserError(
      f'{path}: is damaged: it has the checksum {result}; expected {metadata["sha256"]}, as in its '
      'header.'
    )
  return tensors, metadata


def _checksum(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
  """Of all that a file says: names, dtypes, shapes and bits of its tensors, format and card."""
  shapes = {name: [leaf.dtype.str, list(leaf.shape)] for name, leaf in tensors.items()}
  about = {key: value for key, value in metadata.items() if key != 'sha256'}
  hashed = hashlib.sha256(json.dumps([about, shapes], sort_keys=True).encode())
  for name in sorted(tensors):
    hashed.update(tensors[name].tobytes())
  return hashed.hexdigest()


def _load_safetensors(path: Path) -> dict[str, Any]:
  tensors, _ = _read(path)
  _check_theta(tensors, str(path))
  return _nest(tensors)


def _load_keras(folder: Path) -> dict[str, Any]:
  expected = {
    f'{keras}/{keras}/{what}:0': f'{ours}/{what}'
    for ours, keras in _KERAS_LAYERS.items()
    for what in ('kernel', 'bias')
  }
  tensors: dict[str, np.ndarray] = {}
  for kind, name in _KERAS_FILES.items():
    path = folder / name
    if not path.is_file():
      raise UserError(
        f'{path}: no such file; the folder must hold {", ".join(_KERAS_FILES.values())}.'
      )
    try:
      result = hdf5.read_arrays(path, list(expected), limit=_MAX_NUMBERS, sort='HDF5 (Keras)')
    except UserError as error:
      raise UserError(f'{path}: not the Keras weights of KNOWN ({error}).') from error
    tensors |= {f'{kind}/{ours}': result[keras].values for keras, ours in expected.items()}
  _check_theta(tensors, str(folder))
  return _nest(tensors)


def parameter_shapes(params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  """Path -> shape of all parameters of a network of KNOWN, from the shapes of some.

  Args:
    params: path -> shape, as found.
  """
  if any(path.startswith('step/') for path in params):
    shape = tuple(params.get('step/bias', ()))
    return known_leaf.parameter_shapes(max(shape[0], 2) if shape else HISTORY_LENGTH)
  shapes = paper_shapes((*params.get('weights/embed/kernel', ()), HISTORY_LENGTH)[0])
  # In units of the leaf there is a constant beside the paper's parameters.
  return shapes | {'bound': ()} if 'bound' in params else shapes


def paper_shapes(history_length: int) -> dict[str, tuple[int, ...]]:
  """Path -> shape of the parameters of one of the paper's KNOWN that reads so many stages."""
  shapes: dict[str, tuple[int, ...]] = {}
  for stream, size in (('weights', history_length), ('differences', history_length - 1)):
    for layer, shape in {'embed': (size, 64), **_HIDDEN}.items():
      shapes[f'{stream}/{layer}/kernel'], shapes[f'{stream}/{layer}/bias'] = shape, shape[1:]
  return shapes | {'residual/kernel': (64, 1), 'residual/bias': (1,)}


def _check_theta(tensors: Mapping[str, np.ndarray], where: str) -> None:
  expected: dict[str, tuple[int, ...]] = {}
  for kind in kinds.KINDS:
    result = {
      name.removeprefix(f'{kind}/'): leaf.shape
      for name, leaf in tensors.items()
      if name.startswith(f'{kind}/')
    }
    expected |= {f'{kind}/{name}': shape for name, shape in parameter_shapes(result).items()}
  for name in [*expected, *tensors]:
    if name not in tensors:
      raise UserError(f'{where}: lacks tensor {name!r} of KNOWN.')
    if name not in expected:
      raise UserError(f'{where}: has tensor {name!r}, which is no part of KNOWN.')
    leaf = tensors[name]
    if leaf.shape != expected[name] or leaf.dtype != np.float32:
      raise UserError(
        f'{where}: tensor {name!r} is {leaf.dtype}{list(leaf.shape)}; expected '
        f'float32{list(expected[name])}.'
      )
    if not np.isfinite(leaf).all():
      raise UserError(f'{where}: tensor {name!r} holds NaN or infinity.')
    if name.endswith('/bound') and not leaf > 0:
      raise UserError(f'{where}: tensor {name!r} is {leaf}; expected a positive number of units.')


def _nest(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  # Arrays of NumPy: the shipped weights are cached, and the first caller may be traced, where every
  # array of JAX would be part of the trace.
  for leaf in tensors.values():
    leaf.flags.writeable = False
  return unflatten_dict(dict(tensors), sep='/')
