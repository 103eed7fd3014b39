import hashlib
import itertools
import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from know_jax.data.subsets import check_subsets, nested_subsets
from know_jax.errors import UserError


@st.composite
def class_counts(draw):
  """Sizes of 1 to 12 classes, from even to very uneven, empty ones included."""
  # Few totals, because JAX compiles a shuffle for each.
  total = draw(st.sampled_from([1, 12, 97, 240]))
  cuts = draw(st.lists(st.integers(0, total), max_size=11))
  return np.diff([0, *sorted(cuts), total]).tolist()


def shuffled_labels(counts, seed=0):
  labels = np.repeat(np.arange(len(counts)), counts)
  return np.random.default_rng(seed).permutation(labels)


@hypothesis.given(
  counts=class_counts(),
  rate=st.floats(0.01, 0.99),
  phases=st.integers(1, 7),
  stratified=st.booleans(),
  seed=st.integers(0, 2**31),
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_subsets_are_nested_sorted_and_of_the_right_sizes(counts, rate, phases, stratified, seed):
  labels = shuffled_labels(counts)
  subsets = nested_subsets(
    jax.random.key(seed), labels, rate=rate, phases=phases, stratified=stratified
  )
  assert len(subsets) == phases
  np.testing.assert_array_equal(subsets[0], np.arange(labels.size))
  for subset in subsets:
    assert subset.dtype == np.int32
    assert (np.diff(subset) > 0).all()  # Sorted, and no example twice.
  for larger, smaller in itertools.pairwise(subsets):
    assert set(smaller) <= set(larger)
    # Rounded to the nearest; a tie of decimals such as 0.145 * 100 may fall on either side.
    exact = Fraction(rate) * larger.size
    assert abs(smaller.size - exact) <= Fraction(1, 2) + Fraction(1, 10**9)


@pytest.mark.parametrize(
  ('size', 'rate', 'expected'),
  [(1000, 0.5, [1000, 500, 250, 125, 63]), (10, 0.3, [10, 3, 1, 0, 0]), (7, 0.5, [7, 4, 2, 1, 1])],
)
def test_sizes_round_half_up(size, rate, expected):
  subsets = nested_subsets(jax.random.key(0), np.zeros(size, int), rate=rate, phases=5)
  assert [subset.size for subset in subsets] == expected


@hypothesis.given(counts=class_counts(), rate=st.floats(0.3, 0.95), seed=st.integers(0, 2**31))
@hypothesis.settings(max_examples=60, deadline=None)
def test_stratified_keeps_class_shares_within_one_example(counts, rate, seed):
  labels = shuffled_labels(counts)
  subsets = nested_subsets(jax.random.key(seed), labels, rate=rate, phases=8, stratified=True)
  for subset in subsets:
    found = np.bincount(labels[subset], minlength=len(counts))
    for have, count in zip(found.tolist(), counts, strict=True):
      assert abs(have - Fraction(subset.size * count, labels.size)) < 1


def test_stratified_keeps_every_class_of_an_uneven_set():
  labels = shuffled_labels([500, 300, 150, 50])
  subsets = nested_subsets(jax.random.key(3), labels, rate=0.5, phases=5, stratified=True)
  # 63 examples: shares of 31.5, 18.9, 9.45 and 3.15.
  found = np.bincount(labels[subsets[-1]])
  assert found.sum() == 63
  assert found[0] in (31, 32)
  assert found[1] in (18, 19)
  assert found[2] in (9, 10)
  assert found[3] in (3, 4)


def test_stratified_favours_no_class():
  # 5 of 10 equal classes get one example each: over 200 keys each about 100 times (spread 7).
  labels = shuffled_labels([2] * 10)
  times = np.zeros(10, int)
  for key in jax.random.split(jax.random.key(0), 200):
    subset = nested_subsets(key, labels, rate=0.25, phases=2, stratified=True)[1]
    times[labels[subset]] += 1
  assert times.sum() == 1000
  assert (abs(times - 100) < 35).all()


@pytest.mark.parametrize('stratified', [False, True])
def test_every_example_is_equally_likely(stratified):
  labels = shuffled_labels([10, 10])
  times = np.zeros(20, int)
  for key in jax.random.split(jax.random.key(1), 400):
    times[nested_subsets(key, labels, rate=0.5, phases=3, stratified=stratified)[2]] += 1
  # 5 of 20: 100 times each, spread sqrt(400 * 1/4 * 3/4) = 8.7.
  assert times.sum() == 2000
  assert (abs(times - 100) < 44).all()


@pytest.mark.parametrize('stratified', [False, True])
def test_subsets_are_a_function_of_the_key(stratified):
  labels = shuffled_labels([40, 30, 30])
  once, again, other = (
    nested_subsets(jax.random.key(seed), labels, rate=0.5, phases=4, stratified=stratified)
    for seed in (0, 0, 1)
  )
  for a, b, c in zip(once, again, other, strict=True):
    np.testing.assert_array_equal(a, b)
    assert a.size == labels.size or not np.array_equal(a, c)


def test_more_phases_leave_the_first_ones_as_they_are():
  labels = shuffled_labels([50, 50])
  short = nested_subsets(jax.random.key(0), labels, rate=0.5, phases=3)
  long = nested_subsets(jax.random.key(0), labels, rate=0.5, phases=5)
  for a, b in zip(short, long, strict=False):
    np.testing.assert_array_equal(a, b)


def test_subsets_are_the_same_on_every_machine():
  # Written down once: runs are resumed and repeated on other machines and must draw the same.
  labels = np.arange(40) % 4
  plain = nested_subsets(jax.random.key(7), labels, rate=0.5, phases=4)
  assert plain[3].tolist() == [9, 10, 12, 17, 30]
  stratified = nested_subsets(jax.random.key(7), labels, rate=0.5, phases=4, stratified=True)
  assert stratified[3].tolist() == [9, 10, 12, 17, 31]


# (examples, classes, rate, phases, stratified, seed) -> SHA-256 of the indices, stage by stage.
DRAWN = {
  (1, 1, 0.5, 3, False, 0): 'cffb57f282df1536',
  (97, 5, 0.3, 6, False, 1): 'd76a88f1acd7633a',
  (240, 12, 0.61803, 5, True, 2): 'a28cc6262eeb6d34',
  (1000, 3, 0.9, 20, False, 123456789): '85460b51591751db',
  (50000, 100, 0.5, 5, False, 0): 'e4e02ad4c54f0cc1',
  (50000, 100, 0.5, 5, True, 0): '72202e757965cbc2',
}


def digest(size, classes, rate, phases, stratified, seed):
  labels = np.arange(size) * 7 % classes
  key = jax.random.key(seed)
  subsets = nested_subsets(key, labels, rate=rate, phases=phases, stratified=stratified)
  lines = (' '.join(map(str, subset.tolist())) for subset in subsets)
  return hashlib.sha256('\n'.join(lines).encode()).hexdigest()[:16]


def test_subsets_are_those_that_were_drawn_before():
  # Written down on a machine with one CPU device; here are eight.
  assert {case: digest(*case) for case in DRAWN} == DRAWN


def test_subsets_are_the_same_with_one_device_and_other_settings():
  cases = list(DRAWN)[1:3]
  source = f"""
import jax, json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_subsets import digest
assert len(jax.devices()) == 1
print(json.dumps([digest(*case) for case in {cases!r}]))
"""
  settings = {'XLA_FLAGS': '', 'JAX_THREEFRY_PARTITIONABLE': '0', 'JAX_ENABLE_X64': '1'}
  done = subprocess.run(
    [sys.executable, '-c', source], env=os.environ | settings, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout) == [DRAWN[case] for case in cases]


@hypothesis.given(
  rate=st.floats(0.01, 0.99),
  phases=st.integers(2, 7),
  stratified=st.booleans(),
  seed=st.integers(0, 2**32 - 1),
)
@hypothesis.settings(max_examples=15, deadline=None)
def test_subsets_do_not_depend_on_where_the_key_is(rate, phases, stratified, seed):
  devices = jax.devices()
  assert len(devices) == 8
  everywhere = jax.sharding.NamedSharding(jax.make_mesh((8,), ('x',)), jax.sharding.PartitionSpec())
  drawn = [
    nested_subsets(
      jax.device_put(jax.random.key(seed), place),
      shuffled_labels([50, 30, 17]),
      rate=rate,
      phases=phases,
      stratified=stratified,
    )
    for place in (devices[0], devices[-1], everywhere)
  ]
  for first, *others in zip(*drawn, strict=True):
    for other in others:
      np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'rate': 0.0}, 'rate is 0.0'),
    ({'rate': 1.0}, 'rate is 1.0'),
    ({'rate': float('nan')}, 'rate is nan'),
    ({'phases': 0}, 'phases is 0'),
    ({'labels': np.zeros((2, 2), int)}, r'labels have shape \(2, 2\)'),
    ({'labels': np.zeros(0, int)}, r'labels have shape \(0,\)'),
    ({'labels': np.zeros(4)}, 'dtype float64'),
    ({'key': 3}, 'key is int'),
    ({'key': np.zeros(2, np.uint32)}, 'dtype uint32'),
    ({'key': jax.random.split(jax.random.key(0))}, r'key has shape \(2,\)'),
    ({'key': jax.random.key(0, impl='rbg')}, "generator 'rbg'; expected threefry2x32"),
  ],
)
def test_bad_arguments(change, message):
  arguments = {'key': jax.random.key(0), 'labels': np.zeros(4, int), 'rate': 0.5, 'phases': 2}
  arguments |= change
  with pytest.raises(UserError, match=message):
    nested_subsets(arguments.pop('key'), arguments.pop('labels'), **arguments)


def test_check_subsets():
  labels = np.array([0, 0, 0, 0, 1, 1, 2, 3])
  subsets = [np.arange(8), np.array([0, 4, 5, 6, 7]), np.array([0, 4, 5])]
  check_subsets(subsets[:2], labels, batch_size=5)
  with pytest.raises(
    UserError, match=r'stage 1 \(0 is the whole set\) has 5 examples; expected .* batch of 6'
  ):
    check_subsets(subsets[:2], labels, batch_size=6)
  with pytest.raises(
    UserError, match=r'stage 2 .* has 3 examples but none of class 2 \(and 1 more .*all 4 class'
  ):
    check_subsets(subsets, labels, batch_size=3)
  # Where there are no classes, the sizes are all there is to check.
  check_subsets(subsets, None, batch_size=3)
  with pytest.raises(UserError, match=r'stage 2 .* has 3 examples; expected .* batch of 4'):
    check_subsets(subsets, None, batch_size=4)
