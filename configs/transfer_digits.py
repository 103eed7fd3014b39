"""Transfer to scikit-learn's embedded digits, classes 5-9, with 16 labels a class: the demo.

Command:   python bin/transfer.py --config=configs/transfer_digits.py
Hardware:  2 CPU cores, 1 minute for 26 arms x 5 seeds
Result:    naive 85.9 %, scratch 85.6 %; no predictor beyond the spread of the seeds
Paper:     section 4.2 (new head, warm-up, fine-tuning), shrunk
"""

from ml_collections import ConfigDict

from know_jax import transfer


def get_config() -> ConfigDict:
  config = transfer.default_config()
  config.dataset = 'digits'
  config.classes = (5, 6, 7, 8, 9)
  config.labels_per_class = 16
  config.seeds = 5
  config.batch_size = 16
  config.warmup_epochs = 10
  config.epochs = 40
  return config
