"""BRAC: losses in float64, known divergences, where the penalty goes, alpha's signs, the clone."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import brac
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import assert_first_adam_step, f64, gradient, mlp, random_batch, scramble, shifted

from common.datasets import Batch

CFG = brac.Config(
    widths=(8, 8), actor_widths=(8,), batch_size=12, log_every=20, actor_lr=1e-3, critic_lr=1e-2,
    clone_lr=1e-2, polyak=0.1, gamma=0.9, normalize=True, alpha=0.6, entropy=0.2, sigma=0.7,
    num_samples=3, warm_start=0,
)  # fmt: skip
KEY = jax.random.key(0)
K_CRITIC, K_ACTOR, K_C, K_ALPHA = jax.random.split(KEY, 4)  # those of an update
B, A, N = 12, 2, CFG.num_samples
NETS = ("behaviour", "actor", "critic", "c")
JIT = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles sooner
INIT = JIT(brac.init, static_argnums=2)
SAMPLE = JIT(brac.draw, static_argnums=5)
CHUNK = JIT(partial(brac.train_chunk, cfg=CFG))
CLONE = JIT(partial(brac.clone_chunk, cfg=CFG))


@pytest.fixture(scope="module")
def data():
    return shifted(100)


@pytest.fixture(scope="module")
def batch():
    return random_batch(B, seed=1)


@pytest.fixture(scope="module")
def fresh(data):
    return INIT(KEY, data, CFG)


@pytest.fixture(scope="module")
def state(fresh):
    """Past the warm start; all networks away from their start, the target away from the critic."""
    nets = {k: getattr(fresh, k) for k in NETS}
    nets = {k: v.replace(params=scramble(v.params, i)) for i, (k, v) in enumerate(nets.items())}
    nets["actor"] = nets["actor"].replace(step=jnp.int32(1))
    last = nets["critic"].params["params"]["MLP_0"]["Dense_2"]
    last["bias"] = jnp.array([[0.0], [-0.4]])  # now either critic is the smaller one somewhere
    return fresh.replace(target=scramble(fresh.target, 7), **nets)


def params64(state):
    nets = {k: f64(getattr(state, k).params) for k in NETS}
    return SimpleNamespace(target=f64(state.target), alpha=0.6, **nets)


# --- The equations in numpy ---


def q64(params, obs, action):  # (2, ..., B)
    x = np.concatenate([np.broadcast_to(obs, (*action.shape[:-1], obs.shape[-1])), action], -1)
    members = [jax.tree.map(lambda p, i=i: p[i], params["params"]["MLP_0"]) for i in range(2)]
    return np.stack([mlp(member, x)[..., 0] for member in members])


def c64(params, obs, action):  # (..., B)
    x = np.concatenate([np.broadcast_to(obs, (*action.shape[:-1], obs.shape[-1])), action], -1)
    return mlp(params["params"]["MLP_0"], x)[..., 0]


def gaussian64(params, obs):
    """Mean and standard deviation of u, where a = tanh(u)."""
    mean, log_std = np.split(mlp(params["params"]["MLP_0"], obs), 2, -1)
    return mean, np.exp(-5 + 2.5 * (np.tanh(log_std) + 1))


def log_prob64(params, obs, u):
    mean, std = gaussian64(params, obs)
    gaussian = -0.5 * ((u - mean) / std) ** 2 - np.log(std * np.sqrt(2 * np.pi))
    return np.sum(gaussian - np.log(1 - np.tanh(u) ** 2), -1)


def draw64(params, obs, key, *n):
    """u (n, B, A) of a policy, with the numbers that `key` draws."""
    mean, std = gaussian64(params, obs)
    return mean + std * np.float64(jax.random.normal(key, (*n, *mean.shape)))


def mmd64(x, y, sigma):
    def kernel(x, y):
        return np.mean([np.exp(-np.abs(a - b).sum(-1) / sigma) for a in x for b in y], 0)

    return kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)


def sample64(pi, p, obs, known, key, cfg):
    """The action in Q, its log density, D."""
    k_pi, k_b = jax.random.split(key)
    u = draw64(pi, obs, k_pi, cfg.num_samples)
    a, log_pi = np.tanh(u), log_prob64(pi, obs, u)
    if cfg.divergence == "kl":
        inside = np.arctanh(np.clip(a, -0.999, 0.999))
        divergence = np.mean(log_pi - log_prob64(p.behaviour, obs, inside), 0)
    elif cfg.divergence == "mmd":
        b = np.tanh(draw64(p.behaviour, obs, k_b, cfg.num_samples))
        divergence = mmd64(a, b, cfg.sigma)
    else:
        known = np.tanh(draw64(p.behaviour, obs, k_b)) if known is None else known
        divergence = c64(p.c, obs, a).mean(0) - c64(p.c, obs, known)
    return a[0], log_pi[0], divergence


def target64(p, b, key, cfg):
    k_next, k_now = jax.random.split(key)
    action, log_pi, divergence = sample64(p.actor, p, b.next_obs, None, k_next, cfg)
    v = np.minimum(*q64(p.target, b.next_obs, action)) - cfg.entropy * log_pi
    reward = b.reward
    if cfg.penalty == "value":
        v = v - p.alpha * divergence
    if cfg.penalty == "reward":
        reward = reward - p.alpha * sample64(p.actor, p, b.obs, b.action, k_now, cfg)[2]
    return reward + cfg.gamma * np.where(b.done == 1, 0, v)


def critic_loss64(q, p, b, key, cfg):
    first, second = q64(q, b.obs, b.action)
    target = target64(p, b, key, cfg)
    return np.mean((first - target) ** 2) + np.mean((second - target) ** 2)


def actor_loss64(pi, p, b, key, cfg):
    action, log_pi, divergence = sample64(pi, p, b.obs, b.action, key, cfg)
    q = np.minimum(*q64(p.critic, b.obs, action))
    return np.mean(p.alpha * divergence + cfg.entropy * log_pi - q)


CONFIGS = [
    replace(CFG, divergence=d, penalty=p)
    for d, p in (("kl", "value"), ("mmd", "reward"), ("wasserstein", "value"), ("kl", "reward"))
]


@pytest.mark.parametrize("cfg", CONFIGS, ids=lambda cfg: f"{cfg.divergence}-{cfg.penalty}")
def test_losses(cfg, state, batch):
    p, b = params64(state), f64(batch)
    ours = JIT(
        lambda: (
            brac.critic_loss(state.critic.params, state, batch, KEY, cfg)[0],
            brac.actor_loss(state.actor.params, state, batch, KEY, cfg)[0],
        )
    )()
    expected = critic_loss64(p.critic, p, b, KEY, cfg), actor_loss64(p.actor, p, b, KEY, cfg)
    np.testing.assert_allclose(ours, expected, rtol=5e-5)


def test_one_update(state, batch):
    """Target first; critics against it; the policy with the new critics; alpha with the new policy;
    the behaviour stays."""
    cfg = replace(CFG, target_divergence=1.0)
    new, info = JIT(partial(brac.update, cfg=cfg))(state, batch, KEY)
    p, b = params64(state), f64(batch)
    p.target = jax.tree.map(lambda t, q: 0.9 * t + 0.1 * q, p.target, p.critic)
    chex.assert_trees_all_close(f64(new.target), p.target, rtol=1e-6, atol=1e-6)
    losses = {
        "critic": (lambda x: critic_loss64(x, p, b, K_CRITIC, cfg), cfg.critic_lr),
        "actor": (lambda x: actor_loss64(x, p, b, K_ACTOR, cfg), cfg.actor_lr),
    }
    for name, (loss, lr) in losses.items():
        params = getattr(p, name)
        np.testing.assert_allclose(info[f"{name}_loss"], loss(params), rtol=5e-5)
        assert_first_adam_step(getattr(state, name), getattr(new, name), gradient(loss, params), lr)
        setattr(p, name, f64(getattr(new, name).params))
    divergence = sample64(p.actor, p, b.obs, b.action, K_ALPHA, cfg)[2].mean()
    grads = {"weight": np.array(1.0 - divergence)}
    assert_first_adam_step(state.alpha, new.alpha, grads, cfg.critic_lr)
    chex.assert_trees_all_equal(new.behaviour, state.behaviour)
    chex.assert_trees_all_equal(new.c, state.c)


# --- Divergences ---


def policies(state, mean, b_mean):
    """Policy and behaviour of std 1 and these means before the tanh, at every state."""

    def fixed(params, mean):
        params = jax.tree.map(jnp.zeros_like, params)
        params["params"]["MLP_0"]["Dense_1"]["bias"] = jnp.array([mean] * A + [20.0] * A)
        return params

    behaviour = state.behaviour.replace(params=fixed(state.behaviour.params, b_mean))
    return fixed(state.actor.params, mean), state.replace(behaviour=behaviour)


def test_kl_of_two_gaussians(state, batch):
    """Of N(0, 1) from N(1, 1): 0.5 in each dimension, which the tanh leaves alone."""
    cfg = replace(CFG, num_samples=2000)
    pi, other = policies(state, 0.0, 1.0)
    divergence = SAMPLE(pi, other, batch.obs, None, KEY, cfg)[2]
    np.testing.assert_allclose(divergence, A * 0.5, atol=0.15)
    pi, same = policies(state, 0.3, 0.3)
    np.testing.assert_allclose(SAMPLE(pi, same, batch.obs, None, KEY, CFG)[2], 0, atol=1e-2)


def test_far_actions_have_a_finite_divergence(state, batch):
    """tanh(20) is 1 in float32: the behaviour's density is asked for at 0.999."""
    pi, other = policies(state, 20.0, 0.0)
    assert np.all(np.isfinite(SAMPLE(pi, other, batch.obs, None, KEY, CFG)[2]))


