"""Does a better prediction transfer better? Short transfers from the runs of a meta-dataset.

From a run's five newest stages an arm predicts one step beyond all data; the predicted network gets
a new head and is fine-tuned for a few steps on few labels of another data set. All arms of a run
see the same head, labels and order, so that gains are differences to the newest weights, in pairs.

Two uses, on different runs. On training runs, evolution strategies (Salimans et al., 2017) tune how
far KNOWN steps and how much it shrinks, for each kind of leaf, for the loss after those few steps.
On validation runs all arms are scored. Every transfer is a line of a journal, so that the same
command runs on after a kill.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from know_jax import forgetting, transfer
from know_jax.data.sources import load_dataset, mean_image
from know_jax.errors import UserError, unknown_name
from know_jax.io.files import write_atomic
from know_jax.io.journal import Journal
from know_jax.jsonable import digest
from know_jax.kinds import KINDS
from know_jax.meta import collect, meta_training
from know_jax.meta.evaluation import (
  OVERALL,
  Arm,
  check_unique,
  predict_stage,
  retrodict,
  stages_of,
)
from know_jax.predictors import known_leaf
from know_jax.predictors.known import HISTORY_LENGTH
from know_jax.predictors.methods import METHODS
from know_jax.predictors.parameters import (
  least_squares_coefficients,
  load_known,
  read_card,
  save_known,
  theta_digest,
)
from know_jax.report.intervals import bootstrap_interval
from know_jax.report.plots import plot_gains
from know_jax.runs.record import RunRecord, config_dict
from know_jax.seeds import named_key
from know_jax.system.progress import progress
from know_jax.training import loop
from know_jax.training.loop import Checkpoint, Recipe

KIND = 'short_transfer'
NAIVE = 'persistence'
# One unit of a search direction: a factor of exp(0.5) on the step, 0.1 of the weights.
_GAIN_UNIT, _DECAY_UNIT = 0.5, 0.1


def default_config() -> ConfigDict:
  """Every field of short transfers."""
  return ConfigDict(
    {
      'seed': 0,
      # Source data set -> target; sources that are not named are left out.
      'targets': {'mnist': 'fashion_mnist', 'fashion_mnist': 'mnist', 'cifar10': 'cifar100'},
      # Classes 0 .. n - 1 of the target.
      'target_classes': 10,
      'data_dir': placeholder(str),
      'labels_per_class': 8,
      'batch_size': 40,
      'epochs': 30,
      'lr': 1e-3,
      'schedule': 'cosine',
      'optimizer': 'adam',
      # Of the target's test set, the first so many.
      'test_examples': 2000,
      # Arms beside KNOWN: predictors, and shrink of convolutions and dense kernels at strengths.
      'predictors': ('least_squares', 'known_paper', 'task_vector', 'log_fit', 'average'),
      'shrink': (0.05, 0.1, 0.2, 0.3, 0.5),
      # Evolution strategies: generations of antithetic pairs on some runs each.
      'generations': 15,
      'pairs': 4,
      'runs_per_generation': 4,
      'sigma': 0.5,
      'search_lr': 0.3,
      # Which runs are for what; as in the meta-training of the KNOWN that is tuned.
      'split_seed': 0,
      'validation_share': 1 / 7,
      'test_share': 2 / 7,
      'resamples': 10000,
    }
  )


def check_config(config: Mapping[str, Any]) -> None:
  """Checks the values of short transfers.

  Raises:
    UserError: one does not fit.
  """
  for name in ('labels_per_class', 'batch_size', 'epochs', 'test_examples', 'target_classes'):
    if config[name] < 1:
      raise UserError(f'{name} is {config[name]}; wanted at least 1.')
  for name in ('generations', 'pairs', 'runs_per_generation'):
    if config[name] < 0 or (config['generations'] and config[name] < 1):
      raise UserError(f'{name} is {config[name]}; wanted at least 1, or generations = 0.')
  for name in ('sigma', 'search_lr'):
    if not config[name] > 0:
      raise UserError(f'{name} is {config[name]}; wanted more than 0.')
  for name in config['predictors']:
    if name not in METHODS:
      raise unknown_name('predictor', name, METHODS)
  check_unique(
    [NAIVE, 'known', 'known_transfer', *config['predictors'], *map(_shrink_name, config['shrink'])]
  )
  meta_training.check_split({**config, 'seed': min(config['seed'], config['split_seed'])})
  if config['resamples'] < 1:
    raise UserError(f'resamples is {config["resamples"]}; wanted at least 1.')
  Recipe(config['optimizer'])
  loop.learning_rates(config['schedule'], config['lr'], 1)
  examples = config['labels_per_class'] * config['target_classes']
  loop.check_batch_size(config['batch_size'], examples, 'the labelled subset')


def run(config: ConfigDict, data: str | Path, known: str | Path | None, workdir: str | Path) -> str:
  """Tunes KNOWN for transfer on training runs, scores all arms on validation runs, and draws.

  Writes `transfers.jsonl`, `known_transfer.safetensors`, `gains.png` and `report.md`.

  Args:
    config: the fields of `default_config`.
    data: the output folder of bin/collect.py.
    known: the parameters to tune, of KNOWN conditioned on the leaf; None: those shipped.
    workdir: where everything is written; a workdir of the same config is run on.

  Returns:
    The report, Markdown.

  Raises:
    UserError: a value does not fit, or the workdir belongs to another config.
  """
  config = config_dict(config)
  check_config(config)
  data, workdir = Path(data).expanduser(), Path(workdir).expanduser()
  theta = load_known(known)
  for kind, params in theta.items():
    if not known_leaf.is_conditioned(params):
      raise UserError(f'{known}: {kind!r} is of the paper; wanted KNOWN conditioned on the leaf.')
  runs = {r.number: r for r in collect.read_runs(data) if r.weights is not None}
  shares = {name: config[name] for name in ('validation_share', 'test_share')}
  split = meta_training.parts_of(
    {**shares, 'seed': config['split_seed'], 'leave_out': ''},
    {n: r.about for n, r in runs.items()},
  )
  check_same_split(split, read_card(known), known)
  # Split as the meta-training did, and only then filtered.
  parts = {
    part: [n for n in numbers if runs[n].about['config']['dataset'] in config['targets']]
    for part, numbers in split.items()
  }
  for part in ('train', 'validation'):
    if not parts[part]:
      raise UserError(
        f'no {part} run is on a data set in targets, {sorted(config["targets"])}; wanted one.'
      )
  identity = {
    'known': theta_digest(theta),
    'data': meta_training.digest_of({n: r.about for n, r in runs.items()}),
  }
  RunRecord.open(workdir, {**config, **identity}, kind=KIND)
  journal = Journal(workdir / 'transfers.jsonl')

  tuned, path = search(config, theta, [runs[n] for n in parts['train']], journal)
  card = {**read_card(known), 'tuned_for_transfer': {'config': config, 'path': path}}
  save_known(workdir / 'known_transfer.safetensors', tuned, card)
  arms = [
    Arm(NAIVE, NAIVE),
    Arm('known', 'known', {'theta': theta}),
    Arm('known_transfer', 'known', {'theta': tuned}),
    *(_default_arm(name) for name in config['predictors']),
    *(
      Arm(_shrink_name(c), 'shrink', {'c': {'conv': c, 'fc': c, 'bias': 0.0}})
      for c in config['shrink']
    ),
  ]
  validation = [runs[n] for n in parts['validation']]
  rows = []
  with progress(len(validation), 'validation runs', 'run') as bar:
    for source in validation:
      errors = retrodict(source, arms)
      for arm in arms:
        found = score(config, source, arm, journal)
        rows.append({'run': source.number, 'arm': arm.name, 'error': errors[arm.name], **found})
      bar.update(1)
  summary = gains(rows, config['resamples'])
  plot_gains(workdir / 'gains.png', summary)
  text = report(summary, path)
  write_atomic(workdir / 'report.md', text.encode())
  return text


def _shrink_name(c: float) -> str:
  return f'shrink {c:g}'


def _default_arm(name: str) -> Arm:
  """A predictor with its defaults, those that are shipped spelt out: the journal knows them so."""
  if METHODS[name].shipped:
    return Arm(name, name, {'theta': load_known(shipped=METHODS[name].shipped)})
  if name == 'least_squares':
    return Arm(name, name, {'coefficients': least_squares_coefficients()})
  return Arm(name, name)


def check_same_split(
  split: Mapping[str, Sequence[int]], card: Mapping[str, Any], known: str | Path | None
) -> None:
  """Checks that KNOWN was not trained on a run that is to validate or test it.

  Raises:
    UserError: it was.
  """
  trained = set(card.get('training', {}).get('runs', {}).get('train', ()))
  if seen := sorted(trained & {*split['validation'], *split['test']}):
    raise UserError(
      f'{known or "the shipped KNOWN"} was trained on run {seen[0]}, which is to validate or test '
      'it; wanted split_seed and shares as in its training, and its meta-dataset.'
    )


# --- one short transfer ---------------------------------------------------------------------------


def score(
  config: Mapping[str, Any], source: collect.Run, arm: Arm, journal: Journal
) -> dict[str, float]:
  """Loss and accuracy after a short transfer, made now or, by the journal, before."""
  key = digest([source.number, arm.predictor, _plain(arm.options)])
  entry = journal.get(key)
  if entry is None:
    found = transfer_one(config, source, arm)
    entry = journal.add(key, run=source.number, arm=arm.name, **found)
  return {name: entry[name] for name in ('loss', 'accuracy')}


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
  return {k: theta_digest(v) if k == 'theta' else v for k, v in options.items()}


def transfer_one(config: Mapping[str, Any], source: collect.Run, arm: Arm) -> dict[str, float]:
  """Predicts from a run's five newest stages, and fine-tunes on the target.

  Args:
    config: the fields of `default_config`.
    source: the run.
    arm: the predictor.

  Returns:
    `loss` and `accuracy` on the target's test examples; loss infinite where it diverged.
  """
  settings = source.about['config']
  weights = predict_stage(source, arm, stages_of(source) - HISTORY_LENGTH)
  variables = unflatten_dict(weights, sep='/')
  train, labels, test = _target(
    config['targets'][settings['dataset']],
    config['data_dir'] or settings['data_dir'],
    config['target_classes'],
    tuple(settings['image_size']),
    config['test_examples'],
  )
  model = forgetting.model_of(settings, config['target_classes'])
  seed = config['seed'] + source.number
  shape = train.images.shape[2:]
  variables = transfer.with_head(
    variables, loop.init_variables(model, named_key(seed, 'head'), shape)
  )
  recipe = Recipe(config['optimizer'])
  try:
    state = loop.fit(
      model,
      Checkpoint(loop.create_state(variables, recipe)),
      train,
      transfer.labelled_subset(labels, config['labels_per_class'], seed),
      recipe=recipe,
      epochs=config['epochs'],
      batch_size=config['batch_size'],
      lr=config['lr'],
      schedule=config['schedule'],
      key=named_key(seed, 'train'),
    )
  except loop.DivergedError:
    return {'loss': math.inf, 'accuracy': 1 / config['target_classes']}
  return loop.evaluate(model, state.variables, test)


@functools.lru_cache(maxsize=4)
def _target(
  name: str, data_dir: str | None, classes: int, image_size: tuple[int, ...], test_examples: int
) -> tuple[loop.DeviceData, np.ndarray, loop.DeviceData]:
  """The target's training set, its labels, and the first of its test set, on the devices."""
  size: Any = image_size or None
  train, test = (
    load_dataset(name, split, data_dir=data_dir, classes=tuple(range(classes)), image_size=size)
    for split in ('train', 'test')
  )
  mean = mean_image(train.images)
  return (
    loop.put_data(train.images, train.labels, mean),
    train.labels,
    loop.put_data(test.images[:test_examples], test.labels[:test_examples], mean),
  )


