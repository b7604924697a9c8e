"""What is hostile or broken does no harm: run folders, caches, downloads, terminals, machines.

Each test is about one kind of harm and, where it can, about all files or all texts of that kind.
"""

import contextlib
import dataclasses
import errno
import io
import json
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import h5py
import jax
import numpy as np
import pytest
import toy
from rich.console import Console

from common import datasets, evaluation, experiment
from common.datasets import __main__ as described
from common.datasets import cache, checked, downloads, readers, sources
from common.evaluation import __main__ as command
from common.experiment import checkpoint, files, folders, plots, progress, runtime

ROOT = Path(__file__).parents[2]
STOP = 30  # step of the checkpoint in `half`, a run of 50 updates


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["toy.py"])
    monkeypatch.setattr(plots, "plot", lambda path, *args: files.write(path, "drawn"))  # slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a finished run, not to be changed."""
    return toy.main(toy.Config(out=str(tmp_path_factory.mktemp("whole")))).folder


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    return toy.main(toy.Config(out=str(tmp_path_factory.mktemp("half"))), stop=STOP).folder


@pytest.fixture
def half(started, tmp_path):
    """The folder of a run that was stopped at step STOP, one's own copy."""
    return Path(shutil.copytree(started, tmp_path / "run"))


def resume(folder):
    return toy.main(toy.Config(resume=str(folder)))


def results(folder):
    """What equal runs have in common."""
    lines = (folder / "metrics.csv").read_text().splitlines()
    names = "checkpoint/state.msgpack", "returns.json"
    return [x.rsplit(",", 2)[0] for x in lines], *[(folder / x).read_bytes() for x in names]


def tree(folder):
    """{path: what is there} of all that is below a folder, links as links."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = stat.S_IFMT(path.lstat().st_mode)
        found[path] = kind, path.read_bytes() if kind == stat.S_IFREG else None
    return found


# --- Links: nothing is written, renamed or removed through one ---

FOLDERS = "checkpoint", "checkpoint.old", "tensorboard", "tensorboard/s0"
MORE = "checkpoint.tmp", "checkpoint.damaged", "wandb"
FILES = "config.json", "metrics.csv", "returns.json", "checkpoint/state.msgpack"
FILES += ("checkpoint/checkpoint.json", "checkpoint.old/state.msgpack")
WRITTEN = *FILES[:4], "diverged.json", "curve.png"
PLACES = *FOLDERS, *MORE, *FILES, "diverged.json", "curve.png", *(f"{x}.tmp" for x in WRITTEN)


def test_the_places_are_all_that_a_run_folder_holds(started, whole):
    names = {str(path.relative_to(whole)) for path in whole.rglob("*")}
    names = {name for name in names if "events.out" not in name}
    assert names - set(PLACES) == {"checkpoint.old/checkpoint.json", "tensorboard/s1"}


@pytest.mark.parametrize("kind", ["file", "folder", "nothing", "pipe"])
def test_a_link_or_a_pipe_in_any_place_is_refused(half, tmp_path, kind):
    victims = tmp_path / "victims"
    victims.mkdir()
    (victims / "file").write_text("mine")
    (victims / "folder").mkdir()
    (victims / "folder/state.msgpack").write_text("mine, too")
    before = tree(victims)
    for name in PLACES:
        copy = Path(shutil.copytree(half, tmp_path / "copy"))
        place = copy / name
        if place.is_dir():
            shutil.rmtree(place)
        place.unlink(missing_ok=True)
        place.parent.mkdir(exist_ok=True)
        os.mkfifo(place) if kind == "pipe" else place.symlink_to(victims / kind)
        now = tree(copy)
        with pytest.raises(experiment.RunError) as error:
            resume(copy)
        assert "link, a pipe or a device" in str(error.value) or name == "config.json", name
        assert tree(victims) == before and tree(copy) == now, name
        shutil.rmtree(copy)


def test_a_hard_link_is_replaced_and_not_written_to(half, tmp_path, whole):
    """A copy by `cp -al` shares its files with the original, which a resumed copy leaves alone."""
    copy = tmp_path / "copy"
    shutil.copytree(half, copy, copy_function=os.link)
    (tmp_path / "victim").write_text("mine")
    for name in WRITTEN:
        os.link(tmp_path / "victim", copy / f"{name}.tmp")
    before = tree(half)
    resume(copy)
    assert tree(half) == before and (tmp_path / "victim").read_text() == "mine"
    assert results(copy) == results(whole)


@pytest.mark.parametrize("name", ["file", "file.tmp"])
@pytest.mark.parametrize("target", ["victim", "nothing"])
def test_write_follows_no_link(tmp_path, name, target):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / name).symlink_to(tmp_path / target)
    files.write(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new" and not (tmp_path / "file").is_symlink()
    assert (tmp_path / "victim").read_text() == "mine"
    assert sorted(x.name for x in tmp_path.iterdir()) == ["file", "victim"]


def test_links_that_wandb_makes_are_welcome(tmp_path):
    """They lead to another place of the same folder; those that lead out of it are not."""
    (tmp_path / "run/wandb/run-1").mkdir(parents=True)
    (tmp_path / "run/wandb/latest-run").symlink_to("run-1")
    files.refuse_links(tmp_path / "run")
    (tmp_path / "run/wandb/out").symlink_to(tmp_path)
    with pytest.raises(OSError, match="link"):
        files.refuse_links(tmp_path / "run")


# --- The lock ---


def test_a_second_resume_changes_nothing(half):
    """Not even a damaged checkpoint's name: the first process may be about to write it."""
    state = half / "checkpoint/state.msgpack"
    state.write_bytes(state.read_bytes()[:-1])
    with checkpoint.lock(half):
        before = tree(half)
        with pytest.raises(experiment.RunError, match="Another process is training"):
            resume(half)
        assert tree(half) == before
    resume(half)
    assert (half / "checkpoint.damaged").exists()


