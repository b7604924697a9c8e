"""AWR: returns, weights and an iteration in float64, chunks of iterations, a bandit."""

from dataclasses import replace
from functools import partial

import awr
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import f64, gradient, mlp, random_batch, scramble

from common import datasets, experiment
from common.datasets import Batch

CFG = awr.Config(
    widths=(8, 8), batch_size=16, gamma=0.8, lam=0.7, actor_lr=0.02, critic_lr=0.3, std=0.5,
    max_weight=3.0, critic_steps=2, actor_steps=3, log_every=6, num_updates=12,
)  # fmt: skip
KEY = jax.random.key(0)
A = 2
LENGTHS, DONE = [5, 1, 7, 4, 3], [1, 0, 0, 1, 1]  # of the episodes; which end at a terminal
INIT = jax.jit(awr.init, static_argnums=2)  # compiled once for the tests that need a fresh state
LABEL = jax.jit(awr.label, static_argnums=2)
UPDATE = jax.jit(partial(awr.update, cfg=CFG))


def episodes(lengths, done, **columns):
    """Episodes of these lengths; `done` says of each whether it ends at a terminal."""
    rows, last = random_batch(sum(lengths)), np.cumsum(lengths) - 1
    flags = np.zeros(sum(lengths), np.float32)
    flags[last] = done
    return awr.Episodes(rows._replace(done=flags, **columns), last)


@pytest.fixture(scope="module")
def data():
    data = episodes(LENGTHS, DONE)
    wild = 1.5 * data.rows.action  # a few means will lie beyond 1
    return data._replace(rows=data.rows._replace(obs=5 + 3 * data.rows.obs, action=wild))


@pytest.fixture(scope="module")
def fresh(data):
    return INIT(KEY, data.rows, CFG)


@pytest.fixture(scope="module")
def state(fresh):
    nets = {"actor": fresh.actor, "value": fresh.value}
    return fresh.replace(
        **{k: v.replace(params=scramble(v.params, i)) for i, (k, v) in enumerate(nets.items())}
    )


# --- The paper's equations in numpy ---


def normalise64(data, obs):
    mean, std = np.mean(f64(data.rows.obs), 0), np.std(f64(data.rows.obs), 0)
    return (f64(obs) - mean) / (std + 1e-3)


def value64(params, obs):
    """What the network gives, (1 - gamma) V."""
    return mlp(params["params"]["MLP_0"], obs)[..., 0]


def returns64(reward, v, v_next, lam, gamma):
    """TD(lambda) returns of one episode; v (T,) of its states, v_next of the state after it."""
    v, returns = [*v, v_next], [v_next]
    for t in reversed(range(len(reward))):
        mixed = (1 - lam) * v[t + 1] + lam * returns[0]
        returns.insert(0, reward[t] + gamma * mixed)
    return returns[:-1]


def label64(params, data, cfg):
    """Returns and weights of all rows, episode by episode."""
    v = value64(params, normalise64(data, data.rows.obs)) / (1 - cfg.gamma)
    after = value64(params, normalise64(data, data.rows.next_obs)) / (1 - cfg.gamma)
    reward, done, returns, first = f64(data.rows.reward), f64(data.rows.done), [], 0
    for last in np.asarray(data.last):
        rows = slice(first, last + 1)
        v_next = 0.0 if done[last] else after[last]
        returns += returns64(reward[rows], v[rows], v_next, cfg.lam, cfg.gamma)
        first = last + 1
    gap = np.array(returns) - v
    gap = (gap - gap.mean()) / (gap.std() + 1e-5) if cfg.standardize else gap
    return np.array(returns), np.minimum(np.exp(gap / cfg.temperature), cfg.max_weight)


def value_loss64(params, obs, returns, cfg):
    return 0.5 * np.mean((value64(params, obs) - (1 - cfg.gamma) * returns) ** 2)


