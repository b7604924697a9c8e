"""CQL: losses and an update in float64, the penalty's gradient, a world known in full."""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import chex
import cql
import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import assert_first_adam_step, f64, gradient, mlp, random_batch, scramble, shifted

from common.datasets import Batch

CFG = cql.Config(
    widths=(8, 8), batch_size=16, log_every=100, actor_lr=1e-3, critic_lr=2e-3, polyak=0.1,
    gamma=0.9, alpha=3.0, normalize=True,
)  # fmt: skip
LAGRANGE = replace(CFG, lagrange=0.5)
CONFIGS = {
    "H": CFG,
    "rho": replace(CFG, variant="rho"),
    "rho-weighted": replace(CFG, variant="rho-weighted"),
    "var": replace(CFG, variant="var", count=3.0),
    "lagrange": LAGRANGE,
    "max_backup": replace(CFG, max_backup=True),
    "sac": replace(CFG, alpha=0.0),
}
KEY = jax.random.key(0)
B, A, N = 16, 2, CFG.num_actions
INIT = jax.jit(cql.init, static_argnums=2)  # compiled once for the tests that need a fresh state


@pytest.fixture(scope="module")
def data():
    return shifted(200)


@pytest.fixture(scope="module")
def fresh(data):
    return INIT(KEY, data, CFG)


@pytest.fixture(scope="module")
def batch():
    return random_batch(B, seed=1)


NETS = ("actor", "critic", "temperature", "multiplier")


@pytest.fixture(scope="module")
def state(fresh):
    """Every parameter away from its start, the target away from the critic."""
    nets = {k: getattr(fresh, k) for k in NETS}
    scales = dict(zip(NETS, (0.1, 0.4, 0.4, 0.4), strict=True))  # tanh(u) short of 1
    nets = {
        k: v.replace(params=scramble(v.params, i, scales[k]))
        for i, (k, v) in enumerate(nets.items())
    }
    return fresh.replace(target=scramble(fresh.target, 7), **nets)


def params64(state):
    nets = {k: f64(getattr(state, k).params) for k in NETS}
    return SimpleNamespace(target=f64(state.target), **nets)


# --- The paper's equations in numpy ---


def q64(params, obs, action):  # action (..., B, A) -> (2, ..., B)
    x = np.concatenate([np.broadcast_to(obs, (*action.shape[:-1], obs.shape[-1])), action], -1)
    members = [jax.tree.map(lambda p, i=i: p[i], params["params"]["MLP_0"]) for i in range(2)]
    return np.stack([mlp(member, x)[..., 0] for member in members])


def gaussian64(params, obs):
    """Mean and standard deviation of u, where a = tanh(u)."""
    p = params["params"]
    mean, log_std = np.split(mlp(p["MLP_0"], obs), 2, -1)
    return mean, np.exp(np.clip(p["log_std_scale"] * log_std + p["log_std_shift"], -20, 2))


def log_prob64(u, mean, std):
    """log density of tanh(u): the Gaussian's less log |d tanh(u) / du|."""
    gaussian = -0.5 * ((u - mean) / std) ** 2 - np.log(std * np.sqrt(2 * np.pi))
    return np.sum(gaussian + 2 * np.log(np.cosh(u)), -1)


def sample64(params, obs, key, shape):
    """Actions of pi(. | obs) with the numbers that `key` draws, and their log density."""
    mean, std = gaussian64(params, obs)
    unit = distrax.MultivariateNormalDiag(jnp.zeros(mean.shape), jnp.ones(mean.shape))
    u = mean + std * np.float64(unit.sample(seed=key, sample_shape=shape))
    return np.tanh(u), log_prob64(u, mean, std)


def backup64(p, b, key, cfg):
    n = cfg.num_actions if cfg.max_backup else 1
    q = q64(p.target, b.next_obs, sample64(p.actor, b.next_obs, key, n)[0])  # (2, n, B)
    return b.reward + cfg.gamma * np.where(b.done == 1, 0, np.minimum(q[0], q[1]).max(0))


