"""Broken and hostile files: each is refused with one message naming file, field and row."""

import importlib
import json
import pickle
import re
import sys

import h5py
import numpy as np
import pytest

from common import datasets
from common.datasets import DatasetError, checked
from common.datasets import __main__ as summary

N = 6


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))


def good():
    return {
        "observations": np.zeros((N, 3), np.float32),
        "actions": np.zeros((N, 2), np.float32),
        "rewards": np.zeros(N, np.float32),
        "terminals": np.zeros(N, bool),
        "timeouts": np.zeros(N, bool),
        "next_observations": np.zeros((N, 3), np.float32),
    }


def write(path, fields):
    with h5py.File(path, "w") as file:
        for name, values in fields.items():
            file[name] = values
    return path


def refuse(path, *parts):
    """Loading is refused, with one message that names the file and says `parts`."""
    with pytest.raises(DatasetError) as refusal:
        datasets.load(str(path))
    assert refusal.type is DatasetError
    assert issubclass(DatasetError, SystemExit)
    for part in (str(path), *parts):
        assert part in str(refusal.value)
    assert not list(path.parent.glob("cache/stillwater/*/*"))  # nothing of it was kept


def changed(values, index, value):
    values = values.copy()
    values[index] = value
    return values


def test_good_file_loads(tmp_path):
    """What the other tests break is otherwise fine."""
    assert len(datasets.load(str(write(tmp_path / "a.hdf5", good()))).obs) == N


VALUES = {
    "nan obs": (
        "observations",
        lambda v: changed(v, (4, 2), np.nan),
        "row 4, column 2: nan is not",
    ),
    "inf obs": (
        "next_observations",
        lambda v: changed(v, (0, 1), -np.inf),
        "row 0, column 1: -inf",
    ),
    "nan reward": ("rewards", lambda v: changed(v, 3, np.nan), "row 3: nan is not a finite"),
    "too large": ("rewards", lambda v: changed(v.astype("f8"), 5, 1e300), "row 5: 1e+300 is not"),
    "action": ("actions", lambda v: changed(v, (2, 1), 1.01), "row 2, column 1: 1.01"),
    "action nan": ("actions", lambda v: changed(v, (1, 0), np.nan), "row 1, column 0: nan"),
    "flag": ("terminals", lambda v: changed(v.astype("f4"), 2, 0.5), "row 2: 0.5 is neither 0 nor"),
    "bytes": ("rewards", lambda v: np.array([b"1"] * N), "values, not numbers"),
    "strings": ("actions", lambda v: ["a"] * N, "values, not numbers"),
    "complex": ("rewards", lambda v: v.astype(complex), "values, not numbers"),
    "record": ("rewards", lambda v: np.zeros(N, [("x", "f4")]), "values, not numbers"),
    "flat obs": ("observations", lambda v: v[:, 0], "has shape (6,), needs 2 axes"),
    "two rewards": ("rewards", lambda v: np.c_[v, v], "has shape (6, 2), needs 1 axes"),
    "scalar": ("rewards", lambda v: 1.0, "has shape (), needs 1 axes"),
    "null": ("rewards", lambda v: h5py.Empty("f4"), "has shape None"),
    "no columns": ("observations", lambda v: v[:, :0], "has shape (6, 0)"),
    "short": (
        "rewards",
        lambda v: v[:-1],
        "rows differ: observations 6, actions 6, rewards 5",
    ),
    "long next": ("next_observations", lambda v: np.zeros((7, 3)), "next_observations 7"),
    "wide next": ("next_observations", lambda v: np.zeros((N, 4)), "has shape (6, 4), not (6, 3)"),
    "short flags": ("timeouts", lambda v: v[1:], "timeouts 5"),
}


@pytest.mark.parametrize("case", VALUES)
def test_wrong_values(tmp_path, case):
    field, change, message = VALUES[case]
    fields = good()
    fields[field] = change(fields[field])
    refuse(write(tmp_path / "a.hdf5", fields), field, message)