def actor_loss64(params, obs, action, weight, cfg):
    mean = mlp(params["params"]["MLP_0"], obs)
    log_prob = -0.5 * ((action - mean) / cfg.std) ** 2 - np.log(cfg.std * np.sqrt(2 * np.pi))
    above, below = np.maximum(mean - 1, 0), np.minimum(mean + 1, 0)
    penalty = 0.5 * np.mean(np.sum(above**2 + below**2, -1))
    return -np.mean(weight * log_prob.sum(-1)) + cfg.bound_weight * penalty


# --- Returns ---


@jax.jit
def returns_of_three(lam, done, v_end):
    """Of an episode of three rows that pay 1 each; V = 0 but for the state after the last."""
    rows = random_batch(3)._replace(reward=jnp.ones(3), done=jnp.array([0, 0, done]))
    data, cfg = awr.Episodes(rows, jnp.array([2])), replace(CFG, lam=lam, gamma=0.5)
    return awr.lambda_returns(jnp.zeros(3), jnp.array([v_end]), data, cfg)


@pytest.mark.parametrize(
    ("lam", "done", "v_end", "expected"),
    [
        (1.0, 1, 8.0, [1.75, 1.5, 1.0]),  # Monte Carlo; a terminal has no future
        (0.0, 1, 8.0, [1.0, 1.0, 1.0]),  # one step, V = 0
        (1.0, 0, 8.0, [2.75, 3.5, 5.0]),  # a time limit has: 1 + 8 / 2
        (0.0, 0, 8.0, [1.0, 1.0, 5.0]),
        (0.5, 1, 8.0, [1.3125, 1.25, 1.0]),
    ],
)
def test_returns_by_hand(lam, done, v_end, expected):
    np.testing.assert_allclose(returns_of_three(lam, done, v_end), expected, rtol=1e-6)
    oracle = returns64([1, 1, 1], [0, 0, 0], v_end * (1 - done), lam, 0.5)
    np.testing.assert_allclose(oracle, expected, rtol=1e-6)


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_labels_are_the_papers(lam, state, data):
    """Of five episodes, one of a single row, ended by terminals and by time limits."""
    cfg = replace(CFG, lam=lam)
    for found, expected in zip(
        LABEL(state, data, cfg), label64(f64(state.value.params), data, cfg), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_monte_carlo_returns_are_those_of_the_dataset(state):
    """Where all episodes end at terminals; `Dataset.steps` counts them by itself."""
    data = episodes(LENGTHS, [1] * 5)
    start = np.cumsum(LENGTHS) - LENGTHS
    arrays = [np.asarray(x) for x in data.rows]
    whole = datasets.Dataset("mine", "", *arrays, start, np.array(LENGTHS), None, None, {})
    found, _ = LABEL(state, data, replace(CFG, lam=1.0))
    np.testing.assert_allclose(found, whole.steps(CFG.gamma).returns_to_go, rtol=1e-5, atol=1e-6)


def test_an_episode_is_labelled_by_itself(state, data):
    """Another reward in the third episode changes no return of the others, and none after it."""
    before, _ = LABEL(state, data, CFG)
    rows = data.rows._replace(reward=data.rows.reward.at[9].add(1.0))
    after, _ = LABEL(state, data._replace(rows=rows), CFG)
    reach = (CFG.gamma * CFG.lam) ** np.arange(3, -1, -1)  # rows 6 to 9 are the episode's first
    np.testing.assert_allclose((after - before)[6:10], reach, rtol=1e-4)
    np.testing.assert_array_equal(np.delete(after - before, range(6, 10)), 0)


# --- Weights ---


@partial(jax.jit, static_argnums=3)
def weights32(advantages, state, temperature, standardize):
    data = episodes([1] * 32, [1] * 32, reward=advantages)
    zero = state.value.replace(params=jax.tree.map(jnp.zeros_like, state.value.params))
    cfg = replace(CFG, max_weight=20.0, temperature=temperature, standardize=standardize)
    return awr.label(state.replace(value=zero), data, cfg)[1]


def weights(advantages, state, temperature=1.0, standardize=True):
    """Weights of rows with these advantages: V = 0, and each row is an episode by itself."""
    n = len(advantages)  # a divisor of 32: as many copies change neither mean nor deviation
    many = jnp.tile(jnp.float32(advantages), 32 // n)
    return weights32(many, state, temperature, standardize)[:n]


def test_weights_by_hand(state):
    np.testing.assert_allclose(weights([-1.0, 1.0], state), [0.3679, 2.7183], rtol=2e-4)
    halved = weights([-1.0, 1.0], state, temperature=2.0)
    np.testing.assert_allclose(halved, np.exp([-0.5, 0.5]), rtol=1e-4)
    raw = weights([0.0, 0.02], state, standardize=False, temperature=0.05)
    np.testing.assert_allclose(raw, [1, np.exp(0.4)], rtol=1e-5)


def test_the_exponential_is_clipped_at_20(state):
    """ln 20 = 2.9957; what overflows is clipped, too."""
    found = weights([2.99, 3.0, 1000.0, 0.0], state, standardize=False)
    np.testing.assert_allclose(found, [np.exp(2.99), 20, 20, 1], rtol=1e-5)


@pytest.mark.parametrize("standardize", [True, False])
def test_standardised_weights_know_no_scale_of_rewards(standardize, state):
    rewards = np.random.default_rng(0).normal(size=32)
    one, other = (weights(x, state, standardize=standardize) for x in (rewards, 100 + 7 * rewards))
    assert np.allclose(one, other, rtol=1e-3) == standardize


def test_of_equal_advantages_all_weigh_1(state):
    """It is behaviour cloning then; without the small number in the divisor, it is nan."""
    np.testing.assert_array_equal(weights([3.0] * 4, state), 1)


# --- Losses ---


def test_losses_are_the_papers(state, data):
    obs, action = normalise64(data, data.rows.obs), f64(data.rows.action)
    returns, weight = label64(f64(state.value.params), data, CFG)
    found = jax.jit(awr.value_loss, static_argnums=4)
    loss, info = found(state.value.params, state, jnp.float32(obs), jnp.float32(returns), CFG)
    expected = value_loss64(f64(state.value.params), obs, returns, CFG)
    np.testing.assert_allclose(loss, expected, rtol=2e-5)
    v = value64(f64(state.value.params), obs).mean() / (1 - CFG.gamma)
    np.testing.assert_allclose(info["v_data"], v, rtol=2e-5)
    found, inputs = jax.jit(awr.actor_loss, static_argnums=5), (obs, action, weight)
    loss, info = found(state.actor.params, state, *map(jnp.float32, inputs), CFG)
    expected = actor_loss64(f64(state.actor.params), obs, action, weight, CFG)
    np.testing.assert_allclose(loss, expected, rtol=2e-5)
    np.testing.assert_allclose(info["weight"], weight.mean(), rtol=2e-5)


def test_golden_values_see_every_part(state, data):
    """Weights on both sides of the clip, mean actions on both sides of both bounds."""
    weight = label64(f64(state.value.params), data, CFG)[1]
    assert 0 < np.sum(weight == CFG.max_weight) < len(weight)
    mean = mlp(f64(state.actor.params)["params"]["MLP_0"], normalise64(data, data.rows.obs))
    assert np.any(mean > 1) and np.any(mean < -1) and np.mean(np.abs(mean) < 1) > 0.2


def test_the_penalty_is_summed_over_dimensions(state):
    """A mean of 1.5 in one of two dimensions: 10 x 0.5 x 0.5^2; within the bounds nothing."""
    obs, action = jnp.zeros((4, 3)), jnp.zeros((4, A))
    params = jax.tree.map(jnp.zeros_like, state.actor.params)

    def loss(mean):
        params["params"]["MLP_0"]["Dense_2"]["bias"] = mean
        return awr.actor_loss(params, state, obs, action, jnp.zeros(4), CFG)[0]

    means = jnp.array([[1.5, 0.9], [-1.5, -1.0], [1.0, -0.9], [0.0, 0.0]])
    np.testing.assert_allclose(jax.jit(jax.vmap(loss))(means), [1.25, 1.25, 0, 0], rtol=1e-6)


def test_the_policys_std_is_fixed(state, data):
    pi = state.actor.apply_fn(state.actor.params, data.rows.obs)
    np.testing.assert_array_equal(pi.stddev(), np.full((sum(LENGTHS), A), 0.5, np.float32))
    assert list(state.actor.params["params"]) == ["MLP_0"]


# --- An iteration ---


def regress64(loss, params, data, key, steps, lr, momentum):
    """SGD with momentum in float64, on the rows that the key draws."""
    speed = jax.tree.map(np.zeros_like, params)
    for k in jax.random.split(key, steps):
        rows = np.asarray(jax.random.randint(k, (CFG.batch_size,), 0, len(data[0])))
        grads = gradient(lambda p, rows=rows: loss(p, *(x[rows] for x in data), CFG), params)
        speed = jax.tree.map(lambda v, g: momentum * v + g, speed, grads)
        params = jax.tree.map(lambda p, v: p - lr * v, params, speed)
    return params


def test_one_iteration_is_the_papers(state, data):
    """Returns under the old V, which stand still as V learns them; weights under the new one."""
    new, info = UPDATE(state, data, KEY)
    k_value, k_actor = jax.random.split(KEY)
    obs, action = normalise64(data, data.rows.obs), f64(data.rows.action)
    old, pi = f64(state.value.params), f64(state.actor.params)

    rows = obs, label64(old, data, CFG)[0]
    value = regress64(value_loss64, f64(old), rows, k_value, 2, CFG.critic_lr, CFG.momentum)
    chex.assert_trees_all_close(f64(new.value.params), value, rtol=1e-4, atol=1e-5)

    rows = obs, action, label64(value, data, CFG)[1]
    actor = regress64(actor_loss64, f64(pi), rows, k_actor, 3, CFG.actor_lr, CFG.momentum)
    chex.assert_trees_all_close(f64(new.actor.params), actor, rtol=1e-4, atol=1e-5)

    rows = obs, action, label64(old, data, CFG)[1]  # else the line above could not tell
    wrong = regress64(actor_loss64, f64(pi), rows, k_actor, 3, CFG.actor_lr, CFG.momentum)
    apart = jax.tree.map(lambda x, y: np.abs(x - y).max(), wrong, actor)
    assert max(jax.tree.leaves(apart)) > 1e-3
    chex.assert_trees_all_equal((new.obs_mean, new.obs_std), (state.obs_mean, state.obs_std))
    assert (int(new.value.step), int(new.actor.step)) == (2, 3)
    assert all(np.isfinite(x) for x in info.values())


def test_a_chunk_of_many_seeds_is_the_iterations_of_each(data):
    """Two iterations of three seeds under vmap, and each iteration of each seed alone, by the key
    of its last update: neither the seeds nor how a run is cut into chunks changes a number."""
    keys = jax.vmap(jax.random.key)(jnp.arange(3))
    start = [INIT(key, data.rows, CFG) for key in keys]
    many = jax.vmap(partial(awr.train_chunk, cfg=CFG), (0, None, 0, None))
    many, metrics = jax.jit(many)(jax.tree.map(lambda *x: jnp.stack(x), *start), data, keys, 12)
    for i in range(3):
        alone, infos = start[i], []
        for t in (9, 12):
            alone, info = UPDATE(alone, data, jax.random.fold_in(keys[i], t))
            infos.append(info)
        mine = jax.tree.map(lambda x, i=i: x[i], (many.actor.params, many.value.params, metrics))
        means = jax.tree.map(lambda *x: np.mean(x), *infos)
        other = alone.actor.params, alone.value.params, means
        chex.assert_trees_all_close(mine, other, rtol=1e-4, atol=1e-5)
    bias = many.value.params["params"]["MLP_0"]["Dense_2"]["bias"][:, 0]
    assert len(np.unique(bias)) == 3


# --- The rest of the file ---


def test_shapes_and_statistics(fresh, data):
    chex.assert_shape(jax.eval_shape(awr.act, fresh, data.rows.obs), (sum(LENGTHS), A))
    chex.assert_shape(jax.eval_shape(awr.act, fresh, data.rows.obs[0]), (A,))
    np.testing.assert_allclose(
        awr.normalise(fresh, data.rows.obs), normalise64(data, data.rows.obs), rtol=1e-4, atol=1e-5
    )
    obs, index = awr.minibatch(fresh, (data.rows.obs, jnp.arange(20)), jnp.array([3, 3, 8]))
    np.testing.assert_allclose(obs, normalise64(data, data.rows.obs)[[3, 3, 8]], rtol=1e-4)
    np.testing.assert_array_equal(index, [3, 3, 8])


def test_actions_are_clipped_only_when_acting(state, data):
    mean = mlp(f64(state.actor.params)["params"]["MLP_0"], normalise64(data, data.rows.obs))
    found = jax.jit(awr.act)(state, data.rows.obs)
    np.testing.assert_allclose(found, mean.clip(-1, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("env", "actor_lr", "std"),
    [
        ("halfcheetah-medium-v2", 5e-5, 0.4),
        ("hopper-medium-replay-v2", 1e-4, 0.4),
        ("walker2d-expert-v2", 2.5e-5, 0.4),
        ("mujoco/humanoid/medium-v0", 1e-5, 0.4),
        ("mujoco/ant/medium-v0", 5e-5, 0.2),
    ],
)
def test_values_of_the_authors(env, actor_lr, std):
    cfg = experiment.resolve(awr.Config(env=env), awr.TUNED)
    assert (cfg.actor_lr, cfg.std) == (actor_lr, std)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(log_every=4), "--log-every 4: must be a multiple of --actor-steps 3"),
        (dict(gamma=1.0), "--gamma 1: must be below 1"),
    ],
)
def test_what_cannot_be_trained_is_refused(flags, message):
    awr.check(CFG, None)
    with pytest.raises(SystemExit, match=message):
        awr.check(replace(CFG, **flags), None)


