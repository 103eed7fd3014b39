"""Does predicting help? The authors' setting: ResNet18, CIFAR-100 to CIFAR-10 with all labels.

Command:   python bin/study.py --workdir=W --config=configs/study_resnet18.py
Also:      --config=configs/study_resnet18.py:short for what half an hour on one fast GPU can hold
           --config.official=folder adds the authors' own KNOWN
Then:      python bin/study.py --workdir=W --report=W/transfer.md
Hardware:  a GPU; not run yet
Paper:     section 4.2 and table 1 (200 epochs a stage, Adam 1e-3, cosine, batch 128, r = 1/2,
           S = 5; 10 epochs of head and BatchNorm at 1e-3, 100 of everything from 4e-4, 10 times)

Computed in bfloat16 with float32 weights. One stage more than the paper's five, to measure how well
predictors retrodict.
`short` cuts: 1 source seed and 2 transfer seeds, 40 epochs of pre-training and 20 of each stage and
of fine-tuning, 2 of warm-up, and the rivals that cost most.
"""

from ml_collections import ConfigDict

from know_jax.study import design
from know_jax.study.arms import shrink_sweep

AUGMENTATION = {'rotation': 10.0, 'shift': 0.15, 'zoom': 0.3, 'flip': False}


def get_config(size: str = 'paper') -> ConfigDict:
  config = design.default_config()
  config.source.dataset = 'cifar100'
  config.source.model = 'resnet18'
  config.source.dtype = 'bfloat16'
  config.source.batch_size = 128
  config.source.epochs = 200
  config.source.lr = 1e-3
  config.source.augmentation = AUGMENTATION
  config.transfer.dataset = 'cifar10'
  config.transfer.batch_size = 128
  config.transfer.warmup_epochs = 10
  config.transfer.warmup_lr = 1e-3
  config.transfer.epochs = 100
  config.transfer.lr = 4e-4
  config.transfer.augmentation = AUGMENTATION
  config.source_seeds = 5
  config.transfer_seeds = 2
  if size == 'short':
    config.source.epochs = 40
    config.source.stage_epochs = 20
    config.transfer.warmup_epochs = 2
    config.transfer.epochs = 20
    config.source_seeds = 1
    # The most telling first: what a cut-off session leaves out comes last.
    config.arms = (
      'persistence', 'known_leaf', *shrink_sweep((0.2, 0.5, 0.7)), 'task_vector', 'log_fit',
      'known', 'extra', 'scratch',
    )  # fmt: skip
  return config
