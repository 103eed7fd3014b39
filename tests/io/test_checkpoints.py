"""Checkpoints: bits kept, damage found and named, kills and failing disks survived."""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from know_jax.errors import UserError
from know_jax.io import checkpoints, files, sealed
from know_jax.system import signals

DTYPES = (
  *('bool', 'int8', 'uint8', 'int16', 'uint16', 'int32', 'uint32', 'int64', 'uint64'),
  *('float16', 'bfloat16', 'float32', 'float64', 'complex64', 'float8_e4m3fn', 'int4'),
)


def small_tree(seed: int = 0):
  rng = np.random.default_rng(seed)
  return {
    'params': {
      'conv1': {'kernel': rng.normal(size=(3, 3, 1, 4)).astype('f'), 'bias': np.ones(4, 'f')},
      'head': {'kernel': rng.normal(size=(40, 10)).astype(ml_dtypes.bfloat16)},
    },
    'batch_stats': {},
    'step': np.array(seed, np.int32),
  }


def bits(tree):
  """What equality of trees means here: structure, shapes, dtypes and bytes."""
  leaves, structure = jax.tree.flatten(tree)
  host = [np.asarray(leaf) for leaf in leaves]
  return structure, [(leaf.shape, leaf.dtype.name, leaf.tobytes()) for leaf in host]


# -- what goes in comes out ----------------------------------------------------------------------


@pytest.mark.parametrize('dtype', DTYPES)
def test_every_dtype_and_bit_is_kept(tmp_path, dtype):
  dtype = np.dtype(dtype)
  rng = np.random.default_rng(0)
  # All bit patterns, payloads of NaNs included; bool and int4 have but few.
  raw = rng.integers(0, 256, size=(3, 5, dtype.itemsize), dtype=np.uint8)
  if dtype.name in ('bool', 'int4'):
    raw %= 2
  array = raw.reshape(3, 5 * dtype.itemsize).view(dtype)
  tree = {'matrix': array, 'scalar': array[0, 0].reshape(()), 'strided': array.T[::2]}
  checkpoints.save(tmp_path / 'c', tree)
  found = checkpoints.restore(tmp_path / 'c', like=tree)
  assert bits(found) == bits(tree)
  assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(found))


_keys = st.text(min_size=1, max_size=6)
_arrays = hnp.arrays(
  st.sampled_from(['f4', 'f2', 'i4', 'u1', '?']),
  hnp.array_shapes(min_dims=0, max_dims=3, min_side=1, max_side=4),
)
_trees = st.dictionaries(
  _keys, st.recursive(_arrays, lambda inner: st.dictionaries(_keys, inner, max_size=3))
)


@given(tree=_trees)
@settings(
  max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_nested_dict_comes_back_or_is_refused(tmp_path, tree):
  path = Path(tempfile.mkdtemp(dir=tmp_path)) / 'c'
  try:
    checkpoints.save(path, tree)
  except UserError as error:
    assert 'without leaves' in str(error) or 'share one name' in str(error)
    assert not path.exists()
  else:
    assert bits(checkpoints.restore(path)) == bits(tree)


def test_jax_arrays_on_one_and_on_many_devices(tmp_path):
  mesh = jax.make_mesh((8,), ('d',), axis_types=(jax.sharding.AxisType.Auto,))
  array = jnp.arange(64, dtype=jnp.bfloat16).reshape(8, 8)
  spec = jax.sharding.PartitionSpec
  tree = {
    'one': array,
    'sharded': jax.device_put(array, jax.NamedSharding(mesh, spec('d'))),
    'replicated': jax.device_put(array, jax.NamedSharding(mesh, spec())),
    'pmapped': jax.pmap(lambda x: x + 1)(array),
  }
  assert len(tree['pmapped'].sharding.device_set) == 8
  checkpoints.save(tmp_path / 'c', tree)
  assert bits(checkpoints.restore(tmp_path / 'c')) == bits(jax.tree.map(np.asarray, tree))


def test_weights_are_a_plain_orbax_checkpoint_for_any_number_of_devices(tmp_path):
  import orbax.checkpoint as ocp

  mesh = jax.make_mesh((8,), ('d',), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.NamedSharding(mesh, jax.sharding.PartitionSpec('d'))
  tree = {'a': jax.device_put(np.arange(16, dtype='f'), sharding), **small_tree()}
  path = checkpoints.save(tmp_path / 'c', tree)
  with ocp.StandardCheckpointer() as checkpointer:
    assert bits(checkpointer.restore(path / 'weights')) == bits(tree)
  script = textwrap.dedent(f"""
    import hashlib, jax, numpy as np
    from know_jax.io import checkpoints
    assert jax.device_count() == 1
    leaves = jax.tree.leaves(checkpoints.restore({str(path)!r}))
    print(hashlib.sha256(b''.join(leaf.tobytes() for leaf in leaves)).hexdigest())
  """)
  done = subprocess.run(
    [sys.executable, '-W', 'error', '-c', script],
    env={**os.environ, 'XLA_FLAGS': ''},
    capture_output=True,
    text=True,
    check=True,
  )
  raw = b''.join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))
  assert done.stdout.strip() == hashlib.sha256(raw).hexdigest()
  assert done.stderr == ''