# --- evolution strategies -------------------------------------------------------------------------


def adjusted(theta: Mapping[str, Any], direction: np.ndarray) -> dict[str, Any]:
  """KNOWN with its steps made longer or shorter and with more or less shrinking.

  Args:
    theta: kind -> parameters of one `ConditionedKNOWN`.
    direction: `[6]`; for conv, fc and bias the logarithm of the step's factor, in units of 0.5,
      then what is added to the decay, in units of 0.1.
  """
  found = {}
  for i, kind in enumerate(KINDS):
    params = theta[kind]
    factor = np.float32(math.exp(_GAIN_UNIT * direction[i]))
    found[kind] = {
      **params,
      'step': {name: np.asarray(leaf) * factor for name, leaf in params['step'].items()},
      'decay': np.float32(params['decay'] + _DECAY_UNIT * direction[3 + i]),
    }
  return found


def search(
  config: Mapping[str, Any], theta: Any, runs: Sequence[collect.Run], journal: Journal
) -> tuple[Any, list[dict[str, Any]]]:
  """Evolution strategies over `adjusted`, for the loss after a short transfer.

  Returns:
    The tuned theta, and for each generation the direction and the mean change in loss against the
    newest weights over its candidates.
  """

  def change(direction: np.ndarray, source: collect.Run) -> float:
    arm = Arm('candidate', 'known', {'theta': adjusted(theta, direction)})
    naive = score(config, source, Arm(NAIVE, NAIVE), journal)
    # A diverged candidate is bad, not infinitely so: it would drown the others.
    return min(score(config, source, arm, journal)['loss'] - naive['loss'], 1.0)

  direction, path = evolve(config, len(runs), lambda d, i: change(d, runs[i]))
  return adjusted(theta, direction), path


