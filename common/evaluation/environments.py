"""Gymnasium environments: made, inspected; gymnasium-robotics' mazes in the form of the others.

A PointMaze's observation is a vector (x, y, vx, vy, goal x, goal y) in metres and metres a second.
Its goal stands still, in the middle of the cell that D4RL's maze2d chose. Its reward is left as it
is: 1 for each step that ends within 0.45 m of the goal (Dense: exp of minus the distance), until
the time limit. Starts are drawn anew for each episode.
"""

import contextlib
import difflib
import importlib.util
import io
import os
import warnings
from typing import NamedTuple

import gymnasium
import numpy as np

from common import experiment

GOALS = {"UMaze": (1, 1), "Medium": (6, 6), "Large": (7, 9)}  # (row, column)


class EvaluationError(experiment.UserError):
    """An error of an environment, a film or an export that the user can correct."""


class Env(NamedTuple):
    """What a dataset must agree with; the defaults stand for an unknown environment."""

    env_id: str = ""
    obs_dim: int = 0
    low: np.ndarray = np.float32([-1])  # (A,) or (1,), bounds of its actions
    high: np.ndarray = np.float32([1])
    limit: int = 0  # steps of an episode at most; 0: unknown


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
            env = make_raw(env_id, **kwargs)
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


def inspect(env_id) -> Env:
    """Sizes, action bounds and time limit of a registered environment. Raises EvaluationError."""
    try:
        register(env_id)
    except ImportError as error:
        raise EvaluationError(f"{env_id} cannot be made: {error}") from None
    if env_id not in gymnasium.registry:  # a "module:Env-v0" would import the module
        near = difflib.get_close_matches(env_id, gymnasium.registry, 3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise EvaluationError(
            f"{env_id!r} is not an environment that Gymnasium has registered{hint}"
        )
    with contextlib.suppress(ImportError):
        import mujoco

        mujoco.set_mju_user_warning(lambda _: None)  # HalfCheetah's model uses an old attribute
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # v4 is out of date, and what D4RL's scores are on
            env = make_raw(env_id)
            env.close()
    except Exception as error:  # whatever an environment's constructor may raise
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EvaluationError(f"{env_id} cannot be made: {why}") from None
    obs, action = env.observation_space, env.action_space
    if not all(isinstance(s, gymnasium.spaces.Box) and len(s.shape) == 1 for s in (obs, action)):
        raise EvaluationError(
            f"{env_id}: flat observations and actions are needed, not {obs}, {action}"
        )
    if not np.isfinite([action.low, action.high]).all():
        raise EvaluationError(f"{env_id}: its actions have no bounds")
    limit = gymnasium.spec(env_id).max_episode_steps or 0
    return Env(env_id, obs.shape[0], action.low, action.high, limit)


def goal_cell(env_id):
    """The cell where the goal stands still, or None: it is drawn anew for each episode."""
    kind, _, size = env_id.rpartition("-v")[0].partition("_")
    return GOALS.get(size.removesuffix("Dense")) if kind == "PointMaze" else None


class FlatMaze(gymnasium.Wrapper):
    """PointMaze with flat observations, and with a goal in the middle of the cell `goal`."""

    def __init__(self, env, goal):
        super().__init__(env)
        self._goal = goal
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (6,))

    def reset(self, *, seed=None, options=None):
        maze = self.unwrapped
        cell = None if self._goal is None else np.array(self._goal)
        obs, info = self.env.reset(seed=seed, options={"goal_cell": cell, **(options or {})})
        if cell is not None:  # there, but for the noise that the environment adds
            maze.goal = maze.maze.cell_rowcol_to_xy(cell)
            maze.update_target_site_pos()
        return self._flat(obs), info

    def step(self, action):
        obs, *rest = self.env.step(action)
        return self._flat(obs), *rest

    def _flat(self, obs):
        return np.float32([*obs["observation"], *self.unwrapped.goal])


def make_raw(env_id, **kwargs):
    """gymnasium.make, with the environment's own bounds; ImportError if its package is missing."""
    register(env_id)
    env = gymnasium.make(env_id, disable_env_checker=True, **kwargs)
    if not env_id.startswith("PointMaze_"):
        return env
    with contextlib.suppress(OSError):  # a copy of the model for each environment, else left behind
        os.unlink(env.unwrapped.tmp_xml_file_path)
    return FlatMaze(env, goal_cell(env_id))


def mazes_installed():
    """Whether the package of the mazes is there."""
    return importlib.util.find_spec("gymnasium_robotics") is not None


def register(env_id):
    """Tell Gymnasium of the mazes, if env_id is one. Raises ImportError."""
    if not env_id.startswith(("PointMaze_", "AntMaze_")):
        return
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # it greets with news on another robot
            import gymnasium_robotics
    except ImportError:
        raise ImportError("mazes need gymnasium-robotics, see requirements.txt") from None
    gymnasium.register_envs(gymnasium_robotics)
