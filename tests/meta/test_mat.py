"""The authors' published meta-datasets: both orders of axes, and files that are not as they say."""

import sys

import h5py
import numpy as np
import pytest

from know_jax.errors import UserError
from know_jax.meta import mat
from know_jax.meta.windows import SPAN, sample_windows

NAME = 'ResNet_FashionMNIST_r0.55_lr1.2e-3_bs64.mat'


def arrays(N=5, M=7, K=4, seed=0):
  """What MATLAB shows; M = 7 looks alike in both orders of axes."""
  rng = np.random.default_rng(seed)
  shapes = {'ConvWeights': (3, 3, N, 7), 'FCWeights': (M, 7), 'Bias': (K, 7)}
  return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(path, shown, *, by_column=True, marked=True, **datasets):
  """Writes a file as MATLAB does, or as h5py does from the arrays as they are.

  `datasets` replaces a data set: an array, None (left out), or a function of (file, name).
  """
  with h5py.File(path, 'w', userblock_size=512 if marked else 0) as file:
    for name, value in (shown | datasets).items():
      if callable(value):
        value(file, name)
      elif value is not None:
        data = file.create_dataset(name, data=value.T if by_column else value)
        if marked:
          data.attrs['MATLAB_class'] = np.bytes_('single')
  if marked:
    with path.open('r+b') as file:
      file.write(b'MATLAB 7.3 MAT-file, Platform: GLNXA64'.ljust(126) + b'\x00\x02IM')
  return path


