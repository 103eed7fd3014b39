"""Scripts: what users mistype, and signals, end in one line and an exit code; programs are kept."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import pytest

from know_jax.errors import UserError
from know_jax.runs import cli
from know_jax.system import compiled, signals

# Importing JAX takes seconds, so one process does it and forks for every script it is to run. It
# starts no backend, so that nothing of JAX is running when it forks.
DRIVER = """
import json, os, runpy, signal, sys, time, traceback, warnings
from know_jax.runs import cli

for line in sys.stdin:
  task = json.loads(line)
  pid = os.fork()
  if not pid:
    for name, fd in (('out', 1), ('err', 2)):
      os.dup2(os.open(os.path.join(task['cwd'], name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    os.chdir(task['cwd'])
    os.environ.update(task['env'])
    sys.argv = task['argv']
    sys.stdin.close()
    # Whoever started the tests in the background had them ignore SIGINT, and what they start too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.simplefilter('default')
    code = 99  # cli.run never returns.
    try:
      runpy.run_path(sys.argv[0], run_name='__main__')
    except SystemExit as stop:
      if task['tidy']:
        raise
      code = stop.code or 0
    except BaseException:
      traceback.print_exc()
      code = 1
    sys.stdout.flush()
    os._exit(code)  # To tidy up takes a third of a second.
  if task['signal']:
    while not os.path.exists(os.path.join(task['cwd'], 'ready')):
      time.sleep(0.01)
    os.kill(pid, task['signal'])
  print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""

SCRIPT = """
from absl import flags
from know_jax.runs import cli

_CONFIG = cli.define_config({config!r})
cli.define_workdir()
_STEPS = flags.DEFINE_integer('steps', 3, 'How many.', lower_bound=1)

def main():
  print(_CONFIG.value.to_dict(), cli.workdir(), _STEPS.value)

if __name__ == '__main__':
  cli.run(main)
"""

CONFIG = """
from ml_collections import ConfigDict
def get_config(width='3'):
  return ConfigDict(dict(
    lr=1e-3, epochs=5, flip=True, betas=(1, 2), model=dict(name='cnn', width=int(width)), to=None))
"""

CLASSES = """
  from ml_collections import ConfigDict
  def get_config():
    data = ConfigDict({'dataset': 'digits', 'classes': (0, 1)})
    return ConfigDict({'data': data, 'dataset': 'digits', 'classes': ()})
"""


class Scripts:
  def __init__(self, folder: Path):
    self.folder = folder
    # The suite names a folder for compiled programs, which JAX reads when it is imported.
    env = {k: v for k, v in os.environ.items() if k != 'JAX_COMPILATION_CACHE_DIR'}
    self.driver = subprocess.Popen(
      [sys.executable, '-W', 'ignore', '-c', DRIVER],
      env=env,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def run(self, script: str, *args: str, send: int = 0, tidy: bool = False, **env: str):
    """Runs a script in its own process; returns exit code, stdout and stderr."""
    (self.folder / 'script.py').write_text(textwrap.dedent(script))
    (self.folder / 'ready').unlink(missing_ok=True)
    env = {'KNOW_JAX_CACHE': str(self.folder / 'cache'), **env}
    task = {
      'argv': ['script.py', *args],
      'cwd': str(self.folder),
      'env': env,
      'signal': send,
      'tidy': tidy,
    }
    print(json.dumps(task), file=self.driver.stdin, flush=True)
    code = int(self.driver.stdout.readline())
    return code, (self.folder / 'out').read_text(), (self.folder / 'err').read_text()


@pytest.fixture(scope='module')
def scripts(tmp_path_factory):
  scripts = Scripts(tmp_path_factory.mktemp('scripts'))
  for name, text in {
    'config.py': CONFIG,
    'syntax.py': 'def get_config(',
    'imports.py': 'import nowhere',
    'raises.py': 'def get_config():\n  raise ValueError("two\\nlines")',
    'none.py': 'x = 1',
    'classes.py': textwrap.dedent(CLASSES),
    'list.py': 'def get_config():\n  return []',
  }.items():
    (scripts.folder / name).write_text(text)
  yield scripts
  scripts.driver.stdin.close()
  scripts.driver.wait()
  scripts.driver.stdout.close()


@pytest.fixture
def script(scripts):
  return SCRIPT.format(config=str(scripts.folder / 'config.py'))


DEFAULTS = {'lr': 1e-3, 'epochs': 5, 'flip': True, 'betas': (1, 2), 'to': None}


def expected(*, width=3, workdir='w', steps=3, **fields):
  model = {'name': 'cnn', 'width': width}
  config = dict(sorted({**DEFAULTS, 'model': model, **fields}.items()))
  return f'{config} {workdir} {steps}\n'


@pytest.mark.parametrize(
  ('args', 'result'),
  [
    ([], {}),
    (['--config.lr=2e-3', '--steps', '4', '--noconfig.flip'],
     {'lr': 2e-3, 'steps': 4, 'flip': False}),
    (['--config=config.py:7', '--config.betas=(3, 4)', '--config.epochs', '6'],
     {'width': 7, 'betas': (3, 4), 'epochs': 6}),
    (['--config', 'config.py', '--config.model.width=8', '--config.lr=1'], {'width': 8, 'lr': 1.0}),
  ],
)  # fmt: skip
def test_flags_and_configs_are_read(scripts, script, args, result):
  assert scripts.run(script, '--workdir=w', *args) == (0, expected(**result), '')


def test_classes_are_those_of_their_own_data_set(scripts, script):
  args = ('--config=classes.py', '--config.dataset=mnist', '--workdir=w')
  _, out, _ = scripts.run(script, *args)
  assert "'dataset': 'mnist'" in out and "'classes': (0, 1)" in out
  _, out, _ = scripts.run(script, *args, '--config.data.dataset=mnist', '--config.data.classes=()')
  assert out.count("'dataset': 'mnist'") == 2 and out.count("'classes': ()") == 2


def test_the_default_workdir_is_named(scripts, script):
  code, out, err = scripts.run(script)
  assert (code, err) == (0, '')
  assert out == (
    f'No --workdir is given: {scripts.folder / "workdir"} is used.\n' + expected(workdir='workdir')
  )
  home = str(scripts.folder)
  out = scripts.run(script, '--workdir=~/w', HOME=home)[1]
  assert out == expected(workdir=f'{home}/w')


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (['--config.lrr=1'], "unknown config field 'lrr'. Did you mean 'lr'? Known: betas, epochs, "),
    (['--config.model.widht=1'], "unknown config field 'model.widht'. Did you mean 'model.width'"),
    (['--config.epochs.x=1'], "unknown config field 'epochs.x'. Did you mean 'epochs'"),
    (['--config.__class__=1'], "unknown config field '__class__'. "),
    (['--config.=1'], "unknown config field ''. "),
    (['--config=config.py', '--config.lrr', '1'], "unknown config field 'lrr'. "),
    (['--noconfig.flop'], "unknown config field 'flop'. Did you mean 'flip'"),
    (['--config.lr=fast'], "flag --config.lr=fast: could not convert string to float: 'fast'"),
    (['--config.epochs=1.5'], 'flag --config.epochs=1.5: invalid literal for int()'),
    (['--config.model=1'], "flag --config.model=1: Failed to parse '1' as a ConfigDict"),
    (['--config.betas[7]=1'], 'wrong flags: tuple index out of range'),
    (['--config.lr'], 'Missing value for flag --config.lr'),
    (['--config.lr=1', '--config=config.py'], 'Found --config.lr=1 in argv before a value for'),
    (['--config=nowhere.py'], "config file 'nowhere.py' is not there."),
    (['--config'], "config file '' is not there."),
    (['--config=syntax.py'], "config file 'syntax.py' fails: SyntaxError: '(' was never closed"),
    (['--config=imports.py'], "config file 'imports.py' fails: ModuleNotFoundError: No module"),
    (['--config=raises.py'], "config file 'raises.py' fails: ValueError: two lines"),
    (['--config=none.py'], "config file 'none.py': it has no function get_config."),
    (['--config=list.py'], "config file 'list.py' gives <class 'list'>; expected a ConfigDict."),
    (['--config=syntax.py:x'], "config file 'syntax.py' fails: SyntaxError"),
    (
      ['--config=classes.py', '--config.data.dataset=mnist'],
      '--config.data.dataset is given, but config.data.classes is (0, 1), classes of the data set '
      "in classes.py; give --config.data.classes too ('()' for all).",
    ),
    (['--setps=4'], "Unknown command line flag 'setps'. Did you mean: steps ?"),
    (['--steps=0'], 'flag --steps=0: 0 is not a positive integer'),
    (['w'], "unexpected argument 'w'; expected flags only, as in --workdir=PATH."),
  ],
)
def test_what_is_mistyped_is_told_in_one_line(scripts, script, args, message):
  code, out, err = scripts.run(script, *args)
  assert (code, out) == (cli.EXIT_USER_ERROR, '')
  assert err.startswith(f'script.py: {message}')
  assert err.count('\n') == 1


def test_help_shows_the_flags_of_the_script(scripts, script):
  code, out, err = scripts.run(script, '--help')
  assert (code, err) == (0, '')
  assert all(flag in out for flag in ('--config:', 'config.py', '--workdir:', '--steps:'))


MAIN = """
import logging, pathlib, time, absl.logging, jax
from know_jax.runs import cli
from know_jax.errors import UserError
from know_jax.system.signals import Terminated

def wait():
  pathlib.Path('ready').touch()
  time.sleep(60)

def main():
{body}

cli.run(main)
"""


@pytest.mark.parametrize(
  ('body', 'send', 'result'),
  [
    ('return None', 0, (0, '', '')),
    ('return 7', 0, (7, '', '')),
    ('raise UserError("a\\nb")', 0, (2, '', 'script.py: a b\n')),
    ('wait()', signal.SIGINT, (130, '', 'script.py: interrupted.\n')),
    ('wait()', signal.SIGTERM, (143, '', 'script.py: terminated.\n')),
    (
      """
      try:
        wait()
      except Terminated:
        import os, signal
        os.kill(os.getpid(), signal.SIGTERM)  # Whoever is in a hurry does not break off the save.
        print('saved')
        raise
      """,
      signal.SIGTERM,
      (143, 'saved\n', 'script.py: terminated.\n'),
    ),
    (
      """
      class Late:  # Python drops what is raised in here.
        def __del__(self):
          wait()
      late = Late()
      del late
      print('went on')
      time.sleep(30)
      print('never stopped')
      """,
      signal.SIGTERM,
      (143, 'went on\n', 'script.py: terminated.\n'),
    ),
    (
      """
      absl.logging.info('noise')
      logging.getLogger('orbax').info('noise')
      jax.jit(lambda x: x + 1)(1.0).block_until_ready()
      """,
      0,
      (0, '', ''),
    ),
  ],
)
def test_how_scripts_end(scripts, body, send, result):
  script = MAIN.format(body=textwrap.indent(textwrap.dedent(body).strip(), '  '))
  assert scripts.run(script, send=send) == result


@pytest.mark.parametrize(
  ('body', 'result'),
  [
    ('pathlib.Path("a" * 300).exists()', (2, f'script.py: {"a" * 300}: File name too long.\n')),
    ('raise PermissionError(13, "Permission denied", "x")',
     (2, 'script.py: x: Permission denied.\n')),
    ('raise OSError(28, "No space left on device")', (2, 'script.py: No space left on device.\n')),
    ('import os; r, w = os.pipe(); os.close(r); os.dup2(w, 1); print("x" * 100_000)',
     (1, 'script.py: the program at the other end of a pipe has ended.\n')),
    ('raise UserError(str(cli.local_path("~nobody-of-this-name/x", "--workdir")))',
     (2, "script.py: --workdir: '~nobody-of-this-name/x' begins with a home folder that is unknown "
         'here.\n')),
  ],
)  # fmt: skip
def test_what_the_system_refuses_is_told_in_one_line(scripts, body, result):
  code, out, err = scripts.run(MAIN.format(body=f'  {body}'))
  assert (code, err) == result and not out


def test_what_was_imported_is_not_searched_for_garbage(scripts):
  """But what a script makes is: cycles with weights in them must not stay."""
  body = """
    import gc, weakref
    assert gc.isenabled()
    class Cycle:
      def __init__(self):
        self.myself = self
    one = weakref.ref(Cycle())
    many = [[] for _ in range(10_000)]
    print(gc.get_freeze_count() > len(gc.get_objects()), one())
  """
  script = MAIN.format(body=textwrap.indent(textwrap.dedent(body).strip(), '  '))
  assert scripts.run(script) == (0, 'True None\n', '')


def test_bugs_and_warnings_are_shown(scripts):
  code, _, err = scripts.run(MAIN.format(body='  1 / 0'))
  assert code == 1
  assert 'Traceback' in err
  assert err.endswith('ZeroDivisionError: division by zero\n')
  code, _, err = scripts.run(MAIN.format(body='  absl.logging.warning("look")'))
  assert code == 0
  assert err.endswith('] look\n')
  _, _, err = scripts.run(MAIN.format(body='  absl.logging.info("more")'), '--verbosity=0')
  assert err.endswith('] more\n')


# -- signals -------------------------------------------------------------------------------------


@contextlib.contextmanager
def handlers(handler):
  before = {signum: signal.signal(signum, handler) for signum in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield
  finally:
    for signum, old in before.items():
      signal.signal(signum, old)


def test_signals_wait_for_the_end_of_a_stretch():
  seen = []
  with handlers(lambda signum, frame: seen.append(signum)):
    with signals.uninterrupted():
      signal.raise_signal(signal.SIGTERM)
      with signals.uninterrupted():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
      assert seen == []
    assert seen == [signal.SIGTERM, signal.SIGINT]
    signal.raise_signal(signal.SIGINT)
  assert seen == [signal.SIGTERM, signal.SIGINT, signal.SIGINT]


def test_a_signal_is_delivered_though_the_stretch_fails():
  with handlers(signals.raise_terminated):
    with pytest.raises(signals.Terminated) as caught, signals.uninterrupted():
      signal.raise_signal(signal.SIGTERM)
      raise ZeroDivisionError
    assert isinstance(caught.value.__context__, ZeroDivisionError)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


# -- compiled programs ---------------------------------------------------------------------------

COMPILES = """
import hashlib, jax, numpy as np
from know_jax.runs import cli
from know_jax.system import compiled

compiled.MIN_SECONDS = 0.0
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append('cache_hits' in name))

def main():
  found = jax.jit(lambda x: jax.numpy.sin(x @ x.T).sum(0))(np.ones((64, 9), 'f'))
  found = jax.pmap(lambda x: jax.lax.pmean(x * 2, 'i'), axis_name='i')(found[:jax.device_count()])
  print(sum(hits), hashlib.sha256(np.asarray(found)).hexdigest())

cli.run(main)
"""


def test_compiled_programs_are_kept_and_give_the_same_bits(scripts):
  cache = scripts.folder / 'cache' / 'jax'
  shutil.rmtree(cache, ignore_errors=True)
  code, first, err = scripts.run(COMPILES, tidy=True)
  assert (code, first[:2], err) == (0, '0 ', '')
  assert len(list(cache.iterdir())) >= 2
  code, second, err = scripts.run(COMPILES)
  assert (code, err) == (0, '')
  assert int(second.split()[0]) >= 2
  assert second.split()[1] == first.split()[1]
  # What a kill cut off in the middle of writing is compiled anew.
  for file in cache.iterdir():
    os.truncate(file, file.stat().st_size // 2)
  code, third, _ = scripts.run(COMPILES)
  assert (code, third) == (0, first)


def test_where_compiled_programs_go(scripts):
  named = scripts.folder / 'named'
  _, out, err = scripts.run(COMPILES, JAX_COMPILATION_CACHE_DIR=str(named))
  assert (out[:2], err) == ('0 ', '')
  assert list(named.iterdir())
  for folder in ('/dev/null/x', '/proc/x'):
    code, out, err = scripts.run(COMPILES, KNOW_JAX_CACHE=folder)
    assert (code, out[:2], err) == (0, '0 ', '')


PREDICTS = """
import time
import jax, numpy as np
import know_jax
from know_jax.system import compiled

compiled.MIN_SECONDS = 0.0
jax.jit(lambda x: x + 1)(1)  # Something was compiled before: it is not too late.
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.split('/')[-1]))
folder = know_jax.keep_compiled()
rng = np.random.default_rng(0)
shapes = {'conv': (3, 3, 1, 8), 'dense': (48, 64), 'head': (64, 10)}
history = [
  {name: {'kernel': rng.normal(size=shape).astype('f')} for name, shape in shapes.items()}
  for _ in range(5)
]
began = time.process_time()
predicted = jax.device_get(know_jax.predict(history))
seconds = time.process_time() - began
bits = b''.join(leaf.tobytes() for leaf in jax.tree.leaves(predicted)).hex()
print(events.count('cache_hits'), events.count('cache_misses'), seconds, folder, bits)
"""


def test_the_library_keeps_compiled_programs_where_it_is_asked_to(scripts):
  shutil.rmtree(scripts.folder / 'cache', ignore_errors=True)
  first, second = (scripts.run(PREDICTS)[1].split() for _ in range(2))
  assert first[0] == '0' and int(first[1]) > 0
  # All that the first process compiled, the second reads.
  assert second[:2] == [first[1], '0']
  assert float(second[2]) < 1 and second[3:] == [str(scripts.folder / 'cache' / 'jax'), first[4]]


def test_a_folder_that_is_named_must_be_writable():
  before = jax.config.jax_compilation_cache_dir
  with pytest.raises(UserError, match='cannot keep compiled programs in /dev/null/x; expected a'):
    compiled.keep_compiled('/dev/null/x')
  assert jax.config.jax_compilation_cache_dir == before
