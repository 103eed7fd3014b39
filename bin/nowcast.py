"""Predicts the weights that more data would have given, from a finished forgetting run.

    python bin/nowcast.py --workdir=W --steps 3 --predictor=known,shrink,task_vector

Every predicted weight becomes a checkpoint, predictions/<predictor>/<step> in the workdir. Without
--workdir, ./workdir is used, as by bin/forget.py. Or from files, however large, oldest first:

    python bin/nowcast.py --history=OLDEST,...,NEWEST --output=DIR

each in a format of know_jax.io.formats (safetensors, Orbax, ...); or a folder that holds them, as
checkpoint-500, checkpoint-1000, ... Then DIR/<predictor>/<step> is the newest checkpoint with its
weights replaced; the same command resumes what a kill left.
"""

from absl import flags

from know_jax import kinds as kinds_
from know_jax.io import formats
from know_jax.io.files import local_path
from know_jax.io.sealed import read_sealed
from know_jax.nowcast import file_job, from_files, lora
from know_jax.nowcast.api import PREDICTORS
from know_jax.nowcast.health import ON_BAD
from know_jax.recalibration import BATCH_NORM_POLICIES
from know_jax.runs import cli
from know_jax.runs.workdir import load_trajectory

cli.define_workdir()
_STEPS = flags.DEFINE_integer('steps', 3, 'How many stages to predict ahead.', lower_bound=1)
_PREDICTOR = flags.DEFINE_list(
  'predictor', 'known', f"Predictors, package.module:object, or 'all': {', '.join(PREDICTORS)}."
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
_ON_BAD = flags.DEFINE_enum('on_bad', 'keep', list(ON_BAD), 'Leaves with a bad prediction.')
_HISTORY = flags.DEFINE_list('history', None, 'Files with the stages, oldest first; or one folder.')
flags.DEFINE_string('output', None, 'With --history: folder for the predictions.')
_RATE = flags.DEFINE_float('rate', 0.5, 'With --history: sampling rate of the stages.')
_KINDS = flags.DEFINE_list('kinds', [], "'regex=kind' where names of leaves do not tell it.")
_MEMORY = flags.DEFINE_integer(
  'memory', 1024, 'With --history: MiB for what is taken whole (tsv).', lower_bound=1
)
_ONLY = flags.DEFINE_string('only', None, 'With --history: regex of the leaves to predict.')
_SKIP = flags.DEFINE_string('skip', None, 'With --history: regex of leaves to keep as they are.')
_STACKED = flags.DEFINE_string(
  'stacked', None, "With --history: regex of leaves with layers on their first axis: 'layers/'."
)
_OPTION = flags.DEFINE_multi_string(
  'option', [], 'With --history: option of a predictor, as lam=0.3; may be given several times.'
)
_FORMAT = flags.DEFINE_string(
  'format', None, "With --history: 'safetensors' to convert to; else that of the newest stage."
)
_DTYPE = flags.DEFINE_string(
  'dtype', None, 'With --history: float32, bfloat16 or float16 for what is written; else as it is.'
)
_READERS = flags.DEFINE_list(
  'readers', [], 'With --history: formats of your own, as package.module with detect and open.'
)
_LORA = flags.DEFINE_enum(
  'lora', 'apart', list(lora.CHOICES), 'With --history: merged to predict the products of A and B.'
)
_DRY_RUN = cli.define_dry_run('With --history: print what would be done, and write nothing.')
_OF_FILES = (
  'output',
  'rate',
  'memory',
  'only',
  'skip',
  'stacked',
  'option',
  'format',
  'dtype',
  'readers',
)


def main() -> None:
  predictors = list(PREDICTORS) if _PREDICTOR.value == ['all'] else _PREDICTOR.value
  if _HISTORY.value is not None:
    cli.refuse('workdir', 'batch_norm', 'recalibration_batches', because='--history is given')
    output = local_path(cli.require('output', because='--history is given'), '--output')
    for reader in _READERS.value:
      formats.register(reader)
    job = file_job.prepare(
      _HISTORY.value, predictors=predictors, steps=_STEPS.value, rate=_RATE.value,
      kinds=kinds_.parse_kinds(_KINDS.value), known=_KNOWN.value, memory=_MEMORY.value << 20,
      on_bad=_ON_BAD.value, options=file_job.parse_options(_OPTION.value), only=_ONLY.value,
      skip=_SKIP.value, stacked=_STACKED.value, format=_FORMAT.value, dtype=_DTYPE.value,
      lora=_LORA.value,
    )  # fmt: skip
    last = len(job.stages) - 1
    for i, stage in enumerate(job.stages):
      print(f'stage {i}{" (the oldest)" * (i == 0)}{" (the newest)" * (i == last)}: {stage.path}')
    print(kinds_.kinds_table(job.leaves, job.kinds))
    if _DRY_RUN.value:
      print(file_job.plan(job, output))
      return
    for folder in from_files.write(job, output):
      if lost := lora.report(read_sealed(folder / from_files.CARD, 'a card')):
        print(f'{folder}: {lost}')
    return
  # What a run needs, its task and network, takes as long to import as all else.
  from know_jax.nowcast import from_run

  cli.refuse(*_OF_FILES, 'dry_run', because='no --history is given')
  workdir = cli.workdir()
  trajectory, _ = load_trajectory(workdir)
  # None: the rule of the run's task.
  kinds = kinds_.parse_kinds(_KINDS.value) if _KINDS.value else None
  print(from_run.kinds_report(trajectory, kinds))
  result = from_run.run(
    workdir, predictors=predictors, steps=_STEPS.value, batch_norm=_BATCH_NORM.value,
    recalibration_batches=_BATCHES.value, known=_KNOWN.value, on_bad=_ON_BAD.value,
    kinds=kinds,
  )  # fmt: skip
  print(f'\nBatchNorm after prediction: {_BATCH_NORM.value}\n')
  print(from_run.report(result))
  print(f'\ncheckpoints and picture (nowcast.png) in {workdir / "predictions"}')


if __name__ == '__main__':
  cli.run(main)
