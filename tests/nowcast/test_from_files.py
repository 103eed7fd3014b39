"""Histories in files: what is read and written by slices is what `forecast` gives for the whole.

References: `know_jax.forecast`, and the safetensors library, which reads what is written here and
judges headers.
"""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import strategies as st
from runs import snapshot

import know_jax
from know_jax import trees
from know_jax.errors import UserError
from know_jax.io import checkpoints
from know_jax.io.formats import open_weights
from know_jax.io.safetensors import DTYPES
from know_jax.io.sealed import read_sealed
from know_jax.io.weights import Reader, Sink
from know_jax.nowcast import chunks, file_job, from_files, health, linear, pieces
from know_jax.predictors import known, parameters

ROOT = Path(__file__).parents[2]
SHAPES = {
  'conv/bias': (5,),
  'conv/kernel': (3, 3, 4, 5),
  'dense/bias': (40,),
  'dense/kernel': (250, 40),
  'norm/bias': (5,),
  'norm/scale': (5,),
  'scalar/bias': (),
}


def narrow_slices(monkeypatch):
  """So that small leaves have several slices."""
  monkeypatch.setattr(pieces, 'STRETCH', 1 << 13)
  monkeypatch.setattr(linear, 'CHUNK', 1 << 13)  # It divides a stretch.


@pytest.fixture(autouse=True)
def in_narrow_slices(monkeypatch):
  narrow_slices(monkeypatch)


def make_history(dtype=np.float32, seed=0, scale=0.1):
  """Five stages, path -> leaf, with a counter that nothing predicts."""
  rng = np.random.default_rng(seed)
  stage = {path: rng.normal(scale=scale, size=shape) for path, shape in SHAPES.items()}
  history = []
  for number in range(5):
    stage = {p: leaf + rng.normal(scale=scale / 10, size=leaf.shape) for p, leaf in stage.items()}
    tree = {path: np.asarray(leaf, dtype) for path, leaf in stage.items()}
    history.append({**tree, 'steps': np.array(2**40 + number, np.int64)})
  return history


def save_file(path, stage, **metadata):
  tensors = {name.replace('/', '.'): leaf for name, leaf in stage.items()}
  safetensors.numpy.save_file(tensors, path, metadata or None)
  return path


def save_shards(folder, stage, shards=3):
  """As Hugging Face writes them."""
  folder.mkdir()
  names, weight_map = sorted(stage), {}
  for number in range(shards):
    file = f'model-{number + 1:05}-of-{shards:05}.safetensors'
    part = {name: stage[name] for name in names[number::shards]}
    save_file(folder / file, part, format='pt')
    weight_map |= {name.replace('/', '.'): file for name in part}
  index = {'metadata': {'total_size': 0}, 'weight_map': weight_map}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
  return folder


def save_all(folder, history):
  folder.mkdir(exist_ok=True)
  return [save_file(folder / f'{i}.safetensors', stage) for i, stage in enumerate(history)]


def raw_tensors(path):
  """Name -> array, by an own reading of the format that trusts the file."""
  data = path.read_bytes()
  length = int.from_bytes(data[:8], 'little')
  header = json.loads(data[8 : 8 + length])
  header.pop('__metadata__', None)
  found = {}
  for name, entry in header.items():
    begin, end = (8 + length + offset for offset in entry['data_offsets'])
    found[name] = np.frombuffer(data[begin:end], DTYPES[entry['dtype']]).reshape(entry['shape'])
  return found


def load(folder):
  """Path -> leaf of a folder of shards, through its index."""
  index = json.loads((folder / 'model.safetensors.index.json').read_text())
  found, size = {}, 0
  files = set(index['weight_map'].values())
  assert files == {path.name for path in folder.glob('*.safetensors')}
  for file in sorted(files):
    with safetensors.safe_open(folder / file, framework='numpy') as library:
      names = set(library.keys())
    tensors = raw_tensors(folder / file)
    assert set(tensors) == names == {n for n, f in index['weight_map'].items() if f == file}
    found |= {name.replace('.', '/'): leaf for name, leaf in tensors.items()}
    size += sum(leaf.nbytes for leaf in tensors.values())
  assert index['metadata']['total_size'] == size
  return dict(sorted(found.items()))


