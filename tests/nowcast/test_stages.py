"""Which stages a history has: found in folders, in order, each once, on this machine."""

import json
import warnings

import numpy as np
import pytest
import safetensors.numpy

from know_jax.errors import PredictionWarning, UserError
from know_jax.io import checkpoints
from know_jax.nowcast import file_job, from_files, stages


def save(path, seed=0, **more):
  path.parent.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(seed)
  tree = {'dense.kernel': rng.normal(size=(6, 5)), 'dense.bias': rng.normal(size=5), **more}
  tensors = {name: np.asarray(leaf, np.float32) for name, leaf in tree.items() if leaf is not None}
  safetensors.numpy.save_file(tensors, path)
  return path


def trainer(folder, step, seed=None):
  save(folder / 'model.safetensors', step if seed is None else seed)
  (folder / 'trainer_state.json').write_text(json.dumps({'global_step': step}))
  return folder


def prepare(history, **options):
  return file_job.prepare(history, **{'predictors': ['log_fit'], **options})


def names(paths):
  return [path.name for path in paths]


def test_a_folder_of_checkpoints_is_taken_by_their_steps(tmp_path):
  for step in (1000, 500, 20000):
    trainer(tmp_path / 'runs' / f'checkpoint-{step}', step)
  expected = ['checkpoint-500', 'checkpoint-1000', 'checkpoint-20000']
  assert names(stages.expand([tmp_path / 'runs'])) == expected
  # Beside the final model, as a Trainer leaves it, and other folders with numbers.
  save(tmp_path / 'runs' / 'model.safetensors')
  (tmp_path / 'runs' / 'logs-3').mkdir()
  assert names(stages.expand([str(tmp_path / 'runs')])) == expected
  assert names(stage.path for stage in prepare([tmp_path / 'runs']).stages) == expected


def test_numbered_files_and_what_is_one_checkpoint(tmp_path):
  for epoch in (10, 9, 1):
    save(tmp_path / 'e' / f'epoch_{epoch}.safetensors', epoch)
  expected = [f'epoch_{n}.safetensors' for n in (1, 9, 10)]
  assert names(stages.expand([tmp_path / 'e'])) == expected
  # Shards are no series; nor is a list expanded.
  for shard in (1, 2):
    save(tmp_path / 's' / f'model-0000{shard}-of-00002.safetensors')
  assert stages.expand([tmp_path / 's']) == [tmp_path / 's']
  assert stages.expand([tmp_path / 'e', tmp_path / 's']) == [tmp_path / 'e', tmp_path / 's']
  (tmp_path / 'e' / 'epoch_4.safetensors').write_bytes(b'')
  with pytest.raises(UserError, match=r'epoch_4.safetensors is empty'):
    prepare([tmp_path / 'e'])
  for step in (3, 4):
    save(tmp_path / 'e' / f'step_{step}.safetensors')
  with pytest.raises(UserError, match=r'e holds several series of checkpoints: .* and '):
    stages.expand([tmp_path / 'e'])


@pytest.mark.parametrize(
  'name',
  [
    'step_{0}.weights.h5', 'weights.{0:02d}-0.{1}.safetensors', 'epoch={0}-step={1}00.safetensors',
    'net18_{0}.safetensors', 'epoch_0-step_{0}.safetensors', 'lr0.1-at-{0}.safetensors',
  ],
)  # fmt: skip
def test_one_of_the_numbers_in_names_counts(tmp_path, name):
  """As Keras's ModelCheckpoint and Lightning write them."""
  expected = [name.format(step, 50 + step) for step in (2, 9, 10)]
  for file in expected:
    save(tmp_path / file)
  assert names(stages.expand([tmp_path])) == expected


def test_two_runs_in_a_folder_are_no_history(tmp_path):
  for seed, step in ((1, 100), (1, 200), (2, 100), (2, 200)):
    save(tmp_path / f'seed{seed}_step{step}.safetensors')
  with pytest.raises(
    UserError, match=r'several series of checkpoints: seed1_step100\..* and seed1'
  ):
    stages.expand([tmp_path])


def test_steps_of_a_checkpoint_manager(tmp_path):
  import orbax.checkpoint as ocp

  with ocp.CheckpointManager(tmp_path / 'm') as manager:
    for step in (2, 10):
      tree = {'dense': {'kernel': np.full((3, 2), step, np.float32)}}
      manager.save(step, args=ocp.args.StandardSave(tree))
  job = prepare([tmp_path / 'm'], predictors=['linear_fit'])
  assert names(stage.path for stage in job.stages) == ['2', '10']
  with job.stages[1].leaves['dense/kernel'].open(tmp_path) as reader:
    assert reader.read(0, 6).tolist() == [10.0] * 6
  with pytest.raises(UserError, match=r'm/10 has step 10, and .*m/2, given after it, 2'):
    prepare([tmp_path / 'm' / '10', tmp_path / 'm' / '2'])


