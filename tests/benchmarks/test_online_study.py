"""The study of the hand-over: its commands, its measures, and what its results say."""

import importlib
import json

import numpy as np
import pytest
import tyro

from benchmarks.studies import online
from common import experiment

STEPS = list(range(-8, 9))  # hand-over at 0


def test_every_command_is_one_and_has_both_phases(monkeypatch):
    """All take the same number of steps, from the same data, with networks of the same size."""
    monkeypatch.setattr("sys.argv", ["notebook"])
    found = online.commands(online.Commands(offline=4_000, online=2_000))
    assert len(found) == 10
    for script, *words in found:
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        cfg = experiment.resolve(tyro.cli(module.Config, args=words), module.TUNED)
        offline = getattr(cfg, "online_steps", 0) and cfg.num_updates - cfg.online_steps
        assert (cfg.num_updates - offline, offline) in {(2_000, 4_000), (2_000, 0)}
        assert (offline == 0) == (script == "algorithms/rlpd.py")
        assert cfg.widths == getattr(cfg, "critic_widths", cfg.widths) == (64, 64)
        assert (cfg.batch_size, cfg.polyak, cfg.num_seeds) == (128, 0.02, 3)


def test_a_fall_and_its_recovery():
    """Windows of three scores that lie after the hand-over as a whole."""
    before, after = [0] * 6 + [6] * 3, [9, 9, 0, 0, 3, 6, 9, 0]
    scores = np.array([before + after, before + [7] * 8, before + [1] * 8], float)
    level, lowest, regained = online.fall(STEPS, scores)
    np.testing.assert_allclose(level, 6)
    np.testing.assert_allclose(lowest, [1, 7, 1])
    np.testing.assert_allclose(regained, [7, 0, np.inf])
    level, lowest, _ = online.fall(STEPS, scores, -8 + 2)  # what comes before has a fall, too
    np.testing.assert_allclose((level, lowest), 0)


def test_a_usual_fall_ends_at_the_hand_over():
    """Half-way through the first phase; what happens after the hand-over does not count."""
    steps = list(range(-8, 5))
    scores = np.array([[9.0] * 5 + [6.0] * 4 + [0.0] * 4])
    found = online.summary({"steps": steps, "scores": scores})
    assert (found["usual"], found["before"], found["lowest"]) == (3, 6, 0)


def test_without_an_offline_phase_only_the_end_counts():
    assert online.summary({"steps": [1, 2, 3, 4], "scores": [[0, 3, 4, 5]]}) == {"end": [4]}


def test_the_steps_of_a_run():
    """Rows of RLPD begin after its random steps."""
    run = dict(algorithm="rlpd", dataset="d", command="c", commit="x", device="CPU")
    run |= dict(curve={"2": [1.0], "4": [3.0]}, data=dict(ref_min=0, ref_max=10, mean_return=2))
    row = online.curve(run | {"config": {"num_updates": 4, "random_steps": 5}})
    assert row["steps"] == [7, 9] and row["scores"] == [[10.0, 30.0]] and row["run"] == "RLPD"
    own = {"num_updates": 4, "online_steps": 2, "calibrate": False}
    row = online.curve(run | {"algorithm": "cal_ql", "config": own})
    assert row["steps"] == [0, 2] and row["run"] == "CQL, as it is" and row["data_score"] == 20
    with pytest.raises(SystemExit, match="no finished run"):
        online.report(online.Report(out="/nowhere"))


def test_the_results_say_what_the_page_says():
    """Falls beyond the usual: IQL's and AWAC's on hopper, Cal-QL's in the maze, no others."""
    path = online.ROOT / "benchmarks/results/online.json"
    found = {
        (row["dataset"], row["run"]): online.summary(row)
        for row in json.loads(path.read_text("utf-8"))["rows"]
    }
    lost = {key: x["before"] - x["lowest"] for key, x in found.items() if "before" in x}
    lost = {key: (x.mean(), found[key]["usual"].mean()) for key, x in lost.items()}
    assert lost[online.HOPPER, "IQL"][0] > 10 > 1 > lost[online.HOPPER, "IQL"][1]
    assert lost[online.HOPPER, "AWAC"][0] > 6 > 2 > lost[online.HOPPER, "AWAC"][1]
    assert lost[online.MAZE, "Cal-QL"][0] > 3 > 1 > lost[online.MAZE, "Cal-QL"][1]
    for name in ("IQL", "AWAC", "CQL, as it is"):
        assert lost[online.MAZE, name][0] < lost[online.MAZE, name][1]
    ends = {key: x["end"].mean() for key, x in found.items() if key[0] == online.HOPPER}
    assert max(ends, key=ends.get) == (online.HOPPER, "RLPD")
    for name, most in (("Cal-QL", 2.5), ("CQL, as it is", 8)):
        assert found[online.HOPPER, name]["before"].mean() < most
