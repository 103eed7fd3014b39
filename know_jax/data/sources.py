"""Image-classification data as uint8 arrays, by name: TFDS data sets, and some that need no files.

TFDS is only read here, through its random-access sources, which needs no TensorFlow.
"""

import dataclasses
import difflib
import functools
import importlib.util
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from know_jax.data.base import Batch
from know_jax.data.folders import MODES, is_folder, load_folder, pixels_of
from know_jax.data.image_cache import cache_dir, cache_key, read_cache, write_cache
from know_jax.errors import UserError, unknown_name
from know_jax.registry import discover, load_object

_NAME = re.compile(r'(?P<set>\w+)(/(?P<config>[\w.-]+))?(:(?P<version>\d+\.\d+\.\d+))?')
_VERSION = re.compile(r'\d+\.\d+\.\d+')


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """One split of an image-classification data set, decoded.

  Attributes:
    name: as given to `load_dataset`.
    split: as given to `load_dataset`.
    images: uint8 [N, H, W, C], read-only; grey images have C = 1.
    labels: int32 [N], from 0 to `num_classes` - 1, read-only.
    class_names: one a class, in the order of the labels.
  """

  name: str
  split: str
  images: np.ndarray
  labels: np.ndarray
  class_names: tuple[str, ...]

  @property
  def num_classes(self) -> int:
    """How many classes there are, whether or not the split has examples of all."""
    return len(self.class_names)

  @property
  def size(self) -> int:
    """How many examples there are."""
    return len(self.labels)

  @property
  def strata(self) -> np.ndarray:
    """The class of every example."""
    return self.labels

  @property
  def arrays(self) -> Batch:
    """All examples, as one batch."""
    return {'image': self.images, 'label': self.labels}

  def batch(self, indices: np.ndarray) -> Batch:
    """The examples at `indices`: images and labels."""
    return {name: array[indices] for name, array in self.arrays.items()}


def load_dataset(
  name: str,
  split: str,
  *,
  data_dir: str | os.PathLike[str] | None = None,
  classes: Sequence[int] = (),
  image_size: tuple[int, int] | None = None,
) -> Dataset:
  """Loads one split of a data set.

  `'digits'` are handwritten and need no files: see `know_jax.data.digits`.

  A path, which has a `/`, is a folder with a folder of pictures for each class: see `load_folder`.

  `'glyphs'` and `'new_glyphs'` are drawn, ten classes each, from strokes that they share: see
  `know_jax.data.glyphs`.

  `'package.module:object'` is a function of one's own: `load(split, image_size)` gives images,
  labels and class names, as `load_glyphs` does.

  Any other name is a TFDS data set that lies prepared in `data_dir`, as array_record files:
  `'cifar10'`, or in full `'name/config:1.0.0'`; without a version the newest one is taken. Images
  are decoded once a process, and once a machine: the result is kept in `$KNOW_JAX_CACHE` (default
  `~/.cache/know_jax`) under a name made from the content of the files it comes from.

  Args:
    name: the data set.
    split: such as `'train'`; of TFDS also `'a[:80%]+b[:80%]'`, parts in the data set's own order.
    data_dir: the TFDS data directory; by default `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`.
    classes: keep only the examples with these labels and number them 0, 1, ... in the order given;
      empty: keep all.
    image_size: (H, W) in pixels that images are resized to, bilinearly (averaging where they
      shrink, as Pillow does); needed where images differ in size.

  Returns:
    The examples in the order of the data set.

  Raises:
    UserError: the data set, split or a class is unknown; the data set is not prepared, not in a
      readable format, or not one for image classification; images differ in size.
  """
  if image_size is not None and (
    len(image_size) != 2 or not all(isinstance(side, int) and side > 0 for side in image_size)
  ):
    raise UserError(f'image_size is {image_size!r}; expected (H, W), two whole numbers of pixels.')
  size = None if image_size is None else (image_size[0], image_size[1])
  if name in _without_files():
    images, labels, class_names = _without_files()[name](split, size)
  elif is_folder(name):
    images, labels, class_names = load_folder(name, split, size)
  elif ':' in name and not _NAME.fullmatch(name):
    load = load_object(name, 'data set')
    images, labels, class_names = _checked(name, load(split, size))
  else:
    base = Path(data_dir or _default_data_dir()).expanduser()
    images, labels, class_names = _load_prepared(name, _find_prepared(name, base), split, size)
  if len(classes):
    images, labels, class_names = _keep_classes(name, images, labels, class_names, classes)
  for array in (images, labels):
    array.setflags(write=False)
  return Dataset(name, split, images, labels, class_names)


