"""Files of every format that people bring: read, or named for what they are.

References: the libraries that write the formats, and the safetensors library.
"""

import contextlib
import gzip
import importlib.util
import io
import os
import pickle
import re
import tarfile
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from complex_files import mark_complex

import know_jax
from know_jax.errors import PredictionWarning, UserError
from know_jax.io.formats import open_weights
from know_jax.nowcast import file_job, from_files


def zipped(*names):
  data = io.BytesIO()
  with zipfile.ZipFile(data, 'w') as archive:
    for name in names:
      archive.writestr(name, b'x')
  return data.getvalue()


def tarred():
  data = io.BytesIO()
  with tarfile.open(fileobj=data, mode='w') as archive:
    archive.addfile(tarfile.TarInfo('model'), io.BytesIO())
  return data.getvalue()


def array():
  data = io.BytesIO()
  np.save(data, np.zeros(3))
  return data.getvalue()


OLD_TORCH = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)


@pytest.mark.parametrize(
  ('name', 'data', 'message'),
  [
    ('m.gguf', b'GGUF\3\0\0\0' + bytes(300), 'is a GGUF file; load it by from_pretrained'),
    ('m.pt', OLD_TORCH, "is a PyTorch file in torch.save's old form; load it by torch.load"),
    ('m.pkl', pickle.dumps({'a': np.zeros(3)}), 'is a Python pickle, which may run any code and'),
    ('m.ckpt', pickle.dumps([1] * 99, 4), 'is a Python pickle'),
    ('m.npy', array(), 'is arrays of NumPy without names'),
    ('m.gz', gzip.compress(b'x'), 'is a file compressed by gzip; unpack it'),
    ('m.tar', tarred(), 'is a tar archive; unpack it'),
    ('m.zip', zipped('a.txt', 'b.txt'), 'is a zip archive of 2 files; unpack it'),
    ('s.pt', zipped('m/data.pkl', 'm/constants.pkl'), 'is a TorchScript program; save its state_'),
    ('cut.zip', zipped('a.txt')[:40], 'is a zip archive that is cut off or damaged'),
    ('m.onnx', b'\x08\x07\x12' + bytes(300), 'is an ONNX file; take the checkpoint'),
    ('m.tflite', b'\0\0\0\0TFL3', 'is a TensorFlow Lite file'),
    ('m.ckpt.index', b'\0\0\x0amodel', 'is the index of a TensorFlow checkpoint; load it in Keras'),
    ('m.safetensors', b'version https://git-lfs.github.com/spec/v1\n', 'is a pointer of Git LFS'),
    ('m.safetensors', b'', 'is empty; write it again'),
    ('page.safetensors', b'<!DOCTYPE html>', 'is a web page'),
    ('z.safetensors', zipped('a'), 'is a zip archive of 1 files'),
  ],
  # Compressed bytes hold the time of day, which names of tests must not.
  ids=lambda value: value if isinstance(value, str) else '',
)  # fmt: skip
def test_other_formats_are_named_with_the_way_on(tmp_path, name, data, message):
  (tmp_path / name).write_bytes(data)
  with pytest.raises(UserError, match=f'{re.escape(name)} {re.escape(message)}'):
    open_weights(tmp_path / name)


def test_folders_of_other_formats_are_named(tmp_path):
  (tmp_path / 'saved').mkdir()
  (tmp_path / 'saved' / 'saved_model.pb').write_bytes(b'\x08\1')
  with pytest.raises(UserError, match='saved is a TensorFlow SavedModel; load it in Keras'):
    open_weights(tmp_path / 'saved')
  (tmp_path / 'tf').mkdir()
  for name in ('checkpoint', 'model.index', 'model.data-00000-of-00001'):
    (tmp_path / 'tf' / name).write_bytes(b'\0\0')
  with pytest.raises(UserError, match='tf is a TensorFlow checkpoint; load it in Keras'):
    open_weights(tmp_path / 'tf')
  (tmp_path / 'llama').mkdir()
  (tmp_path / 'llama' / 'config.json').write_text('{}')
  (tmp_path / 'llama' / 'm.gguf').write_bytes(b'GGUF' + bytes(99))
  with pytest.raises(UserError, match=r'llama holds no weights that are read: m.gguf is a GGUF'):
    open_weights(tmp_path / 'llama')


def test_a_header_whose_length_reads_like_a_pickle_is_no_pickle(tmp_path):
  # 0x0280 bytes begin with b'\x80\x02', as a pickle of protocol 2.
  path = tmp_path / 'a'
  safetensors.numpy.save_file({'a': np.arange(3)}, path, {'note': 'x' * (640 - 96)})
  data = path.read_bytes()
  length = int.from_bytes(data[:8], 'little')
  header = data[8 : 8 + length].rstrip().ljust(0x280)
  path.write_bytes((0x280).to_bytes(8, 'little') + header + data[8 + length :])
  assert path.read_bytes()[:2] == b'\x80\x02'
  assert open_weights(path).leaves['a'].shape == (3,)


