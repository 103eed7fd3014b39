"""The networks that the benchmark trains, once more in plain PyTorch, written from publications.

`bin/benchmark.py` times a training step of each beside know_jax's, where PyTorch is installed, and
tests/benchmark checks that both compute the same. Layers have the names of the Flax modules', so
that weights go over by name; nothing else is shared. PVTv2 is timm's.

References:
  He et al., Deep Residual Learning, 2016; Sandler et al., MobileNetV2, 2018; Chen et al.,
  Encoder-Decoder with Atrous Separable Convolution, 2018; TensorFlow's tutorial "Image captioning
  with visual attention".
"""

import copy
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from flax import traverse_util
from torch import nn
from torch.nn import functional

from know_jax.models import to_state_dict

DEFAULT, CHANNELS_LAST = 'PyTorch', 'PyTorch, channels last'
"""The two orders in memory that PyTorch has for images; which is faster depends on the network."""


class Conv(nn.Conv2d):
  """A convolution padded with zeros as TensorFlow does: at stride 2 more below and to the right."""

  def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, bias: bool = False):
    padding = kernel // 2 if stride == 1 else 0
    super().__init__(inputs, outputs, kernel, stride, padding, bias=bias)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    if self.stride[0] > 1:
      pads = []
      for side in (x.shape[3], x.shape[2]):
        outputs = -(-side // self.stride[0])
        total = max((outputs - 1) * self.stride[0] + self.kernel_size[0] - side, 0)
        pads += [total // 2, total - total // 2]
      x = functional.pad(x, pads) if any(pads) else x
    return super().forward(x)


class CNN(nn.Module):
  """Convolutions 3x3, ReLU and max-pooling; one hidden layer."""

  def __init__(self, like: Any, image: tuple[int, int, int]):
    super().__init__()
    side, channels = np.array(image[:2]), image[2]
    self.convs = like.convs
    for i in range(1, like.convs + 1):
      outputs = like.width if i == 1 else 2 * like.width
      self.add_module(f'conv{i}', Conv(channels, outputs, 3, bias=True))
      channels = outputs
      side = side // 2 if side.min() > 1 else side
    self.dense = nn.Linear(int(side.prod()) * channels, 8 * like.width)
    self.head = nn.Linear(8 * like.width, like.num_classes)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    for i in range(1, self.convs + 1):
      x = functional.relu(getattr(self, f'conv{i}')(x))
      if min(x.shape[2:]) > 1:
        x = functional.max_pool2d(x, 2)
    x = x.permute(0, 2, 3, 1).flatten(1)  # The order in which Flax has the hidden layer's inputs.
    return self.head(functional.relu(self.dense(x)))


class ResNet(nn.Module):
  """Basic blocks."""

  def __init__(self, like: Any, image: tuple[int, int, int], head: bool = True):
    super().__init__()
    bias, channels = like.conv_bias, like.width
    self.stem = Conv(image[2], channels, like.stem_kernel, like.stem_stride, bias)
    self.stem_norm = nn.BatchNorm2d(channels)
    self.blocks = []
    for i, stride in enumerate(like.strides):
      for j in range(like.blocks):
        block = BasicBlock(channels, like.width * 2**i, stride if j == 0 else 1, bias)
        channels = like.width * 2**i
        self.blocks.append(f'stage{i + 1}_block{j + 1}')
        self.add_module(self.blocks[-1], block)
    self.channels = channels
    if head:
      self.head = nn.Linear(channels, like.num_classes)

  def feature_map(self, x: torch.Tensor) -> torch.Tensor:
    x = functional.relu(self.stem_norm(self.stem(x)))
    for name in self.blocks:
      x = getattr(self, name)(x)
    return x

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.head(self.feature_map(x).mean((2, 3)))


class BasicBlock(nn.Module):
  def __init__(self, inputs: int, outputs: int, stride: int, bias: bool):
    super().__init__()
    self.conv1 = Conv(inputs, outputs, 3, stride, bias)
    self.norm1 = nn.BatchNorm2d(outputs)
    self.conv2 = Conv(outputs, outputs, 3, bias=bias)
    self.norm2 = nn.BatchNorm2d(outputs)
    self.projected = stride > 1 or inputs != outputs
    if self.projected:
      self.shortcut = Conv(inputs, outputs, 1, stride, bias)
      self.shortcut_norm = nn.BatchNorm2d(outputs)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    y = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
    return functional.relu(y + (self.shortcut_norm(self.shortcut(x)) if self.projected else x))


class InvertedResidual(nn.Module):
  def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, dilation: int):
    super().__init__()
    inner = inputs * expansion
    self.expands, self.adds = expansion > 1, stride == 1 and inputs == outputs
    if self.expands:
      self.expand = nn.Conv2d(inputs, inner, 1, bias=False)
      self.expand_norm = nn.BatchNorm2d(inner)
    self.depthwise = nn.Conv2d(
      inner, inner, 3, stride, dilation, dilation, groups=inner, bias=False
    )
    self.depthwise_norm = nn.BatchNorm2d(inner)
    self.project = nn.Conv2d(inner, outputs, 1, bias=False)
    self.project_norm = nn.BatchNorm2d(outputs)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    y = functional.relu6(self.expand_norm(self.expand(x))) if self.expands else x
    y = functional.relu6(self.depthwise_norm(self.depthwise(y)))
    y = self.project_norm(self.project(y))
    return x + y if self.adds else y


class ConvNorm(nn.Module):
  def __init__(self, inputs: int, outputs: int, kernel: int, separable: bool, dilation: int = 1):
    super().__init__()
    self.separable = separable and kernel > 1
    padding = dilation * (kernel // 2)
    if self.separable:
      self.depthwise = nn.Conv2d(
        inputs, inputs, kernel, 1, padding, dilation, groups=inputs, bias=False
      )
      self.depthwise_norm = nn.BatchNorm2d(inputs)
      kernel, padding, dilation = 1, 0, 1
    self.conv = nn.Conv2d(inputs, outputs, kernel, 1, padding, dilation, bias=False)
    self.norm = nn.BatchNorm2d(outputs)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    if self.separable:
      x = functional.relu(self.depthwise_norm(self.depthwise(x)))
    return functional.relu(self.norm(self.conv(x)))


class DeepLabV3Plus(nn.Module):
  """MobileNetV2 with dilated late blocks, ASPP, and a decoder that joins block 3's map."""

  # Expansion, channels, blocks, stride: MobileNetV2, table 2.
  STAGES = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
    (6, 320, 1, 1),
  )  # fmt: skip

  def __init__(self, like: Any, image: tuple[int, int, int]):
    super().__init__()

    def scaled(channels: int) -> int:
      near = max(8, int(like.width * channels + 4) // 8 * 8)
      return near + 8 if near < 0.9 * like.width * channels else near

    channels, stride_so_far, rate, self.blocks = scaled(32), 2, 1, []
    self.stem = nn.Conv2d(image[2], channels, 3, 2, 1, bias=False)
    self.stem_norm = nn.BatchNorm2d(channels)
    for expansion, outputs, blocks, first in self.STAGES:
      for j in range(blocks):
        stride, dilation = (first if j == 0 else 1), rate
        if stride_so_far * stride > like.output_stride:  # Dilation in place of the stride.
          rate, stride = rate * stride, 1
        stride_so_far *= stride
        block = InvertedResidual(channels, scaled(outputs), stride, expansion, dilation)
        channels = scaled(outputs)
        self.blocks.append(f'block{len(self.blocks) + 1}')
        self.add_module(self.blocks[-1], block)
    width, separable = like.channels, like.separable
    self.branches = [f'aspp{i}' for i in range(len(like.rates) + 1)]
    self.aspp0 = ConvNorm(channels, width, 1, separable)
    for name, dilation in zip(self.branches[1:], like.rates, strict=True):
      self.add_module(name, ConvNorm(channels, width, 3, separable, dilation))
    self.aspp_pool = ConvNorm(channels, width, 1, separable)
    self.aspp = ConvNorm(width * (len(like.rates) + 2), width, 1, separable)
    self.dropout = nn.Dropout(like.dropout)
    self.low_level = ConvNorm(scaled(24), 48, 1, separable)
    self.decoder0 = ConvNorm(width + 48, width, 3, separable)
    self.decoder1 = ConvNorm(width, width, 3, separable)
    self.head = nn.Conv2d(width, like.num_classes, 1)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    def enlarged(x: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
      return functional.interpolate(x, to.shape[2:], mode='bilinear', align_corners=False)

    y = functional.relu6(self.stem_norm(self.stem(x)))
    for name in self.blocks:
      y = getattr(self, name)(y)
      if name == 'block3':
        low = y
    pooled = self.aspp_pool(y.mean((2, 3), keepdim=True)).expand(-1, -1, *y.shape[2:])
    parts = [*(getattr(self, name)(y) for name in self.branches), pooled]
    y = self.dropout(self.aspp(torch.cat(parts, 1)))
    y = torch.cat([enlarged(y, low), self.low_level(low)], 1)
    return enlarged(self.head(self.decoder1(self.decoder0(y))), x)


class Attention(nn.Module):
  """Each head as wide as the tokens."""

  def __init__(self, units: int, features: int, heads: int, dropout: float):
    super().__init__()
    self.heads, self.dropout = heads, dropout
    self.query = nn.Linear(units, heads * units)
    self.key, self.value = (nn.Linear(features, heads * units) for _ in range(2))
    self.out = nn.Linear(heads * units, units)

  def forward(self, x: torch.Tensor, to: torch.Tensor, causal: bool) -> torch.Tensor:
    layers = ((self.query, x), (self.key, to), (self.value, to))
    q, k, v = (layer(y).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer, y in layers)
    dropout = self.dropout if self.training else 0.0
    y = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)
    return self.out(y.transpose(1, 2).flatten(2))


class DecoderBlock(nn.Module):
  def __init__(self, units: int, features: int, heads: int, dropout: float):
    super().__init__()
    self.self_attention = Attention(units, units, heads, dropout)
    self.cross_attention = Attention(units, features, heads, dropout)
    self.dense1, self.dense2 = nn.Linear(units, 2 * units), nn.Linear(2 * units, units)
    self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(units, eps=1e-3) for _ in range(3))
    self.dropout = nn.Dropout(dropout)

  def forward(self, x: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    x = self.norm1(x + self.self_attention(x, x, True))
    x = self.norm2(x + self.cross_attention(x, image, False))
    return self.norm3(x + self.dropout(self.dense2(functional.relu(self.dense1(x)))))


class CaptionDecoder(nn.Module):
  def __init__(self, like: Any, features: int):
    super().__init__()
    self.token_embedding = nn.Embedding(like.vocabulary, like.units)
    self.position_embedding = nn.Embedding(like.max_length, like.units)
    self.blocks = [f'block{i + 1}' for i in range(like.layers)]
    for name in self.blocks:
      self.add_module(name, DecoderBlock(like.units, features, like.heads, like.dropout))
    self.output = nn.Linear(like.units, like.vocabulary)
    self.prior = torch.tensor(like.log_prior, dtype=torch.float32)

  def forward(self, image: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    x = self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]
    for name in self.blocks:
      x = getattr(self, name)(x, image)
    return self.output(x) + self.prior


class Captioner(nn.Module):
  """A ResNet's last map, and a transformer decoder that attends to it."""

  def __init__(self, like: Any, image: tuple[int, int, int]):
    super().__init__()
    self.encoder = ResNet(like.classifier, image, head=False)
    self.decoder = CaptionDecoder(like.decoder, self.encoder.channels)

  def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    image = self.encoder.feature_map(x).flatten(2).transpose(1, 2)
    return self.decoder(image, tokens).transpose(1, 2)


NETWORKS = {network.__name__: network for network in (CNN, ResNet, DeepLabV3Plus, Captioner)}


def build(module: Any, variables: Mapping[str, Any], image: tuple[int, int, int]) -> Any:
  """The network of a Flax module, with its weights; None: there is none here.

  Every parameter of the one must be there in the other, and in its shape.
  """
  name = type(module).__name__
  if name == 'PVTv2' and importlib.util.find_spec('timm') is not None:
    from timm.models.pvt_v2 import PyramidVisionTransformerV2

    options = ('depths', 'embed_dims', 'num_heads', 'sr_ratios', 'mlp_ratios', 'linear')
    network = PyramidVisionTransformerV2(
      num_classes=module.num_classes, **{option: getattr(module, option) for option in options}
    )
    state = to_state_dict(module, variables)
  elif name in NETWORKS:
    network, state = NETWORKS[name](module, image), torch_names(variables)
  else:
    return None
  network.load_state_dict({key: torch.tensor(value) for key, value in state.items()})
  return network


def torch_names(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Flax variables by PyTorch's names of leaves, in PyTorch's layout."""
  names = {'kernel': 'weight', 'scale': 'weight', 'mean': 'running_mean', 'var': 'running_var'}
  state = {}
  for (_, *layers, leaf), value in traverse_util.flatten_dict(variables).items():
    value = np.asarray(value)
    if leaf.endswith('_embedding'):
      layers, leaf = [*layers, leaf], 'kernel'
    elif leaf == 'kernel' and value.ndim == 4:
      value = value.transpose(3, 2, 0, 1)
    elif leaf == 'kernel':  # Of attention [in, heads, size], or [heads, size, out].
      outputs = (-1, value.shape[-1]) if layers[-1] == 'out' else (len(value), -1)
      value = value.reshape(outputs).T
    elif layers[-1] in ('query', 'key', 'value'):
      value = value.reshape(-1)
    state['.'.join([*layers, names.get(leaf, leaf)])] = value.copy()
  return state


def count(network: nn.Module) -> int:
  """The number of parameters."""
  return sum(parameter.numel() for parameter in network.parameters())


def inputs_of(batch: Mapping[str, Any], last: bool = False) -> list[torch.Tensor]:
  """What a network takes of a prepared batch: images, and tokens if there are."""
  images = torch.tensor(np.asarray(batch['image'])).permute(0, 3, 1, 2)
  order = torch.channels_last if last else torch.contiguous_format
  inputs = [images.contiguous(memory_format=order)]
  return inputs + [torch.tensor(np.asarray(batch[n])).long() for n in ('tokens',) if n in batch]


def logits(network: nn.Module, batch: Mapping[str, Any]) -> np.ndarray:
  """In evaluation, in Flax's layout: the classes last."""
  with torch.no_grad():
    return network.eval()(*inputs_of(batch)).movedim(1, -1).numpy()


def epochs(
  network: nn.Module,
  batch: Mapping[str, Any],
  *,
  batch_size: int,
  lr: float,
  epsilon: float = 1e-7,
  shuffle: bool = True,
) -> dict[str, Callable[[], float]]:
  """Functions that train a copy of the network for an epoch, and give the last step's loss.

  Args:
    network: see `build`.
    batch: all examples, prepared. Labels of 255 do not count, in captions those of 0.
    batch_size: of a step of Adam.
    lr: its learning rate.
    epsilon: its epsilon.
    shuffle: whether examples come in another order each time.
  """
  labels = torch.tensor(np.asarray(batch['label'])).long()
  ignored = 0 if 'tokens' in batch else 255

  def trained(last: bool) -> Callable[[], float]:
    own, inputs = copy.deepcopy(network).train(), inputs_of(batch, last)
    own = own.to(memory_format=torch.channels_last) if last else own
    optimizer = torch.optim.Adam(own.parameters(), lr, eps=epsilon)

    def epoch() -> float:
      order = torch.randperm(len(labels)) if shuffle else torch.arange(len(labels))
      for part in order.split(batch_size):
        optimizer.zero_grad()
        found = own(*(x[part] for x in inputs))
        loss = functional.cross_entropy(found, labels[part], ignore_index=ignored)
        loss.backward()
        optimizer.step()
      return float(loss.detach())

    return epoch

  return {DEFAULT: trained(False), CHANNELS_LAST: trained(True)}
