"""Domain generalisation: joined domains, their strata, and domains that do not fit."""

import jax
import numpy as np
import pytest

from know_jax.data.sources import Dataset
from know_jax.data.subsets import nested_subsets
from know_jax.errors import UserError
from know_jax.forgetting import default_config
from know_jax.tasks import domains, load_task


def domain(split, counts, size=4):
  labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
  images = np.full((len(labels), size, size, 3), len(counts), np.uint8)
  return Dataset('pacs', split, images, labels, ('dog', 'horse'))


def test_subsets_keep_the_shares_of_each_class_in_each_domain():
  source = domains.joined([domain('art', (40, 8)), domain('sketch', (16, 80))])
  assert source.size == 144
  np.testing.assert_array_equal(np.bincount(source.strata), [40, 8, 16, 80])
  np.testing.assert_array_equal(source.arrays['label'], source.strata % 2)
  half = nested_subsets(jax.random.key(0), source.strata, rate=0.5, phases=2, stratified=True)[1]
  np.testing.assert_array_equal(np.bincount(source.strata[half]), [20, 4, 8, 40])
  with pytest.raises(UserError, match=r'images of photo have shape \(5, 5, 3\), those of art'):
    domains.joined([domain('art', (4, 4)), domain('photo', (4, 4), size=5)])


def test_a_config_joins_splits_and_tests_on_another(monkeypatch):
  made = {'art': (6, 4), 'photo': (3, 5), 'sketch': (7, 2)}
  monkeypatch.setattr(domains, 'load_dataset', lambda name, split, **_: domain(split, made[split]))
  config = default_config()
  config.update(task='domains', dataset='pacs', train_split='art+sketch', test_split='photo')
  task = load_task(config)
  assert (task.train.size, task.test.size) == (19, 8)
  assert task.about == {'class_names': ['dog', 'horse'], 'domains': ['art', 'sketch']}
  np.testing.assert_array_equal(np.bincount(task.train.strata), [6, 4, 7, 2])


@pytest.mark.parametrize(('train', 'test'), [('train+train', 'test'), ('train+test', 'test')])
def test_domains_that_come_twice_are_refused(train, test):
  config = default_config()
  config.update(task='domains', train_split=train, test_split=test)
  with pytest.raises(UserError, match='expected each domain once'):
    load_task(config)


def test_a_missing_domain_is_named():
  config = default_config()
  config.update(task='domains', train_split='train+sketsch', test_split='test')
  with pytest.raises(UserError, match="'sketsch'"):
    load_task(config)
