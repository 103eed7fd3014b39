"""Five stages of every format, written by its own library: what is predicted, the library loads.

References: `know_jax.forecast` for the numbers, and the libraries, which load strictly. What needs
PyTorch or Keras runs where they are installed.
"""

import io
import json
import re
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from runs import snapshot

import know_jax
from know_jax.errors import PredictionWarning, UserError
from know_jax.io import checkpoints, formats
from know_jax.io.weights import Sink
from know_jax.kinds import find_kinds, parse_kinds
from know_jax.nowcast import file_job, from_files

SHAPES = {
  'conv/kernel': (3, 3, 2, 4),
  'conv/bias': (4,),
  'dense/kernel': (30, 7),
  'dense/bias': (7,),
}


def make_history(dtype=np.float32, stages=5, seed=0):
  rng = np.random.default_rng(seed)
  stage = {path: rng.normal(scale=0.1, size=shape) for path, shape in SHAPES.items()}
  history = []
  for number in range(stages):
    stage = {p: leaf + rng.normal(scale=0.01, size=leaf.shape) for p, leaf in stage.items()}
    tree = {path: np.asarray(leaf, dtype) for path, leaf in stage.items()}
    history.append({**tree, 'count': np.array(2**40 + number, np.int64)})
  return history


def nested(stage, leaf=lambda x: x):
  tree = {}
  for path, value in stage.items():
    *parents, name = path.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf(value)
  return tree


def flat(tree, prefix=''):
  found = {}
  for name, value in tree.items():
    inner = isinstance(value, dict)
    found |= flat(value, f'{prefix}{name}/') if inner else {prefix + name: np.asarray(value)}
  return found


class SafetensorsFile:
  name = 'model.safetensors'

  def save(self, path, stage):
    tensors = {p.replace('/', '.'): leaf for p, leaf in stage.items()}
    safetensors.numpy.save_file(tensors, path, {'format': 'np', 'own': 'note'})

  def load(self, path):
    with safetensors.safe_open(path, framework='numpy') as file:
      assert file.metadata() == {'format': 'np', 'own': 'note'}
    return {n.replace('.', '/'): v for n, v in safetensors.numpy.load_file(path).items()}


class HuggingFaceFolder(SafetensorsFile):
  name = 'hf'

  def save(self, path, stage):
    path.mkdir()
    files = ('model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors')
    parts = [dict(list(stage.items())[i::2]) for i in (0, 1)]
    for file, part in zip(files, parts, strict=True):
      super().save(path / file, part)
    weight_map = {
      n.replace('/', '.'): f for f, part in zip(files, parts, strict=True) for n in part
    }
    index = {'metadata': {'total_size': 1, 'other': 'x'}, 'weight_map': weight_map}
    (path / 'model.safetensors.index.json').write_text(json.dumps(index))
    (path / 'config.json').write_text('{"model_type": "tiny"}')
    (path / 'tokenizer').mkdir()
    (path / 'tokenizer' / 'vocab.txt').write_text('a b c')
    (path / 'modeling_tiny.py').write_text('raise SystemExit("executed")')
    (path / 'README.md').write_text('# of the input')
    (path / 'optimizer.pt').write_bytes(b'\x80\x02optimizer')
    (path / 'trainer_state.json').write_text('{}')

  def load(self, path):
    index = json.loads((path / 'model.safetensors.index.json').read_text())
    assert index['metadata'] == {'total_size': 1, 'other': 'x'}
    assert (path / 'tokenizer' / 'vocab.txt').read_text() == 'a b c'
    assert (path / 'config.json').read_text() == '{"model_type": "tiny"}'
    assert (path / 'modeling_tiny.py').exists()
    assert not (path / 'optimizer.pt').exists() and not (path / 'trainer_state.json').exists()
    assert '# of the input' not in (path / 'README.md').read_text()
    stage = {}
    for file in sorted(set(index['weight_map'].values())):
      part = super().load(path / file)
      assert {n.replace('/', '.') for n in part} == {
        n for n, f in index['weight_map'].items() if f == file
      }
      stage |= part
    return stage


