"""Collects data of an ant that walks through a maze, to random places (arXiv:2004.07219).

    python -m benchmarks.collect.antmaze --maze UMaze

First SAC (algorithms/sac.py) trains a walker: an Ant on an open plane that is told a direction and
paid for its speed that way. In the maze it is told the direction of the next cell on the shortest
path to a random place, then to another one, with noisy actions. The goal of the maze plays no part,
so that its rewards tell which pieces of the walks are worth joining. An ant that falls on its back
lies there for a while and begins a new episode.

The environment is gymnasium-robotics' AntMaze with a start and a goal at the two ends, each drawn
within a metre of its cell's middle. obs (31,): position, body (27,), goal. The reward is 1 at the
goal, which ends the episode, else 0. The score is the percentage of episodes that reach it.

Ctrl-C saves the walker's training, and the same command continues it. The result is a Minari
dataset with its provenance, as of benchmarks.collect: `stillwater/antmaze-umaze/navigate-v0`.
As D4RL's and OGBench's (arXiv:2410.20092): noise, and a walker by SAC on directions. Differs from
D4RL: episodes begin anywhere and end at the goal or after a fall (a truncation).
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import gymnasium
import jax
import numpy as np
import tyro

from benchmarks.collect import __main__ as collecting
from benchmarks.collect import recording, waypoints
from common import evaluation

SPEED = 2.0  # metres per second; a faster walker earns no more
NOISE = 0.2  # standard deviation of the noise on actions in the maze
NEAR = 0.5  # metres from a target that count as reached
DOWN = 50  # steps on the back that end an episode: enough that learners know states of that kind
BODY, WXYZ, VELOCITY = slice(2, 29), slice(1, 5), slice(13, 15)  # of the maze's obs, of a body
MAZES = {  # 1 is a wall, r the start, g the goal
    "UMaze": ["11111", "1r001", "11101", "1g001", "11111"],
    "Medium": ["11111111", "1r011001", "10010001", "11000111",
               "10010001", "10100101", "100010g1", "11111111"],
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    maze: Literal["UMaze", "Medium"] = "UMaze"  # its size
    seed: int = 0  # of SAC, the environments and the noise
    num_steps: int = 500_000  # transitions in the dataset
    num_envs: int = 10  # mazes walked through at once
    sac_steps: int = 500_000  # environment steps of the walker's training
    start_steps: int = 5_000  # of them with uniform actions and without updates
    out: str = "data"  # folder for Minari datasets
    work: str = "runs/collect"  # folder for SAC's checkpoints
    kind = "navigate"

    @property
    def env_id(self):
        return maze_id(self.maze)


def maze_id(maze, start="r"):
    """The environment's name with its options. start "0": episodes begin in any cell."""
    cells = [[int(c) if c.isdigit() else c for c in row.replace("r", start)] for row in MAZES[maze]]
    body = dict(include_cfrc_ext_in_observation=False, continuing_task=False)
    return f"AntMaze_{maze}-v5 {json.dumps(dict(body, maze_map=cells))}"


class Walk(gymnasium.Wrapper):
    """Ant on a plane with a direction to walk in: obs (29,) of body (27,) and a unit vector.

    The direction changes at random, every 50 steps on average. An ant on its back ends the episode.
    """

    def __init__(self):
        super().__init__(gymnasium.make("Ant-v5", include_cfrc_ext_in_observation=False).unwrapped)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (29,))
        self.way = None

    def turn(self):
        angle = self.unwrapped.np_random.uniform(0, 2 * np.pi)
        self.way = np.array([np.cos(angle), np.sin(angle)])

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        self.turn()
        return np.float32([*obs, *self.way]), info

    def step(self, action):
        obs, *_, info = self.env.step(action)
        speed = min(obs[VELOCITY] @ self.way, SPEED)
        reward = speed - 0.05 * np.square(action).sum() + 0.5
        if self.unwrapped.np_random.random() < 0.02:
            self.turn()
        return np.float32([*obs, *self.way]), float(reward), fallen(obs), False, info


def fallen(body):
    """Whether an ant lies on its back: (..., 27) -> (...)."""
    _, x, y, _ = np.moveaxis(body[..., WXYZ], -1, 0)
    return x**2 + y**2 > 0.5


