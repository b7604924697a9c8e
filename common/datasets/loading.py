"""From a dataset's name to a Dataset: find the file, read it, cut it into episodes, cache it."""

import contextlib
import json
import sys

import numpy as np

from common import evaluation
from common.datasets import cache, checked, readers, sources
from common.datasets.checked import DatasetError
from common.datasets.d4rl import REFERENCE
from common.datasets.dataset import Dataset
from common.experiment import printable, runtime


def load(name: str, env_id: str = "") -> Dataset:
    """The Dataset `name`: a D4RL name, a Minari id, or a path to an HDF5 file in D4RL's layout.

    env_id: Gymnasium id to score a file on; other datasets have their own. Notes about the data go
    to stderr. Raises DatasetError if the dataset cannot be found or read.
    """
    source, origin = sources.find(name, env_id)
    place = cache.place(source)
    kept = cache.read(place)
    if kept is None:
        try:
            kept = read(source, origin)
        except MemoryError:
            free = f"this machine has {runtime.free_memory():,} bytes of memory left"
            raise DatasetError(f"{source.path}: does not fit: {free}") from None
        cache.write(place, *kept)
    arrays, about = kept
    for note in about["provenance"]["notes"]:
        print(printable(f"{name}: {note}"), file=sys.stderr)
    return Dataset(name=name, **arrays, **about)


def read(source, origin):
    """Reads and checks a file: ({name: array} of cache.ARRAYS, the other fields of a Dataset).

    source: Source of a file on this machine. origin: where it came from, for provenance. Raises
    DatasetError.
    """
    path, notes, metadata = source.path, [], {}
    file = checked.CheckedFile(path)
    sha256 = file.sha256()
    verified = sha256 == source.sha256 if source.sha256 else None
    if verified is False:
        notes.append(f"warning: {path} is not D4RL's file: SHA-256 {sha256}, not {source.sha256}")
    elif verified is None and source.layout == "D4RL":
        notes.append(f"not verified, no known hash: {path} has SHA-256 {sha256}")
    if source.layout == "Minari":
        metadata = readers.read_metadata(path.with_name("metadata.json"))
    env_id, env = choose_env(source, metadata, notes)
    rows = (readers.read_minari if source.layout == "Minari" else readers.read_d4rl)(file, env)
    file.close()
    arrays, dropped = flatten(rows, env)
    if not len(arrays["start"]):
        raise file.refusal("observations", "no transition whose next_obs is known")
    stand_in = int((~rows.known & rows.terminal).sum())
    if dropped or stand_in:
        notes.append(f"no next_observations: {dropped:,} last rows of episodes are left out, "
                     f"{stand_in:,} terminal rows have obs in place of next_obs")  # fmt: skip
    ref = reference(source, metadata, env_id)
    kept = ("algorithm_name", "author", "description", "minari_version", "stillwater")
    about = {"env_id": env_id, "ref_min": ref[0], "ref_max": ref[1]}
    about["provenance"] = {
        "file": str(path), "layout": source.layout, "source": origin, "sha256": sha256,
        "verified": verified, "notes": notes, "timeouts": int((rows.end & ~rows.terminal).sum()),
        "metadata": {key: metadata[key] for key in kept if key in metadata},
    }  # fmt: skip
    return arrays, about


def choose_env(source, metadata, notes):
    """(Gymnasium id to score on or "", evaluation.Env): `source.env_id`, else the metadata's.

    The id is the only thing taken from Minari's environment spec, and only if Gymnasium has
    registered it; no code of the spec is run. Appends to `notes`. Raises DatasetError.
    """
    own = ""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        spec = metadata["env_spec"]
        own = str((json.loads(spec) if isinstance(spec, str) else spec)["id"])[:100]
    if source.env_id and own not in ("", source.env_id):
        raise DatasetError(f"--env-id {source.env_id}: {source.path} holds data of {own}.")
    try:
        env = evaluation.inspect(source.env_id or own) if source.env_id or own else evaluation.Env()
    except evaluation.EvaluationError as error:
        if source.env_id:
            raise DatasetError(str(error)) from None
        notes.append(f"cannot be scored: {error}")
        env = evaluation.Env()
    return env.env_id, env._replace(limit=env.limit or source.limit)


def reference(source, metadata, env_id):
    """Returns that score 0 and 100, from the name, the metadata or the environment; or Nones."""
    told = source.ref or tuple(metadata.get(f"ref_{k}_score") for k in ("min", "max"))
    if all(type(r) in (int, float) for r in told) and -1e300 < told[0] < told[1] < 1e300:
        return float(told[0]), float(told[1])
    return REFERENCE.get(env_id.rsplit("-", 1)[0], (None, None))


def flatten(rows: readers.Rows, env):
    """({name: array} of cache.ARRAYS, number of rows left out).

    Left out are rows with an unknown next_obs, except terminal ones. Actions are scaled from the
    environment's bounds to [-1, 1].
    """
    keep = rows.known | rows.terminal
    episode = np.cumsum(np.r_[0, rows.end[:-1]])[keep]
    _, start, length = np.unique(episode, return_index=True, return_counts=True)
    middle, half = (env.high + env.low) / 2, (env.high - env.low) / 2  # mostly 0 and 1: exact
    action = np.clip((rows.action - middle) / half, -1, 1)
    columns = rows.obs, action, rows.reward, rows.next_obs, rows.terminal
    columns = [np.ascontiguousarray(column[keep], np.float32) for column in columns]
    arrays = *columns, start.astype(np.int64), length.astype(np.int64)
    return dict(zip(cache.ARRAYS, arrays, strict=True)), int((~keep).sum())
