"""Discrete actions and small images: read, checked, evaluated, and refused by the wrong files."""

import json

import bcq
import discrete_bcq
import gymnasium
import h5py
import iql
import jax
import numpy as np
import pytest
import tiny

from common import datasets, evaluation, experiment
from common.datasets import __main__ as command

N = 12
SPACE = json.dumps({"type": "Discrete", "dtype": "int64", "start": 0, "n": 3})


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def rows(**changed):
    """The arguments of from_arrays for three episodes of CartPole."""
    rng = np.random.default_rng(0)
    fields = dict(obs=rng.normal(size=(N, 4)), action=np.arange(N) % 2, reward=np.ones(N))
    fields |= dict(done=np.arange(N) % 4 == 3, timeout=np.zeros(N), env_id="CartPole-v1")
    return fields | changed


def minari(home, metadata, **changed):
    """own/grid-v0: an episode whose observations are images of 2 x 3 x 2 numbers."""
    data = home / "own/grid-v0/data"
    data.mkdir(parents=True)
    arrays = {
        "observations": np.arange((N + 1) * 12).reshape(N + 1, 2, 3, 2) % 2 == 0,
        "actions": np.arange(N) % 2, "rewards": np.ones(N), "terminations": np.zeros(N, bool),
        "truncations": np.arange(N) == N - 1,
    }  # fmt: skip
    with h5py.File(data / "main_data.hdf5", "w") as file:
        for name, x in (arrays | changed).items():
            for part, y in x.items() if isinstance(x, dict) else (("", x),):
                file[f"episode_0/{name}/{part}".rstrip("/")] = y
    (data / "metadata.json").write_text(json.dumps(metadata))
    return arrays


def test_whole_numbers_become_one_vector_for_each_action():
    data = datasets.from_arrays(**rows())
    assert data.action.dtype == np.int32 and data.action.shape == (N,)
    assert data.num_actions == 2 and data.action.tolist() == [0, 1] * 6
    for vectors in (data.transitions().action, data.steps().action):
        assert vectors.dtype == np.float32
        np.testing.assert_array_equal(vectors, np.eye(2)[data.action])
    column = datasets.from_arrays(**rows(action=np.arange(N)[:, None] % 2.0))
    assert column.action.tolist() == data.action.tolist()


def test_without_an_environment_the_largest_action_tells_their_number():
    data = datasets.from_arrays(**rows(action=np.arange(N) % 5, env_id=""))
    assert data.num_actions == 5
    assert datasets.from_arrays(**rows(action=np.zeros((N, 1)), env_id="")).num_actions == 0


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.arange(N) % 3, "action: row 2: 2 is not one of the actions 0 to 1 of CartPole-v1"),
        (np.arange(N) - 1, "action: row 0: -1 is not one"),
        (np.arange(N) / 2, "action: row 1: 0.5 is not one"),
        (np.zeros((N, 2)), r"action: has shape \(12, 2\), needs 1 ax"),
        (np.full(N, np.nan), "row 0: nan is not a finite"),
    ],
)
def test_other_numbers_are_refused(action, message):
    with pytest.raises(datasets.DatasetError, match=message):
        datasets.from_arrays(**rows(action=action))


def test_a_minari_set_of_images_is_read_and_says_how(home):
    arrays = minari(home, {"action_space": SPACE})
    for _ in range(2):  # the second time from the cache
        data = datasets.load("own/grid-v0")
        np.testing.assert_array_equal(data.obs, arrays["observations"][:-1].reshape(N, 12))
        np.testing.assert_array_equal(data.next_obs, arrays["observations"][1:].reshape(N, 12))
        assert data.num_actions == 3  # of the metadata: the data hold two
        assert data.provenance["obs"] == "2 x 3 x 2 numbers in the order of their axes"


def test_a_minari_set_of_dicts_says_which_parts_in_which_order(home):
    place = np.arange(N + 1.0)[:, None]
    parts = {"achieved_goal": place, "desired_goal": place + 20, "observation": place + 10}
    minari(home, {"action_space": SPACE}, observations=parts)
    data = datasets.load("own/grid-v0")
    assert data.provenance["obs"] == "achieved_goal, then observation, then desired_goal"
    np.testing.assert_array_equal(data.obs[1], [1, 11, 21])


def test_metadata_that_contradict_the_environment_are_told(home, capsys):
    spec = json.dumps({"id": "CartPole-v1", "max_episode_steps": 500})
    minari(home, {"env_spec": spec, "action_space": SPACE}, observations=np.zeros((N + 1, 4)))
    data = datasets.load("own/grid-v0")
    assert data.env_id == "" and data.num_actions == 3
    assert "3 discrete actions, those of CartPole-v1 2 discrete actions" in capsys.readouterr().err


