"""The flat cache of datasets: plain .npy files; nothing that goes wrong with it stops a load."""

import hashlib
import json
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

from common import evaluation

FORMAT = 2  # goes up whenever what is read from a file changes
ARRAYS = ("obs", "action", "reward", "next_obs", "done", "start", "length")


def paths(source):
    """(folder of this source, name that changes with the files and with what reads them)."""
    files = [source.path, source.path.with_name("metadata.json")]
    stats = [(f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    what = source._replace(path=str(source.path.resolve()))
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    how = FORMAT, version("gymnasium"), evaluation.mazes_installed(), stats
    folder, stamp = (hashlib.sha256(repr(x).encode()).hexdigest()[:16] for x in (what, how))
    return Path(root, "stillwater", folder), stamp


def read(folder):
    """(arrays, about) as `write` kept them, or None."""
    try:
        about = json.loads((folder / "about.json").read_text())
        arrays = {k: np.load(folder / f"{k}.npy", allow_pickle=False) for k in ARRAYS}
        whole = all(len(arrays[k]) == arrays["length"].sum() for k in ARRAYS[:5])
        return (arrays, about) if whole else None
    except (OSError, ValueError, EOFError, KeyError):
        return None


def write(folder, stamp, arrays, about):
    """Into a temporary folder, then renamed; what stood there of an older content goes."""
    part = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            shutil.rmtree(old, ignore_errors=True)
        part = Path(tempfile.mkdtemp(dir=folder))
        for name, array in arrays.items():
            np.save(part / f"{name}.npy", array)
        (part / "about.json").write_text(json.dumps(about))
        part.rename(folder / stamp)
    except (OSError, ValueError):  # a read-only home, a full disk: the next load reads the file
        if part:
            shutil.rmtree(part, ignore_errors=True)
