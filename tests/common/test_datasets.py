"""Reading datasets: names, episodes, layouts, downloads, cache. Hostile files: the next file."""

import hashlib
import http.server
import json
import os
import re
import sys
import threading
import time
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest

from common import datasets
from common.datasets import DatasetError, checked, downloads, loading, readers, sources
from common.datasets import __main__ as summary


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty home: no file and no cache of this machine's user is seen or touched."""
    for name in ("D4RL_DATASET_DIR", "MINARI_DATASETS_PATH", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "home"


def steps(n=10, dim=2, act=1, seed=0):
    """n rows without any ends; obs[i] = (i, noise), next_obs[i] = obs[i + 1] where i goes on."""
    rng = np.random.default_rng(seed)
    track = np.stack([np.arange(n + 1), *rng.normal(size=(dim - 1, n + 1))], 1).astype(np.float32)
    return {
        "observations": track[:-1].copy(),
        "actions": rng.uniform(-1, 1, (n, act)).astype(np.float32),
        "rewards": np.arange(n, dtype=np.float32),
        "terminals": np.zeros(n, bool),
        "timeouts": np.zeros(n, bool),
        "next_observations": track[1:].copy(),
    }


def at(n, *rows):
    return np.isin(np.arange(n), rows)


def write(path, fields, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in fields.items():
            file.create_dataset(name, data=values, **kwargs)
    return str(path)


def without(fields, *names):
    return {name: values for name, values in fields.items() if name not in names}


# --- Episodes ---


def test_file_with_all_fields_keeps_every_row(tmp_path):
    fields = steps(10)
    fields["terminals"], fields["timeouts"] = at(10, 3), at(10, 6)
    fields["next_observations"][[3, 6, 9]] += 50  # true ends are not the next episode's start
    data = datasets.load(write(tmp_path / "a.hdf5", fields))
    assert data.start.tolist() == [0, 4, 7]
    assert data.length.tolist() == [4, 3, 3]
    assert data.start.dtype == data.length.dtype == np.int64
    assert data.done.tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]  # a timeout is not a terminal
    batch = data.transitions()
    assert batch.next_obs.tobytes() == fields["next_observations"].tobytes()
    assert batch.obs.tobytes() == fields["observations"].tobytes()
    assert all(x.dtype == np.float32 and len(x) == 10 for x in batch)
    assert data.returns().tolist() == [0 + 1 + 2 + 3, 4 + 5 + 6, 7 + 8 + 9]


def test_terminal_wins_over_a_timeout_in_the_same_row(tmp_path):
    fields = steps(6)
    fields["terminals"], fields["timeouts"] = at(6, 2), at(6, 2, 5)
    data = datasets.load(write(tmp_path / "a.hdf5", fields))
    assert data.done.tolist() == [0, 0, 1, 0, 0, 0]
    assert data.length.tolist() == [3, 3]


def test_without_next_observations_nothing_crosses_an_episode(tmp_path, capsys):
    fields = without(steps(10), "next_observations")
    fields["terminals"], fields["timeouts"] = at(10, 3), at(10, 6)
    data = datasets.load(write(tmp_path / "a.hdf5", fields))
    kept = [0, 1, 2, 3, 4, 5, 7, 8]  # 6 is a timeout, 9 the end of the file: next_obs unknown
    assert data.obs[:, 0].tolist() == kept
    assert data.next_obs[:, 0].tolist() == [1, 2, 3, 3, 5, 6, 8, 9]  # 3, terminal: stands in itself
    assert data.done.tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    assert data.start.tolist() == [0, 4, 6]
    assert data.length.tolist() == [4, 2, 2]
    assert data.action.tobytes() == fields["actions"][kept].tobytes()
    assert "2 last rows of episodes are left out, 1 terminal rows" in capsys.readouterr().err


def test_episode_of_one_unknown_row_vanishes(tmp_path):
    fields = without(steps(6), "next_observations")
    fields["timeouts"] = at(6, 2, 3, 5)
    data = datasets.load(write(tmp_path / "a.hdf5", fields))
    assert data.obs[:, 0].tolist() == [0, 1, 4]
    assert data.length.tolist() == [2, 1]
    fields["timeouts"][:] = True
    with pytest.raises(DatasetError, match="no transition whose next_obs is known"):
        datasets.load(write(tmp_path / "b.hdf5", fields))


@pytest.mark.parametrize("timeouts", [True, False])
def test_a_jump_in_next_observations_ends_an_episode(tmp_path, timeouts):
    fields = steps(8)
    fields["terminals"] = at(8, 1)
    fields["next_observations"][4, 1] += 0.1  # row 5 starts elsewhere: an unmarked seam
    fields = fields if timeouts else without(fields, "timeouts")
    data = datasets.load(write(tmp_path / "a.hdf5", fields))
    assert data.start.tolist() == [0, 2, 5]
    assert data.done.sum() == 1
    assert len(data.obs) == 8


def test_with_neither_the_time_limit_cuts(tmp_path):
    n = 450  # Pendulum-v1 ends after 200 steps
    fields = without(steps(n, dim=3), "timeouts", "next_observations")
    fields["terminals"] = at(n, 29)
    path = write(tmp_path / "a.hdf5", fields)
    data = datasets.load(path, "Pendulum-v1")
    assert data.length.tolist() == [30, 199, 199, 19]  # last rows of unknown next_obs left out
    assert data.obs[data.start, 0].tolist() == [0, 30, 230, 430]
    with pytest.raises(DatasetError, match=r"a\.hdf5: timeouts: missing.*--env-id"):
        datasets.load(path)


def test_float64_and_integers_are_cast(tmp_path):
    fields = {k: v.astype(np.float64) for k, v in steps(5).items()}
    fields["terminals"] = np.array([0, 0, 1, 0, 0])
    data = datasets.load(write(tmp_path / "a.hdf5", fields, compression="gzip"))
    assert {x.dtype for x in data.transitions()} == {np.dtype(np.float32)}
    assert data.done.tolist() == [0, 0, 1, 0, 0]


# --- Environments, actions, scores ---


def test_actions_are_rescaled_from_the_environments_bounds(tmp_path):
    fields = steps(4, dim=3)
    fields["actions"] = np.float32([[-2], [0.5], [1], [2 + 1e-6]])  # Pendulum: [-2, 2]
    path = write(tmp_path / "a.hdf5", fields)
    assert datasets.load(path, "Pendulum-v1").action.ravel().tolist() == [-1, 0.25, 0.5, 1]
    with pytest.raises(DatasetError, match="actions: row 0, column 0: -2 is not within"):
        datasets.load(path)  # an unknown environment's are [-1, 1]


def test_bounds_need_not_lie_around_zero():
    """Columns in [0, 10] and [-3, -1]."""
    env = readers.Env("Some-v0", 1, np.float32([0, -3]), np.float32([10, -1]))
    zeros, action = np.zeros((3, 1)), np.float32([[0, -3], [5, -1], [10, -2]])
    flags = np.zeros(3, bool), np.array([False, False, True]), np.ones(3, bool)
    rows = readers.Rows(zeros, action, zeros[:, 0], zeros, *flags)
    arrays, _ = loading.flatten(rows, env)
    assert arrays["action"].tolist() == [[-1, -1], [0, 1], [1, 0]]


def test_unit_bounds_leave_actions_bit_for_bit(tmp_path):
    fields = steps(100, dim=11, act=3)
    fields["actions"][0] = 1e-12, -1, 1
    data = datasets.load(write(tmp_path / "a.hdf5", fields), "Hopper-v5")
    assert data.action.tobytes() == fields["actions"].tobytes()
    assert (data.ref_min, data.ref_max) == (-20.272305, 3234.3)
    assert data.score([-20.272305, 3234.3]).tolist() == [0, 100]


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("Hopper-v2", "Hopper-v2 cannot be made"),
        ("Hoper-v5", "unknown environment 'Hoper-v5'. Did you mean Hopper-v5"),
        ("json:Evil-v0", "unknown environment 'json:Evil-v0'"),
        ("FrozenLake-v1", "observations must be vectors and actions vectors or discrete"),
        ("CartPole-v1", "observations: 11 columns where CartPole-v1 has 4"),
        ("HalfCheetah-v5", "observations: 11 columns where HalfCheetah-v5 has 17"),
        ("Reacher-v4", "actions: 3 columns, not Reacher-v4's 2"),
    ],
)
def test_wrong_environments(tmp_path, env_id, message):
    path = write(tmp_path / "a.hdf5", steps(5, dim=11, act=3))
    with pytest.raises(DatasetError, match=re.escape(message)):
        datasets.load(path, env_id)