def run(history, output, *, shard_bytes=1 << 14, format='safetensors', **options):
  job = file_job.prepare(history, format=format, **options)
  return from_files.write(job, output, shard_bytes=shard_bytes, show_progress=False)


def forecast(history, predictor, steps=3, **options):
  """The stages of `know_jax.forecast`; it has no int64, which stays as it is."""
  bare = [{p: leaf for p, leaf in stage.items() if p != 'steps'} for stage in history]
  found = know_jax.forecast(bare, steps, predictor=predictor, **options)
  return [
    {path: np.asarray(leaf) for path, leaf in stage.items()} | {'steps': history[-1]['steps']}
    for stage in found
  ]


def assert_predicted(found, expected, exact=True):
  assert list(found) == sorted(expected)
  for path, leaf in found.items():
    want = np.asarray(expected[path])
    assert (leaf.dtype, leaf.shape) == (want.dtype, want.shape), path
    if exact or not trees.is_floating(leaf):
      assert leaf.tobytes() == want.tobytes(), path
    else:
      one_off = max(1e-6, float(jnp.finfo(leaf.dtype).eps) if leaf.dtype.itemsize == 2 else 0)
      leaf, want = leaf.astype(np.float64), want.astype(np.float64)
      np.testing.assert_allclose(leaf, want, rtol=one_off, err_msg=path)
      assert (np.abs(leaf - want) > 1e-6 * np.abs(want)).mean() < 0.01, path


# KNOWN conditioned on the leaf finds the coefficients of all leaves at once in `forecast`.
@pytest.mark.parametrize(
  ('dtype', 'exact', 'close'),
  [
    (np.float32, ('log_fit', 'task_vector'), ('known_leaf',)),
    (jnp.bfloat16, ('log_fit', 'consensus_ta'), ('known_leaf', 'known_leaf_history_free')),
    (np.float16, ('log_fit',), ('known_leaf',)),
  ],
)
def test_predictions_are_those_of_forecast(tmp_path, dtype, exact, close):
  history = make_history(dtype)
  files = [
    save_shards(tmp_path / 'zero', history[0]),
    save_shards(tmp_path / 'one', history[1], 2) / 'model.safetensors.index.json',
    *(save_file(tmp_path / f'{i}.safetensors', history[i], format='pt') for i in (2, 3, 4)),
  ]
  folders = run(files, tmp_path / 'out', predictors=(*exact, *close), rate=0.4)
  assert folders == [tmp_path / 'out' / name / n for name in (*exact, *close) for n in '123']
  for predictor in (*exact, *close):
    for n, expected in enumerate(forecast(history, predictor, rate=0.4), 1):
      folder = tmp_path / 'out' / predictor / str(n)
      assert_predicted(load(folder), expected, exact=predictor in exact)
      assert len(list(folder.glob('*.safetensors'))) == 3
      card = read_sealed(folder / 'nowcast.json', 'card')
      assert (card['predictor'], card['steps'], card['rate']) == (predictor, n, 0.4)
      assert card['multiple'] == 0.4**-n
      assert card['kinds']['dense/kernel'] == 'fc'
      assert [len(stage['files']) for stage in card['history']] == [3, 2, 1, 1, 1]
      assert card['environment']['jax'] == jax.__version__
  with safetensors.safe_open(next(folder.glob('*.safetensors')), framework='numpy') as library:
    assert library.metadata() == {'format': 'pt'}


def test_float64_needs_x64(tmp_path):
  history = make_history(np.float64)
  files = save_all(tmp_path, history)
  with pytest.raises(UserError, match=r"leaf 'conv/bias' is float64, which JAX would narrow"):
    run(files, tmp_path / 'out')
  with jax.enable_x64(True):
    run(files, tmp_path / 'out', predictors=['log_fit'], steps=2)
    for n, expected in enumerate(forecast(history, 'log_fit', 2), 1):
      assert_predicted(load(tmp_path / 'out' / 'log_fit' / str(n)), expected)


def test_no_more_than_a_slice_is_read_at_once(tmp_path, monkeypatch):
  reads = []
  read = Reader.read
  monkeypatch.setattr(Reader, 'read', lambda *a: reads.append(a[2] - a[1]) or read(*a))
  run(save_all(tmp_path, make_history()), tmp_path / 'out', predictors=['known_leaf', 'log_fit'])
  assert max(reads) == pieces.STRETCH < 250 * 40


