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
    action = ours.action[rows]
    if not ours.num_actions:
        low, high = theirs.action_space.low, theirs.action_space.high
        action = low + (action + 1) / 2 * (high - low)
    np.testing.assert_allclose(first.actions, action, atol=1e-5)
    text = (ROOT / "data" / name / "data/metadata.json").read_text()
    about = json.loads(text)["stillwater"]
    assert {"command", "config", "reference_from", "returns", "versions"} <= about.keys()
    assert about["returns"]["mean"] == pytest.approx(ours.returns().mean(), rel=1e-4)
    assert "/home" not in text
    assert "/work" not in text


def test_the_bundled_sets_are_small():
    files = [p for p in (ROOT / "data").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 28e6
    assert len(BUNDLED) >= 7


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


# --- Discrete actions ---

DISCRETE = [name for name in BUNDLED if name.parts[1] in ("acrobot", "cartpole")]


@pytest.fixture
def dqn(tmp_path, monkeypatch):
    """(the module, a DQN that is better than uniform actions within 800 steps)."""
    from benchmarks.collect import discrete

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    cfg = discrete.Config(num_steps=300, dqn_steps=800, start_steps=50, explore_steps=200,
                          gamma=0.9, polyak=0.05,
                          score_every=200, batch_size=32, lr=1e-2, widths=(32,))  # fmt: skip
    return discrete, cfg


def probabilities(folder):
    """(behaviour's probabilities (N, A), actions (N,)) of a set."""
    with h5py.File(Path(folder) / "data/main_data.hdf5") as file:
        names = sorted(file, key=lambda name: int(name.removeprefix("episode_")))
        found = [(file[f"{x}/infos/probability"][:], file[f"{x}/actions"][:]) for x in names]
    return (np.concatenate(x) for x in zip(*found, strict=True))


def agree(p, action):
    """The probabilities sum to 1, and actions follow them: within four standard deviations, among
    rows where an action's probability is alike."""
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)
    assert p[np.arange(len(p)), action].min() > 0
    taken = np.eye(p.shape[1])[action]
    for low, high in ((0, 0.03), (0.03, 0.3), (0.3, 0.7), (0.7, 0.97), (0.97, 1.01)):
        rows = (p >= low) & (p < high)
        if rows.sum() > 20:
            wanted, spread = p[rows].sum(), np.sqrt((p[rows] * (1 - p[rows])).sum())
            assert abs(taken[rows].sum() - wanted) < 4 * spread + 1e-9, (low, high)


@pytest.mark.parametrize("name", [*map(str, DISCRETE)])
def test_bundled_actions_follow_the_stored_probabilities(name):
    p, action = probabilities(ROOT / "data" / name)
    agree(p, action)
    assert np.unique(p.round(3)).size > 2


def test_the_bundled_sets_with_discrete_actions_are_small():
    files = [p for name in DISCRETE for p in (ROOT / "data" / name).rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 2e6
    assert len(DISCRETE) == 2


def test_dqn_collects_what_it_says(dqn, monkeypatch):
    """Replay and medium from one training: whole episodes, probabilities, time limits; the same
    seed gives the same rows."""
    discrete, cfg = dqn
    monkeypatch.setattr(discrete, "EPISODES", 10)
    discrete.main(cfg)
    replay = load("stillwater/cartpole/replay-v0", monkeypatch)
    assert replay.num_actions == 2 and 200 < len(replay.obs) <= 300
    inside = np.ones(len(replay.obs), bool)
    inside[replay.start + replay.length - 1] = False
    np.testing.assert_array_equal(replay.next_obs[:-1][inside[:-1]], replay.obs[1:][inside[:-1]])
    rows = np.load("runs/collect/CartPole-v1-s0/rows.npz")
    assert {tuple(x) for x in replay.obs} <= {tuple(x) for x in rows["obs"]}
    p, action = probabilities("data/stillwater/cartpole/replay-v0")
    agree(p, action)
    np.testing.assert_array_equal(action, replay.action)
    assert np.isclose(p, 0.5).all(1)[: replay.length[0]].all()  # the first steps are uniform

    monkeypatch.setattr(discrete, "train", None)  # not again
    discrete.main(replace(cfg, kind="medium"))
    medium = load("stillwater/cartpole/medium-v0", monkeypatch)
    p, action = probabilities("data/stillwater/cartpole/medium-v0")
    agree(p, action)
    assert set(p.max(1).round(4)) <= {np.float32(0.9), np.float32(0.9995)}  # epsilon 0.2, 0.001
    of_episode = [p.max(1)[i] for i in medium.start]
    np.testing.assert_array_equal(np.repeat(of_episode, medium.length), p.max(1))
    assert medium.ref_min == replay.ref_min < medium.ref_max == replay.ref_max
    assert medium.done.sum() >= len(medium.start) - 1  # CartPole falls

    again = load("stillwater/cartpole/medium-v0", monkeypatch).obs.copy()
    discrete.main(replace(cfg, kind="medium"))
    with h5py.File("data/stillwater/cartpole/medium-v0/data/main_data.hdf5") as file:
        np.testing.assert_array_equal(
            file["episode_0/observations"][:-1], again[: medium.length[0]]
        )
    with pytest.raises(SystemExit, match="other settings"):
        discrete.main(replace(cfg, gamma=0.8))
    with pytest.raises(SystemExit, match="no discrete actions"):
        discrete.main(discrete.Config("Pendulum-v1"))


def test_a_time_limit_is_no_terminal(dqn):
    """A pole that is never dropped: 500 steps, cut by time."""
    discrete, cfg = dqn

    class Balanced:
        """CartPole that always starts anew within an episode."""

        def __init__(self):
            self.steps = 0

        def reset(self, seed):
            return np.zeros(4, np.float32), {}

        def step(self, action):
            self.steps += 1
            return np.zeros(4, np.float32), 1.0, False, self.steps == 7, {}

    env = discrete.evaluation.make("CartPole-v1")
    rows = discrete.play([Balanced()], discrete.fresh(cfg, env), "medium",
                         np.random.default_rng(0), 1)  # fmt: skip
    assert len(rows["reward"]) == 7
    assert rows["truncated"].tolist() == [False] * 6 + [True] and not rows["terminated"].any()