def test_mmd_of_two_points():
    x, y = jnp.zeros((1, 1, 1)), jnp.full((1, 1, 1), 2.0)
    found = brac.squared_mmd(x, y, replace(CFG, sigma=1.0))
    np.testing.assert_allclose(found, [2 - 2 * np.exp(-2)], rtol=1e-6)
    np.testing.assert_array_equal(brac.squared_mmd(y, y, CFG), [0])


@pytest.mark.parametrize("divergence", ["kl", "mmd"])
def test_a_divergence_pulls_towards_the_behaviour(divergence, state, batch):
    """The gradient goes through the policy's actions: left of the behaviour it moves right."""
    cfg = replace(CFG, divergence=divergence, num_samples=16)

    def slope(mean):
        pi, other = policies(state, mean, 0.0)
        grads = jax.grad(lambda x: brac.draw(x, other, batch.obs, None, KEY, cfg)[2].mean())(pi)
        return grads["params"]["MLP_0"]["Dense_1"]["bias"][:A]

    left, right = JIT(lambda: (slope(-0.7), slope(0.7)))()
    assert np.all(left < -0.01) and np.all(right > 0.01)


def linear(state, k):
    """c(s, a) = k times the action's first component."""
    return state.replace(c=state.c.replace(apply_fn=lambda params, obs, action: k * action[..., 0]))


