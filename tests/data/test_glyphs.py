"""The generated glyphs: the same everywhere, balanced, and hard enough to be worth training for."""

import hashlib

import numpy as np
import pytest

from know_jax.data.glyphs import GLYPHS
from know_jax.data.sources import load_dataset
from know_jax.errors import UserError

SPLITS = [(name, split) for name in GLYPHS for split in ('train', 'test')]


@pytest.mark.parametrize('name, split', SPLITS)
def test_glyphs_are_balanced_and_whole(name, split):
  data = load_dataset(name, split)
  each = {'train': 160, 'test': 400}[split]
  assert data.images.shape == (10 * each, 12, 12, 1) and data.images.dtype == np.uint8
  assert np.bincount(data.labels).tolist() == [each] * 10
  assert len(np.unique(data.images, axis=0)) == len(data.images)
  # In random order: not sorted by class.
  assert (np.diff(data.labels) != 0).mean() > 0.8
  assert data.images.min() == 0 and data.images.max() == 255


def test_no_image_or_class_is_shared():
  images = np.concatenate([load_dataset(*which).images for which in SPLITS])
  assert len(np.unique(images, axis=0)) == len(images)
  names = [load_dataset(name, 'test').class_names for name in GLYPHS]
  assert len(set(names[0] + names[1])) == 20


def test_glyphs_are_the_same_on_every_machine():
  digest = hashlib.sha256()
  for which in SPLITS:
    digest.update(load_dataset(*which).images.tobytes())
    digest.update(load_dataset(*which).labels.astype('<i4').tobytes())
  assert digest.hexdigest() == '59bb0146e9dadcc9bb476777d2d87cf7190217c6b812a7ca84fd800f4dfcdb45'


def test_more_data_help_and_are_needed():
  # The nearest training image: above chance, far from perfect, better with more images.
  train, test = load_dataset('glyphs', 'train'), load_dataset('glyphs', 'test')
  x, y = (data.images.reshape(len(data.images), -1) / 255 for data in (train, test))
  distances = (x**2).sum(axis=1) - 2 * y @ x.T
  few, many = (
    (train.labels[distances[:, :n].argmin(axis=1)] == test.labels).mean() for n in (100, 1600)
  )
  assert 0.2 < few < many - 0.1 and many < 0.9


def test_the_mean_glyphs_of_both_splits_agree_and_differ_between_classes():
  means = [
    np.stack([data.images[data.labels == label].mean(axis=0).ravel() for label in range(10)])
    for data in (load_dataset('new_glyphs', split) for split in ('train', 'test'))
  ]
  distances = np.linalg.norm(means[0][:, None] - means[1][None], axis=-1)
  assert distances.argmin(axis=1).tolist() == list(range(10))


def test_glyphs_are_drawn_in_any_size():
  large = load_dataset('glyphs', 'train', image_size=(24, 36)).images
  small = load_dataset('glyphs', 'train').images
  assert large.shape == (1600, 24, 36, 1)
  # Averaged down, the same drawing: other noise, finer lines.
  averaged = large.reshape(1600, 12, 2, 12, 3).mean(axis=(2, 4))
  correlation = np.corrcoef(averaged.ravel(), small.ravel())[0, 1]
  assert correlation > 0.8


def test_another_split_is_an_error():
  with pytest.raises(UserError, match=r"unknown split of 'glyphs' 'trian'\. Did you mean 'train'"):
    load_dataset('glyphs', 'trian')
