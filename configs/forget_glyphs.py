"""Forgetting on generated glyphs, ten classes: the demo.

Command:   python bin/forget.py --config=configs/forget_glyphs.py
Hardware:  2 CPU cores, 15 seconds
Result:
Paper:     section 3 (S = 5 stages, r = 1/2), on a task small enough for any machine

The task (know_jax/data/glyphs.py), its rates and epochs were chosen so that test accuracy falls at
every stage by more than its noise and naive transfer beats training from scratch. The rate of the
stages was 1.5e-2 by that rule alone; after the whole table was seen it was lowered to the lowest
tried (2e-3, 5e-3, 1e-2, 1.5e-2) at which every fall exceeds the standard error of an accuracy, 0.6
points. That rule reads no predictor, but the table had been seen: read it as a demonstration.
"""

from ml_collections import ConfigDict

from know_jax import forgetting


def get_config() -> ConfigDict:
  config = forgetting.default_config()
  config.dataset = 'glyphs'
  config.model = 'cnn'
  config.width = 12
  config.stages = 5
  config.rate = 0.5
  config.stratified = True
  config.batch_size = 16
  config.epochs = 40
  config.lr = 2e-3
  config.stage_epochs = 30
  config.stage_lr = 1e-2
  config.augmentation = {'rotation': 5.0, 'shift': 0.05, 'zoom': 0.1, 'flip': False}
  return config