def test_a_run_is_locked_from_its_beginning_to_its_end(half):
    cfg = experiment.resolve(toy.Config(resume=str(half)), toy.TUNED)
    run = experiment.Run(cfg, toy.dataset(cfg.env))
    with pytest.raises(experiment.RunError, match="Another process"):
        resume(half)
    steps = run.steps()
    next(steps)
    with pytest.raises(experiment.RunError, match="Another process"):
        resume(half)
    steps.close()
    run = resume(half)  # finished, it holds no lock
    resume(run.folder)


def test_a_reader_that_meets_a_save_reads_again(tmp_path, capsys):
    done = threading.Event()

    def save():
        for step in range(1, 10**6):
            checkpoint.save(tmp_path, step, {"x": np.full(1000, step)})
            if done.is_set():
                return

    checkpoint.save(tmp_path, 0, {"x": np.zeros(1000, int)})
    writer = threading.Thread(target=save)
    writer.start()
    try:
        steps = []
        until = time.monotonic() + 1.5
        while time.monotonic() < until or len(steps) < 50:
            step, state = checkpoint.read(tmp_path)
            assert (state["x"] == step).all()
            steps.append(step)
    finally:
        done.set()
        writer.join()
    assert steps == sorted(steps) and steps[-1] > steps[0]
    assert capsys.readouterr().err == ""


# --- Downloads ---

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def drip(start, piece, pause=0.02):
    """Sends `start`, then `piece` for ever."""

    def answer(client, over):
        client.sendall(start)
        while not over.wait(pause):
            client.sendall(piece)

    return answer


def at_once(raw):
    return lambda client, over: client.sendall(raw)


