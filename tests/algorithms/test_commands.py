"""The real command line on real, bundled data, as a user types it."""

import csv
import dataclasses
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import tyro

ROOT = Path(__file__).parents[2]
NAMES = [path.stem for path in sorted((ROOT / "algorithms").glob("*.py"))]
SHORT = ["--num-updates", "100", "--eval-every", "50", "--eval-episodes", "2"]
EXTRA = {
    "awr": "--actor-steps 25 --critic-steps 5".split(),
    "diffuser": "--width 16 --multiples 1 2 --horizon 4 --samples 2 --ddim-steps 2".split(),
    "edac": "--widths 32 32 --num-critics 3".split(),
    "rebrac": "--widths 32 32".split(),
    "dt": "--width 16 --layers 1 --context 5".split(),
    "combo": (
        "--widths 32 32 --max-epochs 1 --model-widths 32 32 --model-decay 0 0 0"
        " --rollout-every 25 --rollout-batch 1000"
    ).split(),
}


def command(*words, cwd, script=ROOT / "algorithms"):
    """Runs `python <script>/<words>`, or `python <words>`, in `cwd`: (code, stdout, stderr)."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
    if cwd != ROOT:
        environment["XDG_CACHE_HOME"] = str(cwd / "cache")
    words = [str(script / words[0]), *words[1:]] if script else words
    line = [sys.executable, *words]
    done = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def rows(folder):
    (path,) = folder.glob("runs/*/*/*/metrics.csv")
    with open(path) as f:
        return list(csv.DictReader(f)), path.parent


@pytest.mark.parametrize("name", NAMES)
def test_trains_on_bundled_data_from_any_folder(name, tmp_path):
    """100 updates of two seeds on real hopper data: finite metrics, returns, checkpoint, curve.

    Another process, which knows the folder alone, scores it to the same bits.
    """
    code, out, err = command(
        f"{name}.py", *SHORT, "--num-seeds", "2", *EXTRA.get(name, []), cwd=tmp_path
    )
    assert code == 0, err
    assert "Warning" not in err
    table, run = rows(tmp_path)
    assert {(row["step"], row["seed"]) for row in table} == {
        (step, seed) for step in ("50", "100") for seed in ("0", "1")
    }
    numbers = [float(value) for row in table for value in row.values()]
    assert all(map(math.isfinite, numbers))
    assert json.loads((run / "config.json").read_text())["algorithm"] == name
    assert np.shape(json.loads((run / "returns.json").read_text())["100"]) == (2, 2)
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "updates/s" in out

    code, out, err = command("-m", "common.evaluation", str(run), cwd=ROOT, script=None)
    assert code == 0, err
    assert out.count("2 episodes of Hopper-v5") == 2
    assert out.endswith("Bit for bit what training recorded.\n")


@pytest.mark.parametrize("name", NAMES)
def test_every_flag_parses(name):
    """Each field by its flag, with another value of its own type than the default."""
    module = importlib.import_module(name)
    for field in dataclasses.fields(module.Config):
        flag, value = "--" + field.name.replace("_", "-"), field.default
        kind = str(field.type)
        if value is True or (value is None and "bool" in kind):
            words, expected = ["--no-" + flag[2:]], False
            if value is None:
                words, expected = [flag, "False"], False
        elif value is False:
            words, expected = [flag], True
        elif "Literal" in kind:
            expected = next(v for v in field.type.__args__ if v != value)
            words = [flag, expected]
        elif value is None and "tuple" in kind:
            expected = (2, 3) if "int" in kind else (0.125, 3.0)
            words = [flag, *map(str, expected)]
        elif isinstance(value, tuple):
            expected = tuple(2 * v for v in value)
            words = [flag, *map(str, expected)]
        elif isinstance(value, int):
            words, expected = [flag, str(value + 3)], value + 3
        elif isinstance(value, float) or (value is None and "float" in kind):
            words, expected = [flag, "0.125"], 0.125
        elif value is None:
            words, expected = [flag, "3"], 3
        else:
            words, expected = [flag, "else"], "else"
        assert getattr(tyro.cli(module.Config, args=words), field.name) == expected, flag


@pytest.mark.parametrize("name", NAMES)
def test_help_shows_every_comment(name, tmp_path):
    code, out, _ = command(f"{name}.py", "--help", cwd=tmp_path)
    assert code == 0
    assert "dataset name, see common/datasets.py" in " ".join(out.replace("│", " ").split())


def test_a_copy_beside_common_works_with_a_file(tmp_path):
    """iql.py and common/ alone: with a file it trains, without it says what is missing."""
    shutil.copy(ROOT / "algorithms/iql.py", tmp_path)
    shutil.copytree(ROOT / "common", tmp_path / "common")
    rng, n = np.random.default_rng(0), 400
    with h5py.File(tmp_path / "mine.hdf5", "w") as f:
        obs = rng.normal(size=(n + 1, 3)).astype(np.float32)
        f["observations"], f["next_observations"] = obs[:-1], obs[1:]
        f["actions"] = rng.uniform(-2, 2, (n, 1)).astype(np.float32)
        f["rewards"] = rng.normal(size=n).astype(np.float32)
        f["terminals"] = np.zeros(n, bool)
        f["timeouts"] = np.arange(n) % 200 == 199
    words = [*SHORT, "--env", "mine.hdf5", "--env-id", "Pendulum-v1"]
    code, _, err = command("iql.py", *words, cwd=tmp_path, script=tmp_path)
    assert code == 0, err
    assert len(rows(tmp_path)[0]) == 2

    code, out, err = command("iql.py", cwd=tmp_path, script=tmp_path)
    assert code == 1
    assert "stillwater/hopper/medium-replay-v0" in err
    assert "Traceback" not in err
    assert len(list(tmp_path.glob("runs/*/*/*"))) == 1  # no folder for a run that never was


def test_killed_and_resumed_it_ends_as_an_uninterrupted_run(tmp_path):
    """Killed after its first checkpoint; the metrics and the weights are those of a whole run."""
    words = ["--num-updates", "3000", "--eval-every", "500", "--eval-episodes", "1"]
    words += ["--env", "stillwater/pendulum/medium-v0"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    assert command("iql.py", *words, cwd=whole)[0] == 0

    line = [sys.executable, str(ROOT / "algorithms/iql.py"), *words]
    with open(tmp_path / "log", "w") as log:
        running = subprocess.Popen(line, cwd=parts, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while not list(parts.glob("runs/*/*/*/checkpoint")):
            assert running.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        running.kill()
        running.wait()
    found, run = rows(parts)
    assert found[-1]["step"] != "3000", "too late: nothing was interrupted"
    code, _, err = command("iql.py", "--resume", str(run), cwd=parts)
    assert code == 0, err

    timing = {"seconds", "updates_per_second"}
    (wanted, reference), (found, _) = rows(whole), rows(parts)
    assert len(wanted) == 6
    for a, b in zip(wanted, found, strict=True):
        assert {k: a[k] for k in a.keys() - timing} == {k: b[k] for k in b.keys() - timing}
    last = [r / "checkpoint" for r in (reference, run)]
    files = [sorted(p.name for p in folder.iterdir()) for folder in last]
    assert files[0] == files[1]
    for name in files[0]:
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes(), name