@pytest.mark.parametrize(
  'dtype',
  [
    ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.bfloat16, np.complex64, np.uint16,
    np.int64, np.bool_, np.float16, np.uint64,
  ],
)  # fmt: skip
def test_all_dtypes_of_safetensors_are_read(tmp_path, dtype):
  values = (np.arange(12).reshape(3, 4) % 7).astype(dtype)
  is_complex = values.dtype == np.complex64
  stored = values.view(np.float32) if is_complex else values
  safetensors.numpy.save_file({'x': stored}, tmp_path / 'a.safetensors')
  if is_complex:
    mark_complex(tmp_path / 'a.safetensors', 'x')
  leaf = open_weights(tmp_path / 'a.safetensors').leaves['x']
  assert (leaf.dtype, leaf.shape) == (values.dtype, (3, 4))
  with leaf.open(tmp_path) as reader:
    assert reader.read(2, 9).tobytes() == values.reshape(-1)[2:9].tobytes()


# --- hostile files --------------------------------------------------------------------------------


class Bomb:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


def torch_like(path, data):
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('archive/data.pkl', pickle.dumps(data, 2))
    archive.writestr('archive/byteorder', 'little')
    archive.writestr('archive/version', '3\n')


def test_pickle_bombs_do_not_go_off(tmp_path):
  torch_like(tmp_path / 'bomb.pt', {'a': Bomb(tmp_path / 'boom')})
  has_torch = importlib.util.find_spec('torch') is not None
  message = (
    'not a PyTorch file of tensors and plain' if has_torch else 'pip install .know_jax.torch'
  )
  with pytest.raises(UserError, match=message) as error:
    open_weights(tmp_path / 'bomb.pt')
  assert '\n' not in str(error.value)
  np.savez(tmp_path / 'bomb.npz', a=np.array([Bomb(tmp_path / 'boom')], object))
  with pytest.raises(UserError, match=r"bomb.npz: array 'a' holds Python objects"):
    open_weights(tmp_path / 'bomb.npz')
  for suffix, before in (('eqx', b''), ('more', array())):
    with (tmp_path / f'bomb.{suffix}').open('wb') as file:
      file.write(before)
      np.save(file, np.array([Bomb(tmp_path / 'boom')], object))
    with pytest.raises(UserError, match=rf'bomb.{suffix}: array . holds Python objects'):
      open_weights(tmp_path / f'bomb.{suffix}')
  import h5py

  with h5py.File(tmp_path / 'bomb.h5', 'w') as file:
    file['layers/dense/vars/0'] = np.void(pickle.dumps(Bomb(tmp_path / 'boom')))
    file['kernel'] = np.ones((2, 2))
  assert open_weights(tmp_path / 'bomb.h5').leaves['kernel'].shape == (2, 2)
  (tmp_path / 'bomb.bin').write_bytes(pickle.dumps(Bomb(tmp_path / 'boom')))
  with pytest.raises(UserError, match='is a Python pickle, which may run any code and is never op'):
    open_weights(tmp_path / 'bomb.bin')
  assert not (tmp_path / 'boom').exists()


def good(name, path):
  rng = np.random.default_rng(0)
  tree = {'a': {'kernel': rng.normal(size=(5, 4)).astype('f'), 'bias': np.ones(4, 'f')}, 'n': 3}
  if name == 'npz':
    np.savez(path, **tree['a'])
  elif name == 'packed npz':
    np.savez_compressed(path, **tree['a'])
  elif name == 'msgpack':
    import flax.serialization

    path.write_bytes(flax.serialization.to_bytes(tree))
  elif name == 'eqx':
    with path.open('wb') as file:
      for leaf in tree['a'].values():
        np.save(file, leaf)
  elif name in ('h5', 'keras'):
    import h5py

    data = io.BytesIO()
    with h5py.File(data, 'w') as file:
      for key, leaf in tree['a'].items():
        file[f'layers/dense/{key}'] = leaf
    path.write_bytes(data.getvalue())
    if name == 'keras':
      with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('config.json', '{}')
        archive.writestr('model.weights.h5', data.getvalue())
  elif name == 'torch':
    torch = pytest.importorskip('torch')
    torch.save({name: torch.from_numpy(leaf) for name, leaf in tree['a'].items()}, path)


