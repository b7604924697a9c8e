"""BCQ: losses and an update in float64, the order of mixing and maximum, support of the data."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import bcq
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import assert_first_adam_step, f64, gradient, mlp, random_batch, scramble, shifted

from common.datasets import Batch

CFG = bcq.Config(
    widths=(8, 8), vae_widths=(8,), batch_size=12, log_every=20, lr=1e-2, polyak=0.1, gamma=0.9,
    normalize=True, phi=0.3, num_samples=5, eval_samples=30,
)  # fmt: skip
KEY = jax.random.key(0)
K_VAE, K_CRITIC, K_ACTOR = jax.random.split(KEY, 3)  # those of an update
B, A = 12, 2
NETS = ("vae", "actor", "critic")
JIT = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles sooner
INIT = JIT(bcq.init, static_argnums=2)


@pytest.fixture(scope="module")
def data():
    return shifted(100)


@pytest.fixture(scope="module")
def batch():
    return random_batch(B, seed=1)


@pytest.fixture(scope="module")
def state(data):
    """All networks away from their start, the targets away from the networks."""
    fresh = INIT(KEY, data, CFG)
    nets = {k: getattr(fresh, k) for k in NETS}
    nets = {k: v.replace(params=scramble(v.params, i)) for i, (k, v) in enumerate(nets.items())}
    last = nets["critic"].params["params"]["MLP_0"]["Dense_2"]
    last["bias"] = jnp.array([[0.0], [-1.1]])  # now either critic is the smaller one somewhere
    targets = {k: scramble(getattr(fresh, k), 7) for k in ("target", "target_actor")}
    return fresh.replace(**targets, **nets)


def params64(state):
    nets = {k: f64(getattr(state, k).params) for k in NETS}
    return SimpleNamespace(target=f64(state.target), target_actor=f64(state.target_actor), **nets)


# --- The equations in numpy ---


def q64(params, obs, action):  # (2, ..., B)
    x = np.concatenate([np.broadcast_to(obs, (*action.shape[:-1], obs.shape[-1])), action], -1)
    members = [jax.tree.map(lambda p, i=i: p[i], params["params"]["MLP_0"]) for i in range(2)]
    return np.stack([mlp(member, x)[..., 0] for member in members])


def vae_loss64(vae, b, noise):
    encoded = mlp(vae["params"]["encoder"], np.concatenate([b.obs, b.action], -1))
    mean, log_std = np.split(encoded, 2, -1)
    std = np.exp(np.clip(log_std, -4, 15))
    decoded = mlp(vae["params"]["decoder"], np.concatenate([b.obs, mean + std * noise], -1))
    kl = (np.log(1 / std) + (std**2 + mean**2 - 1) / 2).mean()  # of N(mean, std) from N(0, 1)
    return np.mean((np.tanh(decoded) - b.action) ** 2) + 0.5 * kl


def decoded64(vae, obs, key):
    """tanh of the decoder, latents clipped."""
    z = np.clip(np.float64(jax.random.normal(key, (*obs.shape[:-1], 2 * A))), -0.5, 0.5)
    return np.tanh(mlp(vae["params"]["decoder"], np.concatenate([obs, z], -1)))


def candidates64(pi, vae, obs, key, phi):
    action = decoded64(vae, obs, key)
    xi = mlp(pi["params"]["MLP_0"], np.concatenate([obs, action], -1))
    return np.clip(action + phi * np.tanh(xi), -1, 1)


def critic_loss64(q, p, b, key, cfg):
    obs = np.broadcast_to(b.next_obs, (cfg.num_samples, *b.next_obs.shape))
    first, second = q64(p.target, obs, candidates64(p.target_actor, p.vae, obs, key, cfg.phi))
    mixed = cfg.lam * np.minimum(first, second) + (1 - cfg.lam) * np.maximum(first, second)
    target = b.reward + cfg.gamma * np.where(b.done == 1, 0, mixed.max(0))
    first, second = q64(q, b.obs, b.action)
    return np.mean((first - target) ** 2) + np.mean((second - target) ** 2)


def actor_loss64(pi, p, b, key, cfg):
    return -np.mean(q64(p.critic, b.obs, candidates64(pi, p.vae, b.obs, key, cfg.phi))[0])


@pytest.fixture(scope="module")
def updated(state, batch):
    return JIT(partial(bcq.update, cfg=CFG))(state, batch, KEY)


def test_one_update_is_the_authors(state, batch, updated):
    """VAE; critics with the new VAE; perturbation against both new ones."""
    new, info = updated
    p, b = params64(state), f64(batch)
    noise = np.float64(jax.random.normal(K_VAE, (B, 2 * A)))
    losses = {
        "vae": lambda x: vae_loss64(x, b, noise),
        "critic": lambda x: critic_loss64(x, p, b, K_CRITIC, CFG),
        "actor": lambda x: actor_loss64(x, p, b, K_ACTOR, CFG),
    }
    for name, loss in losses.items():
        params = getattr(p, name)
        np.testing.assert_allclose(info[f"{name}_loss"], loss(params), rtol=2e-5)
        grads = gradient(loss, params)
        assert_first_adam_step(getattr(state, name), getattr(new, name), grads, CFG.lr)
        setattr(p, name, f64(getattr(new, name).params))


def test_the_order_of_an_update_shows(state, batch, updated):
    """With the old VAE the critics' loss, with the old critics the perturbation's, is another."""
    _, info = updated
    p, b = params64(state), f64(batch)
    assert abs(critic_loss64(p.critic, p, b, K_CRITIC, CFG) / info["critic_loss"] - 1) > 1e-4
    p.vae = f64(updated[0].vae.params)
    assert abs(actor_loss64(p.actor, p, b, K_ACTOR, CFG) / info["actor_loss"] - 1) > 1e-4


def test_both_targets_move_towards_the_new_networks(state, updated):
    new, _ = updated
    for target, net in (("target", "critic"), ("target_actor", "actor")):
        old, online = f64(getattr(state, target)), f64(getattr(new, net).params)
        expected = jax.tree.map(lambda t, x: 0.9 * t + 0.1 * x, old, online)
        chex.assert_trees_all_close(f64(getattr(new, target)), expected, rtol=1e-6, atol=1e-6)


def test_targets_start_as_the_networks_and_critics_apart(data):
    fresh = INIT(KEY, data, CFG)
    chex.assert_trees_all_equal(fresh.target, fresh.critic.params)
    chex.assert_trees_all_equal(fresh.target_actor, fresh.actor.params)
    kernel = fresh.critic.params["params"]["MLP_0"]["Dense_0"]["kernel"]
    assert not np.any(np.isclose(kernel[0], kernel[1]))


# --- Known answers ---


def answering(net, answer):
    """A TrainState that answers so, whatever its parameters and inputs are."""
    return net.replace(apply_fn=lambda *args, **kwargs: answer(*args))


def test_kl_is_a_mean_over_latents(state, batch):
    """Mean 1 and std 1 in 4 latents: KL 0.5, counted half; summed it would add 1."""
    ones = jnp.ones((B, 4))
    vae = answering(state.vae, lambda *_: (batch.action, ones, ones))
    loss, info = bcq.vae_loss(vae.params, state.replace(vae=vae), batch, KEY)
    np.testing.assert_allclose((loss, info["vae_kl"], info["vae_error"]), (0.25, 0.5, 0))


def test_error_is_a_mean_over_dimensions(state, batch):
    latent = jnp.zeros((B, 4)), jnp.ones((B, 4))  # no KL
    off = batch.action + jnp.array([0.3, 0.0])
    vae = answering(state.vae, lambda *_: (off, *latent))
    loss, _ = bcq.vae_loss(vae.params, state.replace(vae=vae), batch, KEY)
    np.testing.assert_allclose(loss, 0.09 / 2, rtol=1e-5)


def test_members_are_mixed_before_the_best_sample_is_taken(state, batch):
    """Q_1 = (1, 4), Q_2 = (3, 0): .75 min + .25 max = (1.5, 1); the maximum first would be 3.25."""
    table = jnp.array([[1.0, 4.0], [3.0, 0.0]])

    def q(params, obs, action):  # the members' predictions are 0 in the data
        return jnp.broadcast_to(table[..., None] if action.ndim == 3 else 0.0, (2, *obs.shape[:-1]))

    cfg = replace(CFG, num_samples=2, gamma=1.0)
    rows = batch._replace(reward=jnp.zeros(B), done=jnp.zeros(B))
    mixing = state.replace(critic=answering(state.critic, q))
    loss, _ = bcq.critic_loss(state.critic.params, mixing, rows, KEY, cfg)
    np.testing.assert_allclose(loss, 2 * 1.5**2, rtol=1e-6)


def test_time_limits_bootstrap_and_terminals_do_not(state, batch):
    def loss(done, next_obs):
        rows = batch._replace(done=jnp.full(B, done), next_obs=next_obs)
        return bcq.critic_loss(state.critic.params, state, rows, KEY, CFG)[0]

    assert loss(0.0, batch.next_obs) != loss(0.0, batch.next_obs + 1)
    assert loss(1.0, batch.next_obs) == loss(1.0, batch.next_obs + 1)
    q = state.critic.apply_fn(state.critic.params, batch.obs, batch.action)
    np.testing.assert_allclose(
        loss(1.0, batch.next_obs), jnp.mean((q - batch.reward) ** 2, 1).sum(), rtol=1e-5
    )


def test_latents_are_clipped_in_sampling_and_not_in_training():
    """A VAE of one layer whose decoder answers z, and whose q(z | s, a) is N(0, 1)."""
    vae = bcq.VAE((), 1)
    obs, action = jnp.zeros((500, 1)), jnp.zeros((500, 1))
    params = jax.tree.map(jnp.zeros_like, vae.init(KEY, obs, action, KEY))
    params["params"]["decoder"]["Dense_0"]["kernel"] = jnp.array([[0.0, 1.0, 0.0]])
    sampled = vae.apply(params, obs, KEY, method="sample")
    assert np.abs(sampled).max() == 0.5 and 0.55 < np.mean(np.abs(sampled) == 0.5) < 0.69  # 0.617
    trained, mean, std = vae.apply(params, obs, action, KEY)
    np.testing.assert_array_equal((mean, std), np.stack([0 * mean, 1 + 0 * std]))
    np.testing.assert_allclose(np.arctanh(trained).std(), 1, atol=0.1)


@pytest.mark.parametrize(("log_std", "std"), [(-9, np.exp(-4)), (20, np.exp(15)), (0.3, None)])
def test_std_of_the_encoder_is_clipped(log_std, std):
    vae, x = bcq.VAE((), 1), jnp.zeros(1)
    params = jax.tree.map(jnp.zeros_like, vae.init(KEY, x, x, KEY))
    params["params"]["encoder"]["Dense_0"]["bias"] = jnp.array([0.0, 0.0, log_std, log_std])
    found = vae.apply(params, x, x, KEY)[2]
    np.testing.assert_allclose(found, np.full(2, std or np.exp(0.3)), rtol=1e-5)


@pytest.mark.parametrize("phi", [0.0, 0.3, 2.0])
def test_a_perturbation_stays_within_phi_and_the_bounds(phi, state, batch):
    net = bcq.Perturbation(CFG.widths, phi)
    far = jax.tree.map(lambda x: 50 * x, state.actor.params)  # tanh(xi) is 1 or -1
    at = jnp.sign(batch.action) * 0.9
    moved = net.apply(far, batch.obs, at)
    assert np.abs(moved).max() <= 1
    assert np.abs(moved - at).max() <= phi + 1e-6
    inside = np.abs(moved) < 1
    assert inside.any() or phi == 2.0
    np.testing.assert_allclose(np.abs(moved - at)[inside], phi, atol=1e-5)


def test_acting_takes_the_candidate_that_the_first_critic_likes_best(state, data):
    """Of normalised observations; the smaller critic would choose others."""
    rows = data.obs[:B]
    action = JIT(partial(bcq.act, cfg=CFG))(state, rows, KEY)
    p, mean, std = params64(state), np.mean(data.obs, 0), np.std(data.obs, 0) + 1e-3
    obs = np.broadcast_to((f64(rows) - mean) / std, (CFG.eval_samples, *rows.shape))
    many = candidates64(p.actor, p.vae, obs, KEY, CFG.phi)
    q = q64(p.critic, obs, many)
    np.testing.assert_allclose(action, many[q[0].argmax(0), np.arange(B)], rtol=1e-4, atol=1e-5)
    assert np.any(q[0].argmax(0) != q.min(0).argmax(0))
    again, carry = jax.eval_shape(bcq.policy(CFG), state, None, rows[0], 0.0, KEY)
    chex.assert_shape(again, (A,))
    assert carry is None


def test_a_row_depends_on_that_row_alone(state, batch):
    """Another row's reward and next state leave the gradient at this row's prediction alone."""

    def slopes(rows):
        table = state.critic.replace(apply_fn=lambda q, obs, action: (
            q if action.ndim == 2 else state.critic.apply_fn(state.target, obs, action)
        ))  # fmt: skip
        f = jax.grad(bcq.critic_loss, has_aux=True)
        return f(jnp.zeros((2, B)), state.replace(critic=table), rows, KEY, CFG)[0]

    other = batch._replace(
        reward=batch.reward.at[3].add(9.0), next_obs=batch.next_obs.at[3].add(1.0)
    )
    moved = np.flatnonzero(np.asarray(slopes(batch) != slopes(other)).any(0))
    np.testing.assert_array_equal(moved, [3])


CHUNK = JIT(partial(bcq.train_chunk, cfg=CFG))


# --- A world with a known answer ---


def test_actions_keep_to_those_of_the_data(data):
    """All data near 0.5, paying less the larger the action. The critic believes that -1 pays best;
    BCQ goes as far from 0.5 as phi lets it."""
    rng = np.random.default_rng(0)
    action = 0.5 + rng.uniform(-0.05, 0.05, data.action.shape)
    x = jnp.zeros_like(data.obs)
    data = Batch(x, jnp.float32(action), -jnp.float32(action.sum(1)), x, jnp.ones(len(x)))
    state, chunk = INIT(KEY, data, CFG), CHUNK
    for step in range(20, 1520, 20):
        state, _ = chunk(state, data, KEY, step)

    def q(a):
        return state.critic.apply_fn(state.critic.params, x[0], jnp.full(A, a))[0]

    assert q(-1.0) > q(0.5) + 0.2
    chosen = bcq.act(state, x[:20], KEY, CFG)
    np.testing.assert_allclose(chosen, 0.5 - CFG.phi, atol=0.06)
