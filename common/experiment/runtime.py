"""Where a run computes: its seeds over all local devices; its programs kept for the next start."""

import hashlib
import os
import platform
from contextlib import suppress
from pathlib import Path

import jax
import numpy as np


def spread(tree):
    """`tree`, whose arrays all have the seeds as axis 0, shared out among the local devices.

    As many of them work as divide the number of seeds: each has whole seeds, and they have nothing
    to say to each other.
    """
    seeds = len(jax.tree.leaves(tree)[0])
    devices = jax.local_devices()
    count = max(n for n in range(1, len(devices) + 1) if seeds % n == 0)
    mesh = jax.sharding.Mesh(np.array(devices[:count]), "seed")
    return jax.device_put(tree, jax.NamedSharding(mesh, jax.P("seed")))


def keep_programs():
    """Lets JAX keep what it compiles, in $XDG_CACHE_HOME/stillwater or ~/.cache/stillwater.

    A user's own JAX_COMPILATION_CACHE_DIR or JAX_ENABLE_COMPILATION_CACHE comes first. Programs are
    machine code: each kind of processor has a folder of its own, for homes that several share.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    words = platform.machine() + platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        words += next((x for x in lines if x.startswith(("flags", "Features"))), "")
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    kind = hashlib.sha256(words.encode()).hexdigest()[:16]
    folder = Path(root, "stillwater", "programs", kind)
    with suppress(OSError):  # a read-only home: compiled anew each time
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # who writes there runs code as you
        if os.access(folder, os.W_OK):
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_compilation_cache_max_size", 2**30)  # bytes; oldest go first
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
