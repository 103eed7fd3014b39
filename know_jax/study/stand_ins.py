"""The page of a stand-in for one of the paper's tables 2 to 5, from the rows of its studies."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from know_jax.errors import UserError, os_errors
from know_jax.io.files import write_atomic
from know_jax.report.intervals import holm, paired_t_test, t_interval
from know_jax.report.markdown import table
from know_jax.study.results import COLUMNS, RESULTS, read_table
from know_jax.study.tables import published

TABLES = {
  2: ('ImageNet to five data sets, PVTv2', 'accuracy'),
  3: ('PACS, each domain left out in turn, PVTv2', 'accuracy'),
  4: ('captions of Flickr8k, PVTv2 and a transformer decoder', 'masked accuracy'),
  5: ('Pascal VOC to Cityscapes, DeepLabV3+', 'mIoU'),
}
"""Number -> what the paper's table is of, and its score."""

ARMS: tuple[Any, ...] = (
  'scratch',
  'persistence',
  *({'predictor': 'persistence', 'lr_scale': scale} for scale in (0.3, 3.0, 10.0)),
  'known',
  {'predictor': 'known', 'part': 'norms', 'name': 'known norms'},
  'known_leaf',
  {'predictor': 'known_leaf', 'part': 'norms', 'name': 'known_leaf norms'},
  'task_vector',
  'log_fit',
  'tsv',
  {'predictor': 'magmax', 'steps': (2,)},
)
"""What the tables compare, and their controls; 'norms': the newest weights at their norms."""

NAIVE, TUNED = 'naive', 'naive at its best rate'
_OFFICIAL = "the authors' KNOWN"
_NORMS = 'naive at the norms of'


def read_rows(workdir: str | Path) -> pd.DataFrame:
  """The rows of a study, or of one for each domain, below a folder; `leg` tells which.

  Raises:
    UserError: there are none, or they cannot be read.
  """
  workdir = Path(workdir).expanduser()
  files = sorted([*workdir.glob(RESULTS), *workdir.glob(f'*/{RESULTS}')])
  if not files:
    raise UserError(f'{workdir}: found no {RESULTS}, there or in a folder of it; run bin/study.py.')
  parts = [read_table(file, COLUMNS).assign(leg=file.parent.name) for file in files]
  return pd.concat(parts, ignore_index=True)


def scores(rows: pd.DataFrame, column: str = 'accuracy') -> pd.DataFrame:
  """A column of the arms by source seed, in per cent: a line for each (name, step).

  The mean over a seed's transfers, then over legs. Seeds that lack a leg of an arm are NaN there.
  Naive transfer at its best rate takes, of each leg and source seed, the rate whose score on
  validation examples is largest: no test example plays a part.
  """
  is_naive = rows.predictor.eq('persistence')
  names = [_name(*row) for row in zip(rows.arm, rows.lr_scale, is_naive, strict=True)]
  rows, keys = rows.assign(arm=names), ['leg', 'source_seed']
  by_rate = _naive_by_rate(rows, column).reset_index()
  parts = [rows[[*keys, 'arm', 'step', 'transfer_seed', column]]]
  if by_rate.validation.notna().all() and by_rate.lr_scale.nunique() > 1:
    best = by_rate.loc[by_rate.groupby(keys).validation.idxmax()]
    parts.append(best.assign(arm=TUNED, step=0, transfer_seed=0)[parts[0].columns])
  whole = pd.concat(parts)
  means = whole.groupby(['arm', 'step', 'leg', 'source_seed'], sort=False)[column].mean()
  by_leg = means.unstack('leg')
  return 100 * by_leg.mean(axis=1, skipna=False).unstack('source_seed')


def _name(name: str, rate: float, is_naive: bool) -> str:
  if is_naive:
    return NAIVE if rate == 1 else f'naive, rate x{rate:g}'
  if name.endswith(' norms'):
    return f'{_NORMS} {_OFFICIAL if "official" in name else name.split()[0]}'
  return _OFFICIAL if name == 'known_official' else name


