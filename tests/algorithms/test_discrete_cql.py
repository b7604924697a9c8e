"""Discrete CQL: loss and an update in float64, known values of the penalties, narrow data."""

from dataclasses import replace
from functools import partial

import chex
import discrete_cql
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import assert_first_adam_step, f64, gradient, mlp, random_batch, scramble, shifted

from common.datasets import Batch

CFG = discrete_cql.Config(
    widths=(8, 8), batch_size=16, log_every=50, lr=1e-2, polyak=0.1, gamma=0.9, alpha=0.7,
    normalize=True,
)  # fmt: skip
CONFIGS = {
    "H": CFG,
    "rho": replace(CFG, variant="rho", temperature=0.5),
    "rho-weighted": replace(CFG, variant="rho-weighted"),
    "var": replace(CFG, variant="var", count=3.0),
    "quantiles": replace(CFG, num_quantiles=4),
    "authors' target": replace(CFG, num_quantiles=4, double=False),
    "DQN": replace(CFG, alpha=0.0),
}
KEY = jax.random.key(0)
B, A = 16, 3


def choices(batch):
    """Discrete actions in place of vectors: the largest entry's."""
    return batch._replace(action=jax.nn.one_hot(batch.action.argmax(-1), batch.action.shape[-1]))


@pytest.fixture(scope="module")
def batch():
    return choices(random_batch(B, action_dim=A, seed=1))


@pytest.fixture(scope="module", params=CONFIGS)
def case(request, batch):
    """(config, a state whose parameters and target are away from their start)."""
    cfg = CONFIGS[request.param]
    fresh = discrete_cql.init(KEY, batch, cfg)
    critic = fresh.critic.replace(params=scramble(fresh.critic.params, 0))
    return cfg, fresh.replace(critic=critic, target=scramble(fresh.target, 7))


# --- The equations in numpy ---


def quantiles64(params, obs):  # (B, A, N)
    return mlp(params["params"]["MLP_0"], obs).reshape(len(obs), A, -1)


def huber64(u):
    return np.where(np.abs(u) <= 1, u**2 / 2, np.abs(u) - 0.5)


def log_mean_exp64(q, weight):
    return np.log(np.sum(weight * np.exp(q), -1))


def loss64(q_params, chooser, target, b, cfg):
    rows, action = np.arange(B), b.action.argmax(1)
    z_next = quantiles64(target, b.next_obs)
    best = quantiles64(chooser if cfg.double else target, b.next_obs).mean(2).argmax(1)
    y = b.reward[:, None] + cfg.gamma * np.where(b.done == 1, 0, z_next[rows, best].T).T
    z = quantiles64(q_params, b.obs)
    u = y[:, None, :] - z[rows, action][:, :, None]  # (B, own, target's)
    if cfg.num_quantiles:
        tau = (2 * np.arange(cfg.num_quantiles) + 1) / (2 * cfg.num_quantiles)
        weight = np.where(u < 0, 1 - tau[:, None], tau[:, None])
        td = (weight * huber64(u)).mean(2).sum(1).mean()
    else:
        td = huber64(u).mean()
    q, old = z.mean(2), quantiles64(target, b.obs).mean(2)
    rho = np.exp(old / cfg.temperature)
    rho /= rho.sum(1, keepdims=True)
    if cfg.variant == "rho":
        pushed = log_mean_exp64(q, rho)
    elif cfg.variant == "rho-weighted":
        weight = rho * np.exp(q)
        pushed = (weight * q).sum(1) / weight.sum(1)
    elif cfg.variant == "var":
        pushed = q.mean(1) + q.std(1) / np.sqrt(cfg.count)
    else:
        pushed = log_mean_exp64(q, np.ones_like(q))
    return td + cfg.alpha * np.mean(pushed - q[rows, action])


