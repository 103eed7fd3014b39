"""Does predicting help? Fashion-MNIST to MNIST with 10 labels a class, a small ResNet.

Command:   python bin/study.py --workdir=W --config=configs/study_fashion_mnist.py
Also:      --config=configs/study_fashion_mnist.py:cnn, with a workdir of its own
Then:      python bin/study.py --workdir=W --report=docs/results/transfer.md
Hardware:  2 CPU cores; start the command twice with the same workdir to use both
Paper:     section 4.2, tables 1, 6 and 7, on smaller networks and data: 6,400 training examples,
           20 epochs, fine-tuning for 40 epochs; r = 1/2, S = 5
"""

from ml_collections import ConfigDict

from know_jax.study import design
from know_jax.study.arms import standard_ablations


def get_config(model: str = 'resnet_small') -> ConfigDict:
  config = design.default_config()
  config.source.dataset = 'fashion_mnist'
  config.source.train_examples = 6400
  config.source.model = model
  config.source.width = 8
  config.source.batch_size = 64
  config.source.epochs = 20
  config.source.lr = 2e-3
  config.source.augmentation = {'rotation': 10.0, 'shift': 0.15, 'zoom': 0.3, 'flip': False}
  config.transfer.dataset = 'mnist'
  config.transfer.labels_per_class = 10
  config.transfer.batch_size = 20
  config.transfer.warmup_epochs = 10
  config.transfer.warmup_lr = 3e-3
  config.transfer.epochs = 40
  config.transfer.lr = 2e-3
  config.source_seeds = 5
  config.transfer_seeds = 3
  config.curve_epochs = (0, 10, 40)
  config.ablations = standard_ablations(batch_norm=model != 'cnn')
  return config
