"""Discrete BCQ: losses and an update in float64, which actions are allowed, banned ones."""

from dataclasses import replace
from functools import partial

import chex
import discrete_bcq
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import assert_first_adam_step, f64, gradient, mlp, random_batch, scramble, shifted

from common.datasets import Batch

CFG = discrete_bcq.Config(
    widths=(8, 8), batch_size=16, log_every=50, lr=1e-2, polyak=0.1, gamma=0.9, normalize=True,
    logit_decay=0.3, tau=0.5,
)  # fmt: skip
KEY = jax.random.key(0)
B, A = 16, 3


@pytest.fixture(scope="module")
def batch():
    noise = random_batch(B, action_dim=A, seed=1)
    return noise._replace(action=jax.nn.one_hot(noise.action.argmax(-1), A))


@pytest.fixture(scope="module")
def state(batch):
    """Parameters and target away from their start."""
    fresh = discrete_bcq.init(KEY, batch, CFG)
    critic = fresh.critic.replace(params=scramble(fresh.critic.params, 0))
    actor = fresh.actor.replace(params=scramble(fresh.actor.params, 1))
    return fresh.replace(critic=critic, actor=actor, target=scramble(fresh.target, 7))


# --- The equations in numpy ---


def net64(params, obs):
    return mlp(params["params"], obs)


def allowed64(pi, obs, tau):
    g = np.exp(net64(pi, obs))
    return g > tau * g.max(1, keepdims=True)


def critic_loss64(q, old_q, pi, target, b, cfg):
    rows = np.arange(B)
    q_next = np.where(allowed64(pi, b.next_obs, cfg.tau), net64(old_q, b.next_obs), -np.inf)
    best = q_next.argmax(1)
    y = b.reward + cfg.gamma * (1 - b.done) * net64(target, b.next_obs)[rows, best]
    u = np.abs(net64(q, b.obs)[rows, b.action.argmax(1)] - y)
    return np.where(u < 1, u**2 / 2, u - 0.5).mean()


def actor_loss64(pi, b, cfg):
    logits = net64(pi, b.obs)
    log_g = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    likelihood = log_g[np.arange(B), b.action.argmax(1)]
    return -likelihood.mean() + cfg.logit_decay * (logits**2).mean()


def test_one_update_is_the_authors(state, batch):
    """Both from the old parameters; then the target towards the new critic."""
    new, info = jax.jit(partial(discrete_bcq.update, cfg=CFG))(state, batch, KEY)
    b, q, pi, target = f64((batch, state.critic.params, state.actor.params, state.target))
    losses = {
        "critic": partial(critic_loss64, old_q=f64(q), pi=pi, target=target, b=b, cfg=CFG),
        "actor": partial(actor_loss64, b=b, cfg=CFG),
    }
    for name, loss in losses.items():
        params = f64(getattr(state, name).params)
        np.testing.assert_allclose(info[f"{name}_loss"], loss(params), rtol=2e-5)
        grads = gradient(loss, params)
        assert_first_adam_step(getattr(state, name), getattr(new, name), grads, CFG.lr)
    expected = jax.tree.map(lambda t, x: 0.9 * t + 0.1 * x, target, f64(new.critic.params))
    chex.assert_trees_all_close(f64(new.target), expected, rtol=1e-6, atol=1e-6)


def test_the_mask_bites_in_this_batch(state, batch):
    """Some actions are banned, and in some rows the largest Q among them."""
    obs = f64(batch.next_obs)
    allowed = allowed64(f64(state.actor.params), obs, CFG.tau)
    best = net64(f64(state.critic.params), obs).argmax(1)
    assert allowed.any(1).all() and not allowed[np.arange(B), best].all()


# --- Known answers ---


def with_tables(state, q, behaviour):
    """A state whose networks answer with Q and probabilities (A,), whatever they see."""

    def answering(net, row):
        return net.replace(apply_fn=lambda _, obs: jnp.broadcast_to(
            jnp.asarray(row), (*obs.shape[:-1], len(row))))  # fmt: skip

    logits = np.log(np.float32(behaviour))
    return state.replace(critic=answering(state.critic, np.float32(q)),
                         actor=answering(state.actor, logits))  # fmt: skip


