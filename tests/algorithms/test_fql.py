"""FQL: losses and an update in float64, the flow, chunks of actions, a bandit with two modes."""

from dataclasses import replace

import chex
import fql
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import assert_first_adam_step, f64, gradient, random_batch, scramble

from common import datasets, experiment

B, A, H = 12, 2, 2  # rows, action dimensions, steps of a chunk
CFG = fql.Config(
    widths=(6, 6), batch_size=B, log_every=5, lr=1e-3, polyak=0.1, gamma=0.9, alpha=0.7,
    normalize_q=True, smaller_q=False, flow_steps=3, chunk=H, shift_reward=0.0,
)  # fmt: skip
ONE = replace(CFG, chunk=1)
KEY = jax.random.key(0)
FAST = dict(compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time
INIT = jax.jit(fql.init, static_argnums=2, **FAST)
UPDATE = jax.jit(fql.update, static_argnums=3, **FAST)
CRITIC_LOSS = jax.jit(fql.critic_loss, static_argnums=4, **FAST)
ACTOR_LOSS = jax.jit(jax.value_and_grad(fql.actor_loss, has_aux=True), static_argnums=4, **FAST)
FLOW = jax.jit(fql.flow_action, static_argnums=3, **FAST)
ACT = jax.jit(fql.act, static_argnums=5, **FAST)


@pytest.fixture(scope="module")
def batch():
    """Chunks of two steps; the episode ends after the first in a quarter of the rows."""
    rows, rng = random_batch(B, seed=1), np.random.default_rng(5)
    valid = np.ones((B, H), np.float32)
    valid[::4, 1] = 0
    action = jnp.float32(rng.uniform(-1, 1, (B, H, A)))
    return fql.Chunks(rows.obs, action, *rows[2:], jnp.asarray(valid))


@pytest.fixture(scope="module")
def state(batch):
    """Every parameter away from its start, the target away from what it follows."""
    fresh = INIT(KEY, batch, CFG)
    nets = {
        name: getattr(fresh, name).replace(params=scramble(getattr(fresh, name).params, i))
        for i, name in enumerate(("actor", "flow", "critic"))
    }
    return fresh.replace(**nets, target=scramble(fresh.target, 3))


# --- The paper's equations in numpy ---


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def dense(p, x):
    return x @ p["kernel"].T + p["bias"]


def field64(params, *inputs):
    p, x = params["params"], np.concatenate(inputs, -1)
    return dense(p["Dense_2"], gelu(dense(p["Dense_1"], gelu(dense(p["Dense_0"], x)))))


def q64(params, obs, action):
    """Both critics, (2, B): LayerNorm after each activation, none before the last layer."""

    def member(p):
        x = np.concatenate([obs, action], -1)
        for i in range(2):
            x = gelu(dense(p[f"Dense_{i}"], x))
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
            x = x * p[f"LayerNorm_{i}"]["scale"] + p[f"LayerNorm_{i}"]["bias"]
        return dense(p["Dense_2"], x)[:, 0]

    return np.stack([member(jax.tree.map(lambda x, i=i: x[i], params["params"])) for i in range(2)])


def noise(key, size=H * A):
    return np.float64(jax.random.normal(key, (B, size)))


def target64(state, b, key, cfg):
    action = field64(f64(state.actor.params), b.next_obs, noise(key)).clip(-1, 1)
    q = q64(f64(state.target), b.next_obs, action)
    q = q.min(0) if cfg.smaller_q else q.mean(0)
    return b.reward + cfg.gamma**H * np.where(b.done == 1, 0, q)


def critic_loss64(params, b, target):
    q = q64(params, b.obs, b.action.reshape(B, -1))
    return np.mean((q - target) ** 2 * b.valid[:, 1])


def flow_loss64(params, b, key):
    k_noise, k_t = jax.random.split(key)
    z, t = noise(k_noise), np.float64(jax.random.uniform(k_t, (B, 1)))
    action = b.action.reshape(B, -1)
    error = field64(params, b.obs, (1 - t) * z + t * action, t) - (action - z)
    return np.mean(error**2 * np.repeat(b.valid, A, 1))


def euler64(params, obs, z, steps):
    x = z
    for i in range(steps):
        x = x + field64(params, obs, x, np.full((B, 1), i / steps)) / steps
    return x.clip(-1, 1)


def actor_loss64(params, b, z, end, q_params, alpha, scale=None):
    """scale: 1 / mean |Q|, a constant of the gradient. end: the flow's actions."""
    action = field64(params, b.obs, z)
    q = q64(q_params, b.obs, action.clip(-1, 1)).mean(0)
    scale = 1 / np.abs(q).mean() if scale is None else scale
    return alpha * np.mean((action - end) ** 2) - scale * q.mean()


# --- Golden values ---


@pytest.mark.parametrize("smaller_q", [False, True])
def test_critic_loss(state, batch, smaller_q):
    """Chunks cut short do not count, but the mean is over all rows, as in the authors' code."""
    cfg, b = replace(CFG, smaller_q=smaller_q), f64(batch)
    loss, info = CRITIC_LOSS(state.critic.params, state, batch, KEY, cfg)
    expected = critic_loss64(f64(state.critic.params), b, target64(state, b, KEY, cfg))
    np.testing.assert_allclose(loss, expected, rtol=2e-5)
    chex.assert_shape([loss, *info.values()], ())


def test_the_flow_is_eulers(state, batch):
    z = noise(KEY)
    found = FLOW(state, batch.obs, jnp.float32(z), CFG)
    expected = euler64(f64(state.flow.params), f64(batch.obs), z, 3)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_an_update(state, batch):
    """All three against the networks as they were; the target towards the old critics."""
    b, keys = f64(batch), jax.random.split(KEY, 3)
    new, info = UPDATE(state, batch, KEY, CFG)
    chex.assert_shape(list(info.values()), ())
    q = f64(state.critic.params)

    target = target64(state, b, keys[0], CFG)
    grads = gradient(lambda p: critic_loss64(p, b, target), f64(state.critic.params))
    assert_first_adam_step(state.critic, new.critic, grads, CFG.lr)

    v = f64(state.flow.params)
    np.testing.assert_allclose(info["flow_loss"], flow_loss64(v, b, keys[1]), rtol=2e-5)
    grads = gradient(lambda p: flow_loss64(p, b, keys[1]), f64(state.flow.params))
    assert_first_adam_step(state.flow, new.flow, grads, CFG.lr)

    z = noise(keys[2])
    end, pi = euler64(v, b.obs, z, 3), f64(state.actor.params)
    expected = actor_loss64(pi, b, z, end, q, 0.7)
    np.testing.assert_allclose(info["actor_loss"], expected, rtol=2e-5)
    scale = 1 / np.abs(q64(q, b.obs, field64(pi, b.obs, z).clip(-1, 1)).mean(0)).mean()
    grads = gradient(lambda p: actor_loss64(p, b, z, end, q, 0.7, scale), f64(state.actor.params))
    assert_first_adam_step(state.actor, new.actor, grads, CFG.lr)

    expected = jax.tree.map(lambda t, p: 0.9 * t + 0.1 * p, f64(state.target), q)
    chex.assert_trees_all_close(f64(new.target), expected, rtol=1e-6, atol=1e-6)


# --- The flow and the policy ---


def given(state, **nets):
    """A state whose networks are functions of their inputs, with parameters they do not use."""
    learners = {
        name: getattr(state, name).replace(apply_fn=lambda _, *inputs, f=f: f(*inputs))
        for name, f in nets.items()
    }
    return state.replace(**learners)


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_the_true_field_of_a_point_ends_there_from_everywhere(state, batch, steps):
    """(a - x) / (1 - t), in any number of steps."""
    point = jnp.float32([0.3, -0.9, 0.5, 1.0])
    flow = given(state, flow=lambda obs, x, t: (point - x) / (1 - t))
    end = fql.flow_action(
        flow, batch.obs, 3 * jnp.float32(noise(KEY)), replace(CFG, flow_steps=steps)
    )
    np.testing.assert_allclose(end, np.tile(point, (B, 1)), atol=1e-5)


def test_a_constant_q_does_not_move_the_policy(state, batch):
    """The gradient is that of the distance alone, and in proportion to alpha."""
    flat = given(state, critic=lambda obs, action: jnp.full((2, len(obs)), 3.0))
    loss = jax.jit(jax.grad(fql.actor_loss, has_aux=True), static_argnums=4, **FAST)
    slopes = [
        loss(state.actor.params, flat, batch, KEY, replace(CFG, alpha=x))[0] for x in (1.0, 4.0)
    ]
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: 4 * x, slopes[0]), slopes[1], rtol=1e-4, atol=1e-6
    )
    assert max(jnp.abs(x).max() for x in jax.tree.leaves(slopes[0])) > 1e-3
    none, _ = loss(state.actor.params, flat, batch, KEY, replace(CFG, alpha=0.0))
    chex.assert_trees_all_close(none, jax.tree.map(jnp.zeros_like, none), atol=1e-7)


