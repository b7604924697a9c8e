"""Every offline dataset a user has, as flat arrays: D4RL names, Minari ids, HDF5 files.

    data = datasets.load("halfcheetah-medium-v2")  # or "mujoco/hopper/medium-v0", or "my.hdf5"
    batch = data.transitions()

Look at one: python -m common.datasets NAME [--env-id Hopper-v5] [--plot FILE.png]

A name becomes a file in sources.py, a file checked arrays in readers.py; here those become
episodes, kept by cache.py ($XDG_CACHE_HOME/stillwater or ~/.cache/stillwater; safe to delete).
"""

import contextlib
import json
import sys
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from common import evaluation
from common.datasets import cache, readers, sources
from common.datasets.d4rl import REFERENCE
from common.datasets.sources import DatasetError
from common.experiment import printable, runtime


class Batch(NamedTuple):
    """N transitions, float32.

    Where a file does not tell a terminal row's next_obs, it is obs itself: TD masks it by `done`; a
    dynamics model leaves out the rows with done = 1 and next_obs == obs.
    """

    obs: np.ndarray  # (N, D)
    action: np.ndarray  # (N, A) in [-1, 1]
    reward: np.ndarray  # (N,)
    next_obs: np.ndarray  # (N, D) never of another episode
    done: np.ndarray  # (N,) 1 at true terminals, 0 at time limits


class Steps(NamedTuple):
    """The N rows in their order, for models of sequences; see `windows`."""

    obs: np.ndarray  # (N, D)
    action: np.ndarray  # (N, A) in [-1, 1]
    reward: np.ndarray  # (N,)
    done: np.ndarray  # (N,) 1 at true terminals, 0 at time limits
    time: np.ndarray  # (N,) int32, steps since the episode's start
    end: np.ndarray  # (N,) int32, the row after the episode's last
    returns_to_go: np.ndarray  # (N,) sum of gamma^k reward from this row to the episode's end


def windows(rows, end, size, left=False):
    """The `size` steps from each of `rows` (...) on, but not beyond the episode: for use in jit.

    end: Steps.end. Returns (index (..., size) int32 into the rows, mask (..., size) bool). What
    an episode's end cuts off is padded, on the right or the `left`: mask is False there, and index
    is that of the window's nearest step. Rows drawn uniformly draw episodes by their length.
    """
    rows = jnp.asarray(rows)[..., None]
    missing = jnp.maximum(rows + size - end[rows], 0)
    index = rows + jnp.arange(size, dtype=jnp.int32) - (missing if left else 0)
    mask = (index >= rows) & (index < end[rows])
    return index.clip(rows, end[rows] - 1), mask


@dataclass(frozen=True)
class Dataset:
    """N transitions in E episodes, one after another."""

    name: str  # as asked for
    env_id: str  # Gymnasium id to score on; "" if it cannot be scored
    obs: np.ndarray  # this and the next four as in Batch
    action: np.ndarray
    reward: np.ndarray
    next_obs: np.ndarray
    done: np.ndarray
    start: np.ndarray  # (E,) int64 first row of each episode
    length: np.ndarray  # (E,) int64 its number of rows, at least 1
    ref_min: float | None  # undiscounted return that scores 0; None: there is no score
    ref_max: float | None  # undiscounted return that scores 100
    provenance: dict  # JSON-able; `verified`: the hash is the known one (None: none is known)

    def transitions(self, scale_reward=False) -> Batch:
        """All rows. scale_reward: times 1000 / (best - worst episode return), as IQL's authors do;
        left alone where all episodes return the same."""
        spread = float(np.ptp(self.returns())) if scale_reward else 0.0
        reward = self.reward * np.float32(1000 / spread) if spread > 0 else self.reward
        return Batch(self.obs, self.action, reward, self.next_obs, self.done)

    def steps(self, gamma=1.0, at_end=0.0) -> Steps:
        """All rows. at_end: added to the reward of true terminals, in `returns_to_go` alone."""
        returns_to_go = self.reward.astype(np.float64) + at_end * self.done
        for t in reversed(range(self.length.max() - 1)):  # every episode's step t at once
            rows = self.start[self.length > t + 1] + t
            returns_to_go[rows] += gamma * returns_to_go[rows + 1]
        start, length = (np.repeat(x, self.length) for x in (self.start, self.length))
        time, end = np.arange(len(start)) - start, start + length
        return Steps(
            self.obs, self.action, self.reward, self.done,
            time.astype(np.int32), end.astype(np.int32), returns_to_go.astype(np.float32),
        )  # fmt: skip

    def returns(self) -> np.ndarray:
        """(E,) float64 undiscounted return of each episode."""
        return np.add.reduceat(self.reward.astype(np.float64), self.start)

    def score(self, returns) -> np.ndarray:
        """100 (R - ref_min) / (ref_max - ref_min), shape as given; NaN without references."""
        if self.ref_min is None or self.ref_max is None:
            return np.full(np.shape(returns), np.nan)
        return (
            100 * (np.asarray(returns, np.float64) - self.ref_min) / (self.ref_max - self.ref_min)
        )


