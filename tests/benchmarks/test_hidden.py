"""The junction of studies/hidden.py: what its data tell, and what its results show."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.studies import hidden

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results"


def test_a_step_in_the_corridor_and_at_the_junction():
    place = np.float32([[0.5, 0], [0.9, 0], [1, 0], [1, -0.4]])
    action = np.float32([[1, 1], [1, -1], [-1, 1], [0, -5]])
    expected = [[0.7, 0], [1, 0], [1, 0.2], [1, -0.5]]
    np.testing.assert_allclose(hidden.move(place, action), expected, rtol=1e-6)
    reward, done = hidden.pays(np.float32(expected), np.float32([1, 1, 1, 1]))
    assert reward.tolist() == [0, 0, 0, -1] and done.tolist() == [False, False, False, True]
    assert hidden.pays(np.float32(expected), np.float32([-1] * 4))[0][3] == 1


@pytest.fixture(scope="module")
def data():
    return {world: hidden.dataset(seen) for world, seen in hidden.WORLDS.items()}


def test_data_are_walks_that_turn_to_the_side_that_pays_three_times_in_four(data):
    for found in data.values():
        np.testing.assert_array_equal(
            hidden.move(found.obs[:, :2], found.action), found.next_obs[:, :2]
        )
        assert set(found.returns()) == {1.0, -1.0}
        first = found.obs[found.start, 2]
        assert {(found.returns()[first == side] == 1).mean() for side in (-1, 1)} == {0.75}
        np.testing.assert_array_equal(np.flatnonzero(found.done), found.start + found.length - 1)


def test_the_worlds_differ_in_what_is_shown_alone(data):
    seen, dark = data["seen"], data["hidden"]
    for name in ("action", "reward", "start"):
        np.testing.assert_array_equal(getattr(seen, name), getattr(dark, name))
    np.testing.assert_array_equal(seen.obs[:, :2], dark.obs[:, :2])
    first = np.isin(np.arange(len(seen.obs)), seen.start)
    np.testing.assert_array_equal(dark.obs[:, 2], np.where(first, seen.obs[:, 2], 0))
    assert np.all(dark.next_obs[:, 2] == 0) and set(seen.next_obs[:, 2]) == {-1.0, 1.0}


def test_nothing_in_the_corridor_but_what_is_shown_tells_the_side(data):
    """Neither place nor action there is correlated with it; at the junction the action is."""
    found = data["seen"]
    side, corridor = found.obs[:, 2], found.obs[:, 0] < 1
    for x in (found.obs[:, 0], *found.action.T):
        assert abs(np.corrcoef(x[corridor], side[corridor])[0, 1]) < 0.05
    assert np.all(found.obs[corridor, 1] == 0)
    assert np.corrcoef(found.action[~corridor, 1], side[~corridor])[0, 1] > 0.4


def test_a_walker_that_remembers_and_one_that_does_not():
    """The first is always right; the second, where the side is shown at the start alone, half."""

    def walker(remembers):
        def policy(state, carry, obs, reward, key):
            side = obs[..., 2] if carry is None or not remembers else carry
            turn = jnp.where(side == 0, 1.0, side)
            return jnp.stack([jnp.ones_like(side), turn], -1), side

        return policy

    cfg = hidden.Config(seeds=2, episodes=10)
    for remembers in (True, False):
        for world, seen in hidden.WORLDS.items():
            state = jnp.zeros(2)
            found = hidden.shares(hidden.play(walker(remembers), state, seen, cfg))
            right = 1.0 if remembers or world == "seen" else 0.5
            assert found == {"right": [right] * 2, "wrong": [1 - right] * 2, "nowhere": [0.0] * 2}


def test_what_the_results_show():
    """Where the side is shown, all are right. Where it was shown at the start, nobody without a
    memory is right more often than by chance, and DT is."""
    runs = json.loads((RESULTS / "hidden.json").read_text("utf-8"))["runs"]
    for who in ("BC", "RvS, asked for 1", "IQL", "DT, context 4"):
        assert np.mean(runs["seen"][who]["right"]) > 0.95
        assert np.mean(runs["hidden"][who]["right"]) < 0.55
    assert np.mean(runs["hidden"]["DT, asked for 1"]["right"]) > 0.75
