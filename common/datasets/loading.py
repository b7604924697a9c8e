"""From a dataset's name to a Dataset: find the file, read it, cut it into episodes, cache it."""

import hashlib
import os
import sys
from pathlib import Path

import numpy as np

from common import evaluation
from common.datasets import arrow, cache, memory, ogbench, readers, recorded, sources
from common.datasets.checked import CheckedFile, DatasetError
from common.datasets.d4rl import REFERENCE, Source
from common.datasets.dataset import Dataset
from common.experiment import printable, runtime


def load(name: str | list[str], env_id: str = "") -> Dataset:
    """The Dataset `name`: a D4RL name, a Minari id, an OGBench task, or a path to an HDF5 file.

    Several names, in a list or separated by commas, are joined as by `join`.
    env_id: Gymnasium id to score a file on, with options or without, as in
    'Hopper-v5 {"max_episode_steps": 200}'; other datasets have their own. Notes about the data go
    to stderr. Raises DatasetError if the dataset cannot be found or read.
    """
    if isinstance(name, str) and "," in name and not os.path.exists(os.path.expanduser(name)):
        name = name.split(",")
    if not isinstance(name, str):
        return join([load(one.strip(), env_id) for one in name])
    if ogbench.split(name):
        fields, origin = ogbench.arrays(name)
        return _from_fields(name, fields, origin)
    source, origin = sources.find(name, env_id)
    metadata = {}
    if source.layout == "Minari":
        metadata = readers.read_metadata(source.metadata)
    env, *told = recorded.environment(source, metadata)
    place = cache.place(source, env)
    kept = cache.read(place)
    if kept is None:
        try:
            kind = arrow.ArrowFolder if source.path.is_dir() else CheckedFile
            kept = read(kind(source.path), source, env)
        except MemoryError:
            free = f"this machine has {runtime.free_memory():,} bytes of memory left"
            raise DatasetError(f"{source.path}: does not fit: {free}") from None
        cache.write(place, *kept)
    return _dataset(name, *kept, source, origin, metadata, env, *told)


def from_arrays(
    obs, action, reward, done, timeout=None, next_obs=None, env_id="", name="arrays"
) -> Dataset:
    """A Dataset of arrays in memory, with the same checks as for files.

    Rows are in the order of recording, one episode after another.

    obs: (N, D). action: (N, A) within the bounds of `env_id`, or in [-1, 1] without an env_id;
    discrete actions: (N,) whole numbers from 0.
    reward: (N,). done: (N,), 1 at true terminals. timeout: (N,), 1 at time limits. next_obs:
    (N, D). Without timeout and next_obs, episodes are cut at the time limit of `env_id`.
    env_id: Gymnasium id to score on. name: used for run folders. Raises DatasetError.
    """
    fields = dict(obs=obs, action=action, reward=reward, done=done, timeout=timeout)
    return _from_fields(name, fields | dict(next_obs=next_obs, env_id=env_id), "memory")


def _from_fields(name, fields, origin):
    """The Dataset of the arguments of `from_arrays`."""
    source = Source(name, "arrays", fields["env_id"])
    env, *told = recorded.environment(source, {})
    arrays, facts = read(memory.Arrays(name, fields), source, env)
    return _dataset(name, arrays, facts, source, origin, {}, env, *told)


def join(parts: list[Dataset]) -> Dataset:
    """One Dataset of all episodes of several datasets of one environment, in their order.

    All rows count alike, so the largest part has the most weight. Whatever is computed from data
    (standardised observations, scales of rewards and returns) is computed from all rows together;
    the references of scores are those that the parts share. Raises DatasetError for parts that
    differ in environment, sizes, references or units of actions.
    """
    if len(parts) == 1:
        return parts[0]
    names, about = [part.name for part in parts], [part.provenance for part in parts]
    first, joined = parts[0], ",".join(names)
    for part in parts:
        for what, ours in _kind(first).items():
            if ours != (theirs := _kind(part)[what]):
                told = f"{ours} of {first.name} and {theirs} of {part.name}"
                raise DatasetError(f"datasets cannot be joined: their {what} differ, {told}.")
    sums = [its["sha256"] for its in about]
    if twice := [name for i, name in enumerate(names) if sums[i] in sums[:i]]:
        raise DatasetError(f"{twice[0]}: is joined twice; its rows would count twice.")
    arrays = {name: np.concatenate([getattr(x, name) for x in parts]) for name in cache.ARRAYS}
    first_rows = np.cumsum([0, *(len(part.obs) for part in parts[:-1])])
    arrays["start"] += np.repeat(first_rows, [len(part.start) for part in parts])
    known = {its["verified"] for its in about}
    facts = {key: ", ".join(dict.fromkeys(its[key] for its in about))
             for key in ("file", "layout", "source")}  # fmt: skip
    facts |= {
        "ordered": all(its["ordered"] for its in about),
        "sha256": hashlib.sha256("".join(sums).encode()).hexdigest(),
        "verified": False if False in known else None if None in known else True,
        "notes": [f"{x.name}: {note}" for x in parts for note in x.provenance["notes"]],
        "timeouts": sum(its["timeouts"] for its in about),
        "obs": about[0]["obs"],
        "metadata": {},
        "parts": [{"name": part.name, **part.provenance} for part in parts],
    }
    if not first.env_id:
        facts["notes"].append("no environment is known: nothing shows that the data share one")
        print(printable(f"{joined}: {facts['notes'][-1]}"), file=sys.stderr)
    refs = first.ref_min, first.ref_max
    count = first.num_actions
    return Dataset(joined, first.env_id, *arrays.values(), *refs, about[0] | facts, count)


