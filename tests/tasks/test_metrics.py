"""Scores against torchmetrics, sklearn and Keras, and against counting in NumPy."""

import numpy as np
import parity
from hypothesis import given, settings
from hypothesis import strategies as st

from know_jax.tasks.metrics import (
  confusion_matrix,
  pixel_losses,
  segmentation_scores,
  token_losses,
  token_scores,
  token_sums,
)


def test_segmentation_is_torchmetrics_and_sklearns():
  arrays, about = parity.load('metrics')
  expected = about['segmentation']
  logits, labels = arrays['segmentation/logits'], arrays['segmentation/labels']
  predictions = arrays['segmentation/predictions']
  parts = [confusion_matrix(labels[p], predictions[p], 5) for p in (slice(1), slice(1, 4))]
  np.testing.assert_array_equal(sum(parts), arrays['segmentation/confusion'])
  scores = segmentation_scores(sum(np.asarray(part) for part in parts))
  np.testing.assert_allclose(scores['miou'], expected['MIOU'], rtol=1e-6)
  np.testing.assert_allclose(scores['mean_accuracy'], expected['MACC'], rtol=1e-6)
  np.testing.assert_allclose(scores['accuracy'], expected['pixel_accuracy'], rtol=1e-6)
  losses, weights = pixel_losses(logits, labels)
  result = (losses * weights).sum() / weights.sum()
  np.testing.assert_allclose(
    result, expected['LOSS (mean over labelled pixels of the batch of four)'], rtol=1e-6
  )


def test_captions_are_keras():
  arrays, about = parity.load('metrics')
  expected = about['captions']
  logits, labels = arrays['captions/logits'], arrays['captions/labels']
  parts = [slice(2), slice(2, 5)]
  sums = [token_sums(logits[p], labels[p], np.ones(len(labels[p]))) for p in parts]
  for key, name in (('loss', 'masked loss'), ('masked_accuracy', 'masked accuracy')):
    each = [token_scores(part)[key] for part in sums]
    np.testing.assert_allclose(each, expected[f'{name} of each batch'], rtol=1e-6)
  scores = token_scores({key: sum(float(part[key]) for part in sums) for key in sums[0]})
  np.testing.assert_allclose(
    scores['loss'], expected['MASKED_LOSS (both batches as one)'], rtol=1e-6
  )
  np.testing.assert_allclose(
    scores['masked_accuracy'], expected['MASKED_ACCURACY (both batches as one)'], rtol=1e-6
  )
  # An example that is masked is as good as absent.
  mask = np.array([1, 1, 0, 0, 0])
  masked = token_sums(logits, labels, mask)
  np.testing.assert_allclose([masked[k] for k in sums[0]], list(sums[0].values()), rtol=1e-6)
  losses, weights = token_losses(logits, labels)
  assert np.isfinite(losses).all() and (np.asarray(losses)[weights == 0] == 0).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_scores_are_counted_pixel_by_pixel(seed):
  rng = np.random.default_rng(seed)
  labels = rng.choice([0, 1, 3, 255], size=(3, 4, 5)).astype(np.uint8)
  predictions = rng.choice(4, size=labels.shape)
  mask = rng.integers(0, 2, 3)
  confusion = np.asarray(confusion_matrix(labels, predictions, 5, mask))
  pairs = [
    (label, prediction)
    for i in range(3)
    for label, prediction in zip(labels[i].ravel(), predictions[i].ravel(), strict=True)
    if mask[i] and label != 255
  ]
  assert confusion.sum() == len(pairs)
  ious, accuracies = [], []
  for c in range(5):
    both = sum(pair == (c, c) for pair in pairs)
    either = sum(c in pair for pair in pairs)
    labelled = sum(pair[0] == c for pair in pairs)
    ious += [both / either] if either else []
    accuracies += [both / labelled] if labelled else []
  scores = segmentation_scores(confusion)
  for key, values in (('miou', ious), ('mean_accuracy', accuracies)):
    if values:
      np.testing.assert_allclose(scores[key], np.mean(values), atol=1e-12)
    else:
      assert np.isnan(scores[key])


def test_nothing_labelled_has_no_score():
  assert np.isnan(list(segmentation_scores(np.zeros((3, 3))).values())).all()
  assert np.isnan(
    list(token_scores(dict.fromkeys(('loss', 'losses', 'right', 'words'), 0)).values())
  ).all()
  losses, weights = pixel_losses(np.zeros((1, 2, 2, 3)), np.full((1, 2, 2), 255, np.uint8))
  assert not np.asarray(losses).any() and not np.asarray(weights).any()
