"""A training state on disk: msgpack with its hash, no pickle, never half-written.

`checkpoint/` holds `state.msgpack` (flax.serialization; {"step", "state"}) and `checkpoint.json`
({"step", "sha256", "bytes"}); `checkpoint.old/` the one before it.
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
    """Text or bytes, whole or not at all: under another name, flushed to the disk, renamed."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def lock(folder):
    """Keeps other processes from training in a run folder; RunError where one already does.

    Does nothing where the file system has no such locks.
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
        pass  # no locks here
    try:
        yield
    finally:
        os.close(place)  # releases the lock, as does the death of the process


def save(folder, step, state):
    """checkpoint.tmp -> checkpoint -> checkpoint.old: one of them is complete at any instant.

    state: a pytree of arrays (typed PRNG keys excepted). Raises OSError, the last one then stands.
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
        if now.exists():  # else `old` may be the only whole one
            shutil.rmtree(old, ignore_errors=True)
            now.rename(old)
        new.rename(now)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def read(folder, keep_damaged=False):
    """(step, state dict) of the newest whole checkpoint; (0, None) where none was ever written.

    A damaged one is reported on stderr, the one before it read; RunError where none is whole.
    keep_damaged: rename it `checkpoint.damaged`, lest `save` keep it as a whole one.
    """
    damaged = []
    for path in filter(Path.exists, (folder / "checkpoint", folder / "checkpoint.old")):
        try:
            note = json.loads((path / "checkpoint.json").read_text("utf-8"))
            raw = (path / "state.msgpack").read_bytes()
            if (size := note["bytes"]) != len(raw):
                raise ValueError(f"state.msgpack has {len(raw)} bytes instead of {size}")
            if note["sha256"] != hashlib.sha256(raw).hexdigest():
                raise ValueError("state.msgpack has another SHA-256 than checkpoint.json says")
            tree = serialization.msgpack_restore(raw)
            step, state = tree["step"], tree["state"]
            if step != note["step"]:
                raise ValueError(f"checkpoint.json says step {note['step']} for {step}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            damaged.append(f"{path} is damaged: {error}.")
            continue
        for line in damaged:
            print(f"{line} Taking {path.name}, step {step:,}.", file=sys.stderr)
        if damaged and keep_damaged:
            shutil.rmtree(folder / "checkpoint.damaged", ignore_errors=True)
            (folder / "checkpoint").rename(folder / "checkpoint.damaged")
        return step, state
    if damaged:
        raise RunError("\n".join([*damaged, f"No whole checkpoint is left in {folder}."]))
    return 0, None


def fill(template, saved):
    """`template`, a pytree of arrays or shapes, with the contents of a state dict, as jax arrays.

    RunError names the leaf whose shape or dtype differs.
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