def infos(dataset: Dataset, name: str) -> np.ndarray | None:
    """Numbers that a file in Minari's layout holds beside its transitions, in infos/NAME.

    (N, K) float32, a row for each transition; None if the dataset has none, is joined or is of
    arrays. Raises DatasetError for damaged ones.
    """
    path = Path(dataset.provenance.get("file") or ".")
    if dataset.provenance.get("layout") != "Minari" or not path.is_file():
        return None
    file = CheckedFile(path)
    try:
        fields = [f"{episode}/infos/{name}" for episode in file.episodes()]
        if file.item(fields[0]) is None:
            return None
        parts = [file.array(field, 2) for field in fields]
        if [len(part) for part in parts] != dataset.length.tolist():
            raise file.refusal(f"infos/{name}", "numbers of rows differ from those of the actions")
        if len(widths := {part.shape[1] for part in parts}) > 1:
            raise file.refusal(f"infos/{name}", f"numbers of columns differ: {sorted(widths)}")
        return np.concatenate(parts)
    finally:
        file.close()


def _kind(data):
    """{what joined datasets share, in words: its value}."""
    shape, about = data.action.shape[1:], data.provenance
    shape = shape or (1,)
    bounds = [np.broadcast_to(about[f"action_{end}"], shape).tolist() for end in ("low", "high")]
    return {
        "environments": data.env_id or "none",
        "observations": data.obs.shape[1],
        "actions": f"{data.num_actions} discrete" if data.num_actions else shape[0],
        "references": (data.ref_min, data.ref_max),
        "action bounds": bounds,
    }


def _dataset(name, arrays, facts, source, origin, metadata, env, bounds, notes):
    """The Dataset of checked arrays and facts; prints its notes."""
    for note in (notes := [*notes, *facts["notes"]]):
        print(printable(f"{name}: {note}"), file=sys.stderr)
    kept = ("algorithm_name", "author", "description", "minari_version", "stillwater")
    provenance = facts | {
        "source": origin,
        "notes": notes,
        "metadata": {key: metadata[key] for key in kept if key in metadata},
        "action_low": np.asarray(bounds[0], float).tolist(),
        "action_high": np.asarray(bounds[1], float).tolist(),
        "is_drawn": env.is_drawn,
    }
    ref = reference(source, metadata, env.env_id)
    count = 0
    if arrays["action"].ndim == 1:
        count = env.num_actions or int(arrays["action"].max()) + 1
    return Dataset(name, env.env_id, *arrays.values(), *ref, provenance, count)


def read(file, source, env=None):
    """Reads and checks a file: ({name: array} of cache.ARRAYS, facts for provenance).

    file: a CheckedFile, or Arrays. source: its Source. env: the evaluation.Env that it must agree
    with. Raises DatasetError.
    """
    env, notes = env or evaluation.Env(limit=source.limit), []
    sha256 = file.sha256()
    verified = sha256 == source.sha256 if source.sha256 else None
    if verified is False:
        known = f"SHA-256 {sha256}, not {source.sha256}"
        notes.append(f"warning: {source.path} is not D4RL's file: {known}")
    elif verified is None and source.layout == "D4RL":
        notes.append(f"not verified, no known hash: {source.path} has SHA-256 {sha256}")
    rows = (readers.read_minari if source.layout == "Minari" else readers.read_d4rl)(file, env)
    file.close()
    arrays, dropped = flatten(rows, env)
    if not len(arrays["start"]):
        raise file.refusal("observations", "no transition whose next_obs is known")
    stand_in = int((~rows.known & rows.terminal).sum())
    if dropped or stand_in:
        notes.append(f"no next_observations: {dropped:,} last rows of episodes are left out, "
                     f"{stand_in:,} terminal rows have obs in place of next_obs")  # fmt: skip
    if source.layout != "D4RL":  # published files are used as they are
        notes += file.notes
    return arrays, {
        "file": str(source.path), "layout": source.layout, "ordered": file.ordered,
        "sha256": sha256, "verified": verified, "notes": notes,
        "timeouts": int((rows.end & ~rows.terminal).sum()), "obs": file.parts,
    }  # fmt: skip


def reference(source, metadata, env_id):
    """Returns that score 0 and 100, from the name, the metadata or the environment; or Nones."""
    told = source.ref or tuple(metadata.get(f"ref_{k}_score") for k in ("min", "max"))
    if all(type(r) in (int, float) for r in told) and -1e300 < told[0] < told[1] < 1e300:
        return float(told[0]), float(told[1])
    if " " in env_id:  # with options the environment is another one
        return None, None
    return REFERENCE.get(env_id.rpartition("-")[0], (None, None))


def flatten(rows: readers.Rows, env):
    """({name: array} of cache.ARRAYS, number of rows left out).

    Left out are rows with an unknown next_obs, except terminal ones. Actions that are vectors are
    scaled from the environment's bounds to [-1, 1].
    """
    keep = rows.known | rows.terminal
    episode = np.cumsum(np.r_[0, rows.end[:-1]])[keep]
    _, start, length = np.unique(episode, return_index=True, return_counts=True)
    action = rows.action
    if action.ndim == 2:
        middle, half = (env.high + env.low) / 2, (env.high - env.low) / 2  # mostly 0, 1: exact
        action = np.clip((action - middle) / half, -1, 1).astype(np.float32)
    columns = rows.obs, rows.reward, rows.next_obs, rows.terminal
    columns = [np.ascontiguousarray(column[keep], np.float32) for column in columns]
    columns.insert(1, np.ascontiguousarray(action[keep]))
    arrays = *columns, start.astype(np.int64), length.astype(np.int64)
    return dict(zip(cache.ARRAYS, arrays, strict=True)), int((~keep).sum())
