import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from know_jax.data.augmentation import (
  PAPER_AUGMENTATION,
  Augmentation,
  Distortion,
  augment,
  draw,
  warp,
)
from know_jax.errors import UserError

ALL = Augmentation(rotation=10.0, shift=0.15, zoom=0.3, flip=True)


def keras_affine(image, angle, shift, zoom):
  """`apply_affine_transform` of Keras in float64 SciPy, rows and columns not swapped."""
  rotation = np.array(
    [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
  )
  translation = np.array([[1, 0, shift[0]], [0, 1, shift[1]], [0, 0, 1]])
  scaling = np.diag([zoom[0], zoom[1], 1])
  centre = [(side - 1) / 2 for side in image.shape[:2]]
  to_centre = np.array([[1, 0, -centre[0]], [0, 1, -centre[1]], [0, 0, 1]])
  matrix = np.linalg.inv(to_centre) @ rotation @ translation @ scaling @ to_centre
  return np.stack(
    [
      scipy.ndimage.affine_transform(
        image[..., c], matrix[:2, :2], matrix[:2, 2], order=1, mode='nearest'
      )
      for c in range(image.shape[-1])
    ],
    axis=-1,
  )


def some_images(shape, dtype=np.float32, seed=0):
  return np.random.default_rng(seed).uniform(-1, 1, shape).astype(dtype)


def some_distortion(size, seed=0):
  rng = np.random.default_rng(seed)
  return Distortion(
    angle=rng.uniform(-math.pi, math.pi, size),
    shift=rng.uniform(-6, 6, (size, 2)),
    zoom=rng.uniform(0.5, 1.6, (size, 2)),
    flip=np.zeros(size, bool),
  )


@pytest.mark.parametrize('shape', [(6, 28, 28, 1), (5, 32, 32, 3), (4, 9, 14, 2)])
def test_warp_is_the_affine_transform_of_scipy(shape):
  images, distortion = some_images(shape), some_distortion(shape[0])
  found = warp(jnp.asarray(images), jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), distortion))
  assert found.dtype == jnp.float32
  for i, image in enumerate(images.astype(np.float64)):
    expected = keras_affine(image, distortion.angle[i], distortion.shift[i], distortion.zoom[i])
    # Coordinates up to 32 in float32 (2e-6 of a pixel, a few roundings), slopes up to 2 a pixel.
    np.testing.assert_allclose(found[i], expected, atol=5e-5)


def test_warp_of_half_precision_interpolates_in_float32():
  images = some_images((4, 8, 8, 1), jnp.bfloat16)
  distortion = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), some_distortion(4))
  found = warp(jnp.asarray(images), distortion)
  expected = warp(jnp.asarray(images, jnp.float32), distortion)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_array_equal(found, expected.astype(jnp.bfloat16))


def test_a_quarter_turn_is_exact_about_the_centre():
  # Pixels fall onto pixels only if the image turns about (side - 1) / 2. Clockwise as it is seen.
  image = some_images((1, 7, 7, 1))
  distortion = Distortion(
    jnp.array([math.pi / 2]), jnp.zeros((1, 2)), jnp.ones((1, 2)), jnp.array([False])
  )
  found = warp(jnp.asarray(image), distortion)
  np.testing.assert_allclose(found, np.rot90(image, k=-1, axes=(1, 2)), atol=1e-5)


def test_shift_moves_rows_then_columns_and_repeats_the_edge():
  image = some_images((1, 5, 6, 1))
  distortion = Distortion(
    jnp.zeros(1), jnp.array([[2.0, -1.0]]), jnp.ones((1, 2)), jnp.array([False])
  )
  expected = np.pad(image, ((0, 0), (0, 2), (1, 0), (0, 0)), mode='edge')[:, 2:, :-1]
  np.testing.assert_allclose(warp(jnp.asarray(image), distortion), expected, atol=1e-6)


def test_draws_are_uniform_in_their_ranges():
  B = 20_000
  drawn = draw(jax.random.split(jax.random.key(0), B), ALL, (28, 20))
  columns = {
    'angle': (drawn.angle, -math.radians(10), math.radians(10)),
    'row shift': (drawn.shift[:, 0], -0.15 * 28, 0.15 * 28),
    'column shift': (drawn.shift[:, 1], -0.15 * 20, 0.15 * 20),
    'row zoom': (drawn.zoom[:, 0], 0.7, 1.3),
    'column zoom': (drawn.zoom[:, 1], 0.7, 1.3),
  }
  for name, (values, low, high) in columns.items():
    scaled = (np.asarray(values, np.float64) - low) / (high - low)
    assert scaled.min() > -1e-6, name
    assert scaled.max() < 1 + 1e-6, name
    # The Kolmogorov-Smirnov distance passes 1.95 / sqrt(B) once in a thousand; the key is fixed.
    distance = np.abs(np.sort(scaled) - (np.arange(B) + 0.5) / B).max()
    assert distance < 1.95 / math.sqrt(B), name
  # Independent of each other and of the flip: |correlation| within 4 / sqrt(B).
  table = np.stack([np.asarray(v) for v, _, _ in columns.values()] + [np.asarray(drawn.flip)])
  correlations = np.corrcoef(table) - np.eye(len(table))
  assert np.abs(correlations).max() < 4 / math.sqrt(B)


