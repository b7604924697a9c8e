"""BEAR: losses and updates of both forms in float64, the MMD's known values, the dual's signs."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import bear
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import assert_first_adam_step, f64, gradient, mlp, random_batch, scramble, shifted

from common.datasets import Batch

CFG = bear.Config(
    widths=(8, 8), vae_widths=(8,), batch_size=12, log_every=20, actor_lr=1e-3, critic_lr=1e-2,
    multiplier_lr=2e-3, polyak=0.1, gamma=0.9, normalize=True, gaussian=False, sigma=0.7,
    num_matches=3, num_samples=5, eval_samples=9, warm_start=0,
)  # fmt: skip
D4RL = replace(CFG, form="d4rl")
KEY = jax.random.key(0)
K_VAE, K_CRITIC, K_ACTOR = jax.random.split(KEY, 3)  # those of an update
K_DECODER, K_PI = jax.random.split(K_ACTOR)
B, A, N = 12, 2, CFG.num_matches
NETS = ("vae", "actor", "critic")
JIT = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles sooner
INIT = JIT(bear.init, static_argnums=2)
CHUNK = JIT(partial(bear.train_chunk, cfg=CFG))


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
    last["bias"] = jnp.array([[0.0], [-0.4]])  # now either critic is the smaller one somewhere
    targets = {k: scramble(getattr(fresh, k), 7) for k in ("target", "target_actor")}
    return fresh.replace(**targets, **nets)


def params64(state):
    nets = {k: f64(getattr(state, k).params) for k in (*NETS, "multiplier")}
    return SimpleNamespace(target=f64(state.target), target_actor=f64(state.target_actor), **nets)


# --- The equations in numpy ---


def q64(params, obs, action):  # (2, ..., B)
    x = np.concatenate([np.broadcast_to(obs, (*action.shape[:-1], obs.shape[-1])), action], -1)
    members = [jax.tree.map(lambda p, i=i: p[i], params["params"]["MLP_0"]) for i in range(2)]
    return np.stack([mlp(member, x)[..., 0] for member in members])


def policy64(pi, obs, key, n, limit):
    """n values before the tanh for each row."""
    mean, log_std = np.split(mlp(pi["params"]["MLP_0"], obs), 2, -1)
    noise = np.float64(jax.random.normal(key, (n, *mean.shape))).clip(-limit, limit)
    return mean + np.exp(log_std.clip(-20, 2)) * noise


def decoder64(vae, obs, key, n):
    z = np.float64(jax.random.normal(key, (n, len(obs), 2 * A))).clip(-0.5, 0.5)
    obs = np.broadcast_to(obs, (n, *obs.shape))
    return mlp(vae["params"]["decoder"], np.concatenate([obs, z], -1))


def mmd64(x, y, kernel):
    """One state after another, one pair of samples after another."""
    found = []
    for xs, ys in zip(x.swapaxes(0, 1), y.swapaxes(0, 1), strict=True):
        xx, yy, xy = (
            [kernel(a - b) for a in p for b in q] for p, q in ((xs, xs), (ys, ys), (xs, ys))
        )
        found.append(np.sqrt(np.mean(xx) + np.mean(yy) - 2 * np.mean(xy) + 1e-6))
    return np.array(found)


def laplacian(gap):
    return np.exp(-np.abs(gap).sum() / (2 * CFG.sigma))


def gaussian(gap):
    return np.exp(-(gap @ gap) / (2 * CFG.sigma))


def vae_loss64(vae, b, noise):
    encoded = mlp(vae["params"]["encoder"], np.concatenate([b.obs, b.action], -1))
    mean, log_std = np.split(encoded, 2, -1)
    std = np.exp(np.clip(log_std, -4, 15))
    decoded = mlp(vae["params"]["decoder"], np.concatenate([b.obs, mean + std * noise], -1))
    kl = (np.log(1 / std) + (std**2 + mean**2 - 1) / 2).mean()
    return np.mean((np.tanh(decoded) - b.action) ** 2) + 0.5 * kl


def critic_loss64(q, p, b, cfg):
    pi = p.target_actor if cfg.form == "authors" else p.actor
    action = np.tanh(policy64(pi, b.next_obs, K_CRITIC, cfg.num_samples, np.inf))
    first, second = q64(p.target, b.next_obs, action)
    mixed = cfg.lam * np.minimum(first, second) + (1 - cfg.lam) * np.maximum(first, second)
    target = b.reward + cfg.gamma * np.where(b.done == 1, 0, mixed.max(0))
    first, second = q64(q, b.obs, b.action)
    return np.mean((first - target) ** 2) + np.mean((second - target) ** 2)


def actor_terms64(pi, p, b, cfg):
    """MMD and Q of each row."""
    u = decoder64(p.vae, b.obs, K_DECODER, N)
    v = policy64(pi, b.obs, K_PI, N, 0.5 if cfg.form == "authors" else np.inf)
    q = q64(p.critic, b.obs, np.tanh(v))  # (2, N, B)
    q = q.mean(1) if cfg.form == "authors" else q[:, 0]
    return mmd64(u, v, gaussian if cfg.gaussian else laplacian), np.minimum(*q)


def actor_loss64(pi, p, b, cfg):
    gap, q = actor_terms64(pi, p, b, cfg)
    return np.mean(np.exp(p.multiplier["log"]) * gap - q)


@pytest.mark.parametrize("cfg", [CFG, D4RL], ids=["authors", "d4rl"])
def test_one_update(cfg, state, batch):
    """VAE; critics; policy with both new ones, in D4RL's form with the old critics; multiplier."""
    new, info = JIT(partial(bear.update, cfg=cfg))(state, batch, KEY)
    p, b = params64(state), f64(batch)
    noise = np.float64(jax.random.normal(K_VAE, (B, 2 * A)))
    gap = actor_terms64(p.actor, p, b, cfg)[0]
    losses = {
        "vae": (lambda x: vae_loss64(x, b, noise), cfg.critic_lr),
        "critic": (lambda x: critic_loss64(x, p, b, cfg), cfg.critic_lr),
        "actor": (lambda x: actor_loss64(x, p, b, cfg), cfg.actor_lr),
    }
    for name, (loss, lr) in losses.items():
        params = getattr(p, name)
        np.testing.assert_allclose(info[f"{name}_loss"], loss(params), rtol=3e-5)
        assert_first_adam_step(getattr(state, name), getattr(new, name), gradient(loss, params), lr)
        if name == "vae" or cfg.form == "authors":
            setattr(p, name, f64(getattr(new, name).params))
            assert abs(loss(params) / loss(getattr(p, name)) - 1) > 1e-4  # else order is not seen

    p = params64(state)
    p.vae = f64(new.vae.params)
    gap = actor_terms64(p.actor, p, b, cfg)[0].mean()
    np.testing.assert_allclose(info["mmd"], gap, rtol=2e-5)
    grads = {"log": np.array(-np.exp(p.multiplier["log"]) * (gap - cfg.eps))}
    assert_first_adam_step(state.multiplier, new.multiplier, grads, cfg.multiplier_lr)
    for target, net in (("target", "critic"), ("target_actor", "actor")):
        old, online = f64(getattr(state, target)), f64(getattr(new, net).params)
        expected = jax.tree.map(lambda t, x: 0.9 * t + 0.1 * x, old, online)
        chex.assert_trees_all_close(f64(getattr(new, target)), expected, rtol=1e-6, atol=1e-6)


