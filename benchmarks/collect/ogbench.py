"""Collects data in OGBench's environments (Park et al. 2024, arXiv:2410.20092): pip install ogbench

    python -m benchmarks.collect.ogbench --env-id cube-single-singletask-v0

    play       cube-single, scene: OGBench's scripted arm carries out one random job after another
    navigate   pointmaze: shortest paths from one random goal to the next, with noisy actions

Noise and lengths are those of OGBench's published recipe. The behaviour knows no task. Rewards and
terminals are OGBench's labels for the task of --env-id, `-task1` to `-task5`, without one OGBench's
default: 0 where the task is done, else -1, in the scene the number of wrong objects, negative. A
row whose task is done is terminal and an episode's last.

The result is a Minari dataset with its provenance, as of benchmarks.collect, for instance
`stillwater/cube-single/play-v0`. It is not OGBench's own dataset and has no reference returns: what
counts is success, which `python -m common.evaluation RUN` reports.
"""

import re
from dataclasses import dataclass

import gymnasium
import numpy as np
import tyro

from benchmarks.collect import recording
from benchmarks.collect.recording import FIELDS
from common import evaluation

TASKS = r"(cube-single|scene|pointmaze-\w+)-singletask(-task[1-5])?-v0"
PLAN_NOISE = dict(noise=0.1, noise_smoothing=0.5)  # of the arm's plans, see OGBench's PlanOracle
STEP_NOISE = 0.5  # standard deviation of the noise on the point's actions


@dataclass(frozen=True)
class Config:
    env_id: str = "cube-single-singletask-v0"  # OGBench's id of a single task
    seed: int = 0  # of the environment and the behaviour
    num_episodes: int = 100  # OGBench has 1,000
    length: int = 1_000  # steps of an episode
    out: str = "data"  # folder for Minari datasets

    @property
    def kind(self):
        return "navigate" if "maze" in self.env_id else "play"


def play(env, length):
    """Rows of one episode of the scripted arm: obs, action, next_obs and the labels' state."""
    from ogbench.manipspace.oracles.plan import button_plan, cube_plan, drawer_plan, window_plan

    oracles = {
        "cube": cube_plan.CubePlanOracle(env=env, **PLAN_NOISE),
        "button": button_plan.ButtonPlanOracle(env=env, **PLAN_NOISE),
        "drawer": drawer_plan.DrawerPlanOracle(env=env, **PLAN_NOISE),
        "window": window_plan.WindowPlanOracle(env=env, **PLAN_NOISE),
    }

    def begin(obs, info):
        oracle = oracles[info["privileged/target_task"]]
        oracle.reset(obs, info)
        return oracle

    (obs, info), rows = env.reset(), []
    oracle = begin(obs, info)
    for _ in range(length):
        action = np.clip(oracle.select_action(obs, info), -1, 1)
        next_obs, *_, info = env.step(action)
        rows.append((obs, action, next_obs, info["prev_qpos"], info.get("prev_button_states", ())))
        obs = next_obs
        if oracle.done:
            oracle = begin(*env.unwrapped.set_new_target())
    return rows


def navigate(env, length):
    """Rows of one episode of the point: obs, action, next_obs and the labels' state."""
    maze, random = env.unwrapped, np.random
    free = np.argwhere(maze.maze_map == 0)
    goals = [cell for cell in free if not is_hallway(maze.maze_map, *cell)]

    def draw(cells):
        return cells[random.randint(len(cells))]

    task = {"init_ij": draw(free), "goal_ij": draw(goals)}
    (obs, _), rows = env.reset(options={"task_info": task}), []
    for _ in range(length):
        way = maze.get_oracle_subgoal(maze.get_xy(), maze.cur_goal_xy)[0] - maze.get_xy()
        action = way / (np.linalg.norm(way) + 1e-6) + random.normal(0, STEP_NOISE, 2)
        action = action.clip(-1, 1)
        next_obs, *_, info = env.step(action)
        rows.append((obs, action, next_obs, info["prev_qpos"], ()))
        obs = next_obs
        if info["success"]:
            maze.set_goal(goal_xy=maze.add_noise(maze.ij_to_xy(draw(goals))))
    return rows


def is_hallway(walls, i, j):
    """Whether a cell has walls on two opposite sides and none on the others."""
    across, along = walls[i - 1 : i + 2 : 2, j].tolist(), walls[i, j - 1 : j + 2 : 2].tolist()
    return (across, along) in (([0, 0], [1, 1]), ([1, 1], [0, 0]))


def is_lost(qpos):
    """Whether the scene's cube, at any time of an episode, is where a camera could not see it."""
    _, y, z = qpos[:, 14:17].T
    return bool(((y >= 0.29) | ((y <= -0.3) & ((z < 0.06) | (z > 0.08)))).any())


def collect(cfg):
    """(obs, action, next_obs, qpos, button states) of all episodes, one after the other."""
    world = re.sub("-singletask(-task[1-5])?", "", cfg.env_id)
    settings = dict(terminate_at_goal=False, max_episode_steps=cfg.length + 1)
    if cfg.kind == "play":
        settings["mode"] = "data_collection"
    env = gymnasium.make(world, disable_env_checker=True, **settings)
    np.random.seed(cfg.seed)  # noqa: NPY002, OGBench draws from the global generator
    env.reset(seed=cfg.seed)
    episode, rows = {"play": play, "navigate": navigate}[cfg.kind], []
    while len(rows) < cfg.num_episodes * cfg.length:
        new = episode(env, cfg.length)
        if world.startswith("scene") and is_lost(np.array([row[3] for row in new])):
            continue
        rows += new
        if len(rows) % (10 * cfg.length) == 0:
            print(f"{len(rows):>9,} steps", flush=True)
    return [np.array(column) for column in zip(*rows, strict=True)]


def label(env_id, env, qpos, button_states):
    """OGBench's (rewards (N,), whether the task is done (N,)) of the states before the actions."""
    from ogbench import relabel_utils

    data = {"qpos": qpos, "button_states": button_states}
    relabel_utils.relabel_dataset(env_id, env, data)
    return data["rewards"], data["masks"] == 0


def main(cfg: Config):
    if not re.fullmatch(TASKS, cfg.env_id):
        raise SystemExit(f"--env-id {cfg.env_id}: expected a single task of cube-single, scene or "
                         "pointmaze, such as cube-single-singletask-v0.")  # fmt: skip
    env = evaluation.make(cfg.env_id)
    obs, action, next_obs, *state = collect(cfg)
    reward, done = label(cfg.env_id, env, *state)
    last = np.arange(1, len(obs) + 1) % cfg.length == 0
    rows = dict(zip(FIELDS, (obs, np.float32(action), reward, next_obs, done, last & ~done),
                    strict=True))  # fmt: skip
    box = gymnasium.spaces.Box(-1, 1, action.shape[1:], np.float32)
    made_by = {"play": "OGBench's scripted oracles", "navigate": "noisy shortest paths"}[cfg.kind]
    reference = None, None, "none: episodes count as solved or not"
    about = {"rows_with_the_task_done": int(done.sum())}
    path = recording.export(
        cfg, rows, obs.shape[1:], box, reference, about, made_by, packages=["mujoco", "ogbench"]
    )
    print(f"{path}: {len(obs):,} steps, the task is done in {done.sum():,} of them")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
