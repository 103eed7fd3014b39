"""Every file in configs/ fits its pipeline, and says what it is."""

import itertools
import re
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from know_jax import forgetting, landscape, transfer
from know_jax.data.augmentation import Augmentation
from know_jax.data.base import Arrays
from know_jax.data.glyphs import GLYPHS
from know_jax.data.sources import Dataset
from know_jax.fields import config_dict, read_config
from know_jax.meta import collect, evaluation, meta_training
from know_jax.models import build_model
from know_jax.nowcast.api import PREDICTORS
from know_jax.study import arms, branches, design, regime, runner
from know_jax.tasks import captioning, classification, domains, load_task, segmentation
from know_jax.training.state import Recipe, learning_rates

ROOT = Path(__file__).parent.parent
PIPELINES = {
  'bin/forget.py': forgetting,
  'bin/transfer.py': transfer,
  'bin/collect.py': collect,
  'bin/meta_train.py': meta_training,
  'bin/evaluate_known.py': evaluation,
  'bin/study.py': design,
  'bin/regime.py': regime,
  'bin/branches.py': branches,
  'bin/landscape.py': landscape,
}
# Those that need no files, and names of TFDS (its list takes seconds to import).
PAPERS_OWN = {'imagenet2012', 'pacs', 'voc2012', 'cityscapes', 'flickr8k'}
STAND_INS = {'tinyimagenet100', 'pacs', 'labelmefacade', 'camvid', 'flickr8k_mini'}
DATASETS = {'digits', 'glyphs', 'new_glyphs', 'mnist', 'fashion_mnist', 'cifar10', 'cifar100'}

FILES = sorted((ROOT / 'configs').glob('*.py'))
every_file = pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)


def header(path):
  """The docstring of a config file, and the script of its command."""
  text = runpy.run_path(str(path))['__doc__']
  command = re.search(r'^Command: +python (bin/\w+\.py) (.*)$', text, re.MULTILINE)
  assert command, f'{path.name} says no command'
  return text, command[1], command[2]


def load(path):
  config = runpy.run_path(str(path))['get_config']()
  assert isinstance(config, ConfigDict)
  return config


def fields(config, prefix=''):
  """Dotted name -> type, for all fields."""
  found = {}
  for name in config:
    found[prefix + name] = config.get_type(name)
    if isinstance(config.get_oneway_ref(name).get(), ConfigDict):
      found |= fields(config[name], f'{prefix}{name}.')
  return found


def test_there_are_configs_of_all_pipelines():
  assert {header(path)[1] for path in FILES} == set(PIPELINES)


@every_file
def test_the_header_says_what_it_is(path):
  text, script, flags = header(path)
  assert re.fullmatch(r'\S.*\.', text.splitlines()[0])
  assert (ROOT / script).is_file()
  assert f'--config=configs/{path.name}' in flags
  for name in ('Hardware', 'Paper'):
    assert re.search(rf'^{name}: +\S', text, re.MULTILINE), name
  # Other files that it names are there too.
  for other in re.findall(r'(?:configs|bin)/\w+\.py', text):
    assert (ROOT / other).is_file(), other


@every_file
def test_the_fields_are_those_of_the_pipeline(path):
  expected = PIPELINES[header(path)[1]].default_config()
  assert fields(load(path)) == fields(expected)
  config_dict(load(path))  # It can be kept in a record.


def check_transfer(config):
  assert config['dataset'] in DATASETS | PAPERS_OWN | STAND_INS
  Recipe(config['optimizer'])
  Augmentation(**config['augmentation'])
  assert len(learning_rates(config['schedule'], config['lr'], 10)) == 10
  # Of PACS seven classes in each of three domains.
  classes = 21 if config['task'] == 'domains' else len(config['classes']) or 10
  if config['labels_per_class']:
    # Every labelled example is seen in every epoch.
    assert config['labels_per_class'] * classes % config['batch_size'] == 0


