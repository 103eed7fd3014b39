"""Two processes of two devices each do what one process does, and what one finds, both know.

They are real ones, on this machine, that talk by gloo.
"""

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from processes import xla_flags
from runs import assert_close, assert_same_bits, forget, small_config
from two_processes import FEW_STEPS, STOPPED_AFTER, make_history

from know_jax.errors import UserError
from know_jax.io import checkpoints
from know_jax.io.journal import read_lines
from know_jax.runs import workdir as workdirs
from know_jax.system import processes
from know_jax.training import steps

ROOT = Path(__file__).parents[2]
SECONDS = 240
"""Until they are killed; idle, it takes a tenth of that."""

SLURM_PORTS = range(65536 - 2**12, 65536)
"""Where JAX has the processes of a Slurm job meet: the number of the job says which it is."""


def free_port(candidates=(0,)):
  for port in candidates:
    with socket.socket() as sock:
      try:
        sock.bind(('localhost', port))
      except OSError:
        continue
      return sock.getsockname()[1]
  raise AssertionError('no port is free')


def run_both(folder, *commands, **variables):
  """Runs two processes to their end; their outputs. The test fails where one of them does.

  Args:
    folder: for what they print.
    *commands: the arguments of Python for each.
    **variables: of the environment; of each its own.
  """
  flags = xla_flags(devices=2)
  outputs, children = [folder / f'output{i}' for i in range(2)], []
  try:
    for i, (command, output) in enumerate(zip(commands, outputs, strict=True)):
      env = {**os.environ, 'XLA_FLAGS': flags, 'PYTHONPATH': str(ROOT)}
      env |= {name: str(values[i]) for name, values in variables.items()}
      with output.open('w') as file:
        children.append(
          subprocess.Popen(
            [sys.executable, '-W', 'ignore', *map(str, command)],
            cwd=folder, env=env, stdout=file, stderr=subprocess.STDOUT,
          )
        )  # fmt: skip
    for child in children:
      child.wait(SECONDS)
  except subprocess.TimeoutExpired:
    pass
  finally:
    for child in children:
      child.kill()
      child.wait()
  codes, texts = [child.returncode for child in children], [o.read_text() for o in outputs]
  assert codes == [0, 0], '\n'.join([f'exit codes {codes}', *texts])
  return texts


@functools.cache
def compiled_for(devices):
  """What `training.steps` compiles, anew: for so many of the devices of this process."""
  names = ('_train_step', '_eval_step', '_sharding', 'count_wishes')
  return {name: functools.cache(getattr(steps, name).__wrapped__) for name in names}


