"""What the names and shapes of leaves tell of their kind.

The names are those of Flax linen and NNX, Haiku, Equinox, Keras and PyTorch, joined by `/` or `.`.
What a name leaves open, shapes and siblings decide: a `weight` of rank 1 is the scale of a
normalisation layer, and the `bias` beside it its shift; a `kernel` of rank 3 beside a bias of
rank 2 is a stack of kernels, or a DenseGeneral.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence

KEEP = 'keep'
"""Marks the leaves that are not predicted."""

WEIGHT = re.compile(
  r'(depthwise_|pointwise_|recurrent_)?kernel|weights?(_v|_orig)?|w|original1?', re.IGNORECASE
)
_RECURRENT = re.compile(r'(weight|w|kernel)_(ih|hh|hr)(_l\d+)?(_reverse)?')
_STATISTICS = {
  'running_mean', 'running_var', 'running_std', 'num_batches_tracked', 'moving_mean',
  'moving_variance', 'moving_var', 'weight_u', 'mean_ema', 'var_ema',
}  # fmt: skip
_OF_STATISTICS = {'batch_stats', 'mean_ema', 'var_ema', 'state_index', 'ema_state_index'}
_MOMENTS = {'mean', 'var', 'variance', 'count'}
_OPTIMIZER = {
  'opt_state', 'opt_states', 'optimizer', 'optimizer_state', 'optimizer_state_dict', 'optim',
  'trace', 'momentum_buffer', 'exp_avg', 'exp_avg_sq', 'max_exp_avg_sq', 'square_avg', 'acc_delta',
  'ema', 'ema_params', 'params_ema', 'ema_state', 'state_dict_ema', 'model_ema',
}  # fmt: skip
_COLLECTIONS = {'params', 'batch_stats', '~', ''}
_NORM = {'ln', 'bn', 'gn', 'rms', 'normalization', 'layernormalization', 'batchnormalization'}
_NO_NORM = {'proj', 'projection', 'fc', 'linear', 'dense', 'conv', 'mlp'}
_EMBEDDING = {'embed', 'embeds', 'embedding', 'embeddings', 'emb', 'embs', 'embedder', 'wte', 'wpe'}
_TOKEN = _EMBEDDING | {
  'token', 'tokens', 'pos', 'position', 'positional', 'latents', 'cls', 'prompt',
}  # fmt: skip
_RELATIVE = {'rel', 'relative', 'biases'}
_LAYER_SCALE = re.compile(
  r'(gamma|beta|lambda|ls|layer_?scale|res_?scale|skip_?scale)(_?(\d+|parameter|attn|mlp|msa))*'
)
_TEMPERATURE = re.compile(r'(log_?)?(temperature|temp|tau|logit_scale|logit_bias)(_?\d+)?')
_MAGNITUDE = re.compile(r'lora_magnitude_vector|magnitude(_vector)?|weight_g|original0|ia3_l')
_STATE_SPACE = re.compile(r'A(_?logs?)?|Ds?|log_A(_real)?|A_(real|imag)|log_dt')
_BUFFER = re.compile(
  r'(\w*_)?mask(ed_bias)?|inv_freq|freqs?(_cis)?|(cos|sin)(_cached)?|pe|\w*_table|\w*_ids'
)
_DENSE = {
  'q', 'k', 'v', 'o', 'qkv', 'kv', 'qk', 'query', 'key', 'value', 'out', 'output', 'gate', 'up',
  'down', 'proj', 'projection', 'projector', 'fc', 'dense', 'linear', 'lin', 'mlp', 'head', 'heads',
  'classifier', 'attn', 'attention', 'lora', 'w', 'wi', 'wo', 'wq', 'wk', 'wv', 'wqkv', 'ff', 'ffn',
  'reduction', 'router', 'decoder', 'logits', 'pooler', 'score', 'predictions',
}  # fmt: skip
# Of flax.linen.MultiHeadDotProductAttention and its like; of Keras.
_TO_HEADS = ('query', 'key', 'value', 'query_dense', 'key_dense', 'value_dense')
_FROM_HEADS = ('out', 'attention_output', 'output_dense')
OPTIMIZER_STATE = 'optimizer state'
STACK = 'a stack of'
_LARGEST_WINDOW = 64  # Of a convolution; a larger axis is no spatial one.


@functools.lru_cache(maxsize=1 << 16)
def _words(name: str) -> frozenset[str]:
  """The lower-case words of a name, without numbers: `DenseGeneral_0` -> dense, general."""
  apart = re.sub(r'(?<=[a-z])(?=[A-Z])', '_', name)
  return frozenset(word.rstrip('0123456789').lower() for word in apart.split('_'))


@functools.lru_cache(maxsize=1 << 16)
def _is_norm_name(name: str) -> bool:
  words = _words(name)
  return _NO_NORM.isdisjoint(words) and any(w.endswith('norm') or w in _NORM for w in words)


def parts_of(path: str) -> list[str]:
  """The names along a path, without what frameworks add: `a.kernel/value`, `a/~/w`, `kernel:0`."""
  parts = re.split(r'[/.]', path)
  while len(parts) > 1 and parts[-1] in ('value', 'raw_value'):
    parts.pop()
  parts[-1] = parts[-1].removesuffix(':0')
  return parts


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What names and shapes say of a leaf."""

  kind: str | None  # None where they say nothing, or two things.
  # Of a kept leaf what it is, where a user might expect it to be predicted; of a leaf without kind
  # what it may be.
  why: str = ''
  is_small: bool = False  # Whether only a rule that names the leaf touches it.


