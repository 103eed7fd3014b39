"""Settings of the whole suite: eight simulated devices, no files of the user's touched."""

import collections
import gc
import mmap
import os
from importlib.util import find_spec
from pathlib import Path

import pytest


def known_to_xla(*flags: str) -> list[str]:
  """Those of some flags that XLA has: it ends a process that sets any other."""
  known: list[str] = []
  for path in Path(find_spec('jaxlib').origin).parent.glob('libjax_common.*'):
    with path.open('rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library:
      known += [
        flag for flag in flags if library.find(flag[2:].split('=')[0].encode() + b'\0') >= 0
      ]
  return known


# Before JAX is imported by anything: the suite runs on eight simulated devices, and its many small
# programs without LLVM's optimisations and MLIR's compiler for fusions, which take longer than what
# they save: half of the suite's time.
# A loaded machine may keep one of them waiting for longer than XLA's 40 seconds, after which it
# would abort the process.
os.environ['XLA_FLAGS'] = ' '.join([
  os.environ.get('XLA_FLAGS', ''),
  '--xla_force_host_platform_device_count=8',
  '--xla_backend_optimization_level=0',
  '--xla_cpu_collective_call_terminate_timeout_seconds=600',
  *known_to_xla(
    '--xla_cpu_use_fusion_emitters=false', '--xla_cpu_parallel_codegen_split_count=1'
  ),
]).strip()  # fmt: skip
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

# Tracing makes the garbage collector run all the time for little: a seventh of the time of the
# networks' tests.
gc.set_threshold(100_000, 50, 100)


def pytest_addoption(parser):
  parser.addoption(
    '--thorough', action='store_true', help='tests/reliability in full: make test-reliability'
  )


@pytest.fixture(scope='session')
def thorough(request) -> bool:
  """Whether the tests of reliability run in full, or in the short form of `make test`."""
  return request.config.getoption('--thorough')


@pytest.fixture
def tally(record_property):
  """`tally(what, count)` adds to a number that is printed after the last test."""
  return lambda what, count=1: record_property('tally', (what, count))


def pytest_terminal_summary(terminalreporter):
  totals: collections.Counter[str] = collections.Counter()
  for report in terminalreporter.getreports('passed'):
    for name, value in report.user_properties:
      if name == 'tally':
        what, count = value
        totals[what] += count
  for what, count in sorted(totals.items()):
    terminalreporter.write_line(f'{what}: {count}')


@pytest.fixture(scope='session', autouse=True)
def own_cache_folder(tmp_path_factory):
  """Decoded images and compiled programs go to a folder of this run, not to the user's cache."""
  folder = tmp_path_factory.mktemp('cache')
  os.environ['KNOW_JAX_CACHE'] = str(folder / 'know_jax')
  os.environ['JAX_COMPILATION_CACHE_DIR'] = str(folder / 'jax')


@pytest.fixture(scope='session')
def official() -> Path:
  """The folder with the authors' three networks and stored outputs of their Keras code."""
  folder = Path(__file__).parents[1] / '..' / 'shared' / 'official'
  if not folder.is_dir():
    pytest.skip(f"{folder}: the authors' networks have no licence and are not in the repository")
  return folder


@pytest.fixture(scope='session')
def finished(tmp_path_factory) -> Path:
  """The workdir of a finished forgetting run, `runs.small_config`; tests write to copies of it."""
  from runs import forget

  workdir = tmp_path_factory.mktemp('finished') / 'run'
  forget(workdir)
  return workdir


@pytest.fixture(scope='session')
def known_file(tmp_path_factory) -> Path:
  """Untrained parameters of KNOWN, for tests that want no more of them than that they are used."""
  import jax

  from know_jax.predictors import known, parameters

  path = tmp_path_factory.mktemp('known_leaf') / 'known.safetensors'
  parameters.save_known(path, known.init_theta(jax.random.key(0)), {})
  return path


@pytest.fixture(scope='session')
def synthetic_runs(tmp_path_factory) -> Path:
  """A meta-dataset of twelve runs whose weights all shrink by a tenth a stage; read only."""
  from test_meta_training import write_dataset

  folder = tmp_path_factory.mktemp('synthetic')
  write_dataset(folder, range(12))
  return folder