@pytest.mark.parametrize("normalize_q", [True, False])
def test_the_size_of_q_counts_only_undivided(state, batch, normalize_q):
    """Rewards of a thousand times the size: here the critics' last layer."""
    params = jax.tree.map(lambda x: x, state.critic.params)
    params["params"]["Dense_2"] = jax.tree.map(lambda x: 1000 * x, params["params"]["Dense_2"])
    large = state.replace(critic=state.critic.replace(params=params))
    cfg = replace(CFG, normalize_q=normalize_q)
    _, slope = ACTOR_LOSS(state.actor.params, state, batch, KEY, cfg)
    _, other = ACTOR_LOSS(state.actor.params, large, batch, KEY, cfg)
    pairs = zip(jax.tree.leaves(slope), jax.tree.leaves(other), strict=True)
    worst = max(float(jnp.abs(a - b).max()) for a, b in pairs)
    assert worst < 1e-5 if normalize_q else worst > 10


# --- Chunks ---


def episodes(done=(1, 0)):
    """Seven rows in episodes of 4 and 3; all fields count the rows; done: of each end."""
    rows, ends = np.arange(7, dtype=np.float32)[:, None], np.zeros(7, np.float32)
    ends[[3, 6]] = done
    arrays = rows, rows / 10, rows[:, 0], rows + 0.5, ends, np.array([0, 4]), np.array([4, 3])
    return datasets.Dataset("rows", "", *arrays, None, None, {})