def test_d4rls_ant_loses_its_zero_contact_forces(home):
    fields = steps(5, dim=111, act=8)
    for field in ("observations", "next_observations"):
        fields[field][:, 27:] = 0
    path = home / ".d4rl/datasets/ant_medium-v2.hdf5"
    write(path, fields)
    data = datasets.load("ant-medium-v2")
    assert data.obs.shape == data.next_obs.shape == (5, 27)
    assert data.env_id == "Ant-v4"
    fields["observations"][4, 110] = 0.5
    write(path, fields)
    with pytest.raises(DatasetError, match="observations: 111 columns where Ant-v4 has 27"):
        datasets.load("ant-medium-v2")


def test_no_reference_no_score_and_reward_scale(tmp_path):
    fields = steps(4)
    fields["timeouts"] = at(4, 1)  # returns 1 and 5
    data = datasets.load(write(tmp_path / "a.hdf5", fields))
    assert data.env_id == ""
    assert np.isnan(data.score(data.returns())).all()
    assert data.transitions(scale_reward=True).reward.tolist() == [0, 250, 500, 750]
    fields["rewards"][:] = 1
    data = datasets.load(write(tmp_path / "b.hdf5", fields))
    assert data.transitions(scale_reward=True).reward.tolist() == [1, 1, 1, 1]