def write(number: int, workdir: str | Path, path: str | Path) -> str:
  """Writes the page, and beside it nothing: the rows are the workdir's.

  Args:
    number: of the paper's table, 2 to 5.
    workdir: of the study.
    path: the Markdown file.

  Returns:
    The sentence that sums it up.

  Raises:
    UserError: there is no such table, there are no rows, or the file cannot be written.
  """
  if number not in TABLES:
    raise UserError(
      f'table {number} has no stand-in; expected one of {", ".join(map(str, TABLES))}.'
    )
  rows = read_rows(workdir)
  what, score = TABLES[number]
  result = scores(rows)
  naive, tuned = result.loc[(NAIVE, 0)], None
  if (TUNED, 0) in result.index:
    tuned = result.loc[(TUNED, 0)]
  body, gains = [], {}
  for (name, step), values in result.iterrows():
    multiple = rows[rows.step.eq(step)].multiple.max() if step else 1.0
    start = f'{name}{f" x{multiple:.3g}" if step else ""}'
    cells = [start, str(int(values.notna().sum()))]
    cells.append(f'{values.mean():.2f}')
    for rival in (naive, tuned):
      if rival is None or values is rival or name == (NAIVE if rival is naive else TUNED):
        cells.append('')
        continue
      differences = (values - rival).dropna()
      low, high = t_interval(differences)
      cells.append(f'{differences.mean():+.2f} [{low:+.2f}, {high:+.2f}]')
      if step and not name.startswith(_NORMS):  # Those are controls.
        gains[start, 'tuned' if rival is tuned else 'naive'] = differences
    body.append([*cells, *([_published(number, name, multiple)] if number != 4 else [])])
  first = rows.iloc[0]
  sentence = verdict(gains, len(naive.dropna()), tuned is not None, score)
  if ('scratch', 0) in result.index and len(naive.dropna()) > 1:
    sentence += ' ' + _worth((naive - result.loc[('scratch', 0)]).dropna(), score)
  header = ['start', 'seeds', f'{score}, %', 'minus naive', f'minus {TUNED}']
  beside = ''
  if number != 4:
    header.append(f"paper's, %{_data_sets(number)}")
    beside = (
      ' Those are retyped in the last column beside the methods that both have, and as a whole '
      "below: KNOWN's too, which stands beside no row, as `known` here has other weights."
    )
  parts = [
    f"# A stand-in for the paper's table {number}",
    f'**{sentence}**',
    f'The paper (Jang, Kim and Kim, CVPR 2026): {what}, on a GPU. This: {first.source} to '
    f'{first.target}, `{first.model}`, shrunk until two cores could run it; its numbers reproduce '
    f"none of the paper's.{beside} The config says what was cut.",
    table(header, body),
    f'Differences are paired by source seed, in points, with 95 % intervals of Student over source '
    f'seeds. "{TUNED}" takes of each source seed the rate that is best on validation examples of '
    'the target; every other start has the one rate of the config. "naive at the norms of" a '
    'predictor is the newest weight with every leaf scaled to the norm that it has in the '
    'prediction: what of a gain is no more than shrinking or growing.',
    *_at_the_edge(rows),
    *_other_metric(rows),
    *_paper(number),
    *_picture(Path(path)),
    f'Made by `python bin/study.py --workdir={workdir} --table={number} --report={path}` from '
    f'`{RESULTS}` there.',
  ]
  with os_errors(f'cannot write {path}'):
    write_atomic(Path(path).expanduser(), ('\n\n'.join(parts) + '\n').encode())
  return sentence


def verdict(gains: dict[Any, pd.Series], seeds: int, tuned: bool, score: str) -> str:
  """What the differences show, corrected for their number by Holm's method."""
  rival = 'tuned' if tuned else 'naive'
  chosen = {start: x for (start, of), x in gains.items() if of == rival}
  against = TUNED if tuned else 'naive transfer'
  if not chosen:
    return f'{seeds} source seed{"" if seeds == 1 else "s"}; no predicted start was scored.'
  if seeds < 2:
    return (
      f'{seeds} source seed{"" if seeds == 1 else "s"} so far: nothing can be said yet of any '
      f'start against {against}.'
    )
  adjusted = holm([paired_t_test(x) for x in chosen.values()])
  better, worse = (
    [
      f'{start} ({x.mean():+.2f})'
      for (start, x), p in zip(chosen.items(), adjusted, strict=True)
      if p < 0.05 and sign * x.mean() > 0
    ]
    for sign in (1, -1)
  )
  best = max(chosen, key=lambda start: chosen[start].mean())
  over = f'Over {seeds} source seeds, after Holm over {len(chosen)} predicted starts,'
  if better:
    told = f'{over} these beat {against} in {score}: {", ".join(better)}'
  else:
    told = (
      f'{over} none beats {against} by more than chance (the best, {best}, by '
      f'{chosen[best].mean():+.2f} points of {score})'
    )
  if len(worse) == len(chosen):
    return f'{told}; all lose, by more than chance.'
  return told + (f'; these lose: {", ".join(worse)}.' if worse else '.')


