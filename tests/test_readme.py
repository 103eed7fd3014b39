"""What the README tells a newcomer to run, runs."""

import re
from pathlib import Path

import pytest

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


PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md'))]


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
  for target in re.findall(
    r'\]\(([^)\s]+)\)', re.sub(r'```.*?```', '', page.read_text(), flags=re.S)
  ):
    name, _, anchor = target.partition('#')
    if ':' in name:
      continue  # Of the web, which the tests do not visit.
    path = (page.parent / name) if name else page
    assert path.exists(), target
    if anchor and path.suffix == '.md':
      headings = re.findall(r'^#+ (.*)$', path.read_text(), re.M)
      assert anchor in map(_slug, headings), target


def _slug(heading):
  """The anchor that Python-Markdown gives a heading."""
  return re.sub(r'[-\s]+', '-', re.sub(r'[^\w\s-]', '', heading).strip().lower())


def test_the_tables_of_results_are_those_of_the_documents():
  pattern = r'\| `.*` (\| \d\.\d{3} \[[^]]*\] ){4}\|'
  rows = [line for line in EVIDENCE.splitlines() if re.fullmatch(pattern, line)]
  assert {'known_leaf', 'least_squares', 'task_vector', 'known_official'} <= {
    row.split('`')[1] for row in rows
  }
  assert not set(rows) - set((ROOT / 'know_jax/weights/known.md').read_text().splitlines())


@pytest.mark.parametrize('text', [README, EVIDENCE], ids=['README', 'evidence'])
def test_what_twice_the_data_gains_is_that_of_its_page(text):
  page = (ROOT / 'docs/results/screen_larger_set.md').read_text()
  found = 0
  for line in text[text.index('| start, each at its best rate') :].splitlines()[2:7]:
    _, test, *gains = [cell.strip() for cell in line.strip('|').split('|')]
    # As in the page: '+2.17 (+1.48 to +2.86)'.
    cells = [re.sub(r'\[(.*), (.*)\]', r'(\1 to \2)', gain) for gain in gains if gain]
    (row,) = [row for row in page.splitlines() if f'| {test} |' in re.sub(' +', ' ', row)]
    assert all(cell in row for cell in cells)
    found += len(cells)
  assert found >= 4
