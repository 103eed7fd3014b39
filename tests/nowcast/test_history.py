"""What a history may be made of: any sequence of stages, any leaves; what moves, what is kept."""

import collections
import functools
import types
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import references
from flax.training.train_state import TrainState

import know_jax
from know_jax import Trajectory, UserError, kinds
from know_jax.errors import KindsWarning

predict = functools.partial(know_jax.predict, predictor='linear_fit')


def walk(shape=(4, 3), dtype=np.float32, seed=0):
  """Five stages of one leaf, moving at random."""
  rng = np.random.default_rng(seed)
  start, steps = rng.normal(0, 0.1, shape), rng.normal(0, 0.02, (5, *shape))
  return [np.asarray(leaf).astype(dtype) for leaf in start + np.cumsum(steps, 0)]


def history_of(make, **leaves):
  """Stages with a kernel that moves, and leaves that `make(t)` gives."""
  return [{'dense': {'kernel': leaf}, **make(t)} for t, leaf in enumerate(walk())]


def expected(stages, n=1):
  return references.linear_fit(np.stack([np.asarray(s, np.float64) for s in stages]), n)


def assert_moved(result, stages, n=1, rtol=1e-5, atol=1e-6):
  np.testing.assert_allclose(np.asarray(result, np.float64), expected(stages, n), rtol, atol)


def quietly(*args, **options):
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', KindsWarning)
    return predict(*args, **options)


# --- what is no weight ----------------------------------------------------------------------------


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=['kernel', 'activation'], meta_fields=[]
)
class Layer:
  """As equinox.nn.MLP has it: the activation is a leaf."""

  def __init__(self, kernel, activation):
    self.kernel, self.activation = kernel, activation


def test_a_function_that_is_a_leaf_comes_back_as_it_is():
  history = [Layer(leaf, jax.nn.relu) for leaf in walk()]
  with pytest.warns(KindsWarning, match=r"handed back as they are.*'activation' \(custom_jvp\)"):
    result = predict(history)
  assert result.activation is jax.nn.relu
  assert_moved(result.kernel, walk())


OBJECTS = [len, 'a name', 3, 2.5, True, object(), slice(1), range(3), np.array(['a', 'b'])]


@pytest.mark.parametrize('value', OBJECTS, ids=lambda value: type(value).__name__)
def test_what_is_no_weight_is_the_newest_object(value):
  # Older stages have another one.
  history = history_of(lambda t: {'other': value if t == 4 else 'older'})
  result = quietly(history)
  assert result['other'] is value
  assert_moved(result['dense']['kernel'], walk())


def test_a_forecast_has_each_object_at_each_step():
  history = history_of(lambda t: {'f': len, 'rate': 0.5, 'none': None})
  with pytest.warns(KindsWarning, match="'f' .*, 'rate' .float."):
    stages = list(know_jax.forecast(history, 2, predictor='linear_fit'))
  for n, stage in enumerate(stages, 1):
    assert stage['f'] is len and stage['rate'] == 0.5 and stage['none'] is None
    assert_moved(stage['dense']['kernel'], walk(), n)
  stacked = Trajectory.from_sequence(history)
  result = quietly(stacked)
  assert result['f'] is len and result['rate'] == 0.5


OPTIMIZERS = {
  'adam': optax.adam(1e-2),
  'momentum': optax.sgd(1e-2, momentum=0.9),
  'chain': optax.chain(optax.clip(1.0), optax.adamw(1e-2)),
  'ema': optax.chain(optax.ema(0.9), optax.rmsprop(1e-2)),
}


