"""Evaluation against rollouts by hand, termination against the real environments, and video."""

import functools
import json
import os
import subprocess
import sys
import threading
import types
import warnings
from functools import partial
from pathlib import Path

import gymnasium
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

from common import evaluation, experiment
from common.evaluation import __main__ as command
from common.evaluation import rollout, video
from common.experiment import runtime

ROOT = Path(__file__).resolve().parents[2]

SIZES = {"Hopper-v5": (11, 3), "Pendulum-v1": (3, 1), "HalfCheetah-v5": (17, 6)}


def memoryless(policy):
    """policy(obs) in the form that `evaluate` takes."""
    return partial(evaluation.stateless(lambda state, obs: policy(obs)), None)


def linear(env_id, num_seeds, scale=1.0):
    """A jitted linear policy per seed: weights (S, D, A), act(weights, obs (S, E, D))."""
    weights = scale * jax.random.normal(jax.random.key(3), (num_seeds, *SIZES[env_id]))
    return weights, jax.jit(lambda w, obs: jnp.tanh(obs @ w))


def by_hand(policy, env_id, seed, rescale=1.0):
    """The return and the length of one episode in one plain Gymnasium environment."""
    env = gymnasium.make(env_id)
    obs, rewards, over = env.reset(seed=seed)[0], [], False
    while not over:
        action = np.asarray(policy(np.float32(obs)), np.float32).clip(-1, 1)
        obs, reward, terminated, truncated, _ = env.step(rescale * action)
        rewards.append(float(reward))
        over = terminated or truncated
    return sum(rewards), len(rewards)


@pytest.mark.parametrize("env_id, rescale", [("Hopper-v5", 1.0), ("Pendulum-v1", 2.0)])
def test_returns_are_those_of_single_environments(env_id, rescale):
    """Hopper falls early, at a different step in every episode; Pendulum's actions are in +-2."""
    weights, act = linear(env_id, 2)
    returns = evaluation.evaluate(memoryless(partial(act, weights)), env_id, 2, 3, seed=5)
    assert returns.shape == (2, 3) and returns.dtype == np.float64
    lengths = []
    for s, j in np.ndindex(2, 3):

        def alone(obs, s=s, j=j):  # in the batch's place: the same float32 sums, to the last bit
            return act(weights, jnp.zeros((2, 3, len(obs))).at[s, j].set(obs))[s, j]

        value, length = by_hand(alone, env_id, 5 + j, rescale)
        np.testing.assert_allclose(returns[s, j], value, rtol=1e-9)
        lengths.append(length)
    if env_id == "Hopper-v5":
        assert len(set(lengths)) > 1 and max(lengths) < 1000  # they do end early, apart
    assert len(np.unique(returns)) == returns.size


