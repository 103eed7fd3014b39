"""LoRA whose product is predicted; references: NumPy's products and decompositions in float64."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import know_jax
from know_jax.errors import PredictionWarning, UserError
from know_jax.nowcast import file_job, from_files, lora

MODULE = 'base_model.model.layers.{}.self_attn.q_proj'


def factors(rng, layer, rank=3, dtype=np.float32):
  name = MODULE.format(layer)
  return {
    f'{name}.lora_A.weight': rng.normal(size=(rank, 10)).astype(dtype),
    f'{name}.lora_B.weight': rng.normal(size=(7, rank)).astype(dtype),
  }


def save(folder, stages, **config):
  paths = []
  for number, stage in enumerate(stages):
    paths.append(folder / f'checkpoint-{number}')
    paths[-1].mkdir(parents=True)
    safetensors.numpy.save_file(stage, paths[-1] / 'adapter_model.safetensors', {'format': 'pt'})
    about = {'r': 3, 'lora_alpha': 12, **config}
    (paths[-1] / 'adapter_config.json').write_text(json.dumps(about))
  return paths


def make_stages(count=4, dtype=np.float32, **more):
  """Factors that turn against each other from stage to stage: only their product moves slowly."""
  rng = np.random.default_rng(0)
  stages = []
  start = factors(rng, 0) | factors(rng, 1)
  for _ in range(count):
    stage = dict(more)
    for layer in range(2):
      a, b = (f'{MODULE.format(layer)}.lora_{x}.weight' for x in 'AB')
      turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
      for name in (a, b):
        start[name] = start[name] + 0.05 * rng.normal(size=start[name].shape)
      stage |= {a: (turn @ start[a]).astype(dtype), b: (start[b] @ turn.T).astype(dtype)}
    stages.append(stage)
  return stages


def product(stage, layer, scale):
  a, b = (
    np.asarray(stage[f'{MODULE.format(layer)}.lora_{x}.weight'], np.float64) for x in 'AB'
  )  # fmt: skip
  return scale * b @ a


@pytest.mark.parametrize(
  ('config', 'scales'),
  [
    ({}, (4, 4)),
    ({'use_rslora': True}, (12 / 3**0.5,) * 2),
    ({'alpha_pattern': {r'layers.1.self_attn.\w+': 6}}, (4, 2)),
  ],
)
def test_the_product_is_predicted_and_taken_apart_to_its_rank(tmp_path, config, scales):
  stages = make_stages()
  paths = save(tmp_path / 'in', stages, **config)
  job = file_job.prepare([tmp_path / 'in'], predictors=['linear_fit'], steps=2, lora='merged')
  assert job.kinds == {
    f'base_model/model/layers/{n}/self_attn/q_proj/lora_BA/weight': 'fc' for n in (0, 1)
  }
  folders = from_files.write(job, tmp_path / 'out', show_progress=False)
  for step, folder in enumerate(folders, 1):
    found = safetensors.numpy.load_file(folder / 'adapter_model.safetensors')
    assert {n: (x.shape, x.dtype) for n, x in found.items()} == {
      n: (x.shape, x.dtype) for n, x in stages[-1].items()
    }
    card = json.loads((folder / 'nowcast.json').read_text())
    errors = card['files']['adapter_model.safetensors']['refactoring_error']
    for layer, scale in enumerate(scales):
      history = [{'k': product(s, layer, scale).astype(np.float32)} for s in stages]
      (expected,) = know_jax.predict(
        history, step, predictor='linear_fit', kinds={'k': 'fc'}
      ).values()
      u, values, v = np.linalg.svd(np.asarray(expected, np.float64), full_matrices=False)
      nearest = (u[:, :3] * values[:3]) @ v[:3]
      # In float32, of numbers about one.
      np.testing.assert_allclose(product(found, layer, scale), nearest, atol=2e-5 * scale)
      lost = np.linalg.norm(values[3:]) / np.linalg.norm(values)
      np.testing.assert_allclose(errors[sorted(job.kinds)[layer]], lost, atol=1e-6)
      assert lost > 1e-4
    assert (
      'products of A and B of LoRA were predicted, 2 of them' in (folder / 'README.md').read_text()
    )
  # The same call once more finds all as it was.
  before = (folders[0] / 'adapter_model.safetensors').stat().st_mtime_ns
  from_files.write(job, tmp_path / 'out', show_progress=False)
  assert (folders[0] / 'adapter_model.safetensors').stat().st_mtime_ns == before
  assert (folders[0] / 'adapter_config.json').read_bytes() == (
    paths[-1] / 'adapter_config.json'
  ).read_bytes()


def test_a_product_that_does_not_move_keeps_its_factors_bit_for_bit(tmp_path):
  """One stands still, though A and B have turned; a magnitude vector beside; in bfloat16."""
  stages = make_stages(3, magnitude=np.ones(7, np.float32))
  a, b = (f'{MODULE.format(1)}.lora_{x}.weight' for x in 'AB')
  for stage, sign in zip(stages, (1, -1, 1), strict=True):
    stage[a], stage[b] = sign * stages[0][a], sign * stages[0][b]
  save(tmp_path / 'in', stages)
  job = file_job.prepare(
    [tmp_path / 'in'], predictors=['log_fit'], steps=1, lora='merged', dtype='bfloat16',
    kinds={'magnitude$': 'keep'},
  )  # fmt: skip
  (folder,) = from_files.write(job, tmp_path / 'out', show_progress=False)
  found = safetensors.numpy.load_file(folder / 'adapter_model.safetensors')
  for name in (a, b, 'magnitude'):
    np.testing.assert_array_equal(found[name], stages[-1][name].astype(jnp.bfloat16))
  moved = f'{MODULE.format(0)}.lora_B.weight'
  assert found[moved].dtype == jnp.bfloat16
  assert not np.array_equal(found[moved], stages[-1][moved].astype(jnp.bfloat16))


def test_convolutions_and_names_of_flax(tmp_path):
  rng = np.random.default_rng(0)
  shapes = {
    'conv.lora_A.weight': (2, 3, 3, 3), 'conv.lora_B.weight': (4, 2, 1, 1),
    'dense/lora_a': (6, 2), 'dense/lora_b': (2, 5),
    'emb.lora_embedding_A': (2, 9), 'emb.lora_embedding_B': (4, 2),
  }  # fmt: skip
  stages = [{n: rng.normal(size=s).astype('f') for n, s in shapes.items()} for _ in range(3)]
  for number, stage in enumerate(stages):
    safetensors.numpy.save_file(stage, tmp_path / f's{number}.safetensors')
  job = file_job.prepare([tmp_path], predictors=['task_vector'], steps=1, lora='merged')
  shapes = {path: leaf.shape for path, leaf in job.leaves.items()}
  assert shapes == {
    'conv/lora_BA/weight': (4, 3, 3, 3),
    'dense/lora_ab': (6, 5),
    'emb/lora_embedding_BA': (4, 9),
  }
  (folder,) = from_files.write(job, tmp_path / 'out', show_progress=False)
  found = safetensors.numpy.load_file(folder / 's2.safetensors')

  def dense(stage):
    return stage['dense/lora_a'].astype(np.float64) @ stage['dense/lora_b']

  u, values, v = np.linalg.svd(2 * dense(stages[2]) - dense(stages[1]))
  np.testing.assert_allclose(dense(found), (u[:, :2] * values[:2]) @ v[:2], atol=1e-5)


@pytest.mark.parametrize('shape', [(40, 30), (300, 280), (2, 9)])
def test_the_nearest_of_a_rank(shape):
  """Against the whole decomposition of NumPy; also where only a few values are computed."""
  matrix = np.random.default_rng(0).normal(size=shape)
  left, right = lora.take_apart(matrix, 4)
  u, values, v = np.linalg.svd(matrix, full_matrices=False)
  np.testing.assert_allclose(left @ right, (u[:, :4] * values[:4]) @ v[:4], atol=1e-9)
  np.testing.assert_allclose((left**2).sum(0), (right**2).sum(1), atol=1e-9)
  assert (left.shape, right.shape) == ((shape[0], 4), (4, shape[1]))


def test_what_cannot_be_merged_is_named(tmp_path):
  (good,) = make_stages(1)
  second = sorted(good)[1]
  paths = save(tmp_path / 'alone', [{n: x for n, x in good.items() if n != second}])
  with pytest.raises(UserError, match=r"q_proj/lora_A/weight' has no '.*lora_B/weight' beside it"):
    file_job.prepare(paths, lora='merged')
  paths = save(tmp_path / 'unfit', [good | {second: np.ones((7, 5), np.float32)}])
  with pytest.raises(UserError, match=r'shape \(7, 5\) and .* \(3, 10\) have no product of a com'):
    file_job.prepare(paths, lora='merged')
  paths = save(tmp_path / 'none', [{'dense.kernel': np.ones((3, 3), np.float32)}])
  with pytest.raises(UserError, match="no leaf is called lora_A; the first is 'dense/kernel'"):
    file_job.prepare(paths, lora='merged')
  paths = save(tmp_path / 'alpha', [good], lora_alpha='x')
  with pytest.raises(UserError, match=r"adapter_config.json: lora_alpha is 'x'; expected a number"):
    file_job.prepare(paths, predictors=['persistence'], lora='merged')
  with pytest.raises(UserError, match=r'unknown lora .merge.'):
    file_job.prepare(paths, lora='merge')
  with pytest.raises(UserError, match='expected no format'):
    file_job.prepare(
      save(tmp_path / 'f', [good]), predictors=['persistence'], lora='merged', format='safetensors'
    )
  with pytest.warns(PredictionWarning, match='A and B of LoRA are predicted apart'):
    file_job.prepare(save(tmp_path / 'apart', [good]), predictors=['persistence'])