def mean_image(images: np.ndarray) -> np.ndarray:
  """The mean of images / 255, which the paper subtracts: uint8 [N, H, W, C] -> float32 [H, W, C].

  Raises:
    UserError: `images` are not as described, or there are none.
  """
  if images.ndim != 4 or images.dtype != np.uint8 or not len(images):
    raise UserError(
      f'images have shape {images.shape} and dtype {images.dtype}; expected uint8 [N, H, W, C] '
      'with N > 0.'
    )
  return (images.mean(axis=0, dtype=np.float64) / 255).astype(np.float32)


def to_device_input(images: jax.Array, mean: jax.Array) -> jax.Array:
  """What the networks are given: uint8 [..., H, W, C] / 255 minus the mean image, in float32.

  Raises:
    UserError: `images` are not uint8, or `mean` has another shape than one of them.
  """
  if images.dtype != jnp.uint8 or images.shape[-3:] != mean.shape:
    raise UserError(
      f'images have shape {images.shape} and dtype {images.dtype}; expected uint8 [..., H, W, C] '
      f'with (H, W, C) = {mean.shape}, the shape of the mean image.'
    )
  return images.astype(jnp.float32) / 255 - mean


def _keep_classes(
  name: str,
  images: np.ndarray,
  labels: np.ndarray,
  class_names: tuple[str, ...],
  classes: Sequence[int],
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
  for label in classes:
    if isinstance(label, bool) or not isinstance(label, (int, np.integer)):
      raise UserError(f'classes hold {label!r}; expected labels, whole numbers.')
    if not 0 <= label < len(class_names):
      raise UserError(f'classes hold {label}; {name!r} has the labels 0 to {len(class_names) - 1}.')
    if list(classes).count(label) > 1:
      raise UserError(f'classes hold {label} more than once: {tuple(classes)}.')
  renumbered = np.full(len(class_names), -1, np.int32)
  renumbered[list(classes)] = np.arange(len(classes))
  labels = renumbered[labels]
  keep = labels >= 0
  return images[keep], labels[keep], tuple(class_names[label] for label in classes)


@functools.cache
def _without_files() -> dict[str, Callable[..., tuple[np.ndarray, np.ndarray, tuple[str, ...]]]]:
  """Name -> a function of split and image size that gives images, labels and class names.

  They are what the `DATASETS` of the modules beside this one declare.
  """
  return discover(__package__, 'DATASETS', skip=__name__)


def _checked(name: str, found: Any) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
  """What a function of the user's gave for a split, if it is images, labels and class names."""
  try:
    images, labels, class_names = found
    images, labels = np.asarray(images), np.asarray(labels)
  except (TypeError, ValueError) as error:
    raise UserError(
      f'data set {name!r} gave {type(found)}; expected images, labels and class names.'
    ) from error
  if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
    raise UserError(
      f'data set {name!r} gave images of shape {images.shape} and dtype {images.dtype}; expected '
      'uint8 [N, H, W, C], N > 0.'
    )
  names = tuple(map(str, class_names))
  whole = np.issubdtype(labels.dtype, np.integer) and labels.shape == images.shape[:1]
  if not whole or labels.min() < 0 or labels.max() >= len(names):
    raise UserError(
      f'data set {name!r} gave labels of shape {labels.shape} and dtype {labels.dtype}; expected '
      f'[{len(images)}] whole numbers from 0 to {len(names) - 1}, one for each image.'
    )
  return images.copy(), labels.astype(np.int32), names


# --- TFDS ------------------------------------------------------------------------------------


def _default_data_dir() -> str:
  # As in TFDS, but read at the time of the call, and without importing TFDS.
  return os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')


def _prepared(base: Path, name: str = '*') -> dict[str, dict[str, Path]]:
  """What lies prepared in a TFDS data directory: `name` or `name/config` -> version -> folder."""
  result: dict[str, dict[str, Path]] = {}
  for versions in ('*', '*/*'):
    for path in base.glob(f'{name}/{versions}/dataset_info.json'):
      folder = path.parent
      # Folders of unfinished preparations have other names.
      if _VERSION.fullmatch(folder.name) and (folder / 'features.json').is_file():
        name = folder.parent.relative_to(base).as_posix()
        result.setdefault(name, {})[folder.name] = folder
  return result


def _find_prepared(name: str, base: Path) -> Path:
  match = _NAME.fullmatch(name)
  if not match:
    raise unknown_name('data set', name, [*_prepared(base), *_without_files()])
  prepared = _prepared(base, match['set'])
  asked = name.removesuffix(f':{match["version"]}')
  if asked not in prepared:
    variants = sorted(known for known in prepared if known.startswith(f'{asked}/'))
    if not variants:
      raise _missing(match['set'], asked, base)
    if len(variants) > 1:
      raise UserError(
        f'data set {asked!r} is prepared in {base} in {len(variants)} configurations; expected one '
        f'of {", ".join(repr(variant) for variant in variants)}.'
      )
    asked = variants[0]
  versions = prepared[asked]
  version = match['version'] or max(versions, key=lambda v: [int(part) for part in v.split('.')])
  if version not in versions:
    raise UserError(
      f'data set {asked!r} is prepared in {base} in version {", ".join(sorted(versions))}; '
      f'expected {version}.'
    )
  return versions[version]


def _missing(base_name: str, asked: str, base: Path) -> UserError:
  """The error for a data set that is not there."""
  tfds = _import_tfds(f'data set {asked!r}')
  offered = tfds.list_builders(with_community_datasets=False)
  if base_name in offered:
    return UserError(
      f'data set {asked!r} is not prepared in {base}. {_how_to_prepare(asked, base)}'
    )
  prepared = _prepared(base)
  message = (
    f'{unknown_name("data set", asked, [*prepared, *_without_files()])} These need no files, or '
    f'are prepared in {base}.'
  )
  near = difflib.get_close_matches(base_name, offered, n=3, cutoff=0.7)
  if near := [name for name in near if name not in prepared]:
    message += f' TFDS also offers {" and ".join(repr(name) for name in near)}. '
    message += _how_to_prepare(near[0], base)
  return UserError(message)


def _how_to_prepare(name: str, base: Path) -> str:
  lacking = importlib.util.find_spec('tensorflow') is None
  install = 'pip install tensorflow && ' if lacking else ''
  return (
    f'Prepare it once with: {install}tfds build {name} --file_format=array_record '
    f'--data_dir={base} (TFDS needs TensorFlow to prepare data sets, but not to read them).'
  )


def _import_tfds(what: str) -> Any:
  try:
    import array_record  # noqa: F401  (TFDS would import it late, with a message of its own)
    import tensorflow_datasets
  except ImportError as error:
    raise UserError(
      f"{what} needs TFDS and array_record: pip install 'know_jax[train]' ({error})."
    ) from error
  return tensorflow_datasets


def open_prepared(name: str, data_dir: str | os.PathLike[str] | None = None) -> tuple[Any, Any]:
  """TFDS, and the builder of a data set that lies prepared: see `load_dataset`.

  Raises:
    UserError: it is not there, or not in a readable format.
  """
  base = Path(data_dir or _default_data_dir()).expanduser()
  return _open(name, _find_prepared(name, base))


def _open(name: str, folder: Path) -> tuple[Any, Any]:
  tfds = _import_tfds(f'data set {name!r}')
  # Read from the folder, not through the code registered under the name: that would want its own
  # version of the data set, and may look for it on the network.
  builder = tfds.builder_from_directory(folder)
  formats = {file_format.value for file_format in builder.info.available_file_formats()}
  if 'array_record' not in formats:
    raise UserError(
      f'data set {name!r} in {folder} is stored as {" and ".join(sorted(formats))}, which is not '
      'read without TensorFlow; expected array_record. Prepare it anew, in another data directory '
      f'or after removing this one. {_how_to_prepare(name, Path("DIR"))}'
    )
  return tfds, builder


@functools.lru_cache(maxsize=8)
def _load_prepared(
  name: str, folder: Path, split: str, image_size: tuple[int, int] | None
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
  tfds, builder = _open(name, folder)
  image_key, label_key = _image_and_label(tfds, name, builder.info)
  try:
    builder.info.splits[split]  # Parts and sums of splits are none of its keys.
  except ValueError as error:
    raise unknown_name(f'split of {name!r}', split, builder.info.splits) from error
  try:
    key = cache_key(builder, split, image_key, label_key, image_size)
  except OSError as error:
    raise UserError(f'data set {name!r} in {folder} is not complete: {error}.') from error
  path = cache_dir() / f'{builder.info.name}-{split}-{key.hex()[:16]}.images'
  decoded = read_cache(path, key)
  if decoded is None:
    decoded = _decode(tfds, name, builder, split, image_key, label_key, image_size)
    write_cache(path, key, *decoded)
  return *decoded, tuple(builder.info.features[label_key].names)


def _image_and_label(tfds: Any, name: str, info: Any) -> tuple[str, str]:
  """The names of the image and the label feature of a data set."""
  features = dict(info.features) if isinstance(info.features, tfds.features.FeaturesDict) else {}
  images = [key for key, x in features.items() if isinstance(x, tfds.features.Image)]
  labels = [key for key, x in features.items() if isinstance(x, tfds.features.ClassLabel)]
  match info.supervised_keys:
    case (str() as image, str() as label) if image in images and label in labels:
      images, labels = [image], [label]
  if len(images) != 1 or len(labels) != 1:
    result = ', '.join(f'{key} ({type(features[key]).__name__})' for key in sorted(features))
    raise UserError(
      f'data set {name!r} is not one for image classification: it has the features '
      f'{result or type(info.features).__name__} and the supervised keys {info.supervised_keys}; '
      'expected one Image and one ClassLabel.'
    )
  image = features[images[0]]
  if image.np_dtype != np.uint8 or image.shape[-1] not in MODES:
    raise UserError(
      f'feature {images[0]!r} of data set {name!r} holds images of {np.dtype(image.np_dtype)} with '
      f'{image.shape[-1]} channels; expected uint8 with 1, 3 or 4.'
    )
  return images[0], labels[0]


def _decode(
  tfds: Any,
  name: str,
  builder: Any,
  split: str,
  image_key: str,
  label_key: str,
  image_size: tuple[int, int] | None,
) -> tuple[np.ndarray, np.ndarray]:
  """Reads and decodes a whole split: images [N, H, W, C] and labels [N]."""
  from PIL import Image
  from tqdm import tqdm

  # Decoding here and not in TFDS, which takes grey JPEGs in a set of colour images as they are,
  # and warns that Pillow is not OpenCV.
  source = builder.as_data_source(
    split=split,
    file_format='array_record',
    decoders={image_key: tfds.decode.SkipDecoding()},
  )
  channels = builder.info.features[image_key].shape[-1]
  labels = np.empty(len(source), np.int32)
  images: np.ndarray = np.empty(0, np.uint8)
  bar = tqdm(
    total=len(source),
    desc=f'decoding {name}/{split}',
    unit=' images',
    delay=1,
    mininterval=0.2 if sys.stderr.isatty() else 10,
  )
  with bar:
    for start in range(0, len(source), 256):
      places = range(start, min(start + 256, len(source)))
      for i, example in zip(places, source.__getitems__(list(places)), strict=True):
        try:
          with Image.open(io.BytesIO(example[image_key])) as encoded:
            pixels = pixels_of(encoded, channels, image_size)
        except OSError as error:
          raise UserError(f'example {i} of {name}/{split} is no image: {error}.') from error
        if i == 0:
          images = np.empty((len(source), *pixels.shape), np.uint8)
        elif pixels.shape != images.shape[1:]:
          raise UserError(
            f'images of {name}/{split} differ in size: {images.shape[1]} x {images.shape[2]} in '
            f'example 0, {pixels.shape[0]} x {pixels.shape[1]} in example {i} (height x width). '
            'Give image_size=(H, W) to resize them all.'
          )
        images[i], labels[i] = pixels, example[label_key]
      bar.update(len(places))
  if not len(labels) or labels.min() < 0:
    raise UserError(
      f'{name}/{split} has {len(labels)} examples, {(labels < 0).sum()} of them without a label; '
      'expected some, all with one.'
    )
  return images, labels
