"""Independent references in float64 NumPy: every predictor's formula, written out the slow way.

Each takes the history of one leaf `[T, ...]`, oldest first, and the step n. Nothing of know_jax is
used here. Where the package has one closed form, this has a solver (`polyfit`, `lstsq`, `svd`) or a
loop over coordinates.
"""

import math

import numpy as np

MAX_STEPS = {
  'task_vector': lambda length: length - 1,
  'magmax': lambda length: length - 1,
  'consensus_ta': lambda length: length - 1,
  'tsv': lambda length: length - 1,
  'average': lambda length: length - 1,
}
"""The predictors that look n stages back; all others can do any step."""

LEAST_LENGTH = {'linear_fit': 2, 'log_fit': 2, 'exp_fit': 2}

SHRINK = {'conv': 0.19, 'fc': 0.06, 'bias': 0.0}


def random_theta(history_length=5, seed=0):
  """Kind -> parameters of KNOWN, with biases other than zero, so that a bias left out shows."""
  rng = np.random.default_rng(seed)

  def dense(fan_in, features):
    return {
      'kernel': rng.normal(0, fan_in**-0.5, (fan_in, features)).astype(np.float32),
      'bias': rng.normal(0, 0.1, features).astype(np.float32),
    }

  def stream(size):
    layers = {'embed': dense(size, 64), 'squeeze': dense(64, 8), 'project': dense(64, 32)}
    return layers | {name: dense(8, 64) for name in ('offset', 'amplitude', 'gate')}

  return {
    kind: {
      'weights': stream(history_length),
      'differences': stream(history_length - 1),
      'residual': dense(64, 1),
    }
    for kind in ('conv', 'fc', 'bias')
  }


def tau(history, i):
  return history[-1] - history[-1 - i]


def persistence(history, n):
  del n
  return history[-1]


def linear_fit(history, n, *, rate=0.5, regressor='size'):
  stages = [len(history) - 1 - t for t in range(len(history))]  # i of Theta^i, oldest first
  if regressor == 'size':
    x, at = [rate**i for i in stages], rate ** (-n)
  else:
    x, at = [-float(i) for i in stages], float(n)
  slope, intercept = np.polyfit(x, history.reshape(len(history), -1), 1)
  return (intercept + slope * at).reshape(history.shape[1:])


def log_fit(history, n, *, rate=0.5):
  shares = np.array([rate ** (len(history) - 1 - t) for t in range(len(history))])
  design = np.stack([np.ones(len(shares)), np.log(shares)], axis=1)
  flat = history.reshape(len(history), -1)
  (a, b), *_ = np.linalg.lstsq(design, flat, rcond=None)
  return (a + b * math.log(rate ** (-n))).reshape(history.shape[1:])


def exp_fit(history, n):
  found = np.zeros(history.shape[1:])
  index = [t - (len(history) - 1) for t in range(len(history))]
  for at in np.ndindex(found.shape):
    values = history[(slice(None), *at)]
    logs = [math.log(max(abs(value), 1e-12)) for value in values]
    slope, intercept = np.polyfit(index, logs, 1)
    found[at] = np.sign(values[-1]) * math.exp(intercept + slope * n)
  return found


def task_vector(history, n, *, lam=1.0, variant='tau_n'):
  if variant == 'two_point':
    return history[-1] + lam * n * (history[-1] - history[-2])
  return history[-1] + lam * tau(history, n)


def magmax(history, n):
  found = np.array(history[-1])
  for at in np.ndindex(found.shape):
    best = 0.0
    for i in range(1, n + 1):
      move = tau(history, i)[at]
      if abs(move) >= abs(best):
        best = move
    found[at] += best
  return found


def consensus_ta(history, n):
  if n < 3:
    return history[-1] + tau(history, n)
  found = np.array(history[-1])
  for at in np.ndindex(found.shape):
    deltas = [history[(-i, *at)] - history[(-i - 1, *at)] for i in range(1, n + 1)]
    votes = 0
    for delta in deltas:
      votes += abs(delta) > 0.4 * abs(sum(deltas) - delta)
    if votes >= 2:
      found[at] += tau(history, n)[at]
  return found


def consensus_margin(history, n):
  """How far each coordinate is from a tie in any of its masks, as a share of its movement."""
  deltas = np.stack([history[-i] - history[-i - 1] for i in range(1, n + 1)])
  margins = np.abs(np.abs(deltas) - 0.4 * np.abs(deltas.sum(0) - deltas))
  return margins.min(0) / np.abs(deltas).max(0)


def tsv(history, n, *, matrix):
  """`matrix`: the shape as which the leaf is read; None where the whole tau_n is taken."""
  move = tau(history, n)
  if matrix is None:
    return history[-1] + move
  u, s, vt = np.linalg.svd(move.reshape(matrix))
  low = np.zeros(matrix)
  for j in range(max(1, math.floor(0.1 * min(matrix)))):
    low += s[j] * np.outer(u[:, j], vt[j])
  return history[-1] + low.reshape(move.shape)


def shrink(history, n, *, c):
  found = history[-1]
  for _ in range(n):
    found = found - c * found
  return found


def average(history, n):
  return sum(history[-1 - i] for i in range(n + 1)) / (n + 1)


def _dense(layer, x):
  return x @ layer['kernel'] + layer['bias']


