"""common/experiment.py, by way of the tiny algorithm in tests/toy.py."""

import dataclasses
import errno
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
import toy
from flax import serialization
from rich.console import Console

from common import evaluation, experiment
from common.experiment import checkpoint, folders, plots, progress, runtime, statistics


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["toy.py"])
    monkeypatch.setattr(plots, "plot", lambda path, *args: path.write_text("drawn"))  # slow
    return toy.Config(out=str(tmp_path / "runs"))


def resumed(run, **flags):
    return toy.main(toy.Config(resume=str(run.folder), **flags))


def rows(folder):
    """metrics.csv without its timing columns."""
    lines = (folder / "metrics.csv").read_text().splitlines()
    assert lines[0].split(",")[-2:] == list(experiment.TIMING)
    return [line.rsplit(",", 2)[0] for line in lines]


def equal(a, b):
    """Whether two run folders hold the same results, bit for bit."""
    files = ("checkpoint/state.msgpack", "checkpoint/checkpoint.json", "returns.json")
    same = [(a / name).read_bytes() == (b / name).read_bytes() for name in files]
    return all(same) and rows(a) == rows(b)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, not to be changed."""
    return toy.main(toy.Config(out=str(tmp_path_factory.mktemp("whole"))))


# --- The folder ---


def test_folder_is_complete(whole):
    names = {path.name for path in whole.folder.iterdir()}
    assert names == {
        *("config.json", "metrics.csv", "returns.json", "curve.png", "tensorboard"),
        *("checkpoint", "checkpoint.old"),
    }
    assert whole.folder.parent.name == "stillwater-hopper-medium-v0"
    assert whole.folder.parent.parent.name == "toy"
    assert whole.folder.name.endswith("-s0")
    info = json.loads((whole.folder / "config.json").read_text())
    assert info["algorithm"] == "toy"
    assert info["dims"] == [60, 5, 2]
    assert info["dataset"]["mean_return"] == pytest.approx(toy.dataset("").returns().mean())
    expected = {"python", "jax", "jaxlib", "flax", "optax", "distrax", "gymnasium", "mujoco"}
    assert expected < info["versions"].keys()
    assert info["device"]
    assert info["command"]


def test_metrics_and_returns(whole):
    header, *lines = rows(whole.folder)
    assert header == "step,seed,return_mean,return_std,score,loss,q_data,q_pi"
    keys = [tuple(map(int, line.split(",")[:2])) for line in lines]
    assert keys == [(step, seed) for step in range(10, 51, 10) for seed in (0, 1)]
    returns = json.loads((whole.folder / "returns.json").read_text())
    assert np.shape([returns[str(step)] for step in range(10, 51, 10)]) == (5, 2, 3)
    mean = float(lines[-1].split(",")[2])
    assert mean == np.mean(returns["50"][1])
    assert float(lines[-1].split(",")[4]) == mean / 2


def test_tensorboard_holds_every_scalar(whole):
    from tensorboardX.proto.event_pb2 import Event

    for seed in ("s0", "s1"):
        (path,) = (whole.folder / "tensorboard" / seed).iterdir()
        raw, events = path.read_bytes(), []
        while raw:  # records: length (8 bytes), its CRC (4), event, CRC (4)
            size = int.from_bytes(raw[:8], "little")
            events.append(Event.FromString(raw[12 : 12 + size]))
            raw = raw[16 + size :]
        tags = [value.tag for event in events for value in event.summary.value]
        assert tags.count("loss") == tags.count("score") == 5


def test_curve_is_a_picture(whole):
    height, width, _ = matplotlib.image.imread(whole.folder / "curve.png").shape
    assert 800 < width < 1600
    assert 600 < height < 1600


def test_curve_without_scores(tmp_path):
    step = np.array([[10], [20]])
    columns = {"step": step, "score": step * np.nan, "return_mean": step, "loss": step}
    plots.plot(tmp_path / "one.png", "title", columns, {"data's mean": 3.0})
    assert matplotlib.image.imread(tmp_path / "one.png").shape[0] < 700  # one panel
    plots.plot(tmp_path / "none.png", "title", columns | {"return_mean": step * np.nan}, {})
    assert not (tmp_path / "none.png").exists()


def test_statistics():
    assert statistics.iqm(np.array([[-100.0, 1, 2, 3, 4, 5, 6, 900]])) == 3.5
    x = np.random.default_rng(1).normal(50, 10, (1, 400))
    low, high = statistics.interval(statistics.of_seeds(x))
    assert low < x.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * 0.5, rel=0.15)
    between = np.array([[0.0] * 50, [10.0] * 50])  # the seeds differ, not the episodes
    assert tuple(statistics.interval(statistics.of_seeds(between))) == (0, 10)


def test_terminal(cfg, capsys):
    run = toy.main(cfg)
    text = capsys.readouterr().out
    for words in (
        "stillwater/hopper/medium-v0: 60 transitions, behaviour's score 52.5",
        "50 updates of 2 seeds on",
        run.folder.name,
        "Setting up and compiling ...",
        "10/50   20%",
        "(with compiling)",
        "50/50  100%",
        "left  score 5",
        "Final score",
        "95 % interval",
        "To score it again, keep the algorithm's file in",  # toy.py is in no algorithms/
    ):
        assert words in text
    assert text.index("compiling") < text.index("10/50")
    assert text.count("(with compiling)") == 1


def test_the_bar_fits_a_terminal_of_100_columns(monkeypatch):
    display = progress.Display(Console(force_terminal=True, width=100, file=io.StringIO()))
    display.start(120_000, 1_000_000)

    def shown():
        lines = display.console.render_lines(display._render(), pad=False)
        return ["".join(part.text for part in line) for line in lines]

    bar, news = shown()
    assert "120,000/1,000,000" in bar and news == "Setting up and compiling ..."
    losses = {f"{name}_loss": 123.456 for name in ("value", "critic", "actor", "temperature")}
    for step in (121_000, 122_000):
        display.update(
            step, 12_345.6, losses | {"q_data": 1.0}, "score 101.2 +- 12.3", step > 121_000
        )
        bar, news = shown()
        assert max(len(bar), len(news)) <= 100
        for words in (f"{step:,}/1,000,000", "12%", "12,346 updates/s", " left"):
            assert words in bar
        assert news.startswith("score 101.2 +- 12.3  value_loss 123  critic_loss 123")
        assert ("(with compiling)" in bar) == (step == 121_000)
    display.stop()
    printed = display.console.file.getvalue()
    assert printed.count("updates/s") >= 1 and "122,000/1,000,000   12%" in printed


def test_a_log_without_a_terminal_gets_plain_lines(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    display = progress.Display()
    display.start(0, 100)
    for step in range(1, 101):
        now[0] += 10
        display.update(step, 0.1, {"loss": step}, "score 5.0", step % 50 == 0)
    display.stop()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Setting up and compiling ..."
    assert (
        lines[1] == "  7/100    7%  0 updates/s  0:15:30 left  score 5.0  loss 7"
    )  # after a minute
    assert (
        len(lines) == 1 + 2 + 14 and " 50/100   50%  0 updates/s  0:08:20 left  score 5.0" in lines
    )


def test_two_runs_in_one_second(cfg):
    class Frozen(folders.datetime):
        @classmethod
        def now(cls):
            return cls(2026, 1, 2, 3, 4, 5)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "datetime", Frozen)
        runs = [experiment.Run(cfg, toy.dataset(cfg.env)) for _ in range(3)]
    names = [run.folder.name for run in runs]
    assert names == ["20260102-030405-s0", "20260102-030405-s0-2", "20260102-030405-s0-3"]


@pytest.mark.parametrize("name", ["../../x.hdf5", "/tmp/a b/x.hdf5", "a" * 300, "é/ü"])
def test_dataset_name_makes_one_folder(cfg, name):
    run = experiment.Run(cfg, toy.dataset(name))
    assert run.folder.parents[2] == Path(cfg.out)


# --- Config ---


def test_config_round_trip(cfg):
    cfg = experiment.resolve(dataclasses.replace(cfg, seed=3, gamma=1 / 3, normalize=False))
    run = experiment.Run(cfg, toy.dataset(cfg.env))
    back = experiment.resolve(toy.Config(resume=str(run.folder)))
    assert dataclasses.replace(back, resume="") == cfg
    assert [type(x) for x in vars(back).values()] == [type(x) for x in vars(cfg).values()]
    assert back.nested == ((1 / 3, 1e-45), (0.1,))
    assert back.tau is None


@pytest.mark.parametrize(
    ("env", "tau", "expected"),
    [
        ("stillwater/hopper/medium-replay-v0", None, 0.9),
        ("hopper-medium-v2", None, 0.9),
        ("hopper-expert-v2", None, 0.6),
        ("path/to/hopper-medium-v2.hdf5", None, 0.7),  # a user's own file
        ("walker2d-medium-v2", None, 0.7),
        ("hopper-medium-v2", 0.1, 0.1),
        ("hopper-medium-v2", 0.0, 0.0),
    ],
)
def test_values_of_the_paper(env, tau, expected):
    assert experiment.resolve(toy.Config(env=env, tau=tau), toy.TUNED).tau == expected


def test_values_that_the_name_decides_are_told(cfg, capsys):
    for env, flags, told in (
        ("hopper-medium-v2", {}, "Tuned values: tau 0.9 (hopper-medium)\n"),
        ("hopper-medium-v2", dict(tau=0.5), ""),  # a flag wins
        ("walker2d-medium-v2", {}, ""),  # the default
    ):
        own = dataclasses.replace(cfg, env=env, **flags)
        own = experiment.resolve(own, toy.TUNED)
        assert capsys.readouterr().out == ""  # once a run: with its dataset
        experiment.resolve(own, toy.TUNED, toy.dataset(env))
        assert capsys.readouterr().out == told


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (dict(num_updates=55), "the nearest are 50 and 60"),
        (dict(num_updates=0), "--num-updates 0"),
        (dict(num_updates=-10), "--num-updates -10"),
        (dict(eval_every=0), "--eval-every 0"),
        (dict(eval_every=-5), "--eval-every -5"),
        (dict(num_seeds=0), "--num-seeds 0"),
        (dict(batch_size=0), "--batch-size 0"),
        (dict(save_every=0), "--save-every 0"),
        (dict(eval_episodes=-1), "--eval-episodes -1"),
        (dict(seed=-1), "--seed -1"),
        (dict(gamma=1.01), "--gamma 1.01"),
        (dict(gamma=float("nan")), "--gamma nan"),
        (dict(lr=-0.1), "--lr -0.1"),
        (dict(lr=0.0), "--lr 0.0"),
        (dict(actor_lr=float("inf")), "--actor-lr inf"),
        (dict(actor_lr=float("nan")), "--actor-lr nan"),
    ],
)
def test_impossible_values_are_refused(flags, words):
    with pytest.raises(experiment.RunError) as error:
        experiment.resolve(toy.Config(**flags))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_short_run_is_one_chunk():
    assert experiment.resolve(toy.Config(num_updates=7, eval_every=100)).eval_every == 7


def test_no_evaluation(cfg, capsys):
    run = toy.main(dataclasses.replace(cfg, eval_episodes=0))
    assert rows(run.folder)[1].split(",")[2:5] == ["nan"] * 3
    assert "nan" not in capsys.readouterr().out


def test_no_reference_scores(cfg, capsys, monkeypatch):
    data = dataclasses.replace(toy.dataset(cfg.env), ref_min=None, ref_max=None)
    monkeypatch.setattr(toy, "dataset", lambda name: data)
    toy.main(cfg)
    text = capsys.readouterr().out
    assert "Final return" in text
    assert "left  return" in text
    assert "behaviour's return" in text


def test_wandb_not_installed(cfg, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(experiment.RunError, match="pip install wandb"):
        toy.main(dataclasses.replace(cfg, wandb=True))


# --- Resuming ---


@pytest.mark.parametrize("save_every", [10, 20])
def test_resume_gives_the_same_bits(cfg, save_every):
    cfg = dataclasses.replace(cfg, save_every=save_every)
    a, b = toy.main(cfg), toy.main(cfg, stop=30)
    assert b.step == {10: 30, 20: 20}[save_every]  # what came after is made again
    c = resumed(b)
    assert c.folder == b.folder
    assert equal(a.folder, b.folder)
    assert (b.folder / "curve.png").exists()


def test_resumed_arrays_are_as_fresh_ones_and_can_be_donated(cfg):
    """Of the same types, even the weak ones of Python's numbers: it is the same program."""
    run = toy.main(cfg, stop=10)
    again = experiment.Run(experiment.resolve(toy.Config(resume=str(run.folder))), run.dataset)
    template = jax.vmap(lambda key: toy.init(key, run.dataset.transitions(), cfg))(
        jax.random.split(jax.random.key(0), 2)
    )
    state, fresh = again.restore(template), experiment.Run(cfg, run.dataset).restore(template)
    types = [[jax.typeof(x) for x in jax.tree.leaves(tree)] for tree in (state, fresh)]
    assert types[0] == types[1] and not any(x.weak_type for x in types[0])
    assert jax.tree.structure(state) == jax.tree.structure(template)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state)
    assert state.x.is_deleted()


