"""Gives environments flat observations and vectors as actions."""

import gymnasium
import numpy as np

GOAL_NAMES = ("achieved_goal", "observation", "desired_goal")  # in the order of a flat vector
IMAGE = 4096  # numbers in an image that becomes a vector, at most


class FlatDict(gymnasium.Wrapper):
    """An environment whose dict observations become vectors: their parts in the order of names.

    A goal environment has (position, observation, goal); the position, `achieved_goal`, is left out
    if `observation` begins with it.
    """

    def __init__(self, env):
        super().__init__(env)
        obs, _ = env.reset(seed=0)
        self._names = sorted(obs)
        if has_goal(env.observation_space):
            place, seen = obs["achieved_goal"], obs["observation"]
            located = np.array_equal(seen[: len(place)], place)
            self._names = ("observation", "desired_goal") if located else GOAL_NAMES
        size = sum(len(obs[name]) for name in self._names)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (size,))

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        return self._flat(obs), info

    def step(self, action):
        obs, *rest = self.env.step(action)
        return self._flat(obs), *rest

    def _flat(self, obs):
        return np.concatenate([obs[name] for name in self._names], dtype=np.float32)


class Choice(gymnasium.ActionWrapper):
    """An environment with A discrete actions that takes vectors (A,): the largest entry's."""

    def __init__(self, env):
        super().__init__(env)
        self.action_space = gymnasium.spaces.Box(-1, 1, (int(env.action_space.n),))

    def action(self, action):
        return int(np.argmax(action))


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


def is_vector(space):
    """Whether a space holds vectors."""
    return isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1


def is_small_image(space):
    """Whether a space holds images of at most IMAGE numbers."""
    is_image = isinstance(space, gymnasium.spaces.Box) and len(space.shape) > 1
    return is_image and np.prod(space.shape) <= IMAGE


def is_choice(space):
    """Whether a space holds discrete actions that are numbered from 0."""
    return isinstance(space, gymnasium.spaces.Discrete) and space.start == 0


def is_dict_of_vectors(space):
    """Whether a space holds dicts of vectors."""
    return isinstance(space, gymnasium.spaces.Dict) and all(map(is_vector, space.values()))


def has_goal(space):
    """Whether an observation space is a goal environment's dict of three vectors."""
    return is_dict_of_vectors(space) and set(space) == set(GOAL_NAMES)
