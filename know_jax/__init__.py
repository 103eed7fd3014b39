"""know_jax: predict the weights that more data would have given, from how a network forgets.

    import know_jax

    weights = know_jax.predict(params_history)  # oldest first: five pytrees of Flax parameters

See `predict` for the whole contract.
"""

import gc as _gc

# What JAX and Flax make while they are imported stays: to search it for garbage, again and again,
# takes a tenth of the time.
_collects = _gc.isenabled()
_gc.disable()
try:
  from know_jax.errors import UserError
  from know_jax.nowcast.api import PREDICTORS, forecast, predict
  from know_jax.predictors.base import Elementwise, Linear, WholeLeaf
  from know_jax.predictors.controls import history_free
  from know_jax.predictors.known import KNOWN
  from know_jax.predictors.parameters import load_known
  from know_jax.predictors.registry import register_predictor
  from know_jax.recalibration import recalibrate
  from know_jax.recommendation import Recommendation, Start, recommend
  from know_jax.system.compiled import keep_compiled
  from know_jax.trajectory import Trajectory
  from know_jax.user_loop import forget, nested_subsets
  from know_jax.version import __version__
finally:
  if _collects:
    _gc.enable()

__all__ = [
  'KNOWN',
  'PREDICTORS',
  'Elementwise',
  'Linear',
  'Recommendation',
  'Start',
  'Trajectory',
  'UserError',
  'WholeLeaf',
  '__version__',
  'forecast',
  'forget',
  'history_free',
  'keep_compiled',
  'load_known',
  'nested_subsets',
  'predict',
  'recalibrate',
  'recommend',
  'register_predictor',
]