def load(name: str, env_id: str = "") -> Dataset:
    """The dataset `name`: a D4RL name, a Minari id, or a path to an HDF5 file in D4RL's layout.

    env_id: Gymnasium id to score a bare file on. Raises DatasetError, whose message says why.
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
    """Reads and checks a file: (cache.ARRAYS by name, the other fields of Dataset but its name)."""
    path, notes, metadata = source.path, [], {}
    reader = readers.Reader(path)
    sha256 = reader.sha256()
    verified = sha256 == source.sha256 if source.sha256 else None
    if verified is False:
        notes.append(f"warning: {path} is not D4RL's file: SHA-256 {sha256}, not {source.sha256}")
    elif verified is None and source.layout == "D4RL":
        notes.append(f"unverified, no hash is known for it: {path} has SHA-256 {sha256}")
    if source.layout == "Minari":
        metadata = readers.read_metadata(path.with_name("metadata.json"))
    env_id, env = choose_env(source, metadata, notes)
    rows = (readers.read_minari if source.layout == "Minari" else readers.read_d4rl)(reader, env)
    reader.file.close()
    arrays, dropped = flatten(rows, env)
    if not len(arrays["start"]):
        raise reader.refusal("observations", "no transition whose next_obs is known")
    stand_in = int((~rows.known & rows.terminal).sum())
    if dropped or stand_in:
        notes.append(f"no next_observations: {dropped:,} last rows of episodes left out, "
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
    """(id to score on or "", evaluation.Env): the id asked for, else the one in Minari's metadata.

    Of that only the id is used, and only if Gymnasium has registered it: nothing in it is run.
    """
    own = ""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        spec = metadata["env_spec"]
        own = str((json.loads(spec) if isinstance(spec, str) else spec)["id"])[:100]
    if source.env_id and own not in ("", source.env_id):
        raise DatasetError(f"{source.path}: is data of {own!r}, not of --env-id {source.env_id}")
    try:
        env = evaluation.inspect(source.env_id or own) if source.env_id or own else evaluation.Env()
    except evaluation.EvaluationError as error:
        if source.env_id:
            raise DatasetError(str(error)) from None
        notes.append(f"cannot be scored: {error}")
        env = evaluation.Env()
    return env.env_id, env._replace(limit=env.limit or source.limit)


def reference(source, metadata, env_id):
    """Returns that score 0 and 100: of the name, the metadata or the environment, or Nones."""
    told = source.ref or tuple(metadata.get(f"ref_{k}_score") for k in ("min", "max"))
    if all(type(r) in (int, float) for r in told) and -1e300 < told[0] < told[1] < 1e300:
        return float(told[0]), float(told[1])
    return REFERENCE.get(env_id.rsplit("-", 1)[0], (None, None))


def flatten(rows: readers.Rows, env):
    """(cache.ARRAYS by name, rows left out): those whose next_obs is unknown, unless terminal."""
    keep = rows.known | rows.terminal
    episode = np.cumsum(np.r_[0, rows.end[:-1]])[keep]
    _, start, length = np.unique(episode, return_index=True, return_counts=True)
    middle, half = (env.high + env.low) / 2, (env.high - env.low) / 2  # mostly 0 and 1: exact
    action = np.clip((rows.action - middle) / half, -1, 1)
    columns = rows.obs, action, rows.reward, rows.next_obs, rows.terminal
    columns = [np.ascontiguousarray(column[keep], np.float32) for column in columns]
    arrays = *columns, start.astype(np.int64), length.astype(np.int64)
    return dict(zip(cache.ARRAYS, arrays, strict=True)), int((~keep).sum())
