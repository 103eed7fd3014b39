import pytest

from know_jax.errors import UserError, unknown_name


def test_library_users_can_catch_it_as_a_value_error():
  assert issubclass(UserError, ValueError)


def test_an_unknown_name_is_answered_with_the_nearest_names_first_and_all_names():
  error = unknown_name('predictor', 'linear', ['tsv', 'log_fit', 'linear_fit'])
  assert isinstance(error, UserError)
  assert str(error) == (
    "unknown predictor 'linear'. Did you mean 'linear_fit'? Known: linear_fit, log_fit, tsv."
  )


@pytest.mark.parametrize('name', ['zzzz', None, 3, ['known_leaf']])
def test_an_unknown_name_may_be_anything(name):
  message = str(unknown_name('model', name, ['cnn', 'resnet18']))
  assert message == f'unknown model {name!r}. Known: cnn, resnet18.'
