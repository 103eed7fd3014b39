"""The version of the package, alone in its module so that builds read it without importing JAX."""

__version__ = '0.1.0'
