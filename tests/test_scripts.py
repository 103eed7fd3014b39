"""The scripts, end to end as a user runs them, mostly on one device: results, kills, mistakes."""

import os
import re
import signal
import subprocess
import sys

import pytest
from processes import ROOT, Kill, Scripts

from know_jax.io import checkpoints
from know_jax.io.journal import read_lines
from know_jax.predictors import parameters
from know_jax.runs import workdir as workdirs
from know_jax.runs.record import RunRecord


@pytest.fixture(scope='module')
def scripts(tmp_path_factory):
  with Scripts(tmp_path_factory.mktemp('scripts')) as scripts:
    yield scripts


# `runs.small_config`, as flags.
SMALL = (
  '--config.dataset=digits',
  '--config.classes=(0,1,2,3,4)',
  '--config.stage_epochs=2',
  '--config.augmentation.rotation=0.0',
  '--config.augmentation.shift=0.0',
  '--config.augmentation.zoom=0.0',
  '--config.stage_lr=0.01',
  '--config.train_examples=625',
  '--config.rate=0.4',
  '--config.model=cnn_bn',
  '--config.width=2',
  '--config.epochs=2',
  '--config.batch_size=16',
  '--config.lr=0.01',
)
QUICK = ('--config.seeds=2', '--config.warmup_epochs=1', '--config.epochs=1')


def test_a_newcomer_needs_no_flags(scripts, known_file):
  said = f'No --workdir is given: {scripts.folder / "workdir"} is used.\n'
  code, out, err = scripts.run(
    'forget.py', '--config.epochs=1', '--config.stage_epochs=1', '--config.width=4'
  )
  assert code == 0, err
  assert out.startswith(said)
  workdir = scripts.folder / 'workdir'
  record = RunRecord.read(workdir, workdirs.KIND)
  rows = [line.split() for line in out.splitlines()[2:-1]]
  assert [row[:3] for row in rows] == [
    [str(s['stage']), str(s['examples']), f'{s["test_accuracy"]:.2%}'] for s in record['stages']
  ]
  assert [int(row[1]) for row in rows] == record['subset_sizes'] == [1600, 800, 400, 200, 100]
  assert record['environment']['devices'] == 1
  assert f'{record["parameters"]:,} parameters; 5 stages in workdir' in out.splitlines()[-1]
  assert re.search(r'stage 4: 100%.*(epoch/s|s/ epoch)', err)  # The bar, with its rate.

  shipped = [] if parameters.SHIPPED['known_leaf'].is_file() else [f'--known={known_file}']
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
  assert restored['params']['head']['kernel'].shape == (8 * 4, 10)
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
  (path,) = workdir.glob('transfer/new_glyphs-*/results.jsonl')
  assert len(read_lines(path)) == 5 * 2


def test_the_settings_for_a_cpu_that_the_page_has_give_it_a_device_for_each_core(tmp_path):
  page = (ROOT / 'docs' / 'scale.md').read_text()
  settings = dict(re.findall(r'^export (\w+)=(\S+)', page, re.MULTILINE))
  assert list(settings) == ['GLIBC_TUNABLES', 'JAX_NUM_CPU_DEVICES', 'XLA_FLAGS']
  flags = ('--config.epochs=1', '--config.stage_epochs=1', '--config.width=4')
  env = {**os.environ, 'PYTHONPATH': str(ROOT), **settings}
  # Devices by the page's own setting.
  fast = os.environ['XLA_FLAGS'].replace('--xla_force_host_platform_device_count=8', '')
  env['XLA_FLAGS'] = f'{env["XLA_FLAGS"]} {fast}'
  done = subprocess.run(
    [sys.executable, str(ROOT / 'bin' / 'forget.py'), f'--workdir={tmp_path / "run"}', *flags],
    capture_output=True,
    text=True,
    env=env,
  )
  assert done.returncode == 0, done.stderr
  record = RunRecord.read(tmp_path / 'run', workdirs.KIND)
  assert record['environment']['devices'] == 2 and len(record['stages']) == 5


@pytest.fixture(scope='module')
def whole(scripts):
  """The workdir of a run that nothing interrupted."""
  workdir = scripts.folder / 'whole'
  code, _, err = scripts.run('forget.py', f'--workdir={workdir}', *SMALL)
  assert code == 0, err
  return workdir


def test_a_killed_transfer_has_every_row_once(scripts, whole):
  command = ('transfer.py', f'--workdir={whole}', *QUICK)
  results = str(whole / 'transfer' / '*' / 'results.jsonl')
  done = scripts.process(*command, kill=Kill(signal.SIGKILL, path=results, lines=2))
  assert done.code == -signal.SIGKILL, done.err
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
  (('forget.py', '--on_metrics=nowhere:log'), "on_metrics 'nowhere:log': cannot import 'nowhere'"),
  (('forget.py', '--config.epoch=3'), "unknown config field 'epoch'. Did you mean 'epochs'"),
  (
    ('forget.py', '--config.batch_size=128'),
    'stage 4 (0 is the whole set) has 100 examples; expected',
  ),
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
      'another config. lr: found 0.01, expected 0.02. Give',
    ),
    (('nowcast.py', '--predictor=shrik'), "unknown predictor 'shrik'. Did you mean 'shrink'"),
    (('nowcast.py', '--predictor=task_vector', '--steps=5'), 'can do at most steps=4 with the 5'),
    (
      ('transfer.py', '--predictor=known_leaf'),
      "no predictions of 'known_leaf'; found none. Run bin/nowcast",
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