# --- D4RL names ---


def test_d4rl_names():
    names = sources.d4rl_names()
    assert names["halfcheetah-medium-replay-v2"] == sources.Source(
        "gym_mujoco_v2/halfcheetah_medium_replay-v2.hdf5", "D4RL", "HalfCheetah-v4",
        (-280.178953, 12135.0), 0, 59448533,
        names["halfcheetah-medium-replay-v2"].sha256,
    )  # fmt: skip
    gym = [n for n in names if names[n].path.startswith("gym_mujoco_v2/")]
    assert len(gym) == 24
    assert all(names[n].env_id.endswith("-v4") for n in gym)
    assert all(len(names[n].sha256) == 64 and names[n].size > 5e7 for n in gym)
    assert names["maze2d-large-dense-v1"].path == "maze2d/maze2d-large-dense-v1.hdf5"
    assert names["maze2d-umaze-v1"].path == "maze2d/maze2d-umaze-sparse-v1.hdf5"
    assert names["antmaze-medium-play-v2"].sha256 == ""  # nobody published it
    table = Path(sources.__file__).with_name("d4rl_files.tsv").read_text()
    listed = {row.split("\t")[0] for row in table.splitlines() if row[0] != "#"}
    assert listed <= {source.path for source in names.values()}
    assert sum(bool(source.sha256) for source in names.values()) == len(listed) - 1


@pytest.mark.parametrize("flat", [True, False])
def test_own_copy_with_another_hash_is_used_and_recorded(home, monkeypatch, flat, capsys):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(home / "mine"))
    name = "gym_mujoco_v2/hopper_medium-v2.hdf5"
    write(home / "mine" / (Path(name).name if flat else name), steps(5, dim=11, act=3))
    data = datasets.load("hopper-medium-v2")
    assert data.env_id == "Hopper-v4"
    assert data.provenance["verified"] is False
    assert "is not D4RL's file" in capsys.readouterr().err
    datasets.load("hopper-medium-v2")
    assert "is not D4RL's file" in capsys.readouterr().err  # said of the cached copy too


def test_hash_known_and_unknown(home, monkeypatch, capsys):
    path = write(home / ".d4rl/datasets/hopper_medium-v2.hdf5", steps(5, dim=11, act=3))
    sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    known = sources.d4rl_names()["hopper-medium-v2"]
    monkeypatch.setitem(sources.d4rl_names(), "hopper-medium-v2", known._replace(sha256=sha256))
    assert datasets.load("hopper-medium-v2").provenance["verified"] is True
    assert capsys.readouterr().err == ""
    file = "Ant_maze_big-maze_noisy_multistart_True_multigoal_False_sparse_fixed.hdf5"
    path = write(home / ".d4rl/datasets" / file, steps(5, dim=29, act=8))
    data = datasets.load("antmaze-medium-play-v2")
    sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert data.provenance["verified"] is None
    assert data.provenance["sha256"] == sha256
    assert sha256 in capsys.readouterr().err
    assert data.env_id == ""
    assert (data.ref_min, data.ref_max) == (0, 1)


