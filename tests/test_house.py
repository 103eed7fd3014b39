"""The size of the package and of its files, and that nothing asks for a predictor by its name."""

import ast
from pathlib import Path

import pytest

from know_jax.predictors.registry import REGISTRY

PACKAGE = Path(__file__).parents[1] / 'know_jax'
FILES = sorted(PACKAGE.rglob('*.py'))

MOST_LINES = 28_770
"""Of the package: whoever adds more deletes as much elsewhere, or raises this and says what for."""
MOST_OF_A_FILE = 500

REASON = 'longer than other files, because'
"""What a module's docstring says where a file is longer all the same."""


def lines_of(path):
  return len(path.read_text().splitlines())


def test_the_package_does_not_grow():
  rooms = {}
  for path in FILES:
    room = path.relative_to(PACKAGE).parts[0]
    rooms[room] = rooms.get(room, 0) + lines_of(path)
  for room, lines in sorted(rooms.items(), key=lambda item: -item[1]):
    print(f'{room:<20} {lines:>6}')
  total = sum(rooms.values())
  print(f'{"in all":<20} {total:>6}, at most {MOST_LINES}')
  assert 10_000 < total <= MOST_LINES


@pytest.mark.parametrize(
  'path', [path for path in FILES if lines_of(path) > MOST_OF_A_FILE], ids=lambda path: path.name
)
def test_a_long_file_says_why(path):
  about = ast.get_docstring(ast.parse(path.read_text())) or ''
  assert REASON in ' '.join(about.lower().split())


def asked_for(source):
  """Comparisons with the name of a predictor, as in `predictor == 'tsv'`, and such cases."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Compare):
      sides = [node.left, *node.comparators]
    elif isinstance(node, ast.match_case):
      sides = [node.pattern]
    else:
      continue
    # A field of a config may be called like a predictor.
    keys = {id(x) for side in sides for n in ast.walk(side) if isinstance(n, ast.Subscript)
            for x in ast.walk(n.slice)}  # fmt: skip
    constants = [x for side in sides for x in ast.walk(side) if isinstance(x, ast.Constant)]
    yield from (x.value for x in constants if x.value in REGISTRY and id(x) not in keys)


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_branches_on_the_name_of_a_predictor(path):
  # A study's tables say which rows are the rivals; they choose among results, not how to predict.
  if path.parent.name != 'study':
    assert not list(asked_for(path.read_text()))


@pytest.mark.parametrize(
  ('source', 'expected'),
  [
    ("if name == 'tsv': pass", ['tsv']),
    ("x = name in ('shrink', 'other')", ['shrink']),
    ("match name:\n  case 'known':\n    pass", ['known']),
    ("x = config['known'] is None", []),
    ("x = {'known': 1}", []),
  ],
)
def test_this_test_sees_what_it_must(source, expected):
  assert list(asked_for(source)) == expected
