"""Tasks that data do not show: one reward for data and environment, commands, report."""

import importlib
import json

import gymnasium
import numpy as np
import pytest
import tyro

from benchmarks.report import generalisation_table
from benchmarks.studies.generalisation import __main__ as study
from benchmarks.studies.generalisation import tasks
from common import datasets, evaluation, experiment

ROBOTS = [name for name in tasks.REWARDS if not name.startswith("Drawer")]
DRAWERS = ["DrawerOpen-v0", "DrawerClose-v0"]  # need OGBench


def steps(env, count=1000, seed=0):
    """(obs, action, next_obs, reward) of random actions in float32, as stored."""
    rng, rows = np.random.default_rng(seed), []
    obs, _ = env.reset(seed=seed)
    for _ in range(count):
        action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        assert not terminated
        rows.append((obs, action, next_obs, reward))
        obs = env.reset()[0] if truncated else next_obs
    return [np.array(column, np.float32) for column in zip(*rows, strict=True)]


def agree(name, count):
    """Relabelled rows get the rewards that the environment gave them."""
    env = evaluation.make(name)
    assert env.spec.max_episode_steps == (100 if name in DRAWERS else 1000)
    obs, action, next_obs, reward = steps(env, count)
    expected = tasks.REWARDS[name](obs, action, next_obs)
    assert np.std(reward) > 0.02
    np.testing.assert_allclose(expected, reward, rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("name", ROBOTS)
def test_the_environment_and_the_relabelled_data_agree_step_by_step(name):
    agree(name, 1200)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_relabelling_changes_rewards_alone(task):
    rng = np.random.default_rng(0)
    rows = {k: rng.normal(size=(5, d)) for k, d in (("obs", 40), ("action", 5), ("next_obs", 40))}
    found = study.relabel(rows | {"reward": np.zeros(5)}, task)
    reward = tasks.REWARDS[tasks.TASKS[task].env_id]
    expected = reward(rows["obs"], rows["action"], rows["next_obs"])
    np.testing.assert_allclose(found["reward"], expected, rtol=1e-6)
    assert found["reward"].dtype == np.float32 and found["reward"].any()
    assert all(found[name] is rows[name] for name in rows)


def test_the_rewards_by_hand():
    obs, action = np.full((3, 17), 99.0), np.array([[0.0] * 6, [1.0] * 6, [-0.5] * 6])
    next_obs = np.zeros((3, 17))
    next_obs[:, tasks.SPEED], next_obs[:, tasks.HEIGHT] = (2.0, 7.0, -4.0), (0.0, 0.2, -0.1)
    np.testing.assert_allclose(tasks.run(obs, action, next_obs), [2, 3 - 0.6, -4 - 0.15])
    np.testing.assert_allclose(tasks.jump(obs, action, next_obs), [2, 5.4, -5.65])


def test_the_ant_is_paid_for_its_direction_and_its_height():
    next_obs, action = np.zeros((4, 27)), np.zeros((4, 8))
    next_obs[:, tasks.ANT_HEIGHT] = 0.5, 0.5, 0.5, 0.1
    next_obs[:, [tasks.ANT_VX, tasks.ANT_VY]] = [2, 0], [0, 2], [3**0.5, 1], [0, 0]
    action[3] = 0.5
    np.testing.assert_allclose(tasks.walk(None, action, next_obs), [3, 1, 1 + 3**0.5, -1])
    np.testing.assert_allclose(tasks.aside(None, action, next_obs), [1 + 3**0.5, 2, 3, -1])


def test_the_drawer_by_hand():
    """Closed and held, open and held, half open with the hand 0.2 m above the handle."""
    next_obs = np.zeros((3, 40))
    next_obs[:, tasks.DRAWER] = np.array([0, -0.16, -0.08]) * 18
    hand = np.array([[0.33, -0.24, 0.08], [0.33, -0.08, 0.08], [0.33, -0.16, 0.28]])
    next_obs[:, tasks.HAND] = (hand - [0.425, 0, 0]) * 10
    np.testing.assert_allclose(tasks.opened(None, None, next_obs), [0, 1, 0.3], atol=1e-12)
    np.testing.assert_allclose(tasks.closed(None, None, next_obs), [1, 0, 0.3], atol=1e-12)


def test_all_else_is_half_cheetah():
    """Observations to the bit; speed and height are the simulator's."""
    ours, theirs = evaluation.make("HalfCheetahJump-v0"), gymnasium.make("HalfCheetah-v5")
    mine, known = steps(ours, 300), steps(theirs, 300)
    np.testing.assert_array_equal(mine[2], known[2])
    rest = evaluation.make("HalfCheetahJump-v0")
    rest.reset(seed=0)
    rng = np.random.default_rng(1)
    for _ in range(50):
        obs, *_, info = rest.step(rng.uniform(-1, 1, 6).astype(np.float32))
    data = rest.unwrapped.data
    assert obs[tasks.HEIGHT] == data.qpos[1] and obs[tasks.SPEED] == data.qvel[0]
    effort = known[3] - np.minimum(known[2][:, tasks.SPEED], 3) + 0.1 * np.square(known[1]).sum(1)
    assert np.abs(effort).mean() < 0.3  # its own reward is that of a step's distance


def test_all_else_is_ant():
    """As Ant-v5 without contact forces; the reward is its own but for speed's definition."""
    kwargs = dict(include_cfrc_ext_in_observation=False, contact_cost_weight=0)
    kwargs["terminate_when_unhealthy"] = False
    ours, theirs = evaluation.make("AntRun-v0"), gymnasium.make("Ant-v5", **kwargs)
    mine, known = steps(ours, 100), steps(theirs, 100)
    np.testing.assert_array_equal(mine[2], known[2])
    data = ours.unwrapped.data
    place = [tasks.ANT_HEIGHT, tasks.ANT_VX, tasks.ANT_VY]
    np.testing.assert_array_equal(mine[2][-1][place], np.float32([data.qpos[2], *data.qvel[:2]]))
    assert np.abs(mine[3] - known[3]).mean() < 0.2


@pytest.mark.parametrize("name", DRAWERS)
def test_the_drawer_is_where_its_observation_says(name):
    pytest.importorskip("ogbench")
    agree(name, 250)
    env = evaluation.make(name)
    starts = [env.reset(seed=seed)[0] for seed in (0, 1, 0)]
    np.testing.assert_array_equal(starts[0], starts[2])
    opening = [tasks.drawer(obs)[2] for obs in starts[:2]]
    assert all(0 <= x <= 1 for x in opening)
    assert np.allclose(opening, 1) == (name == "DrawerClose-v0")
    hand, handle, _ = tasks.drawer(starts[0])
    data = env.unwrapped.scene.data
    np.testing.assert_allclose(hand, data.site("ur5e/robotiq/pinch").xpos, atol=1e-9)
    np.testing.assert_allclose(handle, data.site("drawer_handle_center").xpos, atol=2e-3)


def test_the_script_opens_the_drawer():
    pytest.importorskip("ogbench")
    env, before, after = evaluation.make("DrawerOpen-v0"), [], []
    for seed in range(4):
        obs, _ = env.reset(seed=seed)
        before.append(tasks.drawer(obs)[2])
        for _ in range(60):
            obs, *_ = env.step(tasks.open_drawer(obs[None])[0])
        after.append(tasks.drawer(obs)[2])
    assert np.min(before) < 0.7 and np.min(after) > 0.95


@pytest.mark.parametrize("task", tasks.TASKS)
def test_every_command_is_one_that_its_file_accepts(task):
    found = study.commands(study.Commands(task=task, num_updates=40_000))
    assert len(found) == len(study.FLAGS) == 6
    for file, *words in found:
        module = importlib.import_module(file.removeprefix("algorithms/").removesuffix(".py"))
        cfg = experiment.resolve(tyro.cli(module.Config, args=words), getattr(module, "TUNED", {}))
        assert (cfg.env, cfg.num_updates, cfg.eval_every) == (study.dataset(task), 40_000, 8000)
        assert getattr(cfg, "horizon", 5) == 5 and not getattr(cfg, "termination", False)


def test_mbpo_is_told_from_mopo():
    run = {"algorithm": "mopo", "config": {"penalty_scale": 0.0}}
    assert study.which(run) == "mopo --penalty-scale 0"
    assert study.which({"algorithm": "mopo", "config": {"penalty_scale": 1.0}}) == "mopo"
    assert study.which({"algorithm": "iql", "config": {}}) == "iql"


def test_no_run_is_no_table(tmp_path):
    with pytest.raises(SystemExit, match="no finished run"):
        study.report(study.Report(out=str(tmp_path), results=str(tmp_path)))


def test_the_table_shows_the_data_and_the_runs():
    run = {"run": "MOPO", "mean": 1234.5, "low": 1000.2, "high": 1400.0}
    run |= {"seeds": 2, "diverged": 1, "updates": 20_000}
    record = {"jump": {"data": {"mean": -3.0, "best": 800.0}, "rows": [run]}}
    lines = generalisation_table(record).splitlines()
    assert lines[2] == "| jump | *data's mean* | *-3* |  |  |"
    assert lines[4] == "| jump | MOPO | 1,234 [1,000, 1,400] | 20,000 | 2, 1 diverged |"
    assert len(lines) == 5


@pytest.mark.slow
@pytest.mark.parametrize("task", tasks.TASKS)
def test_collected_trained_and_reported(task, tmp_path, monkeypatch, capsys):
    """Eleven episodes of uniform actions, or of the script, and a short run of IQL."""
    if task == "drawer-close":
        pytest.importorskip("ogbench")
    out, length = str(tmp_path / "study"), 100 if task == "drawer-close" else 1000
    count, env_id = 11 * length, tasks.TASKS[task].env_id
    cfg = study.Collect(task=task, num_steps=count, start_steps=12_000, out=out)
    path = study.collect(cfg)
    monkeypatch.setenv("MINARI_DATASETS_PATH", f"{out}/data")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    about = json.loads((path / "data/metadata.json").read_text())["stillwater"]
    dataset = datasets.load(study.dataset(task))
    assert (dataset.env_id, len(dataset.obs), len(dataset.start)) == (env_id, count, 11)
    rows = dataset.transitions()
    expected = tasks.REWARDS[env_id](*map(np.asarray, (rows.obs, rows.action, rows.next_obs)))
    np.testing.assert_allclose(rows.reward, expected, rtol=1e-5, atol=1e-4)
    assert about["collected_on"] == tasks.TASKS[task].before
    iql = importlib.import_module("iql")
    iql.train(iql.Config(num_updates=20, eval_episodes=1, widths=(8,), out=out), dataset)
    record = study.report(study.Report(out=out, results=str(tmp_path)))
    assert [row["run"] for row in record[task]["rows"]] == ["IQL"]
    assert record == json.loads((tmp_path / "generalisation.json").read_text())
    np.testing.assert_allclose(record[task]["data"]["mean"], dataset.returns().mean(), rtol=1e-5)
    assert f"| {task} | IQL |" in capsys.readouterr().out
