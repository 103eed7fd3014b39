"""What lies beside predicted weights: the newest checkpoint's configs, tokenizers, and a card."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from know_jax import kinds as kinds_
from know_jax.io.files import replacing, write_atomic
from know_jax.nowcast import lora

README = 'README.md'

_STALE = re.compile(
  # Weights in other files, and the state of the training that led to the newest stage.
  r'\.(safetensors|bin|pt|pth|ckpt|h5|keras|msgpack|npz|onnx|gguf|pkl|pickle|index\.json)$'
  r'|^(optimizer|scheduler|scaler|rng_state|training_args|trainer_state|events\.out|latest$)'
  r'|^(README\.md|nowcast\.json|record\.json)$'
)


def copy_side_files(home: Path, folder: Path) -> None:
  """Copies what belongs to a model beside its weights; what is code is copied, never run.

  Args:
    home: the folder of the newest checkpoint.
    folder: that of the prediction.

  Raises:
    OSError: a file cannot be read or written.
  """
  for path in sorted(home.rglob('*')):
    relative = path.relative_to(home)
    hidden = any(part.startswith(('.', 'checkpoint-')) for part in relative.parts)
    if hidden or _STALE.search(path.name) or not path.is_file():
      continue
    target = folder / relative
    target.parent.mkdir(parents=True, exist_ok=True)
    with path.open('rb') as source, replacing(target) as file:
      shutil.copyfileobj(source, file, 1 << 20)


def write_readme(
  folder: Path,
  card: Mapping[str, Any],
  *,
  sizes: Mapping[str, int],
  moved: Mapping[str, float],
  notes: tuple[str, ...],
) -> None:
  """Writes the model card, in Hugging Face's form.

  Args:
    folder: of the prediction, with its side files.
    card: the content of nowcast.json.
    sizes: path -> number of weights of a leaf.
    moved: path -> how far the weight of a leaf that moved most has moved.
    notes: what was warned of.

  Raises:
    OSError: it cannot be written.
  """
  environment = card['environment']
  lines = [
    '---',
    f'library_name: {_library(folder)}',
    'tags:',
    '- know_jax',
    '- weight-prediction',
    f'predictor: {card["predictor"]}',
    f'prediction_steps: {card["steps"]}',
    '---',
    '',
    f'# {card["predictor"]}, step {card["steps"]}',
    '',
    f'These weights were predicted by know_jax {environment["know_jax"]}, not trained: '
    f'`{card["predictor"]}`, {card["steps"]} step{"s" * (card["steps"] != 1)} ahead of '
    f'{len(card["history"])} checkpoints at '
    f'rate {card["rate"]:g}, which stands for {card["multiple"]:g} times the data of the newest.'
    + (f' Options: {json.dumps(card["options"])}.' if card['options'] else ''),
    '',
    '## History, oldest first',
    '',
    '| checkpoint | file | bytes | SHA-256 |',
    '|---|---|---:|---|',
  ]
  for stage in card['history']:
    for name, file in stage['files'].items():
      lines.append(f'| `{stage["path"]}` | `{name}` | {file["size"]} | `{file["sha256"]}` |')
  lines += [
    '', '## Weights', '', '| kind | leaves | weights | largest move |', '|---|---:|---:|---:|',
  ]  # fmt: skip
  for kind in (*kinds_.KINDS, kinds_.KEEP):
    paths = [path for path, result in card['kinds'].items() if result == kind]
    far = max((moved[path] for path in paths if path in moved), default=0.0)
    weights = sum(sizes[path] for path in paths)
    lines.append(f'| {kind} | {len(paths)} | {weights} | {far:.3g} |')
  warned = list(notes)
  if kept := card['kept_newest']:
    warned.append(f'{len(kept)} leaves had a bad prediction and are as in the newest: {kept}.')
  if lost := lora.report(card):
    warned.append(f'{lost[0].upper()}{lost[1:]}')
  lines += ['', '## Warnings', '', *([f'- {note}' for note in warned] or ['None.'])]
  versions = ', '.join(
    f'{name} {environment[name]}' for name in ('know_jax', 'jax', 'numpy', 'python')
  )
  lines += ['', '## Versions', '', f'{versions}; {environment["platform"]}.', '']
  write_atomic(folder / README, '\n'.join(lines).encode())


def _library(folder: Path) -> str:
  for name, library in (('adapter_config.json', 'peft'), ('model_index.json', 'diffusers')):
    if (folder / name).is_file():
      return library
  try:
    config = json.loads((folder / 'config.json').read_text('utf-8'))
  except (OSError, ValueError):
    return 'know_jax'
  if not isinstance(config, dict):
    return 'know_jax'
  if 'model_type' in config:
    return 'transformers'
  return 'timm' if 'architecture' in config else 'know_jax'
