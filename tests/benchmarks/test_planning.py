"""planning.py's clock, its floor in the maze, and what it keeps."""

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from benchmarks.studies import planning
from common import experiment


def test_straight_to_the_goal_by_hand():
    obs = np.array([[[1.0, 2.0, 0.5, -1.0, -1.0, 1.0]]])
    action, _ = planning.straight(None, obs, None, None)
    np.testing.assert_array_equal(action, [[[-2.5, 0.0]]])


def test_a_plan_is_timed_over_the_steps_that_it_serves():
    """Every fourth step takes 20 ms, the first plan 0.3 s: 20 ms for four steps, thrice."""
    calls = []

    def policy(carry, obs, reward, key):
        assert obs.shape == (1, 2, 6)
        assert reward.shape == (1, 2)
        age = 0 if carry is None else (carry + 1) % 4
        time.sleep(0.3 if carry is None else 0.02 * (age == 0))
        calls.append(age)
        return None, age

    spent = planning.seconds(policy, np.zeros((5, 6)), episodes=2, length=4, plans=3)
    assert calls == [0, 1] + 3 * [1, 2, 3, 0]
    assert 0.02 <= spent < 0.2


def test_where_one_plan_serves_an_episode_it_is_the_first_that_counts():
    def policy(carry, obs, reward, key):
        time.sleep(0.05 if carry is None else 0)
        return None, 0

    assert 0.05 <= planning.seconds(policy, np.zeros((5, 6)), 1, 0, 3) < 0.5


def test_rows_of_other_datasets_and_algorithms_stay(tmp_path, monkeypatch):
    """Two datasets measured one after the other; the first one again, from another run; then by
    the other algorithm."""

    def measure(run, cfg, known):
        row = {"dataset": run[0], "run": run, "known": len(known)}
        return [row | {"algorithm": "decision_diffuser" if run[1] == "d" else "diffuser"}]

    goalless = (None, SimpleNamespace(), None)
    monkeypatch.setattr(planning, "measure", measure)
    monkeypatch.setattr(planning.evaluation, "load", lambda run: goalless)
    for run in ("a1", "b1", "a2", "ad"):
        planning.main(planning.Config(runs=(run,), results=str(tmp_path)))
    rows = json.loads((tmp_path / "planning.json").read_text("utf-8"))["rows"]
    assert [(row["run"], row["known"]) for row in rows] == [
        ("ad", 2),
        ("a2", 2),
        ("b1", 1),
    ]


def test_every_planner_is_one_that_its_algorithm_has():
    """And each differs from the others."""
    for name, planners in planning.VARIANTS.items():
        config = experiment.module(name.split()[0]).Config()
        made = [replace(config, **settings) for settings in planners.values() if settings]
        assert len(set(made)) == len(made) >= 4
