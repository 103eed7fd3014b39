"""Where the members of a zip archive lie, so that they are read, and replaced, in their places."""

import contextlib
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from know_jax.errors import UserError, reason

_BLOCK = 1 << 20


class Member(NamedTuple):
  """A file in an archive."""

  start: int  # Where its bytes begin in the archive.
  size: int  # How many they are, as stored.
  stored: bool  # Whether they are not compressed.
  header: int  # Where its local header begins.
  entry: int  # Where its entry in the central directory begins.
  described: bool  # Whether a data descriptor follows its bytes.


def names(path: Path) -> list[str] | None:
  """The names of the files in an archive; None if it is none, or is cut off or damaged."""
  if not path.is_file() or not zipfile.is_zipfile(path):
    return None
  try:
    with reading(''), zipfile.ZipFile(path) as archive:
      return archive.namelist()
  except UserError:
    return None


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
  """Makes one error of the many that `zipfile` raises for the ways in which archives are damaged.

  Raises:
    UserError: the block raises anything; `what` says what cannot be read.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    why = reason(error) if isinstance(error, OSError) else str(error)
    raise UserError(f'{what}: {why}.') from error


def members(path: Path) -> dict[str, Member]:
  """Name -> member; all lie in the archive, apart from each other.

  Raises:
    UserError: the archive is cut off or damaged.
  """
  damaged = f'{path}: not a readable zip archive: '
  result: dict[str, Member] = {}
  with (
    reading(f'{path}: not a readable zip archive'),
    zipfile.ZipFile(path) as archive,
    path.open('rb') as file,
  ):
    size = path.stat().st_size
    entry = archive.start_dir
    for info in archive.infolist():
      file.seek(entry)
      central = file.read(46)
      file.seek(info.header_offset)
      local = file.read(30)
      if central[:4] != b'PK\1\2' or local[:4] != b'PK\3\4' or len(local) < 30:
        raise UserError(f'{damaged}its directory leads to no header of {info.filename!r}.')
      start = info.header_offset + 30 + sum(struct.unpack('<HH', local[26:30]))
      if start + info.compress_size > size or info.filename in result:
        raise UserError(f'{damaged}{info.filename!r} is cut off, or there twice.')
      result[info.filename] = Member(
        start, info.compress_size, info.compress_type == zipfile.ZIP_STORED
        and info.compress_size == info.file_size, info.header_offset, entry,
        bool(info.flag_bits & 8),
      )  # fmt: skip
      entry += 46 + sum(struct.unpack('<HHH', central[28:34]))
  reached = 0
  for name, member in sorted(result.items(), key=lambda item: item[1].header):
    if member.header < reached:
      raise UserError(f'{damaged}{name!r} lies in another file of it.')
    reached = member.start + member.size
  return result


def mend(file: IO[bytes], changed: Iterable[Member]) -> None:
  """Writes the checksums of members whose bytes have been replaced."""
  for member in changed:
    file.seek(member.start)
    checksum, left = 0, member.size
    while left:
      data = file.read(min(left, _BLOCK))
      checksum, left = zlib.crc32(data, checksum), left - len(data)
    places = [member.entry + 16]
    if member.described:
      file.seek(end := member.start + member.size)
      places.append(end + 4 if file.read(4) == b'PK\x07\x08' else end)
      file.seek(member.header + 14)
      places += [member.header + 14] if any(file.read(4)) else []
    else:
      places.append(member.header + 14)
    for place in places:
      file.seek(place)
      file.write(struct.pack('<I', checksum))
