"""Which start beats a tuned rate and tuned shrinking? Families of starts, all probed alike.

Every family has twelve candidates: three strengths at four learning rates, or one start, such as
the newest weights, at twelve. All are trained for a third of the epochs, the best four in full;
validation images choose. The winner is then trained with other seeds and judged on the test set,
which chooses nothing. A winner of this screening is a hypothesis, to be confirmed elsewhere.
"""

import collections
import dataclasses
import functools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from know_jax import forgetting, transfer, trees
from know_jax.data.base import part_of
from know_jax.errors import PredictionWarning, UserError, unknown_name
from know_jax.fields import Given, read_config
from know_jax.io.journal import Journal, read_lines
from know_jax.kinds import leaf_kinds
from know_jax.nowcast import api
from know_jax.report.intervals import holm, paired_t_test, t_interval
from know_jax.report.markdown import table
from know_jax.seeds import named_key
from know_jax.study.design import Config
from know_jax.study.sources import larger_task
from know_jax.tasks import load_task
from know_jax.tasks.base import Task
from know_jax.training import loop
from know_jax.training.batch_norm import apply_policy
from know_jax.training.state import DivergedError
from know_jax.training.steps import Data, put_data

RATES = tuple(2.5**i for i in range(4))
ONE_RATES = tuple(0.25 * 1.5**i for i in range(12))
SCALES = (0.7, 0.5, 0.3)
NORMS = (1.0, 0.6, 0.35)
STRENGTHS = (0.5, 1.0, 2.0)
EXPONENTS = (0.35, 0.7, 1.2)
NAIVE, SHRINK, SCRATCH = 'naive', 'shrink', 'scratch'
MORE_DATA, LONGER = 'twice the data in truth', 'the same data for twice the epochs'
FAMILIES = (
  NAIVE, SCRATCH, SHRINK,
  'average of 3 stages', 'average of 4 half branches', 'average of the last epochs',
  'scale by movement', 'scale by movement, permuted', 'scale by depth',
  'shrink what the gradient shrinks', 'contrast, same - half',
  'reversed forgetting, newest - half', 'known_leaf', 'log_fit',
  MORE_DATA, f'{MORE_DATA}, scaled', LONGER, f'{LONGER}, scaled',
)  # fmt: skip
"""What can be tried."""
_GOES_ON = 4
_FIRST_TEST_SEED = 1000
_VALIDATION = 500
_BRANCHES = 4
_LAST = 5  # Epochs of an average, and of the way that is extrapolated.

Leaves = dict[str, np.ndarray]


def run(
  config: Config | Given, workdir: str | Path, *, name: str, only: Sequence[str] = ()
) -> list[dict[str, Any]]:
  """Adds a row for each source seed of a study to `rows.jsonl` in the workdir; resumes by rows.

  Args:
    config: the fields of `study.design.Config`; of them `source`, `transfer`, `source_seeds` and
      `transfer_seeds` count.
    workdir: of the journal; several studies may share it.
    name: of the study, in rows.
    only: names in `FAMILIES`; empty: all.

  Returns:
    All rows of the workdir: `study`, `source_seed`, `families` (name -> `strength`, `rate`,
    `validation`, and `test`, a score for each transfer seed), `as_is` (see `as_they_are`).

  Raises:
    UserError: a value does not fit.
  """
  config = read_config(Config, config)
  if config.source.epochs <= 2 * _LAST + 1:
    raise UserError(
      f'source.epochs is {config.source.epochs}; expected more than {2 * _LAST + 1}, for averages '
      'over the last and over the middle ones.'
    )
  families = _families(config, only)
  workdir = Path(workdir).expanduser()
  workdir.mkdir(parents=True, exist_ok=True)
  journal = Journal(workdir / 'rows.jsonl')
  for seed in range(config.source_seeds):
    found = journal.get(f'{name} {seed}')
    if found is not None and set(found['families']) != set(families):
      raise UserError(
        f'source {seed} of {name!r} in {workdir} has the families {", ".join(found["families"])}; '
        f'expected {", ".join(families)}. Give another workdir or name, or the families found.'
      )
    if found is None:
      began = time.monotonic()
      row = _measure(config, seed, families)
      seconds = time.monotonic() - began
      journal.add(f'{name} {seed}', study=name, source_seed=seed, **row, seconds=seconds)
      print(f'{name}, source {seed}: {seconds:.0f} s', flush=True)
  return read_lines(workdir / 'rows.jsonl')


