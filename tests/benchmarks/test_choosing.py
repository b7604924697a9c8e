"""The study of choices: its bandit, who judges, and what its results say."""

import json

import numpy as np
import pytest

from algorithms import ope
from benchmarks.studies import choosing

CFG = choosing.Config(candidates=3, draws=400, resamples=20)
ARMS = np.tile([2, 0, 1], (300, 1))  # policies in the order of the candidates


def rows(scores, estimate=(0, 0, 0)):
    found = zip(scores, estimate, strict=True)
    return [{"scores": list(x), "FQE": {"value": value}} for x, value in found]


def test_the_bandit_tries_every_policy_and_then_stays_with_the_best():
    rng, returns = np.random.default_rng(0), np.array([[-9.0], [-1.0], [-4.0]])
    best = choosing.bandit(rng, returns, ARMS, 40)
    first = ARMS[0, best[:, 0]]
    assert set(first) == {0, 1, 2}  # the only one known, negative or not
    second = returns[ARMS[0, best[:, 1]], 0]
    assert (second >= returns[first, 0]).all() and (second > -9).all()
    assert (ARMS[0, best[:, 2:]] == 1).all()


def test_the_bonus_is_in_units_of_the_returns():
    """Returns times ten and shifted: the same choices, episode by episode."""
    returns = np.random.default_rng(1).normal(size=(3, 20))
    one, other = (
        choosing.bandit(np.random.default_rng(0), x, ARMS, 30) for x in (returns, 10 * returns - 50)
    )
    np.testing.assert_array_equal(one, other)


def test_the_upper_bound_of_a_known_case():
    total, count = np.array([[4.0, 9.0]]), np.array([[1.0, 3.0]])
    got = choosing.upper_bound(total, count, np.array([2.0]), 4)
    np.testing.assert_allclose(got, [[4 + 2 * np.log(16) ** 0.5, 3 + 2 * (np.log(16) / 3) ** 0.5]])


def test_other_episodes_judge_than_those_that_choose():
    """Policy 0 is the best in the even episodes, policy 1 in the odd ones."""
    scores = [[9, 0, 9, 0], [1, 5, 1, 5], [0, 1, 0, 1]]
    found = choosing.choices(rows(scores, (0, 0, 7)), ["FQE"], CFG)
    assert found["the environment"]["score"] == 0 and found["bandit"]["score"][-1] == 0
    assert found["FQE"]["score"] == 1 and found["FQE"]["cost"] == -1
    assert found["any"]["score"] == pytest.approx(2)
    assert found["bandit"]["score"][0] == pytest.approx(2, abs=0.5)


def test_intervals_redraw_the_policies():
    """With policies that are alike there is nothing to redraw; else the interval holds the mean."""
    found = choosing.choices(rows([[3, 3]] * 3), ["FQE"], CFG)
    assert found["FQE"]["interval"] == [3, 3] and found["FQE"]["cost_interval"] == [0, 0]
    found = choosing.choices(rows([[0, 0], [4, 4], [8, 8]]), ["FQE"], CFG)["any"]
    assert found["interval"][0] < found["score"] < found["interval"][1]


def test_worth_in_episodes():
    found = {"bandit": {"score": [1, 2, 2, 4]}, "FQE": {"score": 2}, "IS": {"score": 5}}
    assert choosing.worth(found, "FQE") == 2 and choosing.worth(found, "IS") is None


def test_the_results_say_what_the_page_says():
    """FQE finds the six worst and little more; two episodes are worth as much."""
    record = json.loads((choosing.ROOT / "benchmarks/results/choosing.json").read_text("utf-8"))
    page = (choosing.ROOT / "benchmarks/README.md").read_text("utf-8")
    assert choosing.table(record) in page
    one = record["datasets"]["stillwater/hopper/medium-replay-v0"]
    ranked = sorted(one["rows"], key=lambda row: row["FQE"]["value"])
    truth = np.array([row["truth"] for row in ranked])
    own = np.array([np.mean(row["scores"][1::2]) for row in ranked])
    assert len(ranked) == 30 and truth[:6].max() < truth[6:].min()
    assert ope.spearman(np.arange(24), truth[6:]) == pytest.approx(0.23, abs=0.005)
    assert 11.5 < own[-3:].min() < own[-3:].max() < 16 and (np.sort(own)[-2:] > 20.5).all()
    found = one["choices"]
    assert choosing.worth(found, "FQE") == 2
    assert found["the environment"]["score"] - found["bandit"]["score"][7] < 0.25
    for row in ranked:
        assert all(row[name]["effective"] < 4 for name in ope.ESTIMATORS if name != "FQE")
        assert abs(row["IS"]["value"]) < 1e-18 and row["command"].startswith("python algorithms/")