def test_killed_before_the_save(tmp_path):
    code = "import toy, sys; toy.main(toy.Config(out=sys.argv.pop()), kill=30)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=Path(toy.__file__).parent
    )
    assert done.returncode == -signal.SIGKILL
    (folder,) = tmp_path.glob("toy/*/*")
    assert rows(folder)[-1].startswith("30,")
    assert "30" in (folder / "returns.json").read_text()
    run = toy.main(toy.Config(resume=str(folder)))
    assert equal(folder, toy.main(toy.Config(out=str(tmp_path / "b"))).folder)
    assert run.step == 50


def test_killed_before_the_first_save(cfg, whole):
    run = toy.main(cfg, stop=10)
    for name in ("checkpoint", "metrics.csv", "returns.json"):
        path = run.folder / name
        path.rename(run.folder / "checkpoint.tmp") if path.is_dir() else path.unlink()
    assert equal(resumed(run).folder, whole.folder)


def test_conflicting_flags(cfg, monkeypatch):
    run = toy.main(dataclasses.replace(cfg, num_seeds=3, gamma=0.5), stop=10)
    for flags, words in (
        (dict(gamma=0.9), "--gamma 0.9 conflicts with the resumed run's 0.5"),
        (dict(tau=0.1), "--tau 0.1 conflicts with the resumed run's 0.9"),
    ):
        with pytest.raises(experiment.RunError, match=words):
            resumed(run, **flags)
    monkeypatch.setattr(sys, "argv", ["toy.py", "--num-seeds=2"])  # the default, but asked for
    with pytest.raises(experiment.RunError, match="--num-seeds 2 conflicts"):
        resumed(run)
    monkeypatch.setattr(sys, "argv", ["toy.py", "--num-seeds", "3"])
    same = dict(gamma=0.5, num_seeds=3, tau=0.9, out="elsewhere")
    assert resumed(run, **same).step == 50