def test_metadata_exists_and_overwrite(tmp_path):
  path = tmp_path / 'deep' / 'er' / 'c'
  assert not checkpoints.exists(path)
  metadata = {'stage': 3, 'accuracy': 0.1 + 0.2, 'loss': float('inf'), 'names': ['a', None, True]}
  assert checkpoints.save(path, small_tree(1), metadata=metadata) == path
  assert checkpoints.exists(path)
  assert checkpoints.read_metadata(path) == metadata
  with pytest.raises(UserError, match=r'/c exists; expected a new path, or overwrite=True'):
    checkpoints.save(path, small_tree(2))
  assert bits(checkpoints.restore(path)) == bits(small_tree(1))
  checkpoints.save(path, small_tree(2), overwrite=True)
  assert bits(checkpoints.restore(path)) == bits(small_tree(2))
  assert checkpoints.read_metadata(path) == {}
  assert sorted(entry.name for entry in path.iterdir()) == ['manifest.json', 'weights']
  assert [entry.name for entry in path.parent.iterdir()] == ['c']


def test_weights_digest_tells_weights_apart(tmp_path):
  digests = [
    checkpoints.weights_digest(checkpoints.save(tmp_path / name, tree, metadata={'name': name}))
    for name, tree in {'a': small_tree(1), 'b': small_tree(1), 'c': small_tree(2)}.items()
  ]
  assert digests[0] == digests[1] != digests[2]
  tree = jax.tree.map(lambda x: x.reshape(x.shape[::-1]), small_tree(1))
  assert checkpoints.weights_digest(checkpoints.save(tmp_path / 'd', tree)) not in digests


def test_overwrite_replaces_checkpoints_only(tmp_path):
  (tmp_path / 'thesis').mkdir()
  (tmp_path / 'thesis' / 'text').write_text('years of work')
  with pytest.raises(UserError, match=r'thesis exists and is not a know_jax checkpoint'):
    checkpoints.save(tmp_path / 'thesis', small_tree(), overwrite=True)
  assert (tmp_path / 'thesis' / 'text').read_text() == 'years of work'


def test_a_link_to_a_checkpoint_survives_a_save(tmp_path):
  checkpoints.save(tmp_path / 'real', small_tree(1))
  (tmp_path / 'link').symlink_to('real')
  checkpoints.save(tmp_path / 'link', small_tree(2), overwrite=True)
  assert (tmp_path / 'link').is_symlink()
  assert bits(checkpoints.restore(tmp_path / 'real')) == bits(small_tree(2))


def test_nothing_is_printed_and_the_log_is_left_as_it_was(tmp_path, capfd):
  level = logging.getLogger('absl').level
  checkpoints.save(tmp_path / 'c', small_tree())
  checkpoints.restore(tmp_path / 'c')
  assert capfd.readouterr() == ('', '')
  assert logging.getLogger('absl').level == level


