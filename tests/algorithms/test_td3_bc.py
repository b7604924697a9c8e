"""TD3+BC: losses and a round in float64, the weight of Q, rounds, a bandit with a known answer."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import td3_bc
from float64 import assert_first_adam_step, f64, gradient, mlp, random_batch, scramble
from soft64 import critics

from common.datasets import Batch

CFG = td3_bc.Config(
    widths=(8, 8), batch_size=16, log_every=6, lr=1e-3, polyak=0.1, gamma=0.9, shift_reward=0.0
)
KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, 2)
B, A = 16, 2
FAST = dict(compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time
INIT = jax.jit(td3_bc.init, static_argnums=2, **FAST)
UPDATE = jax.jit(td3_bc.update, static_argnums=3, **FAST)
CHUNK = jax.jit(td3_bc.train_chunk, static_argnums=4, **FAST)
CRITIC_LOSS = jax.jit(
    jax.value_and_grad(td3_bc.critic_loss, has_aux=True), static_argnums=4, **FAST
)
ACTOR_LOSS = jax.jit(jax.value_and_grad(td3_bc.actor_loss, has_aux=True), static_argnums=3, **FAST)


@pytest.fixture(scope="module")
def batch():
    return random_batch(B, seed=1)


@pytest.fixture(scope="module")
def pair(batch):
    """Two minibatches on axis 0."""
    return jax.tree.map(lambda *x: jnp.stack(x), random_batch(B, seed=2), batch)


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


def target64(state, batch, key, cfg):
    b = f64(batch)
    noise = cfg.policy_noise * np.float64(jax.random.normal(key, (B, A)))
    noise = np.clip(noise, -cfg.noise_clip, cfg.noise_clip)
    action = np.clip(pi64(f64(state.target_actor), b.next_obs) + noise, -1, 1)
    q = critics(f64(state.target), b.next_obs, action).min(0)
    return b.reward + cfg.gamma * np.where(b.done == 1, 0, q)


def critic_loss64(q, b, target):
    return np.mean((critics(q, b.obs, b.action) - target) ** 2, 1).sum()


def actor_loss64(pi, q_params, b, alpha, scale=None):
    """scale: lambda, a constant of the gradient."""
    action = pi64(pi, b.obs)
    q = critics(q_params, b.obs, action)[0]
    scale = alpha / np.abs(q).mean() if scale is None else scale
    return -scale * q.mean() + np.mean((action - b.action) ** 2)


def scale64(state, q_params, b, alpha):
    return alpha / np.abs(critics(q_params, b.obs, pi64(f64(state.actor.params), b.obs))[0]).mean()


# --- Golden values ---


@pytest.mark.parametrize("noise", [0.2, 2.0])
def test_critic_loss(noise, state, batch):
    cfg = replace(CFG, policy_noise=noise)  # the larger one meets both clips
    (loss, info), _ = CRITIC_LOSS(state.critic.params, state, batch, KEY, cfg)
    expected = critic_loss64(f64(state.critic.params), f64(batch), target64(state, batch, KEY, cfg))
    np.testing.assert_allclose(loss, expected, rtol=2e-5)
    chex.assert_shape([loss, *info.values()], ())


def test_actor_loss(state, batch):
    (loss, info), _ = ACTOR_LOSS(state.actor.params, state, batch, CFG)
    expected = actor_loss64(f64(state.actor.params), f64(state.critic.params), f64(batch), 2.5)
    np.testing.assert_allclose(loss, expected, rtol=2e-5)
    chex.assert_shape([loss, *info.values()], ())


def test_a_round_of_one(state, batch):
    """The critics; the policy against the new ones; both targets to the new parameters."""
    cfg, b = replace(CFG, policy_delay=1), f64(batch)
    rows, keys = jax.tree.map(lambda x: x[None], (batch, KEY))
    new, _ = UPDATE(state, rows, keys, cfg)

    target = target64(state, batch, KEY, cfg)
    grads = gradient(lambda q: critic_loss64(q, b, target), f64(state.critic.params))
    assert_first_adam_step(state.critic, new.critic, grads, cfg.lr)

    q, scale = f64(new.critic.params), scale64(state, f64(new.critic.params), b, cfg.alpha)
    grads = gradient(lambda pi: actor_loss64(pi, q, b, 2.5, scale), f64(state.actor.params))
    assert_first_adam_step(state.actor, new.actor, grads, cfg.lr)

    for old, moved, learner in (
        (state.target, new.target, new.critic),
        (state.target_actor, new.target_actor, new.actor),
    ):
        expected = jax.tree.map(lambda t, p: 0.9 * t + 0.1 * p, f64(old), f64(learner.params))
        chex.assert_trees_all_close(f64(moved), expected, rtol=1e-6, atol=1e-6)


# --- Rounds ---


def test_the_critics_learn_twice_then_the_policy_once(state, pair):
    """As two updates of the critics one by one, with one target, and one of all else."""
    new, _ = UPDATE(state, pair, KEYS, CFG)
    critic = state.critic
    for i in range(2):
        row = jax.tree.map(lambda x, i=i: x[i], pair)
        _, slope = CRITIC_LOSS(critic.params, state, row, KEYS[i], CFG)
        critic = critic.apply_gradients(grads=slope)
    _, slope = ACTOR_LOSS(state.actor.params, state.replace(critic=critic), row, CFG)
    actor = state.actor.apply_gradients(grads=slope)
    chex.assert_trees_all_close(new.critic.params, critic.params, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(new.actor.params, actor.params, rtol=1e-5, atol=1e-6)
    moved = jax.tree.map(lambda t, q: 0.9 * t + 0.1 * q, state.target, critic.params)
    chex.assert_trees_all_close(new.target, moved, rtol=1e-5, atol=1e-6)


def test_chunks_of_rounds(fresh):
    """Six updates are six steps of the critics and three of the policy, however they are cut."""
    data, half = random_batch(40, seed=3), replace(CFG, log_every=2)
    whole, _ = CHUNK(fresh, data, KEY, 6, CFG)
    cut = fresh
    for step in (2, 4, 6):
        cut, _ = CHUNK(cut, data, KEY, step, half)
    chex.assert_trees_all_equal(whole, cut)
    assert (int(whole.critic.step), int(whole.actor.step)) == (6, 3)


def test_odd_chunks_are_refused():
    td3_bc.check(CFG, None)
    with pytest.raises(SystemExit, match="--log-every 5: must be a multiple of --policy-delay 2"):
        td3_bc.check(replace(CFG, log_every=5), None)


# --- The target ---


def test_noise_smooths_the_target_policys_action(state, batch):
    """Within the clip of pi_target(s'), within the actions' range, another for every row."""
    pi = state.actor.apply_fn(state.target_actor, batch.next_obs)
    action = td3_bc.smoothed_action(state, batch, KEY, replace(CFG, policy_noise=5.0))
    noise = action - pi
    assert np.abs(action).max() == 1
    assert np.abs(noise).max() < 0.5 + 1e-6
    inside = np.abs(action) < 1
    np.testing.assert_allclose(np.abs(noise[inside]).max(), 0.5, rtol=1e-5)
    assert len(np.unique(td3_bc.smoothed_action(state, batch, KEY, CFG) - pi)) > B


@pytest.mark.parametrize("member", [0, 1])
def test_the_smaller_of_two_targets_counts(member, state, batch):
    """A critic that is raised out of reach leaves the other's loss as its own target."""
    params = f64(state.target)
    params["params"]["MLP_0"]["Dense_2"]["bias"][member] += 100
    raised = state.replace(target=jax.tree.map(jnp.float32, params))
    other = jax.tree.map(lambda x: x[jnp.array([1 - member] * 2)], state.target)
    losses = [
        CRITIC_LOSS(state.critic.params, s, batch, KEY, CFG)[0][0]
        for s in (raised, state.replace(target=other))
    ]
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_terminals_end_the_sum(state, batch):
    """With done = 1 everywhere the loss does not know the target networks."""
    ended = batch._replace(done=jnp.ones(B))
    elsewhere = state.replace(target=scramble(state.target, 9))
    losses = [
        [CRITIC_LOSS(state.critic.params, s, rows, KEY, CFG)[0][0] for s in (state, elsewhere)]
        for rows in (ended, batch)
    ]
    assert losses[0][0] == losses[0][1]
    assert abs(losses[1][0] - losses[1][1]) > 1e-3


# --- The policy ---


def stub(state, batch, action, q):
    """A policy whose actions are its parameters; critics that know only these values."""
    actor = state.actor.replace(apply_fn=lambda params, obs: params, params=action)
    critic = state.critic.replace(apply_fn=lambda params, obs, action: params + 0 * action[:, 0])
    q = jnp.stack([q, jnp.full_like(q, 1e3)])  # the second must not count
    rows = jax.tree.map(lambda x: x[: len(action)], batch)
    return state.replace(actor=actor, critic=critic.replace(params=q)), rows


def test_known_values(state, batch):
    """Q = (2, -4), actions off by (0.5, 0.5): lambda 2.5 / 3, imitation 0.25."""
    learner, rows = stub(state, batch, batch.action[:2] + 0.5, jnp.array([2.0, -4.0]))
    loss, info = td3_bc.actor_loss(learner.actor.params, learner, rows, CFG)
    np.testing.assert_allclose(info["imitation_loss"], 0.25, rtol=1e-5)
    np.testing.assert_allclose(info["q_pi"], -1)
    np.testing.assert_allclose(loss, 0.25 + 2.5 / 3, rtol=1e-5)


def test_the_size_of_q_does_not_count(state, batch):
    """The last layer ten times as large: the same loss and gradient."""
    params = jax.tree.map(lambda x: x, state.critic.params)
    layers = params["params"]["MLP_0"]
    layers["Dense_2"] = jax.tree.map(lambda x: 10 * x, layers["Dense_2"])
    large = state.replace(critic=state.critic.replace(params=params))
    (loss, info), slope = ACTOR_LOSS(state.actor.params, state, batch, CFG)
    (other, other_info), other_slope = ACTOR_LOSS(state.actor.params, large, batch, CFG)
    np.testing.assert_allclose(other_info["q_pi"], 10 * info["q_pi"], rtol=1e-5)
    np.testing.assert_allclose(other, loss, rtol=1e-5)
    chex.assert_trees_all_close(other_slope, slope, rtol=1e-4, atol=1e-6)


def test_alpha_zero_is_imitation(state, batch):
    def imitation(params):
        return jnp.mean((state.actor.apply_fn(params, batch.obs) - batch.action) ** 2)

    _, slope = ACTOR_LOSS(state.actor.params, state, batch, replace(CFG, alpha=0.0))
    chex.assert_trees_all_close(slope, jax.grad(imitation)(state.actor.params), atol=1e-6)


def test_acting_is_the_policy_on_normalised_observations(batch):
    data = batch._replace(obs=5 + 3 * batch.obs)
    state = INIT(KEY, data, CFG)
    obs = (f64(data.obs) - f64(data.obs).mean(0)) / (f64(data.obs).std(0) + 1e-3)
    expected = pi64(f64(state.actor.params), obs)
    np.testing.assert_allclose(td3_bc.act(state, data.obs), expected, rtol=1e-4, atol=1e-5)


# --- A bandit with a known answer ---


def test_the_policy_goes_where_q_and_imitation_balance():
    """Actions around 0 pay c (2 + a): alpha / (2 + a) = 2 a, whatever c; alpha = 0 stays at 0."""
    rng = np.random.default_rng(0)
    action = rng.uniform(-0.6, 0.6, (1000, 1))
    obs, done = np.ones((1000, 1)), np.ones(1000)
    rows = Batch(obs, action - action.mean(), 2 + action[:, 0] - action.mean(), obs, done)
    data = Batch(*(jnp.asarray(x, jnp.float32) for x in rows))
    cfg = replace(CFG, widths=(16,), batch_size=128, log_every=1500, lr=3e-3, normalize=False)
    start = INIT(KEY, data, cfg)

    def train(alpha, scale):
        scaled, own = data._replace(reward=scale * data.reward), replace(cfg, alpha=alpha)
        state = td3_bc.train_chunk(start, scaled, KEY, cfg.log_every, own)[0]
        return td3_bc.act(state, jnp.ones(1))[0]

    train = jax.jit(jax.vmap(train), **FAST)
    found = train(jnp.array([0.0, 1.0, 1.0]), jnp.array([1.0, 1.0, 5.0]))
    best = -1 + np.sqrt(1.5)
    np.testing.assert_allclose(found, [0, best, best], atol=0.03)
