"""Transfers the newest and all predicted weights of a workdir to another task.

    python bin/transfer.py --workdir=W --config=configs/transfer_mnist.py

Without --workdir, ./workdir is used, as by bin/forget.py and bin/nowcast.py; without --config,
configs/transfer_glyphs.py. The same command runs on after a kill. With config.task 'domains' and
config.test_split 'each', each domain of config.train_split is left out and tested on in turn.
"""

from pathlib import Path

from absl import flags

from know_jax import transfer
from know_jax.runs import cli

cli.define_workdir()
_CONFIG = cli.define_config(Path(__file__).parent.parent / 'configs' / 'transfer_glyphs.py')
_PREDICTOR = flags.DEFINE_list('predictor', '', 'Predictors to transfer; all found in the workdir.')


def main() -> None:
  workdir = cli.workdir()
  rows = transfer.run(_CONFIG.value, workdir, [name for name in _PREDICTOR.value if name])
  if domains := dict.fromkeys(row['test_split'] for row in rows if 'test_split' in row):
    for domain in domains:
      print(f'{domain}:\n{transfer.table([r for r in rows if r["test_split"] == domain])}\n')
    print(f'mean of {", ".join(domains)}:')
  print(transfer.table(rows))


if __name__ == '__main__':
  cli.run(main)
