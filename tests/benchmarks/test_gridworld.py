"""CQL's claims for discrete actions: the world, the theorems in a table, stored and short runs."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.studies import gridworld

ROOT = Path(__file__).resolve().parents[2]
STORED = json.loads((ROOT / "benchmarks/results/gridworld.json").read_text("utf-8"))
UNIFORM = np.full((gridworld.CELLS, gridworld.ACTIONS), 1 / gridworld.ACTIONS)


def above(kind, how):
    """Shares of pairs, and of means under the policy, whose learned Q is above the truth."""
    found = STORED["bounds"][f"{kind}, {how}"]
    return [np.mean(np.array(found[k][1]) > np.array(found[k][0])) for k in ("pairs", "policy")]


# --- The world ---


def test_values_are_what_walks_earn():
    """20,000 walks of 150 steps from the start: one step right, then the uniform policy."""
    rng = np.random.default_rng(0)
    q = gridworld.true_q(UNIFORM)[gridworld.cell(0, 0), 1]
    place, earned = np.full(20_000, gridworld.cell(0, 0)), 0.0
    for t in range(150):
        action = np.full(len(place), 1) if t == 0 else rng.integers(4, size=len(place))
        going = place != gridworld.GOAL
        chance = gridworld.P[place, action].cumsum(1)
        to = (rng.random(len(place))[:, None] > chance).sum(1).clip(0, 24)
        earned = earned - 0.9**t * gridworld.COST * going
        place = np.where(going, to, place)
    np.testing.assert_allclose(q, earned.mean(), atol=4 * earned.std() / 20_000**0.5)


def test_the_best_policy_beats_others_and_the_data_are_steps_of_the_world():
    best = gridworld.best_q()
    assert np.all(best >= gridworld.true_q(UNIFORM))
    np.testing.assert_allclose(gridworld.true_q(gridworld.greedy(best)), best, atol=1e-9)
    data = gridworld.rows(np.random.default_rng(0), UNIFORM, 40_000)
    place, action = data.obs.argmax(1), data.action.argmax(1)
    for s, a in ((0, 0), (7, 2), (23, 0)):
        seen = data.next_obs[(place == s) & (action == a)].mean(0)
        np.testing.assert_allclose(seen, gridworld.P[s, a], atol=0.05)
    assert np.all((data.next_obs.argmax(1) == gridworld.GOAL) == data.done)
    assert not (place == gridworld.GOAL).any()


# --- Theorems 3.1 and 3.2, exact ---


@pytest.mark.parametrize("seed", range(5))
def test_a_table_is_below_the_truth_without_the_data_term_and_in_the_mean_with_it(seed):
    """For any behaviour and policy; with the term some pairs are above."""
    rng = np.random.default_rng(seed)
    behaviour, policy = (rng.dirichlet(np.ones(4) * 3, gridworld.CELLS) + 0.02 for _ in range(2))
    behaviour, policy = (p / p.sum(1, keepdims=True) for p in (behaviour, policy))
    truth = gridworld.true_q(policy)
    without, kept = (gridworld.tabular(0.01, keep, behaviour, policy) for keep in (0, 1))
    assert np.all(without < truth)
    assert np.all((policy * (kept - truth)).sum(1) < 0)
    assert np.any(kept > truth)
    np.testing.assert_allclose(gridworld.tabular(0, 0, behaviour, policy), truth, atol=1e-9)


def test_the_stored_bounds_hold():
    for kind in ("table", "network"):
        assert above(kind, "without") == [0, 0]
        pairs, means = above(kind, "with")
        assert pairs > 0 and means == 0
    assert above("network", "CQL(H)")[1] > 0.5  # as the page says


# --- Narrow data, CQL(var) ---


def narrow_holds(found, prediction=0.1):
    never = {who: np.mean(found[who]["never in the data"]) for who in ("DQN", "CQL")}
    assert never["DQN"] > 0.5 and never["CQL"] == 0
    np.testing.assert_allclose(found["CQL"]["earned"], found["value of the behaviour"], rtol=1e-4)
    assert np.max(found["DQN"]["earned"]) < found["value of the behaviour"] - 0.2
    over = np.array(found["DQN"]["predicted"]) - found["DQN"]["earned"]
    assert np.min(over) > 0.3
    off = np.array(found["CQL"]["predicted"]) - found["CQL"]["earned"]
    assert np.max(np.abs(off)) < prediction


def test_dqn_leaves_narrow_data_and_cql_does_not():
    narrow_holds(STORED["narrow"])
    narrow_holds(gridworld.narrow(updates=600, seeds=2), 0.25)


def test_the_penalty_of_cql_var_shrinks_with_the_root_of_the_visits():
    """Four times the visits, half the spread lost; stored and in a short run."""
    found = STORED["spread"]
    for lost in (found["exact"], found["lost"]["mean"]):
        ratio = np.array(lost[:-1]) / np.array(lost[1:])
        np.testing.assert_allclose(ratio, 2, atol=0.25)
    np.testing.assert_allclose(found["lost"]["mean"], found["exact"], atol=0.01)
    assert found["alpha / sqrt(n)"][-1] == found["exact"][-1]  # nowhere is the spread used up
    short = gridworld.spread(updates=1500, seeds=2)
    np.testing.assert_allclose(short["lost"]["mean"], short["exact"], atol=0.03)


def test_the_picture_is_drawn(tmp_path):
    gridworld.draw(STORED, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 10_000