class Npz:
  name = 'weights.npz'

  def save(self, path, stage):
    np.savez(path, **stage)

  def load(self, path):
    with np.load(path, allow_pickle=False) as file:
      return dict(file)


class FlaxMsgpack:
  name = 'flax_model.msgpack'

  def save(self, path, stage):
    import flax.serialization

    tree = {'params': nested(stage), 'step': 7, 'names': ['a', 'b'], 'scale': np.float32(0.5)}
    path.write_bytes(flax.serialization.to_bytes(tree))

  def load(self, path):
    import flax.serialization

    found = flax.serialization.msgpack_restore(path.read_bytes())
    assert found['step'] == 7 and found['scale'] == np.float32(0.5)
    return flat(found['params'])

  prefix = 'params/'
  kinds = {'scale': 'keep'}  # noqa: RUF012


class TorchFile:
  name = 'model.pth'

  def save(self, path, stage):
    torch = pytest.importorskip('torch')
    state = {p.replace('/', '.'): torch.from_numpy(np.array(leaf)) for p, leaf in stage.items()}
    torch.save({'state_dict': state, 'epoch': 3}, path)

  def load(self, path):
    import torch

    found = torch.load(path, weights_only=True)
    assert found['epoch'] == 3
    return {n.replace('.', '/'): v.numpy() for n, v in found['state_dict'].items()}

  prefix = 'state_dict/'


class TorchShards:
  name = 'hf'
  names = ('pytorch_model-00001-of-00002.bin', 'pytorch_model-00002-of-00002.bin')

  def save(self, path, stage):
    torch = pytest.importorskip('torch')
    path.mkdir()
    weight_map = {}
    for file, part in zip(self.names, (list(stage)[:2], list(stage)[2:]), strict=True):
      torch.save(
        {p.replace('/', '.'): torch.from_numpy(np.array(stage[p])) for p in part}, path / file
      )
      weight_map |= {p.replace('/', '.'): file for p in part}
    index = {'metadata': {'total_size': 1}, 'weight_map': weight_map}
    (path / 'pytorch_model.bin.index.json').write_text(json.dumps(index))
    (path / 'config.json').write_text('{}')

  def load(self, path):
    import torch

    index = json.loads((path / 'pytorch_model.bin.index.json').read_text())['weight_map']
    files = {name: torch.load(path / name, weights_only=True) for name in self.names}
    return {n.replace('.', '/'): files[file][n].numpy() for n, file in index.items()}


class WeightsH5:
  """As Keras 3 writes it: a data set for each variable, by number."""

  name = 'm.weights.h5'
  numbered = {  # noqa: RUF012
    'conv/kernel': 'layers/conv2d/vars/0',
    'conv/bias': 'layers/conv2d/vars/1',
    'dense/kernel': 'layers/dense/vars/0',
    'dense/bias': 'layers/dense/vars/1',
    'count': 'count',
  }

  def write(self, file, stage):
    import h5py

    with h5py.File(file, 'w') as h5:
      for path, leaf in stage.items():
        h5[self.numbered[path]] = leaf
      h5['optimizer/vars/0'] = np.float32(3)
      h5['layers/text'] = 'a text'
      h5['layers'].attrs['name'] = 'x'

  def read(self, file):
    import h5py

    with h5py.File(file, 'r') as h5:
      assert h5['optimizer/vars/0'][()] == 3 and h5['layers/text'][()] == b'a text'
      return {path: h5[name][()] for path, name in self.numbered.items()}

  def save(self, path, stage):
    self.write(path, stage)

  def load(self, path):
    return self.read(path)


class LegacyH5(WeightsH5):
  name = 'm.h5'
  numbered = {path: f'model_weights/{path.split("/")[0]}/{path}:0' for path in SHAPES} | {
    'count': 'count'
  }


