"""gymnasium-robotics' PointMaze in the form that the other environments have.

Its observation is a vector (x, y, vx, vy, goal x, goal y), metres and metres a second, and its goal
stands still, in the middle of the cell that D4RL's maze2d chose. What it pays is left as it is: 1
for each step that ends within 0.45 m of the goal (Dense: exp of minus the distance), to the time
limit. Starts are drawn anew for each episode.
"""

import contextlib
import importlib.util
import io
import os

import gymnasium
import numpy as np

GOALS = {"UMaze": (1, 1), "Medium": (6, 6), "Large": (7, 9)}  # (row, column)


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


def make(env_id, **kwargs):
    """gymnasium.make, for mazes as well; ImportError where their package is missing."""
    register(env_id)
    env = gymnasium.make(env_id, disable_env_checker=True, **kwargs)
    if not env_id.startswith("PointMaze_"):
        return env
    with contextlib.suppress(OSError):  # a copy of the model for each environment, else left behind
        os.unlink(env.unwrapped.tmp_xml_file_path)
    return FlatMaze(env, goal_cell(env_id))


def installed():
    """Whether the mazes' package is there."""
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