@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16])
def test_stretches_that_are_read_side_by_side_do_not_mix(tmp_path, monkeypatch, dtype):
  for module in (from_files, chunks):
    monkeypatch.setattr(module, 'processors', lambda: 3)
  shapes = {'a/kernel': (20 * pieces.STRETCH + 5, 1), 'b/kernel': (7, 2 * pieces.STRETCH)}
  rng = np.random.default_rng(0)
  walks = {path: rng.normal(size=(5, *shape)).cumsum(0) for path, shape in shapes.items()}
  history = [{path: walk[t].astype(dtype) for path, walk in walks.items()} for t in range(5)]
  exact = {'task_vector': True, 'known_leaf': True, 'known': False}
  files = save_all(tmp_path, history)
  for folder in run(files, tmp_path / 'out', predictors=list(exact), steps=1, on_bad='ignore'):
    name = folder.parent.name
    expected = know_jax.predict(history, predictor=name, on_bad='ignore')
    assert_predicted(load(folder), expected, exact[name])


def test_tsv_sees_matrices_whole_and_those_of_pytorch_alike(tmp_path):
  rng = np.random.default_rng(0)
  shapes = {'conv/kernel': (3, 3, 20, 30), 'conv/bias': (30,)}
  flax = [
    {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    for _ in range(3)
  ]
  expected = know_jax.predict(flax, 2, predictor='tsv')
  run(save_all(tmp_path, flax), tmp_path / 'out', predictors=['tsv'], steps=2)
  assert_predicted(load(tmp_path / 'out' / 'tsv' / '2'), expected)
  torch = [{'conv/weight': s['conv/kernel'].transpose(3, 2, 0, 1).copy()} for s in flax]
  run(save_all(tmp_path / 'torch', torch), tmp_path / 'torch', predictors=['tsv'], steps=2)
  found = load(tmp_path / 'torch' / 'tsv' / '2')['conv/weight'].transpose(2, 3, 1, 0)
  np.testing.assert_allclose(found, expected['conv/kernel'], atol=1e-4)


# --- kills, damage, repetition --------------------------------------------------------------------


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  return save_all(tmp_path_factory.mktemp('history'), make_history(jnp.bfloat16))


PREDICTORS = ('known_leaf', 'task_vector')


def results(folder):
  """The content of all files but the records, which tell when a run was begun."""
  return {name: data for name, data in snapshot(folder).items() if not name.endswith('record.json')}


@pytest.fixture(scope='module')
def whole(files, tmp_path_factory):
  """What a run writes that nothing interrupts."""
  with pytest.MonkeyPatch.context() as monkeypatch:
    narrow_slices(monkeypatch)
    output = tmp_path_factory.mktemp('whole')
    run(files, output, predictors=PREDICTORS, shard_bytes=9000)
  return results(output)


def test_a_run_broken_off_anywhere_ends_with_the_same_bytes(tmp_path, files, whole, monkeypatch):
  writes, stop = 0, 0
  write = Sink.write

  def counting(self, data):
    nonlocal writes
    writes += 1
    if writes == stop:
      raise OSError(28, 'No space left on device')
    write(self, data)

  monkeypatch.setattr(Sink, 'write', counting)
  run(files, tmp_path / 'counted', predictors=PREDICTORS, shard_bytes=9000)
  total, rng = writes, random.Random(0)
  output = tmp_path / 'out'
  for _ in range(3):
    before = {path: path.stat().st_ino for path in output.glob('*/*/model-*.safetensors')}
    writes, stop = 0, rng.randint(1, total // 3)
    with pytest.raises(UserError, match=r'^cannot write .*: No space left on device\.$'):
      run(files, output, predictors=PREDICTORS, shard_bytes=9000)
    assert not list(output.rglob('.*'))
    # What is finished stays as it is; what is there is whole.
    for path in output.glob('*/*/model-*.safetensors'):
      assert path.read_bytes() == whole[path.relative_to(output).as_posix()]
    assert all(path.stat().st_ino == inode for path, inode in before.items())
  assert before
  stop = 0
  run(files, output, predictors=PREDICTORS, shard_bytes=9000)
  assert results(output) == whole


DRIVER = """
import json, os, runpy, signal, sys
from know_jax.io.weights import Sink
from know_jax.nowcast import chunks, file_job, from_files, linear, pieces
from know_jax.runs import cli
from know_jax.system import compiled
pieces.STRETCH = linear.CHUNK = 1 << 13
write, writes = Sink.write, 0
compiled.MIN_SECONDS = 0.0
for line in sys.stdin:
  kill, folder, argv = json.loads(line)
  pid = os.fork()
  if not pid:
    os.dup2(os.open(folder + '/out', os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(os.open(folder + '/err', os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    def counting(self, data):
      global writes
      writes += 1
      if writes == kill:
        os.kill(os.getpid(), signal.SIGKILL)
      write(self, data)
    Sink.write = counting
    from_files.write.__kwdefaults__['shard_bytes'] = 9000
    sys.argv, code = argv, 99
    try:
      runpy.run_path(argv[0], run_name='__main__')
    except SystemExit as stop:
      code = stop.code or 0
    sys.stdout.flush()
    os._exit(code)
  print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def test_the_script(tmp_path, files, whole):
  with subprocess.Popen(
    [sys.executable, '-W', 'ignore', '-c', DRIVER],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as driver:

    def script(*args, kill=0):
      argv = [str(ROOT / 'bin' / 'nowcast.py'), *map(str, args)]
      print(json.dumps([kill, str(tmp_path), argv]), file=driver.stdin, flush=True)
      code = int(driver.stdout.readline())
      return code, (tmp_path / 'out').read_text(), (tmp_path / 'err').read_text()

    output = tmp_path / 'predicted'
    history = '--history=' + ','.join(map(str, files))
    zeros = np.zeros((200, 200), np.float32)
    large = ','.join(
      str(save_file(tmp_path / name, {'large/kernel': zeros})) for name in ('large', 'larger')
    )
    for args, message in (
      ((history,), '--output is needed where --history is given.'),
      ((f'--output={output}',), '--output means nothing where no --history is given.'),
      (
        (history, '--output=gs://bucket/out'),
        "--output: found 'gs://bucket/out'; expected a path on this machine",
      ),
      (('--workdir=s3://b/w',), "--workdir: found 's3://b/w'; expected a path on this machine"),
      ((history, f'--output={output}', '--option=lam'), "option: found 'lam'; expected 'name=va"),
      ((history, f'--output={output}', '--skip=x9'), "skip: 'x9' is found in no path"),
      ((history, '--workdir=W'), '--workdir means nothing where --history is given.'),
      (
        (history, f'--output={output}', '--kinds=dense'),
        "kinds: found 'dense'; expected 'regex=kind'",
      ),
      (
        (history, f'--output={output}', '--rate=2'),
        'rate is 2.0; expected a Python number in (0, 1)',
      ),
      (
        (f'--history={large}', f'--output={output}', '--predictor=tsv', '--memory=1', '--steps=1'),
        "leaf 'large/kernel' has 40000 weights, which 'tsv' must decompose as a whole",
      ),
    ):
      code, out, err = script(*args)
      assert (code, out, err.count('\n')) == (2, '', 1), err
      assert err.startswith(f'nowcast.py: {message}')
    assert not output.exists()

    rng = random.Random()  # Not seeded: every place must do.
    command = (
      history, f'--output={output}', '--steps=3', f'--predictor={",".join(PREDICTORS)}',
      '--format=safetensors',
    )  # fmt: skip
    code, out, err = script(*command, '--dry_run')
    assert (code, 'dry run: nothing was written' in out, output.exists()) == (0, True, False), err
    # What the first leaves to be done takes 36 writes at least.
    for kill in (rng.randint(1, 40), rng.randint(1, 36)):
      code, _, err = script(*command, kill=kill)
      assert code == -signal.SIGKILL, (kill, err)
    code, out, err = script(*command)
    assert code == 0, err
    assert results(output) == whole
    assert 'dense/kernel  fc    (250, 40)' in out
    assert re.search(r'task_vector: 100%.* (\d+\.\d)k/\1k .* weights/s', err)
    driver.stdin.close()


def test_damaged_and_lost_shards_are_written_again(tmp_path, files, whole):
  output = tmp_path / 'out'
  run(files, output, predictors=PREDICTORS, shard_bytes=9000)
  first, second, *_, intact = sorted(output.glob('known_leaf/2/model-*.safetensors'))
  data = bytearray(first.read_bytes())
  data[-1] ^= 1
  first.write_bytes(data)
  second.unlink()
  inode = intact.stat().st_ino
  run(files, output, predictors=PREDICTORS, shard_bytes=9000)
  assert results(output) == whole
  assert intact.stat().st_ino == inode


def test_an_output_is_of_one_call(tmp_path, files):
  output = tmp_path / 'out'
  run(files, output, predictors=['log_fit'])
  before = snapshot(output)
  other = save_all(tmp_path, make_history(jnp.bfloat16, seed=1))
  for history, options, message in (
    (files, {'rate': 0.3}, r'rate: found 0\.5, expected 0\.3\. Give another --output'),
    (files, {'steps': 2}, 'steps: found 3, expected 2'),
    (files, {'kinds': {'scalar/bias': 'keep'}}, 'scalar/bias: found "bias", expected "keep"'),
    (other, {}, 'history: found '),
  ):
    with pytest.raises(UserError, match=message):
      run(history, output, **{'predictors': ['log_fit'], **options})
  assert snapshot(output) == before
  run(files, output)  # Another predictor has a folder of its own.
  with pytest.raises(UserError, match=r'the history .* lies in .*known, which is written to'):
    run([*files[:2], *(output / 'known' / n for n in '123')], output)
  (tmp_path / 'mine' / 'known').mkdir(parents=True)
  (tmp_path / 'mine' / 'known' / 'thesis.txt').write_text('all of it')
  with pytest.raises(UserError, match=r'known holds something else'):
    run(files, tmp_path / 'mine')


def test_a_full_disk_is_noticed_before(tmp_path, files, monkeypatch):
  usage = type('Usage', (), {'free': 1000})
  monkeypatch.setattr(from_files.shutil, 'disk_usage', lambda _: usage)
  with pytest.raises(UserError, match=r'out has 1000 bytes free; expected \d+ for the predictions'):
    run(files, tmp_path / 'out')
  assert not list((tmp_path / 'out').rglob('*'))


# --- what is checked ------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'conv/bias': None}, r"stage 1 \(.*1\.safetensors\) lacks leaf 'conv/bias'"),
    ({'more/bias': np.zeros(3)}, r"stage 1 .* has leaf 'more/bias', which the newest stage"),
    (
      {'conv/bias': np.zeros(6, np.float32)},
      r"leaf 'conv/bias' has shape \(6,\) in stage 1 .*; expected \(5,\), as in the newest",
    ),
    (
      {'conv/bias': np.zeros(5, np.float16)},
      r"leaf 'conv/bias' has dtype float16 in stage 1 .*; expected float32",
    ),
  ],
)
def test_stages_that_differ(tmp_path, change, message):
  history = make_history()
  history[1] = {p: leaf for p, leaf in {**history[1], **change}.items() if leaf is not None}
  with pytest.raises(UserError, match=message):
    run(save_all(tmp_path, history), tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'predictors': ['shrik']}, "unknown predictor 'shrik'. Did you mean 'shrink'"),
    ({'predictors': []}, 'no predictor is given'),
    ({'predictors': ['task_vector'], 'steps': 5}, 'needs a history of 6 stages for steps=5'),
    ({'steps': 0}, 'steps is 0; expected at least 1'),
    ({'on_bad': 'weep'}, "unknown choice of on_bad 'weep'"),
    ({'kinds': {'dense': 'dense'}}, "unknown kind of 'dense' 'dense'"),
    ({'kinds': {'(': 'fc'}}, r"kinds: '\(' is no regular expression"),
    ({'kinds': {'embed': 'keep'}}, "kinds: 'embed' is found in no path"),
    ({'kinds': {'steps': 'fc'}}, "leaf 'steps' has dtype int64 but kind 'fc'"),
  ],
)
def test_mistakes(tmp_path, files, options, message):
  with pytest.raises(UserError, match=message):
    run(files, tmp_path / 'out', **options)
  assert not (tmp_path / 'out').exists()


def test_a_value_that_is_not_finite_is_named_and_what_is_finished_stays(tmp_path):
  history = make_history()
  history[3]['dense/kernel'][210, 7] = np.inf
  files = save_all(tmp_path, history)
  for predictor in ('known_leaf', 'log_fit', 'tsv'):
    message = r"leaf 'dense/kernel' has inf at weight 8407 of 10000 in stage 3 of 5 .*3\.safetens"
    with pytest.raises(UserError, match=message):
      run(files, tmp_path / 'out', predictors=[predictor], shard_bytes=1000)
    done = list((tmp_path / 'out' / predictor).glob('*/*.safetensors'))
    assert [path.name for path in done] == ['model-00001-of-00003.safetensors'] * 3
  history[3]['dense/kernel'][210, 7] = 0
  history[0]['norm/scale'][2] = np.nan  # Kept leaves are not checked, but copied.
  history[4]['norm/scale'][1] = -np.inf
  (folder,) = run(save_all(tmp_path, history), tmp_path / 'nan', predictors=['log_fit'], steps=1)
  assert load(folder)['norm/scale'].tobytes() == history[4]['norm/scale'].tobytes()


def test_bad_leaves_keep_their_newest_weights(tmp_path):
  history = make_history()
  for stage in history:
    stage['dense/kernel'] *= 30  # A residual of the paper's KNOWN ends at 1.
  files = save_all(tmp_path, history)
  theta = known.init_theta(jax.random.key(0))
  parameters.save_known(tmp_path / 'known.safetensors', theta, {})
  options = {
    'predictors': ['known'],
    'kinds': {'(conv|dense)/kernel$|bias$': 'fc'},
    'known': tmp_path / 'known.safetensors',
  }
  told = {
    'predictor': 'known',
    'kinds': lambda p, _: 'keep' if 'scale' in p else 'fc',
    'theta': theta,
  }

  def warned(do):
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter('always')
      found = do()
    texts = [str(w.message) for w in caught if issubclass(w.category, health.PredictionWarning)]
    return found, texts

  expected, texts = warned(lambda: forecast(history, **told))
  assert "'dense/kernel' (fc) at step 1: a residual is saturated" in texts[0]
  assert len(texts) == 1
  for _ in range(2):  # Also where all is done.
    folders, found = warned(lambda: run(files, tmp_path / 'out', **options))
    assert found == texts
  for folder, stage in zip(folders, expected, strict=True):
    assert_predicted(load(folder), stage)
    assert read_sealed(folder / 'nowcast.json', 'card')['kept_newest'] == ['dense/kernel']
  with pytest.raises(UserError, match=r"1 of 1 leaves .*'dense/kernel'"):
    run(files, tmp_path / 'raise', **options, on_bad='raise')
  folders, found = warned(lambda: run(files, tmp_path / 'ignore', **options, on_bad='ignore'))
  assert not found
  for folder, stage in zip(folders, forecast(history, **told, on_bad='ignore'), strict=True):
    assert_predicted(load(folder), stage)


def test_what_must_be_whole_must_fit(tmp_path, files):
  with pytest.raises(UserError, match=r"leaf 'dense/kernel' has 10000 weights, which 'tsv' must"):
    run(files, tmp_path / 'out', predictors=['tsv'], memory=10000 * 40)
  run(
    files, tmp_path / 'out', predictors=['tsv'], memory=10000 * 40, kinds={'dense/kernel$': 'keep'}
  )


# --- hostile files --------------------------------------------------------------------------------


def entry(dtype='F32', shape=(2,), offsets=(0, 8)):
  return {'dtype': dtype, 'shape': list(shape), 'data_offsets': list(offsets)}


def write_header(path, header, data=b'\0' * 8, length=None):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  length = len(text) if length is None else length
  path.write_bytes(length.to_bytes(8, 'little') + text + data)


@pytest.mark.parametrize(
  ('header', 'message'),
  [
    ({'a': entry(offsets=(0, 16))}, "'a' has 16 bytes; expected 8, for F32"),
    ({'a': entry(shape=(4,), offsets=(0, 16))}, 'take 16 bytes; found 8'),
    ({'a': entry(shape=(1,), offsets=(0, 4))}, 'take 4 bytes; found 8'),
    ({'a': entry(), 'b': entry()}, "'b' begins at byte 0; expected 8, where tensor 'a' ends"),
    ({'a': entry(shape=(1,), offsets=(4, 8))}, 'begins at byte 4; expected 0, where the header'),
    ({'a': entry(offsets=(8, 0))}, 'has -8 bytes'),
    ({'a': entry(offsets=(-8, 0))}, 'expected counts'),
    ({'a': entry(shape=(2**62, 4), offsets=(0, 0))}, 'has 0 bytes; expected 73786976294838206464'),
    ({'a': entry(shape=(-1, -2))}, 'expected counts'),
    ({'a': entry(shape=(True, 2))}, 'expected counts'),
    ({'a': entry(shape=(2.0,))}, 'expected counts'),
    ({'a': entry(dtype='F3_E4M3', shape=(8,))}, "'a' has dtype 'F3_E4M3'; expected one of F64"),
    ({'a': entry(dtype=['F32'])}, 'has dtype'),
    ({'a': 3}, 'not described by'),
    ({'a.b': entry(), 'a/b': entry(offsets=(8, 16))}, "'a.b' and 'a/b' have the same path 'a/b'"),
    ({'__metadata__': {'a': 1}, 'a': entry()}, '__metadata__ is no mapping to strings'),
    ({}, 'take 0 bytes; found 8'),
    ([1], "begins with b'\\['"),
    (b'{"a":', 'expected JSON'),
    (b'{"a":1,"a":1}', 'a name stands twice'),
    (b'{"\xff":1}', 'expected JSON'),
    (b'{"\\ud800":1}', 'expected JSON'),
    (b'{"a":' + b'[' * 100_000, 'nested too deep'),
  ],
)
def test_hostile_headers(tmp_path, header, message):
  file = tmp_path / 'a.safetensors'
  one_path = 'the same path' in message
  write_header(file, header, b'\0' * (16 if one_path else 8))
  with pytest.raises(UserError, match=message):
    open_weights(file)
  if not one_path and 'twice' not in message and header:
    with pytest.raises(safetensors.SafetensorError):
      safetensors.safe_open(file, framework='numpy').__enter__()


def test_hostile_lengths_and_folders(tmp_path):
  file = tmp_path / 'a.safetensors'
  for length in (0, 10**9, 2**64 - 1):
    write_header(file, {'a': entry()}, length=length)
    with pytest.raises(UserError, match=f'header is said to have {length} bytes; expected 2 to'):
      open_weights(file)
  file.write_bytes(b'abc')
  with pytest.raises(UserError, match='header is said to have 0 bytes'):
    open_weights(file)
  with pytest.raises(UserError, match='no such file or folder'):
    open_weights(tmp_path / 'missing')
  file.unlink()
  with pytest.raises(UserError, match='holds no weights: found neither'):
    open_weights(tmp_path)
  for name in 'ab':
    save_file(tmp_path / f'{name}.safetensors', {name: np.zeros(2, np.float32)})
  with pytest.raises(UserError, match=r'has 2 safetensors files and no model.safetensors.index'):
    open_weights(tmp_path)
  index = tmp_path / 'model.safetensors.index.json'
  for weight_map, message in (
    ({'a': '../a.safetensors', 'b': 'b.safetensors'}, "'a' is said to be in '../a.safetensors'"),
    ({'a': str(tmp_path / 'a.safetensors')}, 'expected the name of a file beside it'),
    ({'a': 3}, "'a' is said to be in 3"),
    ({'a': 'c.safetensors'}, 'cannot read .*c.safetensors: No such file'),
    ({'a': 'b.safetensors'}, "b.safetensors lacks tensor 'a', which the index has"),
    ({'b': 'b.safetensors', 'c': 'b.safetensors'}, "lacks tensor 'c'"),
    ({}, 'it has no weight_map'),
    ([], 'it has no weight_map'),
  ):
    index.write_text(json.dumps({'weight_map': weight_map}))
    with pytest.raises(UserError, match=message):
      open_weights(tmp_path)
  save_file(tmp_path / 'b.safetensors', {n: np.zeros(2, np.float32) for n in 'bc'})
  index.write_text(json.dumps({'weight_map': {'b': 'b.safetensors'}}))
  weights = open_weights(index)
  assert list(weights.leaves) == ['b']
  assert re.search(r"b.safetensors has tensor 'c', which the index omits", weights.notes[0])


def test_a_file_that_is_cut_off_while_it_is_read(tmp_path):
  file = save_file(tmp_path / 'a.safetensors', {'a': np.zeros(100, np.float32)})
  leaf = open_weights(file).leaves['a']
  os.truncate(file, 200)
  with (
    leaf.open(tmp_path) as reader,
    pytest.raises(UserError, match=r"cannot read tensor 'a' of .*: the file has become shorter"),
  ):
    reader.read(0, 100)


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(st.data())
def test_what_is_accepted_the_library_reads_alike(tmp_path_factory, data):
  """Bytes of a header changed at random: an error of ours, or the tensors the library finds."""
  file = tmp_path_factory.getbasetemp() / 'fuzzed.safetensors'
  save_file(file, {'a/kernel': np.ones((2, 3), np.float32), 'b': np.arange(4, dtype=np.int16)})
  content = bytearray(file.read_bytes())
  length = 8 + int.from_bytes(content[:8], 'little')
  for _ in range(data.draw(st.integers(1, 3))):
    place = data.draw(st.integers(0, length - 1))
    content[place] = data.draw(
      st.one_of(st.sampled_from(b'0123456789,:[]{}" '), st.integers(0, 255))
    )
  file.write_bytes(content)
  with contextlib.suppress(UserError):
    found = open_weights(file).leaves
    with safetensors.safe_open(file, framework='numpy') as library:
      expected = {name: library.get_tensor(name) for name in library.keys()}  # noqa: SIM118
    assert {leaf.name: (leaf.shape, leaf.dtype) for leaf in found.values()} == {
      name: (leaf.shape, leaf.dtype) for name, leaf in expected.items()
    }
    for leaf in found.values():
      with leaf.open(file.parent) as reader:
        assert reader.read(0, leaf.size).tobytes() == expected[leaf.name].tobytes()


# --- Orbax ----------------------------------------------------------------------------------------


def nested(stage):
  tree = {}
  for path, leaf in stage.items():
    *parents, name = path.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return tree


def test_orbax_checkpoints(tmp_path):
  import orbax.checkpoint as ocp

  history = make_history(jnp.bfloat16)
  stages = [tmp_path / str(i) for i in range(4)]
  checkpoints.save(stages[0], nested(history[0]))
  checkpoints.save(stages[1], nested(history[1]))
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(stages[2], nested(history[2]))
    checkpointer.save(stages[3], nested(history[3]))
  stages.append(save_file(tmp_path / 'newest.safetensors', history[4]))
  run(stages, tmp_path / 'out', predictors=['log_fit'])
  for n, expected in enumerate(forecast(history, 'log_fit'), 1):
    assert_predicted(load(tmp_path / 'out' / 'log_fit' / str(n)), expected)

  with pytest.raises(UserError, match=r"leaf 'dense/kernel' of .*0 is stored in chunks of 20000"):
    run(stages, tmp_path / 'small', memory=50000)
  (damaged,) = [f for f in (stages[1] / 'weights').rglob('*') if f.name == '_METADATA']
  damaged.write_text(damaged.read_text() + ' ')
  with pytest.raises(UserError, match=r"1 is damaged: file 'weights/_METADATA' has \d+ bytes"):
    run(stages, tmp_path / 'damaged')
  (stages[2] / 'manifest.ocdbt').write_bytes(b'nonsense')
  with pytest.raises(UserError, match=r'cannot read .*/2: '):
    run(stages, tmp_path / 'damaged')
  assert not (tmp_path / 'damaged').exists()


@pytest.mark.parametrize(
  'chunks', [(5, 7, 4), (2, 7, 4), (2, 3, 4), (5, 3, 4), (2, 3, 3), (1, 7, 1)]
)
def test_chunks_are_put_together(tmp_path, chunks):
  import tensorstore as ts

  # A checkpoint of Orbax without OCDBT.
  expected = np.arange(140, dtype=np.float32).reshape(5, 7, 4)
  spec = {
    'driver': 'zarr',
    'kvstore': {'driver': 'file', 'path': f'{tmp_path}/a.kernel/'},
    'metadata': {'shape': [5, 7, 4], 'chunks': chunks, 'dtype': '<f4'},
  }
  ts.open(spec, create=True).result().write(expected).result()
  (tmp_path / '_METADATA').write_text('{}')
  leaf = open_weights(tmp_path).leaves['a/kernel']
  assert (leaf.shape, leaf.dtype, leaf.chunk_bytes) == ((5, 7, 4), np.float32, 4 * np.prod(chunks))
  with leaf.open(tmp_path) as reader:
    assert reader.read(3, 137).tolist() == list(range(3, 137))
  (tmp_path / 'a.kernel' / '0.0.0').unlink()
  with (
    pytest.raises(UserError, match=r"cannot read leaf 'a\.kernel' of .*missing"),
    leaf.open(tmp_path),
  ):
    pass
