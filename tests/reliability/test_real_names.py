"""Real names and dtypes: the leaves of public model families, each with the kind that is right.

The layouts are written from the families' public code (transformers, timm, PEFT, mamba_ssm, Flax,
Haiku), shrunk. Every family goes through `predict`, from memory, and through a history in files,
and no leaf may get a wrong kind or be kept without a word. What moves must move, by the formula of
the predictor in NumPy float64; what is kept must come back with the same bytes.
"""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from safetensors.numpy import load_file, save_file

import know_jax
from know_jax import kinds
from know_jax.errors import KindsWarning
from know_jax.nowcast import file_job, from_files

CONV, FC, BIAS = 'conv', 'fc', 'bias'
NORM = 'norm'  # Kept, and nothing need be said: normalisation, statistics.
KEEP = 'keep'  # Kept, and said.
INT = 'int'
D, H = 8, 12  # The width of a model, and of its hidden layers.


def dense(name, outputs, inputs, bias=True, layout='weight'):
  shape = (outputs, inputs) if layout == 'weight' else (inputs, outputs)
  found = {f'{name}.{layout}': (shape, FC)}
  return {**found, f'{name}.bias': ((outputs,), BIAS)} if bias else found


def denses(prefix, names, outputs=D, inputs=D, bias=True, layout='weight'):
  found = {}
  for name in names.split():
    found |= dense(f'{prefix}{name}', outputs, inputs, bias, layout)
  return found


def conv(name, *shape, bias=True, layout='weight'):
  found = {f'{name}.{layout}': (shape, CONV)}
  outputs = shape[0] if layout == 'weight' else shape[-1]
  return {**found, f'{name}.bias': ((outputs,), BIAS)} if bias else found


def norm(name, size=D, scale='weight', shift='bias'):
  return {f'{name}.{leaf}': ((size,), NORM) for leaf in (scale, shift) if leaf}


def batch_norm(name, size=D):
  return {
    **norm(name, size),
    f'{name}.running_mean': ((size,), NORM),
    f'{name}.running_var': ((size,), NORM),
    f'{name}.num_batches_tracked': ((), INT),
  }


def each(count, make):
  found = {}
  for i in range(count):
    found |= make(i)
  return found


def llama():
  def layer(i):
    at = f'model.layers.{i}.'
    return {
      **denses(f'{at}self_attn.', 'q_proj k_proj v_proj o_proj', bias=False),
      **denses(f'{at}mlp.', 'gate_proj up_proj', H, D, bias=False),
      **denses(f'{at}mlp.', 'down_proj', D, H, bias=False),
      **norm(f'{at}input_layernorm', shift=None),
      **norm(f'{at}post_attention_layernorm', shift=None),
    }

  return {
    'model.embed_tokens.weight': ((20, D), KEEP),
    **each(2, layer),
    **norm('model.norm', shift=None),
    'model.rotary_emb.inv_freq': ((4,), KEEP),
    **dense('lm_head', 20, D, bias=False),
  }


def gpt2():
  def block(i):
    at = f'transformer.h.{i}.'
    return {
      **norm(f'{at}ln_1'),
      **norm(f'{at}ln_2'),
      f'{at}attn.bias': ((1, 1, 6, 6), KEEP),
      f'{at}attn.masked_bias': ((), KEEP),
      **{f'{at}{n}.weight': ((D, s), FC) for n, s in (('attn.c_attn', 24), ('mlp.c_fc', H))},
      **{f'{at}{n}.bias': ((s,), BIAS) for n, s in (('attn.c_attn', 24), ('mlp.c_fc', H))},
      **denses(at, 'attn.c_proj mlp.c_proj'),
    }

  return {
    'transformer.wte.weight': ((20, D), KEEP),
    'transformer.wpe.weight': ((6, D), KEEP),
    **each(2, block),
    **norm('transformer.ln_f'),
    'lm_head.weight': ((20, D), FC),
  }


