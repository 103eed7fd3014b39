"""Tries starts for a transfer, and says which to use: often none but the newest weights.

    python bin/recommend.py --workdir=W --config=configs/transfer_mnist.py

W holds a finished forgetting run; the config is that of a transfer, as bin/transfer.py takes it.
Starts and learning rates are tried by successive halving on a part of the labelled images; the test
set is not used. The same command resumes after a kill.
"""

from pathlib import Path

from absl import flags

from know_jax import transfer_starts
from know_jax.errors import UserError
from know_jax.recommendation import STARTS, Start
from know_jax.runs import cli

cli.define_workdir()
_CONFIG = cli.define_config(Path(__file__).parent.parent / 'configs' / 'transfer_glyphs.py')
_PREDICTOR = flags.DEFINE_list(
  'predictor', '', 'Predictors to try, each for --steps; without: a dozen starts.'
)
_STEPS = flags.DEFINE_list('steps', '1,2,3', 'With --predictor: the steps to try.')
_RATES = flags.DEFINE_list('rates', '0.5,1,2,4', "Multiples of the config's lr to try.")
_REPEATS = flags.DEFINE_integer('repeats', 5, 'Seeds that decide.')
_SEED = flags.DEFINE_integer('labels_seed', 0, "Which of the transfer's seeds draws the labels.")
_VALIDATION = flags.DEFINE_float('validation', 0.2, 'Part of the labelled images to judge by.')


def _numbers(flag: flags.FlagHolder, kind: type) -> list:
  try:
    return [kind(value) for value in flag.value]
  except ValueError as error:
    raise UserError(f'--{flag.name} is {",".join(flag.value)}; expected numbers.') from error


def main() -> None:
  chosen = [name for name in _PREDICTOR.value if name]
  if not chosen:
    cli.refuse('steps', because='no --predictor is given')
  starts = [Start(name, steps) for name in chosen for steps in _numbers(_STEPS, int)]
  result = transfer_starts.run(
    _CONFIG.value,
    cli.workdir(),
    starts=starts or STARTS,
    rates=_numbers(_RATES, float),
    repeats=_REPEATS.value,
    validation=_VALIDATION.value,
    labels_seed=_SEED.value,
  )
  print(result)


if __name__ == '__main__':
  cli.run(main)
