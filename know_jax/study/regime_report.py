"""The page of `know_jax.study.regime`: every arm, and what the bounds fixed before decide."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from know_jax.errors import UserError
from know_jax.io.files import write_atomic
from know_jax.io.journal import read_lines
from know_jax.report import intervals
from know_jax.report.markdown import table
from know_jax.study.regime import ARMS, SOURCE, STAGES, Arm, Config

MATTERS = 0.3
"""Points; see `know_jax.study.regime`."""

NAIVE, RESET, OFFICIAL, RADIAL, TANGENTIAL, MATCHED = (arm.name for arm in ARMS[:6])


class Difference(NamedTuple):
  """Of two arms in points: the mean over sources, paired, its 95 % t-interval, p of the t-test.

  The interval of fewer than two sources is NaN.
  """

  mean: float
  low: float
  high: float
  sources: int
  p: float

  @property
  def matters(self) -> bool:
    """Whether it is at least `MATTERS`, and its interval does not hold zero."""
    return abs(self.mean) >= MATTERS and (self.low > 0 or self.high < 0)

  def __str__(self) -> str:
    return f'{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f})'


def difference(scores: pd.DataFrame, arm: str, other: str) -> Difference:
  """An arm minus another, over the sources that have both; scores as of `scores_of`.

  Raises:
    UserError: no source has both.
  """
  if not {arm, other} <= set(scores) or not len(both := scores[[arm, other]].dropna()):
    raise UserError(f'no source has both {arm!r} and {other!r}; resume the study first.')
  values = (both[arm] - both[other]).to_numpy()
  low, high = intervals.t_interval(values)
  return Difference(values.mean(), low, high, len(values), intervals.paired_t_test(values))


def scores_of(rows: Sequence[Mapping[str, Any]], field: str) -> pd.DataFrame:
  """A field of the rows in per cent: by source, a column for each arm."""
  transfers = pd.DataFrame([row for row in rows if row['arm'] != SOURCE])
  return 100 * transfers.pivot_table(field, 'source', 'arm', 'last')


def verdicts(scores: pd.DataFrame) -> list[str]:
  """A sentence for each bound in `know_jax.study.regime`."""

  def of(arm: str, other: str) -> Difference:
    return difference(scores, arm, other)

  gain, by_reset, after_reset = of(OFFICIAL, NAIVE), of(RESET, NAIVE), of(OFFICIAL, RESET)
  rate, radial, tangential = of(MATCHED, OFFICIAL), of(RADIAL, OFFICIAL), of(TANGENTIAL, RESET)
  reset = by_reset.matters and by_reset.mean > 0 and not after_reset.matters
  as_rate = max(abs(rate.mean), abs(radial.mean)) <= MATTERS and not tangential.matters
  trajectory = (-radial.mean > 0 and radial.matters) or (tangential.mean > 0 and tangential.matters)
  over = min(rate.mean, radial.mean) > MATTERS and not (tangential.matters and tangential.mean > 0)
  is_gain = gain.matters and gain.mean > 0
  return [
    f'Gain: official x8 minus naive is {gain}: {"it matters" if is_gain else "no gain"}.',
    f'Reset: {_is(reset)}. Naive reset minus naive kept is {by_reset}, official minus naive reset '
    f'{after_reset}.',
    f'Rate: {_is(as_rate)}. Minus official x8, naive reset at the matched rate is {rate}, the '
    f'radial part alone {radial}; the tangential part alone minus naive reset is {tangential}.'
    + (
      ' The bound asked for equality within 0.3 points: both do better than official x8, so the '
      'rate explains more than the whole gain, and the rest of the prediction takes from it.'
      if over
      else ''
    ),
    f'Trajectory: {_is(trajectory)}. Official minus its radial part is {of(OFFICIAL, RADIAL)}.',
  ]


def _is(found: bool) -> str:
  return 'yes' if found else 'no'


def best_rate(rows: Sequence[Mapping[str, Any]], start: str, batch_norm: str) -> tuple[str, bool]:
  """The arm whose rate is best by validation images, and whether it is at the edge of its grid.

  Rates are compared by their mean gain over rate x1 from the same sources.
  """
  validation = scores_of(rows, 'validation')
  base = Arm(start, 1.0, batch_norm).name
  grid = sorted(
    (arm for arm in ARMS if (arm.start, arm.batch_norm) == (start, batch_norm)
     and not isinstance(arm.times, str) and arm.name in validation),
    key=lambda arm: arm.times,
  )  # fmt: skip
  gains = [difference(validation, arm.name, base).mean for arm in grid]
  place = gains.index(max(gains))
  return grid[place].name, place in (0, len(grid) - 1)


def write(workdir: Path, path: str | Path) -> Path:
  """Writes the page of `rows.jsonl` in a workdir.

  Raises:
    UserError: there are no rows, or arms that the bounds need are missing.
  """
  rows = read_lines(workdir / 'rows.jsonl')
  if not any(row['arm'] != SOURCE for row in rows):
    raise UserError(f'{workdir} has no rows of transfers yet; run the study first.')
  write_atomic(Path(path), page(rows).encode())
  return Path(path)


def page(rows: Sequence[Mapping[str, Any]]) -> str:
  """The page as Markdown."""
  scores, training = scores_of(rows, 'accuracy'), scores_of(rows, 'training')
  names = [arm.name for arm in ARMS if arm.name in scores]
  to_naive = [difference(scores, name, NAIVE) for name in names]
  adjusted = intervals.holm(
    [math.nan if n == NAIVE else gain.p for n, gain in zip(names, to_naive, strict=True)]
  )
  shapes = {row['arm']: row for row in rows}
  body = [
    [
      name, f'{scores[name].mean():.2f}', f'{training[name].mean():.1f}',
      *(('', '') if name == NAIVE else (str(gain), f'{p:.3f}')),
      f'{shapes[name]["lr"]:.2g}', f'{shapes[name]["norm"]:.2f}', str(gain.sources),
    ]
    for name, gain, p in zip(names, to_naive, adjusted, strict=True)
  ]  # fmt: skip
  head = ['arm', 'test, %', 'training, %', 'minus naive', 'p (Holm)', 'rate', 'norm', 'sources']
  tuned = [best_rate(rows, 'naive', 'keep'), best_rate(rows, 'official x8', 'reset')]
  edges = [name for name, at_edge in tuned if at_edge]
  versus = difference(scores, tuned[1][0], tuned[0][0])
  sources = [row for row in rows if row['arm'] == SOURCE]
  stages = zip(*(row['held_out'] for row in sources), strict=True)
  held = ', '.join(f'{100 * statistics.mean(stage):.1f}' for stage in stages)
  chosen = (
    f'At equal tuning: by validation images naive is best as "{tuned[0][0]}", official x8 as '
    f'"{tuned[1][0]}"; official minus naive is then {versus}.'
  )
  if edges:
    chosen += f' At the edge of its grid: {", ".join(edges)}.'
  # The first study's rows came before configs were noted; it had the defaults, and data of its own.
  config = Config(**sources[0].get('config', {}))
  lossy = '' if 'config' in sources[0] else ' CIFAR-100 is a lossy copy (PSNR 38.5 dB).'
  kept = 'kept' if config.keep_optimizer else 're-initialised'
  return '\n\n'.join(
    [
      f'# Rate, reset or trajectory: {config.model} from {config.source_dataset} to '
      f'{config.target_dataset}',
      "The authors' three networks and their recipe, on "
      f'{config.source_examples:,} images of the source and {config.labels:,} of the target, with '
      f'all their labels, {STAGES} stages of {config.source_epochs} epochs, {config.warmup_epochs} '
      f'epochs of head and BatchNorm and {config.epochs} of everything (the authors: 50,000 images '
      f'and 200, 10 and 100 epochs), batch {config.batch_size}, {config.optimizer} with epsilon '
      f'{config.epsilon:g}, {kept} before all layers are fine-tuned, {config.conv_init} '
      f'convolutions, computed in {config.dtype} on one {sources[0]["device"]}. BatchNorm is '
      "Flax's (epsilon 1e-5, momentum 0.9; Keras: 1e-3, 0.99). It is no reproduction of a number "
      f'of the paper.{lossy} '
      f'{len(rows) - len(sources)} transfers from {len(sources)} sources, one a source and arm; '
      'arms with fewer sources came last, when time was short.',
      'The bounds stand in `know_jax/study/regime.py` and were committed before the first run. '
      'What they decide:',
      '\n'.join(f'- {sentence}' for sentence in (*verdicts(scores), chosen)),
      table(head, body),
      'Test accuracy after transfer, accuracy on the training images as they are, and the paired '
      'difference in points with its 95 % t-interval over sources; p of the paired t-test, after '
      'Holm over all these arms. Norm: of the convolution kernels at the start, over that of the '
      'newest weights. Scaled biases are a second run of official x8 in effect, because BatchNorm '
      'cancels biases: they show the noise of one training. Accuracy of the stages on held-out '
      f'source images, all data first: {held} %.',
      'Made by `python bin/regime.py --workdir=docs/results/resnet18 '
      '--report=docs/results/resnet18.md` from `docs/results/resnet18/rows.jsonl`.\n',
    ]
  )