def bert():
  def layer(i):
    at = f'bert.encoder.layer.{i}.'
    return {
      **denses(f'{at}attention.self.', 'query key value'),
      **dense(f'{at}attention.output.dense', D, D),
      **norm(f'{at}attention.output.LayerNorm'),
      **dense(f'{at}intermediate.dense', H, D),
      **dense(f'{at}output.dense', D, H),
      **norm(f'{at}output.LayerNorm', scale='gamma', shift='beta'),
    }

  at = 'bert.embeddings.'
  return {
    f'{at}word_embeddings.weight': ((20, D), KEEP),
    f'{at}position_embeddings.weight': ((6, D), KEEP),
    f'{at}token_type_embeddings.weight': ((2, D), KEEP),
    f'{at}position_ids': ((1, 6), INT),
    **norm(f'{at}LayerNorm'),
    **each(2, layer),
    **dense('bert.pooler.dense', D, D),
    'cls.predictions.bias': ((20,), BIAS),
    **dense('cls.predictions.transform.dense', D, D),
    **norm('cls.predictions.transform.LayerNorm'),
    **dense('cls.predictions.decoder', 20, D, bias=False),
    **dense('cls.seq_relationship', 2, D),
  }


def vit():
  """timm's names, and those of transformers for the tokens."""

  def block(i):
    at = f'blocks.{i}.'
    return {
      **norm(f'{at}norm1'),
      **dense(f'{at}attn.qkv', 24, D),
      **dense(f'{at}attn.proj', D, D),
      f'{at}ls1.gamma': ((D,), KEEP),
      **norm(f'{at}norm2'),
      **dense(f'{at}mlp.fc1', H, D),
      **dense(f'{at}mlp.fc2', D, H),
      f'{at}ls2.gamma': ((D,), KEEP),
    }

  return {
    'cls_token': ((1, 1, D), KEEP),
    'reg_token': ((1, 4, D), KEEP),
    'pos_embed': ((1, 5, D), KEEP),
    **conv('patch_embed.proj', D, 3, 4, 4),
    **each(2, block),
    **norm('norm'),
    **dense('head', 5, D),
    'vit.embeddings.cls_token': ((1, 1, D), KEEP),
    'vit.embeddings.mask_token': ((1, 1, D), KEEP),
    'vit.embeddings.position_embeddings': ((1, 5, D), KEEP),
    **conv('vit.embeddings.patch_embeddings.projection', D, 3, 4, 4),
    'vit.encoder.layer.0.layer_scale1.lambda1': ((D,), KEEP),
    **norm('vit.encoder.layer.0.layernorm_before'),
  }


def pvt():
  def block(i):
    at = f'stages.0.blocks.{i}.'
    return {
      **norm(f'{at}norm1'),
      **denses(f'{at}attn.', 'q kv proj'),
      **conv(f'{at}attn.sr', D, D, 2, 2),
      **norm(f'{at}attn.norm'),
      **norm(f'{at}norm2'),
      **dense(f'{at}mlp.fc1', H, D),
      **conv(f'{at}mlp.dwconv.dwconv', H, 1, 3, 3),
      **dense(f'{at}mlp.fc2', D, H),
    }

  return {
    **conv('patch_embed1.proj', D, 3, 7, 7),
    **norm('patch_embed1.norm'),
    **each(2, block),
    **norm('norm1'),
    **dense('head', 5, D),
  }


def whisper():
  def layer(at, attentions):
    found = {}
    for attention in attentions:
      found |= denses(f'{at}{attention}.', 'q_proj v_proj out_proj')
      found |= dense(f'{at}{attention}.k_proj', D, D, bias=False)
      found |= norm(f'{at}{attention}_layer_norm')
    return {**found, **denses(at, 'fc1 fc2'), **norm(f'{at}final_layer_norm')}

  return {
    **conv('model.encoder.conv1', D, 4, 3),
    **conv('model.encoder.conv2', D, D, 3),
    'model.encoder.embed_positions.weight': ((6, D), KEEP),
    **layer('model.encoder.layers.0.', ['self_attn']),
    **norm('model.encoder.layer_norm'),
    'model.decoder.embed_tokens.weight': ((20, D), KEEP),
    'model.decoder.embed_positions.weight': ((6, D), KEEP),
    **layer('model.decoder.layers.0.', ['self_attn', 'encoder_attn']),
    'proj_out.weight': ((20, D), FC),
  }


