"""Files of JSON lines that are only ever added to, so that a kill loses one line."""

import io
import json
import os
from pathlib import Path
from typing import Any

from know_jax.errors import UserError, os_errors
from know_jax.io.files import fsync_directory, locked
from know_jax.jsonable import json_line, restored


def read_lines(path: Path) -> list[dict[str, Any]]:
  """Reads a `.jsonl` file; a last line that a kill cut off is left out.

  Args:
    path: the file; a missing one is empty.

  Returns:
    A dict for each line.

  Raises:
    UserError: the file cannot be read, or a line before the last is no JSON object.
  """
  return _lines(path)[0]


def append_line(path: Path, value: dict[str, Any]) -> None:
  """Appends a line to a `.jsonl` file, durably; what a kill cut off before it is removed.

  Raises:
    UserError: the file is damaged or cannot be written, or the value is not JSON data.
  """
  line = json_line(value, path.stem).encode()
  with os_errors(f'cannot write {path}'):
    with locked(path):
      existed, intact = path.exists(), _lines(path)[1]
      with path.open('ab') as file:
        file.truncate(intact)
        if intact and path.read_bytes()[-1:] != b'\n':
          file.write(b'\n')
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    if not existed:
      fsync_directory(path.parent)


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
  """The lines of a `.jsonl` file, and the length of the file without a line that is cut off."""
  with os_errors(f'cannot read {path}'):
    if path.exists() and not path.is_file():
      raise UserError(f'{path} is a folder or a device; expected a file.')
    data = path.read_bytes() if path.exists() else b''
  result, length = [], 0
  lines = io.BytesIO(data).readlines()
  for number, line in enumerate(lines, 1):
    try:
      value = json.loads(line)
      if not isinstance(value, dict):
        raise ValueError('no JSON object')
      value = restored(value)
    except (ValueError, RecursionError) as error:
      # No beginning of a JSON object is one itself, so a line that parses is whole.
      if number == len(lines) and not line.endswith(b'\n'):
        break
      raise UserError(f'{path} is damaged: line {number} is no JSON object.') from error
    result.append(value)
    length += len(line)
  return result, length


class Journal:
  """What is done, by key: lines that are only ever added, so that a kill loses one entry."""

  def __init__(self, path: Path):
    self._path = path
    self._entries: dict[str, dict[str, Any]] = {}
    self.reload()

  def reload(self) -> None:
    """Reads also what other processes have added; of equal keys the first line counts."""
    lines = read_lines(self._path)
    for number, line in enumerate(lines, 1):
      if not isinstance(line.get('key'), str):
        raise UserError(f'{self._path} is damaged: line {number} has no key.')
    self._entries = {line['key']: line for line in reversed(lines)}

  def get(self, key: str) -> dict[str, Any] | None:
    """The entry of a key, None if there is none yet."""
    return self._entries.get(key)

  def add(self, key: str, **values: Any) -> dict[str, Any]:
    """Writes an entry, durably, and returns it."""
    entry = {'key': key, **values}
    append_line(self._path, entry)
    self._entries[key] = entry
    return entry
