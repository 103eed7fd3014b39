"""Configs: what is given is read once, every field is checked, and mypy sees the fields."""

import dataclasses
import typing
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from know_jax import forgetting, landscape, transfer, transfer_starts
from know_jax.errors import UserError
from know_jax.fields import config_dict, editable, read_config
from know_jax.meta import collect, evaluation, meta_training
from know_jax.study import advice, branches, design, regime, runner, screen
from know_jax.tasks.base import DataFields, NetworkFields

ROOT = Path(__file__).parents[1]
KINDS = (
  forgetting, transfer, landscape, collect, meta_training, evaluation, design, regime, branches
)  # fmt: skip
every_kind = pytest.mark.parametrize('module', KINDS, ids=lambda module: module.__name__)

RUNS = {
  'forgetting': (forgetting.run, {'lr': '0.1'}, "^lr is '0.1'; expected a number."),
  'transfer': (transfer.run, {'from_scratch': 1}, 'from_scratch is 1; expected True or False'),
  'recommend': (transfer_starts.run, {'epochs': 2.5}, 'epochs is 2.5; expected a whole number'),
  'landscape': (landscape.run, {'known': 3}, 'known is 3; expected a string or None'),
  'collect': (
    collect.run, {'widths': {'cnn': (2.5,)}}, r'widths.cnn\[0\] is 2.5; expected a whole number'
  ),
  'meta_training': (
    lambda config, path: meta_training.run(config, path / 'data', path),
    {'steps': True}, 'steps is True; expected a whole number',
  ),
  'evaluation': (
    lambda config, path: evaluation.run(config, path / 'data', path),
    {'known': {'lr': None}}, 'known.lr is None; expected a number',
  ),
  'study': (
    runner.run, {'source': {'augmentation': 2}}, 'source.augmentation is 2; expected a dict'
  ),
  'plan of a study': (runner.plan, {'amounts': 1.0}, 'amounts is 1.0; expected a tuple'),
  'screening': (
    lambda config, path: screen.run(config, path, name='a'),
    {'transfer': {'lr': '1'}}, "transfer.lr is '1'; expected a number",
  ),
  'advice': (
    lambda config, path: advice.run(config, path, name='a'),
    {'source': {'stages': 5.0}}, 'source.stages is 5.0; expected a whole number',
  ),
  'regime': (regime.run, {'official': 0}, 'official is 0; expected a string or None'),
  'branches': (branches.run, {'models': 'cnn'}, "models is 'cnn'; expected a tuple"),
}  # fmt: skip


@pytest.mark.parametrize('make', [dict, ConfigDict])
@pytest.mark.parametrize('name', RUNS)
def test_a_value_of_another_type_is_refused_before_work(name, make, tmp_path):
  run, fields, message = RUNS[name]
  with pytest.raises(UserError, match=message):
    run(make(fields), tmp_path / 'new')
  assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize('name', RUNS)
def test_an_unknown_field_is_refused_before_work(name, tmp_path):
  run, fields, _ = RUNS[name]
  (field, value), *_ = fields.items()
  with pytest.raises(UserError, match=f"^unknown config field '{field}e'. Did you .*{field}"):
    run({f'{field}e': value}, tmp_path / 'new')
  if isinstance(value, dict) and name != 'collect':
    (inner,) = value
    message = f"^unknown config field '{field}.{inner}e'. Did you mean '{field}.{inner}'"
    with pytest.raises(UserError, match=message):
      run({field: {f'{inner}e': 1}}, tmp_path / 'new')
  assert not (tmp_path / 'new').exists()


@every_kind
def test_a_config_is_the_same_in_all_its_forms(module):
  config, default = module.Config(), module.default_config()
  assert read_config(module.Config, config) is config
  plain = config_dict(default)
  # Also in the order of its fields, as records are written.
  assert repr(config_dict(config)) == repr(plain)
  assert read_config(module.Config, default) == read_config(module.Config, plain)
  assert repr(config_dict(read_config(module.Config, plain))) == repr(plain)
  assert repr(config_dict(editable(read_config(module.Config, plain)))) == repr(plain)


@every_kind
def test_every_field_has_a_type(module):
  typed = typing.get_type_hints(module.Config)
  untyped = {name for name, kind in typed.items() if typing.Any in (kind, *typing.get_args(kind))}
  assert untyped <= {'arms', 'ablations'}
  assert set(typed) == set(module.default_config())


def test_numbers_stay_as_they_were_given():
  given = {'lr': 1, 'rate': 0.5, 'classes': (3, 4)}
  config = read_config(forgetting.Config, given)
  assert repr(config.lr) == '1' and config.classes == (3, 4)
  found = config_dict(config)
  assert (repr(found['lr']), found['classes'], found['width']) == ('1', [3, 4], None)


def test_a_part_of_a_config_is_read_alone():
  config = forgetting.Config(dataset='mnist', width=3, lr=0.5)
  assert read_config(NetworkFields, config_dict(config), only=True) == NetworkFields(
    model='cnn', width=3
  )
  with pytest.raises(UserError, match='config field dataset is missing'):
    read_config(DataFields, {'task': 'classification'}, only=True)
  with pytest.raises(UserError, match="image_size is 'all'; expected a tuple"):
    read_config(DataFields, {'dataset': 'mnist', 'image_size': 'all', 'other': 1}, only=True)


def test_a_config_cannot_be_changed():
  with pytest.raises(dataclasses.FrozenInstanceError):
    forgetting.Config().lr = 0.5


def test_mypy_sees_the_fields(tmp_path):
  mypy = pytest.importorskip('mypy.api', reason='mypy is not installed')
  lines = {
    'forgetting.Config().lr.real_part': '"float" has no attribute "real_part"',
    'forgetting.Config().lrr': '"Config" has no attribute "lrr"',
    "forgetting.Config(lr='0.1')": 'has incompatible type "str"; expected "float"',
    'design.Config().source.stage_lr + 1': 'Unsupported operand types for + ("None" and "int")',
    "read_config(transfer.Config, {}).epochs + 'a'": 'Unsupported operand types for + ("int"',
  }
  imports = (
    'from know_jax import forgetting, transfer',
    'from know_jax.fields import read_config',
    'from know_jax.study import design',
  )
  path = tmp_path / 'reads_fields.py'
  path.write_text('\n'.join([*imports, *lines]))
  cache = ('--cache-dir', str(ROOT / '.mypy_cache'))
  config = ('--config-file', str(ROOT / 'pyproject.toml'))
  said, _, _ = mypy.run([*cache, *config, str(path)])
  for number, message in enumerate(lines.values(), len(imports) + 1):
    assert any(f':{number}: ' in line and message in line for line in said.splitlines()), said
