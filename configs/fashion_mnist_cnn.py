"""Forgetting on Fashion-MNIST with a plain CNN.

Command:   python bin/forget.py --workdir=W --config=configs/fashion_mnist_cnn.py
Then:      python bin/nowcast.py --workdir=W --steps 3
           python bin/transfer.py --workdir=W --config=configs/transfer_mnist.py
Hardware:  2 CPU cores, 7 minutes beside other work
Result:    test accuracy 89.4 % (all data), 89.8, 89.7, 89.6, 89.4 % (1/16)
Paper:     section 3 (S = 5 stages, r = 1/2, Adam 1e-3, cosine decay, batch 128)
"""

from ml_collections import ConfigDict

from know_jax import forgetting


def get_config() -> ConfigDict:
  config = forgetting.default_config()
  config.dataset = 'fashion_mnist'
  config.model = 'cnn'
  config.stages = 5
  config.rate = 0.5
  config.width = 16
  config.batch_size = 128
  config.epochs = 8
  return config
