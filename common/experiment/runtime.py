"""The machine below a run: devices, compiled programs, signals, versions."""

import atexit
import hashlib
import importlib
import io
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import jax
import numpy as np

from common.experiment import files
from common.experiment.checkpoint import RunError

PROJECT = Path(__file__).resolve().parents[2]
PACKAGES = ["jax", "jaxlib", "flax", "optax", "distrax", "gymnasium", "mujoco", "numpy"]
ROOM = 2**28  # bytes that a disk must have left for compiled programs
last_words = ""  # what an interrupt outside of a run's steps adds to "Stopped."


def end_at_interrupt():
    """From now on, Ctrl-C or SIGTERM ends this command with one sentence and exit code 130."""
    sys.excepthook = _excepthook
    in_main = threading.current_thread() is threading.main_thread()
    if in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def _excepthook(kind, error, trace):
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, trace)
    atexit._run_exitfuncs()  # a progress bar shows the cursor again
    with suppress(OSError, ValueError, AttributeError):
        print(f"Stopped. {last_words}".rstrip(), file=sys.stderr)
        sys.stdout.flush()
    os._exit(130)


def open_streams():
    """Lets stdout and stderr take any text, also without UTF-8; closed ones take it to nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, io.StringIO())
        with suppress(AttributeError, ValueError):  # a notebook's has no such method
            getattr(sys, name).reconfigure(errors="backslashreplace")


def give_up_stdout(error):
    """Ends a command's output, and not the command, where a disk is full or a pipe is closed."""
    with suppress(OSError, ValueError):
        print(f"Cannot write to stdout ({error}); nothing more is shown.", file=sys.stderr)
    with suppress(OSError, ValueError, AttributeError):  # what is buffered goes there, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def import_own(name):
    """Imports a module of the user's, found from the working directory too: it runs their code.

    name: as in `import`, or a .py file; "": nothing. Raises RunError if it cannot be imported.
    """
    if not name or name in sys.modules:
        return
    path = Path(os.path.expanduser(name))
    folder, name = (path.parent, path.stem) if path.suffix == ".py" else (Path(), name)
    if (folder := str(folder.resolve())) not in sys.path:
        sys.path.append(folder)
    try:
        importlib.import_module(name)
    except Exception as error:  # the user's code may raise anything
        raise RunError(f"--env-module {name}: {type(error).__name__}: {error}.") from error


def check_device():
    """Raises RunError unless JAX has a device, as with JAX_PLATFORMS=cuda and no GPU."""
    try:
        jax.devices()
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        asked = os.environ.get("JAX_PLATFORMS")
        raise RunError(f"JAX has no device: {why} (JAX_PLATFORMS is {asked})") from None


def shard_seeds(tree):
    """A pytree of arrays with the seeds on axis 0, sharded over the local devices by seed.

    Uses the largest number of devices that divides the number of seeds. Seeds are independent, so
    the devices need no communication.
    """
    seeds = len(jax.tree.leaves(tree)[0])
    devices = jax.local_devices()
    count = max(n for n in range(1, len(devices) + 1) if seeds % n == 0)
    mesh = jax.sharding.Mesh(np.array(devices[:count]), "seed")
    # weak types, which a checkpoint does not keep, would make a resumed run another program
    tree = jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), tree)
    return jax.device_put(tree, jax.NamedSharding(mesh, jax.P("seed")))


def keep_programs():
    """Keeps compiled programs in $XDG_CACHE_HOME/stillwater or ~/.cache/stillwater.

    Keeps none where others could write to that folder or one above it, and on a full disk. The
    user's own JAX_COMPILATION_CACHE_DIR or JAX_ENABLE_COMPILATION_CACHE takes precedence.
    Programs are machine code and machines may share a home, so each kind of processor has its own
    folder.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    words = platform.machine() + platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        words += next((x for x in lines if x.startswith(("flags", "Features"))), "")
    kind = hashlib.sha256(words.encode()).hexdigest()[:16]
    with suppress(OSError):  # a read-only home: every start compiles
        folder = files.cache_folder() / "programs" / kind
        files.make_private(folder)  # whoever can write to it can run code as this user
        full = shutil.disk_usage(folder).free < ROOM  # JAX waits for each program that finds none
        if os.access(folder, os.W_OK) and not full:
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


def machine():
    """What a run's bits depend on besides its config, as plain data.

    "jax": settings that decide which numbers are drawn and of what kind. "xla": settings that
    decide in which order numbers are added.
    """
    check_device()
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
        "jax": {
            "prng": jax.config.jax_default_prng_impl,
            "partitionable": jax.config.jax_threefry_partitionable,
            "x64": jax.config.jax_enable_x64,
        },
        "xla": {
            "devices": jax.local_device_count(),
            "threads": os.environ.get("NPROC") or cores(),  # as XLA counts them
            "matmul_precision": jax.config.jax_default_matmul_precision,
            "flags": os.environ.get("XLA_FLAGS", ""),
        },
    }


def free_memory():
    """Bytes that this process may still take: of the machine, its container and `ulimit -v`."""
    free = [2**62]
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:")]
    with suppress(OSError, ValueError):  # "max": no limit
        group = Path("/sys/fs/cgroup")
        most, now = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        free.append(most - now)
    with suppress(ImportError, OSError):
        import resource

        most, _ = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        if most != resource.RLIM_INFINITY:
            free.append(most - pages * resource.getpagesize())
    return max(0, min(free))


def cores():
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
