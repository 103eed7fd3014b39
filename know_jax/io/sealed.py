"""JSON files with a checksum of themselves."""

import hashlib
import json
from pathlib import Path
from typing import Any

from know_jax.errors import UserError, os_errors
from know_jax.io.files import write_atomic
from know_jax.jsonable import plain, restored

_MAX_JSON_BYTES = 64 * 2**20


def write_sealed(path: Path, content: dict[str, Any]) -> None:
  """Writes a JSON object with a checksum of itself, atomically.

  Args:
    path: the file.
    content: what `plain` takes, without the key `sha256`.

  Raises:
    OSError: it cannot be written; the old content is intact.
    UserError: `content` cannot be kept as JSON.
  """
  if 'sha256' in content:
    raise UserError(f'{path}: the key sha256 is taken by the checksum of the content itself.')
  write_atomic(path, _seal(plain(content, path.stem)))


def read_sealed(path: Path, what: str) -> dict[str, Any]:
  """Reads what `write_sealed` wrote; any altered byte is an error.

  Args:
    path: the file.
    what: what the file is called in errors, as in 'manifest'.

  Returns:
    The content, without the checksum.

  Raises:
    UserError: the file is missing, a link, unreadable, truncated, altered, or was never sealed.
  """
  damaged = f'{what} {path} is damaged or foreign: '
  with os_errors(f'cannot read {what} {path}'):
    # A link may lead to any file; what is sealed is written in its place.
    if path.is_symlink():
      raise UserError(f'{damaged}it is a link; expected a plain file.')
    if not path.is_file():
      raise UserError(f'{what} {path} is missing.')
    if (size := path.stat().st_size) > _MAX_JSON_BYTES:
      raise UserError(f'{damaged}{size} bytes; expected at most {_MAX_JSON_BYTES}.')
    data = path.read_bytes()
  try:
    result = json.loads(data)
  except (ValueError, RecursionError) as error:
    raise UserError(f'{damaged}{error or "nested too deep"}; expected JSON.') from error
  if not isinstance(result, dict) or 'sha256' not in result:
    raise UserError(f'{damaged}it has no checksum of itself.')
  content = {key: value for key, value in result.items() if key != 'sha256'}
  try:
    content = restored(content)
    # Compared as bytes: JSON can be spelt in several ways (1e5, 1E5), and only one was written.
    intact = _seal(plain(content, what)) == data
  except RecursionError as error:
    raise UserError(f'{damaged}nested too deep.') from error
  if not intact:
    raise UserError(f'{damaged}its content does not have the checksum it states.')
  return content


def _seal(content: dict[str, Any]) -> bytes:
  checksum = hashlib.sha256(json.dumps(content, allow_nan=False).encode()).hexdigest()
  return (json.dumps({**content, 'sha256': checksum}, indent=1, allow_nan=False) + '\n').encode()
