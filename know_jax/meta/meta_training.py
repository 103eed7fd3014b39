"""Meta-training: KNOWN learns from the meta-dataset to predict the next weight.

The paper, section 4.1: windows of five stages and the sixth, mean absolute error of the residual,
Adam at 1e-3, an L1 penalty on some layers. Three networks, one for each kind of leaf, are trained
side by side and do not touch; of each, the parameters with the lowest error on validation runs are
kept.
"""

import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from know_jax import checkpoints, known, training
from know_jax.errors import UserError
from know_jax.files import write_atomic
from know_jax.meta import collect
from know_jax.meta.windows import Windows, sample_windows, split_runs
from know_jax.nowcast import predict
from know_jax.pretrained import save_known
from know_jax.run_record import MetricsLog, RunRecord, config_dict, progress
from know_jax.signals import Terminated, uninterrupted
from know_jax.training import AXIS, named_key
from know_jax.trees import KINDS

KIND = 'meta_train'
RIVALS = ('persistence', 'task_vector', 'linear_fit', 'log_fit', 'average', 'shrink')
"""Predictors that the card compares KNOWN with on the test runs."""


def default_config() -> ConfigDict:
  """Every field of a meta-training."""
  return ConfigDict(
    {
      # Decides the split, the weights drawn, the first parameters and the batches.
      'seed': 0,
      # Shares of the runs held out, for choosing parameters and for the report.
      'validation_share': 0.2,
      'test_share': 0.2,
      # Weights drawn from every run, for each kind.
      'weights_per_run': 16384,
      'batch_size': 4096,
      'lr': 1e-3,
      'steps': 20000,
      'validate_every': 250,
      # Stops when no kind has improved for so many validations.
      'patience': 20,
      'save_every_seconds': 60.0,
    }
  )


class MetaState(NamedTuple):
  """What meta-training changes; all but `step` are kind -> parameters or numbers."""

  step: Any
  theta: Any
  opt_state: Any
  best_theta: Any
  best_ratio: Any
  best_step: Any


def run(config: ConfigDict, data: str | Path, workdir: str | Path) -> RunRecord:
  """Trains the three networks and writes `known.safetensors` in the workdir.

  Args:
    config: the fields of `default_config`.
    data: the output folder of bin/collect.py.
    workdir: where everything is written; a workdir of the same config is run on.

  Returns:
    The record, with the error against copying on the test runs.

  Raises:
    UserError: a value does not fit, the meta-dataset is damaged or too small, or the workdir
      belongs to another config.
  """
  config = config_dict(config)
  _check_config(config)
  data, workdir = Path(data).expanduser(), Path(workdir).expanduser()
  runs = {run.number: run for run in collect.read_runs(data) if run.weights is not None}
  shares = (config['validation_share'], config['test_share'])
  parts = split_runs(list(runs), config['seed'], shares)
  train, validation, test = (
    sample_windows([runs[n] for n in part], config['weights_per_run'], config['seed'])
    for part in parts
  )
  source = RunRecord.read(data, collect.KIND)
  record = RunRecord.open(workdir, {**config, 'data': source['config']}, kind=KIND)
  record.update(runs={'train': parts[0], 'validation': parts[1], 'test': parts[2]})
  if 'test_error' in record:
    return record

  state = _train(config, workdir, train, validation)
  theta = state.best_theta
  errors = retrodiction_errors(test, theta)
  summary = {
    kind: {name: float(np.mean(e)) for name, e in by.items()} for kind, by in errors.items()
  }
  card = {
    'what': 'KNOWN, 9,425 parameters for each kind of leaf, trained by bin/meta_train.py',
    'meta_dataset': {
      'config': source['config'],
      'runs': len(runs),
      'summary': collect.summary(data).splitlines()[1:],
      'environment': source['environment'],
    },
    'training': {'config': config, 'runs': record['runs'], 'environment': record['environment']},
    'validation_error': {k: float(v) for k, v in state.best_ratio.items()},
    'step': {k: int(v) for k, v in state.best_step.items()},
    'test_error': summary,
    'test_error_means': 'mean absolute error of the hidden weight divided by that of copying the '
    'newest weight, averaged over the test runs; below 1 is better than copying',
  }
  save_known(workdir / 'known.safetensors', theta, card)
  write_atomic(workdir / 'known.md', card_text(card).encode())
  record.update(test_error=summary, steps=int(state.step))
  return record


def _check_config(config: Mapping[str, Any]) -> None:
  for name in ('weights_per_run', 'batch_size', 'steps', 'validate_every', 'patience'):
    if config[name] < 1:
      raise UserError(f'{name} is {config[name]}; wanted at least 1.')
  if config['steps'] < config['validate_every']:
    raise UserError(
      f'steps is {config["steps"]}; wanted at least validate_every = {config["validate_every"]}, '
      'as parameters are chosen by validation.'
    )
  training.check_batch_size(config['batch_size'], config['batch_size'], 'a batch')


