"""Bad input by the real command line: exit code, one message, no traceback, nothing written.

Each case is a command of an algorithm, as a user types it. It runs in this process, by runpy, which
takes milliseconds; the last tests show that a process of its own ends the same.
"""

import contextlib
import hashlib
import http.server
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from commands import run

from common.datasets import checked, downloads, sources

ROOT = Path(__file__).parents[2]
N = 60  # rows of the whole files, in episodes of 20
CODE = "raise SystemExit('code of the file was run')"


def fields(n=N, obs=11, act=3):
    """Rows for Hopper-v5 in D4RL's layout, a time limit after every 20th; no terminal at all."""
    rng = np.random.default_rng(0)
    track = rng.normal(size=(n + 1, obs)).astype(np.float32)
    return {
        "observations": track[:-1],
        "actions": rng.uniform(-1, 1, (n, act)).astype(np.float32),
        "rewards": rng.normal(size=n).astype(np.float32),
        "terminals": np.zeros(n, bool),
        "timeouts": np.arange(n) % 20 == 19,
        "next_observations": track[1:],
    }


def write(path, fields):
    with h5py.File(path, "w") as file:
        for name, values in fields.items():
            if values is not None:
                file[name] = values


def tree(folder):
    """{path: bytes} of all that is in a folder, hidden files too; of a link where it leads.

    But for the programs that JAX compiled: they are kept whatever becomes of the command."""
    found = {}
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name != "programs"]
        for name in (*folders, *files):
            path = Path(place, name)
            plain = path.is_file() and not path.is_symlink()
            found[path] = path.read_bytes() if plain else path.is_dir()
    return found


TINY = "--num-updates 4 --eval-every 2 --eval-episodes 1 --batch-size 8 --widths 8".split()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The working folder of all cases: whole files, their cache filled, and a run on data without
    any terminal, which is welcome."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MINARI_DATASETS_PATH", "HTTP_PROXY", "http_proxy"):
            patch.delenv(name, raising=False)
        patch.setenv("HOME", str(folder / "home"))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("D4RL_DATASET_DIR", str(folder / "d4rl"))
        patch.chdir(folder)
        for name in ("home", "d4rl", "case", "runs"):
            (folder / name).mkdir()
        write("good.hdf5", fields())
        write("single.hdf5", fields() | {"timeouts": np.ones(N, bool)})
        write("plain.hdf5", fields(obs=3, act=1))
        ends = {"terminals": np.ones(N, bool), "next_observations": None}
        write("ends.hdf5", fields() | ends)
        from common import datasets

        with contextlib.redirect_stderr(io.StringIO()):
            for name in ("good.hdf5", "single.hdf5", "ends.hdf5"):
                datasets.load(name, "Hopper-v5")
                datasets.load(name)
        datasets.load("plain.hdf5")
        code, _, err = run("iql", *TINY, "--env", "good.hdf5", "--env-id", "Hopper-v5")
        assert code == 0, err
        yield folder


@pytest.fixture(autouse=True)
def case(world):
    """The folder for the files of one case, empty before and after."""
    yield world / "case"
    shutil.rmtree(world / "case")
    (world / "case").mkdir()


def refuse(world, script, words, message, code=1, lines=1, quiet=True):
    """The command fails with one message that says `message`, in time, and writes nothing."""
    before, began = tree(world), time.process_time()  # not the clock's: the machine may be busy
    found, out, err = run(script, *words)
    assert time.process_time() - began < 30
    assert found == code, (found, out, err)
    for part in message:
        assert part in err, err
    assert "Traceback" not in out + err
    assert out == "" or not quiet
    if lines:
        assert len(err.splitlines()) == lines, err
    after = tree(world)
    assert after.keys() == before.keys()
    assert all(after[path] == before[path] for path in before)


# --- Datasets: each case makes case/a.hdf5 and is told what the message says ---


def changed(field, index, value, kind=None):
    """The whole file with one value changed."""

    def make(path):
        rows = fields()
        values = rows[field].astype(kind) if kind else rows[field].copy()
        values[index] = value
        write(path, rows | {field: values})

    return make


