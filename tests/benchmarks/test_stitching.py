"""Which methods join two paths of the data to one that nobody took: studies/stitching.py, short."""

import numpy as np
import pytest

from benchmarks.studies import stitching


@pytest.fixture(scope="module")
def data():
    return stitching.dataset()


def arrivals(who, data, updates, seeds=1):
    """The shares of the seeds' episodes from A that end at C and at F."""
    cfg = stitching.Config(updates=updates, seeds=seeds, episodes=20)
    _, returns = stitching.episodes_from_a(*stitching.train(who, data, cfg), cfg)
    return (returns == 10).mean(), (returns == 5).mean()


def test_no_episode_goes_from_a_to_c(data):
    """Every row of the data is a move of the world; A is left for F and for D, C reached from B."""
    first = data.obs[data.start]
    from_a = np.linalg.norm(first - stitching.PLACES["A"], axis=1) < 0.3
    assert 0.6 < from_a.mean() < 0.7
    assert set(data.returns()[from_a]) == {0.0, 5.0}
    assert set(data.returns()[~from_a]) == {10.0}
    assert np.linalg.norm(first[~from_a] - stitching.PLACES["B"], axis=1).max() < 0.3
    next_obs, pays, done = stitching.move(data.obs, data.action)
    np.testing.assert_array_equal(next_obs, data.next_obs)
    np.testing.assert_array_equal(pays, data.reward)
    np.testing.assert_array_equal(done, data.done)
    np.testing.assert_array_equal(np.flatnonzero(done), data.start + data.length - 1)
    np.testing.assert_array_equal(stitching.ended(None, None, data.next_obs), done)


def test_paths_are_kept_up_to_their_ends():
    """Of 40 episodes every second, the last place once."""
    steps = np.minimum(np.arange(stitching.LIMIT + 1)[:, None, None], np.arange(40))
    path = np.stack([steps / 4, 0 * steps], -1)
    lines = stitching.shown(path)
    assert [len(line) for line in lines] == [2, *range(3, 26, 2), *[25] * 7]
    assert lines[1] == [[0, 0], [25, 0], [50, 0]]


@pytest.mark.parametrize(("who", "updates"), [("IQL", 3000), ("AWAC", 3000)])
def test_dynamic_programming_goes_from_a_to_c(who, updates, data):
    to_c, _ = arrivals(who, data, updates)
    assert to_c > 0.8


@pytest.mark.slow
def test_so_does_the_conservative_one_if_its_weight_is_small(data):
    to_c, _ = arrivals("CQL, alpha 0.2", data, 8000)
    assert to_c > 0.8


@pytest.mark.slow
def test_some_seed_of_combo_goes_to_c_and_most_arrive(data):
    """At its weight rounding decides where a seed goes: two of three to C, here."""
    to_c, to_f = arrivals("COMBO", data, 8000, seeds=3)
    assert to_c > 0.3
    assert to_c + to_f > 0.8


@pytest.mark.slow
def test_much_conservatism_prefers_the_short_way(data):
    """The penalty is paid at every step: with CQL's default weight C is too far away."""
    _, to_f = arrivals("CQL", data, 8000)
    assert to_f > 0.8


@pytest.mark.parametrize("who", ["BC", "%BC, best half"])
def test_imitation_cannot(who, data):
    to_c, to_f = arrivals(who, data, 2000)
    assert to_c < 0.4
    assert who == "BC" or to_f > 0.9


@pytest.mark.slow
def test_a_transformer_asked_for_the_best_goes_where_the_best_episodes_from_there_went(
    data, monkeypatch
):
    name, settings = stitching.RUNS["DT, asked for 10"]
    fewer = settings | dict(num_updates=400, eval_every=400, warmup=50)
    monkeypatch.setitem(stitching.RUNS, "DT, asked for 10", (name, fewer))
    to_c, to_f = arrivals("DT, asked for 10", data, 400)
    assert to_c < 0.1
    assert to_f > 0.8


@pytest.mark.slow
def test_returns_seen_do_not_guide_a_plan_to_c(data):
    to_c, to_f = arrivals("Diffuser", data, 2000)
    assert to_c < 0.1
    assert to_f > 0.5
