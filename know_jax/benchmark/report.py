"""The benchmark in Markdown and as a plot, from its JSON data alone."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from know_jax.benchmark.goals import MIB
from know_jax.benchmark.timing import spread
from know_jax.report.plots import MARKERS, new_figure

_COMMAND = 'python bin/benchmark.py'


def markdown(found: Mapping[str, Any], picture: str | None) -> str:
  """The report.

  Args:
    found: what `runner.run` measured.
    picture: the file name of the plot beside it, None if there is none.
  """
  parts = ['# Benchmark', _machine(found), '## Goals', goals_table(found)]
  if found['quick']:
    parts.insert(1, '**Measured with --quick: these numbers say nothing.**')
  for name, section in found['sections'].items():
    parts += _WRITERS[name](section)
  if picture:
    parts.append(f'![Cost and memory of a prediction by the number of weights]({picture})')
  return '\n\n'.join(parts) + '\n'


def goals_table(found: Mapping[str, Any]) -> str:
  """A line for every goal: wanted, found, met."""
  words = {True: 'yes', False: 'no', None: 'unmeasured'}
  return _table(
    ('goal', 'wanted', 'found', 'met'),
    [
      (g['what'], g['wanted'], '' if g['found'] is None else f'{g["found"]:.3g}', words[g['met']])
      for g in found['goals']
    ],
  )


def _machine(found: Mapping[str, Any]) -> str:
  m = found['machine']
  versions = ', '.join(
    f'{name} {m[name]}'
    for name in ('python', 'jax', 'flax', 'numpy', 'tensorflow', 'keras')
    if m[name]
  )
  load = ', '.join(f'{at[0]:.1f}' for at in (m['load_average'], found['load_average_after']))
  return (
    f'By `{_COMMAND}`, in {found["seconds"] / 60:.0f} minutes, on {m["processor"]}, {m["cores"]} '
    f'cores, {m["memory_bytes"] / 2**30:.0f} GiB of memory; JAX on {m["backend"]} '
    f'({m["devices"]} x {m["device"]}); {versions}; know_jax at commit {m["commit"]}. Load average '
    f'before and after: {load}. All that is compared ran in turn in one process, each round '
    'beginning with another. Numbers are medians with quartiles [25 %, 75 %]; ratios are taken '
    'within each round. Compilation is not in them unless that is said.'
  )


def _predict(section: Mapping[str, Any]) -> Iterable[str]:
  yield '## Prediction'
  chunk = f'{section["plain_chunk"]:,}'
  yield (
    "One step ahead for every weight of a network. `known` is the paper's KNOWN in "
    '`know_jax.predict`, `known_leaf` the one conditioned on the leaf (another function, and far '
    'less work). Both check what they predict, as by default; the others do not. *plain vmap* is '
    f'the Flax module under `jax.vmap` and `jax.jit`, leaf by leaf, at most {chunk} weights at a '
    'time so that it fits memory. *NumPy* is the formula in chunks of 8,192. *Keras* is the '
    'functional model rebuilt from its description, with the same weights; `predict` is called '
    'once for each kind of leaf with the fastest of several batch sizes. Differences are the '
    'largest to the plain module over all weights (for `known_leaf`, to its formula over whole '
    'leaves).'
  )
  if section['keras_absent']:
    yield section['keras_absent']
  for network in section['networks']:
    batch = network['keras_batch_size']
    yield (
      f'### {network["model"]}: {network["weights"]:,} weights in {network["leaves"]} leaves'
      + (f' (Keras: batches of {batch:,})' if batch else '')
    )
    rates, speedup = network['weights_a_second'], network['speedup']
    yield _table(
      ('', 'million weights a second', '`known` is faster by', 'difference'),
      [
        (
          name,
          _spread(rates[name], scale=1e-6),
          _spread(speedup[name]) if name in speedup else '',
          f'{network["difference"][name]:.1e}' if name in network['difference'] else '',
        )
        for name in network['seconds']
      ],
    )
    roofline = network['roofline']
    yield (
      f'Roofline: `known` needs {roofline["flops_a_weight"] / 1000:.1f} kFLOP a weight in '
      'matrix products (its 128 exponentials not counted).'
    )
    yield _table(
      ('', 'GFLOP a second', 'limit, million weights a second', 'achieved / limit'),
      [
        (
          name,
          _spread(roofline['flops_a_second'][name], scale=1e-9),
          _spread(roofline['limit'][name], scale=1e-6),
          _spread(roofline['achieved'][name]),
        )
        for name in roofline['flops']
      ],
    )


def _compile(section: Sequence[Mapping[str, Any]]) -> Iterable[str]:
  yield '## Compilation'
  yield (
    'In processes of their own, nothing compiled before: the first prediction of a network, minus '
    'the median of later ones, and the programs that XLA compiled in it. Then another network '
    'of other leaf shapes.'
  )
  yield _table(
    ('', 'first call, s', 'compilation, s', 'programs', 'programs of the other network'),
    [
      (
        entry['predictor'],
        f'{entry["first"]["seconds"]:.2f}',
        f'{entry["compile_seconds"]:.2f}',
        str(entry['first']['programs']),
        str(entry['other']['programs']),
      )
      for entry in section
    ],
  )


def _memory(section: Mapping[str, Any]) -> Iterable[str]:
  yield '## Memory and cost by size'
  starts = [entry['start']['extra'] for entry in section['entries']]
  yield (
    'In processes of their own, on the host: resident memory at the peak of a call, less that '
    'before it and less its outputs. The first call compiles; later ones do not. Before it, '
    'something else had been compiled in the process, a product in a loop: for that JAX and XLA '
    f'took {_spread(spread(starts), scale=1 / MIB)} MiB. Memory that the process had freed goes '
    'back to the system before each.'
  )
  yield _table(
    (
      'predictor', 'weights', 'steps', 'inputs, MiB', 'outputs, MiB', 'extra, first call, MiB',
      'extra later, MiB', 'ns a weight',
    ),
    [
      (
        entry['predictor'],
        f'{entry["weights"]:,}',
        str(entry['steps']),
        f'{entry["inputs"] / MIB:.1f}',
        f'{entry["outputs"] / MIB:.1f}',
        f'{entry["first"]["extra"] / MIB:.1f}',
        _spread(entry['extra'], scale=1 / MIB),
        _spread(entry['seconds_a_weight'], scale=1e9),
      )
      for entry in section['entries']
    ],
  )  # fmt: skip
  if section['growth']:
    powers = ', '.join(f'{power:.2f} ({name} steps)' for name, power in section['growth'].items())
    yield f'From the median size on, cost grows with this power of the number of weights: {powers}.'


def _streaming(section: Mapping[str, Any]) -> Iterable[str]:
  yield '## Weights in files'
  if 'unmeasured' in section:
    yield f'Unmeasured: {section["unmeasured"]}'
    return
  gigabytes = {name: f'{section[name] / 1e9:.3g} GB' for name in ('inputs', 'outputs')}
  yield (
    f'`bin/nowcast.py --history=... --output=...` predicts one step by `{section["predictor"]}`: '
    f'{section["weights"]:,} weights in {section["leaves"]} leaves, bfloat16 in sharded '
    f'safetensors ({gigabytes["inputs"]} read, {gigabytes["outputs"]} written).'
  )
  for call in section['calls']:
    how = 'killed when its first file was finished' if call['killed'] else 'to its end'
    yield (
      f'- {how}: {call["seconds"]:.0f} s, at most {call["peak"] / MIB:.0f} MiB of resident memory'
    )
  yield (
    f'Of {section["files"]} file(s) the last call found {section["kept"]} finished, and kept them. '
    f'It wrote {section["weights_a_second"] / 1e6:.3g} million weights a second, start and '
    'checksums of the history included.'
  )


def _training(section: Mapping[str, Any]) -> Iterable[str]:
  yield '## Training'
  height, width, channels = section['image']
  yield (
    f'`{section["model"]}` on {height} x {width} x {channels} images in memory, batches of '
    f'{section["batch_size"]}, Adam, float32, {section["images"]:,} images by one call of `fit`. '
    f'know_jax runs on {section["devices"]} device(s), and turns bytes into centred '
    'numbers in every step; Keras is given them ready, and runs with and without XLA.'
  )
  if section['keras_absent']:
    yield section['keras_absent']
  rates, speedup = section['images_a_second'], section['speedup']
  yield _table(
    ('', 'images a second', 'know_jax is faster by'),
    [
      (name, _spread(rates[name]), _spread(speedup[name]) if name in speedup else '')
      for name in section['seconds']
    ],
  )


def _gpu(section: Mapping[str, Any]) -> Iterable[str]:
  yield '## GPU'
  if 'unmeasured' in section:
    yield f'Unmeasured: {section["unmeasured"]}'
    return
  yield f'JAX ran on {section["backend"]}.'
  for part in ('network', 'large'):
    entry = section[part]
    yield (
      f'{entry["steps"]} step(s) of {entry["weights"]:,} weights in {entry["leaves"]} leaves, '
      f'{entry.get("dtype", "float32")}:'
    )
    yield _table(
      ('', 'ms', 'million weights a second'),
      [
        (name, _spread(values, scale=1e3), _spread(entry['weights_a_second'][name], scale=1e-6))
        for name, values in entry['seconds_spread'].items()
      ],
    )
  epoch = section['epoch']
  yield (
    f'An epoch of `{epoch["model"]}` in {epoch["dtype"]}, {epoch["images"]:,} images in batches of '
    f'{epoch["batch_size"]}, augmented: {_spread(epoch["seconds_spread"]["fit"])} s, '
    f'{_spread(epoch["images_a_second"]["fit"])} images a second.'
  )


_WRITERS: dict[str, Callable[[Any], Iterable[str]]] = {
  'predict': _predict,
  'compile': _compile,
  'memory': _memory,
  'streaming': _streaming,
  'training': _training,
  'gpu': _gpu,
}


def _table(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
  rule = '|'.join(['---', *['---:'] * (len(header) - 1)])
  rows = (' | '.join(row) for row in body)
  return '\n'.join([f'| {" | ".join(header)} |', f'|{rule}|', *(f'| {row} |' for row in rows)])


def _spread(values: Mapping[str, float], scale: float = 1.0) -> str:
  low, median, high = (f'{scale * values[key]:.3g}' for key in ('low', 'median', 'high'))
  return f'{median} [{low}, {high}]'


def draw(path: Path, section: Mapping[str, Any]) -> None:
  """Draws cost and memory by the number of weights.

  Args:
    path: the PNG file to write.
    section: `memory` of what was measured.
  """
  figure = new_figure(12, 5)
  left, right = figure.subplots(1, 2)
  groups = dict.fromkeys((e['predictor'], e['steps']) for e in section['entries'])
  for i, (predictor, steps) in enumerate(groups):
    mine = [e for e in section['entries'] if (e['predictor'], e['steps']) == (predictor, steps)]
    sizes = [e['weights'] for e in mine]
    style = {
      'color': f'C{i}', 'marker': MARKERS[i], 'linewidth': 1,
      'label': f'{predictor}, {steps} step{"s" if steps > 1 else ""}',
    }  # fmt: skip
    seconds = [[e['weights'] * e['seconds_a_weight'][key] for e in mine] for key in _QUARTILES]
    _curve(left, sizes, seconds, style)
    _curve(right, sizes, [[e['extra'][key] / MIB for e in mine] for key in _QUARTILES], style)
  ends = [
    min(e['weights'] for e in section['entries']),
    max(e['weights'] for e in section['entries']),
  ]
  slowest = max(
    (e for e in section['entries'] if e['weights'] == ends[1]),
    key=lambda e: e['seconds_a_weight']['median'],
  )
  line = [size * slowest['seconds_a_weight']['median'] for size in ends]
  left.plot(ends, line, ':', color='grey', linewidth=1, label='linear')
  right.axhline(128, color='grey', linestyle=':', linewidth=1, label='128 MiB')
  left.set_yscale('log')
  # Linear near zero: where little is needed, measurement of it may come out below.
  right.set_yscale('symlog', linthresh=10)
  right.set_ylim(bottom=min(0.0, *(e['extra']['low'] / MIB for e in section['entries'])))
  left.set_ylabel('seconds')
  right.set_ylabel('memory beyond inputs and outputs, MiB')
  for axes in (left, right):
    axes.set_xscale('log')
    axes.set_xlabel('weights')
  figure.legend(*left.get_legend_handles_labels(), loc='outside right upper', fontsize=8)
  figure.savefig(path, dpi=110, metadata={'Software': None})


_QUARTILES = ('low', 'median', 'high')


def _curve(axes: Any, sizes: Sequence[float], lines: Sequence[Sequence[float]], style: Any) -> None:
  low, median, high = lines
  axes.plot(sizes, median, **style)
  axes.fill_between(sizes, low, high, color=style['color'], alpha=0.2, linewidth=0)
