"""Collects a meta-dataset of randomised forgetting runs.

    python bin/collect.py --output=D --config=configs/collect.py

The same command, also in several processes or on several hosts that share the folder, runs on
where runs are missing. --dry_run lists the runs.
"""

from pathlib import Path

from absl import flags

from know_jax.meta import collect
from know_jax.runs import cli

_CONFIG = cli.define_config(Path(__file__).parent.parent / 'configs' / 'collect.py')
_OUTPUT = flags.DEFINE_string('output', None, 'Folder of the meta-dataset.', required=True)
_WORKERS, _SCHEDULER = cli.define_workers()
_DRY_RUN = cli.define_dry_run('Only list the runs.')


def main() -> None:
  print(
    collect.run(
      _CONFIG.value, _OUTPUT.value, dry_run=_DRY_RUN.value, workers=_WORKERS.value,
      scheduler=_SCHEDULER.value,
    )
  )  # fmt: skip


if __name__ == '__main__':
  cli.run(main)
