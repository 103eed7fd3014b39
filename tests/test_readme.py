"""What the README tells a newcomer to run, runs."""

import re
from pathlib import Path

import know_jax

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()
EVIDENCE = (ROOT / 'docs' / 'evidence.md').read_text()


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


def test_the_tables_of_results_are_those_of_the_documents():
  for cells, arm, source in (
    (r'(\| \d\.\d{3} \[[^]]*\] ){4}\|', 'known_official', 'know_jax/weights/known.md'),
    (r'\| \d\.\d{3} \[.* \| \+.*\|', 'known_transfer', 'docs/results/known_log.md'),
  ):
    rows = [line for line in EVIDENCE.splitlines() if re.fullmatch(rf'\| `.*` {cells}', line)]
    assert {'known_leaf', 'least_squares', 'task_vector', arm} <= {
      row.split('`')[1] for row in rows
    }
    assert not set(rows) - set((ROOT / source).read_text().splitlines())