def _families(config: Config, only: Sequence[str]) -> Sequence[str]:
  """The families to try: `only`, or all that the data allow."""
  for family in only:
    if family not in FAMILIES:
      raise unknown_name('family', family, FAMILIES)
  of_more = [family for family in FAMILIES if family.startswith(MORE_DATA)]
  if set(of_more) & set(only or FAMILIES):
    source = _source(config, 0)
    try:
      larger_task(source, load_task(source), 1)
    except UserError as error:
      if only:
        raise
      print(f'without {MORE_DATA!r}: {error}', flush=True)
      return [family for family in FAMILIES if family not in of_more]
  return only or FAMILIES


def _source(config: Config, seed: int) -> forgetting.Config:
  return forgetting.Config(**vars(config.source) | {'seed': seed, 'stages': 5})


def _measure(config: Config, seed: int, only: Sequence[str]) -> dict[str, Any]:
  source = _source(config, seed)
  task = load_task(source)
  made = Trained(task, source)
  target_config = dataclasses.replace(config.transfer, validation_examples=0)
  target = load_task(target_config, source)
  probe = _Probe(target, target_config, seed)
  kinds = leaf_kinds(made.stages[-1], task.kinds)
  families = starts_of(made, kinds, probe.gradient, np.random.default_rng(seed), task, source)
  result = {}
  for name, make in families.items():
    if name not in only:
      continue
    starts = make()
    result[name] = probe.best(starts, ONE_RATES if len(starts) == 1 else RATES)
    strength, rate = result[name]['strength'], result[name]['rate']
    tests = range(config.transfer_seeds)
    result[name]['test'] = [probe.tested(starts[strength], rate, test) for test in tests]
  return {'families': result, 'as_is': as_they_are(made.epochs, kinds, task, source)}


