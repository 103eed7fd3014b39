"""Glyphs: two generated sets of images for which pre-training pays and forgetting shows.

Twenty glyphs are each four strokes between the points of a 3 x 3 grid, like letters of one script.
An image is a glyph with its points displaced, sheared, scaled and moved, one stroke too many, and
noise. The first ten are one data set, the others a second one. All glyphs share their strokes, so
that a network trained on some of them has features for the others; and it takes many examples to
see through what is done to them.
"""

import functools
import itertools

import numpy as np

from know_jax.errors import unknown_name

GLYPHS = {'glyphs': range(10), 'new_glyphs': range(10, 20)}
"""Name -> the glyphs that are its classes."""

_STROKES = 4  # Of each glyph, out of the 20 between neighbouring points.
_DIFFERENT = 2  # Strokes of a glyph that another one lacks, at least.
_SIZE = (12, 12)
_PER_CLASS = {'train': 160, 'test': 400}
_SEED = 20


@functools.cache
def load_glyphs(
  name: str, split: str, image_size: tuple[int, int] | None = None
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
  """Draws the images of a split, in a fraction of a second.

  The split 'train' has 160 images a class, 'test' 400; `image_size` is by default 12 x 12. Gives
  images, uint8 `[N, H, W, 1]`, in random order; labels, int32 `[N]`; the names of the classes. They
  are the same on every machine: only sums, products and quotients make them.

  Raises:
    UserError: there is no such split.
  """
  if split not in _PER_CLASS:
    raise unknown_name(f'split of {name!r}', split, list(_PER_CLASS))
  glyphs = GLYPHS[name]
  rng = np.random.default_rng([_SEED, list(_PER_CLASS).index(split), glyphs[0]])
  labels = rng.permutation(np.repeat(np.arange(len(glyphs), dtype=np.int32), _PER_CLASS[split]))
  strokes = _shapes(max(g.stop for g in GLYPHS.values()))[glyphs.start : glyphs.stop]
  images = _draw(strokes[labels], image_size or _SIZE, rng)
  return images, labels, tuple(f'glyph {glyph}' for glyph in glyphs)


def _shapes(count: int) -> np.ndarray:
  """The strokes of so many glyphs, as pairs of points: int `[count, strokes, 2]`."""
  neighbours = [
    (a, b)
    for a, b in itertools.combinations(range(9), 2)
    if max(abs(a // 3 - b // 3), abs(a % 3 - b % 3)) == 1
  ]
  rng = np.random.default_rng(_SEED)
  chosen: list[frozenset[int]] = []
  while len(chosen) < count:
    glyph = frozenset(rng.permutation(len(neighbours))[:_STROKES].tolist())
    if all(len(glyph - other) >= _DIFFERENT for other in chosen):
      chosen.append(glyph)
  return np.array([[neighbours[i] for i in sorted(glyph)] for glyph in chosen])


def _draw(strokes: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
  """Images of glyphs, uint8 `[N, H, W, 1]`, of their strokes, int `[N, strokes, 2]`."""
  count = len(strokes)
  # A stroke that does not belong there, between two points that need not be neighbours.
  begin = rng.integers(0, 9, count)
  extra = np.stack([begin, (begin + rng.integers(1, 9, count)) % 9], axis=-1)
  strokes = np.concatenate([strokes, extra[:, None]], axis=1)
  y, x = (axis - 1.0 + rng.uniform(-0.3, 0.3, (count, 9)) for axis in np.divmod(np.arange(9), 3))
  scale, shear, shift = (
    rng.uniform(low, high, (2, count, 1)) for low, high in ((0.7, 1.1), (-0.3, 0.3), (-0.3, 0.3))
  )
  y, x = scale[0] * y + shear[0] * x + shift[0], scale[1] * x + shear[1] * y + shift[1]
  # Where strokes begin and end, each [N, strokes, 1, 1]. Glyphs span 2, images 3.2.
  ends = strokes.reshape(count, -1)
  y0, y1, x0, x1 = (
    np.take_along_axis(axis.astype(np.float32), ends, axis=1)[:, end::2, None, None]
    for axis in (y, x)
    for end in (0, 1)
  )
  rows, columns = ((np.arange(n, dtype=np.float32) + 0.5) * (3.2 / n) - 1.6 for n in size)
  down, across = rows[:, None] - y0, columns - x0
  dy, dx = y1 - y0, x1 - x0
  along = np.clip((down * dy + across * dx) / (dy * dy + dx * dx + 1e-6), 0, 1)
  distance = (down - along * dy) ** 2 + (across - along * dx) ** 2  # Squared.
  ink = np.maximum(1 - distance.min(axis=1) / 0.1, 0)  # [N, H, W]
  ink = rng.uniform(0.6, 1.0, (count, 1, 1)) * ink + rng.uniform(-0.3, 0.3, ink.shape)
  return np.round(255 * np.clip(ink, 0, 1)).astype(np.uint8)[..., None]


DATASETS = {name: functools.partial(load_glyphs, name) for name in GLYPHS}