@pytest.mark.parametrize('name', OPTIMIZERS)
@pytest.mark.parametrize('form', ['dict', 'tuple', 'TrainState'])
def test_the_state_of_an_optimizer_is_the_newest(name, form):
  tx = OPTIMIZERS[name]
  stages = []
  for leaf in walk():
    params = {'dense': {'kernel': jnp.asarray(leaf)}}
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    stages.append(
      {
        'dict': {'params': params, 'opt_state': state},
        'tuple': (params, state),
        # Of another `tx` and `apply_fn` at each stage.
        'TrainState': TrainState(
          step=jnp.int32(0), apply_fn=lambda: None, params=params, tx=tx, opt_state=state
        ),
      }[form]
    )
  with pytest.warns(KindsWarning, match='handed back as they are'):
    result = predict(stages)
  if form == 'tuple':
    params, state, newest = *result, stages[-1][1]
  elif form == 'dict':
    params, state, newest = result['params'], result['opt_state'], stages[-1]['opt_state']
  else:
    params, state, newest = result.params, result.opt_state, stages[-1].opt_state
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(newest), strict=True):
    assert a is b
  assert jax.tree.structure(result) == jax.tree.structure(stages[-1])
  assert_moved(params['dense']['kernel'], walk())


@pytest.mark.parametrize(
  'prefix',
  ['opt_state/0/mu', '1/0/nu', 'optimizer/adam', 'opt_state/trace', 'state/exp_avg_sq', 'ema'],
)
def test_optimizers_are_told_by_names_too(prefix):
  # As files have them: there are names alone.
  leaves = {'params/dense/kernel': np.ones((2, 2), np.float32)}
  for half in ('mu', 'nu'):
    leaves[f'{prefix.replace("nu", half).replace("mu", half)}/dense/kernel'] = np.ones((2, 2))
  found = kinds.leaf_kinds(leaves)
  assert found == {path: 'fc' if path.startswith('params') else 'keep' for path in found}
  # Nor is it by a rule that fits it by chance.
  assert kinds.leaf_kinds(leaves, {'kernel$': 'fc'}) == found


