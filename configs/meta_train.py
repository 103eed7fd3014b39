"""The shipped `known_leaf`: KNOWN conditioned on the leaf.

Command:   python bin/meta_train.py --data=D --workdir=W --config=configs/meta_train.py
Hardware:  1 CPU core, 2 minutes
Result:    error on validation runs: know_jax/weights/known.md
Paper:     section 4.1, with another network and loss
"""

from ml_collections import ConfigDict

from know_jax.meta import meta_training


def get_config() -> ConfigDict:
  config = meta_training.default_config()
  config.lr = 2e-3
  config.schedule = 'cosine'
  config.weight_decay = 10.0
  # Twelve, two and three of the seventeen runs that each family has on each data set.
  config.validation_share, config.test_share = 2 / 17, 3 / 17
  config.weights_per_run = 8192
  config.steps = 1000
  config.validate_every = 25
  config.patience = 20
  return config
