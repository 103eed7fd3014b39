import hashlib
import importlib.util
import io
import json
import shutil
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from real_data import cache_dir, packed, prepared_data_dir

import know_jax
from know_jax.data import digits, sources
from know_jax.data.sources import load_dataset, mean_image, to_device_input
from know_jax.errors import UserError

REAL = {
  'mnist': ((28, 28, 1), 60_000, 10),
  'fashion_mnist': ((28, 28, 1), 60_000, 10),
  'cifar10': ((32, 32, 3), 50_000, 10),
  'cifar100': ((32, 32, 3), 50_000, 100),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
  """No test reads or writes the user's cache, or what another test left in this process."""
  monkeypatch.setenv('KNOW_JAX_CACHE', str(tmp_path / 'cache'))
  sources._load_prepared.cache_clear()
  yield
  sources._load_prepared.cache_clear()


def encoded(image, encoding='PNG'):
  buffer = io.BytesIO()
  image = np.asarray(image)
  Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, encoding)
  return buffer.getvalue()


def prepare(
  data_dir,
  splits,
  *,
  name='tiny',
  version='1.0.0',
  shape=(None, None, 3),
  features=None,
  supervised_keys=('image', 'label'),
  class_names=('ant', 'bee', 'cat', 'dog'),
):
  """Writes a TFDS data set as array_record, without TensorFlow; `splits`: name -> examples."""
  features = features or {
    'image': tfds.features.Image(shape=shape),
    'label': tfds.features.ClassLabel(names=class_names),
  }
  methods = {
    'name': name,
    'VERSION': tfds.core.Version(version),
    '_info': lambda self: tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(features),
      supervised_keys=supervised_keys,
      description='Made for a test.',
    ),
    '_split_generators': lambda self, _: {split: enumerate(splits[split]) for split in splits},
    '_generate_examples': lambda self: None,
    '__module__': __name__,
  }
  kind = type('Tiny', (tfds.core.GeneratorBasedBuilder,), methods, skip_registration=True)
  tfds.disable_progress_bar()
  kind(data_dir=data_dir, file_format='array_record').download_and_prepare()
  return data_dir / name / version


def some_examples(count=6, sides=(5, 7), channels=3, num_classes=4, seed=0):
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, (count, *sides, channels), np.uint8)
  labels = np.arange(count) % num_classes
  return images, [
    {'image': encoded(image), 'label': int(label)}
    for image, label in zip(images, labels, strict=True)
  ]


# --- real data -------------------------------------------------------------------------------


@pytest.mark.parametrize('name', REAL)
def test_real_data_sets_load_as_they_were_packed(name, monkeypatch):
  data_dir = prepared_data_dir([name])
  # Kept, since decoding 60,000 images takes long; the cache itself is tested below.
  monkeypatch.setenv('KNOW_JAX_CACHE', str(cache_dir() / 'decoded'))
  shape, train_size, num_classes = REAL[name]
  script = packed()
  info = json.loads((script.DATA / name / 'info.json').read_text())
  for split, size in (('train', train_size), ('test', 10_000)):
    found = load_dataset(name, split, data_dir=data_dir)
    assert found.images.shape == (size, *shape)
    assert found.images.dtype == np.uint8
    assert found.labels.dtype == np.int32
    assert found.num_classes == num_classes
    assert list(found.class_names) == info['classes']
    packed_labels = np.load(script.DATA / name / f'{split}_labels.npy')
    # TFDS shuffles examples when it writes them.
    np.testing.assert_array_equal(np.bincount(found.labels), np.bincount(packed_labels))
    if split == 'test':
      images, labels = script.load(name, split)
      if 'psnr_db' in info[split]:
        _assert_same_but_for_the_decoder(found.images, found.labels, images, labels)
      else:
        np.testing.assert_array_equal(_hashes(found.images, found.labels), _hashes(images, labels))


def _hashes(images, labels):
  return sorted(
    hashlib.sha256(image.tobytes() + bytes([label])).digest()
    for image, label in zip(images, labels.tolist(), strict=True)
  )