class Trained:
  """What is trained on the source task, when it is first asked for."""

  def __init__(self, task: Task, source: forgetting.Config):
    self._task, self._source = task, source
    self._data = put_data(task)[0]
    self._subsets = forgetting.subsets_of(task, source)
    self._fresh = jax.device_get(task.init(named_key(source.seed, 'init')))
    self.epochs: dict[int, Any] = {}  # Number -> variables after it, some of the first stage's.

  @functools.cached_property
  def stages(self) -> list[Any]:
    """Oldest first."""
    end, middle = self._source.epochs, self._source.epochs // 2
    shown = {*range(end - _LAST + 1, end + 1), *range(middle - _LAST, middle + _LAST + 1)}

    def keep(epoch: int, state: Any) -> None:
      self.epochs[epoch] = state.variables

    stages: list[Any] = []
    for stage, subset in enumerate(self._subsets):
      options: dict[str, Any] = {} if stage else {'show_after': shown, 'show': keep}
      start = stages[-1] if stage else self._fresh
      stages.append(self._train(start, subset, stage, 'train', stage, **options))
    return stages[::-1]

  @functools.cached_property
  def halves(self) -> list[Any]:
    """Branches from the newest weights, each on a random half of the data."""
    rng, all_ = np.random.default_rng(self._source.seed), self._subsets[0]
    halves = [np.sort(rng.permutation(all_)[: len(all_) // 2]) for _ in range(_BRANCHES)]
    return [self._train(self.stages[-1], half, 1, 'half', i) for i, half in enumerate(halves)]

  @functools.cached_property
  def same(self) -> list[Any]:
    """Branches from the newest weights on the data that they have seen."""
    branches = range(_BRANCHES)
    return [self._train(self.stages[-1], self._subsets[0], 1, 'same', i) for i in branches]

  @functools.cached_property
  def larger(self) -> Any:
    """What the newest weights would be with twice the data (1 / r times): same start, epochs."""
    task = larger_task(self._source, self._task, 1)
    data, every = Data(task.train, task.prepare), np.arange(task.train.size, dtype=np.int32)
    return self._train(self._fresh, every, 0, 'larger', data=data)

  @functools.cached_property
  def longer(self) -> Any:
    """What they would be after the steps of `larger`, on the data that they have seen."""
    return self._train(self._fresh, self._subsets[0], 0, 'longer', times=1 / self._source.rate)

  def _train(
    self, variables: Any, subset: np.ndarray, stage: int, *names: Any,
    data: Data | None = None, times: float = 1.0, **options: Any,
  ) -> Any:  # fmt: skip
    """As a stage is trained, for so many times its epochs; `names` are of the key."""
    source = self._source
    epochs, lr = source.training_of(stage)
    return loop.train(
      self._task, variables, data or self._data, subset, recipe=forgetting.recipe_of(source),
      epochs=round(times * epochs), lr=lr, batch_size=source.batch_size, schedule=source.schedule,
      key=named_key(source.seed, *names), **options,
    )  # fmt: skip


def starts_of(
  made: Any,
  kinds: Mapping[str, str],
  gradient: Callable[[Any], Leaves],
  rng: np.random.Generator,
  task: Task,
  source: forgetting.SourceFields,
) -> dict[str, Callable[[], dict[str, Any]]]:
  """Family -> a function that makes its starts: strength, in words -> variables.

  Args:
    made: see `Trained`.
    kinds: of the leaves.
    gradient: of the loss on the target at some variables.
    rng: permutes.
    task: of the source.
    source: what trained it.
  """
  newest, before = made.stages[-1], made.stages[-2]
  w, old, end = trees.named_leaves(newest), trees.named_leaves(before), source.epochs
  kernels = [path for path, kind in kinds.items() if kind in ('conv', 'fc') and not task.head(path)]
  weights = [path for path, kind in kinds.items() if kind != 'keep' and not task.head(path)]

  def with_(
    change: Callable[[str], Any], paths: Sequence[str] = kernels, base: Leaves | None = None
  ) -> Any:
    base = w if base is None else base
    leaves = [np.float32(change(p)) if p in paths else x for p, x in base.items()]
    return jax.tree.unflatten(jax.tree.structure(newest), leaves)

  def scaled(variables: Any, scales: Sequence[float]) -> dict[str, Any]:
    of = trees.named_leaves(variables)
    return _each('scale', scales, lambda s: with_(lambda p: s * of[p], base=of))

  def at_norms(mean: Leaves) -> dict[str, Any]:
    def of_norm(path: str, norm: float) -> np.ndarray:
      return mean[path] * (norm * np.linalg.norm(w[path]) / np.linalg.norm(mean[path]))

    return _each('norm', NORMS, lambda n: with_(lambda p: of_norm(p, n)))

  def by_leaf(amounts: np.ndarray) -> dict[str, Any]:
    shares = dict(zip(kernels, amounts / np.mean(amounts), strict=True))
    return _each('exponent', EXPONENTS, lambda a: with_(lambda p: w[p] * np.exp(-a * shares[p])))

  def along(end: Leaves, start: Leaves) -> dict[str, Any]:
    moved = {p: end[p] - start[p] for p in weights}
    return _each('times', STRENGTHS, lambda a: with_(lambda p: w[p] + a * moved[p], weights))

  def predicted(predictor: str) -> dict[str, Any]:
    about: dict[str, Any] = {'predictor': predictor, 'rate': source.rate, 'kinds': task.kinds}
    with warnings.catch_warnings():
      # What a start is worth is about to be measured.
      warnings.simplefilter('ignore', PredictionWarning)
      return _each('steps', (1, 2, 3), lambda n: api.predict(made.stages, n, **about))

  def downhill() -> dict[str, Any]:
    g = gradient(newest)
    shrinks = {p: w[p] * g[p] > 0 for p in kernels}
    return _each('scale', SCALES, lambda s: with_(lambda p: w[p] * np.where(shrinks[p], s, 1.0)))

  moved = np.array([np.linalg.norm(w[p] - old[p]) / np.linalg.norm(w[p]) for p in kernels])
  last = range(end - _LAST + 1, end + 1)
  return {
    NAIVE: lambda: {'as it is': newest},
    SCRATCH: lambda: {'fresh': None},  # As `transfer.train_one` takes it.
    SHRINK: lambda: scaled(newest, SCALES),
    'average of 3 stages': lambda: at_norms(mean_of(made.stages[-3:])),
    'average of 4 half branches': lambda: at_norms(mean_of(made.halves)),
    'average of the last epochs': lambda: at_norms(mean_of([made.epochs[i] for i in last])),
    'scale by movement': lambda: by_leaf(moved),
    'scale by movement, permuted': lambda: by_leaf(rng.permutation(moved)),
    'scale by depth': lambda: by_leaf(np.arange(1, len(kernels) + 1)),
    'shrink what the gradient shrinks': downhill,
    'contrast, same - half': lambda: along(mean_of(made.same), mean_of(made.halves)),
    'reversed forgetting, newest - half': lambda: along(w, mean_of(made.halves)),
    'known_leaf': lambda: predicted('known_leaf'),
    'log_fit': lambda: predicted('log_fit'),
    MORE_DATA: lambda: {'as it is': made.larger},
    f'{MORE_DATA}, scaled': lambda: scaled(made.larger, NORMS),
    LONGER: lambda: {'as it is': made.longer},
    f'{LONGER}, scaled': lambda: scaled(made.longer, NORMS),
  }


def _each(word: str, values: Sequence[float], make: Callable[[Any], Any]) -> dict[str, Any]:
  return {f'{word} {value:g}': make(value) for value in values}


def mean_of(many: Sequence[Any]) -> Leaves:
  """Path -> the mean of a leaf over several variables."""
  named = [trees.named_leaves(variables) for variables in many]
  return {path: np.mean([leaves[path] for leaves in named], axis=0) for path in named[0]}


class _Probe:
  """Trains on the labelled images of one seed of the target."""

  def __init__(self, target: Task, config: transfer.TargetFields, seed: int):
    self._config, self._seed = config, seed
    train = Data(target.train, target.prepare)
    held_out = part_of(target.train, transfer.validation_subset(target, _VALIDATION, seed))
    self._labelled = transfer.labelled_subset(target, config.labels_per_class, seed, _VALIDATION)
    self._validating = dataclasses.replace(target, test=held_out)
    self._testing = target
    self._validation = (train, Data(held_out, target.prepare))
    self._test = (train, Data(target.test, target.prepare))

  def best(self, starts: Mapping[str, Any], rates: Sequence[float]) -> dict[str, Any]:
    """Strength, rate and validation score of the best candidate."""
    scores = {(s, r): self._validated(starts[s], r, 1 / 3) for s in starts for r in rates}
    kept = sorted(scores, key=lambda pair: -scores[pair])[:_GOES_ON]
    scores = {(s, r): self._validated(starts[s], r, 1.0) for s, r in kept}
    strength, rate = max(scores, key=lambda pair: scores[pair])
    validation = scores[strength, rate]
    return {'strength': strength, 'rate': rate, 'validation': validation, 'rates': [*rates]}

  def _validated(self, start: Any, rate: float, budget: float) -> float:
    config = self._scaled(rate, budget)
    return _score(self._validating, start, self._validation, self._labelled, config, self._seed)

  def tested(self, start: Any, rate: float, test: int) -> float:
    seed = _FIRST_TEST_SEED * (test + 1) + self._seed
    return _score(self._testing, start, self._test, self._labelled, self._scaled(rate, 1.0), seed)

  def _scaled(self, rate: float, budget: float) -> transfer.TargetFields:
    epochs = max(1, round(self._config.epochs * budget))
    return dataclasses.replace(self._config, lr=self._config.lr * rate, epochs=epochs)

  def gradient(self, start: Any) -> Leaves:
    """Of the loss on the labelled images, with a head that was trained alone."""
    warm: list[Any] = []
    transfer.train_one(
      self._validating, start, self._validation, self._labelled,
      dataclasses.replace(self._config, epochs=0), self._seed, on_trained=warm.append,
    )  # fmt: skip
    model, batch = self._testing.model, self._testing.prepared(self._labelled)

    def loss(params: Any) -> jax.Array:
      variables = warm[0] | {'params': params}
      outputs, _ = model.apply(variables, batch, train=False, key=None)
      return self._testing.loss(outputs, batch)[0].mean()

    result = jax.device_get(jax.jit(jax.grad(loss))(warm[0]['params']))
    return trees.named_leaves({'params': result})


def _score(
  task: Task, start: Any, data: Any, subset: np.ndarray, config: transfer.TargetFields, seed: int
) -> float:
  try:
    return transfer.train_one(task, start, data, subset, config, seed)[task.score]
  except DivergedError:
    return -math.inf


def as_they_are(
  epochs: Mapping[int, Any], kinds: Mapping[str, str], task: Task, source: forgetting.Config
) -> dict[str, float]:
  """Test scores on the source task at half its training, extrapolated and not; no transfer."""
  middle = source.epochs // 2
  now, old = (trees.named_leaves(epochs[epoch]) for epoch in (middle, middle - _LAST))
  tested = put_data(task)[1]
  images = task.prepared(forgetting.subsets_of(task, source)[0][:512])

  def score(leaves: Leaves) -> float:
    kept = [leaves[p] if kinds[p] != 'keep' else x for p, x in now.items()]
    variables = jax.tree.unflatten(
      jax.tree.structure(epochs[middle]), [np.float32(leaf) for leaf in kept]
    )
    settled = apply_policy(
      'recalibrate', task.model, variables, images, num_batches=8, batch_size=64
    )
    return loop.evaluate(task, settled, tested)[task.score]

  average = mean_of([epochs[e] for e in range(middle - _LAST + 1, middle + 1)])
  return {
    'half trained': score(now),
    **{
      f'extrapolated by {a:g}': score({p: x + a * (x - old[p]) for p, x in now.items()})
      for a in (0.3, 0.5)
    },
    'average of the last epochs': score(average),
    f'{_LAST} epochs more': score(trees.named_leaves(epochs[middle + _LAST])),
    'trained to the end': score(trees.named_leaves(epochs[source.epochs])),
  }


def page(rows: Sequence[Mapping[str, Any]], command: str) -> str:
  """The report in Markdown; p after Holm over all comparisons of the page.

  Raises:
    UserError: there are no rows.
  """
  if not rows:
    raise UserError('there are no rows; run the command without --report first.')
  studies = {study: [r for r in rows if r['study'] == study] for study in _in_order(rows)}
  gains = {
    (study, name, rival): _points(group, name) - _points(group, rival)
    for study, group in studies.items()
    for name in group[0]['families']
    for rival in (NAIVE, SHRINK)
    if name not in (rival, NAIVE)
  }
  p_values = dict(zip(gains, holm([paired_t_test(x) for x in gains.values()]), strict=True))
  sections, winners = [], []
  for study, group in studies.items():
    lines = []
    for name in group[0]['families']:
      cells = []
      for rival in (NAIVE, SHRINK):
        key = (study, name, rival)
        cells += [_interval(gains[key]), f'{p_values[key]:.3f}'] if key in gains else ['', '']
      chosen = collections.Counter(
        f'{r["families"][name]["strength"]} at {r["families"][name]["rate"]:.3g}' for r in group
      )
      (most, count), *_ = chosen.most_common(1)
      tried = [r['families'][name] for r in group]
      at_edge = sum(one['rate'] == max(one['rates']) for one in tried)
      cells += [f'{most} ({count})', str(at_edge)]
      lines.append([name, f'{_points(group, name).mean():.2f}', *cells])
      keys = [(study, name, rival) for rival in (NAIVE, SHRINK)]
      if all(k in gains and p_values[k] < 0.05 and gains[k].mean() > 0 for k in keys):
        winners.append(f'{name} ({study})')
    as_is = [
      [words, f'{100 * statistics.mean(r["as_is"][words] for r in group):.2f}',
       _interval([100 * (r['as_is'][words] - r['as_is']['half trained']) for r in group])]
      for words in group[0]['as_is']
    ]  # fmt: skip
    sections += [
      f'## {study}: {len(group)} sources',
      f'Rates, times that of the study: {_grid(group, NAIVE)} (naive and what has one start), '
      f'{_grid(group, SHRINK)} (all others).',
      table(['start', 'test, %', 'minus tuned naive', 'p', 'minus tuned shrink', 'p',
             'chosen most often (sources)', 'sources at the largest rate'], lines),
      'The source at half its training, as it is, on its own test set:',
      table(['weights', 'test, %', 'minus half trained'], as_is),
    ]  # fmt: skip
  return '\n\n'.join(
    [
      '# What could beat a tuned rate and tuned shrinking',
      'Every family of starts has twelve candidates, three strengths at four learning rates '
      '(naive, and what else has one start: twelve rates). All are trained for a third of the '
      f'epochs, the best {_GOES_ON} in full, and {_VALIDATION} validation images choose. Winners '
      'are trained with other seeds and judged on the test set. Means over source seeds with 95 % '
      't-intervals; p of paired t-tests, after Holm over all on this page. Scales and averages are '
      'of kernels, leaf by leaf; a norm is relative to the newest weights.',
      f'Above both rivals with p < 0.05: {", ".join(winners) or "none"}.',
      *sections,
      f'Made by `{command}` from `rows.jsonl` there.\n',
    ]
  )


def _grid(group: Sequence[Mapping[str, Any]], name: str) -> str:
  """The rates that a family was tried at, in words."""
  rates = {
    rate for row in group if name in row['families'] for rate in row['families'][name]['rates']
  }
  return f'{len(rates)} from {min(rates):.3g} to {max(rates):.3g}' if rates else 'none'


def _in_order(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  return list(dict.fromkeys(row['study'] for row in rows))


def _points(group: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
  return np.array([100 * statistics.mean(row['families'][name]['test']) for row in group])


def _interval(values: Sequence[float] | np.ndarray) -> str:
  low, high = t_interval(values)
  return f'{np.mean(values):+.2f} ({low:+.2f} to {high:+.2f})'
