"""Measures how fast know_jax predicts and trains here, beside other ways to do the same.

    python bin/benchmark.py --output=docs/results/benchmark.md
    python bin/benchmark.py --only=predict,memory --output=benchmark.md

A quarter of an hour on 2 cores, which should have nothing else to do; JSON and a plot are written
beside the Markdown file. Where TensorFlow is installed, Keras is compared with. --quick shows in
seconds that everything runs; its numbers say nothing.
"""

from absl import flags

from know_jax.benchmark import report, runner
from know_jax.runs import cli

_OUTPUT = flags.DEFINE_string('output', 'benchmark.md', 'The Markdown file to write.')
_ONLY = flags.DEFINE_list('only', [], f'Sections: {", ".join(runner.SECTIONS)}; else all.')
_QUICK = flags.DEFINE_bool('quick', False, 'Small sizes, to see that it runs.')


def main() -> None:
  result = runner.run(_OUTPUT.value, only=_ONLY.value, quick=_QUICK.value)
  print(report.goals_table(result))
  print(f'\nreport: {_OUTPUT.value}')


if __name__ == '__main__':
  cli.run(main)
