"""Pictures: the plane is that of a singular value decomposition, and something is drawn."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from know_jax.report import plots
from know_jax.trajectory import Trajectory


@pytest.mark.parametrize(('count', 'size'), [(2, 5), (3, 1), (6, 4), (9, 1000)])
def test_principal_plane_equals_a_singular_value_decomposition(count, size):
  rng = np.random.default_rng(count)
  points = rng.normal(3.0, 1.0, (count, size)) * rng.uniform(0.1, 2.0, size)
  found, shares = plots.principal_plane(points)
  u, s, _ = np.linalg.svd(points - points.mean(0), full_matrices=False)
  s = np.concatenate([s, [0.0]])
  u = np.hstack([u, np.zeros((count, 1))])
  np.testing.assert_allclose(shares, s[:2] ** 2 / (s**2).sum(), atol=1e-12)
  assert found.shape == (count, 2)
  for component in range(2):
    expected = u[:, component] * s[component]
    scale = np.abs(points).max()
    middle = found[(count - 1) // 2, component]
    assert middle >= 0  # Which of the two signs it is.
    sign = 1.0 if np.abs(found[:, component] - expected).max() < 1e-6 * scale else -1.0
    np.testing.assert_allclose(found[:, component], sign * expected, atol=1e-6 * scale)


def test_principal_plane_equals_scikit_learn():
  from sklearn.decomposition import PCA

  points = np.random.default_rng(0).normal(size=(8, 30)).astype(np.float32)
  found, shares = plots.principal_plane(points)
  pca = PCA(2, svd_solver='full').fit(points.astype(np.float64))
  np.testing.assert_allclose(np.abs(found), np.abs(pca.transform(points)), rtol=1e-6, atol=1e-9)
  np.testing.assert_allclose(shares, pca.explained_variance_ratio_, rtol=1e-9)


def test_principal_plane_keeps_distances_of_points_in_a_plane():
  rng = np.random.default_rng(1)
  flat = rng.normal(size=(7, 2)) * (3, 1)
  axes = np.linalg.qr(rng.normal(size=(50, 2)))[0].T
  # Weights far from zero, in float32: the mean must be taken off with care.
  found, shares = plots.principal_plane((100 + flat @ axes).astype(np.float32))
  distances = [np.linalg.norm(x[:, None] - x[None], axis=-1) for x in (found, flat)]
  np.testing.assert_allclose(distances[0], distances[1], atol=1e-3)
  assert shares.sum() == pytest.approx(1.0, abs=1e-6)


def test_principal_plane_of_equal_points():
  found, shares = plots.principal_plane(np.ones((3, 4)))
  assert (found == 0).all()
  assert (shares == 0).all()


def weights(seed, scale=1.0):
  rng = np.random.default_rng(seed)
  return {
    'params': {'dense': {'kernel': rng.normal(0, scale, (3, 4)), 'bias': rng.normal(0, scale, 4)}},
    'batch_stats': {'norm': {'mean': np.full(4, np.nan)}},
  }


@pytest.mark.parametrize('wild', [1.0, np.nan])
def test_the_picture_has_history_and_predictions(tmp_path, wild):
  history = [
    {c: {n: {k: leaf.astype(np.float32) for k, leaf in layer.items()} for n, layer in part.items()}
     for c, part in weights(seed).items()}
    for seed in range(5)
  ]  # fmt: skip
  groups = {
    name: [
      SimpleNamespace(variables=weights(10 * i + n, scale), multiple=2.0**n, loss=0.5 + n / 20)
      for n in (1, 2, 3)
    ]
    for i, (name, scale) in enumerate((('shrink', 1.0), ('known_leaf', wild)), 1)
  }
  path = tmp_path / 'new' / 'picture.png'
  trajectory = Trajectory.from_sequence(history)
  plots.plot_nowcast(path, trajectory, groups, [0.5, 0.6, 0.7, 0.8, 0.9], 0.5)
  with Image.open(path) as picture:
    pixels = np.asarray(picture.convert('RGB')).reshape(-1, 3)
  colors, counts = np.unique(pixels, axis=0, return_counts=True)
  assert (colors[counts.argmax()] == 255).all()  # A white ground, and on it
  found = {tuple(map(int, color)) for color in colors}
  # the history in black and both predictors in Matplotlib's C0 and C1.
  assert {(0, 0, 0), (31, 119, 180), (255, 127, 14)} <= found
  before = path.read_bytes()
  plots.plot_nowcast(path, trajectory, {}, [0.5, 0.6, 0.7, 0.8, 0.9], 0.5)
  assert path.read_bytes() != before
