"""Scripts killed at random points of their lives, and asked to leave: they end with the same bits.

The points are drawn from a seed, which is printed with them when a test fails; KILL_SEED=<seed> in
the environment draws them again. A point is a number of seconds after the start, or, to hit what is
being written, a number of changes to names in the run's folder.
"""

import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from processes import Done, Kill, Scripts
from test_run_record import events_of

from know_jax import trees
from know_jax.io import checkpoints, journal, sealed

CLOCK = {'seconds', 'train_seconds', 'started'}
"""What is read from a clock, by name: no two runs have the same."""

STUDY = """
from know_jax.study import design

def get_config():
  config = design.default_config()
  config.source.update(
    classes=(0, 1, 2, 3, 4), train_examples=625, stratified=True, width=2, batch_size=100, epochs=1,
    lr=0.01, stages=3, rate=0.4, save_every_seconds=0.0,
  )
  config.transfer.update(
    classes=(5, 6, 7, 8, 9), labels_per_class=10, batch_size=24, warmup_epochs=1, epochs=1,
  )
  config.update(source_seeds=2, transfer_seeds=1, history=2, steps=1, curve_epochs=(0, 1))
  config.arms = ('scratch', 'persistence', 'incremental', 'extra', 'shrink')
  return config
"""

COMMANDS = {
  # Two epochs of 6, 2 and 1 steps, and a save after each step.
  'forget.py': (
    '--workdir={folder}', '--config.train_examples=625', '--config.rate=0.4', '--config.stages=3',
    '--config.model=cnn_bn', '--config.width=2', '--config.epochs=2', '--config.batch_size=100',
    '--config.lr=0.01', '--config.save_every_seconds=0',
    '--config.dataset=digits', '--config.classes=(0,1,2,3,4)', '--config.stage_epochs=2',
    '--config.stage_lr=0.01', '--config.augmentation.rotation=0.0',
    '--config.augmentation.shift=0.0', '--config.augmentation.zoom=0.0',
  ),
  'collect.py': (
    '--output={folder}', '--config.runs=2', '--config.datasets=("digits",)',
    '--config.widths.cnn=(2,)', '--config.train_examples=(400, 400)',
    '--config.pretrain_steps=(20, 20)', '--config.batch_size=(32, 32)', '--config.epochs=(1, 1)',
    '--config.stages=3', '--config.rate=(0.5, 0.5)', '--config.augmented=0',
  ),
  'meta_train.py': (
    '--data={runs}', '--workdir={folder}', '--config.weights_per_run=256',
    '--config.batch_size=256', '--config.steps=12', '--config.validate_every=4',
    '--config.save_every_seconds=0',
  ),
  'nowcast.py': ('--workdir={folder}', '--predictor=known_leaf_history_free,shrink', '--steps=2'),
  'study.py': ('--workdir={folder}', '--config={study}'),
}  # fmt: skip

MIDST = {
  'forget.py': ('metrics.jsonl', 1),
  'collect.py': ('running/*/metrics.jsonl', 1),
  'meta_train.py': ('metrics.jsonl', 1),
  'nowcast.py': ('predictions/*/1/manifest.json', 1),
  'study.py': ('journal.jsonl', 2),
}
"""Files, and how many lines they have together when a script is in the midst of its work."""

KILLS = {'forget.py': 8, 'collect.py': 6, 'meta_train.py': 6, 'nowcast.py': 6, 'study.py': 12}
"""How often each is killed in the thorough form."""

SHORT = ('forget.py', 'meta_train.py', 'nowcast.py')
"""Those of the short form. The others are killed within one process in test_collect.py and
test_study.py, and train by what the first of these runs."""

LEAVES_WITHIN = 20.0
"""Seconds, for a machine with much else to do."""


@pytest.fixture(scope='module')
def cast(tmp_path_factory, synthetic_runs, thorough):
  folder = tmp_path_factory.mktemp('kills')
  (folder / 'study_config.py').write_text(STUDY)
  with Scripts(folder) as scripts:
    yield Cast(scripts, synthetic_runs, thorough)


