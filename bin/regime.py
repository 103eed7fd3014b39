"""Where a gain comes from: rate, BatchNorm reset or trajectory; ResNet18, one GPU.

    python bin/regime.py --workdir=W --config.official=FOLDER --config.data_dir=TFDS
    python bin/regime.py --workdir=W --report=docs/results/resnet18.md

The same command continues after a kill or when --config.seconds are over. --report writes a page
and a table of rows beside it (.csv) from the journal in the workdir, or, without --workdir, the page
again from those rows.
"""

from pathlib import Path

from absl import flags

from know_jax.runs import cli
from know_jax.study import regime

cli.define_workdir()
_CONFIG = cli.define_config(Path(__file__).parent.parent / 'configs' / 'regime.py')
_REPORT = flags.DEFINE_string('report', None, 'Only write a report, a Markdown file.')


def main() -> None:
  regime.run(_CONFIG.value, cli.workdir())


if __name__ == '__main__':
  cli.run(main)
