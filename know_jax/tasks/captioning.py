"""Captioning: the next word of an image's caption, masked loss and masked accuracy."""

import collections
import functools
import io
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import numpy as np

from know_jax.data.augmentation import Augmentation
from know_jax.data.base import Arrays, Batch
from know_jax.data.sources import open_prepared, to_device_input
from know_jax.errors import UserError, unknown_name
from know_jax.fields import read_config
from know_jax.kinds import KEEP
from know_jax.models import Classifier
from know_jax.models.adapters import linen
from know_jax.models.captioner import PADDING, CaptionDecoder, Captioner, search
from know_jax.tasks import classification
from know_jax.tasks.base import DataFields, NetworkFields, Task, below
from know_jax.tasks.metrics import token_losses, token_scores, token_sums

UNKNOWN, START, END = '[UNK]', '[START]', '[END]'
_BAN = -1e9
_AT_A_TIME = 64


class Vocabulary(NamedTuple):
  """The words of training captions and what they are to a network.

  Attributes:
    words: by token: '' (padding), '[UNK]', then by frequency, '[START]' and '[END]' among them.
    log_prior: of each token the log of its share in the training labels, -1e9 where it is banned
      or never comes; added to the logits.
  """

  words: tuple[str, ...]
  log_prior: tuple[float, ...]

  def encode(self, caption: str) -> list[int]:
    """The tokens of a caption, start and end included; words not known become '[UNK]'."""
    numbers = {word: i for i, word in enumerate(self.words)}
    return [numbers.get(word, 1) for word in words_of(caption)]

  def decode(self, tokens: Sequence[int]) -> str:
    """The words of tokens, up to the end and without the start."""
    words = [self.words[token] for token in tokens if token != PADDING]
    words = words[: words.index(END)] if END in words else words
    return ' '.join(word for word in words if word != START)


def words_of(caption: str) -> list[str]:
  """Lower case without ASCII punctuation, split at spaces, between '[START]' and '[END]'."""
  cleaned = re.sub(f'[{re.escape(string.punctuation)}]', '', caption.lower())
  return [START, *cleaned.split(), END]


def fit_vocabulary(captions: Sequence[str], size: int) -> Vocabulary:
  """The most frequent words of captions; of equally frequent ones the alphabet's first.

  Args:
    captions: of the training images.
    size: the most tokens there may be, padding and '[UNK]' included.

  Raises:
    UserError: there are no words, or `size` leaves no room for any.
  """
  counts = collections.Counter(word for caption in captions for word in words_of(caption))
  if len(counts) < 3 or size < 5:
    raise UserError(
      f'a vocabulary of at most {size} tokens from {len(captions)} captions with '
      f'{max(len(counts) - 2, 0)} words; expected at least 5 tokens and one word.'
    )
  # Start and end are the most frequent, except where captions repeat a word: they always belong.
  ordered = sorted(counts, key=lambda word: (word not in (START, END), -counts[word], word))
  words = ('', UNKNOWN, *ordered[: size - 2])
  labels = np.array([0 if word == START else counts[word] for word in words], np.float64)
  total = labels.sum()
  prior = [float(np.log(n / total)) if n else _BAN for n in labels]
  return Vocabulary(words, tuple(prior))


@flax.struct.dataclass
class Preparation(classification.Preparation):
  """Images as in classification; captions to what goes in and comes out."""

  def __call__(self, batch: Batch, keys: jax.Array | None) -> Batch:
    """'image' as float32, 'tokens' `[B, T]` without the last and 'label' without the first."""
    batch, tokens = super().__call__(batch, keys), batch['caption']
    return {'image': batch['image'], 'tokens': tokens[:, :-1], 'label': tokens[:, 1:]}


class Pairs:
  """Images and captions, each pair an example, without a copy of the image for each caption.

  Attributes:
    images: uint8 `[N, H, W, C]`.
    image_of: which image each caption is of, int32 `[size]`.
    captions: tokens padded at the end, int32 `[size, T]`.
  """

  strata = None

  def __init__(self, images: np.ndarray, image_of: np.ndarray, captions: np.ndarray):
    self.images, self.image_of, self.captions = images, image_of, captions

  @property
  def size(self) -> int:
    """How many captions there are."""
    return len(self.captions)

  def batch(self, indices: np.ndarray) -> Batch:
    """The images and captions at `indices`."""
    return {'image': self.images[self.image_of[indices]], 'caption': self.captions[indices]}


def pairs(
  what: str,
  images: np.ndarray,
  captions: Sequence[Sequence[str]],
  vocabulary: Vocabulary,
  max_length: int,
) -> Pairs:
  """Every caption beside its image.

  Args:
    what: what they are, for messages.
    images: uint8 `[N, H, W, C]`.
    captions: of each image some.
    vocabulary: of the training captions.
    max_length: the most words that are fed to the network; longer captions lose their end.

  Raises:
    UserError: an image has no caption, or a caption no known word.
  """
  if len(captions) != len(images):
    raise UserError(f'{what} has {len(images)} images and captions of {len(captions)}.')
  rows, image_of = [], []
  for i, texts in enumerate(captions):
    if not texts:
      raise UserError(f'image {i} of {what} has no caption; expected at least one.')
    for text in texts:
      tokens = vocabulary.encode(text)
      if not any(token > 1 for token in tokens[1:-1]):
        raise UserError(
          f'caption {text!r} of image {i} of {what} has no word of the vocabulary; expected one.'
        )
      rows.append(tokens[: max_length + 1])
      image_of.append(i)
  padded = np.zeros((len(rows), max_length + 1), np.int32)
  for row, tokens in zip(padded, rows, strict=True):
    row[: len(tokens)] = tokens
  return Pairs(images, np.asarray(image_of, np.int32), padded)