@pytest.mark.parametrize(
  ('tree', 'message'),
  [
    ([np.ones(2)], 'tree of .*list'),
    ({}, 'without leaves'),
    ({'a': {}}, 'without leaves'),
    ({'a': {'b': [np.ones(2)]}}, "leaf 'a/b' is of .*list"),
    ({'a': {'b': 1.0}}, "leaf 'a/b' is of .*float"),
    ({'a': {1: np.ones(2)}}, "key 1 in 'a'"),
    ({'a': np.ones((0, 3))}, r"leaf 'a' is empty, of shape \(0, 3\)"),
    ({'a': np.array(['x'])}, "leaf 'a' has dtype <U1"),
    ({'a': np.ones(2, '>f4')}, "leaf 'a' has dtype >f4; expected numbers in native byte order"),
    ({'a': jax.random.key(0)}, "leaf 'a' has dtype key<fry>.*key_data"),
    ({'a.b': np.ones(2), 'a': {'b': np.zeros(2)}}, "'a.b'.* and .*'a', 'b'.* share one name"),
    ({'a/b': np.ones(2), 'a': {'b': np.zeros(2)}}, "'a/b'.* and .*'a', 'b'.* share one name"),
  ],
)
def test_what_cannot_be_saved_is_refused_by_name(tmp_path, tree, message):
  with pytest.raises(UserError, match=message):
    checkpoints.save(tmp_path / 'c', tree)
  assert list(tmp_path.iterdir()) == []


def test_metadata_that_is_not_json_is_refused_by_name(tmp_path):
  with pytest.raises(UserError, match=r'metadata\.a\[1\] is .*ellipsis'):
    checkpoints.save(tmp_path / 'c', small_tree(), metadata={'a': [1, ...]})
  assert list(tmp_path.iterdir()) == []


# -- damage is found -----------------------------------------------------------------------------

WAYS = (
  *('flip', 'truncate', 'delete', 'swap', 'append'),
  *('zero', 'stray', 'double', 'foreign', 'rename'),
)


@pytest.fixture(scope='module')
def intact(tmp_path_factory):
  return checkpoints.save(tmp_path_factory.mktemp('intact') / 'c', small_tree(), metadata={'n': 1})


@pytest.fixture
def damaged(tmp_path, intact):
  """A copy to be damaged."""
  return Path(shutil.copytree(intact, tmp_path / 'c'))


def corrupt(rng: np.random.Generator, path: Path) -> str:
  """Damages one file of a folder at random; returns what was done and to which file."""
  names = sorted(str(p.relative_to(path)) for p in path.rglob('*') if p.is_file())
  name = names[rng.integers(len(names))]
  file = path / name
  data = bytearray(file.read_bytes())
  way = WAYS[rng.integers(len(WAYS))]
  if way == 'flip' and data:
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
  elif way == 'truncate' and data:
    del data[rng.integers(len(data)) :]
  elif way == 'append':
    data += rng.bytes(1 + int(rng.integers(9)))
  elif way == 'zero' and any(data):
    first = next(i for i, byte in enumerate(data) if byte)
    data[first : first + 512] = bytes(len(data[first : first + 512]))
  elif way == 'swap' and (others := [n for n in names if (path / n).read_bytes() != data]):
    other = path / others[rng.integers(len(others))]
    data = bytearray(other.read_bytes())
    other.write_bytes(file.read_bytes())
  elif way == 'double' and data:
    data *= 2
  elif way == 'foreign':
    data = bytearray(rng.bytes(len(data) + 1))
  elif way == 'stray':
    name += 'x'
    file = path / name
  elif way == 'rename':
    file.rename(path / f'{name}x')
    return f'rename {name}'
  else:
    file.unlink()
    return f'delete {name}'
  file.write_bytes(data)
  return f'{way} {name}'


def corrupt_and_check(rng: np.random.Generator, n: int, workdir: Path) -> int:
  """Damages `n` copies of a checkpoint at random, one way each, and checks that each is noticed.

  Args:
    rng: decides files, ways and places.
    n: the number of corruptions.
    workdir: an existing directory for the copies.

  Returns:
    The number of corruptions caught, which is `n`; anything unnoticed is an assertion error.
  """
  intact = checkpoints.save(workdir / 'intact', small_tree(), metadata={'accuracy': 0.5})
  path = workdir / 'damaged'
  for _ in range(n):
    shutil.copytree(intact, path)
    what = corrupt(rng, path)
    with pytest.raises(UserError) as caught:
      checkpoints.restore(path)
    # Of two swapped files either one may be named.
    assert what.split()[1] in str(caught.value) or what.startswith('swap'), (what, caught.value)
    shutil.rmtree(path)
  assert bits(checkpoints.restore(intact)) == bits(small_tree())
  return n


