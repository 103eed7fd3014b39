"""Predicts the weights that more data would have given, from a finished forgetting run.

    python bin/nowcast.py --workdir=W --steps 3 --predictor=known,shrink,task_vector

Every predicted weight becomes a checkpoint, predictions/<predictor>/<step> in the workdir. Without
--workdir, ./workdir is used, as by bin/forget.py.
"""

from absl import flags

from know_jax import cli, forgetting, prediction
from know_jax.batch_norm import BATCH_NORM_POLICIES
from know_jax.nowcast import PREDICTORS

cli.define_workdir()
_STEPS = flags.DEFINE_integer('steps', 3, 'How many stages to predict ahead.', lower_bound=1)
_PREDICTOR = flags.DEFINE_list(
  'predictor', 'known', f"Predictors, or 'all': {', '.join(PREDICTORS)}."
)
_BATCH_NORM = flags.DEFINE_string(
  'batch_norm', 'keep', f'BatchNorm after prediction: {", ".join(BATCH_NORM_POLICIES)}.'
)
_BATCHES = flags.DEFINE_integer(
  'recalibration_batches', 10, 'Batches of 128 images for recalibrate.', lower_bound=1
)
_KNOWN = flags.DEFINE_string(
  'known', None, 'Parameters of KNOWN: a safetensors file or a folder of .h5 files; else shipped.'
)


def main() -> None:
  workdir = cli.workdir()
  trajectory, _ = forgetting.load_trajectory(workdir)
  print(prediction.kinds_report(trajectory))
  found = prediction.run(
    workdir,
    predictors=list(PREDICTORS) if _PREDICTOR.value == ['all'] else _PREDICTOR.value,
    steps=_STEPS.value,
    batch_norm=_BATCH_NORM.value,
    recalibration_batches=_BATCHES.value,
    known=_KNOWN.value,
  )
  print(f'\nBatchNorm after prediction: {_BATCH_NORM.value}\n')
  print(prediction.report(found))
  print(f'\ncheckpoints and picture (nowcast.png) in {workdir / "predictions"}')


if __name__ == '__main__':
  cli.run(main)
