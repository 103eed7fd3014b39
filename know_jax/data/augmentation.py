"""Random rotation, shift, zoom and flip of a batch of images, on the device."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from know_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """How strongly images are distorted; the default does nothing.

  The names and ranges are those of Keras' `ImageDataGenerator`.

  Attributes:
    rotation: the angle is uniform in ±`rotation` degrees; 0 to 180.
    shift: rows and columns are shifted, each by its own draw, by a part of the side that is uniform
      in ±`shift`; 0 to below 1.
    zoom: rows and columns are scaled, each by its own draw, by a factor uniform in 1 ± `zoom`; 0 to
      below 1.
    flip: mirror left and right with probability 1/2.

  Raises:
    UserError: a value is out of its range.
  """

  rotation: float = 0.0
  shift: float = 0.0
  zoom: float = 0.0
  flip: bool = False

  def __post_init__(self):
    for name, expected, fits in (
      ('rotation', '0 to 180 degrees', lambda value: 0 <= value <= 180),
      ('shift', '0 to below 1, a fraction of the side', lambda value: 0 <= value < 1),
      ('zoom', '0 to below 1', lambda value: 0 <= value < 1),
    ):
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, (int, float)) or not fits(value):
        raise UserError(f'augmentation {name} is {value!r}; expected a number from {expected}.')
    if not isinstance(self.flip, bool):
      raise UserError(f'augmentation flip is {self.flip!r}; expected True or False.')


# The setting of the paper's meta-dataset and CIFAR experiments.
PAPER_AUGMENTATION = Augmentation(rotation=10.0, shift=0.15, zoom=0.3)


class Distortion(NamedTuple):
  """What is done to each image of a batch."""

  angle: jax.Array  # [B] radians.
  shift: jax.Array  # [B, 2] pixels, rows then columns.
  zoom: jax.Array  # [B, 2] factors, rows then columns; above 1 the image shrinks, as in Keras.
  flip: jax.Array  # [B] bool.


def augment(keys: jax.Array, images: jax.Array, augmentation: Augmentation) -> jax.Array:
  """Distorts every image by its own random draw; where `augmentation` does nothing, gives `images`.

  Args:
    keys: [B] typed keys, one an image, so that what happens to an image depends neither on the rest
      of the batch nor on how the batch is split over devices.
    images: [B, H, W, C] floating point; so is what comes back.
    augmentation: how strongly; static under `jax.jit`.

  Raises:
    UserError: shapes or dtypes are not as described.
  """
  if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
    raise UserError(
      f'images have shape {images.shape} and dtype {images.dtype}; expected [B, H, W, C], floating '
      'point.'
    )
  if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) or keys.shape != images.shape[:1]:
    raise UserError(
      f'keys have shape {keys.shape} and dtype {keys.dtype}; expected {images.shape[:1]}, one '
      'typed key an image, as from jax.random.split(key, B).'
    )
  if augmentation == Augmentation():
    return images
  drawn = draw(keys, augmentation, images.shape[1:3])
  if augmentation.rotation or augmentation.shift or augmentation.zoom:
    images = warp(images, drawn)
  if augmentation.flip:
    images = jnp.where(drawn.flip[:, None, None, None], images[:, :, ::-1], images)
  return images


def draw(keys: jax.Array, augmentation: Augmentation, sides: Sequence[int]) -> Distortion:
  """Draws a distortion, float32, for each of `[B]` typed keys; shifts are parts of `sides`."""
  # All draws are made whatever the setting, so that turning one off leaves the others as they are.
  uniform = jax.vmap(lambda key: jax.random.uniform(key, (6,), minval=-1.0, maxval=1.0))(keys)
  return Distortion(
    angle=math.radians(augmentation.rotation) * uniform[:, 0],
    shift=augmentation.shift * jnp.asarray(sides, jnp.float32) * uniform[:, 1:3],
    zoom=1.0 + augmentation.zoom * uniform[:, 3:5],
    flip=(uniform[:, 5] < 0.0) & augmentation.flip,
  )


def augment_labels(
  keys: jax.Array, labels: jax.Array, augmentation: Augmentation, beyond: int
) -> jax.Array:
  """Distorts label maps, uint8 [B, H, W], as `augment` does images with the same keys.

  Each pixel has the label of the nearest place, `beyond` where that lies beyond the edge.
  """
  drawn = draw(keys, augmentation, labels.shape[1:3])
  if augmentation.rotation or augmentation.shift or augmentation.zoom:
    options = {'order': 0, 'mode': 'constant', 'cval': beyond}
    labels = warp(labels[..., None], drawn, **options)[..., 0]
  return jnp.where(drawn.flip[:, None, None], labels[:, :, ::-1], labels)


def warp(images: jax.Array, distortion: Distortion, **options: Any) -> jax.Array:
  """Rotates, shifts and zooms images about their centre, with bilinear interpolation.

  The value at place p = (row, column) is taken from c + R(angle) (zoom (p - c) + shift), with the
  centre c = ((H - 1) / 2, (W - 1) / 2), R(a) = [[cos a, -sin a], [sin a, cos a]], and places beyond
  the edge replaced by the nearest place within. This is `apply_affine_transform` of Keras (rotation
  matrix times shift matrix times zoom matrix, output to input, `fill_mode='nearest'`, order 1) with
  the centre as corrected in keras-preprocessing (pull request 314, 2020); before, it was
  (H / 2 + 1/2, W / 2 + 1/2) by mistake. Keras finally swaps the roles of rows and columns; as all
  draws are symmetric about no change and rows and columns are drawn alike, that leaves the
  distribution for square images as it is. Here rows are rows, so that images of unequal sides turn
  about their centre too.

  Args:
    images: [B, H, W, C].
    distortion: one for each image; `flip` is ignored.
    **options: of `map_coordinates`, in place of bilinear interpolation and the nearest place.

  Returns:
    [B, H, W, C] of the dtype of `images`, interpolated in float32 (or wider).
  """
  H, W = images.shape[1:3]
  options = {'order': 1, 'mode': 'nearest', **options}

  def warp_one(image, angle, shift, zoom):
    rows = (zoom[0] * (jnp.arange(H) - (H - 1) / 2) + shift[0])[:, None]
    columns = (zoom[1] * (jnp.arange(W) - (W - 1) / 2) + shift[1])[None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    from_places = [
      cos * rows - sin * columns + (H - 1) / 2,
      sin * rows + cos * columns + (W - 1) / 2,
    ]
    return jax.vmap(
      lambda channel: map_coordinates(channel, from_places, **options),
      in_axes=-1,
      out_axes=-1,
    )(image)

  wide = images.astype(jnp.promote_types(images.dtype, jnp.float32))
  angle, shift, zoom, _ = distortion
  return jax.vmap(warp_one)(wide, angle, shift, zoom).astype(images.dtype)
