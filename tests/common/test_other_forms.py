"""Data in the forms in which people have them: read where it is safe, else named with a remedy."""

import json
import re
import sys

import gymnasium
import h5py
import numpy as np
import pytest

from common import datasets, evaluation, experiment
from common.datasets import __main__ as command
from common.datasets import hdf5


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def minari(home, metadata="{}", column=False, **changed):
    """own/data-v0 with an episode of 4 steps; its data folder."""
    data = home / "own/data-v0/data"
    data.mkdir(parents=True)
    n, shape = 4, (4, 1) if column else (4,)
    arrays = {
        "observations": np.arange(n + 1.0)[:, None], "actions": np.zeros((n, 1)),
        "rewards": np.arange(n).reshape(shape), "terminations": np.zeros(shape),
        "truncations": (np.arange(n) == n - 1).reshape(shape),
    }  # fmt: skip
    with h5py.File(data / "main_data.hdf5", "w") as file:
        for name, x in (arrays | changed).items():
            for part, y in x.items() if isinstance(x, dict) else (("", x),):
                file[f"episode_0/{name}/{part}".rstrip("/")] = y
    if metadata:
        (data / "metadata.json").write_text(metadata)
    return data


def refusal(name="own/data-v0"):
    with pytest.raises(datasets.DatasetError) as error:
        datasets.load(str(name))
    return str(error.value)


def test_columns_of_one_are_vectors(home):
    minari(home, column=True)
    data = datasets.load("own/data-v0")
    assert data.reward.tolist() == [0, 1, 2, 3]
    given = dict(obs=np.zeros((3, 1)), action=np.zeros((3, 1)), reward=[[1], [2], [3]],
                 done=np.zeros((3, 1)), timeout=[[0], [0], [1]])  # fmt: skip
    assert datasets.from_arrays(**given).reward.tolist() == [1, 2]


class Two(gymnasium.Env):
    observation_space = gymnasium.spaces.Dict(
        vel=gymnasium.spaces.Box(-9, 9, (1,)), pos=gymnasium.spaces.Box(-9, 9, (2,))
    )
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        return {"vel": np.float32([3]), "pos": np.float32([1, 2])}, {}

    def step(self, action):
        return self.reset()[0], 0.0, False, False, {}


def test_dicts_of_vectors_are_flattened_as_the_environment_is(home):
    spec = json.dumps({"env_spec": json.dumps({"id": "Two-v0"})})
    minari(home, spec, observations={"vel": np.full((5, 1), 3), "pos": np.tile([1, 2], (5, 1))})
    gymnasium.register("Two-v0", Two, max_episode_steps=9)
    try:
        data = datasets.load("own/data-v0")
        obs, _ = evaluation.make("Two-v0").reset(seed=0)
        assert data.env_id == "Two-v0"
        assert data.obs[0].tolist() == obs.tolist() == [1, 2, 3]
    finally:
        del gymnasium.registry["Two-v0"]


def test_a_minari_datasets_path_will_do(home):
    data = minari(home)
    for path in (data, data.parent, data / "main_data.hdf5"):
        assert datasets.load(str(path)).provenance["layout"] == "Minari"