def test_no_random_corruption_goes_unnoticed(tmp_path):
  assert corrupt_and_check(np.random.default_rng(0), 60, tmp_path) == 60


def test_every_flipped_bit_of_the_manifest_is_noticed(damaged):
  file = damaged / 'manifest.json'
  data = file.read_bytes()
  rng = np.random.default_rng(0)
  for place in rng.choice(8 * len(data), size=300, replace=False):
    altered = bytearray(data)
    altered[place // 8] ^= 1 << int(place % 8)
    file.write_bytes(altered)
    with pytest.raises(UserError, match=r'manifest.json'):
      checkpoints.read_metadata(damaged)
  file.write_bytes(data)
  assert checkpoints.read_metadata(damaged) == {'n': 1}


def reseal(path: Path, change) -> None:
  """Alters a manifest and gives it the checksum of its new content."""
  content = sealed.read_sealed(path / 'manifest.json', 'manifest')
  change(content)
  sealed.write_sealed(path / 'manifest.json', content)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda m: m.update(version=2), r'has format version 2; this version of know_jax reads 1'),
    (
      lambda m: m.update(format='x'),
      r"manifest.json has format 'x'; expected 'know_jax checkpoint'",
    ),
    (lambda m: m.pop('leaves'), 'malformed'),
    (lambda m: m['leaves'].update(step=3), 'malformed'),
    (lambda m: m['leaves']['step'].update(shape=[-1]), 'malformed'),
    (lambda m: m['files']['weights/_METADATA'].pop('size'), 'malformed'),
    (lambda m: m['leaves'].pop('step'), "leaf 'step' is in its weights, not in its manifest"),
    (lambda m: m['leaves'].update(new=m['leaves']['step']), "leaf 'new' is in its manifest, not"),
    (
      lambda m: m['leaves']['step'].update(shape=[1]),
      r"leaf 'step' has shape \[\]; expected \[1\]",
    ),
    (lambda m: m['leaves']['step'].update(shape=[2**50]), 'bytes; this machine has'),
    (lambda m: m['leaves']['step'].update(dtype='int64'), "leaf 'step' has dtype int32; expected"),
    (lambda m: m['leaves']['step'].update(sha256='0'), "leaf 'step' has sha256 .*; expected 0, as"),
    (lambda m: m['files'].update({'../x': {'size': 1, 'sha256': ''}}), r"'../x' is missing"),
  ],
)
def test_manifests_that_do_not_fit(damaged, change, message):
  (damaged.parent / 'x').write_text('x')
  reseal(damaged, change)
  with pytest.raises(UserError, match=message):
    checkpoints.restore(damaged)


def test_what_is_not_ours_is_named(tmp_path, damaged):
  with pytest.raises(UserError, match=r'there is no checkpoint .*/nowhere'):
    checkpoints.restore(tmp_path / 'nowhere')
  (tmp_path / 'other').mkdir()
  with pytest.raises(UserError, match=r'/other is not a know_jax checkpoint: it has no manifest'):
    checkpoints.restore(tmp_path / 'other')
  (tmp_path / 'file').write_text('x')
  with pytest.raises(UserError, match=r'/file is not a know_jax checkpoint'):
    checkpoints.restore(tmp_path / 'file')
  (tmp_path / 'other' / 'manifest.json').write_text(json.dumps({'some': 'manifest'}))
  with pytest.raises(UserError, match=r'damaged or foreign: it has no checksum'):
    checkpoints.restore(tmp_path / 'other')
  (tmp_path / 'other' / 'manifest.json').write_text('[' * 10**6)
  with pytest.raises(UserError, match=r'damaged or foreign'):
    checkpoints.restore(tmp_path / 'other')
  metadata = damaged / 'weights' / '_METADATA'
  metadata.rename(tmp_path / 'elsewhere')
  metadata.symlink_to(tmp_path / 'elsewhere')
  with pytest.raises(UserError, match=r"'weights/_METADATA' is a link or a device"):
    checkpoints.restore(damaged)
  metadata.unlink()
  os.mkfifo(metadata)
  with pytest.raises(UserError, match=r"'weights/_METADATA' is a link or a device"):
    checkpoints.restore(damaged)