# --- dtypes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['linear_fit', 'task_vector', 'shrink', 'average'])
@pytest.mark.parametrize('form', ['list', 'stacked', 'jit', 'layers'])
def test_complex_leaves_are_predicted_by_parts(name, form):
  history = [
    {'layers': {'spectral': {'kernel': re + 1j * im}}}
    for re, im in zip(walk((2, 4, 3)), walk((2, 4, 3), seed=1), strict=True)
  ]
  history = jax.tree.map(lambda leaf: leaf.astype(np.complex64), history)
  options = {'stacked': 'layers/'} if form == 'layers' else {'kinds': {'kernel$': 'fc'}}
  function = functools.partial(know_jax.predict, predictor=name, **options)
  given = Trajectory.from_sequence(history) if form == 'stacked' else history
  result = (jax.jit(function) if form == 'jit' else function)(given)['layers']['spectral']['kernel']
  assert (result.shape, result.dtype) == ((2, 4, 3), np.complex64)
  formula = getattr(references, name)
  formula = functools.partial(formula, c=0.06) if name == 'shrink' else formula
  for part in ('real', 'imag'):
    stages = np.stack([getattr(s['layers']['spectral']['kernel'], part) for s in history])
    wide = np.asarray(stages, np.float64)
    np.testing.assert_allclose(getattr(result, part), formula(wide, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  'dtype', [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.bfloat16, np.float16, '>f4', '>f2']
)
@pytest.mark.parametrize('name', ['known', 'known_leaf', 'linear_fit'])
def test_narrow_and_foreign_floats_are_predicted_in_float32(dtype, name):
  dtype = np.dtype(dtype)
  native = dtype.newbyteorder('=')
  stages = [np.asarray(leaf, native) for leaf in walk((16, 8))]
  given = [{'dense': {'kernel': stage.astype(dtype)}} for stage in stages]
  result = know_jax.predict(given, predictor=name, on_bad='ignore')['dense']['kernel']
  wide = [{'dense': {'kernel': stage.astype(np.float32)}} for stage in stages]
  reference = know_jax.predict(wide, predictor=name, on_bad='ignore')['dense']['kernel']
  assert result.dtype == native
  np.testing.assert_array_equal(
    np.asarray(result, np.float32), np.asarray(reference).astype(native).astype(np.float32)
  )


@pytest.mark.parametrize('dtype', [ml_dtypes.int4, ml_dtypes.uint4, np.int8, np.bool_, '>i4'])
def test_kept_dtypes_have_the_same_bytes(dtype):
  table = np.arange(6).reshape(2, 3).astype(dtype)
  history = history_of(lambda t: {'quantised': {'kernel': table}})
  assert predict(history)['quantised']['kernel'] is table


def test_raw_bytes_that_were_bfloat16_are_an_error_that_says_so():
  stages = [leaf.astype(ml_dtypes.bfloat16).view('V2') for leaf in walk()]
  history = [{'dense': {'kernel': stage}} for stage in stages]
  with pytest.raises(UserError, match=r"'dense/kernel' has dtype \|V2.*ml_dtypes\.bfloat16"):
    predict(history)
  # Nobody looks at what is kept.
  both = history_of(lambda t: {'raw': history[t]})
  result = predict(both, kinds={'raw/dense/kernel$': 'keep'})
  assert result['raw']['dense']['kernel'] is stages[-1]


def test_longer_floats_than_jax_has_are_an_error():
  history = [{'dense': {'kernel': leaf.astype(np.longdouble)}} for leaf in walk()]
  with pytest.raises(UserError, match=r"leaf 'dense/kernel' is .*, which JAX does not have"):
    predict(history)
  history = [{'dense': {'kernel': leaf.astype(np.complex128)}} for leaf in walk()]
  with pytest.raises(
    UserError, match="'dense/kernel' is complex128, which JAX would narrow to com"
  ):
    predict(history)


# --- keep is left alone ---------------------------------------------------------------------------

KEPT = {
  'a mask with -inf': lambda t: {'attn': {'mask': np.full((2, 2), -np.inf, np.float32)}},
  'a statistic with NaN': lambda t: {
    'bn': {'scale': np.ones(2), 'mean': np.full(2, np.nan if t == 1 else 1.0)}
  },
  'an embedding of another size': lambda t: {'wte': {'embedding': np.ones((5 + (t < 2), 2))}},
  'a statistic that is missing': lambda t: {'bn': {'running_mean': np.ones(2)}} if t > 2 else {},
  'a statistic that is too many': lambda t: {'bn': {'running_mean': np.ones(2)}} if t < 2 else {},
  'another dtype': lambda t: {'ln': {'scale': np.ones(2, np.float16 if t else np.float32)}},
  'float64': lambda t: {'ln': {'scale': np.ones(2)}},
}


@pytest.mark.parametrize('what', KEPT)
def test_kept_leaves_are_not_checked(what):
  history = history_of(KEPT[what])
  result = quietly(history)
  assert jax.tree.structure(result) == jax.tree.structure(history[-1])
  assert_moved(result.pop('dense')['kernel'], walk())
  newest = {key: value for key, value in history[-1].items() if key != 'dense'}
  for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(newest), strict=True):
    assert a is b


def test_a_leaf_that_is_predicted_must_be_in_all_stages():
  history = history_of(lambda t: {'more': {'bias': np.ones(2, np.float32)}} if t != 1 else {})
  with pytest.raises(UserError, match=r"stage 1 lacks leaf 'more/bias', which stage 4 .the newest"):
    predict(history)
  with pytest.raises(UserError, match=r"stage 0 has leaf 'more/bias', which stage 3 .the newest"):
    predict([history[0], *history[1:2] * 3])


@pytest.mark.parametrize(
  ('leaves', 'text'),
  [
    (
      {'wte': {'embedding': np.ones((5, 2), np.float32)}},
      r"embedding 'wte/embedding'.*\$': 'keep'",
    ),
    ({'block': {'gamma': np.ones(2, np.float32)}}, "layer scale 'block/gamma'"),
    ({'logit_scale': np.ones((), np.float32)}, "temperature 'logit_scale'"),
    ({'cls_token': np.ones((1, 1, 2), np.float32)}, "embedding 'cls_token'"),
    (
      {'attn': {'rel_pos_h': np.ones((3, 2), np.float32)}},
      "relative position table 'attn/rel_pos_h",
    ),
  ],
)
def test_what_is_kept_by_its_name_is_said_once_and_not_where_a_rule_agrees(leaves, text):
  history = history_of(lambda t: leaves)
  with pytest.warns(KindsWarning, match=f'kept as they are in the newest stage: {text}') as caught:
    predict(history)
  assert len(caught) == 1 and caught[0].filename == __file__
  rule = str(caught[0].message).split("--kinds='")[1].split("'")[0]
  result = predict(history, kinds=kinds.parse_kinds([rule]))  # Warnings are errors here.
  del result['dense']
  assert jax.tree.leaves(result)[0] is jax.tree.leaves(leaves)[0]