def test_chunks_by_hand():
    """Three steps each, gamma 0.5, rewards from 0 to 6, shifted by 1."""
    found = fql.action_chunks(episodes(), replace(CFG, chunk=3, gamma=0.5, shift_reward=1.0))
    assert found.action.shape == (7, 3, 1)
    np.testing.assert_array_equal(
        found.valid, [[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0]]
    )
    whole = [0, 1, 4]
    expected = [i + 1 + (i + 2) / 2 + (i + 3) / 4 for i in whole]
    np.testing.assert_allclose(found.reward[whole], expected)
    np.testing.assert_array_equal(found.next_obs[whole, 0], [2.5, 3.5, 6.5])
    np.testing.assert_array_equal(found.done[whole], [0, 1, 0])
    for i in whole:
        np.testing.assert_allclose(found.action[i, :, 0], np.arange(i, i + 3) / 10, rtol=1e-6)
    assert found.reward.dtype == found.valid.dtype == np.float32


def test_a_chunk_of_one_is_the_data():
    data = episodes()
    found, rows = fql.action_chunks(data, replace(CFG, chunk=1)), data.transitions()
    np.testing.assert_array_equal(found.action[:, 0], rows.action)
    assert (found.valid == 1).all()
    for name in ("obs", "reward", "next_obs", "done"):
        np.testing.assert_array_equal(getattr(found, name), getattr(rows, name))


def test_chunks_longer_than_every_episode_are_refused():
    fql.check(replace(CFG, chunk=4), episodes())
    with pytest.raises(SystemExit, match="--chunk 5: the longest episode of rows has 4 steps"):
        fql.check(replace(CFG, chunk=5), episodes())


def test_a_chunk_is_carried_out_without_looking(state):
    """Its second action comes whatever is seen; then the next chunk is chosen."""
    rng, keys = np.random.default_rng(0), jax.random.split(KEY, 4)
    obs = jnp.float32(rng.normal(size=(4, 3, 3)))  # of four steps and three episodes
    first, carry = ACT(state, None, obs[0], jnp.zeros(3), keys[0], CFG)
    second, carry = ACT(state, carry, obs[1], jnp.zeros(3), keys[1], CFG)
    third, carry = ACT(state, carry, obs[2], jnp.zeros(3), keys[2], CFG)
    z = np.float64(jax.random.normal(keys[0], (3, H * A)))
    expected = field64(f64(state.actor.params), f64(obs[0]), z).clip(-1, 1)
    np.testing.assert_allclose(np.concatenate([first, second], 1), expected, atol=1e-5)
    z = np.float64(jax.random.normal(keys[2], (3, H * A)))
    expected = field64(f64(state.actor.params), f64(obs[2]), z).clip(-1, 1)
    np.testing.assert_allclose(third, expected[:, :A], atol=1e-5)