def test_resume_what_is_no_run(cfg, tmp_path):
    for folder, words in (
        (tmp_path / "nothing", "is not a run folder"),
        (tmp_path, "No such file"),
    ):
        with pytest.raises(experiment.RunError, match=words):
            experiment.resolve(toy.Config(resume=str(folder)))
    run = toy.main(cfg, stop=10)
    path = run.folder / "config.json"
    info = json.loads(path.read_text())
    for change, words in (
        ({"algorithm": "iql"}, "is a run of iql, not of toy"),
        ({"dims": [1, 2]}, "is damaged"),
        ({"config": {"env": "x", "bogus": 1}}, "unknown to this program: bogus"),
    ):
        path.write_text(json.dumps(info | change))
        with pytest.raises(experiment.RunError, match=words):
            resumed(run)
    path.write_text("{")
    with pytest.raises(experiment.RunError, match="is damaged"):
        resumed(run)


def test_resume_with_other_data(cfg, monkeypatch):
    run = toy.main(cfg, stop=10)
    data = dataclasses.replace(toy.dataset(cfg.env), provenance={"sha256": "1" * 64})
    monkeypatch.setattr(toy, "dataset", lambda name: data)
    with pytest.raises(experiment.RunError, match="is not the data"):
        resumed(run)


def test_finished_run_is_left_alone(whole, capsys):
    files = [path for path in whole.folder.rglob("*") if path.is_file()]
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    resumed(whole)
    assert "finished, nothing is left to do" in capsys.readouterr().out
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    assert files == [path for path in whole.folder.rglob("*") if path.is_file()]


