"""What a task is: a network, data, what is done to a batch, a loss and a score.

All that trains, predicts, transfers or draws speaks to a `Task` only. A new one is a file with a
function that makes it; see `know_jax/tasks/classification.py`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from know_jax.data.augmentation import Augmentation
from know_jax.data.base import Batch, Source, checked_batch
from know_jax.errors import UserError, unknown_name
from know_jax.kinds import Rules, leaf_kinds
from know_jax.models.adapters import Model, Variables

T = TypeVar('T')
AXIS = 'batch'
"""The mapped axis of devices; networks average BatchNorm's statistics over it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionFields:
  """Of the task captioning alone: the most tokens, the most words of a caption, its decoder."""

  vocabulary: int = 5000
  max_length: int = 50
  units: int = 256
  heads: int = 2
  layers: int = 2
  dropout: float = 0.5

  def __post_init__(self) -> None:
    for name, value in vars(self).items():
      if not (0 <= value < 1 if name == 'dropout' else value >= 1):
        raise UserError(
          f'captions.{name} is {value}; expected '
          f'{"a share from 0 to below 1" if name == "dropout" else "at least 1"}.'
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataFields:
  """The config fields that name a task's data."""

  # A name in know_jax.tasks.TASKS, or 'package.module:object'.
  task: str = 'classification'
  # A TFDS name, 'digits' or the path of a folder of pictures; classes: () for all, else those
  # kept, relabelled 0, 1, ...
  dataset: str
  data_dir: str | None = None
  classes: tuple[int, ...] = ()
  image_size: tuple[int, ...] = ()
  train_split: str = 'train'
  test_split: str = 'test'
  captions: CaptionFields = CaptionFields()
  augmentation: Augmentation = Augmentation()  # noqa: RUF009  (it is frozen)

  @property
  def size(self) -> tuple[int, int] | None:
    """The size that images get, (H, W), as `load_dataset` takes and checks it."""
    size: Any = self.image_size or None
    return size

  def read_splits(self, read: Callable[..., T], what: str) -> list[T]:
    """What `read(dataset, split, data_dir, size)` gives of the training and the test split.

    Raises:
      UserError: classes are chosen, which a task that is not of classes cannot do; `what` names it.
    """
    if self.classes:
      raise UserError(f'classes is {self.classes}; expected none for {what}.')
    splits = (self.train_split, self.test_split)
    return [read(self.dataset, split, self.data_dir, self.size) for split in splits]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawnFields(DataFields):
  """The data of a forgetting run, and how many of its training examples are drawn by a seed."""

  train_examples: int = 0
  seed: int = 0


CONV_INITS = {
  name: getattr(jax.nn.initializers, name)
  for name in ('glorot_uniform', 'glorot_normal', 'he_uniform', 'he_normal', 'lecun_normal')
}
"""Initialisers of convolution kernels. Ours start Glorot-uniform, the authors' he-normal."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkFields:
  """The config fields that name a network."""

  # A name in know_jax.models.MODELS, or 'package.module:object'; width: None for the family's own;
  # model_options: its keyword arguments, as 'depths=(1, 2, 1, 1), stem_stride=2'; head: the layer
  # that a transfer makes anew.
  model: str
  width: int | None = None
  model_options: str = ''
  # How convolution kernels start, a name in `CONV_INITS`; None: as the network has it.
  conv_init: str | None = None
  dtype: str = 'float32'
  head: str = 'head'


def as_it_is(batch: Batch, keys: jax.Array | None) -> Batch:
  """The batch without any preparation."""
  del keys
  return batch


def below(name: str) -> Callable[[str], bool]:
  """Whether a path has a component of this name: `below('head')('params/head/kernel')`."""
  return lambda path: name in path.split('/')


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
  """A task ready to train on.

  The functions run within compiled steps. Steps are compiled once for each `model`, `loss` and
  `sums`: tasks that share these, as functions of a module and not made anew, share compilations. A
  `prepare` that is a pytree (a `flax.struct.dataclass` or `jax.tree_util.Partial`) hands its arrays
  over as arguments; those of any other function are compiled in.

  Attributes:
    model: the network.
    train: the training set.
    test: the test set; batches have the same arrays as those of `train`.
    loss: (outputs, batch) -> (values, weights). The loss of a batch is the mean of the values under
      the weights, over the whole batch on all devices; weights None: all count alike. Values have
      the examples on axis 0 (tokens or pixels on others), and each is of its own example alone.
    sums: (outputs, batch, mask) -> dict of arrays that add up over batches; `mask` `[B]` is 1 for
      an example that counts and 0 for one that does not.
    metrics: sums over a whole set, NumPy float64 -> dict of numbers, 'loss' and `score` included.
    prepare: (batch, keys) -> batch, on the device. `keys`: `[B]`, one an example, so that what
      befalls an example (augmentation) depends on nothing else; None outside training.
    head: whether a leaf, by its path in the variables as 'params/head/kernel', is part of what a
      transfer makes anew.
    kinds: the rule for the kinds of leaves where names do not tell them; see `kinds.leaf_kinds`.
    score: the metric by which weights are compared; larger is better.
    encoder: the component of the variables below which the leaves of a classifier have the names
      that they have in the classifier itself; a transfer may start from one. '': none.
    name: what the data are, for messages.
    about: JSON data for the record of a run, such as the names of classes.
    conv_init: how convolution kernels start, a name in `CONV_INITS`; None: as the network has it.
    at_a_time: how many examples a device takes at a time in evaluation.
  """

  model: Model
  train: Source
  test: Source
  loss: Callable[[Any, Batch], tuple[jax.Array, jax.Array | None]]
  sums: Callable[[Any, Batch, jax.Array], dict[str, Any]]
  metrics: Callable[[Mapping[str, Any]], dict[str, float]]
  prepare: Callable[[Batch, jax.Array | None], Batch] = as_it_is
  head: Callable[[str], bool] = dataclasses.field(default_factory=lambda: below('head'))
  kinds: Rules | None = None
  score: str = 'accuracy'
  encoder: str = ''
  name: str = 'the task'
  about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  conv_init: str | None = None
  at_a_time: int = 512

  def __post_init__(self) -> None:
    for field in ('loss', 'sums', 'metrics', 'prepare', 'head'):
      if not callable(getattr(self, field)):
        raise UserError(f'{field} of a task is {getattr(self, field)!r}; expected a function.')
    for field in ('train', 'test'):
      source = getattr(self, field)
      if source.size < 1:
        raise UserError(f'{field} of {self.name} has {source.size} examples; expected some.')
      if source.strata is not None and np.shape(source.strata) != (source.size,):
        raise UserError(
          f'the strata of {field} have shape {np.shape(source.strata)}; expected [{source.size}], '
          'one for each example.'
        )
    if self.conv_init is not None and self.conv_init not in CONV_INITS:
      raise unknown_name('conv_init', self.conv_init, CONV_INITS)
    try:
      hash(self.model)
    except TypeError as error:
      raise UserError(f'model {self.model!r} cannot be hashed; expected that it can.') from error

  def init(self, key: jax.Array) -> Variables:
    """Fresh variables of the network, on the device; also under `jax.eval_shape`."""
    first = checked_batch(self.train, np.zeros(1, np.int32))
    shapes = jax.eval_shape(lambda batch: self.prepare(batch, None), first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    variables = _init_fn(self.model)(key, zeros)
    if not isinstance(variables, dict) or 'params' not in variables:
      raise UserError(
        f"the variables of the network are {type(variables)}; expected 'params' in a dict."
      )
    if self.conv_init is None:
      return variables
    draw = CONV_INITS[self.conv_init]()
    leaves, treedef = jax.tree.flatten(variables['params'])
    kinds = leaf_kinds({'params': variables['params']}, self.kinds).values()
    drawn = [
      draw(key, leaf.shape, leaf.dtype) if kind == 'conv' else leaf
      for key, leaf, kind in zip(jax.random.split(key, len(leaves)), leaves, kinds, strict=True)
    ]
    return {**variables, 'params': jax.tree.unflatten(treedef, drawn)}

  def prepared(self, indices: np.ndarray) -> Batch:
    """Training examples as the network is given them in evaluation."""
    return self.prepare(jax.tree.map(jnp.asarray, checked_batch(self.train, indices)), None)


@functools.lru_cache(maxsize=64)
def _init_fn(model: Model) -> Callable[..., Any]:
  return jax.jit(model.init)
