"""Losses, gradients and whole updates are the authors': the golden numbers of their own code."""

import ast
import functools
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.parity import __main__ as parity
from benchmarks.parity import flatten, unflatten, vector

ROOT = Path(__file__).resolve().parents[2]

NAMES = parity.algorithms()


@functools.cache
def ours(name, scale=1.0):
    """Our outputs for the golden inputs, the real numbers among them times `scale`."""
    inputs, _ = parity.read(name)
    return parity.module(name).ours(
        {k: v * np.float32(scale) if v.dtype == np.float32 else v for k, v in inputs.items()}
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_number_is_the_peers(name):
    _, theirs = parity.read(name)
    assert theirs
    found, allowed = parity.differences(ours(name), theirs), parity.bounds(name)
    above = {k: v for k, v in found.items() if allowed[k] is not None and not v <= allowed[k]}
    assert not above


@pytest.mark.parametrize("name", NAMES)
def test_what_differs_on_purpose_does_and_the_docstring_says_so(name):
    differs = getattr(parity.module(name), "DIFFERS", {})
    text = ast.get_docstring(ast.parse((ROOT / f"algorithms/{name}.py").read_text("utf-8")))
    for why in differs.values():
        assert why in re.sub(r"\s+", " ", text)
    _, theirs = parity.read(name)
    found = parity.differences(ours(name), theirs)
    assert all(found[quantity] > parity.BOUND for quantity in differs)


@pytest.mark.parametrize("name", NAMES)
def test_the_check_can_fail(name):
    """Other inputs by one per cent: every quantity moves, by far more than the bound."""
    moved = parity.differences(ours(name, 1.01), ours(name))
    assert {k: v for k, v in moved.items() if not v > 20 * parity.BOUND} == {}


@pytest.mark.parametrize("name", NAMES)
def test_golden_file_is_small_and_says_whose_it_is(name):
    assert (parity.FOLDER / f"golden/{name}.npz").stat().st_size < 100_000
    peer = parity.module(name).PEER
    assert peer["name"] and peer["environment"]
    assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", peer["repository"])
    assert re.fullmatch(r"[0-9a-f]{40}", peer["commit"])


def test_every_golden_file_has_its_procedure():
    assert {p.stem for p in parity.FOLDER.glob("golden/*.npz")} == set(NAMES)
    assert {"iql"} <= set(NAMES)


def test_difference_is_relative_to_the_largest():
    theirs = {"x": np.array([1.0, -4.0])}
    assert parity.differences({"x": np.array([1.0, -4.0])}, theirs) == {"x": 0}
    assert parity.differences({"x": np.array([1.5, -4.0])}, theirs) == {"x": 0.125}
    assert np.isnan(parity.differences({"x": np.array([1.5, np.nan])}, theirs)["x"])
    tree = {"x": {"b": np.array([[-4.0]]), "a": np.array(1.0)}}
    assert parity.differences(tree, theirs) == {"x": 0}


@pytest.mark.parametrize(
    ("mine", "known"),
    [
        ({"y": np.ones(2)}, {"x": np.ones(2)}),
        ({"x": np.ones(1)}, {"x": np.ones(2)}),  # would be broadcast
        ({"x": np.ones(2)}, {"x": np.array([1, np.inf])}),
        ({"x": np.zeros(2)}, {"x": np.zeros(2)}),  # would say nothing
    ],
)
def test_what_cannot_be_compared_is_refused(mine, known):
    with pytest.raises(ValueError, match="[xy]"):
        parity.differences(mine, known)


def test_trees():
    tree = {"b": {"y": np.arange(2), "x": np.arange(3)}, "a": np.ones(1)}
    flat = flatten(tree, "net")
    assert list(flat) == ["net/a", "net/b/x", "net/b/y"]
    assert vector(tree).tolist() == [1, 0, 1, 2, 0, 1]
    again = unflatten(flat | {"network/c": np.ones(1)}, "net")
    assert vector(again).tolist() == vector(tree).tolist()
    assert unflatten(flat, "net/a") is flat["net/a"]
