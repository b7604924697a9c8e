"""datasets.from_arrays: as a file of the same arrays, through the same checks; several joined."""

import dataclasses

import h5py
import numpy as np
import pytest

from common import datasets


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def arrays(n=12):
    rng = np.random.default_rng(0)
    track = rng.normal(size=(n + 1, 3))
    return dict(
        obs=track[:-1], action=rng.uniform(-2, 2, (n, 1)), reward=rng.integers(0, 5, n),
        done=np.arange(n) == 4, timeout=np.arange(n) == n - 1, next_obs=track[1:],
    )  # fmt: skip


NAMES = dict(obs="observations", action="actions", reward="rewards", done="terminals",
             timeout="timeouts", next_obs="next_observations")  # fmt: skip


@pytest.mark.parametrize("absent", [(), ("timeout",), ("next_obs",), ("timeout", "next_obs")])
def test_equals_a_file_of_the_same_arrays(tmp_path, absent):
    given = {name: x for name, x in arrays().items() if name not in absent}
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for name, x in given.items():
            file[NAMES[name]] = x
    theirs = datasets.load(str(tmp_path / "a.hdf5"), "Pendulum-v1")
    ours = datasets.from_arrays(**given, env_id="Pendulum-v1")
    for field in ("obs", "action", "reward", "next_obs", "done", "start", "length"):
        a, b = getattr(ours, field), getattr(theirs, field)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, field)
    assert (ours.env_id, ours.name) == ("Pendulum-v1", "arrays")
    assert ours.action.max() <= 1


def test_lists_flags_and_a_name_will_do():
    data = datasets.from_arrays([[1], [2]], [[0], [1]], [1, 2], [False, True], [0, 0], name="mine")
    assert data.obs.tolist() == [[1], [2]]
    assert data.done.tolist() == [0, 1]
    assert data.name == "mine"
    assert data.provenance["layout"] == "arrays"


def test_nothing_is_shared_with_the_callers_arrays():
    given = {name: np.float32(x) for name, x in arrays().items()}
    data = datasets.from_arrays(**given, env_id="Pendulum-v1")
    before = data.obs.copy(), data.reward.copy()
    given["obs"][:], given["reward"][:] = 77, 77
    np.testing.assert_array_equal(data.obs, before[0])
    np.testing.assert_array_equal(data.reward, before[1])


def test_the_hash_tells_other_arrays_apart():
    one, two = arrays(), arrays()
    two["reward"] = two["reward"] + 1
    hashes = [datasets.from_arrays(**x, env_id="Pendulum-v1").provenance["sha256"]
              for x in (one, arrays(), two)]  # fmt: skip
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(reward=np.full(12, np.nan)), "mine: reward: row 0: nan is not a finite float32"),
        (dict(obs=np.zeros(12)), r"mine: obs: has shape \(12,\), needs 2 axes"),
        (dict(obs=[[1], [2, 3]]), "mine: obs: "),
        (dict(action=np.full((12, 1), 3.0)), "mine: action: row 0, column 0: 3 is not within"),
        (dict(action=np.zeros((12, 2))), "mine: action: 2 columns, not Pendulum-v1's 1"),
        (dict(done=np.full(12, 2)), "mine: done: row 0: 2.* is neither 0 nor 1"),
        (dict(reward=np.zeros(11)), "mine: numbers of rows differ: .*11"),
        (dict(obs=np.array([["a"]] * 12)), "mine: obs: holds <U1 values, not numbers"),
        (dict(obs=np.array([[{}]] * 12)), "mine: obs: holds object values"),
        (dict(next_obs=np.zeros((12, 2))), "mine: next_obs: 2 columns where Pendulum-v1 has 3"),
        (dict(env_id="Nothing-v0"), "unknown environment 'Nothing-v0'"),
    ],
)
def test_what_is_wrong_is_named_by_its_argument(change, message):
    with pytest.raises(datasets.DatasetError, match=message):
        datasets.from_arrays(**dict(arrays(), env_id="Pendulum-v1", name="mine") | change)


