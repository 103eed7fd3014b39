"""What people ask of predictions from files: some leaves only, options, dtypes, a card.

References: `know_jax.predict`, the safetensors library, and hashlib.
"""

import hashlib
import json
import re
import warnings

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from complex_files import mark_complex

import know_jax
from know_jax.errors import PredictionWarning, UserError
from know_jax.nowcast import file_job, from_files

SHAPES = {
  'conv/kernel': (3, 3, 2, 4),
  'conv/bias': (4,),
  'dense/kernel': (30, 7),
  'dense/bias': (7,),
}


def make_history(dtype=np.float32, stages=3):
  rng = np.random.default_rng(0)
  stage = {path: rng.normal(scale=0.5, size=shape) for path, shape in SHAPES.items()}
  history = []
  for _ in range(stages):
    stage = {p: leaf + rng.normal(scale=0.05, size=leaf.shape) for p, leaf in stage.items()}
    history.append({path: np.asarray(leaf, dtype) for path, leaf in stage.items()})
  return history


def save(folder, history, **more):
  folder.mkdir(exist_ok=True)
  paths = []
  for number, stage in enumerate(history):
    paths.append(folder / f'{number}.safetensors')
    tensors = {path.replace('/', '.'): leaf for path, leaf in {**stage, **more}.items()}
    safetensors.numpy.save_file(tensors, paths[-1])
  return paths


def run(paths, output, name='2.safetensors', **options):
  options = {'predictors': ['task_vector'], 'steps': 1, **options}
  (folder,) = from_files.write(file_job.prepare(paths, **options), output, show_progress=False)
  return load(folder / name)


def load(path):
  """The library checks the file; it has no 8-bit floats for NumPy, so they are taken from bytes."""
  dtypes = {
    'F8_E4M3': ml_dtypes.float8_e4m3fn, 'F8_E5M2': ml_dtypes.float8_e5m2, 'F32': np.float32,
    'BF16': ml_dtypes.bfloat16, 'F16': np.float16, 'I64': np.int64,
  }  # fmt: skip
  return {
    name.replace('.', '/'): np.frombuffer(entry['data'], dtypes[entry['dtype']])
    for name, entry in safetensors.deserialize(path.read_bytes())
  }


def equal(a, b):
  return a.dtype == b.dtype and a.tobytes() == np.asarray(b).tobytes()


def test_some_leaves_only(tmp_path):
  history = make_history()
  paths = save(tmp_path, history)
  predicted = know_jax.predict(history, 1, predictor='task_vector')
  for options, moved in (
    ({'only': 'dense'}, {'dense/kernel', 'dense/bias'}),
    ({'skip': 'bias$'}, {'dense/kernel', 'conv/kernel'}),
    ({'only': 'dense', 'skip': 'bias'}, {'dense/kernel'}),
  ):
    found = run(paths, tmp_path / str(options), **options)
    for path, leaf in found.items():
      assert equal(leaf, predicted[path] if path in moved else history[-1][path]), (options, path)
  for options, message in (
    ({'only': 'embed'}, r"only: 'embed' is found in no path; the first is 'conv/bias'"),
    ({'skip': '('}, r"skip: '\(' is no regular expression"),
  ):
    with pytest.raises(UserError, match=message):
      run(paths, tmp_path / 'wrong', **options)
  assert not (tmp_path / 'wrong').exists()


def test_options_of_predictors(tmp_path):
  history = make_history()
  paths = save(tmp_path, history)
  options = file_job.parse_options(['lam=0.3'])
  found = run(paths, tmp_path / 'out', options=options)
  for path, leaf in know_jax.predict(history, 1, predictor='task_vector', lam=0.3).items():
    assert equal(found[path], leaf)
  assert file_job.parse_options(['a=true', 'b=x', 'c=-1e-3']) == {'a': True, 'b': 'x', 'c': -1e-3}
  for text in ('lam', '=3', 'a b=3'):
    with pytest.raises(UserError, match=r"option: found '.*'; expected 'name=value', as in 'lam"):
      file_job.parse_options([text])
  with pytest.raises(UserError, match='lamb'):
    run(paths, tmp_path / 'wrong', options={'lamb': 0.3})
  assert not (tmp_path / 'wrong').exists()