@pytest.mark.parametrize(
    ("q", "tau", "action"),
    [
        ((1e6, 1, 0), 0.3, 1),  # ratios .25, .5, 1: the first is banned, however large its Q
        ((1e6, 1, 0), 0.2, 0),
        ((1e6, 1, 0), 0.0, 0),  # double DQN
        ((1e6, 1, 0), 0.99, 2),  # imitation
        ((5, 1, 0), 0.25, 1),  # more than tau, not as much
        ((-3e4, -2e4, -1e4), 0.3, 2),
    ],
)
def test_the_best_of_the_likely_actions_is_taken(state, batch, q, tau, action):
    told = with_tables(state, q, (0.125, 0.25, 0.5))
    cfg = replace(CFG, tau=tau)
    found = discrete_bcq.policy(cfg)(told, None, batch.obs, None, None)[0]
    np.testing.assert_array_equal(found, np.tile(np.eye(A)[action], (B, 1)))


def test_logits_of_zero_cost_log_a_alone(state, batch):
    told = with_tables(state, np.zeros(A), np.ones(A))
    loss, info = discrete_bcq.actor_loss(told.actor.params, told, batch, CFG)
    np.testing.assert_allclose((loss, info["imitation_loss"]), np.log(A), rtol=1e-6)
    twice = with_tables(state, np.zeros(A), np.exp(2) * np.ones(A))
    loss, _ = discrete_bcq.actor_loss(told.actor.params, twice, batch, CFG)
    np.testing.assert_allclose(loss, np.log(A) + CFG.logit_decay * 4, rtol=1e-5)


def test_time_limits_bootstrap_and_terminals_do_not(state, batch):
    def loss(done, next_obs):
        rows = batch._replace(done=jnp.full(B, done), next_obs=next_obs)
        return discrete_bcq.critic_loss(state.critic.params, state, rows, CFG)[0]

    assert loss(0.0, batch.next_obs) != loss(0.0, batch.next_obs + 1)
    assert loss(1.0, batch.next_obs) == loss(1.0, batch.next_obs + 1)


def test_acting_normalises_observations(state):
    data = shifted(100)
    moved = state.replace(obs_mean=data.obs.mean(0), obs_std=data.obs.std(0) + 1e-3)
    action = discrete_bcq.act(moved, data.obs.reshape(4, 25, -1), CFG)
    obs = f64((data.obs - moved.obs_mean) / moved.obs_std)
    q, pi = f64((state.critic.params, state.actor.params))
    best = np.where(allowed64(pi, obs, CFG.tau), net64(q, obs), -np.inf).argmax(1)
    np.testing.assert_array_equal(action.reshape(100, A), np.eye(A)[best])


# --- A world with a known answer ---


def test_an_action_that_the_data_hardly_hold_is_not_taken():
    """Action 0 pays 1, in 1 row of 100; action 1 pays 0 in the others. Q prefers action 0, and so
    does double DQN (tau 0); BCQ takes action 1, since action 0 has a hundredth of its share."""
    obs, rows = jnp.zeros((400, 3)), np.arange(400) % 100
    action = jax.nn.one_hot(jnp.where(rows == 0, 0, 1), A)
    data = Batch(obs, action, jnp.float32(rows == 0), obs, jnp.ones(400))
    for tau, wanted in ((0.3, 1), (0.0, 0)):
        cfg = replace(CFG, tau=tau, normalize=False, batch_size=64, logit_decay=0.01)
        state = discrete_bcq.init(KEY, data, cfg)
        chunk = jax.jit(partial(discrete_bcq.train_chunk, cfg=cfg))
        for step in range(cfg.log_every, 801, cfg.log_every):
            state, _ = chunk(state, data, KEY, step)
        q = state.critic.apply_fn(state.critic.params, obs[0])
        assert q[0] > q[1] + 0.2
        allowed = discrete_bcq.act(state, obs[:1], cfg)[0]
        if tau:
            assert allowed.argmax() == wanted
        else:
            assert allowed.argmax() != 1  # 0, or 2, of which nothing is known
