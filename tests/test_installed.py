"""The wheel: it holds all of the package, and its commands run in an empty folder."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SETUPTOOLS = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['setuptools']


def test_every_folder_of_the_package_is_installed():
  folders = {path.parent.relative_to(ROOT) for path in (ROOT / 'know_jax').rglob('*.py')}
  mapped = SETUPTOOLS['package-dir']
  assert {'.'.join(folder.parts) for folder in folders} | set(mapped) == set(SETUPTOOLS['packages'])
  assert all((ROOT / folder).is_dir() for folder in mapped.values())


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
  """The wheel unpacked; a function that runs `python -m know_jax` from it in an empty folder."""
  pytest.importorskip('setuptools', minversion='77', reason='needed to build a wheel offline')
  folder = tmp_path_factory.mktemp('installed')
  source = folder / 'source'
  source.mkdir()
  for name in ('know_jax', 'bin', 'configs', 'pyproject.toml', 'README.md', 'LICENSE'):
    (source / name).symlink_to(ROOT / name)
  subprocess.run(
    [
      sys.executable, '-c',
      'import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])',
      str(folder),
    ],
    cwd=source, check=True, capture_output=True,
  )  # fmt: skip
  (wheel,) = folder.glob('*.whl')
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(folder / 'site')
  empty = folder / 'empty'
  empty.mkdir()

  def run(*args):
    env = {**os.environ, 'PYTHONPATH': str(folder / 'site')}
    ran = subprocess.run(
      [sys.executable, '-m', 'know_jax', *args], cwd=empty, env=env, capture_output=True, text=True
    )
    return ran.returncode, ran.stdout, ran.stderr

  return run, folder / 'site', empty


def test_the_wheel_has_scripts_configs_and_weights(installed):
  site = installed[1]
  for of, to in (('bin', 'commands'), ('configs', 'configs')):
    names = sorted(path.name for path in (ROOT / of).glob('*.py'))
    assert sorted(path.name for path in (site / 'know_jax' / to).glob('*.py')) == names
  assert (site / 'know_jax' / 'weights' / 'known.safetensors').is_file()
  assert 'know-jax = know_jax.__main__:main' in next(site.glob('*/entry_points.txt')).read_text()


def test_help_lists_every_command(installed):
  code, out, err = installed[0]()
  assert code == 0, err
  for path in (ROOT / 'bin').glob('*.py'):
    assert f'\n  {path.stem.replace("_", "-")} ' in out
  assert '\n  demo ' in out


def test_commands_run_with_the_configs_of_the_package(installed):
  run, _, empty = installed
  small = ('train_examples=320', 'stages=2', 'epochs=1', 'stage_epochs=1', 'width=2')
  flags = [f'--config.{field}' for field in small]
  code, out, err = run('forget', '--workdir=W', '--config=configs/forget_glyphs.py', *flags)
  assert code == 0, err
  assert '2 stages in W' in out
  assert [path.name for path in empty.iterdir()] == ['W']
  code, _, err = run('forget', '--config=forget_glyphs', '--config.epohs=1')
  assert code == 2 and "unknown config field 'epohs'" in err


def test_a_file_comes_before_a_name(installed):
  run, _, empty = installed
  (empty / 'forget_glyphs.py').write_text('raise ValueError("mine")')
  code, _, err = run('forget', '--workdir=V', '--config=forget_glyphs.py')
  (empty / 'forget_glyphs.py').unlink()
  assert code == 2 and 'ValueError: mine' in err


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (['forgt'], "unknown command 'forgt'. Did you mean 'forget'"),
    (['forget', '--config=forget_glyfs'], "config file 'forget_glyfs' is not there"),
    (['demo', '--stages=3'], ''),
  ],
)
def test_mistakes_are_one_line(installed, args, message):
  code, out, err = installed[0](*args)
  assert code == 2 and message in err
  assert len((out + err).splitlines()) == 1