def _stream(p, x):
  h = _dense(p['embed'], x)
  z = np.maximum(_dense(p['squeeze'], h), 0)
  h = _dense(p['offset'], z) + _dense(p['amplitude'], z) * np.exp(_dense(p['gate'], z) * h)
  h = _dense(p['project'], h)
  return np.where(h > 0, h, 0.3 * h)


def known_residual(params, w):
  """`w`: windows `[..., S]`, oldest first; the residual theta^-1 - theta^0, `[...]`."""
  d = w[..., 1:] - w[..., :-1]
  joined = np.concatenate([_stream(params['weights'], w), _stream(params['differences'], d)], -1)
  return np.tanh(_dense(params['residual'], joined))[..., 0]


def known(history, n, *, params):
  length = params['weights']['embed']['kernel'].shape[0]
  window = np.moveaxis(history[len(history) - length :], 0, -1)
  for _ in range(n):
    nearest = window[..., -1] + known_residual(params, window)
    window = np.concatenate([window[..., 1:], nearest[..., None]], -1)
  return window[..., -1]


def known_scaled(history, n, *, params, reach=2.0):
  """KNOWN in units of the leaf, of which `history` `[S, ...]` is all."""
  length = params['weights']['embed']['kernel'].shape[0]
  window = np.moveaxis(history[len(history) - length :], 0, -1)
  movement = math.sqrt((np.diff(window) ** 2).mean())
  size = math.sqrt((window[..., -1] ** 2).mean())
  if movement == 0:
    return window[..., -1]
  for _ in range(n):
    newest = window[..., -1:]
    x = np.clip((window - newest) / movement, -params['bound'], params['bound'])
    x = x + (newest / size if size else newest)
    nearest = newest[..., 0] + reach * movement * known_residual(params, x)
    window = np.concatenate([window[..., 1:], nearest[..., None]], -1)
  return window[..., -1]


def known_history_free(history, n, *, params):
  length = params['weights']['embed']['kernel'].shape[0]
  return known(np.stack([history[-1]] * length), n, params=params)


def random_conditioned_theta(history_length=5, seed=0):
  """Kind -> parameters of KNOWN conditioned on the leaf, none of them zero."""
  rng = np.random.default_rng(seed)
  d = history_length - 1
  size = d + d * (d - 1) // 2 + d + 2

  def dense(fan_in, features, scale=1.0):
    return {
      'kernel': (scale * rng.normal(0, fan_in**-0.5, (fan_in, features))).astype(np.float32),
      'bias': (scale * rng.normal(0, 0.1, features)).astype(np.float32),
    }

  return {
    kind: {
      'mean': rng.normal(0, 0.5, size).astype(np.float32),
      'scale': rng.uniform(0.5, 2, size).astype(np.float32),
      'hidden': dense(size, 32),
      'hidden_2': dense(32, 32),
      'step': dense(32, history_length, 0.3),
      'decay': np.float32(rng.uniform(0.01, 0.1)),
    }
    for kind in ('conv', 'fc', 'bias')
  }


def leaf_context(window, rate):
  """What KNOWN conditioned on the leaf reads of a window `[S, ...]`, by plain loops."""
  flat = window.reshape(len(window), -1)
  moves, newest = np.diff(flat, axis=0), flat[-1]
  squares = (moves**2).mean(axis=1)

  def log_ratio(x, y):
    return math.log(min(max(x / y, math.exp(-12)), math.exp(12))) if y > 0 else 0.0

  def cosine(a, b):
    norms = math.sqrt((a @ a) * (b @ b))
    return a @ b / norms if norms > 0 else 0.0

  found = [log_ratio(square, squares.mean()) for square in squares]
  for i in range(len(moves)):
    found += [cosine(moves[i], moves[j]) for j in range(i + 1, len(moves))]
  found += [cosine(move, newest) for move in moves]
  return np.array([*found, log_ratio(squares.mean(), (newest**2).mean()), math.log(rate)])


def known_leaf(history, n, *, params, rate):
  """KNOWN conditioned on the leaf: the window itself is slid, and looked at anew at every step."""
  length = len(params['step']['bias'])
  window = history[len(history) - length :]
  for _ in range(n):
    h = np.clip((leaf_context(window, rate) - params['mean']) / params['scale'], -3, 3)
    for layer in ('hidden', 'hidden_2'):
      h = np.tanh(_dense(params[layer], h))
    *along, towards = _dense(params['step'], h)
    moves, newest = np.diff(window, axis=0), window[-1]
    movement, size = (moves**2).mean(), (newest**2).mean()
    step = -params['decay'] * newest
    if movement > 0:
      step = step + np.tensordot(along, moves, 1)
      if size > 0:
        step = step + towards * math.sqrt(movement / size) * newest
    window = np.concatenate([window[1:], (newest + step)[None]])
  return window[-1]


def known_leaf_history_free(history, n, *, params, rate):
  copies = np.stack([history[-1]] * len(params['step']['bias']))
  return known_leaf(copies, n, params=params, rate=rate)


def least_squares(history, n, *, coefficients):
  window = history[len(history) - len(coefficients) :]
  for _ in range(n):
    *along, towards = coefficients
    step = np.tensordot(along, np.diff(window, axis=0), 1) + towards * window[-1]
    window = np.concatenate([window[1:], (window[-1] + step)[None]])
  return window[-1]