def test_other_kinds_of_minari_datasets_are_named(home, monkeypatch):
    data = minari(home, metadata="")
    for name in ("own/data-v0", data, data / "main_data.hdf5"):
        assert "before version 0.5" in refusal(name)
    (data / "main_data.hdf5").unlink()
    (data / "metadata.json").write_text("{}")
    assert "without main_data.hdf5, .arrow or .parquet files" in refusal(data)
    (data / "part-0.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("own/data-v0", data):
        assert "pip install pyarrow" in refusal(name)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
def test_arrow_holds_the_same_numbers(home, suffix, capsys):
    """As Minari writes it: a folder for each episode, a row of zeros after all but observations."""
    pyarrow = pytest.importorskip("pyarrow", reason="an optional package")
    from pyarrow import dataset

    def column(x):
        flat = pyarrow.array(x.reshape(-1))
        return pyarrow.FixedSizeListArray.from_arrays(flat, x.shape[1]) if x.ndim > 1 else flat

    data, rng, n = home / "own/data-v0/data", np.random.default_rng(0), 4
    for i in (0, 1, 10):
        parts = {name: column(rng.normal(size=(n + 1, d))) for name, d in (("vel", 1), ("pos", 2))}
        rows = {
            "observations": pyarrow.StructArray.from_arrays(parts.values(), list(parts)),
            "actions": column(np.r_[np.full((n, 1), i / 10), [[9.0]]]),
            "rewards": column(np.r_[np.arange(n) + 10.0 * i, 0]),
            "terminations": column(np.arange(n + 1) == n - 1),
            "truncations": column(np.zeros(n + 1, bool)),
        }
        table = pyarrow.table(rows)
        dataset.write_dataset(table, data / str(i), format=suffix)
    (data / "metadata.json").write_text('{"total_episodes": 4}')
    (data / "10/link.arrow").symlink_to(data / "0/part-0.arrow")
    kept = [datasets.load("own/data-v0"), datasets.load(str(data.parent))]
    for found in kept:
        assert found.reward.tolist() == [0, 1, 2, 3, 10, 11, 12, 13, 100, 101, 102, 103]
        assert found.length.tolist() == [4, 4, 4] and found.done.sum() == 3
        assert found.action[::4, 0].tolist() == [0, np.float32(0.1), 1]
        last = [x.flatten().to_numpy().reshape(n + 1, -1) for x in (parts["pos"], parts["vel"])]
        np.testing.assert_array_equal(found.obs[8:], np.float32(np.concatenate(last, 1))[:-1])
        np.testing.assert_array_equal(found.next_obs[8:], np.float32(np.concatenate(last, 1))[1:])
    assert "tells of 4 episodes, 3 are there" in capsys.readouterr().err
    (data / f"1/part-0.{suffix}").write_bytes(b"PAR1 nothing")
    assert "1: cannot be read" in refusal()


@pytest.mark.parametrize(
    "changed, why",
    [
        (dict(observations=np.arange(5)), r"discrete values.*datasets.from_arrays"),
        (dict(observations=np.zeros((5, 64, 64, 3), np.uint8)), r"images.*datasets.from_arrays"),
        (dict(observations={"a": np.zeros((5, 1)), "b": np.zeros((4, 1))}), "differ in length"),
    ],
)
def test_what_is_not_read_is_named(home, changed, why):
    minari(home, **changed)
    assert re.search(why, refusal())


def bare(path, user_block=0, skip=(), **kwargs):
    """40 rows in D4RL's layout; {field: values}. Rewards hold runs, noise and a long repetition."""
    n, rng = 40, np.random.default_rng(0)
    reward = np.r_[rng.normal(size=20), np.zeros(10), np.tile([1.0, 2.0], 5)]
    obs, zeros = rng.normal(size=(n, 300)).round(1), np.zeros(n)
    arrays = dict(observations=obs, actions=zeros[:, None], rewards=reward,
                  terminals=zeros, timeouts=np.arange(n) % 9 == 8)  # fmt: skip
    with h5py.File(path, "w", userblock_size=user_block) as file:
        for name, x in arrays.items():
            if name not in skip:
                file.create_dataset(name, data=x, **kwargs)
    return path


def compact():
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_layout(h5py.h5d.COMPACT)
    return plan


@pytest.mark.parametrize(
    "how",
    [
        dict(compression="lzf"),
        dict(compression="lzf", shuffle=True, fletcher32=True, chunks=True),
        dict(user_block=1024),
        dict(user_block=512, compression="gzip"),
    ],
)
def test_other_forms_of_hdf5_hold_the_same_numbers(tmp_path, how):
    one = datasets.load(str(bare(tmp_path / "plain.hdf5")))
    two = datasets.load(str(bare(tmp_path / "other.mat", **how)))
    for name in ("obs", "reward", "next_obs", "start"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    assert len(one.obs) == 35 and one.reward.std() > 0.5


def test_arrays_in_the_files_header(tmp_path):
    """HDF5 keeps at most 64 KiB in a header, so the 300 columns stay outside."""
    path = bare(tmp_path / "a.hdf5", skip=("rewards", "timeouts"))
    with h5py.File(path, "r+") as file:
        file.create_dataset("rewards", data=np.arange(40.0), dcpl=compact())
        file.create_dataset("timeouts", data=np.arange(40) == 39, dcpl=compact())
    data = datasets.load(str(path))
    assert data.reward.tolist() == list(range(39))


@pytest.mark.parametrize(
    "raw, why",
    [
        (b"\x20\x00", "before its start"),
        (b"\x00a\x20\x05", "before its start"),
        (b"\x00a\xe0", "no end"),
        (b"\x00a\x20", "no end"),
    ],
)
def test_damaged_lzf(raw, why):
    with pytest.raises(ValueError, match=why):
        hdf5.unpack_lzf(raw, 100)


def test_lzf_stops_at_what_was_declared():
    assert hdf5.unpack_lzf(b"\x00a\xe0\xff\x00", 100) == b"a" * 265
    assert len(hdf5.unpack_lzf(b"\x00a" + b"\xe0\xff\x00" * 1000, 100)) == 265


def test_what_is_wrong_with_an_hdf5_file_is_told(tmp_path):
    a, b, c = (tmp_path / f"{name}.hdf5" for name in "abc")
    told = refusal(bare(a, skip=("terminals",)))
    assert "terminals: missing; the file has actions, observations, rewards" in told
    whole = np.arange(40)
    with h5py.File(bare(b, skip=("rewards",)), "r+") as file:
        file.create_dataset("rewards", data=whole, scaleoffset=0, chunks=True)
    assert "packed by scaleoffset" in refusal(b) and "h5repack -f GZIP=4" in refusal(b)
    c.write_bytes(b"a table, and more than a few bytes of it")
    assert refusal(c).count(str(c)) == 1 and "not an HDF5 file (it begins with" in refusal(c)


def test_a_picture_goes_into_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "draw", lambda data, path: path.write_text("drawn"))
    path = tmp_path / "new/folder/a.png"
    command.main(str(bare(tmp_path / "a.hdf5")), plot=path)
    assert path.read_text() == "drawn"


def test_a_picture_that_cannot_be_written(tmp_path):
    name = str(bare(tmp_path / "a.hdf5"))
    with pytest.raises(datasets.DatasetError, match=r"--plot .*xyz: the name must end in .*\.png"):
        command.main(name, plot=tmp_path / "a.xyz")
    with pytest.raises(experiment.UserError, match=r"--plot .*png cannot be written: File exi"):
        command.main(name, plot=tmp_path / "a.hdf5/a.png")
