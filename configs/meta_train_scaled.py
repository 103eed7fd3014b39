"""The shipped `known`: the paper's network on weights in units of their leaf.

Command:   python bin/meta_train.py --data=D --workdir=W --config=configs/meta_train_scaled.py
Hardware:  1 CPU core, 3 minutes
Result:    error on validation runs: know_jax/weights/known.md
Paper:     section 4.1, with other inputs and loss
"""

from ml_collections import ConfigDict

from know_jax.meta import meta_training


def get_config() -> ConfigDict:
  config = meta_training.default_config()
  config.architecture = 'scaled'
  config.schedule = 'cosine'
  # Twelve, two and three of the seventeen runs that each family has on each data set.
  config.validation_share, config.test_share = 2 / 17, 3 / 17
  config.weights_per_run = 8192
  config.batch_size = 2048
  config.steps = 1500
  config.validate_every = 50
  config.patience = 10
  return config