def _train(
  config: Mapping[str, Any], workdir: Path, train: Windows, validation: Windows
) -> MetaState:
  optimizer = optax.adam(config['lr'])
  theta = jax.device_get(known.init_theta(named_key(config['seed'], 'theta')))
  blank = {kind: np.float64(np.inf) for kind in KINDS}
  state = MetaState(
    step=np.int64(0),
    theta=theta,
    opt_state=optimizer.init(theta),
    best_theta=theta,
    best_ratio=blank,
    best_step={kind: np.int64(0) for kind in KINDS},
  )
  resume = workdir / 'resume'
  losses: list[float] = []
  if checkpoints.exists(resume):
    leaves = checkpoints.restore(resume)['leaves']
    state = jax.tree.unflatten(
      jax.tree.structure(state), [leaves[str(i)] for i in range(len(leaves))]
    )
    losses = checkpoints.read_metadata(resume)['losses']

  def save() -> None:
    leaves = jax.tree.leaves(jax.device_get(state))
    tree = {'leaves': {str(i): np.asarray(leaf) for i, leaf in enumerate(leaves)}}
    checkpoints.save(resume, tree, metadata={'losses': losses}, overwrite=True)

  step_fn = train_step(optimizer)
  replicated = training.replicate((state.theta, state.opt_state))
  saved, done = time.monotonic(), int(state.step)
  with (
    MetricsLog(workdir, resume_step=done) as log,
    progress(config['steps'], 'meta_train', 'step', initial=done) as bar,
  ):
    for step in range(done, config['steps']):
      try:
        # A signal in here waits until state, losses and the log agree again.
        with uninterrupted():
          batch = draw_batch(train, config['batch_size'], config['seed'], step)
          replicated, loss = step_fn(replicated, batch)
          losses.append(float(loss[0]))
          done = step + 1
          stop = False
          if (step + 1) % config['validate_every'] == 0:
            theta, opt_state = training.unreplicate(replicated)
            state = _validate(
              state._replace(theta=theta, opt_state=opt_state), validation, step + 1
            )
            ratios = {f'ratio_{kind}': float(v) for kind, v in _ratios(theta, validation).items()}
            log.write(step + 1, loss=float(np.mean(losses)), **ratios)
            bar.set_postfix({k.removeprefix('ratio_'): f'{v:.3f}' for k, v in ratios.items()})
            losses = []
            waited = step + 1 - max(int(v) for v in state.best_step.values())
            stop = waited >= config['patience'] * config['validate_every']
          if time.monotonic() - saved > config['save_every_seconds']:
            state = _current(state, replicated, done)
            save()
            saved = time.monotonic()
          bar.update(1)
      except (KeyboardInterrupt, Terminated):
        state = _current(state, replicated, done)
        save()
        raise
      if stop:
        break
  return state


def _current(state: MetaState, replicated: Any, step: int) -> MetaState:
  theta, opt_state = training.unreplicate(replicated)
  return state._replace(step=np.int64(step), theta=theta, opt_state=opt_state)


def _validate(state: MetaState, validation: Windows, step: int) -> MetaState:
  """Keeps the parameters of each kind if their error on the validation runs is the lowest yet."""
  best_theta, best_ratio = dict(state.best_theta), dict(state.best_ratio)
  best_step = dict(state.best_step)
  for kind, ratio in _ratios(state.theta, validation).items():
    if ratio < best_ratio[kind]:
      best_theta[kind], best_ratio[kind] = state.theta[kind], np.float64(ratio)
      best_step[kind] = np.int64(step)
  return state._replace(
    step=np.int64(step), best_theta=best_theta, best_ratio=best_ratio, best_step=best_step
  )


