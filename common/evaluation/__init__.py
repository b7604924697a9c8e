"""Policies -> returns; and facts about environments.

`evaluate` scores the policies of all seeds in one batch; `termination` tells a learned model where
the real environment ends an episode; a trained run is scored again, or filmed, by

    python -m common.evaluation runs/iql/...
    python -m common.evaluation runs/iql/... --video hopper.mp4
"""

import functools
import itertools
import json
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import tyro

from common import mazes


class EvaluationError(SystemExit):
    """Something a user can put right: uncaught, it prints its one message and exits with 1."""


def make(env_id, **kwargs):
    """A Gymnasium environment that takes actions in [-1, 1], whatever its own bounds.

    Raises EvaluationError for an id that Gymnasium cannot make, observations or actions that are
    not plain vectors, and a missing time limit.
    """
    import mujoco  # not above: --video chooses the renderer before

    if not env_id or ":" in env_id:  # "module:id" would import the module
        raise EvaluationError(f"--env-id {env_id!r} is not the id of a Gymnasium environment.")
    mujoco.set_mju_user_warning(lambda message: None)  # else: MUJOCO_LOG.TXT (settotalmass, mostly)
    try:
        with warnings.catch_warnings():  # v4 is the right version for D4RL's data
            warnings.filterwarnings("ignore", ".*is out of date", DeprecationWarning)
            env = mazes.make(env_id, **kwargs)
    except (gymnasium.error.Error, ImportError) as error:
        raise EvaluationError(f"Gymnasium cannot make {env_id}: {error}") from error
    obs, action, limit = env.observation_space, env.action_space, env.spec.max_episode_steps
    vectors = all(isinstance(x, gymnasium.spaces.Box) and len(x.shape) == 1 for x in (obs, action))
    if not (vectors and action.is_bounded() and limit):
        raise EvaluationError(
            f"Cannot score on {env_id}: it needs vectors as observations, bounded vectors as "
            f"actions and a time limit; it has {obs}, {action} and {limit}."
        )
    if np.any(action.low != -1) or np.any(action.high != 1):
        env = gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    return env


@functools.lru_cache(maxsize=2)
def _pool(env_id, count):
    return [make(env_id) for _ in range(count)]


def stateless(act):
    """act(state, obs) -> action, without memory, as (state, carry, obs, reward, key) -> (action,
    carry), the form of those that have one."""
    return lambda state, carry, obs, reward, key: (act(state, obs), carry)


def evaluate(policy, env_id, num_seeds, episodes, seed=0):
    """Undiscounted returns of whole episodes, (num_seeds, episodes) float64.

    policy: (carry, obs (S, E, D), reward (S, E), key) -> (action (S, E, A), carry) for S seeds and
        E episodes, which all begin together. Called once per time step, always with these shapes
        in float32. carry is the policy's own memory, any pytree: None at the first step, then what
        it returned (so a jitted one with memory compiles twice, one without it once). reward is
        what the action before earned, 0 at first; key is fold_in(key(seed), time step). Actions
        are clipped to [-1, 1].
    seed: episode j of every policy seed is reset with environment seed `seed + j`: all seeds and
        all evaluations meet the same starts.

    An episode that has ended is not stepped any more: there is no autoreset whose step could be
    counted, and the policy sees its last observation until the longest episode has ended. A seed
    with an action that is not finite has failed: its returns are all nan, the others go on.
    No episodes: an empty array, and no environment is made. Raises EvaluationError as `make`.
    Environments are kept and shared: not for several threads. They are stepped on all cores: MuJoCo
    computes without Python's lock, and no episode knows of another.
    """
    if episodes == 0:
        return np.zeros((num_seeds, 0))
    return _rollout(policy, _pool(env_id, num_seeds * episodes), num_seeds, seed)


def _cores():
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()


_threads = functools.cache(ThreadPoolExecutor)


