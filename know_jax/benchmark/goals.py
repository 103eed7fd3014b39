"""What is asked of speed and memory, and whether what was measured meets it."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from know_jax.benchmark import predicting, training_speed

MIB = 2**20


class Goal(NamedTuple):
  """A number that is asked for.

  Attributes:
    what: the number.
    wanted: as text, as in 'at least 4'.
    found: what was measured; None where it was not.
    met: whether it is enough; None where it was not measured.
  """

  what: str
  wanted: str
  found: float | None
  met: bool | None


def goals(sections: Mapping[str, Any]) -> list[Goal]:
  """The goals of the sections that there are."""
  found: list[Goal] = []
  for name, judge in _JUDGES.items():
    if name in sections:
      found += judge(sections[name])
  return found


def _at_least(what: str, wanted: float, found: float | None) -> Goal:
  return Goal(what, f'at least {wanted:g}', found, None if found is None else found >= wanted)


def _at_most(what: str, wanted: float, found: float | None) -> Goal:
  return Goal(what, f'at most {wanted:g}', found, None if found is None else found <= wanted)


def _predict(section: Mapping[str, Any]) -> Iterator[Goal]:
  network = section['networks'][-1]
  model, keras = network['model'], network['speedup'].get(predicting.KERAS)
  yield _at_least(f'`known` over Keras, {model}', 4, keras['median'] if keras else None)
  achieved = [entry['median'] for entry in network['roofline']['achieved'].values()]
  yield _at_least(f'share of the arithmetic limit, {model}', 0.5, min(achieved))
  ours = (predicting.OURS, predicting.CONDITIONED)
  apart = max(n['difference'][name] for n in section['networks'] for name in ours)
  yield _at_most('largest difference to the plain module', 1e-6, apart)


def _compile(section: Any) -> Iterator[Goal]:
  for entry in section:
    what = f'programs that another network compiles, `{entry["predictor"]}`'
    yield _at_most(what, 0, entry['other']['programs'])


def _memory(section: Mapping[str, Any]) -> Iterator[Goal]:
  ours = [e for e in section['entries'] if e['predictor'] != predicting.PLAIN]
  what = 'memory beyond inputs and outputs, MiB'
  yield _at_most(what, 128, max(max(e['later_extra']) for e in ours) / MIB)
  first = max(e['first']['extra'] for e in ours)
  yield _at_most(f'{what}, in a first call, its compilation included', 128, first / MIB)
  for name, power in section['growth'].items():
    if name.startswith(predicting.OURS):
      yield _at_most(f'power of the size that cost grows with, `{name}`', 1.05, power)


def _streaming(section: Mapping[str, Any]) -> Iterator[Goal]:
  peaks = [entry['peak'] / MIB for entry in section.get('calls', [])]
  what = 'resident memory of a prediction from files, MiB'
  yield _at_most(what, 2048, max(peaks, default=None))


def _training(section: Mapping[str, Any]) -> Iterator[Goal]:
  rivals = [
    entry['median']
    for name, entry in section['speedup'].items()
    if name in (training_speed.KERAS, training_speed.KERAS_XLA)
  ]
  what = f'training {section["model"]}, over the faster Keras'
  yield _at_least(what, 1, min(rivals) if rivals else None)


def _gpu(section: Mapping[str, Any]) -> Iterator[Goal]:
  for part, what, wanted in (
    ('network', 'GPU: three steps of ResNet18, seconds', 0.05),
    ('large', 'GPU: 1 billion weights, seconds', 2.0),
    ('epoch', 'GPU: an epoch of ResNet18 in bfloat16, seconds', 4.0),
  ):
    spreads = section.get(part, {}).get('seconds_spread', {'': None})
    for name, entry in spreads.items():
      label = f'{what}, `{name}`' if part != 'epoch' and name else what
      yield _at_most(label, wanted, entry['median'] if entry else None)


_JUDGES = {
  'predict': _predict,
  'compile': _compile,
  'memory': _memory,
  'streaming': _streaming,
  'training': _training,
  'gpu': _gpu,
}