# --- A bandit with a known answer ---


def test_in_a_bandit_the_policy_is_the_weighted_mean():
    """In 30 % of the rows the action is 0.6 s and pays 1, else it is -0.6 s and pays nothing.

    V is 0.3, whatever s; an advantage is 0.7 or -0.3, of standard deviation 0.458.
    """
    side = np.where(np.arange(400) % 2, 1.0, -1.0)
    good = np.arange(400) // 2 % 10 < 3
    action = np.where(good, 0.6, -0.6) * side
    columns = side[:, None], action[:, None], good, 0 * side[:, None], np.ones(400)
    data = awr.Episodes(Batch(*(jnp.float32(x) for x in columns)), jnp.arange(400))
    cfg = awr.Config(
        widths=(16,), batch_size=256, gamma=0.9, std=0.4, actor_lr=2e-3, critic_lr=0.1,
        critic_steps=200, actor_steps=300, log_every=300,
    )  # fmt: skip
    start = INIT(KEY, data.rows, cfg)

    def train(temperature):
        return awr.train_chunk(start, data, KEY, 300, replace(cfg, temperature=temperature))[0]

    temperatures = np.array([1e6, 1.0, 0.5])
    states = jax.jit(jax.vmap(train))(jnp.float32(temperatures))
    gap = np.array([0.7, -0.3]) / np.sqrt(0.21)
    weight = np.exp(gap / temperatures[:, None]).clip(max=20) * [0.3, 0.7]
    known = 0.6 * (weight[:, 0] - weight[:, 1]) / weight.sum(1)
    sides = jnp.array([[-1.0], [1.0]])
    towards = jax.vmap(awr.act, (0, None))(states, sides)[..., 0] * sides[:, 0]
    np.testing.assert_allclose(towards, np.stack([known, known], 1), atol=0.05)
    np.testing.assert_allclose(known, [-0.24, 0.35, 0.56], atol=0.01)  # the first is imitation
