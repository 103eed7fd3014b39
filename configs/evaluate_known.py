"""The retrodiction benchmark of the shipped weights, on three splits.

Command:   python bin/evaluate_known.py --data=D --workdir=W --config=configs/evaluate_known.py
Hardware:  2 CPU cores, about an hour and a half
Result:    know_jax/weights/known.md
Paper:     section 4.1; the paper has no such test
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from know_jax.meta import evaluation

HERE = Path(__file__).parent


def get_config() -> ConfigDict:
  config = evaluation.default_config()
  config.known_leaf = runpy.run_path(str(HERE / 'meta_train.py'))['get_config']()
  config.known = runpy.run_path(str(HERE / 'meta_train_scaled.py'))['get_config']()
  config.known_raw = runpy.run_path(str(HERE / 'meta_train_paper.py'))['get_config']()
  return config
