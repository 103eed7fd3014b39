"""The meta-dataset of the shipped KNOWN: six families on CIFAR-10, MNIST and Fashion-MNIST.

Command:   python bin/collect.py --output=D --config=configs/collect.py
Hardware:  2 CPU cores, one worker pinned to each: 3 hours
Result:    306 runs; their accuracies: know_jax/weights/known.md
Paper:     section 4.1, shrunk: parts of the training sets, networks of at most 300,000 parameters
"""

from ml_collections import ConfigDict

from know_jax.meta import collect


def get_config() -> ConfigDict:
  config = collect.default_config()
  config.runs = 306
  config.families = ('cnn', 'resnet_small', 'densenet', 'shufflenetv2', 'mobilenetv2', 'vit')
  config.datasets = ('fashion_mnist', 'cifar10', 'mnist')
  config.widths = {
    'cnn': (8, 12, 16, 30),
    'resnet_small': (8, 12, 16, 30),
    'densenet': (8, 12, 16),
    'shufflenetv2': (8, 16, 32),
    'mobilenetv2': (4, 8, 12),
    'vit': (32, 64, 96),
  }
  config.train_examples = (1500, 14000)
  config.batch_size = (8, 64)
  config.pretrain_steps = (1500, 3000)
  config.epochs = (4, 20)
  config.max_steps = 2000
  config.test_split = 'test[:2000]'
  config.schedules = ('cosine',)
  return config