class KerasArchive(WeightsH5):
  name = 'm.keras'

  def save(self, path, stage):
    data = io.BytesIO()
    self.write(data, stage)
    with zipfile.ZipFile(path, 'w') as archive:
      archive.writestr('metadata.json', '{}')
      archive.writestr('config.json', '{"class_name": "x"}')
      archive.writestr('model.weights.h5', data.getvalue())

  def load(self, path):
    with zipfile.ZipFile(path) as archive:
      assert archive.testzip() is None  # Checksums are right.
      assert archive.read('config.json') == b'{"class_name": "x"}'
      return self.read(io.BytesIO(archive.read('model.weights.h5')))


class OrbaxStandard:
  name = 'orbax'

  def save(self, path, stage):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(path, nested(stage))

  def load(self, path):
    import jax
    import orbax.checkpoint as ocp

    with jax.enable_x64(True), ocp.StandardCheckpointer() as checkpointer:
      like = nested(make_history()[0], lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype))
      return flat(checkpointer.restore(path, like))


class OrbaxManager(OrbaxStandard):
  name = '3'

  def save(self, path, stage):
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(path.parent) as manager:
      manager.save(3, args=ocp.args.Composite(
        params=ocp.args.StandardSave(nested(stage)), about=ocp.args.JsonSave({'x': 1}),
      ))  # fmt: skip

  def load(self, path):
    import orbax.checkpoint as ocp

    step = int(path.name)
    with ocp.CheckpointManager(path.parent) as manager:
      assert step in manager.all_steps()
      found = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))
    assert found['about'] == {'x': 1}
    return super().load(path / 'params')


class Sealed(OrbaxStandard):
  name = 'sealed'

  def save(self, path, stage):
    checkpoints.save(path, nested(stage), metadata={'examples': int(stage['count'])})

  def load(self, path):
    assert checkpoints.read_metadata(path)['predictor'] == 'log_fit'
    return flat(checkpoints.restore(path))


FORMATS = (
  OrbaxStandard(), OrbaxManager(), Sealed(),
  SafetensorsFile(), HuggingFaceFolder(), Npz(), FlaxMsgpack(), TorchFile(), TorchShards(),
  WeightsH5(),
  LegacyH5(), KerasArchive(),
)  # fmt: skip


def run(history, output, **options):
  options = {'predictors': ['log_fit'], 'steps': 2, **options}
  return from_files.write(file_job.prepare(history, **options), output, show_progress=False)


def save_all(form, folder, history):
  paths = []
  for number, stage in enumerate(history):
    (folder / str(number)).mkdir(parents=True)
    paths.append(folder / str(number) / form.name)
    form.save(paths[-1], stage)
  return paths


def place(folder, form):
  is_folder = isinstance(form, (HuggingFaceFolder, OrbaxStandard, TorchShards))
  return folder if is_folder else folder / form.name


@pytest.mark.parametrize('form', FORMATS, ids=lambda form: type(form).__name__)
def test_what_comes_out_is_the_newest_checkpoint_with_its_weights_replaced(tmp_path, form):
  history = make_history(stages=3)
  paths = save_all(form, tmp_path, history)
  folders = run(paths, tmp_path / 'out', kinds=getattr(form, 'kinds', None))
  bare = [{p: leaf for p, leaf in stage.items() if p != 'count'} for stage in history]
  for folder, expected in zip(
    folders, know_jax.forecast(bare, 2, predictor='log_fit'), strict=True
  ):
    found = form.load(place(folder, form))
    assert found.keys() == history[-1].keys()
    assert (found['count'].dtype, int(found['count'])) == (np.int64, 2**40 + 2)
    for path, leaf in expected.items():
      assert found[path].dtype == np.float32 and found[path].shape == SHAPES[path]
      np.testing.assert_array_equal(found[path], np.asarray(leaf), err_msg=path)
    assert not np.array_equal(found['dense/kernel'], history[-1]['dense/kernel'])
  if isinstance(form, WeightsH5):
    return  # Each file of HDF5 takes a process.
  # The same call once more finds all as it was.
  before = snapshot(tmp_path / 'out')
  run(paths, tmp_path / 'out', kinds=getattr(form, 'kinds', None))
  assert snapshot(tmp_path / 'out') == before


