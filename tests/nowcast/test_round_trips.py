"""Five stages of every format, written by its own library: what is predicted, the library loads.

References: `know_jax.forecast` for the numbers, and the libraries, which load strictly. What needs
PyTorch or Keras runs where they are installed.
"""

import json

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from runs import snapshot

import know_jax
from know_jax.nowcast import from_files

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


FORMATS = (SafetensorsFile(), HuggingFaceFolder(), Npz(), FlaxMsgpack(), TorchFile())


def run(history, output, **options):
  options = {'predictors': ['log_fit'], 'steps': 2, **options}
  return from_files.write(from_files.prepare(history, **options), output, show_progress=False)


def save_all(form, folder, history):
  paths = []
  for number, stage in enumerate(history):
    (folder / str(number)).mkdir(parents=True)
    paths.append(folder / str(number) / form.name)
    form.save(paths[-1], stage)
  return paths


def place(folder, form):
  return folder if (folder / 'config.json').exists() else folder / form.name


@pytest.mark.parametrize('form', FORMATS, ids=lambda form: type(form).__name__)
def test_what_comes_out_is_the_newest_checkpoint_with_its_weights_replaced(tmp_path, form):
  history = make_history()
  paths = save_all(form, tmp_path, history)
  folders = run(paths, tmp_path / 'out', kinds=getattr(form, 'kinds', None))
  bare = [{p: leaf for p, leaf in stage.items() if p != 'count'} for stage in history]
  for folder, expected in zip(
    folders, know_jax.forecast(bare, 2, predictor='log_fit'), strict=True
  ):
    found = form.load(place(folder, form))
    assert found.keys() == history[-1].keys()
    assert (found['count'].dtype, int(found['count'])) == (np.int64, 2**40 + 4)
    for path, leaf in expected.items():
      assert found[path].dtype == np.float32 and found[path].shape == SHAPES[path]
      np.testing.assert_array_equal(found[path], np.asarray(leaf), err_msg=path)
    assert not np.array_equal(found['dense/kernel'], history[-1]['dense/kernel'])
  # The same call once more finds all as it was.
  before = snapshot(tmp_path / 'out')
  run(paths, tmp_path / 'out', kinds=getattr(form, 'kinds', None))
  assert snapshot(tmp_path / 'out') == before
