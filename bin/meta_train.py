"""Trains KNOWN on a meta-dataset.

    python bin/meta_train.py --data=D --workdir=W --config=configs/meta_train.py

Writes W/known.safetensors, which `know_jax.load_known` and bin/nowcast.py --known read. The same
command runs on after a kill.
"""

from pathlib import Path

from absl import flags

from know_jax.meta import meta_training
from know_jax.runs import cli

cli.define_workdir()
_CONFIG = cli.define_config(Path(__file__).parent.parent / 'configs' / 'meta_train.py')
_ON_METRICS = cli.define_on_metrics()
_DATA = flags.DEFINE_string(
  'data', None, 'Output folder of bin/collect.py, or one of .mat files.', required=True
)


def main() -> None:
  workdir = cli.workdir()
  record = meta_training.run(_CONFIG.value, _DATA.value, workdir, on_metrics=_ON_METRICS.value)
  print(meta_training.report(record))
  print(f'weights and card: {workdir / "known.safetensors"}')


if __name__ == '__main__':
  cli.run(main)
