"""What is measured, in full and in the short form that shows that it can be."""

import dataclasses
from typing import Any

from know_jax.predictors.known import HISTORY_LENGTH

Images = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Target:
  """A network of `build_model`, its options, its input `(H, W, C)`, how often it is measured."""

  model: str
  image: Images
  options: dict[str, Any] = dataclasses.field(default_factory=dict)
  repetitions: int = 1


_CNN = Target('cnn', (28, 28, 1), repetitions=40)
_RESNET = Target('resnet18', (32, 32, 3), repetitions=15)
_RESNET_BFLOAT16 = Target('resnet18', (32, 32, 3), {'dtype': 'bfloat16'})


@dataclasses.dataclass(frozen=True)
class Settings:
  """The sizes of everything; the defaults are the full measurement.

  Attributes:
    predicted: networks whose weights are predicted, the one that goals are judged by last.
    plain_chunk: weights that the plain vmap takes at a time: 64 features of four layers in two
      streams, in float32, are about 2 KB a weight.
    keras_batches: batch sizes of Keras' predict; the fastest is taken.
    product: rows and columns of the large matrices whose product is timed.
    linear: weights of the history that linear predictors read, and how often each does.
    leaves: how many leaves, and the weights of each, where there are many.
    compiled: two networks; after the first the second should need no new program.
    sizes: numbers of weights for memory and cost.
    steps: steps ahead for memory and cost.
    size_seconds: each size is repeated for so long, twice at least.
    fresh: whether each measurement of memory and compilation has a process of its own.
    streamed: weights of a history in files, in bfloat16.
    streamed_leaf: the most of one of its leaves.
    trained: the network that is trained.
    batch_size: images a step.
    train_steps: steps of an epoch.
    gpu_anywhere: whether what is for GPUs runs on any device, to see that it does.
    gpu_predicted: the network predicted three steps ahead on a GPU.
    gpu_weights: weights of the large model there, in bfloat16.
    gpu_leaf: weights of each of its leaves.
    gpu_trained: the network that is trained there in bfloat16.
    gpu_images: images of an epoch there.
    gpu_repetitions: how often the large ones are repeated.
  """

  predicted: tuple[Target, ...] = (
    Target('cnn', (28, 28, 1), repetitions=15),
    Target('resnet18', (32, 32, 3), repetitions=5),
  )
  plain_chunk: int = 1 << 18
  keras_batches: tuple[int, ...] = (1024, 8192, 65536)
  product: int = 2048
  linear: tuple[int, int] = (5 * 10**7, 5)
  leaves: tuple[int, int] = (5000, 1000)
  compiled: tuple[Target, Target] = (_RESNET, Target('densenet', (32, 32, 3)))
  sizes: tuple[int, ...] = (10**5, 10**6, 10**7, 10**8)
  steps: tuple[int, ...] = (1, 3)
  size_seconds: float = 3.0
  fresh: bool = True
  streamed: int = 10**9
  streamed_leaf: int = 5 * 10**7
  trained: Target = _CNN
  batch_size: int = 128
  train_steps: int = 40
  gpu_anywhere: bool = False
  gpu_predicted: Target = _RESNET
  gpu_weights: int = 10**9
  gpu_leaf: int = 5 * 10**7
  gpu_trained: Target = _RESNET_BFLOAT16
  gpu_images: int = 50_000
  gpu_repetitions: int = 5


FULL = Settings()

_TINY = Target('cnn', (8, 8, 1), {'width': 2, 'convs': 1}, repetitions=3)

QUICK = Settings(
  predicted=(_TINY,),
  plain_chunk=100,
  keras_batches=(512, 1024),
  product=64,
  linear=(2_000, 2),
  leaves=(20, 100),
  compiled=(_TINY, dataclasses.replace(_TINY, options={'width': 3, 'convs': 1})),
  sizes=(2_000, 4_000, 20_000),
  steps=(1,),
  size_seconds=0.0,
  fresh=False,
  streamed=25_000,
  streamed_leaf=10_000,
  trained=_TINY,
  batch_size=16,
  train_steps=2,
  gpu_anywhere=True,
  gpu_predicted=_TINY,
  gpu_weights=20_000,
  gpu_leaf=10_000,
  gpu_trained=dataclasses.replace(_TINY, options={**_TINY.options, 'dtype': 'bfloat16'}),
  gpu_images=64,
  gpu_repetitions=3,
)
"""Seconds instead of half an hour; its numbers say nothing."""

STAGES = HISTORY_LENGTH
"""Stages of every history here."""
