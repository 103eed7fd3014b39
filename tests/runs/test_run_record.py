"""The run record, metrics and bar: nothing lost, nothing doubled, numbers exact."""

import concurrent.futures
import io
import json
import math
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict, config_dict

from know_jax import jsonable
from know_jax.errors import UserError
from know_jax.io import files, journal, sealed
from know_jax.runs import record as record_
from know_jax.runs.metrics import MetricsLog, find_callback
from know_jax.runs.record import RunRecord
from know_jax.system import progress as progress_

CONFIG = {'lr': 1e-3, 'stages': 5, 'model': {'name': 'cnn', 'width': 16}, 'flip': False}


# -- JSON that keeps numbers ---------------------------------------------------------------------

_scalars = (
  st.none()
  | st.booleans()
  | st.integers(-(2**70), 2**70)
  | st.floats()
  | st.text().filter(lambda text: text not in ('NaN', 'Infinity', '-Infinity'))
)
_json = st.recursive(
  _scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner)
)


@given(value=st.dictionaries(st.text().filter(lambda key: key != 'sha256'), _json, max_size=4))
@settings(deadline=None, max_examples=50)
def test_sealed_files_give_back_what_went_in(tmp_path_factory, value):
  path = tmp_path_factory.getbasetemp() / 'sealed.json'
  sealed.write_sealed(path, value)
  assert repr(sealed.read_sealed(path, 'file')) == repr(value)  # repr: NaN is not equal to itself.

  def refuse(token):
    raise AssertionError(f'{token} is not JSON')

  json.loads(path.read_text(), parse_constant=refuse)


def test_scalars_of_arrays_become_the_numbers_they_equal():
  value = {'a': np.float32(0.1), 'b': jnp.bfloat16(0.1), 'c': np.int64(3), 'd': (np.bool_(True),)}
  found = jsonable.plain(value, 'x')
  assert found == {'a': 0.10000000149011612, 'b': 0.10009765625, 'c': 3, 'd': [True]}
  assert [type(v) for v in found.values()] == [float, float, int, list]


# -- the record ----------------------------------------------------------------------------------


def test_a_record_is_begun_resumed_and_read(tmp_path):
  workdir = tmp_path / 'new' / 'run'
  record = RunRecord.open(workdir, CONFIG, kind='forget')
  assert record['config'] == CONFIG
  assert record['environment'] == record_.environment()
  record['accuracy'] = [0.1 + 0.2, np.float32(0.7)]
  record.update(loss=math.inf, **{'test/seen': (1, 2)})
  for again in (RunRecord.open(workdir, CONFIG, kind='forget'), RunRecord.read(workdir, 'forget')):
    assert again['accuracy'] == [0.1 + 0.2, float(np.float32(0.7))]
    assert again['loss'] == math.inf
    assert again['test/seen'] == [1, 2]
    assert 'loss' in again
    assert 'gain' not in again
    assert again.get('gain', 3) == 3
  content = json.loads((workdir / 'record.json').read_text())
  assert content['kind'] == 'forget'
  assert content['config'] == CONFIG
  assert content['resumed_in'] == []
  assert [entry.name for entry in workdir.iterdir()] == ['record.json']


def test_a_record_is_one_of_its_config_only(tmp_path):
  RunRecord.open(tmp_path, CONFIG, kind='forget')
  before = (tmp_path / 'record.json').read_bytes()
  other = {**CONFIG, 'lr': 0.1, 'stages': 5.0, 'model': {'name': 'cnn', 'depth': 2}}
  with pytest.raises(UserError) as caught:
    RunRecord.open(tmp_path, other, kind='forget')
  assert str(caught.value) == (
    f'workdir {tmp_path} holds a run with another config. lr: found 0.001, expected 0.1; '
    'stages: found 5, expected 5.0; model.width: found 16, expected nothing; '
    'model.depth: found nothing, expected 2. Give another --workdir, or the config found there.'
  )
  with pytest.raises(
    UserError, match=r"another kind: found 'forget', expected 'transfer'.*--workdir"
  ):
    RunRecord.open(tmp_path, CONFIG, kind='transfer')
  with pytest.raises(UserError, match=r"another kind: found 'forget', expected 'transfer'"):
    RunRecord.read(tmp_path, 'transfer')
  assert (tmp_path / 'record.json').read_bytes() == before