# --- containers -----------------------------------------------------------------------------------

SEQUENCES = {
  'deque': lambda stages: collections.deque([None, *stages], maxlen=5),
  'generator': lambda stages: (stage for stage in stages),
  'map': lambda stages: map(dict, stages),
  'values': lambda stages: dict(enumerate(stages)).values(),
  'UserList': collections.UserList,
  'tuple': tuple,
}


@pytest.mark.parametrize('form', SEQUENCES)
def test_any_sequence_of_stages(form):
  history = history_of(lambda t: {})
  assert_moved(predict(SEQUENCES[form](history))['dense']['kernel'], walk())


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (
      lambda h: dict(enumerate(h)),
      'the history is a dict of 5 entries that are alike, 0 and so on',
    ),
    (lambda h: {f'stage_{i}': s for i, s in enumerate(h)}, r'give a list, oldest first'),
    (lambda h: {f'epoch{i}': s for i, s in enumerate(h)}, r'give Trajectory\(history\)'),
    (set, 'the history is of .*set'),
    (lambda h: 'checkpoints/', 'the history is of .*str.*expected the stages in order'),
    (lambda h: iter([]), 'the history is empty'),
    (collections.deque, 'the history is empty'),
    (lambda h: 7, 'the history is of .*int'),
    (lambda h: [types.SimpleNamespace(state_dict=1, load_state_dict=2)] * 5, r'its state_dict\(\)'),
  ],
)
def test_what_is_no_history_is_told_in_one_line(make, message):
  history = history_of(lambda t: {}) if make not in (set, collections.deque) else ()
  with pytest.raises(UserError, match=message) as error:
    predict(make(history))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'layers',
  [
    [(4, 6), (6, 2)],
    [(4, 4), (4, 4)],
    [(4, 6), (6, 6), (6, 2)],
    [(3, 3)] * 5,
  ],
)
@pytest.mark.parametrize('root', [list, tuple])
def test_a_stacked_tree_whose_root_is_a_list_is_told(layers, root):
  # As plain JAX has it: a list of (weights, biases).
  history = root((np.stack(walk(shape)), np.stack(walk(shape[1:]))) for shape in layers)
  with pytest.raises(
    UserError, match=rf'that is a {root.__name__}, .* give Trajectory.history'
  ) as e:
    predict(history)
  assert '\n' not in str(e.value)
  rules = {'/0$': 'fc', '/1$': 'bias'}
  result = predict(Trajectory(history), kinds=rules)
  for (weights, biases), shape in zip(result, layers, strict=True):
    assert_moved(weights, walk(shape))
    assert_moved(biases, walk(shape[1:]))


@pytest.mark.parametrize('name', ['tsv', 'known', 'known_leaf', 'linear_fit', 'exp_fit'])
@pytest.mark.parametrize('shape', [(0, 4), (0,), (4, 0, 2), (2, 0)])
def test_empty_leaves(name, shape):
  empty = np.zeros(shape, np.float32)
  history = history_of(lambda t: {'a': {'bias' if len(shape) < 2 else 'conv_kernel': empty}})
  options = {'kinds': {'conv_kernel$': 'conv'}} if len(shape) > 1 else {}
  result = know_jax.predict(history, predictor=name, on_bad='ignore', **options)
  assert next(iter(result['a'].values())).shape == shape
  assert (np.asarray(result['dense']['kernel']) != history[-1]['dense']['kernel']).any()
  stages = know_jax.forecast(history, 2, predictor=name, on_bad='ignore', **options)
  assert next(iter(stages.weights['a'].values())).shape == (2, *shape)