def t5():
  at = 'encoder.block.0.layer.'
  return {
    'shared.weight': ((20, D), KEEP),
    **denses(f'{at}0.SelfAttention.', 'q k v o', bias=False),
    f'{at}0.SelfAttention.relative_attention_bias.weight': ((32, 2), KEEP),
    **norm(f'{at}0.layer_norm', shift=None),
    **denses(f'{at}1.DenseReluDense.', 'wi_0 wi_1 wo', bias=False),
    **norm(f'{at}1.layer_norm', shift=None),
    **norm('encoder.final_layer_norm', shift=None),
    **dense('lm_head', 20, D, bias=False),
  }


def resnet():
  def block(i):
    at = f'layer1.{i}.'
    return {
      **conv(f'{at}conv1', D, D, 3, 3, bias=False),
      **batch_norm(f'{at}bn1'),
      **conv(f'{at}downsample.0', D, D, 1, 1, bias=False),
      **batch_norm(f'{at}downsample.1'),
    }

  return {
    **conv('conv1', D, 3, 7, 7, bias=False),
    **batch_norm('bn1'),
    **each(2, block),
    **dense('fc', 5, D),
  }


def efficientnet():
  at = 'blocks.1.0.'
  return {
    **conv('conv_stem', D, 3, 3, 3, bias=False),
    **batch_norm('bn1'),
    **conv(f'{at}conv_pw', H, D, 1, 1, bias=False),
    **batch_norm(f'{at}bn1', H),
    **conv(f'{at}conv_dw', H, 1, 3, 3, bias=False),
    **conv(f'{at}se.conv_reduce', 2, H, 1, 1),
    **conv(f'{at}se.conv_expand', H, 2, 1, 1),
    **conv(f'{at}conv_pwl', D, H, 1, 1, bias=False),
    **dense('classifier', 5, D),
  }


def mamba():
  at = 'backbone.layers.0.'
  return {
    'backbone.embeddings.weight': ((20, D), KEEP),
    **norm(f'{at}norm', shift=None),
    f'{at}mixer.A_log': ((H, 4), KEEP),
    f'{at}mixer.D': ((H,), KEEP),
    **conv(f'{at}mixer.conv1d', H, 1, 4),
    **denses(f'{at}mixer.', 'in_proj x_proj out_proj', H, D, bias=False),
    **dense(f'{at}mixer.dt_proj', H, 2),
    'backbone.layers.1.mixer.dt_bias': ((4,), BIAS),
    **norm('backbone.norm_f', shift=None),
    **dense('lm_head', 20, D, bias=False),
  }


def lstm():
  found = {'encoder.weight': ((20, D), FC), 'encoder.bias': ((20,), BIAS)}
  for kind, gates in (('lstm', 4), ('gru', 3)):
    for end in ('l0', 'l0_reverse', 'l1'):
      for stream in ('ih', 'hh'):
        found[f'{kind}.weight_{stream}_{end}'] = ((gates * D, D), FC)
        found[f'{kind}.bias_{stream}_{end}'] = ((gates * D,), BIAS)
  attention = {
    'attn.in_proj_weight': ((24, D), FC),
    'attn.in_proj_bias': ((24,), BIAS),
    **dense('attn.out_proj', D, D),
  }
  return {**found, **attention, 'embedding.weight': ((20, D), KEEP)}


def lora():
  """PEFT's adapters: LoRA, DoRA, and what they stand beside."""
  found = {}
  for name in ('q_proj', 'v_proj'):
    at = f'base_model.model.model.layers.0.self_attn.{name}.'
    found |= {
      f'{at}lora_A.weight': ((2, D), FC),
      f'{at}lora_B.weight': ((D, 2), FC),
      f'{at}lora_magnitude_vector': ((D,), KEEP),
      f'{at}base_layer.weight': ((D, D), FC),
    }
  at = 'base_model.model.model.layers.1.self_attn.q_proj.'
  return {
    **found,
    f'{at}lora_A.default.weight': ((2, D), FC),
    f'{at}lora_B.default.weight': ((D, 2), FC),
    f'{at}lora_magnitude_vector.default.weight': ((D,), KEEP),
  }


