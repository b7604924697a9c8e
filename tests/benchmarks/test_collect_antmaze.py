"""benchmarks.collect.antmaze: the guide keeps to the maze, the walker's reward, the dataset."""

import numpy as np
import pytest

from algorithms import iql
from benchmarks.collect import antmaze
from common import datasets, evaluation, experiment


@pytest.mark.parametrize("maze", list(antmaze.MAZES))
def test_who_follows_the_guide_sees_the_whole_maze_and_no_wall(maze):
    world = evaluation.make(antmaze.maze_id(maze)).unwrapped.maze
    guide = antmaze.Guide(world, np.random.default_rng(0), n=1)
    here, seen, targets = world.cell_rowcol_to_xy(guide.free[0])[None], set(), set()
    for _ in range(6_000):
        way = guide(here)
        np.testing.assert_allclose(np.linalg.norm(way), 1)
        here = here + 0.2 * way
        cell = guide.cell(here[0])
        assert world.maze_map[cell[0]][cell[1]] != 1
        seen.add(cell)
        targets.add(tuple(guide.targets[0]))
    assert seen == {tuple(map(int, cell)) for cell in guide.free}
    assert len(targets) > 20


def test_the_walker_is_paid_for_speed_in_its_direction_up_to_a_limit(monkeypatch):
    env = antmaze.Walk()
    obs, _ = env.reset(seed=0)

    def reward(velocity, way, action):
        told = obs[:27].copy()
        told[antmaze.VELOCITY] = velocity
        monkeypatch.setattr(env.env, "step", lambda _: (told, 0.0, False, False, {}))
        env.way = np.array(way)
        return env.step(np.array(action))[1]

    still = np.zeros(8)
    assert reward([1, 0], [1, 0], still) - reward([0, 0], [1, 0], still) == pytest.approx(1)
    assert reward([0, 1], [1, 0], still) == pytest.approx(reward([0, 0], [1, 0], still))
    assert reward([-1, 0], [1, 0], still) < reward([0, 0], [1, 0], still)
    assert reward([9, 0], [1, 0], still) == reward([antmaze.SPEED, 0], [1, 0], still)
    assert reward([1, 0], [1, 0], still + 1) < reward([1, 0], [1, 0], still)


def test_an_ant_on_its_back_has_fallen():
    body = np.zeros((3, 27))
    turns = np.deg2rad([0, 80, 100])  # about x
    body[:, antmaze.WXYZ] = np.stack([np.cos(turns / 2), np.sin(turns / 2), 0 * turns, 0 * turns]).T
    assert antmaze.fallen(body).tolist() == [False, False, True]


def test_an_ant_that_stays_on_its_back_begins_a_new_episode(monkeypatch):
    env = antmaze.Upright(evaluation.make(antmaze.maze_id("UMaze")))

    def ends(fallen):
        """Whether each step truncates, of an ant that is on its back at some of them."""
        obs, _ = env.reset(seed=0)
        for down in fallen:
            x = 0.9 * down
            obs[antmaze.BODY][antmaze.WXYZ] = np.sqrt(1 - x**2), x, 0, 0
            monkeypatch.setattr(env.env, "step", lambda _: (obs, 0.0, False, False, {}))
            yield env.step(np.zeros(8))[3]

    n = antmaze.DOWN
    assert list(ends([0] * 5 + [1] * n)) == [False] * (4 + n) + [True]
    assert not any(ends(([1] * (n - 1) + [0]) * 3))
    assert not any(ends([1] * (n - 1)))  # each episode counts anew


def test_the_dataset_is_an_ant_maze_to_every_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    rng = np.random.default_rng(0)
    at_random = lambda obs: rng.uniform(-1, 1, (len(obs), 8))  # noqa: E731
    monkeypatch.setattr(antmaze, "learn_to_walk", lambda cfg: at_random)
    cfg = antmaze.Config(num_steps=1_500, num_envs=3, out=str(tmp_path))
    antmaze.main(cfg)
    assert "1,500 steps" in capsys.readouterr().out
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))  # the collector changes it
    data = datasets.load("stillwater/antmaze-umaze/navigate-v0")
    env = evaluation.make(data.env_id)
    obs, _ = env.reset(seed=0)
    assert data.obs.shape == (1_500, 31) and obs.shape == (31,)
    begins = data.obs[data.start, :2]
    apart = np.linalg.norm(begins[:, None] - begins, axis=-1)
    assert apart.max() > 4  # metres: not in one cell
    assert np.linalg.norm(env.reset(seed=1)[0][:2] - obs[:2]) < 3  # an evaluation starts in one
    assert experiment.resolve(iql.Config(env=data.name), iql.TUNED, data).tau == 0.9
    assert (data.ref_min, data.ref_max) == (0, 1)
