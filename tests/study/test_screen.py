"""The screening of starts: what each start is, the real loop shrunk, a page recomputed by SciPy."""

import types

import jax
import numpy as np
import pytest
import scipy.stats
from numpy.testing import assert_allclose

from know_jax import trees
from know_jax.data.digits import load_digits
from know_jax.errors import UserError
from know_jax.fields import read_config
from know_jax.forgetting import SourceFields
from know_jax.kinds import leaf_kinds
from know_jax.seeds import named_key
from know_jax.study import design, screen, sources
from know_jax.tasks import load_task
from know_jax.training import loop

PATHS = ('params/conv/kernel', 'params/dense/kernel', 'params/head/kernel')


def weights(rng):
  return {
    'params': {
      'conv': {'bias': rng.normal(size=3), 'kernel': rng.normal(size=(3, 3, 1, 3))},
      'dense': {'bias': rng.normal(size=4), 'kernel': rng.normal(size=(12, 4))},
      'head': {'kernel': rng.normal(size=(4, 2))},
    }
  }


@pytest.fixture(scope='module')
def made():
  rng = np.random.default_rng(0)
  one = lambda: jax.tree.map(np.float32, weights(rng))  # noqa: E731
  return types.SimpleNamespace(
    stages=[one() for _ in range(5)],
    halves=[one() for _ in range(4)],
    same=[one() for _ in range(4)],
    epochs={epoch: one() for epoch in range(1, 13)},
    larger=one(),
    longer=one(),
  )


@pytest.fixture(scope='module')
def starts(made):
  kinds = leaf_kinds(made.stages[-1])
  gradient = trees.named_leaves(jax.tree.map(np.float32, weights(np.random.default_rng(1))))
  task = load_task({**design.default_config().source.to_dict(), 'dataset': 'digits'})
  found = screen.starts_of(
    made, kinds, lambda at: gradient, np.random.default_rng(0), task, SourceFields(epochs=12)
  )
  assert tuple(found) == screen.FAMILIES
  return {
    name: {words: trees.named_leaves(tree) for words, tree in make().items()}
    for name, make in found.items()
  }, gradient


def norm(x):
  return float(np.sqrt((np.asarray(x, np.float64) ** 2).sum()))


def test_every_family_has_three_candidates_or_is_naive_and_leaves_the_head(made, starts):
  newest = trees.named_leaves(made.stages[-1])
  for name, family in starts[0].items():
    one = (screen.NAIVE, screen.SCRATCH, screen.MORE_DATA, screen.LONGER)
    assert len(family) == (1 if name in one else 3)
    if name not in ('known_leaf', 'log_fit') and not name.startswith(one[1:]):
      for leaves in family.values():
        assert_allclose(leaves['params/head/kernel'], newest['params/head/kernel'])
  assert len(screen.ONE_RATES) == 3 * len(screen.RATES)


@pytest.mark.parametrize('name', ['stages', 'half branches', 'the last epochs'])
def test_averages_point_where_means_point_at_the_norms_asked_for(made, starts, name):
  family, newest = starts[0], trees.named_leaves(made.stages[-1])
  of = {
    'stages': made.stages[2:],
    'half branches': made.halves,
    'the last epochs': [made.epochs[epoch] for epoch in (8, 9, 10, 11, 12)],
  }[name]
  (full,) = [n for n in family if n.startswith('average') and n.endswith(name)]
  for path in PATHS[:2]:
    module, leaf = path.split('/')[1:]
    mean = sum(np.float64(w['params'][module][leaf]) for w in of) / len(of)
    for part in screen.NORMS:
      got = np.float64(family[full][f'norm {part:g}'][path])
      assert_allclose(norm(got), part * norm(newest[path]), rtol=1e-5)
      assert_allclose((got * mean).sum(), norm(got) * norm(mean), rtol=1e-5)


def test_scales_of_leaves_keep_their_mean_exponent_and_follow_movement(made, starts):
  families = starts[0]
  newest, before = (trees.named_leaves(made.stages[i]) for i in (-1, -2))
  moved = [norm(newest[p] - before[p]) / norm(newest[p]) for p in PATHS[:2]]
  for name in ('scale by movement', 'scale by movement, permuted', 'scale by depth'):
    for exponent in screen.EXPONENTS:
      leaves = families[name][f'exponent {exponent:g}']
      logs = [-np.log(norm(leaves[p]) / norm(newest[p])) for p in PATHS[:2]]
      assert_allclose(np.mean(logs), exponent, rtol=1e-4)
      if name == 'scale by movement':
        assert_allclose(logs[0] / logs[1], moved[0] / moved[1], rtol=1e-4)
      if name == 'scale by depth':
        assert_allclose(logs[1] / logs[0], 2, rtol=1e-4)