def swin():
  at = 'layers.0.blocks.0.'
  return {
    **conv('patch_embed.proj', D, 3, 4, 4),
    **norm('patch_embed.norm'),
    **norm(f'{at}norm1'),
    f'{at}attn.relative_position_bias_table': ((9, 2), KEEP),
    f'{at}attn.relative_position_index': ((4, 4), INT),
    f'{at}attn_mask': ((4, 4, 4), KEEP),
    **denses(at, 'attn.qkv attn.proj mlp.fc1 mlp.fc2'),
    f'{at}attn.logit_scale': ((2, 1, 1), KEEP),
    **dense(f'{at}attn.cpb_mlp.0', H, 2),
    **dense(f'{at}attn.cpb_mlp.2', 2, H, bias=False),
    f'{at}attn.q_bias': ((D,), BIAS),
    f'{at}attn.v_bias': ((D,), BIAS),
    **norm('layers.1.downsample.norm', 2 * D),
    **dense('layers.1.downsample.reduction', D, 2 * D, bias=False),
    **dense('head.fc', 5, D),
  }


def convnext():
  at = 'stages.0.blocks.0.'
  return {
    **conv('stem.0', D, 3, 4, 4),
    **norm('stem.1'),
    f'{at}gamma': ((D,), KEEP),
    **conv(f'{at}conv_dw', D, 1, 7, 7),
    **norm(f'{at}norm'),
    **denses(at, 'mlp.fc1 mlp.fc2'),
    **norm(f'{at}mlp.grn'),
    'convnext.encoder.stages.0.layers.0.layer_scale_parameter': ((D,), KEEP),
    'convnextv2.encoder.stages.0.layers.0.grn.weight': ((1, 1, 1, D), NORM),
    'convnextv2.encoder.stages.0.layers.0.grn.bias': ((1, 1, 1, D), NORM),
    **dense('head.fc', 5, D),
  }


def clip():
  return {
    'logit_scale': ((), KEEP),
    'text_projection': ((D, D), FC),
    'positional_embedding': ((6, D), KEEP),
    'token_embedding.weight': ((20, D), KEEP),
    'visual.class_embedding': ((D,), KEEP),
    'visual.proj': ((D, D), FC),
    **conv('visual.conv1', D, 3, 4, 4, bias=False),
    **norm('visual.ln_pre'),
    'visual.transformer.resblocks.0.attn.in_proj_weight': ((24, D), FC),
    'visual.transformer.resblocks.0.attn.in_proj_bias': ((24,), BIAS),
    **denses('visual.transformer.resblocks.0.mlp.', 'c_fc c_proj'),
  }


def linen():
  at = 'params.MultiHeadDotProductAttention_0.'
  heads = {f'{at}{name}.kernel': ((D, 2, 4), FC) for name in ('query', 'key', 'value')}
  biases = {f'{at}{name}.bias': ((2, 4), BIAS) for name in ('query', 'key', 'value')}
  return {
    **conv('params.Conv_0', 3, 3, 3, D, layout='kernel'),
    **conv('params.Conv_1', 3, D, D, layout='kernel'),
    **norm('params.BatchNorm_0', scale='scale'),
    'params.BatchNorm_1.bias': ((D,), NORM),
    **{f'batch_stats.BatchNorm_{i}.{n}': ((D,), NORM) for i in range(2) for n in ('mean', 'var')},
    **norm('params.LayerNorm_0', scale='scale'),
    **heads,
    **biases,
    f'{at}out.kernel': ((2, 4, D), FC),
    f'{at}out.bias': ((D,), BIAS),
    'params.Embed_0.embedding': ((20, D), KEEP),
    **denses('params.OptimizedLSTMCell_0.', 'hi hf hg ho', layout='kernel'),
    **denses('params.OptimizedLSTMCell_0.', 'ii if ig io', bias=False, layout='kernel'),
    **dense('params.Dense_0', 5, D, layout='kernel'),
  }


