"""Domain generalisation: classification, trained on some domains and tested on all of another."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from know_jax.data.base import Arrays
from know_jax.data.sources import Dataset
from know_jax.errors import UserError
from know_jax.fields import read_config
from know_jax.tasks.base import DataFields, NetworkFields, Task
from know_jax.tasks.classification import network_of, split_of, task

T = TypeVar('T', bound=DataFields)

EACH = 'each'
"""The `test_split` of a transfer that leaves out each domain of `train_split` in turn."""


def legs(config: T) -> dict[str, T]:
  """The transfers that one config stands for, by name: one for each domain where it says `EACH`.

  Raises:
    UserError: fewer than two domains, or one twice.
  """
  if config.task != 'domains' or config.test_split != EACH:
    return {'': config}
  domains = config.train_split.split('+')
  if len(set(domains)) < len(domains) or len(domains) < 2:
    raise UserError(
      f'train_split is {config.train_split!r}; expected at least two domains, each once, of '
      f'which each is tested on in turn (test_split is {EACH!r}).'
    )
  return {
    domain: dataclasses.replace(
      config,
      train_split='+'.join(other for other in domains if other != domain),
      test_split=domain,
    )
    for domain in domains
  }


def load(config: Mapping[str, Any], network: Mapping[str, Any]) -> Task:
  """The task that a config names.

  Args:
    config: as of classification; each domain is a split. `train_split` joins several by '+', as
      'art_painting+cartoon+photo'; `test_split` is another, such as 'sketch'.
    network: as of classification.

  Raises:
    UserError: a domain is missing, twice there, or tested on as well as trained on.
  """
  fields = read_config(DataFields, config, only=True)
  domains, tested = fields.train_split.split('+'), fields.test_split
  if len({*domains, tested}) <= len(domains):
    raise UserError(
      f'train_split is {fields.train_split!r} and test_split {tested!r}; expected each domain once.'
    )
  *train, test = (split_of(fields, split) for split in (*domains, tested))
  of_network = read_config(NetworkFields, network, only=True)
  return task(
    network_of(of_network, test.num_classes),
    joined(train),
    test,
    augmentation=fields.augmentation,
    head=of_network.head,
    name=f'{test.name} images {test.images.shape[1:]}',
    about={'class_names': list(test.class_names), 'domains': domains},
  )


def joined(domains: Sequence[Dataset]) -> Arrays:
  """The examples of several domains, one after the other; strata are pairs of domain and class.

  Raises:
    UserError: images differ in size.
  """
  first = domains[0]
  for other in domains[1:]:
    if other.images.shape[1:] != first.images.shape[1:]:
      raise UserError(
        f'images of {other.split} have shape {other.images.shape[1:]}, those of {first.split} '
        f'{first.images.shape[1:]}; expected one shape, as image_size gives it.'
      )
  strata = [i * first.num_classes + domain.labels for i, domain in enumerate(domains)]
  arrays = {
    'image': np.concatenate([domain.images for domain in domains]),
    'label': np.concatenate([domain.labels for domain in domains]),
  }
  return Arrays(arrays, np.concatenate(strata))