def test_half_of_the_images_are_flipped_and_nothing_else():
  B = 4000
  images = jnp.asarray(some_images((B, 2, 3, 1)))
  found = np.asarray(
    augment(jax.random.split(jax.random.key(1), B), images, Augmentation(flip=True))
  )
  mirrored = (found == np.asarray(images)[:, :, ::-1]).all(axis=(1, 2, 3))
  same = (found == np.asarray(images)).all(axis=(1, 2, 3))
  assert (mirrored ^ same).all()
  assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / math.sqrt(B)


def test_turning_one_part_off_leaves_the_other_draws_as_they_are():
  keys = jax.random.split(jax.random.key(2), 50)
  every, fewer = draw(keys, ALL, (8, 8)), draw(keys, Augmentation(zoom=0.3), (8, 8))
  np.testing.assert_array_equal(every.zoom, fewer.zoom)
  assert not np.asarray(fewer.angle).any()
  assert not np.asarray(fewer.shift).any()
  assert not np.asarray(fewer.flip).any()
  assert np.asarray(every.flip).any()


def test_no_augmentation_returns_the_images_themselves():
  images = jnp.ones((2, 4, 4, 1))
  keys = jax.random.split(jax.random.key(0), 2)
  assert augment(keys, images, Augmentation()) is images


def test_the_setting_of_the_paper():
  assert Augmentation(rotation=10.0, shift=0.15, zoom=0.3, flip=False) == PAPER_AUGMENTATION


def test_augment_is_a_flip_of_a_warp_and_a_function_of_each_key():
  images = jnp.asarray(some_images((16, 12, 12, 3)))
  keys = jax.random.split(jax.random.key(3), 16)
  whole = augment(keys, images, ALL)
  drawn = draw(keys, ALL, (12, 12))
  warped = np.asarray(warp(images, drawn))
  expected = np.where(np.asarray(drawn.flip)[:, None, None, None], warped[:, :, ::-1], warped)
  np.testing.assert_array_equal(whole, expected)
  np.testing.assert_array_equal(whole, augment(keys, images, ALL))
  assert not np.allclose(whole, augment(jax.random.split(jax.random.key(4), 16), images, ALL))


def test_the_result_does_not_depend_on_the_split_over_devices():
  images = jnp.asarray(some_images((16, 12, 12, 3)))
  keys = jax.random.split(jax.random.key(3), 16)
  run = jax.jit(functools.partial(augment, augmentation=ALL))
  whole = run(keys, images)
  parts = [run(keys[i : i + 4], images[i : i + 4]) for i in range(0, 16, 4)]
  # Within rounding: XLA may compile other batch sizes to other instructions.
  np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-5)
  devices = len(jax.devices())
  if devices > 1:
    shards = [x.reshape(devices, -1, *x.shape[1:]) for x in (keys, images)]
    mapped = jax.pmap(functools.partial(augment, augmentation=ALL))(*shards)
    np.testing.assert_allclose(mapped.reshape(images.shape), whole, atol=1e-5)


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    ({'rotation': -1.0}, 'rotation is -1.0; expected a number from 0 to 180 degrees'),
    ({'rotation': 181}, 'rotation is 181'),
    ({'rotation': float('nan')}, 'rotation is nan'),
    ({'shift': 1.0}, 'shift is 1.0; expected a number from 0 to below 1'),
    ({'shift': '0.1'}, "shift is '0.1'"),
    ({'zoom': 1.0}, 'zoom is 1.0'),
    ({'zoom': True}, 'zoom is True'),
    ({'flip': 1}, 'flip is 1; expected True or False'),
  ],
)
def test_bad_settings(values, message):
  with pytest.raises(UserError, match=message):
    Augmentation(**values)


def test_bad_inputs():
  keys = jax.random.split(jax.random.key(0), 2)
  with pytest.raises(UserError, match='dtype uint8; expected'):
    augment(keys, jnp.zeros((2, 4, 4, 1), jnp.uint8), ALL)
  with pytest.raises(UserError, match=r'images have shape \(2, 4, 4\)'):
    augment(keys, jnp.zeros((2, 4, 4)), ALL)
  with pytest.raises(UserError, match=r'keys have shape \(2,\).* expected \(3,\)'):
    augment(keys, jnp.zeros((3, 4, 4, 1)), ALL)
  with pytest.raises(UserError, match='dtype uint32; expected'):
    augment(jax.random.key_data(keys), jnp.zeros((2, 4, 4, 1)), ALL)
