"""What every algorithm does: a run by its command line and from Python, its bits, flags, refusals.

Each file trains once, tiny, by its command line in this process; all tests look at that run.
test_commands.py has whole processes.
"""

import csv
import dataclasses
import importlib
import json
import logging
import os
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
import tyro
from commands import ROOT, run
from flax import serialization

from common import experiment
from common.evaluation import __main__ as scoring
from common.experiment import TIMING, checkpoint, plots

BEFOREHAND = "['dynamics']", "['behaviour']"
STEPS, SEEDS = range(10, 101, 10), (0, 1)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """{whether actions are discrete: a tiny Dataset}."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield {
            kind: tiny.dataset(folder / f"{kind}.hdf5", name)
            for kind, name in ((False, "iql"), (True, tiny.DISCRETE[0]))
        }


class Listener(logging.Handler):
    """Keeps the names of the programs that JAX compiles."""

    def __init__(self):
        super().__init__()
        self.names = []

    def emit(self, record):
        self.names += re.findall(r"Compiling jit\((\w+)\)", record.getMessage())


OFTEN = [
    pytest.param(name, marks=pytest.mark.slow) if name in tiny.TWINS else name
    for name in tiny.NAMES
]


@pytest.fixture(scope="module", params=tiny.NAMES)
def whole(request, kinds, tmp_path_factory):
    """A run by the command line: name, data, module, folder and what the command said."""
    name, out = request.param, tmp_path_factory.mktemp(request.param)
    data = kinds[name in tiny.DISCRETE]
    where = ["--env", data.name, "--env-id", data.env_id, "--out", out]
    compiled, logger = Listener(), logging.getLogger("jax._src.interpreters.pxla")
    logger.addHandler(compiled)
    with jax.log_compiles():
        code, text, errors = run(name, *where, *tiny.flags(tiny.settings(name)))
    logger.removeHandler(compiled)
    assert code == 0, errors
    (folder,) = out.glob(f"{name}/*/*")
    module = importlib.import_module(name)
    yield SimpleNamespace(
        name=name, data=data, module=module, folder=folder, text=text, errors=errors,
        compiled=compiled.names,
    )  # fmt: skip
    jax.clear_caches()


@pytest.fixture(autouse=True)
def no_words(monkeypatch):
    """As in a notebook: argv says nothing of the config."""
    monkeypatch.setattr(sys, "argv", ["notebook", "-f", "kernel.json"])


@pytest.fixture
def no_curve(monkeypatch):
    """Drawing takes longer than training."""
    monkeypatch.setattr(plots, "plot", lambda path, *_: path.write_bytes(b""))


def table(folder):
    """metrics.csv, a dict for each row, without the timing columns."""
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return [{name: x for name, x in row.items() if name not in TIMING} for row in rows]


def saved(folder, name="checkpoint"):
    """{path: leaf} of a checkpoint's state."""
    raw = (folder / name / "state.msgpack").read_bytes()
    return leaves(serialization.msgpack_restore(raw)["state"])


def leaves(state):
    """{path: leaf} of a state."""
    flat = jax.tree_util.tree_leaves_with_path(serialization.to_state_dict(state))
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in flat}


def differing(a, b):
    """Paths of the leaves that are not the same bits."""
    assert a.keys() == b.keys()
    return [path for path in a if a[path].tobytes() != b[path].tobytes()]


# --- A whole run ---