@pytest.mark.filterwarnings('ignore')  # Of Keras itself.
def test_a_model_of_keras_is_loaded_and_runs(tmp_path, monkeypatch):
  monkeypatch.setenv('KERAS_BACKEND', 'jax')
  keras = pytest.importorskip('keras')
  layers = keras.layers
  model = keras.Sequential([
    keras.Input((8, 8, 3)), layers.Conv2D(4, 3), layers.BatchNormalization(), layers.Flatten(),
    layers.Dense(5),
  ])  # fmt: skip
  rng = np.random.default_rng(0)
  images = rng.normal(size=(2, 8, 8, 3)).astype('f')
  for name in ('m.keras', 'm.weights.h5', 'm.h5'):
    for number in range(3):
      model.set_weights([w + rng.normal(scale=0.01, size=w.shape) for w in model.get_weights()])
      (tmp_path / name / str(number)).mkdir(parents=True)
      path = tmp_path / name / str(number) / name
      model.save_weights(path) if 'weights' in name else model.save(path)
    paths = [tmp_path / name / str(number) / name for number in range(3)]
    newest = model.get_weights()
    job = file_job.prepare(
      paths, predictors=['task_vector'], steps=1, kinds={'gamma|beta|moving': 'keep'}
    )
    kinds = sorted(job.kinds.values())
    assert kinds == ['bias', 'bias', 'conv', 'fc', 'keep', 'keep', 'keep', 'keep']
    (folder,) = from_files.write(job, tmp_path / name / 'out', show_progress=False)
    if 'weights' in name:
      model.load_weights(folder / name)
      loaded = model
    else:
      loaded = keras.models.load_model(folder / name)
    moved = [not np.array_equal(a, b) for a, b in zip(newest, loaded.get_weights(), strict=True)]
    assert moved == [True, True, False, False, False, False, True, True]
    assert np.isfinite(loaded(images)).all()


def test_compressed_arrays_become_safetensors(tmp_path):
  import h5py

  history = [
    {p: leaf for p, leaf in stage.items() if p != 'count'} for stage in make_history(stages=3)
  ]
  for number, stage in enumerate(history):
    np.savez_compressed(tmp_path / f'n{number}.npz', **stage)
  with h5py.File(tmp_path / 'h.h5', 'w') as file:
    for path, leaf in history[2].items():
      file.create_dataset(path, data=leaf, compression='gzip', chunks=True)
  paths = [tmp_path / 'n0.npz', tmp_path / 'n1.npz', tmp_path / 'h.h5']
  with pytest.warns(PredictionWarning, match=r'h.h5 has compressed arrays: what is predicted'):
    (folder,) = run(paths, tmp_path / 'out', steps=1)
  found = safetensors.numpy.load_file(folder / 'model-00001-of-00001.safetensors')
  for path, leaf in know_jax.predict(history, 1, predictor='log_fit').items():
    np.testing.assert_array_equal(found[path], np.asarray(leaf))


def test_a_nnx_model_is_updated_from_what_comes_out(tmp_path):
  import jax
  import orbax.checkpoint as ocp
  from flax import nnx

  class Net(nnx.Module):
    def __init__(self, rngs):
      self.dense = nnx.Linear(3, 4, rngs=rngs)

    def __call__(self, x):
      return self.dense(x)

  paths, states = [], []
  for seed in range(3):
    states.append(nnx.state(Net(nnx.Rngs(seed)), nnx.Param))
    paths.append(tmp_path / str(seed))
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(paths[-1], states[-1])
  job = file_job.prepare(paths, predictors=['task_vector'], steps=1)
  assert sorted(job.kinds.values()) == ['bias', 'fc']
  (folder,) = from_files.write(job, tmp_path / 'out', show_progress=False)
  with ocp.StandardCheckpointer() as checkpointer:
    found = checkpointer.restore(folder, states[-1])
  expected = know_jax.predict([nnx.to_pure_dict(s) for s in states], 1, predictor='task_vector')
  net = Net(nnx.Rngs(9))
  nnx.update(net, found)
  np.testing.assert_array_equal(net.dense.kernel[...], expected['dense']['kernel'])
  assert np.isfinite(net(jax.numpy.ones((1, 3)))).all()


