"""Updates of other implementations, timed by benchmarks.speed.peers: a file for each peer.

A file has PEER, which describes the peer, and CASES, {case: rows(checkout, world)}. rows is a
generator of Row: what is timed, at which sizes, and a loop. world is the environment with its data.
The files run in the peer's environment; this module needs only NumPy.

Sizes are equal to ours where the peer has a setting for them. A row states its sizes: "widths" of
the hidden layers ("actor_widths" if different), critics, actions per row in the penalty of CQL and
COMBO. An evaluation, a plan or a rollout counts as one update.
"""

import importlib.util
import itertools
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import MagicMock

import numpy as np

OBS, ACTION, EPISODES, LENGTH = 17, 6, 100, 1000  # HalfCheetah
BATCH = dict(batch=256, obs=OBS, action=ACTION)
TWO, THREE = [256] * 2, [256] * 3
MODEL = dict(members=7, elites=5, widths=[200] * 4)
DYNAMICS = MODEL | BATCH
ROLLOUT = dict(starts=50_000, steps=5, policy_widths=THREE, **MODEL)
DT = dict(batch=64, context=20, width=128, layers=3, heads=1, obs=OBS, action=ACTION)
EVALUATION = dict(episodes=10, widths=TWO)
MULTIPLES = {32: (1, 2, 4, 8), 4: (1, 4, 8)}  # of Diffuser's authors, by horizon; 4: HalfCheetah
DIFFUSION_STEPS = 20


class Row(NamedTuple):
    """One measurement."""

    what: str  # name of the update
    sizes: dict
    updates: int  # in a chunk
    loop: Callable  # loop(tick) runs forever and calls tick() after every chunk


def repeat(step, updates, wait=lambda: None):
    """A loop of chunks of `updates` calls of step(), then wait()."""

    def loop(tick):
        while True:
            for _ in range(updates):
                step()
            wait()
            tick()

    return loop


def every(updates, tick):
    """A function to call after each update, with any arguments; it ticks every `updates` calls."""
    count = itertools.count(1)
    return lambda *_, **__: next(count) % updates or tick()


def diffuser_sizes(horizon, **more):
    """Sizes of Diffuser without attention."""
    sizes = dict(horizon=horizon, width=32, multiples=list(MULTIPLES[horizon]))
    return sizes | dict(obs=OBS, action=ACTION, diffusion_steps=DIFFUSION_STEPS) | more


# --- Stand-ins for D4RL, old Gym, and packages for logging and settings ---


def without(*names):
    """Replaces these modules by empty ones."""
    for name in names:
        sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None))


def module(checkout, path):
    """A single file of a checkout as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, Path(checkout) / path)
    sys.modules[spec.name] = found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


class World:
    """HalfCheetah with the interface of Gym before 0.26, and noise in place of D4RL's arrays."""

    def __init__(self):
        self.env, self.name = None, "halfcheetah-medium-v2"
        self.observation_space = SimpleNamespace(shape=(OBS,))
        bounds = dict(low=-np.ones(ACTION, np.float32), high=np.ones(ACTION, np.float32))
        self.action_space = SimpleNamespace(shape=(ACTION,), seed=self.seed, **bounds)

    def get_dataset(self):
        rng, n = np.random.default_rng(0), EPISODES * LENGTH
        obs = rng.normal(size=(EPISODES, LENGTH + 1, OBS)).astype(np.float32)
        return dict(
            observations=obs[:, :-1].reshape(n, OBS),
            next_observations=obs[:, 1:].reshape(n, OBS),
            actions=rng.uniform(-0.95, 0.95, (n, ACTION)).astype(np.float32),
            rewards=rng.normal(size=n).astype(np.float32),
            terminals=np.zeros(n, np.float32),
            timeouts=np.arange(n) % LENGTH == LENGTH - 1,
        )

    def seed(self, seed):
        pass

    def get_normalized_score(self, score):
        return score

    def reset(self):
        if self.env is None:
            import gymnasium

            self.env = gymnasium.make("HalfCheetah-v5")
        self.info = {"episode": {"return": 0.0, "length": 0}}
        return self.env.reset()[0].astype(np.float32)

    def step(self, action):
        obs, reward, terminated, truncated, _ = self.env.step(action)
        self.info["episode"]["return"] += reward
        self.info["episode"]["length"] += 1
        return obs.astype(np.float32), reward, terminated or truncated, self.info


def prepare():
    """Installs the stand-ins that several peers need; the environment."""
    without("gym", "d4rl", "pyrallis", "wandb", "tyro", "omegaconf")
    gym, world = sys.modules["gym"], World()
    gym.make = lambda name: world
    gym.wrappers.TransformObservation = lambda env, function: env
    gym.wrappers.TransformReward = lambda env, function: env
    sys.modules["d4rl"].qlearning_dataset = lambda env: env.get_dataset()
    sys.modules["pyrallis"].wrap = lambda: lambda function: function
    sys.modules["omegaconf"].OmegaConf.from_cli = dict
    return world