@every_file
def test_names_and_values_are_known(path):
  pipeline = PIPELINES[header(path)[1]]
  config = config_dict(load(path))
  if pipeline is collect:
    read_config(collect.Config, config)
    assert set(config['datasets']) <= DATASETS
  elif pipeline in (evaluation, meta_training):
    read_config(pipeline.Config, config)
  elif pipeline is forgetting:
    assert config['dataset'] in DATASETS
    build_model(config['model'], num_classes=2, width=config['width'], dtype=config['dtype'])
    checked = read_config(forgetting.Config, config)
    forgetting.recipe_of(checked)
    for stage in range(config['stages']):
      assert forgetting.stage_plan(checked, stage, 10 * config['batch_size'])['steps'] > 0
  elif pipeline is transfer:
    check_transfer(config)
  elif pipeline is design:
    assert config['source']['dataset'] in DATASETS | PAPERS_OWN
    check_transfer(config['transfer'])
    # Every predictor can do its steps with the history, and every arm has a name of its own.
    found = arms.arms_of(read_config(design.Config, config), batch_norm=True)
    assert len(found) > (15 if path.stem.startswith('table') else 40)
  elif pipeline is landscape:
    assert set(config['predictors']) <= set(PREDICTORS)


@pytest.mark.parametrize(
  ('name', 'variant'),
  [('study_fashion_mnist', 'cnn'), ('study_cifar', 'cnn'), ('study_resnet18', 'short')],
)
def test_variants_are_studies_too(name, variant):
  path = ROOT / 'configs' / f'{name}.py'
  assert f':{variant}' in header(path)[0]
  config = runpy.run_path(str(path))['get_config'](variant)
  assert fields(config) == fields(design.default_config())
  config = config_dict(config)
  check_transfer(config['transfer'])
  found = arms.arms_of(read_config(design.Config, config), batch_norm=variant != 'cnn')
  assert {'persistence', 'known_leaf', 'extra', 'shrink', 'task_vector'} <= {
    a.predictor for a in found
  }


TABLES = {
  # What the paper names of them.
  'table2': {'model': 'pvt_v2_b0', 'target': 'cifar100'},
  'table3': {'model': 'pvt_v2_b0', 'target': 'pacs', 'epochs': 80},
  'table4': {'model': 'pvt_v2_b0', 'target': 'flickr8k', 'epochs': 50, 'optimizer': 'adam'},
  'table5': {'model': 'deeplabv3plus', 'target': 'cityscapes', 'epochs': 150, 'optimizer': 'adam'},
}


@pytest.mark.parametrize('name', TABLES)
def test_tables_are_those_of_the_paper_and_their_stand_ins(name):
  get_config = runpy.run_path(str(ROOT / 'configs' / f'{name}.py'))['get_config']
  paper, small = get_config(), get_config('small')
  expected = dict(TABLES[name])
  assert paper.source.model == expected.pop('model')
  assert paper.transfer.dataset == expected.pop('target')
  for field, value in expected.items():
    assert paper.transfer[field] == value
  for config in (paper, small):
    assert config.source.rate == 1 / 3 and config.steps == 2 and config.source_seeds >= 5
    assert fields(config) == fields(design.default_config())
    check_transfer(config_dict(config.transfer))
    # Chosen on validation images of the target.
    assert config.transfer.validation_examples > 0
    found = arms.arms_of(read_config(design.Config, config), batch_norm=name == 'table5')
    rates = {a.lr_scale for a in found if arms.is_naive(a) or a.predictor == 'persistence'}
    only_naive = name == 'table4' and config is small
    assert rates == ({0.3, 1.0, 3.0} if only_naive else {0.3, 1.0, 3.0, 10.0})
    if name != 'table4' or config is paper:
      made = {(a.name, a.step) for a in found}
      both = ('known', 'known_leaf', 'task_vector', 'log_fit', 'tsv', 'known norms')
      assert made >= {(arm, step) for arm in both for step in (1, 2)} | {('magmax', 2)}
  assert small.source.dataset in STAND_INS and small.transfer.dataset in STAND_INS | DATASETS


