"""Policies in one's own code: without memory, with memory, and out of a run's folder."""

import json
from functools import partial
from types import SimpleNamespace

import dt
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import datasets, evaluation, experiment
from common.evaluation import Policy, rollout


def remember(state, carry, obs, reward, key, cfg):
    """Four actions: the steps so far, all rewards so far, the first observation, noise; a tenth."""
    first = (jnp.zeros(len(obs)), jnp.zeros(len(obs)), obs[:, 0])
    count, total, start = first if carry is None else carry
    carry = count + 1, total + reward, start
    noise = jax.random.uniform(key, (len(obs),))
    return state * jnp.stack([*carry, noise], -1) / cfg.scale, carry


CFG = SimpleNamespace(scale=10.0)


@pytest.fixture
def policy():
    return Policy(partial(remember, cfg=CFG), jnp.float32(1))


def test_memory_goes_from_step_to_step_and_reset_begins_afresh(policy):
    for start in (0.2, 0.3):
        told = [(start, 0.0), (0.5, 1.0), (0.7, 2.0)]  # obs, and what the action before earned
        actions = [policy(np.array([obs, 9.0]), reward) for obs, reward in told]
        np.testing.assert_allclose(
            np.array(actions)[:, :3],
            [[0.1, 0, start / 10], [0.2, 0.1, start / 10], [0.3, 0.3, start / 10]],
            rtol=1e-5,
        )
        policy.reset()


def test_keys_differ_from_step_to_step_and_repeat_after_a_reset(policy):
    first = [policy(np.zeros(2))[3] for _ in range(3)]
    assert len(set(first)) == 3
    policy.reset()
    assert [policy(np.zeros(2))[3] for _ in range(3)] == first


def test_reward_is_none_where_none_is_told(policy):
    assert [policy(np.zeros(2))[1] for _ in range(2)] == [0, 0]


@pytest.mark.parametrize("shape", [(), (1,), (3,)])
def test_one_observation_or_several(shape, policy):
    """(D,) or (E, D), each of which has a memory of its own; a reward for all, or one for each."""
    obs = np.linspace(0.1, 0.4, 2 * int(np.prod(shape))).reshape(*shape, 2)
    reward = np.linspace(1, 2, max(1, obs.size // 2)).reshape(shape)
    policy(obs)
    action = policy(obs + 0.1, 1.5)
    assert isinstance(action, np.ndarray) and action.shape == (*shape, 4)
    np.testing.assert_allclose(action[..., 0], np.full(shape, 0.2), rtol=1e-5)
    np.testing.assert_allclose(action[..., 1], np.full(shape, 0.15), rtol=1e-5)
    np.testing.assert_allclose(action[..., 2], obs[..., 0] / 10, rtol=1e-5)
    action = policy(obs, reward)
    np.testing.assert_allclose(action[..., 1], (1.5 + reward) / 10, rtol=1e-5)


def test_actions_are_clipped():
    policy = Policy(partial(remember, cfg=CFG), jnp.float32(-100))
    assert policy(np.ones(2))[:3].tolist() == [-1, 0, -1]


def test_a_policy_with_memory_compiles_twice_and_no_more():
    traces = []

    def act(state, carry, obs, reward, key):
        traces.append(obs.shape)
        return remember(state, carry, obs, reward, key, CFG)

    policy = Policy(act, jnp.float32(1))
    for _ in range(2):
        for t in range(4):
            policy(np.zeros(2), t)
        policy.reset()
    assert traces == [(1, 2), (1, 2)]  # without a carry, then with one


def test_without_memory_an_action_is_of_its_observation_alone():
    def act(state, obs):
        return state * obs[..., :1]

    policy = Policy(evaluation.stateless(act), jnp.float32(2))
    several = np.array([[0.1, 0.0], [-0.3, 5.0], [0.9, 1.0]])
    expected = [[0.2], [-0.6], [1.0]]
    for _ in range(2):
        np.testing.assert_allclose(policy(several, reward=7.0), expected, rtol=1e-6)
        for obs, action in zip(several, expected, strict=True):
            np.testing.assert_allclose(policy(obs), action, rtol=1e-6)
        np.testing.assert_allclose(policy(several), expected, rtol=1e-6)
        policy.reset()


# --- What evaluate and a loaded policy do is one thing ---


class Walk(gymnasium.Env):
    """Four steps; observes the action and pays for it: a wrong memory changes the return."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    rewards = []

    def reset(self, *, seed=None, options=None):
        return np.float32([seed, 0, 0]), {}

    def step(self, action):
        reward = float(1 + 3 * action[0] - action[1])
        Walk.rewards.append(reward)
        return np.float32([1, *action]), reward, False, False, {}


@pytest.fixture
def walk():
    gymnasium.register("Walk-v0", Walk, max_episode_steps=4)
    Walk.rewards.clear()
    yield "Walk-v0"
    del gymnasium.registry["Walk-v0"]
    rollout._pool.cache_clear()


def test_a_loaded_dt_acts_as_in_evaluation(walk, tmp_path, monkeypatch):
    """Two seeds; the context is shorter than the episode; from the disk, outside of `evaluate`."""
    monkeypatch.setattr("sys.argv", ["dt.py"])
    rng = np.random.default_rng(0)
    obs, action = rng.normal(size=(9, 3)), rng.uniform(-1, 1, (9, 2))
    arrays = (np.float32(x) for x in (obs, action, rng.normal(size=9), obs, np.zeros(9)))
    data = datasets.Dataset("mine", walk, *arrays, np.array([0, 4]), np.array([4, 5]), 0, 1, {})
    cfg = dt.Config(
        env="mine", out=str(tmp_path), num_seeds=2, num_updates=10, eval_every=10, context=3,
        layers=1, width=8, max_time=10, targets=(5.0,), rtg_scale=1.0, eval_episodes=1,
        batch_size=8,
    )  # fmt: skip
    keys = jax.vmap(jax.random.key)(jnp.arange(2))
    shapes = jax.eval_shape(jax.vmap(partial(dt.init, cfg=cfg), (0, None)), keys, data.steps())
    state = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)
    run = experiment.Run(cfg, data)
    run.save(10, state)
    assert json.loads((run.folder / "config.json").read_text())["algorithm"] == "dt"

    act = jax.jit(jax.vmap(dt.policy(cfg), (0, 0, 0, 0, None)))
    returns = evaluation.evaluate(partial(act, state), walk, 2, 1, seed=1)
    assert abs(returns[0, 0] - returns[1, 0]) > 0.1
    assert np.ptp(Walk.rewards[::2]) > 0.1
    policy, env = evaluation.load_policy(run.folder, 1), evaluation.make(walk)

    def episode(told):
        obs, reward, total = env.reset(seed=1)[0], 0.0, 0.0
        for _ in range(4):
            obs, reward, *_ = env.step(policy(obs, reward * told))
            total += reward
        policy.reset()
        return total

    np.testing.assert_allclose([episode(told=1), episode(told=1)], returns[1, 0], rtol=1e-5)
    assert abs(episode(told=0) - returns[1, 0]) > 1e-3  # else the line above says too little
