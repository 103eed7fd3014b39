"""What is measured, in full and in the short form that shows that it can be."""

import dataclasses
import math
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
  captions: bool = False  # Whether it is trained as the encoder of captions.
  batch: int = 32  # Images of a training step.
  steps: int = 10  # Of an epoch that is timed; what it needs besides steps is in it.


@dataclasses.dataclass(frozen=True)
class Llama:
  """A Llama of so many layers, whose checkpoints are merged."""

  layers: int
  hidden: int
  vocabulary: int = 32_000

  @property
  def config(self) -> dict[str, Any]:
    """Its `config.json`."""
    return {
      'architectures': ['LlamaForCausalLM'], 'model_type': 'llama', 'dtype': 'bfloat16',
      'hidden_size': self.hidden, 'intermediate_size': 3 * self.hidden,
      'num_attention_heads': 8, 'num_hidden_layers': self.layers, 'vocab_size': self.vocabulary,
    }  # fmt: skip

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Name -> shape, as PyTorch has them."""
    hidden, inner = self.hidden, 3 * self.hidden
    one_layer = {
      **{f'self_attn.{name}_proj.weight': (hidden, hidden) for name in 'qkvo'},
      **{f'mlp.{name}_proj.weight': (inner, hidden) for name in ('gate', 'up')},
      'mlp.down_proj.weight': (hidden, inner),
      'input_layernorm.weight': (hidden,),
      'post_attention_layernorm.weight': (hidden,),
    }
    layers = {f'model.layers.{i}.': one_layer for i in range(self.layers)}
    return {
      'model.embed_tokens.weight': (self.vocabulary, hidden),
      **{prefix + name: shape for prefix, of in layers.items() for name, shape in of.items()},
      'model.norm.weight': (hidden,),
      'lm_head.weight': (self.vocabulary, hidden),
    }

  @property
  def weights(self) -> int:
    """How many it has."""
    return sum(math.prod(shape) for shape in self.shapes.values())


_CNN = Target('cnn', (28, 28, 1), repetitions=40, steps=100)
_RESNET = Target('resnet18', (32, 32, 3), repetitions=15)
_RESNET_BFLOAT16 = Target('resnet18', (32, 32, 3), {'dtype': 'bfloat16'})


# Half of b0's channels, as fits two cores.
_PVT = {
  'embed_dims': (16, 32, 80, 128),
  'depths': (2, 2, 2, 2),
  'num_heads': (1, 2, 5, 8),
  'sr_ratios': (8, 4, 2, 1),
  'mlp_ratios': (8, 8, 4, 4),
}
_DEEPLAB = {'width': 0.5, 'output_stride': 8, 'rates': (2, 4, 6), 'channels': 64}


@dataclasses.dataclass(frozen=True)
class Settings:
  """The sizes of everything; the defaults are the full measurement."""

  # Whose weights are predicted, the network that goals are judged by last.
  predicted: tuple[Target, ...] = (
    Target('cnn', (28, 28, 1), repetitions=15),
    Target('resnet18', (32, 32, 3), repetitions=5),
  )
  # Weights that the plain vmap takes at once, at some 2 KB each: 64 features of four layers in two
  # streams, in float32.
  plain_chunk: int = 1 << 18
  keras_batches: tuple[int, ...] = (1024, 8192, 65536)  # Of its `predict`; the fastest is taken.
  product: int = 2048  # Rows of the matrices whose product is timed.
  linear: tuple[int, int] = (5 * 10**7, 5)  # Weights, and how often they are predicted.
  leaves: tuple[int, int] = (5000, 1000)  # How many, and the weights of each.
  few: tuple[int, int] = (300, 20_000)  # Likewise; they may cost hardly more than one leaf.
  # After the first, the second should need no new program.
  compiled: tuple[Target, Target] = (_RESNET, Target('densenet', (32, 32, 3)))
  # For memory and cost: dtype, steps ahead, numbers of weights. Five stages of the most in float32
  # would take 20 GB.
  series: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = (
    ('float32', (1, 3), (10**5, 10**6, 10**7, 10**8)),
    ('bfloat16', (1,), (10**6, 10**7, 10**8, 10**9)),
  )
  # Numbers of weights for the cost of every predictor, and the side of matrices for those that
  # decompose them.
  growth: tuple[int, ...] = (10**6, 10**7, 10**8, 10**9)
  growth_side: int = 256
  size_seconds: float = 3.0  # Each size is repeated for so long, twice at least.
  fresh: bool = True  # Whether memory and compilation have a process for each measurement.
  streamed: int = 10**9  # Weights of a history in files, in bfloat16.
  streamed_leaf: int = 5 * 10**7  # The most of one of its leaves.
  merged: tuple[Llama, ...] = (Llama(13, 1024), Llama(16, 2048))
  starts: int = 5  # Processes of each kind that are started and merge.
  trained: Target = _CNN
  batch_size: int = 128
  train_steps: int = 40  # Of an epoch.
  # Of which steps are timed.
  networks: tuple[Target, ...] = (
    _CNN,
    Target('resnet_small', (32, 32, 3), repetitions=10, steps=100),
    Target('pvt_v2', (64, 64, 3), _PVT, repetitions=10, steps=30),
    Target('pvt_v2_b0', (224, 224, 3), repetitions=3, batch=8, steps=30),
    Target('deeplabv3plus', (64, 96, 3), _DEEPLAB, repetitions=10),
    Target('resnet_small', (32, 32, 3), repetitions=10, steps=50, captions=True),
  )
  gpu_anywhere: bool = False  # Whether what is for GPUs runs on any device, to see that it does.
  gpu_predicted: Target = _RESNET
  gpu_weights: int = 10**9  # Of the large model there, in bfloat16.
  gpu_leaf: int = 5 * 10**7  # Weights of each of its leaves.
  gpu_trained: Target = _RESNET_BFLOAT16
  gpu_images: int = 50_000  # Of an epoch there.
  gpu_repetitions: int = 5  # Of the large ones.


FULL = Settings()

_TINY = Target('cnn', (8, 8, 1), {'width': 2, 'convs': 1}, repetitions=3, batch=8, steps=2)

QUICK = Settings(
  predicted=(_TINY,),
  plain_chunk=100,
  keras_batches=(512, 1024),
  product=64,
  linear=(2_000, 2),
  leaves=(20, 100),
  few=(3, 700),
  compiled=(_TINY, dataclasses.replace(_TINY, options={'width': 3, 'convs': 1})),
  series=(('float32', (1,), (2_000, 20_000)), ('bfloat16', (1,), (2_000, 4_000))),
  growth=(2_000, 20_000),
  growth_side=16,
  size_seconds=0.0,
  fresh=False,
  streamed=25_000,
  streamed_leaf=10_000,
  merged=(Llama(1, 16, 50),),
  starts=1,
  trained=_TINY,
  batch_size=16,
  train_steps=2,
  networks=(_TINY, dataclasses.replace(_TINY, captions=True)),
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
