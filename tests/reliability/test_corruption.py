"""Damage: no altered byte goes unnoticed, and a full disk or a read-only folder costs no state."""

import functools
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import assert_same_bits, snapshot
from test_checkpoints import bits, corrupt, corrupt_and_check
from test_meta_training import synthetic_run

from know_jax import load_known
from know_jax.errors import UserError
from know_jax.io import checkpoints
from know_jax.meta import collect
from know_jax.nowcast import from_run
from know_jax.predictors import parameters
from know_jax.runs import workdir as workdirs
from know_jax.runs.record import RunRecord

ROOT = Path(__file__).resolve().parents[2]


def test_no_random_corruption_of_a_checkpoint_goes_unnoticed(tmp_path, thorough, tally):
  # The short form is in test_checkpoints.py.
  count = 400 if thorough else 10
  tally('corruptions caught', corrupt_and_check(np.random.default_rng(1), count, tmp_path))


# -- the other formats that have checksums -------------------------------------------------------


def make_runs(folder: Path) -> None:
  """Two runs, and a third that diverged."""
  import hashlib

  import safetensors.numpy

  from know_jax.io.sealed import write_sealed

  (folder / 'runs').mkdir()
  for number in range(3):
    run = synthetic_run(number)
    path = folder / 'runs' / f'{number:05d}.json'
    about = {**run.about}
    if number == 2:
      about['diverged'] = 'loss is nan'
    else:
      weights = {name: np.ascontiguousarray(leaf[..., :3]) for name, leaf in run.weights.items()}
      data = safetensors.numpy.save(weights, {'format': collect.FORMAT})
      path.with_suffix('.safetensors').write_bytes(data)
      about['weights_sha256'] = hashlib.sha256(data).hexdigest()
    write_sealed(path, about)


def read_runs(folder: Path) -> Any:
  return [
    (run.number, run.about, None if run.weights is None else bits(run.weights))
    for run in collect.read_runs(folder)
  ]


def make_record(folder: Path) -> None:
  record = RunRecord.open(folder, {'seed': 0, 'rates': [0.5, 0.25]}, kind='forget')
  record.update(stages=[{'stage': i, 'test_accuracy': 0.9 - 0.1 * i} for i in range(5)])


def read_record(folder: Path) -> Any:
  return RunRecord.read(folder, 'forget')._content


def make_weights(name: str, folder: Path) -> None:
  shutil.copy(parameters.SHIPPED[name], folder)


def read_weights(name: str, folder: Path) -> Any:
  path = folder / parameters.SHIPPED[name].name
  return bits(load_known(path)), parameters.read_card(path)


def make_coefficients(folder: Path) -> None:
  shutil.copy(parameters.LEAST_SQUARES, folder)


def read_coefficients(folder: Path) -> Any:
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(parameters, 'LEAST_SQUARES', folder / parameters.LEAST_SQUARES.name)
    return parameters.least_squares_coefficients.__wrapped__()


FORMATS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
  'runs': (make_runs, read_runs),
  'record': (make_record, read_record),
  **{
    name: (functools.partial(make_weights, name), functools.partial(read_weights, name))
    for name in parameters.SHIPPED
  },
  'coefficients': (make_coefficients, read_coefficients),
}


def without(found: list[Any], name: str) -> list[Any]:
  return [run for run in found if run[0] != int(Path(name).name[:5])]


@pytest.mark.parametrize('what', FORMATS)
def test_no_random_corruption_of_other_formats_goes_unnoticed(tmp_path, thorough, tally, what):
  make, read = FORMATS[what]
  intact, damaged = tmp_path / 'intact', tmp_path / 'damaged'
  intact.mkdir()
  make(intact)
  expected = read(intact)
  rng, caught = np.random.default_rng(0), 0
  for _ in range({'runs': 300}.get(what, 150) if thorough else 15):
    shutil.copytree(intact, damaged)
    way, name = corrupt(rng, damaged).split()
    try:
      found = read(damaged)
    except UserError as error:
      assert Path(name).stem in str(error) or way == 'swap', (way, name, error)
      caught += 1
    else:
      # Files of no name that is looked for are not looked at. A run without its JSON file is one
      # that is not finished yet; what another one's file says of it is not believed.
      unfinished = way in ('delete', 'rename') and name.endswith('.json') and what == 'runs'
      assert way == 'stray' or unfinished, (way, name)
      assert found == (without(expected, name) if unfinished else expected)
    shutil.rmtree(damaged)
  assert read(intact) == expected
  assert caught > 0
  tally('corruptions caught', caught)