def test_one_update_is_the_papers(case, batch):
    """Loss, its gradient's Adam step, then the target towards the new critic."""
    cfg, state = case
    new, info = jax.jit(partial(discrete_cql.update, cfg=cfg))(state, batch, KEY)
    b, params = f64(batch), f64(state.critic.params)
    loss = partial(loss64, chooser=f64(params), target=f64(state.target), b=b, cfg=cfg)
    np.testing.assert_allclose(info["critic_loss"], loss(params), rtol=2e-5)
    assert_first_adam_step(state.critic, new.critic, gradient(loss, params), cfg.lr)
    expected = jax.tree.map(lambda t, x: 0.9 * t + 0.1 * x, *f64((state.target, new.critic.params)))
    chex.assert_trees_all_close(f64(new.target), expected, rtol=1e-6, atol=1e-6)


def test_options_change_the_loss(batch):
    """So that no case above stands for another."""
    fresh = discrete_cql.init(KEY, batch, CFG)
    state = fresh.replace(target=scramble(fresh.target, 7))
    configs = [CONFIGS[name] for name in ("H", "rho", "rho-weighted", "var", "DQN")]
    configs.append(replace(CFG, double=False))
    found = [float(discrete_cql.critic_loss(fresh.critic.params, state, batch, c)[0])
             for c in configs]  # fmt: skip
    assert len(set(found)) == len(found)


# --- Known answers ---

Q = jnp.array([[0.0, np.log(3.0)]])
UNIFORM = jnp.log(jnp.full((1, 2), 0.5))


@pytest.mark.parametrize(
    ("variant", "value", "slope"),
    [
        ("H", 1.3863, (0.25, 0.75)),
        ("rho", 0.6931, (0.25, 0.75)),
        ("rho-weighted", 0.8240, (0.0440, 0.9560)),
    ],
)
def test_what_is_pushed_down(variant, value, slope):
    """Q = (0, log 3), rho uniform. The slopes sum to 1, those of the gap to 0."""
    cfg = replace(CFG, variant=variant)
    f = lambda q: discrete_cql.pushed_down(q, UNIFORM, cfg)[0]  # noqa: E731
    np.testing.assert_allclose(f(Q), value, atol=1e-4)
    np.testing.assert_allclose(jax.grad(f)(Q)[0], slope, atol=1e-4)


def test_pushed_down_for_equal_q():
    """log A for CQL(H), the mean alone for CQL(var), with a finite gradient."""
    zero = jnp.zeros((1, A))
    np.testing.assert_allclose(discrete_cql.pushed_down(zero, None, CFG), np.log(A), rtol=1e-6)
    cfg = replace(CFG, variant="var", count=4.0)
    f = lambda q: discrete_cql.pushed_down(q, None, cfg)[0]  # noqa: E731
    np.testing.assert_allclose(f(zero + 2), 2, atol=1e-5)
    np.testing.assert_allclose(jax.grad(f)(zero), 1 / A, atol=1e-5)
    spread = jnp.array([[0.0, 2.0]])  # std 1
    np.testing.assert_allclose(f(spread), 1 + 0.5, atol=1e-5)
    more = replace(cfg, count=16.0)
    np.testing.assert_allclose(discrete_cql.pushed_down(spread, None, more)[0], 1.25, atol=1e-5)


def test_huber_of_one_quantile():
    """u = 1/2, tau = 1/2: 1/16. Without quantiles 1/8; and beyond 1 it is linear."""
    z, y = jnp.zeros((1, 1)), jnp.full((1, 1), 0.5)
    np.testing.assert_allclose(discrete_cql.td_loss(z, y, replace(CFG, num_quantiles=1)), 1 / 16)
    np.testing.assert_allclose(discrete_cql.td_loss(z, y, CFG), 1 / 8)
    np.testing.assert_allclose(discrete_cql.td_loss(z, 6 * y, CFG), 2.5)


def test_quantiles_are_those_of_the_returns():
    """Fitted to the returns 0, 1, ..., 99 each alone, four quantiles are 1/8, 3/8, 5/8, 7/8 of them
    up to the width of Huber's bend."""
    cfg = replace(CFG, num_quantiles=4)
    y = jnp.arange(100.0)[:, None] * jnp.ones((1, 4))
    f = jax.jit(jax.grad(lambda z: discrete_cql.td_loss(jnp.tile(z, (100, 1)), y, cfg).mean()))
    z = jnp.zeros(4)
    for i in range(1500):
        z = z - 100 / (1 + i / 50) * f(z)
    np.testing.assert_allclose(z, [12, 37, 62, 87], atol=1)


