"""The meta-dataset of the shipped KNOWN: six families on CIFAR-10, MNIST and Fashion-MNIST.

Command:   python bin/collect.py --output=D --config=configs/collect.py
Hardware:  2 CPU cores, one worker pinned to each: 86 minutes beside other work
Result:    126 runs, none diverged; test accuracy fell in 67 % of stages
Paper:     section 4.1, shrunk: parts of the training sets, small widths, 28 x 28 images
"""

from ml_collections import ConfigDict

from know_jax.meta import collect


def get_config() -> ConfigDict:
  config = collect.default_config()
  config.runs = 126
  config.families = ('cnn', 'resnet_small', 'densenet', 'shufflenetv2', 'mobilenetv2', 'vit')
  config.datasets = ('fashion_mnist', 'cifar10', 'mnist')
  config.image_size = (28, 28)
  config.train_examples = (2500, 6000)
  config.pretrain_steps = (1200, 2000)
  config.epochs = (4, 20)
  config.max_steps = 1500
  config.schedules = ('cosine',)
  return config
