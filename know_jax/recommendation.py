"""Which start to train from: starts and learning rates, tried by successive halving.

Most of what a predicted start gains over the newest weights, a better learning rate gains too. So
every start is judged against *tuned* naive transfer, and "none" is a frequent answer.
"""

import dataclasses
import hashlib
import html
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from know_jax import trees
from know_jax.errors import PredictionWarning, UserError
from know_jax.io.journal import Journal
from know_jax.kinds import Rules
from know_jax.nowcast import api
from know_jax.predictors.registry import resolve
from know_jax.report.intervals import t_interval

BUDGETS = (1 / 9, 1 / 3, 1.0)
"""The part of the whole training that each round of the search gives; a third goes on."""
RATES = (0.5, 1.0, 2.0, 4.0)
"""Multiples of the learning rate that are tried."""
_MOST_WIDER = 4  # How often the grid of rates grows where its edge is best.


@dataclasses.dataclass(frozen=True)
class Start:
  """A start for training, as `predict` makes it.

  Attributes:
    predictor: a name, 'package.module:object', or a predictor of your own.
    steps: how far.
    options: pairs of the predictor's own options.
  """

  predictor: Any
  steps: int = 1
  options: tuple[tuple[str, Any], ...] = ()

  def __str__(self) -> str:
    name = self.predictor if isinstance(self.predictor, str) else type(self.predictor).__name__
    settings = [f'steps={self.steps}', *(f'{key}={value}' for key, value in self.options)]
    return f'{name} ({", ".join(settings)})' if self.steps else 'naive'


NAIVE = Start('persistence', 0)
STARTS = (
  *(Start(name, steps) for name in ('known', 'shrink') for steps in (1, 3)),
  Start('shrink', 1, (('c', 0.35),)),
  Start('shrink', 1, (('c', 0.5),)),
  Start('known_leaf'),
  Start('log_fit'),
  Start('task_vector', 1, (('lam', 0.3),)),
  *(Start('average', steps) for steps in (1, 2, 4)),
)
"""What is tried where nothing else is asked for. A start that needs a longer history is named."""


@dataclasses.dataclass(frozen=True)
class Recommendation:
  """The start to use, and why.

  Attributes:
    start: what to train from; `NAIVE` where no start beats tuned naive for sure.
    rate: the multiple of the learning rate to use with it.
    gain: what `start` scores above tuned naive, on seeds that the search did not use; 0 for naive.
    interval: of that gain, by Student's t over these seeds.
    best: the start that came out of the search first, naive aside, and its rate, gain and interval,
      be it recommended or not.
    naive_rate: the rate at which naive is best.
    naive_score: its mean score there.
    trainings: how many trainings were scored, and what they cost, in whole trainings.
    left_out: a line for each start that could not be tried.
  """

  start: Start
  rate: float
  gain: float
  interval: tuple[float, float]
  best: tuple[Start, float, float, tuple[float, float]]
  naive_rate: float
  naive_score: float
  trainings: tuple[int, float]
  left_out: tuple[str, ...] = ()

  def __str__(self) -> str:
    start, rate, gain, (low, high) = self.best
    words = f'{start} at {rate:g} times the rate: {gain:+.4f} ({low:+.4f} to {high:+.4f}, 95 %)'
    if self.start == NAIVE:
      answer = f'None: train from the newest weights at {self.rate:g} times the rate.'
      reason = f'The best start, {words}, is not surely better than that.'
    else:
      answer = f'{start}, trained at {rate:g} times the rate.'
      reason = f'Against the newest weights at their best rate, {self.naive_rate:g} times: {words}.'
    count, cost = self.trainings
    cost_line = f'{count} trainings were scored, which cost as much as {cost:.1f} whole ones.'
    return '\n'.join([answer, reason, cost_line, *self.left_out])

  __repr__ = __str__

  def _repr_html_(self) -> str:
    answer, *others = map(html.escape, str(self).splitlines())
    return f'<p><b>{answer}</b></p><p>{"<br>".join(others)}</p>'


