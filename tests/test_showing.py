"""What objects show of themselves: one screen, whatever they hold."""

import html.parser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import know_jax
from know_jax import Start, Trajectory, showing
from know_jax.io import formats
from know_jax.recommendation import NAIVE
from know_jax.runs.record import RunRecord

HISTORY = [{'dense': {'kernel': np.full((2, 3), s, 'f'), 'bias': np.zeros(3, 'f')}} for s in (0, 1)]


class Cells(html.parser.HTMLParser):
  """The cells of a table, row by row; every tag must be closed."""

  def __init__(self, text):
    super().__init__()
    self.rows, self.open = [], []
    self.feed(text)
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.open += [tag] if tag != 'br' else []
    if tag == 'tr':
      self.rows.append([])

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open[-1] in ('td', 'th'):
      self.rows[-1].append(data)


def test_a_trajectory_shows_its_leaves():
  trajectory = Trajectory.from_sequence(HISTORY)
  assert repr(trajectory) == (
    'Trajectory of 2 stages, oldest first, 9 weights in each:\n'
    '  leaf          shape   dtype\n'
    '  dense/bias    [3]     float32\n'
    '  dense/kernel  [2, 3]  float32'
  )
  assert Cells(trajectory._repr_html_()).rows == [
    ['leaf', 'shape', 'dtype'],
    ['dense/bias', '[3]', 'float32'],
    ['dense/kernel', '[2, 3]', 'float32'],
  ]


def test_a_large_trajectory_fits_on_a_screen():
  leaf = np.zeros((5, 4), 'f')
  lines = repr(Trajectory({f'layer{i:03}/' + 'x' * 200: leaf for i in range(500)})).splitlines()
  assert len(lines) == 23 and max(map(len, lines)) <= 100
  assert lines[0].endswith('2,000 weights in each:') and lines[-1] == '  and 480 more'


def test_anything_that_a_trajectory_can_hold_is_shown():
  shown = []

  @jax.jit
  def traced(trajectory):
    shown.append(repr(trajectory))
    return jax.tree.map(lambda leaf: leaf + 1, trajectory)

  trajectory = Trajectory({'w': jnp.zeros((2, 3)), 'key': jax.random.split(jax.random.key(0), 2)})
  assert 'key   []     key<fry>' in repr(trajectory)
  traced(Trajectory({'w': jnp.zeros((2, 3))}))
  assert 'w     [3]    float32' in shown[0]
  for empty in ({}, {'f': len}, {'a': np.zeros(2), 'b': np.zeros(3)}, {'a': jnp.zeros(())}):
    assert repr(Trajectory(empty)).startswith('Trajectory ')
  assert 'NoneType' not in repr(jax.tree.map(lambda leaf: None, trajectory))


def test_text_in_a_table_is_escaped():
  text = showing.as_html('<b>', (['<i>'], [['a & b\n<script>']]))
  assert '<script>' not in text and '<b>' not in text
  assert Cells(text).rows == [['<i>'], ['a & b <script>']]


def test_a_record_shows_its_stages(tmp_path):
  record = RunRecord.open(tmp_path, {'stages': 2}, kind='forget')
  record.update(parameters=7, note='x' * 500)
  assert f"Record of 'forget' in {tmp_path}, by know_jax {know_jax.__version__}:" in repr(record)
  assert '  parameters  7\n' in repr(record) and max(map(len, repr(record).splitlines()[1:])) < 80
  record['stages'] = [{'stage': 0, 'accuracy': 2 / 3}, {'stage': 1, 'accuracy': 0.5, 'extra': True}]
  assert Cells(record._repr_html_()).rows == [
    ['stage', 'accuracy', 'extra'],
    ['0', '0.6667'],  # The third cell is empty.
    ['1', '0.5', 'True'],
  ]


def test_weights_in_a_file_show_their_leaves(tmp_path):
  safetensors.numpy.save_file({'a.weight': np.zeros((4, 2), 'f')}, tmp_path / 'w.safetensors')
  shown = repr(formats.open_weights(tmp_path / 'w.safetensors'))
  assert 'w.safetensors (safetensors), 32 bytes:' in shown
  assert shown.endswith('  a/weight  [4, 2]  float32')


@pytest.mark.parametrize('start', [NAIVE, Start('shrink', 1, (('c', 0.5),))])
def test_a_recommendation_shows_its_answer(start):
  best = (Start('shrink', 1, (('c', 0.5),)), 2.0, 0.25, (0.125, 0.375))
  shown = know_jax.Recommendation(
    start, 2.0, 0.25, (0.125, 0.375), best, 1.0, 0.5, (9, 4.5), ('<x>',)
  )
  assert repr(shown) == str(shown)
  text = shown._repr_html_()
  Cells(text)
  assert f'<b>{str(shown).splitlines()[0]}</b>' in text and '&lt;x&gt;' in text
