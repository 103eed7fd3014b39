"""The benchmark in Markdown and as a plot, from its JSON data alone."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from know_jax.benchmark.memory import MIB, series
from know_jax.report.markdown import spread, table
from know_jax.report.plots import MARKERS, new_figure

_TITLES = {
  'predict': 'Prediction by KNOWN',
  'linear': 'Linear predictors',
  'leaves': 'Many small leaves',
  'compile': 'Compilation',
  'memory': 'Memory and cost by size',
  'growth': 'Cost of every predictor by size',
  'streaming': 'Weights in files',
  'merging': 'Merging of large models',
  'start': 'Start',
  'training': 'Training',
  'networks': 'Training steps of each network',
  'gpu': 'GPU',
}


def markdown(found: Mapping[str, Any], stem: str) -> str:
  """The report of what `runner.run` measured, a file of this stem; its plots lie beside it."""
  parts = ['# Benchmark', _machine(found), '## Goals', goals_table(found)]
  if found['quick']:
    parts.insert(1, '**Measured with --quick: these numbers say nothing.**')
  for name, section in found['sections'].items():
    parts.append(f'## {_TITLES[name]}')
    if 'unmeasured' in section:
      parts.append(f'Unmeasured: {section["unmeasured"]}')
      continue
    parts.append(section['note'].strip())
    for title, rows in section['tables'].items():
      parts += [f'### {title}'] if title else []
      body = [[_cell(cell) for cell in row.values()] for row in rows]
      parts.append(table(list(rows[0]), body, pad=False))
  for name, (end, caption, _) in PLOTS.items():
    if name in found['sections']:
      parts.append(f'![{caption}]({stem}{end})')
  return '\n\n'.join(parts) + '\n'


def _cell(value: Any) -> str:
  if value is None:
    return ''
  if isinstance(value, Mapping):
    return spread(value)
  if isinstance(value, int):
    return f'{value:,}'
  return value if isinstance(value, str) else f'{value:.3g}'


def goals_table(found: Mapping[str, Any]) -> str:
  """A line for every goal: expected, found, met."""
  words = {True: 'yes', False: 'no', None: 'unmeasured'}
  goals = [goal for section in found['sections'].values() for goal in section['goals']]
  body = [[g['what'], g['expected'], _cell(g['found']), words[g['met']]] for g in goals]
  return table(['goal', 'expected', 'found', 'met'], body, pad=False)


def _machine(found: Mapping[str, Any]) -> str:
  m = found['machine']
  names = ('python', 'jax', 'flax', 'numpy', 'tensorflow', 'keras')
  versions = ', '.join(f'{name} {m[name]}' for name in names if m[name])
  settings = ''.join(f'{name}={value} ' for name, value in m['set'].items())
  only = f' --only={",".join(found["only"])}' if found['only'] else ''
  load = ', '.join(f'{at[0]:.1f}' for at in (m['load_average'], found['load_average_after']))
  return (
    f'By `{settings}python bin/benchmark.py{only}`, in {found["seconds"] / 60:.0f} minutes, on '
    f'{m["processor"]} ({m["instructions"]}), {m["cores"]} cores, {m["memory_bytes"] / 2**30:.0f} '
    f'GiB of memory; JAX on {m["backend"]} ({m["devices"]} x {m["device"]}); {versions}; know_jax '
    f'at commit {m["commit"]}. Load average before and after: {load}. All that is compared ran in '
    'turn in one process, each round beginning with another. Numbers are medians with quartiles '
    '[25 %, 75 %]; ratios are of each round. Compilation is not in them unless that is said.'
  )


def draw_growth(path: Path, section: Mapping[str, Any]) -> None:
  """Draws cost by the number of weights, from the section `growth`."""
  figure = new_figure(8, 6)
  axes = figure.subplots()
  _draw_cost(axes, section['entries'], lambda entry: entry['predictor'])
  _save(figure, axes, path)


def draw(path: Path, section: Mapping[str, Any]) -> None:
  """Draws cost and memory by the number of weights, from the section `memory`."""
  figure = new_figure(12, 5)
  left, right = figure.subplots(1, 2)
  entries = section['entries']
  _draw_cost(left, entries, series)
  _curves(right, entries, series, lambda entry: _times(entry['extra'], 1 / MIB))
  right.axhline(128, color='grey', linestyle=':', linewidth=1, label='128 MiB')
  # Linear near zero: where little is needed, measurement of it may come out below.
  right.set_yscale('symlog', linthresh=10)
  right.set_ylim(bottom=min(0.0, *(e['extra']['low'] / MIB for e in entries)))
  right.set_ylabel('memory beyond inputs and outputs, MiB')
  _save(figure, left, path)


def _draw_cost(axes: Any, entries: Sequence[Any], label: Callable[[Any], str]) -> None:
  """Seconds by the number of weights, and what would be linear through the slowest."""
  _curves(axes, entries, label, lambda entry: _times(entry['seconds_a_weight'], entry['weights']))
  largest = max(entries, key=lambda e: (e['weights'], e['seconds_a_weight']['median']))
  ends = [min(e['weights'] for e in entries), largest['weights']]
  slowest = largest['seconds_a_weight']['median']
  axes.plot(ends, [size * slowest for size in ends], ':', color='grey', label='linear')
  axes.set_yscale('log')
  axes.set_ylabel('seconds')


def _times(spread_: Mapping[str, float], factor: float) -> dict[str, float]:
  return {key: factor * value for key, value in spread_.items()}


def _curves(
  axes: Any,
  entries: Sequence[Any],
  label: Callable[[Any], str],
  of: Callable[[Any], Mapping[str, float]],
) -> None:
  """A spread by the number of weights, a curve for each label."""
  for i, name in enumerate(dict.fromkeys(map(label, entries))):
    mine = [entry for entry in entries if label(entry) == name]
    sizes = [entry['weights'] for entry in mine]
    low, median, high = ([of(entry)[key] for entry in mine] for key in ('low', 'median', 'high'))
    style = {'color': f'C{i}', 'marker': MARKERS[i % len(MARKERS)], 'linewidth': 1, 'label': name}
    axes.plot(sizes, median, **style)
    axes.fill_between(sizes, low, high, color=style['color'], alpha=0.2, linewidth=0)
  axes.set_xscale('log')
  axes.set_xlabel('weights')


def _save(figure: Any, axes: Any, path: Path) -> None:
  figure.legend(*axes.get_legend_handles_labels(), loc='outside right upper', fontsize=8)
  figure.savefig(path, dpi=110, metadata={'Software': None})


PLOTS: dict[str, tuple[str, str, Callable[[Path, Mapping[str, Any]], None]]] = {
  'memory': ('.png', 'Cost and memory of a prediction by the number of weights', draw),
  'growth': ('_growth.png', 'Cost of every predictor by the number of weights', draw_growth),
}
"""Section -> how the name of its plot ends, its caption, and what draws it."""
