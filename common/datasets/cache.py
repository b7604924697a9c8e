"""The cache of loaded datasets: plain .npy files. No failure of the cache stops a load.

about.json holds a checksum of each array; an entry with another checksum counts as missing.
"""

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np

from common.datasets import arrow
from common.experiment import files

FORMAT = 5  # increased whenever the arrays read from a file change
ARRAYS = ("obs", "action", "reward", "next_obs", "done", "start", "length")
ABOUT = ("file", "layout", "ordered", "sha256", "verified", "notes", "timeouts", "obs")


def place(source, env):
    """The folder of the entry of a Source read for an evaluation.Env, or None without a home.

    Its name changes with the files and with everything else that the arrays depend on.
    """
    sources = [source.path, source.metadata]
    if source.path.is_dir():
        sources = [source.metadata, *arrow.paths(source.path)]
    stats = [f.stat() for f in sources if f.is_file()]
    # an edit can keep size and mtime, but not ctime
    stats = [(s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for s in stats]
    what = source._replace(path=str(source.path.resolve()))
    bounds = env.low.tolist(), env.high.tolist(), env.num_actions
    how = FORMAT, env.obs_dim, *bounds, env.limit, env.clip, stats
    folder, stamp = (hashlib.sha256(repr(x).encode()).hexdigest()[:16] for x in (what, how))
    with suppress(OSError):
        return files.cache_folder() / folder / stamp


def read(folder):
    """(arrays, about) as given to `write`, or None if there is no intact entry."""
    if folder is None:
        return None
    try:
        kept = files.read_json(folder / "about.json")
        about = {name: kept["about"][name] for name in ABOUT}
        arrays = {}
        for name in ARRAYS:
            with files.open_plain(folder / f"{name}.npy") as file:
                arrays[name] = np.load(file, allow_pickle=False)
        whole = kept["crc32"] == {name: files.checksum(x) for name, x in arrays.items()}
        return (arrays, about) if whole and type(about["notes"]) is list else None
    except Exception:  # numpy raises many kinds for a damaged header
        return None


def write(folder, arrays, about):
    """Writes an entry to a temporary folder and renames it; removes older entries of the source.

    folder: of `place`. arrays: {name: array} of ARRAYS. about: plain data.
    """
    if folder is None:
        return
    part = None
    try:
        files.make_folder(folder.parent)
        for old in folder.parent.iterdir():
            shutil.rmtree(old, ignore_errors=True)
        part = Path(tempfile.mkdtemp(dir=folder.parent))
        for name, array in arrays.items():
            with open(part / f"{name}.npy", "wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
        crc32 = {name: files.checksum(x) for name, x in arrays.items()}
        files.write(part / "about.json", json.dumps({"about": about, "crc32": crc32}))
        part.rename(folder)
    except (OSError, ValueError):  # a read-only home or a full disk: no entry
        if part:
            shutil.rmtree(part, ignore_errors=True)
