"""Pictures in folders, one folder a class, as a data set by its path."""

import functools
import hashlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from know_jax.errors import UserError, os_errors, unknown_name
from know_jax.system.machine import memory_bytes

SUFFIXES = ('.bmp', '.gif', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')
"""What the names of pictures end in."""

MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}
"""What Pillow calls images of so many channels."""

_GREY = ('1', 'L', 'I;16', 'I;16B', 'I;16L')  # What Pillow calls grey pictures.
_TEST_SHARE = 5  # One picture in so many is a test picture, where the folder has no splits.

Listing = tuple[tuple[str, tuple[str, ...]], ...]
"""Class and the paths of its pictures, in order."""


def is_folder(name: str) -> bool:
  """Whether the name of a data set is a path: of a folder that is there, or one that must be."""
  return name.startswith(('/', './', '../', '~')) or ('/' in name and Path(name).is_dir())


def load_folder(
  name: str, split: str, image_size: tuple[int, int] | None
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
  """Reads the pictures of a split.

  Either `PATH/<split>/<class>/*.png`, or `PATH/<class>/*.png`, where one picture in five of each
  class, drawn by the names of the files, is in the split 'test' and the others in 'train'. Classes
  are numbered in the order of their names. Pictures are turned as EXIF says; all are grey if those
  of the whole folder are, else all are colour; what is transparent is laid on white.

  Args:
    name: PATH.
    split: 'train', 'test', or another folder below PATH.
    image_size: (H, W) that pictures are resized to; needed where they differ in size.

  Returns:
    Images uint8 `[N, H, W, C]`, labels int32 `[N]`, and the names of the classes.

  Raises:
    UserError: a folder is missing, empty, or has pictures beside folders; a file is no picture or
      cannot be read; pictures differ in size; it is named.
  """
  root = Path(name).expanduser().absolute()
  with os_errors(f'data set {name!r} cannot be read'):
    if not root.is_dir():
      raise UserError(f'data set {name!r}: there is no such folder.')
    listing, everything = _listing(root, split)
    stamps = tuple((path, (s := Path(path).stat()).st_size, s.st_mtime_ns) for path in everything)
    return _read(listing, image_size, stamps)


def _folders(folder: Path) -> list[Path]:
  return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith('.'))


def _listing(root: Path, split: str) -> tuple[Listing, list[str]]:
  """The pictures of a split by class, and those of all splits."""
  splits = {path.name: _folders(path) for path in _folders(root)}
  if not splits:
    raise UserError(f'{root} has no folders; expected one for each class, or for each split.')
  if loose := [p for p in _files(root) if p.suffix.lower() in SUFFIXES]:
    raise UserError(
      f'{loose[0]} lies beside folders; expected pictures in folders of classes only.'
    )
  if not any(splits.values()):
    whole = {name: _pictures(root / name) for name in splits}
    if split not in ('train', 'test'):
      raise unknown_name(f'split of {str(root)!r}', split, ('test', 'train'))
    listing = tuple((name, _drawn(paths, split)) for name, paths in whole.items())
    return listing, [path for paths in whole.values() for path in paths]
  if split not in splits:
    raise unknown_name(f'split of {str(root)!r}', split, splits)
  if mixed := [name for name, below in splits.items() if not below]:
    raise UserError(
      f'{root / mixed[0]} has no folders, and others beside it do; expected folders of classes in '
      'every split.'
    )
  # The classes of all splits, so that each has the same numbers in all.
  names = sorted({path.name for below in splits.values() for path in below})
  pictures = {path: _pictures(path) for below in splits.values() for path in below}
  listing = tuple((name, pictures.get(root / split / name, ())) for name in names)
  return listing, [path for paths in pictures.values() for path in paths]


def _files(folder: Path) -> list[Path]:
  ignored = ('thumbs.db', 'desktop.ini')
  return sorted(
    path
    for path in folder.iterdir()
    if path.is_file() and not path.name.startswith('.') and path.name.lower() not in ignored
  )