def test_a_model_of_equinox_is_loaded(tmp_path):
  import equinox as eqx
  import jax

  class Net(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.LayerNorm
    attend: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self):
      keys = jax.random.split(jax.random.key(0), 3)
      self.conv = eqx.nn.Conv2d(3, 8, 3, key=keys[0])
      self.norm = eqx.nn.LayerNorm(8)
      self.attend = eqx.nn.MultiheadAttention(2, 8, key=keys[1])
      self.mlp = eqx.nn.MLP(8, 4, 16, 1, key=keys[2])

  # To draw the weights in JAX would compile for seconds.
  rng = np.random.default_rng(0)
  models = [
    jax.tree.map(
      lambda x: rng.normal(size=x.shape).astype('f') if hasattr(x, 'shape') else x,
      eqx.filter_eval_shape(Net),
    )
  ]
  for _ in range(2):
    models.append(
      jax.tree.map(lambda x: x * np.float32(1.1) if hasattr(x, 'shape') else x, models[-1])
    )
  arrays = jax.tree_util.tree_leaves_with_path(models[0])
  for number, model in enumerate(models):
    eqx.tree_serialise_leaves(tmp_path / f'step_{number}.eqx', model)
  with pytest.raises(UserError, match=r'a dense kernel without bias, or an embedding') as error:
    file_job.prepare([tmp_path])
  # What is open has one rule to paste, and its matrices are those of the attention.
  rule = re.search(r"--kinds='([^']*)'", str(error.value))[1]
  with pytest.warns(PredictionWarning, match='no names: its 14 arrays are called by their numbers'):
    job = file_job.prepare(
      [tmp_path], predictors=['task_vector'], steps=1, kinds=parse_kinds(rule.split(','))
    )
  assert len(job.notes) == 1  # For all stages.
  (folder,) = from_files.write(job, tmp_path / 'out', show_progress=False)
  found = eqx.tree_deserialise_leaves(folder / 'step_2.eqx', models[0])
  # The newest and its last movement; a normalisation as it was.
  for (path, first), leaf in zip(arrays, jax.tree.leaves(found), strict=True):
    if not hasattr(first, 'shape'):
      continue
    is_norm = 'norm' in jax.tree_util.keystr(path)
    np.testing.assert_allclose(leaf, first * (1.21 if is_norm else 1.32), rtol=1e-5)


def test_arrays_without_names_are_told_by_order_and_shape(tmp_path):
  """Linear, LayerNorm, a matrix and LayerNorm, a convolution, an RMSNorm, a scalar."""
  shapes = (
    (5, 3), (5,), (5,), (5,), (4, 5), (4,), (4,), (6, 2, 3, 3), (6, 1, 1), (9,), ()
  )  # fmt: skip
  with (tmp_path / 'a.eqx').open('wb') as file:
    for shape in shapes:
      np.save(file, np.ones(shape, ml_dtypes.bfloat16))
  leaves = formats.open_weights(tmp_path / 'a.eqx').leaves
  assert all(leaf.dtype == ml_dtypes.bfloat16 for leaf in leaves.values())
  found = dict.fromkeys(leaves)
  found |= find_kinds({p: f for p, f in leaves.items() if p not in ('4/weight', '9', '10')}).of
  assert found == {
    '0/weight': 'fc', '0/bias': 'bias', '2/weight': 'keep', '2/bias': 'keep', '4/weight': None,
    '5/weight': 'keep', '5/bias': 'keep', '7/weight': 'conv', '7/bias': 'bias', '9': None,
    '10': None,
  }  # fmt: skip


