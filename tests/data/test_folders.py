"""Folders of pictures: what is read is what Pillow and NumPy say, and what is wrong is named."""

import jax
import numpy as np
import pytest
from PIL import Image
from runs import small_config

from know_jax import forgetting
from know_jax.data.sources import load_dataset
from know_jax.errors import UserError
from know_jax.fields import config_dict, read_config
from know_jax.tasks import load_task

RNG = np.random.default_rng(0)


def pixels(*shape):
  return RNG.integers(0, 256, shape, np.uint8)


def save(path, array, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(array).save(path, **options)


@pytest.fixture
def splits(tmp_path):
  """Two classes in two splits, grey; label and name of a picture are in its first pixels."""
  for split, count in (('train', 6), ('test', 3)):
    for label, name in enumerate(('cat', 'dog')):
      for i in range(count):
        array = pixels(9, 12)
        array[0, :2] = label, i
        save(tmp_path / split / name / f'{i}.png', array)
  return tmp_path


def test_pictures_are_read_by_class_and_name(splits):
  (splits / 'train' / 'cat' / '.DS_Store').write_text('x')
  train, test = (load_dataset(str(splits), split) for split in ('train', 'test'))
  assert train.images.shape == (12, 9, 12, 1) and test.images.shape == (6, 9, 12, 1)
  assert train.class_names == test.class_names == ('cat', 'dog')
  for data in (train, test):
    assert (data.images[:, 0, 0, 0] == data.labels).all()
    assert data.images[:, 0, 1, 0].tolist() == [*range(data.size // 2)] * 2
  # One that changes is read anew.
  save(splits / 'test' / 'dog' / '2.png', np.full((9, 12), 7, np.uint8))
  assert (load_dataset(str(splits), 'test').images[-1] == 7).all()
  assert (test.images[-1] != 7).any()


def test_classes_have_the_same_numbers_in_all_splits(splits):
  for i in range(3):
    save(splits / 'train' / 'ape' / f'{i}.png', pixels(9, 12))
  test = load_dataset(str(splits), 'test')
  assert test.class_names == ('ape', 'cat', 'dog')
  assert test.labels.tolist() == [1] * 3 + [2] * 3


def test_one_folder_is_split_by_names(tmp_path):
  for label, name in enumerate(('a', 'b')):
    for i in range(10 + label):
      save(tmp_path / name / f'{i}.png', np.full((8, 8), 20 * label + i, np.uint8))
  train, test = (load_dataset(str(tmp_path), split) for split in ('train', 'test'))
  found = [data.images[:, 0, 0, 0].tolist() for data in (train, test)]
  assert sorted(found[0] + found[1]) == [*range(10), *range(20, 31)]
  assert np.bincount(test.labels).tolist() == [2, 3]
  # More pictures do not move those that are there to the other split but for the shares.
  assert load_dataset(str(tmp_path), 'test').images.tobytes() == test.images.tobytes()
  with pytest.raises(UserError, match=r"unknown split of .* 'validation'"):
    load_dataset(str(tmp_path), 'validation')


def test_colour_alpha_palette_and_depth(tmp_path):
  colour, alpha, deep = pixels(8, 8, 3), pixels(8, 8, 4), RNG.integers(0, 65536, (8, 8), np.uint16)
  grey = pixels(8, 8)
  folder = tmp_path / 'train' / 'one'
  save(folder / '0.png', colour)
  save(folder / '1.png', alpha)
  save(folder / '2.png', grey)
  save(folder / '3.png', deep)
  palette = Image.fromarray(colour).quantize(16)
  palette.save(folder / '4.gif')
  images = load_dataset(str(tmp_path), 'train').images
  assert images.shape == (5, 8, 8, 3)
  assert (images[0] == colour).all()
  share = alpha[..., 3:] / 255
  over_white = alpha[..., :3] * share + 255 * (1 - share)
  assert np.abs(images[1] - over_white).max() <= 1.0
  assert (images[2] == grey[..., None]).all()
  assert (images[3] == (deep // 256)[..., None]).all()
  assert (images[4] == np.asarray(palette.convert('RGB'))).all()


def test_pictures_are_upright_and_resized(tmp_path):
  array = pixels(8, 12)
  exif = Image.Exif()
  exif[0x0112] = 6  # To be turned by 90 degrees clockwise.
  save(tmp_path / 'train' / 'one' / '0.png', array, exif=exif)
  assert (load_dataset(str(tmp_path), 'train').images[0, ..., 0] == np.rot90(array, -1)).all()
  save(tmp_path / 'train' / 'one' / '1.png', pixels(20, 20))
  with pytest.raises(UserError, match=r'0.png has 12 x 8, .*1.png has 20 x 20. Give image_size'):
    load_dataset(str(tmp_path), 'train')
  images = load_dataset(str(tmp_path), 'train', image_size=(6, 4)).images
  assert images.shape == (2, 6, 4, 1)
  expected = Image.fromarray(np.rot90(array, -1)).resize((4, 6), Image.Resampling.BILINEAR)
  assert (images[0, ..., 0] == np.asarray(expected)).all()


def test_a_folder_is_a_data_set_of_a_run(splits):
  config = config_dict(
    small_config(
      dataset=str(splits), classes=(), train_examples=0, stages=2, rate=0.7, batch_size=8
    )
  )
  task = load_task(config)
  assert task.about['class_names'] == ['cat', 'dog']
  assert [
    len(part) for part in forgetting.subsets_of(task, read_config(forgetting.Config, config))
  ] == [12, 8]
  assert task.train.batch(np.arange(2))['image'].shape == (2, 9, 12, 1)
  logits, _ = task.model.apply(
    task.init(jax.random.key(0)), task.prepared(np.arange(3)), train=False, key=None
  )
  assert logits.shape == (3, 2)


def wrong(make):
  def build(folder):
    save(folder / 'train' / 'a' / '0.png', pixels(8, 8))
    make(folder)
    return folder

  return build


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda f: f / 'none', 'there is no such folder'),
    (lambda f: f, 'has no folders; expected one for each class'),
    (wrong(lambda f: (f / 'train' / 'b').mkdir()), r'train/b is empty; expected the pictures'),
    (wrong(lambda f: save(f / '0.png', pixels(8, 8))), r'0.png lies beside folders'),
    (
      wrong(lambda f: save(f / 'test' / '0.png', pixels(8, 8))),
      r'test has no folders, and others beside it do',
    ),
    (
      wrong(lambda f: save(f / 'train' / 'a' / 'c' / '0.png', pixels(8, 8))),
      r'a/c is a folder in a class; expected pictures only',
    ),
    (
      wrong(lambda f: (f / 'train' / 'a' / 'notes.txt').write_text('x')),
      r'notes.txt is no picture by its name; expected one of .bmp',
    ),
    (
      wrong(lambda f: (f / 'train' / 'a' / '1.png').write_bytes(b'no picture')),
      r'1.png is no picture that can be read',
    ),
    (
      wrong(
        lambda f: (f / 'train' / 'a' / '1.png').write_bytes(
          (f / 'train' / 'a' / '0.png').read_bytes()[:60]
        )
      ),
      r'1.png cannot be decoded',
    ),
  ],
)
def test_what_is_wrong_is_named(tmp_path, make, message):
  with pytest.raises(UserError, match=message):
    load_dataset(str(make(tmp_path)), 'train')


def test_a_picture_that_would_take_all_memory_is_refused(tmp_path, monkeypatch):
  save(tmp_path / 'train' / 'a' / '0.png', pixels(40, 40))
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
  with pytest.raises(UserError, match=r'0.png is no picture that can be read: Image size'):
    load_dataset(str(tmp_path), 'train')