def propose64(p, b, key, cfg, uniform):
    _, k_pi, k_next = jax.random.split(key, 3)
    here = sample64(p.actor, b.obs, k_pi, cfg.num_actions)
    there = sample64(p.actor, b.next_obs, k_next, cfg.num_actions)
    log_uniform = np.full(uniform.shape[:2], np.log(1 / 2**A))
    return map(np.concatenate, zip((uniform, log_uniform), here, there, strict=True))


def log_sum_exp(x, axis):
    top = x.max(axis, keepdims=True)
    return np.log(np.sum(np.exp(x - top), axis)) + top.squeeze(axis)


def lowered64(values, log_density, cfg):
    """Of values (2, N, B): what stands for the sum over actions in Eq. (4), (2, B)."""
    if cfg.variant == "rho-weighted":
        weight = np.exp(values - values.max(1, keepdims=True))
        return np.sum(weight * values, 1) / np.sum(weight, 1)
    if cfg.variant == "var":
        mean = values.mean(1)
        return mean + np.sqrt(np.mean((values - mean[:, None]) ** 2, 1) / cfg.count)
    return log_sum_exp(values if log_density is None else values - log_density, 1)


def gap64(q, p, b, cfg, action, log_density):
    """The bracket of Eq. (4), of each critic by itself; over 30 values in CQL(H)."""
    values = q64(q, b.obs, action)
    return np.mean(lowered64(values, log_density, cfg) - q64(q, b.obs, b.action), 1)  # (2,)


def critic_loss64(q, p, b, cfg, target, action, log_density):
    first, second = q64(q, b.obs, b.action)
    td = np.mean((first - target) ** 2) + np.mean((second - target) ** 2)
    weight = cfg.alpha * (np.exp(p.multiplier["params"]["log"]) if cfg.lagrange is not None else 1)
    return td + weight * gap64(q, p, b, cfg, action, log_density).sum()


def frozen64(p, state, batch, key, cfg):
    """Target, proposed actions and log densities of critic_loss under `key`."""
    k_backup, k_propose = jax.random.split(key)
    b = f64(batch)
    target = backup64(p, b, k_backup, cfg)
    if cfg.variant in ("rho", "rho-weighted"):
        return target, sample64(p.actor, b.obs, k_propose, cfg.num_actions)[0], None
    if cfg.variant == "var":
        return target, np.float64(cql.reference(state, batch, k_propose, cfg)), None
    uniform = np.float64(cql.propose(state, batch, k_propose, cfg)[0][: cfg.num_actions])
    return target, *propose64(p, b, k_propose, cfg, uniform)


def actor_loss64(pi, p, b, key):
    action, log_pi = sample64(pi, b.obs, key, ())
    temperature = np.exp(p.temperature["params"]["log"])
    return np.mean(temperature * log_pi - np.minimum(*q64(p.critic, b.obs, action)))


# --- The distribution ---


def test_log_density_of_own_samples():
    mean, std = jnp.array([[0.3, -1.0], [2.0, 0.0]]), jnp.array([[0.5, 1.0], [0.1, 2.0]])
    pi = cql.TanhNormal(mean, std)
    action, log_prob = pi.sample_and_log_prob(seed=KEY, sample_shape=7)
    chex.assert_shape([action, log_prob], [(7, 2, 2), (7, 2)])
    assert np.all(np.abs(action) <= 1)
    unit = distrax.MultivariateNormalDiag(jnp.zeros((2, 2)), jnp.ones((2, 2)))
    u = f64(mean) + f64(std) * f64(unit.sample(seed=KEY, sample_shape=7))
    np.testing.assert_allclose(action, np.tanh(u), atol=1e-6)
    np.testing.assert_allclose(log_prob, log_prob64(u, f64(mean), f64(std)), rtol=1e-4, atol=1e-4)


def test_density_integrates_to_one():
    grid = (jnp.arange(20000) + 0.5) / 10000 - 1
    pi = cql.TanhNormal(jnp.array([0.4]), jnp.array([0.7]))
    np.testing.assert_allclose(jnp.exp(pi.log_prob(grid[:, None])).sum() / 10000, 1, atol=1e-3)


