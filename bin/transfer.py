"""Transfers the newest and all predicted weights of a workdir to another task.

    python bin/transfer.py --workdir=W --config=configs/transfer_mnist.py

Without --workdir, ./workdir is used, as by bin/forget.py and bin/nowcast.py; without --config,
configs/transfer_glyphs.py. The same command runs on after a kill.
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
  print(transfer.table(rows))


if __name__ == '__main__':
  cli.run(main)