def draw_batch(windows: Windows, batch_size: int, seed: int, step: int) -> dict[str, np.ndarray]:
  """One batch for each kind, `[devices, batch_size / devices, SPAN]`; all runs weigh the same."""
  rng = np.random.default_rng([seed, step])
  devices = jax.local_device_count()
  batch = {}
  for kind, weights in windows.weights.items():
    run = rng.integers(weights.shape[0], size=batch_size)
    row = rng.integers(weights.shape[1], size=batch_size)
    batch[kind] = weights[run, row].reshape(devices, batch_size // devices, -1)
  return batch


def window_loss(params: Any, windows: jax.Array) -> jax.Array:
  """Mean absolute error of the residual, windows `[N, SPAN]`, hidden weight last."""
  history, hidden = windows[:, :-1].T, windows[:, -1]
  return jnp.abs(history[-1] + known.residuals(params, history) - hidden).mean()


@functools.lru_cache(maxsize=4)
def train_step(optimizer: optax.GradientTransformation) -> Any:
  """The pmapped train step: ((theta, opt_state), batch) -> the same, loss before the update."""

  def step(state: Any, batch: Mapping[str, jax.Array]) -> Any:
    theta, opt_state = state

    def loss_fn(theta: Any) -> jax.Array:
      return sum(
        (window_loss(theta[kind], batch[kind]) + known.penalty(theta[kind]) for kind in KINDS),
        start=jnp.zeros(()),
      )

    loss, grads = jax.value_and_grad(loss_fn)(theta)
    loss, grads = jax.lax.pmean((loss, grads), AXIS)
    updates, opt_state = optimizer.update(grads, opt_state, theta)
    return (optax.apply_updates(theta, updates), opt_state), loss

  return jax.pmap(step, AXIS, donate_argnums=0)


def _ratios(theta: Any, windows: Windows) -> dict[str, float]:
  errors = retrodiction_errors(windows, theta, rivals=())
  return {kind: float(np.mean(by['known'])) for kind, by in errors.items()}


def retrodiction_errors(
  windows: Windows, theta: Any, rivals: tuple[str, ...] = RIVALS
) -> dict[str, dict[str, np.ndarray]]:
  """Error in predicting the hidden weight, divided by that of copying the newest weight.

  Args:
    windows: of the runs to test on.
    theta: the parameters of KNOWN.
    rivals: other predictors to test. Fits against size use r = 1/2, as a window does not know its
      run's rate.

  Returns:
    kind -> predictor ('known', 'known_history_free' where there are rivals, and the rivals) ->
    mean absolute error over that of copying, float64 `[runs]`.
  """
  names = ('known', 'known_history_free', *rivals) if rivals else ('known',)
  found: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in KINDS}
  stages = [
    {kind: w[..., i] for kind, w in windows.weights.items()} for i in range(known.HISTORY_LENGTH)
  ]
  hidden = {kind: w[..., -1].astype(np.float64) for kind, w in windows.weights.items()}
  copying = {kind: np.abs(stages[-1][kind] - hidden[kind]).mean(axis=1) for kind in KINDS}
  for name in names:
    options = {'theta': theta} if name.startswith('known') else {}
    predicted = predict(stages, predictor=name, kinds=lambda path, leaf: path, **options)
    for kind in KINDS:
      error = np.abs(np.asarray(predicted[kind], np.float64) - hidden[kind]).mean(axis=1)
      found[kind][name] = error / np.maximum(copying[kind], np.finfo(np.float32).tiny)
  return found


def card_text(card: Mapping[str, Any]) -> str:
  """The card of trained weights as Markdown, to lie beside them."""
  meta, made = card['meta_dataset'], card['training']
  runs = made['runs']
  errors = card['test_error']
  lines = [
    '# Weights of KNOWN',
    '',
    f'{card["what"][0].upper()}{card["what"][1:]}.',
    '',
    '## Error on held-out runs',
    '',
    f'{card["test_error_means"][0].upper()}{card["test_error_means"][1:]}.',
    f'Runs were split at random: {len(runs["train"])} for training, {len(runs["validation"])} to '
    f'choose parameters, {len(runs["test"])} for this table alone (runs {_listed(runs["test"])}).',
    '',
    '| predictor | ' + ' | '.join(KINDS) + ' |',
    '|---|' + '---:|' * len(KINDS),
    *(
      f'| {name} | ' + ' | '.join(f'{errors[kind][name]:.3f}' for kind in KINDS) + ' |'
      for name in errors[KINDS[0]]
    ),
    '',
    '## Meta-dataset',
    '',
    *(f'- {" ".join(line.split())}' for line in meta['summary']),
    f'- made by bin/collect.py at commit {meta["environment"]["commit"]}, seed '
    f'{meta["config"]["seed"]}, config:',
    '',
    *_block(meta['config']),
    '',
    '## Training',
    '',
    f'Made by bin/meta_train.py at commit {made["environment"]["commit"]}, seed '
    f'{made["config"]["seed"]}; parameters kept from step '
    + ', '.join(f'{card["step"][kind]} ({kind})' for kind in KINDS)
    + '. Config:',
    '',
    *_block(made['config']),
    '',
  ]
  return '\n'.join(lines)


def _listed(numbers: list[int]) -> str:
  return ', '.join(str(number) for number in numbers)


def _block(config: Mapping[str, Any]) -> list[str]:
  return ['```', *(f'{key} = {value!r}' for key, value in config.items()), '```']


def report(record: RunRecord) -> str:
  """The test table: predictors by kind, error divided by that of copying."""
  errors = record['test_error']
  names = list(errors[KINDS[0]])
  lines = [
    'error / error of copying, mean over test runs',
    f'{"predictor":<20}' + ''.join(f'{k:>8}' for k in KINDS),
  ]
  lines += [f'{name:<20}' + ''.join(f'{errors[k][name]:>8.3f}' for k in KINDS) for name in names]
  return '\n'.join(lines)
