"""The pages of the site: every Python example runs, and what they name is there.

Examples run in this process, in an empty folder. A block with a title is a file of that name; what
a page registers is taken back. Pages of libraries that are not installed skip with that reason.
"""

import copy
import importlib.util
import inspect
import re
import sys
from pathlib import Path

import jax
import pytest

import know_jax
from know_jax import __main__ as command_line
from know_jax import data, io, models, predictors, tasks
from know_jax.data.sources import load_dataset
from know_jax.errors import UserError
from know_jax.io import formats
from know_jax.models import MODELS
from know_jax.predictors.registry import REGISTRY
from know_jax.registry import discover
from know_jax.runs import cli

ROOT = Path(__file__).parents[2]
DOCS = ROOT / 'docs'
PAGES = sorted(p for p in DOCS.rglob('*.md') if 'results' not in p.parts)
LIBRARIES = {
  'equinox.md': ['equinox'],
  'haiku.md': ['haiku'],
  'keras.md': ['keras'],
  'pytorch.md': ['torch'],
  'huggingface.md': ['torch', 'transformers'],
}
BLOCK = re.compile(r'^```python(?: title="(?P<file>[\w.]+)")?\n(?P<code>.*?)^```$', re.M | re.S)


def name(page):
  return page.relative_to(DOCS).as_posix()


def blocks(page):
  return [(found['file'], found['code']) for found in BLOCK.finditer(page.read_text('utf-8'))]


@pytest.fixture
def newcomer(tmp_path, monkeypatch):
  """An empty folder in which a user works; what is registered and imported there is forgotten."""
  registered, modules = {k: copy.copy(v) for k, v in vars(REGISTRY).items()}, set(sys.modules)
  monkeypatch.setattr(formats, 'REGISTERED', [])
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  yield tmp_path
  vars(REGISTRY).update(registered)
  for module in set(sys.modules) - modules:
    if str(tmp_path) in str(getattr(sys.modules[module], '__file__', '')):
      del sys.modules[module]


def example(page):
  # What other libraries warn of among themselves is not for us to mend.
  marks = [pytest.mark.filterwarnings('default')] if page.name in LIBRARIES else []
  return pytest.param(page, marks=marks, id=name(page))


@pytest.mark.parametrize('page', [example(p) for p in PAGES if blocks(p)])
def test_every_example_runs(page, newcomer):
  for library in LIBRARIES.get(page.name, []):
    pytest.importorskip(library, reason=f'{page.name} needs {library}')
  namespace = {'__name__': '__main__'}
  for file, code in blocks(page):
    if file:
      (newcomer / file).write_text(code)
    else:
      exec(compile(code, str(page), 'exec'), namespace)


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_commands_and_their_flags_are_there(page):
  for line in re.findall(r'^know-jax (.*)$', page.read_text('utf-8'), re.M):
    command, *rest = line.split()
    if command == 'COMMAND' or command == 'demo':
      continue
    script = command_line.commands()[command].read_text()
    defined = re.findall(r"(?:DEFINE_\w+|define_\w+)\(\s*'(\w+)'", script + inspect.getsource(cli))
    for flag in re.findall(r'(?<!\S)--([\w.]+)', ' '.join(rest)):
      field = flag.removeprefix('config.')
      if field != flag:
        library = 'transfer' if command == 'transfer' else 'forgetting'
        config = importlib.import_module(f'know_jax.{library}').default_config()
        assert field in config, f'{line}: {field}'
      else:
        assert flag in {*defined, 'config', 'dry_run'}, f'{line}: {flag}'


@pytest.mark.parametrize('page', [ROOT / 'README.md', *PAGES], ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page):
  for link in re.findall(r'\]\(([^)#]+)', page.read_text('utf-8')):
    made = link.endswith('results/known_card.md')  # From the package, by docs/hooks.py.
    assert made or link.startswith('http') or (page.parent / link).is_file(), link


def test_every_file_that_is_named_is_there():
  for page in PAGES:
    for path in re.findall(r'`((?:bin|configs|know_jax|tests)/[\w./]+)`', page.read_text('utf-8')):
      assert (ROOT / path).exists(), f'{name(page)}: {path}'


def test_the_reference_has_every_public_name():
  listed = re.findall(r'^::: know_jax\.(\w+)$', (DOCS / 'api.md').read_text(), re.M)
  assert sorted(listed) == sorted(know_jax.__all__)