@pytest.mark.parametrize('name', [screen.MORE_DATA, screen.LONGER])
def test_what_more_data_or_epochs_would_give_is_tried_as_it_is_and_with_smaller_kernels(
  made, starts, name
):
  truth = trees.named_leaves({screen.MORE_DATA: made.larger, screen.LONGER: made.longer}[name])
  for scale in (1, 0.6, 0.35):
    leaves = starts[0][f'{name}, scaled'][f'scale {scale:g}']
    for path, leaf in truth.items():
      assert_allclose(leaves[path], leaf * (scale if path in PATHS[:2] else 1), rtol=1e-6)
      assert_allclose(starts[0][name]['as it is'][path], leaf)


def test_directions_and_what_the_gradient_shrinks(made, starts):
  families, gradient = starts
  newest = trees.named_leaves(made.stages[-1])
  half, same = (
    sum(np.float64(w['params']['conv']['bias']) for w in kind) / 4
    for kind in (made.halves, made.same)
  )
  path = 'params/conv/bias'
  contrast = families['contrast, same - half']['times 2'][path]
  assert_allclose(contrast, newest[path] + 2 * (same - half), rtol=1e-5)
  tau = families['reversed forgetting, newest - half']['times 0.5'][path]
  assert_allclose(tau, newest[path] + 0.5 * (newest[path] - half), rtol=1e-5)
  for path in PATHS[:2]:
    got, w = families['shrink what the gradient shrinks']['scale 0.3'][path], newest[path]
    # A step down the gradient makes a weight smaller where both have one sign.
    smaller = np.abs(w - 1e-3 * gradient[path]) < np.abs(w)
    assert 0 < smaller.sum() < smaller.size
    assert_allclose(got, np.where(smaller, 0.3 * w, w), rtol=1e-5)


def small():
  config = design.default_config()
  config.source.update({'classes': (0, 1, 2, 3, 4), 'model': 'cnn', 'width': 4, 'epochs': 12})
  config.source.update({'stage_epochs': 2, 'batch_size': 16, 'stratified': True})
  config.transfer.update({'classes': (5, 6, 7, 8, 9), 'labels_per_class': 8, 'batch_size': 16})
  config.transfer.update({'epochs': 3, 'warmup_epochs': 1})
  config.source_seeds, config.transfer_seeds = 1, 2
  return config


def test_the_loop_resumes_and_judges_by_images_that_chose_nothing(tmp_path, monkeypatch):
  judged = []
  score = screen._score

  def watched(task, start, data, subset, config, seed):
    judged.append((task.test.size, config.epochs, seed))
    return score(task, start, data, subset, config, seed)

  monkeypatch.setattr(screen, '_score', watched)
  monkeypatch.setattr(screen, '_VALIDATION', 100)
  monkeypatch.setattr(screen, '_BRANCHES', 1)
  only = (screen.NAIVE, screen.SCRATCH, screen.SHRINK)
  (row,) = screen.run(small(), tmp_path, name='digits', only=only)
  assert list(row['families']) == list(only)
  tested = int((load_digits('test')[1] >= 5).sum())
  # Twelve for a third of the epochs, four in full, then two on the test set with other seeds.
  each = [(100, 1, 0)] * 12 + [(100, 3, 0)] * 4 + [(tested, 3, 1000), (tested, 3, 2000)]
  assert judged == 3 * each
  assert all(0 < value <= 1 for value in row['as_is'].values())
  assert row['families']['naive']['rates'] == list(screen.ONE_RATES)
  assert row['families']['shrink']['rates'] == list(screen.RATES)
  assert row['families']['naive']['rate'] in screen.ONE_RATES
  before = (tmp_path / 'rows.jsonl').read_bytes()
  screen.run(small(), tmp_path, name='digits', only=only)
  assert (tmp_path / 'rows.jsonl').read_bytes() == before
  assert len(judged) == 54
  with pytest.raises(
    UserError, match=r'has the families naive, scratch, shrink; expected naive\. Give'
  ):
    screen.run(small(), tmp_path, name='digits', only=[screen.NAIVE])
  assert (tmp_path / 'rows.jsonl').read_bytes() == before


