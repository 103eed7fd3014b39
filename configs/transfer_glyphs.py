"""Transfer to ten other glyphs, with 16 labels a class: the demo.

Command:   python bin/transfer.py --config=configs/transfer_glyphs.py
Hardware:  2 CPU cores, 1 minute for 20 arms x 5 seeds
Result:
Paper:     section 4.2 (new head, warm-up, fine-tuning), shrunk

How the task was chosen stands in configs/forget_glyphs.py.
"""

from ml_collections import ConfigDict

from know_jax import transfer


def get_config() -> ConfigDict:
  config = transfer.default_config()
  config.dataset = 'new_glyphs'
  config.labels_per_class = 16
  config.seeds = 5
  config.batch_size = 20
  config.warmup_epochs = 10
  config.warmup_lr = 3e-3
  config.epochs = 30
  config.lr = 2e-3
  return config