def test_ends_must_be_told_somehow():
    given = {name: x for name, x in arrays().items() if name not in ("timeout", "next_obs")}
    given["action"] = given["action"] / 2
    with pytest.raises(datasets.DatasetError, match="arrays: timeout: missing"):
        datasets.from_arrays(**given)


# --- Several at once ---


def part(tmp_path, name, reward, env_id="Pendulum-v1", **changed):
    """A file of 12 rows in two episodes, whose rewards are all `reward`; its path."""
    given = dict(arrays(), reward=np.full(12, reward)) | changed
    with h5py.File(tmp_path / name, "w") as file:
        for key, x in given.items():
            file[NAMES[key]] = x
    return str(tmp_path / name)


def test_joined_datasets_are_one_pool_of_episodes(tmp_path):
    """Returns 5, 7 and 10, 14: rewards are scaled by the worst and best of them all."""
    a, b = part(tmp_path, "a.hdf5", 1), part(tmp_path, "b.hdf5", 2)
    one, two = (datasets.load(x, "Pendulum-v1") for x in (a, b))
    for data in (datasets.load(f"{a},{b}", "Pendulum-v1"), datasets.load([a, b], "Pendulum-v1")):
        assert data.name == f"{a},{b}" and data.env_id == "Pendulum-v1"
        assert data.returns().tolist() == [5, 7, 10, 14]
        assert data.start.tolist() == [0, 5, 12, 17]
        np.testing.assert_array_equal(data.obs, np.concatenate([one.obs, two.obs]))
        scaled = data.transitions(scale_reward=True).reward
        np.testing.assert_allclose(scaled[[0, -1]], [1000 / 9, 2000 / 9], rtol=1e-6)
        assert data.steps().end.tolist() == [5] * 5 + [12] * 7 + [17] * 5 + [24] * 7
        assert data.provenance["timeouts"] == 2
    assert data.provenance["sha256"] != datasets.join([two, one]).provenance["sha256"]
    assert datasets.load([a], "Pendulum-v1").provenance == one.provenance


def test_a_comma_may_be_a_part_of_a_path(tmp_path):
    path = part(tmp_path, "a,b.hdf5", 1)
    assert datasets.load(path, "Pendulum-v1").returns().tolist() == [5, 7]


def test_what_cannot_be_joined_is_told(tmp_path, capsys):
    given = dict(arrays(), action=arrays()["action"] / 2)
    one = datasets.from_arrays(**given, env_id="Pendulum-v1", name="one")
    limit = 'Pendulum-v1 {"max_episode_steps": 50}'
    other = dict(given, reward=np.ones(12))
    for change, why in (
        (dict(env_id=limit), "environments differ, Pendulum-v1 of one and Pendulum-v1 {"),
        (dict(), "environments differ, Pendulum-v1 of one and none of two"),
    ):
        two = datasets.from_arrays(**other, name="two", **change)
        with pytest.raises(datasets.DatasetError, match=why):
            datasets.join([one, two])
    bare = datasets.from_arrays(**given, name="bare")
    wide = datasets.from_arrays(**dict(other, action=np.zeros((12, 2))), name="wide")
    with pytest.raises(datasets.DatasetError, match="actions differ, 1 of bare and 2 of wide"):
        datasets.join([bare, wide])
    about = bare.provenance | {"action_high": [2.0]}
    torque = dataclasses.replace(bare, name="torque", provenance=about)
    with pytest.raises(datasets.DatasetError, match=r"action bounds differ, .* of torque"):
        datasets.join([bare, torque])
    with pytest.raises(datasets.DatasetError, match="bare: is joined twice"):
        datasets.join([bare, bare])
    two = datasets.from_arrays(**other, name="two")
    assert len(datasets.join([bare, two]).obs) == 24
    assert "bare,two: no environment is known" in capsys.readouterr().err