def test_far_out_samples_keep_a_finite_density():
    pi = cql.TanhNormal(jnp.full(2, 12.0), jnp.full(2, 0.1))  # tanh(12) rounds to 1
    action, log_prob = pi.sample_and_log_prob(seed=KEY)
    np.testing.assert_allclose(action, 1, atol=1e-6)  # the tests' tanh may stop an ulp below
    assert np.isfinite(log_prob)


@pytest.mark.parametrize(("shift", "log_std"), [(50.0, 2.0), (-50.0, -20.0)])
def test_std_is_clipped(shift, log_std, state, batch):
    params = jax.tree.map(lambda x: x, state.actor.params)
    params["params"]["log_std_shift"] = jnp.float32(shift)
    pi = state.actor.apply_fn(params, batch.obs)
    np.testing.assert_allclose(pi.distribution.stddev(), math.exp(log_std), rtol=1e-5)


def test_acting_takes_the_mode_of_normalised_observations(fresh, data):
    mean, std = np.mean(data.obs, 0), np.std(data.obs, 0) + 1e-3
    obs, next_obs = (
        (f64(x) - np.float64(mean)) / np.float64(std) for x in (data.obs, data.next_obs)
    )
    expected = np.tanh(gaussian64(f64(fresh.actor.params), obs)[0])
    np.testing.assert_allclose(cql.act(fresh, data.obs), expected, rtol=1e-4, atol=1e-5)
    batch = cql.minibatch(fresh, data, jnp.array([3, 3, 8]))
    np.testing.assert_allclose(batch.obs, obs[[3, 3, 8]], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(batch.next_obs, next_obs[[3, 3, 8]], rtol=1e-4, atol=1e-5)


# --- Golden values ---


def test_proposals(state, batch):
    """30 actions a row: uniform, of pi(. | s), of pi(. | s'), each with its own log density."""
    actions, log_density = cql.propose(state, batch, KEY, CFG)
    chex.assert_shape([actions, log_density], [(3 * N, B, A), (3 * N, B)])
    uniform = np.float64(actions[:N])
    expected, expected_density = propose64(params64(state), f64(batch), KEY, CFG, uniform)
    np.testing.assert_allclose(actions, expected, atol=2e-6)
    np.testing.assert_allclose(log_density, expected_density, rtol=1e-4, atol=1e-4)
    many = cql.propose(state, batch, KEY, replace(CFG, num_actions=500))[0][:500]
    assert -1 <= many.min() < -0.99 < 0.99 < many.max() <= 1
    np.testing.assert_allclose(many.mean((0, 1)), 0, atol=0.03)
    np.testing.assert_allclose(many.var((0, 1)), 1 / 3, atol=0.03)


@pytest.mark.parametrize("name", ["H", "max_backup"])
def test_backup(name, state, batch):
    cfg = CONFIGS[name]
    target = cql.backup(state, batch, KEY, cfg)
    expected = backup64(params64(state), f64(batch), KEY, cfg)
    np.testing.assert_allclose(target, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_critic_loss(name, state, batch):
    cfg, p, b = CONFIGS[name], params64(state), f64(batch)
    loss, info = cql.critic_loss(state.critic.params, state, batch, KEY, cfg)
    constants = frozen64(p, state, batch, KEY, cfg)
    np.testing.assert_allclose(loss, critic_loss64(p.critic, p, b, cfg, *constants), rtol=2e-5)
    gap = gap64(p.critic, p, b, cfg, *constants[1:])
    assert abs(gap[0] - gap[1]) > 0.01  # the critics differ: mixing them would show
    np.testing.assert_allclose(info["gap"], gap.mean(), rtol=2e-5)


def test_actor_loss(state, batch):
    loss, info = cql.actor_loss(state.actor.params, state, batch, KEY)
    p, b = params64(state), f64(batch)
    np.testing.assert_allclose(loss, actor_loss64(p.actor, p, b, KEY), rtol=2e-5)
    log_pi = sample64(p.actor, b.obs, KEY, ())[1]
    np.testing.assert_allclose(info["entropy"], -log_pi.mean(), rtol=2e-5)


@pytest.mark.parametrize("entropy", [-5.0, 1.0])
def test_temperature_rises_below_the_target_entropy(entropy, state):
    params = state.temperature.params
    loss, info = cql.temperature_loss(params, state, entropy, -2)
    log = float(params["params"]["log"])
    np.testing.assert_allclose(loss, log * (entropy + 2), rtol=1e-5)
    np.testing.assert_allclose(info["temperature"], math.exp(log), rtol=1e-6)
    new, _ = cql.descend(cql.temperature_loss, state.temperature, state, entropy, -2)
    assert (new.params["params"]["log"] > log) == (entropy < -2)


@pytest.mark.parametrize("gap", [-1.0, 2.0])
def test_multiplier_rises_above_the_lagrange_gap(gap, state):
    params = state.multiplier.params
    loss, _ = cql.multiplier_loss(params, state, gap, LAGRANGE)
    log = float(params["params"]["log"])
    np.testing.assert_allclose(loss, -3 * math.exp(log) * (gap - 0.5), rtol=1e-5)
    new, _ = cql.descend(cql.multiplier_loss, state.multiplier, state, gap, LAGRANGE)
    assert (new.params["params"]["log"] > log) == (gap > 0.5)


def test_one_update(state, batch):
    """All learn against the others as they were; then the target moves once, to the new critic."""
    cfg, p, b = LAGRANGE, params64(state), f64(batch)
    new, _ = jax.jit(partial(cql.update, cfg=cfg))(state, batch, KEY)
    k_actor, k_critic = jax.random.split(KEY)

    grads = gradient(lambda x: actor_loss64(x, p, b, k_actor), p.actor)
    assert_first_adam_step(state.actor, new.actor, grads, cfg.actor_lr)

    entropy = -sample64(p.actor, b.obs, k_actor, ())[1].mean()
    grads = {"params": {"log": np.array(entropy + A)}}
    assert_first_adam_step(state.temperature, new.temperature, grads, cfg.actor_lr)

    constants = frozen64(p, state, batch, k_critic, cfg)
    grads = gradient(lambda x: critic_loss64(x, p, b, cfg, *constants), p.critic)
    assert_first_adam_step(state.critic, new.critic, grads, cfg.critic_lr)

    gap = gap64(p.critic, p, b, cfg, *constants[1:]).mean()
    grad = -cfg.alpha * np.exp(p.multiplier["params"]["log"]) * (gap - cfg.lagrange)
    grads = {"params": {"log": np.array(grad)}}
    assert_first_adam_step(state.multiplier, new.multiplier, grads, cfg.critic_lr)

    expected = jax.tree.map(lambda t, q: 0.9 * t + 0.1 * q, p.target, f64(new.critic.params))
    chex.assert_trees_all_close(f64(new.target), expected, rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_equal((new.obs_mean, new.obs_std), (state.obs_mean, state.obs_std))


# --- The penalty's gradient ---


def tabled(state, seed=0, n=3 * N):
    """A critic whose values are its parameters: a gradient says what happens to each value."""
    rng = np.random.default_rng(seed)
    table = {"data": rng.normal(size=(2, B)), "other": 2 * rng.normal(size=(2, n, B))}
    table = jax.tree.map(jnp.float32, table)

    def apply(table, obs, action):
        return table["data"] if action.ndim == 2 else table["other"][:, : len(action)]

    critic = state.critic.replace(apply_fn=apply, params=table)
    return state.replace(critic=critic, target=table)


def penalty_gradient(state, batch, cfg):
    """With alpha = 1 less without: what the penalty adds, the temporal difference removed."""

    def grad(alpha):
        f = jax.grad(cql.critic_loss, has_aux=True)
        return f(state.critic.params, state, batch, KEY, replace(cfg, alpha=alpha))[0]

    return jax.tree.map(jnp.subtract, grad(1.0), grad(0.0))


@pytest.mark.parametrize("variant", ["H", "rho"])
def test_penalty_lowers_q_at_proposals_and_raises_it_at_data(variant, state, batch):
    n = 3 * N if variant == "H" else N
    state, cfg = tabled(state, n=n), replace(CFG, variant=variant)
    grads = penalty_gradient(state, batch, cfg)
    assert np.all(grads["other"] > 0)  # descent lowers Q at each sampled action, of each critic,
    np.testing.assert_allclose(grads["data"], -1 / B, rtol=1e-4)  # raises it at each of the data,
    np.testing.assert_allclose(grads["other"].sum(1), 1 / B, rtol=1e-4)  # by as much in each row
    values = f64(state.critic.params["other"])
    if variant == "H":
        _, k_propose = jax.random.split(KEY)
        values -= f64(cql.propose(state, batch, k_propose, cfg)[1])
    share = np.exp(values - log_sum_exp(values, 1)[:, None])
    np.testing.assert_allclose(grads["other"], share / B, rtol=1e-3, atol=1e-6)  # where Q is large


@pytest.mark.parametrize(
    ("variant", "values", "lowered", "slope"),
    [
        ("rho", [0, np.log(3)], np.log(4), [0.25, 0.75]),
        ("rho-weighted", [0, np.log(3)], 0.8240, [0.0440, 0.9560]),
        ("var", [0, 2], 1.5, [0.25, 0.75]),  # 1 + sqrt(1 / 4)
        ("rho", [7, 7], 7 + np.log(2), [0.5, 0.5]),
        ("rho-weighted", [7, 7], 7, [0.5, 0.5]),
        ("var", [7, 7], 7, [0.5, 0.5]),
    ],
)
def test_what_the_variants_push_down_by_hand(variant, values, lowered, slope):
    """Of two equally likely actions; a gradient of CQL(rho) with its weights held still is that of
    its logarithmic form."""
    q = jnp.float32(values)[None, :, None]
    cfg = replace(CFG, variant=variant, count=4.0)
    np.testing.assert_allclose(cql.lowered(q, 0.0, cfg), [[lowered]], rtol=1e-4)
    found = jax.grad(lambda q: cql.lowered(q, 0.0, cfg).sum())(q)
    np.testing.assert_allclose(found[0, :, 0], slope, atol=1e-4)


@pytest.mark.parametrize("variant", ["rho-weighted", "var"])
def test_the_papers_other_variants_move_every_value(variant, state, batch):
    """By the derivative of what they push down; in each row as much as the data's rises."""
    state, cfg = tabled(state, n=N), CONFIGS[variant]
    grads = penalty_gradient(state, batch, cfg)
    q = f64(state.critic.params["other"])
    if variant == "var":
        apart = q - q.mean(1, keepdims=True)
        share = (1 + apart / np.sqrt(cfg.count * q.var(1, keepdims=True))) / N
    else:
        weight = np.exp(q - log_sum_exp(q, 1)[:, None])
        share = weight * (1 + q - np.sum(weight * q, 1, keepdims=True))
    np.testing.assert_allclose(grads["other"], share / B, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(grads["other"].sum(1), 1 / B, rtol=1e-3)
    np.testing.assert_allclose(grads["data"], -1 / B, rtol=1e-4)
    assert np.any(grads["other"] < 0)  # far below the mean, Q rises


def test_more_visits_leave_less_of_the_variance(state, batch):
    """With very many, CQL(var) lowers the mean of uniform actions and nothing else."""
    state = tabled(state, n=N)
    few, many = (replace(CONFIGS["var"], count=n) for n in (1.0, 1e8))
    grads = [penalty_gradient(state, batch, cfg)["other"] for cfg in (few, many)]
    np.testing.assert_allclose(grads[1], 1 / (N * B), rtol=1e-3)
    assert grads[0].std() > 0.1 / (N * B)


def test_actions_of_cql_var_are_uniform(state, batch):
    cfg = replace(CONFIGS["var"], num_actions=500)
    action = cql.reference(state, batch, KEY, cfg)
    chex.assert_shape(action, (500, B, A))
    assert -1 <= action.min() < -0.99 < 0.99 < action.max() <= 1
    np.testing.assert_allclose(action.mean((0, 1)), 0, atol=0.03)
    np.testing.assert_allclose(action.var((0, 1)), 1 / 3, atol=0.03)


@pytest.mark.parametrize("member", [0, 1])
def test_each_critic_is_penalised_by_itself(member, state, batch):
    state = tabled(state)
    params = jax.tree.map(lambda x: x.at[1 - member].add(5.0), state.critic.params)
    other = state.replace(critic=state.critic.replace(params=params))
    before, after = (penalty_gradient(s, batch, CFG) for s in (state, other))
    chex.assert_trees_all_close(*(jax.tree.map(lambda x: x[member], g) for g in (before, after)))


def test_a_step_on_the_penalty_opens_the_gap_in_each_network(state, batch):
    grads = penalty_gradient(state, batch, CFG)
    params = jax.tree.map(lambda p, g: p - 1e-2 * g, state.critic.params, grads)
    _, k_propose = jax.random.split(KEY)
    action, log_density = cql.propose(state, batch, k_propose, CFG)
    action, log_density, b = f64(action), f64(log_density), f64(batch)
    inputs = None, b, CFG, action, log_density
    old, new = (gap64(f64(q), *inputs) for q in (state.critic.params, params))
    assert np.all(new < old - 1e-5)


def test_log_sum_exp_estimates_the_integral(state, batch):
    """With Q(s, a) = c . a the integral of exp Q is the product of 2 sinh(c) / c."""
    c = np.array([1.0, -0.5])

    def apply(params, obs, action):
        return jnp.stack([action @ c, 2 * action @ c])

    actor = jax.tree.map(jnp.zeros_like, state.actor.params)  # tanh of a unit Gaussian
    state = state.replace(
        critic=state.critic.replace(apply_fn=apply), actor=state.actor.replace(params=actor)
    )
    cfg = replace(CFG, num_actions=1000)
    info = cql.critic_loss(state.critic.params, state, batch, KEY, cfg)[1]
    integral = [np.sum(np.log(2 * np.sinh(k * c) / (k * c))) for k in (1, 2)]
    data = np.mean(batch.action @ c) * np.array([1, 2])
    expected = np.mean(np.log(3 * cfg.num_actions) + integral - data)
    np.testing.assert_allclose(info["gap"], expected, atol=0.08)


# --- Structure ---


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes(name, state, batch):
    cfg = CONFIGS[name]
    target = jax.eval_shape(partial(cql.backup, cfg=cfg), state, batch, KEY)
    chex.assert_shape(target, (B,))
    q = jax.eval_shape(state.critic.apply_fn, state.target, batch.obs, batch.action)
    chex.assert_shape(q, (2, B))
    loss = partial(cql.critic_loss, cfg=cfg)
    out, info = jax.eval_shape(loss, state.critic.params, state, batch, KEY)
    chex.assert_shape([out, *info.values()], ())
    out, info = jax.eval_shape(cql.actor_loss, state.actor.params, state, batch, KEY)
    chex.assert_shape([out, *info.values()], ())
    chex.assert_shape(jax.eval_shape(cql.act, state, batch.obs), (B, A))
    chex.assert_shape(jax.eval_shape(cql.act, state, batch.obs[0]), (A,))


def test_a_rows_target_depends_on_that_row_alone(state, batch):
    """Nothing of shape (B, B): another row's reward, end or next state leaves it as it was."""
    other = batch._replace(
        reward=batch.reward.at[3].add(9.0), next_obs=batch.next_obs.at[3].add(1.0)
    )
    old, new = (cql.backup(state, rows, KEY, CFG) for rows in (batch, other))
    moved = np.flatnonzero(np.asarray(old != new))
    np.testing.assert_array_equal(moved, [3])


@pytest.mark.parametrize("max_backup", [False, True])
def test_time_limits_bootstrap_and_terminals_do_not(max_backup, state, batch):
    cfg = replace(CFG, max_backup=max_backup)

    def target(done, shift=0.0):
        rows = batch._replace(done=jnp.full(B, done), next_obs=batch.next_obs + shift)
        return cql.backup(state, rows, KEY, cfg)

    np.testing.assert_array_equal(target(1.0), batch.reward)
    assert np.all(np.abs(target(0.0) - batch.reward) > 1e-4)
    assert np.all(target(0.0) != target(0.0, shift=1.0))


def test_max_backup_takes_the_best_of_pessimistic_values(state, batch):
    """The minimum over critics first, of each action by itself; then the maximum over actions."""
    state = tabled(state)
    q = f64(state.target["other"][:, :N])  # (2, N, B)
    rows = batch._replace(done=jnp.zeros(B), reward=jnp.zeros(B))
    target = cql.backup(state, rows, KEY, CONFIGS["max_backup"])
    np.testing.assert_allclose(target, CFG.gamma * q.min(0).max(0), rtol=1e-5)


# --- A world known in full ---

# Two steps. In the first state any action pays nothing; in the second, action a pays reward(a) and
# ends. The data's actions lie in [-0.3, 0.3], where reward(a) = 5 a; beyond 0.3, where they never
# go, the reward falls steeply. Whoever prolongs the data's line believes in a = 1.


def reward(action):
    return np.where(action < 0.3, 5 * action, 1.5 - 15 * (action - 0.3))


@pytest.fixture(scope="module")
def trained():
    """States of alpha = 0 and alpha = 2 after the same training on the same data."""
    rng = np.random.default_rng(0)
    action = rng.uniform(-0.3, 0.3, (400, 1))
    second = np.arange(400) % 2
    obs = np.eye(2)[second]
    rows = Batch(obs, action, second * reward(action[:, 0]), np.eye(2)[[1] * 400], second)
    data = Batch(*(jnp.asarray(x, jnp.float32) for x in rows))
    cfg = cql.Config(
        widths=(16, 16), batch_size=64, log_every=1000, actor_lr=3e-3, critic_lr=3e-3, polyak=0.05,
        gamma=0.9, num_actions=4,
    )  # fmt: skip
    start = INIT(KEY, data, cfg)

    def train(alpha):
        return cql.train_chunk(start, data, KEY, cfg.log_every, replace(cfg, alpha=alpha))[0]

    states = jax.jit(jax.vmap(train))(jnp.array([0.0, 2.0]))
    np.testing.assert_array_equal(
        states.multiplier.params["params"]["log"], 1
    )  # without --lagrange
    return [jax.tree.map(lambda x, i=i: x[i], states) for i in range(2)]


def values(state):
    """Of the first and of the second state: the critics' value of the policy, and the true one."""
    pi = state.actor.apply_fn(state.actor.params, jnp.eye(2))
    action = pi.sample(seed=KEY, sample_shape=1000)  # (1000, 2, 1)
    obs = jnp.broadcast_to(jnp.eye(2), (1000, 2, 2))
    believed = state.critic.apply_fn(state.critic.params, obs, action).mean((0, 1))
    last = reward(np.asarray(action[:, 1, 0])).mean()
    return np.asarray(believed), np.array([0.9 * last, last])


def test_value_lies_below_the_true_one_where_naive_sac_lies_above(trained):
    (naive, naive_true), (ours, true) = map(values, trained)
    assert np.all(ours < true)
    assert np.all(naive > naive_true + 0.3)
    assert np.all(true > naive_true + 0.3)  # and its policy is the better one


def test_actions_outside_the_data_are_worth_less(trained):
    def q(state, action):  # both states, both critics
        action = jnp.asarray(action)[:, None, None] * jnp.ones((1, 2, 1))
        obs = jnp.broadcast_to(jnp.eye(2), (len(action), 2, 2))
        return state.critic.apply_fn(state.critic.params, obs, action)  # (2, N, 2)

    inside, outside = np.linspace(-0.25, 0.25, 11), np.array([-0.9, -0.7, 0.7, 0.9])
    naive, ours = trained
    assert np.all(q(ours, outside).max(1) < q(ours, inside).min(1))
    assert np.all(q(naive, outside).max(1)[:, 1] > q(naive, inside).max(1)[:, 1])
