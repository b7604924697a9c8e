"""The machine below a run: devices, compiled programs, signals, versions."""

import hashlib
import os
import platform
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import jax
import numpy as np

PROJECT = Path(__file__).resolve().parents[2]
PACKAGES = ["jax", "jaxlib", "flax", "optax", "distrax", "gymnasium", "mujoco", "numpy"]


def shard_seeds(tree):
    """A pytree of arrays with the seeds on axis 0, sharded over the local devices by seed.

    Uses the largest number of devices that divides the number of seeds. Seeds are independent, so
    the devices need no communication.
    """
    seeds = len(jax.tree.leaves(tree)[0])
    devices = jax.local_devices()
    count = max(n for n in range(1, len(devices) + 1) if seeds % n == 0)
    mesh = jax.sharding.Mesh(np.array(devices[:count]), "seed")
    return jax.device_put(tree, jax.NamedSharding(mesh, jax.P("seed")))


def keep_programs():
    """Keeps compiled programs in $XDG_CACHE_HOME/stillwater or ~/.cache/stillwater.

    The user's own JAX_COMPILATION_CACHE_DIR or JAX_ENABLE_COMPILATION_CACHE takes precedence.
    Programs are machine code and machines may share a home, so each kind of processor has its own
    folder.
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
    with suppress(OSError):  # a read-only home: every start compiles
        # 0700: whoever can write to this folder can run code as this user
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_compilation_cache_max_size", 2**30)  # bytes; oldest go first
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@contextmanager
def on_interrupt(first, again):
    """Handles Ctrl-C while the main thread waits for XLA.

    The first SIGINT or SIGTERM calls first(), each later one again(), in a thread of its own.
    Python's own handlers run in the main thread, and only once XLA has returned from a compiled
    chunk, which can take minutes. Does nothing outside the main thread of a program.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def listen():
        calls = first
        while byte := os.read(reading, 1):
            if byte[0] in before:
                calls()
                calls = again
        os.close(reading)

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    wakeup = signal.set_wakeup_fd(writing)
    threading.Thread(target=listen, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writing)


def quiet_interrupt():
    """From now on an uncaught KeyboardInterrupt ends the process with a line, not a traceback."""

    def hook(kind, *rest):
        if issubclass(kind, KeyboardInterrupt):
            print("Stopped.", file=sys.stderr)
        else:
            sys.__excepthook__(kind, *rest)

    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = hook


def machine():
    """What a run's bits depend on besides its config, as plain data: versions, commit, device."""
    versions = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    git, commit = ["git", "-C", str(PROJECT), "describe", "--always", "--abbrev=40"], ""
    with suppress(OSError):
        git += ["--exclude=*", "--dirty=+changes"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return {
        "versions": versions,
        "commit": commit or None,
        "device": f"CPU, {os.cpu_count()} cores" if device.endswith("x cpu") else device,
    }
