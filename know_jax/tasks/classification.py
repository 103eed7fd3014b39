"""Image classification: cross-entropy and accuracy."""

import ast
import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from know_jax.data.augmentation import Augmentation, augment
from know_jax.data.base import Batch, Source, checked_batch
from know_jax.data.sources import Dataset, load_dataset, mean_image, to_device_input
from know_jax.data.subsets import nested_subsets
from know_jax.errors import UserError
from know_jax.fields import read_config
from know_jax.models import HEAD, build_model
from know_jax.models.adapters import Model, linen
from know_jax.registry import load_object
from know_jax.seeds import named_key
from know_jax.tasks.base import AXIS, DataFields, DrawnFields, NetworkFields, Task, below

_READ = 512
"""Examples that are read at a time where the data are not in memory."""


@flax.struct.dataclass
class Preparation:
  """Bytes to centred numbers, augmented in training."""

  mean: Any  # The image to subtract, float32 `[H, W, C]`.
  # Applied after it is subtracted.
  augmentation: Augmentation = flax.struct.field(pytree_node=False, default=Augmentation())

  def __call__(self, batch: Batch, keys: jax.Array | None) -> Batch:
    """The batch with images as the networks take them, float32 `[B, H, W, C]`."""
    images = to_device_input(batch['image'], self.mean)
    if keys is not None:
      images = augment(keys, images, self.augmentation)
    return {**batch, 'image': images}


def loss(logits: jax.Array, batch: Batch) -> tuple[jax.Array, None]:
  """The cross-entropy of every example, `[B]`."""
  logits = logits.astype(jnp.float32)
  return optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']), None


def sums(logits: jax.Array, batch: Batch, mask: jax.Array) -> dict[str, jax.Array]:
  """Sums of cross-entropy, of correct answers and of examples."""
  correct = logits.astype(jnp.float32).argmax(-1) == batch['label']
  values, _ = loss(logits, batch)
  return {
    'loss': (values * mask).sum(),
    'accuracy': (correct.astype(jnp.float32) * mask).sum(),
    'examples': mask.sum(),
  }


def metrics(sums: Mapping[str, Any]) -> dict[str, float]:
  """Mean cross-entropy, and the share of correct answers."""
  examples = float(sums['examples'])
  return {name: float(sums[name]) / examples for name in ('loss', 'accuracy')}


def task(
  model: Model | nn.Module,
  train: Source,
  test: Source,
  *,
  mean: np.ndarray | None = None,
  augmentation: Augmentation = Augmentation(),  # noqa: B008  (it is frozen)
  head: str = HEAD,
  name: str = 'the images',
  about: Mapping[str, Any] | None = None,
) -> Task:
  """Image classification with a network and data of one's own.

  Args:
    model: takes `batch['image']` and gives logits `[B, classes]`; a linen module, or a `Model`.
    train: batches of 'image', uint8 `[B, H, W, C]`, and 'label', int32 `[B]`.
    test: likewise.
    mean: the image to subtract from images / 255, float32 `[H, W, C]`; None: their mean.
    augmentation: of training images.
    head: the layer that a transfer makes anew.
    name: what the data are, for messages.
    about: JSON data for the record of a run.
  """
  model = linen(model) if isinstance(model, nn.Module) else model
  mean = mean_of(train) if mean is None else mean
  return Task(
    model, train, test, loss, sums, metrics,
    prepare=Preparation(np.asarray(mean, np.float32), augmentation), head=below(head), name=name,
    about=about or {},
  )  # fmt: skip


