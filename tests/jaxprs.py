"""What a jaxpr computes, that of functions which it calls included, each time that they are."""

from jax.extend import core as jex_core


def sub_jaxprs(value):
  if isinstance(value, jex_core.ClosedJaxpr):
    yield value.jaxpr
  elif isinstance(value, jex_core.Jaxpr):
    yield value
  elif isinstance(value, list | tuple):
    for item in value:
      yield from sub_jaxprs(item)


def equations(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn
    for value in eqn.params.values():
      for inner in sub_jaxprs(value):
        yield from equations(inner)