# --- The MMD ---


@pytest.mark.parametrize(("cfg", "value"), [(CFG, 1.1244), (replace(CFG, gaussian=True), 1.3150)])
def test_mmd_of_two_points(cfg, value):
    x, y = jnp.zeros((1, 1, 1)), jnp.full((1, 1, 1), 2.0)
    np.testing.assert_allclose(bear.mmd(x, y, replace(cfg, sigma=1.0)), [value], atol=5e-5)


@pytest.mark.parametrize(
    ("kernel", "cfg"), [(laplacian, CFG), (gaussian, replace(CFG, gaussian=True))]
)
def test_mmd_is_the_mean_over_all_pairs_of_a_state(kernel, cfg):
    x, y = jax.random.normal(KEY, (2, 4, 6, A))
    found = bear.mmd(x, y, cfg)
    chex.assert_shape(found, (6,))
    np.testing.assert_allclose(found, mmd64(f64(x), f64(y), kernel), rtol=1e-4)
    np.testing.assert_allclose(bear.mmd(x, x[::-1], cfg), 1e-3, rtol=0.2)  # the root of 1e-6


@pytest.mark.parametrize("cfg", [CFG, replace(CFG, gaussian=True)], ids=["laplacian", "gaussian"])
def test_the_mmd_pulls_towards_the_behaviour(cfg):
    """A policy left of the samples of the behaviour moves right; one that matches them stays: the
    root is finite there, and smooth with the Gaussian kernel."""
    x = jax.random.normal(KEY, (4, 1, 1))
    slope = JIT(jax.grad(lambda shift: bear.mmd(x, x + shift, cfg).sum()))
    assert slope(-0.5) < -0.1 and slope(0.5) > 0.1
    assert np.isfinite(slope(0.0))
    if cfg.gaussian:
        np.testing.assert_allclose(slope(0.0), 0, atol=1e-3)


