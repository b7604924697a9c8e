"""Environments in which data are collected, and those of tasks that the data do not show.

    import benchmarks.studies.generalisation.tasks    # or --env-module: registers them

jump          HalfCheetah-v5. Data: paid for speed up to 3. Task: paid for height, too.
angle         Ant-v5. Data: paid for speed along x. Task: for speed 30 degrees off.
drawer-close  OGBench's scene, whose arm can move a drawer. Data: a script opens the drawer.
              Task: paid for closing it. Needs `pip install ogbench`.

A reward is a function of (obs, action, next_obs), the same for an environment and for recorded
steps. No episode ends before its time limit, Ant's neither. All else is as in the environment named
above, but for the drawer's start.
"""

from typing import NamedTuple

import gymnasium
import numpy as np

HEIGHT, SPEED = 0, 8  # of HalfCheetah's obs: the torso's height, 0 at rest, and forward velocity
ANT_HEIGHT, ANT_VX, ANT_VY = 0, 13, 14  # of Ant's obs
HAND, HAND_COS, HAND_SIN, DRAWER = slice(12, 15), 15, 16, 36  # of the scene's obs
HAND_CENTRE, HAND_UNIT, DRAWER_UNIT = np.array([0.425, 0, 0]), 10.0, 18.0  # its units per metre
HANDLE, TRAVEL = np.array([0.33, -0.24, 0.08]), 0.16  # of the closed drawer; it opens along y


def run(obs, action, next_obs):
    """HalfCheetah: speed up to 3, less the effort: (..., D), (..., A), (..., D) -> (...)."""
    return np.minimum(next_obs[..., SPEED], 3) - 0.1 * np.square(action).sum(-1)


def jump(obs, action, next_obs):
    """As `run`, and 15 for each metre of height."""
    return run(obs, action, next_obs) + 15 * next_obs[..., HEIGHT]


def walk(obs, action, next_obs, degrees=0):
    """Ant: speed in a direction, less the effort, and 1 while the torso is at a healthy height."""
    angle, height = np.deg2rad(degrees), next_obs[..., ANT_HEIGHT]
    speed = np.cos(angle) * next_obs[..., ANT_VX] + np.sin(angle) * next_obs[..., ANT_VY]
    healthy = (height >= 0.2) & (height <= 1)
    return speed - 0.5 * np.square(action).sum(-1) + healthy


def aside(obs, action, next_obs):
    """As `walk`, 30 degrees off."""
    return walk(obs, action, next_obs, 30)


def drawer(obs):
    """Position of the hand, (..., 3) in metres, of the drawer's handle, and the drawer's opening
    from 0 to 1."""
    opening = -obs[..., DRAWER] / DRAWER_UNIT
    handle = HANDLE + opening[..., None] * np.array([0, 1, 0])
    return obs[..., HAND] / HAND_UNIT + HAND_CENTRE, handle, opening / TRAVEL


def opened(obs, action, next_obs):
    """Scene: the drawer's opening, less the distance in metres from hand to handle."""
    hand, handle, opening = drawer(next_obs)
    return opening - np.linalg.norm(hand - handle, axis=-1)


def closed(obs, action, next_obs):
    """As `opened`, with 1 for a closed drawer and 0 for an open one."""
    hand, handle, opening = drawer(next_obs)
    return 1 - opening - np.linalg.norm(hand - handle, axis=-1)


def open_drawer(obs):
    """Actions (n, 5) of a script that moves above the handle, down to it, and pulls."""
    hand, handle, _ = drawer(obs)
    gap = handle - hand
    beside = np.linalg.norm(gap[:, :2], axis=-1) > 0.04
    above = np.linalg.norm(gap, axis=-1) > 0.03
    pull = HANDLE + np.array([0, TRAVEL + 0.02, 0]) - hand
    move = np.where(above[:, None], gap, pull)
    move = np.where(beside[:, None], gap + np.array([0, 0, 0.12]), move)
    turn = -np.arctan2(obs[:, HAND_SIN] * obs[:, HAND_COS], obs[:, HAND_COS] ** 2)  # to 0 or pi
    action = np.column_stack([move / 0.05, turn / 0.3, -np.ones(len(obs))])  # of the action's size
    return action.clip(-1, 1).astype(np.float32)


class Rewarded(gymnasium.Wrapper):
    """An environment with the reward function reward(obs, action, next_obs)."""

    def __init__(self, env, reward):
        super().__init__(env)
        self.reward, self.obs = reward, None

    def reset(self, **kwargs):
        self.obs, info = self.env.reset(**kwargs)
        return self.obs, info

    def step(self, action):
        before = self.obs
        self.obs, _, *ends, info = self.env.step(action)
        return self.obs, float(self.reward(before, action, self.obs)), *ends, info


class Drawer(gymnasium.Env):
    """OGBench's scene with nothing locked and a drawer that starts open, or anywhere."""

    action_space = gymnasium.spaces.Box(-1, 1, (5,))
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (40,))
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, starts_open, render_mode=None, **kwargs):
        from ogbench.manipspace.envs.scene_env import SceneEnv  # an extra

        self.scene = SceneEnv("scene", mode="data_collection", terminate_at_goal=False, **kwargs)
        self.starts_open, self.render_mode = starts_open, render_mode

    def reset(self, *, seed=None, options=None):
        _, info = self.scene.reset(seed=seed)  # of a random scene
        if self.starts_open:
            info["qpos"][self.scene.model.joint("drawer_slide").qposadr[0]] = -TRAVEL
        self.scene.set_state(info["qpos"], info["qvel"], np.array([1, 1]))  # both buttons
        return self.scene.compute_observation(), {}

    def step(self, action):
        obs, *_ = self.scene.step(action)
        return obs, 0.0, False, False, {}

    def render(self):
        return self.scene.render()


def make(name, **kwargs):
    """The environment of that name; kwargs: of its constructor."""
    if name.startswith("HalfCheetah"):
        env = gymnasium.make("HalfCheetah-v5", **kwargs).unwrapped
    elif name.startswith("Ant"):
        shape = dict(include_cfrc_ext_in_observation=False, terminate_when_unhealthy=False)
        env = gymnasium.make("Ant-v5", **shape, **kwargs).unwrapped
    else:
        env = Drawer(starts_open=name == TASKS["drawer-close"].env_id, **kwargs)
    return Rewarded(env, REWARDS[name])


class Task(NamedTuple):
    before: str  # the environment that the data come from
    env_id: str  # the task's
    kind: str  # of data: all steps of SAC's training, or of a script with noise


TASKS = {
    "jump": Task("HalfCheetahRun-v0", "HalfCheetahJump-v0", "replay"),
    "angle": Task("AntRun-v0", "AntAngle-v0", "replay"),
    "drawer-close": Task("DrawerOpen-v0", "DrawerClose-v0", "scripted"),
}
REWARDS = {
    "HalfCheetahRun-v0": run,
    "HalfCheetahJump-v0": jump,
    "AntRun-v0": walk,
    "AntAngle-v0": aside,
    "DrawerOpen-v0": opened,
    "DrawerClose-v0": closed,
}

for env_id in REWARDS:
    gymnasium.register(
        env_id,
        entry_point=f"{__name__}:make",
        max_episode_steps=100 if env_id.startswith("Drawer") else 1000,
        kwargs={"name": env_id},
    )