def test_slopes_of_c_above_one_are_punished(state, batch):
    loss = JIT(lambda k: brac.c_loss(state.c.params, linear(state, k), batch, KEY)[0])
    action = np.tanh(draw64(f64(state.actor.params), f64(batch.obs), jax.random.split(KEY)[0]))
    distance = np.mean(action[:, 0] - f64(batch.action)[:, 0])
    for k, excess in ((0.5, 0.0), (1.0, 0.0), (-2.0, 5.0), (3.0, 20.0)):
        np.testing.assert_allclose(loss(k), excess - k * distance, rtol=1e-4, atol=1e-6)


def test_wasserstein_is_what_c_tells_apart(state, batch):
    cfg = replace(CFG, divergence="wasserstein")
    k_pi, k_b = jax.random.split(KEY)
    p, obs = params64(state), f64(batch.obs)
    action = np.tanh(draw64(p.actor, obs, k_pi, N))[..., 0].mean(0)
    for known in (batch.action, None):
        other = f64(batch.action) if known is not None else np.tanh(draw64(p.behaviour, obs, k_b))
        found = SAMPLE(state.actor.params, linear(state, 0.5), batch.obs, known, KEY, cfg)[2]
        np.testing.assert_allclose(found, 0.5 * (action - other[:, 0]), rtol=1e-4, atol=1e-5)


