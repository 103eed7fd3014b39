"""The retrodiction benchmark: how well predictors find the hidden newest weight of unseen runs.

    python bin/evaluate_known.py --data=D --workdir=W --config=configs/evaluate_known.py

Trains KNOWN, the paper's KNOWN and least squares for each split (by run, one family left out, one
data set left out), and tests them and every other predictor. The same command runs on after a kill.
"""

from pathlib import Path

from absl import flags

from know_jax.meta import evaluation
from know_jax.runs import cli

cli.define_workdir()
_CONFIG = cli.define_config(Path(__file__).parent.parent / 'configs' / 'evaluate_known.py')
_DATA = flags.DEFINE_string('data', None, 'Output folder of bin/collect.py.', required=True)
_OFFICIAL = flags.DEFINE_string(
  'official', None, "Folder with the authors' three .h5 files, to be tested too."
)


def main() -> None:
  workdir = cli.workdir()
  print(evaluation.run(_CONFIG.value, _DATA.value, workdir, _OFFICIAL.value))
  print(f'tables and trained weights: {workdir}')


if __name__ == '__main__':
  cli.run(main)
