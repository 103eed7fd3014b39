"""Meta-training: KNOWN learns from the meta-dataset to predict the next weight.

Three recipes, by the config's `architecture`:

- `paper`: the paper's network (`known.py`) and recipe, section 4.1: windows of five stages and the
  sixth, mean absolute error of the raw residual, Adam at 1e-3, an L1 penalty on some layers.
- `scaled`: the paper's network and penalty, weights in units of their leaf (`known.py`).
- `conditioned`: the network that sees the leaf's trajectory (`known_leaf.py`).

In the last two every run's error is divided by that of copying, so that runs with large movements
do not drown the others. In all, three networks, one for each kind of leaf, are trained side by side
and do not touch; of each, the parameters with the lowest error on validation runs are kept. Beside
them the best linear predictor, `least_squares`, is fitted on the same windows.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from know_jax.errors import UserError, unknown_name
from know_jax.fields import Given, check_least, config_dict, editable, read_config
from know_jax.io import checkpoints
from know_jax.io.files import remove_tree
from know_jax.io.journal import read_lines
from know_jax.io.sealed import write_sealed
from know_jax.jsonable import digest
from know_jax.kinds import KINDS
from know_jax.meta import mat
from know_jax.meta.windows import Windows, fit_least_squares, sample_windows, split_runs
from know_jax.predictors import known, known_leaf
from know_jax.predictors.parameters import save_known
from know_jax.report.plots import plot_learning_curves
from know_jax.runs.metrics import MetricsLog, OnMetrics, find_callback
from know_jax.runs.record import RunRecord
from know_jax.seeds import named_key
from know_jax.system.progress import progress
from know_jax.tasks.base import AXIS
from know_jax.training import loop, steps
from know_jax.training.state import DivergedError, learning_rates

KIND = 'meta_train'
_RESUME = 'resume'
VALIDATION_BLOCK = 8192
"""Windows that are predicted at a time in validation."""


class Architecture(NamedTuple):
  """What meta-training needs to know of a network."""

  init: Callable[[jax.Array, Windows], Any]  # (key, what is trained on) -> theta.
  # (params of one kind, batch as of `draw_batch`) -> the predicted weights `[N]`.
  predict: Callable[[Any, Mapping[str, jax.Array]], jax.Array]
  relative: bool  # Whether errors are divided by the run's error of copying.
  penalty: Callable[[Any], jax.Array | float]  # Params of one kind -> what is added to the loss.


def _predict_paper(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
  history = batch['windows'][:, :-1].T
  return history[-1] + known.residuals(params, history)


def _predict_scaled(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
  history = batch['windows'][:, :-1].T
  of_leaf = jax.vmap(known.units)(batch['moments']).T
  return history[-1] + known.fused_steps(known.fuse(params), history, of_leaf)


def _init_conditioned(key: jax.Array, train: Windows) -> Any:
  theta = jax.device_get(known_leaf.init_theta(key))
  return {kind: _with_context_scale(theta[kind], train, kind) for kind in KINDS}


def _predict_conditioned(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
  constants = {name: jax.lax.stop_gradient(params[name]) for name in ('mean', 'scale')}
  step = functools.partial(known_leaf.step_coefficients, {**params, **constants})
  coefficients = jax.vmap(step)(batch['moments'], batch['rate'])
  history = batch['windows'][:, :-1].T
  return history[-1] + (coefficients.T * known_leaf.basis(history)).sum(axis=0)


ARCHITECTURES = {
  'conditioned': Architecture(_init_conditioned, _predict_conditioned, True, lambda params: 0.0),
  'scaled': Architecture(
    lambda key, train: known.init_scaled_theta(key), _predict_scaled, True, known.penalty
  ),
  'paper': Architecture(
    lambda key, train: known.init_theta(key), _predict_paper, False, known.penalty
  ),
}
"""Name -> what `config.architecture` selects."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Every config field of a meta-training."""

  # Decides the split, the weights drawn, the first parameters and the batches.
  seed: int = 0
  # 'conditioned', 'scaled' or 'paper'.
  architecture: str = 'conditioned'
  # Shares of the runs held out, for choosing parameters and for the report.
  validation_share: float = 0.2
  test_share: float = 0.2
  # A family or data set whose runs are neither trained nor validated on; '': none.
  leave_out: str = ''
  # Weights drawn from every run, for each kind.
  weights_per_run: int = 16384
  batch_size: int = 4096
  lr: float = 1e-3
  schedule: str = 'constant'
  # Decoupled weight decay on kernels; the paper has none.
  weight_decay: float = 0.0
  steps: int = 20000
  validate_every: int = 250
  # Stops when no kind has improved for so many validations.
  patience: int = 20
  save_every_seconds: float = 60.0

  def __post_init__(self) -> None:
    if self.architecture not in ARCHITECTURES:
      raise unknown_name('architecture', self.architecture, ARCHITECTURES)
    check_least(self, 1, 'weights_per_run', 'batch_size', 'steps', 'validate_every', 'patience')
    check_least(self, 0, 'seed', 'weight_decay')
    if self.steps < self.validate_every:
      raise UserError(
        f'steps is {self.steps}; expected at least validate_every = {self.validate_every}, as '
        'parameters are chosen by validation.'
      )
    shares = (self.validation_share, self.test_share)
    if not (min(shares) > 0 and sum(shares) < 1):
      raise UserError(
        f'validation_share and test_share are {shares[0]} and {shares[1]}; expected more than 0 '
        'each and less than 1 together.'
      )
    learning_rates(self.schedule, self.lr, 1)


