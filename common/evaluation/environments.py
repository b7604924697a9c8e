"""Makes and inspects Gymnasium environments; gives mazes flat observations.

The observation of a PointMaze (gymnasium-robotics) is a vector (x, y, vx, vy, goal x, goal y) in
metres and metres per second. Its goal is fixed in the middle of the cell that D4RL's maze2d uses.
Its reward is the environment's own: 1 for each step that ends within 0.45 m of the goal (Dense:
exp(-distance)), until the time limit. The start is drawn for each episode.
"""

import contextlib
import difflib
import io
import json
import os
import traceback
import warnings
from typing import NamedTuple

import gymnasium
import numpy as np

from common import experiment
from common.evaluation.options import join, spec, split
from common.evaluation.wrappers import (
    Choice,
    FlatDict,
    FlatMaze,
    is_choice,
    is_dict_of_vectors,
    is_small_image,
    is_vector,
)

MAZES = "PointMaze_", "AntMaze_"  # of gymnasium-robotics
GOALS = {"UMaze": (1, 1), "Medium": (6, 6), "Large": (7, 9)}  # (row, column)


class EvaluationError(experiment.UserError):
    """An error with an environment, a film or an export that the user can correct."""


class Env(NamedTuple):
    """What a dataset must agree with; the defaults describe an unknown environment."""

    env_id: str = ""  # with its options, see options.py
    obs_dim: int = 0
    low: np.ndarray = np.float32([-1])  # (A,) or (1,), lower bounds of the actions
    high: np.ndarray = np.float32([1])  # upper bounds
    limit: int = 0  # time limit of an episode in steps; 0: unknown
    clip: bool = False  # data may hold actions beyond the bounds, which the environment clips
    is_drawn: bool = False  # whether it can render frames
    num_actions: int = 0  # how many discrete actions there are; 0: actions are vectors


def make(env_id, **kwargs):
    """A Gymnasium environment that takes actions in [-1, 1], whatever its own bounds are.

    Of A discrete actions it takes the one with the largest entry of a vector (A,). Small images
    become vectors.

    env_id: an id, with options or without, see options.py. kwargs: of gymnasium.make. Raises
    EvaluationError for an id that Gymnasium cannot make, for observations or actions of other
    kinds, and for an environment without a time limit.
    """
    env = make_raw(env_id, **kwargs)
    action, limit = env.action_space, env.spec.max_episode_steps
    if not limit:
        name, options = split(env_id)
        example = f"{name} {json.dumps(options | {'max_episode_steps': 1000})}"
        raise EvaluationError(f"{env_id} needs a time limit: --env-id '{example}' sets one.")
    if np.any(action.low != -1) or np.any(action.high != 1):
        env = gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    return env


def inspect(env_id) -> Env:
    """The Env of a registered environment: sizes, action bounds, time limit.

    Resets the environment and takes one step, so that errors show before training. Raises
    EvaluationError as `make` does, and for any error of the environment.
    """
    with contextlib.suppress(ImportError):
        import mujoco

        mujoco.set_mju_user_warning(lambda _: None)  # HalfCheetah's model has an old attribute
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Gymnasium calls v4 out of date
        env = make(env_id)
    raw, size = env.unwrapped, env.observation_space.shape
    try:
        with contextlib.closing(env):
            first, _ = env.reset(seed=0)
            later, reward, *ends, _ = env.step(np.zeros(env.action_space.shape, np.float32))
            np.asarray(reward, float).item(), *map(bool, ends)
        for obs in (first, later):
            if np.shape(obs) != size or not np.isfinite(np.float32(obs)).all():
                raise ValueError(f"observes {obs!r}, not finite numbers of shape {size}")
    except Exception as error:  # an environment may raise anything
        raise EvaluationError(f"{env_id} cannot be used: {one_line(error)}") from None
    limit, action = env.spec.max_episode_steps, raw.action_space
    is_drawn = "rgb_array" in (env.metadata or {}).get("render_modes", ())
    if isinstance(action, gymnasium.spaces.Discrete):
        count = int(action.n)
        return Env(env_id, size[0], limit=limit, is_drawn=is_drawn, num_actions=count)
    return Env(env_id, size[0], action.low, action.high, limit, is_drawn=is_drawn)


