"""The scripts of bin/ as processes of their own, to be looked at, signalled and killed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent

# As in test_cli.py: importing takes seconds, so one process does it and forks for every script.
DRIVER = """
import glob, json, os, pathlib, runpy, signal, sys, time, traceback, warnings
import matplotlib.figure, orbax.checkpoint, tensorboardX
from know_jax import transfer
from know_jax.nowcast import from_run
from know_jax.runs import cli
from know_jax.system import compiled
from know_jax.meta import collect, meta_training
from know_jax.study import runner

compiled.MIN_SECONDS = 0.0
CHANGES = {'open', 'os.mkdir', 'os.remove', 'os.rename', 'os.rmdir'}
WRITING = os.O_WRONLY | os.O_RDWR
changes = 0

def lines(pattern):
  return sum(pathlib.Path(path).read_bytes().count(b'\\n') for path in glob.glob(pattern))

def watch(folder, signum, number):
  # Counts the changes to names in a folder; a signal may come just before one of them.
  def hook(event, args):
    global changes
    if event not in CHANGES or event == 'open' and not (args[2] or 0) & WRITING:
      return
    path = os.fspath(args[0]) if not isinstance(args[0], int) else ''
    path = path.decode() if isinstance(path, bytes) else path
    # What is removed with all that it holds is named from within the directory that it is in.
    within = event in ('os.remove', 'os.rmdir') and args[1] != -1
    if within or path.startswith(folder):
      changes += 1
      if changes == number:
        os.kill(os.getpid(), signum)
  sys.addaudithook(hook)

for line in sys.stdin:
  task = json.loads(line)
  kill = task['kill'] or {}
  began = time.monotonic()
  pid = os.fork()
  if not pid:
    for name, fd in (('out', 1), ('err', 2)):
      os.dup2(os.open(os.path.join(task['cwd'], name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    os.chdir(task['cwd'])
    sys.argv = task['argv']
    sys.stdin.close()
    warnings.simplefilter('default')
    if task['watched']:
      watch(task['watched'], kill.get('signal'), kill.get('change'))
    code = 99  # cli.run never returns.
    try:
      runpy.run_path(sys.argv[0], run_name='__main__')
    except SystemExit as stop:
      code = stop.code or 0
    except BaseException:
      traceback.print_exc()
      code = 1
    sys.stdout.flush()
    with open('changes', 'w') as file:
      file.write(str(changes))
    os._exit(code)
  done = 0
  if kill.get('change') is None and kill:
    while not done and kill['path'] and lines(kill['path']) < kill['lines']:
      time.sleep(0.002)
      done, status = os.waitpid(pid, os.WNOHANG)
    until = (time.monotonic() if kill['path'] else began) + kill['seconds']
    while not done and time.monotonic() < until:
      time.sleep(max(0.0, min(0.01, until - time.monotonic())))
      done, status = os.waitpid(pid, os.WNOHANG)
    if not done:
      began = time.monotonic()
      os.kill(pid, kill['signal'])
  if not done:
    _, status = os.waitpid(pid, 0)
  code = os.waitstatus_to_exitcode(status)
  print(json.dumps([code, time.monotonic() - began]), flush=True)
"""


class Kill(NamedTuple):
  """A signal to be sent to a script at some point of its life.

  Attributes:
    signal: which.
    change: just before the script makes its so-manieth change to a name in the watched folder
      (opening a file to write, making, renaming or removing something); None: by time.
    seconds: so many seconds after the script has started, or after the next two have come true.
    path: a pattern of files;
    lines: that have so many lines.
  """

  signal: int
  change: int | None = None
  seconds: float = 0.0
  path: str = ''
  lines: int = 0


class Done(NamedTuple):
  """What is left of a process.

  Attributes:
    code: its exit code, the negative number of the signal that killed it.
    out: what it wrote to stdout.
    err: to stderr.
    seconds: it lived, since it was signalled from outside or else since it was started.
    changes: how many it made to names in the watched folder; 0 if it was killed.
  """

  code: int
  out: str
  err: str
  seconds: float
  changes: int


def xla_flags(devices: int) -> str:
  """Those of this process, by which small programs compile soon, with so many devices."""
  return os.environ['XLA_FLAGS'].replace('device_count=8', f'device_count={devices}')


class Scripts:
  """Runs the scripts of bin/ in processes of their own, which share compiled programs."""

  def __init__(self, folder: Path):
    self.folder = folder
    env = {key: value for key, value in os.environ.items() if key != 'JAX_COMPILATION_CACHE_DIR'}
    env |= {
      'XLA_FLAGS': xla_flags(devices=1),
      'XDG_CACHE_HOME': str(folder / 'cache'),
      # No git: a commit made between two runs would tell their records apart.
      'PATH': '',
    }
    self.env = env
    self._driver = subprocess.Popen(
      [sys.executable, '-W', 'ignore', '-c', DRIVER],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=env,
    )

  def __enter__(self) -> 'Scripts':
    return self

  def __exit__(self, *_: object) -> None:
    assert self._driver.stdin and self._driver.stdout
    self._driver.stdin.close()
    self._driver.wait()
    self._driver.stdout.close()

  def process(self, script: str, *args: Any, kill: Kill | None = None, watched: Any = '') -> Done:
    """Runs a script to its end, or to that which `kill` gives it."""
    assert self._driver.stdin and self._driver.stdout
    (self.folder / 'changes').write_text('0')
    task = {
      'argv': [str(ROOT / 'bin' / script), *map(str, args)],
      'cwd': str(self.folder),
      'watched': str(watched),
      'kill': kill and {**kill._asdict(), 'signal': int(kill.signal)},
    }
    print(json.dumps(task), file=self._driver.stdin, flush=True)
    code, seconds = json.loads(self._driver.stdout.readline())
    out, err, changes = ((self.folder / name).read_text() for name in ('out', 'err', 'changes'))
    assert 'Warning' not in err, err
    return Done(code, out, err, seconds, int(changes))

  def run(self, script: str, *args: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a script."""
    return self.process(script, *args)[:3]
