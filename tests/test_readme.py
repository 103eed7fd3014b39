"""What the README tells a newcomer to run, runs."""

import re
from pathlib import Path

import know_jax

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()


def test_the_example_runs_as_printed(capsys):
  (code,) = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
  assert len(code.splitlines()) <= 15
  exec(code, {})
  printed = capsys.readouterr().out
  assert str(sorted(know_jax.PREDICTORS)) in printed
  assert ' 3 [' in printed  # The forecast has three stages.


def test_every_file_and_make_target_that_it_names_is_there():
  paths = set(re.findall(r'\b((?:bin|configs|know_jax)/[\w./]+\.(?:py|md))\b', README))
  assert 'bin/forget.py' in paths and 'know_jax/weights/known.md' in paths
  assert not [path for path in paths if not (ROOT / path).is_file()]
  makefile = (ROOT / 'Makefile').read_text()
  for target in re.findall(r'^    make (\w+)', README, re.MULTILINE):
    assert f'\n{target}:' in makefile


def test_the_tables_of_errors_are_those_of_the_card():
  card = (ROOT / 'know_jax' / 'weights' / 'known.md').read_text().splitlines()
  rows = [line for line in README.splitlines() if re.match(r'\| .*\d\.\d{3} \[', line)]
  assert {'known', 'least_squares', 'task_vector', 'known_official'} <= {
    row.split('`')[1] for row in rows
  }
  assert not [row for row in rows if row not in card]