def forget_on(devices, workdir):
  """The run of `FEW_STEPS`, or what is left of it, in this process on so many devices."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'pmap', functools.partial(jax.pmap, devices=jax.devices()[:devices]))
    for name in ('device_count', 'local_device_count'):
      patch.setattr(jax, name, lambda: devices)
    for name, compiled in compiled_for(devices).items():
      patch.setattr(steps, name, compiled)
    forget(workdir, **FEW_STEPS)
  return workdir


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """The run in one process: number of devices -> workdir."""
  folder = tmp_path_factory.mktemp('alone')
  return {devices: forget_on(devices, folder / str(devices)) for devices in (1, 4)}


@pytest.fixture(scope='module')
def both(tmp_path_factory):
  """The folder where two processes have done all that two_processes.py has them do, and outputs."""
  folder, port = tmp_path_factory.mktemp('both'), free_port()
  config = folder / 'config.py'
  fields = json.dumps(small_config(**FEW_STEPS).to_dict())
  config.write_text(
    f'import json, ml_collections\n'
    f'def get_config():\n  return ml_collections.ConfigDict(json.loads({fields!r}))\n'
  )
  script = (ROOT / 'bin' / 'forget.py', f'--workdir={folder / "run"}', f'--config={config}')
  together = (f'--coordinator=localhost:{port}', '--processes=2')
  commands = [
    (ROOT / 'tests' / 'two_processes.py', folder, *script, *together, f'--process={process}')
    for process in range(2)
  ]
  return folder, run_both(folder, *commands)


def assert_same_run(found, expected):
  """The same run but for rounding."""
  for stage in range(FEW_STEPS['stages']):
    weights = [workdirs.restore_stage(workdir, stage) for workdir in (found, expected)]
    assert_close(*weights, rtol=1e-4, atol=1e-6)
  metrics = [read_lines(workdir / 'metrics.jsonl') for workdir in (found, expected)]
  assert [line['step'] for line in metrics[0]] == [1, 2]
  for line, other in zip(*metrics, strict=True):
    assert line == pytest.approx(other, rel=1e-4)
  stages = [workdirs.finished_record(workdir)['stages'] for workdir in (found, expected)]
  for stage, other in zip(*stages, strict=True):
    seconds = {'train_seconds': stage['train_seconds']}
    assert stage == pytest.approx({**other, **seconds}, rel=1e-4)


def test_two_processes_train_as_one(both, alone):
  folder, (first, second) = both
  workdir = folder / 'run'
  for devices in (1, 4):
    assert_same_run(workdir, alone[devices])
  assert workdirs.finished_record(workdir)['environment']['devices'] == 4
  # Process 0 alone writes and says what there is to say.
  assert len(list((workdir / 'tensorboard').iterdir())) == FEW_STEPS['stages']
  assert 'test accuracy' in first
  assert 'stage 1: 100%' in first
  assert 'accuracy' not in second
  assert 'epoch' not in second


def test_what_both_refuse_leaves_nothing(both):
  folder, _ = both
  assert not (folder / 'refused').exists()
  assert not (folder / 'unlike').exists()


def test_what_both_saved_one_restores(both):
  folder, _ = both
  found = checkpoints.restore(folder / 'spread')
  assert found.pop('step') == 7
  assert_same_bits(found, make_history()[-1])
  assert checkpoints.read_metadata(folder / 'spread') == {'of': 'two'}
  files = checkpoints.verify(folder / 'spread')
  assert any(name.startswith('weights/ocdbt.process_1/') for name in files), 'only one has written'


def test_what_both_were_stopped_in_one_finishes(both, alone):
  folder, _ = both
  steps = [json.loads((folder / f'steps{process}.json').read_text()) for process in range(2)]
  assert steps[0] == steps[1]
  assert STOPPED_AFTER <= steps[0] <= STOPPED_AFTER + 2
  assert checkpoints.restore(folder / 'stopped' / 'resume')['step'] == steps[0]
  assert_same_run(forget_on(1, folder / 'stopped'), alone[4])


def test_a_cluster_tells_its_processes_who_they_are(tmp_path):
  job = free_port(SLURM_PORTS) - SLURM_PORTS[0]
  code = (
    'from know_jax.system import processes; processes.start("auto"); import jax; '
    'print("found", jax.process_index(), jax.device_count())'
  )
  outputs = run_both(
    tmp_path,
    *[['-c', code]] * 2,
    SLURM_JOB_ID=(job, job),
    SLURM_STEP_NODELIST=('localhost', 'localhost'),
    SLURM_NTASKS=(2, 2),
    SLURM_PROCID=(0, 1),
    SLURM_LOCALID=(0, 1),
  )
  for process, output in enumerate(outputs):
    assert f'found {process} 4' in output


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (('localhost:1', 2), 'with processes 2 and process None; expected HOST:PORT with both, or'),
    (('auto', 2, 0), "or 'auto' with neither"),
    (('localhost:1', 2, 2), 'process is 2; expected 0 to 1, of 2 processes'),
    (('localhost', 2, 0), "coordinator is 'localhost'; expected HOST:PORT or 'auto'"),
  ],
)
def test_wrong_ways_to_start_are_named(arguments, message):
  with pytest.raises(UserError, match=message):
    processes.start(*arguments)


def test_a_process_by_itself_calls(tmp_path):
  assert processes.is_first()
  assert processes.from_first(lambda: tmp_path) is tmp_path
  assert processes.in_all(lambda: tmp_path) is tmp_path
  processes.check_same({'any': tmp_path}, 'config')
