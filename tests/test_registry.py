"""Names of registries, and objects of the user's modules."""

import sys

import pytest

from know_jax.errors import UserError
from know_jax.registry import Registry, load_object


def only_numbers(entry, what):
  if not isinstance(entry, int):
    raise UserError(f'{what} is {entry!r}; expected a number.')


@pytest.fixture
def numbers():
  found = Registry('number', only_numbers)
  assert found.register('one', 1) == 1
  found.register('two', 2)
  return found


@pytest.fixture
def module(tmp_path, monkeypatch):
  """A module in the current folder, which is not on Python's path."""
  (tmp_path / 'my_numbers.py').write_text(
    'three = 3\nword = "x"\nclass Box:\n  class Inner:\n    four = 4\n'
  )
  (tmp_path / 'broken_numbers.py').write_text('1 / 0\n')
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'path', [path for path in sys.path if path])
  yield
  sys.modules.pop('my_numbers', None)


def test_a_registry_is_a_mapping_in_the_order_of_registration(numbers):
  assert dict(numbers) == {'one': 1, 'two': 2} and list(numbers) == ['one', 'two']
  assert numbers.find('two') == ('two', 2)
  with pytest.raises(UserError, match=r"unknown number 'tow'\. Did you mean 'two'"):
    numbers.find('tow')
  with pytest.raises(UserError, match='unknown number None'):
    numbers.find(None)


def test_names_are_taken_once_and_entries_checked(numbers):
  with pytest.raises(UserError, match="there is a number 'one' already"):
    numbers.register('one', 3)
  numbers.register('one', 3, replace=True)
  assert numbers['one'] == 3
  for name in ('', 'a b', 'a:b', 'a/b', 3):
    with pytest.raises(UserError, match='the name of a number is'):
      numbers.register(name, 3)
  with pytest.raises(UserError, match="number 'word' is 'x'; expected a number"):
    numbers.register('word', 'x')


def test_objects_of_own_modules_are_found_in_the_current_folder(numbers, module):
  path = list(sys.path)
  assert numbers.find('my_numbers:three') == ('three', 3)
  assert numbers.find('my_numbers:Box.Inner.four') == ('four', 4)
  assert load_object('my_numbers:word') == 'x'
  assert sys.path == path


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('my_numbers:word', "number 'my_numbers:word' is 'x'; expected a number"),
    ('my_numbers:ten', "number 'my_numbers:ten': 'my_numbers' has no 'ten'"),
    ('no_numbers:ten', r"cannot import 'no_numbers' \(ModuleNotFoundError: No module"),
    ('broken_numbers:ten', r"cannot import 'broken_numbers' \(ZeroDivisionError: "),
    ('my_numbers:', "number is 'my_numbers:'; expected a name, or 'package.module:object'"),
    (':ten', "number is ':ten'; expected a name"),
  ],
)
def test_what_cannot_be_imported_is_named(numbers, module, name, message):
  with pytest.raises(UserError, match=message):
    numbers.find(name)