def test_variables_of_keras_that_are_told_by_their_layers(tmp_path):
  """By the numbers under which Keras 3.15 saves them."""
  import h5py

  layers = {
    'separable_conv2d': [(3, 3, 2, 1), (1, 1, 2, 4), (4,)],
    'depthwise_conv2d': [(3, 3, 2, 1), (2,)],
    'gru/cell': [(4, 6), (2, 6), (2, 6)],
    'multi_head_attention/query_dense': [(8, 2, 4), (2, 4)],
    'multi_head_attention/output_dense': [(2, 4, 8), (8,)],
    'layer_normalization': [(8,), (8,)],
    'position_embedding': [(9, 8)],
    'dense': [(8, 3)],
    'p_re_lu': [(4, 4, 3)],
  }
  with h5py.File(tmp_path / 'm.weights.h5', 'w') as file:
    for layer, shapes in layers.items():
      for number, shape in enumerate(shapes):
        file[f'layers/{layer}/vars/{number}'] = np.ones(shape, 'f')
  leaves = formats.open_weights(tmp_path / 'm.weights.h5').leaves
  # What may be anything stays open.
  assert 'layers/p_re_lu/vars/0' in leaves
  found = find_kinds({path: leaf for path, leaf in leaves.items() if 'p_re_lu' not in path}).of
  assert found == {
    'layers/separable_conv2d/depthwise_kernel': 'conv',
    'layers/separable_conv2d/pointwise_kernel': 'conv',
    'layers/separable_conv2d/bias': 'bias',
    'layers/depthwise_conv2d/kernel': 'conv',
    'layers/depthwise_conv2d/bias': 'bias',
    'layers/gru/cell/kernel': 'fc',
    'layers/gru/cell/recurrent_kernel': 'fc',
    'layers/gru/cell/bias': 'bias',
    'layers/multi_head_attention/query_dense/kernel': 'fc',
    'layers/multi_head_attention/query_dense/bias': 'bias',
    'layers/multi_head_attention/output_dense/kernel': 'fc',
    'layers/multi_head_attention/output_dense/bias': 'bias',
    'layers/layer_normalization/gamma': 'keep',
    'layers/layer_normalization/beta': 'keep',
    'layers/position_embedding/embeddings': 'keep',
    'layers/dense/kernel': 'fc',
  }


def test_a_kill_in_an_orbax_checkpoint_leaves_nothing_half_written(tmp_path, monkeypatch):
  history = make_history(stages=3)
  form = OrbaxStandard()
  paths = save_all(form, tmp_path, history)
  write, calls = Sink.write, 0

  def failing(self, data):
    nonlocal calls
    calls += 1
    if calls == 4:
      raise OSError(28, 'No space left on device')
    write(self, data)

  monkeypatch.setattr(Sink, 'write', failing)
  with pytest.raises(UserError, match='No space left on device'):
    run(paths, tmp_path / 'out')
  assert not list((tmp_path / 'out').rglob('_METADATA')) and not list(tmp_path.rglob('.*.tmp'))
  monkeypatch.setattr(Sink, 'write', write)
  folders = run(paths, tmp_path / 'out')
  inode = (folders[0] / '_METADATA').stat().st_ino
  (folders[1] / '_METADATA').write_text('{}')  # Damaged since: all steps are written again.
  run(paths, tmp_path / 'out')
  assert (folders[0] / '_METADATA').stat().st_ino != inode
  bare = [{p: leaf for p, leaf in stage.items() if p != 'count'} for stage in history]
  expected = know_jax.predict(bare, 2, predictor='log_fit')
  assert (
    form.load(folders[1])['dense/kernel'].tobytes()
    == np.asarray(expected['dense/kernel']).tobytes()
  )