def test_like_names_the_leaf_that_differs(intact):
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), small_tree())
  checkpoints.restore(intact, like=shapes)
  shapes['params']['head']['kernel'] = jax.ShapeDtypeStruct((40, 10), jnp.float32)
  with pytest.raises(UserError, match=r"'params/head/kernel' has dtype bfloat16 in checkpoint /"):
    checkpoints.restore(intact, like=shapes)
  del shapes['params']['head']
  with pytest.raises(
    UserError, match=r"has leaf 'params/head/kernel', which the tree expected lacks"
  ):
    checkpoints.restore(intact, like=shapes)


# -- kills and failing disks ---------------------------------------------------------------------


class Kill(BaseException):
  """Stands for SIGKILL."""


class Killer:
  """Kills before the n-th change of files, and every later one: nothing is tidied up."""

  def __init__(self):
    self.left: int | None = None
    sys.addaudithook(self)

  def __call__(self, event, args):
    if self.left is None:
      return
    if event == 'open' and not (isinstance(args[2], int) and args[2] & os.O_CREAT):
      return
    if event in ('open', 'os.mkdir', 'os.rename', 'os.remove', 'os.rmdir', 'shutil.rmtree'):
      if self.left == 0:
        raise Kill
      self.left -= 1


@pytest.fixture(scope='module')
def killer():
  return Killer()  # An audit hook cannot be removed; this one does nothing between tests.


@pytest.mark.parametrize('overwrite', [False, True])
def test_a_kill_before_any_step_leaves_the_old_state_or_the_new(
  tmp_path, monkeypatch, killer, overwrite
):
  trees = {n: small_tree(n) for n in (1, 2)}
  made = {n: checkpoints.save(tmp_path / f'made{n}', trees[n]) for n in trees}

  def copy(path, directory, tree):
    # Orbax's threads would not die with this one, so a real checkpoint of Orbax is copied.
    shutil.copytree(made[int(tree['step'])] / 'weights', directory)

  monkeypatch.setattr(checkpoints, '_orbax_save', copy)
  seen = set()
  for step in range(10**6):
    path = tmp_path / f'{overwrite}{step}' / 'c'
    path.parent.mkdir()
    if overwrite:
      checkpoints.save(path, trees[1])
    killer.left = step
    try:
      checkpoints.save(path, trees[2], overwrite=overwrite)
      break
    except Kill:
      pass
    finally:
      killer.left = None
    if overwrite or checkpoints.exists(path):
      found = checkpoints.restore(path)
      assert bits(found) in [bits(trees[n]) for n in trees]
      seen.add(int(found['step']))
    else:
      with pytest.raises(UserError, match='there is no checkpoint'):
        checkpoints.restore(path)
      seen.add(1)
    # The next save of the path clears everything away.
    checkpoints.save(path, trees[1], overwrite=True)
    assert bits(checkpoints.restore(path)) == bits(trees[1])
    assert [entry.name for entry in path.parent.iterdir()] == ['c']
  assert step > 20
  assert seen == {1, 2}


def test_real_kills(tmp_path):
  # Forked from a process that has imported everything: a second per import would be too slow.
  script = textwrap.dedent(f"""
    import os, random, signal, sys, time, warnings
    import numpy as np
    from know_jax.io import checkpoints
    import orbax.checkpoint
    warnings.simplefilter('ignore')  # That JAX and forks do not mix; no backend is started here.
    path = {str(tmp_path / 'c')!r}

    def tree(n):
      return {{'n': np.array(n), 'w': np.full((50, 50), n, 'f')}}

    def child(work):
      pid = os.fork()
      if pid:
        return pid
      try:
        work()
        os._exit(0)
      except BaseException as error:
        print(repr(error), flush=True)
        os._exit(1)

    def save_for_ever():
      n = 0
      while True:
        n += 1
        checkpoints.save(path, tree(n), overwrite=True)

    def check():
      found = checkpoints.restore(path)
      assert found['w'].tobytes() == tree(int(found['n']))['w'].tobytes()

    for seed in range(8):
      pid = child(save_for_ever)
      while not os.path.exists(path):
        time.sleep(0.01)
      time.sleep(random.Random(seed).uniform(0.05, 0.25))
      os.kill(pid, signal.SIGKILL)
      os.waitpid(pid, 0)
      assert os.waitpid(child(check), 0)[1] == 0, seed
    print('survived')
  """)
  done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, timeout=120)
  assert done.stdout == 'survived\n', done.stdout + done.stderr


