"""What a forgetting step consists of, on three small networks and data sets.

Command:   python bin/branches.py --workdir=W --config=configs/branches.py
Also:      --config.dataset=fashion_mnist and --config.dataset=cifar10, in the same workdir
Then:      python bin/branches.py --workdir=W --report=docs/results/branches.md
Hardware:  2 CPU cores, ten to twenty minutes a data set
Paper:     the hypothesis of sections 1 and 3, that reversed forgetting points to more data
"""

from ml_collections import ConfigDict

from know_jax.study import branches


def get_config() -> ConfigDict:
  return branches.default_config()
