"""IQL: losses and an update against float64, their structure, a world with known values."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import chex
import iql
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import assert_first_adam_step, f64, gradient, mlp, random_batch, scramble, shifted

from common.datasets import Batch

CFG = iql.Config(
    widths=(8, 8), batch_size=16, num_updates=1000, log_every=100, lr=1e-2, polyak=0.1,
    gamma=0.9, tau=0.8, beta=2.0, max_weight=0.02,
)  # fmt: skip
KEY = jax.random.key(0)
B = 16
INIT = jax.jit(iql.init, static_argnums=2)  # compiled once for the tests that need a fresh state


@pytest.fixture(scope="module")
def data():
    return shifted(200)


@pytest.fixture(scope="module")
def fresh(data):
    return INIT(KEY, data, CFG)


@pytest.fixture(scope="module")
def batch():
    return random_batch(B, seed=1)


@pytest.fixture(scope="module")
def state(fresh):
    """All networks away from their start, the target away from the critic."""
    nets = {"actor": fresh.actor, "critic": fresh.critic, "value": fresh.value}
    nets = {k: v.replace(params=scramble(v.params, i)) for i, (k, v) in enumerate(nets.items())}
    return fresh.replace(target=scramble(fresh.target, 3), **nets)


def params64(state):
    nets = {k: f64(getattr(state, k).params) for k in ("actor", "critic", "value")}
    return SimpleNamespace(target=f64(state.target), **nets)


# --- The paper's equations in numpy ---


def q64(params, obs, action):  # (2, B)
    x = np.concatenate([obs, action], -1)
    members = [jax.tree.map(lambda p, i=i: p[i], params["params"]["MLP_0"]) for i in range(2)]
    return np.stack([mlp(member, x)[..., 0] for member in members])


def v64(params, obs):  # (B,)
    return mlp(params["params"]["MLP_0"], obs)[..., 0]


def log_prob64(params, obs, action):  # (B,)
    mean = np.tanh(mlp(params["params"]["MLP_0"], obs))
    std = np.exp(np.clip(params["params"]["log_std"], -5, 2))
    return np.sum(-0.5 * ((action - mean) / std) ** 2 - np.log(std * np.sqrt(2 * np.pi)), -1)


def value_loss64(v, p, b, cfg):
    u = np.minimum(*q64(p.target, b.obs, b.action)) - v64(v, b.obs)
    return np.mean(np.where(u < 0, 1 - cfg.tau, cfg.tau) * u**2)


def critic_loss64(q, p, b, cfg):
    target = b.reward + cfg.gamma * np.where(b.done == 1, 0, v64(p.value, b.next_obs))
    first, second = q64(q, b.obs, b.action)
    return np.mean((first - target) ** 2) + np.mean((second - target) ** 2)


def weight64(p, b, cfg):
    q = np.minimum(*q64(p.target, b.obs, b.action))
    return np.minimum(np.exp(cfg.beta * (q - v64(p.value, b.obs))), cfg.max_weight)


def actor_loss64(pi, p, b, cfg):
    return -np.mean(weight64(p, b, cfg) * log_prob64(pi, b.obs, b.action))


LOSSES = {
    "value": (iql.value_loss, value_loss64),
    "critic": (iql.critic_loss, critic_loss64),
    "actor": (iql.actor_loss, actor_loss64),
}


# --- Golden values ---


@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_the_papers(name, state, batch):
    ours, paper = LOSSES[name]
    loss, info = ours(getattr(state, name).params, state, batch, CFG)
    p = params64(state)
    np.testing.assert_allclose(loss, paper(getattr(p, name), p, f64(batch), CFG), rtol=2e-5)
    assert info.get(f"{name}_loss") == loss


def test_weights_are_on_both_sides_of_the_clip(state, batch):
    weight = weight64(params64(state), f64(batch), CFG)
    assert 0 < np.sum(weight == CFG.max_weight) < B  # else the golden values above say too little


def test_expectile_weighs_surplus_by_tau(state, batch):
    """Where Q exceeds V the square counts tau, where it falls short 1 - tau, Eq. (5)."""
    shift = {True: 100.0, False: -100.0}  # far above and far below every Q
    for above, by in shift.items():
        v = jax.tree.map(lambda x: x, state.value.params)
        v["params"]["MLP_0"]["Dense_2"]["bias"] += by
        u = iql.advantage(v, state, batch)
        loss, _ = iql.value_loss(v, state, batch, CFG)
        expected = (1 - CFG.tau if above else CFG.tau) * jnp.mean(u**2)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)


UPDATE = jax.jit(partial(iql.update, cfg=CFG))


@pytest.fixture(scope="module")
def updated(state, batch):
    return UPDATE(state, batch, KEY)


def test_one_update_is_the_papers(state, batch, updated):
    """V first; the policy and Q against the new V and the old target; then the target."""
    new, info = updated
    p, b = params64(state), f64(batch)
    for name in ("value", "actor", "critic"):
        paper = LOSSES[name][1]
        np.testing.assert_allclose(info[f"{name}_loss"], paper(getattr(p, name), p, b, CFG), 2e-5)
        grads = gradient(lambda x, f=paper: f(x, p, b, CFG), getattr(p, name))
        assert_first_adam_step(getattr(state, name), getattr(new, name), grads, CFG.lr)
        if name == "value":
            p.value = f64(new.value.params)


def test_policy_and_critic_use_the_new_value(state, batch, updated):
    new, info = updated
    p, b = params64(state), f64(batch)
    old = weight64(p, b, CFG).mean(), critic_loss64(p.critic, p, b, CFG)
    p.value = f64(new.value.params)
    now = weight64(p, b, CFG).mean(), critic_loss64(p.critic, p, b, CFG)
    np.testing.assert_allclose((info["weight"], info["critic_loss"]), now, rtol=2e-5)
    assert min(np.abs(np.divide(old, now) - 1)) > 1e-2  # else the line above cannot tell them apart


def test_target_moves_once_towards_the_new_critic(state, updated):
    new, _ = updated
    old, critic = f64(state.target), f64(new.critic.params)
    expected = jax.tree.map(lambda t, q: 0.9 * t + 0.1 * q, old, critic)
    chex.assert_trees_all_close(f64(new.target), expected, rtol=1e-6, atol=1e-6)


def test_update_leaves_the_rest_alone(state, updated):
    new, _ = updated
    chex.assert_trees_all_equal((new.obs_mean, new.obs_std), (state.obs_mean, state.obs_std))
    for name in ("actor", "critic", "value"):
        assert getattr(new, name).step == getattr(state, name).step + 1


@pytest.mark.parametrize(("count", "share"), [(0, 1), (500, 0.5), (1000, 0), (2000, 0)])
def test_actors_learning_rate_falls_to_zero_by_a_cosine(count, share, state, batch):
    moments, schedule = state.actor.opt_state
    late = (moments, schedule._replace(count=jnp.int32(count)))  # of num_updates = 1000
    new, _ = UPDATE(state.replace(actor=state.actor.replace(opt_state=late)), batch, KEY)
    before, after = (s.actor.params["params"]["log_std"] for s in (state, new))
    np.testing.assert_allclose(np.abs(after - before), share * CFG.lr, rtol=1e-3, atol=1e-8)


# --- Structure ---


def test_shapes(state, batch):
    q = jax.eval_shape(state.critic.apply_fn, state.target, batch.obs, batch.action)
    chex.assert_shape(q, (2, B))
    v = jax.eval_shape(state.value.apply_fn, state.value.params, batch.obs)
    gap = jax.eval_shape(iql.advantage, state.value.params, state, batch)
    log_prob = jax.eval_shape(
        lambda p: state.actor.apply_fn(p, batch.obs).log_prob(batch.action), state.actor.params
    )
    chex.assert_shape([v, gap, log_prob], (B,))
    for name, (loss, _) in LOSSES.items():
        f = partial(loss, cfg=CFG)
        out, info = jax.eval_shape(f, getattr(state, name).params, state, batch)
        chex.assert_shape([out, *info.values()], ())
    chex.assert_shape(jax.eval_shape(iql.act, state, batch.obs), (B, 2))
    chex.assert_shape(jax.eval_shape(iql.act, state, batch.obs[0]), (2,))


@pytest.mark.parametrize("name", LOSSES)
def test_a_rows_loss_depends_on_that_row_alone(name, state, batch):
    """The batch's loss is the mean of its rows' losses: nothing of shape (B, B), no softmax."""
    loss = partial(LOSSES[name][0], cfg=CFG)
    params = getattr(state, name).params
    rows = jax.tree.map(lambda x: x[:, None], batch)
    each, _ = jax.vmap(loss, (None, None, 0))(params, state, rows)
    np.testing.assert_allclose(loss(params, state, batch)[0], each.mean(), rtol=1e-5)


def test_time_limits_bootstrap_and_terminals_do_not(state, batch):
    def loss(done, next_obs):
        rows = batch._replace(done=jnp.full(B, done), next_obs=next_obs)
        return iql.critic_loss(state.critic.params, state, rows, CFG)[0]

    assert loss(0.0, batch.next_obs) != loss(0.0, batch.next_obs + 1)
    assert loss(1.0, batch.next_obs) == loss(1.0, batch.next_obs + 1)
    q = state.critic.apply_fn(state.critic.params, batch.obs, batch.action)
    expected = jnp.mean((q - batch.reward) ** 2, 1).sum()
    np.testing.assert_allclose(loss(1.0, batch.next_obs), expected, rtol=1e-5)


def test_policy_imitates_the_better_row_more(state, batch):
    """Of two actions of one state, the one with the larger Q pulls harder, by exp(beta dQ)."""
    one = jax.tree.map(lambda x: x[:1], batch)
    cfg = replace(CFG, max_weight=1e9)

    def weight(action):
        rows = one._replace(action=action)
        q = state.critic.apply_fn(state.target, rows.obs, rows.action).min(0)
        return iql.actor_loss(state.actor.params, state, rows, cfg)[1]["weight"], q[0]

    (w_a, q_a), (w_b, q_b) = weight(jnp.array([[0.9, 0.9]])), weight(jnp.array([[-0.9, -0.9]]))
    assert abs(q_a - q_b) > 0.1
    np.testing.assert_allclose(jnp.log(w_a / w_b), cfg.beta * (q_a - q_b), rtol=1e-4)


@pytest.mark.parametrize(("log_std", "clipped"), [(10, 2), (-10, -5), (0.3, 0.3)])
def test_policys_std_is_clipped_and_knows_no_state(log_std, clipped, state, batch):
    params = jax.tree.map(lambda x: x, state.actor.params)
    params["params"]["log_std"] = jnp.full(2, float(log_std))
    pi = state.actor.apply_fn(params, batch.obs)
    np.testing.assert_allclose(pi.stddev(), np.full((B, 2), np.exp(clipped)), rtol=1e-5)
    expected = log_prob64(f64(params), f64(batch.obs), f64(batch.action))
    np.testing.assert_allclose(pi.log_prob(batch.action), expected, rtol=1e-4)


def test_observations_are_normalised_once_for_training_and_acting(fresh, data):
    rows = jnp.array([3, 3, 8])
    batch = iql.minibatch(fresh, data, rows)
    mean, std = np.mean(data.obs, 0), np.std(data.obs, 0) + 1e-3
    np.testing.assert_allclose(batch.obs, (data.obs[rows] - mean) / std, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(batch.next_obs, (data.next_obs[rows] - mean) / std, 1e-4, 1e-5)
    for field in ("action", "reward", "done"):
        np.testing.assert_array_equal(getattr(batch, field), getattr(data, field)[rows])
    actor = f64(fresh.actor.params)["params"]["MLP_0"]
    expected = np.tanh(mlp(actor, (f64(data.obs) - mean) / std))
    np.testing.assert_allclose(iql.act(fresh, data.obs), expected, rtol=1e-4, atol=1e-5)


def test_critics_start_apart_and_the_target_with_them(fresh):
    kernel = fresh.critic.params["params"]["MLP_0"]["Dense_0"]["kernel"]  # (2, 8, 5)
    assert not np.any(np.isclose(kernel[0], kernel[1]))
    chex.assert_trees_all_equal(fresh.target, fresh.critic.params)


# --- A world with known values ---

# Four states in a row and three actions. Action 0 stays and costs 0.3, action 1 goes one to the
# right at no cost, action 2 jumps two and pays 0.1; entering the last state pays 1 and ends. Data
# jump from states 1 and 2 but never from 0, where it would be best. COUNTS[s, a] rows of each.
COUNTS = np.array([[4, 3, 0], [4, 2, 2], [4, 3, 1]])
GAMMA = 0.8


def world():
    """s, a, r, s' of every row; s' = 3 is the end."""
    s, a = np.repeat(np.argwhere(COUNTS > 0), COUNTS[COUNTS > 0], 0).T
    to = np.minimum(s + a, 3)
    return s, a, np.array([-0.3, 0.0, 0.1])[a] + (to == 3), to


def fixed_point(summary):
    """V(s) = summary of r + gamma V(s') over the rows of s, by iteration; V of the end is 0."""
    s, _, reward, to = world()
    v = np.zeros(4)
    for _ in range(200):
        q = reward + GAMMA * v[to]
        v[:3] = [summary(q[s == i]) for i in range(3)]
    return v[:3]


def expectile(x, tau):
    """The e at which tau E[(x - e)+] = (1 - tau) E[(e - x)+]."""
    e = x.mean()
    for _ in range(100):
        weight = np.where(x < e, 1 - tau, tau)
        e = np.sum(weight * x) / weight.sum()
    return e


def test_value_lies_between_sarsas_and_the_best_in_the_data():
    s, a, reward, to = world()
    sarsa, best = fixed_point(np.mean), fixed_point(np.max)
    jump = 0.1 + GAMMA * best[2]
    assert np.all(best > sarsa + 0.2)
    assert jump > best[0] + 0.05  # what Q-learning over all actions would find

    eye = np.eye(4)
    rows = Batch(eye[s], eye[a][:, :3], reward, eye[to], to == 3)
    data = Batch(*(jnp.asarray(x, jnp.float32) for x in rows))
    cfg = iql.Config(
        widths=(32,), batch_size=512, num_updates=10_000, log_every=1500, lr=3e-3, polyak=0.05,
        gamma=GAMMA, normalize=False, beta=10.0,
    )  # fmt: skip
    start = INIT(KEY, data, cfg)

    def train(tau):
        return iql.train_chunk(start, data, KEY, cfg.log_every, replace(cfg, tau=tau))[0]

    taus = [0.5, 0.7, 0.9, 0.99]
    state = jax.jit(jax.vmap(train))(jnp.asarray(taus))
    v = jax.vmap(lambda s: s.value.apply_fn(s.value.params, data.obs))(state)
    v = np.stack([v[:, np.argmax(s == i)] for i in range(3)], 1)  # (tau, state)
    np.testing.assert_allclose(v[0], sarsa, atol=0.05)
    for tau, value in zip(taus, v, strict=True):
        known = fixed_point(partial(expectile, tau=tau))
        np.testing.assert_allclose(value, known, atol=0.05)
    np.testing.assert_allclose(v[-1], best, atol=0.05)
    assert np.all(np.diff(v, axis=0) > 0)  # in the order of tau
    assert np.all(v < best + 0.02)  # and nothing that the data do not show

    behaviour = COUNTS[1] / COUNTS[1].sum()
    action = iql.act(jax.tree.map(lambda x: x[0], state), jnp.asarray(eye[1], jnp.float32))
    assert action[0] < behaviour[0] - 0.1  # against SARSA's Q: less of what costs,
    assert action[2] > behaviour[2] + 0.1  # more of what pays
