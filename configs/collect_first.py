"""The meta-dataset of the first shipped KNOWN: plain CNNs on digits, MNIST and Fashion-MNIST.

Command:   python bin/collect.py --output=D --config=configs/collect_first.py
Hardware:  2 CPU cores, 16 minutes beside other work
Result:    48 runs, none diverged; test accuracy fell in 40 % of stages
Paper:     section 4.1, shrunk: parts of the training sets, few epochs
"""

from ml_collections import ConfigDict

from know_jax.meta import collect


def get_config() -> ConfigDict:
  config = collect.default_config()
  config.runs = 48
  config.families = ('cnn',)
  config.datasets = ('digits', 'mnist', 'fashion_mnist')
  config.widths = {'cnn': (6, 8)}
  config.train_examples = (1500, 5000)
  config.max_steps = 3000
  return config