# --- Known answers ---


@pytest.mark.parametrize(("form", "ensemble", "value"), [
    ("authors", "min", 2.0), ("authors", "mean", 2.5), ("d4rl", "min", 0.0), ("d4rl", "mean", 1.5),
])  # fmt: skip
def test_q_of_the_policys_loss(form, ensemble, value, state, batch):
    """Q_1 = (0, 4), Q_2 = (3, 3) at two samples: a mean over samples for each critic comes first;
    D4RL's form looks at the first sample alone."""
    table = jnp.array([[0.0, 4.0], [3.0, 3.0]])

    def q(params, obs, action):
        return jnp.broadcast_to(table[:, : len(action), None], (2, len(action), B))

    critic = state.critic.replace(apply_fn=q)
    cfg = replace(CFG, form=form, ensemble=ensemble, num_matches=2)
    params = state.actor.params
    info = JIT(lambda: bear.actor_loss(params, state.replace(critic=critic), batch, KEY, cfg)[1])()
    np.testing.assert_allclose(info["q_pi"], value)


def test_members_are_mixed_before_the_best_sample_is_taken(state, batch):
    """Q_1 = (1, 4), Q_2 = (3, 0): .75 min + .25 max = (1.5, 1); the maximum first would be 3.25."""
    table = jnp.array([[1.0, 4.0], [3.0, 0.0]])

    def q(params, obs, action):  # the members' predictions are 0 in the data
        return jnp.broadcast_to(table[..., None] if action.ndim == 3 else 0.0, (2, *obs.shape[:-1]))

    cfg = replace(CFG, num_samples=2, gamma=1.0)
    rows = batch._replace(reward=jnp.zeros(B), done=jnp.zeros(B))
    mixing = state.replace(critic=state.critic.replace(apply_fn=q))
    loss, _ = JIT(lambda q: bear.critic_loss(q, mixing, rows, KEY, cfg))(state.critic.params)
    np.testing.assert_allclose(loss, 2 * 1.5**2, rtol=1e-6)


def test_the_policy_learns_from_the_mmd_alone_at_first(state, batch):
    """The gradient of update 20 knows nothing of Q where the warm start has 20, that of 21 does."""
    cfg = replace(CFG, warm_start=20)
    other = state.replace(critic=state.critic.replace(params=state.target))
    slope = JIT(jax.grad(lambda *args: bear.actor_loss(*args, K_ACTOR, cfg)[0]))

    def at(step, state):
        state = state.replace(actor=state.actor.replace(step=jnp.int32(step)))
        return slope(state.actor.params, state, batch)

    chex.assert_trees_all_equal(at(19, state), at(19, other))
    first, second = (
        x["params"]["MLP_0"]["Dense_2"]["bias"] for x in (at(20, state), at(20, other))
    )
    assert np.all(np.abs(first - second)[:A] > 1e-4)


def test_samples_of_the_policy_are_clipped_where_the_authors_clip_them(state, batch):
    """Within half a standard deviation in an MMD; the target and acting draw freely."""
    mean, std = state.actor.apply_fn(state.actor.params, batch.obs)
    far = {
        limit: np.abs(bear.sample(state.actor.params, state, batch.obs, KEY, 50, limit) - mean)
        / std
        for limit in (0.5, jnp.inf)
    }
    np.testing.assert_allclose(far[0.5].max(), 0.5, rtol=1e-4)
    np.testing.assert_allclose(np.mean(far[0.5] > 0.499), 0.617, atol=0.03)
    assert far[jnp.inf].max() > 2.5
    drawn = bear.candidates(state.actor.params, state, batch.obs, KEY, 50)
    free = bear.sample(state.actor.params, state, batch.obs, KEY, 50)
    np.testing.assert_array_equal(drawn, jnp.tanh(free))


@pytest.mark.parametrize(
    ("bias", "std"), [(9.0, np.exp(2)), (-30.0, np.exp(-20)), (0.5, np.exp(0.5))]
)
def test_std_is_clipped(bias, std, state, batch):
    params = jax.tree.map(jnp.zeros_like, state.actor.params)
    params["params"]["MLP_0"]["Dense_2"]["bias"] = jnp.full(2 * A, bias)
    np.testing.assert_allclose(
        state.actor.apply_fn(params, batch.obs)[1], np.full((B, A), std), 1e-5
    )