def _assert_same_but_for_the_decoder(images, labels, other_images, other_labels):
  """The same examples in any order; two versions of a lossy decoder may differ by one level.

  The data directory is shared by environments with other versions of the decoder: imagecodecs
  2024.9.22 and 2026.3.6 decode one pixel of the 10,000 test images of CIFAR-100 differently.
  """
  for label in np.unique(other_labels):
    mine = images[labels == label].astype(np.int16)
    left = list(other_images[other_labels == label].astype(np.int16))
    assert len(mine) == len(left)
    for image in mine:
      worst = [np.abs(image - other).max() for other in left]
      assert min(worst) <= 1
      left.pop(int(np.argmin(worst)))  # each partner once


# --- the embedded digits ---------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn():
  from sklearn.datasets import load_digits

  raw = load_digits()
  train, test = load_dataset('digits', 'train'), load_dataset('digits', 'test')
  assert train.images.shape == (1442, 8, 8, 1)
  assert test.images.shape == (355, 8, 8, 1)
  assert train.class_names == tuple('0123456789')
  both = np.concatenate([train.images, test.images])
  assert both.dtype == np.uint8
  assert both.max() == 255
  expected = np.rint(raw.images.astype(np.float64) / 16 * 255).astype(np.uint8)[..., None]
  labels = np.concatenate([train.labels, test.labels])
  np.testing.assert_array_equal(_hashes(both, labels), _hashes(expected, raw.target))


def test_digits_are_asked_of_scikit_learn_where_their_file_is_not_found(monkeypatch):
  expected = load_dataset('digits', 'test')
  monkeypatch.setattr(digits, '_FILE', ('elsewhere',))
  images, labels, _ = digits.load_digits.__wrapped__('test')
  np.testing.assert_array_equal(images, expected.images)
  np.testing.assert_array_equal(labels, expected.labels)


def test_the_split_of_the_digits_is_stratified_and_fixed():
  train, test = load_dataset('digits', 'train'), load_dataset('digits', 'test')
  counts = np.bincount(train.labels) + np.bincount(test.labels)
  np.testing.assert_array_equal(np.bincount(test.labels), counts // 5)
  # Written down once: results on other machines are for the same split.
  digest = hashlib.sha256(test.images.tobytes() + test.labels.astype('<i4').tobytes()).hexdigest()
  assert digest.startswith('3f53dde2e1e7e8a5')


def test_digits_resized():
  small = load_dataset('digits', 'test')
  large = load_dataset('digits', 'test', image_size=(16, 12))
  assert large.images.shape == (355, 16, 12, 1)
  expected = Image.fromarray(small.images[3, ..., 0]).resize((12, 16), Image.Resampling.BILINEAR)
  np.testing.assert_array_equal(large.images[3, ..., 0], expected)


def test_classes_are_kept_in_the_order_given():
  whole = load_dataset('digits', 'test')
  some = load_dataset('digits', 'test', classes=(7, 2))
  assert some.class_names == ('7', '2')
  assert some.num_classes == 2
  assert some.labels.dtype == np.int32
  keep = np.isin(whole.labels, (7, 2))
  np.testing.assert_array_equal(some.images, whole.images[keep])
  np.testing.assert_array_equal(np.array([7, 2])[some.labels], whole.labels[keep])


def test_arrays_cannot_be_changed_by_accident():
  for classes in ((), (1, 2)):
    found = load_dataset('digits', 'train', classes=classes)
    with pytest.raises(ValueError, match='read-only'):
      found.images[0] = 0
    with pytest.raises(ValueError, match='read-only'):
      found.labels[0] = 0


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'split': 'tests'}, "unknown split of 'digits' 'tests'. Did you mean 'test'"),
    ({'classes': (3, 10)}, 'classes hold 10; .* labels 0 to 9'),
    ({'classes': (-1,)}, 'classes hold -1'),
    ({'classes': (3, 3)}, 'classes hold 3 more than once'),
    ({'classes': ('3',)}, "classes hold '3'; expected labels"),
    ({'image_size': (8,)}, r'image_size is \(8,\)'),
    ({'image_size': (8, 0)}, r'image_size is \(8, 0\)'),
  ],
)
def test_bad_arguments(arguments, message):
  with pytest.raises(UserError, match=message):
    load_dataset('digits', **{'split': 'test', **arguments})