def test_twice_the_data_hold_the_data_and_are_trained_for_twice_the_steps(monkeypatch):
  config = small()
  config.source.update(train_examples=200, batch_size=8)
  source = screen._source(read_config(design.Config, config), 3)
  task = load_task(source)
  larger = sources.larger_task(source, task, 1)
  images = [{x.tobytes() for x in t.train.arrays['image']} for t in (task, larger)]
  assert (task.train.size, larger.train.size) == (200, 400)
  assert images[0] < images[1]
  assert_allclose(larger.prepare.mean, task.prepare.mean)

  trained = []

  def watched(task, start, data, indices, *, epochs, lr, **options):
    trained.append((data.size, len(indices), epochs, lr))
    return start

  monkeypatch.setattr(loop, 'train', watched)
  made = screen.Trained(task, source)
  fresh = jax.device_get(task.init(named_key(3, 'init')))
  for variables in (made.stages[-1], made.larger, made.longer):  # All from one start.
    jax.tree.map(np.testing.assert_array_equal, variables, fresh)
  lr = source.lr
  assert trained[0] == (200, 200, 12, lr)
  assert trained[5:] == [(400, 400, 12, lr), (200, 200, 24, lr)]


def test_families_are_those_asked_for_that_the_data_allow(capsys, tmp_path):
  config = read_config(design.Config, small())
  assert list(screen._families(config, [])) == [
    name for name in screen.FAMILIES if not name.startswith(screen.MORE_DATA)
  ]
  assert 'larger x2 needs' in capsys.readouterr().out
  with pytest.raises(UserError, match=r'larger x2 needs .* training examples'):
    screen.run(config, tmp_path / 'none', name='x', only=[screen.MORE_DATA])
  with pytest.raises(UserError, match=r"'shrinks'\. Did you mean 'shrink'"):
    screen.run(config, tmp_path / 'none', name='x', only=['shrinks'])
  assert not (tmp_path / 'none').exists()


def test_too_short_a_training_is_refused_before_it_begins(tmp_path):
  config = small()
  config.source.epochs = 11
  with pytest.raises(UserError, match=r'source\.epochs is 11; expected more than 11'):
    screen.run(config, tmp_path / 'none', name='x')
  assert not (tmp_path / 'none').exists()


def test_the_page_has_paired_intervals_and_holm():
  rng = np.random.default_rng(0)
  scores = {name: rng.normal(mean, 0.01, (6, 2)) for name, mean in
            (('naive', 0.5), ('shrink', 0.51), ('contrast', 0.9))}  # fmt: skip
  rows = [
    {
      'study': 'a', 'source_seed': i, 'as_is': {'half trained': 0.5, 'later': 0.5 + 0.01 * i},
      'families': {
        name: {'strength': 's', 'rate': 4.0 if i < 2 else 1.0, 'test': list(values[i]),
               'rates': [1.0, 4.0] + [9.0] * (name == 'naive')}
        for name, values in scores.items()
      },
    }
    for i in range(6)
  ]  # fmt: skip
  shown = screen.page(rows, 'the command')
  means = {name: 100 * values.mean(1) for name, values in scores.items()}
  pairs = [('shrink', 'naive'), ('contrast', 'naive'), ('contrast', 'shrink')]
  raw = np.array([scipy.stats.ttest_rel(means[a], means[b]).pvalue for a, b in pairs])
  order = np.argsort(raw)
  adjusted = np.empty(3)
  adjusted[order] = np.minimum(1, np.maximum.accumulate(raw[order] * [3, 2, 1]))
  line = next(line for line in shown.splitlines() if line.startswith('| contrast'))
  cells = [cell.strip() for cell in line.split('|')[2:]]
  gain = means['contrast'] - means['shrink']
  low, high = scipy.stats.t.interval(0.95, 5, gain.mean(), scipy.stats.sem(gain))
  assert cells[3] == f'{gain.mean():+.2f} ({low:+.2f} to {high:+.2f})'
  assert cells[4] == f'{adjusted[2]:.3f}'
  line = next(line for line in shown.splitlines() if line.startswith('| shrink'))
  assert line.split('|')[4].strip() == f'{adjusted[0]:.3f}'
  assert line.split('|')[-2].strip() == '2'  # naive is tried at a higher rate than 4
  assert 'study: 3 from 1 to 9 (naive and what has one start), 2 from 1 to 4 (all others).' in shown
  assert (
    next(line for line in shown.splitlines() if '| naive' in line).split('|')[-2].strip() == '0'
  )
  assert 'Above both rivals with p < 0.05: contrast (a).' in shown
  with pytest.raises(UserError, match='no rows'):
    screen.page([], 'x')
