"""Rate, reset or trajectory? The authors' ResNet18 and networks in a regime like theirs, cut short.

Command:   python bin/regime.py --workdir=W --config=configs/regime.py
Then:      python bin/regime.py --workdir=W --report=docs/results/resnet18.md
Hardware:  one fast GPU; bfloat16
Paper:     section 4.2 and table 1, with a quarter of both training sets, and epochs cut from 200
           and 10 + 100 as the fields say: no reproduction of any number there
"""

from ml_collections import ConfigDict

from know_jax.study import regime


def get_config() -> ConfigDict:
  return regime.default_config()
