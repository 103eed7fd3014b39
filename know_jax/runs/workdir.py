"""What a forgetting run leaves in its workdir: a record, and a checkpoint for each stage."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from know_jax.errors import UserError
from know_jax.io import checkpoints
from know_jax.runs.record import RunRecord
from know_jax.trajectory import Trajectory

KIND = 'forget'
"""What `record.json` of a forgetting run says it is."""


def stage_path(workdir: str | Path, stage: int) -> Path:
  """The checkpoint of Theta^stage: 0 is trained on all data."""
  return Path(workdir) / 'stages' / str(stage)


def restore_stage(workdir: str | Path, stage: int) -> Any:
  """The variables of Theta^stage, NumPy arrays.

  Raises:
    UserError: the checkpoint is missing, damaged or foreign.
  """
  return checkpoints.restore(stage_path(workdir, stage))


def stage_digests(workdir: str | Path, count: int) -> list[str]:
  """What identifies the weights of the first stages, that of Theta^0 first.

  Raises:
    UserError: a checkpoint is missing or foreign.
  """
  return [checkpoints.weights_digest(stage_path(workdir, stage)) for stage in range(count)]


def check_stages(workdir: str | Path, predictions: Mapping[Path, Mapping[str, Any]]) -> None:
  """Checks that predictions in a workdir, path -> metadata, were made from the stages there.

  Raises:
    UserError: one was made from others.
  """
  # Older predictions do not tell.
  made_from = {path: about.get('stages', []) for path, about in predictions.items()}
  digests = stage_digests(workdir, max(map(len, made_from.values()), default=0))
  for path, stages in made_from.items():
    if stages != digests[: len(stages)]:
      raise UserError(
        f'{path} was predicted from other stages than those of {workdir}; expected predictions of '
        'this run: make them with bin/nowcast.py, or remove the folder.'
      )


def load_trajectory(workdir: str | Path) -> tuple[Trajectory, RunRecord]:
  """The weights of all stages of a finished run, oldest (smallest subset) first, and its record.

  Raises:
    UserError: the workdir holds no finished forgetting run, or a checkpoint is damaged.
  """
  record = finished_record(workdir)
  stages = [restore_stage(workdir, i) for i in range(record['config']['stages'] - 1, -1, -1)]
  return Trajectory.from_sequence(stages), record


def finished_record(workdir: str | Path) -> RunRecord:
  """The record of a finished run.

  Raises:
    UserError: the workdir holds no finished forgetting run.
  """
  if not (Path(workdir).expanduser() / 'record.json').exists():
    raise UserError(f'{workdir}: no forgetting run is here; make one with bin/forget.py.')
  record = RunRecord.read(workdir, KIND)
  expected, done = record['config']['stages'], len(record.get('stages', []))
  if done < expected:
    raise UserError(
      f'{workdir}: {done} of {expected} stages are done; run bin/forget.py with the same flags to '
      'finish it.'
    )
  return record
