"""The jump: one reward for data and environment, HalfCheetah in all else, commands and report."""

import importlib
import json

import gymnasium
import numpy as np
import pytest
import tyro

from benchmarks.studies.generalisation import __main__ as study
from benchmarks.studies.generalisation import tasks
from common import datasets, evaluation, experiment


def steps(env, count=1000, seed=0):
    """(obs, action, next_obs, reward) of random actions in float32, as stored."""
    rng, rows = np.random.default_rng(seed), []
    obs, _ = env.reset(seed=seed)
    for _ in range(count):
        action = rng.uniform(-1, 1, 6).astype(np.float32)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        assert not terminated
        rows.append((obs, action, next_obs, reward))
        obs = env.reset()[0] if truncated else next_obs
    return [np.array(column, np.float32) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("task", tasks.REWARDS)
def test_the_environment_and_the_relabelled_data_agree_step_by_step(task):
    env = evaluation.make(f"HalfCheetah{task.title()}-v0")
    assert env.spec.max_episode_steps == 1000
    obs, action, next_obs, reward = steps(env, 1200)
    rows = {"obs": obs, "action": action, "next_obs": next_obs, "reward": np.zeros(1200)}
    relabelled = study.relabel(rows, task)
    assert relabelled["reward"].dtype == np.float32 and np.std(reward) > 0.5
    np.testing.assert_allclose(relabelled["reward"], reward, rtol=1e-6, atol=5e-6)
    assert all(relabelled[name] is rows[name] for name in ("obs", "action", "next_obs"))


def test_the_rewards_by_hand():
    obs, action = np.full((3, 17), 99.0), np.array([[0.0] * 6, [1.0] * 6, [-0.5] * 6])
    next_obs = np.zeros((3, 17))
    next_obs[:, tasks.SPEED], next_obs[:, tasks.HEIGHT] = (2.0, 7.0, -4.0), (0.0, 0.2, -0.1)
    np.testing.assert_allclose(tasks.run(obs, action, next_obs), [2, 3 - 0.6, -4 - 0.15])
    np.testing.assert_allclose(tasks.jump(obs, action, next_obs), [2, 5.4, -5.65])


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


def test_every_command_is_one_that_its_file_accepts():
    found = study.commands(study.Commands(num_updates=2000))
    assert len(found) == len(study.FLAGS) == 6
    for file, *words in found:
        module = importlib.import_module(file.removeprefix("algorithms/").removesuffix(".py"))
        cfg = experiment.resolve(tyro.cli(module.Config, args=words), getattr(module, "TUNED", {}))
        assert (cfg.env, cfg.num_updates, cfg.eval_every) == (study.DATASET, 2000, 100)
        assert getattr(cfg, "horizon", 5) == 5 and not getattr(cfg, "termination", False)


def test_mbpo_is_told_from_mopo():
    run = {"algorithm": "mopo", "config": {"penalty_scale": 0.0}}
    assert study.which(run) == "mopo --penalty-scale 0"
    assert study.which({"algorithm": "mopo", "config": {"penalty_scale": 1.0}}) == "mopo"
    assert study.which({"algorithm": "iql", "config": {}}) == "iql"


def test_no_run_is_no_table(tmp_path):
    with pytest.raises(SystemExit, match="no finished run"):
        study.report(study.Report(out=str(tmp_path), results=str(tmp_path)))


@pytest.mark.slow
def test_collected_trained_and_reported(tmp_path, monkeypatch, capsys):
    """Eleven episodes of uniform actions and a short run of BC."""
    out = str(tmp_path / "study")
    path = study.collect(study.Collect(sac_steps=11_000, start_steps=12_000, out=out))
    monkeypatch.setenv("MINARI_DATASETS_PATH", f"{out}/data")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    about = json.loads((path / "data/metadata.json").read_text())["stillwater"]
    dataset = datasets.load(study.DATASET)
    assert (dataset.env_id, len(dataset.obs), len(dataset.start)) == (study.ENV_ID, 11_000, 11)
    rows = dataset.transitions()
    expected = tasks.jump(*(np.asarray(x) for x in (rows.obs, rows.action, rows.next_obs)))
    np.testing.assert_allclose(rows.reward, expected, rtol=1e-5, atol=1e-4)
    assert about["collected_on"] == "HalfCheetahRun-v0"
    iql = importlib.import_module("iql")
    iql.train(iql.Config(num_updates=20, eval_episodes=1, widths=(8,), out=out), dataset)
    record = study.report(study.Report(out=out, results=str(tmp_path)))
    assert [row["run"] for row in record["rows"]] == ["IQL"]
    assert record == json.loads((tmp_path / "generalisation.json").read_text())
    np.testing.assert_allclose(record["data"]["mean"], dataset.returns().mean(), rtol=1e-5)
    assert "| IQL |" in capsys.readouterr().out