def evolve(
  config: Mapping[str, Any], runs: int, change: Callable[[np.ndarray, int], float]
) -> tuple[np.ndarray, list[dict[str, Any]]]:
  """Minimises the mean of `change(direction, run)` by antithetic evolution strategies with Adam."""
  mean, first, second = (np.zeros(2 * len(KINDS)) for _ in range(3))
  path: list[dict[str, Any]] = []
  total = config['generations'] * config['pairs'] * config['runs_per_generation']
  with progress(total, 'search', 'pair') as bar:
    for generation in range(config['generations']):
      rng = np.random.default_rng([config['seed'], generation])
      chosen = rng.choice(runs, size=min(config['runs_per_generation'], runs), replace=False)
      gradient, changes = np.zeros_like(mean), []
      for _ in range(config['pairs']):
        noise = rng.normal(size=mean.shape)
        for number in chosen:
          up, down = (
            change(mean + sign * config['sigma'] * noise, int(number)) for sign in (1, -1)
          )
          gradient += (up - down) * noise / (2 * config['sigma'])
          changes += [up, down]
          bar.update(1)
      gradient /= config['pairs'] * len(chosen)
      path.append({'direction': mean.tolist(), 'change': float(np.mean(changes))})
      first = 0.9 * first + 0.1 * gradient
      second = 0.99 * second + 0.01 * gradient**2
      age = generation + 1
      scaled = first / (1 - 0.9**age) / (np.sqrt(second / (1 - 0.99**age)) + 1e-12)
      mean = mean - config['search_lr'] * scaled
  path.append({'direction': mean.tolist(), 'change': None})
  return mean, path


