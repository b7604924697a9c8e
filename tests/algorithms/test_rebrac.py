"""ReBRAC: losses and a round in float64, next actions, per-dataset values, a known value."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rebrac
from float64 import assert_first_adam_step, f64, gradient, mlp, random_batch, scramble

from common import datasets, experiment

CFG = rebrac.Config(
    widths=(8, 8), batch_size=16, log_every=6, actor_lr=1e-3, critic_lr=2e-3, polyak=0.1, gamma=0.9,
    beta1=0.4, beta2=0.7, reward_scale=1.0,
)  # fmt: skip
KEY = jax.random.key(0)
B, A = 16, 2
FAST = dict(compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time
INIT = jax.jit(rebrac.init, static_argnums=2, **FAST)
UPDATE = jax.jit(rebrac.update, static_argnums=3, **FAST)
CRITIC_LOSS = jax.jit(rebrac.critic_loss, static_argnums=4, **FAST)
ACTOR_LOSS = jax.jit(jax.value_and_grad(rebrac.actor_loss, has_aux=True), static_argnums=3, **FAST)


@pytest.fixture(scope="module")
def batch():
    next_action = np.random.default_rng(5).uniform(-1, 1, (B, A))
    return rebrac.Transitions(*random_batch(B, seed=1), jnp.asarray(next_action, jnp.float32))


@pytest.fixture(scope="module")
def fresh(batch):
    return INIT(KEY, batch, CFG)


@pytest.fixture(scope="module")
def state(fresh):
    """Every parameter away from its start, both targets away from what they follow."""
    return fresh.replace(
        actor=fresh.actor.replace(params=scramble(fresh.actor.params, 0)),
        critic=fresh.critic.replace(params=scramble(fresh.critic.params, 1)),
        target_actor=scramble(fresh.target_actor, 2, 1.0),
        target=scramble(fresh.target, 3),
    )


# --- The paper's equations in numpy ---


def pi64(params, obs):
    return np.tanh(mlp(params["params"]["MLP_0"], obs))


def q64(params, obs, action):
    """Both critics, (2, B): LayerNorm after each ReLU, none before the last layer."""

    def member(p):
        x = np.concatenate([obs, action], -1)
        for i in range(2):
            x = np.maximum(x @ p[f"Dense_{i}"]["kernel"].T + p[f"Dense_{i}"]["bias"], 0)
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
            x = x * p[f"LayerNorm_{i}"]["scale"] + p[f"LayerNorm_{i}"]["bias"]
        return (x @ p["Dense_2"]["kernel"].T + p["Dense_2"]["bias"])[:, 0]

    return np.stack([member(jax.tree.map(lambda x, i=i: x[i], params["params"])) for i in range(2)])


def target64(state, b, key, cfg):
    noise = np.clip(cfg.policy_noise * np.float64(jax.random.normal(key, (B, A))), -0.5, 0.5)
    action = np.clip(pi64(f64(state.target_actor), b.next_obs) + noise, -1, 1)
    value = q64(f64(state.target), b.next_obs, action).min(0)
    value = value - cfg.beta2 * ((action - b.next_action) ** 2).sum(-1)
    return b.reward + cfg.gamma * np.where(b.done == 1, 0, value)


def critic_loss64(q, b, target):
    return np.mean((q64(q, b.obs, b.action) - target) ** 2, 1).sum()


def actor_loss64(pi, q_params, b, beta1, scale=None):
    """scale: 1 / mean |Q|, a constant of the gradient."""
    action = pi64(pi, b.obs)
    q = q64(q_params, b.obs, action).min(0)
    scale = 1 / np.abs(q).mean() if scale is None else scale
    return np.mean(beta1 * ((action - b.action) ** 2).sum(-1) - scale * q)


# --- Golden values ---


def test_critic_loss(state, batch):
    loss, info = CRITIC_LOSS(state.critic.params, state, batch, KEY, CFG)
    b = f64(batch)
    expected = critic_loss64(f64(state.critic.params), b, target64(state, b, KEY, CFG))
    np.testing.assert_allclose(loss, expected, rtol=2e-5)
    chex.assert_shape([loss, *info.values()], ())


def test_actor_loss(state, batch):
    (loss, info), _ = ACTOR_LOSS(state.actor.params, state, batch, CFG)
    expected = actor_loss64(f64(state.actor.params), f64(state.critic.params), f64(batch), 0.4)
    np.testing.assert_allclose(loss, expected, rtol=2e-5)
    chex.assert_shape([loss, *info.values()], ())


def test_a_round_of_one(state, batch):
    """The critics; the policy against the new ones; the target policy towards the old policy."""
    cfg, b = replace(CFG, policy_delay=1), f64(batch)
    rows, keys = jax.tree.map(lambda x: x[None], (batch, KEY))
    new, _ = UPDATE(state, rows, keys, cfg)

    target = target64(state, b, KEY, cfg)
    grads = gradient(lambda q: critic_loss64(q, b, target), f64(state.critic.params))
    assert_first_adam_step(state.critic, new.critic, grads, cfg.critic_lr)

    pi, q = f64(state.actor.params), f64(new.critic.params)
    scale = 1 / np.abs(q64(q, b.obs, pi64(pi, b.obs)).min(0)).mean()
    grads = gradient(lambda x: actor_loss64(x, q, b, cfg.beta1, scale), f64(state.actor.params))
    assert_first_adam_step(state.actor, new.actor, grads, cfg.actor_lr)

    for old, moved, towards in (
        (state.target, new.target, q),
        (state.target_actor, new.target_actor, pi),
    ):
        expected = jax.tree.map(lambda t, p: 0.9 * t + 0.1 * p, f64(old), towards)
        chex.assert_trees_all_close(f64(moved), expected, rtol=1e-6, atol=1e-6)


def test_the_first_round_leaves_the_target_policy_at_its_start(fresh, batch):
    pair = jax.tree.map(lambda x: jnp.stack([x, x]), batch)
    new, _ = UPDATE(fresh, pair, jax.random.split(KEY), CFG)
    chex.assert_trees_all_close(new.target_actor, fresh.actor.params, rtol=1e-6, atol=1e-7)
    moved = jax.tree.map(lambda x, y: jnp.abs(x - y).max(), new.actor.params, fresh.actor.params)
    assert min(jax.tree.leaves(moved)) > 1e-4


# --- The two penalties ---


def test_the_target_falls_by_the_distance_of_the_next_action(state, batch):
    """Of the noisy action, summed over dimensions; not where the episode has ended."""
    action = f64(rebrac.smoothed_action(state, batch, KEY, CFG))
    distance = ((action - f64(batch.next_action)) ** 2).sum(-1)

    def target(beta2):
        """Read off the gradient of a critic whose values are its parameters, all 0."""
        critic = state.critic.replace(
            apply_fn=lambda params, obs, action: params + 0 * action[:, 0],
            params=jnp.zeros((2, B)),
        )
        own = state.replace(critic=critic, target=jnp.ones((2, B)))
        grad = jax.grad(rebrac.critic_loss, has_aux=True)
        return grad(critic.params, own, batch, KEY, replace(CFG, beta2=beta2))[0] * -B / 2

    fall = f64(target(0.0)) - f64(target(0.7))
    expected = 0.9 * 0.7 * distance * (1 - f64(batch.done))
    np.testing.assert_allclose(fall, np.stack([expected] * 2), rtol=1e-4, atol=1e-5)


def test_imitation_is_the_sum_over_action_dimensions(state, batch):
    """Off by (0.5, 0.5) in every row: 0.5, and beta1 times it in the loss."""
    actor = state.actor.replace(
        apply_fn=lambda params, obs: params, params=jnp.asarray(batch.action + 0.5)
    )
    own = state.replace(actor=actor)
    losses = {}
    for beta1 in (0.0, 2.0):
        loss, info = rebrac.actor_loss(actor.params, own, batch, replace(CFG, beta1=beta1))
        losses[beta1] = loss
        np.testing.assert_allclose(info["imitation_loss"], 0.5, rtol=1e-5)
    np.testing.assert_allclose(losses[2.0] - losses[0.0], 1, rtol=1e-5)


def test_the_size_of_q_does_not_count(state, batch):
    """The last layer ten times as large: the same loss and gradient."""
    params = jax.tree.map(lambda x: x, state.critic.params)
    params["params"]["Dense_2"] = jax.tree.map(lambda x: 10 * x, params["params"]["Dense_2"])
    large = state.replace(critic=state.critic.replace(params=params))
    (loss, info), slope = ACTOR_LOSS(state.actor.params, state, batch, CFG)
    (other, other_info), other_slope = ACTOR_LOSS(state.actor.params, large, batch, CFG)
    np.testing.assert_allclose(other_info["q_pi"], 10 * info["q_pi"], rtol=1e-5)
    np.testing.assert_allclose(other, loss, rtol=1e-5)
    chex.assert_trees_all_close(other_slope, slope, rtol=1e-4, atol=1e-6)


# --- The data ---


def episodes(done):
    """Ten rows in episodes of 3, 1, 2 and 4; the actions count the rows; done: of each end."""
    length = np.array([3, 1, 2, 4])
    start = np.cumsum(length) - length
    rows = np.arange(10, dtype=np.float32)[:, None]
    ends = np.zeros(10, np.float32)
    ends[start + length - 1] = done
    arrays = (rows, rows / 10, rows[:, 0], rows + 1, ends, start, length)
    return datasets.Dataset("rows", "", *arrays, None, None, {})


def test_next_actions_are_the_episodes_own():
    """Rows cut off by a time limit are left out; terminal rows stay, their b does not count."""
    rows = rebrac.transitions(episodes([1, 0, 0, 1]))
    np.testing.assert_array_equal(rows.reward, [0, 1, 2, 4, 6, 7, 8, 9])
    going_on = rows.done == 0
    np.testing.assert_array_equal(rows.done, [0, 0, 1, 0, 0, 0, 0, 1])
    next_action = rows.next_action[going_on, 0]
    np.testing.assert_allclose(next_action, rows.action[going_on, 0] + 0.1, rtol=1e-6)


def test_data_without_a_next_action_is_refused():
    one = episodes([0, 0, 0, 0])
    one = replace(one, start=np.arange(10), length=np.ones(10, int))
    with pytest.raises(SystemExit, match="rows: no row has a next action"):
        rebrac.transitions(one)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("halfcheetah-medium-v2", (0.001, 0.01, 1024, 0.99, 1e-3, 1e-3, 1)),
        ("halfcheetah-medium-expert-v2", (0.01, 0.1, 1024, 0.99, 1e-3, 1e-3, 1)),
        ("hopper-medium-v2", (0.01, 0.01, 1024, 0.99, 1e-3, 1e-3, 1)),
        ("stillwater/hopper/medium-replay-v0", (0.05, 0.5, 1024, 0.99, 1e-3, 1e-3, 1)),
        ("walker2d-medium-expert-v2", (0.01, 0.01, 1024, 0.99, 1e-3, 1e-3, 1)),
        ("antmaze-large-play-v2", (0.002, 0.001, 256, 0.999, 3e-4, 5e-5, 100)),
        ("antmaze-umaze-diverse-v2", (0.003, 0.001, 256, 0.999, 3e-4, 5e-5, 100)),
        ("D4RL/pen/human-v2", (0.1, 0.5, 256, 0.99, 3e-4, 3e-4, 1)),
        ("maze2d-large-v1", (0.003, 0.001, 256, 0.99, 3e-4, 3e-4, 1)),
        ("mine.hdf5", (0.01, 0.01, 1024, 0.99, 1e-3, 1e-3, 1)),
    ],
)
def test_values_of_a_dataset(name, expected):
    cfg = experiment.resolve(rebrac.Config(env=name), rebrac.TUNED)
    found = (cfg.beta1, cfg.beta2, cfg.batch_size, cfg.gamma, cfg.actor_lr, cfg.critic_lr)
    assert (*found, cfg.reward_scale) == expected


# --- A world known in full ---


def test_the_value_counts_the_datas_own_spread():
    """Two steps; the second pays 2. A policy that imitates is at the data's mean, and the first
    state is worth gamma (2 - beta2 times the variance of the data's actions)."""
    rng = np.random.default_rng(0)
    action = rng.uniform(-0.6, 0.6, (1000, 1))
    action -= action.mean()
    second = np.arange(1000) % 2
    obs = np.eye(2)[second]
    rows = (obs, action, 2.0 * second, np.eye(2)[[1] * 1000], second, np.roll(action, -1, 0))
    data = rebrac.Transitions(*(jnp.asarray(x, jnp.float32) for x in rows))
    cfg = replace(
        CFG, widths=(16,), batch_size=128, log_every=1500, actor_lr=3e-3, critic_lr=3e-3,
        beta1=100.0, policy_noise=0.0,
    )  # fmt: skip
    start = INIT(KEY, data, cfg)

    def value(beta2):
        own = replace(cfg, beta2=beta2)
        state = rebrac.train_chunk(start, data, KEY, cfg.log_every, own)[0]
        return state.critic.apply_fn(state.critic.params, jnp.eye(2), jnp.zeros((2, 1)))  # (2, 2)

    found = jax.jit(jax.vmap(value), **FAST)(jnp.array([0.0, 5.0]))
    first = 0.9 * (2 - np.array([0.0, 5.0]) * action[second == 1].var())
    assert first[0] - first[1] > 0.5
    np.testing.assert_allclose(found[:, :, 0], np.stack([first, first], 1), atol=0.08)
    np.testing.assert_allclose(found[:, :, 1], 2, atol=0.08)
