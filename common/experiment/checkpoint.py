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

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from common.experiment import files


class RunError(files.UserError):
    """An error of a run that the user can correct."""


@contextmanager
def lock(folder):
    """Keeps other processes from changing a run folder. Raises RunError if one already trains.

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
        files.write(new / "state.msgpack", raw)
        files.write(new / "checkpoint.json", json.dumps(note))
        if now.exists():  # else `old` may be the only intact one
            shutil.rmtree(old, ignore_errors=True)
            now.rename(old)
        new.rename(now)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def read(folder, keep_damaged=False):
    """(step, state dict) of the newest intact checkpoint; (0, None) if none was ever written.

    If the newest one is damaged, stderr says so and the one before it is read. keep_damaged, only
    under the lock: rename a damaged one to `checkpoint.damaged`, so that `save` does not keep it as
    `checkpoint.old`. Raises RunError if all are damaged. Without the lock a run may save meanwhile;
    then the folder is read again.
    """
    paths = folder / "checkpoint", folder / "checkpoint.old"
    for _ in range(20):
        before = list(map(_identity, paths))
        found, damaged = _read_intact(paths)
        if (found and not damaged) or before == list(map(_identity, paths)):
            break
    if damaged and not found:
        raise RunError("\n".join([*damaged, f"No intact checkpoint is left in {folder}."]))
    for line in damaged:
        print(files.printable(f"{line} Using checkpoint.old, step {found[0]:,}."), file=sys.stderr)
    if damaged and keep_damaged:
        shutil.rmtree(folder / "checkpoint.damaged", ignore_errors=True)
        (folder / "checkpoint").rename(folder / "checkpoint.damaged")
    return found or (0, None)


def _identity(path):
    """What tells a folder from another one of that name; None without one."""
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_ino, about.st_mtime_ns


def _read_intact(paths):
    """((step, state dict) of the first intact checkpoint or None, sentences on those before it)."""
    damaged = []
    for path in filter(os.path.lexists, paths):
        try:
            note = files.read_json(path / "checkpoint.json")
            raw = files.read(path / "state.msgpack", most=2**40)
            if (size := note["bytes"]) != len(raw):
                raise ValueError(f"state.msgpack has {len(raw)} bytes instead of {size}")
            if note["sha256"] != hashlib.sha256(raw).hexdigest():
                raise ValueError("state.msgpack does not have the SHA-256 in checkpoint.json")
            tree = serialization.msgpack_restore(raw)
            step, state = tree["step"], tree["state"]
            if type(step) is not int or step != note["step"]:
                raise ValueError(f"checkpoint.json says step {note['step']}, the state is {step}")
        except Exception as error:  # flax and msgpack raise many kinds for foreign content
            damaged.append(f"{path} is damaged: {error or type(error).__name__}.")
            continue
        return (step, state), damaged
    return None, damaged


def _empty_fields(tree):
    """The fields of a state dict whose arrays hold no number: older checkpoints may lack them."""
    fields = tree.items() if isinstance(tree, dict) else ()
    leaves = {name: jax.tree.leaves(x) for name, x in fields}
    empty = [name for name, x in leaves.items() if x and not any(leaf.size for leaf in x)]
    return {name: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree[name]) for name in empty}


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
        saved = _empty_fields(tree) | saved if isinstance(saved, dict) else saved
        tree = jax.tree_util.tree_map_with_path(place, tree, saved)
        return serialization.from_state_dict(template, tree)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"The checkpoint does not fit this program: {error}.") from None
