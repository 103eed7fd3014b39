"""Which predictors there are, by name."""

from collections.abc import Iterable, Mapping
from typing import Any

from know_jax.errors import UserError
from know_jax.predictors.base import Predictor, check_predictor, make
from know_jax.predictors.parameters import load_known, network_of
from know_jax.registry import Registry, discover

REGISTRY: Registry[Any] = Registry('predictor', check_predictor)
"""Name -> a predictor, or a class of them whose options may be given beside the name.

Those of the package are what the `PREDICTORS` of its modules declare.
"""

for _name, _entry in discover(__package__, 'PREDICTORS', skip=__name__).items():
  REGISTRY.register(_name, _entry)

RENAMED = {'known_paper': 'known', 'known_paper_history_free': 'known_history_free'}
"""Old name -> new name of a predictor."""


def register_predictor(name: str, predictor: Any) -> Any:
  """Gives a predictor of one's own a name, by which every part of the package takes it.

  Args:
    name: what it is called in calls, flags and configs, and in the folders of its predictions.
    predictor: an object or a class of one of the capabilities, see `know_jax.predictors.base`.

  Returns:
    The predictor.

  Raises:
    UserError: the name is taken, or it is no predictor.
  """
  return REGISTRY.register(name, predictor)


def resolve(predictor: Any, options: Mapping[str, Any] | None = None) -> tuple[str, Any]:
  """The short name of a predictor, and the object that predicts.

  Args:
    predictor: a name in `PREDICTORS`, 'package.module:object', an object or a class.
    options: those of a class, see its signature.

  Raises:
    UserError: there is none of that name, it is no predictor, or an option does not fit.
  """
  if isinstance(predictor, str) and predictor in RENAMED:
    raise UserError(f'predictor {predictor!r} is called {RENAMED[predictor]!r} now.')
  is_object = isinstance(predictor, (Predictor, type)) or not (
    predictor is None or isinstance(predictor, (str, list, tuple))
  )
  if is_object:
    check_predictor(predictor, 'predictor')
    kind = predictor if isinstance(predictor, type) else type(predictor)
    # What is registered keeps its name, also where it is handed on as an object.
    names = [name for name, entry in REGISTRY.items() if entry is predictor or entry is kind]
    name = names[0] if names else kind.__name__
    return name, make(name, predictor, options or {})
  name, entry = REGISTRY.find(predictor)
  return name, make(name, entry, options or {})


def resolve_all(predictors: Iterable[Any], options: Mapping[str, Any] | None = None) -> dict:
  """Short name -> predictor, of several that are to predict the same history.

  Raises:
    UserError: as `resolve`; or there is none, or two have the same short name.
  """
  result: dict[str, Predictor] = {}
  for predictor in dict.fromkeys(predictors):
    name, made = resolve(predictor, options)
    if name in result:
      raise UserError(f'two predictors are called {name!r}; register one by another name.')
    result[name] = made
  if not result:
    raise UserError(f'no predictor is given; expected some of {", ".join(REGISTRY)}.')
  return result


def given_theta(known: str | None, predictors: Mapping[str, Any]) -> dict[str, Any]:
  """The user's parameters of KNOWN by the names of the predictors that run their network.

  Args:
    known: file or folder, as `load_known` takes; None where none are given.
    predictors: name -> predictor.

  Raises:
    UserError: they cannot be read, or no predictor takes them.
  """
  if known is None:
    return {}
  theta = load_known(known)
  network = network_of(theta)
  result = {name: theta for name, entry in predictors.items() if entry.accepts(network)}
  if not result:
    raise UserError(
      f'{known} holds parameters of {network!r}; the predictors are {", ".join(predictors)}, of '
      'which none takes them.'
    )
  return result
