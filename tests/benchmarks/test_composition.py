"""The maze of studies/composition.py, its data, and what its figures count."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.studies import composition

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results"


def test_a_wall_stops_the_point_on_its_axis():
    """From the left end to the right: the block. Up and right at once: only up. Then out: no."""
    left = np.float32([[-2, 0]])
    np.testing.assert_allclose(composition.move(left, np.array([[1.0, 0]])), [[-1.5, 0]])
    near = np.float32([[-1.6, 0]])
    np.testing.assert_allclose(composition.move(near, np.array([[1.0, 0.4]])), [[-1.6, 0.2]])
    corner = np.float32([[-2.4, 1.4]])
    np.testing.assert_array_equal(composition.move(corner, np.array([[-1.0, 1.0]])), corner)
    above = np.float32([[0, 1]])
    np.testing.assert_allclose(composition.move(above, np.array([[9.0, 0]])), [[0.5, 1]])


@pytest.mark.parametrize("mixed", [True, False])
def test_data_are_walks_in_the_maze_and_visit_both_corridors_only_if_mixed(mixed):
    data = composition.dataset(mixed, episodes=40)
    np.testing.assert_allclose(composition.move(data.obs, data.action), data.next_obs)
    assert not np.all(np.abs(data.obs) < composition.BLOCK - 1e-6, -1).any()
    assert np.all(np.abs(data.obs) <= composition.HALF)
    visited = composition.visits(data.obs.reshape(40, composition.LIMIT, 2))
    assert min(visited["upper"], visited["lower"]) > 0.1 or mixed
    assert (visited["both"] > 0.3) == mixed and (mixed or visited["both"] == 0)


def test_visits_and_walls_by_hand():
    left, up, middle, down = [-2, 0], [0, 1], [0, 0], [0, -1]
    paths = np.array([[left, up, up], [left, down, down], [up, left, down], [left, middle, left]])
    found = composition.visits(paths)
    assert found == {"upper": 0.25, "lower": 0.25, "both": 0.25, "neither": 0.25}
    assert composition.through_walls(paths) == 0.25


def test_states_follow_a_plan_by_inverse_dynamics():
    """Of an exact inverse, the plan itself; a plan through the block is stopped by it."""

    class Exact:
        @staticmethod
        def normalise(state, obs):
            return obs

        @staticmethod
        def plan(state, known, key, own):
            steps = np.arange(own.horizon)[:, None] * np.float32([0.25, 0])
            return known[0][:, None] + steps

    class State:
        obs_mean, obs_std = np.float32(0), np.float32(1)

    def action(state, obs, ahead):
        return (ahead - obs) / composition.STEP

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composition, "action", action)
        patch.setattr(
            composition, "planned", lambda m, s, x, own, key: m.plan(s, (x, None), key, own)
        )
        own = type("Own", (), {"horizon": 6})
        plans, paths = composition.follow(Exact, own, State, composition.Config(plans=2))
    np.testing.assert_allclose(plans[0, :, 0], -2 + 0.25 * np.arange(6))
    np.testing.assert_allclose(paths[0, :3], plans[0, :3])
    np.testing.assert_allclose(paths[0, 3:, 0], -1.5)


def test_what_the_results_show():
    """One corridor is taken as asked; with NOT the other one; AND where no episode has both goes
    through the wall."""
    runs = json.loads((RESULTS / "composition.json").read_text("utf-8"))["runs"]
    assert list(runs) == list(composition.KINDS)
    for entries in runs.values():
        assert list(entries) == list(composition.ASKED)
        for entry in entries.values():
            np.testing.assert_allclose(sum(entry["paths"].values()), 1)
        assert entries["upper, NOT lower"]["plans"]["upper"] > 0.9
    alone = runs[composition.KINDS[1]]
    for asked in ("upper", "lower"):
        assert alone[asked]["plans"][asked] > 0.9
    assert alone["upper AND lower"]["plans"]["both"] < 0.1
    assert jax.tree.structure(alone) == jax.tree.structure(runs[composition.KINDS[0]])