def test_the_same_stage_twice_is_an_error(tmp_path):
  files = [save(tmp_path / f'{name}.safetensors', seed) for seed, name in enumerate('abc')]
  with pytest.raises(UserError, match=r'stages 0 \(.*a.safetensors\) and 2 \(.*a.saf.* the same'):
    prepare([files[0], files[1], tmp_path / '.' / 'a.safetensors'])
  copy = tmp_path / 'copy.safetensors'
  copy.write_bytes(files[1].read_bytes())
  job = prepare([*files, copy])
  with pytest.raises(UserError, match=r'stages 1 \(.*b.safetensors\) and 3 \(.*copy.saf.* the sa'):
    from_files.write(job, tmp_path / 'out', show_progress=False)
  assert not (tmp_path / 'out').exists()


def test_a_wrong_order_by_records_is_an_error(tmp_path):
  later, sooner = (trainer(tmp_path / name, step) for name, step in (('x', 900), ('y', 300)))
  with pytest.raises(UserError, match=r'oldest first: .*x has global_step 900, and .*y, .* 300'):
    prepare([later, sooner])
  assert prepare([sooner, later]).stages[0].path == sooner
  steps = [save(tmp_path / f'checkpoint-{n}' / 'model.safetensors', n).parent for n in (90, 300)]
  with pytest.raises(UserError, match=r'has checkpoint 300, and .*checkpoint-90, given after it'):
    prepare(steps[::-1])
  # Runs of their own each, as of forgetting: their steps say nothing of each other.
  apart = [trainer(tmp_path / run / 'checkpoint-5', step) for run, step in (('p', 9), ('q', 4))]
  assert len(prepare(apart).stages) == 2
  for number, examples in enumerate((100, 200)):
    tree = {'dense': {'kernel': np.full((2, 2), number, np.float32)}}
    checkpoints.save(tmp_path / f's{number}', tree, metadata={'examples': examples})
  with pytest.raises(UserError, match=r's1 has examples 200, and .*s0, given after it, 100'):
    prepare([tmp_path / 's1', tmp_path / 's0'])


def test_names_that_count_down_are_warned_of(tmp_path):
  files = [save(tmp_path / f'part{n}.safetensors', n) for n in (1, 2, 10)]
  with pytest.warns(PredictionWarning, match=r'looks reversed: .* part10.safe.* to part1.safe'):
    prepare(files[::-1])
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    prepare(files)
    prepare([files[1], files[0], files[2]])
    # Stages of forgetting: 0 is the newest, as their records show.
    for number in (0, 1, 2):
      tree = {'dense': {'kernel': np.full((2, 2), number, np.float32)}}
      checkpoints.save(tmp_path / f'{number}', tree, metadata={'examples': 80 >> number})
    prepare([tmp_path / f'{number}' for number in (2, 1, 0)])


@pytest.mark.parametrize('url', ['gs://bucket/run', 's3://b/run', 'hf://org/model', 'gs:/b'])
def test_places_elsewhere_are_refused_before_anything_is_written(tmp_path, url, monkeypatch):
  monkeypatch.chdir(tmp_path)
  file = save(tmp_path / 'a.safetensors')
  with pytest.raises(UserError, match=r"history: found '.*'; expected a path on this machine"):
    prepare([url])
  other = save(tmp_path / 'b.safetensors', 1)
  with pytest.raises(UserError, match=r'output: found .*mount it'):
    from_files.write(prepare([file, other]), url, show_progress=False)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['a.safetensors', 'b.safetensors']
  assert prepare([file.as_uri(), other]).stages[0].path == file


def test_tied_and_kept_leaves_may_be_missing(tmp_path):
  head = {'lm_head.weight': np.ones((4, 3)), 'lm_head.bias': np.ones(4)}
  old = save(tmp_path / 'a.safetensors', 0, **{**head, 'lm_head.weight': None})
  new = save(tmp_path / 'b.safetensors', 1, **head)
  with pytest.warns(PredictionWarning, match="'lm_head/weight' is missing in some stages"):
    job = prepare([old, new])
  assert (job.kinds['lm_head/weight'], job.kinds['lm_head/bias']) == ('keep', 'bias')
  with pytest.warns(PredictionWarning, match="'lm_head/weight' of .*b.safe.* not in the newest"):
    assert 'lm_head/weight' not in prepare([new, old]).kinds
  files = [save(tmp_path / 'plain.safetensors', 5)]
  # A kept leaf may be of any size, or none.
  old = save(tmp_path / 'c.safetensors', 2, mask=np.ones(3))
  newer = save(tmp_path / 'd.safetensors', 3, mask=np.full(7, -np.inf))
  job = prepare([old, newer], kinds={'mask': 'keep'})
  (folder,) = from_files.write(job, tmp_path / 'out', show_progress=False)[:1]
  found = safetensors.numpy.load_file(folder / 'd.safetensors')
  assert found['mask'].tolist() == [-np.inf] * 7
  with pytest.raises(UserError, match="has leaf 'extra/bias', which the newest"):
    prepare([save(tmp_path / 'e.safetensors', 4, **{'extra.bias': np.ones(2)}), files[0]])