# --- Checkpoints ---


def truncate(path):
    path.write_bytes(path.read_bytes()[:-20])


def edit(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def restep(path):
    note = path.with_name("checkpoint.json")
    note.write_text(note.read_text().replace('"step": 30', '"step": 40'))


def hollow(path):
    """A hash that fits, and nothing in it."""
    raw = serialization.msgpack_serialize({"step": 30})
    path.write_bytes(raw)
    note = {"step": 30, "sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}
    path.with_name("checkpoint.json").write_text(json.dumps(note))


DAMAGES = [truncate, edit, restep, hollow, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint(cfg, whole, capsys, damage):
    run = toy.main(cfg, stop=30)
    damage(run.folder / "checkpoint" / "state.msgpack")
    assert equal(resumed(run).folder, whole.folder)
    message = capsys.readouterr().err
    assert "is damaged" in message
    assert "Using checkpoint.old, step 20" in message
    assert (run.folder / "checkpoint.damaged").exists()


def test_no_whole_checkpoint(cfg):
    run = toy.main(cfg, stop=30)
    for name in ("checkpoint", "checkpoint.old"):
        truncate(run.folder / name / "state.msgpack")
    before = rows(run.folder)
    with pytest.raises(experiment.RunError, match="No intact checkpoint is left") as error:
        resumed(run)
    assert str(run.folder / "checkpoint.old") in str(error.value)
    assert rows(run.folder) == before


def test_killed_while_writing_a_checkpoint(tmp_path, monkeypatch):
    """Stopped before each call that touches the disk: the checkpoint is whole, old or new."""

    class Killed(BaseException):
        pass

    def deadly(original):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == -1:
                raise Killed
            return original(*args, **kwargs) if left[0] >= 0 else None  # the dead tidy nothing

        return call

    steps = set()
    for deadline in range(20):
        folder, left = tmp_path / str(deadline), [deadline]
        folder.mkdir()
        for step in (1, 2):
            checkpoint.save(folder, step, {"x": jnp.full(3, step)})
        with monkeypatch.context() as patch:
            names = [(Path, "mkdir"), (Path, "rename"), (Path, "replace"), (os, "fsync")]
            for owner, name in [*names, (checkpoint.shutil, "rmtree")]:
                patch.setattr(owner, name, deadly(getattr(owner, name)))
            with suppress(Killed):
                checkpoint.save(folder, 3, {"x": jnp.full(3, 3)})
        step, saved = checkpoint.read(folder)
        steps.add((step, (folder / "checkpoint").exists()))
        assert step == 3 if left[0] >= 0 else step in (2, 3)
        assert (saved["x"] == step).all()
        checkpoint.save(folder, 4, {"x": jnp.full(3, 4)})  # and the next save works
        assert checkpoint.read(folder)[0] == 4
    assert steps == {(2, True), (2, False), (3, True)}  # (2, False): between the two renames


def test_killed_between_the_renames(cfg, whole):
    run = toy.main(cfg, stop=30)
    (run.folder / "checkpoint.old").rename(run.folder / "x")
    (run.folder / "checkpoint").rename(run.folder / "checkpoint.old")
    (run.folder / "x").rename(run.folder / "checkpoint.tmp")
    assert equal(resumed(run).folder, whole.folder)
    assert not (run.folder / "checkpoint.tmp").exists()


def test_disk_full(cfg, whole, monkeypatch):
    run = toy.main(cfg, stop=20)

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save = checkpoint.save
    for owner, name, value in (
        (checkpoint, "save", lambda *args: full(0) if args[1] == 40 else save(*args)),
        (checkpoint.os, "fsync", full),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            with pytest.raises(experiment.RunError, match="No space left on device") as error:
                resumed(run)
        assert "Saved up to step" in str(error.value)
        assert "--resume" in str(error.value)
    assert checkpoint.read(run.folder)[0] == 30
    assert equal(resumed(run).folder, whole.folder)


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_training(cfg, monkeypatch):
    """A run that is finished can still be looked at."""
    run, done = toy.main(cfg, stop=20), toy.main(cfg)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(experiment.RunError, match="cannot be written to") as error:
        resumed(run)
    assert str(run.folder) in str(error.value)
    assert resumed(done).step == 50


def test_output_folder_that_cannot_be(cfg, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(experiment.RunError, match="Cannot use .*file"):
        toy.main(dataclasses.replace(cfg, out=str(tmp_path / "file")))
    monkeypatch.chdir(tmp_path)
    run = toy.main(dataclasses.replace(cfg, out="~nobody-of-that-name/x"), stop=10)
    assert run.folder.is_relative_to(tmp_path / "~nobody-of-that-name")  # as a shell has it


def test_checkpoint_of_another_shape(tmp_path):
    checkpoint.save(tmp_path, 1, {"a": {"x": jnp.zeros(3)}})
    saved = checkpoint.read(tmp_path)[1]
    for template, words in (
        ({"a": {"x": jnp.zeros(4)}}, r"\['a'\]\['x'\] is float32\[3\], not float32\[4\]"),
        ({"a": {"x": jnp.zeros(3, int)}}, "not int32"),
        ({"a": {"y": jnp.zeros(3)}}, "does not fit"),
        ({"a": jnp.zeros(3)}, "does not fit"),
    ):
        with pytest.raises(experiment.RunError, match=words):
            checkpoint.fill(template, saved)


def test_a_checkpoint_may_lack_fields_that_hold_no_number(tmp_path):
    """Fields of a newer program, from arrays and shapes; one with numbers may not be missing."""
    checkpoint.save(tmp_path, 1, {"a": jnp.ones(3)})
    saved, none = checkpoint.read(tmp_path)[1], {"x": jnp.zeros((0, 2))}
    for template in ({"a": jnp.zeros(3), "b": none}, {"a": jnp.zeros(3), "b": jnp.zeros(0)}):
        for like in (template, jax.eval_shape(lambda t=template: t)):
            found = checkpoint.fill(like, saved)
            np.testing.assert_array_equal(found["a"], 1)
            assert jax.tree.map(jnp.shape, found["b"]) == jax.tree.map(jnp.shape, template["b"])
    with pytest.raises(experiment.RunError, match="does not fit"):
        checkpoint.fill({"a": jnp.zeros(3), "b": jnp.zeros(1)}, saved)


# --- Recording ---


def test_record_checks_its_arguments(cfg):
    run = experiment.Run(experiment.resolve(cfg), toy.dataset(cfg.env))
    steps = run.steps()
    step = next(steps)
    with pytest.raises(ValueError, match="shape"):
        run.record(step, {"loss": np.zeros(3)})
    run.record(step, {"loss": np.zeros(2)})
    with pytest.raises(ValueError, match="columns"):
        run.record(step, {"loss": np.zeros(2), "new": np.zeros(2)})


# --- Divergence ---


@pytest.mark.parametrize("name, value", [("loss", np.nan), ("loss", np.inf), ("q_pi", -1e9)])
def test_a_seed_that_diverges_leaves_the_others_alone(cfg, whole, capsys, name, value):
    spoil = [(30, 1, name, value)]
    run = toy.main(cfg, spoil=spoil)
    told = f"Seed 1 has diverged: {name} is {value:.3g} at step 30. Its last good checkpoint is"
    assert capsys.readouterr().out.count(f"{told} from step 20.") == 2  # then, and at the end
    good = [row for row in rows(whole.folder) if ",0," in row[:5]]
    assert [row for row in rows(run.folder) if ",0," in row[:5]] == good
    gone = [row.split(",")[2:] for row in rows(run.folder) if row[:5] in ("40,1,", "50,1,")]
    assert gone == [["nan"] * len(gone[0])] * 2
    saved, clean = checkpoint.read(run.folder)[1], checkpoint.read(whole.folder)[1]
    early = checkpoint.read(toy.main(cfg, stop=20).folder)[1]
    for key in ("x", "count", "obs_mean"):
        assert np.array_equal(saved[key][0], clean[key][0])
        assert np.array_equal(saved[key][1], early[key][1])
    assert saved["count"].tolist() == [50, 20]

    again = resumed(toy.main(cfg, stop=40, spoil=spoil))  # the seed stays stopped
    assert equal(again.folder, run.folder)
    again = resumed(toy.main(dataclasses.replace(cfg, save_every=20), stop=30, spoil=spoil))
    assert equal(again.folder, whole.folder)  # begun again at step 20, now it does not diverge


def test_a_run_whose_seeds_all_diverge_ends(cfg, capsys):
    spoil = [(20, 0, "loss", np.nan), (30, 1, "q_data", 1e9)]
    with pytest.raises(experiment.RunError) as error:
        toy.main(cfg, spoil=spoil)
    message = str(error.value)
    assert "Seed 1 has diverged: q_data is 1e+09 at step 30" in message
    assert "from step 20" in message
    assert "No seed is left" in message
    assert "Seed 0 has diverged: loss is nan at step 20" in capsys.readouterr().out
    (folder,) = Path(cfg.out).glob("toy/*/*")
    assert checkpoint.read(folder)[0] == 20
    assert rows(folder)[-1].startswith("30,1,")
    with pytest.raises(experiment.RunError) as error:
        toy.main(dataclasses.replace(cfg, num_seeds=1), spoil=[(10, 0, "q_pi", np.inf)])
    assert "q_pi is inf at step 10. It has no good checkpoint" in str(error.value)


def test_large_values_are_no_divergence(cfg):
    """A Q-value may be 1,000 times what an episode of the data could earn, other metrics any."""
    data = toy.dataset(cfg.env)
    limit = 1e3 * np.abs(data.reward).max() * 10
    run = experiment.Run(experiment.resolve(cfg), data)
    steps = run.steps()
    run.record(next(steps), {"q_data": np.array([1, -1]) * 0.9 * limit, "loss": np.full(2, 1e30)})
    assert not (run.folder / "diverged.json").exists()
    with pytest.raises(experiment.RunError, match="Seed 1 has diverged: q_data"):
        run.record(next(steps), {"q_data": np.array([1, -1]) * 1.1 * limit, "loss": np.zeros(2)})


# --- Loading ---


def test_load(whole, monkeypatch, tmp_path):
    monkeypatch.setattr(folders, "PROJECT", tmp_path)
    with pytest.raises(experiment.RunError, match="no algorithm 'toy'"):
        evaluation.load(whole.folder)
    (tmp_path / "algorithms").symlink_to(Path(toy.__file__).parent)
    module, cfg, state = evaluation.load(whole.folder)
    assert vars(cfg) == vars(whole.cfg)
    saved = checkpoint.read(whole.folder)[1]
    assert np.array_equal(state.x, saved["x"])
    assert state.count.tolist() == [50, 50]

    obs = np.random.default_rng(0).normal(size=(7, 5))
    policies = [evaluation.load_policy(whole.folder, seed) for seed in (0, 1)]
    actions = np.array([policy(obs) for policy in policies])
    assert np.array_equal(actions, jax.vmap(module.act, (0, None))(state, jnp.float32(obs)))
    assert policies[0](obs[0]).shape == (2,)


@pytest.mark.parametrize("name", ["../toy", "toy.py", "os", "", "toy/../toy"])
def test_load_executes_nothing_else(cfg, name):
    run = toy.main(cfg, stop=10)
    path = run.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"algorithm": name}))
    with pytest.raises(experiment.RunError, match="no algorithm"):
        evaluation.load(run.folder)


# --- Ctrl-C ---


@contextmanager
def started(out, *flags):
    """The toy in a process of its own, and a function that reads its lines up to some words."""
    command = [sys.executable, toy.__file__, "--out", str(out), *flags]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def wait_for(words):
        text = ""
        while words not in text:
            line = process.stdout.readline()
            assert line, text
            text += line
        return text

    with subprocess.Popen(command, **pipes) as process:
        try:
            yield process, wait_for
        finally:
            process.kill()


def test_interrupt_ends_after_the_save(tmp_path, whole):
    with started(tmp_path, "--delay", "0.5", "--save-every", "50") as (process, wait_for):
        wait_for("20/50")
        process.send_signal(signal.SIGINT)
        text = wait_for("Stopped. ")
        assert "Traceback" not in text + process.stdout.read()
        assert process.wait(10) == 130
    (folder,) = tmp_path.glob("toy/*/*")
    step = checkpoint.read(folder)[0]
    assert step in (20, 30)  # 20 if the signal came between its record and its save
    assert "Stopping once this chunk is saved" in text
    assert f"Saved up to step {step}. To continue: python" in text
    named = text.split("--resume ")[1].split()[0]  # relative to here where that is shorter
    assert Path(named).resolve() == folder
    assert equal(toy.main(toy.Config(resume=str(folder), delay=0.5)).folder, whole.folder)


def test_second_interrupt_ends_at_once(tmp_path):
    with started(tmp_path, "--delay", "5") as (process, wait_for):
        wait_for("10/50")
        while not list(tmp_path.glob("toy/*/*/checkpoint")):
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        wait_for("Stopping")
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        text = process.stdout.read()
        assert process.wait(10) == 130
        assert time.monotonic() - begin < 3
    assert "Stopped at once. Saved up to step 10." in text
    assert "Traceback" not in text
    (folder,) = tmp_path.glob("toy/*/*")
    assert checkpoint.read(folder)[0] == 10


def test_one_process_at_a_time(tmp_path, whole):
    """Two that resume one run would write over each other's checkpoints; a dead one is no bar."""
    with started(tmp_path, "--delay", "0.5") as (process, wait_for):
        wait_for("20/50")
        (folder,) = tmp_path.glob("toy/*/*")
        with pytest.raises(experiment.RunError, match="Another process is training"):
            toy.main(toy.Config(resume=str(folder)))
        process.kill()
    assert equal(toy.main(toy.Config(resume=str(folder))).folder, whole.folder)


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    heard = []
    with runtime.on_interrupt(lambda: heard.append(1), lambda: heard.append(2)):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
    assert heard == [1, 2, 2]
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_sigterm_outside_of_the_steps_is_ctrl_c(monkeypatch):
    """While a behaviour is cloned, say; what a parent told to ignore SIGTERM goes on."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # put back afterwards
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        runtime.end_at_interrupt()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        runtime.end_at_interrupt()
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_data_without_an_environment_is_refused_at_once(cfg):
    """Not after the first chunk, hours later; unscored it is welcome."""
    data = dataclasses.replace(toy.dataset(cfg.env), env_id="")
    with pytest.raises(experiment.RunError, match="--eval-episodes 0"):
        experiment.resolve(cfg, {}, data)
    assert not list(Path(cfg.out).rglob("config.json"))
    experiment.Run(experiment.resolve(dataclasses.replace(cfg, eval_episodes=0), {}, data), data)