CHUNK = b"8\r\n" + checked.MAGIC + b"\r\n"
BODY = b"HTTP/1.1 %s\r\nContent-Length: 40\r\n\r\n" + checked.MAGIC + bytes(32)
PEERS = {
    "a header that never ends": (drip(b"HTTP/1.1 200 OK\r\nX: ", b"a"), "1,024 bytes a second"),
    "headers for ever": (drip(b"HTTP/1.1 200 OK\r\n", b"", 5), "1,024 bytes a second"),
    "100 Continue for ever": (drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), "1,024 bytes a second"),
    "a chunk's extension": (drip(HEAD + CHUNK + b"8;", b"x"), "1,024 bytes a second"),
    "trailers": (drip(HEAD + CHUNK + b"0\r\n", b"X: y\r\n"), "1,024 bytes a second|100 headers"),
    "nothing": (drip(b"", b""), "1,024 bytes a second"),
    "a part": (at_once(BODY % b"206 Partial Content"), "HTTP 206"),
    "HDF5 by its first bytes alone": (at_once(BODY % b"200 OK"), "refused, cannot be opened"),
    "terminal codes": (at_once(b"HTTP/1.1 404 \x1b[31mred\r\n\r\n"), "HTTP 404 .*red"),
}


@pytest.fixture
def peer(monkeypatch, tmp_path):
    """Lets downloads.download talk to an answer of PEERS."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        over, box = threading.Event(), {}

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    client, _ = server.accept()
                    threading.Thread(target=talk, args=(client,), daemon=True).start()

        def talk(client):
            with client, contextlib.suppress(OSError):
                client.recv(2**16)
                box["answer"](client, over)

        threading.Thread(target=serve, daemon=True).start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}/"
        monkeypatch.setattr(sources, "D4RL_HOST", address)
        monkeypatch.setattr(sources, "D4RL_MIRROR", address)
        monkeypatch.setattr(downloads, "STALL", 0.4)
        monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
        monkeypatch.setenv("HOME", str(tmp_path))
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        yield box
        over.set()


@pytest.mark.parametrize("name", PEERS)
def test_a_download_ends_whatever_the_peer_sends(peer, name, tmp_path):
    peer["answer"], message = PEERS[name]
    unknown = next(x for x, source in sources.d4rl_names().items() if not source.sha256)
    began = time.monotonic()
    with pytest.raises(datasets.DatasetError, match=message) as error:
        datasets.load(unknown)
    assert time.monotonic() - began < 20 and "\x1b" not in str(error.value)
    assert not [path for path in tmp_path.rglob("*.hdf5*") if path.is_file()]


# --- The cache of datasets ---


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """(path of a file, its arrays, folder of its cache), loaded once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, rng = tmp_path / "a.hdf5", np.random.default_rng(0)
    obs = rng.normal(size=(41, 3)).astype(np.float32)
    with h5py.File(path, "w") as file:
        file["observations"], file["next_observations"] = obs[:-1], obs[1:]
        file["actions"] = rng.uniform(-1, 1, (40, 2)).astype(np.float32)
        file["rewards"] = rng.normal(size=40).astype(np.float32)
        file["terminals"] = np.zeros(40, bool)
        file["timeouts"] = np.arange(40) % 20 == 19
    data = datasets.load(str(path))
    (about,) = (tmp_path / "cache").rglob("about.json")
    return path, data, about.parent


def same(a, b):
    return all(np.array_equal(getattr(a, x), getattr(b, x)) for x in cache.ARRAYS)


def zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def numbers(path):
    np.save(path, np.load(path) + 1)


def columns(path):
    np.save(path, np.load(path)[..., None])


def pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [zeros, flip, numbers, columns, pipe, Path.unlink])
def test_a_damaged_cache_is_not_believed(kept, damage):
    path, data, folder = kept
    for name in (*cache.ARRAYS, "about"):
        (file,) = folder.glob(f"{name}.*")
        if file.suffix == ".json" and damage in (numbers, columns):
            continue
        damage(file)
        assert cache.read(folder) is None, name
        assert same(datasets.load(str(path)), data)
        assert cache.read(folder) is not None, name  # it was written anew


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", "1", '{"about": 1}', '{"about": {}, "crc32": {}}', "[" * 10**5]
)
def test_about_json_of_any_kind(kept, text):
    path, data, folder = kept
    (folder / "about.json").write_text(text)
    assert same(datasets.load(str(path)), data)