def test_nan_in_a_config_is_the_same_nan(tmp_path):
  RunRecord.open(tmp_path, {'x': math.nan, 'y': (1,)}, kind='forget')
  RunRecord.open(tmp_path, {'x': math.nan, 'y': [1]}, kind='forget')
  with pytest.raises(UserError, match='x: found "NaN", expected "Infinity"'):
    RunRecord.open(tmp_path, {'x': math.inf, 'y': (1,)}, kind='forget')


def test_another_environment_is_added_to_the_record(tmp_path, monkeypatch):
  begun = RunRecord.open(tmp_path, CONFIG, kind='forget')['environment']
  monkeypatch.setattr(record_, 'environment', lambda: {**begun, 'jax': '99'})
  for _ in range(2):
    record = RunRecord.open(tmp_path, CONFIG, kind='forget')
  assert record['environment'] == begun
  content = json.loads((tmp_path / 'record.json').read_text())
  assert content['resumed_in'] == [{**begun, 'jax': '99'}]


def test_damaged_missing_and_foreign_records(tmp_path):
  with pytest.raises(UserError, match=r'record .*record.json is missing'):
    RunRecord.read(tmp_path, 'forget')
  RunRecord.open(tmp_path, CONFIG, kind='forget')
  path = tmp_path / 'record.json'
  data = path.read_bytes()
  rng = np.random.default_rng(0)
  for place in rng.choice(8 * len(data), size=100, replace=False):
    altered = bytearray(data)
    altered[place // 8] ^= 1 << int(place % 8)
    path.write_bytes(altered)
    with pytest.raises(UserError, match=r'record .*record.json is damaged or foreign'):
      RunRecord.open(tmp_path, CONFIG, kind='forget')
  path.write_bytes(data[:-9])
  with pytest.raises(UserError, match=r'record .*record.json is damaged or foreign'):
    RunRecord.read(tmp_path, 'forget')
  sealed.write_sealed(path, {'format': 'another', 'version': 1})
  with pytest.raises(UserError, match=r"has format 'another', version 1; expected 'know_jax run'"):
    RunRecord.read(tmp_path, 'forget')


def test_values_that_cannot_be_kept_leave_the_record_as_it_was(tmp_path):
  record = RunRecord.open(tmp_path, CONFIG, kind='forget')
  with pytest.raises(UserError, match=r'record.x is .* expected a dict'):
    record['x'] = object()
  with pytest.raises(UserError, match=r"record.x is the string 'NaN'"):
    record['x'] = 'NaN'
  assert 'x' not in record
  mine = [1]
  record['y'] = mine
  mine.append(2)
  assert record['y'] == RunRecord.read(tmp_path, 'forget')['y'] == [1]


def test_a_full_disk_leaves_the_last_record(tmp_path, monkeypatch):
  record = RunRecord.open(tmp_path, CONFIG, kind='forget')
  record['x'] = 1

  def refuse(fd):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(os, 'fsync', refuse)
    with pytest.raises(UserError, match=r'cannot write .*record.json: No space left on device'):
      record['x'] = 2
  assert record['x'] == RunRecord.read(tmp_path, 'forget')['x'] == 1
  assert [entry.name for entry in tmp_path.iterdir()] == ['record.json']


def test_a_workdir_that_cannot_be_made(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match=r'cannot use workdir .*/file/run: Not a directory'):
    RunRecord.open(tmp_path / 'file' / 'run', CONFIG, kind='forget')


def test_config_dict_is_plain_and_names_what_is_not():
  config = ConfigDict({'a': {'b': (1, 2.5), 'c': None}})
  config.half = config.a.get_oneway_ref('b')
  assert record_.config_dict(config) == {'a': {'b': [1, 2.5], 'c': None}, 'half': [1, 2.5]}
  with pytest.raises(UserError, match=r'config\.f is .*function'):
    record_.config_dict(ConfigDict({'f': print}))
  config = ConfigDict({'clip': math.inf})
  assert record_.config_dict(config) == {'clip': math.inf}
  with pytest.raises(UserError, match=r'the config is incomplete'):
    record_.config_dict(ConfigDict({'n': config_dict.required_placeholder(int)}))


@pytest.mark.parametrize('key', ['config', 'kind', 'sha256', 'format'])
def test_what_a_record_begins_with_cannot_be_set(tmp_path, key):
  record = RunRecord.open(tmp_path, CONFIG, kind='forget')
  with pytest.raises(KeyError, match=key):
    record[key] = 'x'


# -- the environment -----------------------------------------------------------------------------


def test_environment_is_json_and_tells_devices_and_versions():
  found = record_.environment()
  assert json.loads(json.dumps(found)) == found
  assert found['jax'] == jax.__version__
  assert found['devices'] == 8
  assert found['python'] == '.'.join(map(str, sys.version_info[:3]))
  assert found['commit'] is None or re.fullmatch(r'[0-9a-f]{40}(-dirty)?', found['commit'])


def test_commit_of_clean_dirty_and_no_checkouts(tmp_path, monkeypatch):
  def git(*args):
    identity = ('-c', 'user.name=n', '-c', 'user.email=e')
    command = ('git', '-C', str(tmp_path), *identity, *args)
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

  (tmp_path / 'know_jax').mkdir()
  (tmp_path / 'know_jax' / 'a.py').write_text('1')
  assert record_._commit(tmp_path) is None
  git('init')
  assert record_._commit(tmp_path) is None  # Nothing committed yet.
  git('add', '.')
  git('commit', '-m', 'm')
  commit = git('rev-parse', 'HEAD')
  assert record_._commit(tmp_path) == commit
  (tmp_path / 'results').write_text('no source')
  assert record_._commit(tmp_path) == commit
  (tmp_path / 'know_jax' / 'b.py').write_text('2')
  assert record_._commit(tmp_path) == f'{commit}-dirty'
  assert record_._commit(tmp_path / 'know_jax') is None  # Inside, but not the source tree.
  monkeypatch.setenv('PATH', '')
  assert record_._commit(tmp_path) is None


def test_a_lock_lets_in_one_at_a_time(tmp_path):
  path = tmp_path / 'count'
  path.write_text('0')

  def count():
    for _ in range(50):
      with files.locked(path):
        path.write_text(str(int(path.read_text()) + 1))

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for done in [pool.submit(count) for _ in range(8)]:
      done.result()
  assert path.read_text() == '400'
  assert [entry.name for entry in tmp_path.iterdir()] == ['count']


# -- lines ---------------------------------------------------------------------------------------


def test_lines_survive_a_kill_at_any_byte(tmp_path):
  path = tmp_path / 'rows.jsonl'
  rows = [{'seed': 0, 'x': 0.1}, {'seed': 1, 'x': math.inf}, {'seed': 2, 'x': 'é'}]
  assert journal.read_lines(path) == []
  for row in rows:
    journal.append_line(path, row)
  whole = path.read_bytes()
  assert journal.read_lines(path) == rows
  ends = [i + 1 for i, byte in enumerate(whole) if byte == ord('\n')]
  for length in range(len(whole)):
    path.write_bytes(whole[:length])
    # A row counts from its closing brace on; the end of the line may be missing.
    count = sum(end - 1 <= length for end in ends)
    assert journal.read_lines(path) == rows[:count]
    for row in rows[count:]:
      journal.append_line(path, row)
    assert path.read_bytes() in (whole, whole[:-1])
    assert journal.read_lines(path) == rows
  assert [entry.name for entry in tmp_path.iterdir()] == ['rows.jsonl']


def test_damaged_lines_are_named(tmp_path):
  path = tmp_path / 'rows.jsonl'
  path.write_bytes(b'{"a": 1}\n{"a": \n{"a": 3}\n')
  for use in (lambda: journal.read_lines(path), lambda: journal.append_line(path, {})):
    with pytest.raises(UserError, match=r'rows.jsonl is damaged: line 2 is no JSON object'):
      use()
  with pytest.raises(UserError, match=r'cannot write .*/no/rows.jsonl: No such file'):
    journal.append_line(tmp_path / 'no' / 'rows.jsonl', {})


def test_digest_is_of_content_not_of_order():
  assert jsonable.digest({'a': (1, 2), 'b': 0.5}) == jsonable.digest({'b': 0.5, 'a': [1, 2]})
  assert (
    len({jsonable.digest(x) for x in ({'a': 1}, {'a': 1.0}, {'a': True}, {'a': math.nan})}) == 4
  )


# -- metrics -------------------------------------------------------------------------------------


def test_lines_are_there_at_once_and_valid_json(tmp_path):
  with MetricsLog(tmp_path, resume_step=None) as log:
    log.write(1, loss=0.1 + 0.2, **{'test/accuracy': np.float32(0.5)})
    log.write(np.int64(2), loss=jnp.float32(math.nan), low=-math.inf, count=3)
    # Read while open: a kill now would lose none.
    text = (tmp_path / 'metrics.jsonl').read_text()
  assert text == (
    '{"step": 1, "loss": 0.30000000000000004, "test/accuracy": 0.5}\n'
    '{"step": 2, "loss": "NaN", "low": "-Infinity", "count": 3}\n'
  )
  assert math.isnan(float(json.loads(text.splitlines()[1])['loss']))
  log.close()


@pytest.mark.parametrize('value', ['0.5', None, [1.0], np.ones(2)])
def test_metrics_are_numbers(tmp_path, value):
  with (
    MetricsLog(tmp_path, resume_step=None) as log,
    pytest.raises(UserError, match=r'metrics\.loss'),
  ):
    log.write(1, loss=value)
  assert (tmp_path / 'metrics.jsonl').read_text() == ''


def test_a_watcher_is_told_every_line_once_it_is_kept(tmp_path):
  told = []

  def on_metrics(step, metrics):
    assert (tmp_path / 'metrics.jsonl').read_text().count('\n') == len(told) + 1
    told.append((step, metrics))
    if metrics['loss'] > 1:
      raise ConnectionError('the tracker is away')

  with MetricsLog(tmp_path, resume_step=None, on_metrics=on_metrics) as log:
    log.write(np.int64(1), loss=np.float32(0.5))
    with pytest.raises(UserError, match='on_metrics fails at step 2: ConnectionError: the tracker'):
      log.write(2, loss=2)
  assert told == [(1, {'loss': 0.5}), (2, {'loss': 2})]


def test_a_watcher_is_named_by_its_module():
  assert find_callback('json:dumps') is json.dumps and find_callback(None) is None
  for wrong, message in (('json:decoder', 'expected a function'), ('json:dump5', "no 'dump5'")):
    with pytest.raises(UserError, match=message):
      find_callback(wrong)


def run_to(workdir, begin, end, resume_step, torn=b''):
  log = MetricsLog(workdir, resume_step=resume_step)
  for step in range(begin, end + 1):
    log.write(step, loss=1 / step)
    if step % 3 == 0:
      log.write(step, test=step)
  log.close()
  with (workdir / 'metrics.jsonl').open('ab') as file:
    file.write(torn)


@pytest.mark.parametrize('seed', range(5))
def test_killed_and_resumed_runs_leave_the_lines_of_one_that_was_not(tmp_path, seed):
  rng = np.random.default_rng(seed)
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  whole.mkdir()
  parts.mkdir()
  run_to(whole, 1, 20, None)
  saved, line = 0, b'{"step": 7, "loss": 0.5}'
  for _ in range(3):
    killed = int(rng.integers(saved + 1, 20))
    torn = line[: rng.integers(len(line))] + [b'', b'\0\0'][rng.integers(2)]
    run_to(parts, saved + 1, killed, saved or None, torn)
    saved = int(rng.integers(saved, killed))
  run_to(parts, saved + 1, 20, saved or None)
  assert (parts / 'metrics.jsonl').read_bytes() == (whole / 'metrics.jsonl').read_bytes()


def test_a_line_that_only_lacks_its_end_is_kept(tmp_path):
  (tmp_path / 'metrics.jsonl').write_bytes(b'{"step": 1}\n{"step": 2}')
  MetricsLog(tmp_path, resume_step=2).close()
  assert (tmp_path / 'metrics.jsonl').read_bytes() == b'{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize(
  'line', [b'{"step": 1', b'[]', b'{"loss": 2}', b'{"step": 1.5}', b'\xff', b'']
)
def test_damage_before_the_last_line_is_an_error(tmp_path, line):
  (tmp_path / 'metrics.jsonl').write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
  with pytest.raises(
    UserError, match=r'metrics.jsonl is damaged: line 2 (is no JSON object|has no step)'
  ):
    MetricsLog(tmp_path, resume_step=2)


