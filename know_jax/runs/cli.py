"""What all scripts share: flags and configs with errors of one line, signals, compilation cache."""

import errno
import gc
import os
import re
import runpy
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from know_jax.errors import PredictionWarning, UserError, reason, unknown_name
from know_jax.io.files import local_path
from know_jax.system import processes
from know_jax.system.compiled import keep_compiled
from know_jax.system.signals import Terminated, raise_again, raise_terminated

# The flags that are defined here are the script's own, and shown by its --help.
flags.disclaim_key_flags()

DEFAULT_WORKDIR = 'workdir'
"""The directory of a run where none is given, in the current directory; of all scripts the same."""

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM

_config_defaults: dict[str, str] = {}


def define_config(default: str | os.PathLike) -> flags.FlagHolder:
  """Defines `--config`: a Python file with `get_config()`, whose fields `--config.FIELD` overrides.

  The config is locked: fields that the file does not have are errors.

  Args:
    default: the config file when none is given. Scripts give an absolute path, so that they can be
      run from anywhere.

  Returns:
    The flag; its value, once `run` has parsed it, is an `ml_collections.ConfigDict`.
  """
  # Given to DEFINE_config_file, the default would be loaded, and the overrides checked, here and
  # now, where nobody turns what is wrong with them into one line. `run` sets it.
  _config_defaults['config'] = os.fspath(default)
  return config_flags.DEFINE_config_file(
    'config',
    None,
    'Config file; --config.FIELD=VALUE overrides a field.',
    lock_config=True,
  )


def define_dry_run(help_text: str) -> Any:
  """Defines --dry_run, also to be written --dry-run."""
  holder = flags.DEFINE_bool('dry_run', False, help_text)
  flags.DEFINE_alias('dry-run', 'dry_run')
  return holder


def define_on_metrics() -> Any:
  """Defines --on_metrics: what watches a run is no part of its config."""
  return flags.DEFINE_string(
    'on_metrics', None, "'package.module:function', called with each step and its metrics."
  )


def define_workers() -> tuple[Any, Any]:
  """Defines --workers and --scheduler, for jobs of independent parts: see `workers.each`."""
  return (
    flags.DEFINE_integer('workers', 1, 'How many processes of this machine.', lower_bound=1),
    flags.DEFINE_string(
      'scheduler', None, 'Address of a Dask scheduler, tcp://HOST:8786, whose workers are used.'
    ),
  )


def define_workdir() -> None:
  """Defines `--workdir`, the directory of a run; `workdir` reads it."""
  flags.DEFINE_string('workdir', DEFAULT_WORKDIR, 'Directory of the run.')


def workdir() -> Path:
  """The directory of the run; says which it is if the default is taken."""
  path = local_path(flags.FLAGS.workdir, '--workdir')
  if flags.FLAGS['workdir'].using_default_value:
    print(f'No --workdir is given: {path.absolute()} is used.')
  return path


def define_processes() -> None:
  """Defines `--coordinator`, `--processes` and `--process`; `run` connects the processes."""
  flags.DEFINE_string(
    'coordinator',
    None,
    'For one run by several processes: HOST:PORT of process 0, the same in all; '
    f"'{processes.DETECTED}' where a cluster (Slurm, ...) says by itself what the next two are.",
  )
  flags.DEFINE_integer('processes', None, 'With --coordinator: how many there are.', lower_bound=1)
  flags.DEFINE_integer('process', None, 'With --coordinator: which this is, from 0.', lower_bound=0)


def _connect() -> None:
  values = flags.FLAGS
  if 'coordinator' not in values:
    return
  if values.coordinator is None:
    refuse('processes', 'process', because='no --coordinator is given')
  else:
    processes.start(values.coordinator, values.processes, values.process)


def refuse(*names: str, because: str) -> None:
  """Raises a `UserError` if one of these flags is given on the command line."""
  for name in names:
    if flags.FLAGS[name].present:
      raise UserError(f'--{name} means nothing where {because}.')


def require(name: str, *, because: str) -> Any:
  """The value of a flag; a `UserError` if it has none."""
  if not flags.FLAGS[name].value:
    raise UserError(f'--{name} is needed where {because}.')
  return flags.FLAGS[name].value


def run(main: Callable[[], Any]) -> NoReturn:
  """Runs a script: parses its flags, calls `main()`, and exits.

  A mistake of the user's (`UserError`, a wrong flag or config) ends in one line on stderr and exit
  code 2, SIGINT in 130, SIGTERM in 143; anything else is a bug and shows its traceback. SIGTERM
  raises `Terminated` in `main`, which may catch it to save, and raises it again. Warnings and
  errors are logged on stderr; `--verbosity=0` adds what libraries have to say.

  Args:
    main: takes no arguments, for the flags hold all; its return value is the exit code.

  Raises:
    SystemExit: always.
  """

  def guarded(_: list[str]) -> Any:
    signal.signal(signal.SIGTERM, raise_terminated)
    sys.unraisablehook = raise_again
    warnings.formatwarning = _format_warning
    keep_compiled()
    try:
      _connect()
      return main()
    except UserError as error:
      _exit(EXIT_USER_ERROR, str(error))

  def parse(argv: list[str]) -> list[str]:
    try:
      return _parse(argv)
    except (UserError, flags.Error) as error:
      _exit(EXIT_USER_ERROR, str(error))

  # What was imported stays, and tracing makes many objects that do too: to search them all for
  # garbage as often as Python does took a seventh of the time of short commands.
  gc.freeze()
  gc.set_threshold(_COLLECTED_AFTER, *gc.get_threshold()[1:])
  try:
    app.run(guarded, flags_parser=parse)
  except BrokenPipeError:
    # Python would say so once more when it ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    _exit(1, 'the program at the other end of a pipe has ended.')
  except OSError as error:
    if error.errno not in _OF_THE_SYSTEM:
      raise
    where = '' if error.filename is None else f'{error.filename}: '
    _exit(EXIT_USER_ERROR, f'{where}{reason(error)}.')
  except KeyboardInterrupt:
    _exit(EXIT_INTERRUPTED, 'interrupted.')
  except Terminated:
    _exit(EXIT_TERMINATED, 'terminated.')