def test_an_edited_source_is_read_again_with_its_size_and_times_kept(kept):
    path, data, _ = kept
    about = path.stat()
    with h5py.File(path, "a") as file:
        file["rewards"][3] = 7.0
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (about.st_size, about.st_mtime_ns)
    again = datasets.load(str(path))
    assert again.reward[3] == 7 and again.provenance["sha256"] != data.provenance["sha256"]


def test_a_million_rows_are_checked_in_less_than_a_third_of_a_second():
    rows = np.ones((1_000_000, 36), np.float32)  # halfcheetah: obs, next_obs and the rest
    files.checksum(rows[:1000])
    began = time.process_time()
    files.checksum(rows)
    assert time.process_time() - began < 0.3


def test_a_checksum_knows_numbers_shapes_and_kinds():
    x = np.arange(6, dtype=np.float32)
    others = x + 1, x[::-1], x.reshape(2, 3), x.reshape(3, 2), x.astype(np.float64), x[:5]
    assert len({files.checksum(y) for y in (x, *others)}) == 7
    assert files.checksum(x.reshape(2, 3).T.copy()) == files.checksum(x.reshape(2, 3).T)
    assert files.checksum(x[:0]) != files.checksum(x[:0].reshape(0, 3))


def test_resume_compares_the_data_that_are_trained_on(half, monkeypatch):
    """The source's hash is the same, a number is not."""
    data = toy.dataset(json.loads((half / "config.json").read_text())["config"]["env"])
    for name in cache.ARRAYS:
        array = getattr(data, name).copy()
        array.flat[-1] += 1
        changed = dataclasses.replace(data, **{name: array})
        monkeypatch.setattr(toy, "dataset", lambda _, changed=changed: changed)
        with pytest.raises(experiment.RunError, match="is not the data"):
            resume(half)


# --- What bits depend on ---


def settings(monkeypatch, name):
    """machine() with one setting changed."""
    old = getattr(jax.config, name, None)
    if name == "NPROC":
        monkeypatch.setenv("NPROC", "7")
    elif name == "XLA_FLAGS":
        monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    elif name == "affinity":
        monkeypatch.delenv("NPROC", raising=False)  # which XLA asks first
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(9)), raising=False)
    elif name == "devices":
        monkeypatch.setattr(jax, "local_device_count", lambda: 5)
    else:
        values = {"jax_default_prng_impl": "rbg", "jax_default_matmul_precision": "float32"}
        jax.config.update(name, values.get(name, not old))
    try:
        return runtime.machine()
    finally:
        if name.startswith("jax_"):
            jax.config.update(name, old)


NOTED = "NPROC", "XLA_FLAGS", "affinity", "devices", "jax_default_matmul_precision"
REFUSED = "jax_default_prng_impl", "jax_enable_x64", "jax_threefry_partitionable"


@pytest.mark.parametrize("name", NOTED)
def test_a_setting_that_may_change_bits_is_noted(half, monkeypatch, capsys, name):
    with monkeypatch.context() as patch:
        facts = settings(patch, name)
    assert facts != runtime.machine()
    monkeypatch.setattr(runtime, "machine", lambda: facts)
    resume(half)
    assert "Note: xla differ" in capsys.readouterr().out


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_draws_other_numbers_is_refused(half, monkeypatch, name):
    with monkeypatch.context() as patch:
        facts = settings(patch, name)
    monkeypatch.setattr(runtime, "machine", lambda: facts)
    before = tree(half)
    with pytest.raises(experiment.RunError, match="was started with the JAX settings"):
        resume(half)
    assert tree(half) == before


def test_a_config_without_its_length_has_the_defaults(half):
    """As of an older program, whose config lacked a field."""
    edit(half, lambda info: info["config"].pop("num_updates"))
    resume(half)
    length = toy.Config().num_updates
    assert json.loads((half / "config.json").read_text())["config"]["num_updates"] == length


def test_on_the_same_machine_nothing_is_noted(half, capsys):
    resume(half)
    assert "Note" not in capsys.readouterr().out


