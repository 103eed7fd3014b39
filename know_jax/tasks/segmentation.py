"""Segmentation: a class for every pixel, cross-entropy, mIoU and mean class accuracy."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import numpy as np

from know_jax.data.augmentation import Augmentation, augment_labels
from know_jax.data.base import Arrays, Batch
from know_jax.data.sources import open_prepared
from know_jax.errors import UserError, unknown_name
from know_jax.fields import read_config
from know_jax.models import HEAD
from know_jax.models.adapters import Model, linen
from know_jax.tasks import classification
from know_jax.tasks.base import DrawnFields, NetworkFields, Task, below
from know_jax.tasks.metrics import IGNORED, confusion_matrix, pixel_losses, segmentation_scores

_AT_A_TIME = 16


@flax.struct.dataclass
class Preparation(classification.Preparation):
  """In training image and label map are distorted alike; what comes in at an edge is ignored."""

  def __call__(self, batch: Batch, keys: jax.Array | None) -> Batch:
    """The batch with images float32 `[B, H, W, C]`; label maps stay uint8 `[B, H, W]`."""
    batch, labels = super().__call__(batch, keys), batch['label']
    if keys is not None and self.augmentation != Augmentation():
      labels = augment_labels(keys, labels, self.augmentation, IGNORED)
    return {**batch, 'label': labels}


def loss(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
  """The cross-entropy of every pixel, and 1 where it counts: `[B, H, W]` both."""
  return pixel_losses(logits, batch['label'])


def sums(logits: jax.Array, batch: Batch, mask: jax.Array) -> dict[str, jax.Array]:
  """Sums of cross-entropy and of pixels, and the confusion matrix."""
  values, weights = loss(logits, batch)
  counts = mask.reshape(-1, 1, 1)
  return {
    'loss': (values * counts).sum(),
    'pixels': (weights * counts).sum(),
    'confusion': confusion_matrix(batch['label'], logits.argmax(-1), logits.shape[-1], mask),
  }


def metrics(sums: Mapping[str, Any]) -> dict[str, float]:
  """Mean cross-entropy of the labelled pixels, and `segmentation_scores`."""
  scores = segmentation_scores(sums['confusion'])
  return {'loss': float(sums['loss']) / max(float(sums['pixels']), 1.0), **scores}


def task(
  model: Model | nn.Module,
  train: Arrays,
  test: Arrays,
  *,
  num_classes: int,
  augmentation: Augmentation = Augmentation(),  # noqa: B008  (it is frozen)
  head: str = HEAD,
  name: str = 'the images',
  about: Mapping[str, Any] | None = None,
) -> Task:
  """Segmentation with a network and data of one's own.

  Args:
    model: takes `batch['image']` and gives logits `[B, H, W, classes]`; a linen module or `Model`.
    train: 'image', uint8 `[N, H, W, C]`, and 'label', uint8 `[N, H, W]`: a class or 255, a pixel
      that counts nowhere.
    test: likewise.
    num_classes: how many classes there are.
    augmentation: of training images and their label maps together.
    head: the layer that a transfer makes anew.
    name: what the data are, for messages.
    about: JSON data for the record of a run.

  Raises:
    UserError: label maps have other sizes than images, or an unknown class; or no pixel is
      labelled.
  """
  for split, source in (('train', train), ('test', test)):
    check_labels(f'{split} of {name}', source.arrays['image'], source.arrays['label'], num_classes)
  return Task(
    linen(model) if isinstance(model, nn.Module) else model,
    train,
    test,
    loss,
    sums,
    metrics,
    prepare=Preparation(classification.mean_of(train), augmentation),
    head=below(head),
    score='miou',
    name=name,
    about=about or {},
    at_a_time=_AT_A_TIME,
  )


def check_labels(what: str, images: np.ndarray, labels: np.ndarray, num_classes: int) -> None:
  """Checks that label maps fit their images.

  Raises:
    UserError: see `task`.
  """
  if labels.dtype != np.uint8 or labels.shape != images.shape[:3]:
    raise UserError(
      f'the label maps of {what} have shape {labels.shape} and dtype {labels.dtype}; expected '
      f'{images.shape[:3]}, as their images have, and uint8.'
    )
  counts = np.bincount(labels.ravel(), minlength=256)
  unknown = np.flatnonzero(counts[num_classes:IGNORED]) + num_classes
  if len(unknown):
    first = np.flatnonzero((labels == unknown[0]).any((1, 2)))[0]
    raise UserError(
      f'label map {first} of {what} has class {unknown[0]}; expected 0 to {num_classes - 1}, or '
      f'{IGNORED} where a pixel has none.'
    )
  if not counts[:num_classes].any():
    raise UserError(f'no pixel of {what} has a class; expected some.')


def load(config: Mapping[str, Any], network: Mapping[str, Any]) -> Task:
  """The task that a config names.

  Args:
    config: the fields of `DataFields`; `dataset` is of TFDS, with the features 'image' and
      'segmentation_mask'; `train_examples`, if it has it: only the first so many, 0 all.
    network: the fields of `NetworkFields`.

  Raises:
    UserError: a field does not fit.
  """
  fields = read_config(DrawnFields, config, only=True)
  of_network = read_config(NetworkFields, network, only=True)
  (train, names), (test, _) = fields.read_splits(read, 'segmentation')
  if examples := fields.train_examples:
    if not 0 < examples <= train.size:
      raise UserError(f'train_examples is {examples}; expected 0 (all) to {train.size}.')
    train = Arrays({key: array[:examples] for key, array in train.arrays.items()})
  return task(
    classification.network_of(of_network, len(names)),
    train,
    test,
    num_classes=len(names),
    augmentation=fields.augmentation,
    head=of_network.head,
    name=f'{fields.dataset} images {train.arrays["image"].shape[1:]}',
    about={'class_names': names},
  )


def read(
  name: str, split: str, data_dir: str | Path | None, size: tuple[int, int] | None
) -> tuple[Arrays, list[str]]:
  """A split of a prepared TFDS data set with label maps, and the names of its classes.

  Images are resized bilinearly and label maps to the nearest pixel, where `size`, (H, W), is given.

  Raises:
    UserError: there is no such data set or split, it has no label maps, or sizes differ.
  """
  from PIL import Image

  tfds, builder = open_prepared(name, data_dir)
  features = builder.info.features
  for key in ('image', 'segmentation_mask'):
    if key not in features:
      raise UserError(
        f'data set {name!r} has the features {", ".join(sorted(features))}; expected image and '
        'segmentation_mask.'
      )
  if split not in builder.info.splits:
    raise unknown_name(f'split of {name!r}', split, builder.info.splits)
  skip = tfds.decode.SkipDecoding()
  source = builder.as_data_source(
    split=split, file_format='array_record', decoders={'image': skip, 'segmentation_mask': skip}
  )
  images: list[Any] = []
  labels: list[np.ndarray] = []
  for i, example in enumerate(source.__getitems__(range(len(source)))):
    with Image.open(io.BytesIO(example['image'])) as encoded:
      image = encoded.convert('RGB')
    with Image.open(io.BytesIO(example['segmentation_mask'])) as encoded:
      label = encoded.copy()
    if image.size != label.size or (images and size is None and image.size != images[0].size):
      raise UserError(
        f'example {i} of {name}/{split} has an image of {image.height} x {image.width} and a label '
        f'map of {label.height} x {label.width}; expected the same size for both and for all '
        'examples (image_size resizes those that differ among one another).'
      )
    if size is not None:
      image = image.resize(size[::-1], Image.Resampling.BILINEAR)
      label = label.resize(size[::-1], Image.Resampling.NEAREST)
    images.append(image)
    labels.append(np.asarray(label))
  names = [str(label) for label in features['segmentation_mask'].names]
  return Arrays(
    {'image': np.stack([np.asarray(i) for i in images]), 'label': np.stack(labels)}
  ), names
