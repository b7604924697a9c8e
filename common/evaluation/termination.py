"""The states at which an environment ends an episode, as a function of observations."""

import re

import jax.numpy as jnp

from common.evaluation.environments import EvaluationError
from common.evaluation.options import split

_ELSEWHERE = "_weight$|_reward$|^reset_noise_scale$|^max_episode_steps$"  # options that end nothing
_ALIVE = {  # obs (..., D) -> bool (...), v4 and v5 alike, read in Gymnasium 1.4's sources
    "Ant": lambda o: (o[..., 0] >= 0.2) & (o[..., 0] <= 1.0) & jnp.isfinite(o).all(-1),
    # Hopper tests velocities but observes them clipped to [-10, 10]: an end by a speed above 100
    # shows in no observation.
    "Hopper": lambda o: (
        (o[..., 0] > 0.7) & (abs(o[..., 1]) < 0.2) & (abs(o[..., 1:]) < 100).all(-1)
    ),
    "Humanoid": lambda o: (o[..., 0] > 1.0) & (o[..., 0] < 2.0),
    "InvertedPendulum": lambda o: (abs(o[..., 1]) <= 0.2) & jnp.isfinite(o).all(-1),
    # Height of the tip of two links of 0.6 m with angles a and b: cos a + cos(a + b). The
    # environment uses the height one physics substep before obs.
    "InvertedDoublePendulum": lambda o: (
        0.6 * (o[..., 3] + o[..., 3] * o[..., 4] - o[..., 1] * o[..., 2]) > 1.0
    ),
    "Walker2d": lambda o: (o[..., 0] > 0.8) & (o[..., 0] < 2.0) & (abs(o[..., 1]) < 1.0),
}
_ALIVE |= dict.fromkeys(
    ("HalfCheetah", "HumanoidStandup", "Reacher", "Swimmer"), lambda o: jnp.ones(o.shape[:-1], bool)
)


def termination(env_id):
    """The termination function (obs (..., D), action (..., A), next_obs (..., D)) -> bool (...).

    It is True at terminal states, and where an entry that the environment checks is nan; never at a
    time limit. It works under jit and vmap. Raises EvaluationError for an environment that it does
    not know, and for options that may move its terminal states.
    """
    full, options = split(env_id)
    name, _, version = full.rpartition("-v")
    alive = _ALIVE.get(name) if version in ("4", "5") else None
    if full == "Pendulum-v1" or name.startswith("PointMaze_"):  # a goal reached is renewed
        alive = _ALIVE["HalfCheetah"]
    if alive and options.pop("terminate_when_unhealthy", True) is False:
        alive = _ALIVE["HalfCheetah"]
    if any(not re.search(_ELSEWHERE, option) for option in options):
        alive = None
    if alive is None:
        raise EvaluationError(
            f"No termination function is known for {env_id!r}, only for {', '.join(_ALIVE)} (v4, "
            "v5), Pendulum-v1 and PointMaze. If its episodes never end early: --no-termination."
        )
    return lambda obs, action, next_obs: ~alive(next_obs)