def test_time_limits_bootstrap_and_terminals_do_not(case, batch):
    cfg, state = case

    def loss(done, next_obs):
        rows = batch._replace(done=jnp.full(B, done), next_obs=next_obs)
        return discrete_cql.critic_loss(state.critic.params, state, rows, cfg)[0]

    assert loss(0.0, batch.next_obs) != loss(0.0, batch.next_obs + 1)
    assert loss(1.0, batch.next_obs) == loss(1.0, batch.next_obs + 1)


def test_double_takes_the_networks_own_choice(batch):
    """The target network likes action 0 best and gives it 9; the network itself likes action 1,
    which the target gives 5."""
    cfg = replace(CFG, gamma=1.0)
    state = discrete_cql.init(KEY, batch, cfg)
    tables = {"own": jnp.array([0.0, 1.0, 0.0]), "target": jnp.array([9.0, 5.0, 0.0])}
    apply_fn = lambda who, obs: jnp.tile(tables[who][:, None], (len(obs), 1, 1))  # noqa: E731
    critic = state.critic.replace(apply_fn=apply_fn, params="own")
    state = state.replace(critic=critic, target="target")
    rows = batch._replace(reward=jnp.zeros(B), done=jnp.zeros(B))
    np.testing.assert_array_equal(discrete_cql.td_target(state, rows, cfg), np.full((B, 1), 5))
    own = replace(cfg, double=False)
    np.testing.assert_array_equal(discrete_cql.td_target(state, rows, own), np.full((B, 1), 9))


def test_acting_takes_the_largest_mean(case):
    """Of normalised observations, for any leading axes."""
    cfg, state = case
    data = shifted(100)
    moved = state.replace(obs_mean=data.obs.mean(0), obs_std=data.obs.std(0) + 1e-3)
    action = discrete_cql.act(moved, data.obs.reshape(4, 25, -1))
    q = quantiles64(f64(state.critic.params), f64((data.obs - moved.obs_mean) / moved.obs_std))
    np.testing.assert_array_equal(action.reshape(100, A), np.eye(A)[q.mean(2).argmax(1)])
    fresh = discrete_cql.init(KEY, choices(random_batch(B, action_dim=A)), cfg)
    chex.assert_trees_all_equal(fresh.target, fresh.critic.params)


# --- A world with a known answer ---


@pytest.fixture(scope="module")
def narrow():
    """Action 0 always, which pays -1; actions 1 and 2 are never tried."""
    rng = np.random.default_rng(0)
    obs = jnp.asarray(rng.normal(size=(200, 3)), jnp.float32)
    action = jax.nn.one_hot(jnp.zeros(200, int), A)
    return Batch(obs, action, -jnp.ones(200), jnp.roll(obs, 1, 0), jnp.zeros(200))


def choices_after(data, cfg, updates=600):
    state, chunk = discrete_cql.init(KEY, data, cfg), jax.jit(
        partial(discrete_cql.train_chunk, cfg=cfg))  # fmt: skip
    for step in range(cfg.log_every, updates + 1, cfg.log_every):
        state, _ = chunk(state, data, KEY, step)
    return np.asarray(discrete_cql.act(state, data.obs)).argmax(1)


def test_only_dqn_goes_where_the_data_never_went(narrow):
    """Nothing tells DQN that the other actions are not worth 0."""
    assert np.mean(choices_after(narrow, CFG) == 0) == 1
    assert np.mean(choices_after(narrow, replace(CFG, alpha=0.0)) == 0) < 0.1


def test_a_large_weight_imitates_the_most_frequent_action():
    """Action 2 in two rows of three, although action 0 pays."""
    obs, rows = jnp.zeros((300, 3)), np.arange(300) % 3
    action = jax.nn.one_hot(jnp.where(rows == 0, 0, 2), A)
    data = Batch(obs, action, jnp.float32(rows == 0), obs, jnp.ones(300))
    assert (choices_after(data, replace(CFG, alpha=50.0, normalize=False)) == 2).all()
    assert (choices_after(data, replace(CFG, alpha=0.1, normalize=False)) == 0).all()
