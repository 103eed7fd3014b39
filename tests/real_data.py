"""The real data sets that are packed beside the repository, prepared for TFDS once a machine."""

import fcntl
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / 'shared' / 'tools' / 'prepare_tfds.py'

_UNVERIFIED = """
import sys
sys.path.insert(0, sys.argv[1])
import prepare_tfds
load = prepare_tfds.load
prepare_tfds.load = lambda name, split, verify: load(name, split)
prepare_tfds._builder(sys.argv[3], sys.argv[2]).download_and_prepare()
"""


def cache_dir() -> Path:
  """Where tests keep what takes long to make: outside the repository, shared by all checkouts."""
  return Path(os.environ.get('KNOW_JAX_TEST_DATA') or '~/.cache/know_jax/test_data').expanduser()


def packed():
  """The script that unpacks the data, as a module: its `load`, `DATA` and `VERSIONS`."""
  if not SCRIPT.is_file():
    pytest.skip(f'no packed data: {SCRIPT} is not there')
  spec = importlib.util.spec_from_file_location('prepare_tfds', SCRIPT)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def prepared_data_dir(names: Sequence[str]) -> Path:
  """A TFDS data directory with the data sets `names`; skips the test where they cannot be had."""
  script = packed()
  base = cache_dir() / 'tensorflow_datasets'
  base.mkdir(parents=True, exist_ok=True)
  # One process at a time: parallel test runs would unpack the same data twice.
  with (base / '.lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    for name in names:
      if (base / name / script.VERSIONS[name] / 'dataset_info.json').is_file():
        continue
      run = subprocess.run(
        [sys.executable, SCRIPT, '--data_dir', base, name],
        capture_output=True,
        text=True,
        check=False,
      )
      if 'pixels do not match the stored checksum' in run.stderr:
        # The packed CIFAR-100 is lossy JPEG XL, which decodes to other last bits on CPUs with other
        # vector instructions. What these tests need is a real data set in TFDS form, not its bits.
        run = subprocess.run(
          [sys.executable, '-c', _UNVERIFIED, SCRIPT.parent, base, name],
          capture_output=True,
          text=True,
          check=False,
        )
      assert run.returncode == 0, run.stderr
  return base