def _pictures(folder: Path) -> tuple[str, ...]:
  """The pictures of a class, in the order of their names."""
  if below := _folders(folder):
    raise UserError(f'{below[0]} is a folder in a class; expected pictures only.')
  files = _files(folder)
  if not files:
    raise UserError(f'{folder} is empty; expected the pictures of a class.')
  for path in files:
    if path.suffix.lower() not in SUFFIXES:
      raise UserError(f'{path} is no picture by its name; expected one of {", ".join(SUFFIXES)}.')
  return tuple(map(str, files))


def _drawn(paths: tuple[str, ...], split: str) -> tuple[str, ...]:
  """The part of a class that is in a split: a function of the files' names."""
  order = sorted(paths, key=lambda path: hashlib.sha256(Path(path).name.encode()).digest())
  test = set(order[: -(-len(order) // _TEST_SHARE)]) if len(order) > 1 else set()
  return tuple(path for path in paths if (path in test) == (split == 'test'))


@functools.lru_cache(maxsize=4)
def _read(
  listing: Listing, image_size: tuple[int, int] | None, stamps: Any
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
  """The pictures of a listing; `stamps` of all pictures tell whether some have changed."""
  grey = all(_open(path).mode in _GREY for path, _, _ in stamps)
  paths = [path for _, group in listing for path in group]
  if not paths:
    raise UserError('the split has no pictures; expected at least 2 in each class.')
  labels = np.repeat(np.arange(len(listing)), [len(group) for _, group in listing])
  images: np.ndarray = np.empty(0, np.uint8)
  for i, path in enumerate(paths):
    pixels = _pixels(path, grey, image_size)
    if i == 0:
      shape = (len(paths), *pixels.shape)
      if (size := int(np.prod(shape))) > (memory := memory_bytes()):
        raise UserError(f'{len(paths)} pictures take {size} bytes; this machine has {memory}.')
      images = np.empty(shape, np.uint8)
    elif pixels.shape != images.shape[1:]:
      (h, w), (height, width) = images.shape[1:3], pixels.shape[:2]
      raise UserError(
        f'pictures differ in size (height x width): {paths[0]} has {h} x {w}, {path} has {height} '
        f'x {width}. Give image_size=(H, W) to resize them all.'
      )
    images[i] = pixels
  return images, labels.astype(np.int32), tuple(name for name, _ in listing)


def _open(path: str) -> Any:
  """A Pillow image; only its header is read."""
  try:
    from PIL import Image
  except ImportError as error:
    raise UserError(f"pictures need Pillow: pip install 'know_jax[train]' ({error}).") from error
  try:
    with warnings.catch_warnings():
      # Of an image so large that reading it could take all memory.
      warnings.simplefilter('error', Image.DecompressionBombWarning)
      with Image.open(path) as image:
        return image
  except (OSError, Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
    raise UserError(f'{path} is no picture that can be read: {error}.') from error


def _pixels(path: str, grey: bool, image_size: tuple[int, int] | None) -> np.ndarray:
  """A picture as uint8 `[H, W, 1 or 3]`, upright."""
  from PIL import Image, ImageOps

  _open(path)
  try:
    with Image.open(path) as opened:
      image: Any = ImageOps.exif_transpose(opened)
      if image.mode.startswith('I;16'):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
      if not grey and ('A' in image.getbands() or 'transparency' in image.info):
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
      return pixels_of(image, 1 if grey else 3, image_size)
  except (OSError, ValueError, SyntaxError) as error:
    raise UserError(f'{path} cannot be decoded: {error}.') from error


def pixels_of(image: Any, channels: int, image_size: tuple[int, int] | None) -> np.ndarray:
  """A Pillow image as uint8 `[H, W, channels]`, resized on request."""
  from PIL import Image

  if image.mode != MODES[channels]:
    image = image.convert(MODES[channels])
  if image_size is not None:
    image = image.resize(image_size[::-1], Image.Resampling.BILINEAR)
  return np.asarray(image).reshape(image.height, image.width, channels)
