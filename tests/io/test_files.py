"""Locks and paths on systems that lack what Linux has, simulated."""

import errno
import fcntl
import importlib.util
import os
import sys
import threading
import types
from pathlib import Path

import pytest

from know_jax.errors import UserError
from know_jax.io import checkpoints, files
from know_jax.runs.record import RunRecord
from know_jax.system import machine


@pytest.fixture
def windows(monkeypatch):
  """`files` as Windows would import it: no fcntl, no folders that can be opened."""

  def locking(fd, mode, count):
    assert (mode, count) == (2, 1)
    try:
      fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise PermissionError(errno.EACCES, 'Permission denied') from error

  monkeypatch.setitem(sys.modules, 'fcntl', None)
  monkeypatch.setitem(sys.modules, 'msvcrt', types.SimpleNamespace(LK_NBLCK=2, locking=locking))
  monkeypatch.delattr(os, 'O_DIRECTORY')
  monkeypatch.delattr(os, 'O_CLOEXEC')
  spec = importlib.util.spec_from_file_location('files_of_windows', files.__file__)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_locks_without_fcntl(windows, tmp_path):
  path, order = tmp_path / 'x', []

  def second():
    with windows.locked(path):
      order.append('second')

  with windows.locked(path):
    with pytest.raises(TimeoutError), windows.locked(path, wait_seconds=0.05):
      pass
    thread = threading.Thread(target=second)
    thread.start()
    thread.join(0.1)
    order.append('first')
  thread.join()
  assert order == ['first', 'second']
  windows.write_atomic(path, b'data')
  assert [p.name for p in tmp_path.iterdir()] == ['x'] and path.read_bytes() == b'data'


def test_a_lock_file_that_cannot_be_removed_still_locks(windows, tmp_path, monkeypatch):
  def refused(self, missing_ok=False):
    raise PermissionError(errno.EACCES, 'in use')

  monkeypatch.setattr(Path, 'unlink', refused)
  for _ in range(2):
    with (
      windows.locked(tmp_path / 'x'),
      pytest.raises(TimeoutError),
      windows.locked(tmp_path / 'x', wait_seconds=0.02),
    ):
      pass


def test_memory_without_sysconf(monkeypatch):
  def status(reference):
    fields = reference._obj
    assert fields[0] == 64
    fields[1] = 12345

  kernel = types.SimpleNamespace(GlobalMemoryStatusEx=status)
  monkeypatch.setattr(
    machine.ctypes, 'windll', types.SimpleNamespace(kernel32=kernel), raising=False
  )
  assert machine.memory_bytes() == os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  monkeypatch.delattr(os, 'sysconf')
  assert machine.memory_bytes() == 12345
  machine.give_back_memory()


def test_paths_of_this_machine(monkeypatch, tmp_path):
  monkeypatch.setenv('HOME', str(tmp_path))
  assert files.local_path('~/a', 'x') == tmp_path / 'a'
  assert files.local_path('file:///a/b', 'x') == Path('/a/b')
  assert files.local_path('C:/a', 'x') == Path('C:/a')
  for url in ('gs://b/c', 's3://b', Path('gs://b/c'), 'https://h/m.safetensors'):
    with pytest.raises(UserError, match=r"--output: found '.*'; expected a path on this machine"):
      files.local_path(url, '--output')


def test_no_run_or_checkpoint_is_begun_in_a_folder_named_like_a_url(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=r'--workdir: found .gs://b/run.; expected a path on this'):
    RunRecord.open('gs://b/run', {}, kind='forget')
  with pytest.raises(UserError, match=r'found .gs://b/c.; expected a path on this machine'):
    checkpoints.save('gs://b/c', {})
  assert not list(tmp_path.iterdir())
