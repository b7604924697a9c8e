"""What all tests share: how programs are compiled, and where they are kept.

The networks of the tests are so small that compiling them is most of the time. So XLA leaves out
its optimisations and its MLIR emitters, which take a third of it. Programs are kept in pytest's
cache folder, for processes that tests start and for the next run; `pytest --cache-clear` forgets
them. Commands that a test types as a user does (test_commands.py) are compiled as a user's are.
"""

# ruff: noqa: E402 (the environment comes before JAX)
import os
import warnings

flags = ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
if os.environ.get("PYTEST_XDIST_WORKER"):  # one of several processes: a thread for each
    os.environ["NPROC"] = "1"
    flags.append("--xla_cpu_multi_thread_eigen=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # tensorflow_probability uses old JAX names
    import distrax  # noqa: F401

import jax
import pytest


def pytest_configure(config):
    cache = getattr(config, "cache", None)  # none with -p no:cacheprovider
    if cache is None:
        return
    settings = {
        "jax_compilation_cache_dir": str(cache.mkdir("programs")),
        "jax_compilation_cache_max_size": 2**30,  # bytes; with a limit JAX locks the folder, too
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.fixture
def optimised():
    """What a test compiles, a user's optimisations and all."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True, scope="module")
def clear_programs():
    """Programs of one file are of no use to the next, and would fill the memory."""
    yield
    jax.clear_caches()