_NORMALISES = Verdict(KEEP, is_small=True)
_IS_BIAS = Verdict('bias', is_small=True)

_Shape = tuple[int, ...]
_Module = Mapping[str, _Shape]


class Names:
  """All leaves by module, for what siblings tell."""

  def __init__(self, shapes: Mapping[str, _Shape]):
    self.parts = {path: parts_of(path) for path in shapes}
    self._modules: dict[tuple[str, ...], dict[str, _Shape]] = collections.defaultdict(dict)
    halves: dict[str, set[tuple[str, ...]]] = {'mu': set(), 'nu': set()}
    for path, parts in self.parts.items():
      self._modules[_module(parts)][parts[-1]] = shapes[path]
      for half, result in halves.items():
        if half in parts:
          result.add(tuple(parts[: parts.index(half)]))
    self._adam = halves['mu'] & halves['nu']
    self._shapes = shapes
    # What jax_utils.replicate gives: one axis before those of all leaves, vectors included.
    lengths = {shape[0] if len(shape) > 1 else 0 for shape in shapes.values()}
    vectors = [path for path in shapes if self.parts[path][-1] in ('bias', 'scale')]
    self._all_stacked = len(lengths) == 1 and min(lengths, default=0) > 0 and bool(vectors)

  def verdict(self, path: str) -> Verdict:
    """The kind of a floating-point leaf."""
    parts, shape = self.parts[path], self._shapes[path]
    name, owners, rank = parts[-1], parts[:-1], len(shape)
    owner = _owner(owners)
    module = self._modules[_module(parts)]
    if name in _OPTIMIZER or not _OPTIMIZER.isdisjoint(owners) or self._is_adam(parts):
      return Verdict(KEEP, OPTIMIZER_STATE)
    if name in _STATISTICS or not _OF_STATISTICS.isdisjoint(owners):
      return _NORMALISES
    normalises = _normalises(module, owner)
    if name in ('scale', 'offset') or (normalises and name in {*_MOMENTS, 'gamma', 'beta', 'bias'}):
      return _NORMALISES
    if _MAGNITUDE.fullmatch(name) or any(map(_MAGNITUDE.fullmatch, owners)):
      return Verdict(KEEP, 'magnitude vector', is_small=True)
    words, owner_words = _words(name), _words(owner)
    if WEIGHT.fullmatch(name):
      if name.startswith('weight') and (rank < 2 or normalises):
        return _NORMALISES
      if not _RELATIVE.isdisjoint(owner_words) and 'bias' in owner_words:
        return Verdict(KEEP, 'relative position table')
      return self._matrix(parts, name, owner, shape, module)
    if _RECURRENT.fullmatch(name) and rank == 2:
      return Verdict('fc')
    if 'lora' in words:
      return self._matrix(parts, 'kernel', name, shape, {})
    if not _RELATIVE.isdisjoint(words):
      return Verdict(KEEP, 'relative position table')
    if not _TOKEN.isdisjoint(words):
      return Verdict(KEEP, 'embedding')
    if _TEMPERATURE.fullmatch(name):
      return Verdict(KEEP, 'temperature')
    if _LAYER_SCALE.fullmatch(name):
      return Verdict(KEEP, 'layer scale')
    if _STATE_SPACE.fullmatch(name):
      return Verdict(KEEP, 'state-space parameter')
    if _BUFFER.fullmatch(name) or ('bias' in words and _is_mask(shape)):
      return Verdict(KEEP, 'buffer')
    if 'bias' in words or name == 'b':
      return _IS_BIAS
    if rank > 1 and not {'proj', 'projection', 'weight', 'kernel'}.isdisjoint(words):
      # A matrix that is a leaf of its own: `in_proj_weight`, `text_projection`.
      beside = module.get(re.sub(r'weight$', 'bias', name))
      layout = 'weight' if name.endswith('weight') else 'kernel'
      return self._matrix(parts, layout, name, shape, {} if beside is None else {'bias': beside})
    return Verdict(None, is_small=rank < 2)

  def _is_adam(self, parts: Sequence[str]) -> bool:
    """Whether a leaf is in `mu` or `nu`, which stand beside each other."""
    halves = [n for n, part in enumerate(parts) if part in ('mu', 'nu')]
    return any(tuple(parts[:n]) in self._adam for n in halves)

  def _matrix(
    self, parts: Sequence[str], name: str, owner: str, shape: _Shape, module: _Module
  ) -> Verdict:
    """The kind of what is called kernel or weight."""
    rank, words = len(shape), _words(owner)
    is_kernel = not name.lower().startswith(('weight', 'original'))  # Outputs last, not first.
    bias = module.get('bias', module.get('b'))
    is_dense, is_conv = not _DENSE.isdisjoint(words), 'conv' in owner.lower() or 'wise' in name
    if rank < 2:
      return Verdict(None, is_small=True)
    if rank == 2:
      if is_kernel or (bias is not None and len(bias) == 1) or is_conv:
        return Verdict('fc')
      if is_dense and (_EMBEDDING.isdisjoint(words) or owner == 'embed_out' or 'lora' in words):
        return Verdict('fc')
      if not _EMBEDDING.isdisjoint(words) or owner in ('shared', 'codebook'):
        return Verdict(KEEP, 'embedding')
      return Verdict(None, 'a dense kernel without bias, or an embedding')
    is_general = 'general' in words or 'einsum' in words
    outputs = shape[-1] if is_kernel else shape[0]
    vector = bias is not None and sum(n != 1 for n in bias) <= 1 and math.prod(bias) == outputs
    # A bias for each of the leading axis: so many layers, or devices, in one leaf.
    layered = (
      bias is not None
      and not vector
      and bias[0] == shape[0]
      and bias[-1] == shape[-1 if is_kernel else 1]
    )
    to_heads = bias is not None and len(bias) > 1 and tuple(bias) == shape[rank - len(bias) :]
    if (self._all_stacked or layered) and not (to_heads and (is_general or owner in _TO_HEADS)):
      return Verdict(None, f'{STACK} {shape[0]} layers, or copies for {shape[0]} devices')
    if is_general:
      return Verdict('fc')
    if rank == 3:
      if is_conv and not to_heads:
        return Verdict('conv')
      if is_kernel and owner in _TO_HEADS and not vector:
        return Verdict('fc')
      if is_kernel and owner in _FROM_HEADS and (bias is None or self._has_heads(parts)):
        return Verdict('fc')
      if vector and (not is_kernel or name in ('w', 'W')):
        return Verdict('conv')
      if to_heads and not layered:
        return Verdict('fc')
      return Verdict(None, f'a 1-d convolution, a DenseGeneral or {STACK} {shape[0]} layers')
    window = shape[:-2] if is_kernel else shape[2:]
    if rank > 5 or max(window) > _LARGEST_WINDOW or (to_heads and not vector):
      return Verdict(None, f'a convolution, a DenseGeneral or {STACK} {shape[0]} layers')
    if is_kernel and is_dense and not is_conv and len(set(window)) > 1:
      return Verdict(None, f'a convolution, a DenseGeneral or {STACK} {shape[0]} layers')
    return Verdict('conv')

  def _has_heads(self, parts: Sequence[str]) -> bool:
    """Whether `query` stands beside the module of a leaf."""
    around = _module(parts)[:-1]
    return any((*around, name) in self._modules for name in ('query', 'query_dense'))


