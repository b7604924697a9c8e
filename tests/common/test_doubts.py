"""Where an episode ends is doubted: warnings with figures, cuts only where they are certain."""

import numpy as np
import pytest

from common import datasets

LIMIT = 200  # of Pendulum-v1


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def walks(lengths=(LIMIT,) * 4, seed=0):
    """A slow random walk for each episode, ended by time; columns of from_arrays."""
    rng, parts = np.random.default_rng(seed), []
    for n in lengths:
        obs = np.cumsum(rng.normal(size=(n + 1, 3)), 0) / 10 + rng.normal(size=3)
        timeout = np.arange(n) == n - 1
        columns = obs[:-1], rng.uniform(-2, 2, (n, 1)), np.ones(n), np.zeros(n), timeout, obs[1:]
        parts.append(columns)
    names = "obs", "action", "reward", "done", "timeout", "next_obs"
    return dict(zip(names, map(np.concatenate, zip(*parts, strict=True)), strict=True))


def load(fields, *without, order=None, env_id="Pendulum-v1"):
    fields = {name: x for name, x in fields.items() if name not in without}
    if order is not None:
        fields = {name: x[order] for name, x in fields.items()}
    return datasets.from_arrays(**fields, env_id=env_id)


def notes(capsys):
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("without", [(), ("timeout",), ("next_obs",), ("timeout", "next_obs")])
def test_sound_data_raise_no_doubts(capsys, without):
    data = load(walks(), *without)
    assert len(data.start) == 4
    assert not [note for note in notes(capsys) if "warning" in note]
    assert data.provenance["ordered"]


def test_timeouts_that_are_never_set_are_cut_at_the_limit(capsys):
    fields = walks()
    fields["timeout"] = np.zeros(4 * LIMIT)
    data = load(fields, "next_obs")
    assert data.length.tolist() == [LIMIT - 1] * 4  # last rows' next_obs are unknown
    assert any("timeouts are never set" in n and "200 steps, 3 times" in n for n in notes(capsys))


def test_a_set_timeout_means_that_they_are_known(capsys):
    fields = walks((LIMIT, 2 * LIMIT, 150))
    data = load(fields, "next_obs")
    assert data.length.tolist() == [LIMIT - 1, 2 * LIMIT - 1, 149]
    (note,) = [n for n in notes(capsys) if "longer than" in n]
    assert "1 of 3 episodes are longer than 200 steps" in note and "longest has 400" in note
    assert """--env-id 'Pendulum-v1 {"max_episode_steps": 400}'""" in note


def test_one_endless_episode_is_told(capsys):
    fields = walks((1500,))
    fields["timeout"][:], fields["action"] = 0, fields["action"] / 2
    load(fields, "next_obs", env_id="")
    assert any("all 1,500 rows are one episode" in note for note in notes(capsys))


def test_shuffled_transitions_have_no_episodes(capsys):
    fields = walks()
    fields["reward"] = np.arange(4 * LIMIT)
    data = load(fields, order=np.random.default_rng(1).permutation(4 * LIMIT))
    (note,) = [n for n in notes(capsys) if "warning" in n]
    assert "nearly every row is an episode" in note and "of 800 rows" in note
    assert not data.provenance["ordered"]
    np.testing.assert_array_equal(data.transitions(True).reward, data.reward)
    assert "rewards are not scaled: rows are not in order" in notes(capsys)[0]


def test_one_step_episodes_that_are_marked_are_no_shuffle(capsys):
    fields = walks()
    fields["done"] = np.ones(4 * LIMIT)
    data = load(fields)
    assert len(data.start) == 4 * LIMIT
    assert data.provenance["ordered"] and not notes(capsys)


def test_unmarked_seams_are_counted(capsys):
    fields = walks()
    fields["timeout"] = fields["timeout"] * (np.arange(4 * LIMIT) > 2 * LIMIT)  # the first two lost
    data = load(fields)
    assert data.length.tolist() == [LIMIT] * 4
    assert any("after 2 of 800 rows" in note for note in notes(capsys))


@pytest.mark.parametrize("count", [2, 5])
def test_interleaved_environments_are_told_by_their_number(capsys, count):
    fields = walks((LIMIT,) * 10)
    order = np.arange(10 * LIMIT).reshape(count, -1).T.ravel()
    data = load(fields, "next_obs", order=order)
    assert any(f"as if {count} environments took turns" in note for note in notes(capsys))
    assert not data.provenance["ordered"]


def test_shuffled_rows_without_next_obs(capsys):
    order = np.random.default_rng(1).permutation(4 * LIMIT)
    data = load(walks(), "next_obs", order=order)
    assert any("do not resemble the next ones" in note for note in notes(capsys))
    assert not data.provenance["ordered"]


@pytest.mark.parametrize("apart, factor", [(1e-7, 1), (0.5, 1), (40.0, 25)])
def test_rewards_are_scaled_only_where_returns_differ(capsys, apart, factor):
    """Returns are 200 and 200 + apart: by 1000 / apart, unless that is less than 1 %."""
    fields = walks((LIMIT,) * 2)
    fields["reward"][LIMIT:] += apart / LIMIT
    data = load(fields)
    scaled = data.transitions(scale_reward=True).reward
    np.testing.assert_allclose(scaled, data.reward * factor, rtol=1e-4)
    assert any("rewards are not scaled" in note for note in notes(capsys)) == (factor == 1)


def test_the_bundled_data_raise_no_doubts(capsys):
    for name in (
        "hopper/medium-replay",
        "halfcheetah/medium",
        "walker2d/medium",
        "pendulum/medium",
    ):
        data = datasets.load(f"stillwater/{name}-v0")
        ends = np.zeros(len(data.obs), bool)
        ends[data.start + data.length - 1] = True
        given = dict(obs=data.obs, action=data.action, reward=data.reward, done=data.done)
        again = datasets.from_arrays(**given, timeout=ends & (data.done == 0))
        assert again.provenance["ordered"]
        assert not [note for note in notes(capsys) if "warning" in note]
