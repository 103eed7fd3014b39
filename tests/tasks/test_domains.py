"""Domain generalisation: joined domains, their strata, and domains that do not fit."""

import jax
import numpy as np
import pytest
from runs import small_config

from know_jax import forgetting, transfer
from know_jax.data.sources import Dataset
from know_jax.data.subsets import nested_subsets
from know_jax.errors import UserError
from know_jax.forgetting import default_config
from know_jax.tasks import classification, domains, load_task
from know_jax.training import loop


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
  monkeypatch.setattr(
    classification, 'load_dataset', lambda name, split, **_: domain(split, made[split])
  )
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


@pytest.mark.parametrize('train', ['art', 'art+art'])
def test_each_needs_domains_to_leave_out(train):
  with pytest.raises(UserError, match='expected at least two domains, each once'):
    domains.legs(transfer.Config(task='domains', test_split='each', train_split=train))


def test_each_domain_is_left_out_in_turn_by_one_command(monkeypatch, tmp_path):
  def load_dataset(name, split, **_):
    return domain(split, made[split], size=8)

  made = {'art': (16, 12), 'photo': (12, 9), 'sketch': (10, 8)}
  monkeypatch.setattr(classification, 'load_dataset', load_dataset)
  about = {'task': 'domains', 'dataset': 'pacs'}
  source = small_config(
    **about, classes=(), train_examples=0, train_split='art+photo', test_split='sketch',
    model='cnn', model_options='convs=1', stages=2, epochs=1,
  )  # fmt: skip
  forgetting.run(source, tmp_path, show_progress=False)
  config = transfer.default_config()
  small = {'seeds': 2, 'labels_per_class': 4, 'batch_size': 8, 'warmup_epochs': 0, 'epochs': 1}
  config.update(**about, **small, train_split='art+photo+sketch', test_split='each')
  config.from_scratch = False
  trained, real = [], loop.fit

  def fit(task, *args, **options):
    trained.append((tuple(task.about['domains']), len(task.test.labels)))
    return real(task, *args, **options)

  monkeypatch.setattr(loop, 'fit', fit)
  rows = transfer.run(config, tmp_path)
  assert [(row['test_split'], row['seed']) for row in rows] == [
    (domain, seed) for domain in made for seed in (0, 1)
  ]
  assert trained == [
    entry
    for entry in [(('photo', 'sketch'), 28), (('art', 'sketch'), 21), (('art', 'photo'), 18)]
    for _ in range(2)
  ]
  # Every domain counts alike, however many images it has; the spread is over seeds.
  scores = np.array([row['accuracy'] for row in rows]).reshape(3, 2).mean(0) * 100
  assert f'{scores.mean():.1f} ± {scores.std(ddof=1):.1f}' in transfer.table(rows)
  assert transfer.run(config, tmp_path) == rows and len(trained) == 6
