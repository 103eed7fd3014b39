"""One transfer of a study, with its test accuracy noted after some epochs of fine-tuning."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from know_jax import training, transfer
from know_jax.training import Checkpoint, named_key


class _Pause(KeyboardInterrupt):
  """Stops `training.fit` as a signal would: it hands over a checkpoint, from which it goes on."""


def train_one(
  model: Any,
  variables: Any,
  data: training.DeviceData,
  subset: np.ndarray,
  test: training.DeviceData,
  config: Mapping[str, Any],
  seed: int,
  curve_epochs: Sequence[int],
) -> dict[str, Any]:
  """`transfer.train_one`, to the same bits, with a learning curve.

  Args:
    model: the network with the task's head.
    variables: where to start; None: a fresh network.
    data: the task's training set.
    subset: the labelled examples in it.
    test: the task's test set.
    config: the fields of `transfer.default_config`.
    seed: decides head, order and augmentation.
    curve_epochs: fine-tuning epochs to test after; 0 is after the warm-up.

  Returns:
    `accuracy`, `loss`, `seconds`, and `curve`: a pair (epoch, accuracy) for each of the epochs.

  Raises:
    DivergedError: the training diverged.
  """
  if not curve_epochs:
    return {**transfer.train_one(model, variables, data, subset, test, config, seed), 'curve': []}
  began = time.monotonic()
  fresh = jax.device_get(
    training.init_variables(model, named_key(seed, 'head'), data.images.shape[2:])
  )
  variables = fresh if variables is None else transfer.with_head(variables, fresh)
  curve = []
  for phase, (recipe, epochs, lr, schedule) in enumerate(transfer._phases(config, variables)):
    pauses = sorted({e for e in curve_epochs if e < epochs}) if phase else []
    if 0 in pauses:
      curve.append((0, training.evaluate(model, variables, test)['accuracy']))
    checkpoint = Checkpoint(training.create_state(variables, recipe))
    for end in [*(e for e in pauses if e), epochs]:
      stopped: list[Checkpoint] = []

      def stop(epoch: int, metrics: Any, end: int = end, epochs: int = epochs) -> None:
        del metrics
        if epoch == end < epochs:
          raise _Pause

      if not epochs:
        break
      try:
        state = training.fit(
          model,
          checkpoint,
          data,
          subset,
          recipe=recipe,
          epochs=epochs,
          batch_size=config['batch_size'],
          lr=lr,
          schedule=schedule,
          key=named_key(seed, 'train', phase),
          on_epoch=stop,
          save=stopped.append,
          save_every_seconds=math.inf,
        )
      except _Pause:
        (checkpoint,) = stopped
        tested = training.evaluate(model, checkpoint.state.variables, test)
        curve.append((end, tested['accuracy']))
      else:
        variables = state.variables
  metrics = training.evaluate(model, variables, test)
  curve += [(e, metrics['accuracy']) for e in {*curve_epochs} if e == config['epochs']]
  return {**metrics, 'seconds': time.monotonic() - began, 'curve': curve}
