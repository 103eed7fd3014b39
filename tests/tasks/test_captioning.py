"""Captioning: vocabulary, the real loop, what a network says, and data that do not fit."""

import shutil

import jax
import numpy as np
import pytest
from runs import assert_same_bits

from know_jax import transfer
from know_jax.errors import UserError
from know_jax.kinds import leaf_kinds
from know_jax.models import build_model
from know_jax.runs.record import RunRecord, config_dict
from know_jax.runs.workdir import finished_record, restore_stage
from know_jax.tasks import TASKS, captioning, load_task
from know_jax.tasks.base import AXIS
from know_jax.training.loop import evaluate, fit
from know_jax.training.state import Checkpoint, Recipe, create_state
from know_jax.training.steps import put_data

CAPTIONS = [['A red one.', 'Red, red!'], ['a green one'], ['A blue one', 'the BLUE one']]


def data(count=24, seed=0):
  rng = np.random.default_rng(seed)
  colours = np.arange(count) % 3
  images = rng.integers(0, 60, (count, 8, 8, 3))
  images[np.arange(count), :, :, colours] += 180
  return images.astype(np.uint8), [[f'a {("red", "green", "blue")[c]} one'] for c in colours]


def test_the_vocabulary_is_counted_by_hand():
  vocabulary = captioning.fit_vocabulary([text for texts in CAPTIONS for text in texts], 9)
  # a, blue, green, one, red, the: 3, 2, 1, 4, 3, 1 times; five captions.
  assert vocabulary.words == ('', '[UNK]', '[END]', '[START]', 'one', 'a', 'red', 'blue', 'green')
  # 5 ends and 3 + 2 + 1 + 4 + 3 words are labels; the start, the padding and 'the' are none.
  expected = np.log(np.array([5, 4, 3, 3, 2, 1]) / 18)
  np.testing.assert_allclose(np.delete(vocabulary.log_prior, [0, 1, 3]), expected, rtol=1e-6)
  assert {vocabulary.log_prior[i] for i in (0, 1, 3)} == {-1e9}
  tokens = vocabulary.encode('The  green, ONE!')
  assert tokens == [3, 1, 8, 4, 2]
  assert vocabulary.decode([*tokens, 0, 0]) == '[UNK] green one'


def test_it_learns_in_the_real_loop_and_says_what_it_sees():
  assert 'captioning' in TASKS
  images, captions = data()
  vocabulary = captioning.fit_vocabulary([c for texts in captions for c in texts], 50)
  source = captioning.pairs('train', images, captions, vocabulary, 6)
  encoder = build_model('cnn', num_classes=1, width=4, convs=1, axis_name=AXIS)
  task = captioning.task(
    encoder, source, source, vocabulary, max_length=6, units=8, layers=1, dropout=0.1
  )
  train, test = put_data(task)
  recipe = Recipe()
  state = create_state(jax.device_get(task.init(jax.random.key(0))), recipe)
  before = evaluate(task, state.variables, test)
  trained = fit(
    task, Checkpoint(state), train, np.arange(24, dtype=np.int32), recipe=recipe, epochs=40,
    batch_size=8, lr=0.02, schedule='cosine', key=jax.random.key(1),
  )  # fmt: skip
  after = evaluate(task, trained.variables, test)
  assert set(after) == {'loss', 'masked_accuracy'}
  assert after['masked_accuracy'] > 0.95 > before['masked_accuracy']
  for beams in (1, 3):
    said = captioning.captions_of(task, trained.variables, images[:3], beams=beams)
    assert said == [texts[0] for texts in captions[:3]]
  kinds = leaf_kinds(trained.variables['params'], task.kinds)
  predicted = {path.split('/')[0] for path, kind in kinds.items() if kind != 'keep'}
  assert predicted == {'encoder'}
  assert {
    path.split('/')[1] for path in ('params/decoder/x', 'params/encoder/x') if task.head(path)
  } == {'decoder'}


@pytest.mark.parametrize(
  ('captions', 'message'),
  [
    ([['a red one'], []], 'image 1 of test has no caption'),
    ([['a red one'], ['']], "caption '' of image 1 of test has no word of the vocabulary"),
    ([['a red one'], ['zebra']], "caption 'zebra' of image 1 of test has no word"),
    ([['a red one']], 'test has 2 images and captions of 1'),
  ],
)
def test_captions_that_do_not_fit_are_refused(captions, message):
  vocabulary = captioning.fit_vocabulary(['a red one'], 10)
  with pytest.raises(UserError, match=message):
    captioning.pairs('test', np.zeros((2, 8, 8, 3), np.uint8), captions, vocabulary, 6)


def test_a_vocabulary_without_words_is_refused():
  with pytest.raises(UserError, match='with 0 words; expected at least 5 tokens and one word'):
    captioning.fit_vocabulary(['...'], 10)


def transfer_config(**captions):
  config = transfer.default_config()
  small = {'seeds': 1, 'batch_size': 8, 'warmup_epochs': 1, 'epochs': 1, 'from_scratch': False}
  config.update(task='captioning', dataset='colours', validation_examples=8, **small)
  config.captions.update({'vocabulary': 20, 'max_length': 6, 'units': 8, 'layers': 1, **captions})
  return config


def grey(name, split, *_):
  images, captions = data(seed=len(split))
  return images[..., :1], captions


def test_a_classifier_becomes_the_encoder_of_captions(monkeypatch, finished, tmp_path):
  monkeypatch.setattr(captioning, 'read', grey)
  shutil.copytree(finished, tmp_path / 'run')
  (row,) = transfer.run(transfer_config(), tmp_path / 'run')
  assert 0 <= row['masked_accuracy'] <= 1 and 0 <= row['validation'] <= 1
  assert row['predictor'] == 'persistence'
  (folder,) = (tmp_path / 'run' / 'transfer').iterdir()
  record = RunRecord.read(folder, transfer.KIND)
  assert {'red', 'green', 'blue'} < set(record['vocabulary'])
  assert len(record['vocabulary']) == len(record['log_prior'])
  # Before any step the encoder is the classifier without its head, statistics included.
  source = finished_record(finished)['config']
  task = load_task(config_dict(transfer_config()), source)
  newest, fresh = restore_stage(finished, 0), jax.device_get(task.init(jax.random.key(0)))
  transfer.check_fits(task, [newest])
  started = transfer.with_head(transfer.adopted(task, newest, fresh), fresh, task.head)
  assert_same_bits(started['params']['decoder'], fresh['params']['decoder'])
  # Its Dense stands above the feature map, as the head does.
  above = ('head', 'dense')
  below_head = {name: x for name, x in newest['params'].items() if name not in above}
  assert_same_bits(started['params']['encoder'], below_head)
  assert_same_bits(started['batch_stats']['encoder'], newest['batch_stats'])
  # A captioner's own variables stay as they are.
  assert transfer.adopted(task, started, fresh) is started


@pytest.mark.parametrize(
  ('captions', 'message'),
  [
    ({'units': 0}, 'captions.units is 0; expected at least 1'),
    ({'dropout': 1.0}, 'captions.dropout is 1.0; expected a share from 0 to below 1'),
  ],
)
def test_decoders_that_cannot_be_made(monkeypatch, finished, captions, message):
  monkeypatch.setattr(captioning, 'read', grey)
  with pytest.raises(UserError, match=message):
    transfer.run(transfer_config(**captions), finished)
