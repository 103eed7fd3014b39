"""The commands of the package, `know-jax NAME FLAGS`: what bin/NAME.py does, wherever it lies.

`python -m know_jax` is the same. Configs are given by path, or by name for those of the package.
"""

import ast
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from know_jax.errors import unknown_name

_DEMO_PREDICTORS = 'known,known_leaf,shrink,average,task_vector,log_fit'
_DEMO = 'Forget, nowcast and transfer on generated glyphs, in --workdir=demo, in under 2 minutes.'


def commands() -> dict[str, Path]:
  """Name -> script, of every command but `demo`; `bin/meta_train.py` is `meta-train`."""
  here = Path(__file__).parent
  # A wheel holds bin/ as a part of the package; see pyproject.toml.
  folder = here / 'commands'
  if not folder.is_dir():
    folder = here.parent / 'bin'
  return {path.stem.replace('_', '-'): path for path in sorted(folder.glob('*.py'))}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command.

  Args:
    argv: the command and its flags; None: those of the process.

  Returns:
    The exit code: 2 for a mistake of the user's. A command other than `demo` does not return.
  """
  name, *flags = list(sys.argv[1:] if argv is None else argv) or ['--help']
  scripts = commands()
  if name in ('--help', '-help', '-h', 'help'):
    print(_help(scripts))
    return 0
  if name == 'demo':
    return _demo(flags)
  if name not in scripts:
    print(f'know-jax: {unknown_name("command", name, [*scripts, "demo"])}', file=sys.stderr)
    return 2
  try:
    import absl  # noqa: F401
  except ImportError as error:
    print(f"know-jax: {name} needs: pip install 'know_jax[train]' ({error}).", file=sys.stderr)
    return 2
  sys.argv = [str(scripts[name]), *flags]
  runpy.run_path(str(scripts[name]), run_name='__main__')
  return 0


def _help(scripts: dict[str, Path]) -> str:
  first = {
    name: (ast.get_docstring(ast.parse(path.read_text('utf-8'))) or '').splitlines()[0]
    for name, path in scripts.items()
  }
  lines = [f'  {name:<15} {line}' for name, line in {**first, 'demo': _DEMO}.items()]
  return '\n'.join(
    ['Usage: know-jax COMMAND FLAGS; know-jax COMMAND --help tells the flags.', '', *lines]
  )


def _demo(flags: Sequence[str]) -> int:
  if flags and (len(flags) > 1 or not flags[0].startswith('--workdir=')):
    if flags in (['--help'], ['-h']):
      print(_DEMO)
      return 0
    print(f'know-jax demo: found {" ".join(flags)}; expected --workdir=DIR.', file=sys.stderr)
    return 2
  workdir = flags[0] if flags else '--workdir=demo'
  for command in (
    ('forget', workdir, '--config=forget_glyphs'),
    ('nowcast', workdir, '--steps=3', f'--predictor={_DEMO_PREDICTORS}'),
    ('transfer', workdir, '--config=transfer_glyphs'),
  ):
    print(f'\nknow-jax {" ".join(command)}\n', flush=True)
    code = subprocess.run([sys.executable, '-m', 'know_jax', *command], check=False).returncode
    if code:
      return code
  return 0


if __name__ == '__main__':
  sys.exit(main())
