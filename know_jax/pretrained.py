"""The weights of KNOWN: those shipped, a safetensors file, or the authors' Keras files."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from know_jax import trees
from know_jax.errors import UserError
from know_jax.known import HISTORY_LENGTH

FORMAT = 'know_jax.known/1'
SHIPPED = Path(__file__).parent / 'weights' / 'known.safetensors'

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


def load_known(path: str | Path | None = None) -> dict[str, Any]:
  """Loads the parameters of KNOWN for the three kinds of leaf.

  Args:
    path: None for the weights shipped with the package; else a safetensors file written by
      `save_known`, or a folder with the authors' `KNOWN_Conv.h5`, `KNOWN_FC.h5`, `KNOWN_Bias.h5`.

  Returns:
    theta: `{'conv': ..., 'fc': ..., 'bias': ...}`, each the Flax parameters of one `KNOWN`.

  Raises:
    UserError: the file is missing, cannot be read, or holds something else; it is named.
  """
  if path is None:
    return jax.tree.map(lambda leaf: leaf, _shipped())  # the cached dicts stay ours
  path = Path(path).expanduser()
  if path.is_dir():
    return _load_keras(path)
  return _load_safetensors(path)


@functools.cache
def _shipped() -> dict[str, Any]:
  return _load_safetensors(SHIPPED)


def save_known(path: str | Path, theta: Mapping[str, Any], card: Mapping[str, Any]) -> None:
  """Writes theta to one safetensors file that `load_known` reads.

  Args:
    path: the file to write.
    theta: kind -> Flax parameters of one KNOWN.
    card: what the weights are and where they come from; JSON-able, kept in the file's header.
  """
  tensors = {
    name: np.ascontiguousarray(leaf, np.float32) for name, leaf in trees.named_leaves(theta).items()
  }
  _check_theta(tensors, str(path))
  metadata = {'format': FORMAT, 'card': json.dumps(card, sort_keys=True)}
  safetensors.numpy.save_file(tensors, path, metadata)


def read_card(path: str | Path | None = None) -> dict[str, Any]:
  """The card of a safetensors file of KNOWN; None for the shipped weights."""
  path = SHIPPED if path is None else Path(path).expanduser()
  return json.loads(_read(path)[1].get('card', '{}'))


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  if not path.is_file():
    raise UserError(
      f'{path}: no such file; wanted a safetensors file of KNOWN, or a folder with '
      f'{", ".join(_KERAS_FILES.values())}.'
    )
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      metadata = file.metadata() or {}
      tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
  except (safetensors.SafetensorError, OSError, TypeError) as error:
    raise UserError(f'{path}: not a readable safetensors file ({error}).') from error
  if metadata.get('format') != FORMAT:
    raise UserError(
      f'{path}: format {metadata.get("format")!r} in the header; wanted {FORMAT!r}, as '
      'bin/meta_train.py writes.'
    )
  return tensors, metadata


def _load_safetensors(path: Path) -> dict[str, Any]:
  tensors, _ = _read(path)
  _check_theta(tensors, str(path))
  return _nest(tensors)


def _load_keras(folder: Path) -> dict[str, Any]:
  try:
    import h5py
  except ImportError as error:
    raise UserError(f'{folder}: reading the .h5 files needs h5py; pip install h5py.') from error
  tensors = {}
  for kind, name in _KERAS_FILES.items():
    path = folder / name
    if not path.is_file():
      raise UserError(
        f'{path}: no such file; the folder must hold {", ".join(_KERAS_FILES.values())}.'
      )
    try:
      with h5py.File(path, 'r') as file:
        for ours, keras in _KERAS_LAYERS.items():
          for what in ('kernel', 'bias'):
            tensors[f'{kind}/{ours}/{what}'] = np.asarray(file[f'{keras}/{keras}/{what}:0'])
    except (OSError, KeyError, ValueError, RuntimeError, TypeError) as error:
      raise UserError(f'{path}: not the Keras weights of KNOWN ({error}).') from error
  _check_theta(tensors, str(folder))
  return _nest(tensors)


def parameter_shapes(history_length: int) -> dict[str, tuple[int, ...]]:
  """Path -> shape of the parameters of one KNOWN that reads so many stages."""
  shapes: dict[str, tuple[int, ...]] = {}
  for stream, size in (('weights', history_length), ('differences', history_length - 1)):
    for layer, shape in {'embed': (size, 64), **_HIDDEN}.items():
      shapes[f'{stream}/{layer}/kernel'], shapes[f'{stream}/{layer}/bias'] = shape, shape[1:]
  return shapes | {'residual/kernel': (64, 1), 'residual/bias': (1,)}


def _check_theta(tensors: Mapping[str, np.ndarray], where: str) -> None:
  first = tensors.get('conv/weights/embed/kernel')
  length = first.shape[0] if first is not None and first.ndim == 2 else HISTORY_LENGTH
  wanted = {f'{k}/{name}': s for k in trees.KINDS for name, s in parameter_shapes(length).items()}
  for name in [*wanted, *tensors]:
    if name not in tensors:
      raise UserError(f'{where}: lacks tensor {name!r} of KNOWN.')
    if name not in wanted:
      raise UserError(f'{where}: has tensor {name!r}, which is no part of KNOWN.')
    leaf = tensors[name]
    if leaf.shape != wanted[name] or leaf.dtype != np.float32:
      raise UserError(
        f'{where}: tensor {name!r} is {leaf.dtype}{list(leaf.shape)}; wanted '
        f'float32{list(wanted[name])}.'
      )
    if not np.isfinite(leaf).all():
      raise UserError(f'{where}: tensor {name!r} holds NaN or infinity.')


def _nest(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  theta: dict[str, Any] = {}
  for name, leaf in tensors.items():
    *parents, last = name.split('/')
    node = theta
    for key in parents:
      node = node.setdefault(key, {})
    # Real arrays even where the first caller is being traced: the shipped weights are cached.
    with jax.ensure_compile_time_eval():
      node[last] = jnp.asarray(leaf)
  return theta