# --- Answers that would be wrong in silence ---


class Toy(gymnasium.Env):
    """Five observations, two actions, three steps."""

    observation_space = gymnasium.spaces.Box(-1, 1, (5,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        return np.zeros(5, np.float32), {}

    def step(self, action):
        return np.zeros(5, np.float32), 1.0, False, False, {}


@pytest.fixture
def scored(half, tmp_path, monkeypatch):
    """`half`, as a run of an algorithm and an environment that are found."""
    (tmp_path / "algorithms").symlink_to(Path(toy.__file__).parent)
    monkeypatch.setattr(folders, "PROJECT", tmp_path)
    gymnasium.register("Toy-v0", Toy, max_episode_steps=3)
    edit(half, lambda info: info["dataset"].update(env_id="Toy-v0"))
    yield half
    del gymnasium.registry["Toy-v0"]
    folders.module.cache_clear()


def edit(folder, change):
    path = folder / "config.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


@pytest.mark.parametrize("index", [7, 2, -1])
def test_a_seed_that_a_run_does_not_have(scored, index):
    with pytest.raises(evaluation.EvaluationError, match=f"{index}: .* holds seeds 0 to 1"):
        evaluation.load_policy(scored, index)


def test_observations_of_another_shape(scored):
    policy = evaluation.load_policy(scored, 1)
    assert policy(np.zeros(5)).shape == (2,) and policy(np.zeros((3, 5))).shape == (3, 2)
    for shape in [(5, 1), (1,), (6,), (), (3, 5, 1), (2, 3, 5), (0,)]:
        with pytest.raises(ValueError, match=r"not \(5,\) or \(E, 5\)"):
            policy(np.zeros(shape))


@pytest.mark.parametrize("words", [["--resume", ""], ["--resume="]])
def test_resume_of_no_name(monkeypatch, tmp_path, words):
    monkeypatch.setattr(sys, "argv", ["toy.py", *words])
    with pytest.raises(experiment.RunError, match="--resume '': needs a run folder"):
        toy.main(toy.Config(out=str(tmp_path)))
    assert not list(tmp_path.iterdir())


# --- Compiled programs ---


def test_new_folders_are_this_users_alone(tmp_path):
    before = os.umask(0)
    try:
        files.make_private(tmp_path / "a/b/c")
    finally:
        os.umask(before)
    for name in ("a", "a/b", "a/b/c"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["a", "a/b", "a/b/c"])
@pytest.mark.parametrize("change", [0o777, 0o770, 0o1777, "owner", "link"])
def test_folders_that_others_can_write_to_are_refused(tmp_path, name, change):
    (tmp_path / "a/b/c").mkdir(parents=True, mode=0o700)
    place = tmp_path / name
    if change == "owner":
        if os.geteuid():
            pytest.skip("only root gives files away")
        os.chown(place, 12345, -1)
    elif change == "link":
        (tmp_path / "theirs").mkdir()
        (tmp_path / "theirs").chmod(0o777)
        shutil.copytree(place, tmp_path / "theirs/x")
        shutil.rmtree(place)
        place.symlink_to(tmp_path / "theirs/x")
    else:
        place.chmod(change)
    if change == 0o1777 and name != "a/b/c":
        return files.make_private(tmp_path / "a/b/c")  # as /tmp
    with pytest.raises(OSError, match="Others can write to it"):
        files.make_private(tmp_path / "a/b/c")


def programs(monkeypatch, home):
    """What keep_programs sets."""
    found = {}
    config = SimpleNamespace(jax_compilation_cache_dir=None, update=found.__setitem__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "jax", SimpleNamespace(config=config))
        runtime.keep_programs()
    return found


def test_programs_are_kept_where_nobody_else_writes_and_a_disk_has_room(tmp_path, monkeypatch):
    folder = programs(monkeypatch, tmp_path)["jax_compilation_cache_dir"]
    assert Path(folder).parent == tmp_path / "stillwater/programs"
    Path(folder).chmod(0o777)
    assert programs(monkeypatch, tmp_path) == {}
    Path(folder).chmod(0o700)
    assert programs(monkeypatch, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    assert programs(monkeypatch, tmp_path) == {}


# --- Run folders of any content, scored, filmed, loaded, resumed ---


def config(**values):
    return lambda folder: edit(folder, lambda info: info["config"].update(values))


def about(**values):
    return lambda folder: edit(folder, lambda info: info["dataset"].update(values))


def top(**values):
    return lambda folder: edit(folder, lambda info: info.update(values))


def content(name, text):
    return lambda folder: (folder / name).write_text(text)


def without(name):
    return lambda folder: edit(folder, lambda info: info["dataset"].pop(name))


DEEP = "[" * 100_000
ANY = {
    "seeds": (config(num_seeds=10**10), "--num-seeds 10000000000: must be from 1 to 1,000"),
    "a width of -1": (config(widths=[-1]), "--widths -1: must be from 1"),
    "no widths": (config(widths=[]), "--widths: needs at least one value"),
    "a seed": (config(seed=2**31 - 1), "the last seed must be"),
    "nan": (config(lr=float("nan")), "--lr nan: must be above 0"),
    "text": (config(num_seeds="many"), "num_seeds is 'many'"),
    "an unknown option": (config(bogus=1), "unknown to this program: bogus"),
    "dims of 0": (top(dims=[60, 0, 2]), "of the wrong kind"),
    "dims of -1": (top(dims=[60, -1, 2]), "of the wrong kind"),
    "other dims": (top(dims=[60, 6, 2]), "does not fit"),
    "two dims": (top(dims=[60, 5]), "of the wrong kind"),
    "dims of text": (top(dims="abc"), "damaged"),
    "no algorithm": (top(algorithm=None), "of the wrong kind"),
    "a data set that is none": (top(dataset=[]), "damaged"),
    "deep": (content("config.json", DEEP), "nested too deeply"),
    "deep, an object": (content("config.json", '{"a":' * 100_000), "nested too deeply"),
    "a list": (content("config.json", "[]"), "does not hold a JSON object"),
    "bytes": (lambda x: (x / "config.json").write_bytes(b"\xff\xfe"), "damaged"),
    "references of text": (about(ref_min_score="a", ref_max_score="b"), "of the wrong kind"),
    "one reference": (about(ref_min_score=None), "of the wrong kind"),
    "equal references": (about(ref_min_score=1.0, ref_max_score=1.0), "of the wrong kind"),
    "an env_id of another kind": (about(env_id=["x"]), "of the wrong kind"),
    "a pipe": (lambda x: pipe(x / "config.json"), "not a plain file"),
    "a device": (
        lambda x: ((x / "config.json").unlink(), (x / "config.json").symlink_to("/dev/zero")),
        "not a plain file",
    ),
    "a folder": (
        lambda x: ((x / "config.json").unlink(), (x / "config.json").mkdir()), "not a plain file",
    ),
    "deep notes": (
        lambda x: [content(f"{name}/checkpoint.json", DEEP)(x) for name in FOLDERS[:2]],
        "nested too deeply",
    ),
    "pipes for states": (
        lambda x: [pipe(x / name / "state.msgpack") for name in FOLDERS[:2]], "not a plain file",
    ),
    "deep divergence": (content("diverged.json", DEEP), "nested too deeply"),
    "divergence of another kind": (content("diverged.json", '{"0": 1}'), "diverged.json"),
    "divergence at infinity": (
        content("diverged.json", '{"0": {"step": 1e999, "message": ""}}'),
        "diverged.json",
    ),
}  # fmt: skip
SCORED = ANY | {
    "no env_id": (without("env_id"), "has no environment to score on"),
    "another env_id": (about(env_id="Pendulum-v1"), "Pendulum-v1 has 3 observations and 1 actions"),
    "a module's env_id": (about(env_id="os:x-v0"), "unknown environment 'os:x-v0'"),
    "returns that are cut": (content("returns.json", '{"10": [[1'), "returns.json is damaged"),
    "a list of returns": (content("returns.json", "[1]"), "returns.json is damaged"),
    "ragged returns": (content("returns.json", '{"30": [[1], [1, 2]]}'), "returns.json is damaged"),
    "returns of no step": (content("returns.json", '{"x": [[1]]}'), "returns.json is damaged"),
    "deep returns": (content("returns.json", DEEP), "returns.json is damaged"),
    "a pipe for returns": (lambda x: pipe(x / "returns.json"), "returns.json is damaged"),
}


@pytest.mark.parametrize("name", SCORED)
def test_scoring_any_folder_ends_in_one_message(scored, name):
    change, message = SCORED[name]
    change(scored)
    before = tree(scored)
    with pytest.raises(SystemExit) as error, contextlib.redirect_stdout(io.StringIO()):
        command.main(scored)
    assert message in str(error.value) and "\x1b" not in str(error.value)
    assert tree(scored) == before
    if name in ANY:
        with pytest.raises(SystemExit) as again:
            evaluation.load_policy(scored)
        assert message in str(again.value)


@pytest.mark.parametrize("name", ANY)
def test_resuming_any_folder_ends_in_one_message(half, name):
    change, message = ANY[name]
    change(half)
    before = tree(half)
    with pytest.raises(SystemExit) as error:
        resume(half)
    expected = message, "is a run of None", "is not the data", "link, a pipe or a device"
    assert any(x in str(error.value) for x in expected), str(error.value)
    assert tree(half) == before


def test_another_header_of_the_metrics_is_one_message(half):
    path = half / "metrics.csv"
    path.write_text(path.read_text().replace("loss", "los", 1))
    with pytest.raises(experiment.RunError, match="metrics.csv has the columns step,seed,.*los,"):
        resume(half)


def test_scoring_a_whole_folder(scored, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(scored.parent))
    monkeypatch.setattr(gymnasium.registry["Toy-v0"], "max_episode_steps", 3)
    command.main(Path("~/run"))  # as a shell leaves it between quotes
    assert "seed 1: return 3.0" in capsys.readouterr().out
    with pytest.raises(evaluation.EvaluationError, match="--episodes -1: must be at least 0"):
        command.main(scored, episodes=-1)


# --- Ctrl-C before the loop ---

EARLY = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
sys.path[:0] = ["tests", "."]
import toy
def wait(cfg):
    print("up", flush=True)
    time.sleep(60)
toy.compiled = wait
toy.main(toy.Config({}))
"""


@pytest.mark.parametrize("resumed", [False, True])
def test_ctrl_c_before_the_loop_is_one_sentence(half, tmp_path, resumed):
    flags = f"resume={str(half)!r}" if resumed else f"out={str(tmp_path / 'new')!r}"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = [sys.executable, "-c", EARLY.format(flags)]
    with subprocess.Popen(line, cwd=ROOT, **pipes) as process:
        while process.stdout.readline().strip() != "up":
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert len(err.splitlines()) == 1 and err.startswith("Stopped. ")
    said = f"Saved up to step {STOP}. To continue: python" if resumed else "Nothing is saved yet."
    assert said in err


# --- Machines ---


def test_no_device(monkeypatch, tmp_path):
    def devices():
        raise RuntimeError("Unable to initialize backend 'cuda': no GPU\nmore")

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(experiment.RunError, match="no GPU .JAX_PLATFORMS is cuda"):
        toy.main(toy.Config(out=str(tmp_path / "runs")))
    with pytest.raises(experiment.RunError, match="JAX has no device"):
        evaluation.load_policy(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def homeless(monkeypatch, tmp_path):
    def nobody(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "XDG_CACHE_HOME", "D4RL_DATASET_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_user_without_a_home(homeless, kept, monkeypatch):
    path, data, _ = kept
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert same(datasets.load(str(path)), data)
    with monkeypatch.context() as patch:
        config = SimpleNamespace(jax_compilation_cache_dir=None, update=None)
        patch.setattr(runtime, "jax", SimpleNamespace(config=config))
        runtime.keep_programs()
    monkeypatch.setattr(downloads, "probe", lambda urls: dict.fromkeys(urls, "no network"))
    with pytest.raises(datasets.DatasetError, match="no network"):
        datasets.load("hopper-medium-v2")
    assert not (homeless / "~").exists()


@pytest.mark.parametrize("proxy", ["http://[::1", "://", "http://host:port", "\x1b[31m", "ftp://"])
def test_proxies_that_are_none(monkeypatch, tmp_path, proxy):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, proxy)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sources, "D4RL_HOST", "http://127.0.0.1:9/")
    monkeypatch.setattr(sources, "D4RL_MIRROR", "https://127.0.0.1:9/")
    monkeypatch.setattr(downloads, "PATIENCE", 1.0)
    with pytest.raises(datasets.DatasetError, match="hopper_medium-v2.hdf5: ") as error:
        datasets.load("hopper-medium-v2")
    assert "\x1b" not in str(error.value)


class Full(io.StringIO):
    def write(self, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def closed():
    file = io.StringIO()
    file.close()
    return file


@pytest.mark.parametrize("stream", [Full, Broken, closed, lambda: None])
def test_no_stdout_is_no_reason_to_lose_a_training(half, whole, monkeypatch, stream):
    monkeypatch.setattr(sys, "stdout", stream())
    resume(half)
    assert results(half) == results(whole)


def test_a_working_folder_that_is_gone(half, whole, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    resume(half)
    assert results(half) == results(whole)
    monkeypatch.chdir(tmp_path)


def test_the_memory_of_the_machine_is_known(kept, monkeypatch):
    path, _, folder = kept
    shutil.rmtree(folder)
    assert 2**20 < runtime.free_memory() < 2**50
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "free_memory", lambda: 1200)
        with pytest.raises(datasets.DatasetError, match="480 bytes.* has memory for 300$"):
            datasets.load(str(path))

    def read(*args):
        raise MemoryError

    monkeypatch.setattr(readers, "read_d4rl", read)
    with pytest.raises(datasets.DatasetError, match="bytes of memory left"):
        datasets.load(str(path))


# --- Text from outside ---

NASTY = "a\udc80 $\\frac [/b] [red] \x1b[31m\x07 \u202e é 猫 \r\nb"


def test_nasty_names_reach_no_terminal_and_stop_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.undo()  # the curve is drawn
    monkeypatch.setattr(sys, "argv", ["toy.py"])
    run = toy.main(toy.Config(env=NASTY, out=str(tmp_path)))
    out = capsys.readouterr().out
    assert (run.folder / "curve.png").stat().st_size > 5_000
    assert "\x1b" not in out and "\u202e" not in out and "$\\frac [/b] [red]" in out


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
def test_a_summary_of_nasty_text(kept, monkeypatch, encoding, tmp_path):
    _, data, _ = kept
    about = data.provenance | {"metadata": {NASTY: NASTY, "x": {NASTY: NASTY}}, "file": NASTY}
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    runtime.open_streams()
    described.show(dataclasses.replace(data, name=NASTY, provenance=about))
    sys.stdout.flush()
    assert b"[/b]" in raw.getvalue() and b"\x1b" not in raw.getvalue()
    described.draw(dataclasses.replace(data, name=NASTY), tmp_path / "a.png")


@pytest.mark.parametrize(
    "kind", [experiment.RunError, datasets.DatasetError, evaluation.EvaluationError]
)
def test_messages_have_no_terminal_codes(kind):
    message = str(kind(f"first: {NASTY}"))
    assert message.split("\n")[0].startswith("first: a? $\\frac") and len(message.split("\n")) == 2
    assert all(c.isprintable() or c == "\n" for c in message)


def test_a_display_that_fails_goes_on_in_silence(capsys):
    display = progress.Display(Console(file=Full()))
    for _ in range(3):
        display.log("x")
    assert capsys.readouterr().err.count("Cannot write to stdout") == 1