def test_every_single_bit_of_shipped_weights_is_guarded(tmp_path, thorough, tally):
  rng = np.random.default_rng(0)
  for path in parameters.SHIPPED.values():
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], 'little')
    places = rng.choice(8 * len(data), size=250 if thorough else 5, replace=False)
    # In the header every bit, as far as time allows: names, offsets, the card, the checksum.
    places = [*places, *rng.choice(8 * header, size=750 if thorough else 10, replace=False)]
    for place in places:
      altered = bytearray(data)
      altered[place // 8] ^= 1 << int(place % 8)
      (tmp_path / path.name).write_bytes(altered)
      with pytest.raises(UserError, match=path.name):
        parameters.read_card(tmp_path / path.name)
    tally('corruptions caught', len(places))


def test_weights_of_before_there_were_checksums_are_read(tmp_path):
  import safetensors
  import safetensors.numpy

  path = parameters.SHIPPED['known_leaf']
  with safetensors.safe_open(path, 'numpy') as file:
    metadata = file.metadata()
  assert metadata.pop('sha256')
  tensors = safetensors.numpy.load_file(path)
  safetensors.numpy.save_file(tensors, tmp_path / 'old.safetensors', metadata)
  assert_same_bits(load_known(tmp_path / 'old.safetensors'), load_known(shipped='known_leaf'))
  safetensors.numpy.save_file(tensors, tmp_path / 'x.safetensors', metadata | {'sha25v': '0'})
  with pytest.raises(UserError, match=r"x\.safetensors: is damaged: 'sha25v' in the header"):
    load_known(tmp_path / 'x.safetensors')


def test_a_run_under_another_number_is_refused(tmp_path):
  make_runs(tmp_path)
  for suffix in ('json', 'safetensors'):
    shutil.copy(tmp_path / f'runs/00001.{suffix}', tmp_path / f'runs/00007.{suffix}')
  with pytest.raises(UserError, match=r'00007\.json: holds run 1; expected the run of its name'):
    list(collect.read_runs(tmp_path))


# -- disks that fill up, at the command line -----------------------------------------------------

# `runs.small_config`, as flags.
SMALL = (
  '--config.train_examples=625', '--config.rate=0.4', '--config.model=cnn_bn', '--config.width=2',
  '--config.epochs=2', '--config.batch_size=16', '--config.lr=0.01',
  '--config.dataset=digits', '--config.classes=(0,1,2,3,4)', '--config.stage_epochs=2',
  '--config.stage_lr=0.01', '--config.augmentation.rotation=0.0',
  '--config.augmentation.shift=0.0', '--config.augmentation.zoom=0.0',
)  # fmt: skip

NOWCAST = ('--steps=2', '--predictor=shrink,linear_fit')

# A disk of memory, in a mount namespace of its own: what the last process leaves is copied out.
SMALL_DISK = """
set -u
mount -t tmpfs -o size={size}k none "$DISK" || exit 77
run() {{
  echo "code $1" > "$OUT/$1"
  "$PYTHON" "$BIN/$2" --workdir="$DISK/run" $3 > "$OUT/$1.out" 2> "$OUT/$1.err"
  echo $? > "$OUT/$1.code"
  cp -r "$DISK/run" "$OUT/$1.run"
}}
run full forget.py "$FORGET"
mount -o remount,size=64m "$DISK"
run more forget.py "$FORGET"
dd if=/dev/zero of="$DISK/filler" bs=1k 2> /dev/null
run none nowcast.py "$NOWCAST"
rm "$DISK/filler"
run last nowcast.py "$NOWCAST"
"""


def on_small_disk(folder: Path, size: int) -> Path:
  """Forgets and nowcasts on a disk that is full and is then enlarged; where all that is told."""
  disk, out = folder / 'disk', folder / 'out'
  disk.mkdir()
  out.mkdir()
  command = ['unshare', '--user', '--map-root-user', '--mount', 'sh', '-c']
  done = subprocess.run(
    [*command, textwrap.dedent(SMALL_DISK).format(size=size)],
    env={
      **os.environ, 'DISK': str(disk), 'OUT': str(out), 'PYTHON': sys.executable,
      'BIN': str(ROOT / 'bin'), 'FORGET': ' '.join(SMALL), 'NOWCAST': ' '.join(NOWCAST),
    },
    capture_output=True,
    text=True,
  )  # fmt: skip
  if done.returncode == 77 or 'unshare' in done.stderr:
    pytest.skip(f'no disk can be mounted here: {done.stderr.strip()}')
  assert done.returncode == 0, done.stderr
  return out


def assert_one_line(out: Path, name: str, script: str) -> None:
  """That a process failed for want of space, and said so in one line."""
  assert (out / f'{name}.code').read_text().strip() == '2'
  text = (out / f'{name}.err').read_text()
  said = [line for line in text.splitlines() if not line.startswith('stage ')]
  assert len(said) == 1 and said[0].startswith(f'{script}: cannot '), text
  assert 'No space left on device' in said[0]


@pytest.mark.parametrize('size', [16, 300])
def test_scripts_on_a_full_disk_go_on_once_there_is_space(tmp_path, request, thorough, tally, size):
  if not thorough:
    pytest.skip('takes a minute: part of --thorough; test_checkpoints.py has failing disks too')
  finished = request.getfixturevalue('finished')
  out = on_small_disk(tmp_path, size)
  assert_one_line(out, 'full', 'forget.py')
  kept = out / 'full.run'
  for path in kept.glob('stages/[0-9]'):  # What is there is whole.
    assert_same_bits(checkpoints.restore(path), workdirs.restore_stage(finished, int(path.name)))
  assert (out / 'more.code').read_text().strip() == '0', (out / 'more.err').read_text()
  for stage in range(5):
    found, expected = (workdirs.restore_stage(w, stage) for w in (out / 'more.run', finished))
    assert_same_bits(found, expected)
  name = 'metrics.jsonl'
  assert (out / 'more.run' / name).read_text() == (finished / name).read_text()

  assert_one_line(out, 'none', 'nowcast.py')
  for folder in ('stages', 'record.json'):
    a, b = out / 'more.run' / folder, out / 'none.run' / folder
    assert a.read_bytes() == b.read_bytes() if a.is_file() else snapshot(a) == snapshot(b)
  assert (out / 'last.code').read_text().strip() == '0', (out / 'last.err').read_text()
  whole = Path(shutil.copytree(finished, tmp_path / 'whole'))
  from_run.run(whole, predictors=['shrink', 'linear_fit'], steps=2)
  for predictor in ('shrink', 'linear_fit'):
    for step in (1, 2):
      name = f'predictions/{predictor}/{step}'
      assert_same_bits(
        checkpoints.restore(out / 'last.run' / name), checkpoints.restore(whole / name)
      )
  tally('full disks survived', 2)
