"""Lets a test `import combo`, and imports distrax once, in peace."""

import sys
import warnings
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "algorithms"))

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # tensorflow_probability uses old JAX names
    import distrax  # noqa: F401
