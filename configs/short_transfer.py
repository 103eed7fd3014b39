"""Short transfers from the runs of the shipped meta-dataset.

Command:   python bin/short_transfer.py --data=D --workdir=W --config=configs/short_transfer.py
Hardware:  2 CPU cores
Paper:     section 4.2, shrunk: 60 steps on 8 labels a class
"""

from ml_collections import ConfigDict

from know_jax.meta import short_transfer


def get_config() -> ConfigDict:
  return short_transfer.default_config()