def nnx():
  found = {
    **conv('conv', 3, 3, 3, D, layout='kernel'),
    **norm('norm', scale='scale'),
    'norm.mean': ((D,), NORM),
    'norm.var': ((D,), NORM),
    'centred.bias': ((D,), NORM),
    'centred.mean': ((D,), NORM),
    'centred.var': ((D,), NORM),
    'embed.embedding': ((20, D), KEEP),
    **dense('blocks.0.mlp', H, D, layout='kernel'),
    **dense('blocks.1.mlp', H, D, layout='kernel'),
    'blocks.0.lora.lora_a': ((D, 2), FC),
    'blocks.0.lora.lora_b': ((2, D), FC),
    'drop.rngs.count': ((), INT),
  }
  return {f'{name}.value': about for name, about in found.items()}


def haiku():
  return {
    'res_net/~/initial_conv.w': ((3, 3, 3, D), CONV),
    'res_net/~/initial_conv1d.w': ((3, D, D), CONV),
    'res_net/~/initial_conv1d.b': ((D,), BIAS),
    **norm('res_net/~/batch_norm', scale='scale', shift='offset'),
    'res_net/~/batch_norm/~/mean_ema.average': ((D,), NORM),
    'res_net/~/batch_norm/~/var_ema.hidden': ((D,), NORM),
    'mlp/~/linear_0.w': ((D, H), FC),
    'mlp/~/linear_0.b': ((H,), BIAS),
    'embed.embeddings': ((20, D), KEEP),
    'lstm/linear.w': ((D, H), FC),
  }


def keras():
  return {
    **conv('conv2d', 3, 3, 3, D, layout='kernel'),
    'depthwise_conv2d.depthwise_kernel': ((3, 3, D, 1), CONV),
    'separable.pointwise_kernel': ((1, 1, D, D), CONV),
    **norm('batch_normalization', scale='gamma', shift='beta'),
    'batch_normalization.moving_mean': ((D,), NORM),
    'batch_normalization.moving_variance': ((D,), NORM),
    **norm('layer_normalization', scale='gamma', shift='beta'),
    'embedding.embeddings': ((20, D), KEEP),
    'lstm.lstm_cell.kernel': ((D, 4 * D), FC),
    'lstm.lstm_cell.recurrent_kernel': ((D, 4 * D), FC),
    'lstm.lstm_cell.bias': ((4 * D,), BIAS),
    'multi_head_attention.query.kernel': ((D, 2, 4), FC),
    'multi_head_attention.query.bias': ((2, 4), BIAS),
    'multi_head_attention.attention_output.kernel': ((2, 4, D), FC),
    **dense('dense', 5, D, layout='kernel'),
  }


def equinox():
  return {
    **dense('mlp.layers.0', H, D),
    **dense('mlp.layers.1', D, H),
    'conv.weight': ((D, 3, 3), CONV),
    'conv.bias': ((D, 1), BIAS),
    'conv2.weight': ((D, 3, 3, 3), CONV),
    'conv2.bias': ((D, 1, 1), BIAS),
    **norm('norm'),
    'embedding.weight': ((20, D), KEEP),
    'cell.weight_ih': ((3 * D, D), FC),
    'cell.weight_hh': ((3 * D, D), FC),
    'cell.bias': ((3 * D,), BIAS),
    **denses('attention.', 'query_proj key_proj value_proj output_proj', bias=False),
  }


FAMILIES = {
  make.__name__: make
  for make in (
    llama, gpt2, bert, vit, pvt, whisper, t5, resnet, efficientnet, mamba, lstm, lora, swin,
    convnext, clip, linen, nnx, haiku, keras, equinox,
  )
}  # fmt: skip
# Of the short form; together they have every sort of leaf.
SHORT = ('gpt2', 'resnet', 'linen', 'equinox')
DTYPES = (np.float32, jnp.bfloat16, np.float16)


