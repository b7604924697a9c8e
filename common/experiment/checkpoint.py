"""Training states on disk: msgpack with a hash, no pickle, never half-written.

`checkpoint/` holds `state.msgpack` (flax.serialization; {"step", "state"}) and `checkpoint.json`
({"step", "sha256", "bytes"}). `checkpoint.old/` holds the checkpoint before it.
"""

import hashlib
import json
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import serialization


class RunError(SystemExit):
    """An error that the user can correct: one message on stderr, exit code 1, no traceback."""


def write(path, content):
    """Writes text or bytes to a temporary name, flushes them to the disk and renames the file.

    A reader sees the old or the new content, never a part of it. Raises OSError.
    """
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def lock(folder):
    """Keeps other processes from training in a run folder. Raises RunError if one already does.

    Does nothing on a file system without locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    place = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(place)
        raise RunError(f"Another process is training in {folder}.") from None
    except OSError:
        pass  # this file system has no locks
    try:
        yield
    finally:
        os.close(place)  # releases the lock, as does the death of the process


def save(folder, step, state):
    """Writes a checkpoint and keeps the one before it.

    checkpoint.tmp becomes checkpoint, which becomes checkpoint.old: at any instant one of them is
    complete. state: a pytree of arrays, without typed PRNG keys. Raises OSError, which leaves the
    last checkpoint in place.
    """
    new, now, old = (folder / f"checkpoint{suffix}" for suffix in (".tmp", "", ".old"))
    tree = {"step": step, "state": serialization.to_state_dict(jax.device_get(state))}
    raw = serialization.msgpack_serialize(tree, in_place=True)
    note = {"step": step, "sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        write(new / "state.msgpack", raw)
        write(new / "checkpoint.json", json.dumps(note))
        if now.exists():  # else `old` may be the only intact one
            shutil.rmtree(old, ignore_errors=True)
            now.rename(old)
        new.rename(now)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def read(folder, keep_damaged=False):
    """(step, state dict) of the newest intact checkpoint; (0, None) if none was ever written.

    If the newest one is damaged, stderr says so and the one before it is read. keep_damaged: rename
    a damaged one to `checkpoint.damaged`, so that `save` does not keep it as `checkpoint.old`.
    Raises RunError if all are damaged.
    """
    damaged = []
    for path in filter(Path.exists, (folder / "checkpoint", folder / "checkpoint.old")):
        try:
            note = json.loads((path / "checkpoint.json").read_text("utf-8"))
            raw = (path / "state.msgpack").read_bytes()
            if (size := note["bytes"]) != len(raw):
                raise ValueError(f"state.msgpack has {len(raw)} bytes instead of {size}")
            if note["sha256"] != hashlib.sha256(raw).hexdigest():
                raise ValueError("state.msgpack does not have the SHA-256 in checkpoint.json")
            tree = serialization.msgpack_restore(raw)
            step, state = tree["step"], tree["state"]
            if step != note["step"]:
                raise ValueError(f"checkpoint.json says step {note['step']}, the state is {step}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            damaged.append(f"{path} is damaged: {error}.")
            continue
        for line in damaged:
            print(f"{line} Using {path.name}, step {step:,}.", file=sys.stderr)
        if damaged and keep_damaged:
            shutil.rmtree(folder / "checkpoint.damaged", ignore_errors=True)
            (folder / "checkpoint").rename(folder / "checkpoint.damaged")
        return step, state
    if damaged:
        raise RunError("\n".join([*damaged, f"No intact checkpoint is left in {folder}."]))
    return 0, None


def fill(template, saved):
    """`template`, a pytree of arrays or shapes, filled from a state dict with jax arrays.

    Raises RunError, which names the leaf whose shape or dtype differs.
    """

    def place(key, like, x):
        if (x.shape, x.dtype) != (like.shape, like.dtype):
            name = jax.tree_util.keystr(key)
            differ = f"{name} is {x.dtype}{list(x.shape)}, not {like.dtype}{list(like.shape)}"
            raise ValueError(differ)
        device = like.sharding if isinstance(like, jax.Array) else None
        return jnp.array(x, device=device)  # a copy, for the next chunk to donate

    try:
        tree = serialization.to_state_dict(template)
        tree = jax.tree_util.tree_map_with_path(place, tree, saved)
        return serialization.from_state_dict(template, tree)
    except (ValueError, AttributeError) as error:
        raise RunError(f"The checkpoint does not fit this program: {error}.") from None