@pytest.mark.parametrize("field", ["observations", "actions", "rewards", "terminals"])
def test_missing_field(tmp_path, field):
    fields = good()
    del fields[field]
    refuse(write(tmp_path / "a.hdf5", fields), f"{field}: missing")


def test_no_rows_and_group_for_array(tmp_path):
    refuse(
        write(tmp_path / "a.hdf5", {k: v[:0] for k, v in good().items()}), "at least one episode"
    )
    fields = good()
    fields["rewards/x"] = fields.pop("rewards")
    refuse(write(tmp_path / "b.hdf5", fields), "rewards: a group, not an array")


def test_not_hdf5(tmp_path):
    for content in (
        b"",
        b"<!DOCTYPE html>",
        b"\x89HDF\r\n\x1a\n",
        b"\x89HDF\r\n\x1a\n" + b"x" * 99,
    ):
        path = tmp_path / "a.hdf5"
        path.write_bytes(content)
        refuse(path)


def test_truncated_at_any_place(tmp_path):
    whole = write(tmp_path / "whole.hdf5", good()).read_bytes()
    path = tmp_path / "a.hdf5"
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        refuse(path)


def test_flipped_bytes_load_or_are_refused(tmp_path):
    """Nothing but a Dataset or a DatasetError comes of a damaged file."""
    rng, path = np.random.default_rng(0), tmp_path / "a.hdf5"
    whole = write(tmp_path / "whole.hdf5", good()).read_bytes()
    refused = 0
    for _ in range(150):
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[rng.integers(0, 4000, 8)] = rng.integers(0, 256, 8)  # where the structure lies
        path.write_bytes(damaged.tobytes())
        try:
            data, message = datasets.load(str(path)), str(path)
        except DatasetError as error:
            data, message = None, str(error)
        assert str(path) in message
        assert data is None or np.isfinite(data.obs).all()
        refused += data is None
    assert refused > 20