# --- Values of a dataset ---


@pytest.mark.parametrize(
    ("name", "alpha", "normalize_q", "smaller_q", "gamma", "shift_reward"),
    [
        ("stillwater/hopper/medium-replay-v0", 0.3, True, False, 0.99, 0),
        ("halfcheetah-medium-v2", 0.3, True, False, 0.99, 0),
        ("mine.hdf5", 0.3, True, False, 0.99, 0),
        ("antmaze-umaze-diverse-v2", 10, False, False, 0.99, -1),
        ("antmaze-large-play-v2", 3, False, False, 0.99, -1),
        ("pen-expert-v1", 3e3, False, True, 0.99, 0),
        ("D4RL/pen/human-v2", 1e4, False, True, 0.99, 0),
        ("hammer-cloned-v1", 1e4, False, True, 0.99, 0),
        ("hammer-expert-v1", 3e4, False, True, 0.99, 0),
        ("antmaze-large-navigate-singletask-task2-v0", 10, False, True, 0.99, 0),
        ("antmaze-giant-navigate-singletask-v0", 10, False, True, 0.995, 0),
        ("humanoidmaze-large-navigate-singletask-v0", 30, False, False, 0.995, 0),
        ("cube-single-play-singletask-task1-v0", 300, False, False, 0.99, 0),
        ("puzzle-3x3-play-singletask-v0", 1000, False, False, 0.99, 0),
    ],
)
def test_values_of_a_dataset(name, alpha, normalize_q, smaller_q, gamma, shift_reward):
    """The authors' README; elsewhere the normalised loss."""
    cfg = experiment.resolve(fql.Config(env=name), fql.TUNED)
    found = cfg.alpha, cfg.normalize_q, cfg.smaller_q, cfg.gamma, cfg.shift_reward
    assert found == (alpha, normalize_q, smaller_q, gamma, shift_reward)


# --- A bandit with two modes ---


@pytest.fixture(scope="module")
def bandit():
    """{alpha: (policy's, flow's action)} from 201 noises between -2 and 2, after training on
    actions near -0.5 and 0.5, which earn 0 and 1."""
    rng = np.random.default_rng(0)
    action = rng.choice([-0.5, 0.5], 1000) + 0.05 * rng.normal(size=1000)
    zeros, ones = np.zeros((1000, 1)), np.ones((1000, 1))
    rows = zeros, action[:, None, None], 1.0 * (action > 0), zeros, ones[:, 0], ones
    data = fql.Chunks(*(jnp.asarray(x, jnp.float32) for x in rows))
    cfg = replace(
        ONE, widths=(32, 32), batch_size=64, log_every=800, lr=4e-3, polyak=0.05, flow_steps=5
    )

    def train(alpha):
        own = replace(cfg, alpha=alpha)
        state, _ = fql.train_chunk(fql.init(KEY, data, own), data, KEY, own.log_every, own)
        z, obs = jnp.linspace(-2, 2, 201)[:, None], jnp.zeros((201, 1))
        action = state.actor.apply_fn(state.actor.params, obs, z).clip(-1, 1)
        return action[:, 0], fql.flow_action(state, obs, z, own)[:, 0]

    alphas = 0.1, 1000.0
    found = jax.jit(jax.vmap(train), **FAST)(jnp.array(alphas))
    return dict(zip(alphas, np.stack(found, 1), strict=True))


def test_a_policy_that_follows_the_flow_keeps_both_modes(bandit):
    """Noise of both signs goes to either mode."""
    policy, flow = bandit[1000.0]
    assert np.abs(policy - flow).mean() < 0.1  # of modes 1 apart
    near = np.abs(np.abs(policy) - 0.5) < 0.25
    assert near.mean() > 0.85
    assert 0.3 < (policy > 0).mean() < 0.7


def test_a_policy_that_climbs_q_takes_the_better_mode_and_nothing_between(bandit):
    """From all noise to the actions that earn 1; the flow still has both modes."""
    policy, flow = bandit[0.1]
    assert policy.min() > 0.25
    assert 0.3 < (flow > 0).mean() < 0.7
