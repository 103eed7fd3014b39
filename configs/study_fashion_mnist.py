"""Does predicting help? Fashion-MNIST to MNIST with 10 labels a class, a small ResNet.

Command:   python bin/study.py --workdir=W --config=configs/study_fashion_mnist.py
Also:      --config=configs/study_fashion_mnist.py:cnn, with a workdir of its own
Then:      python bin/study.py --workdir=W --report=docs/results/transfer_fashion_mnist.md
Hardware:  2 CPU cores; start the command twice with the same workdir to use both
Paper:     section 4.2, tables 1, 6 and 7, on smaller networks and data: 3,200 training examples,
           60 epochs, then 20 a stage; fine-tuning for 40 epochs; r = 1/2, S = 5

Epochs and augmentation of the source were chosen so that its loss is flat before stage 1 and its
test accuracy falls from stage to stage: on source seed 99, which is in no study, and without
looking at any transfer.
"""

from ml_collections import ConfigDict

from know_jax.study import design
from know_jax.study.arms import standard_ablations


def get_config(model: str = 'resnet_small') -> ConfigDict:
  config = design.default_config()
  config.source.dataset = 'fashion_mnist'
  config.source.train_examples = 3200
  config.source.stratified = True
  config.source.model = model
  config.source.width = 8
  config.source.batch_size = 32
  config.source.epochs = 60
  config.source.stage_epochs = 20
  config.source.lr = 2e-3
  config.source.augmentation = {'rotation': 5.0, 'shift': 0.05, 'zoom': 0.1, 'flip': False}
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
  return config if model == 'resnet_small' else shortened(config)


def shortened(config: ConfigDict) -> ConfigDict:
  """Leaves out what is varied or tried once only, here with the small ResNet, to save hours."""
  config.arms = tuple(
    arm for arm in config.arms
    if arm not in ('linear_fit', 'exp_fit', 'magmax', 'consensus_ta', 'tsv')
  )  # fmt: skip
  config.ablations = tuple(a for a in config.ablations if a['group'] not in ('history', 'rate'))
  return config
