"""One word for one thing: the phrases that a native reader stumbles over stay out.

check (not "look at"), resume (not "go on with", "run on"), expected (not "wanted", in messages and
as a name), and no ", of which", which should be two sentences.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
  path
  for pattern in (
    'know_jax/**/*.py',
    'bin/*.py',
    'configs/*.py',
    '*.md',
    'docs/*.md',
    'docs/models/*.md',
    'docs/adding/*.md',
  )
  for path in ROOT.glob(pattern)
)
WORST = re.compile(
  r"""\blook(s|ed)?\ at\b
  | \bgo(es)?\ on\ (with|by|from|in)\b
  | \b(is|are|be|was|were)\ run\ on\b(?!\ )
  | \brun\ on\ (with|from)\b
  | ,\ of\ which\b
  | \bwhat\ is\ beyond\b
  | \bwanted\b""",
  re.VERBOSE | re.IGNORECASE,
)


def worst_of(text):
  return [match[0] for match in WORST.finditer(' '.join(text.split()))]


def test_there_is_something_to_read():
  assert len(FILES) > 100


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_worst_phrases_stay_out(path):
  assert not worst_of(path.read_text())


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('each leaf is looked\nat once', ['looked at']),
    ('a killed run goes on from there', ['goes on from']),
    ('a workdir of the same config is run on.', ['is run on']),
    ('two files, of which one is read', [', of which']),
    ('found 3; wanted 4', ['wanted']),
    ('it runs on one core, and time goes on', []),
  ],
)
def test_this_test_sees_what_it_must(text, expected):
  assert worst_of(text) == expected