# --- The multiplier ---


@pytest.mark.parametrize(("gap", "log"), [(0.04, 0.3), (0.06, 0.3), (9.0, 9.999), (0.0, -4.999)])
def test_the_multiplier_grows_while_the_mmd_is_above_eps(gap, log, state, batch):
    """One large step of it; it stays within e^-5 and e^10."""
    cfg = replace(CFG, multiplier_lr=1.0)
    loss, info = bear.dual_loss({"log": jnp.float32(log)}, gap, cfg)
    np.testing.assert_allclose(loss, -np.exp(log) * (gap - 0.05), rtol=1e-4)
    np.testing.assert_allclose(info["multiplier"], np.exp(log), rtol=1e-5)
    slope = jax.grad(lambda x: bear.dual_loss(x, gap, cfg)[0])({"log": jnp.float32(log)})["log"]
    assert (slope < 0) == (gap > cfg.eps)


def test_an_update_keeps_the_multiplier_within_bounds(state, batch):
    update = JIT(lambda s: bear.update(s, batch, KEY, CFG)[0].multiplier.params["log"])
    for log, bound in ((11.0, 10), (-6.0, -5)):
        learner = state.multiplier.replace(params={"log": jnp.float32(log)})
        assert update(state.replace(multiplier=learner)) == bound


def test_a_fixed_multiplier_stays(state, batch):
    cfg = replace(CFG, fixed_multiplier=100.0)
    new, info = jax.eval_shape(partial(bear.update, cfg=cfg), state, batch, KEY)
    assert "multiplier" not in info
    loss, info = JIT(lambda pi: bear.actor_loss(pi, state, batch, KEY, cfg))(state.actor.params)
    np.testing.assert_allclose(loss, 100 * info["mmd"] - info["q_pi"], rtol=1e-5)


def test_the_multiplier_starts_at_random_and_in_d4rls_form_at_one(data):
    logs = [INIT(key, data, CFG).multiplier.params["log"] for key in jax.random.split(KEY)]
    assert logs[0] != logs[1] and np.abs(logs).max() < 4
    assert JIT(lambda: bear.init(KEY, data, D4RL).multiplier.params["log"])() == 0


# --- Acting ---


def test_acting_takes_the_sample_that_the_first_critic_likes_best(state, data):
    rows = data.obs[:B]
    action = JIT(partial(bear.act, cfg=CFG))(state, rows, KEY)
    p, mean, std = params64(state), np.mean(data.obs, 0), np.std(data.obs, 0) + 1e-3
    obs = (f64(rows) - mean) / std
    many = np.tanh(policy64(p.actor, obs, KEY, CFG.eval_samples, np.inf))
    q = q64(p.critic, obs, many)
    np.testing.assert_allclose(action, many[q[0].argmax(0), np.arange(B)], rtol=1e-4, atol=1e-5)
    assert np.any(q[0].argmax(0) != q.min(0).argmax(0))


# --- A world with a known answer ---


def test_the_multiplier_decides_between_q_and_support(data):
    """All data near 0.5, paying less the larger the action, so that the critic believes that -1
    pays best. Without the MMD the policy goes there, with much of it the policy keeps to 0.5."""
    rng = np.random.default_rng(0)
    action = 0.5 + rng.uniform(-0.05, 0.05, data.action.shape)
    x = jnp.zeros_like(data.obs)
    data = Batch(x, jnp.float32(action), -jnp.float32(action.sum(1)), x, jnp.ones(len(x)))
    start = INIT(KEY, data, CFG)

    def train(multiplier, state, step):
        cfg = replace(CFG, fixed_multiplier=multiplier, actor_lr=1e-2)
        return bear.train_chunk(state, data, KEY, step, cfg)[0]

    weights = jnp.array([0.0, 100.0])
    states = jax.tree.map(lambda x: jnp.stack([x, x]), start)
    chunk = JIT(jax.vmap(train, (0, 0, None)))
    for step in range(20, 1020, 20):
        states = chunk(weights, states, step)
    free, held = (jax.tree.map(lambda x, i=i: x[i], states) for i in range(2))
    mean = [jnp.tanh(s.actor.apply_fn(s.actor.params, x[0])[0]) for s in (free, held)]
    assert mean[0].mean() < -0.3
    np.testing.assert_allclose(mean[1], 0.5, atol=0.15)