_OF_THE_SYSTEM = (
  errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOSPC,
  errno.EDQUOT,
)  # fmt: skip
"""What a path of the user's may meet at any place: no bug."""

_COLLECTED_AFTER = 5000
"""Objects made, less those freed, after which the youngest are searched for garbage."""

_format_other_warning = warnings.formatwarning


def _format_warning(
  message: Warning | str,
  category: type[Warning],
  filename: str,
  lineno: int,
  line: str | None = None,
) -> str:
  """What is about the user's weights in one line; other warnings with their place in the code."""
  if issubclass(category, PredictionWarning):
    return f'{Path(sys.argv[0]).name}: warning: {message}\n'
  return _format_other_warning(message, category, filename, lineno, line)


def _parse(argv: list[str]) -> list[str]:
  values = flags.FLAGS
  # ml_collections reports unknown fields by errors of many types; so they are looked for first.
  for name, default in _config_defaults.items():
    argv = _with_shipped_config(name, default, argv)
    _check_config(name, default, argv)
  try:
    with warnings.catch_warnings():
      # ml_collections loads config files in a way that Python is about to give up.
      warnings.filterwarnings('ignore', r'the load_module\(\) method', DeprecationWarning)
      for name, default in _config_defaults.items():
        values.set_default(name, default)
      rest = values(argv)
  except SystemExit as stop:
    # Only the help flags leave here, and absl has them fail.
    raise SystemExit(0) from stop
  except (AttributeError, LookupError, TypeError, ValueError) as error:
    raise UserError(f'wrong flags: {error}') from error
  if rest[1:]:
    raise UserError(f'unexpected argument {rest[1]!r}; expected flags only, as in --workdir=PATH.')
  if values['verbosity'].using_default_value:
    # Warnings and errors; left as it is, absl would choose INFO.
    values.verbosity = -1  # type: ignore[assignment]
  return rest


def _with_shipped_config(name: str, default: str, argv: Sequence[str]) -> list[str]:
  """A command line in which the name of a shipped config is its path; files come before names."""
  result = list(argv)
  for i, arg in enumerate(argv):
    if (match := re.fullmatch(rf'(--?{name}=)([\w/]*?(\w+)(?:\.py)?)(:.*)?', arg)) and i:
      shipped = Path(default).with_name(f'{match[3]}.py')
      if not Path(match[2]).is_file() and match[2] in _names(shipped) and shipped.is_file():
        result[i] = f'{match[1]}{shipped}{match[4] or ""}'
  return result


def _names(config: Path) -> tuple[str, ...]:
  """What a shipped config may be called."""
  return config.stem, config.name, f'configs/{config.name}'


def _check_config(name: str, default: str, argv: Sequence[str]) -> None:
  """Loads the config that a command line names, and checks the names of the fields it sets."""
  source, fields = default, []
  for arg, following in zip(argv[1:], [*argv[2:], ''], strict=False):
    if match := re.fullmatch(rf'--?{name}(?:=(.*))?', arg, re.DOTALL):
      source = following if match[1] is None else match[1]
    elif match := re.match(rf'--?(?:no)?{name}\.([^=]*)', arg):
      fields.append(match[1])
  config = _load_config(source)
  known = list(_fields(config))
  for field in fields:
    # Classes that a config chose are those of its own data set.
    rest, _, last = field.rpartition('.')
    classes = f'{rest}.classes' if rest else 'classes'
    if last == 'dataset' and classes in known and classes not in fields:
      node: Any = config
      for part in classes.split('.'):
        node = node[part]
      if node:
        raise UserError(
          f'--config.{field} is given, but config.{classes} is {tuple(node)}, classes of the data '
          f"set in {source}; give --config.{classes} too ('()' for all)."
        )
    # An entry of a field, as in betas[0], is left to ml_collections.
    if field.partition('[')[0] not in known:
      raise unknown_name('config field', field, known)


def _load_config(source: str) -> ConfigDict:
  # What stands after a colon is an argument of get_config.
  path, *argument = source.split(':', 1)
  if not Path(path).is_file():
    raise UserError(f'config file {path!r} is not there.')
  try:
    module = runpy.run_path(path)
    if 'get_config' not in module:
      raise UserError('it has no function get_config.')
    config = module['get_config'](*argument)
  except OSError as error:
    raise UserError(f'config file {path!r} cannot be read: {reason(error)}.') from error
  except UserError as error:
    raise UserError(f'config file {path!r}: {error}') from error
  except Exception as error:
    raise UserError(f'config file {path!r} fails: {type(error).__name__}: {error}') from error
  if not isinstance(config, ConfigDict):
    raise UserError(f'config file {path!r} gives {type(config)}; expected a ConfigDict.')
  return config


def _fields(config: ConfigDict, prefix: str = '') -> Iterator[str]:
  """The dotted names of all fields, those that hold others included."""
  # With references, because some fields have no value yet.
  for name, value in config.items(preserve_field_references=True):
    yield prefix + name
    if isinstance(value, ConfigDict):
      yield from _fields(value, f'{prefix}{name}.')


def _exit(code: int, message: str) -> NoReturn:
  # In one line: errors of absl have several.
  print(f'{Path(sys.argv[0]).name}: {" ".join(message.split())}', file=sys.stderr)
  sys.exit(code)
