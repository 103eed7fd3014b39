"""Predicts checkpoints of real models, and loads what comes out by the models' own libraries.

    make round-trips                                   in an environment of its own, or
    python tests/tools/round_trips.py --output=docs/results/round_trips.md [--only=REGEX]

Each model is tiny and has random weights. Its library saves it five times, a little changed each
time; `bin/nowcast.py --history` predicts from the five as a user would call it; and the library
loads the prediction, strictly, and runs it. Where the command asks for the kinds of leaves, the
rule that its message offers is pasted, once: the table says so. A row fails if a key is missing or
is left over, if a number is not finite, or if the outputs are those of the newest checkpoint.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault('KERAS_BACKEND', 'jax')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['HF_HUB_OFFLINE'] = '1'

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
STAGES = 5
PACKAGES = ('torch', 'timm', 'transformers', 'peft', 'keras', 'flax', 'equinox', 'dm-haiku', 'jax')
PASTED = re.compile(r"--kinds='([^']*)'")


@dataclasses.dataclass(frozen=True)
class Case:
  """A model and the format that it is kept in.

  Attributes:
    model: what it is.
    form: what is saved.
    loaded: by what the prediction is loaded.
    make: the model, with random weights.
    vary: `vary(model, number)` gives the model of a stage.
    save: `save(model, path)` writes a stage.
    load: `load(path)` loads a prediction, strictly, into a model.
    run: the outputs of a model.
    name: of the stage's file or folder, with `{}` for its number.
    flags: what the user adds to the command.
  """

  model: str
  form: str
  loaded: str
  make: Callable[[], Any]
  vary: Callable[[Any, int], Any]
  save: Callable[[Any, Path], None]
  load: Callable[[Path], Any]
  run: Callable[[Any], np.ndarray]
  name: str = 'checkpoint-{}'
  flags: tuple[str, ...] = ()


# --- PyTorch: timm, transformers, PEFT ------------------------------------------------------------


def vary_torch(model: Any, number: int) -> Any:
  """Moves the parameters that are trained, a little."""
  import torch

  generator = torch.Generator().manual_seed(number)
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.requires_grad:
        noise = torch.randn(parameter.shape, generator=generator)
        parameter += (0.02 * noise).to(parameter.dtype)
  return model


def seeded(make: Callable[[], Any]) -> Any:
  import torch

  torch.manual_seed(0)
  return make().eval()


def outputs(model: Any, call: Callable[[Any], Any]) -> np.ndarray:
  import torch

  with torch.no_grad():
    return call(model.eval()).float().numpy()


def torch_file(model: Any, path: Path) -> None:
  import torch

  torch.save(model.state_dict(), path)


def timm_cases() -> list[Case]:
  import timm
  import torch
  from safetensors.torch import save_file
  from timm.models import save_for_hf
  from timm.utils import CheckpointSaver

  def train_checkpoint(model: Any, path: Path) -> None:
    # As timm's train.py leaves it: with the optimizer's state, whose tensors are no weights.
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 3, 64, 64)).sum().backward()
    optimizer.step()
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=str(path.parent))
    saver._save(str(path), epoch=3)

  made: list[tuple[str, str, str, dict[str, Any], Callable[[Any, Path], None], str]] = [
    ('resnet', 'one .safetensors', 'resnet18',
     {'channels': (8, 16, 16, 24)}, lambda m, p: save_file(m.state_dict(), p),
     'step_{}.safetensors'),
    ('convnext', '.pth of a state_dict', 'convnext_atto',
     {'depths': (1, 1, 2, 1), 'dims': (8, 16, 24, 32)}, torch_file, 'step_{}.pth'),
    ('swin', ".pth.tar of timm's train.py, with optimizer", 'swin_tiny_patch4_window7_224',
     {'img_size': 64, 'window_size': 4, 'embed_dim': 16, 'depths': (2, 1, 1, 1),
      'num_heads': (1, 2, 2, 4)}, train_checkpoint, 'checkpoint-{}.pth.tar'),
    ('pvt_v2', '.bin of a state_dict', 'pvt_v2_b0',
     {'depths': (1, 1, 1, 1), 'embed_dims': (8, 16, 40, 64)}, torch_file, 'step_{}.bin'),
  ]  # fmt: skip
  cases = []
  for name, form, model, options, save, file in made:
    make = functools.partial(timm.create_model, model, num_classes=10, **options)
    run = functools.partial(outputs, call=lambda m: m(torch.ones(1, 3, 64, 64) * 0.1))
    cases.append(
      Case(
        f'timm {name}', form, 'timm.create_model(checkpoint_path=)',
        functools.partial(seeded, make), vary_torch, save,
        lambda path, make=make: make(checkpoint_path=str(path)), run, file,
      )
    )  # fmt: skip
  options = {
    'img_size': 32, 'patch_size': 8, 'embed_dim': 32, 'depth': 2, 'num_heads': 2, 'num_classes': 10
  }  # fmt: skip

  def save_vit(model: Any, path: Path) -> None:
    save_for_hf(model, path, model_args=options, safe_serialization=True)

  cases.append(
    Case(
      'timm vit', 'Hugging Face folder', "timm.create_model('local-dir:...', pretrained=True)",
      functools.partial(seeded, lambda: timm.create_model('vit_tiny_patch16_224', **options)),
      vary_torch, save_vit,
      lambda path: timm.create_model(f'local-dir:{path}', pretrained=True),
      functools.partial(outputs, call=lambda m: m(torch.ones(1, 3, 32, 32) * 0.1)),
    )
  )  # fmt: skip
  return cases


def strictly(kind: Any, path: Path) -> Any:
  """A model of transformers; an error if a key is missing, is left over, or has another shape."""
  model, about = kind.from_pretrained(path, output_loading_info=True)
  wrong = {what: keys for what, keys in about.items() if keys}
  if wrong:
    raise AssertionError(f'from_pretrained reports {wrong}')
  return model


def transformers_cases() -> list[Case]:
  import torch
  import transformers as tf

  ids = torch.arange(2, 12)[None]
  pixels = torch.ones(1, 3, 32, 32) * 0.1
  small = {'vocab_size': 64, 'hidden_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 2}
  llama = tf.LlamaConfig(
    **small, intermediate_size=48, num_key_value_heads=1, max_position_embeddings=32
  )
  gpt2 = tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32)
  bert = tf.BertConfig(**small, intermediate_size=48, max_position_embeddings=32)
  vit = tf.ViTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
    image_size=32, patch_size=8,
  )  # fmt: skip
  whisper = tf.WhisperConfig(
    vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8,
    max_source_positions=16, max_target_positions=16, pad_token_id=0, bos_token_id=1,
    eos_token_id=2, decoder_start_token_id=1,
  )  # fmt: skip

  def bin_folder(model: Any, path: Path) -> None:
    path.mkdir()
    model.config.save_pretrained(path)
    torch_file(model, path / 'pytorch_model.bin')

  def trained(model: Any, path: Path) -> None:
    # As the Trainer leaves it: with the states of the optimizer and of the training.
    model.save_pretrained(path)
    torch.save(torch.optim.AdamW(model.parameters()).state_dict(), path / 'optimizer.pt')
    step = int(path.name.rpartition('-')[2])
    (path / 'trainer_state.json').write_text(json.dumps({'global_step': step}))

  def whole(model: Any, path: Path) -> None:
    model.save_pretrained(path)

  made: list[tuple[str, str, Any, Any, Any, Callable[[Any, Path], None], Callable[[Any], Any]]] = [
    ('Llama', 'sharded safetensors in bfloat16', tf.LlamaForCausalLM, llama, torch.bfloat16,
     lambda m, p: m.save_pretrained(p, max_shard_size='20KB'), lambda m: m(input_ids=ids).logits),
    ('GPT-2', 'safetensors, tied output layer', tf.GPT2LMHeadModel, gpt2, torch.float32,
     whole, lambda m: m(input_ids=ids).logits),
    ('BERT', "Trainer's checkpoints", tf.BertForSequenceClassification, bert, torch.float32,
     trained, lambda m: m(input_ids=ids).logits),
    ('ViT', 'safetensors in float16', tf.ViTForImageClassification, vit, torch.float16,
     whole, lambda m: m.float()(pixel_values=pixels).logits),
    ('Whisper', 'pytorch_model.bin', tf.WhisperForConditionalGeneration, whisper, torch.float32,
     bin_folder, lambda m: m(input_features=torch.ones(1, 8, 32), decoder_input_ids=ids).logits),
  ]  # fmt: skip
  return [
    Case(
      f'transformers {name}', form, f'{kind.__name__}.from_pretrained',
      functools.partial(seeded, lambda kind=kind, config=config, to=dtype: kind(config).to(to)),
      vary_torch, save, functools.partial(strictly, kind), functools.partial(outputs, call=call),
    )
    for name, form, kind, config, dtype, save, call in made
  ]  # fmt: skip


def peft_cases(folder: Path) -> list[Case]:
  import peft
  import torch
  import transformers as tf

  config = tf.LlamaConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=48, num_key_value_heads=1, max_position_embeddings=32,
  )  # fmt: skip
  base = folder / 'base'
  seeded(lambda: tf.LlamaForCausalLM(config)).save_pretrained(base)
  ids = torch.arange(2, 12)[None]

  def make(dora: bool) -> Any:
    model = tf.AutoModelForCausalLM.from_pretrained(base)
    lora = peft.LoraConfig(
      r=4, lora_alpha=8, target_modules=['q_proj', 'v_proj', 'down_proj'], use_dora=dora,
      task_type='CAUSAL_LM', init_lora_weights=False,
    )  # fmt: skip
    return peft.get_peft_model(model, lora)

  def load(path: Path) -> Any:
    with warnings.catch_warnings():
      warnings.filterwarnings('error', message='.*(missing|unexpected|not found).*')
      return peft.PeftModel.from_pretrained(tf.AutoModelForCausalLM.from_pretrained(base), path)

  return [
    Case(
      f'PEFT {name}', 'adapter folder', 'PeftModel.from_pretrained',
      functools.partial(seeded, functools.partial(make, dora)), vary_torch,
      lambda m, p: m.save_pretrained(p), load,
      functools.partial(outputs, call=lambda m: m(input_ids=ids).logits), flags=flags,
    )
    for name, dora, flags in (
      ('LoRA', False, ()), ('LoRA, product', False, ('--lora=merged',)), ('DoRA', True, ()),
    )
  ]  # fmt: skip


# --- Keras, Flax, Equinox, Haiku ------------------------------------------------------------------


def noise(leaf: Any, rng: np.random.Generator) -> Any:
  """A leaf a little moved, if it is one of floating-point numbers."""
  leaf = np.asarray(leaf)
  if not np.issubdtype(leaf.dtype, np.floating):
    return leaf
  return (leaf + 0.02 * rng.normal(size=leaf.shape)).astype(leaf.dtype)


def keras_cases() -> list[Case]:
  import keras

  def make() -> Any:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
      keras.Input((8, 8, 3)), keras.layers.Conv2D(8, 3), keras.layers.BatchNormalization(),
      keras.layers.ReLU(), keras.layers.SeparableConv2D(8, 3), keras.layers.Flatten(),
      keras.layers.Dense(12, activation='relu'), keras.layers.Dense(4),
    ])  # fmt: skip
    # By name, as 'mse', Keras cannot load its own .h5 file.
    model.compile('adam', keras.losses.MeanSquaredError())
    model.fit(np.ones((4, 8, 8, 3)), np.ones((4, 4)), verbose=0)
    return model

  def vary(model: Any, number: int) -> Any:
    rng = np.random.default_rng(number)
    for variable in model.trainable_variables:
      variable.assign(noise(variable, rng))
    return model

  def weights_into(path: Path) -> Any:
    model = make()
    model.load_weights(path)
    return model

  def run(model: Any) -> np.ndarray:
    return np.asarray(model(np.full((1, 8, 8, 3), 0.1, np.float32), training=False))

  forms = (
    ('.keras', 'step_{}.keras', 'save', 'keras.saving.load_model', keras.saving.load_model),
    ('.weights.h5', 'step_{}.weights.h5', 'save_weights', 'Model.load_weights', weights_into),
    ('.h5', 'step_{}.h5', 'save', 'keras.saving.load_model', keras.saving.load_model),
  )
  return [
    Case(
      'Keras CNN', form, loaded, make, vary,
      lambda m, p, saver=saver: getattr(m, saver)(p), load, run, name,
    )
    for form, name, saver, loaded, load in forms
  ]  # fmt: skip


def vary_tree(tree: Any, number: int) -> Any:
  import jax

  rng = np.random.default_rng(number)
  return jax.tree.map(lambda leaf: jax.numpy.asarray(noise(leaf, rng)), tree)


def flax_cases() -> list[Case]:
  import flax.serialization
  import jax
  import jax.numpy as jnp
  import orbax.checkpoint as ocp
  from flax import linen, nnx

  class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
      self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
      self.norm = nnx.BatchNorm(8, rngs=rngs)
      self.attend = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
      self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, images: Any) -> Any:
      hidden = self.norm(self.conv(images), use_running_average=True)
      hidden = self.attend(hidden.reshape(len(hidden), -1, 8))
      return self.head(hidden.mean(1))

  class Linen(linen.Module):
    @linen.compact
    def __call__(self, images: Any) -> Any:
      hidden = linen.LayerNorm()(linen.Conv(8, (3, 3))(images))
      hidden = linen.SelfAttention(2)(hidden.reshape(len(hidden), -1, 8))
      return linen.Dense(4)(hidden.mean(1))

  images = jnp.full((1, 6, 6, 3), 0.1)

  def vary_nnx(model: Any, number: int) -> Any:
    nnx.update(model, vary_tree(nnx.state(model, nnx.Param), number))
    return model

  def save_nnx(model: Any, path: Path) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(path, nnx.state(model, (nnx.Param, nnx.BatchStat)))

  def load_nnx(path: Path) -> Any:
    model = Net(nnx.Rngs(1))
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    with ocp.StandardCheckpointer() as checkpointer:
      nnx.update(model, checkpointer.restore(path, state))
    return model

  def linen_variables(seed: int = 0) -> Any:
    return Linen().init(jax.random.key(seed), images)

  def load_linen(path: Path) -> Any:
    return flax.serialization.from_bytes(linen_variables(1), path.read_bytes())

  return [
    Case(
      'NNX CNN with attention', 'Orbax StandardCheckpointer', 'restore and nnx.update',
      lambda: Net(nnx.Rngs(0)), vary_nnx, save_nnx, load_nnx,
      lambda model: np.asarray(model(images)), 'step_{}',
    ),
    Case(
      'linen CNN with attention', 'msgpack of flax.serialization', 'flax.serialization.from_bytes',
      linen_variables, vary_tree,
      lambda tree, path: path.write_bytes(flax.serialization.to_bytes(tree)) and None,
      load_linen, lambda tree: np.asarray(Linen().apply(tree, images)), 'step_{}.msgpack',
    ),
  ]  # fmt: skip


def equinox_cases() -> list[Case]:
  import equinox as eqx
  import jax
  import jax.numpy as jnp

  class Net(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.LayerNorm
    attend: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, key: Any):
      first, second, third = jax.random.split(key, 3)
      self.conv = eqx.nn.Conv2d(3, 8, 3, key=first)
      self.norm = eqx.nn.LayerNorm(8)
      self.attend = eqx.nn.MultiheadAttention(2, 8, key=second)
      self.mlp = eqx.nn.MLP(8, 4, 16, 1, key=third)

    def __call__(self, image: Any) -> Any:
      hidden = jax.vmap(self.norm)(self.conv(image).reshape(8, -1).T)
      return self.mlp(self.attend(hidden, hidden, hidden).mean(0))

  def vary(model: Any, number: int) -> Any:
    arrays, rest = eqx.partition(model, eqx.is_array)
    return eqx.combine(vary_tree(arrays, number), rest)

  return [
    Case(
      'Equinox CNN with attention', '.eqx of tree_serialise_leaves', 'eqx.tree_deserialise_leaves',
      lambda: Net(jax.random.key(0)), vary,
      lambda model, path: eqx.tree_serialise_leaves(path, model),
      lambda path: eqx.tree_deserialise_leaves(path, Net(jax.random.key(1))),
      lambda model: np.asarray(model(jnp.full((3, 6, 6), 0.1))), 'step_{}.eqx',
    )
  ]  # fmt: skip


def haiku_cases() -> list[Case]:
  import haiku as hk
  import jax
  import jax.numpy as jnp
  import orbax.checkpoint as ocp

  def net(images: Any) -> Any:
    hidden = hk.LayerNorm(-1, True, True)(hk.Conv2D(8, 3)(images))
    return hk.nets.MLP((12, 4))(hidden.mean((1, 2)))

  images = jnp.full((1, 6, 6, 3), 0.1)
  model = hk.without_apply_rng(hk.transform(net))

  def save_step(tree: Any, path: Path) -> None:
    with ocp.CheckpointManager(path.parent) as manager:
      manager.save(int(path.name), args=ocp.args.StandardSave(tree))

  def load_step(path: Path) -> Any:
    like = model.init(jax.random.key(1), images)
    with ocp.CheckpointManager(path.parent) as manager:
      return manager.restore(int(path.name), args=ocp.args.StandardRestore(like))

  def load_npz(path: Path) -> Any:
    like = model.init(jax.random.key(1), images)
    with np.load(path, allow_pickle=False) as file:
      names = {f'{m}/{n}': (m, n) for m, leaves in like.items() for n in leaves}
      if file.keys() != names.keys():
        raise AssertionError(f'found {set(file)}; expected {set(names)}')
      tree: dict[str, dict[str, Any]] = {module: {} for module in like}
      for key, (module, name) in names.items():
        tree[module][name] = file[key].astype(like[module][name].dtype)
    return tree

  def save_npz(tree: Any, path: Path) -> None:
    np.savez(path, **{f'{m}/{n}': leaf for m, leaves in tree.items() for n, leaf in leaves.items()})

  def make() -> Any:
    return model.init(jax.random.key(0), images)

  def run(tree: Any) -> np.ndarray:
    return np.asarray(model.apply(tree, images))

  return [
    Case(
      'Haiku CNN', 'steps of an Orbax CheckpointManager', 'CheckpointManager.restore',
      make, vary_tree, save_step, load_step, run, '{}',
    ),
    Case(
      'Haiku CNN', 'savez of module/name', 'np.load, names compared', make, vary_tree, save_npz,
      load_npz, run, 'step_{}.npz',
    ),
  ]  # fmt: skip


# --- the trip -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
  """What came of a case; `error` is empty if all went well."""

  case: Case
  leaves: str = ''
  pasted: str = ''
  change: float = float('nan')
  error: str = ''
  seconds: float = 0.0


def nowcast(history: Path, output: Path, flags: tuple[str, ...]) -> subprocess.CompletedProcess:
  command = [
    sys.executable, str(ROOT / 'bin' / 'nowcast.py'), f'--history={history}', f'--output={output}',
    '--steps=1', '--predictor=known', *flags,
  ]  # fmt: skip
  environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
  return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=output.parent)


def travel(case: Case, folder: Path) -> Row:
  """Saves, predicts, loads and runs."""
  row, began = Row(case), time.monotonic()
  history = folder / 'history'
  history.mkdir(parents=True)
  model = case.make()
  for number in range(STAGES):
    model = case.vary(model, number)
    path = history / case.name.format(100 * (number + 1))
    case.save(model, path)
  newest = case.run(model)
  done = nowcast(history, folder / 'output', case.flags)
  offered = PASTED.search(done.stderr)
  if done.returncode and offered:
    row.pasted = f"--kinds='{offered[1]}'"
    done = nowcast(history, folder / 'output', (*case.flags, f'--kinds={offered[1]}'))
  if done.returncode:
    row.error = ' '.join(done.stderr.split())[-2000:]
    return row
  (folder / 'output.log').write_text(done.stdout + done.stderr)
  step = folder / 'output' / 'known' / '1'
  kinds = json.loads((step / 'nowcast.json').read_text())['kinds']
  row.leaves = ' '.join(
    f'{list(kinds.values()).count(kind)} {kind}' for kind in ('conv', 'fc', 'bias', 'keep')
  )
  found = case.run(case.load(step if path.is_dir() else step / path.name))
  row.change = float(np.abs(found - newest).max())
  if not np.isfinite(found).all():
    row.error = 'its outputs are not finite'
  elif not row.change:
    row.error = 'its outputs are those of the newest checkpoint'
  row.seconds = time.monotonic() - began
  return row


FAMILIES: dict[str, Callable[[Path], list[Case]]] = {
  'timm': lambda _: timm_cases(),
  'transformers': lambda _: transformers_cases(),
  'PEFT': peft_cases,
  'Keras': lambda _: keras_cases(),
  'Flax': lambda _: flax_cases(),
  'Equinox': lambda _: equinox_cases(),
  'Haiku': lambda _: haiku_cases(),
}


def table(rows: list[Row], left_out: list[str]) -> str:
  """The page, with the names of the cases that were not run."""
  versions = []
  for name in PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions.append(f'{name} {importlib.metadata.version(name)}')
  good = sum(not row.error for row in rows)
  lines = [
    '# Round trips through the libraries of others',
    '',
    f'{good} of {len(rows)} rows pass. `make round-trips` runs them and writes this page.',
    '',
    'Each model is tiny and has random weights. Its own library saves it five times, a little '
    'moved each time; `bin/nowcast.py --history=FOLDER --output=DIR --steps=1 --predictor=known` '
    'predicts the next; the library loads that strictly, no key missing and none left over, and '
    'runs it. The last column is the largest change of an output from that of the newest '
    'checkpoint: finite and not zero. A flag is what a user must add; `--kinds` is pasted from '
    'the message of the first call.',
    '',
    '| model | saved as | loaded by | flag | leaves | change |',
    '|---|---|---|---|---|---:|',
  ]
  for row in rows:
    case = row.case
    flag = ' '.join(f'`{flag}`' for flag in (*case.flags, *filter(None, [row.pasted])))
    flag = flag.replace('|', '\\|') or 'none'
    change = f'FAILED: {row.error[:200]}'.replace('|', '/') if row.error else f'{row.change:.2g}'
    lines.append(
      f'| {case.model} | {case.form} | `{case.loaded}` | {flag} | {row.leaves} | {change} |'
    )
  if left_out:
    lines += ['', f'Not run this time: {", ".join(left_out)}.']
  python = '.'.join(map(str, sys.version_info[:3]))
  lines += ['', f'Versions: Python {python}, {", ".join(versions)}.', '']
  return '\n'.join(lines)


def main() -> int:
  """Runs the cases; returns how many failed."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--output', type=Path, help='the page to write')
  parser.add_argument('--only', default='', help='regular expression of the models to run')
  parser.add_argument(
    '--keep', type=Path, help='a folder to leave all in: rows done are not redone'
  )
  options = parser.parse_args()
  rows: list[Row] = []
  left_out: list[str] = []
  with tempfile.TemporaryDirectory() as temporary:
    folder = options.keep or Path(temporary)
    folder.mkdir(parents=True, exist_ok=True)
    store = folder / 'rows.json'
    for family, cases_of in FAMILIES.items():
      cases = cases_of(folder)
      done: dict[str, Any] = json.loads(store.read_text('utf-8')) if store.exists() else {}
      for number, case in enumerate(cases):
        key = f'{case.model} ({case.form})'
        if key in done:
          rows.append(Row(case, **done[key]))
          continue
        if not re.search(options.only, f'{family} {case.model} {case.form}'):
          left_out.append(key)
          continue
        shutil.rmtree(folder / f'{family}-{number}', ignore_errors=True)
        try:
          row = travel(case, folder / f'{family}-{number}')
        except Exception as error:
          row = Row(case, error=f'{type(error).__name__}: {error}')
          traceback.print_exc()
        rows.append(row)
        if not row.error:
          done[key] = {'leaves': row.leaves, 'pasted': row.pasted, 'change': row.change}
          store.write_text(json.dumps(done), 'utf-8')
        print(
          f'{key}: {row.error or f"{row.change:.3g}"} {row.pasted} '
          f'[{row.leaves}] {row.seconds:.0f} s',
          flush=True,
        )
  if options.output:
    options.output.write_text(table(rows, left_out), 'utf-8')
  return sum(bool(row.error) for row in rows)


if __name__ == '__main__':
  sys.exit(main())