def _stepped(envs, rows, action):
    """(row, what its environment's step returns) for these rows; each core has a part of them."""

    def some(part):
        return [(i, envs[i].step(action[i])) for i in part]

    workers = min(_cores(), len(rows))
    if workers == 1:
        return some(rows)
    ends = [len(rows) * k // workers for k in range(workers + 1)]
    parts = [rows[begin:end] for begin, end in itertools.pairwise(ends)]
    return itertools.chain.from_iterable(_threads(workers).map(some, parts))


_fold_in = jax.jit(jax.random.fold_in)  # compiled at its first call


def _rollout(policy, envs, num_seeds, seed):
    """`evaluate` in given environments; episode j of seed s is row s * E + j."""
    rows, shape = len(envs), (num_seeds, len(envs) // num_seeds)
    start = [env.reset(seed=seed + i % shape[1])[0] for i, env in enumerate(envs)]
    obs, reward, returns = np.float32(start), np.zeros(rows, np.float32), np.zeros(rows)
    key, carry, active = jax.random.key(seed), None, range(rows)
    for t in itertools.count():
        inputs = obs.reshape(*shape, -1), reward.reshape(shape), _fold_in(key, t)
        action, carry = policy(carry, *inputs)
        action = np.asarray(action, np.float32).reshape(rows, *envs[0].action_space.shape)
        if not np.isfinite(action).all():
            failed = {i // shape[1] for i in active if not np.isfinite(action[i]).all()}
            returns.reshape(shape)[list(failed)] = np.nan
            active = [i for i in active if i // shape[1] not in failed]

        action, running = action.clip(-1, 1), []
        obs, reward = obs.copy(), np.zeros_like(reward)  # anew: a carry may hold the old arrays
        for i, result in _stepped(envs, active, action):
            obs[i], gained, terminated, truncated, _ = result
            reward[i] = gained
            returns[i] += gained
            if not (terminated or truncated):
                running.append(i)
        active = running
        if not active:
            return returns.reshape(shape)


# --- Termination ---

_ALIVE = {  # obs (..., D) -> bool (...), v4 and v5 alike, read in Gymnasium 1.4's sources
    "Ant": lambda o: (o[..., 0] >= 0.2) & (o[..., 0] <= 1.0) & jnp.isfinite(o).all(-1),
    # Hopper tests velocities but observes them clipped to [-10, 10]: an end by speed alone, of 100
    # and more, shows in no observation.
    "Hopper": lambda o: (
        (o[..., 0] > 0.7) & (abs(o[..., 1]) < 0.2) & (abs(o[..., 1:]) < 100).all(-1)
    ),
    "Humanoid": lambda o: (o[..., 0] > 1.0) & (o[..., 0] < 2.0),
    "InvertedPendulum": lambda o: (abs(o[..., 1]) <= 0.2) & jnp.isfinite(o).all(-1),
    # Height of the tip of two links of 0.6 m, angles a and b: cos a + cos(a + b). The environment's
    # is one physics substep older than obs; they differ if the tip crosses the line within it.
    "InvertedDoublePendulum": lambda o: (
        0.6 * (o[..., 3] + o[..., 3] * o[..., 4] - o[..., 1] * o[..., 2]) > 1.0
    ),
    "Walker2d": lambda o: (o[..., 0] > 0.8) & (o[..., 0] < 2.0) & (abs(o[..., 1]) < 1.0),
}
_ALIVE |= dict.fromkeys(
    ("HalfCheetah", "HumanoidStandup", "Reacher", "Swimmer"), lambda o: jnp.ones(o.shape[:-1], bool)
)


def termination(env_id):
    """When the environment truly ends: (obs (..., D), action (..., A), next_obs) -> bool (...).

    Time limits are not ends; nan is one, wherever the environment looks. For jit, vmap and any
    leading axes. Holds for environments as registered, without options. Raises EvaluationError
    for one that it does not know.
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


# --- Video ---

_ADVICE = "On Debian or Ubuntu `apt-get install libegl1 libgl1-mesa-dri` (or libosmesa6) helps."


def film(policy, env_id, path, episodes=1, seed=0):
    """Write whole episodes of one policy to an .mp4 or .gif file; its returns, (episodes,) float64.

    policy, seed: as in `evaluate`, with S = E = 1. Shown in simulated time, at about 30 Hz.
    Raises EvaluationError as `make`, for other kinds of file, and where nothing can be drawn.
    """
    import imageio.v2 as imageio
    import mujoco

    path = Path(path)
    if path.suffix not in (".mp4", ".gif"):
        raise EvaluationError(f"{path}: a video's name must end in .mp4 or .gif.")
    env = make(env_id, render_mode="rgb_array")
    if model := getattr(env.unwrapped, "model", None):
        model.vis.quality.shadowsize = 0  # MuJoCo's shadows triple the time and leave blotches
        follow = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, "track")  # or -1: none
        inner = getattr(env.unwrapped, "point_env", env.unwrapped)  # a maze holds its robot
        inner.mujoco_renderer.camera_id = follow
    try:
        env.reset(seed=seed)
        env.render()
    except Exception as error:  # OpenGL libraries fail in many ways
        raise EvaluationError(f"{env_id} cannot be drawn here: {error!r}. {_ADVICE}") from error
    skip, steps = max(1, round(env.metadata["render_fps"] / 30)), itertools.count()
    fps = env.metadata["render_fps"] / skip
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"fps": fps} if path.suffix == ".mp4" else {"duration": 1000 / fps, "loop": 0}
    with warnings.catch_warnings(), env, imageio.get_writer(path, **options) as video:
        warnings.filterwarnings("ignore", r"os.fork\(\) was called", RuntimeWarning)  # by ffmpeg

        def watched(*inputs):
            if next(steps) % skip == 0:
                video.append_data(env.render())
            return policy(*inputs)

        starts = range(seed, seed + episodes)
        return np.array([_rollout(watched, [env], 1, start)[0, 0] for start in starts])


def _choose_renderer():
    """Without a display, set MUJOCO_GL, which MuJoCo reads when imported, to what draws here."""
    asked = os.environ.get("MUJOCO_GL")
    if sys.platform != "linux" or ("DISPLAY" in os.environ and not asked):
        return
    names = [asked] if asked else ["egl", "osmesa"]
    for name in names:  # each in a process of its own: a failed import lingers
        trial = f"from mujoco.{name} import GLContext; GLContext(8, 8).make_current()"
        environ, quiet = {**os.environ, "MUJOCO_GL": name}, subprocess.DEVNULL
        if subprocess.call([sys.executable, "-c", trial], env=environ, stderr=quiet) == 0:
            os.environ["MUJOCO_GL"] = name
            return
    raise EvaluationError(f"MuJoCo cannot draw here: tried {' and '.join(names)}. {_ADVICE}")


def main(
    run: tyro.conf.Positional[Path], video: Path | None = None, episodes: int = 0, seed: int = 0
):
    """Score a trained run's last checkpoint, every seed, as its training did; or film a seed.

    Args:
        run: run folder
        video: file to write instead, .mp4 or .gif
        episodes: how many; 0: to score, as many as in training, to film, one
        seed: which of the run's seeds to film, counted from 0
    """
    if video:
        _choose_renderer()
    from common import experiment, policy

    module, cfg, state = experiment.load(run)
    data = json.loads((run / "config.json").read_text())["dataset"]
    env_id = data["env_id"]
    if not 0 <= seed < cfg.num_seeds:
        raise EvaluationError(f"{run} holds seeds 0 to {cfg.num_seeds - 1}, counted from 0.")
    act = jax.jit(policy.of_seeds(module, cfg))
    if video:
        act = functools.partial(act, jax.tree.map(lambda x: x[seed : seed + 1], state))
        returns = film(act, env_id, video, episodes or 1)
        print(f"{video}: {env_id}, return {', '.join(f'{r:.1f}' for r in returns)}")
        return
    act = functools.partial(act, state)
    returns = evaluate(act, env_id, cfg.num_seeds, episodes or cfg.eval_episodes)
    low, high = data["ref_min_score"], data["ref_max_score"]
    for i, row in enumerate(returns):
        mean = f"return {row.mean():.1f} +- {row.std():.1f}"
        score = "" if low is None else f", score {100 * (row.mean() - low) / (high - low):.1f}"
        print(f"seed {cfg.seed + i}: {mean}{score}, {len(row)} episodes of {env_id}")
    saved = experiment.recorded(run)
    if saved is not None and np.shape(saved) == returns.shape:
        left = np.isfinite(saved).all(1)  # seeds that have not diverged
        same = np.array_equal(np.array(saved)[left], returns[left])
        print("Bit for bit what training recorded." if same else "Training recorded other returns.")


if __name__ == "__main__":
    tyro.cli(main)
