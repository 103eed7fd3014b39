"""A stand-in for table 2 on two cores: part of TinyImageNet to part of CIFAR-100, a small PVTv2.

Command:   python bin/study.py --workdir=W --config=configs/table2_small.py
Also:      --config=configs/table2_small.py:FOLDER adds the authors' own KNOWN from a folder
Then:      python bin/study.py --workdir=W --report=docs/results/table2.md
Hardware:  1 CPU core, about 3 minutes a source seed
Paper:     section 4.3 and table 2 (ImageNet to five data sets, PVTv2, r = 1/3, x3 and x9), on 6,075
           images of 50 classes at 32 pixels, 10 epochs a stage, 500 labelled images, 8 epochs: no
           reproduction of any number there

Sizes were chosen by time alone. Rates are Adam's usual one, and for naive transfer three in steps
of 3, from which validation images of the target choose.
"""

from ml_collections import ConfigDict

from know_jax.study import design


def get_config(official: str = '') -> ConfigDict:
  config = design.default_config()
  config.source.dataset = 'tinyimagenet100'
  config.source.test_split = 'validation'
  config.source.classes = tuple(range(0, 100, 2))
  config.source.image_size = (32, 32)
  config.source.train_examples = 6075
  config.source.stratified = True
  config.source.model = 'pvt_v2'
  config.source.model_options = (
    'embed_dims=(8, 16, 40, 64), depths=(1, 1, 1, 1), mlp_ratios=(4, 4, 4, 4), '
    'sr_ratios=(4, 2, 1, 1)'
  )
  config.source.stages = 5
  config.source.rate = 1 / 3
  config.source.batch_size = 25
  config.source.epochs = 10
  config.source.lr = 1e-3
  config.source.augmentation = {'rotation': 0.0, 'shift': 0.1, 'zoom': 0.0, 'flip': True}
  config.transfer.dataset = 'cifar100'
  config.transfer.classes = tuple(range(0, 100, 5))
  config.transfer.labels_per_class = 25
  config.transfer.validation_examples = 1000
  config.transfer.batch_size = 25
  config.transfer.warmup_epochs = 2
  config.transfer.epochs = 8
  config.transfer.lr = 1e-3
  config.transfer.augmentation = {'rotation': 0.0, 'shift': 0.1, 'zoom': 0.0, 'flip': True}
  config.source_seeds = 5
  config.transfer_seeds = 1
  config.steps = 2
  config.arms = arms(official)
  return config


def arms(official: str = '') -> tuple:
  """What tables 2 to 5 compare, and the controls; x3 and x9."""

  def both(predictor: str, name: str = '', **options) -> tuple:
    """A predictor, and the newest weights shrunk or grown to the norms of its leaves."""
    name = name or predictor
    entry = {'predictor': predictor, 'name': name, **options}
    return entry, {**entry, 'name': f'naive at the norms of {name}', 'part': 'norms'}

  return (
    'scratch',
    'persistence',
    *({'predictor': 'persistence', 'lr_scale': scale} for scale in (0.3, 3.0)),
    *(both('known', 'known_official', theta=official) if official else ()),
    *both('known'),
    *both('known_leaf'),
    'task_vector',
    'log_fit',
    'tsv',
    {'predictor': 'magmax', 'steps': (2,)},
  )
