"""Studies of segmentation and captions: the real loop, shrunk, its score, and pictures of it."""

import flax.linen as nn
import numpy as np
import pytest
from PIL import Image

from know_jax.data.base import Arrays
from know_jax.errors import UserError
from know_jax.runs.record import RunRecord
from know_jax.study import design, examples, runner
from know_jax.study.results import COLUMNS, RESULTS, read_table
from know_jax.tasks import captioning, segmentation


class Pixels(nn.Module):
  """A logit for each class from a few features of each pixel."""

  num_classes: int
  features: int

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(self.features, (1, 1), name='body')(x))
    return nn.Conv(self.num_classes, (1, 1), name='head')(x)


def maps(name, split, *_):
  """Images whose colour tells the class, of `name` two or three."""
  rng = np.random.default_rng(len(split))
  count = {'two': 2, 'three': 3}[name]
  labels = rng.integers(0, count, (16, 8, 8)).astype(np.uint8).repeat(2, 1).repeat(2, 2)
  images = (np.eye(3)[labels] * 200 + rng.integers(0, 50, (16, 16, 16, 3))).astype(np.uint8)
  labels[:, :2] = 255
  return Arrays({'image': images, 'label': labels}), ['red', 'green', 'blue'][:count]


def study_of(**fields):
  config = design.default_config()
  source = {'stages': 2, 'rate': 0.5, 'batch_size': 8, 'epochs': 1, 'lr': 1e-2}
  config.source.update(source)
  transfer = {'batch_size': 8, 'warmup_epochs': 1, 'epochs': 2, 'lr': 1e-2}
  config.transfer.update(validation_examples=4, labels_per_class=8, **transfer)
  config.update(source_seeds=1, transfer_seeds=1, history=2, steps=1)
  config.arms = ('persistence', {'predictor': 'persistence', 'lr_scale': 0.3}, 'task_vector')
  config.update(fields)
  return config


@pytest.fixture(scope='module')
def segmented(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('segmented')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(segmentation, 'read', maps)
    config = study_of()
    for part, name in ((config.source, 'two'), (config.transfer, 'three')):
      part.update(task='segmentation', dataset=name)
    # DeepLabV3+ compiles for minutes; its own tests are in tests/models.
    config.source.model = f'{__name__}:Pixels'
    config.source.model_options = 'features=4'
    runner.run(config, workdir, show_progress=False)
    examples.write(config, workdir, workdir / 'maps.png', images=2)
  return workdir


def test_a_study_of_segmentation_scores_miou(segmented):
  rows = read_table(segmented / RESULTS, COLUMNS)
  assert rows.arm.tolist() == ['persistence', 'persistence lr x0.3', 'task_vector']
  for column in ('accuracy', 'mean_accuracy', 'validation'):
    assert rows[column].between(0, 1).all() and rows[column].notna().all()
  # mIoU is never above mean class accuracy where every class has labels.
  assert (rows.accuracy <= rows.mean_accuracy + 1e-9).all()
  assert not (rows.accuracy == rows.mean_accuracy).all()


def test_label_maps_are_drawn_side_by_side(segmented):
  with Image.open(segmented / 'maps.png') as page:
    picture = np.asarray(page.convert('RGB'))
  # Image, truth, naive and the task vector's, two rows; ignored pixels are black.
  assert picture.shape[1] > 1.9 * picture.shape[0] and len(np.unique(picture)) > 20
  assert (picture == 0).all(-1).mean() > 0.005


def test_a_study_of_classes_has_no_such_pictures(tmp_path):
  config = study_of()
  config.source.update(model='cnn', classes=(0, 1))
  config.transfer.update(classes=(2, 3))
  with pytest.raises(UserError, match="task 'classification' has no pictures"):
    examples.write(config, tmp_path, tmp_path / 'page.png')


def test_captions_are_shown_beside_a_persons(monkeypatch, tmp_path):
  def read(name, split, *_):
    rng = np.random.default_rng(len(split))
    images = rng.integers(0, 255, (12, 8, 8, 1)).astype(np.uint8)
    return images, [[f'a {word} one', f'{word}'] for word in ('red', 'green') * 6]

  monkeypatch.setattr(captioning, 'read', read)
  config = study_of()
  config.source.update(model='cnn', model_options='convs=1', width=2)
  config.source.classes, config.source.train_examples = (0, 1), 128
  config.source.stages = config.history = 5
  config.transfer.update(task='captioning', dataset='colours', labels_per_class=0)
  config.transfer.captions.update(vocabulary=9, max_length=5, units=4, layers=1)
  runner.run(config, tmp_path, show_progress=False)
  # As for table 4's page: a study that predicted nothing of the kind has the forgetting runs.
  config.arms = ('persistence', 'known_leaf')
  text = examples.write(config, tmp_path, tmp_path / 'page.png')
  assert 'naive: masked_accuracy' in text and 'known_leaf x2: masked_accuracy' in text
  assert '- a person: a red one' in text and text.count('Image') == 6
  # For every image, whichever way the words are chosen.
  for name in ('naive', 'known_leaf x2'):
    for way in ('greedy', '3 beams'):
      assert text.count(f'- {name}, {way}: ') == 6
  # What tokens mean lies beside the results.
  words = RunRecord.read(tmp_path, runner.KIND)['vocabulary']
  assert words[:5] == ['', '[UNK]', '[END]', '[START]', 'a'] and {'red', 'green'} < set(words)
  with Image.open(tmp_path / 'page.png') as page:
    assert page.width > 500
  rows = read_table(tmp_path / RESULTS, COLUMNS)
  assert rows.accuracy.between(0, 1).all() and rows.validation.notna().all()
