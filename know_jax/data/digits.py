"""The handwritten digits that come with scikit-learn, as a data set: no files, no downloads."""

import functools
import importlib.util
from pathlib import Path

import numpy as np

from know_jax.errors import UserError, unknown_name

_FILE = 'datasets', 'data', 'digits.csv.gz'


@functools.cache
def load_digits(
  split: str, image_size: tuple[int, int] | None = None
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
  """Reads the images of a split: 1,797 digits of 8 x 8, with values 0 to 16 scaled to 0 to 255.

  Args:
    split: `'test'`, every fifth example of each digit in the order of scikit-learn (355 in all), or
      `'train'`, the others (1,442).
    image_size: (H, W) in pixels that images are resized to; None: as they are.

  Returns:
    Images, uint8 `[N, H, W, 1]`; labels, int32 `[N]`; the names of the classes.

  Raises:
    UserError: there is no such split, or scikit-learn is not installed.
  """
  if split not in ('train', 'test'):
    raise unknown_name("split of 'digits'", split, ('train', 'test'))
  table = _read()
  labels = table[:, -1].astype(np.int32)
  images = np.round(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)[..., None]
  test = np.zeros(len(labels), bool)
  for digit in range(10):
    test[np.flatnonzero(labels == digit)[4::5]] = True
  chosen = test if split == 'test' else ~test
  images, labels = images[chosen], labels[chosen]
  if image_size is not None:
    from PIL import Image

    images = np.stack(
      [
        np.asarray(Image.fromarray(x[..., 0]).resize(image_size[::-1], Image.Resampling.BILINEAR))
        for x in images
      ]
    )[..., None]
  return images, labels, tuple(str(digit) for digit in range(10))


def _read() -> np.ndarray:
  """The pixels of each image, row by row, and its label: `[1797, 65]`.

  The file is read without scikit-learn, which takes longer to import than all else of a short run.
  """
  try:
    package = importlib.util.find_spec('sklearn')
    for folder in (package and package.submodule_search_locations) or ():
      if (file := Path(folder, *_FILE)).is_file():
        return np.loadtxt(file, delimiter=',')
    from sklearn import datasets
  except ImportError as error:
    raise UserError(
      f"data set 'digits' needs scikit-learn: pip install 'know_jax[train]' ({error})."
    ) from error
  return np.column_stack(datasets.load_digits(return_X_y=True))


DATASETS = {'digits': load_digits}
