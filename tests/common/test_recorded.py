"""The environment that data were recorded in: options, wrappers, units, time limits."""

import json
import re

import gymnasium
import h5py
import numpy as np
import pytest

from common import datasets, evaluation
from common.evaluation import options


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def box(low, high, size=1):
    return json.dumps({"type": "Box", "shape": [size], "low": [low] * size, "high": [high] * size})


def minari(home, spec, action=((-1.0,), (0.5,), (1.0,)), obs_dim=3, **metadata):
    """Writes own/data-v0, one episode with these actions."""
    data = home / "own/data-v0/data"
    data.mkdir(parents=True, exist_ok=True)
    action = np.float32(action)
    n = len(action)
    with h5py.File(data / "main_data.hdf5", "w") as file:
        episode = file.create_group("episode_0")
        episode["observations"] = np.zeros((n + 1, obs_dim))
        episode["actions"], episode["rewards"] = action, np.ones(n)
        episode["terminations"], episode["truncations"] = np.zeros(n), np.arange(n) == n - 1
    text = json.dumps({"env_spec": json.dumps(spec), **metadata})
    (data / "metadata.json").write_text(text)
    return "own/data-v0"


PENDULUM = {"id": "Pendulum-v1", "max_episode_steps": 200, "kwargs": {}}
RESCALE = {"name": "RescaleAction", "entry_point": "x:y", "kwargs": {}}


def test_actions_recorded_through_a_wrapper_are_in_the_wrappers_units(home, capsys):
    """Pendulum's own bounds are -2 and 2: through RescaleAction 1 is its full torque."""
    spec = PENDULUM | {"additional_wrappers": [RESCALE]}
    data = datasets.load(minari(home, spec, action_space=box(-1, 1)))
    assert data.action.ravel().tolist() == [-1, 0.5, 1]
    assert data.env_id == "Pendulum-v1"
    data = datasets.load(minari(home, spec, ((0.0,), (0.25,), (1.0,)), action_space=box(0, 1)))
    assert data.action.ravel().tolist() == [-1, -0.5, 1]
    assert data.provenance["action_high"] == [2]  # what Pendulum-v1 itself takes
    assert capsys.readouterr().err == ""


def test_clipped_actions_are_those_that_were_taken(home):
    spec = PENDULUM | {"additional_wrappers": [{"name": "ClipAction", "kwargs": None}]}
    name = minari(home, spec, ((-9.0,), (1.0,), (3.0,)), action_space=box(-np.inf, np.inf))
    assert datasets.load(name).action.ravel().tolist() == [-1, 0.5, 1]


@pytest.mark.parametrize(
    "spec, metadata, why",
    [
        ({"additional_wrappers": [{"name": "TransformReward"}]}, {}, "TransformReward"),
        ({}, {"action_space": box(-1, 1)}, "actions go from -1 to 1, those of Pendulum-v1 from -2"),
        (
            {"kwargs": {"g": "../x.xml"}},
            {},
            "arguments of Pendulum-v1 in its metadata are",
        ),
        ({"kwargs": {"gravity": 9.0}}, {}, "gravity"),
        ({"kwargs": [1]}, {}, "not plain"),
        ({}, {"observation_space": box(-1, 1, 7)}, r"shape \[7\], those of Pendulum-v1 \[3\]"),
    ],
)
def test_what_cannot_be_honoured_is_one_note_and_no_score(home, capsys, spec, metadata, why):
    data = datasets.load(minari(home, PENDULUM | spec, **metadata))
    assert (data.env_id, data.ref_max) == ("", None)
    (note,) = capsys.readouterr().err.splitlines()
    assert "cannot be scored" in note
    assert re.search(why, note)


def test_options_are_honoured_and_told(home, capsys):
    """Gravity 0 keeps a resting pendulum at rest; D4RL's references no longer apply."""
    spec = {"id": "Pendulum-v1", "max_episode_steps": 7, "kwargs": {"g": 0.0, "render_mode": "x"}}
    data = datasets.load(minari(home, spec, ((0.5,),)))
    assert data.env_id == 'Pendulum-v1 {"g": 0.0, "max_episode_steps": 7}'
    assert "is scored on Pendulum-v1 {" in capsys.readouterr().err
    env = evaluation.make(data.env_id)
    assert env.unwrapped.g == 0.0
    env.reset(seed=0)
    ends = [env.step(np.zeros(1, np.float32))[3] for _ in range(7)]
    assert ends == [False] * 6 + [True]
    returns = evaluation.evaluate(
        lambda carry, obs, reward, key: (np.zeros((1, 2, 1)), carry), data.env_id, 1, 2
    )
    assert returns.shape == (1, 2) and np.isfinite(returns).all()


