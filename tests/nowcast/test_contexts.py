"""Wherever a process predicts first, it predicts the same, and so it does everywhere afterwards.

What is cached in a transformation must not belong to it. Each context gets a process of its own,
forked from one that has imported everything and computed nothing.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from processes import xla_flags
from test_nowcast import assert_close, make_history

import know_jax

ROOT = Path(__file__).parents[2]

DRIVER = """
import os, sys, threading, warnings
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
import know_jax
warnings.simplefilter('ignore')
history = [{'dense': {'kernel': np.cos(np.arange(32).reshape(8, 4) + 0.1 * t).astype(np.float32)}}
           for t in range(5)]
batch = jax.tree.map(lambda leaf: leaf[None], history)
flat = lambda tree: tree['dense']['kernel']

def of_batch(batch, name):
  found = know_jax.predict(jax.tree.map(lambda leaf: leaf[0], batch), 2, predictor=name)
  return jax.tree.map(lambda leaf: leaf[None], found)

def shard_map(name):
  mesh = Mesh(np.array(jax.devices()[:1]), ('d',))
  mapped = jax.shard_map(lambda h: of_batch(h, name), mesh=mesh, in_specs=P('d'), out_specs=P('d'))
  return flat(mapped(batch))[0]

def shard_map_of_constants(name):
  mesh = Mesh(np.array(jax.devices()[:1]), ('d',))
  mapped = jax.shard_map(
    lambda x: x + flat(know_jax.predict(history, 2, predictor=name)),
    mesh=mesh, in_specs=P(), out_specs=P())
  return mapped(jnp.zeros((8, 4)))

def jit(name):
  return flat(jax.jit(lambda h: know_jax.predict(h, 2, predictor=name))(history))

def vmap(name):
  return flat(jax.vmap(lambda h: know_jax.predict(h, 2, predictor=name))(batch))[0]

def pmap(name):
  return flat(jax.pmap(lambda h: know_jax.predict(h, 2, predictor=name))(batch))[0]

def grad(name):
  def loss(h):
    found = flat(know_jax.predict(h, 2, predictor=name))
    return found.sum(), found
  return jax.grad(loss, has_aux=True)(jax.tree.map(jnp.asarray, history))[1]

def checkpoint(name):
  return flat(jax.checkpoint(lambda h: know_jax.predict(h, 2, predictor=name))(history))

def scan(name):
  def body(carry, h):
    return carry, know_jax.predict(h, 2, predictor=name)
  return flat(jax.lax.scan(body, 0, batch)[1])[0]

def thread(name):
  found = []
  run = lambda: found.append(flat(know_jax.predict(history, 2, predictor=name)))
  worker = threading.Thread(target=run)
  worker.start(); worker.join()
  return found[0]

def plain(name):
  return flat(know_jax.predict(history, 2, predictor=name))

for context in map(globals().get, sys.argv[1].split(',')):
  sys.stdout.flush()
  if not (pid := os.fork()):
    code = 1
    try:
      for name in sys.argv[2:]:
        first, then = np.asarray(context(name)), np.asarray(plain(name))
        np.testing.assert_allclose(first, then, rtol=1e-5, atol=1e-6)
        assert (then != flat(history[-1])).all()
      code = 0
    finally:
      print(context.__name__, 'ok' if not code else 'failed', flush=True)
      os._exit(code)
  os.waitpid(pid, 0)
"""

SHORT = ('shard_map', 'shard_map_of_constants', 'pmap', 'thread')
THOROUGH = (*SHORT, 'jit', 'vmap', 'grad', 'checkpoint', 'scan')


def test_any_context_may_be_the_first(thorough):
  contexts, names = (THOROUGH, ('known', 'known_leaf')) if thorough else (SHORT, ('known_leaf',))
  env = {'PYTHONPATH': str(ROOT), 'XLA_FLAGS': xla_flags(devices=1)}
  done = subprocess.run(
    [sys.executable, '-c', DRIVER, ','.join(contexts), *names],
    capture_output=True, text=True, timeout=600, env={**os.environ, **env},
  )  # fmt: skip
  assert done.stdout.split('\n')[:-1] == [f'{name} ok' for name in contexts], done.stderr


@pytest.mark.parametrize('name', know_jax.PREDICTORS)
def test_over_a_mapped_axis(name):
  mesh = Mesh(np.array(jax.devices()[:2]), ('d',))
  shapes = {'head': {'kernel': (10, 3)}}
  members = [make_history(shapes=shapes, seed=seed) for seed in range(2)]
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *members)
  stacked = jax.device_put(stacked, NamedSharding(mesh, P('d')))

  def member(history):
    history = jax.tree.map(lambda leaf: leaf[0], history)
    found = know_jax.predict(history, 2, predictor=name, on_bad='ignore')
    return jax.tree.map(lambda leaf: leaf[None], found)

  mapped = jax.shard_map(member, mesh=mesh, in_specs=P('d'), out_specs=P('d'))
  result = jax.jit(mapped)(stacked)
  for i, history in enumerate(members):
    expected = know_jax.predict(history, 2, predictor=name, on_bad='ignore')
    assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], result), expected)


@pytest.mark.parametrize('name', ['known', 'known_leaf'])
def test_over_a_mapped_axis_of_theta(name):
  mesh = Mesh(np.array(jax.devices()[:2]), ('d',))
  theta, history = (
    know_jax.load_known(shipped=name),
    make_history(shapes={'head': {'kernel': (4, 3)}}),
  )
  thetas = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.9 * leaf]), theta)

  def member(theta):
    theta = jax.tree.map(lambda leaf: leaf[0], theta)
    found = know_jax.predict(jax.tree.map(jnp.asarray, history), 2, predictor=name, theta=theta)
    return jax.tree.map(lambda leaf: leaf[None], found)

  mapped = jax.shard_map(member, mesh=mesh, in_specs=P('d'), out_specs=P('d'))
  result = jax.jit(mapped)(thetas)
  for i in range(2):
    one = jax.tree.map(lambda leaf, i=i: leaf[i], thetas)
    expected = know_jax.predict(history, 2, predictor=name, theta=one)
    assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], result), expected)
