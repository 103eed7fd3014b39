"""When the programs of a process are forgotten."""

import jax
import pytest

from know_jax.system import compiled


@pytest.mark.parametrize(('most', 'kept'), [('1000000', True), ('100', False), (None, False)])
def test_programs_are_forgotten_where_they_are_many(monkeypatch, tmp_path, most, kept):
  """Linux gives a process so many memory maps; other systems do not say."""
  if most is not None:
    (tmp_path / 'most').write_text(most + '\n')
  monkeypatch.setattr(compiled, '_MOST_MAPS', tmp_path / 'most')
  dropped: list[bool] = []
  monkeypatch.setattr(jax, 'clear_caches', lambda: dropped.append(True))
  compiled.drop_programs()
  assert dropped == ([] if kept else [True])