# --- stacks of layers -----------------------------------------------------------------------------


def layers(seed=0):
  leaves = {
    'wi/kernel': (3, 8, 6),
    'wi/bias': (3, 6),
    'norm/scale': (3, 8),
    'conv/kernel': (3, 3, 3, 2, 4),
  }
  stages = {name: walk(shape, seed=seed + i) for i, (name, shape) in enumerate(leaves.items())}
  return [
    {
      'layers': {
        n: stages[n][t]
        * (1 + np.arange(3).reshape(3, *[1] * (stages[n][t].ndim - 1))).astype(np.float32)
        for n in leaves
      },
      'head': {'kernel': stages['wi/kernel'][t][0]},
    }
    for t in range(5)
  ]


@pytest.mark.parametrize(
  ('name', 'form'),
  [
    ('known', 'list'), ('known_leaf', 'list'), ('tsv', 'list'), ('known_leaf', 'stacked'),
    ('linear_fit', 'jit'), ('tsv', 'jit'), ('known', 'forecast'), ('magmax', 'forecast'),
  ],
)  # fmt: skip
def test_a_declared_stack_is_predicted_layer_by_layer(name, form):
  history = layers()
  options = {'predictor': name, 'on_bad': 'ignore'}
  function = functools.partial(know_jax.predict, stacked='layers/', **options)
  if form == 'jit':
    result = jax.jit(function)(history)
  elif form == 'forecast':
    result = know_jax.forecast(history, 2, stacked='layers/', **options)[0]
  else:
    result = function(Trajectory.from_sequence(history) if form == 'stacked' else history)
  assert jax.tree.structure(result) == jax.tree.structure(history[-1])
  for layer in range(3):
    alone = [{k: leaf[layer] for k, leaf in stage['layers'].items()} for stage in history]
    reference = know_jax.predict(alone, **options)
    for path, leaf in reference.items():
      np.testing.assert_allclose(result['layers'][path][layer], leaf, rtol=2e-5, atol=1e-6)


def test_a_bad_layer_alone_keeps_its_newest_weights():
  history = layers()
  for t, stage in enumerate(history):
    stage['layers']['wi/kernel'][1] = np.float32(10.0) ** (7 * t)
  with pytest.warns(know_jax.errors.PredictionWarning, match=r"'layers/wi/kernel\[1\]' \(fc\)"):
    result = know_jax.predict(history, 2, predictor='exp_fit', stacked='layers/')
  kernel = np.asarray(result['layers']['wi/kernel'])
  np.testing.assert_array_equal(kernel[1], history[-1]['layers']['wi/kernel'][1])
  assert (kernel[0] != history[-1]['layers']['wi/kernel'][0]).any()


@pytest.mark.parametrize(
  ('stacked', 'message'),
  [
    ('blocks/', "stacked: 'blocks/' is found in no path"),
    ('(', r"stacked: '\(' is no regular expression"),
    ('ayers/', "stacked: 'ayers/' is found in no path"),  # From the beginning of a name on.
    ('temperature', "stacked: 'temperature' fits leaf 'temperature', a scalar"),
  ],
)
def test_mistakes_in_stacked(stacked, message):
  history = [{**stage, 'temperature': np.float32(1)} for stage in layers()]
  with pytest.raises(UserError, match=message):
    quietly(history, stacked=stacked)


def test_replicated_parameters_can_be_declared():
  history = [{'Dense_0': {'kernel': k, 'bias': k[0]}} for k in walk((6, 4))]
  copies = [jax.tree.map(lambda leaf: np.stack([leaf] * 4), stage) for stage in history]
  with pytest.raises(UserError, match=r"'Dense_0/kernel' with shape \(4, 6, 4\).*copies for 4 dev"):
    predict(copies)
  result, alone = predict(copies, stacked=''), predict(history)
  for copy in range(4):
    jax.tree.map(lambda a, b, copy=copy: np.testing.assert_array_equal(a[copy], b), result, alone)


