"""settling.py's rule for a moving Q, its comparison with a simulator, and what it committed."""

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace

import combo
import gymnasium
import jax
import numpy as np
import pytest
import tiny

from benchmarks import report
from benchmarks.scores import runs
from benchmarks.studies import settling, simulator
from common import datasets, evaluation

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "benchmarks/results/settling.json").read_text("utf-8"))


@pytest.mark.parametrize(
    ("before", "now", "direction"),
    [(100.0, 103.0, "rises"), (100.0, 101.0, ""), (100.0, 97.0, "falls"), (-100.0, -97.0, "rises")],
)
def test_a_q_moves_where_it_changed_by_two_percent(before, now, direction):
    """By its mean over the seeds, in the 10,000 updates before."""
    q = {"5000": [0.0, 0.0], "10000": [before - 9, before + 9], "20000": [now + 5, now - 5]}
    assert settling.direction(q, 20_000) == direction
    assert settling.direction({"20000": [now, now]}, 20_000) == ""  # nothing is known before


@pytest.fixture
def folder(tmp_path):
    """A run of COMBO, stopped after 20 updates: two seeds of two episodes; 0 and 100 score so."""
    config = dict(num_updates=100_000, seed=0, num_seeds=2, beta=0.5, real_fraction=0.5, out="x")
    config |= dict(rho="model", max_epochs=25, num_actions=1)
    info = {
        "algorithm": "combo",
        "command": ["/somewhere/combo.py", "--out", "/somewhere", "--beta", "0.5"],
        "config": config,
        "dataset": {
            **{"name": "stillwater/hopper/medium-v0", "env_id": "Hopper-v5", "metadata": {}},
            **{"layout": "Minari", "verified": None, "mean_return": 15.0, "best_return": 90.0},
            **{"ref_min_score": 0.0, "ref_max_score": 100.0, "sha256": "0"},
        },
        **{"commit": "0" * 40, "versions": {}, "device": "CPU"},
    }
    returns = {"10": [[1.0, 2.0], [3.0, 4.0]], "20": [[10.0, 20.0], [30.0, 40.0]]}
    (tmp_path / "config.json").write_text(json.dumps(info))
    (tmp_path / "returns.json").write_text(json.dumps(returns))
    with open(tmp_path / "metrics.csv", "w", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["step", "seed", "seconds", "q_pi"])
        table.writerows([t, seed, 1.0, t + 2 * seed] for t in (5, 10, 20) for seed in (0, 1))
    return tmp_path


def test_a_runs_curve(folder, monkeypatch):
    row = settling.curve(folder)
    assert row["run"] == "COMBO, beta 0.5, model of 25 epochs, rho model"
    assert row["command"] == "python algorithms/combo.py --beta 0.5"
    assert row["scores"] == {"10": [1.5, 3.5], "20": [15.0, 35.0]}
    assert row["q"] == {"10": [10.0, 12.0], "20": [20.0, 22.0]}
    monkeypatch.setattr(settling, "SPAN", 10)
    monkeypatch.setattr(settling, "POINTS", (10, 20))
    mean, interval, q, direction = settling.summary(row, 20)
    assert (mean, *interval, q, direction) == (25.0, 15.0, 35.0, 21.0, "rises")
    line = report.settling_table([row]).splitlines()[2]
    assert line.startswith(
        "| hopper/medium (15.0) | COMBO, beta 0.5, model of 25 epochs, rho model"
    )
    assert line.endswith("| 2.5 [1.5, 3.5] | 25.0 [15.0, 35.0] | 11 | 21 ↑ |")
    monkeypatch.setattr(settling, "POINTS", (20, 30))
    line = report.settling_table([row]).splitlines()[2]
    assert line.endswith("| 25.0 [15.0, 35.0] | – | 21 ↑ | – |")  # nothing where it had stopped


def test_the_simulator_as_the_model():
    """It repeats the data's transitions, and a run with it is named so."""
    data = datasets.load("stillwater/halfcheetah/medium-v0")
    env = gymnasium.make(simulator.ENV).unwrapped
    obs, action = (x[:6].reshape(2, 3, -1) for x in (data.obs, data.action))
    step = jax.vmap(lambda o, a: simulator.simulator_step(env)(None, o, a, None, None))
    next_obs, reward = jax.jit(step)(obs, action)
    np.testing.assert_allclose(next_obs.reshape(6, -1), data.next_obs[:6], atol=1e-5)
    np.testing.assert_allclose(reward.reshape(6), data.reward[:6], atol=1e-5)
    command = runs.command({"command": ["/somewhere/studies/simulator.py"]})
    run = {"algorithm": "combo", "config": {"beta": 0.5}, "command": command}
    assert settling.label(run) == "COMBO, beta 0.5, the simulator as its model"


def test_only_what_is_simulated():
    with pytest.raises(SystemExit, match="only HalfCheetah-v5 is simulated"):
        simulator.main(combo.Config(env="stillwater/hopper/medium-v0"))


def test_what_was_measured_before_stays(folder, tmp_path):
    """But for a run of the same name."""
    other = settling.curve(folder) | {"run": "CQL"}
    again = settling.curve(folder) | {"scores": {}}
    results = tmp_path / "results"
    results.mkdir()
    (results / "settling.json").write_text(json.dumps({"runs": [other, again], "models": [1]}))
    settling.main(settling.Config(runs=(str(folder),), results=str(results)))
    found = json.loads((results / "settling.json").read_text())
    assert found["runs"] == [settling.curve(folder), other]
    assert found["models"] == [1]