def replaced(**others):
    """The whole file with fields replaced, or left out where None."""
    return lambda path: write(path, fields() | others)


def edited(edit):
    """The whole file without rewards, then edit(h5py.File, folder)."""

    def make(path):
        write(path, fields() | {"rewards": None})
        write(path.with_name("other.hdf5"), fields())
        with h5py.File(path, "a") as file:
            edit(file, path.parent)

    return make


def truncated(share):
    def make(path):
        write(path, fields())
        raw = path.read_bytes()
        path.write_bytes(raw[: int(share * len(raw))])

    return make


class Trap:
    """Unpickled, it makes a file."""

    def __reduce__(self):
        return open, ("case/mark", "w")


def external_storage(file, folder):
    (folder / "raw").write_bytes(bytes(4 * N))
    file.create_dataset("rewards", (N,), "f4", external=[(str(folder / "raw"), 0, 4 * N)])


def virtual(file, folder):
    layout = h5py.VirtualLayout((N,), "f4")
    layout[:] = h5py.VirtualSource(str(folder / "other.hdf5"), "rewards", (N,))
    file.create_virtual_dataset("rewards", layout)


def twice_packed(file, folder):
    """gzip in gzip, which makes a million zeros of a byte."""
    how = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    how.set_chunk((N,))
    how.set_deflate(9)
    how.set_filter(h5py.h5z.FILTER_DEFLATE, 0, (9,))
    space = h5py.h5s.create_simple((N,))
    h5py.h5d.create(file.id, b"rewards", h5py.h5t.IEEE_F32LE, space, how)


DATASETS = {
    "empty file": (lambda path: path.write_bytes(b""), "not an HDF5 file"),
    "signature alone": (lambda path: path.write_bytes(checked.MAGIC), "cannot be opened"),
    "truncated to a half": (truncated(0.5), "cannot be opened"),
    "truncated by a tenth": (truncated(0.9), "cannot be opened"),
    "a web page": (lambda path: path.write_text("<!DOCTYPE html>"), "begins with b'<!DOCTYP'"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps(Trap())), "not an HDF5 file"),
    "a folder": (Path.mkdir, "a folder, not a file"),
    "no rows": (
        lambda path: write(path, {k: v[:0] for k, v in fields().items()}),
        "observations: no rows: at least one episode",
    ),
    "no rewards": (replaced(rewards=None), "rewards: missing"),
    "shape, flat observations": (
        replaced(observations=np.zeros(N, "f4")), "observations: has shape (60,), needs 2 axes",
    ),
    "shape, rewards in columns": (
        replaced(rewards=np.zeros((N, 2), "f4")), "rewards: has shape (60, 2), needs 1 axes",
    ),
    "shape, a row less": (replaced(rewards=np.zeros(N - 1, "f4")), "rewards 59"),
    "shape, next_observations": (
        replaced(next_observations=np.zeros((N, 4), "f4")), "next_observations: 4 columns where",
    ),
    "dtype, text": (replaced(actions=["left"] * N), "actions: holds object values, not numbers"),
    "dtype, complex": (replaced(rewards=np.zeros(N, complex)), "complex128 values, not numbers"),
    "dtype, records": (replaced(rewards=np.zeros(N, [("x", "f4")])), "rewards: holds"),
    "nan in row 41": (
        changed("observations", ([41, 50], 2), np.nan),
        "observations: row 41, column 2: nan is not a finite float32",
    ),
    "inf in row 7": (
        changed("next_observations", (7, 10), np.inf), "row 7, column 10: inf is not a finite",
    ),
    "nan reward in row 59": (changed("rewards", 59, np.nan), "rewards: row 59: nan is not"),
    "reward beyond float32": (changed("rewards", 3, 1e300, "f8"), "rewards: row 3: 1e+300 is not"),
    "action out of range": (
        changed("actions", ([20, 30], 1), -1.5),
        "actions: row 20, column 1: -1.5 is not within the action's bounds -1 and 1 of Hopper-v5",
    ),
    "a flag of a half": (changed("terminals", 5, 0.5, "f4"), "row 5: 0.5 is neither 0 nor 1"),
    "declared beyond memory": (
        edited(lambda file, _: file.create_dataset("rewards", (10**12,), "f4")),
        "rewards: declares 1,000,000,000,000 values",
    ),
    "declared beyond memory, packed": (
        edited(lambda f, _: f.create_dataset("rewards", (10**12,), "f4", compression="gzip")),
        "rewards: declares 1,000,000,000,000 values",
    ),
    "packed twice": (edited(twice_packed), "rewards: is packed by gzip, gzip"),
    "external link": (
        edited(lambda file, folder: file.update(
            rewards=h5py.ExternalLink(str(folder / "other.hdf5"), "rewards"))),
        "rewards: is an external link, which is not followed",
    ),
    "soft link": (
        edited(lambda file, _: file.update(rewards=h5py.SoftLink("/timeouts"))),
        "rewards: is a soft link, which is not followed",
    ),
    "external storage": (edited(external_storage), "rewards: its data are in other files"),
    "virtual dataset": (edited(virtual), "rewards: its data are in other files"),
}  # fmt: skip