def test_names_that_are_none():
    with pytest.raises(DatasetError, match="Did you mean .*hopper-medium-v2"):
        datasets.load("hopper-medium-v0")
    with pytest.raises(DatasetError, match="scored on Hopper-v4"):
        datasets.load("hopper-medium-v2", "Hopper-v5")
    with pytest.raises(DatasetError, match=r"nowhere\.hdf5: no such file"):
        datasets.load("nowhere.hdf5")
    with pytest.raises(DatasetError, match="unknown dataset"):
        datasets.load("mujoco/../../etc/passwd-v0")


# --- Minari's layout ---


@pytest.fixture
def minari_home(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def make_minari(name="own/pendulum/some-v0", episodes=12):
    """A Minari dataset by minari itself; rewards tell the episode's number."""
    import gymnasium
    import minari
    from minari.data_collector import EpisodeBuffer

    rng, buffers = np.random.default_rng(0), []
    for i in range(episodes):
        n = 3 + i
        buffers.append(
            EpisodeBuffer(
                observations=rng.normal(size=(n + 1, 3)).astype(np.float32),
                actions=rng.uniform(-2, 2, (n, 1)).astype(np.float32),
                rewards=np.full(n, i, np.float32),
                terminations=at(n, n - 1) & (i % 2 == 0),
                truncations=at(n, n - 1) & (i % 2 == 1),
            )
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # minari's, of each optional field left out
        return minari.create_dataset_from_buffers(
            name,
            buffers,
            env="Pendulum-v1",
            observation_space=gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32),
            action_space=gymnasium.spaces.Box(-2, 2, (1,), np.float32),
        )


def test_minari_layout_agrees_with_minari(minari_home):
    theirs = list(make_minari().iterate_episodes())
    data = datasets.load("own/pendulum/some-v0")
    assert data.env_id == "Pendulum-v1"
    assert data.ref_min is None
    # episode_10 comes after episode_9, not after episode_1
    assert data.reward[data.start].tolist() == [e.rewards[0] for e in theirs] == [*range(12)]
    assert data.length.tolist() == [len(e.actions) for e in theirs]
    for field, want in {
        "obs": [e.observations[:-1] for e in theirs],
        "next_obs": [e.observations[1:] for e in theirs],
        "action": [e.actions / 2 for e in theirs],
        "reward": [e.rewards for e in theirs],
        "done": [e.terminations for e in theirs],
    }.items():
        np.testing.assert_array_equal(getattr(data, field), np.concatenate(want), field)
    assert data.done.sum() == 6
    with pytest.raises(DatasetError, match="--env-id Hopper-v5: .* holds data of Pendulum-v1"):
        datasets.load("own/pendulum/some-v0", "Hopper-v5")
    assert data.provenance["timeouts"] == 6


def test_minari_references_and_goals(minari_home):
    """Reference returns come from the metadata; a goal joins the observation."""
    data = minari_home / "own/goal-v0/data"
    episode = {
        "observations/observation": np.zeros((4, 3)), "observations/desired_goal": np.ones((4, 2)),
        "observations/achieved_goal": np.zeros((4, 2)), "actions": np.zeros((3, 1)),
        "rewards": np.ones(3), "terminations": at(3, 0), "truncations": at(3, 2),
    }  # fmt: skip
    write(data / "main_data.hdf5", {f"episode_0/{k}": v for k, v in episode.items()})
    metadata = {"ref_min_score": 1, "ref_max_score": 3.0, "env_spec": '{"id": "Unknown-v3"}'}
    (data / "metadata.json").write_text(json.dumps(metadata))
    loaded = datasets.load("own/goal-v0")
    assert loaded.obs.tolist() == [[0, 0, 0, 1, 1]] * 3
    assert loaded.env_id == ""
    assert loaded.length.tolist() == [1, 2]
    assert loaded.score([2.0]).tolist() == [50]
    assert "Unknown-v3" in loaded.provenance["notes"][0]
    (data / "metadata.json").write_text(json.dumps(metadata | {"ref_max_score": float("nan")}))
    assert datasets.load("own/goal-v0").ref_max is None


def test_a_place_that_the_observation_lacks_comes_first(minari_home):
    """As in Minari's antmaze, whose `observation` is the ant's joints alone."""
    data = minari_home / "own/ant-v0/data"
    episode = {
        "observations/observation": np.zeros((4, 3)), "observations/desired_goal": np.ones((4, 2)),
        "observations/achieved_goal": np.full((4, 2), 5), "actions": np.zeros((3, 1)),
        "rewards": np.ones(3), "terminations": at(3, 0), "truncations": at(3, 2),
    }  # fmt: skip
    write(data / "main_data.hdf5", {f"episode_0/{k}": v for k, v in episode.items()})
    (data / "metadata.json").write_text("{}")
    assert datasets.load("own/ant-v0").obs.tolist() == [[5, 5, 0, 0, 0, 1, 1]] * 3


def test_bundled_comes_first_and_needs_no_minari(minari_home, tmp_path, monkeypatch):
    make_minari()
    bundled = tmp_path / "data/own/pendulum"
    bundled.mkdir(parents=True)
    (minari_home / "own/pendulum/some-v0").rename(bundled / "some-v0")
    monkeypatch.setattr(sources, "BUNDLED", tmp_path / "data")
    monkeypatch.setitem(sys.modules, "minari", None)  # importing it would raise
    data = datasets.load("own/pendulum/some-v0")
    assert data.provenance["source"] == "bundled"
    assert len(data.start) == 12


@pytest.mark.skipif(not (sources.BUNDLED / sources.OFFLINE).is_dir(), reason="not made yet")
def test_the_default_dataset_loads_from_the_repository():
    data = datasets.load("stillwater/hopper/medium-replay-v0")
    assert data.env_id == "Hopper-v5"
    assert data.obs.shape[1] == 11
    assert len(data.obs) > 50_000
    going_on = np.ones(len(data.obs), bool)
    going_on[data.start + data.length - 1] = False
    inside = np.flatnonzero(going_on)
    np.testing.assert_array_equal(data.next_obs[inside], data.obs[inside + 1])
    assert not data.done[inside].any()
    assert data.length.sum() == len(data.obs)
    told = data.provenance["metadata"]["stillwater"]["returns"]["mean"]
    assert data.returns().mean() == pytest.approx(told, abs=1e-2)


# --- Downloads ---

BODY = b"".join([checked.MAGIC, bytes(range(256)) * 40])


class Answers(http.server.BaseHTTPRequestHandler):
    """answers["host"] to GET /host/..., same for mirror: a status, or (body, length told)."""

    def do_GET(self):
        self.server.asked.append(self.path)
        answer = self.server.answers[self.path.split("/")[1]]
        if isinstance(answer, int):
            return self.send_error(answer)
        body, length = answer
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.answers, server.asked = {"host": 404, "mirror": 404}, []
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(sources, "D4RL_HOST", f"{address}/host/")
        monkeypatch.setattr(sources, "D4RL_MIRROR", f"{address}/mirror/")
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def good_file(tmp_path, monkeypatch, name="hopper-medium-v2"):
    """A body that passes for D4RL's `name`: its size and hash are the known ones."""
    body = Path(write(tmp_path / "good.hdf5", steps(5, dim=11, act=3))).read_bytes()
    known = sources.d4rl_names()[name]._replace(
        size=len(body), sha256=hashlib.sha256(body).hexdigest()
    )
    monkeypatch.setitem(sources.d4rl_names(), name, known)
    return body


def test_download_from_host_then_local(server, home, tmp_path, monkeypatch):
    body = good_file(tmp_path, monkeypatch)
    server.answers["host"] = body, len(body)
    data = datasets.load("hopper-medium-v2")
    assert data.provenance["verified"] is True
    assert "/host/" in data.provenance["source"]
    assert server.asked == ["/host/gym_mujoco_v2/hopper_medium-v2.hdf5"]
    assert [p.name for p in (home / ".d4rl/datasets").iterdir()] == ["hopper_medium-v2.hdf5"]
    datasets.load("hopper-medium-v2")
    assert len(server.asked) == 1  # the second time it is a local file


def test_refused_downloads_then_a_clean_restart(server, home, tmp_path, monkeypatch):
    body = good_file(tmp_path, monkeypatch)
    wrong = bytearray(body)
    wrong[-1] ^= 1
    page = b"<!DOCTYPE html><html>down for maintenance</html>".ljust(len(body))
    cases = {
        "HTTP 403 Forbidden": 403,
        "HTTP 404 Not Found": 404,
        "HTTP 500 Internal Server Error": 500,
        "sent no HDF5 file but b'<!DOCTYPE html>": (page, len(page)),
        f"broke off after 1,000 of {len(body):,} bytes": (body[:1000], len(body)),
        f"offers 1,000 bytes where D4RL's file has {len(body):,}": (body[:1000], 1000),
        "refused, SHA-256": (bytes(wrong), len(body)),
    }
    folder = home / ".d4rl/datasets"
    for message, answer in cases.items():
        server.answers["host"] = answer
        with pytest.raises(DatasetError, match=re.escape(message)) as refusal:
            datasets.load("hopper-medium-v2")
        text = str(refusal.value)
        assert "/mirror/hopper_medium-v2.hdf5: HTTP 404 Not Found" in text
        assert f"Put hopper_medium-v2.hdf5 into {folder}." in text
        assert not list(folder.iterdir())  # neither the file nor a part of it
    server.answers["mirror"] = body, len(body)  # the host still sends the wrong bytes
    data = datasets.load("hopper-medium-v2")
    assert "/mirror/" in data.provenance["source"]
    assert data.provenance["verified"] is True


def test_part_of_a_killed_download_is_no_dataset(server, home, tmp_path, monkeypatch):
    body = good_file(tmp_path, monkeypatch)
    server.answers["host"] = body, len(body)
    left = home / ".d4rl/datasets/hopper_medium-v2.hdf5.123.part"
    left.parent.mkdir(parents=True)
    left.write_bytes(body[:1000])
    os.utime(left, (0, 0))
    assert len(datasets.load("hopper-medium-v2").obs) == 5
    assert [p.name for p in left.parent.iterdir()] == ["hopper_medium-v2.hdf5"]


def test_no_network_is_one_message_within_five_seconds(home, monkeypatch):
    """Name service that never answers, the slowest way of having no network."""
    released = threading.Event()

    def silent(*_, **__):
        released.wait(30)
        raise OSError("too late to be heard")

    monkeypatch.setattr("socket.getaddrinfo", silent)
    began = time.monotonic()
    with pytest.raises(DatasetError) as refusal:
        datasets.load("halfcheetah-medium-v2")
    assert time.monotonic() - began < 5
    released.set()
    text = str(refusal.value)
    path = "gym_mujoco_v2/halfcheetah_medium-v2.hdf5"
    for part in (
        f"{sources.D4RL_HOST}{path}: no answer within 4 s",
        f"{sources.D4RL_MIRROR}halfcheetah_medium-v2.hdf5: no answer within 4 s",
        f"Put halfcheetah_medium-v2.hdf5 into {home / '.d4rl/datasets'}.",
        "Works offline: --env ",
    ):
        assert part in text


def test_no_network_minari(minari_home, monkeypatch):
    monkeypatch.setattr(sources, "MINARI_HOST", "http://127.0.0.1:9/farama/")  # nobody listens
    with pytest.raises(DatasetError) as refusal:
        datasets.load("mujoco/hopper/medium-v0")
    text = str(refusal.value)
    assert "http://127.0.0.1:9/farama/mujoco: no connection" in text
    assert str(minari_home) in text
    assert "metadata.json and main_data.hdf5" in text


def test_minari_downloads(minari_home, monkeypatch):
    """minari's own download is called, and what it raises becomes part of the one message."""
    import minari

    monkeypatch.setattr(downloads, "probe", lambda urls: dict.fromkeys(urls, ""))
    monkeypatch.setattr(minari, "download_dataset", lambda name, **_: 1 / 0)
    with pytest.raises(
        DatasetError, match="farama-minari/own: ZeroDivisionError: division by zero"
    ):
        datasets.load("own/pendulum/some-v0")
    monkeypatch.setattr(minari, "download_dataset", lambda name, **_: None)
    with pytest.raises(DatasetError, match="came without main_data.hdf5, .arrow"):
        datasets.load("own/pendulum/some-v0")
    monkeypatch.setattr(minari, "download_dataset", lambda name, **_: make_minari(name))
    data = datasets.load("own/pendulum/some-v0")
    assert len(data.start) == 12
    assert data.provenance["source"] == sources.MINARI_HOST + "own"


def test_common_alone_says_where_the_bundled_data_is(home, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BUNDLED", tmp_path / "elsewhere/data")
    monkeypatch.setattr(downloads, "probe", lambda _: pytest.fail("asked the network"))
    with pytest.raises(DatasetError) as refusal:
        datasets.load("stillwater/hopper/medium-replay-v0")
    text = str(refusal.value)
    assert "was not found" in text
    assert str(tmp_path / "elsewhere/data") in text
    assert "--env FILE.hdf5 --env-id" in text
    assert "--env stillwater" not in text


def test_probe_asks_the_proxy_where_there_is_one(server, monkeypatch):
    url = "http://nowhere.invalid/x"
    assert downloads.probe([url])[url].startswith("no connection")
    monkeypatch.setenv("http_proxy", f"127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "")
    assert downloads.probe([url]) == {url: ""}


# --- Cache ---


def same(a, b):
    return all(x.tobytes() == y.tobytes() and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


def test_cache_serves_the_second_load_until_the_file_changes(tmp_path, monkeypatch):
    fields = steps(6)
    path = write(tmp_path / "a.hdf5", fields)
    first = datasets.load(path)
    opened = []
    file = loading.CheckedFile
    monkeypatch.setattr(loading, "CheckedFile", lambda path: opened.append(path) or file(path))
    second = datasets.load(path)
    assert not opened
    assert same(first.transitions(), second.transitions())
    assert second.start.tolist() == first.start.tolist()
    assert second.provenance == first.provenance
    fields["rewards"][2] = 77
    os.utime(write(tmp_path / "a.hdf5", fields), ns=(1, 1))
    assert datasets.load(path).reward[2] == 77
    assert len(opened) == 1
    assert len(list((tmp_path / "cache/stillwater").glob("*/*"))) == 1  # the old one is gone


def test_cache_knows_the_environment_apart(tmp_path):
    fields = steps(4, dim=3)
    path = write(tmp_path / "a.hdf5", fields)
    plain, pendulum = datasets.load(path), datasets.load(path, "Pendulum-v1")
    np.testing.assert_allclose(pendulum.action, plain.action / 2)
    assert datasets.load(path).env_id == ""
    assert datasets.load(path, "Pendulum-v1").env_id


@pytest.mark.parametrize("damage", ["truncated", "pickled", "missing", "short", "not json"])
def test_damaged_cache_is_read_anew(tmp_path, damage):
    path = write(tmp_path / "a.hdf5", steps(6))
    first = datasets.load(path)
    (obs,) = (tmp_path / "cache/stillwater").glob("*/*/obs.npy")
    if damage == "truncated":
        obs.write_bytes(obs.read_bytes()[:-9])
    elif damage == "pickled":
        np.save(obs, np.array([{}] * 6, object), allow_pickle=True)
    elif damage == "missing":
        obs.unlink()
    elif damage == "short":
        np.save(obs, first.obs[:-1])
    else:
        obs.with_name("about.json").write_text("{")
    assert same(datasets.load(path).transitions(), first.transitions())


def test_no_cache_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(datasets.load(write(tmp_path / "a.hdf5", steps(6))).obs) == 6

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(np, "save", full)
    assert len(datasets.load(write(tmp_path / "a.hdf5", steps(6))).obs) == 6
    assert not list((tmp_path / "cache/stillwater").glob("*/*"))


# --- Summary ---


def test_summary_and_picture(tmp_path, capsys):
    fields = steps(6, dim=11, act=3)
    fields["terminals"] = at(6, 2)
    summary.main(write(tmp_path / "a.hdf5", fields), "Hopper-v5", tmp_path / "a.png")
    text = " ".join(capsys.readouterr().out.split())
    for part in ("transitions │ 6", "episodes │ 2", "1 terminal, 1 time limit", "Hopper-v5"):
        assert part in text
    returns = np.array([0 + 1 + 2, 3 + 4 + 5])
    assert f"{returns.mean():.1f} +- {returns.std():.1f}" in text
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