@pytest.mark.parametrize(
  ('gives', 'message'),
  [
    ((np.zeros((2, 3, 3, 1)), [0, 1], 'ab'), r'images of shape \(2, 3, 3, 1\) and dtype float64'),
    ((np.zeros((2, 3, 3), np.uint8), [0, 1], 'ab'), r'expected uint8 \[N, H, W, C\]'),
    ((np.zeros((2, 3, 3, 1), np.uint8), [0, 2], 'ab'), 'whole numbers from 0 to 1, one for each'),
    ((np.zeros((2, 3, 3, 1), np.uint8), [0], 'ab'), r'expected \[2\] whole numbers'),
    (3, "gave <class 'int'>; expected images, labels and class names"),
  ],
)
def test_a_function_of_the_users_gives_images_labels_and_names(monkeypatch, gives, message):
  monkeypatch.setattr(know_jax, 'some_data', lambda split, size: gives, raising=False)
  with pytest.raises(UserError, match=message):
    load_dataset('know_jax:some_data', 'train')


# --- TFDS data sets --------------------------------------------------------------------------


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_any_image_classification_set_loads_by_name(tmp_path, channels):
  images, examples = some_examples(channels=channels)
  prepare(tmp_path, {'train': examples, 'validation': examples[:2]}, shape=(5, 7, channels))
  found = load_dataset('tiny', 'train', data_dir=tmp_path)
  assert found.class_names == ('ant', 'bee', 'cat', 'dog')
  np.testing.assert_array_equal(
    _hashes(found.images, found.labels), _hashes(images, np.arange(6) % 4)
  )
  assert len(load_dataset('tiny', 'validation', data_dir=tmp_path).labels) == 2


def test_features_of_other_names_are_found(tmp_path):
  # As in CIFAR-100: more than one label, told apart by the supervised keys.
  images, examples = some_examples(count=3)
  features = {
    'picture': tfds.features.Image(shape=(5, 7, 3)),
    'coarse': tfds.features.ClassLabel(num_classes=2),
    'fine': tfds.features.ClassLabel(num_classes=100),
    'id': tfds.features.Text(),
  }
  renamed = [
    {'picture': example['image'], 'coarse': 0, 'fine': 97 + i, 'id': f'example {i}'}
    for i, example in enumerate(examples)
  ]
  prepare(tmp_path, {'train': renamed}, features=features, supervised_keys=('picture', 'fine'))
  found = load_dataset('tiny', 'train', data_dir=tmp_path)
  assert found.num_classes == 100
  np.testing.assert_array_equal(
    _hashes(found.images, found.labels), _hashes(images, np.array([97, 98, 99]))
  )
  # Without supervised keys the one image and the one label are taken.
  features.pop('coarse')
  for example in renamed:
    example.pop('coarse')
  prepare(tmp_path, {'train': renamed}, name='keyless', features=features, supervised_keys=None)
  again = load_dataset('keyless', 'train', data_dir=tmp_path)
  np.testing.assert_array_equal(
    _hashes(again.images, again.labels), _hashes(found.images, found.labels)
  )


def test_images_of_differing_sizes_need_a_size(tmp_path):
  one, _ = some_examples(count=1, sides=(6, 9))
  two, _ = some_examples(count=1, sides=(4, 4))
  examples = [{'image': encoded(image[0]), 'label': 0} for image in (one, two)]
  prepare(tmp_path, {'train': examples})
  with pytest.raises(
    UserError, match=r'images of tiny/train differ in size: .* image_size=\(H, W\)'
  ):
    load_dataset('tiny', 'train', data_dir=tmp_path)
  found = load_dataset('tiny', 'train', data_dir=tmp_path, image_size=(3, 5))
  expected = [
    np.asarray(Image.fromarray(image[0]).resize((5, 3), Image.Resampling.BILINEAR))
    for image in (one, two)
  ]
  np.testing.assert_array_equal(
    _hashes(found.images, found.labels), _hashes(np.stack(expected), np.zeros(2, int))
  )


def test_grey_images_in_a_colour_set_become_colour(tmp_path):
  grey = np.arange(35, dtype=np.uint8).reshape(5, 7, 1)
  prepare(tmp_path, {'train': [{'image': encoded(grey), 'label': 1}]}, shape=(None, None, 3))
  found = load_dataset('tiny', 'train', data_dir=tmp_path)
  np.testing.assert_array_equal(found.images[0], np.repeat(grey, 3, axis=-1))