def test_metrics_need_their_workdir(tmp_path):
  with pytest.raises(UserError, match=r'cannot write metrics in .*nowhere: No such file'):
    MetricsLog(tmp_path / 'nowhere', resume_step=None)


def events_of(folder: Path):
  """What TensorBoard would show: (step, tag, value), earlier files first, purged as it purges.

  Reads the TFRecord framing of TensorFlow's documentation: length, its CRC, data, its CRC.
  """
  from tensorboardX.proto.event_pb2 import Event, SessionLog

  shown = []
  for path in sorted(folder.iterdir()):
    data, place = path.read_bytes(), 0
    while place < len(data):
      (length,) = struct.unpack_from('<Q', data, place)
      event = Event.FromString(data[place + 12 : place + 12 + length])
      place += 16 + length
      if event.session_log.status == SessionLog.START:
        shown = [entry for entry in shown if entry[0] < event.step]
      shown += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
  return shown


def test_tensorboard_shows_what_the_lines_say(tmp_path):
  with MetricsLog(tmp_path, resume_step=None) as log:
    for step in (1, 2, 3):
      log.write(step, loss=step / 2, bad=math.nan, huge=1e300)
  killed = MetricsLog(tmp_path, resume_step=2)
  killed.write(3, loss=9.0)
  killed.sync()
  shown = events_of(tmp_path / 'tensorboard')  # As a kill would leave it.
  assert [e for e in shown if e[1] == 'loss'] == [
    (1, 'loss', 0.5),
    (2, 'loss', 1.0),
    (3, 'loss', 9.0),
  ]
  assert [e[1:] for e in shown if e[0] == 1 and e[1] != 'loss'][1] == ('huge', math.inf)
  killed.close()
  with MetricsLog(tmp_path, resume_step=None) as log:
    log.write(1, loss=4.0)
  assert events_of(tmp_path / 'tensorboard') == [(1, 'loss', 4.0)]


# -- the bar -------------------------------------------------------------------------------------


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_no_bar_is_shown_where_none_is_wanted(capfd):
  with progress_.progress(2, 'run', 'step', show=False) as bar:
    bar.set_postfix(loss=1.0)
    bar.update()
  assert capfd.readouterr() == ('', '')


@pytest.mark.parametrize('stream', [io.StringIO, Terminal])
def test_the_bar_counts_from_where_the_run_was(monkeypatch, stream):
  monkeypatch.setattr(sys, 'stderr', file := stream())
  with progress_.progress(10, 'stage 2', 'step', initial=4) as bar:
    for _ in range(6):
      bar.set_postfix(loss='0.25')
      bar.update()
  states = re.split('[\r\n]', file.getvalue().strip())
  assert states[0].startswith('stage 2:  40%')
  assert states[-1].startswith('stage 2: 100%')
  assert re.search(r'10/10 \[00:00<00:00, [\d.]+ step/s, loss=0.25\]', states[-1])
  # Ten seconds have not passed: where there is no terminal only the ends are shown.
  assert ('\r' in file.getvalue()) == (stream is Terminal)
  assert file.getvalue().count('\n') == (1 if stream is Terminal else 2)
