"""A HalfCheetah that runs, for collecting data, and one that jumps, the task that data lack.

    import benchmarks.studies.generalisation.tasks    # or --env-module: registers both

HalfCheetahRun-v0 pays for speed up to 3, HalfCheetahJump-v0 for height, too. Everything else is
HalfCheetah-v5: 17 observations, actions in [-1, 1], 1,000 steps, no terminal states. A reward is a
function of (obs, action, next_obs), the same for the environment and for recorded steps.
"""

import gymnasium
import numpy as np

HEIGHT, SPEED = 0, 8  # entries of obs: the torso's height, 0 at rest, and its forward velocity
FASTEST, PER_METRE, EFFORT = 3.0, 15.0, 0.1


def run(obs, action, next_obs):
    """Speed up to 3, less the effort: (..., D), (..., A), (..., D) -> (...)."""
    effort = EFFORT * np.square(action).sum(-1)
    return np.minimum(next_obs[..., SPEED], FASTEST) - effort


def jump(obs, action, next_obs):
    """As `run`, and 15 for each metre of height."""
    return run(obs, action, next_obs) + PER_METRE * next_obs[..., HEIGHT]


REWARDS = {"run": run, "jump": jump}


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


def half_cheetah(task, **kwargs):
    """HalfCheetah-v5 with the reward of a task; kwargs: of its constructor."""
    return Rewarded(gymnasium.make("HalfCheetah-v5", **kwargs).unwrapped, REWARDS[task])


for name in REWARDS:
    gymnasium.register(
        f"HalfCheetah{name.title()}-v0",
        entry_point=f"{__name__}:half_cheetah",
        max_episode_steps=1000,
        kwargs={"task": name},
    )
