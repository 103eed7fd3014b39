"""Several studies on one page: the answer to whether predicting helps, and a report of each."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from know_jax.errors import UserError, os_errors
from know_jax.report.markdown import table
from know_jax.study import report
from know_jax.study.analysis import (
  PAIR,
  Comparison,
  beyond_shrinking,
  compare,
  cross_chosen,
  trainings,
)
from know_jax.study.arms import ANSWER
from know_jax.study.tables import beyond_text, interval

_RIVALS = {
  'naive transfer': f'Against naive transfer, the best step of `{ANSWER}` changes accuracy',
  'shrink': 'Against the best shrinking of the newest weights, it changes accuracy',
  'equal compute': 'Against training the newest weights on for as long as forgetting took, it '
  'changes accuracy',
}


def write(workdirs: Sequence[str | Path], path: str | Path) -> str:
  """Writes a page over several studies, and beside it the report of each, `<path's stem>_W.md`.

  Gives the answer, the first section.

  Raises:
    UserError: as `report.write` does; also where two workdirs have one name.
  """
  path = Path(path).expanduser()
  places = {Path(workdir).name: Path(workdir).expanduser() for workdir in workdirs}
  if len(places) < len(workdirs):
    names = [Path(workdir).name for workdir in workdirs]
    twice = next(name for name in names if names.count(name) > 1)
    raise UserError(f'two studies are called {twice!r}; expected names that tell them apart.')
  result, body, counts, beyond = {}, [], [], []
  for name, workdir in places.items():
    rows, lines, main, naive = report.read_lines(workdir)
    counts.append((len(rows), trainings(rows)))
    file = f'{path.stem}_{name}.md'
    report.write(workdir, path.with_name(file))
    result[name] = report.against_rivals(main, naive)
    first = naive.first
    what = f'{first["source"]} to {first["target"]}, {first["model"]}'
    for line, to_naive, to_shrink in beyond_shrinking(lines, naive.amount):
      beyond.append((f'{line.title} ({what})', to_naive, to_shrink))
    shrunk = cross_chosen([line for line in main if line.predictor == 'shrink'])
    scratch = next((line for line in main if line.predictor == 'scratch'), None)
    faster = report.at_other_rates(lines, naive)
    fastest = max(faster, key=lambda scale: faster[scale].mean, default=None)
    body.append(
      [
        f'[{what}]({file})',
        ' x '.join(str(naive.rows[seed].nunique()) for seed in PAIR),
        f'{100 * naive.rows["accuracy"].mean():.2f}',
        *(interval(result[name].get(rival)) for rival in _RIVALS),
        interval(compare(shrunk, naive)),
        interval(compare(scratch, naive)),
        '' if fastest is None else f'{interval(faster[fastest])} at {fastest:g} times',
      ]
    )  # fmt: skip
  answer = answer_text(result)
  header = [
    'study', 'seeds', 'naive, %', *(f'`{ANSWER}` to {rival}' for rival in _RIVALS),
    'shrink to naive', 'scratch to naive', 'naive at its best other learning rate',
  ]  # fmt: skip
  total, begun = (sum(column) for column in zip(*counts, strict=True))
  parts = [
    '# Does predicting help transfer?',
    answer,
    table(header, body),
    f'{total:,} rows, of {begun:,} trainings: arms of equal weights share theirs. Differences of '
    'accuracy after transfer in points, paired, with 95 % bootstrap intervals over source seeds '
    'and the transfers from each. Seeds: source runs x transfers from each. Steps of '
    f'`{ANSWER}` and strengths of shrink are chosen for each source seed by the other source '
    'seeds; the best other learning rate is not, so that its gain is flattered a little. Where '
    'scratch (no pre-training) beats naive transfer, pre-training does harm, and what undoes it '
    'helps. All arms, the tests with corrected p, ablations, times and plots are in the reports of '
    'the single studies.',
    *beyond_text(beyond),
  ]
  with os_errors(f'cannot write {path}'):
    path.write_text('\n\n'.join(parts) + '\n', 'utf-8')
  return answer


def answer_text(found: Mapping[str, Mapping[str, Comparison]]) -> str:
  """The answer over studies (what `report.against_rivals` gave of each), a sentence a rival."""
  sentences = []
  for rival, start in _RIVALS.items():
    compared = [study[rival] for study in found.values() if rival in study]
    if not compared:
      continue
    if len(compared) == 1:
      sentences.append(f'{start} by {interval(compared[0])} points.')
      continue
    means = sorted(comparison.mean for comparison in compared)
    better = sum(comparison.low > 0 for comparison in compared)
    worse = sum(comparison.high < 0 for comparison in compared)
    sentences.append(
      f'{start} by {means[0]:+.2f} to {means[-1]:+.2f} points over {len(compared)} studies: in '
      f'{better} the 95 % interval lies above zero, in {worse} below, and in '
      f'{len(compared) - better - worse} it includes zero.'
    )
  return ' '.join(sentences)
