"""Kills and resumption: a test for each family of methods, and that the kills hit what they say."""

import importlib
import json
import random
import signal
import subprocess
import sys

import pytest
import tyro

from benchmarks.faults import resume
from common import experiment

FAMILIES = {
    "imitation": "bc",
    "critics": "iql",
    "a schedule of its own": "awr",
    "sequences": "dt",
    "plans": "diffuser",
    "a learned model": "combo",
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_killed_runs_end_as_if_they_had_not_been(family, tmp_path):
    random.seed(0)
    row = resume.shake(FAMILIES[family], 4, tmp_path)
    assert row["kills"] >= 4 and row["runs"] == row["runs_with_equal_bits"]


@pytest.mark.parametrize("name", resume.Config().algorithms)
def test_every_algorithm_has_flags_for_it(name):
    module = importlib.import_module(name)
    cfg = tyro.cli(module.Config, args=resume.flags(name))
    cfg = experiment.resolve(cfg, getattr(module, "TUNED", None))
    assert cfg.num_updates // cfg.eval_every >= 10 and cfg.log_every == 20


def test_kills_hit_every_phase_and_twice_in_a_row():
    random.seed(0)
    plan = resume.plan(8)
    assert set(plan) == set(resume.PHASES) - {0}
    assert plan[1::2] == [resume.COMPILING] * 4  # right after each of the others


def test_a_killed_process_leaves_no_open_pipe(tmp_path):
    (mark := tmp_path / "mark").write_bytes(bytes([resume.TRAINING]))
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert resume.kill(process, mark, resume.TRAINING, 1, 0.01) == "training"
    assert process.returncode == -signal.SIGKILL and process.stderr.closed


def test_the_file_keeps_the_rows_of_other_algorithms(tmp_path, monkeypatch):
    def shake(name, kills, folder):
        return {"algorithm": name, "kills": kills, "runs": 1, "runs_with_equal_bits": 1}

    monkeypatch.setattr(resume, "shake", shake)
    file = tmp_path / "resume.json"
    for names, kills in ((("iql", "bc"), 3), (("iql",), 5)):
        resume.main(resume.Config(algorithms=names, kills=kills, results=str(file)))
    rows = json.loads(file.read_text("utf-8"))["rows"]
    assert [(row["algorithm"], row["kills"]) for row in rows] == [("bc", 3), ("iql", 5)]
    assert all(row["commit"] and row["versions"] for row in rows)


def test_an_outcome_is_all_that_equal_runs_share(tmp_path):
    """A changed weight, metric or return shows, a changed time does not."""
    run = tmp_path / "out/a/b/c"
    (run / "checkpoint").mkdir(parents=True)
    texts = {
        "metrics.csv": "step,loss,seconds,updates_per_second\n1,2.0,3,4\n",
        "returns.json": '{"1": [[5]]}',
        "checkpoint/state.msgpack": "6",
    }

    def outcome(**changes):
        for name, text in texts.items():
            for old, new in changes.items():
                text = text.replace(old.strip("_"), new)
            (run / name).write_text(text)
        return resume.outcome(tmp_path / "out")

    assert outcome() == outcome(_3="7") == outcome(_4="8")
    assert all(outcome() != outcome(**{x: "9"}) for x in ("_2", "_5", "_6"))