gymnasium.register("AntWalk-v0", entry_point=Walk, max_episode_steps=500)


def learn_to_walk(cfg):
    """SAC's policy on the plane: obs (n, 29) -> action (n, 8)."""
    own = collecting.Config(
        env_id="AntWalk-v0",
        kind="expert",  # to the end, whatever the returns
        seed=cfg.seed,
        sac_steps=cfg.sac_steps,
        start_steps=cfg.start_steps,
    )
    folder = Path(cfg.work) / f"{own.env_id}-s{cfg.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    collecting.check_settings(own, folder)
    env = evaluation.make(own.env_id)
    state, *_ = collecting.train(own, env, folder, -np.inf)
    return jax.jit(lambda obs: collecting.mode(state.actor, obs))


class Guide:
    """Directions through one maze to random places, for n ants."""

    def __init__(self, maze, rng, n):
        self.maze, self.rng = maze, rng
        walls = [[int(c == 1) for c in row] for row in maze.maze_map]
        self.free = np.argwhere(np.array(walls) == 0)
        self.route = cache(lambda here, there: waypoints.route(walls, here, there))
        self.targets = [self.draw() for _ in range(n)]

    def draw(self):
        """A place (2,), in metres, within a metre of a free cell's middle."""
        middle = self.maze.cell_rowcol_to_xy(self.free[self.rng.integers(len(self.free))])
        return middle + self.rng.uniform(-1, 1, 2)

    def cell(self, position):
        return tuple(int(i) for i in self.maze.cell_xy_to_rowcol(position))

    def __call__(self, position):
        """Unit vectors (n, 2) at positions (n, 2)."""
        ways = np.zeros_like(position)
        for i, here in enumerate(position):
            if np.linalg.norm(self.targets[i] - here) < NEAR:
                self.targets[i] = self.draw()
            path = self.route(self.cell(here), self.cell(self.targets[i]))
            aim = self.maze.cell_rowcol_to_xy(np.array(path[0])) if path else self.targets[i]
            ways[i] = aim - here
        return ways / np.linalg.norm(ways, axis=-1, keepdims=True)


class Upright(gymnasium.Wrapper):
    """Truncates the episode of an ant that has been on its back for `DOWN` steps.

    Not with the fall: a value that is bootstrapped there must be that of states in the data.
    """

    def reset(self, **kwargs):
        self.down = 0
        return self.env.reset(**kwargs)

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.down = self.down + 1 if fallen(obs[BODY]) else 0
        return obs, reward, terminated, truncated or self.down >= DOWN, info


def navigate(cfg, walk):
    """Rows of walks through the maze, {name: array} of `FIELDS`."""
    rng = np.random.default_rng(cfg.seed)
    envs = [Upright(evaluation.make(maze_id(cfg.maze, start="0"))) for _ in range(cfg.num_envs)]
    guide = Guide(envs[0].unwrapped.maze, rng, len(envs))

    def policy(obs):
        action = np.asarray(walk(np.concatenate([obs[:, BODY], guide(obs[:, :2])], 1)))
        return (action + NOISE * rng.normal(size=action.shape)).clip(-1, 1).astype(np.float32)

    return recording.cut(recording.play(envs, policy, rng, cfg.num_steps), cfg.num_steps)


def main(cfg: Config):
    rows = navigate(cfg, learn_to_walk(cfg))
    ends = rows["next_obs"][[s.stop - 1 for s in recording.boundaries(rows)], BODY]
    reached, falls = int(rows["terminated"].sum()), int(fallen(ends).sum())
    env = evaluation.make(cfg.env_id)
    path = recording.export(
        cfg,
        rows,
        env.observation_space.shape,
        env.action_space,
        (0.0, 1.0, "the share of episodes that reach the goal"),
        {"episodes_that_reach_the_goal": reached, "episodes_that_end_on_the_back": falls},
        made_by="SAC's walker, guided to random places",
        packages=["mujoco", "gymnasium-robotics"],
    )
    print(f"{path}: {len(rows['reward']):,} steps, {reached} of {len(ends)} episodes "
          f"reach the goal, {falls} end on the back")  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