def loss(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
  """The cross-entropy of every token, and 1 where it counts: `[B, T]` both."""
  return token_losses(logits, batch['label'])


def sums(logits: jax.Array, batch: Batch, mask: jax.Array) -> dict[str, jax.Array]:
  """See `token_sums`."""
  return token_sums(logits, batch['label'], mask)


def kinds(path: str, leaf: Any) -> str | None:
  """Only the encoder is predicted."""
  del leaf
  return None if 'encoder' in path.split('/') else KEEP


def task(
  encoder: Any,
  train: Pairs,
  test: Pairs,
  vocabulary: Vocabulary,
  *,
  max_length: int,
  augmentation: Augmentation = Augmentation(),  # noqa: B008  (it is frozen)
  name: str = 'the images',
  **decoder: Any,
) -> Task:
  """Captioning with data of one's own.

  Args:
    encoder: a `Classifier`, whose feature map the decoder attends to.
    train: see `pairs`.
    test: likewise.
    vocabulary: of both, fitted on the training captions.
    max_length: as in `pairs`.
    augmentation: of training images.
    name: what the data are, for messages.
    **decoder: options of `CaptionDecoder`.
  """
  text = CaptionDecoder(
    len(vocabulary.words), max_length=max_length, log_prior=vocabulary.log_prior, **decoder
  )
  return Task(
    linen(Captioner(encoder, text, axis_name=encoder.axis_name), ('image', 'tokens')),
    train,
    test,
    loss,
    sums,
    token_scores,
    prepare=Preparation(classification.mean_of(Arrays({'image': train.images})), augmentation),
    head=below('decoder'),
    kinds=kinds,
    score='masked_accuracy',
    encoder='encoder',
    name=name,
    about={'vocabulary': list(vocabulary.words), 'log_prior': list(vocabulary.log_prior)},
    at_a_time=_AT_A_TIME,
  )


def load(config: Mapping[str, Any], network: Mapping[str, Any]) -> Task:
  """The task that a config names.

  Args:
    config: the fields of `DataFields`; `dataset` is of TFDS, with 'image' and 'captions'.
    network: the fields of `NetworkFields`, of the encoder.

  Raises:
    UserError: a field does not fit.
  """
  fields = read_config(DataFields, config, only=True)
  of_network = read_config(NetworkFields, network, only=True)
  read_in = fields.read_splits(read, 'captioning')
  options = dict(vars(fields.captions))
  learnt = [text for texts in read_in[0][1] for text in texts]
  vocabulary = fit_vocabulary(learnt, options.pop('vocabulary'))
  train, test = (
    pairs(f'{fields.dataset}/{split}', *part, vocabulary, options['max_length'])
    for split, part in zip((fields.train_split, fields.test_split), read_in, strict=True)
  )
  encoder = classification.network_of(of_network, 1)
  if not isinstance(encoder, Classifier):
    raise UserError(
      f'model {of_network.model!r} gives {type(encoder)}; expected a know_jax Classifier as the '
      'encoder of captions.'
    )
  return task(
    encoder,
    train,
    test,
    vocabulary,
    augmentation=fields.augmentation,
    name=f'{fields.dataset} images {train.images.shape[1:]}',
    dtype=encoder.dtype,
    **options,
  )


def read(
  name: str, split: str, data_dir: str | Path | None, size: tuple[int, int] | None
) -> tuple[np.ndarray, list[list[str]]]:
  """Images uint8 `[N, H, W, 3]` of a prepared TFDS data set, and the captions of each.

  Raises:
    UserError: there is no such data set or split, it has no captions, or images differ in size.
  """
  from PIL import Image

  tfds, builder = open_prepared(name, data_dir)
  features = builder.info.features
  if not {'image', 'captions'} <= set(features):
    raise UserError(
      f'data set {name!r} has the features {", ".join(sorted(features))}; expected image and '
      'captions.'
    )
  if split not in builder.info.splits:
    raise unknown_name(f'split of {name!r}', split, builder.info.splits)
  source = builder.as_data_source(
    split=split, file_format='array_record', decoders={'image': tfds.decode.SkipDecoding()}
  )
  images: list[np.ndarray] = []
  captions = []
  for i, example in enumerate(source.__getitems__(range(len(source)))):
    with Image.open(io.BytesIO(example['image'])) as encoded:
      image = encoded.convert('RGB')
    if size is not None:
      image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    images.append(np.asarray(image))
    if images[-1].shape != images[0].shape:
      raise UserError(
        f'image {i} of {name}/{split} is {image.height} x {image.width}, others differ; expected '
        'image_size, to which all are resized.'
      )
    captions.append([text.decode() for text in example['captions']])
  return np.stack(images), captions


def captions_of(task: Task, variables: Any, images: np.ndarray, *, beams: int = 1) -> list[str]:
  """What a network says about images.

  Args:
    task: of this module.
    variables: of its network.
    images: uint8 `[B, H, W, C]`.
    beams: of the search; 1: greedily.

  Returns:
    A caption for each image.
  """
  vocabulary = Vocabulary(tuple(task.about['vocabulary']), tuple(task.about['log_prior']))
  model: Any = task.model
  captioner: Captioner = model.module.clone(axis_name=None)
  preparation: Any = task.prepare
  inputs = to_device_input(jax.numpy.asarray(images), preparation.mean)
  features = jax.jit(lambda v, x: captioner.apply(v, x, method='encode'))(variables, inputs)
  decode = jax.jit(lambda v, f, t: captioner.apply(v, f, t, method='decode'))
  tokens = search(
    functools.partial(decode, variables),
    features,
    start=vocabulary.words.index(START),
    end=vocabulary.words.index(END),
    length=captioner.decoder.max_length,
    beams=beams,
  )
  return [vocabulary.decode(row) for row in tokens]
