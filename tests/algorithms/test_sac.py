"""SAC: losses and an update in float64, CQL without its penalty, what data alone cannot teach."""

import math
from dataclasses import replace
from types import SimpleNamespace

import chex
import cql
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sac
import soft64
from float64 import assert_first_adam_step, f64, gradient, random_batch, scramble

from common.datasets import Batch

CFG = sac.Config(
    widths=(8, 8), batch_size=16, actor_lr=1e-3, critic_lr=2e-3, polyak=0.1, gamma=0.9
)  # fmt: skip
KEY = jax.random.key(0)
B, A = 16, 2
NETS = ("actor", "critic", "temperature")
FAST = dict(compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time
INIT = jax.jit(sac.init, static_argnums=2, **FAST)
BACKUP = jax.jit(sac.soft_backup, static_argnums=3, **FAST)
UPDATE = jax.jit(sac.update, static_argnums=3, **FAST)


@pytest.fixture(scope="module")
def batch():
    return random_batch(B, seed=1)


@pytest.fixture(scope="module")
def fresh(batch):
    return INIT(KEY, batch, CFG)


@pytest.fixture(scope="module")
def state(fresh):
    """Every parameter away from its start, the target away from the critic."""
    scales = dict(zip(NETS, (0.1, 0.4, 0.4), strict=True))  # tanh(u) short of 1
    nets = {
        k: getattr(fresh, k).replace(params=scramble(getattr(fresh, k).params, i, scales[k]))
        for i, k in enumerate(NETS)
    }
    return fresh.replace(target=scramble(fresh.target, 7), **nets)


def params64(state):
    nets = {k: f64(getattr(state, k).params) for k in NETS}
    return SimpleNamespace(target=f64(state.target), **nets)


def critic_loss64(q, b, target):
    return np.mean((soft64.critics(q, b.obs, b.action) - target) ** 2, 1).sum()


# --- Golden values ---


@pytest.mark.parametrize("entropy", [True, False])
def test_critic_loss(entropy, state, batch):
    cfg, p, b = replace(CFG, backup_entropy=entropy), params64(state), f64(batch)
    k_backup, _ = jax.random.split(KEY)
    expected = soft64.backup(p, b, k_backup, cfg.gamma, entropy)
    target = BACKUP(state, batch, k_backup, cfg)
    np.testing.assert_allclose(target, expected, rtol=2e-5, atol=2e-6)
    critic_loss = jax.jit(sac.critic_loss, static_argnums=4, **FAST)
    loss, info = critic_loss(state.critic.params, state, batch, KEY, cfg)
    np.testing.assert_allclose(loss, critic_loss64(p.critic, b, expected), rtol=2e-5)
    chex.assert_shape([loss, *info.values()], ())


def test_actor_loss(state, batch):
    loss, info = sac.actor_loss(state.actor.params, state, batch, KEY)
    p, b = params64(state), f64(batch)
    np.testing.assert_allclose(loss, soft64.actor_loss(p.actor, p, b, KEY), rtol=2e-5)
    log_pi = soft64.sample(p.actor, b.obs, KEY)[1]
    np.testing.assert_allclose(info["entropy"], -log_pi.mean(), rtol=2e-5)
    chex.assert_shape([loss, *info.values()], ())


@pytest.mark.parametrize("entropy", [-5.0, 1.0])
def test_temperature_rises_below_the_target_entropy(entropy, state):
    params = state.temperature.params
    log = float(params["params"]["log"])
    loss, info = sac.temperature_loss(params, state, entropy, -2)
    np.testing.assert_allclose(loss, log * (entropy + 2), rtol=1e-5)
    np.testing.assert_allclose(info["temperature"], math.exp(log), rtol=1e-6)
    new, _ = sac.descend(sac.temperature_loss, state.temperature, state, entropy, -2)
    assert (new.params["params"]["log"] > log) == (entropy < -2)


def test_one_update(state, batch):
    """All learn against the others as they were; then the target moves once, to the new critic."""
    p, b = params64(state), f64(batch)
    new, _ = UPDATE(state, batch, KEY, CFG)
    k_actor, k_critic = jax.random.split(KEY)

    grads = gradient(lambda x: soft64.actor_loss(x, p, b, k_actor), p.actor)
    assert_first_adam_step(state.actor, new.actor, grads, CFG.actor_lr)

    entropy = -soft64.sample(p.actor, b.obs, k_actor)[1].mean()
    grads = {"params": {"log": np.array(entropy + A)}}  # the target entropy is -A
    assert_first_adam_step(state.temperature, new.temperature, grads, CFG.actor_lr)

    target = soft64.backup(p, b, jax.random.split(k_critic)[0], CFG.gamma)
    grads = gradient(lambda x: critic_loss64(x, b, target), p.critic)
    assert_first_adam_step(state.critic, new.critic, grads, CFG.critic_lr)

    expected = jax.tree.map(lambda t, q: 0.9 * t + 0.1 * q, p.target, f64(new.critic.params))
    chex.assert_trees_all_close(f64(new.target), expected, rtol=1e-6, atol=1e-6)


# --- The target ---


def test_the_target_counts_the_entropy_of_the_next_action(state, batch):
    """With it minus without it: -gamma (1 - done) temperature log pi(a' | s')."""
    with_it, without = (
        BACKUP(state, batch, KEY, replace(CFG, backup_entropy=on)) for on in (True, False)
    )
    pi = state.actor.apply_fn(state.actor.params, batch.next_obs)
    log_pi = f64(pi.sample_and_log_prob(seed=KEY)[1])
    temperature = np.exp(float(state.temperature.params["params"]["log"]))
    expected = -CFG.gamma * (1 - f64(batch.done)) * temperature * log_pi
    np.testing.assert_allclose(f64(with_it) - f64(without), expected, rtol=1e-3, atol=1e-5)
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize("entropy", [True, False])
def test_time_limits_bootstrap_and_terminals_do_not(entropy, state, batch):
    cfg = replace(CFG, backup_entropy=entropy)
    ended, cut = (
        BACKUP(state, batch._replace(done=jnp.full(B, done)), KEY, cfg) for done in (1.0, 0.0)
    )
    np.testing.assert_array_equal(ended, batch.reward)
    assert np.all(np.abs(cut - batch.reward) > 1e-4)


def test_a_rows_target_depends_on_that_row_alone(state, batch):
    """Nothing of shape (B, B): another row's reward and next state leave it as it was."""
    other = batch._replace(
        reward=batch.reward.at[3].add(9.0), next_obs=batch.next_obs.at[3].add(1.0)
    )
    old, new = (BACKUP(state, rows, KEY, CFG) for rows in (batch, other))
    chex.assert_shape(old, (B,))
    np.testing.assert_array_equal(np.flatnonzero(np.asarray(old != new)), [3])


# --- The sibling ---


def test_it_is_cql_without_the_penalty(batch):
    """The same key and batches: the same networks from the first to after five updates."""
    ours, cfg = replace(CFG, backup_entropy=False), dict(alpha=0.0, variant="rho", num_actions=1)
    for name in ("widths", "batch_size", "gamma", "actor_lr", "critic_lr", "polyak"):
        cfg[name] = getattr(CFG, name)
    theirs = cql.Config(**cfg)
    mine = INIT(KEY, batch, ours)
    other = jax.jit(cql.init, static_argnums=2, **FAST)(KEY, batch, theirs)
    step = jax.jit(cql.update, static_argnums=3, **FAST)

    def learned(state):
        return [getattr(state, name).params for name in NETS], state.target

    chex.assert_trees_all_equal(learned(mine), learned(other))
    start = mine
    for i in range(5):
        key = jax.random.key(i)
        mine, other = UPDATE(mine, batch, key, ours)[0], step(other, batch, key, theirs)[0]
    chex.assert_trees_all_close(learned(mine), learned(other), rtol=1e-5, atol=1e-6)
    moved = jax.tree.map(lambda x, y: jnp.abs(x - y).max(), learned(mine), learned(start))
    assert min(jax.tree.leaves(moved)) > 1e-3


# --- A world known in full ---

# Two steps. In the first state any action pays nothing; in the second, action a pays reward(a) and
# ends. Where the data's actions lie in [-0.3, 0.3], reward(a) = 5 a is all that they show; beyond
# 0.3 the reward falls steeply.


def reward(action):
    return np.where(action < 0.3, 5 * action, 1.5 - 15 * (action - 0.3))


def world(width):
    """800 rows whose actions are uniform in [-width, width]."""
    action = np.random.default_rng(0).uniform(-width, width, (800, 1))
    second = np.arange(800) % 2
    rows = Batch(np.eye(2)[second], action, second * reward(action[:, 0]), np.eye(2)[[1] * 800],
                 second)  # fmt: skip
    return Batch(*(jnp.asarray(x, jnp.float32) for x in rows))


@pytest.fixture(scope="module")
def values():
    """(data's width, (first state, second state)): what the critics predict, what is earned."""
    cfg = sac.Config(
        widths=(32, 32), batch_size=64, log_every=1500, actor_lr=3e-3, critic_lr=3e-3, polyak=0.05,
        gamma=0.9, backup_entropy=False,
    )  # fmt: skip
    data = jax.tree.map(lambda *x: jnp.stack(x), world(0.3), world(1.0))
    start = INIT(KEY, world(1.0), cfg)
    train = jax.vmap(lambda data: sac.train_chunk(start, data, KEY, cfg.log_every, cfg)[0])

    def value(state):
        pi = state.actor.apply_fn(state.actor.params, jnp.eye(2))
        action = pi.sample(seed=KEY, sample_shape=1000)  # (1000, 2, 1)
        obs = jnp.broadcast_to(jnp.eye(2), (1000, 2, 2))
        return state.critic.apply_fn(state.critic.params, obs, action).mean((0, 1)), action

    predicted, action = jax.jit(lambda data: jax.vmap(value)(train(data)), **FAST)(data)
    last = reward(np.asarray(action[:, :, 1, 0])).mean(1)
    return np.asarray(predicted), np.stack([0.9 * last, last], 1)


def test_it_predicts_what_it_does_not_earn_where_actions_are_missing(values):
    (narrow, wide), (earned, earned_wide) = values
    assert np.all(narrow > earned + 1)
    assert np.all(np.abs(wide - earned_wide) < 0.2)  # the algorithm is sound, the data is not
    assert np.all(earned_wide > earned + 1)