@pytest.mark.parametrize('name', ['npz', 'packed npz', 'eqx', 'msgpack', 'h5', 'keras', 'torch'])
def test_cut_off_and_altered_files_are_refused_in_one_line_or_read(tmp_path, name):
  path = tmp_path / 'good'
  with (tmp_path / 'written').open('wb') as file:
    good(name, file if 'npz' in name else tmp_path / 'written')
  (tmp_path / 'written').rename(path)
  data = path.read_bytes()
  assert open_weights(path).leaves

  def outcome(changed):
    path.write_bytes(changed)
    try:
      for leaf in open_weights(path).leaves.values():
        with leaf.open(tmp_path) as reader:
          reader.read(0, leaf.size)
    except UserError as error:
      assert '\n' not in str(error), error
      assert str(path) in str(error)
      return 'refused'
    return 'read'

  # The last bytes of an archive are its comment's length.
  # Each file of HDF5 takes a process.
  for cut in range(
    1, len(data) - 2, max(1, len(data) // (60 if name not in ('h5', 'keras') else 2))
  ):
    assert outcome(data[:cut]) == 'refused', cut
  rng = np.random.default_rng(0)
  for _ in range({'torch': 20, 'h5': 3, 'keras': 3}.get(name, 150)):
    changed = bytearray(data)
    for _ in range(rng.integers(1, 4)):
      changed[rng.integers(len(data))] = rng.integers(256)
    outcome(bytes(changed))


def test_an_array_of_msgpack_in_pieces_is_named(tmp_path, monkeypatch):
  import flax.serialization

  monkeypatch.setattr(flax.serialization, 'MAX_CHUNK_SIZE', 64)
  tree = {'a': {'kernel': np.zeros((10, 10), np.float32)}}
  (tmp_path / 'm').write_bytes(flax.serialization.to_bytes(tree))
  with pytest.raises(UserError, match=r"array 'a/kernel' is in several pieces, as Flax"):
    open_weights(tmp_path / 'm')
  # 1,000 maps in each other.
  (tmp_path / 'deep').write_bytes(b'\x81\xa1a' * 1000 + b'\xc0')
  with pytest.raises(UserError, match='nested too deep'):
    open_weights(tmp_path / 'deep')


@pytest.mark.parametrize(
  'save', [np.savez, np.savez_compressed, None], ids=['npz', 'packed', 'eqx']
)
def test_arrays_in_fortran_s_order_are_predicted_as_in_memory(tmp_path, save):
  """NumPy writes a transposed array in it; stages may differ in it."""
  rng = np.random.default_rng(0)
  shapes = {'layers/kernel': (4, 3, 5, 6), 'square/kernel': (8, 8), 'square/bias': (8,)}
  history = [
    {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for _ in range(3)
  ]
  files = []
  for number, stage in enumerate(history):
    files.append(tmp_path / f'{number}.{"npz" if save else "eqx"}')
    orders = 'FCF' if number != 1 else 'CFC'
    arrays = {k: np.array(x, order=o) for (k, x), o in zip(stage.items(), orders, strict=True)}
    with files[-1].open('wb') as file:
      if save is not None:
        save(file, **arrays)
      for array in arrays.values() if save is None else ():
        np.save(file, array)
  rules = {'layers' if save else '0/weight': 'conv'}
  with contextlib.nullcontext() if save else pytest.warns(PredictionWarning, match='no names'):
    job = file_job.prepare(files, predictors=['tsv', 'task_vector'], steps=1, kinds=rules)
  for folder in from_files.write(job, tmp_path / 'out', show_progress=False):
    written = folder / files[-1].name
    result = open_weights(written if written.exists() else folder)
    # Layouts go by names: those of the file, where there are others.
    names = shapes if save else ['0/weight', '1/weight', '1/bias']
    named = [dict(zip(names, stage.values(), strict=True)) for stage in history]
    expected = know_jax.predict(named, predictor=folder.parent.name, kinds=rules)
    for name, leaf in result.leaves.items():
      array = expected[name.replace('.', '/')]
      with leaf.open(tmp_path) as reader:
        found = reader.read(0, array.size).reshape(leaf.shape)
      np.testing.assert_allclose(found, array, rtol=1e-4, atol=1e-5)
    if written.exists() and save is not None:
      for name, array in np.load(written).items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-5)


def test_orders_and_dtypes_of_npz(tmp_path):
  values = np.arange(12, dtype=np.float32).reshape(3, 4)
  np.savez(tmp_path / 'a.npz', f=np.asfortranarray(values), b=values.astype(ml_dtypes.bfloat16))
  weights = open_weights(tmp_path / 'a.npz')
  found = {}
  for path, leaf in weights.leaves.items():
    with leaf.open(tmp_path) as reader:
      found[path] = reader.read(0, 12).reshape(leaf.shape)
  np.testing.assert_array_equal(found['f'], values)
  assert found['b'].dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(found['b'], values)
  assert 'as bfloat16 has: taken for that' in weights.notes[0]
