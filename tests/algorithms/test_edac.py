"""EDAC: losses and an update in float64, known similarities, SAC with two critics, pessimism."""

from dataclasses import replace
from types import SimpleNamespace

import chex
import edac
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sac
import soft64
from float64 import assert_first_adam_step, f64, gradient, random_batch, scramble

from common import experiment
from common.datasets import Batch

CFG = edac.Config(
    widths=(8, 8), batch_size=16, actor_lr=1e-3, critic_lr=2e-3, polyak=0.1, gamma=0.9,
    num_critics=3, eta=1.5,
)  # fmt: skip
KEY = jax.random.key(0)
B, A, N = 16, 2, 3
NETS = ("actor", "critic", "temperature")
FAST = dict(compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time
INIT = jax.jit(edac.init, static_argnums=2, **FAST)
BACKUP = jax.jit(edac.soft_backup, static_argnums=3, **FAST)
UPDATE = jax.jit(edac.update, static_argnums=3, **FAST)
SIMILARITY = jax.jit(jax.value_and_grad(edac.ensemble_similarity), static_argnums=2, **FAST)


@pytest.fixture(scope="module")
def batch():
    return random_batch(B, seed=1)


@pytest.fixture(scope="module")
def fresh(batch):
    return INIT(KEY, batch, CFG)


@pytest.fixture(scope="module")
def state(fresh):
    """Every parameter away from its start, the target away from the critics."""
    scales = dict(zip(NETS, (0.1, 0.4, 0.4), strict=True))  # tanh(u) short of 1
    nets = {
        k: getattr(fresh, k).replace(params=scramble(getattr(fresh, k).params, i, scales[k]))
        for i, k in enumerate(NETS)
    }
    return fresh.replace(target=scramble(fresh.target, 7), **nets)


def params64(state):
    nets = {k: f64(getattr(state, k).params) for k in NETS}
    return SimpleNamespace(target=f64(state.target), **nets)


# --- The paper's equations in numpy ---


def slope64(layers, obs, action):
    """The gradient of one member with respect to the action, (B, A), by the chain rule."""
    x, open_units = np.concatenate([obs, action], -1), []
    for i in range(2):
        u = x @ layers[f"Dense_{i}"]["kernel"].T + layers[f"Dense_{i}"]["bias"]
        open_units.append(u > 0)
        x = np.maximum(u, 0)
    slope = np.broadcast_to(layers["Dense_2"]["kernel"], x.shape)
    for i in (1, 0):
        slope = (slope * open_units[i]) @ layers[f"Dense_{i}"]["kernel"]
    return slope[:, obs.shape[-1] :]


def similarity64(q, b):
    """The cosines pair by pair."""
    members = [jax.tree.map(lambda x, i=i: x[i], q["params"]["MLP_0"]) for i in range(N)]
    slopes = [slope64(layers, b.obs, b.action) for layers in members]
    unit = [g / np.linalg.norm(g, axis=-1, keepdims=True) for g in slopes]
    pairs = [(unit[i] * unit[j]).sum(-1) for i in range(N) for j in range(N) if i != j]
    return np.mean(sum(pairs)) / (N - 1)


def critic_loss64(q, b, target, eta):
    td = np.mean((soft64.critics(q, b.obs, b.action) - target) ** 2, 1).sum()
    return td + eta * similarity64(q, b)


# --- Golden values ---


@pytest.mark.parametrize("eta", [1.5, 0.0])
def test_critic_loss(eta, state, batch):
    cfg, p, b = replace(CFG, eta=eta), params64(state), f64(batch)
    critic_loss = jax.jit(edac.critic_loss, static_argnums=4, **FAST)
    loss, info = critic_loss(state.critic.params, state, batch, KEY, cfg)
    target = soft64.backup(p, b, jax.random.split(KEY)[0], cfg.gamma)
    np.testing.assert_allclose(loss, critic_loss64(p.critic, b, target, eta), rtol=2e-5)
    if eta:
        np.testing.assert_allclose(info["similarity"], similarity64(p.critic, b), rtol=2e-5)
    chex.assert_shape([loss, *map(jnp.asarray, info.values())], ())


def test_one_update(state, batch):
    """All learn against the others as they were; then the target moves once, to the new critics."""
    p, b = params64(state), f64(batch)
    new, _ = UPDATE(state, batch, KEY, CFG)
    k_actor, k_critic = jax.random.split(KEY)

    grads = gradient(lambda x: soft64.actor_loss(x, p, b, k_actor), p.actor)
    assert_first_adam_step(state.actor, new.actor, grads, CFG.actor_lr)

    entropy = -soft64.sample(p.actor, b.obs, k_actor)[1].mean()
    grads = {"params": {"log": np.array(entropy + A)}}  # the target entropy is -A
    assert_first_adam_step(state.temperature, new.temperature, grads, CFG.actor_lr)

    target = soft64.backup(p, b, jax.random.split(k_critic)[0], CFG.gamma)
    grads = gradient(lambda x: critic_loss64(x, b, target, CFG.eta), p.critic)
    assert_first_adam_step(state.critic, new.critic, grads, CFG.critic_lr)

    expected = jax.tree.map(lambda t, q: 0.9 * t + 0.1 * q, p.target, f64(new.critic.params))
    chex.assert_trees_all_close(f64(new.target), expected, rtol=1e-6, atol=1e-6)


# --- The similarity of the ensemble ---


@pytest.mark.parametrize(
    ("slopes", "expected"),
    [
        ([(1, 2), (2, 4)], 2),  # parallel: N
        ([(1, 2), (-3, -6)], -2),
        ([(1, 0), (0, 5)], 0),
        ([(1, 2)] * 3, 3),
        ([(1, 0), (0, 2), (1, 1)], np.sqrt(2)),
    ],
)
def test_known_similarities(slopes, expected, batch):
    """Linear critics, whose gradients are their weights."""
    obs_dim = batch.obs.shape[-1]
    kernel = [[[0.3] * obs_dim + list(slope)] for slope in slopes]
    dense = {"kernel": jnp.float32(kernel), "bias": jnp.zeros((len(slopes), 1))}
    params = {"params": {"MLP_0": {"Dense_0": dense}}}
    cfg = replace(CFG, widths=(), num_critics=len(slopes))
    found = edac.ensemble_similarity(params, batch, cfg)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_step_lowers_the_similarity(state, batch):
    before, grads = SIMILARITY(state.critic.params, batch, CFG)
    params = jax.tree.map(lambda p, g: p - 1e-2 * g, state.critic.params, grads)
    assert SIMILARITY(params, batch, CFG)[0] < before - 1e-4


# --- The target ---


def test_each_further_critic_lowers_the_target_or_leaves_it(state, batch):
    """In each row the smallest of the members counts, of all of them."""
    rows = batch._replace(done=jnp.zeros(B))
    params = f64(state.target)
    level = soft64.critics(params, f64(batch.next_obs), f64(batch.action)).mean(1)
    params["params"]["MLP_0"]["Dense_2"]["bias"] -= level[:, None]  # no member is always smallest
    params = jax.tree.map(jnp.float32, params)
    targets = [
        np.asarray(BACKUP(state.replace(target=first), rows, KEY, CFG))
        for first in (jax.tree.map(lambda x, n=n: x[:n], params) for n in (1, 2, 3))
    ]
    falls = np.diff(targets, axis=0)
    assert np.all(falls <= 0)
    assert np.all((falls < 0).any(1)) and np.all((falls == 0).any(1))


def test_terminals_end_the_sum(state, batch):
    target = BACKUP(state, batch._replace(done=jnp.ones(B)), KEY, CFG)
    np.testing.assert_array_equal(target, batch.reward)


def test_two_critics_without_similarity_are_sac(batch):
    """The same start, keys and batches: the same networks after three updates."""
    cfg = replace(CFG, num_critics=2, eta=0.0)
    shared = ("widths", "batch_size", "gamma", "actor_lr", "critic_lr", "polyak")
    theirs = sac.Config(**{name: getattr(cfg, name) for name in shared})
    step = jax.jit(sac.update, static_argnums=3, **FAST)
    mine = other = INIT(KEY, batch, cfg)

    def learned(state):
        return [getattr(state, name).params for name in NETS], state.target

    for i in range(3):
        key = jax.random.key(i)
        mine, other = UPDATE(mine, batch, key, cfg)[0], step(other, batch, key, theirs)[0]
    chex.assert_trees_all_close(learned(mine), learned(other), rtol=1e-5, atol=1e-6)


# --- Settings ---


@pytest.mark.parametrize(
    ("name", "num_critics", "eta"),
    [
        ("halfcheetah-medium-v2", 10, 1),
        ("halfcheetah-medium-expert-v2", 10, 5),
        ("stillwater/hopper/medium-expert-v0", 50, 1),
        ("walker2d-medium-expert-v2", 10, 5),
        ("pen-human-v1", 20, 1000),
        ("pen-cloned-v1", 20, 10),
        ("maze2d-large-v1", 10, 0.1),
    ],
)
def test_values_of_a_dataset(name, num_critics, eta):
    cfg = experiment.resolve(edac.Config(env=name), edac.TUNED)
    assert (cfg.num_critics, cfg.eta) == (num_critics, eta)


def test_one_critic_has_none_to_differ_from():
    edac.check(CFG, None)
    edac.check(replace(CFG, num_critics=1, eta=0.0), None)
    with pytest.raises(SystemExit, match="--num-critics 1: must be at least 2, or --eta 0"):
        edac.check(replace(CFG, num_critics=1), None)


# --- A bandit with an action that the data never tries ---


@pytest.fixture(scope="module")
def spread():
    """eta: the smallest Q at second actions -1, 0 and 1, first action 0; data has (x, 0) alone."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, 1000)
    obs, done = np.ones((1000, 1)), np.ones(1000)
    rows = Batch(obs, np.stack([x, 0 * x], 1), x, obs, done)
    data = Batch(*(jnp.asarray(x, jnp.float32) for x in rows))
    found = {}
    for eta in (0.0, 1.0):
        cfg = replace(CFG, widths=(16,), batch_size=64, log_every=600, critic_lr=3e-3,
                      num_critics=6, eta=eta)  # fmt: skip
        start = INIT(jax.random.key(1), data, cfg)
        train = jax.jit(edac.train_chunk, static_argnums=4, **FAST)
        state = train(start, data, KEY, cfg.log_every, cfg)[0]
        action = jnp.float32([[0, -1], [0, 0], [0, 1]])
        q = state.critic.apply_fn(state.critic.params, jnp.ones((3, 1)), action)
        found[eta] = np.asarray(q.min(0))
    return found


def test_diverse_critics_are_pessimistic_where_the_data_is_silent(spread):
    """On both sides of the data, more than critics left alone; at the data they are right."""
    for q in spread.values():
        np.testing.assert_allclose(q[1], 0, atol=0.1)
    fall = {eta: q[1] - q[[0, 2]] for eta, q in spread.items()}
    assert np.all(fall[1.0] > 1.5) and np.all(fall[0.0] < 1)
