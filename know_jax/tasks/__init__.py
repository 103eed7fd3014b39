"""Tasks: what a network is trained for, one sort a file.

A module of this folder is a task by its name; its `load(config, network)` makes the `Task`.
"""

import dataclasses
import pkgutil
from collections.abc import Callable
from typing import Any

from know_jax.errors import UserError, unknown_name
from know_jax.fields import config_dict
from know_jax.registry import load_object
from know_jax.tasks.base import Task

_NO_TASKS = ('base', 'metrics')
TASKS = tuple(
  sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _NO_TASKS)
)
"""The names of the tasks that come with the package."""


def load_task(config: Any, network: Any = None) -> Task:
  """Makes the task that a config names.

  Args:
    config: a mapping, or the dataclass of a run. `task` is a name in `TASKS` or
      'package.module:object', a function of two mappings, as the arguments of this one; the other
      fields are the task's own: data, augmentation and so on.
    network: the config whose network is meant; None: the same. A transfer has the data of its own
      config and the network of the forgetting run.

  Raises:
    UserError: there is no such task, it is none, or one of its fields does not fit.
  """
  given = config_dict(config)
  of_network = given if network is None else config_dict(network)
  task = _loader(given['task'])(given, of_network)
  if not isinstance(task, Task):
    raise UserError(f'task {given["task"]!r} gave {type(task)}; expected a know_jax Task.')
  conv_init = of_network.get('conv_init')
  return task if conv_init is None else dataclasses.replace(task, conv_init=conv_init)


def _loader(name: str) -> Callable[..., Any]:
  if isinstance(name, str) and ':' in name:
    return load_object(name, 'task')
  if name not in TASKS:
    raise unknown_name('task', name, TASKS)
  return load_object(f'know_jax.tasks.{name}:load', 'task')