def default_config() -> ConfigDict:
  """Every field of a meta-training, with the defaults that configs start from: see `Config`."""
  return editable(Config())


def run(
  config: Config | Given,
  data: str | Path,
  workdir: str | Path,
  *,
  on_metrics: OnMetrics | str | None = None,
) -> RunRecord:
  """Trains the three networks and writes `known.safetensors` and `least_squares.json`.

  Args:
    config: the fields of `Config`.
    data: the output folder of bin/collect.py, or a folder of the authors' `.mat` files.
    workdir: where everything is written; a workdir of the same config resumes.
    on_metrics: called with the metrics of every validation, see `runs.metrics.OnMetrics`; or its
      name, 'package.module:function'.

  Returns:
    The record, with the runs of each part and the error against copying on the validation runs.

  Raises:
    UserError: a value does not fit, the meta-dataset is damaged or too small, or the workdir
      belongs to another config.
  """
  config = read_config(Config, config)
  loop.check_batch_size(config.batch_size, config.batch_size, 'a batch')
  told = find_callback(on_metrics)
  data, workdir = Path(data).expanduser(), Path(workdir).expanduser()
  everything = list(mat.read_any(data))
  source = mat.describe(data, everything)
  runs = {run.number: run for run in everything if run.weights is not None}
  parts = parts_of(config, {number: run.about for number, run in runs.items()})
  train, validation = (
    sample_windows([runs[n] for n in parts[name]], config.weights_per_run, config.seed)
    for name in ('train', 'validation')
  )
  identity = {
    'data': source['config'],
    'runs': parts,
    'digest': digest_of({number: run.about for number, run in runs.items()}),
  }
  record = RunRecord.open(workdir, {**config_dict(config), **identity}, kind=KIND)
  record.update(runs=parts)
  if 'validation_error' in record:
    remove_tree(workdir / _RESUME)
    return record

  best, done = _train(config, workdir, train, validation, told)
  for kind, result in best.items():
    if not np.isfinite(result['ratio']):
      raise DivergedError(
        f'the error on the validation runs was never finite for {kind!r} at learning rate '
        f'{config.lr}; expected a finite one.'
      )
  coefficients = fit_least_squares(train)
  card = {
    'what': f'KNOWN ({config.architecture}), trained by bin/meta_train.py',
    'parameters': {
      kind: sum(int(np.size(leaf)) for leaf in jax.tree.leaves(best[kind]['theta']))
      for kind in KINDS
    },
    'meta_dataset': {
      'config': source['config'],
      'runs': len(runs),
      'summary': source['summary'],
      'environment': source['environment'],
    },
    'training': {
      'config': config_dict(config),
      'runs': parts,
      'environment': record['environment'],
    },
    # A state that was restored has its kinds in another order.
    'validation_error': {kind: float(best[kind]['ratio']) for kind in KINDS},
    'step': {kind: int(best[kind]['step']) for kind in KINDS},
  }
  thetas = {kind: best[kind]['theta'] for kind in KINDS}
  save_known(workdir / 'known.safetensors', thetas, card)
  write_sealed(workdir / 'least_squares.json', {'coefficients': coefficients})
  plot_learning_curves(workdir / 'learning_curves.png', read_lines(workdir / 'metrics.jsonl'))
  record.update(validation_error=card['validation_error'], steps=done)
  remove_tree(workdir / _RESUME)
  return record


def digest_of(abouts: Mapping[int, Mapping[str, Any]]) -> str:
  """Identifies the runs of a meta-dataset, from their numbers and their weights' checksums."""
  return digest({str(n): about.get('weights_sha256', about) for n, about in abouts.items()})


