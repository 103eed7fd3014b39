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


@pytest.mark.parametrize('config', ['forget_glyphs', 'configs/forget_glyphs.py'])
def test_commands_find_the_configs_of_the_package(installed, config):
  run, _, empty = installed
  code, _, err = run('forget', f'--config={config}', '--config.epohs=1')
  assert code == 2 and "unknown config field 'epohs'. Did you mean 'epochs'" in err
  # All is checked, and the mistake that is left is found, before anything is written.
  code, _, err = run('forget', f'--config={config}', '--config.rate=2')
  assert code == 2 and 'rate is 2' in err
  assert not list(empty.iterdir())


def test_help_is_that_of_the_script(installed):
  code, out, err = installed[0]('forget', '--help')
  assert code == 0, err
  assert out.startswith('Trains a network, then fine-tunes it') and '--workdir' in out


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
