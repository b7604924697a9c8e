"""The layouts of files, read into rows: D4RL's flat arrays and Minari's episodes."""

import sys
import time
from typing import NamedTuple

import numpy as np

from common.datasets import doubts
from common.datasets.checked import CheckedFile, DatasetError
from common.evaluation import Env
from common.experiment import files


class Rows(NamedTuple):
    """N rows of a file."""

    obs: np.ndarray  # (N, D) float32
    action: np.ndarray  # (N, A) float32, within the bounds up to rounding; discrete: (N,) int32
    reward: np.ndarray  # (N,) float32
    next_obs: np.ndarray  # (N, D) float32
    terminal: np.ndarray  # (N,) bool
    end: np.ndarray  # (N,) bool, last row of an episode
    known: np.ndarray  # (N,) bool, False if the file does not hold this row's next_obs


def read_d4rl(file: CheckedFile, env: Env) -> Rows:
    """Rows of D4RL's layout: flat arrays of observations, actions, rewards and terminals.

    timeouts and next_observations are optional. An episode ends at a terminal, at a timeout, and
    where next_observations differ from the next row's observations. Without next_observations and
    without any timeout, episodes are cut at the environment's time limit; without
    next_observations a row's next_obs is the next row's obs, and unknown at the end of an episode.
    Raises DatasetError.
    """
    obs, action = file.obs("observations", env), file.actions("actions", env)
    reward, terminal = file.array("rewards", 1), file.flags("terminals")
    sizes = {"observations": len(obs), "actions": len(action), "rewards": len(reward)}
    timeout = next_obs = None
    if file.item("timeouts") is not None:
        timeout = file.flags("timeouts")
        sizes["timeouts"] = len(timeout)
    if file.item("next_observations") is not None:
        next_obs = file.obs("next_observations", env)
        sizes["next_observations"] = len(next_obs)
    file.same_length(sizes | {"terminals": len(terminal)})
    if len(obs) == 0:
        raise file.refusal("observations", "no rows: at least one episode is needed")
    if next_obs is not None and next_obs.shape != obs.shape:
        raise file.refusal("next_observations", f"has shape {next_obs.shape}, not {obs.shape}")
    end = terminal.copy()
    end[-1] = True
    if timeout is not None:
        end |= timeout
    if next_obs is not None:
        jumps = ~np.isclose(next_obs[:-1], obs[1:], 1e-4, 1e-5).all(1)
        unmarked = int((jumps & ~end[:-1]).sum())
        end[:-1] |= jumps
        file.warn(*doubts.of_jumps(unmarked, len(obs), timeout is not None))
        file.warn(doubts.of_lengths(end, env))
        return Rows(obs, action, reward, next_obs, terminal, end, np.ones(len(obs), bool))
    file.warn(*doubts.of_order(obs, end))
    if timeout is None and not env.limit:
        raise file.refusal(
            "timeouts", "missing, and next_observations too: --env-id gives the time limit"
        )
    if env.limit and (timeout is None or (not timeout.any() and file.ordered)):
        first = np.flatnonzero(np.r_[True, end[:-1]])
        age = np.arange(len(obs)) - np.repeat(first, np.diff(np.r_[first, len(obs)]))
        cut = (age % env.limit == env.limit - 1) & ~end
        end |= cut
        if timeout is not None and cut.any():
            why = f"episodes are cut at the limit of {env.env_id}, {env.limit:,} steps"
            file.warn([f"warning: timeouts are never set; {why}, {cut.sum():,} times"])
    file.warn(doubts.of_lengths(end, env))
    next_obs = np.where(end[:, None], obs, np.roll(obs, -1, 0))
    return Rows(obs, action, reward, next_obs, terminal, end, ~end)


def read_minari(file: CheckedFile, env: Env) -> Rows:
    """Rows of Minari's layout: a group for each episode, T + 1 observations and T of all else.

    Raises DatasetError.
    """
    names = file.episodes()
    if not names:
        raise file.refusal("episode_0", "missing: at least one episode is needed")
    episodes, shown = [], time.monotonic()
    for name in names:
        if time.monotonic() - shown > 5:
            shown = time.monotonic()
            print(f"{file.path}: {len(episodes):,} of {len(names):,} episodes", file=sys.stderr)
        obs = file.obs(f"{name}/observations", env)
        action = file.actions(f"{name}/actions", env)
        reward = file.array(f"{name}/rewards", 1)
        terminal, timeout = (
            file.flags(f"{name}/terminations"),
            file.flags(f"{name}/truncations"),
        )
        sizes = {"observations - 1": len(obs) - 1, "actions": len(action), "rewards": len(reward)}
        sizes |= {"terminations": len(terminal), "truncations": len(timeout)}
        file.same_length({f"{name}/{field}": size for field, size in sizes.items()})
        if len(action) == 0:
            raise file.refusal(f"{name}/actions", "no rows: an episode has at least one")
        end = terminal | timeout
        end[-1] = True
        known = np.ones(len(end), bool)
        episodes.append(Rows(obs[:-1], action, reward, obs[1:], terminal, end, known))
        first = episodes[0]
        for field, ours, theirs in (
            ("observations", obs, first.obs),
            ("actions", action, first.action),
        ):
            if ours.shape[1:] != theirs.shape[1:]:
                why = f"{ours.shape[1]} columns, not {theirs.shape[1]} as in the first episode"
                raise file.refusal(f"{name}/{field}", why)
    return Rows(*(np.concatenate(arrays) for arrays in zip(*episodes, strict=True)))


def read_metadata(path) -> dict:
    """The content of Minari's metadata.json, a dict. Raises DatasetError."""
    try:
        return files.read_json(path, most=2**24)
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: not readable as JSON metadata: {error}") from None