def test_the_references_of_d4rl_hold_for_the_standard_environment_alone(home):
    spec = {"id": "Hopper-v5", "max_episode_steps": 1000, "kwargs": {}}
    action = [[0.0] * 3] * 2
    assert datasets.load(minari(home, spec, action, 11)).ref_max == 3234.3
    for change in ({"kwargs": {"terminate_when_unhealthy": False}}, {"max_episode_steps": 200}):
        assert datasets.load(minari(home, spec | change, action, 11)).ref_max is None


def test_options_that_change_the_observations_size(home):
    kwargs = {"exclude_current_positions_from_observation": False}
    spec = {"id": "Hopper-v5", "kwargs": kwargs}
    data = datasets.load(minari(home, spec, [[0.0] * 3] * 2, 12))
    assert data.env_id == f"Hopper-v5 {json.dumps(kwargs)}"
    assert data.obs.shape == (2, 12)


def test_an_evaluation_environment_is_what_is_scored_on(home):
    limit = PENDULUM | {"max_episode_steps": 1_000_000}
    data = datasets.load(minari(home, limit, eval_env_spec=json.dumps(PENDULUM)))
    assert data.env_id == "Pendulum-v1"
    data = datasets.load(minari(home, PENDULUM, eval_env_spec=limit))
    assert data.env_id == 'Pendulum-v1 {"max_episode_steps": 1000000}'


def test_an_unknown_environments_actions_are_in_the_metadatas_units(home):
    data = datasets.load(minari(home, {"id": "My-v0"}, ((-3.0,), (0.0,), (3.0,)),
                                action_space=box(-3, 3)))  # fmt: skip
    assert data.action.ravel().tolist() == [-1, 0, 1]


def test_an_environment_is_looked_for_afresh_each_time(home, capsys):
    name = minari(home, {"id": "My-v0", "max_episode_steps": 5}, ((-3.0,), (3.0,)))
    with pytest.raises(datasets.DatasetError, match="bounds -1 and 1"):
        datasets.load(name)
    name = minari(home, {"id": "My-v0", "max_episode_steps": 5}, ((-1.0,), (1.0,)))
    assert datasets.load(name).env_id == ""
    assert "--env-module" in capsys.readouterr().err
    pendulum = "gymnasium.envs.classic_control.pendulum:PendulumEnv"
    gymnasium.register("My-v0", pendulum, max_episode_steps=5)
    try:
        data = datasets.load(name)
        assert (data.env_id, data.action.ravel().tolist()) == ("My-v0", [-0.5, 0.5])
    finally:
        del gymnasium.registry["My-v0"]
    assert datasets.load(name).env_id == ""


def test_options_typed_by_the_user():
    assert options.split("Pendulum-v1") == ("Pendulum-v1", {})
    with pytest.raises(evaluation.EvaluationError, match="JSON object of plain values"):
        evaluation.make('Pendulum-v1 ["g"]')
    for text in ("Pendulum-v1 {", 'Pendulum-v1 {"nothing": 1}', 'Pendulum-v1 {"g": "a/b"}'):
        with pytest.raises(evaluation.EvaluationError, match="cannot be made"):
            evaluation.make(text)
    assert options.join("Pendulum-v1", {"max_episode_steps": 200}) == "Pendulum-v1"


def test_terminal_states_under_options():
    obs = np.zeros((1, 11), np.float32)  # fallen
    assert evaluation.termination("Hopper-v5")(obs, None, obs).all()
    same = evaluation.termination('Hopper-v5 {"forward_reward_weight": -5, "max_episode_steps": 9}')
    assert same(obs, None, obs).all()
    never = evaluation.termination('Hopper-v5 {"terminate_when_unhealthy": false}')
    assert not never(obs, None, obs).any()
    with pytest.raises(evaluation.EvaluationError, match="No termination function"):
        evaluation.termination('Hopper-v5 {"healthy_z_range": [0.5, 2.0]}')
