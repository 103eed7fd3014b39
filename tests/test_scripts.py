"""The scripts, end to end as a user runs them, on one device: results, kills, mistakes."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import SIZES, STEPS, assert_same_bits
from test_run_record import events_of

from know_jax import checkpoints, forgetting, pretrained
from know_jax.files import read_lines
from know_jax.run_record import RunRecord

ROOT = Path(__file__).parent.parent

# As in test_cli.py: importing takes seconds, so one process does it and forks for every script.
DRIVER = """
import glob, json, os, pathlib, runpy, signal, sys, time, traceback, warnings
import matplotlib.figure, orbax.checkpoint, sklearn.datasets, tensorboardX
from know_jax import cli, prediction, transfer

cli._CACHE_SECONDS = 0.0

def lines(pattern):
  return sum(pathlib.Path(path).read_bytes().count(b'\\n') for path in glob.glob(pattern))

for line in sys.stdin:
  task = json.loads(line)
  pid = os.fork()
  if not pid:
    for name, fd in (('out', 1), ('err', 2)):
      os.dup2(os.open(os.path.join(task['cwd'], name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    os.chdir(task['cwd'])
    sys.argv = task['argv']
    sys.stdin.close()
    warnings.simplefilter('default')
    code = 99  # cli.run never returns.
    try:
      runpy.run_path(sys.argv[0], run_name='__main__')
    except SystemExit as stop:
      code = stop.code or 0
    except BaseException:
      traceback.print_exc()
      code = 1
    sys.stdout.flush()
    os._exit(code)
  done = 0
  if task['kill']:
    signum, path, count, delay = task['kill']
    while not done and lines(path) < count:
      time.sleep(0.002)
      done, status = os.waitpid(pid, os.WNOHANG)
    if not done:
      time.sleep(delay)
      os.kill(pid, signum)
  if not done:
    _, status = os.waitpid(pid, 0)
  print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Scripts:
  """Runs the scripts of bin/ in processes of their own, which share compiled programs."""

  def __init__(self, folder):
    self.folder = folder
    env = {key: value for key, value in os.environ.items() if key != 'JAX_COMPILATION_CACHE_DIR'}
    env |= {
      'XLA_FLAGS': '--xla_force_host_platform_device_count=1',
      'XDG_CACHE_HOME': str(folder / 'cache'),
    }
    self.env = env
    self.driver = subprocess.Popen(
      [sys.executable, '-W', 'ignore', '-c', DRIVER],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=env,
    )

  def run(self, script, *args, kill=None):
    """Returns exit code, stdout and stderr.

    `kill`: (signal, pattern, lines, seconds): the signal is sent so many seconds after the file
    that the pattern matches has so many lines.
    """
    task = {
      'argv': [str(ROOT / 'bin' / script), *map(str, args)],
      'cwd': str(self.folder),
      'kill': kill and [int(kill[0]), str(kill[1]), *kill[2:]],
    }
    print(json.dumps(task), file=self.driver.stdin, flush=True)
    code = int(self.driver.stdout.readline())
    out, err = ((self.folder / name).read_text() for name in ('out', 'err'))
    assert 'Warning' not in err
    return code, out, err


@pytest.fixture(scope='module')
def scripts(tmp_path_factory):
  scripts = Scripts(tmp_path_factory.mktemp('scripts'))
  yield scripts
  scripts.driver.stdin.close()
  scripts.driver.wait()
  scripts.driver.stdout.close()


# `runs.small_config`, as flags; saves are so frequent that every run has some to resume from.
SMALL = (
  '--config.train_examples=625',
  '--config.rate=0.4',
  '--config.model=cnn_bn',
  '--config.width=2',
  '--config.epochs=2',
  '--config.batch_size=16',
  '--config.lr=0.01',
  '--config.save_every_seconds=0.1',
)
QUICK = ('--config.seeds=2', '--config.warmup_epochs=1', '--config.epochs=1')


def test_a_newcomer_needs_no_flags(scripts, known_file):
  said = f'No --workdir is given: {scripts.folder / "workdir"} is used.\n'
  code, out, err = scripts.run('forget.py', '--config.epochs=1', '--config.width=4')
  assert code == 0, err
  assert out.startswith(said)
  workdir = scripts.folder / 'workdir'
  record = RunRecord.read(workdir, forgetting.KIND)
  rows = [line.split() for line in out.splitlines()[2:-1]]
  assert [row[:3] for row in rows] == [
    [str(s['stage']), str(s['examples']), f'{s["test_accuracy"]:.2%}'] for s in record['stages']
  ]
  assert [int(row[1]) for row in rows] == record['subset_sizes'] == [723, 362, 181, 91, 46]
  assert record['environment']['devices'] == 1
  assert f'{record["parameters"]:,} parameters; 5 stages in workdir' in out.splitlines()[-1]
  assert re.search(r'stage 4: 100%.*epoch/s', err)  # The bar, with its rate.

  shipped = [] if pretrained.SHIPPED['known'].is_file() else [f'--known={known_file}']
  code, out, err = scripts.run('nowcast.py', '--steps', '3', *shipped)
  assert code == 0, err
  assert out.startswith(said)
  kinds = dict(re.findall(r'^(params/\S+) +(\w+) +\(', out, re.MULTILINE))
  layers = ('conv1', 'conv2', 'conv3', 'dense', 'head')
  assert kinds == {f'params/{layer}/bias': 'bias' for layer in layers} | {
    f'params/{layer}/kernel': 'conv' if 'conv' in layer else 'fc' for layer in layers
  }
  assert 'BatchNorm after prediction: keep' in out
  rows = re.findall(r'^(known|persistence) +x(\d) +([\d.]+%) .*%\)', out, re.MULTILINE)
  assert [(name, multiple) for name, multiple, _ in rows] == [
    ('persistence', '1'), ('known', '2'), ('known', '4'), ('known', '8'),
  ]  # fmt: skip
  about = [checkpoints.read_metadata(workdir / 'predictions' / 'known' / n) for n in '123']
  assert [accuracy for _, _, accuracy in rows[1:]] == [f'{a["test_accuracy"]:.2%}' for a in about]
  restored = checkpoints.restore(workdir / 'predictions' / 'known' / '3')
  assert restored['params']['head']['kernel'].shape == (8 * 4, 5)
  assert (workdir / 'predictions' / 'nowcast.png').is_file()

  code, out, err = scripts.run('transfer.py', *QUICK)
  assert code == 0, err
  assert out.startswith(said)
  table = [line for line in out.splitlines() if line.startswith('|')]
  assert [line.split('|')[1].strip() for line in table] == [
    'predictor', table[1].split('|')[1], 'scratch (no pre-training)', 'persistence (naive)',
    'known',
  ]  # fmt: skip
  assert [cell.strip() for cell in table[0].split('|')[2:-1]] == [
    f'{part} x{m}' for part in ('as is', 'transfer') for m in (1, 2, 4, 8)
  ]
  assert re.fullmatch(r'\d+\.\d ± \d+\.\d', table[-1].split('|')[-2].strip())
  (path,) = workdir.glob('transfer/digits-*/results.jsonl')
  assert len(read_lines(path)) == 5 * 2


@pytest.fixture(scope='module')
def whole(scripts):
  """The workdir of a run that nothing interrupted."""
  workdir = scripts.folder / 'whole'
  code, _, err = scripts.run('forget.py', f'--workdir={workdir}', *SMALL)
  assert code == 0, err
  return workdir


def test_a_run_killed_at_random_points_ends_with_the_same_bits(scripts, whole):
  workdir = scripts.folder / 'killed'
  metrics = workdir / 'metrics.jsonl'
  rng = random.Random()  # Not seeded: when a signal arrives cannot be repeated anyway.
  command = ('forget.py', f'--workdir={workdir}', *SMALL)
  # Before the first epoch is done or in it; and soon after the first and the third.
  for place, lines, longest in (
    (workdir / 'record.json', 1, 0.5),
    (metrics, 1, 0.1),
    (metrics, 3, 0.1),
  ):
    delay = rng.uniform(0.0, longest)
    code, _, err = scripts.run(*command, kill=(signal.SIGKILL, place, lines, delay))
    assert code == -signal.SIGKILL, err
  code, out, err = scripts.run('nowcast.py', f'--workdir={workdir}', '--predictor=shrink')
  assert (code, out) == (2, '')
  assert re.fullmatch(r'nowcast\.py: .*killed: [1-4] of 5 stages are done; run bin/.*\n', err)
  code, _, err = scripts.run(*command, kill=(signal.SIGTERM, metrics, 7, 0.0))
  assert code == 143, err
  assert err.endswith('forget.py: terminated.\n')
  assert 'Traceback' not in err
  code, _, err = scripts.run(*command)
  assert code == 0, err

  for stage in range(5):
    found, wanted = (forgetting.restore_stage(run, stage) for run in (workdir, whole))
    assert_same_bits(found, wanted)
  assert metrics.read_bytes() == (whole / 'metrics.jsonl').read_bytes()
  assert len(read_lines(metrics)) == 2 * len(STEPS)
  assert events_of(workdir / 'tensorboard') == events_of(whole / 'tensorboard')
  records = [RunRecord.read(run, forgetting.KIND) for run in (workdir, whole)]
  assert records[0]['config'] == records[1]['config']
  assert records[0]['subset_sizes'] == SIZES
  for mine, other in zip(*(record['stages'] for record in records), strict=True):
    assert {**mine, 'train_seconds': 0} == {**other, 'train_seconds': 0}
  assert sorted(path.name for path in workdir.iterdir()) == [
    'metrics.jsonl', 'record.json', 'stages', 'tensorboard',
  ]  # fmt: skip
  assert sorted(path.name for path in (workdir / 'stages').iterdir()) == list('01234')


def test_a_killed_transfer_has_every_row_once(scripts, whole):
  command = ('transfer.py', f'--workdir={whole}', *QUICK)
  results = whole / 'transfer' / '*' / 'results.jsonl'
  code, _, err = scripts.run(*command, kill=(signal.SIGKILL, results, 2, 0.0))
  assert code == -signal.SIGKILL, err
  (path,) = whole.glob('transfer/*/results.jsonl')
  first = read_lines(path)
  assert 2 <= len(first) < 4
  code, out, err = scripts.run(*command)
  assert code == 0, err
  rows = read_lines(path)
  assert rows[: len(first)] == first
  assert [(row['predictor'], row['seed']) for row in rows] == [
    ('scratch', 0), ('scratch', 1), ('persistence', 0), ('persistence', 1),
  ]  # fmt: skip
  # The same again: nothing is trained, and the same table is shown.
  assert scripts.run(*command)[:2] == (0, out)
  assert read_lines(path) == rows


MISTAKES = [
  (('forget.py', '--config.dataset=digitz'), "unknown data set 'digitz'. Did you mean 'digits'"),
  (('forget.py', '--config.model=cnn_nb'), "unknown model 'cnn_nb'. Did you mean 'cnn_bn'"),
  (('forget.py', '--config.epoch=3'), "unknown config field 'epoch'. Did you mean 'epochs'"),
  (('forget.py', '--config.batch_size=64'), 'stage 4 (0 is the whole set) has 46 examples; wanted'),
  (
    ('forget.py', '--config.rate=0.1', '--config.stages=3', '--config.batch_size=1',
     '--config.stratified=False', '--config.train_examples=300'),
    'stage 2 (0 is the whole set) has 3 examples but none of class',
  ),
  (
    ('nowcast.py', '--predictor=shrink'),
    'new: no forgetting run is here; make one with bin/forget.py.',
  ),
  (('transfer.py',), 'new: no forgetting run is here; make one with bin/forget.py.'),
]  # fmt: skip


@pytest.mark.parametrize(('command', 'message'), MISTAKES, ids=range(len(MISTAKES)))
def test_mistakes_end_in_one_line_and_write_nothing(scripts, command, message):
  code, out, err = scripts.run(*command, '--workdir=new')
  assert (code, out) == (2, '')
  assert err.startswith(f'{command[0]}: {message}')
  assert err.count('\n') == 1
  assert not (scripts.folder / 'new').exists()


def test_what_a_finished_run_cannot_do(scripts, whole):
  for command, message in (
    (
      ('forget.py', *SMALL, '--config.lr=0.02'),
      'another config. lr: found 0.01, wanted 0.02. Give',
    ),
    (('nowcast.py', '--predictor=shrik'), "unknown predictor 'shrik'. Did you mean 'shrink'"),
    (('nowcast.py', '--predictor=task_vector', '--steps=5'), 'can do at most steps=4 with the 5'),
    (
      ('transfer.py', '--predictor=known'),
      "no predictions of 'known'; found none. Run bin/nowcast",
    ),
  ):
    code, _, err = scripts.run(*command, f'--workdir={whole}')
    assert code == 2
    assert message in err
    assert err.count('\n') == 1
  assert not (whole / 'predictions').exists()


def test_a_script_runs_by_itself(scripts):
  """Without the fork: a Python of its own, from another directory."""
  done = subprocess.run(
    [sys.executable, ROOT / 'bin' / 'forget.py', '--config.optimizer=adm', '--workdir=new'],
    cwd=scripts.folder,
    env=scripts.env,
    capture_output=True,
    text=True,
    check=False,
  )
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr.startswith("forget.py: unknown optimizer 'adm'. Did you mean 'adam'")
  assert done.stderr.count('\n') == 1
  assert not (scripts.folder / 'new').exists()
