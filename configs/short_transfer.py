"""Short transfers from the runs of the shipped meta-dataset.

Command:   python bin/short_transfer.py --data=D --workdir=W --config=configs/short_transfer.py
Hardware:  1 CPU core, 20 minutes
Result:    docs/results/known_log.md
Paper:     section 4.2, shrunk: 60 steps on 8 labels a class
"""

from ml_collections import ConfigDict

from know_jax.meta import short_transfer


def get_config() -> ConfigDict:
  return short_transfer.default_config()
