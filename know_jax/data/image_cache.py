"""Decoded images on disk, so that each machine decodes a data set once."""

import hashlib
import io
import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from know_jax.errors import UserError
from know_jax.io.files import write_atomic

_CACHE_FORMAT = 'know_jax decoded images 1'
_DIGEST_BYTES = hashlib.sha256().digest_size


def cache_dir() -> Path:
  """Where decoded images are kept: `$KNOW_JAX_CACHE`, by default `~/.cache/know_jax`."""
  return Path(os.environ.get('KNOW_JAX_CACHE') or '~/.cache/know_jax').expanduser()


def cache_key(
  builder: Any, split: str, image_key: str, label_key: str, image_size: tuple[int, int] | None
) -> bytes:
  """A checksum of everything that decoded images depend on, the content of the files included."""
  import PIL

  key = hashlib.sha256()
  words = [_CACHE_FORMAT, PIL.__version__, split, image_key, label_key, image_size]
  key.update(json.dumps(words).encode())
  folder = Path(builder.data_dir)
  shards = (Path(path) for path in builder.info.splits[split].filepaths)
  for path in (folder / 'dataset_info.json', folder / 'features.json', *shards):
    with path.open('rb') as file:
      key.update(hashlib.file_digest(file, 'sha256').digest())
  return key.digest()


def read_cache(path: Path, key: bytes) -> tuple[np.ndarray, np.ndarray] | None:
  """Decoded images and labels from a file; None if there is none or it is damaged."""
  try:
    content = path.read_bytes()
  except FileNotFoundError:
    return None
  except OSError as error:
    warnings.warn(f'cannot read decoded images: {error}; decoding anew.', stacklevel=2)
    return None
  body, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
  if hashlib.sha256(key + body).digest() != digest:
    warnings.warn(f'{path} is damaged; decoding anew.', stacklevel=2)
    return None
  file = io.BytesIO(body)
  return np.load(file, allow_pickle=False), np.load(file, allow_pickle=False)


def write_cache(path: Path, key: bytes, images: np.ndarray, labels: np.ndarray) -> None:
  """Keeps decoded images and labels; a disk that is full or read-only is a warning."""
  file = io.BytesIO()
  for array in (images, labels):
    np.save(file, array, allow_pickle=False)
  body = file.getvalue()
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, body + hashlib.sha256(key + body).digest())
  except (OSError, UserError) as error:
    # The images are at hand; only the next process will have to decode them again.
    warnings.warn(f'cannot keep decoded images: {error} ($KNOW_JAX_CACHE)', stacklevel=2)
