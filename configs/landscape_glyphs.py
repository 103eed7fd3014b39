"""The accuracy landscape around a forgetting run on the glyphs.

Command:   python bin/landscape.py --workdir=W --config=configs/landscape_glyphs.py
After:     python bin/forget.py --workdir=W --config=configs/forget_glyphs.py
Hardware:  2 CPU cores, half a minute
Paper:     figure 3 (principal components of the stages and noisy neighbours, accuracy surface)
"""

from ml_collections import ConfigDict

from know_jax import landscape


def get_config() -> ConfigDict:
  config = landscape.default_config()
  config.predictors = ('known_leaf', 'task_vector', 'log_fit', 'shrink')
  config.steps = 3
  config.grid = (25, 25)
  return config
