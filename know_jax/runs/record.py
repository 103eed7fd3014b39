"""What a run leaves beside its weights: its record, its metrics, and a bar while it runs."""

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import jax

from know_jax import showing
from know_jax.errors import UserError, os_errors
from know_jax.fields import config_dict
from know_jax.io.files import local_path
from know_jax.io.sealed import read_sealed, write_sealed
from know_jax.jsonable import plain, restored
from know_jax.system.processes import from_first, in_all
from know_jax.version import __version__

FORMAT = 'know_jax run'
VERSION = 1

_RECORD = 'record.json'
_HEADER = {
  *('format', 'version', 'kind', 'config', 'environment', 'started', 'resumed_in', 'sha256')
}
_PACKAGES = ('jax', 'jaxlib', 'flax', 'numpy', 'optax', 'orbax-checkpoint', 'tensorflow-datasets')
_SOURCES = ('know_jax', 'bin', 'configs', 'pyproject.toml')


def environment() -> dict[str, Any]:
  """What a run ran on, JSON data.

  `know_jax`, `python`, the versions of JAX, Flax and other packages (None where one is not
  installed), `platform`, `device` (its kind), `devices` (how many), and `commit`: that of the
  source tree with `-dirty` where sources differ from it, or None if the sources are in no git
  checkout.
  """
  versions: dict[str, str | None] = {}
  for package in _PACKAGES:
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      versions[package] = None
  return {
    'know_jax': __version__,
    'python': platform.python_version(),
    **versions,
    'platform': platform.platform(),
    'device': jax.devices()[0].device_kind,
    'devices': jax.device_count(),
    'commit': _commit(Path(__file__).resolve().parents[2]),
  }


def _commit(root: Path) -> str | None:
  # Set by git for its hooks, these would point it to another repository.
  env = {key: value for key, value in os.environ.items() if not key.startswith('GIT_')}

  def git(*args: str) -> str:
    command = ('git', '-C', str(root), *args)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip()

  try:
    # An installed package may lie inside the checkout of something else, as in its .venv.
    if Path(git('rev-parse', '--show-toplevel')).resolve() != root:
      return None
    commit = git('rev-parse', 'HEAD')
    return f'{commit}-dirty' if git('status', '--porcelain', '--', *_SOURCES) else commit
  except (OSError, subprocess.SubprocessError):
    return None