def test_a_signal_waits_for_the_end_of_a_save(tmp_path, monkeypatch):
  orbax_save = checkpoints._orbax_save

  def signalled(*args):
    signal.raise_signal(signal.SIGTERM)
    orbax_save(*args)

  monkeypatch.setattr(checkpoints, '_orbax_save', signalled)
  before = signal.signal(signal.SIGTERM, signals.raise_terminated)
  try:
    with pytest.raises(signals.Terminated):
      checkpoints.save(tmp_path / 'c', small_tree())
  finally:
    signal.signal(signal.SIGTERM, before)
  assert bits(checkpoints.restore(tmp_path / 'c')) == bits(small_tree())


@contextlib.contextmanager
def full_disk(monkeypatch):
  def refuse(fd, offset, length):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(os, 'posix_fallocate', refuse)
    yield


@contextlib.contextmanager
def small_files_only(monkeypatch):
  # The kernel refuses to let a file grow, in the middle of Orbax's writing.
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def no_rename(monkeypatch):
  rename = Path.rename

  def refuse(self, target):
    if 'saving' in self.name:
      raise OSError(5, 'Input/output error')
    return rename(self, target)

  with monkeypatch.context() as patch:
    patch.setattr(Path, 'rename', refuse)
    yield


@pytest.mark.parametrize(
  ('failure', 'words'),
  [
    (full_disk, 'No space left on device'),
    (small_files_only, 'File too large'),
    (no_rename, 'Input/output error'),
  ],
)
def test_a_failing_disk_leaves_the_last_good_state(tmp_path, monkeypatch, failure, words):
  path = checkpoints.save(tmp_path / 'c', small_tree(1))
  # One leaf: of several that fail, TensorStore's threads report all but the first as unraisable
  # errors, some time later.
  large = {'w': np.random.default_rng(0).normal(size=(100, 100))}
  with (
    failure(monkeypatch),
    pytest.raises(UserError, match=f'cannot save checkpoint {path}: {words}'),
  ):
    checkpoints.save(path, large, overwrite=True)
  assert [entry.name for entry in tmp_path.iterdir()] == ['c']
  assert bits(checkpoints.restore(path)) == bits(small_tree(1))
  checkpoints.save(path, large, overwrite=True)
  assert bits(checkpoints.restore(path)) == bits(large)


def test_a_read_only_folder_is_an_error_with_its_reason():
  # Not tmp_path: a root user has to become another one here, who may not enter that.
  folder = Path(tempfile.mkdtemp())
  path = checkpoints.save(folder / 'c', small_tree(1))
  folder.chmod(0o555)
  root = os.geteuid() == 0
  if root:
    os.seteuid(65534)
  try:
    for name in ('c', 'new', 'new/er'):
      with pytest.raises(UserError, match=f'save checkpoint {folder / name}: Permission denied'):
        checkpoints.save(folder / name, small_tree(2), overwrite=True)
    assert bits(checkpoints.restore(path)) == bits(small_tree(1))
  finally:
    if root:
      os.seteuid(0)
    folder.chmod(0o755)
  assert [entry.name for entry in folder.iterdir()] == ['c']
  shutil.rmtree(folder)


def test_a_second_writer_is_told_and_a_stale_lock_is_no_obstacle(tmp_path, monkeypatch):
  monkeypatch.setitem(files.locked.__wrapped__.__kwdefaults__, 'wait_seconds', 0.05)
  lock = tmp_path / '.c.lock'
  with lock.open('w') as held:
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(UserError, match=r'save checkpoint .*/c: another process is writing it'):
      checkpoints.save(tmp_path / 'c', small_tree())
  assert lock.exists()
  checkpoints.save(tmp_path / 'c', small_tree())
  assert [entry.name for entry in tmp_path.iterdir()] == ['c']
