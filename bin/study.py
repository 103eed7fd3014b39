"""Runs a transfer study: arms x amounts of data x source seeds x transfer seeds -> results.csv.

    python bin/study.py --workdir=W --config=configs/study_fashion_mnist.py
    python bin/study.py --workdir=W --config=configs/study_fashion_mnist.py --dry_run
    python bin/study.py --workdir=W --report=docs/results/transfer.md

The same command runs on after a kill; several processes may share a workdir, and --workers=2 starts
them, --scheduler=tcp://HOST:8786 uses those of a Dask cluster. --dry_run only says
how much there is to do, and how long it takes at the rate measured so far. --report writes tables
and plots from results.csv and timings.csv alone; of several workdirs on one page with --studies,
and beside it the report of each; --table=2 to 5 writes the page
of a stand-in for that table of the paper. --examples draws label maps, or captions, of test images
as naive and predicted starts give them after transfer. Without --config, configs/study_smoke.py.
"""

from pathlib import Path

from absl import flags

from know_jax.runs import cli
from know_jax.study import examples, report, runner, stand_ins, summary

cli.define_workdir()
_CONFIG = cli.define_config(Path(__file__).parent.parent / 'configs' / 'study_smoke.py')
_WORKERS, _SCHEDULER = cli.define_workers()
_DRY_RUN = cli.define_dry_run('Only say how much there is to do.')
_REPORT = flags.DEFINE_string('report', None, 'Only write a report, a Markdown file, with plots.')
_TABLE = flags.DEFINE_integer(
  'table', None, 'With --report: the page of a stand-in for this table of the paper, 2 to 5.'
)
_EXAMPLES = flags.DEFINE_string(
  'examples', None, 'Only draw what naive and predicted starts make of test images, a PNG file.'
)
_STUDIES = flags.DEFINE_list('studies', None, 'With --report: workdirs of several, on one page.')


def main() -> None:
  if _STUDIES.value:
    cli.refuse('workdir', 'config', 'dry_run', because='--studies are given')
    print(summary.write(_STUDIES.value, cli.require('report', because='--studies are given')))
    return
  workdir = cli.workdir()
  if _TABLE.value is not None:
    print(stand_ins.write(_TABLE.value, workdir, cli.require('report', because='--table is given')))
  elif _REPORT.value:
    print(report.write(workdir, _REPORT.value))
  elif _EXAMPLES.value:
    print(examples.write(_CONFIG.value, workdir, _EXAMPLES.value))
  elif _DRY_RUN.value:
    print(runner.plan(_CONFIG.value, workdir))
  else:
    print(runner.run(_CONFIG.value, workdir, workers=_WORKERS.value, scheduler=_SCHEDULER.value))


if __name__ == '__main__':
  cli.run(main)