class RunRecord:
  """The record of a run: `record.json` in its workdir, written anew at every change.

  Behaves as a dict of JSON data with string keys (`record['accuracy'] = 0.9`); numbers come back as
  they went in. It begins with the keys `kind`, `config`, `environment`, `started` (seconds since
  1970) and `resumed_in`, which cannot be set. It carries a checksum: a change by hand is noticed.
  """

  def __init__(self, workdir: Path, content: dict[str, Any]):
    self.workdir = workdir
    self._content = content

  @classmethod
  def open(
    cls,
    workdir: str | os.PathLike,
    config: Any,
    *,
    kind: str,
    flag: str = '--workdir',
  ) -> 'RunRecord':
    """Begins a run in a workdir, or resumes the one that is there.

    Where a run resumes in another environment (a new version, another device), that is added to
    the record under `resumed_in`. Of several processes all call this and what changes the record,
    with the same values; process 0 writes, and its record is that of all.

    Args:
      workdir: the directory; made if missing.
      config: what `config_dict` takes.
      kind: what the run does: 'forget', 'transfer', ...
      flag: the option that gave the workdir, for errors.

    Returns:
      The record, with what an earlier part of the run wrote.

    Raises:
      UserError: the workdir holds a run of another kind or config (each differing field is
        named), a damaged record, or cannot be written; or a process does not see it.
    """
    workdir = local_path(workdir, flag)
    content = from_first(lambda: cls._open(workdir, config, kind, flag)._content)

    def check_seen() -> None:
      if not (workdir / _RECORD).exists():
        raise UserError(f'{workdir} has no {_RECORD}; expected a folder that all processes share.')

    in_all(check_seen)
    return cls(workdir, content)

  @classmethod
  def _open(cls, workdir: Path, given: Any, kind: str, flag: str) -> 'RunRecord':
    """`open` in the process that writes."""
    config = config_dict(given)
    path = workdir / _RECORD
    with os_errors(f'cannot use workdir {workdir}'):
      workdir.mkdir(parents=True, exist_ok=True)
      begun = path.exists()
    if begun:
      record = cls.read(workdir, kind)
      if differences := _differences(record['config'], config):
        raise UserError(
          f'workdir {workdir} holds a run with another config. '
          + '; '.join(differences)
          + f'. Give another {flag}, or the config found there.'
        )
      here = environment()
      resumed = record['resumed_in']
      if here != (resumed[-1] if resumed else record['environment']):
        record._replace({**record._content, 'resumed_in': [*resumed, here]})
      return record
    content = {
      'format': FORMAT,
      'version': VERSION,
      'kind': kind,
      'config': config,
      'environment': environment(),
      'started': time.time(),
      'resumed_in': [],
    }
    record = cls(workdir, {})
    record._replace(content)
    return record

  @classmethod
  def read(cls, workdir: str | os.PathLike, kind: str) -> 'RunRecord':
    """Reads the record of a run.

    Raises:
      UserError: there is none, it is damaged, or it is of another kind of run or format version.
    """
    workdir = Path(workdir).expanduser()
    path = workdir / _RECORD
    content = read_sealed(path, 'record')
    if content.get('format') != FORMAT or content.get('version') != VERSION:
      raise UserError(
        f'record {path} has format {content.get("format")!r}, version '
        f'{content.get("version")!r}; expected {FORMAT!r}, version {VERSION}.'
      )
    header = {'config': dict, 'environment': dict, 'resumed_in': list}
    for name, expected in header.items():
      if not isinstance(content.get(name), expected):
        raise UserError(f'record {path} is malformed: its {name} is no {expected.__name__}.')
    if content.get('kind') != kind:
      raise UserError(
        f'workdir {workdir} holds a run of another kind: found {content.get("kind")!r}, expected '
        f'{kind!r}. Give another --workdir.'
      )
    return cls(workdir, content)

  def __repr__(self) -> str:
    return showing.as_text(*self._about())

  def _repr_html_(self) -> str:
    return showing.as_html(*self._about())

  def _about(self) -> tuple[str, showing.Table]:
    """Its stages, if it has any, or else its values."""
    values = {k: v for k, v in self._content.items() if k not in _HEADER}
    stages = [row for row in values.get('stages') or () if isinstance(row, dict)]
    kind, version = self._content.get('kind'), self._content.get('environment', {}).get('know_jax')
    title = f'Record of {kind!r} in {self.workdir}, by know_jax {version}'
    if stages:
      header = tuple(dict.fromkeys(key for row in stages for key in row))
      return title, (header, [[row.get(key, '') for key in header] for row in stages])
    return title, (('key', 'value'), list(values.items()))

  def __getitem__(self, key: str) -> Any:
    return self._content[key]

  def __contains__(self, key: str) -> bool:
    return key in self._content

  def get(self, key: str, default: Any = None) -> Any:
    """The value of a key, or a default."""
    return self._content.get(key, default)

  def __setitem__(self, key: str, value: Any) -> None:
    self.update(**{key: value})

  def update(self, /, **values: Any) -> None:
    """Sets several keys in one atomic and durable write.

    Raises:
      UserError: a value is not JSON data, or the file cannot be written; the record is as before.
      KeyError: a key is one that the record begins with.
    """
    if taken := _HEADER & values.keys():
      raise KeyError(f'{min(taken)!r} cannot be set.')

    def change() -> dict[str, Any]:
      self._replace({**self._content, **values})
      return self._content

    self._content = from_first(change)

  def _replace(self, content: dict[str, Any]) -> None:
    path = self.workdir / _RECORD
    # As it will be read: no list of the caller's is in it, and tuples are lists.
    content = restored(plain(content, 'record'))
    with os_errors(f'cannot write {path}'):
      write_sealed(path, content)
    self._content = content


def _differences(found: Any, expected: Any, field: str = '') -> list[str]:
  """`field: found X, expected Y` for every leaf in which two configs differ."""
  if isinstance(found, dict) and isinstance(expected, dict):
    return [
      difference
      for key in dict.fromkeys((*found, *expected))
      for difference in _differences(
        found.get(key, _Missing), expected.get(key, _Missing), f'{field}.{key}' if field else key
      )
    ]
  # As text, because 1 == 1.0 == True.
  same = _show(found) == _show(expected)
  return [] if same else [f'{field}: found {_show(found)}, expected {_show(expected)}']


class _Missing:
  pass


def _show(value: Any) -> str:
  return 'nothing' if value is _Missing else json.dumps(plain(value, 'config'))
