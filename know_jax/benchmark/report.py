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
  entries = section['entries']
  names = list(dict.fromkeys(e['predictor'] for e in entries))
  for i, name in enumerate(names):
    mine = [e for e in entries if e['predictor'] == name]
    cost = [{key: e['weights'] * s for key, s in e['seconds_a_weight'].items()} for e in mine]
    marker = MARKERS[i % len(MARKERS)]
    style = {'color': f'C{i % 10}', 'marker': marker, 'linewidth': 1, 'label': name}
    _curve(axes, [e['weights'] for e in mine], cost, style)
  ends = [min(e['weights'] for e in entries), max(e['weights'] for e in entries)]
  slowest = max(e['seconds_a_weight']['median'] for e in entries if e['weights'] == ends[1])
  axes.plot(ends, [size * slowest for size in ends], ':', color='grey', label='linear')
  axes.set_xscale('log')
  axes.set_yscale('log')
  axes.set_xlabel('weights')
  axes.set_ylabel('seconds')
  figure.legend(*axes.get_legend_handles_labels(), loc='outside right upper', fontsize=8)
  figure.savefig(path, dpi=110, metadata={'Software': None})


def draw(path: Path, section: Mapping[str, Any]) -> None:
  """Draws cost and memory by the number of weights, from the section `memory`."""
  figure = new_figure(12, 5)
  left, right = figure.subplots(1, 2)
  entries = section['entries']
  for i, label in enumerate(dict.fromkeys(map(series, entries))):
    mine = [e for e in entries if series(e) == label]
    sizes = [e['weights'] for e in mine]
    style = {'color': f'C{i}', 'marker': MARKERS[i], 'linewidth': 1}
    cost = [{key: e['weights'] * s for key, s in e['seconds_a_weight'].items()} for e in mine]
    extra = [{key: bytes_ / MIB for key, bytes_ in e['extra'].items()} for e in mine]
    for axes, spreads in ((left, cost), (right, extra)):
      _curve(axes, sizes, spreads, {**style, 'label': label})
  largest = max(entries, key=lambda e: (e['weights'], e['seconds_a_weight']['median']))
  ends = [min(e['weights'] for e in entries), largest['weights']]
  slowest = largest['seconds_a_weight']['median']
  left.plot(ends, [size * slowest for size in ends], ':', color='grey', label='linear')
  right.axhline(128, color='grey', linestyle=':', linewidth=1, label='128 MiB')
  left.set_yscale('log')
  # Linear near zero: where little is needed, measurement of it may come out below.
  right.set_yscale('symlog', linthresh=10)
  right.set_ylim(bottom=min(0.0, *(e['extra']['low'] / MIB for e in entries)))
  left.set_ylabel('seconds')
  right.set_ylabel('memory beyond inputs and outputs, MiB')
  for axes in (left, right):
    axes.set_xscale('log')
    axes.set_xlabel('weights')
  figure.legend(*left.get_legend_handles_labels(), loc='outside right upper', fontsize=8)
  figure.savefig(path, dpi=110, metadata={'Software': None})


def _curve(axes: Any, sizes: Sequence[int], spreads: Sequence[Any], style: Any) -> None:
  low, median, high = ([s[key] for s in spreads] for key in ('low', 'median', 'high'))
  axes.plot(sizes, median, **style)
  axes.fill_between(sizes, low, high, color=style['color'], alpha=0.2, linewidth=0)


PLOTS: dict[str, tuple[str, str, Callable[[Path, Mapping[str, Any]], None]]] = {
  'memory': ('.png', 'Cost and memory of a prediction by the number of weights', draw),
  'growth': ('_growth.png', 'Cost of every predictor by the number of weights', draw_growth),
}
"""Section -> how the name of its plot ends, its caption, and what draws it."""
