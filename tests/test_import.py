"""What `import know_jax` needs and brings in, each in a fresh interpreter."""

import importlib.metadata
import itertools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def run(source):
  done = subprocess.run(
    [sys.executable, '-W', 'error', '-c', source], cwd='/', capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


HISTORY = """
import jax, numpy as np
import know_jax
from know_jax.predictors import known
rng = np.random.default_rng(0)
history = [
  {'conv': {'kernel': rng.normal(size=(3, 3, 1, 2)).astype(np.float32)},
   'head': {'kernel': rng.normal(size=(4, 3)).astype(np.float32), 'bias': np.ones(3, np.float32)}}
  for _ in range(5)
]
shapes = jax.eval_shape(known.init_theta, jax.random.key(0))
theta = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.01, leaf.dtype), shapes)
def run(name, theta):
  # Parameters of the paper's network; known_leaf has shipped ones of its own.
  options = {'theta': theta} if name in ('known', 'known_history_free') else {}
  # Random weights are like none that KNOWN was trained on.
  predicted = know_jax.predict(history, 2, predictor=name, on_bad='ignore', **options)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(predicted)), name
"""


def test_the_garbage_collector_is_left_as_it_was_found():
  for before in ('enable', 'disable'):
    out = run(f"""
import gc
gc.{before}()
before = gc.isenabled(), gc.get_threshold()
import know_jax
print((gc.isenabled(), gc.get_threshold()) == before, gc.get_stats()[2]['collections'])
""")
    assert out.split() == ['True', '0']  # And it was not at work on the way.


def test_import_is_quick_and_neither_it_nor_predict_brings_in_the_heavy_packages():
  heavy = (
    'tensorflow', 'tensorflow_datasets', 'orbax', 'optax', 'sklearn', 'matplotlib', 'h5py',
    'pandas',
  )  # fmt: skip
  out = run(f"""
import sys, time
import jax, flax
start = time.perf_counter()
import know_jax
assert time.perf_counter() - start < 1.5
def loaded():
  return sorted({{name.split('.')[0] for name in sys.modules}} & set({heavy!r}))
assert not loaded(), loaded()
{HISTORY}
run('known', theta)
assert not loaded(), loaded()
print('done')
""")
  assert out == 'done\n'


def pins(lock):
  lines = (ROOT / '.ci' / lock).read_text().splitlines()
  found = (Requirement(line) for line in lines if not line.startswith('#'))
  return {canonicalize_name(pin.name): str(pin.specifier).removeprefix('==') for pin in found}


def test_the_lower_bounds_are_the_versions_that_are_tested():
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  # PyTorch and the tools of the site are in environments of their own: no lock file has them.
  optional = project['optional-dependencies'].items()
  extras = [v for extra, v in optional if extra not in ('torch', 'docs')]
  expected = [Requirement(line) for line in itertools.chain(project['dependencies'], *extras)]
  oldest, newest = pins('oldest.txt'), pins('newest.txt')
  assert len(expected) > 20
  for requirement in expected:
    name = canonicalize_name(requirement.name)
    # One bound each, written as the oldest lock file has it.
    assert requirement.specifier == SpecifierSet(f'>={oldest[name]}'), name
    assert Version(oldest[name]) <= Version(newest[name]), name


def train_modules():
  """The top-level modules of the packages that the extra `train` asks for."""
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  expected = {
    re.match(r'[\w.-]+', requirement)[0].lower()
    for requirement in project['optional-dependencies']['train']
  }
  provided = importlib.metadata.packages_distributions()
  found = {
    module
    for module, names in provided.items()
    if {name.lower().replace('_', '-') for name in names} & {n.replace('_', '-') for n in expected}
  }
  return sorted(module for module in found if module.isidentifier())


# Fails every import of a module that core dependencies do not bring.
BLOCK = """
import sys
class Block:
  def find_spec(self, name, path=None, target=None):
    if name.split('.')[0] in {blocked!r}:
      raise ModuleNotFoundError('not a core dependency: ' + name, name=name)
sys.meta_path.insert(0, Block())
"""


def core_only():
  """Code that blocks what core dependencies do not bring; run it before any import."""
  blocked = train_modules()
  for module in ('optax', 'orbax', 'h5py', 'sklearn', 'tensorflow_datasets', 'PIL', 'tqdm'):
    assert module in blocked
  core = ('absl', 'scipy')  # Flax imports the one, JAX the other.
  return BLOCK.format(blocked=[module for module in blocked if module not in core])


def test_all_predictors_work_with_core_dependencies_only():
  source = "for name in know_jax.PREDICTORS: run(name, theta)\nprint('done')"
  assert run(core_only() + HISTORY + source) == 'done\n'


def test_the_shipped_weights_work_with_core_dependencies_only():
  source = "run('known', None); run('known_leaf', None)\nprint('done')"
  assert run(core_only() + HISTORY + source) == 'done\n'


# Windows, as far as Python shows it: calls and modules that only Unix has are missing. For what is
# the package's own; other packages are imported before.
WINDOWS = """
import jax, orbax.checkpoint, absl.app, ml_collections.config_flags, multiprocessing.shared_memory
import os, types
for name in ('fcntl', 'resource'):
  sys.modules.pop(name, None)
unix = 'preadv pwrite posix_fallocate sched_getaffinity O_DIRECTORY O_CLOEXEC'
for name in unix.split():
  delattr(os, name)
# From Python 3.13 on: it asks for the affinity only where the system had it.
os.process_cpu_count = os.cpu_count
sys.modules['msvcrt'] = msvcrt = types.ModuleType('msvcrt')
locks = []
msvcrt.LK_NBLCK, msvcrt.locking = 2, lambda *args: locks.append(args)
"""


def test_files_are_predicted_where_the_system_is_not_unix_and_tfds_is_missing(tmp_path):
  blocked = ['fcntl', 'resource', 'array_record', 'tensorflow_datasets']
  out = run(
    f'import sys\n{WINDOWS}{BLOCK.format(blocked=blocked)}{HISTORY}'
    f"""
from pathlib import Path
import orbax.checkpoint as ocp
import safetensors.numpy
from know_jax import trees
from know_jax.nowcast import file_job, from_files
import know_jax.runs.cli, know_jax.forgetting, know_jax.data.sources
folder = Path({str(tmp_path)!r})
for i, stage in enumerate(history):
  flat = {{path.replace('/', '.'): leaf for path, leaf in trees.named_leaves(stage).items()}}
  safetensors.numpy.save_file(flat, folder / f'{{i}}.safetensors')
  with ocp.StandardCheckpointer() as saver:
    saver.save(folder / f'{{i}}.orbax', stage)
for form in ('safetensors', 'orbax'):
  files = [str(folder / f'{{i}}.{{form}}') for i in range(5)]
  job = file_job.prepare(files, predictors=['task_vector'], steps=1)
  from_files.write(job, folder / form, show_progress=False)
(file,) = (folder / 'safetensors' / 'task_vector' / '1').glob('*.safetensors')
results = [safetensors.numpy.load_file(file)['head.kernel']]
with ocp.StandardCheckpointer() as saver:
  results.append(saver.restore(folder / 'orbax' / 'task_vector' / '1')['head']['kernel'])
before, newest = (stage['head']['kernel'] for stage in history[3:])
for result in results:
  np.testing.assert_allclose(result, 2 * newest - before, atol=1e-5)
assert locks and all(args[1:] == (2, 1) for args in locks)
print('done')
"""
  )
  assert out.endswith('done\n')


def test_reading_the_authors_files_without_h5py_says_what_to_install(tmp_path):
  for kind in ('Conv', 'FC', 'Bias'):
    (tmp_path / f'KNOWN_{kind}.h5').touch()
  out = run(
    BLOCK.format(blocked=['h5py'])
    + f"""
import know_jax
try:
  know_jax.load_known({str(tmp_path)!r})
except know_jax.UserError as error:
  print(error)
"""
  )
  assert 'needs h5py; pip install h5py' in out
