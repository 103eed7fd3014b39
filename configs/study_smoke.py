"""The whole transfer study, shrunk: digits 0-4 to digits 5-9 with 8 labels a class.

Command:   python bin/study.py --workdir=W --config=configs/study_smoke.py
Then:      python bin/study.py --workdir=W --report=W/report.md
Hardware:  2 CPU cores, a minute
Paper:     section 4.2, tables 1, 6 and 7, on a task small enough for any machine; no evidence
"""

from ml_collections import ConfigDict

from know_jax.study import design


def get_config() -> ConfigDict:
  config = design.default_config()
  config.source.classes = (0, 1, 2, 3, 4)
  config.source.model = 'cnn_bn'
  config.source.width = 4
  config.source.stratified = True
  config.source.batch_size = 20
  config.source.epochs = 10
  config.source.lr = 3e-3
  config.transfer.classes = (5, 6, 7, 8, 9)
  config.transfer.labels_per_class = 8
  config.transfer.batch_size = 20
  config.transfer.warmup_epochs = 4
  config.transfer.epochs = 12
  config.transfer.lr = 2e-3
  config.source_seeds = 2
  config.transfer_seeds = 2
  config.curve_epochs = (0, 4, 12)
  config.ablations = (
    {'group': 'history', 'predictor': 'log_fit', 'history': 3, 'steps': (1,)},
    {'group': 'rate', 'predictor': 'task_vector', 'rate': 0.6, 'steps': (1,)},
    {'group': 'BatchNorm', 'predictor': 'known_leaf', 'batch_norm': 'recalibrate', 'steps': (1,)},
    {'group': 'kinds', 'predictor': 'known_leaf', 'kinds': ('bias',), 'steps': (1,)},
  )
  return config
