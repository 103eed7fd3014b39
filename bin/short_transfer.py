"""Does a better prediction transfer better? Short transfers from the runs of a meta-dataset.

    python bin/short_transfer.py --data=D --known=K --workdir=W --config=configs/short_transfer.py

Tunes KNOWN for transfer by evolution strategies on training runs, and scores every arm on
validation runs. The same command runs on after a kill.
"""

from pathlib import Path

from absl import flags

from know_jax.meta import short_transfer
from know_jax.runs import cli

cli.define_workdir()
_CONFIG = cli.define_config(Path(__file__).parent.parent / 'configs' / 'short_transfer.py')
_DATA = flags.DEFINE_string('data', None, 'Output folder of bin/collect.py.', required=True)
_KNOWN = flags.DEFINE_string('known', None, 'The KNOWN to tune, a safetensors file; else shipped.')


def main() -> None:
  workdir = cli.workdir()
  print(short_transfer.run(_CONFIG.value, _DATA.value, _KNOWN.value, workdir))
  print(f'plot and tuned weights: {workdir}')


if __name__ == '__main__':
  cli.run(main)
