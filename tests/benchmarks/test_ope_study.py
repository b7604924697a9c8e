"""The study of estimators: its exact values against enumeration, and what its results say."""

import itertools
import json

import numpy as np
import pytest

from algorithms import ope as algorithm
from benchmarks.studies import ope


def test_value_and_deviation_are_those_of_all_episodes():
    steps, total, square = 4, 0.0, 0.0
    for actions in itertools.product((0, 1), repeat=steps):
        for places in itertools.product((0, 1), repeat=steps):  # after each action
            s, chance, rho, pay = 0, 1.0, 1.0, 0.0
            for a, later in zip(actions, places, strict=True):
                pay += ope.PAY[s, a]
                rho *= ope.PI[s, a] / ope.B[s, a]
                chance *= ope.B[s, a] * ope.MOVE[s, a, later]
                s = later
            total += chance * rho * pay
            square += chance * (rho * pay) ** 2
    assert abs(total - ope.values(ope.PI, steps)[1][steps, 0]) < 1e-12
    assert abs(np.sqrt(square - total**2) - ope.deviation(steps)) < 1e-12


def test_drawn_episodes_have_the_moments():
    """Of IS from 4 episodes: its mean and deviation within four standard errors."""
    cfg = ope.Config(episodes=4, repeats=4_000)
    row = ope.measure(algorithm, np.random.default_rng(0), 3, cfg)
    exact = row["exact IS deviation"]
    assert abs(row["IS"]["mean"] - row["truth"]) < 4 * exact / np.sqrt(cfg.repeats)
    assert row["IS"]["deviation"] == pytest.approx(exact, rel=0.1)


def test_the_results_say_what_the_page_says():
    found = json.loads((ope.ROOT / "benchmarks/results/ope.json").read_text("utf-8"))
    last = found["rows"][-1]
    assert last["steps"] == 50 and last["exact IS deviation"] > 10 * last["IS"]["deviation"]
    for name in ("WIS", "WPDIS", "WDR"):
        assert last[name]["deviation"] < 0.1 * last["PDIS"]["deviation"]
        assert last[name]["mean"] < last["truth"]
    for row in found["rows"]:
        if row["steps"] <= 10:
            error = row["exact IS deviation"] / np.sqrt(found["repeats"])
            assert abs(row["IS"]["mean"] - row["truth"]) < 4 * error
