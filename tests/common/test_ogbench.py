"""OGBench's single tasks: names, labels of files made here, what is refused.

The package is an extra: without it a stand-in shows what becomes of its labels; with it they are
compared with its own.
"""

import sys
from types import ModuleType

import gymnasium
import numpy as np
import pytest

from common import datasets, evaluation
from common.datasets import ogbench as reader

NAME = "cube-single-play-singletask-task1-v0"


@pytest.mark.parametrize(
    ("name", "env_id", "stem"),
    [
        (NAME, "cube-single-singletask-task1-v0", "cube-single-play-v0"),
        (
            "antmaze-large-navigate-singletask-v0",
            "antmaze-large-singletask-v0",
            "antmaze-large-navigate-v0",
        ),
        (
            "puzzle-4x4-play-singletask-task5-v0",
            "puzzle-4x4-singletask-task5-v0",
            "puzzle-4x4-play-v0",
        ),
    ],
)
def test_names(name, env_id, stem):
    assert reader.split(name) == (env_id, stem)


@pytest.mark.parametrize(
    "name",
    ["cube-single-play-v0", "hopper-medium-v2", "stillwater/hopper/medium-v0", "singletask-v0",
     "a-b-singletask-task6-v0", "a-b-singletask-task1-v0.npz"],
)  # fmt: skip
def test_other_names(name):
    assert reader.split(name) is None


def trajectories(rows=(6, 4), obs_dim=2, qpos_dim=1):
    """Two trajectories as the package's files hold them: the last row of each has no next state."""
    rng, total = np.random.default_rng(0), sum(rows)
    ends = np.zeros(total, bool)
    ends[np.cumsum(rows) - 1] = True
    return {
        "observations": rng.normal(size=(total, obs_dim)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (total, 1)).astype(np.float32),
        "terminals": ends,
        "qpos": rng.normal(size=(total, qpos_dim)),
        "qvel": rng.normal(size=(total, qpos_dim)),
    }


class Toy(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-9, 9, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), -1.0, False, False, {}


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """A package that knows one task: it is done where |qpos| < 0.5."""

    def load_dataset(path, add_info):
        file = np.load(path)
        kept = np.flatnonzero(~file["terminals"])
        found = {name: file[name][kept] for name in ("observations", "actions", "qpos")}
        found["next_observations"] = file["observations"][kept + 1]
        return found | {"terminals": np.float32(file["terminals"][kept + 1])}

    def relabel_dataset(name, env, dataset):
        done = np.abs(dataset["qpos"][:, 0]) < 0.5
        dataset["rewards"], dataset["masks"] = np.float32(done) - 1, 1 - np.float32(done)

    modules = {x: ModuleType(x) for x in ("ogbench", "ogbench.utils", "ogbench.relabel_utils")}
    package, utils, relabel_utils = modules.values()
    package.utils, package.relabel_utils = utils, relabel_utils
    utils.load_dataset, utils.DATASET_URL = load_dataset, "http://127.0.0.1:9/ogbench"
    relabel_utils.relabel_dataset = relabel_dataset
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path))
    monkeypatch.delenv("http_proxy", raising=False)
    gymnasium.register("toy-singletask-task1-v0", Toy, max_episode_steps=5)
    yield tmp_path / "toy-play-v0.npz"
    del gymnasium.registry["toy-singletask-task1-v0"]


def test_done_is_where_the_task_is_done_and_not_where_a_trajectory_ends(stand_in):
    file = trajectories()
    file["qpos"][:, 0] = [1, 1, 0, 1, 1, 0, 1, 1, 0, 0]  # rows 5 and 9 have no next state
    np.savez(stand_in, **file)
    data = datasets.load("toy-play-singletask-task1-v0")
    assert data.env_id == "toy-singletask-task1-v0"
    kept = [0, 1, 2, 3, 4, 6, 7, 8]
    np.testing.assert_array_equal(data.obs, file["observations"][kept])
    np.testing.assert_array_equal(data.next_obs, file["observations"][np.add(kept, 1)])
    np.testing.assert_array_equal(data.action, file["actions"][kept])
    np.testing.assert_array_equal(data.done, [0, 0, 1, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(data.reward, data.done - 1)
    np.testing.assert_array_equal(data.start, [0, 3, 5])  # time limits end the second one
    assert data.provenance["timeouts"] == 1 and data.provenance["source"] == "local file"
    again = datasets.load("toy-play-singletask-task1-v0")
    assert again.provenance["sha256"] == data.provenance["sha256"]
    assert np.isnan(data.score(-1.0))


def test_what_cannot_be_had_or_read_is_said(stand_in):
    name = "toy-play-singletask-task1-v0"
    with pytest.raises(datasets.DatasetError, match="toy-play-v0 was not found:") as error:
        datasets.load(name)
    assert str(stand_in) in str(error.value) and "127.0.0.1:9" in str(error.value)
    stand_in.write_bytes(b"not a zip file")
    with pytest.raises(datasets.DatasetError, match="cannot be opened"):
        datasets.load(name)
    file = trajectories()
    np.savez(stand_in, **{k: x for k, x in file.items() if k != "qpos"})
    with pytest.raises(datasets.DatasetError, match="qpos: missing"):
        datasets.load(name)
    np.savez(stand_in, **file | {"observations": np.array([{}] * 10)})  # a pickle
    with pytest.raises(datasets.DatasetError, match="cannot be read for toy-play"):
        datasets.load(name)
    file["actions"][3] = 7
    np.savez(stand_in, **file)
    with pytest.raises(datasets.DatasetError, match="row 3, column 0: 7 is not within"):
        datasets.load(name)


def test_a_file_larger_than_memory_is_refused(stand_in, monkeypatch):
    np.savez_compressed(stand_in, **trajectories())
    monkeypatch.setattr(reader.runtime, "free_memory", lambda: 400)
    with pytest.raises(datasets.DatasetError, match="this machine has memory for 100"):
        reader.check(stand_in)


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ogbench", None)
    with pytest.raises(datasets.DatasetError, match="pip install ogbench"):
        datasets.load(NAME)


def test_labels_are_the_packages_own(tmp_path, monkeypatch):
    """A file made here, in which the cube lies at the target for the end of a trajectory."""
    ogbench = pytest.importorskip("ogbench")
    env = evaluation.make("cube-single-singletask-task1-v0")
    env.reset(seed=0)
    file = trajectories((8, 5), 28, 21) | {"actions": np.zeros((13, 5), np.float32)}
    file["qpos"][5:8, 14:17] = env.unwrapped._data.mocap_pos[0]
    for name in ("cube-single-play-v0.npz", "cube-single-play-v0-val.npz"):
        np.savez(tmp_path / name, **file)
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path))
    data = datasets.load(NAME)
    _, theirs, _ = ogbench.make_env_and_datasets(NAME, dataset_dir=str(tmp_path))
    assert data.done.sum() == 2
    np.testing.assert_array_equal(data.obs, theirs["observations"])
    np.testing.assert_array_equal(data.next_obs, theirs["next_observations"])
    np.testing.assert_array_equal(data.reward, theirs["rewards"])
    np.testing.assert_array_equal(data.done, 1 - theirs["masks"])