@pytest.mark.parametrize("name", DATASETS)
def test_datasets(world, case, name):
    make, message = DATASETS[name]
    path = case / "a.hdf5"
    make(path)
    refuse(world, "iql", ["--env", path, "--env-id", "Hopper-v5"], [str(path), message])
    assert not (case / "mark").exists()


NAMES = {
    "missing file": (["--env", "nowhere.hdf5"], ["nowhere.hdf5: no such file", "--env "]),
    "a name that is none": (["--env", "hopper-midium-v2"], ["Did you mean hopper-medium-v2"]),
    "a path that is none": (["--env", "../../etc/passwd-v0"], ["unknown dataset '../../etc"]),
    "a name too long": (["--env", "a" * 5000 + ".hdf5"], ["cannot be read: File name too long"]),
    "home of nobody": (["--env", "~nobody-here/a.hdf5"], ["no such file"]),
    "no name": (["--env", ""], ["unknown dataset ''"]),
    "unknown env id": (
        ["--env", "good.hdf5", "--env-id", "Hoper-v5"],
        ["unknown environment 'Hoper-v5'", "Did you mean Hopper-v5"],
    ),
    "env id of a module": (
        ["--env", "good.hdf5", "--env-id", "case.evil:Evil-v0"],
        ["unknown environment 'case.evil:Evil-v0'"],
    ),
    "env id without vectors": (
        ["--env", "good.hdf5", "--env-id", "FrozenLake-v1"],
        ["observations must be vectors and actions vectors or discrete"],
    ),
    "env id of other observations": (
        ["--env", "good.hdf5", "--env-id", "HalfCheetah-v5"],
        ["observations: 11 columns where HalfCheetah-v5 has 17"],
    ),
    "env id of other actions": (
        ["--env", "plain.hdf5", "--env-id", "MountainCarContinuous-v0"],
        ["plain.hdf5", "3 columns where MountainCarContinuous-v0 has 2"],
    ),
    "env id of a name that has its own": (
        ["--env", "hopper-medium-v2", "--env-id", "Hopper-v5"],
        ["hopper-medium-v2 is scored on Hopper-v4", "--env-id Hopper-v5 is for a bare file"],
    ),
    "no env id": (["--env", "good.hdf5"], ["no environment to score on", "--env-id"]),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_and_environments(world, case, name):
    (case / "evil.py").write_text(CODE)
    words, message = NAMES[name]
    refuse(world, "iql", words, message)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_no_permission(world, case):
    shutil.copy("good.hdf5", case / "a.hdf5")
    (case / "a.hdf5").chmod(0)
    try:
        code, _, err = run("iql", "--env", case / "a.hdf5", "--env-id", "Hopper-v5")
    finally:
        (case / "a.hdf5").chmod(0o600)
    assert code == 1 and "Permission denied" in err and "Traceback" not in err


def minari(case, metadata):
    """A dataset of one episode that names an environment; its --env."""
    folder = case / "minari/own/x-v0/data"
    folder.mkdir(parents=True)
    rows = fields(5, 3, 1)
    rows["observations"] = np.zeros((6, 3), "f4")
    names = dict(zip(("terminals", "timeouts"), ("terminations", "truncations"), strict=True))
    del rows["next_observations"]
    episode = {f"episode_0/{names.get(k, k)}": v for k, v in rows.items()}
    write(folder / "main_data.hdf5", episode)
    (folder / "metadata.json").write_text(metadata)
    return "own/x-v0"


def evil(env_id):
    spec = {"id": env_id, "entry_point": "evil:run", "kwargs": {}}
    spec["additional_wrappers"] = [{"name": "x", "entry_point": "evil:run", "kwargs": None}]
    return json.dumps({"env_spec": json.dumps(spec)})


METADATA = {
    "code in the metadata's entry point": (evil("Evil-v0"), "no environment to score on"),
    "code in the metadata's id": (evil("evil:Evil-v0"), "no environment to score on"),
    "metadata that are no JSON": ("{", "metadata.json: not readable as JSON metadata"),
    "metadata without an end": ("[" * 100_000, "metadata.json: not readable as JSON metadata"),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata(world, case, name, monkeypatch):
    metadata, message = METADATA[name]
    (case / "evil.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(case))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(case / "minari"))
    env = minari(case, metadata)
    lines = 2 if "code" in name else 1  # what is wrong with the environment comes first
    monkeypatch.setenv("XDG_CACHE_HOME", str(ROOT / "README.md"))  # no cache: the data are good
    refuse(world, "iql", ["--env", env], [message], lines=lines)
    assert "evil" not in sys.modules


# --- Downloads, from a server of our own ---


class Answers(http.server.BaseHTTPRequestHandler):
    """server.answer: a status; or (body, length told), sent as it is or a byte at a time."""

    def do_GET(self):
        if isinstance(self.server.answer, int):
            return self.send_error(self.server.answer)
        body, length, pause = self.server.answer
        self.send_response(200)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        with contextlib.suppress(OSError):  # it hangs up
            for i in range(0, len(body), 1 if pause else len(body) or 1):
                self.wfile.write(body[i : i + 1] if pause else body)
                self.server.done.wait(pause)

    def log_message(self, *_):
        pass


BODY = checked.MAGIC + bytes(range(256)) * 40
PAGE = b"<!DOCTYPE html><html>Down for maintenance.</html>".ljust(len(BODY))
DOWNLOADS = {
    "403": (403, "HTTP 403 Forbidden"),
    "404": (404, "HTTP 404 Not Found"),
    "500": (500, "HTTP 500 Internal Server Error"),
    "a page of HTML": ((PAGE, len(PAGE), 0), "sent no HDF5 file but b'<!DOCTYPE html>"),
    "cut in the middle": ((BODY[:5000], len(BODY), 0), "broke off after 5,000 of 10,248 bytes"),
    "nothing": ((b"", 0, 0), "offers 0 bytes where D4RL's file has"),
    "another size": ((BODY[:5000], 5000, 0), "offers 5,000 bytes where D4RL's file has 10,248"),
    "a wrong hash": ((BODY[:-1] + b"x", len(BODY), 0), "refused, SHA-256"),
    "no length, too long": ((BODY + b"x", None, 0), "sends more than 10,248 bytes"),
    "silent": ((BODY[:100], len(BODY), 60), "sends less than 1,024 bytes a second"),
    "slow": ((BODY, len(BODY), 0.02), "sends less than 1,024 bytes a second"),
}


@pytest.fixture
def server(monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.done = threading.Event()
        address = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(sources, "D4RL_HOST", address)
        monkeypatch.setattr(sources, "D4RL_MIRROR", address + "mirror/")
        monkeypatch.setattr(downloads, "STALL", 0.5)
        known = sources.d4rl_names()["hopper-medium-v2"]
        sha256 = hashlib.sha256(BODY).hexdigest()
        known = known._replace(size=len(BODY), sha256=sha256)
        monkeypatch.setitem(sources.d4rl_names(), "hopper-medium-v2", known)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.done.set()
        server.shutdown()


@pytest.mark.parametrize("name", DOWNLOADS)
def test_downloads(world, server, name):
    server.answer, message = DOWNLOADS[name]
    parts = ["hopper-medium-v2 was not found", f"/hopper_medium-v2.hdf5: {message}"]
    parts += [f"/mirror/hopper_medium-v2.hdf5: {message}", "Put hopper_medium-v2.hdf5 into"]
    began = time.monotonic()
    refuse(world, "iql", ["--env", "hopper-medium-v2"], [*parts, "Works offline: --env"], lines=7)
    assert time.monotonic() - began < 30


def test_a_local_file_with_a_wrong_hash_is_named(world, case, monkeypatch):
    """The user put it there, so it is used, but never as D4RL's: see test_datasets.py."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(case))
    monkeypatch.setenv("XDG_CACHE_HOME", str(ROOT / "README.md"))  # no cache: the data are good
    shutil.copy("good.hdf5", case / "hopper_medium-v2.hdf5")
    words, message = ["--env", "hopper-medium-v2"], "is not D4RL's file: SHA-256"
    refuse(world, "iql", words, [message, "--batch-size 256"], lines=2)


# --- Flags ---

GOOD = ["--env", "good.hdf5", "--env-id", "Hopper-v5"]
SMALL = {
    "iql": "--batch-size 8",
    "bc": "--batch-size 8",
    "dt": "--batch-size 8",
    "diffuser": "--batch-size 8 --horizon 8",
    "combo": "--batch-size 8",
    **dict.fromkeys(("mopo", "mobile"), "--batch-size 8 --real-fraction 0.5"),
}
FLAGS = {
    # of the kind that a number must be
    "iql --lr -0.001": "--lr -0.001: must be above 0",
    "iql --lr 0": "--lr 0.0: must be above 0",
    "iql --lr nan": "--lr nan: must be above 0",
    "iql --lr inf": "--lr inf: must be above 0",
    "cql --actor-lr -1": "--actor-lr -1.0: must be above 0",
    "combo --model-lr nan": "--model-lr nan: must be above 0",
    "mopo --penalty-scale -1": "--penalty-scale -1.0: must be at least 0",
    "mobile --temperature 2": "--temperature 2.0: must be at least 0 and at most 1",
    "iql --gamma 2": "--gamma 2.0: must be between 0 and 1",
    "iql --gamma nan": "--gamma nan: must be between 0 and 1",
    "iql --gamma -0.1": "--gamma -0.1: must be between 0 and 1",
    "iql --polyak 1.5": "--polyak 1.5: must be between 0 and 1",
    "iql --tau 1.2": "--tau 1.2: must be above 0 and below 1",
    "iql --beta nan": "--beta nan: must be at least 0",
    "iql --max-weight -1": "--max-weight -1.0: must be above 0",
    "iql --shift-reward inf": "--shift-reward inf: must be a finite number",
    "iql --batch-size 0": "--batch-size 0: must be from 1",
    "iql --batch-size -8": "--batch-size -8: must be from 1",
    "iql --widths 0": "--widths 0: must be from 1",
    "iql --widths 8 -8": "--widths -8: must be from 1",
    "iql --widths": "--widths: needs at least one value",
    "iql --widths 1000000000": "--widths 1000000000: must be from 1 to 16,384",
    "iql --num-seeds 0": "--num-seeds 0: must be from 1",
    "iql --num-seeds 1000000000": "--num-seeds 1000000000: must be from 1 to 1,000",
    "iql --seed -1": "--seed -1: must be from 0",
    "iql --seed 4294967296": "--seed 4294967296: must be from 0 to 2,147,483,647",
    "iql --seed 2147483647 --num-seeds 2": "the last seed must be 2,147,483,647 or less",
    "iql --num-updates 0": "--num-updates 0: must be from 1",
    "iql --num-updates 100000000000000000000": "--num-updates 100000000000000000000: must be from",
    "iql --eval-every 1000000000 --num-updates 1000000000": "must be from 1 to 10,000,000",
    "iql --eval-episodes -1": "--eval-episodes -1: must be from 0",
    "iql --eval-episodes 1000000000": "must be from 0 to 10,000",
    "awac --num-samples 0": "--num-samples 0: must be from 1",
    "cql --alpha -5": "--alpha -5.0: must be at least 0",
    "cql --num-actions 0": "--num-actions 0: must be from 1",
    "cql --lagrange nan": "--lagrange nan: must be a finite number",
    "dt --dropout 1": "--dropout 1.0: must be at least 0 and below 1",
    "dt --targets nan": "--targets nan: must be a finite number",
    "dt --targets": "--targets: needs at least one value",
    "dt --rtg-scale 0": "--rtg-scale 0.0: must be above 0",
    "dt --context 0": "--context 0: must be from 1",
    "dt --layers 0": "--layers 0: must be from 1",
    "diffuser --multiples": "--multiples: needs at least one value",
    "diffuser --ema 1.1": "--ema 1.1: must be at least 0 and at most 1",
    "diffuser --return-scale -1": "--return-scale -1.0: must be above 0",
    "diffuser --diffusion-steps 0": "--diffusion-steps 0: must be from 1",
    "diffuser --plan-every -1": "--plan-every -1: must be at least 0",
    "bc --fraction 0": "--fraction 0.0: must be above 0 and at most 1",
    "bc --fraction 1.01": "--fraction 1.01: must be above 0 and at most 1",
    # that contradict each other
    "iql --num-updates 100 --eval-every 30": "the nearest are 90 and 120",
    "dt --heads 3 --width 128": "--heads 3: must divide --width 128",
    "dt --targets 3 2 1 --eval-episodes 2": "--targets: 3 of them need as many --eval-episodes",
    "combo --num-elites 8 --num-members 7": "--num-elites must divide --rollout-batch, and be at",
    "combo --num-elites 7": "--num-elites must divide --rollout-batch",
    "combo --real-fraction 1": "--real-fraction 1.0: must be above 0 and below 1",
    "combo --real-fraction 0.01": "must leave rows of the data and of the model",
    "mopo --real-fraction 0.05": "must leave rows of the data and of the model",
    "combo --model-widths 8": "--model-decay needs one value more than --model-widths",
    "combo --rollout-every 300 --eval-every 1000": "--log-every 1000, --rollout-every 300: one",
    "combo --retain 10000 --rollout-batch 1000000": "50,000,000,000 rows are too many",
    "diffuser --horizon 6": "--horizon 6: must be a multiple of 8",
    "diffuser --width 12": "--width must be a multiple of 8",
    "diffuser --plan-every 9": "--plan-every 9: a plan has only 8 steps",
    "diffuser --ddim-steps 21": "nor that --diffusion-steps",
    "diffuser --warm-start 6 --ddim-steps 5": "--warm-start must not exceed --ddim-steps",
    # that contradict the data
    "iql --batch-size 61": "--batch-size 61: good.hdf5 has only 60 transitions",
    "combo --batch-size 61": "--batch-size 61: good.hdf5 has only 60 transitions",
    "dt --context 21": "--context 21: the longest episode of good.hdf5 has 20 steps",
    "diffuser --horizon 24": "--horizon 24: the longest episode of good.hdf5 has 20 steps",
    "dt --env single.hdf5 --context 2": "the longest episode of single.hdf5 has 1 steps",
    "diffuser --env single.hdf5": "--horizon 8: the longest episode of single.hdf5 has 1 steps",
    "diffuser --goal True": "--goal: good.hdf5 is no maze",
    "bc --fraction 0.3": "--fraction 0.3 of 3 episodes is none",
    "bc --fraction 0.4 --batch-size 21": "leaves 20 transitions, fewer than --batch-size 21",
    "combo --env ends.hdf5": "ends.hdf5: a model needs 5 rows whose next_obs is known",
}


@pytest.mark.parametrize("line", FLAGS)
def test_flags(world, line):
    script, *words = line.split()
    good = GOOD[2:] if "--env" in words else GOOD
    words = [*good, *SMALL.get(script, "--batch-size 8").split(), *words]
    lines = 2 if "ends.hdf5" in line else 1  # the note on its rows comes first
    refuse(world, script, words, [FLAGS[line]], lines=lines)


@pytest.mark.parametrize(
    "words", ["--gama 0.9", "--batch-size many", "--lr", "--widths 8.5", "--batch-size 1e3"]
)
def test_flags_that_are_none(world, words):
    """Refused by the command line's own parser, in a box that points at --help."""
    refuse(world, "iql", words.split(), [words.split()[0], "--help"], code=2, lines=0)


def test_an_output_folder_that_is_a_file(world):
    refuse(world, "iql", [*GOOD, "--batch-size", "8", "--out", "good.hdf5"], ["Cannot use", "good"])


# --- Resuming ---


def rewrite(name, change):
    """change(text) -> text of a file of the run; an object of JSON in place."""

    def edit(folder):
        path = folder / name
        text = path.read_text()
        if path.suffix == ".json":
            content = json.loads(text)
            text = json.dumps(change(content) or content)
        else:
            text = change(text)
        path.write_text(text)

    return edit


def option(**values):
    return rewrite("config.json", lambda info: info["config"].update(values))


def cut(*names):
    def edit(folder):
        for name in names:
            raw = (folder / name).read_bytes()
            (folder / name).write_bytes(raw[: len(raw) // 2])

    return edit


STATES = "checkpoint/state.msgpack", "checkpoint.old/state.msgpack"
RESUMES = {
    "no folder": (shutil.rmtree, "is not a run folder: config.json: No such file"),
    "an empty folder": (
        lambda run: (shutil.rmtree(run), run.mkdir()), "is not a run folder: config.json: No such",
    ),
    "config.json cut": (cut("config.json"), "config.json is damaged"),
    "config.json of another algorithm": (
        rewrite("config.json", lambda info: info.update(algorithm="cql")), "is a run of cql, not",
    ),
    "config.json of no algorithm": (
        rewrite("config.json", lambda info: info.update(algorithm="../x")), "is a run of ../x, not",
    ),
    "an unknown option": (option(bogus=1), "has options unknown to this program: bogus"),
    "a text for a number": (option(lr="fast"), "config.json is damaged: lr is 'fast'"),
    "a number for a list": (option(widths=8), "config.json is damaged: widths is 8"),
    "null for a number": (option(batch_size=None), "config.json is damaged: batch_size is None"),
    "an impossible number": (option(gamma=2.0), "--gamma 2.0: must be between 0 and 1"),
    "a negative number": (option(batch_size=-1), "--batch-size -1: must be from 1"),
    "other data": (
        rewrite("config.json", lambda info: info["dataset"].update(sha256="0")), "is not the data",
    ),
    "other sizes": (rewrite("config.json", lambda info: info.update(dims=[60, 11, 4])), "not the"),
    "other widths": (option(widths=[9]), "The checkpoint does not fit this program"),
    "metrics.csv cut": (cut("metrics.csv"), "returns.json"),
    "metrics.csv without a row": (
        rewrite("metrics.csv", lambda text: "\n".join(text.splitlines()[:-1])),
        "not 2 whole rows up to step 4",
    ),
    "metrics.csv with words": (
        rewrite("metrics.csv", lambda text: text.replace("\n2,0,", "\n2,zero,")),
        "could not convert string to float: 'zero'",
    ),
    "metrics.csv empty": (rewrite("metrics.csv", lambda _: ""), "returns.json"),
    "metrics.csv gone": (lambda run: (run / "metrics.csv").unlink(), "metrics.csv is missing"),
    "returns.json cut": (cut("returns.json"), "returns.json"),
    "returns.json of another kind": (
        rewrite("returns.json", lambda _: [1, 2]), "returns.json",
    ),
    "returns.json with words": (
        rewrite("returns.json", lambda returns: returns.update({"2": "many"})), "is damaged",
    ),
    "both checkpoints cut": (cut(*STATES), "No intact checkpoint is left"),
    "both checkpoints' notes cut": (
        cut("checkpoint/checkpoint.json", "checkpoint.old/checkpoint.json"), "No intact checkpoint",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RESUMES)
def test_resuming(world, case, name):
    edit, message = RESUMES[name]
    (found,) = world.glob("runs/iql/*/*")
    shutil.copytree(found, case / "run")
    edit(case / "run")
    words, where = ["--resume", case / "run"], str(case / "run")
    if name == "other widths":  # found when nothing but the numbers is at hand
        where = "float32[1, 8], not float32[1, 9]"
    lines = 3 if name.startswith("both") else 1
    quiet = name != "other widths"
    refuse(world, "iql", words, [where, message], lines=lines, quiet=quiet)


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("cql", "", "is a run of iql, not of cql"),
        ("iql", "--gamma 0.9", "--gamma 0.9 conflicts with the resumed run's 0.99"),
        ("iql", "--batch-size 256", "--batch-size 256 conflicts with the resumed run's 8"),
        ("iql", "--env single.hdf5", "single.hdf5 is not the data that"),
        ("iql", "--env good.hdf5 --env good.hdf5", "good.hdf5: is joined twice"),
    ],
)  # fmt: skip
def test_resuming_with_flags(world, script, words, message):
    (found,) = world.glob("runs/iql/*/*")
    refuse(world, script, ["--resume", found, *words.split()], [message])


# --- What is welcome ---


@pytest.mark.parametrize(
    ("script", "env", "words"),
    [
        ("iql", "ends.hdf5", "--widths 8"),  # all of them one step and terminal, next_obs unknown
        ("dt", "single.hdf5", "--context 1 --layers 1 --width 8"),
        ("combo", "single.hdf5",
         "--widths 8 --model-widths 8 --model-decay 0 0 --max-epochs 1 --rollout-batch 10"),
    ],
)  # fmt: skip
def test_these_are_no_errors(case, script, env, words):
    words = [*TINY[:8], "--env", env, "--env-id", "Hopper-v5", *words.split()]
    code, _, err = run(script, *words, "--out", case / "runs")
    assert code == 0, err
    (path,) = case.glob("runs/*/*/*/metrics.csv")
    rows = [line.split(",") for line in path.read_text().splitlines()[1:]]
    assert len(rows) == 2 and np.isfinite(np.array(rows, float)).all()


# --- The same in a process of its own ---


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("iql", "--env nowhere.hdf5"),
        ("dt", "--env good.hdf5 --env-id Hopper-v5 --context 21 --batch-size 8"),
        ("iql", "--env good.hdf5 --env-id Hopper-v5 --lr nan"),
        ("iql", "--gama 0.9"),
    ],
)
def test_a_process_ends_as_it_does_here(world, script, words):
    before = tree(world)
    line = [sys.executable, ROOT / f"algorithms/{script}.py", *words.split()]
    done = subprocess.run(line, capture_output=True, text=True, cwd=world)
    code, out, err = run(script, *words.split())
    assert done.returncode == code > 0
    assert bare(done.stdout) == bare(out) and bare(done.stderr) == bare(err)
    assert tree(world) == before


def bare(text):
    """Without the frame that the parser draws, as wide as a terminal, and its colours."""
    return " ".join(re.sub(r"\x1b\[[\d;]*m|[─│╭╮╰╯]|-{3,}", " ", text).split())
