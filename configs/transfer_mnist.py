"""Transfer to MNIST with 10 labels a class.

Command:   python bin/transfer.py --workdir=W --config=configs/transfer_mnist.py
Hardware:  2 CPU cores, 6 minutes for 20 arms x 5 seeds
Result:    from configs/fashion_mnist_cnn.py: scratch 78.6 %, naive 79.5 %, known_leaf x2 80.0 %,
           shrink x4 81.3 %
Paper:     section 4.2 (new head, warm-up of head and BatchNorm at 1e-3, then all, cosine from 4e-4)
"""

from ml_collections import ConfigDict

from know_jax import transfer


def get_config() -> ConfigDict:
  config = transfer.default_config()
  config.dataset = 'mnist'
  config.labels_per_class = 10
  config.seeds = 5
  config.batch_size = 50
  config.warmup_epochs = 10
  config.epochs = 100
  return config
