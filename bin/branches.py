"""What does a forgetting step consist of? Branches from one network, and their directions.

    python bin/branches.py --workdir=W
    python bin/branches.py --workdir=W --config.dataset=mnist --config.data_dir=TFDS
    python bin/branches.py --workdir=W --report=docs/results/branches.md

The same command resumes after a kill; several data sets may share W. --report writes a page and a
picture from the rows in W, the journal rows.jsonl.
"""

from pathlib import Path

from absl import flags

from know_jax.runs import cli
from know_jax.study import branches

cli.define_workdir()
_CONFIG = cli.define_config(Path(__file__).parent.parent / 'configs' / 'branches.py')
_REPORT = flags.DEFINE_string('report', None, 'Only write a report, a Markdown file.')


def main() -> None:
  if _REPORT.value:
    print(branches.write(cli.workdir(), _REPORT.value))
  else:
    branches.run(_CONFIG.value, cli.workdir())


if __name__ == '__main__':
  cli.run(main)