def test_the_dtype_that_is_written(tmp_path):
  history = make_history(ml_dtypes.bfloat16)
  count = np.arange(3)
  paths = save(tmp_path, history, count=count)
  wide = [{p: leaf.astype(np.float32) for p, leaf in stage.items()} for stage in history]
  expected = know_jax.predict(wide, 1, predictor='task_vector')
  found = run(paths, tmp_path / 'wide', dtype='float32', skip='conv')
  assert equal(found['count'], count)
  for path, leaf in found.items():
    if path != 'count':
      assert equal(leaf, wide[-1][path] if 'conv' in path else expected[path]), path
  with pytest.raises(UserError, match=r"unknown dtype 'float8'.*bfloat16"):
    run(paths, tmp_path / 'wrong', dtype='float8')
  np.savez(tmp_path / 'n.npz', **wide[2])
  mixed = [*save(tmp_path / 'wide_files', wide)[:2], tmp_path / 'n.npz']
  with pytest.raises(
    UserError, match=r'npz checkpoint is written with its own dtypes; add format='
  ):
    run(mixed, tmp_path / 'wrong', dtype='bfloat16')
  with pytest.raises(UserError, match=r"format is 'orbax'; expected safetensors, or nothing for"):
    run(paths, tmp_path / 'wrong', format='orbax')
  converted = run(
    mixed, tmp_path / 'np', 'model-00001-of-00001.safetensors', format='safetensors',
    dtype='float16',
  )  # fmt: skip
  assert {leaf.dtype for leaf in converted.values()} == {np.dtype(np.float16)}


@pytest.mark.parametrize('dtype', [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_8_bit_floats_are_predicted_in_float32(tmp_path, dtype):
  history = [{path: (3 * leaf).astype(dtype) for path, leaf in s.items()} for s in make_history()]
  found = run(save(tmp_path, history), tmp_path / 'out')
  wide = [{p: leaf.astype(np.float32) for p, leaf in stage.items()} for stage in history]
  for path, leaf in know_jax.predict(wide, 1, predictor='task_vector').items():
    assert equal(found[path], np.asarray(leaf).astype(dtype)), path
  assert any(not equal(found[path], history[-1][path]) for path in found)


def test_what_can_only_be_kept_is_copied_as_bytes(tmp_path):
  history = make_history()
  waves = np.arange(4, dtype=np.complex64)
  parts = waves.view(np.float32)
  paths = save(tmp_path, history, wave=parts, flags=np.array([True, False]), big=np.uint16([7]))
  for path in paths:
    mark_complex(path, 'wave')
  with pytest.raises(UserError, match=r"leaf 'wave' has dtype complex64, .*--skip='\^wave\$'"):
    run(paths, tmp_path / 'wrong')
  # Numbers of four bits, and scales of eight, which NumPy does not have.
  for path in paths:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], 'little')
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    end = len(body)
    header['packed'] = {'dtype': 'F4', 'shape': [2, 3], 'data_offsets': [end, end + 3]}
    header['scale8'] = {'dtype': 'F8_E8M0', 'shape': [2], 'data_offsets': [end + 3, end + 5]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, 'little') + text + body + b'\1\2\3\4\5')
  with pytest.warns(PredictionWarning, match='not predicted, and copied: packed, scale8'):
    job = file_job.prepare(paths, predictors=['task_vector'], steps=1, skip='wave')
  (folder,) = from_files.write(job, tmp_path / 'out', show_progress=False)
  before, after = paths[-1].read_bytes(), (folder / '2.safetensors').read_bytes()
  length = 8 + int.from_bytes(after[:8], 'little')
  assert len(before) == len(after) and before[:length] == after[:length]
  predicted = know_jax.predict(history, 1, predictor='task_vector')
  for name, entry in json.loads(after[8:length]).items():
    begin, end = (length + offset for offset in entry['data_offsets'])
    path = name.replace('.', '/')
    expected = np.asarray(predicted[path]).tobytes() if path in predicted else before[begin:end]
    assert after[begin:end] == expected, name
  with (
    pytest.raises(UserError, match=r"leaf 'packed' has dtype .*V1, which safetensors cannot be"),
    pytest.warns(),
  ):
    file_job.prepare(paths, predictors=['task_vector'], steps=1, skip='wave', format='safetensors')


def test_numbers_in_another_order_of_bytes_are_copied_and_told(tmp_path):
  history = make_history()
  for number, stage in enumerate(history):
    np.savez(tmp_path / f'{number}.npz', **stage, other=(np.arange(3) + number).astype('>f4'))
  with pytest.warns(PredictionWarning, match='of a dtype that is not predicted, and copied: other'):
    job = file_job.prepare(
      [tmp_path / f'{n}.npz' for n in range(3)], predictors=['task_vector'], steps=1
    )
  (folder,) = from_files.write(job, tmp_path / 'out', show_progress=False)
  with np.load(folder / '2.npz') as found:
    assert found['other'].dtype == '>f4' and found['other'].tolist() == [2, 3, 4]
    for path, leaf in know_jax.predict(history, 1, predictor='task_vector').items():
      assert equal(found[path], leaf)