def test_the_steps_of_c_raise_what_it_tells_apart(state, batch):
    cfg = replace(CFG, divergence="wasserstein", c_steps=40)
    new, _ = JIT(partial(brac.update, cfg=cfg))(state, batch, KEY)
    assert new.c.step == 40
    before, after = (
        SAMPLE(new.actor.params, s, batch.obs, batch.action, K_C, cfg)[2].mean()
        for s in (state, new)
    )
    assert after > before + 0.1


# --- Where the penalty goes ---


def targets(state, batch, cfg, q_next):
    """What the critics regress onto, for each row: the gradient at predictions of 0 tells."""
    size = len(batch.reward)

    def apply(q, obs, action):  # predictions are the parameters; the target network is q_next
        return q if isinstance(q, jax.Array) else jnp.stack([q_next(obs, action)] * 2)

    state = state.replace(critic=state.critic.replace(apply_fn=apply))
    grads = jax.grad(brac.critic_loss, has_aux=True)
    return -size / 2 * grads(jnp.zeros((2, size)), state, batch, KEY, cfg)[0][0]


def test_the_penalty_is_subtracted_from_value_or_reward_or_neither(state, batch):
    """BRAC-v: y falls by gamma (1 - d) alpha D(s'), the modified reward's by alpha D(s) also at
    ends; BRAC-p's does not know alpha."""
    k_next, k_now = jax.random.split(KEY)
    after = SAMPLE(state.actor.params, state, batch.next_obs, None, k_next, CFG)[2]
    now = SAMPLE(state.actor.params, state, batch.obs, batch.action, k_now, CFG)[2]
    find = JIT(partial(targets, q_next=lambda obs, action: action[..., 0]), static_argnums=2)
    off = state.replace(alpha=state.alpha.replace(params={"weight": jnp.float32(0)}))
    falls = {
        "value": 0.6 * CFG.gamma * (1 - batch.done) * after,
        "reward": 0.6 * now,
        "policy": 0 * now,
    }
    assert np.abs(after).min() > 1e-3 and batch.done.sum() > 1
    for penalty, fall in falls.items():
        cfg = replace(CFG, penalty=penalty)
        change = find(off, batch, cfg) - find(state, batch, cfg)
        np.testing.assert_allclose(change, fall, rtol=1e-3, atol=1e-5)


def test_the_modified_reward_learns_brac_v_less_alpha_d(state, monkeypatch):
    """Two states, two actions, known divergences. At their fixed points the two Q differ by
    alpha D(s), and the policy's gradient is the same: it sees no function of s alone."""
    divergences = jnp.array([0.7, 2.0])
    obs, next_obs = jnp.eye(2)[jnp.array([[0, 0, 1, 1], [1, 0, 0, 1]])]
    action = jnp.array([-0.5, 0.5, -0.5, 0.5])[:, None]
    reward, done = jnp.array([1.0, -0.5, 0.3, 2.0]), jnp.array([0.0, 0, 0, 1])
    rows = Batch(obs, action, reward, next_obs, done)

    def sample(pi_params, state, obs, known, key, cfg):
        """Of a policy that takes the first action in one state and the second in the other."""
        return obs @ jnp.array([[-0.5], [0.5]]), jnp.zeros(len(obs)), obs @ divergences

    def look_up(table, obs, action):
        return jnp.sum(obs * jnp.where(action > 0, table[:, 1], table[:, 0]), -1)

    def solve(penalty):
        def step(table, _):
            y = targets(state, rows, replace(CFG, penalty=penalty), partial(look_up, table))
            return y.reshape(2, 2), None

        return jax.lax.scan(step, jnp.zeros((2, 2)), None, 200)[0]

    monkeypatch.setattr(brac, "draw", sample)
    value, modified = JIT(lambda: (solve("value"), solve("reward")))()
    np.testing.assert_allclose(modified, value - 0.6 * divergences[:, None], atol=1e-5)
    assert np.ptp(value) > 1 and np.abs(modified - value).min() > 0.4
    monkeypatch.undo()

    def slope(table):
        def apply(params, obs, action):  # linear between the two actions
            share = action[..., :1] / 2 + 0.5
            q = (1 - share) * table[:, 0] + share * table[:, 1]
            return jnp.stack([jnp.sum(q * obs[..., :2], -1)] * 2)

        other = state.replace(critic=state.critic.replace(apply_fn=apply))
        wide = rows._replace(obs=jnp.pad(obs, ((0, 0), (0, 1))), action=jnp.tile(action, (1, A)))
        return jax.grad(lambda x: brac.actor_loss(x, other, wide, KEY, CFG)[0])(state.actor.params)

    same = JIT(lambda: (slope(value), slope(modified)))()
    chex.assert_trees_all_close(*same, rtol=1e-4, atol=1e-6)


