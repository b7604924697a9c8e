"""benchmarks.collect.ogbench: cells, labels, episodes; with the package, its own reading agrees."""

import sys
from types import ModuleType

import gymnasium
import numpy as np
import pytest

from benchmarks.collect import ogbench as collect
from common import datasets, evaluation

WALLS = np.ones((5, 5), int)
WALLS[1:4, 1:4] = 0
WALLS[2, 2] = 1  # a ring around one wall


class Ring(gymnasium.Env):
    """The part of OGBench's point mazes that the collector uses; a cell is a metre wide."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    maze_map = WALLS

    def __init__(self, terminate_at_goal=True):
        pass

    def ij_to_xy(self, cell):
        return float(cell[1]), float(cell[0])

    def add_noise(self, xy):
        return xy

    def set_goal(self, goal_xy):
        self.cur_goal_xy = np.array(goal_xy)

    def get_xy(self):
        return self.xy.copy()

    def get_oracle_subgoal(self, start, goal):
        """The next cell clockwise: up on the left, right on the top, ..."""
        x, y = np.round(start)
        step = (0, -1) if x == 1 and y > 1 else (1, 0) if y == 1 and x < 3 else (
            (0, 1) if x == 3 and y < 3 else (-1, 0))  # fmt: skip
        return np.array([x, y]) + step, None

    def reset(self, *, seed=None, options=None):
        task = (options or {}).get("task_info", {"init_ij": (1, 1), "goal_ij": (3, 3)})
        self.xy = np.array(self.ij_to_xy(task["init_ij"]))
        self.set_goal(self.ij_to_xy(task["goal_ij"]))
        return self.xy.copy(), {}

    def step(self, action):
        before, self.xy = self.xy, (self.xy + 0.3 * action).clip(1, 3)
        success = np.linalg.norm(self.xy - self.cur_goal_xy) < 0.5
        info = {"prev_qpos": before, "success": success}
        return self.xy.copy(), 0.0, False, False, info


@pytest.fixture
def ring(tmp_path, monkeypatch):
    """A stand-in for the package: a task is done within half a metre of (3, 3)."""

    def relabel_dataset(name, env, data):
        done = np.linalg.norm(data["qpos"] - 3, axis=1) < 0.5
        data["rewards"], data["masks"] = np.float32(done) - 1, 1 - np.float32(done)

    package, utils = ModuleType("ogbench"), ModuleType("ogbench.relabel_utils")
    package.relabel_utils, utils.relabel_dataset = utils, relabel_dataset
    monkeypatch.setitem(sys.modules, "ogbench", package)
    monkeypatch.setitem(sys.modules, "ogbench.relabel_utils", utils)
    known = collect.recording.version
    monkeypatch.setattr(
        collect.recording, "version", lambda name: "0" if name == "ogbench" else known(name)
    )
    for name in ("MINARI_DATASETS_PATH", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("common.datasets.sources.BUNDLED", tmp_path / "data")
    names = "pointmaze-ring-v0", "pointmaze-ring-singletask-v0"
    for name in names:
        gymnasium.register(name, f"{__name__}:Ring", max_episode_steps=50)
    yield collect.Config("pointmaze-ring-singletask-v0", num_episodes=3, length=100)
    for name in names:
        del gymnasium.registry[name]


def test_an_episode_ends_where_the_task_is_done_and_goals_change(ring):
    collect.main(ring)
    data = datasets.load("stillwater/pointmaze-ring/navigate-v0")
    assert data.env_id == "pointmaze-ring-singletask-v0" and len(data.obs) == 300
    done = np.linalg.norm(data.obs - 3, axis=1) < 0.5
    assert 10 < done.sum() < 100
    np.testing.assert_array_equal(data.done, done)
    np.testing.assert_array_equal(data.reward, done - 1.0)
    last = np.r_[done[:-1], True] | (np.arange(1, 301) % 100 == 0)
    np.testing.assert_array_equal(np.flatnonzero(last), data.start + data.length - 1)
    np.testing.assert_array_equal(data.next_obs[:99], data.obs[1:100])  # also across `done`
    assert (data.next_obs[99] != data.obs[100]).any()
    assert data.ref_max is None
    assert data.obs.std(0).min() > 0.5  # it walks around, not to one goal
    assert np.abs(data.action).mean() > 0.3


def test_a_seed_gives_the_same_rows(ring):
    one, again = collect.collect(ring), collect.collect(ring)
    np.testing.assert_array_equal(one[0], again[0])
    other = collect.collect(collect.Config(ring.env_id, seed=1, num_episodes=3, length=100))
    assert (one[0] != other[0]).any()


def test_a_hallway_has_walls_on_two_opposite_sides_alone():
    found = [(i, j) for i, j in np.argwhere(WALLS == 0) if collect.is_hallway(WALLS, i, j)]
    assert found == [(1, 2), (2, 1), (2, 3), (3, 2)]


def test_a_lost_cube():
    qpos = np.zeros((4, 17))
    assert not collect.is_lost(qpos)
    for y, z, lost in ((0.3, 0.02, True), (-0.36, 0.066, False), (-0.36, 0.02, True)):
        qpos[2, 15:] = y, z
        assert collect.is_lost(qpos) == lost


def test_what_cannot_be_collected_is_said(monkeypatch):
    for name in ("cube-single-v0", "antmaze-medium-singletask-v0", "puzzle-3x3-singletask-v0"):
        with pytest.raises(SystemExit, match="expected a single task"):
            collect.main(collect.Config(name))
    monkeypatch.setitem(sys.modules, "ogbench", None)
    for name in [name for name in gymnasium.registry if "-singletask-" in name]:
        monkeypatch.delitem(gymnasium.registry, name)  # another test has had the package
    with pytest.raises(evaluation.EvaluationError, match="pip install ogbench"):
        collect.main(collect.Config())


@pytest.mark.parametrize("world", ["cube-single", "scene", "pointmaze-medium"])
def test_ogbenchs_own_reading_gives_the_same_dataset(world, tmp_path, monkeypatch):
    """The same rows in a file of its layout, read by its name."""
    pytest.importorskip("ogbench")
    for name in ("MINARI_DATASETS_PATH", "XDG_CACHE_HOME", "OGBENCH_DATASET_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr("common.datasets.sources.BUNDLED", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    cfg = collect.Config(f"{world}-singletask-v0", num_episodes=2, length=40)
    found = []
    monkeypatch.setattr(collect, "collect", lambda cfg, own=collect.collect: found or own(cfg))
    found += collect.collect(cfg)
    collect.main(cfg)
    ours = datasets.load(f"stillwater/{world}/{cfg.kind}-v0")
    longer = [*range(40), 39, *range(40, 80), 79]  # by a row without a next state
    obs, action, _, qpos, buttons = (column[longer] for column in found)
    ends = np.arange(1, 83) % 41 == 0
    obs[ends] = found[2][[39, 79]]
    file = {"observations": obs, "actions": action, "terminals": ends, "qpos": qpos, "qvel": qpos}
    if buttons.size:
        file["button_states"] = buttons
    np.savez(tmp_path / f"{world}-{cfg.kind}-v0.npz", **file)
    theirs = datasets.load(f"{world}-{cfg.kind}-singletask-v0")
    assert ours.env_id == theirs.env_id
    for name in ("obs", "action", "reward", "next_obs", "done", "start", "length"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), name)