def test_the_card(tmp_path):
  history = make_history()
  more = {f'layer/lora_{x}/weight': np.ones((2, 5), np.float32) for x in 'AB'}
  paths = save(tmp_path, history, **more)
  with pytest.warns(PredictionWarning, match='--lora=merged predicts the product'):
    job = file_job.prepare(
      paths, predictors=['task_vector'], steps=1, kinds={'lora_.*/weight': 'fc'},
      options={'lam': 0.4},
    )  # fmt: skip
  (folder,) = from_files.write(job, tmp_path / 'out', show_progress=False)
  text = (folder / 'README.md').read_text()
  front, body = text.removeprefix('---\n').split('\n---\n')
  assert dict(line.split(': ') for line in front.splitlines() if ': ' in line) == {
    'library_name': 'know_jax', 'predictor': 'task_vector', 'prediction_steps': '1'
  }  # fmt: skip
  for path in paths:
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    assert f'`{path.name}` | {path.stat().st_size} | `{checksum}`' in body
  moved = {'conv': 0.0, 'bias': 0.0, 'fc': 0.0}
  for path, leaf in know_jax.predict(history, 1, predictor='task_vector', lam=0.4).items():
    far = np.abs(np.asarray(leaf) - history[-1][path]).max()
    moved[job.kinds[path]] = max(moved[job.kinds[path]], far)
  for kind, leaves, weights in (('conv', 1, 72), ('fc', 3, 230), ('bias', 2, 11), ('keep', 0, 0)):
    assert f'| {kind} | {leaves} | {weights} | {moved.get(kind, 0):.3g} |' in body
  assert '3 checkpoints at rate 0.5, which stands for 2 times the data' in body
  assert 'A and B of LoRA are predicted apart' in body and '"lam": 0.4' in body
  assert f'know_jax {know_jax.__version__}, jax ' in body


def test_what_would_be_done(tmp_path):
  paths = save(tmp_path, make_history())
  job = file_job.prepare(paths, predictors=['task_vector', 'log_fit'], steps=2)
  text = file_job.plan(job, tmp_path / 'a' / 'b')
  assert 'weights: 72 conv, 210 fc, 11 bias, 0 keep' in text
  # 293 weights of four bytes, three stages.
  assert 'reads 0.0 MB; writes 2 x 2 checkpoints of 0.0 MB (safetensors)' in text
  assert 'predicting takes about' in text
  assert not (tmp_path / 'a').exists()


def test_tensors_of_torch_that_share_or_permute_their_numbers(tmp_path):
  torch = pytest.importorskip('torch')
  rng = np.random.default_rng(0)
  paths = []
  for number in range(3):
    table = torch.from_numpy(rng.normal(size=(6, 4)).astype('f'))
    conv = torch.from_numpy(rng.normal(size=(5, 4, 3, 3)).astype('f'))
    state = {
      'embed.weight': table, 'lm_head.weight': table,
      'conv.weight': conv.to(memory_format=torch.channels_last),
      'conv.bias': conv[:, 0, 0, 0].clone(),
    }  # fmt: skip
    paths.append(tmp_path / f'{number}.pt')
    torch.save(state, paths[-1])
  with pytest.warns(
    PredictionWarning, match="'lm_head.weight' shares the numbers of 'embed.weight'"
  ):
    job = file_job.prepare(paths, predictors=['task_vector'], steps=1, kinds={'embed/weight': 'fc'})
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    (folder,) = from_files.write(job, tmp_path / 'out', show_progress=False)
  found = torch.load(folder / '2.pt', weights_only=True)
  stages = [torch.load(path, weights_only=True) for path in paths]
  for name in found:
    assert found[name].stride() == stages[-1][name].stride()
    assert not torch.equal(found[name], stages[-1][name])
  assert found['lm_head.weight'].data_ptr() == found['embed.weight'].data_ptr()
  expected = know_jax.predict(
    [{'conv': {'kernel': s['conv.weight'].numpy()}} for s in stages], 1, predictor='task_vector'
  )
  np.testing.assert_array_equal(found['conv.weight'].numpy(), expected['conv']['kernel'])


def test_batch_norm_of_torch_is_kept_and_the_way_to_settle_it_is_told(tmp_path):
  names = {'bn/weight': 1, 'bn/bias': 2, 'bn/running_mean': 3, 'bn/running_var': 4}
  more = {name: np.full(4, value, np.float32) for name, value in names.items()}
  paths = save(tmp_path, make_history(), **more)
  with pytest.warns(PredictionWarning, match=r'settle them on your data in PyTorch: for m in'):
    found = run(paths, tmp_path / 'out')
  assert all(equal(found[name], more[name]) for name in names)
  assert 'm.reset_running_stats()' in (tmp_path / 'out/task_vector/1/README.md').read_text()