# --- Warm start, alpha ---


def test_the_policy_learns_from_the_divergence_alone_at_first(state, batch):
    """Of the updates 0 to 20,000 none knows Q, of the later ones all."""
    cfg = replace(CFG, warm_start=20_000)
    other = state.replace(critic=state.critic.replace(params=state.target))
    slope = JIT(jax.grad(lambda *args: brac.actor_loss(*args, K_ACTOR, cfg)[0]))

    def at(step, state):
        state = state.replace(actor=state.actor.replace(step=jnp.int32(step)))
        return slope(state.actor.params, state, batch)["params"]["MLP_0"]["Dense_1"]["bias"]

    np.testing.assert_array_equal(at(20_000, state), at(20_000, other))
    assert np.all(np.abs(at(20_001, state) - at(20_001, other))[:A] > 1e-4)


def test_alpha_rises_while_the_divergence_is_above_its_target(state, batch):
    """From 0 too; it stays in [0, 500]."""
    divergence = SAMPLE(state.actor.params, state, batch.obs, batch.action, KEY, CFG)[2].mean()

    @JIT
    def step(weight, target):
        learner = state.alpha.replace(params={"weight": weight})
        cfg = replace(CFG, target_divergence=target)
        new, _ = brac.descend(brac.alpha_loss, learner, state, batch, KEY, cfg)
        return brac.clipped(new, 500).params["weight"]

    for start in (0.0, 0.6, 500.0):
        above, below = step(start, divergence - 0.1), step(start, divergence + 0.1)
        expected = np.clip([start + CFG.critic_lr, start - CFG.critic_lr], 0, 500)
        np.testing.assert_allclose([above, below], expected, rtol=1e-5)


def test_std_lies_between_the_authors_bounds(state, batch):
    for bias, log_std in ((-50.0, -5.0), (0.0, -2.5), (50.0, 0.0)):
        params = jax.tree.map(jnp.zeros_like, state.actor.params)
        params["params"]["MLP_0"]["Dense_1"]["bias"] = jnp.full(2 * A, bias)
        std = state.actor.apply_fn(params, batch.obs).distribution.stddev()
        np.testing.assert_allclose(std, np.full((B, A), np.exp(log_std)), rtol=1e-5)


# --- The clone ---


def test_one_step_of_the_clone(state, batch):
    """Likelihood of the data's actions, clipped at the edge, and the entropy by its weight."""
    edge = batch._replace(action=batch.action.at[0].set(1.0))
    k_behaviour, k_entropy = jax.random.split(KEY)
    new, info = JIT(brac.clone)(state, edge, KEY)
    p, b = params64(state), f64(edge)
    u = np.arctanh(np.clip(b.action, -0.999, 0.999))

    def loss(x):
        own = log_prob64(x, b.obs, draw64(x, b.obs, k_behaviour))
        return np.mean(1.0 * own - log_prob64(x, b.obs, u))

    np.testing.assert_allclose(info["behaviour_loss"], loss(p.behaviour), rtol=1e-4)
    grads = gradient(loss, p.behaviour)
    assert_first_adam_step(state.behaviour, new.behaviour, grads, CFG.clone_lr)
    behaviour = f64(new.behaviour.params)
    entropy = -log_prob64(behaviour, b.obs, draw64(behaviour, b.obs, k_entropy)).mean()
    grads = {"weight": np.array(entropy + A)}  # the weight falls while the entropy is above -A
    assert_first_adam_step(state.clone_entropy, new.clone_entropy, grads, CFG.clone_lr)
    chex.assert_trees_all_equal(new.actor, state.actor)


def test_the_weight_of_the_entropy_does_not_fall_below_zero(state):
    learner = state.clone_entropy.replace(params={"weight": jnp.float32(-0.3)})
    assert brac.clipped(learner, jnp.inf).params["weight"] == 0


