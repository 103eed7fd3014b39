"""Which start beats a tuned learning rate and tuned shrinking? A screening with equal budgets.

    python bin/screen.py --workdir=W --config=configs/study_fashion_mnist.py:cnn --name=fashion_cnn
    python bin/screen.py --workdir=W --report=docs/results/screen.md

The config is that of a study; several studies may share W. The same command resumes after a kill.
--only tries some families of starts, `study.screen.FAMILIES`. --report writes a page from the rows
in W, the journal rows.jsonl.
"""

from pathlib import Path

from absl import flags

from know_jax.io.files import write_atomic
from know_jax.io.journal import read_lines
from know_jax.runs import cli
from know_jax.study import screen

cli.define_workdir()
_CONFIG = cli.define_config(Path(__file__).parent.parent / 'configs' / 'study_smoke.py')
_NAME = flags.DEFINE_string('name', 'study', 'Of the study, in rows.')
_ONLY = flags.DEFINE_multi_string('only', [], 'A family to try; again for another; none: all.')
_REPORT = flags.DEFINE_string('report', None, 'Only write a report, a Markdown file.')


def main() -> None:
  if not _REPORT.value:
    screen.run(_CONFIG.value, cli.workdir(), name=_NAME.value, only=_ONLY.value)
    return
  workdir = cli.workdir()
  command = f'python bin/screen.py --workdir={workdir} --report={_REPORT.value}'
  page = screen.page(read_lines(workdir / 'rows.jsonl'), command)
  write_atomic(Path(_REPORT.value), page.encode())
  print(page)


if __name__ == '__main__':
  cli.run(main)
