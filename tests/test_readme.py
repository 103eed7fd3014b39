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


def test_the_table_of_errors_is_that_of_the_shipped_weights():
  card = know_jax.pretrained.read_card()
  for name in ('known_history_free', 'task_vector', 'log_fit', 'average', 'shrink'):
    row = ' | '.join(f'{card["test_error"][kind][name]:.3f}' for kind in ('conv', 'fc', 'bias'))
    assert f'| `{name}` | {row} |' in README
  row = ' | '.join(f'{card["test_error"][kind]["known"]:.3f}' for kind in ('conv', 'fc', 'bias'))
  assert f'| `known`, shipped | {row} |' in README