def parts_of(config: Config, abouts: Mapping[int, Mapping[str, Any]]) -> dict[str, list[int]]:
  """The runs to train on, to choose parameters by, and to report.

  With `leave_out`, those of the family or data set are taken out of the first two parts, and the
  third is only they: what is reported of a left-out group was never trained on, or chosen by.

  Raises:
    UserError: a part is empty, or there is no such family or data set.
  """
  split = split_runs(abouts, config.seed, (config.validation_share, config.test_share))
  parts = dict(zip(('train', 'validation', 'test'), split, strict=True))
  left_out = config.leave_out
  if not left_out:
    return parts
  names = {number: group_names(about) for number, about in abouts.items()}
  if not any(left_out in result for result in names.values()):
    raise unknown_name('family or data set', left_out, sorted(set().union(*names.values())))
  for part, numbers in parts.items():
    parts[part] = [n for n in numbers if (left_out in names[n]) == (part == 'test')]
    if not parts[part]:
      raise UserError(
        f'no run is left for {part} with leave_out={left_out!r}; expected at least one: collect '
        'more runs.'
      )
  return parts


def group_names(about: Mapping[str, Any]) -> tuple[str, str]:
  """The family and data set of a run, from its JSON file."""
  return about['config']['model'], about['config']['dataset']


def _train(
  config: Config,
  workdir: Path,
  train: Windows,
  validation: Windows,
  on_metrics: OnMetrics | None,
) -> tuple[dict[str, dict[str, Any]], int]:
  """Trains: of each kind the `theta` with the lowest error (`ratio`), and its `step`; all steps."""
  architecture = ARCHITECTURES[config.architecture]
  theta = jax.device_get(architecture.init(named_key(config.seed, 'theta'), train))
  rates = learning_rates(config.schedule, config.lr, config.steps)
  none = {'ratio': np.float64(np.inf), 'step': np.int64(0)}
  best = {kind: {'theta': theta[kind], **none} for kind in KINDS}
  moving = (theta, _optimizer(config.weight_decay).init(theta))
  done, resume, losses = 0, workdir / _RESUME, list[float]()
  if checkpoints.exists(resume):
    leaves = checkpoints.restore(resume)['leaves']
    done, best, moving = jax.tree.unflatten(
      jax.tree.structure((done, best, moving)), [leaves[str(i)] for i in range(len(leaves))]
    )
    losses, done = checkpoints.read_metadata(resume)['losses'], int(done)
  step_fn = train_step(config.architecture, config.weight_decay)
  state = steps.replicate(moving)

  def more() -> bool:
    last = max(int(result['step']) for result in best.values())
    patient = done - last < config.patience * config.validate_every
    return done < config.steps and patient

  with (
    MetricsLog(workdir, resume_step=done, on_metrics=on_metrics) as log,
    progress(config.steps, 'meta_train', 'step', initial=done) as bar,
  ):

    def step() -> None:
      nonlocal state, done
      batch = draw_batch(train, config.batch_size, config.seed, done)
      state, loss = step_fn(state, batch, rates[done])
      # Not loss[0], which would run on all devices.
      losses.append(float(steps.unreplicate(loss)))
      done += 1
      if done % config.validate_every == 0:
        theta, _ = steps.unreplicate(state)
        ratios = ratios_of(config.architecture, theta, validation)
        for kind, ratio in ratios.items():
          if ratio < best[kind]['ratio']:
            result = {'ratio': np.float64(ratio), 'step': np.int64(done)}
            best[kind] = {'theta': theta[kind], **result}
        log.write(done, loss=float(np.mean(losses)), **{f'ratio_{k}': v for k, v in ratios.items()})
        bar.set_postfix({kind: f'{ratio:.3f}' for kind, ratio in ratios.items()})
        losses.clear()
      bar.update(1)

    def save() -> None:
      log.sync()
      leaves = jax.tree.leaves((np.int64(done), best, steps.unreplicate(state)))
      tree = {'leaves': {str(i): np.asarray(leaf) for i, leaf in enumerate(leaves)}}
      checkpoints.save(resume, tree, metadata={'losses': losses}, overwrite=True)

    loop.drive(more, step, save, config.save_every_seconds)
  return best, done


def _with_context_scale(params: Any, windows: Windows, kind: str) -> Any:
  """Parameters with the mean and standard deviation of the contexts of all leaves and windows."""
  # A leaf's rate is its run's: that of the first weight drawn from the leaf.
  rate = np.ones(len(windows.moments[kind]), np.float32)
  for run, rows in enumerate(windows.leaves[kind]):
    rate[rows] = windows.rates[run]
  drawn = np.unique(windows.leaves[kind])
  result = np.asarray(
    jax.vmap(known_leaf.context)(windows.moments[kind][drawn], rate[drawn]), np.float64
  )
  scale = np.maximum(result.std(axis=0), 1e-2)
  return {
    **params,
    'mean': result.mean(axis=0).astype(np.float32),
    'scale': scale.astype(np.float32),
  }


