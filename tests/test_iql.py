"""IQL: losses and one update against float64, their structure, seeds, and a world with known values."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import chex
import iql
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.datasets import Batch

CFG = iql.Config(
    widths=(8, 8), batch_size=16, num_updates=1000, eval_every=100, lr=1e-2, polyak=0.1,
    gamma=0.9, tau=0.8, beta=2.0, max_weight=3.0,
)  # fmt: skip
KEY = jax.random.key(0)
B = 16


# --- Float64 mathematics, and a Batch of noise ---


def random_batch(rows=16, obs_dim=3, action_dim=2, seed=0):
    """A third of its rows are done."""
    rng = np.random.default_rng(seed)
    obs, next_obs = rng.normal(size=(2, rows, obs_dim))
    action = rng.uniform(-0.95, 0.95, (rows, action_dim))
    done = np.arange(rows) % 3 == 1
    fields = Batch(obs, action, rng.normal(size=rows), next_obs, done)
    return Batch(*(jnp.asarray(x, jnp.float32) for x in fields))


def f64(tree):
    """The same tree of arrays in numpy's float64, safe to write to."""
    return jax.tree.map(lambda x: np.array(x, np.float64), tree)


def scramble(params, seed, scale=0.4):
    """Parameters moved off their start, so that no bias is 0 and no two networks are equal."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.float32(scale * rng.normal(size=x.shape)), params)


def mlp(params, x):
    """Dense_0, relu, Dense_1, relu, ..., Dense_n in numpy."""
    for i in range(len(params)):
        x = x @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"]
        x = np.maximum(x, 0) if i < len(params) - 1 else x
    return x


def gradient(loss, params, step=1e-6):
    """Central differences of loss(params), one parameter at a time; `params` of float64."""
    leaves, tree = jax.tree.flatten(params)
    grads = [np.zeros_like(leaf) for leaf in leaves]
    for leaf, grad in zip(leaves, grads, strict=True):
        for i in np.ndindex(leaf.shape):
            kept = leaf[i]
            leaf[i] = kept + step
            above = loss(params)
            leaf[i] = kept - step
            grad[i] = (above - loss(params)) / (2 * step)
            leaf[i] = kept
    return jax.tree.unflatten(tree, grads)


def assert_first_adam_step(before, after, grads, lr):
    """`after` (a TrainState) is `before` after one Adam step along `grads`: size and direction."""
    first_moment = after.opt_state[0].mu  # (1 - 0.9) g
    trees = (before.params, after.params, first_moment, grads)
    for old, new, moment, g in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_allclose(moment, 0.1 * g, rtol=2e-4, atol=2e-6)
        clear = (np.abs(g) > 1e-4) | (g == 0)  # elsewhere rounding decides the direction
        expected = np.float64(old) - lr * g / (np.abs(g) + 1e-8)
        np.testing.assert_allclose(np.asarray(new)[clear], expected[clear], rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def batch():
    return random_batch(B)


@pytest.fixture(scope="module")
def state(batch):
    """All networks away from their start, the target away from the critic."""
    state = jax.jit(partial(iql.init, cfg=CFG))(KEY, batch)
    nets = {"actor": state.actor, "critic": state.critic, "value": state.value}
    nets = {k: v.replace(params=scramble(v.params, i)) for i, (k, v) in enumerate(nets.items())}
    return state.replace(target=scramble(state.target, 3), **nets)


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


@pytest.fixture(scope="module")
def updated(state, batch):
    return jax.jit(partial(iql.update, cfg=CFG))(state, batch, KEY)


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
    assert min(np.abs(np.subtract(old, now))) > 1e-3  # else the line above cannot tell them apart


def test_target_moves_once_towards_the_new_critic(state, updated):
    new, _ = updated
    expected = jax.tree.map(lambda t, q: 0.9 * t + 0.1 * q, f64(state.target), f64(new.critic.params))
    chex.assert_trees_all_close(f64(new.target), expected, rtol=1e-6, atol=1e-6)


def test_update_leaves_the_rest_alone(state, updated):
    new, _ = updated
    chex.assert_trees_all_equal((new.obs_mean, new.obs_std), (state.obs_mean, state.obs_std))
    for name in ("actor", "critic", "value"):
        assert getattr(new, name).step == getattr(state, name).step + 1


def test_actors_learning_rate_ends_at_zero(state, batch):
    cfg = replace(CFG, num_updates=2)
    start = jax.jit(partial(iql.init, cfg=cfg))(KEY, batch)
    step = jax.jit(partial(iql.update, cfg=cfg))
    states = [start]
    for _ in range(3):
        states.append(step(states[-1], batch, KEY)[0])
    log_std = [s.actor.params["params"]["log_std"] for s in states]
    moves = np.abs(np.diff(log_std, axis=0)).max(1)
    np.testing.assert_allclose(moves[0], cfg.lr, rtol=1e-3)
    assert 0 < moves[1] < 0.7 * cfg.lr  # cosine, half-way
    assert moves[2] == 0
    v = [s.value.params["params"]["MLP_0"]["Dense_2"]["bias"] for s in states]
    assert v[3] != v[2]  # V and Q go on


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


@pytest.mark.parametrize(("log_std", "std"), [(10.0, np.exp(2)), (-10.0, np.exp(-5)), (0.3, np.exp(0.3))])
def test_policys_std_is_clipped_and_knows_no_state(log_std, std, state, batch):
    params = jax.tree.map(lambda x: x, state.actor.params)
    params["params"]["log_std"] = jnp.full(2, log_std)
    pi = state.actor.apply_fn(params, batch.obs)
    np.testing.assert_allclose(pi.stddev(), np.full((B, 2), std), rtol=1e-5)
    expected = log_prob64(f64(params), f64(batch.obs), f64(batch.action))
    np.testing.assert_allclose(pi.log_prob(batch.action), expected, rtol=1e-4)


def test_observations_are_normalised_once_for_training_and_acting():
    data = random_batch(50, seed=1)
    data = data._replace(obs=5 + 3 * data.obs, next_obs=5 + 3 * data.next_obs)
    state = jax.jit(partial(iql.init, cfg=CFG))(KEY, data)
    rows = jnp.array([3, 3, 8])
    batch = iql.minibatch(state, data, rows)
    mean, std = np.mean(data.obs, 0), np.std(data.obs, 0) + 1e-3
    np.testing.assert_allclose(batch.obs, (data.obs[rows] - mean) / std, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(batch.next_obs, (data.next_obs[rows] - mean) / std, 1e-4, 1e-5)
    for field in ("action", "reward", "done"):
        np.testing.assert_array_equal(getattr(batch, field), getattr(data, field)[rows])
    actor = f64(state.actor.params)["params"]["MLP_0"]
    expected = np.tanh(mlp(actor, (f64(data.obs) - mean) / std))
    np.testing.assert_allclose(iql.act(state, data.obs), expected, rtol=1e-4, atol=1e-5)


# --- Seeds ---


def test_a_seed_of_many_is_that_seed_alone():
    data = random_batch(200, seed=2)

    def run(key):
        state = iql.init(jax.random.fold_in(key, 0), data, CFG)
        state, metrics = iql.train_chunk(state, data, jax.random.fold_in(key, 1), CFG)
        return state.actor.params, state.critic.params, state.value.params, state.target, metrics

    keys = jax.vmap(jax.random.key)(jnp.arange(3))
    many, alone = jax.jit(jax.vmap(run))(keys), jax.jit(run)
    for i in range(3):
        mine = jax.tree.map(lambda x, i=i: x[i], many)
        chex.assert_trees_all_close(mine, alone(keys[i]), rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal(alone(keys[2]), alone(keys[2]))  # a rerun: bit for bit
    bias = many[2]["params"]["MLP_0"]["Dense_2"]["bias"]
    assert len(np.unique(bias)) == 3  # and the seeds differ


# --- A world with known values ---

# Four states in a row and three actions. Action 0 stays and pays 0.1, action 1 goes right and pays
# nothing, action 2 jumps two to the right and pays -0.2; entering the last state pays 1 and ends. In
# state 0 the data never jump; the behaviour takes action 0 in half of the rows.
COUNTS = np.array([[4, 3, 0], [4, 2, 2], [4, 3, 1]])
GAMMA = 0.8


def world():
    s, a = np.repeat(np.argwhere(COUNTS > 0), COUNTS[COUNTS > 0], 0).T
    to = np.minimum(s + a, 3)
    reward = np.array([0.1, 0.0, -0.2])[a] + (to == 3)
    return s, a, reward, to


def known_value(tau):
    """The fixed point of Eq. (5) and (6): V(s) is the tau-expectile over the data of r + gamma V(s')."""
    s, _, reward, to = world()
    v = np.zeros(4)
    for _ in range(400):
        q = reward + GAMMA * np.where(to == 3, 0, v[to])
        weight = np.where(q < v[s], 1 - tau, tau)
        v = np.bincount(s, weight * q, 4) / np.maximum(np.bincount(s, weight, 4), 1e-9)
    return v[:3]


def test_value_lies_between_sarsas_and_the_best_in_the_data():
    s, a, reward, to = world()
    sarsa, best = np.zeros(4), np.zeros(4)
    for _ in range(400):
        q = reward + GAMMA * np.where(to == 3, 0, sarsa[to])
        sarsa[:3] = (np.bincount(s, q, 3) / np.bincount(s, minlength=3))[:3]
        q = reward + GAMMA * np.where(to == 3, 0, best[to])
        best[:3] = [q[s == i].max() for i in range(3)]
    sarsa, best = sarsa[:3], best[:3]
    assert np.all(best > sarsa + 0.08)
    np.testing.assert_allclose(known_value(0.5), sarsa, atol=1e-6)

    eye = np.eye(4, dtype=np.float32)
    rows = (eye[s], eye[:3][a][:, :3], reward, eye[to], to == 3)
    data = Batch(*(jnp.asarray(x, jnp.float32) for x in rows))
    cfg = iql.Config(
        widths=(32,), batch_size=64, num_updates=10_000, eval_every=2000, lr=3e-3, polyak=0.05,
        gamma=GAMMA, normalize=False, beta=10.0,
    )  # fmt: skip

    def train(tau):
        state = iql.init(KEY, data, cfg)
        state, _ = iql.train_chunk(state, data, KEY, replace(cfg, tau=tau))
        v = state.value.apply_fn(state.value.params, eye[:3])
        return v, iql.act(state, eye[:3])

    taus = np.array([0.5, 0.7, 0.9, 0.99])
    v, action = jax.jit(jax.vmap(train))(jnp.asarray(taus))
    print(v, [known_value(t) for t in taus], sarsa, best, action)
    np.testing.assert_allclose(v[0], sarsa, atol=0.05)
    for tau, value in zip(taus[:3], v, strict=False):
        np.testing.assert_allclose(value, known_value(tau), atol=0.05)
    np.testing.assert_allclose(v[3], best, atol=0.1)
    assert np.all(np.diff(v, axis=0) > 0)  # in order of tau
    assert np.all(v < best + 0.05)  # and nothing beyond the data