class Lights(gymnasium.Env):
    """Shows a plane of 2 x 2 lights; pays for the action whose light is on."""

    observation_space = gymnasium.spaces.Box(0, 1, (2, 2), bool)
    action_space = gymnasium.spaces.Discrete(4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._light(), {}

    def step(self, action):
        reward = float(action == self._on)
        return self._light(), reward, False, False, {}

    def _light(self):
        self._on = self.np_random.integers(4)
        return np.arange(4).reshape(2, 2) == self._on


@pytest.fixture
def lights():
    gymnasium.register("Lights-v0", Lights, max_episode_steps=10)
    yield "Lights-v0"
    del gymnasium.registry["Lights-v0"]


def test_the_largest_entry_is_the_action_taken(lights):
    """The policy that returns the planes as they are presses the light that is on."""
    assert evaluation.inspect(lights)[:2] == (lights, 4)
    assert evaluation.inspect(lights).num_actions == 4
    follow = evaluation.evaluate(lambda carry, obs, *_: (obs, carry), lights, 2, 3)
    np.testing.assert_array_equal(follow, np.full((2, 3), 10))
    avoid = evaluation.evaluate(lambda carry, obs, *_: (-obs, carry), lights, 1, 1)
    assert avoid == 0


def test_joined_sets_have_one_number_of_actions():
    two = datasets.from_arrays(**rows(), name="two")
    more = datasets.from_arrays(**rows(reward=np.zeros(N)), name="more")
    both = datasets.join([two, more])
    assert both.num_actions == 2 and both.action.tolist() == [0, 1] * 12
    bare = [datasets.from_arrays(**rows(action=np.arange(N) % n, env_id="", obs=np.ones((N, n))
                                        [:, :2])) for n in (2, 3)]  # fmt: skip
    with pytest.raises(datasets.DatasetError, match="actions differ, 2 discrete .* 3 discrete"):
        datasets.join(bare)


def test_the_summary_tells_the_share_of_each_action(tmp_path):
    data = datasets.from_arrays(**rows())
    assert ("action (2 discrete)", "0: 50.0%  1: 50.0%") in command.facts(data)
    command.draw(data, tmp_path / "data.png")
    assert (tmp_path / "data.png").stat().st_size > 1000


# --- Files that take the other kind ---


def test_a_file_for_vectors_refuses_and_names_those_that_take_them(tmp_path):
    data = datasets.from_arrays(**rows())
    for module, use in ((iql, "bc.py or discrete_bcq.py"), (bcq, "discrete_bcq.py or bc.py")):
        cfg = module.Config(out=str(tmp_path), batch_size=8)
        with pytest.raises(experiment.RunError) as error:
            module.train(cfg, data)
        name = module.__name__
        wanted = f"{name}.py does not take the discrete actions of arrays: use {use}"
        assert str(error.value).startswith(wanted)
    assert not list(tmp_path.iterdir())


def test_a_file_for_discrete_actions_refuses_vectors(tmp_path):
    data = tiny.dataset(tmp_path / "tiny.hdf5")
    with pytest.raises(experiment.RunError) as error:
        discrete_bcq.train(discrete_bcq.Config(out=str(tmp_path), batch_size=8), data)
    assert "does not take the continuous actions" in str(error.value)
    assert "use bcq.py or" in str(error.value)
    assert not list(tmp_path.glob("discrete*"))


def test_a_loaded_policy_gives_whole_numbers(tmp_path):
    """Those of the run's own `act`, for one observation and for many."""
    data = datasets.from_arrays(**rows())
    cfg = tiny.config("discrete_bcq", out=str(tmp_path), num_updates=10, eval_every=10,
                      log_every=10, eval_episodes=0, num_seeds=1)  # fmt: skip
    discrete_bcq.train(cfg, data)
    (run,) = tmp_path.glob("*/*/*")
    module, own, state = evaluation.load(run)
    state = jax.tree.map(lambda x: x[0], state)
    action, _ = module.policy(own)(state, None, data.obs, None, None)
    wanted = np.asarray(action).argmax(-1)
    for units in ("unit", "environment"):
        policy = evaluation.load_policy(run, units=units)
        np.testing.assert_array_equal(policy(data.obs), wanted)
        assert policy(data.obs[0]) == wanted[0] and policy(data.obs[0]).dtype.kind == "i"
