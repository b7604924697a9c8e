"""From an HDF5 file that nobody vouches for to checked arrays: D4RL's layout and Minari's.

Only numbers that lie in the file itself are read: no pickles, no links, no code from metadata. What
a file declares is held against its size before memory is taken.
"""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from common.datasets import hdf5
from common.datasets.sources import MAGIC, DatasetError
from common.evaluation import Env
from common.experiment import runtime

MEMORY = 16 * 2**30  # bytes that the arrays of one file may take
COPIES = 4  # of them, while episodes are made
DEFLATE = 1100  # gzip's best ratio, about


class Rows(NamedTuple):
    """N rows as a file has them; `known` is False where it does not tell next_obs."""

    obs: np.ndarray  # (N, D) float32
    action: np.ndarray  # (N, A) float32, within the environment's bounds up to rounding
    reward: np.ndarray  # (N,) float32
    next_obs: np.ndarray  # (N, D) float32
    terminal: np.ndarray  # (N,) bool
    end: np.ndarray  # (N,) bool, last row of an episode
    known: np.ndarray  # (N,) bool


class Reader:
    """Checked arrays of the HDF5 file `path`; a refusal is a DatasetError naming file and field."""

    def __init__(self, path: Path):
        self.path, self.left = path, min(MEMORY, runtime.free_memory() // COPIES)
        try:
            with open(path, "rb") as file:
                head = file.read(8)
            if head != MAGIC:
                raise DatasetError(f"{path}: not an HDF5 file (it begins with {head!r})")
            self.bytes = path.stat().st_size
            self.file = h5py.File(path, "r", locking=False)
        except Exception as error:  # h5py raises many kinds for a damaged file, here and below
            raise DatasetError(f"{path}: cannot be opened: {error}") from None

    def sha256(self):
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def refusal(self, field, why):
        return DatasetError(f"{self.path}: {field}: {why}")

    def episodes(self):
        """Names of the groups at the top that are Minari's episodes, in their order."""
        try:
            names = [name for name in self.file if re.fullmatch(r"episode_\d+", name, re.ASCII)]
        except Exception as error:
            raise self.refusal("episodes", f"cannot be listed: {error}") from None
        return sorted(names, key=lambda name: (len(name), name))

    def item(self, field):
        """The group or array at `field`, or None; every step of the way lies in this file."""
        here = self.file
        try:
            for name in field.split("/"):
                link = here.get(name, getlink=True) if isinstance(here, h5py.Group) else None
                if link is None:
                    return None
                if not isinstance(link, h5py.HardLink):
                    kind = "an external" if isinstance(link, h5py.ExternalLink) else "a soft"
                    raise self.refusal(field, f"is {kind} link, which is not followed")
                here = here[name]
        except Exception as error:
            raise self.refusal(field, f"cannot be read: {error}") from None
        return here

    def array(self, field, ndim):
        """The finite numbers at `field`: float32, `ndim` axes, only the first of which may be 0."""
        item = self.item(field)
        if not isinstance(item, h5py.Dataset):
            raise self.refusal(field, "missing" if item is None else "a group, not an array")
        try:
            if item.is_virtual or item.external:
                raise self.refusal(field, "its data lies in other files, which are not opened")
            if item.dtype.kind not in "fiub":
                raise self.refusal(field, f"holds {item.dtype} values, not numbers")
            if item.shape is None or len(item.shape) != ndim or 0 in item.shape[1:]:
                raise self.refusal(field, f"has shape {item.shape}, needs {ndim} axes")
            size = math.prod(item.shape)
            need = item.dtype.itemsize * max(size, math.prod(item.chunks or (1,)))
            if need > DEFLATE * self.bytes + 2**16 or need > self.left:
                raise self.refusal(
                    field,
                    f"declares {size:,} values, {need:,} bytes, in a file of {self.bytes:,}; "
                    f"this machine has memory for {self.left:,}",
                )
            self.left -= need
            raw = hdf5.array(self.path, item)
            with np.errstate(over="ignore"):  # what is too large for float32 becomes inf
                values = raw.astype(np.float32, copy=False)
        except hdf5.NotStored as error:
            raise self.refusal(field, str(error)) from None
        except Exception as error:
            raise self.refusal(field, f"cannot be read: {error}") from None
        finite = np.isfinite(values)
        if not finite.all():
            row, *column = np.argwhere(~finite)[0]
            where = f"row {row}" + (f", column {column[0]}" if column else "")
            raise self.refusal(field, f"{where}: {raw[(row, *column)]} is not a finite float32")
        return values

    def flags(self, field):
        """(N,) bool; the numbers 0 and 1 will do."""
        values = self.array(field, 1)
        wrong = np.flatnonzero((values != 0) & (values != 1))
        if wrong.size:
            raise self.refusal(field, f"row {wrong[0]}: {values[wrong[0]]} is neither 0 nor 1")
        return values > 0

    def obs(self, field, env):
        """(N, D) observations; of a goal-conditioned dict, `observation` and `desired_goal`.

        AntMaze's `observation` lacks the place, which only `achieved_goal` tells: that comes first.
        """
        if isinstance(self.item(field), h5py.Group):
            names = ("achieved_goal", "observation", "desired_goal")
            place, seen, goal = (self.array(f"{field}/{name}", 2) for name in names)
            if len({len(place), len(seen), len(goal)}) > 1:
                raise self.refusal(field, f"{', '.join(names)} differ in length")
            told = np.array_equal(seen[:, : place.shape[1]], place)
            values = np.concatenate([seen, goal] if told else [place, seen, goal], 1)
        else:
            values = self.array(field, 2)
        if (values.shape[1], env.obs_dim) == (111, 27) and not values[:, 27:].any():
            values = values[:, :27]  # D4RL's Ant: contact forces, all zero, which v4 leaves out
        if env.obs_dim and values.shape[1] != env.obs_dim:
            raise self.refusal(
                field, f"{values.shape[1]} columns where {env.env_id} has {env.obs_dim}"
            )
        return values

    def actions(self, field, env):
        """(N, A) actions within the environment's bounds, up to rounding."""
        values = self.array(field, 2)
        if env.env_id and values.shape[1:] != env.low.shape:
            raise self.refusal(
                field, f"{values.shape[1]} columns, not {env.env_id}'s {len(env.low)}"
            )
        slack = 1e-5 * (env.high - env.low)
        wrong = np.argwhere((values < env.low - slack) | (values > env.high + slack))
        if wrong.size:
            row, column = wrong[0]
            low, high = (np.broadcast_to(x, values.shape[1])[column] for x in (env.low, env.high))
            raise self.refusal(
                field,
                f"row {row}, column {column}: {values[row, column]:.7g} is not within the action's "
                f"bounds {low:g} and {high:g}" + (f" of {env.env_id}" if env.env_id else ""),
            )
        return values

    def same_length(self, sizes):
        """Refuses fields of unequal length; sizes: field -> rows."""
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{field} {size:,}" for field, size in sizes.items())
            raise DatasetError(f"{self.path}: rows differ: {told}")


def read_d4rl(reader: Reader, env: Env) -> Rows:
    """Flat arrays, D4RL's layout: observations, actions, rewards, terminals, and where there are
    any next_observations and timeouts.

    An episode ends at a terminal, at a timeout, and where next_observations do not go on in the
    next row. A file with neither of the two is cut at the environment's time limit. Without
    next_observations a row's next_obs is the next row's obs; at an episode's end it is unknown.
    """
    obs, action = reader.obs("observations", env), reader.actions("actions", env)
    reward, terminal = reader.array("rewards", 1), reader.flags("terminals")
    sizes = {"observations": len(obs), "actions": len(action), "rewards": len(reward)}
    timeout = next_obs = None
    if reader.item("timeouts") is not None:
        timeout = reader.flags("timeouts")
        sizes["timeouts"] = len(timeout)
    if reader.item("next_observations") is not None:
        next_obs = reader.obs("next_observations", env)
        sizes["next_observations"] = len(next_obs)
    reader.same_length(sizes | {"terminals": len(terminal)})
    if len(obs) == 0:
        raise reader.refusal("observations", "no rows: at least one episode is needed")
    if next_obs is not None and next_obs.shape != obs.shape:
        raise reader.refusal("next_observations", f"has shape {next_obs.shape}, not {obs.shape}")
    end = terminal.copy()
    end[-1] = True
    if timeout is not None:
        end |= timeout
    if next_obs is not None:
        end[:-1] |= ~np.isclose(next_obs[:-1], obs[1:], 1e-4, 1e-5).all(1)
        return Rows(obs, action, reward, next_obs, terminal, end, np.ones(len(obs), bool))
    if timeout is None:
        if not env.limit:
            raise reader.refusal(
                "timeouts", "missing, as are next_observations: --env-id tells the time limit"
            )
        first = np.flatnonzero(np.r_[True, end[:-1]])
        age = np.arange(len(obs)) - np.repeat(first, np.diff(np.r_[first, len(obs)]))
        end |= age % env.limit == env.limit - 1
    next_obs = np.where(end[:, None], obs, np.roll(obs, -1, 0))
    return Rows(obs, action, reward, next_obs, terminal, end, ~end)


def read_minari(reader: Reader, env: Env) -> Rows:
    """Minari's layout: a group for each episode, with T + 1 observations and T of all else."""
    names = reader.episodes()
    if not names:
        raise reader.refusal("episode_0", "missing: at least one episode is needed")
    episodes = []
    for name in names:
        obs = reader.obs(f"{name}/observations", env)
        action = reader.actions(f"{name}/actions", env)
        reward = reader.array(f"{name}/rewards", 1)
        terminal, timeout = (
            reader.flags(f"{name}/terminations"),
            reader.flags(f"{name}/truncations"),
        )
        sizes = {"observations - 1": len(obs) - 1, "actions": len(action), "rewards": len(reward)}
        sizes |= {"terminations": len(terminal), "truncations": len(timeout)}
        reader.same_length({f"{name}/{field}": size for field, size in sizes.items()})
        if len(action) == 0:
            raise reader.refusal(f"{name}/actions", "no rows: an episode has at least one")
        end = terminal | timeout
        end[-1] = True
        known = np.ones(len(end), bool)
        episodes.append(Rows(obs[:-1], action, reward, obs[1:], terminal, end, known))
        first = episodes[0]
        for field, ours, theirs in (
            ("observations", obs, first.obs),
            ("actions", action, first.action),
        ):
            if ours.shape[1] != theirs.shape[1]:
                why = f"{ours.shape[1]} columns, not {theirs.shape[1]} as in the first episode"
                raise reader.refusal(f"{name}/{field}", why)
    return Rows(*(np.concatenate(arrays) for arrays in zip(*episodes, strict=True)))


def read_metadata(path) -> dict:
    """Minari's metadata.json as plain data. Raises DatasetError."""
    try:
        if path.stat().st_size > 2**24:
            raise ValueError("more than 16 MiB")
        metadata = json.loads(path.read_text("utf-8"))
        if not isinstance(metadata, dict):
            raise ValueError("not an object")
        return metadata
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: not readable as JSON metadata: {error}") from None