def test_the_behaviour_is_cloned_in_chunks_that_change_no_number(data):
    """25 updates in chunks of 10, for each seed: 10, 10 and 5; and more of them fit better."""
    keys = jax.random.split(KEY, 2)
    start = jax.tree.map(lambda *x: jnp.stack(x), *(INIT(key, data, CFG) for key in keys))
    cfg, lines = replace(CFG, log_every=10, clone_updates=25), []
    state = brac.clone_behaviour(keys, start, data, cfg, lines.append)
    assert [line.split(":")[0] for line in lines] == [
        f"behaviour, update {n}" for n in (10, 20, 25)
    ]
    np.testing.assert_array_equal(state.behaviour.step, [25, 25])
    own = jax.vmap(jax.random.fold_in, (0, None))(keys, jnp.uint32(2**31))
    whole, _ = CLONE(INIT(keys[0], data, CFG), data, own[0], jnp.arange(25))
    alone = jax.tree.map(lambda x: x[0], state.behaviour.params)
    chex.assert_trees_all_close(alone, whole.behaviour.params, rtol=1e-5, atol=1e-5)
    more, first = CLONE(whole, data, own[0], jnp.arange(25, 50))
    assert first["behaviour_loss"] < float(lines[0].split()[-1])


# --- Acting, seeds and chunks ---


def test_acting_takes_the_mode_of_normalised_observations(fresh, data):
    mean, std = np.mean(data.obs, 0), np.std(data.obs, 0) + 1e-3
    expected = np.tanh(gaussian64(f64(fresh.actor.params), (f64(data.obs) - mean) / std)[0])
    np.testing.assert_allclose(JIT(brac.act)(fresh, data.obs), expected, rtol=1e-4, atol=1e-5)


def test_chunks_and_seeds_change_no_number(data):
    """Two chunks of 10 are one of 20, bit for bit; a seed of two is that seed alone."""
    start = [INIT(key, data, CFG) for key in jax.random.split(KEY, 2)]
    keys = jax.random.split(jax.random.key(1), 2)
    whole, _ = CHUNK(start[0], data, keys[0], 20)
    part = JIT(partial(brac.train_chunk, cfg=replace(CFG, log_every=10)))
    state, _ = part(part(start[0], data, keys[0], 10)[0], data, keys[0], 20)
    chex.assert_trees_all_equal(state.actor.params, whole.actor.params)

    both = JIT(jax.vmap(partial(brac.train_chunk, cfg=CFG), (0, None, 0, None)))
    many, _ = both(jax.tree.map(lambda *x: jnp.stack(x), *start), data, keys, 20)
    mine, alone = (
        (s.target, s.critic.params, s.actor.params)
        for s in (jax.tree.map(lambda x: x[0], many), whole)
    )
    chex.assert_trees_all_close(mine, alone, rtol=1e-5, atol=1e-5)
    bias = many.critic.params["params"]["MLP_0"]["Dense_2"]["bias"]
    assert not np.any(np.isclose(bias[0], bias[1]))


# --- A world with a known answer ---


def test_alpha_decides_between_q_and_the_behaviour(data):
    """All data near 0.5, paying less the larger the action, so that the critic believes that -1
    pays best. Without the penalty the policy goes there, with much of it it keeps to 0.5."""
    rng = np.random.default_rng(0)
    action = 0.5 + rng.uniform(-0.1, 0.1, data.action.shape)
    x = jnp.zeros_like(data.obs)
    data = Batch(x, jnp.float32(action), -jnp.float32(action.sum(1)), x, jnp.ones(len(x)))
    state, _ = CLONE(INIT(KEY, data, CFG), data, KEY, jnp.arange(25))
    for _ in range(15):
        state, _ = CLONE(state, data, KEY, jnp.arange(25))
    chunk, found = JIT(partial(brac.train_chunk, cfg=replace(CFG, actor_lr=1e-2, entropy=0.0))), []
    for alpha in (0.0, 10.0):
        run = state.replace(alpha=state.alpha.replace(params={"weight": jnp.float32(alpha)}))
        for step in range(20, 620, 20):
            run, _ = chunk(run, data, KEY, step)
        found.append(JIT(brac.act)(run, x[0]))
    assert found[0].mean() < -0.3
    np.testing.assert_allclose(found[1], 0.5, atol=0.15)
