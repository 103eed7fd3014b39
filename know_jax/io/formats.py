"""Which formats there are: one module each, and what is said of files of other formats.

A format is a module with `detect(path) -> bool`, which judges by content, and
`open(path) -> Weights`. Those of this folder are found; `register` adds one from elsewhere.
"""

import functools
import importlib
import os
import pkgutil
import sys
from pathlib import Path
from typing import Any

from know_jax.errors import UserError, os_errors
from know_jax.io import zipped
from know_jax.io.files import local_path
from know_jax.io.weights import Weights
from know_jax.registry import load_object

REGISTERED: list[Any] = []
"""The formats that `register` added."""

_SAVE = 'save its tensors by safetensors.torch.save_file'
_MAGIC = (
  (0, b'GGUF', 'a GGUF file', 'load it by from_pretrained(..., gguf_file=) of transformers and '
   'save_pretrained it'),
  (0, b'\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.', "a PyTorch file in torch.save's old form",
   'load it by torch.load(..., weights_only=True) and torch.save it again'),
  (0, b'\x93NUMPY', 'arrays of NumPy without names (.npy)',
   'save them with names: np.savez(file, **arrays), or safetensors.numpy.save_file'),
  (0, b'\x1f\x8b', 'a file compressed by gzip', 'unpack it'),
  (0, b'\x28\xb5\x2f\xfd', 'a file compressed by zstd', 'unpack it'),
  (0, b'\xfd7zXZ', 'a file compressed by xz', 'unpack it'),
  (0, b'BZh', 'a file compressed by bzip2', 'unpack it'),
  (0, b'7z\xbc\xaf', 'a 7z archive', 'unpack it'),
  (257, b'ustar', 'a tar archive', 'unpack it'),
  (4, b'TFL3', 'a TensorFlow Lite file', 'take the checkpoint that it was made from'),
  (0, b'version https://git-lfs', 'a pointer of Git LFS, not the file itself', 'run git lfs pull'),
  (0, b'<!DOCTYPE', 'a web page, not a checkpoint', 'download the file itself'),
)  # fmt: skip
_PICKLE = 'a Python pickle, which may run any code and is never opened'
_SUFFIXES = {
  '.onnx': ('an ONNX file', 'take the checkpoint that it was exported from'),
  '.index': ('the index of a TensorFlow checkpoint', 'load it in Keras and save .weights.h5'),
  '.pb': ('a TensorFlow graph', 'load it in Keras and save .weights.h5'),
  '.pkl': (_PICKLE, 'load it where you trust it and ' + _SAVE),
  '.pickle': (_PICKLE, 'load it where you trust it and ' + _SAVE),
}


@functools.cache
def formats() -> dict[str, Any]:
  """Name -> module of the formats of this folder, in the order in which they are asked.

  A module with `LAST = True` is asked after the others: what it detects may be something else.
  """
  result = {}
  for module in pkgutil.iter_modules(sys.modules[__package__].__path__):
    # By its text, as some of the others need packages that not everybody has.
    path = Path(module.module_finder.path, f'{module.name}.py')  # type: ignore[union-attr]
    if module.name != 'formats' and '\ndef detect(' in path.read_text('utf-8'):
      result[module.name] = importlib.import_module(f'{__package__}.{module.name}')
  return dict(sorted(result.items(), key=lambda item: getattr(item[1], 'LAST', False)))


def register(entry: Any) -> None:
  """Adds a format of one's own, which is asked before those of the package.

  Args:
    entry: a module or an object with `detect` and `open`; or its path, 'package.module' or
      'package.module:object', looked for in the current folder too.

  Raises:
    UserError: it cannot be imported, or lacks one of the two.
  """
  if isinstance(entry, str) and ':' in entry:
    entry = load_object(entry, 'format')
  elif isinstance(entry, str):
    load_object(f'{entry}:open', 'format')
    entry = sys.modules[entry]
  for name in ('detect', 'open'):
    if not callable(getattr(entry, name, None)):
      raise UserError(f'format {entry!r} has no function {name!r}; expected detect and open.')
  if entry not in REGISTERED:
    REGISTERED.insert(0, entry)


def detect(path: Path) -> Any:
  """The module of the format that a path is in, None if it is in none."""
  if not path.is_file() and not path.is_dir():
    return None  # A pipe would never end.
  asked = (*REGISTERED, *formats().values())
  return next((module for module in asked if module.detect(path)), None)


def open_weights(path: str | os.PathLike) -> Weights:
  """Finds the leaves of a stage; reads headers and metadata, no weights.

  Args:
    path: a file or folder of one of `formats`.

  Raises:
    UserError: there is nothing of the kind, it is in another format, which is named with the way
      on, cannot be read, or its header is damaged; file and tensor are named.
  """
  given = local_path(path, 'history')
  with os_errors(f'cannot read {given}'):
    if not given.is_file() and not given.is_dir():
      raise UserError(f'{given}: no such file or folder; expected the weights of a stage.')
    if module := detect(given):
      return module.open(given)
    if given.is_dir():
      raise UserError(_no_weights(given))
    if other := describe(given):
      raise UserError(f'{given} is {other[0]}; {other[1]}.')
    # Nothing else has no mark at all; the error says what is wrong with its header.
    return importlib.import_module('know_jax.io.safetensors').open(given)


def describe(path: Path) -> tuple[str, str] | None:
  """What a file of a format that is not read is, and the way on; None if that is unknown."""
  if not path.is_file():
    return None
  with path.open('rb') as file:
    head = file.read(262)
  if not head:
    return 'empty', 'write it again'
  for place, magic, what, way in _MAGIC:
    if head[place:].startswith(magic):
      return what, way
  if head.startswith(b'PK'):
    return _describe_zip(path)
  if head[0] == 0x80 and head[1] in range(2, 6) and head[8:9] != b'{':
    return _SUFFIXES['.pkl']
  return _SUFFIXES.get(path.suffix)


def _describe_zip(path: Path) -> tuple[str, str]:
  names = zipped.names(path)
  if names is None:
    return 'a zip archive that is cut off or damaged', 'write it again'
  if any(name.endswith('constants.pkl') for name in names):
    return 'a TorchScript program', 'save its state_dict() by torch.save or safetensors'
  if any(name.endswith('data.pkl') for name in names):
    return 'a PyTorch file', f'load it by torch.load(..., weights_only=True) and {_SAVE}'
  return f'a zip archive of {len(names)} files', 'unpack it'


def _no_weights(folder: Path) -> str:
  names = {path.name for path in folder.iterdir()}
  if 'saved_model.pb' in names:
    return f'{folder} is a TensorFlow SavedModel; load it in Keras and save .weights.h5.'
  if 'checkpoint' in names and any(name.endswith('.index') for name in names):
    return f'{folder} is a TensorFlow checkpoint; load it in Keras and save .weights.h5.'
  for name in sorted(names):
    if other := describe(folder / name):
      return f'{folder} holds no weights that are read: {name} is {other[0]}; {other[1]}.'
  return (
    f'{folder} holds no weights: found neither a file of {", ".join(formats())}, nor an index of '
    'shards, nor an Orbax or know_jax checkpoint.'
  )