def recommend(
  history: Any,
  score: Callable[[Any, float, float, int], float],
  *,
  starts: Sequence[Start] = STARTS,
  rates: Sequence[float] = RATES,
  repeats: int = 5,
  rate: float = 0.5,
  kinds: Rules | None = None,
  workdir: str | Path | None = None,
  on_score: Callable[[Start, float], None] = lambda start, score: None,
) -> Recommendation:
  """Tries starts for a training, and says which to use, with its gain over tuned naive.

  Every start, at every learning rate, is trained for a ninth of the whole budget; the best third
  for a third of it, the best third of these in full (successive halving: Jamieson and Talwalkar,
  AISTATS 2016), all with seed 0. The newest weights have a search of their own. Where the best rate
  is at the edge of the grid, the grid grows. Then the best start and naive, each at its best rate,
  are trained in full with the seeds 1 .. `repeats`, which decide.

  Args:
    history: the weights, as `predict` takes them.
    score: `score(params, rate, budget, seed) -> number`: trains from `params` at `rate` times the
      usual learning rate for the part `budget` of the usual steps (with a schedule of its own), and
      gives the score on validation data, larger is better; NaN for a training that diverged. The
      seed must decide all that is random, the split into training and validation data too.
    starts: what to try.
    rates: the multiples of the learning rate to try.
    repeats: how many seeds decide; at least 3.
    rate: the sampling rate r of the history.
    kinds: as for `predict`.
    workdir: where every score is kept; the same call resumes after a kill. None: nowhere.
    on_score: called with each start that was scored and its score; `trainings` says how often.

  Returns:
    A `Recommendation`.

  Raises:
    UserError: before any training, if an argument is not as described, or no start can be tried;
      after it, if naive diverged at every rate.
  """
  if repeats < 3:
    raise UserError(f'repeats is {repeats}; expected at least 3, for an interval.')
  if len(set(rates)) != len(rates) or not rates or not all(0 < r < math.inf for r in rates):
    raise UserError(f'rates are {tuple(rates)}; expected different numbers above 0.')
  for start in starts:
    resolve(start.predictor, dict(start.options))
  weights: dict[Start, Any] = {}
  left_out = []
  for start in dict.fromkeys([NAIVE, *starts]):
    try:
      with warnings.catch_warnings():
        # What a start is worth is about to be measured.
        warnings.simplefilter('ignore', PredictionWarning)
        weights[start] = api.predict(
          history, start.steps, predictor=start.predictor, rate=rate, kinds=kinds,
          **dict(start.options),
        )  # fmt: skip
    except UserError as error:
      if start == NAIVE:
        raise
      left_out.append(f'Not tried: {start}: {error}')
  rivals = [start for start in weights if start != NAIVE]
  if not rivals:
    raise UserError('no start can be tried. ' + ' '.join(left_out))
  trials = _Trials(score, weights, workdir, on_score)
  _, naive_rate = _search([NAIVE], rates, trials)
  best, best_rate = _search(rivals, rates, trials)
  rows = np.array(
    [
      [trials(start, multiple, 1.0, seed) for seed in range(1, repeats + 1)]
      for start, multiple in ((best, best_rate), (NAIVE, naive_rate))
    ]
  )
  if not np.isfinite(rows[1]).all():
    raise UserError('training from the newest weights diverged; try lower rates.')
  gains = rows[0] - rows[1]
  gain, interval = -math.inf, (-math.inf, math.inf)
  if np.isfinite(gains).all():
    gain, interval = float(gains.mean()), t_interval(gains)
  about = (
    (best, best_rate, gain, interval), naive_rate, float(rows[1].mean()),
    (trials.count, trials.cost), tuple(left_out),
  )  # fmt: skip
  if interval[0] > 0:
    return Recommendation(best, best_rate, gain, interval, *about)
  return Recommendation(NAIVE, naive_rate, 0.0, (0.0, 0.0), *about)


class _Trials:
  """Scores by what was trained: each is asked for once, and kept."""

  def __init__(
    self,
    score: Callable[[Any, float, float, int], float],
    weights: Mapping[Start, Any],
    workdir: str | Path | None,
    on_score: Callable[[Start, float], None],
  ):
    self.count, self.cost = 0, 0.0
    self._score, self._weights, self._on_score = score, weights, on_score
    self._kept: dict[str, float] = {}
    self._journal, self._digests = None, dict[Start, str]()
    if workdir is not None:
      folder = Path(workdir).expanduser()
      folder.mkdir(parents=True, exist_ok=True)
      self._journal = Journal(folder / 'trials.jsonl')
      self._digests = {start: _digest(tree) for start, tree in weights.items()}

  def __call__(self, start: Start, rate: float, budget: float, seed: int) -> float:
    """The score, -infinity where the training diverged."""
    about = {'start': str(start), 'rate': rate, 'budget': budget, 'seed': seed}
    key = json.dumps({**about, 'weights': self._digests.get(start)})
    if key not in self._kept:
      entry = None if self._journal is None else self._journal.get(key)
      if entry is None:
        value = float(self._score(self._weights[start], rate, budget, seed))
        if self._journal is not None:
          self._journal.add(key, **about, score=value)
      else:
        value = entry['score']
      self._kept[key] = value if math.isfinite(value) else -math.inf
      self.count, self.cost = self.count + 1, self.cost + budget
      self._on_score(start, value)
    return self._kept[key]


def _digest(tree: Any) -> str:
  hashed = hashlib.sha256()
  for path, leaf in trees.named_leaves(tree).items():
    hashed.update(path.encode())
    if hasattr(leaf, 'dtype') and not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      hashed.update(np.ascontiguousarray(leaf).tobytes())
  return hashed.hexdigest()[:16]


def trainings(starts: int, rates: int, repeats: int) -> int:
  """How many trainings `recommend` scores, where no grid of rates has to grow."""
  total = 2 * repeats
  for size in (rates, starts * rates):
    for _ in BUDGETS:
      total, size = total + size, -(-size // 3)
  return total


def _search(
  starts: Sequence[Start], rates: Sequence[float], trials: _Trials
) -> tuple[Start, float]:
  """The best start and its rate, by seed 0."""
  tried = [(start, rate) for start in starts for rate in rates]
  scores: dict[tuple[Start, float], float] = {}
  for budget in BUDGETS:
    scores = {pair: trials(*pair, budget, 0) for pair in tried}
    tried = sorted(tried, key=lambda pair: -scores[pair])[: -(-len(tried) // 3)]
  best = max(scores, key=lambda pair: scores[pair])
  grid = sorted(rates)
  for _ in range(_MOST_WIDER if len(grid) > 1 else 0):
    if best[1] == grid[-1]:
      grid.append(grid[-1] ** 2 / grid[-2])
      wider = (best[0], grid[-1])
    elif best[1] == grid[0]:
      grid.insert(0, grid[0] ** 2 / grid[1])
      wider = (best[0], grid[0])
    else:
      break
    if trials(*wider, 1.0, 0) <= trials(*best, 1.0, 0):
      break
    best = wider
  return best