# --- the report -----------------------------------------------------------------------------------


def gains(rows: Sequence[Mapping[str, Any]], resamples: int) -> list[dict[str, Any]]:
  """Each arm's retrodiction error and its gain over the newest weights, in pairs, over runs.

  Args:
    rows: `run`, `arm`, `error` (as `retrodict` gives it), `loss`, `accuracy`.
    resamples: of the bootstrap over runs.

  Returns:
    For each arm `arm`, `error` (overall), `accuracy_gain` in points and `loss_gain` (negative is
    better), each with `_low` and `_high`, the ends of a 95 % interval.
  """
  naive = {row['run']: row for row in rows if row['arm'] == NAIVE}
  found = []
  for arm in dict.fromkeys(row['arm'] for row in rows):
    chosen = [row for row in rows if row['arm'] == arm]
    values = {
      'error': [row['error'][OVERALL] for row in chosen],
      'accuracy_gain': [100 * (row['accuracy'] - naive[row['run']]['accuracy']) for row in chosen],
      'loss_gain': [row['loss'] - naive[row['run']]['loss'] for row in chosen],
    }
    line: dict[str, Any] = {'arm': arm}
    for name, numbers in values.items():
      line[name] = float(np.mean(numbers))
      ends = (math.nan, math.nan)
      if np.isfinite(numbers).all():
        ends = bootstrap_interval([[x] for x in numbers], resamples=resamples)
      line[f'{name}_low'], line[f'{name}_high'] = ends
    found.append(line)
  return found


def report(found: Sequence[Mapping[str, Any]], path: Sequence[Mapping[str, Any]]) -> str:
  """The table of arms, what the search found, and the correlation of error and gain."""
  lines = [
    '| arm | retrodiction error / copying | accuracy gain (points) | loss change |',
    '|---|---:|---:|---:|',
  ]
  for line in found:
    cells = [
      f'{line[name]:{spec}} [{line[f"{name}_low"]:{spec}}, {line[f"{name}_high"]:{spec}}]'
      for name, spec in (('error', '.3f'), ('accuracy_gain', '+.2f'), ('loss_gain', '+.3f'))
    ]
    lines.append(f'| `{line["arm"]}` | ' + ' | '.join(cells) + ' |')
  direction = path[-1]['direction']
  steps = [math.exp(_GAIN_UNIT * x) for x in direction[:3]]
  decays = [_DECAY_UNIT * x for x in direction[3:]]
  lines += [
    '',
    'Evolution strategies ended at steps times '
    + ', '.join(f'{x:.2f} ({kind})' for kind, x in zip(KINDS, steps, strict=True))
    + ' and extra decay '
    + ', '.join(f'{x:+.3f} ({kind})' for kind, x in zip(KINDS, decays, strict=True))
    + f' after {len(path) - 1} generations.',
  ]
  return '\n'.join(lines) + '\n'
