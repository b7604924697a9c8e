"""Makes and inspects Gymnasium environments; gives mazes flat observations.

The observation of a PointMaze (gymnasium-robotics) is a vector (x, y, vx, vy, goal x, goal y) in
metres and metres per second. Its goal is fixed in the middle of the cell that D4RL's maze2d uses.
Its reward is the environment's own: 1 for each step that ends within 0.45 m of the goal (Dense:
exp(-distance)), until the time limit. The start is drawn for each episode.
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
    """What a dataset must agree with; the defaults describe an unknown environment."""

    env_id: str = ""
    obs_dim: int = 0
    low: np.ndarray = np.float32([-1])  # (A,) or (1,), lower bounds of the actions
    high: np.ndarray = np.float32([1])  # upper bounds
    limit: int = 0  # time limit of an episode in steps; 0: unknown


def make(env_id, **kwargs):
    """A Gymnasium environment that takes actions in [-1, 1], whatever its own bounds are.

    kwargs: of gymnasium.make. Raises EvaluationError for an id that Gymnasium cannot make, for
    observations or actions that are not vectors, and for an environment without a time limit.
    """
    import mujoco  # here, because --video must choose the renderer first

    if not env_id or ":" in env_id:  # "module:id" would import the module
        raise EvaluationError(f"--env-id {env_id!r} is not the id of a Gymnasium environment.")
    mujoco.set_mju_user_warning(lambda message: None)  # it would write MUJOCO_LOG.TXT
    try:
        with warnings.catch_warnings():  # D4RL's scores are on v4
            warnings.filterwarnings("ignore", ".*is out of date", DeprecationWarning)
            env = make_raw(env_id, **kwargs)
    except (gymnasium.error.Error, ImportError) as error:
        raise EvaluationError(f"Gymnasium cannot make {env_id}: {error}") from error
    obs, action, limit = env.observation_space, env.action_space, env.spec.max_episode_steps
    vectors = all(isinstance(x, gymnasium.spaces.Box) and len(x.shape) == 1 for x in (obs, action))
    if not (vectors and action.is_bounded() and limit):
        raise EvaluationError(
            f"Cannot score on {env_id}: it needs vectors as observations, bounded vectors as "
            f"actions and a time limit, but has {obs}, {action} and {limit}."
        )
    if np.any(action.low != -1) or np.any(action.high != 1):
        env = gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    return env


def inspect(env_id) -> Env:
    """The Env of a registered environment: sizes, action bounds, time limit.

    Raises EvaluationError for an unknown id and for one whose observations or actions are not
    vectors, or whose actions have no bounds.
    """
    try:
        register(env_id)
    except ImportError as error:
        raise EvaluationError(f"{env_id} cannot be made: {error}") from None
    if env_id not in gymnasium.registry:  # a "module:Env-v0" would import the module
        near = difflib.get_close_matches(env_id, gymnasium.registry, 3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise EvaluationError(f"unknown environment {env_id!r}.{hint}")
    with contextlib.suppress(ImportError):
        import mujoco

        mujoco.set_mju_user_warning(lambda _: None)  # HalfCheetah's model has an old attribute
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Gymnasium calls v4 out of date
            env = make_raw(env_id)
            env.close()
    except Exception as error:  # an environment's constructor may raise anything
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EvaluationError(f"{env_id} cannot be made: {why}") from None
    obs, action = env.observation_space, env.action_space
    if not all(isinstance(s, gymnasium.spaces.Box) and len(s.shape) == 1 for s in (obs, action)):
        raise EvaluationError(
            f"{env_id}: observations and actions must be vectors, not {obs} and {action}"
        )
    if not np.isfinite([action.low, action.high]).all():
        raise EvaluationError(f"{env_id}: actions must have bounds, not {action}")
    limit = gymnasium.spec(env_id).max_episode_steps or 0
    return Env(env_id, obs.shape[0], action.low, action.high, limit)


def goal_cell(env_id):
    """(row, column) of the fixed goal in a PointMaze; None if goals are drawn for each episode."""
    kind, _, size = env_id.rpartition("-v")[0].partition("_")
    return GOALS.get(size.removesuffix("Dense")) if kind == "PointMaze" else None


class FlatMaze(gymnasium.Wrapper):
    """PointMaze with flat observations and a goal in the middle of the cell `goal`, if not None."""

    def __init__(self, env, goal):
        super().__init__(env)
        self._goal = goal
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (6,))

    def reset(self, *, seed=None, options=None):
        maze = self.unwrapped
        cell = None if self._goal is None else np.array(self._goal)
        obs, info = self.env.reset(seed=seed, options={"goal_cell": cell, **(options or {})})
        if cell is not None:  # without the noise that the environment adds
            maze.goal = maze.maze.cell_rowcol_to_xy(cell)
            maze.update_target_site_pos()
        return self._flat(obs), info

    def step(self, action):
        obs, *rest = self.env.step(action)
        return self._flat(obs), *rest

    def _flat(self, obs):
        return np.float32([*obs["observation"], *self.unwrapped.goal])


def make_raw(env_id, **kwargs):
    """gymnasium.make with the mazes registered. Raises ImportError if their package is missing."""
    register(env_id)
    env = gymnasium.make(env_id, disable_env_checker=True, **kwargs)
    if not env_id.startswith("PointMaze_"):
        return env
    with contextlib.suppress(OSError):  # each environment leaves a copy of its model
        os.unlink(env.unwrapped.tmp_xml_file_path)
    return FlatMaze(env, goal_cell(env_id))


def mazes_installed():
    """Whether the package of the mazes, gymnasium-robotics, is installed."""
    return importlib.util.find_spec("gymnasium_robotics") is not None


def register(env_id):
    """Registers the mazes if env_id is one. Raises ImportError if their package is missing."""
    if not env_id.startswith(("PointMaze_", "AntMaze_")):
        return
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its import prints news
            import gymnasium_robotics
    except ImportError:
        raise ImportError("mazes need gymnasium-robotics, see requirements.txt") from None
    gymnasium.register_envs(gymnasium_robotics)
