"""Imports distrax once, in peace."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # tensorflow_probability uses old JAX names
    import distrax  # noqa: F401
