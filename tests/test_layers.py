"""Modules import only from modules above them in this list, and every module is in it."""

import ast
import itertools
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / 'know_jax'

# A row's modules may import from the rows above and from those before them in their own row. `a/*`
# stands for a folder, whose modules may import one another.
ROWS = (
  (
    'errors',
    'version',
    'jsonable',
    'fields',
    'seeds',
    'registry',
    'trees',
    'showing',
    'names',
    'kinds',
    'trajectory',
    'recalibration',
  ),
  ('system/*',),
  ('io/*',),
  ('predictors/*',),
  ('models/*',),
  ('data/*',),
  ('tasks/*',),
  ('training/*',),
  ('runs/*',),
  ('report/*',),
  ('forgetting', 'user_loop'),
  ('nowcast/*',),
  (
    'transfer',
    'recommendation',
    'transfer_starts',
    'landscape',
    'meta/*',
    'study/*',
    'benchmark/*',
  ),
  ('__main__',),
)
ORDER = {name: place for place, name in enumerate(itertools.chain.from_iterable(ROWS))}
# The package itself gathers the public names: it may import everything, nothing may import it.
ROOT = '__init__'


def modules():
  files = (path.relative_to(PACKAGE).with_suffix('') for path in PACKAGE.rglob('*.py'))
  return sorted(path.as_posix() for path in files)


def layer(module):
  folder, _, _ = module.rpartition('/')
  return f'{folder}/*' if folder else module


def imported(source, module):
  """The modules of the package that a module's source imports, anywhere in it."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ''
      if node.level:
        parents = ['know_jax', *module.split('/')]
        base = '.'.join([*parents[: -node.level], *filter(None, [node.module])])
      names = [f'{base}.{alias.name}' for alias in node.names]
    else:
      continue
    found |= {resolve(name) for name in names if name.split('.')[0] == 'know_jax'}
  return found


def resolve(name):
  """`know_jax.trees.stack` -> `trees`; a name that is no module belongs to its package."""
  parts = name.split('.')[1:]
  while parts:
    path = PACKAGE.joinpath(*parts)
    if path.with_suffix('.py').is_file():
      return '/'.join(parts)
    if path.is_dir():
      return '/'.join([*parts, ROOT])
    parts.pop()
  return ROOT


def violations(source, module):
  place = ORDER[layer(module)]
  for other in sorted(imported(source, module) - {module}):
    if other == ROOT:
      yield f'{module} imports the package itself; import the module that has the name'
    elif layer(other) != layer(module) and ORDER[layer(other)] >= place:
      yield f'{module} imports {other}, which is not above it'


def test_every_module_is_listed():
  unlisted = [m for m in modules() if m != ROOT and layer(m) not in ORDER]
  assert not unlisted, f'give each a place in ROWS: {unlisted}'


@pytest.mark.parametrize('module', [m for m in modules() if m != ROOT])
def test_imports_point_upward(module):
  source = (PACKAGE / f'{module}.py').read_text()
  assert not list(violations(source, module))


@pytest.mark.parametrize(
  ('module', 'source', 'wrong'),
  [
    ('trees', 'from know_jax.errors import UserError', False),
    ('errors', 'from know_jax.trees import stack', True),
    ('errors', 'from know_jax import trees', True),
    ('errors', 'import know_jax.trees', True),
    ('errors', 'def f():\n  import know_jax.trees as t', True),
    ('errors', 'from . import trees', True),
    ('errors', 'from .trees import stack', True),
    ('nowcast/api', 'from know_jax import predict', True),
    ('nowcast/api', 'import know_jax', True),
    ('nowcast/api', 'from know_jax import trees, predictors', False),
    ('nowcast/api', 'from know_jax import trees, transfer', True),
    ('predictors/known', 'from know_jax import trajectory', False),
    ('trajectory', 'from know_jax.predictors import known', True),
    ('models/cnn', 'from know_jax.models import common', False),
    ('models/cnn', 'from .common import conv', False),
    ('models/cnn', 'from ..errors import UserError', False),
    ('models/cnn', 'from ..training import fit', True),
    ('models/cnn', 'from know_jax.training import fit', True),
    ('training/loop', 'from know_jax.models import MODELS', False),
    ('training/loop', 'import numpy, jax.numpy', False),
  ],
)
def test_this_test_sees_what_it_must(module, source, wrong):
  assert bool(list(violations(source, module))) == wrong