def test_a_run_is_whole(whole):
    """Finite metrics of every chunk and seed, returns of every evaluation, checkpoint, curve."""
    rows = table(whole.folder)
    steps = [(int(row["step"]), int(row["seed"])) for row in rows]
    assert steps == [(step, seed) for step in STEPS for seed in SEEDS]
    of_evaluation = {"return_mean", "return_std", "score"}
    for row in rows:
        evaluated = int(row["step"]) % 50 == 0
        if whole.data.ref_min is None:  # CartPole has no references
            assert row.pop("score") == "nan"
        for name, x in row.items():
            assert np.isfinite(float(x)) or (name in of_evaluation and not evaluated), (name, row)
    returns = json.loads((whole.folder / "returns.json").read_text())
    assert {step: np.shape(x) for step, x in returns.items()} == {"50": (2, 1), "100": (2, 1)}
    info = json.loads((whole.folder / "config.json").read_text())
    assert info["algorithm"] == whole.name
    assert info["dims"] == [64, *tiny.sizes(whole.name)[1:]]
    assert (whole.folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert checkpoint.read(whole.folder)[0] == 100
    assert "updates/s" in whole.text and "Final" in whole.text
    assert "Warning" not in whole.errors and "Traceback" not in whole.errors
    assert all(np.isfinite(x).all() for x in saved(whole.folder).values() if x.dtype.kind == "f")


def test_each_program_is_compiled_once(whole):
    """The second chunk is of the first one's types, and so on. A policy with memory is compiled
    without one and with it."""
    own = [name for name in whole.compiled if hasattr(whole.module, name)]
    assert {"init", "train_chunk"} <= set(own)
    assert own.count("act") <= 2
    own = [name for name in own if name != "act"]
    assert len(own) == len(set(own)), own


def test_scored_again_it_earns_the_same_bits(whole, capsys):
    scoring.main(whole.folder)
    text = capsys.readouterr().out
    assert text.count(f"1 episodes of {whole.data.env_id}") == 2
    assert text.endswith("Bit for bit what training recorded.\n")


def test_the_weights_learn_and_no_two_seeds_are_alike(whole):
    """Since the checkpoint before the last one. A model of the environment and a cloned behaviour
    are trained beforehand."""
    state, before = saved(whole.folder), saved(whole.folder, "checkpoint.old")
    weights = [path for path in state if "kernel" in path]
    weights = [path for path in weights if not path.startswith(BEFOREHAND)]
    assert weights
    for path in weights:
        assert (state[path] != before[path]).mean() > 0.5, path
        assert (state[path][0] != state[path][1]).mean() > 0.5, path


# --- From Python, and however it is cut ---


@pytest.mark.parametrize("whole", OFTEN, indirect=True)
def test_train_from_python_gives_the_commands_bits_in_chunks_of_any_size(whole, tmp_path, no_curve):
    """The state of `train(cfg, dataset)`, without a command line, in chunks of 50 updates and with
    one evaluation; the command's were of 10, with two evaluations."""
    cfg = tiny.config(whole.name, log_every=50, eval_every=100, out=str(tmp_path))
    state = whole.module.train(cfg, whole.data)
    assert differing(leaves(state), saved(whole.folder)) == []
    (folder,) = tmp_path.glob(f"{whole.name}/*/*")
    rows, fine = table(folder), table(whole.folder)
    assert [row["step"] for row in rows] == ["50", "50", "100", "100"]
    for row in rows:
        parts = [x for x in fine if x["seed"] == row["seed"]]
        parts = [
            x for x in parts if int(x["step"]) in range(int(row["step"]) - 40, int(row["step"]) + 1)
        ]
        for name in row.keys() - {"step", "seed", "return_mean", "return_std", "score"}:
            mean = np.mean([float(x[name]) for x in parts])
            np.testing.assert_allclose(float(row[name]), mean, rtol=1e-4, atol=1e-5, err_msg=name)
    assert [x["return_mean"] for x in rows[2:]] == [x["return_mean"] for x in fine[-2:]]


class Killed(BaseException):
    """Ends a run where SIGKILL would."""


@pytest.mark.parametrize("whole", OFTEN, indirect=True)
def test_killed_and_resumed_it_ends_with_the_same_bits(whole, tmp_path, no_curve, monkeypatch):
    """Killed at step 70, after the checkpoint of step 50. What Ctrl-C does: test_experiment.py."""
    record = experiment.Run.record

    def killed(self, step, *args):
        record(self, step, *args)
        if step == 70:
            raise Killed

    monkeypatch.setattr(experiment.Run, "record", killed)
    with pytest.raises(Killed):
        whole.module.train(tiny.config(whole.name, out=str(tmp_path)), whole.data)
    (folder,) = tmp_path.glob(f"{whole.name}/*/*")
    assert checkpoint.read(folder)[0] == 50 and table(folder)[-1]["step"] == "70"
    monkeypatch.setattr(experiment.Run, "record", record)
    code, text, errors = run(whole.name, "--resume", folder)
    assert code == 0, errors
    assert "Resumed at step 50" in text
    for name in ("checkpoint/state.msgpack", "checkpoint/checkpoint.json", "returns.json"):
        assert (folder / name).read_bytes() == (whole.folder / name).read_bytes(), name
    assert table(folder) == table(whole.folder)


@pytest.mark.parametrize("whole", OFTEN, indirect=True)
def test_a_seed_of_many_is_that_seed_alone(whole, tmp_path, no_curve):
    """The second seed, 100 updates by itself: the same to float32's rounding."""
    cfg = tiny.config(whole.name, seed=1, num_seeds=1, eval_episodes=0, out=str(tmp_path))
    alone = leaves(whole.module.train(cfg, whole.data))
    for path, x in saved(whole.folder).items():
        np.testing.assert_allclose(alone[path][0], x[1], rtol=1e-5, atol=1e-5, err_msg=path)


def test_a_run_whose_seeds_diverge_ends_in_one_message(whole, tmp_path):
    broken = dataclasses.replace(whole.data, obs=np.full_like(whole.data.obs, np.nan))
    with pytest.raises(experiment.RunError, match="No seed is left") as error:
        whole.module.train(tiny.config(whole.name, out=str(tmp_path)), broken)
    for seed in SEEDS:
        assert f"Seed {seed} has diverged" in str(error.value)
    (folder,) = tmp_path.glob(f"{whole.name}/*/*")
    assert not (folder / "checkpoint").exists()


# --- The config ---


def other(field):
    """Another value of a field's own type than its default."""
    value, kind = field.default, str(field.type)
    if "bool" in kind:
        return not value
    if "Literal" in kind:
        return next(x for x in field.type.__args__ if x != value)
    if "tuple" in kind:
        return tuple(2 * x for x in value or ((2, 3) if "int" in kind else (0.125, 3.0)))
    if "str" in kind:
        return "else"
    if "float" in kind:
        return 0.125
    return (value or 0) + 3


@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_flag_parses(name):
    """Each field by its flag, with another value than the default."""
    kind = importlib.import_module(name).Config
    values, words = {field.name: other(field) for field in dataclasses.fields(kind)}, []
    for field in dataclasses.fields(kind):
        value = values[field.name]
        if isinstance(value, bool) and field.default is None:
            words += ["--" + field.name.replace("_", "-"), str(value)]
        else:
            words += tiny.flags({field.name: value})
        assert value != field.default
    assert vars(tyro.cli(kind, args=words)) == values


@pytest.mark.parametrize("name", tiny.NAMES)
def test_help_shows_every_comment(name):
    code, out, _ = run(name, "--help")
    assert code == 0
    shown = " ".join(out.replace("│", " ").split())
    text = (ROOT / f"algorithms/{name}.py").read_text("utf-8").split("class Config:")[1]
    for field in dataclasses.fields(importlib.import_module(name).Config):
        flag = field.name.replace("_", "-")
        line = next(x for x in text.splitlines() if x.startswith(f"    {field.name}: "))
        assert f"-{flag} " in shown, flag
        assert line.split("  # ")[1] in shown, flag


@pytest.mark.parametrize("name", tiny.NAMES)
def test_values_that_are_no_number_or_out_of_range_are_refused(name):
    """Of every field, also of those that TUNED fills; the message has the flag's name."""
    kind = importlib.import_module(name).Config
    seen = 0
    for field in dataclasses.fields(kind):
        wrong = []
        if "float" in str(field.type):
            wrong = [float("nan")]
        elif "int" in str(field.type):
            wrong = [-1, 10**20]
        for value in wrong:
            value = (value,) if "tuple" in str(field.type) else value
            with pytest.raises(experiment.RunError) as error:
                experiment.resolve(kind(**{field.name: value}))
            message = str(error.value)
            assert message.startswith(f"--{field.name.replace('_', '-')} "), message
            assert "\n" not in message
            seen += 1
    assert seen > 10


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(num_updates=80), "--num-updates 80: must be a multiple of --eval-every 50"),
        (dict(batch_size=65), "--batch-size 65: .* has only 64 transitions"),
        (dict(num_seeds=0), "--num-seeds 0: must be from 1"),
    ],
)
@pytest.mark.parametrize("name", tiny.NAMES)
def test_what_contradicts_itself_or_the_data_is_refused(name, flags, message, kinds, tmp_path):
    data = kinds[name in tiny.DISCRETE]
    with pytest.raises(experiment.RunError, match=message):
        importlib.import_module(name).train(tiny.config(name, out=str(tmp_path), **flags), data)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", tiny.NAMES)
def test_importing_a_file_runs_nothing(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--no-such-flag"])
    before = dict(os.environ), Path.cwd()
    runpy.run_path(str(ROOT / f"algorithms/{name}.py"), run_name="imported")
    assert capsys.readouterr() == ("", "")
    assert (dict(os.environ), Path.cwd()) == before
