"""The real command line in processes of its own, on real, bundled data, as a user types it.

test_all.py has every file's command line in one process.
"""

import csv
import itertools
import json
import math
import shutil
import time

import h5py
import numpy as np
import pytest
import tiny
from commands import ROOT, command, start

SHORT = ["--num-updates", "100", "--eval-every", "50", "--eval-episodes", "2"]


def rows(folder):
    (path,) = folder.glob("runs/*/*/*/metrics.csv")
    with open(path) as f:
        return list(csv.DictReader(f)), path.parent


def trains(name, folder, where, home=None):
    """A tiny run of two seeds: finite metrics, returns, checkpoint, curve.

    Another process, which knows the folder alone, scores it to the same bits.
    """
    words = [*where, *tiny.flags(tiny.settings(name))]
    code, out, err = command(f"{name}.py", *words, cwd=folder, home=home)
    assert code == 0, err
    assert "Warning" not in err
    table, run = rows(folder)
    steps, seeds = map(str, range(10, 101, 10)), ("0", "1")
    assert [(row["step"], row["seed"]) for row in table] == list(itertools.product(steps, seeds))
    for row in table:
        scored = (
            {"return_mean", "return_std", "score"} if row["step"] not in ("50", "100") else set()
        )
        assert all(math.isfinite(float(row[name])) for name in row.keys() - scored)
    assert json.loads((run / "config.json").read_text())["algorithm"] == name
    assert np.shape(json.loads((run / "returns.json").read_text())["100"]) == (2, 1)
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "updates/s" in out

    words = "-m", "common.evaluation", run
    code, out, err = command(*words, cwd=ROOT, script=None, home=home)
    assert code == 0, err
    assert out.count(f"1 episodes of {tiny.sizes(name)[0]}") == 2
    assert out.endswith("Bit for bit what training recorded.\n")


def test_trains_on_bundled_data_from_any_folder_as_a_user_compiles_it(tmp_path):
    trains("iql", tmp_path, [], tmp_path / "home")


@pytest.mark.parametrize(
    "name", ["combo", "dt", pytest.param("decision_diffuser", marks=pytest.mark.slow)]
)
def test_trains_on_a_file(name, tmp_path):
    """A file of each other kind: with a model, of sequences, of plans; programs of test_all.py."""
    tiny.write(tmp_path / "tiny.hdf5")
    trains(name, tmp_path, ["--env", "tiny.hdf5", "--env-id", "Hopper-v5"])


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_file_trains_on_bundled_data_as_a_user_compiles_it(name, tmp_path):
    trains(name, tmp_path, [], tmp_path / "home")


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


@pytest.mark.slow
def test_killed_and_resumed_it_ends_as_an_uninterrupted_run(tmp_path):
    """Killed after its first checkpoint; the metrics and the weights are those of a whole run."""
    words = ["--num-updates", "30000", "--eval-every", "5000", "--eval-episodes", "1"]
    words += ["--widths", "8", "--batch-size", "8", "--env", "stillwater/pendulum/medium-v0"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    assert command("iql.py", *words, cwd=whole)[0] == 0

    with open(tmp_path / "log", "w") as log:
        running = start("iql.py", *words, cwd=parts, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while not list(parts.glob("runs/*/*/*/checkpoint")):
            assert running.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        running.kill()
        running.wait()
    found, run = rows(parts)
    assert found[-1]["step"] != "30000", "too late: nothing was interrupted"
    code, _, err = command("iql.py", "--resume", str(run), cwd=parts)
    assert code == 0, err

    timing = {"seconds", "updates_per_second"}
    (wanted, reference), (found, _) = rows(whole), rows(parts)
    assert len(wanted) == 30
    for a, b in zip(wanted, found, strict=True):
        assert {k: a[k] for k in a.keys() - timing} == {k: b[k] for k in b.keys() - timing}
    last = [r / "checkpoint" for r in (reference, run)]
    files = [sorted(p.name for p in folder.iterdir()) for folder in last]
    assert files[0] == files[1]
    for name in files[0]:
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes(), name
