"""A dataset in memory: transitions, steps of episodes, windows, returns and scores."""

import sys
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from common.experiment import printable


class Batch(NamedTuple):
    """N transitions, float32.

    If a file does not hold the next_obs of a terminal row, next_obs equals obs there: a TD target
    masks it by `done`; a dynamics model leaves out rows with done = 1 and next_obs == obs.
    """

    obs: np.ndarray  # (N, D)
    action: np.ndarray  # (N, A) in [-1, 1]; of A discrete actions the taken one is 1, others 0
    reward: np.ndarray  # (N,)
    next_obs: np.ndarray  # (N, D), never of another episode
    done: np.ndarray  # (N,) 1 at true terminals, 0 at time limits


class Steps(NamedTuple):
    """N rows in order, for sequence models; see `windows`."""

    obs: np.ndarray  # (N, D)
    action: np.ndarray  # (N, A) as in Batch
    reward: np.ndarray  # (N,)
    done: np.ndarray  # (N,) 1 at true terminals, 0 at time limits
    time: np.ndarray  # (N,) int32, steps since the start of the episode
    end: np.ndarray  # (N,) int32, the row after the last row of the episode
    returns_to_go: np.ndarray  # (N,) sum of gamma^k reward from this row to the episode's end


def windows(rows, end, size, left=False):
    """Windows of `size` steps that start at `rows` (...) and stay within the episode; for jit.

    end: Steps.end. Returns (index (..., size) int32 into the rows, mask (..., size) bool). A window
    that the end of the episode cuts is padded on the right, or on the `left`: mask is False there
    and index repeats the nearest step of the window. Rows drawn uniformly draw episodes in
    proportion to their length.
    """
    rows = jnp.asarray(rows)[..., None]
    missing = jnp.maximum(rows + size - end[rows], 0)
    index = rows + jnp.arange(size, dtype=jnp.int32) - (missing if left else 0)
    mask = (index >= rows) & (index < end[rows])
    return index.clip(rows, end[rows] - 1), mask


@dataclass(frozen=True)
class Dataset:
    """N transitions in E episodes, one after another."""

    name: str  # as given to `load`
    env_id: str  # Gymnasium id to score on; "" if the dataset cannot be scored
    obs: np.ndarray  # this and the next four as in Batch
    action: np.ndarray  # discrete ones: (N,) int32, from 0 to num_actions - 1
    reward: np.ndarray
    next_obs: np.ndarray
    done: np.ndarray
    start: np.ndarray  # (E,) int64, first row of each episode
    length: np.ndarray  # (E,) int64, number of rows of each episode, at least 1
    ref_min: float | None  # undiscounted return with score 0; None: no reference, no score
    ref_max: float | None  # undiscounted return with score 100
    provenance: dict  # JSON-able; `verified`: whether the hash is the known one, None if unknown
    num_actions: int = 0  # how many discrete actions there are; 0: actions are vectors

    def reward_scale(self) -> np.float32:
        """1000 / (best - worst episode return), as the authors of IQL scale rewards.

        If returns differ by less than 1 % or the rows are not in order, it is 1 and a line on
        stderr says so.
        """
        returns, why = self.returns(), ""
        spread = float(np.ptp(returns))
        if not self.provenance.get("ordered", True):
            why = "rows are not in order, so the returns of episodes are unknown"
        elif spread <= 0.01 * np.abs(returns).max():
            why = f"returns only go from {returns.min():g} to {returns.max():g}"
        if why:
            print(printable(f"{self.name}: rewards are not scaled: {why}"), file=sys.stderr)
        return np.float32(1 if why else 1000 / spread)

    def transitions(self, scale_reward=False) -> Batch:
        """All rows. scale_reward: multiply rewards by `reward_scale`."""
        reward = self.reward * self.reward_scale() if scale_reward else self.reward
        return Batch(self.obs, self._vectors(), reward, self.next_obs, self.done)

    def _vectors(self):
        """Actions (N, A) as in Batch."""
        if not self.num_actions:
            return self.action
        return np.eye(self.num_actions, dtype=np.float32)[self.action]

    def steps(self, gamma=1.0, at_end=0.0) -> Steps:
        """All rows. at_end: added to the reward of true terminals, in `returns_to_go` only."""
        returns_to_go = self.reward.astype(np.float64) + at_end * self.done
        for t in reversed(range(self.length.max() - 1)):  # step t of every episode at once
            rows = self.start[self.length > t + 1] + t
            returns_to_go[rows] += gamma * returns_to_go[rows + 1]
        start, length = (np.repeat(x, self.length) for x in (self.start, self.length))
        time, end = np.arange(len(start)) - start, start + length
        return Steps(
            self.obs, self._vectors(), self.reward, self.done,
            time.astype(np.int32), end.astype(np.int32), returns_to_go.astype(np.float32),
        )  # fmt: skip

    def returns(self) -> np.ndarray:
        """Undiscounted return of each episode, (E,) float64."""
        return np.add.reduceat(self.reward.astype(np.float64), self.start)

    def score(self, returns) -> np.ndarray:
        """Normalised score 100 (R - ref_min) / (ref_max - ref_min) of returns of any shape.

        NaN without references. Source: Fu et al. 2020, arXiv:2004.07219.
        """
        returns = np.asarray(returns, np.float64)
        if self.ref_min is None or self.ref_max is None:
            return np.full(returns.shape, np.nan)
        return 100 * (returns - self.ref_min) / (self.ref_max - self.ref_min)