class Touch:
    """Unpickling an instance creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickle_under_an_hdf5_name_is_not_unpickled(tmp_path):
    path, mark = tmp_path / "a.hdf5", tmp_path / "mark"
    path.write_bytes(pickle.dumps(Touch(mark)))
    refuse(path, "not an HDF5 file")
    assert not mark.exists()
    pickle.loads(path.read_bytes()).close()
    assert mark.exists()  # the trap works


# --- Ways out of the file ---


SECRET = np.full(N, 7.0, np.float32)  # what would be read if the way out were taken


def external_link(file, folder):
    write(folder / "other.hdf5", {"rewards": SECRET})
    file["rewards"] = h5py.ExternalLink(str(folder / "other.hdf5"), "rewards")


def soft_link(file, folder):
    file["x"] = SECRET
    file["rewards"] = h5py.SoftLink("/x")


def external_storage(file, folder):
    (folder / "raw").write_bytes(SECRET.tobytes())
    file.create_dataset("rewards", (N,), "f4", external=[(str(folder / "raw"), 0, SECRET.nbytes)])


def virtual(file, folder):
    other = write(folder / "other.hdf5", {"rewards": SECRET})
    layout = h5py.VirtualLayout((N,), "f4")
    layout[:] = h5py.VirtualSource(str(other), "rewards", (N,))
    file.create_virtual_dataset("rewards", layout)


@pytest.mark.parametrize(
    ("leave", "message"),
    [
        (external_link, "is an external link"),
        (soft_link, "is a soft link"),
        (external_storage, "its data are in other files"),
        (virtual, "its data are in other files"),
    ],
)
def test_ways_out_of_the_file_are_refused(tmp_path, leave, message):
    fields = good()
    del fields["rewards"]
    path = write(tmp_path / "a.hdf5", fields)
    with h5py.File(path, "a") as file:
        leave(file, tmp_path)
    with h5py.File(path) as file:
        assert file["rewards"][()].tolist() == SECRET.tolist()  # h5py takes it: the trap works
    refuse(path, "rewards", message)


def test_group_behind_a_link_is_refused(tmp_path):
    episode = minari_dataset(tmp_path, "own/x-v0")
    with h5py.File(episode, "a") as file:
        file.move("episode_0", "hidden")
        file["episode_0"] = h5py.SoftLink("/hidden")
    with pytest.raises(DatasetError, match="episode_0/observations: is a soft link"):
        datasets.load("own/x-v0")


@pytest.mark.parametrize("kwargs", [{}, {"chunks": (2**20,), "compression": "gzip"}])
def test_declared_size_is_held_against_the_files(tmp_path, kwargs):
    fields = good()
    del fields["rewards"]
    path = write(tmp_path / "a.hdf5", fields)
    with h5py.File(path, "a") as file:
        file.create_dataset("rewards", (10**12,), "f4", **kwargs)
    assert path.stat().st_size < 20_000
    refuse(path, "rewards: declares 1,000,000,000,000 values")


def test_one_huge_chunk_is_held_against_the_files_size(tmp_path):
    fields = good()
    del fields["rewards"]
    path = write(tmp_path / "a.hdf5", fields)
    with h5py.File(path, "a") as file:
        file.create_dataset("rewards", (N,), "f4", chunks=(2**29,), maxshape=(None,))
    refuse(path, "rewards: declares 6 values, 2,147,483,648 bytes")


def test_many_names_of_one_array_are_held_against_the_memory(tmp_path, monkeypatch):
    path = minari_dataset(tmp_path, "own/x-v0")
    with h5py.File(path, "a") as file:
        for i in range(1, 100):
            file[f"episode_{i}"] = file["episode_0"]
    assert len(datasets.load("own/x-v0").start) == 100
    monkeypatch.setattr(checked, "MEMORY", 3000)
    path.touch()
    with pytest.raises(DatasetError, match=r"episode_\d+/\w+: declares"):
        datasets.load("own/x-v0")


def test_compressed_constants_are_no_bomb(tmp_path):
    """A million zeros in two kilobytes are fine."""
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for name, values in good().items():
            shape = (100_000, *values.shape[1:])
            file.create_dataset(name, data=np.zeros(shape, values.dtype), compression="gzip")
    assert len(datasets.load(str(tmp_path / "a.hdf5")).obs) == 100_000


# --- Minari's layout ---


def minari_dataset(tmp_path, name, metadata="{}", **changes):
    """A dataset of one episode under MINARI_DATASETS_PATH; returns its HDF5 file."""
    data = tmp_path / "minari" / name / "data"
    data.mkdir(parents=True)
    episode = {
        "observations": np.zeros((N + 1, 3)), "actions": np.zeros((N, 1)), "rewards": np.zeros(N),
        "terminations": np.zeros(N, bool), "truncations": np.arange(N) == N - 1,
    }  # fmt: skip
    fields = {f"episode_0/{k}": v for k, v in (episode | changes).items() if v is not None}
    (data / "metadata.json").write_text(metadata)
    return write(data / "main_data.hdf5", fields)


EPISODES = {
    "numbers of rows differ: episode_0/observations - 1 5": {"observations": np.zeros((N, 3))},
    "episode_0/actions: no rows": {
        "observations": np.zeros((1, 3)), "actions": np.zeros((0, 1)), "rewards": np.zeros(0),
        "terminations": np.zeros(0, bool), "truncations": np.zeros(0, bool),
    },
    "episode_0/rewards: missing": {"rewards": None},
    "episode_0/rewards: row 2: nan": {"rewards": changed(np.zeros(N), 2, np.nan)},
    "episode_0/actions: row 5, column 0: -1.5": {"actions": changed(np.zeros((N, 1)), 5, -1.5)},
    "episode_0/actions: has shape (6,)": {"actions": np.zeros(N)},
    "episode_0/actions: row 2: -1 is not one": {"actions": changed(np.zeros(N, int), 2, -1)},
    "episode_0/actions: row 2: 1024 is not one": {"actions": changed(np.zeros(N, int), 2, 1024)},
}  # fmt: skip


@pytest.mark.parametrize("message", EPISODES)
def test_wrong_episodes(tmp_path, message):
    path = minari_dataset(tmp_path, "own/x-v0", **EPISODES[message])
    with pytest.raises(DatasetError, match=re.escape(message)) as refusal:
        datasets.load("own/x-v0")
    assert str(path) in str(refusal.value)


def test_wrong_sets_of_episodes(tmp_path):
    path = minari_dataset(tmp_path, "own/x-v0")
    with h5py.File(path, "a") as file:
        file.copy("episode_0", "episode_1")
        del file["episode_1/observations"]
        file["episode_1/observations"] = np.zeros((N + 1, 4))
    with pytest.raises(DatasetError, match="episode_1/observations: 4 columns, not 3"):
        datasets.load("own/x-v0")
    with h5py.File(path, "w") as file:
        file["other"] = 1
    with pytest.raises(DatasetError, match="at least one episode"):
        datasets.load("own/x-v0")


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, "\xff\xfe", "null"])
def test_metadata_that_is_no_object(tmp_path, text):
    minari_dataset(tmp_path, "own/x-v0", text)
    with pytest.raises(DatasetError, match=r"metadata\.json: not readable as JSON"):
        datasets.load("own/x-v0")


@pytest.mark.parametrize(
    "spec", [None, 3, "", "{", "[]", "{}", '{"id": 3}', '{"id": {"a": []}}', {"id": None}]
)
def test_unusable_env_spec_only_costs_the_score(tmp_path, spec):
    minari_dataset(tmp_path, "own/x-v0", json.dumps({"env_spec": spec}))
    data = datasets.load("own/x-v0")
    assert data.env_id == ""
    assert len(data.obs) == N
    assert data.ref_min is None


def test_metadata_runs_no_code(tmp_path, monkeypatch):
    """Neither an entry point nor a "module:Env-v0" of the metadata is imported or called."""
    mark = tmp_path / "mark"
    (tmp_path / "hostile_module.py").write_text(
        f"open({str(mark)!r}, 'w').close()\ndef run(**kwargs): open({str(mark)!r}, 'w').close()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for i, env_id in enumerate(("Pendulum-v1", "hostile_module:Evil-v0", "Evil-v0")):
        spec = {"id": env_id, "entry_point": "hostile_module:run", "kwargs": {}}
        wrapper = {"name": "OrderEnforcing", "entry_point": "hostile_module:run"}
        spec |= {"additional_wrappers": [wrapper]}
        metadata = {"env_spec": json.dumps(spec), "eval_env_spec": json.dumps(spec)}
        metadata |= {"observation_space": "hostile_module", "stillwater": "!!python/object"}
        minari_dataset(tmp_path, f"own/x-v{i}", json.dumps(metadata))
        data = datasets.load(f"own/x-v{i}")
        assert data.env_id == ("Pendulum-v1" if i == 0 else "")
        assert not mark.exists()
        assert "hostile_module" not in sys.modules
    importlib.import_module("hostile_module")
    assert mark.exists()  # the trap works
    sys.modules.pop("hostile_module")


def test_control_characters_of_metadata_stay_out_of_the_terminal(tmp_path, capsys):
    minari_dataset(tmp_path, "own/x-v0", json.dumps({"description": "a\x1b[2Jb [red]c[/red]"}))
    summary.main("own/x-v0")
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "[red]c[/red]" in out


def test_a_command_ends_with_one_message_and_code_1(tmp_path):
    import subprocess

    fields = good()
    fields["rewards"] = changed(fields["rewards"], 3, np.nan)
    path = write(tmp_path / "a.hdf5", fields)
    root = checked.Path(checked.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "common.datasets", str(path)],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"{path}: rewards: row 3: nan is not a finite float32\n"