@pytest.mark.parametrize(
  ('name', 'size'),
  [*itertools.product(TABLES, ('paper', 'small')), ('table2', 'small_pacs')],
)
def test_tables_plan_and_trace_a_training_step(name, size, monkeypatch, tmp_path):
  """A dry run, and one step of source and target at the full image size, traced: no data needed."""

  def load_dataset(name, split, *, classes=(), image_size=None, **_):
    count = len(classes) or {'imagenet2012': 50, 'pacs': 7}.get(name, 20)
    large = split in ('train', 'validation') or '[:80%]' in split
    labels = np.arange((300 if large else 60) * count) % count
    images = np.broadcast_to(np.uint8(0), (len(labels), *(image_size or (32, 32)), 3))
    names = tuple(f'class {i}' for i in range(count))
    return Dataset(name, split, images, labels.astype(np.int32), names)

  def read_maps(name, split, _, image_size):
    labels = np.broadcast_to(np.uint8(1), (2000, *image_size))
    images = np.broadcast_to(np.uint8(0), (2000, *image_size, 3))
    return Arrays({'image': images, 'label': labels}), [f'class {i}' for i in range(19)]

  def read_captions(name, split, _, image_size):
    images = np.broadcast_to(np.uint8(0), (2000, *image_size, 3))
    return images, [['a dog runs']] * 2000

  monkeypatch.setattr(classification, 'load_dataset', load_dataset)
  monkeypatch.setattr(classification, 'mean_image', lambda x: np.zeros(x.shape[1:], np.float32))
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  monkeypatch.setattr(segmentation, 'read', read_maps)
  monkeypatch.setattr(segmentation, 'check_labels', lambda *_: None)
  monkeypatch.setattr(captioning, 'read', read_captions)
  config = runpy.run_path(str(ROOT / 'configs' / f'{name}.py'))['get_config'](size)
  config.source.train_examples = 0
  text = runner.plan(config, tmp_path / 'none')
  assert text.count('forgetting runs: 5 (0 done), 5 stages each') == (4 if name == 'table3' else 1)
  assert not (tmp_path / 'none').exists()
  settings = read_config(design.Config, config)
  legs = list(domains.legs(settings.transfer).values())
  for task in (load_task(settings.source), load_task(legs[0], settings.source)):
    batch = task.prepared(np.zeros(2, np.int32))
    variables = jax.eval_shape(lambda task=task: task.init(jax.random.key(0)))

    def loss(params, variables, task=task, batch=batch):
      variables = {**variables, 'params': params}
      outputs, _ = task.model.apply(variables, batch, train=True, key=jax.random.key(0))
      values, weights = task.loss(outputs, batch)
      return (values if weights is None else values * weights).sum()

    gradients = jax.eval_shape(jax.grad(loss), variables['params'], variables)
    assert jax.tree.map(np.shape, gradients) == jax.tree.map(np.shape, variables['params'])


def test_the_second_target_of_table_2_has_the_first_ones_sources():
  get_config = runpy.run_path(str(ROOT / 'configs' / 'table2.py'))['get_config']
  first, pacs = get_config('small'), get_config('small_pacs')
  assert fields(pacs) == fields(first)
  # The forgetting runs of the one are those of the other, and so are the arms.
  for field in ('source', 'arms', 'steps', 'source_seeds'):
    assert pacs[field] == first[field], field
  transfer_config = config_dict(pacs.transfer)
  assert transfer_config['dataset'] in STAND_INS and transfer_config['task'] == 'classification'
  labels = transfer_config['labels_per_class'] * 7
  assert labels % transfer_config['batch_size'] == 0
  # No image is in both: the parts of each domain meet where the first ends.
  train, test = (transfer_config[split].split('+') for split in ('train_split', 'test_split'))
  assert [part.replace('[:80%]', '[80%:]') for part in train] == test and len(set(train)) == 4


def test_the_demo_forgets_and_transfers_between_different_classes():
  source, target = (
    load(ROOT / 'configs' / f'{name}_glyphs.py').dataset for name in ('forget', 'transfer')
  )
  assert not set(GLYPHS[source]) & set(GLYPHS[target])