@pytest.mark.parametrize(('by_column', 'marked'), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize(('N', 'M', 'K'), [(5, 7, 4), (7, 3, 7), (3, 7, 7), (1, 1, 1)])
def test_both_orders_give_the_stages_oldest_first(tmp_path, by_column, marked, N, M, K):
  shown = arrays(N, M, K)
  path = write(tmp_path / NAME, shown, by_column=by_column, marked=marked)
  run = mat.read_mat(path, number=3)
  assert run.number == 3
  assert run.about['kinds'] == {'ConvWeights': 'conv', 'FCWeights': 'fc', 'Bias': 'bias'}
  assert set(run.weights) == set(shown)
  for name, leaf in run.weights.items():
    assert leaf.dtype == np.float32 and leaf.flags.c_contiguous
    for stage in range(7):
      np.testing.assert_array_equal(leaf[stage], shown[name][..., stage])


def test_scipy_reads_the_same_kernels_from_the_same_numbers(tmp_path):
  """MATLAB's own order by an independent reader: SciPy's of MATLAB 5 files, by column as well."""
  scipy_io = pytest.importorskip('scipy.io')
  shown = arrays()
  scipy_io.savemat(tmp_path / 'five.mat', shown)
  five = scipy_io.loadmat(tmp_path / 'five.mat')
  run = mat.read_mat(write(tmp_path / NAME, shown))
  for name, leaf in run.weights.items():
    np.testing.assert_array_equal(leaf, np.moveaxis(five[name], -1, 0))
  with pytest.raises(UserError, match=r'five\.mat: not a readable HDF5 \(MATLAB v7\.3\) file'):
    mat.read_mat(tmp_path / 'five.mat', rate=0.5)


def test_doubles_big_endian_and_compressed_are_read(tmp_path):
  shown = arrays()
  doubles = {name: leaf.astype('>f8') for name, leaf in shown.items()}

  def packed(file, name):
    file.create_dataset(name, data=shown[name].T, compression='gzip', maxshape=(7, None))

  run = mat.read_mat(write(tmp_path / NAME, doubles, Bias=packed))
  for name, leaf in run.weights.items():
    assert leaf.dtype == np.float32
    np.testing.assert_array_equal(leaf, np.moveaxis(shown[name], -1, 0))


def test_windows_are_drawn_from_a_folder(tmp_path):
  written = {}
  for seed, name in enumerate(('b_r0.5.mat', 'a_r0.4.mat', 'c_cnn_r0.6.mat')):
    written[name] = arrays(seed=seed)
    write(tmp_path / name, written[name])
  runs = list(mat.read_mat_folder(tmp_path))
  assert [(run.number, run.about['file']) for run in runs] == [
    (0, 'a_r0.4.mat'), (1, 'b_r0.5.mat'), (2, 'c_cnn_r0.6.mat'),
  ]  # fmt: skip
  assert [run.number for run in mat.read_any(tmp_path)] == [0, 1, 2]
  windows = sample_windows(runs, 50, seed=0)
  assert windows.numbers == (0, 1, 2)
  np.testing.assert_allclose([run.about['config']['rate'] for run in runs], (0.4, 0.5, 0.6))
  kinds = {'conv': 'ConvWeights', 'fc': 'FCWeights', 'bias': 'Bias'}
  for kind, name in kinds.items():
    assert windows.weights[kind].shape == (3, 50, SPAN)
    for run, drawn in zip(runs, windows.weights[kind], strict=True):
      rows = written[run.about['file']][name].reshape(-1, 7)
      possible = {row[i : i + SPAN].tobytes() for row in rows for i in (0, 1)}
      assert {window.tobytes() for window in drawn} <= possible


def test_a_folder_without_runs_and_one_of_two_sorts_are_refused(tmp_path):
  with pytest.raises(UserError, match=r'no \.mat files'):
    list(mat.read_mat_folder(tmp_path))
  with pytest.raises(UserError, match='no finished runs'):
    list(mat.read_any(tmp_path))
  write(tmp_path / 'a_r0.5.mat', arrays())
  (tmp_path / 'runs').mkdir()
  with pytest.raises(UserError, match=r'holds \.mat files and a folder `runs`'):
    mat.read_any(tmp_path)


def test_a_folder_is_described_by_its_names_and_sizes(tmp_path):
  for name in ('cnn_mnist_r0.5.mat', 'cnn_mnist_r0.6.mat', 'resnet_cifar10_r0.5.mat'):
    write(tmp_path / name, arrays())
  found = mat.describe(tmp_path, list(mat.read_any(tmp_path)))
  assert found['summary'][0] == '3 runs, from .mat files'
  assert [line.split() for line in found['summary'][1:]] == [
    ['cnn', 'mnist', '2', 'runs'], ['resnet', 'cifar10', '1', 'runs'],
  ]  # fmt: skip
  assert found['config']['files'] == 3
  assert mat.describe(tmp_path, list(mat.read_any(tmp_path))) == found
  write(tmp_path / 'cnn_mnist_r0.5.mat', arrays(N=1000))
  assert mat.describe(tmp_path, list(mat.read_any(tmp_path)))['config'] != found['config']


@pytest.mark.parametrize(
  ('name', 'rate', 'message'),
  [
    ('cnn.mat', None, 'the sampling rate is not in the name; expected one between 0 and 1'),
    ('cnn_r2.mat', None, r'the sampling rate is 2\.0; expected'),
    ('cnn_r0.5.mat', 1.0, r'the sampling rate is 1\.0; expected'),
  ],
)
def test_a_run_has_a_rate(tmp_path, name, rate, message):
  path = write(tmp_path / name, arrays())
  with pytest.raises(UserError, match=message):
    mat.read_mat(path, rate=rate)
  assert mat.read_mat(path, rate=0.25).about['config']['rate'] == 0.25


@pytest.mark.parametrize(
  ('stem', 'fields'),
  [
    (
      'ResNet_FashionMNIST_r0.55_lr1.2e-3_bs64',
      {'model': 'resnet', 'dataset': 'fashion_mnist', 'rate': 0.55, 'stage_lr': 1.2e-3,
       'batch_size': 64},
    ),
    (
      'mobilenetV2-cifar-10-rate=0.3-epochs_20-seed 7',
      {'model': 'mobilenetv2', 'dataset': 'cifar10', 'rate': 0.3, 'stage_epochs': 20, 'seed': 7},
    ),
    ('cnn_MNIST_batch_128', {'model': 'cnn', 'dataset': 'mnist', 'batch_size': 128}),
    ('ShuffleNetV2_cifar100', {'model': 'shufflenetv2', 'dataset': 'cifar100'}),
    # A name within a name, a number within a word.
    ('color0.5_lr2x_run12', {'model': 'unknown', 'dataset': 'unknown'}),
  ],
)  # fmt: skip
def test_names_tell_what_they_tell(stem, fields):
  found = mat.name_fields(stem)
  assert found == fields
  assert all(type(found[key]) is int for key in ('batch_size', 'stage_epochs') if key in found)


def soft(file, name):
  file['elsewhere'] = np.zeros((7, 4), np.float32)
  file[name] = h5py.SoftLink('/elsewhere')


def outside(file, name):
  file[name] = h5py.ExternalLink('/etc/passwd', '/data')


def raw_outside(file, name):
  file.create_dataset(name, (7, 4), 'f4', external=[('/etc/passwd', 0, 112)])


def virtual(file, name):
  layout = h5py.VirtualLayout((7, 4), 'f4')
  layout[:] = h5py.VirtualSource('/etc/passwd', 'data', (7, 4))
  file.create_virtual_dataset(name, layout)


def huge(file, name):
  file.create_dataset(name, (7, 2**60), 'f4', chunks=(1, 1024))


def huge_chunks(file, name):
  file.create_dataset(name, (7, 4), 'f4', chunks=(7, 2**25), maxshape=(7, None))


def with_nan(shape, dtype=np.float32, value=np.nan):
  found = np.zeros(shape, dtype)
  found[0, 2] = value
  return found


@pytest.mark.parametrize(
  ('value', 'message'),
  [
    (None, r'is missing\.'),
    (soft, 'is a link to elsewhere'),
    (outside, 'is a link to elsewhere'),
    (raw_outside, 'keeps its values in other files'),
    (virtual, 'keeps its values in other files'),
    (lambda file, name: file.create_group(name), 'is a group'),
    (huge, r'has shape \(7, 1152921504606846976\); expected at most 29360128 numbers'),
    (huge_chunks, r'has chunks of shape \(7, 33554432\)'),
    (lambda file, name: file.create_dataset(name, dtype='f4', shape=None), 'has no values'),
    (np.zeros((4, 7), np.int32), 'has dtype int32; expected real single or double'),
    (np.zeros((4, 7), np.float16), 'has dtype float16; expected real single or double'),
    (np.zeros((4, 7), np.complex64), 'has dtype complex64; expected real single or double'),
    (np.zeros((4, 7), 'S5'), r'has dtype \|S5; expected real single or double'),
    (np.zeros((4, 6), np.float32), r'has shape \(4, 6\) in MATLAB; expected 2 axes.* the 7 stages'),
    (np.zeros((7, 4), np.float32), r'has shape \(7, 4\) in MATLAB; expected 2 axes'),
    (np.zeros((4, 1, 7), np.float32), r'has shape \(4, 1, 7\) in MATLAB; expected 2 axes'),
    (np.zeros((0, 7), np.float32), r'has shape \(0, 7\) in MATLAB; expected 2 axes, none empty'),
    (with_nan((4, 7)), 'stage 2 .* holds NaN or infinity'),
    (with_nan((4, 7), np.float64, 1e300), 'stage 2 .* holds NaN or infinity'),
  ],
)
def test_hostile_data_sets_are_named(tmp_path, value, message):
  path = write(tmp_path / NAME, arrays(), Bias=value)
  with pytest.raises(UserError, match=rf'{NAME}: Bias: .*{message}'):
    mat.read_mat(path)


@pytest.mark.parametrize(
  ('shape', 'marked', 'message'),
  [
    ((7, 5, 3, 3), True, r'marked as MATLAB.s, which would show \(7, 5, 3, 3\)'),
    ((3, 3, 5, 6), True, r'HDF5 shows shape \(6, 5, 3, 3\); expected \(7, N, 3, 3\)'),
    ((3, 5, 5, 7), False, r'HDF5 shows shape \(7, 5, 5, 3\)'),
    ((45, 7), True, r'HDF5 shows shape \(7, 45\)'),
  ],
)
def test_kernels_of_another_shape_are_refused(tmp_path, shape, marked, message):
  path = write(tmp_path / NAME, arrays(), marked=marked, ConvWeights=np.zeros(shape, np.float32))
  with pytest.raises(UserError, match=f'{NAME}: ConvWeights: .*{message}'):
    mat.read_mat(path)


def test_damaged_files_are_named(tmp_path):
  path = write(tmp_path / NAME, arrays())
  content = path.read_bytes()
  for damaged in (b'', b'MATLAB 7.3 MAT-file', content[: len(content) // 2]):
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=f'{NAME}: not a readable HDF5'):
      mat.read_mat(path)
  with pytest.raises(UserError, match=r'none_r0.5\.mat: no such file'):
    mat.read_mat(tmp_path / 'none_r0.5.mat')


def test_without_h5py_it_says_what_to_install(tmp_path, monkeypatch):
  path = write(tmp_path / NAME, arrays())
  monkeypatch.setitem(sys.modules, 'h5py', None)
  with pytest.raises(UserError, match=r'needs h5py; pip install h5py'):
    mat.read_mat(path)