def test_the_newest_version_or_the_one_named(tmp_path):
  for version, count in (('2.0.0', 2), ('10.0.0', 3)):
    prepare(tmp_path, {'train': some_examples(count)[1]}, version=version)
  assert len(load_dataset('tiny', 'train', data_dir=tmp_path).labels) == 3
  assert len(load_dataset('tiny:2.0.0', 'train', data_dir=tmp_path).labels) == 2
  with pytest.raises(UserError, match=r'in version 10.0.0, 2.0.0; expected 3.0.0'):
    load_dataset('tiny:3.0.0', 'train', data_dir=tmp_path)


def test_configurations_are_named_by_a_slash(tmp_path):
  folder = prepare(tmp_path, {'train': some_examples()[1]})
  (tmp_path / 'many').mkdir()
  shutil.copytree(folder.parent, tmp_path / 'many' / 'small')
  assert len(load_dataset('many', 'train', data_dir=tmp_path).labels) == 6
  shutil.copytree(folder.parent, tmp_path / 'many' / 'large')
  assert len(load_dataset('many/large:1.0.0', 'train', data_dir=tmp_path).labels) == 6
  with pytest.raises(
    UserError, match="2 configurations; expected one of 'many/large', 'many/small'"
  ):
    load_dataset('many', 'train', data_dir=tmp_path)


def test_the_data_directory_of_tfds_is_the_default(tmp_path, monkeypatch):
  prepare(tmp_path, {'train': some_examples()[1]})
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  assert len(load_dataset('tiny', 'train').labels) == 6
  monkeypatch.delenv('TFDS_DATA_DIR')
  monkeypatch.setenv('HOME', str(tmp_path))
  with pytest.raises(UserError, match=str(tmp_path / 'tensorflow_datasets')):
    load_dataset('tiny', 'train')


def test_unknown_names_come_with_the_nearest_ones(tmp_path):
  prepare(tmp_path, {'train': some_examples()[1]})
  with pytest.raises(
    UserError, match=r"unknown data set 'tinny'. Did you mean 'tiny'\? Known: digits"
  ):
    load_dataset('tinny', 'train', data_dir=tmp_path)
  with pytest.raises(UserError, match=r"TFDS also offers 'cifar10'.*tfds build cifar10"):
    load_dataset('cifar_10', 'train', data_dir=tmp_path)
  with pytest.raises(UserError, match="unknown data set 'a b'"):
    load_dataset('a b', 'train', data_dir=tmp_path)
  with pytest.raises(UserError, match=r"split of 'tiny' 'trian'. Did you mean 'train'"):
    load_dataset('tiny', 'trian', data_dir=tmp_path)


def test_parts_of_splits_are_joined_in_their_order(tmp_path):
  prepare(tmp_path, {'art': some_examples(10)[1], 'photo': some_examples(5, seed=1)[1]})
  options = {'data_dir': tmp_path}
  whole = [load_dataset('tiny', split, **options) for split in ('art', 'photo')]
  (art, photo), labels = [part.images for part in whole], [part.labels for part in whole]
  train = load_dataset('tiny', 'art[:80%]+photo[:80%]', **options)
  test = load_dataset('tiny', 'art[80%:]+photo[80%:]', **options)
  np.testing.assert_array_equal(train.images, np.concatenate([art[:8], photo[:4]]))
  np.testing.assert_array_equal(test.images, np.concatenate([art[8:], photo[4:]]))
  np.testing.assert_array_equal(test.labels, np.concatenate([labels[0][8:], labels[1][4:]]))
  for split in ('art+foto', 'art[:80%', 'art[:80%]+'):
    with pytest.raises(UserError, match=r"unknown split of 'tiny'.*Known: art, photo"):
      load_dataset('tiny', split, **options)


@pytest.mark.parametrize('installed', [False, True])
def test_a_set_that_is_not_prepared_says_how_to_prepare_it(tmp_path, monkeypatch, installed):
  found = object() if installed else None
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: found)
  with pytest.raises(UserError) as error:
    load_dataset('mnist', 'train', data_dir=tmp_path)
  message = str(error.value)
  assert f"'mnist' is not prepared in {tmp_path}" in message
  assert f'tfds build mnist --file_format=array_record --data_dir={tmp_path}' in message
  assert ('pip install tensorflow' in message) != installed


def test_an_unfinished_preparation_is_not_taken_for_data(tmp_path):
  folder = prepare(tmp_path, {'train': some_examples()[1]}, name='mnist')
  folder.rename(folder.with_name('1.0.0.incompleteABCDEF'))
  with pytest.raises(UserError, match="'mnist' is not prepared"):
    load_dataset('mnist', 'train', data_dir=tmp_path)


