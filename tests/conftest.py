"""Lets a test `import combo`: algorithms/ is on the path, and distrax is imported once, in peace."""

import sys
import warnings
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "algorithms"))

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # tensorflow_probability uses old JAX names
    import distrax  # noqa: F401
