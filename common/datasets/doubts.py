"""Checks of where episodes end in flat arrays: warnings with figures and a remedy."""

import json

import numpy as np

ORDER = (
    "Write one episode after another: returns, scaled rewards and sequence models need that, and "
    "so does next_obs if next_observations are missing."
)


def of_jumps(unmarked, rows, marked):
    """(warnings, whether the rows are in order), from the gaps between rows.

    unmarked: of `rows` rows, the number whose next_obs is not the next row's obs although no flag
    ends an episode. marked: whether the file has timeouts.
    """
    told = f"after {unmarked:,} of {rows:,} rows next_observations differ from the next row's"
    if unmarked > rows / 2 and rows >= 20:
        return [
            f"warning: nearly every row is an episode: {told} observations, as if shuffled. {ORDER}"
        ], False
    if unmarked and marked:
        why = "though neither terminals nor timeouts end an episode there; it is taken to end"
        return [f"warning: {told} observations, {why}."], True
    return [], True


def of_order(obs, end):
    """(warnings, whether the rows are in order), from the resemblance of a row to the next one.

    The largest correlation of a column is above 0.9 in MuJoCo's tasks and about 0 for shuffled
    rows. If m environments took turns, it is high between rows that are m apart.

    obs: (N, D). end: (N,) bool, last row of an episode.
    """
    if len(obs) < 200:
        return [], True
    near, lags = resemblance(obs, ~end, 1), {}
    for lag in range(2, min(65, len(obs) // 3)):
        lags[lag] = resemblance(obs, np.ones(len(obs), bool), lag)
    best = max(lags, key=lags.get)
    if lags[best] > near + 0.3:
        why = f"rows resemble that {best} rows on (correlation {lags[best]:.2f}) more than the next"
        return [
            f"warning: {why} ({near:.2f}), as if {best} environments took turns. {ORDER}"
        ], False
    if near < 0.2:
        why = f"rows do not resemble the next ones (correlation {near:.2f}), as if shuffled"
        return [f"warning: {why}. {ORDER}"], False
    return [], True


def resemblance(obs, rows, lag):
    """The largest correlation of a column of obs between `rows` (N,) bool and `lag` rows later."""
    rows = np.flatnonzero(rows[: len(obs) - lag])
    rows = rows[:: max(1, len(rows) // 5000)]
    mean, std = obs.mean(0), obs.std(0)
    here, there = obs[rows] - mean, obs[rows + lag] - mean
    covariance, varies = (here * there).mean(0), std > 1e-5 * (1 + np.abs(mean))
    return (covariance[varies] / std[varies] ** 2).max(initial=-1) if len(rows) > 99 else 1.0


def of_lengths(end, env):
    """Warnings about episodes that are longer than the environment's limit or never end."""
    length = np.diff(np.flatnonzero(np.r_[True, end]))
    longest, many = length.max(), int((length > env.limit).sum())
    if env.limit and many:
        name, limit = env.env_id.partition(" ")[0], json.dumps({"max_episode_steps": int(longest)})
        return [
            f"warning: {many:,} of {len(length):,} episodes are longer than {env.limit:,} steps, "
            f"the limit of {env.env_id}; the longest has {longest:,}. Either ends are missing in "
            "timeouts, or rows of several environments are mixed, or the limit was another one, "
            f"which is an option of the environment: --env-id '{name} {limit}'."
        ]
    if len(length) == 1 and longest > 1000:
        why = "neither terminals nor timeouts are set"
        return [f"warning: {why}: all {longest:,} rows are one episode. --env-id NAME tells the "
                "time limit, which cuts them."]  # fmt: skip
    return []