def test_a_set_in_another_format_is_refused(tmp_path):
  folder = prepare(tmp_path, {'train': some_examples()[1]})
  info = folder / 'dataset_info.json'
  text = info.read_text()
  assert '"fileFormat": "array_record"' in text
  info.write_text(text.replace('"fileFormat": "array_record"', '"fileFormat": "tfrecord"'))
  with pytest.raises(
    UserError, match=r'stored as tfrecord.* expected array_record\. Prepare it anew'
  ):
    load_dataset('tiny', 'train', data_dir=tmp_path)


def test_other_kinds_of_data_are_refused(tmp_path):
  label = tfds.features.ClassLabel(num_classes=4)
  prepare(
    tmp_path,
    {'train': [{'text': 'a', 'label': 0}]},
    features={'text': tfds.features.Text(), 'label': label},
    supervised_keys=('text', 'label'),
  )
  with pytest.raises(
    UserError, match=r'not one for image classification.* label \(ClassLabel\), text \(Text\)'
  ):
    load_dataset('tiny', 'train', data_dir=tmp_path)
  prepare(
    tmp_path,
    {'train': [{'image': b'', 'label': 0}]},
    name='deep',
    features={'image': tfds.features.Image(shape=(2, 2, 1), dtype=np.uint16), 'label': label},
  )
  with pytest.raises(UserError, match="'image' of data set 'deep' holds images of uint16"):
    load_dataset('deep', 'train', data_dir=tmp_path)


def test_damaged_data_are_refused(tmp_path):
  folder = prepare(tmp_path, {'train': some_examples()[1], 'test': [{'image': b'x', 'label': 0}]})
  with pytest.raises(UserError, match='example 0 of tiny/test is no image'):
    load_dataset('tiny', 'test', data_dir=tmp_path)
  next(folder.glob('*train*')).unlink()
  with pytest.raises(UserError, match=r"'tiny' in .* is not complete"):
    load_dataset('tiny', 'train', data_dir=tmp_path)


def test_a_split_without_labels_is_refused(tmp_path):
  _, examples = some_examples(count=2)
  prepare(tmp_path, {'test': [{**example, 'label': -1} for example in examples]})
  with pytest.raises(UserError, match='tiny/test has 2 examples, 2 of them without a label'):
    load_dataset('tiny', 'test', data_dir=tmp_path)


# --- the cache -------------------------------------------------------------------------------


def counted_decoding(monkeypatch):
  calls = []
  decode = sources._decode
  monkeypatch.setattr(sources, '_decode', lambda *args: calls.append(args) or decode(*args))
  return calls


def test_images_are_decoded_once_a_process_and_once_a_machine(tmp_path, monkeypatch):
  calls = counted_decoding(monkeypatch)
  prepare(tmp_path, {'train': some_examples()[1]})
  first = load_dataset('tiny', 'train', data_dir=tmp_path)
  assert load_dataset('tiny', 'train', data_dir=tmp_path).images is first.images
  sources._load_prepared.cache_clear()  # As in a new process.
  again = load_dataset('tiny', 'train', data_dir=tmp_path)
  assert len(calls) == 1
  assert again.images is not first.images
  np.testing.assert_array_equal(again.images, first.images)
  np.testing.assert_array_equal(again.labels, first.labels)
  with pytest.raises(ValueError, match='read-only'):
    again.images[0] = 0


def test_the_cache_cannot_go_stale(tmp_path, monkeypatch):
  calls = counted_decoding(monkeypatch)
  load = lambda **kwargs: load_dataset('tiny', 'train', data_dir=tmp_path, **kwargs)  # noqa: E731
  images, examples = some_examples()
  folder = prepare(tmp_path, {'train': examples})
  load()
  load(image_size=(3, 3))
  assert len(calls) == 2
  # The same name, version, sizes and labels, other pixels.
  shutil.rmtree(folder)
  prepare(
    tmp_path,
    {
      'train': [
        {**example, 'image': encoded(255 - image)}
        for example, image in zip(examples, images, strict=True)
      ]
    },
  )
  sources._load_prepared.cache_clear()
  np.testing.assert_array_equal(
    _hashes(load().images, load().labels), _hashes(255 - images, np.arange(6) % 4)
  )
  assert len(calls) == 3


