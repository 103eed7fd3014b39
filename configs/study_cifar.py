"""Does predicting help? CIFAR-100 to CIFAR-10 with 20 labels a class, a small ResNet.

Command:   python bin/study.py --workdir=W --config=configs/study_cifar.py
Also:      --config=configs/study_cifar.py:cnn, with a workdir of its own
Then:      python bin/study.py --workdir=W --report=docs/results/transfer_cifar.md
Hardware:  2 CPU cores; start the command twice with the same workdir to use both
Paper:     section 4.2, tables 1, 6 and 7, on a smaller network and less data: 20 of the 100
           classes, 6,400 training examples, 40 epochs, then 20 a stage; fine-tuning for 30 epochs;
           r = 1/2, S = 5
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(model: str = 'resnet_small') -> ConfigDict:
  # Trained and fine-tuned as from Fashion-MNIST, but for the data and what they need.
  other = runpy.run_path(str(Path(__file__).with_name('study_fashion_mnist.py')))
  config = other['get_config'](model)
  config.source.dataset = 'cifar100'
  # With all 100 the smallest subset would have two examples of each.
  config.source.classes = tuple(range(0, 100, 5))
  config.source.train_examples = 6400
  config.source.epochs = 40
  config.transfer.dataset = 'cifar10'
  config.transfer.labels_per_class = 20
  config.transfer.batch_size = 40
  config.transfer.epochs = 30
  config.curve_epochs = (0, 10, 30)
  return other['shortened'](config)
