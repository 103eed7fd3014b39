"""Where a gain comes from: rate, BatchNorm reset or trajectory; ResNet18, one GPU.

    python bin/regime.py --workdir=W --config.official=FOLDER --config.data_dir=TFDS
    python bin/regime.py --workdir=W --report=docs/results/resnet18.md

The same command resumes after a kill, or when --config.seconds are over. --report writes a page
from the rows in W, the journal rows.jsonl.
"""

from pathlib import Path

from absl import flags

from know_jax.runs import cli
from know_jax.study import regime, regime_report

cli.define_workdir()
_CONFIG = cli.define_config(Path(__file__).parent.parent / 'configs' / 'regime.py')
_REPORT = flags.DEFINE_string('report', None, 'Only write a report, a Markdown file.')


def main() -> None:
  if _REPORT.value:
    print(regime_report.write(cli.workdir(), _REPORT.value))
  else:
    regime.run(_CONFIG.value, cli.workdir())


if __name__ == '__main__':
  cli.run(main)