def _worth(gains: pd.Series, score: str) -> str:
  low, high = t_interval(gains)
  return (
    f'Pre-training itself is worth {gains.mean():+.2f} [{low:+.2f}, {high:+.2f}] points of {score} '
    f'over a network from scratch at the same rate{"" if low > 0 else ", no more than chance"}.'
  )


_METHODS = {
  NAIVE: 'naive_transfer',
  _OFFICIAL: 'known',
  'log_fit': 'log_fit',
  'task_vector': 'task_vector',
  'tsv': 'tsv',
  'magmax': 'magmax',
}


def _published(number: int, name: str, multiple: float) -> str:
  """The paper's own figures of a start, in the order of `_data_sets`."""
  if name not in _METHODS:
    return ''
  frame = published(number)
  row = frame[frame.method.eq(_METHODS[name]) & frame.times.astype(float).eq(round(multiple))]
  return ' / '.join(row.iloc[0, 2:].iloc[::2]) if len(row) else ''


def _data_sets(number: int) -> str:
  return f' ({" / ".join(str(name) for name in published(number).columns[2::2])})'


def _paper(number: int) -> list[str]:
  if number == 4:
    return [
      "The paper's table 4: KNOWN 39.38 ± 0.15 (x3) and 39.25 ± 0.17 (x9) masked accuracy, about "
      '2.2 points over naive transfer.'
    ]
  frame = published(number)
  # pandas numbers columns of one name: sd, sd.1, ...
  header = [str(name).partition('.')[0] for name in frame.columns]
  return [f"## The paper's table {number}", table(header, frame.to_numpy().tolist())]


def _picture(page: Path) -> list[str]:
  """What `--examples` drew, where that lies beside the page under its name."""
  picture = page.expanduser().with_suffix('.png')
  if not picture.exists():
    return []
  return [
    f'![Test images and what naive and predicted starts make of them]({picture.name})',
    'Test images evenly spread over the test set, none picked for what came out, after '
    "transfers of one source seed, the first. Drawn by `--examples` as the config's header says.",
  ]


def _at_the_edge(rows: pd.DataFrame) -> list[str]:
  """Whether rates outside the grid could have been better still for naive transfer."""
  by_rate = _naive_by_rate(rows, 'validation').validation
  if by_rate.isna().any() or rows.lr_scale.nunique() < 2:
    return []
  best = by_rate.groupby(['leg', 'source_seed']).idxmax().map(lambda place: place[-1])
  edges = int(best.isin([rows.lr_scale.min(), rows.lr_scale.max()]).sum())
  if not edges:
    return []
  return [
    f'In {edges} of {len(best)} cases the best rate is at the edge of those tried, so that naive '
    'transfer could be better still, and so could be every other start at a rate of its own.'
  ]


def _naive_by_rate(rows: pd.DataFrame, column: str) -> pd.DataFrame:
  naive = rows[rows.predictor.eq('persistence') & rows.batch_norm.eq('keep')]
  return naive.groupby(['leg', 'source_seed', 'lr_scale'])[list({'validation', column})].mean()


def _other_metric(rows: pd.DataFrame) -> list[str]:
  """Mean class accuracy of segmentation, which the paper's text names where its table has mIoU."""
  if not np.isfinite(rows.mean_accuracy.astype(float)).any():
    return []
  body = [
    [f'{name}{f", step {step}" if step else ""}', f'{values.mean():.2f}']
    for (name, step), values in scores(rows, 'mean_accuracy').iterrows()
  ]
  return ['Mean class accuracy, which the text of the paper names:', table(['start', '%'], body)]
