"""The states at which an environment ends an episode, as a function of observations."""

import jax.numpy as jnp

from common.evaluation.environments import EvaluationError

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
    time limit. It works under jit and vmap, for environments as registered, without options.
    Raises EvaluationError for an environment that it does not know.
    """
    name, _, version = env_id.rpartition("-v")
    alive = _ALIVE.get(name) if version in ("4", "5") else None
    if env_id == "Pendulum-v1" or name.startswith("PointMaze_"):  # a goal reached is renewed
        alive = _ALIVE["HalfCheetah"]
    if alive is None:
        raise EvaluationError(
            f"No termination function is known for {env_id!r}, only for {', '.join(_ALIVE)} (v4, "
            "v5), Pendulum-v1 and PointMaze. If its episodes never end early: --no-termination."
        )
    return lambda obs, action, next_obs: ~alive(next_obs)
