"""The authors' forgetting run: ResNet18 on CIFAR-100.

Command:   python bin/forget.py --workdir=W --config=configs/cifar100_resnet18.py
Hardware:  a GPU; not run yet
Paper:     section 4.2 and table 1 (200 epochs a stage, Adam 1e-3, cosine, batch 128, r = 1/2)
"""

from ml_collections import ConfigDict

from know_jax import forgetting


def get_config() -> ConfigDict:
  config = forgetting.default_config()
  config.dataset = 'cifar100'
  config.model = 'resnet18'
  config.stages = 5
  config.rate = 0.5
  config.batch_size = 128
  config.epochs = 200
  config.augmentation = {'rotation': 10.0, 'shift': 0.15, 'zoom': 0.3, 'flip': False}
  return config