def test_a_damaged_cache_is_noticed_and_mended(tmp_path, monkeypatch):
  calls = counted_decoding(monkeypatch)
  prepare(tmp_path, {'train': some_examples()[1]})
  first = load_dataset('tiny', 'train', data_dir=tmp_path)
  (path,) = (tmp_path / 'cache').glob('*.images')
  whole = path.read_bytes()
  rng = np.random.default_rng(0)
  damages = [whole[: len(whole) // 2], b'']
  for place in rng.integers(0, len(whole), 20):
    damages.append(
      whole[:place] + bytes([whole[place] ^ (1 << rng.integers(8))]) + whole[place + 1 :]
    )
  for damaged in damages:
    path.write_bytes(damaged)
    sources._load_prepared.cache_clear()
    with pytest.warns(UserWarning, match='is damaged; decoding anew'):
      again = load_dataset('tiny', 'train', data_dir=tmp_path)
    np.testing.assert_array_equal(again.images, first.images)
    assert path.read_bytes() == whole
  assert len(calls) == 1 + len(damages)


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
  prepare(tmp_path, {'train': some_examples()[1]})
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('KNOW_JAX_CACHE', str(tmp_path / 'file' / 'cache'))
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    assert len(load_dataset('tiny', 'train', data_dir=tmp_path).labels) == 6
  assert any('cannot keep decoded images' in str(warning.message) for warning in caught)


# --- what comes out on screen, and what is imported ------------------------------------------


def test_reading_prints_nothing_and_needs_no_tensorflow(tmp_path):
  prepare(tmp_path, {'train': some_examples()[1]})
  code = (
    'import sys, know_jax, know_jax.data.sources\n'
    "assert 'tensorflow_datasets' not in sys.modules\n"
    f"found = know_jax.data.sources.load_dataset('tiny', 'train', data_dir={str(tmp_path)!r})\n"
    "assert len(found.labels) == 6 and 'tensorflow' not in sys.modules\n"
  )
  run = subprocess.run(
    [sys.executable, '-W', 'error', '-c', code], capture_output=True, text=True, check=False
  )
  assert (run.returncode, run.stdout, run.stderr) == (0, '', '')


def test_a_long_decoding_shows_its_progress(tmp_path, monkeypatch, capsys):
  import tqdm

  bar = tqdm.tqdm
  monkeypatch.setattr(tqdm, 'tqdm', lambda **kwargs: bar(**{**kwargs, 'delay': 0}))
  prepare(tmp_path, {'train': some_examples()[1]})
  load_dataset('tiny', 'train', data_dir=tmp_path)
  assert 'decoding tiny/train: 100%' in capsys.readouterr().err


# --- inputs of the networks ------------------------------------------------------------------


def test_mean_image_and_input():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (300, 4, 5, 3), np.uint8)
  mean = mean_image(images)
  assert mean.dtype == np.float32
  expected = (images.astype(np.float64) / 255).mean(axis=0)
  np.testing.assert_allclose(mean, expected, rtol=1e-7, atol=1e-7)
  found = jax.jit(to_device_input)(jnp.asarray(images), jnp.asarray(mean))
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, images.astype(np.float64) / 255 - expected, atol=3e-7)


def test_mean_image_of_many_images_does_not_drift():
  # In float32 a running sum of 200,000 values of 255 would have stopped being exact.
  images = np.full((200_000, 1, 1, 1), 255, np.uint8)
  images[0] = 0
  np.testing.assert_allclose(mean_image(images)[0, 0, 0], 1 - 1 / 200_000, rtol=6e-8)


@pytest.mark.parametrize('images', [np.zeros((0, 2, 2, 1), np.uint8), np.zeros((3, 2, 2, 1))])
def test_mean_image_of_something_else(images):
  with pytest.raises(UserError, match='expected uint8'):
    mean_image(images)


def test_inputs_of_something_else():
  with pytest.raises(UserError, match='dtype float32; expected uint8'):
    to_device_input(jnp.zeros((3, 2, 2, 1)), jnp.zeros((2, 2, 1)))
  with pytest.raises(UserError, match=r'\(H, W, C\) = \(2, 2, 1\)'):
    to_device_input(jnp.zeros((3, 2, 2, 3), jnp.uint8), jnp.zeros((2, 2, 1)))
