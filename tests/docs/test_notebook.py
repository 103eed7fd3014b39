"""The notebook runs as it stands, by Jupyter, and shows what its text says."""

import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / 'docs' / 'walk.ipynb'


@pytest.fixture(scope='module')
def executed():
  nbclient = pytest.importorskip('nbclient', reason='needs the extra docs; `make docs` runs it')
  pytest.importorskip('ipykernel', reason='needs the extra docs; `make docs` runs it')
  import nbformat

  notebook = nbformat.read(NOTEBOOK, 4)
  resources = {'metadata': {'path': str(NOTEBOOK.parent)}}
  # Seconds for a cell: on a core that other programs used too, all cells together took 1270.
  return nbclient.NotebookClient(notebook, timeout=1800, resources=resources).execute()


def texts(notebook):
  found = [output for cell in notebook.cells for output in cell.get('outputs', [])]
  return ''.join(o.get('text', '') for o in found), [o for o in found if 'data' in o]


@pytest.mark.filterwarnings('default')  # Jupyter's own.
def test_the_notebook_runs_and_its_text_is_true(executed):
  text, shown = texts(executed)
  assert sum('image/png' in output['data'] for output in shown) == 3
  assert any('Trajectory of 5 stages' in o['data'].get('text/html', '') for o in shown)
  gains = {a.strip(): float(b) for a, b in re.findall(r'^(.*?) +[\d.]+ %, gain (\S+)', text, re.M)}
  assert gains['naive (x1)'] == 0 and gains['from scratch'] < -2  # Pre-training helps,
  others = [gain for name, gain in gains.items() if 'x2' in name]
  assert len(others) == 3 and max(map(abs, others)) < 2  # and predictions add little.


def test_the_file_holds_its_pictures_and_no_errors():
  import json

  cells = json.loads(NOTEBOOK.read_text('utf-8'))['cells']
  outputs = [o for cell in cells for o in cell.get('outputs', [])]
  assert sum('image/png' in o.get('data', {}) for o in outputs) == 3
  kinds = {(o['output_type'], o.get('name')) for o in outputs}
  assert kinds <= {('display_data', None), ('execute_result', None), ('stream', 'stdout')}
