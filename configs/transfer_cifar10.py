"""The authors' transfer: to CIFAR-10 with all labels.

Command:   python bin/transfer.py --workdir=W --config=configs/transfer_cifar10.py
Hardware:  a GPU; not run yet
Paper:     section 4.2 and table 1 (10 epochs of head and BatchNorm at 1e-3, 100 of everything,
           cosine from 4e-4, 10 repetitions)
"""

from ml_collections import ConfigDict

from know_jax import transfer


def get_config() -> ConfigDict:
  config = transfer.default_config()
  config.dataset = 'cifar10'
  config.seeds = 10
  config.batch_size = 128
  config.warmup_epochs = 10
  config.epochs = 100
  config.augmentation = {'rotation': 10.0, 'shift': 0.15, 'zoom': 0.3, 'flip': False}
  return config