class Countdown(gymnasium.Env):
    """Ends after 3 + (seed % 4) steps, paying 1 a step; stepping on would pay 1000."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    steps_after_end = 0

    def reset(self, *, seed=None, options=None):
        self.left = 3 + seed % 4
        return np.float32([self.left, 0]), {}

    def step(self, action):
        Countdown.steps_after_end += self.left <= 0
        self.left -= 1
        reward = 1.0 if self.left >= 0 else 1000.0
        return np.float32([self.left, action[0]]), reward, self.left == 0, False, {}


@pytest.fixture
def countdown():
    gymnasium.register("Countdown-v0", Countdown, max_episode_steps=5)
    Countdown.steps_after_end = 0
    yield "Countdown-v0"
    del gymnasium.registry["Countdown-v0"]
    rollout._pool.cache_clear()


def test_nothing_is_counted_or_stepped_after_the_end(countdown):
    zeros = memoryless(lambda obs: np.zeros((2, 4, 1)))
    for _ in range(2):  # a second evaluation begins from resets, not where the first one stopped
        returns = evaluation.evaluate(zeros, countdown, 2, 4)
        np.testing.assert_array_equal(returns, [[3, 4, 5, 5]] * 2)  # the last one by the time limit
    assert Countdown.steps_after_end == 0


class Telling(Countdown):
    """Tells success before the end of an episode of 3 steps, none in one of 4, else no number."""

    def reset(self, *, seed=None, options=None):
        found = super().reset(seed=seed)
        self.length = self.left
        return found

    def step(self, action):
        told = {3: self.left == 2, 4: False}.get(self.length, np.ones(2))
        return *super().step(action)[:4], {"success": told}


def test_success_is_what_the_environment_tells_at_any_step(countdown):
    zeros = memoryless(lambda obs: np.zeros((1, 4, 1)))
    assert np.isnan(evaluation.outcomes(zeros, countdown, 1, 4)[1]).all()
    returns, successes = rollout.rollout(
        zeros, [gymnasium.wrappers.TimeLimit(Telling(), 5) for _ in range(4)], 1, 0
    )
    np.testing.assert_array_equal(returns, [[3, 4, 5, 5]])
    np.testing.assert_array_equal(successes, [[1, 0, np.nan, np.nan]])


def test_discounted_returns(countdown):
    """1 a step for 3, 4, 5 and 5 steps."""
    zeros = memoryless(lambda obs: np.zeros((2, 4, 1)))
    returns = evaluation.evaluate(zeros, countdown, 2, 4, gamma=0.5)
    np.testing.assert_array_equal(returns, [[1.75, 1.875, 1.9375, 1.9375]] * 2)


def test_a_collector_steps_through_episodes_and_goes_on_where_one_stopped(countdown):
    """Terminals and time limits; rows never cross an episode; a later one continues anywhere."""
    whole = evaluation.Collector(countdown, [0, 1])
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1.5, 1.5, (40, 2, 1))  # beyond the bounds: clipped
    rows, shown = [], []
    for action in actions:
        shown.append(whole.obs.copy())
        rows.append(whole.step(action))
    obs, action, reward, next_obs, done, end = (np.stack(x, 1) for x in zip(*rows, strict=True))
    np.testing.assert_array_equal(obs, np.stack(shown, 1))
    np.testing.assert_array_equal(action, np.float32(actions).clip(-1, 1).swapaxes(0, 1))
    assert (reward == 1).all() and 0 < done.sum() < end.sum()  # some end by the limit of 5 steps
    np.testing.assert_array_equal(next_obs[..., 0], obs[..., 0] - 1)
    np.testing.assert_array_equal(next_obs[..., 1], action[..., 0])
    np.testing.assert_array_equal(done == 1, next_obs[..., 0] == 0)
    goes_on = end[:, :-1] == 0
    np.testing.assert_array_equal(obs[:, 1:][goes_on], next_obs[:, :-1][goes_on])
    assert len(set(obs[:, 1:][~goes_on][:, 0])) > 1  # episodes are reset with seeds of their own
    assert Countdown.steps_after_end == 0
    for stop in (0, 1, 7, 23):
        later = evaluation.Collector(countdown, [0, 1], action[:, :stop], end[:, :stop])
        for t in range(stop, 40):
            for x, y in zip(later.step(actions[t]), rows[t], strict=True):
                np.testing.assert_array_equal(x, y)


def test_a_collector_takes_no_infinite_action(countdown):
    collector = evaluation.Collector(countdown, [0, 1])
    _, action, *_ = collector.step(np.array([[np.nan], [-np.inf]]))
    np.testing.assert_array_equal(action, 0)


@pytest.mark.parametrize("cores", [1, 2, 3, 64])
def test_returns_are_the_same_bits_on_any_number_of_cores(cores, monkeypatch):
    """Episodes end apart, so that there are fewer of them than cores, too."""
    weights, act = linear("Hopper-v5", 2)
    score = partial(evaluation.evaluate, memoryless(partial(act, weights)), "Hopper-v5", 2, 5)
    monkeypatch.setattr(runtime, "cores", lambda: 1)
    alone, threads = score(), set()
    for env in rollout._pool("Hopper-v5", 10):
        monkeypatch.setattr(env, "step", noted(env.step, threads))
    monkeypatch.setattr(runtime, "cores", lambda: cores)
    np.testing.assert_array_equal(score(), alone)
    assert (threads == {threading.main_thread()}) == (cores == 1)


def noted(step, threads):
    def noting(action):
        threads.add(threading.current_thread())
        return step(action)

    return noting


def test_an_error_of_an_environment_is_heard_from_any_core(countdown, monkeypatch):
    monkeypatch.setattr(runtime, "cores", lambda: 2)
    monkeypatch.setattr(Countdown, "step", lambda self, action: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluation.evaluate(memoryless(lambda obs: np.zeros((1, 4, 1))), countdown, 1, 4)


def test_memory_policy_sees_the_reward_of_the_action_before(countdown):
    seen = []

    def policy(carry, obs, reward, key):
        count, total = (0, jnp.zeros((1, 2))) if carry is None else carry
        seen.append((np.array(obs), np.array(reward), jax.random.key_data(key).tolist()))
        return jnp.full((1, 2, 1), count / 10), (count + 1, total + reward)

    evaluation.evaluate(policy, countdown, 1, 2, seed=1)  # 4 and 5 steps
    obs, reward, keys = zip(*seen, strict=True)
    np.testing.assert_array_equal(np.array(reward)[:, 0, 0], [0, 1, 1, 1, 1])
    np.testing.assert_array_equal(np.array(obs)[:, 0, 0, 0], [4, 3, 2, 1, 0])
    np.testing.assert_array_equal(np.array(obs)[:, 0, 1, 0], [5, 4, 3, 2, 1])
    np.testing.assert_allclose(np.array(obs)[1:, 0, 1, 1], [0, 0.1, 0.2, 0.3])  # its own count
    folds = [jax.random.fold_in(jax.random.key(1), t) for t in range(5)]
    assert list(keys) == [jax.random.key_data(k).tolist() for k in folds]


def test_rewards_after_the_end_are_zero(countdown):
    rewards = []

    def policy(carry, obs, reward, key):
        rewards.append(reward)
        return np.zeros((1, 3, 1)), carry

    evaluation.evaluate(policy, countdown, 1, 3)  # 3, 4 and 5 steps
    np.testing.assert_array_equal(
        np.array(rewards)[:, 0], [[0, 0, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1], [0, 1, 1]]
    )


def test_seeds_do_not_touch_each_other_and_reruns_are_equal():
    weights, act = linear("Hopper-v5", 3)

    def returns(weights):
        policy = memoryless(partial(act, weights))
        return evaluation.evaluate(policy, "Hopper-v5", 3, 2)

    first = returns(weights)
    np.testing.assert_array_equal(returns(weights), first)
    changed = returns(weights.at[1].multiply(-2))
    np.testing.assert_array_equal(changed[[0, 2]], first[[0, 2]])
    assert (changed[1] != first[1]).all()
    same = returns(jnp.stack([weights[0]] * 3))
    np.testing.assert_array_equal(same, np.stack([first[0]] * 3))  # same starts for every seed


def test_a_policy_compiles_once():
    weights, _ = linear("Pendulum-v1", 2)
    traces = []

    @jax.jit
    def act(weights, obs, reward, key):
        traces.append(obs.shape)
        return jnp.tanh(obs @ weights) + 0.1 * jax.random.normal(key) + 0 * reward[..., None]

    for factor in (1.0, 2.0):

        def policy(carry, obs, reward, key, weights=factor * weights):
            return act(weights, obs, reward, key), carry

        evaluation.evaluate(policy, "Pendulum-v1", 2, 2)
    assert traces == [(2, 2, 3)]


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_failed_seed_is_nan_and_the_others_go_on(countdown, wrong):
    def policy(obs):
        action = np.zeros((3, 2, 1))
        action[1, 0] = np.where(obs[1, 0, 0] > 1, 0, wrong)  # fails before its last step
        return action

    returns = evaluation.evaluate(memoryless(policy), countdown, 3, 2)
    np.testing.assert_array_equal(returns, [[3, 4], [np.nan, np.nan], [3, 4]])


def test_a_policy_may_be_undefined_after_the_end(countdown):
    def policy(obs):
        return np.where(obs[..., :1] > 0, 0, np.nan)

    returns = evaluation.evaluate(memoryless(policy), countdown, 1, 3)
    np.testing.assert_array_equal(returns, [[3, 4, 5]])


@pytest.mark.parametrize(
    "env_id, says", [("", "unknown environment"), ("Hoper-v5", "Hopper"),
                     ("FrozenLake-v1", "Discrete(16)"), ("antigravity:Hopper-v5", "unknown env")]
)  # fmt: skip
def test_environments_that_cannot_be_scored(env_id, says):
    with pytest.raises(evaluation.EvaluationError) as error:
        evaluation.evaluate(None, env_id, 1, 1)
    assert says in str(error.value)


def test_making_environments_is_quiet_and_leaves_no_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for env_id in ("HalfCheetah-v4", "HalfCheetah-v5"):
            env = evaluation.make(env_id)
            env.reset(seed=0)
            env.step(np.zeros(6, np.float32))
    assert not list(tmp_path.iterdir())


# --- Termination ---

ENDING = ["Ant", "Hopper", "Humanoid", "InvertedDoublePendulum", "InvertedPendulum", "Walker2d"]


@functools.cache
def transitions(env_id, count=600):
    """Real steps from random states: (obs, action, next_obs, ended, unseen), `count` rows.

    unseen: the end, if any, cannot be read off next_obs, see the comments in evaluation.py.
    """
    env, rng, rows = evaluation.make(env_id).unwrapped, np.random.default_rng(0), []
    env.reset(seed=0)
    for i in range(count):  # healthy, fallen, tumbling, and absurdly fast
        width, speed = (0.05, 0.3, 1.0, 3.0)[i % 4], (0.1, 5.0, 40.0, 300.0)[rng.integers(4)]
        qpos = env.init_qpos + width * rng.standard_normal(env.model.nq)
        env.set_state(qpos, speed * rng.standard_normal(env.model.nv))
        obs, action = env._get_obs(), rng.uniform(-1, 1, env.action_space.shape)
        next_obs, _, ended, _, _ = env.step(action)
        unseen = env_id.startswith("Hopper") and (np.abs(env.data.qvel) >= 100).any()
        if env_id.startswith("InvertedDouble"):
            older = env.data.site_xpos[0][2]
            mujoco.mj_kinematics(env.model, env.data)  # the tip where the observation has it
            unseen = (older <= 1) != (env.data.site_xpos[0][2] <= 1)
        rows.append((obs, action, next_obs, ended, unseen))
    return [np.array(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("name", ENDING)
def test_termination_is_the_real_one(name, version):
    env_id = f"{name}-v{version}"
    obs, action, next_obs, ended, unseen = transitions(env_id)
    says = np.array(evaluation.termination(env_id)(*map(jnp.float32, (obs, action, next_obs))))
    np.testing.assert_array_equal(says[~unseen], ended[~unseen])
    assert min(ended[~unseen].sum(), (~ended[~unseen]).sum()) >= 100, (ended.mean(), unseen.mean())


def test_hopper_ends_that_an_observation_cannot_show():
    """Velocities are clipped in the observation, so an end by speed alone looks healthy there."""
    *inputs, ended, unseen = transitions("Hopper-v4")
    wrong = np.array(evaluation.termination("Hopper-v4")(*map(jnp.float32, inputs))) != ended
    assert wrong.any() and not wrong[~unseen].any() and ended[wrong].all()


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("name", ["HalfCheetah", "HumanoidStandup", "Reacher", "Swimmer"])
def test_termination_of_those_that_never_end(name, version):
    env_id = f"{name}-v{version}"
    obs, action, next_obs, ended, _ = transitions(env_id, 300)
    assert not ended.any()
    assert not np.array(evaluation.termination(env_id)(obs, action, next_obs)).any()


def test_pendulum_never_ends():
    env = evaluation.make("Pendulum-v1")
    env.reset(seed=0)
    over = [env.step(env.action_space.sample())[2:4] for _ in range(200)]
    assert not np.array(over)[:-1].any() and over[-1] == (False, True)  # a time limit is no end
    assert not np.array(evaluation.termination("Pendulum-v1")(*[jnp.zeros((4, 3))] * 3)).any()


@pytest.mark.parametrize("name", [*ENDING, "HalfCheetah", "Reacher"])
def test_termination_under_jit_and_vmap_for_any_leading_axes(name):
    ends = evaluation.termination(f"{name}-v5")
    obs = jnp.float32(transitions(f"{name}-v5")[2] if name in ENDING else jnp.ones((600, 17)))
    action = jnp.zeros((600, 3))
    plain = np.array(ends(obs, action, obs))
    assert plain.shape == (600,) and plain.dtype == bool
    np.testing.assert_array_equal(jax.jit(ends)(obs, action, obs), plain)
    np.testing.assert_array_equal(jax.vmap(ends)(obs, action, obs), plain)
    cube = [x.reshape(3, 200, -1) for x in (obs, action, obs)]
    np.testing.assert_array_equal(ends(*cube), plain.reshape(3, 200))
    if name in ENDING:  # a model's nonsense ends the rollout
        assert bool(ends(obs[0], action[0], jnp.full_like(obs[0], jnp.nan)))


def test_termination_of_an_unknown_environment_names_the_way_out():
    for env_id in ("Hopper-v3", "Hopper", "", "MountainCarContinuous-v0", "Countdown-v4"):
        with pytest.raises(evaluation.EvaluationError, match="--no-termination"):
            evaluation.termination(env_id)
    assert not evaluation.termination("PointMaze_UMaze-v3")(None, None, jnp.zeros((2, 4))).any()


# --- Video ---


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A run folder and, in evaluation.load's place, a state whose second seed's weights are 1."""
    cfg = types.SimpleNamespace(num_seeds=2, seed=5, eval_episodes=2)
    state = {"w": jnp.stack([jnp.zeros(()), jnp.ones(())])}
    act = evaluation.stateless(lambda state, obs: state["w"] * obs[..., :1])
    module = types.SimpleNamespace(policy=lambda cfg: act)
    returns = lambda run: json.loads((run / "returns.json").read_text())  # noqa: E731
    monkeypatch.setattr(evaluation, "load", lambda run: (module, cfg, state))
    monkeypatch.setattr(evaluation, "recorded", returns)
    data = {"env_id": "Drawn-v0", "ref_min_score": 1.0, "ref_max_score": 5.0}
    info = {"dataset": data, "dims": [9, 2, 1]}
    monkeypatch.setattr(experiment, "read", lambda run: (info, cfg))
    monkeypatch.setattr(video, "choose_renderer", lambda: None)
    return tmp_path