# --- PyTorch --------------------------------------------------------------------------------------


class Tensor:
  """What is used of torch.Tensor, so that this is tried where PyTorch is not installed too."""

  def __init__(self, array, dtype):
    self._array, self.dtype = np.asarray(array), dtype
    self.shape = self._array.shape

  def detach(self):
    return self

  cpu = detach

  def float(self):
    return Tensor(self._array.astype(np.float32), 'torch.float32')

  def numpy(self):
    assert self.dtype != 'torch.bfloat16', 'TypeError: Got unsupported ScalarType BFloat16'
    return self._array

  def new_tensor(self, array):
    assert type(array) is np.ndarray and array.dtype.kind == 'f'
    dtype = np.dtype(ml_dtypes.bfloat16 if self.dtype == 'torch.bfloat16' else array.dtype)
    return Tensor(array.astype(dtype), self.dtype)


@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize('form', ['dict', 'list', 'bare'])
def test_tensors_come_back_as_tensors(dtype, form):
  def stage(leaf):
    tensor = Tensor(leaf, f'torch.{np.dtype(dtype).name}')
    matrix = Tensor(np.stack([leaf] * 2), tensor.dtype)
    steps = Tensor(np.int64(3), 'torch.int64')
    return {
      'dict': {'fc.weight': matrix, 'fc.bias': tensor, 'bn.num_batches_tracked': steps},
      'list': [tensor, steps],
      'bare': tensor,
    }[form]

  arrays = walk((4,), dtype)
  rules = {'dict': None, 'list': {'^0$': 'bias'}, 'bare': {'^$': 'bias'}}[form]
  history = [stage(leaf) for leaf in arrays]
  result = predict(history, kinds=rules)
  moved = {'dict': lambda: result['fc.bias'], 'list': lambda: result[0], 'bare': lambda: result}[
    form
  ]()
  assert isinstance(moved, Tensor) and moved.dtype == f'torch.{np.dtype(dtype).name}'
  eps = 4 * float(jnp.finfo(dtype).eps)
  assert_moved(moved._array, arrays, rtol=eps, atol=eps)


def test_tensors_of_pytorch():
  torch = pytest.importorskip('torch')
  for dtype in (torch.float32, torch.bfloat16):
    history = [
      {'fc.weight': torch.tensor(leaf).to(dtype), 'fc.bias': torch.tensor(leaf[0]).to(dtype)}
      for leaf in walk()
    ]
    result = predict(history)
    assert {leaf.dtype for leaf in result.values()} == {dtype}
    stages = [stage['fc.weight'].float().numpy() for stage in history]
    assert_moved(result['fc.weight'].float().numpy(), stages, rtol=0.05, atol=0.01)


# --- kinds through predict ------------------------------------------------------------------------


def test_the_shift_of_a_normalisation_without_scale_is_kept():
  model = nn.Sequential(
    [
      nn.Conv(4, (3, 3), use_bias=False),
      nn.BatchNorm(use_running_average=False, use_scale=False),
    ]
  )
  variables = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 8, 8, 3)))
  found = kinds.leaf_kinds(variables)
  assert found.pop('params/layers_0/kernel') == 'conv'
  assert set(found.values()) == {'keep'} and 'params/layers_1/bias' in found


@pytest.mark.parametrize('rules', [{'fc': 'conv'}, {'dense/kernel$': 'keep', 'wte': 'fc'}])
def test_rules_are_taken_as_a_mapping(rules):
  history = history_of(lambda t: {'wte': {'embedding': walk()[t]}, 'fc': {'kernel': walk()[t]}})
  if 'wte' in rules:
    result = predict(history, kinds=rules)
    assert result['dense']['kernel'] is history[-1]['dense']['kernel']
    assert_moved(result['wte']['embedding'], walk())
  else:
    with pytest.warns(KindsWarning, match=r"the rule 'fc=conv' changes .*: 'fc/kernel' \(fc\)\."):
      predict(history, kinds={**rules, 'embedding$': 'keep'})
