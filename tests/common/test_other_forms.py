"""Data in the forms in which people have them: read where it is safe, else named with a remedy."""

import json

import gymnasium
import h5py
import numpy as np
import pytest

from common import datasets, evaluation
from common.datasets import __main__ as command


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


def test_other_kinds_of_minari_datasets_are_named(home):
    data = minari(home, metadata="")
    for name in ("own/data-v0", data, data / "main_data.hdf5"):
        assert "before version 0.5" in refusal(name)
    (data / "main_data.hdf5").unlink()
    (data / "metadata.json").write_text("{}")
    (data / "part-0.parquet").write_bytes(b"PAR1")
    for name in ("own/data-v0", data):
        assert "arrow format" in refusal(name) and "from_arrays" in refusal(name)


@pytest.mark.parametrize(
    "changed, why",
    [
        (dict(actions=np.arange(4)), "discrete actions"),
        (dict(observations=np.zeros((5, 8, 8, 3), np.uint8)), "images are not read"),
        (dict(observations={"a": np.zeros((5, 1)), "b": np.zeros((4, 1))}), "differ in length"),
    ],
)
def test_what_is_not_read_is_named(home, changed, why):
    minari(home, **changed)
    assert why in refusal()


def bare(path, user_block=0, skip=(), **kwargs):
    n = 40
    arrays = dict(observations=np.zeros((n, 1)), actions=np.zeros((n, 1)), rewards=np.ones(n),
                  terminals=np.zeros(n), timeouts=np.arange(n) % 9 == 8)  # fmt: skip
    with h5py.File(path, "w", userblock_size=user_block) as file:
        for name, x in arrays.items():
            if name not in skip:
                file.create_dataset(name, data=x, **kwargs)
    return path


def test_other_forms_of_hdf5_name_their_remedy(tmp_path):
    a, b, c, path = (tmp_path / f"{name}.hdf5" for name in "abcd")
    assert "packed by lzf" in refusal(bare(a, compression="lzf"))
    assert "h5repack -f GZIP=4" in refusal(a)
    told = refusal(bare(b, user_block=1024))
    assert "user block of 1024 bytes" in told and "h5unjam" in told
    told = refusal(bare(c, skip=("terminals",)))
    assert "terminals: missing; the file has actions, observations, rewards" in told
    bare(path, skip=("rewards",))
    with h5py.File(path, "r+") as file:
        values = np.ones(40)
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_layout(h5py.h5d.COMPACT)
        kind, space = h5py.h5t.py_create(values.dtype), h5py.h5s.create_simple(values.shape)
        h5py.h5d.create(file.id, b"rewards", kind, space, plan).write(
            h5py.h5s.ALL, h5py.h5s.ALL, values
        )
    assert "compact storage" in refusal(path)


def test_a_picture_goes_into_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "draw", lambda data, path: path.write_text("drawn"))
    path = tmp_path / "new/folder/a.png"
    command.main(str(bare(tmp_path / "a.hdf5")), plot=path)
    assert path.read_text() == "drawn"