def load(config: Mapping[str, Any], network: Mapping[str, Any]) -> Task:
  """The task that a config names.

  Args:
    config: the fields of `DataFields` and, if it has them, of `DrawnFields`: how many examples of
      the training set are used, drawn by class.
    network: the fields of `NetworkFields`.

  Raises:
    UserError: a field does not fit.
  """
  fields = read_config(DrawnFields, config, only=True)
  train, test = (split_of(fields, split) for split in (fields.train_split, fields.test_split))
  train = _draw(train, fields.train_examples, fields.seed)
  if absent := sorted(set(range(train.num_classes)) - set(train.labels.tolist())):
    raise UserError(
      f'class {train.class_names[absent[0]]!r} has no example in {train.name}/{train.split}; '
      'expected some of each class.'
    )
  of_network = read_config(NetworkFields, network, only=True)
  return task(
    network_of(of_network, train.num_classes),
    train,
    test,
    augmentation=fields.augmentation,
    head=of_network.head,
    name=f'{train.name} images {train.images.shape[1:]}',
    about={'class_names': list(train.class_names)},
  )


def split_of(fields: DataFields, split: str) -> Dataset:
  """A split of the data that a config names."""
  return load_dataset(
    fields.dataset, split, data_dir=fields.data_dir, classes=fields.classes, image_size=fields.size
  )


def mean_of(source: Source) -> np.ndarray:
  """The mean image of a source, read once where it is not in memory; see `mean_image`."""
  arrays = getattr(source, 'arrays', None)
  if arrays is not None:
    return mean_image(arrays['image'])
  total: Any = 0.0
  for start in range(0, source.size, _READ):
    indices = np.arange(start, min(start + _READ, source.size), dtype=np.int32)
    total += mean_image(checked_batch(source, indices)['image']).astype(np.float64) * len(indices)
  return (total / source.size).astype(np.float32)


def network_of(config: NetworkFields, num_classes: int) -> Model | nn.Module:
  """The network that a config names, with so many logits.

  A name of the user's, 'package.module:object', is called with `num_classes` and the keywords in
  `model_options`, and with `width` and `dtype` where they are not the config's defaults; it gives a
  linen module or a `Model`.

  Raises:
    UserError: a name or value does not fit.
  """
  name, dtype = config.model, config.dtype
  options = keywords(config.model_options, 'model_options')
  if config.width is not None:
    options = {'width': config.width} | options
  if ':' not in name:
    return build_model(name, num_classes=num_classes, dtype=dtype, axis_name=AXIS, **options)
  if dtype != 'float32':
    options['dtype'] = jnp.dtype(dtype)
  return load_object(name, 'model')(num_classes=num_classes, **options)


def keywords(text: str, what: str) -> dict[str, Any]:
  """Keyword arguments as they stand in a call: 'depths=(1, 2), linear=True'.

  Args:
    text: the arguments, of constants.
    what: where they stand, for errors.

  Raises:
    UserError: they are none, or `num_classes`, `dtype` or `axis_name`, which have a field of their
      own or follow from the data.
  """
  try:
    call = ast.parse(f'f({text})', mode='eval').body
    if not isinstance(call, ast.Call) or call.args:
      raise ValueError
    result = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
  except (SyntaxError, ValueError) as error:
    raise UserError(
      f"{what} is {text!r}; expected keyword arguments, as 'depths=(1, 2, 1, 1), linear=True'."
    ) from error
  if reserved := sorted({'num_classes', 'dtype', 'axis_name', 'None'} & set(result)):
    raise UserError(
      f'{what} has {reserved[0]}; expected options of the network alone: dtype is a field of the '
      'config, num_classes and axis_name follow from the data.'
    )
  return result


def _draw(train: Dataset, examples: int, seed: int) -> Dataset:
  """A random part of a training set, with the classes' shares kept."""
  if examples == 0 or examples == len(train.labels):
    return train
  if not 0 < examples < len(train.labels):
    raise UserError(
      f'train_examples is {examples}; expected 0 (all) to {len(train.labels)}, the size of '
      f'{train.name}/{train.split}.'
    )
  share = examples / len(train.labels)
  key = named_key(seed, 'train_examples')
  chosen = nested_subsets(key, train.labels, rate=share, phases=2, stratified=True)[1]
  return dataclasses.replace(train, images=train.images[chosen], labels=train.labels[chosen])