def history_of(layout, dtype, seed):
  rng = np.random.default_rng(seed)
  start = {name: rng.normal(0, 0.1, shape) for name, (shape, _) in layout.items()}
  step = {name: rng.normal(0, 0.01, shape) for name, (shape, _) in layout.items()}
  stages = []
  for t in range(5):
    stages.append({})
    for name, (_, kind) in layout.items():
      value = start[name] + t * step[name]
      value = 100 * value if kind == INT else value
      stages[-1][name] = np.asarray(value).astype(np.int64 if kind == INT else dtype)
  return stages


def nested(stage):
  """The stage as Flax and Haiku have it, by modules."""
  tree = {}
  for name, leaf in stage.items():
    *owners, last = name.split('.')
    node = tree
    for owner in owners:
      node = node.setdefault(owner, {})
    node[last] = leaf
  return tree


def flat(tree, prefix=''):
  found = {}
  for key, value in tree.items():
    found |= (
      flat(value, f'{prefix}{key}.') if isinstance(value, dict) else {f'{prefix}{key}': value}
    )
  return found


def check(layout, stages, result, told):
  """What moves is `linear_fit` of NumPy, what is kept has the same bytes, or is told."""
  for name, (shape, kind) in layout.items():
    found, newest = np.asarray(result[name]), stages[-1][name]
    assert (found.shape, found.dtype) == (shape, newest.dtype), name
    is_told = re.search(rf"'{re.escape(name.replace('.', '/'))}'", told.replace('.', '/'))
    assert bool(is_told) == (kind == KEEP), f'{name}: {told}'
    if kind in (NORM, KEEP, INT):
      assert found.tobytes() == newest.tobytes(), name
      continue
    values = np.stack([np.asarray(stage[name], np.float64) for stage in stages])
    expected = references.linear_fit(values, 1)
    rounding = 4 * float(jnp.finfo(newest.dtype).eps)
    atol = rounding * abs(values).max()
    np.testing.assert_allclose(found.astype(np.float64), expected, rtol=rounding, atol=atol)
    assert (found != newest).any(), name


def kinds_of(layout):
  return {name: kind if kind in (CONV, FC, BIAS) else 'keep' for name, (_, kind) in layout.items()}


@pytest.mark.parametrize('family', FAMILIES)
def test_kinds_of_real_names(family, tally):
  layout = FAMILIES[family]()
  structs = {
    name: jax.ShapeDtypeStruct(shape, np.int64 if kind == INT else np.float32)
    for name, (shape, kind) in layout.items()
  }
  assert kinds.leaf_kinds(structs) == dict(sorted(kinds_of(layout).items()))
  tally('leaves of real names with the right kind', len(layout))
  tally('model families')


@pytest.mark.parametrize('family', FAMILIES)
def test_real_names_through_predict_and_files(family, tmp_path, thorough, tally):
  if not thorough and family not in SHORT:
    pytest.skip('make test-reliability predicts all families')
  layout = FAMILIES[family]()
  for number, dtype in enumerate(DTYPES if thorough else DTYPES[:1]):
    stages = history_of(layout, dtype, seed=number)
    in_modules = family in ('linen', 'nnx', 'haiku', 'keras', 'equinox')
    given = [nested(stage) for stage in stages] if in_modules else stages
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter('always')
      result = know_jax.predict(given, predictor='linear_fit')
    told = ' '.join(str(w.message) for w in caught if issubclass(w.category, KindsWarning))
    check(layout, stages, flat(result) if in_modules else result, told)
    files = []
    for t, stage in enumerate(stages):
      files.append(tmp_path / f'{number}-{t}.safetensors')
      save_file(stage, files[-1])
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter('always')
      job = file_job.prepare(files, predictors=['linear_fit'], steps=1)
      (folder,) = from_files.write(job, tmp_path / f'out{number}', show_progress=False)
    assert job.kinds == {name.replace('.', '/'): kind for name, kind in kinds_of(layout).items()}
    written = {}
    for shard in folder.glob('*.safetensors'):
      written |= load_file(shard)
    check(layout, stages, written, ' '.join(str(w.message) for w in caught))
    tally('leaves of real names predicted or kept as they must be', 2 * len(layout))
