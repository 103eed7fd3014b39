"""Trains a network, then fine-tunes it on ever smaller nested subsets of its own training data.

    python bin/forget.py --workdir=W --config=configs/fashion_mnist_cnn.py --config.lr=2e-3

Without --workdir, ./workdir is used; without --config, configs/forget_glyphs.py. The same command
runs on after a kill. Several processes, on one machine or on many that share the workdir, train one
run if each is started with

    --coordinator=HOST:PORT --processes=N --process=I

(I = 0, 1, ...; HOST:PORT of process 0), or with --coordinator=auto under Slurm and its like.
"""

from pathlib import Path

from know_jax import forgetting
from know_jax.runs import cli
from know_jax.system import processes

cli.define_workdir()
cli.define_processes()
_ON_METRICS = cli.define_on_metrics()
_CONFIG = cli.define_config(Path(__file__).parent.parent / 'configs' / 'forget_glyphs.py')


def main() -> None:
  workdir = cli.workdir()
  record = forgetting.run(_CONFIG.value, workdir, on_metrics=_ON_METRICS.value)
  if not processes.is_first():
    return
  score = record['score']
  print(f'{"stage":>5} {"examples":>9} {f"test {score}":>14} {"test loss":>10} {"seconds":>8}')
  for stage in record['stages']:
    print(
      f'{stage["stage"]:>5} {stage["examples"]:>9} {stage[f"test_{score}"]:>14.2%} '
      f'{stage["test_loss"]:>10.4f} {stage["train_seconds"]:>8.1f}'
    )
  print(f'{record["parameters"]:,} parameters; {len(record["stages"])} stages in {workdir}')


if __name__ == '__main__':
  cli.run(main)