# --- stacks of layers -----------------------------------------------------------------------------


def stacked_history(folder, stages=5):
  rng = np.random.default_rng(3)
  shapes = {'layers/wi/kernel': (3, 20, 30), 'layers/wi/bias': (3, 30), 'head/kernel': (30, 4)}
  start = {path: rng.normal(0, 0.1, shape) for path, shape in shapes.items()}
  history = []
  for _ in range(stages):
    start = {p: leaf + rng.normal(0, 0.01, leaf.shape) for p, leaf in start.items()}
    # Each layer moves at a pace of its own.
    history.append({p: (leaf * 1.1).astype(np.float32) for p, leaf in start.items()})
    history[-1]['layers/wi/kernel'] *= np.float32([[[1]], [[2]], [[4]]])
  return history, save(folder, history)


@pytest.mark.parametrize('predictor', ['known', 'known_leaf', 'tsv', 'linear_fit'])
def test_declared_stacks_are_predicted_layer_by_layer(tmp_path, predictor):
  history, paths = stacked_history(tmp_path / 'history')
  options = {'predictors': [predictor], 'on_bad': 'ignore'}
  result = run(paths, tmp_path / 'out', '4.safetensors', stacked='layers/', **options)
  for layer in range(3):
    alone = [
      {path: leaf[layer] for path, leaf in stage.items() if path.startswith('layers')}
      for stage in history
    ]
    reference = know_jax.predict(alone, predictor=predictor, on_bad='ignore')
    for path, leaf in reference.items():
      found = result[path].reshape(history[-1][path].shape)[layer]
      np.testing.assert_allclose(found, leaf, rtol=2e-5, atol=1e-6)


def test_a_bad_layer_in_a_file_alone_keeps_its_newest_weights(tmp_path):
  history, _ = stacked_history(tmp_path / 'history')
  for t, stage in enumerate(history):
    stage['layers/wi/kernel'][1] = np.float32(10.0) ** (7 * t)
  paths = save(tmp_path / 'bad', history)
  with pytest.warns(PredictionWarning, match=r"'layers/wi/kernel\[1\]' \(fc\)"):
    result = run(
      paths, tmp_path / 'out', '4.safetensors', predictors=['exp_fit'], stacked='layers/'
    )
  newest = history[-1]['layers/wi/kernel']
  kernel = result['layers/wi/kernel'].reshape(newest.shape)
  np.testing.assert_array_equal(kernel[1], newest[1])
  assert (kernel[0] != newest[0]).any() and (kernel[2] != newest[2]).any()
  card = json.loads((tmp_path / 'out' / 'exp_fit' / '1' / 'nowcast.json').read_text())
  assert 'layers/wi/kernel[1]' in str(card['kept_newest'])
  assert 'layers/wi/kernel' in str(card['stacked'])


def test_stacks_that_are_not_declared_are_an_error(tmp_path):
  _, paths = stacked_history(tmp_path / 'history')
  with pytest.raises(UserError, match=r"leaf 'layers/wi/kernel' .*a stack of 3.*--stacked"):
    run(paths, tmp_path / 'out')
  with pytest.raises(UserError, match="stacked: 'blocks' is found in no path"):
    run(paths, tmp_path / 'out', stacked='blocks')
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('on_bad', ['keep', 'raise'])
@pytest.mark.parametrize('path', ['a/kernel', 'b/embedding', 'c/bias'])
def test_what_a_narrower_dtype_cannot_hold_is_told(tmp_path, path, on_bad):
  history = [
    {'a/kernel': np.full((4, 4), 1.0 + t), 'b/embedding': np.ones((4, 4)), 'c/bias': np.ones(4)}
    for t in range(2)
  ]
  for stage in history:
    stage[path] = stage[path] * 60_000 * (1 if path == 'a/kernel' else 2)
  paths = save(tmp_path, [{k: x.astype(np.float32) for k, x in h.items()} for h in history])
  job = file_job.prepare(
    paths, predictors=['persistence'], steps=1, dtype='float16', on_bad=on_bad,
    kinds={'b/': 'keep'},
  )  # fmt: skip
  told = 'float16 cannot hold one of them, 120000.0' if on_bad == 'keep' else f'{path!r}'
  if path == 'b/embedding':
    told = f'leaf {path!r} keeps its newest weights, and float16 cannot hold'
  with pytest.raises(UserError, match=re.escape(told)):
    from_files.write(job, tmp_path / 'out', show_progress=False)
