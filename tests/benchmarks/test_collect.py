"""collect.py makes what it says; the bundled sets are what minari itself can open."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import h5py
import minari
import numpy as np
import pytest

from common import datasets

ROOT = Path(__file__).parents[2]
BUNDLED = sorted(
    p.parents[1].relative_to(ROOT / "data") for p in ROOT.glob("data/**/metadata.json")
)


@pytest.fixture
def collect(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location(
        "collect", ROOT / "benchmarks/collect/__main__.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))  # export sets it; undone afterwards
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return module


@pytest.fixture
def small(collect):
    """A SAC that is medium after its eleventh episode, in about two seconds."""
    return collect.Config(
        env_id="Pendulum-v1",
        kind="medium-replay",
        num_steps=1000,
        sac_steps=5000,
        medium_fraction=-1.0,
        expert_return=-150.0,
        start_steps=100,
        batch_size=16,
        widths=(8,),
    )


def load(name, monkeypatch):
    monkeypatch.setattr("common.datasets.sources.BUNDLED", Path("data").resolve())
    return datasets.load(name)


@pytest.mark.parametrize("name", [*map(str, BUNDLED)])
def test_minari_opens_the_bundled_sets(name, monkeypatch, tmp_path):
    """minari's own reading and ours agree; the provenance is complete and tells no one's paths."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(ROOT / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    theirs, ours = minari.load_dataset(name), datasets.load(name)
    assert theirs.total_steps == len(ours.obs) <= 100_000
    assert theirs.total_episodes == len(ours.start)
    first, rows = theirs[0], slice(0, ours.length[0])
    np.testing.assert_array_equal(first.observations[1:], ours.next_obs[rows])
    low, high = theirs.action_space.low, theirs.action_space.high
    action = low + (ours.action[rows] + 1) / 2 * (high - low)
    np.testing.assert_allclose(first.actions, action, atol=1e-5)
    text = (ROOT / "data" / name / "data/metadata.json").read_text()
    about = json.loads(text)["stillwater"]
    assert {"command", "config", "reference_from", "returns", "versions"} <= about.keys()
    assert about["returns"]["mean"] == pytest.approx(ours.returns().mean(), rel=1e-4)
    assert "/home" not in text
    assert "/work" not in text


def test_the_bundled_sets_are_small():
    files = [p for p in (ROOT / "data").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 26e6
    assert len(BUNDLED) >= 5


def test_random_actions_cover_the_environments_range(collect, monkeypatch):
    """450 steps of Pendulum: 200, 200 and 50, all cut by time; actions in +-2 in the file."""
    cfg = collect.Config("Pendulum-v1", kind="random", num_steps=450, expert_return=-150.0)
    collect.main(cfg)
    data = load("stillwater/pendulum/random-v0", monkeypatch)
    assert data.length.tolist() == [200, 200, 50]
    assert data.done.sum() == 0
    with h5py.File("data/stillwater/pendulum/random-v0/data/main_data.hdf5") as f:
        actions = f["episode_0/actions"][:]
        assert f["episode_2/truncations"][-1]
    assert np.abs(actions).max() > 1.9
    assert np.abs(actions).max() <= 2
    assert abs(actions.mean()) < 0.3
    np.testing.assert_allclose(actions / 2, data.action[:200], atol=1e-6)


def test_replay_is_what_sac_saw_and_an_interrupted_run_goes_on(collect, small, monkeypatch):
    """Ctrl-C after 700 steps, the same command again: one replay, no row of it across episodes."""
    steps, update = [], collect.update

    def interrupted(*args):
        steps.append(1)
        if len(steps) == 600:
            raise KeyboardInterrupt
        return update(*args)

    monkeypatch.setattr(collect, "update", interrupted)
    with pytest.raises(SystemExit, match="the same command continues"):
        collect.main(small)
    monkeypatch.setattr(collect, "update", update)
    collect.main(small)

    folder = Path("runs/collect/Pendulum-v1-s0")
    rows = dict(np.load(folder / "replay.npz", allow_pickle=False))
    assert len(rows["obs"]) == json.loads((folder / "medium.json").read_text())["step"]
    assert 2000 < len(rows["obs"]) < 3000
    ends = rows["terminated"] | rows["truncated"]
    inside = ~ends[:-1]
    np.testing.assert_array_equal(rows["next_obs"][:-1][inside], rows["obs"][1:][inside])
    assert (rows["next_obs"][:-1] != rows["obs"][1:]).any(1)[~inside].all()

    data = load("stillwater/pendulum/medium-replay-v0", monkeypatch)
    assert 800 < len(data.obs) <= 1000  # whole episodes, thinned
    inside = np.ones(len(data.obs), bool)
    inside[data.start + data.length - 1] = False
    np.testing.assert_array_equal(data.next_obs[:-1][inside[:-1]], data.obs[1:][inside[:-1]])
    seen = {tuple(row) for row in rows["obs"]}
    assert all(tuple(row) in seen for row in data.obs)
    assert data.provenance["metadata"]["stillwater"]["medium_policy_return"]["sampled"] < 0

    collect.main(replace(small, kind="medium", num_steps=500))  # of the same SAC
    data = load("stillwater/pendulum/medium-v0", monkeypatch)
    assert data.length.tolist() == [200, 200, 100]
    assert np.ptp(data.action) > 0.5  # sampled from an untrained policy
    assert data.ref_max == -150

    with pytest.raises(SystemExit, match="other settings"):
        collect.main(replace(small, gamma=0.9))


def test_an_environment_without_a_reference_is_refused(collect):
    with pytest.raises(SystemExit, match="--expert-return"):
        collect.main(collect.Config("Pendulum-v1"))
    with pytest.raises(SystemExit, match="benchmarks.collect.discrete"):
        collect.main(collect.Config("CartPole-v1"))
