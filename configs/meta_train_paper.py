"""The paper's network and recipe: the `known_raw` of the benchmark, which is not shipped.

Command:   python bin/meta_train.py --data=D --workdir=W --config=configs/meta_train_paper.py
Hardware:  1 CPU core, 3 minutes
Result:    error on validation runs: know_jax/weights/known.md
Paper:     section 4.1
"""

from ml_collections import ConfigDict

from know_jax.meta import meta_training


def get_config() -> ConfigDict:
  config = meta_training.default_config()
  config.architecture = 'paper'
  # Twelve, two and three of the seventeen runs that each family has on each data set.
  config.validation_share, config.test_share = 2 / 17, 3 / 17
  config.weights_per_run = 8192
  config.batch_size = 2048
  config.steps = 1500
  config.validate_every = 100
  config.patience = 10
  return config