def _module(parts: Sequence[str]) -> tuple[str, ...]:
  """The module of a leaf, the same for all collections."""
  return tuple(part for part in parts[:-1] if part not in _COLLECTIONS)


def _owner(owners: Sequence[str]) -> str:
  """The nearest name above a leaf that says something: no number, no name of a wrapper."""
  for name in reversed(owners):
    if not name.isdecimal() and name not in ('default', 'base_layer', 'weight', 'parametrizations'):
      return name
  return ''


def _normalises(module: _Module, owner: str) -> bool:
  """Whether a module is a normalisation layer: it has a scale or statistics, and no matrix."""
  weight, bias = module.get('weight'), module.get('bias')
  if weight is not None:
    return len(weight) < 2 or weight == bias or (bias is None and _is_norm_name(owner))
  if any(len(module.get(name, ())) > 1 for name in ('kernel', 'w')):
    return False
  if {'scale', 'offset'} & module.keys() or {'gamma', 'beta'} <= module.keys():
    return True
  has_statistics = not _STATISTICS.isdisjoint(module) or len(_MOMENTS & module.keys()) > 1
  return has_statistics or _is_norm_name(owner)


def _is_mask(shape: _Shape) -> bool:
  """Whether what is called bias is a mask over pairs of places, as GPT-2 has it: [1, 1, N, N]."""
  return len(shape) > 2 and shape[-1] == shape[-2] > 1