def draw_batch(windows: Windows, batch_size: int, seed: int, step: int) -> dict[str, Any]:
  """One batch for each kind, leaves `[devices, batch_size / devices, ...]`; runs weigh the same.

  A batch has `windows`, `moments`, `rate`, and `weight`, one over the run's error of copying.
  """
  rng = np.random.default_rng([seed, step])
  devices = jax.local_device_count()
  batch = {}
  for kind, weights in windows.weights.items():
    run = rng.integers(weights.shape[0], size=batch_size)
    row = rng.integers(weights.shape[1], size=batch_size)
    result = {
      'windows': weights[run, row],
      'moments': windows.moments[kind][windows.leaves[kind][run, row]],
      'rate': windows.rates[run],
      'weight': (1.0 / windows.copying(kind))[run].astype(np.float32),
    }
    batch[kind] = jax.tree.map(
      lambda x: x.reshape(devices, batch_size // devices, *x.shape[1:]), result
    )
  return batch


def batch_loss(architecture: str, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
  """The loss of one kind of leaf: mean absolute error of the prediction, and the penalty."""
  about = ARCHITECTURES[architecture]
  error = jnp.abs(about.predict(params, batch) - batch['windows'][:, -1])
  return (error * batch['weight'] if about.relative else error).mean() + about.penalty(params)


def _optimizer(weight_decay: float) -> optax.GradientTransformation:
  """Adam without the learning rate, which the step multiplies in."""
  mask = functools.partial(jax.tree.map, lambda leaf: np.ndim(leaf) > 1)
  return optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(weight_decay, mask=mask))


@functools.lru_cache(maxsize=8)
def train_step(architecture: str, weight_decay: float) -> Any:
  """The pmapped step: ((theta, opt_state), batch, lr) -> the same, loss before the update."""
  optimizer = _optimizer(weight_decay)

  def step(state: Any, batch: Mapping[str, Any], lr: jax.Array) -> Any:
    theta, opt_state = state

    def loss_fn(theta: Any) -> jax.Array:
      return sum(
        (batch_loss(architecture, theta[kind], batch[kind]) for kind in KINDS),
        start=jnp.zeros(()),
      )

    loss, grads = jax.value_and_grad(loss_fn)(theta)
    devices = jax.lax.axis_size(AXIS)
    loss, grads = jax.tree.map(lambda x: x / devices, steps.sum_over_devices((loss, grads)))
    updates, opt_state = optimizer.update(grads, opt_state, theta)
    updates = jax.tree.map(lambda update: -lr * update, updates)
    return (optax.apply_updates(theta, updates), opt_state), loss

  return steps.mapped(step, in_axes=(0, 0, None), donate_argnums=0)


def ratios_of(architecture: str, theta: Any, windows: Windows) -> dict[str, float]:
  """Kind -> error of the hidden weight over that of copying, the mean over runs."""
  result = {}
  predict = _window_predictor(architecture)
  for kind in KINDS:
    weights, copying = windows.weights[kind], windows.copying(kind)
    ratios = []
    for run in range(len(weights)):
      errors = []
      for start in range(0, weights.shape[1], VALIDATION_BLOCK):
        part = slice(start, start + VALIDATION_BLOCK)
        batch = {
          'windows': weights[run, part],
          'moments': windows.moments[kind][windows.leaves[kind][run, part]],
          'rate': np.full(len(weights[run, part]), windows.rates[run]),
        }
        predicted = np.asarray(predict(theta[kind], batch), np.float64)
        errors.append(np.abs(predicted - batch['windows'][:, -1]))
      ratios.append(np.concatenate(errors).mean() / copying[run])
    result[kind] = float(np.mean(ratios))
  return result


@functools.lru_cache(maxsize=8)
def _window_predictor(architecture: str) -> Any:
  return jax.jit(ARCHITECTURES[architecture].predict)


def report(record: RunRecord) -> str:
  """The error on the validation runs, by kind, and how many runs were in each part."""
  errors = record['validation_error']
  parts = ', '.join(f'{len(numbers)} {name}' for name, numbers in record['runs'].items())
  return f'runs: {parts}\nerror / error of copying on the validation runs: ' + ', '.join(
    f'{kind} {errors[kind]:.3f}' for kind in KINDS
  )