class Drawn(Countdown):
    """Countdown with a picture of the steps left."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 60}

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def render(self):
        return np.full((32, 32, 3), 20 * max(self.left, 0), np.uint8)


@pytest.fixture
def drawn():
    gymnasium.register("Drawn-v0", Drawn)
    gymnasium.registry["Drawn-v0"].max_episode_steps = 50
    yield "Drawn-v0"
    del gymnasium.registry["Drawn-v0"]


def test_film_shows_the_evaluated_episodes(drawn, tmp_path):
    path = tmp_path / "new" / "film.gif"
    zeros = memoryless(lambda obs: np.zeros_like(obs[..., :1]))
    returns = video.film(zeros, drawn, path, episodes=4)
    np.testing.assert_array_equal(returns, evaluation.evaluate(zeros, drawn, 1, 4)[0])
    rollout._pool.cache_clear()
    import imageio.v2 as imageio

    with imageio.get_reader(path) as reader:  # 18 steps, every second one at 60 Hz
        shades = [frame.mean() for frame in reader]
    assert len(shades) == 9 and shades[0] == pytest.approx(60, abs=4)


def test_the_command_films_the_seed_asked_for(trained, drawn, capsys):
    path = trained / "film.gif"
    command.main(trained, path, episodes=2, seed=1)
    assert capsys.readouterr().out == f"{path}: Drawn-v0, return 3.0, 4.0\n" and path.exists()
    with pytest.raises(evaluation.EvaluationError, match="seeds 0 to 1"):
        command.main(trained, path, seed=2)
    with pytest.raises(evaluation.EvaluationError, match="mp4 or .gif"):
        command.main(trained, trained / "film.txt")


def test_the_command_scores_every_seed(trained, drawn, capsys):
    for recorded, verdict in (
        ([[3.0, 4.0]] * 2, "Bit for bit what training recorded."),
        ([[3.0, 4.0], [3.0, 4.000001]], "Training recorded other returns."),
        (None, None),  # nothing to compare with
    ):
        (trained / "returns.json").write_text(json.dumps(recorded))
        command.main(trained)
        lines = capsys.readouterr().out.splitlines()
        for seed in (5, 6):
            words = f"seed {seed}: return 3.5 +- 0.5, score 62.5, 2 episodes of Drawn-v0"
            assert lines[seed - 5] == words
        assert lines[2:] == ([verdict] if verdict else [])
    command.main(trained, episodes=3)
    assert "3 episodes" in capsys.readouterr().out


def test_no_renderer_ends_in_one_message_with_the_package(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "")  # so that it is restored
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    tried = []
    monkeypatch.setattr(subprocess, "call", lambda cmd, env, stderr: tried.append(env) or 1)
    with pytest.raises(evaluation.EvaluationError, match="apt-get install libegl1"):
        video.choose_renderer()
    assert [env["MUJOCO_GL"] for env in tried] == ["egl", "osmesa"]
    assert "MUJOCO_GL" not in os.environ
    monkeypatch.setattr(
        subprocess, "call", lambda cmd, env, stderr: env["MUJOCO_GL"] == "egl"
    )  # fails
    video.choose_renderer()
    assert os.environ["MUJOCO_GL"] == "osmesa"
    with pytest.raises(evaluation.EvaluationError, match="tried osmesa"):  # asked for, but broken
        monkeypatch.setattr(subprocess, "call", lambda cmd, env, stderr: 1)
        video.choose_renderer()


def test_a_broken_renderer_is_one_message(tmp_path, drawn, monkeypatch):
    monkeypatch.setattr(Drawn, "render", lambda self: 1 / 0)
    with pytest.raises(evaluation.EvaluationError, match="cannot be drawn here.*apt-get"):
        video.film(None, drawn, tmp_path / "film.gif")


FILM = """
import sys
import imageio.v2 as imageio, numpy as np
from common.evaluation import video

video.choose_renderer()
policy = lambda carry, obs, reward, key: (np.zeros((1, 1, 3)), carry)
print(video.film(policy, "Hopper-v5", sys.argv[1])[0])
with imageio.get_reader(sys.argv[1]) as reader:
    frames = np.array([frame for frame in reader])
print(len(frames), frames.std(), np.any(frames[0] != frames[-1]))
"""


def test_hopper_is_really_drawn_where_the_machine_can(tmp_path):
    """In a process of its own: the renderer is chosen before MuJoCo is imported."""
    command = [sys.executable, "-W", "error", "-c", FILM, str(tmp_path / "hopper.mp4")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode and "apt-get" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    value, count, contrast, moves = done.stdout.split()
    zeros = memoryless(lambda obs: np.zeros((1, 1, 3)))
    assert float(value) == evaluation.evaluate(zeros, "Hopper-v5", 1, 1)[0, 0]
    assert int(count) > 5 and float(contrast) > 10 and moves == "True"


def test_no_episodes_need_no_environment():
    """Data without an environment of Gymnasium can still be trained on."""
    assert evaluation.evaluate(None, "", 3, 0).shape == (3, 0)