def test_every_predictor_has_its_formula():
  page = (DOCS / 'predictors.md').read_text('utf-8')
  rows = [line for line in page.splitlines() if line.startswith('| `')]
  assert {n for row in rows for n in re.findall(r'`(\w+)`', row.split('|')[1])} == set(REGISTRY)


# -- what is added to the package is one file, which is found where it lies ------------------------


def file_of(page, title):
  return next(code for file, code in blocks(DOCS / 'adding' / page) if file == title)


def test_a_predictor_of_the_package_is_one_file(tmp_path, monkeypatch):
  line = "\nPREDICTORS = {'further': Further}\n"
  (tmp_path / 'further_of_the_page.py').write_text(file_of('predictor.md', 'further.py') + line)
  monkeypatch.setattr(predictors, '__path__', [*predictors.__path__, str(tmp_path)])
  found = discover('know_jax.predictors', 'PREDICTORS', skip='know_jax.predictors.registry')
  assert found.keys() - REGISTRY.keys() == {'further'}
  know_jax.predict([{'a/kernel': jax.numpy.ones((2, 2))}] * 2, predictor=found['further'])


def test_a_model_of_the_package_is_one_file(tmp_path, monkeypatch):
  line = "\n\nfrom know_jax.models.common import Family\nMODELS = {'small_net': Family(SmallNet)}\n"
  (tmp_path / 'net_of_the_page.py').write_text(file_of('model.md', 'small_net.py') + line)
  monkeypatch.setattr(models, '__path__', [*models.__path__, str(tmp_path)])
  found = discover('know_jax.models', 'MODELS')
  assert found.keys() - MODELS.keys() == {'small_net'}


def test_a_task_of_the_package_is_one_file(tmp_path, monkeypatch):
  (tmp_path / 'angles_of_the_page.py').write_text(file_of('task.md', 'angles.py'))
  monkeypatch.setattr(tasks, '__path__', [*tasks.__path__, str(tmp_path)])
  # The package of tasks as it would be imported with that file in it.
  spec = importlib.util.spec_from_file_location(
    'tasks_anew', tasks.__file__, submodule_search_locations=list(tasks.__path__)
  )
  anew = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(anew)
  assert set(anew.TASKS) - set(tasks.TASKS) == {'angles_of_the_page'}
  task = anew.load_task({'task': 'angles_of_the_page'})
  assert task.score == 'close' and task.train.size == 256 and task.head('params/head/kernel')


def test_a_data_set_of_the_package_is_one_file(tmp_path, monkeypatch):
  line = "\n\nDATASETS = {'stripes': load}\n"
  (tmp_path / 'stripes_of_the_page.py').write_text(file_of('data.md', 'stripes.py') + line)
  monkeypatch.setattr(data, '__path__', [*data.__path__, str(tmp_path)])
  found = discover('know_jax.data', 'DATASETS', skip='know_jax.data.sources')
  assert found.keys() - {'digits', 'glyphs', 'new_glyphs'} == {'stripes'}
  images, labels, class_names = found['stripes']('test', None)
  assert images.shape == (120, 8, 8, 1) and set(labels) == {0, 1} and len(class_names) == 2


def test_data_sets_by_path_are_what_the_function_gives(newcomer):
  (newcomer / 'stripes.py').write_text(file_of('data.md', 'stripes.py'))
  found = load_dataset('stripes:load', 'train')
  assert found.class_names == ('lying', 'standing') and found.size == 120
  rows, columns = (found.images.astype(float).mean((axis, 3)) for axis in (2, 1))
  striped = rows[:, ::2].mean(1) - rows[:, 1::2].mean(1) > 50
  assert (striped == (found.labels == 0)).all() and columns.shape == (120, 8)
  assert load_dataset('stripes:load', 'test', classes=(1,)).class_names == ('standing',)


def test_a_format_of_the_package_is_one_file(tmp_path, monkeypatch):
  before = set(formats.formats())  # Kept from here on.
  (tmp_path / 'flat_of_the_page.py').write_text(file_of('format.md', 'flat.py'))
  monkeypatch.setattr(io, '__path__', [*io.__path__, str(tmp_path)])
  found = formats.formats.__wrapped__()
  assert found.keys() - before == {'flat_of_the_page'}
  assert next(reversed(found)) == 'msgpack'  # It is asked last, because it is vague.


@pytest.mark.parametrize(
  ('entry', 'message'),
  [('no_such_format', "cannot import 'no_such_format'"), (jax, "has no function 'detect'")],
)
def test_what_is_no_format_is_not_registered(entry, message):
  with pytest.raises(UserError, match=message):
    formats.register(entry)