def test_a_models_errors_by_hand():
    """The world: s' = s + a, r = sum(a). The model adds 0.1 to a coordinate of s' and 0.3 to r."""
    rng = np.random.default_rng(0)
    actions = rng.normal(size=(7, 4, 2))
    states = np.cumsum([rng.normal(size=(4, 2)), *actions], 0)
    rewards = actions.sum(-1)
    states[6:, 0], rewards[6:, 0] = np.nan, np.nan  # an episode that ended

    def step(obs, action, key):
        return obs + action + [0.1, 0.0], action.sum(-1) + 0.3

    found = settling.compare(step, (states, actions, rewards), np.array([0.5, 2.0]), 3)
    np.testing.assert_allclose(found["errors"], np.array([0.2, 0.4, 0.6]) / np.sqrt(2))
    np.testing.assert_allclose(found["reward_bias"], 0.3)
    alone = settling.compare(step, (states, actions, rewards), np.array([0.5, np.inf]), 3)
    np.testing.assert_allclose(alone["errors"], [0.2, 0.4, 0.6])


def test_the_simulator_repeats_the_data():
    """Placed at states of the data, with the data's actions, it takes the data's steps."""
    data = datasets.load("stillwater/halfcheetah/medium-v0")
    rows = settling.inside(data, 5)[[0, 700, 40_000]]
    states, actions, rewards = settling.recorded(data, rows, 5)
    envs = [evaluation.make(data.env_id) for _ in rows]
    turns = iter(actions)
    track = settling.follow(
        envs, lambda obs, key: next(turns), data.obs[rows], jax.random.key(0), 5
    )
    for ours, theirs in zip(track, (states, actions, rewards), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=2e-3)


def test_a_track_ends_with_its_episode():
    """A hopper that is thrown down: its rows are nan after the step that ended, the other's not."""
    data = datasets.load("stillwater/hopper/medium-replay-v0")
    obs = data.obs[[0, 0]]
    envs = [evaluation.make(data.env_id) for _ in obs]
    full = np.array([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    states, _, rewards = settling.follow(envs, lambda obs, key: full, obs, jax.random.key(0), 60)
    ended = [np.flatnonzero(np.isfinite(rewards[:, i]))[-1] for i in range(2)]
    assert min(ended) < 59
    for i, last in enumerate(ended):
        assert np.isfinite(rewards[: last + 1, i]).all()
        assert np.isfinite(states[: last + 2, i]).all()
        assert np.isnan(states[last + 2 :, i]).all()


def test_starts_leave_room_in_their_episode():
    data = SimpleNamespace(start=np.array([0, 4, 6]), length=np.array([4, 2, 5]))
    np.testing.assert_array_equal(settling.inside(data, 3), [0, 6, 7])


def test_the_holdout_error_is_that_of_the_log(tmp_path):
    data, cfg, lines = tiny.dataset(tmp_path / "data.hdf5"), tiny.config("combo"), []
    keys = jax.random.key(cfg.seed)[None]
    elites = combo.fit_dynamics(keys, data.transitions(), cfg, lines.append)
    elites = jax.tree.map(lambda x: x[0], elites)
    error = settling.holdout_error(combo, cfg, elites, data.transitions())
    assert lines[-1].endswith(f"best of the elites {error:.4f}")


def test_the_shares_of_a_buffer():
    """Four of six rows are filled, one beyond the range 0 to 1; 4 of 2 x 3 x 4 steps were kept."""
    obs = np.array([[0.0], [1.0]])
    data = SimpleNamespace(obs=obs, next_obs=obs)
    rows = SimpleNamespace(next_obs=np.array([[0.5], [1.5], [0.0], [1.0], [9.0], [9.0]]))
    own = SimpleNamespace(rollout_every=10, rollout_batch=3, horizon=4)
    shares = settling.buffer_shares(SimpleNamespace(rows=rows, filled=4, total=4), data, 11, own)
    assert shares == {"outside": 0.25, "cut": pytest.approx(1 - 4 / 24)}


def test_the_committed_figures_can_be_traced():
    """Command and commit of each run, no folder of the machine that trained it."""
    assert len({row["command"] for row in RECORD["runs"]}) == len(RECORD["runs"])
    for row in [*RECORD["runs"], *RECORD.get("checkpoints", [])]:
        assert re.fullmatch(r"python (algorithms/\w+\.py|-m benchmarks\S+) .+", row["command"])
        assert re.fullmatch(r"[0-9a-f]{40}", row["commit"])
        assert "--out" not in row["command"] and " /" not in row["command"]


def test_without_a_models_rows_combo_is_cql():
    """With f .999 one row in 256 is the model's: from 50,000 updates on the scores are CQL's."""
    rows = {row["run"]: row for row in RECORD["runs"] if "halfcheetah" in row["dataset"]}
    for step in (50_000, 100_000):
        ends = [settling.summary(rows[name], step)[1] for name in ("CQL", "COMBO, beta 5, f 0.999")]
        assert max(low for low, _ in ends) <= min(high for _, high in ends)