class Cast:
  """The scripts, what they leave when nothing interrupts them, and lives full of interruptions."""

  def __init__(self, scripts: Scripts, runs: Path, thorough: bool):
    self._scripts, self._runs, self._thorough = scripts, runs, thorough
    self._whole: dict[str, tuple[Path, Done]] = {}
    self._lives = 0

  def start(self, script: str, folder: Path, kill: Kill | None = None) -> Done:
    """Runs a script, with the same command for the same folder."""
    study = self._scripts.folder / 'study_config.py'
    args = [arg.format(folder=folder, runs=self._runs, study=study) for arg in COMMANDS[script]]
    if kill and kill.path:
      kill = kill._replace(path=str(folder / kill.path))
    return self._scripts.process(script, *args, kill=kill, watched=folder)

  def new_folder(self, script: str) -> Path:
    """A folder for a script to write to, with what it reads there."""
    self._lives += 1
    folder = self._scripts.folder / f'{self._lives}-{script}'
    if script == 'nowcast.py':
      shutil.copytree(self.whole('forget.py')[0], folder)
    return folder

  def whole(self, script: str) -> tuple[Path, Done]:
    """The folder of a run that nothing interrupted, and what is known of its life."""
    if script not in self._whole:
      # The first compiles; a second one takes the time that those take which will be killed.
      for _ in range(1 + self._thorough):
        done = self.start(script, folder := self.new_folder(script))
        assert done.code == 0, done.err
      self._whole[script] = folder, done
    return self._whole[script]

  def live(self, script: str, points: list[Kill]) -> list[Done]:
    """Starts a script again after each signal, until it ends; its folder is as if none had come.

    Returns:
      What was left of each process that a signal ended.
    """
    whole, folder = self.whole(script)[0], self.new_folder(script)
    ended = []
    for point in [*points, None]:
      print(f'{script}: {point}')
      done = self.start(script, folder, point)
      if done.code == 0:
        break
      assert point and done.code in (-signal.SIGKILL, 143), done.err
      if point.signal == signal.SIGTERM:
        assert done.code == 143
        assert done.err.endswith(f'{script}: terminated.\n')
      assert 'Traceback' not in done.err, done.err
      ended.append(done)
    found, expected = contents(folder), contents(whole)
    assert sorted(found) == sorted(expected)
    for name, value in found.items():
      assert value == expected[name], name
    shutil.rmtree(folder)
    return ended

  def point(self, script: str, rng: random.Random, signum: int, share: float) -> Kill:
    """A random point in the first part of a script's life, by time or by what it writes."""
    done = self.whole(script)[1]
    if self._thorough and signum == signal.SIGKILL and rng.random() < 0.5:
      return Kill(signum, seconds=rng.uniform(0.0, share * done.seconds))
    return Kill(signum, change=rng.randint(1, round(share * done.changes)))


def contents(folder: Path) -> dict[str, Any]:
  """All that is in a folder, by name: bits, and JSON without what is read from a clock."""
  found: dict[str, Any] = {}
  checkpoint_folders = {path.parent for path in folder.rglob('manifest.json')}
  for path in sorted(folder.rglob('*')):
    name = path.relative_to(folder).as_posix()
    if checkpoint_folders & {*path.parents} or 'tensorboard' in path.parts[:-1]:
      continue
    if path in checkpoint_folders:
      leaves = trees.named_leaves(checkpoints.restore(path))
      bits = {key: (x.dtype.name, x.shape, x.tobytes()) for key, x in leaves.items()}
      found[name] = bits, timeless(checkpoints.read_metadata(path))
    elif path.name == 'tensorboard':
      found[name] = events_of(path)
    elif path.is_dir():
      found[name] = 'folder'
    elif path.suffix == '.jsonl':
      lines = journal.read_lines(path)
      assert path.read_bytes().count(b'\n') == len(lines), name
      found[name] = [timeless(line) for line in lines]
    elif path.suffix == '.json':
      found[name] = timeless(sealed.read_sealed(path, name))
    elif path.name == 'timings.csv':
      header, *rows = path.read_text().splitlines()
      assert header.endswith(',seconds')
      found[name] = [header, *(row.rpartition(',')[0] for row in rows)]
    elif path.suffix == '.safetensors':
      # The library gives the entries of the header another order in every process.
      data = path.read_bytes()
      start = 8 + int.from_bytes(data[:8], 'little')
      found[name] = json.loads(data[8:start]), data[start:]
    else:
      found[name] = path.read_bytes()
  return found


def timeless(value: Any) -> str:
  """JSON data without what is read from a clock, as text: in it, NaN equals NaN."""

  def strip(value: Any) -> Any:
    if isinstance(value, dict):
      return {key: strip(entry) for key, entry in value.items() if key not in CLOCK}
    return [strip(entry) for entry in value] if isinstance(value, list) else value

  return json.dumps(strip(value))


@pytest.mark.parametrize('script', COMMANDS)
def test_a_script_that_is_stopped_ends_with_the_same_bits(cast, thorough, tally, script):
  if not (thorough or script in SHORT):
    pytest.skip('part of --thorough; its own tests have kills within the process')
  seed = int(os.environ.get('KILL_SEED', random.SystemRandom().randrange(10**6) * thorough))
  print(f'KILL_SEED={seed}')
  rng = random.Random(f'{seed} {script}')

  pattern, lines = MIDST[script]
  points = [Kill(signal.SIGTERM, path=pattern, lines=lines)]
  signums = (signal.SIGTERM, signal.SIGTERM) if thorough else (signal.SIGKILL,)
  points += [cast.point(script, rng, signum, 0.3) for signum in signums]
  first, *_ = ended = cast.live(script, points)
  assert first.code == 143
  assert first.seconds < LEAVES_WITHIN
  killed = sum(done.code == -signal.SIGKILL for done in ended)
  assert killed == (not thorough)

  while thorough and killed < KILLS[script]:
    # The longer a life, the less of it is left to be killed in.
    shares = [0.5**number for number in range(min(KILLS[script] - killed, 4))]
    points = [cast.point(script, rng, signal.SIGKILL, share) for share in shares]
    killed += len(cast.live(script, points))
  tally('kills survived', killed)