def one_line(error):
    """The first line of an exception's message; without one, its name and where it was raised."""
    if lines := str(error).strip().splitlines():
        return lines[0]
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {place.filename}, line {place.lineno}: {place.line}"


def named(name, options):
    """The name of an environment with options, see options.py.

    Raises ValueError for options that are not plain values.
    """
    with contextlib.suppress(ImportError):
        register(name)
    return join(name, options)


def goal_cell(env_id):
    """(row, column) of the fixed goal in a PointMaze; None if goals are drawn for each episode."""
    kind, _, size = env_id.rpartition("-v")[0].partition("_")
    return GOALS.get(size.removesuffix("Dense")) if kind == "PointMaze" else None


def make_raw(env_id, **kwargs):
    """An environment with its own action bounds and flat observations. Raises EvaluationError."""
    import mujoco  # here, because --video must choose the renderer first

    mujoco.set_mju_user_warning(lambda message: None)  # it would write MUJOCO_LOG.TXT
    try:
        name, options = split(env_id)
        register(name)
        if name not in gymnasium.registry:  # a "module:Env-v0" would import the module
            near = difflib.get_close_matches(name, gymnasium.registry, 3)
            hint = f"Did you mean {' or '.join(near)}? " if near else ""
            hint += "If a module of your own registers it: --env-module MODULE"
            raise EvaluationError(f"unknown environment {name!r}. {hint}.")
        with warnings.catch_warnings():  # D4RL's scores are on v4
            warnings.filterwarnings("ignore", ".*is out of date", DeprecationWarning)
            env = gymnasium.make(spec(env_id), disable_env_checker=True, **kwargs)
        if name.startswith(MAZES):
            with contextlib.suppress(OSError):  # each environment leaves a copy of its model
                os.unlink(env.unwrapped.tmp_xml_file_path)
        if name.startswith("PointMaze_"):
            env = FlatMaze(env, None if "maze_map" in options else goal_cell(name))
        elif is_dict_of_vectors(env.observation_space):
            env = FlatDict(env)
        elif is_small_image(env.observation_space):
            env = gymnasium.wrappers.FlattenObservation(env)
        if is_choice(env.action_space):
            env = Choice(env)
    except Exception as error:  # an environment's constructor may raise anything
        raise EvaluationError(f"{env_id} cannot be made: {one_line(error)}") from error
    obs, action = env.observation_space, env.action_space
    if not (is_vector(obs) and is_vector(action)):
        raise EvaluationError(
            f"{env_id}: observations must be vectors and actions vectors or discrete, "
            f"not {obs} and {action}"
        )
    if not np.isfinite([action.low, action.high]).all():
        raise EvaluationError(f"{env_id}: actions must have bounds, not {action}")
    return env


def register(name):
    """Registers the environments of gymnasium-robotics if `name` is a maze or unknown, and
    OGBench's for a single task.

    Raises ImportError if the package of a maze or of such a task is missing.
    """
    is_maze = name.startswith(MAZES)
    if "-singletask-" in name:
        # its environments make a new space, of float64, and warn, at each access
        warnings.filterwarnings("ignore", ".*precision lowered by casting")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import ogbench  # noqa: F401
        except ImportError:
            if name not in gymnasium.registry:
                raise ImportError("OGBench's tasks need its package: pip install ogbench") from None
    if name in gymnasium.registry and not is_maze:
        return
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its import prints news
            import gymnasium_robotics

            gymnasium.register_envs(gymnasium_robotics)
    except ImportError:
        if is_maze:
            raise ImportError("mazes need gymnasium-robotics, see requirements.txt") from None
