"""The training of the first shipped KNOWN.

Command:   python bin/meta_train.py --data=D --workdir=W --config=configs/meta_train.py
Hardware:  2 CPU cores, 9 minutes beside other work
Result:    error / error of copying on test runs: 0.648 conv, 0.734 fc, 0.607 bias
Paper:     section 4.1 (L1 loss, Adam 1e-3, L1 penalty)
"""

from ml_collections import ConfigDict

from know_jax.meta import meta_training


def get_config() -> ConfigDict:
  config = meta_training.default_config()
  config.steps = 8000
  return config
