"""After a run, and with one's own code: extended, moved, scored later, copied; own environments."""

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest

from common import datasets, evaluation, experiment
from common.evaluation import __main__ as command
from common.experiment import config, plots, runtime

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("toy", ROOT / "tests/toy.py")
sys.modules["toy"] = toy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["toy.py"])
    monkeypatch.setattr(plots, "plot", lambda path, *args: path.write_text("drawn"))  # slow
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return toy.Config(out=str(tmp_path / "runs"))


# --- Longer runs, moved data ---


def test_an_extended_run_is_a_longer_run_bit_for_bit(cfg):
    short = toy.main(cfg)
    longer = toy.main(toy.Config(resume=str(short.folder), num_updates=80))
    whole = toy.main(dataclasses.replace(cfg, num_updates=80, seed=cfg.seed))
    for name in ("checkpoint/state.msgpack", "returns.json"):
        assert (longer.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    stored = json.loads((longer.folder / "config.json").read_text())["config"]
    assert stored["num_updates"] == 80
    again = toy.main(toy.Config(resume=str(short.folder)))  # knows its new length
    assert (again.step, again.cfg.num_updates) == (80, 80)


def test_a_run_is_not_extended_where_a_schedule_ends_or_backwards(cfg, monkeypatch):
    run = toy.main(cfg)
    with pytest.raises(experiment.RunError, match="--num-updates 40 conflicts"):
        toy.main(toy.Config(resume=str(run.folder), num_updates=40))
    with pytest.raises(experiment.RunError, match="multiple of --eval-every"):
        toy.main(toy.Config(resume=str(run.folder), num_updates=55))
    comment = {"normalize": "falls until num_updates", "delay": "so too until num_updates"}
    monkeypatch.setattr(config, "_comments", lambda kind: comment)
    with pytest.raises(experiment.RunError, match="schedule of 50 updates.*--no-normalize"):
        toy.main(toy.Config(resume=str(run.folder), num_updates=80))
    assert json.loads((run.folder / "config.json").read_text())["config"]["num_updates"] == 50


def test_moved_data_are_known_by_their_hash(cfg, monkeypatch):
    run = toy.main(cfg, stop=10)
    moved = toy.main(toy.Config(resume=str(run.folder), env="elsewhere.hdf5"))
    assert (moved.step, moved.folder) == (50, run.folder)
    other, own = toy.main(cfg, stop=10), toy.dataset

    def changed(name):
        data = own(name)
        return dataclasses.replace(data, provenance={"sha256": "1" * 64})

    monkeypatch.setattr(toy, "dataset", changed)
    with pytest.raises(experiment.RunError, match="not the data that"):
        toy.main(toy.Config(resume=str(other.folder), env="elsewhere.hdf5"))


def test_a_repeated_env_is_several_datasets(cfg, monkeypatch, capsys):
    """Tuned values apply if the key is in each name; a resumed run may name its data again."""
    own, loaded = toy.dataset, []

    def pool(name):
        loaded.append(name)
        return dataclasses.replace(own(name), name=name)

    monkeypatch.setattr(toy, "dataset", pool)
    words = ["toy.py", "--env", "hopper-medium-v2", "--env=hopper-expert-v2"]
    monkeypatch.setattr(sys, "argv", words)
    run = toy.main(dataclasses.replace(cfg, env="hopper-expert-v2"), stop=10)
    assert loaded == ["hopper-medium-v2,hopper-expert-v2"]
    assert run.cfg.env == loaded[0] and run.folder.parent.name == loaded[0].replace(",", "-")
    assert toy.main(toy.Config(resume=str(run.folder), env="hopper-expert-v2")).step == 50
    tuned = {"default": {"tau": 0.1}, "medium": {"tau": 0.2}, "hopper": {"tau": 0.3}}
    assert config.resolve(dataclasses.replace(cfg, tau=None), tuned).tau == 0.3
    tuned["expert"] = {"tau": 0.4}
    monkeypatch.setattr(sys, "argv", words[:1])
    assert config.resolve(dataclasses.replace(cfg, tau=None, env=words[2]), tuned).tau == 0.3


# --- One's own environment ---

CAR = """
import gymnasium, numpy as np

class Car(gymnasium.Env):
    '''As people write them: no render_mode, lists, arrays of one, bounds of 3.'''
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Box(-3, 3, (1,), np.float32)
    def reset(self, seed=None, options=None):
        self.s = [0.0, 0.0]
        return self.s, {}
    def step(self, a):
        self.s = [self.s[0] + 1, float(a[0])]
        return self.s, np.abs(a), np.array([False]), False, {}

class Broken(Car):
    def step(self, a):
        raise ValueError("no robot is connected")

class Sure(Car):
    def reset(self, seed=None, options=None):
        assert options

class Wrong(Car):
    def step(self, a):
        return [0.0, 0.0, 0.0], 0.0, False, False, {}

gymnasium.register("Car-v0", Car, max_episode_steps=5)
gymnasium.register("Endless-v0", Car)
gymnasium.register("Broken-v0", Broken, max_episode_steps=5)
gymnasium.register("Wrong-v0", Wrong, max_episode_steps=5)
gymnasium.register("Sure-v0", Sure, max_episode_steps=5)
"""


@pytest.fixture
def car(tmp_path, monkeypatch):
    """A module own_car in the working directory; its environments are forgotten afterwards."""
    (tmp_path / "own_car.py").write_text(CAR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "own_car"
    sys.modules.pop("own_car", None)
    for name in ("Car-v0", "Endless-v0", "Broken-v0", "Wrong-v0", "Sure-v0"):
        gymnasium.registry.pop(name, None)


def arrays(n=20):
    return dict(
        obs=np.random.default_rng(0).normal(size=(n, 2)), action=np.full((n, 1), 3.0),
        reward=np.ones(n), done=np.zeros(n), timeout=np.arange(n) % 5 == 4,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["own_car", "own_car.py"])
def test_an_own_module_registers_environments(car, name):
    with pytest.raises(datasets.DatasetError, match=r"unknown environment 'Car-v0'.*--env-module"):
        datasets.from_arrays(**arrays(), env_id="Car-v0")
    runtime.import_own(name)
    data = datasets.from_arrays(**arrays(), env_id="Car-v0")
    assert (data.action == 1).all()
    act = lambda carry, obs, reward, key: (np.full((1, 2, 1), 0.5), carry)  # noqa: E731
    returns = evaluation.evaluate(act, "Car-v0", 1, 2)
    np.testing.assert_allclose(returns, [[7.5, 7.5]])  # five steps of half of 3


def test_a_video_is_only_offered_where_it_can_be_drawn(car, cfg, capsys):
    from algorithms import bc

    runtime.import_own(car)
    assert not evaluation.inspect("Car-v0").is_drawn and evaluation.inspect("Hopper-v5").is_drawn
    small = dict(num_updates=20, eval_every=20, eval_episodes=1, batch_size=8, widths=(8,))
    bc.train(bc.Config(**small, out=cfg.out), datasets.from_arrays(**arrays(), env_id="Car-v0"))
    (run,) = Path(cfg.out).glob("bc/*/*")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("Score: python -m common.evaluation") and "--video" not in last
    with pytest.raises(evaluation.EvaluationError, match="Car-v0 cannot be drawn: .*render_mode"):
        command.main(run, video=run / "new/a.gif")
    with pytest.raises(experiment.UserError, match="--export .* cannot be written: File exi"):
        command.main(run, export=run / "config.json/a.npz")


def test_a_module_that_cannot_be_imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_bad.py").write_text("1 / 0")
    with pytest.raises(experiment.RunError, match="--env-module own_bad: ZeroDivisionError"):
        runtime.import_own("own_bad")
    with pytest.raises(experiment.RunError, match="--env-module own_none: ModuleNotFoundError"):
        runtime.import_own("own_none")


@pytest.mark.parametrize(
    "env_id, message",
    [
        ("Endless-v0", r"needs a time limit: --env-id 'Endless-v0 {\"max_episode_steps\": 1000}'"),
        ("Broken-v0", "Broken-v0 cannot be used: no robot is connected"),
        ("Sure-v0", r"AssertionError in .*own_car.py, line \d+: assert options"),
        ("Wrong-v0", r"Wrong-v0 cannot be used: observes .*not finite numbers of shape \(2,\)"),
    ],
)
def test_what_evaluation_needs_is_tried_before_training(car, env_id, message):
    runtime.import_own(car)
    with pytest.raises(datasets.DatasetError, match=message):
        datasets.from_arrays(**arrays(), env_id=env_id)


def test_a_time_limit_can_be_given(car):
    runtime.import_own(car)
    name = 'Endless-v0 {"max_episode_steps": 4}'
    assert evaluation.inspect(name).limit == 4
    assert datasets.from_arrays(**arrays(), env_id=name).env_id == name


def test_resuming_runs_no_module_that_was_not_typed(cfg, car):
    run = toy.main(dataclasses.replace(cfg, env_module=car), stop=10)
    del sys.modules[car], gymnasium.registry["Car-v0"], gymnasium.registry["Broken-v0"]
    del gymnasium.registry["Endless-v0"], gymnasium.registry["Wrong-v0"]
    del gymnasium.registry["Sure-v0"]
    with pytest.raises(experiment.RunError, match="own_car.*give it again"):
        toy.main(toy.Config(resume=str(run.folder)))
    assert car not in sys.modules
    assert toy.main(toy.Config(resume=str(run.folder), env_module=car)).step == 50
    assert car in sys.modules


# --- Scored later, in other units, from a copy ---


def pendulum(path, n=200):
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["observations"] = rng.normal(size=(n, 3))
        file["actions"], file["rewards"] = rng.uniform(-2, 2, (n, 1)), np.ones(n)
        file["terminals"], file["timeouts"] = np.zeros(n), np.arange(n) % 50 == 49
    return str(path)


@pytest.fixture
def unscored(cfg, tmp_path):
    """A run of BC on arrays whose environment nobody named; actions go from -1 to 1."""
    from algorithms import bc

    given = arrays(60)
    data = datasets.from_arrays(
        np.c_[given["obs"], np.ones(60)], given["action"] / 3, given["reward"], given["done"],
        given["timeout"],
    )  # fmt: skip
    small = dict(num_updates=20, eval_every=20, eval_episodes=0, batch_size=8, widths=(8,))
    bc.train(bc.Config(**small, out=cfg.out), data)
    (folder,) = Path(cfg.out).glob("bc/*/*")
    return folder


def test_an_unscored_run_is_scored_later(unscored, capsys):
    with pytest.raises(evaluation.EvaluationError, match="no environment to score on: --env-id"):
        command.main(unscored)
    command.main(unscored, episodes=2, env_id="Pendulum-v1")
    assert "2 episodes of Pendulum-v1" in capsys.readouterr().out
    with pytest.raises(evaluation.EvaluationError, match="11 observations and 3 actions"):
        command.main(unscored, env_id="Hopper-v5")


def test_policies_speak_the_units_of_the_data(unscored):
    info = json.loads((unscored / "config.json").read_text())
    assert (info["dataset"]["action_low"], info["dataset"]["action_high"]) == ([-1], [1])
    info["dataset"] |= {"action_low": [0.0], "action_high": [10.0]}
    (unscored / "config.json").write_text(json.dumps(info))
    obs = np.random.default_rng(0).normal(size=(5, 3))
    unit = evaluation.load_policy(unscored)(obs)
    own = evaluation.load_policy(unscored, units="environment")(obs)
    np.testing.assert_allclose(own, 5 + 5 * unit, rtol=1e-6)
    with pytest.raises(ValueError, match="units 'metres'"):
        evaluation.load_policy(unscored, units="metres")


@pytest.mark.slow
def test_a_renamed_copy_beside_common_can_do_what_its_run_says(tmp_path):
    shutil.copytree(ROOT / "common", tmp_path / "common")
    shutil.copy(ROOT / "algorithms/bc.py", tmp_path / "my-bc.py")
    path = pendulum(tmp_path / "a.hdf5")

    def run(*words):
        words = [sys.executable, *words]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    flags = "--num-updates 20 --eval-every 20 --eval-episodes 1 --batch-size 8 --widths 8"
    words = ["my-bc.py", "--env", path, "--env-id", "Pendulum-v1", *flags.split()]
    done = run(*words)
    assert done.returncode == 0, done.stderr
    (line,) = [x for x in done.stdout.splitlines() if x.startswith("Video: python ")]
    command = line.removeprefix("Video: python ").removesuffix(" --video run.mp4").split()
    scored = run(*command)
    assert scored.returncode == 0, scored.stderr
    assert "Bit for bit what training recorded." in scored.stdout
