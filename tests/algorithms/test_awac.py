"""AWAC: one update in float64 with the same draws, what a row's weight hangs on, a bandit."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import awac
import bc
import chex
import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import assert_first_adam_step, f64, gradient, mlp, random_batch, scramble, shifted

from common import datasets, experiment
from common.datasets import Batch

CFG = awac.Config(
    widths=(8, 8), batch_size=16, num_updates=1000, log_every=100, lr=1e-2, polyak=0.1,
    gamma=0.9, num_samples=3, beta=2.0, max_weight=1.1,
)  # fmt: skip
KEY = jax.random.key(0)
B, A = 16, 2
INIT = jax.jit(awac.init, static_argnums=2)  # compiled once for the tests that need a fresh state
UPDATE = jax.jit(partial(awac.update, cfg=CFG))


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
    nets = {"actor": fresh.actor, "critic": fresh.critic}
    nets = {k: v.replace(params=scramble(v.params, i)) for i, (k, v) in enumerate(nets.items())}
    return fresh.replace(target=scramble(fresh.target, 2), **nets)


def params64(state):
    nets = {k: f64(getattr(state, k).params) for k in ("actor", "critic")}
    return SimpleNamespace(target=f64(state.target), **nets)


# --- The paper's equations in numpy, noise given ---


def normal(key, *shape):
    """The standard normal numbers (*shape, A) that a policy draws with `key`, in float64."""
    noise = distrax.MultivariateNormalDiag(jnp.zeros((shape[-1], A)), jnp.ones((shape[-1], A)))
    return f64(noise.sample(seed=key, sample_shape=shape[:-1]))


def q64(params, obs, action):  # (2, ...)
    x = np.concatenate([obs, action], -1)
    members = [jax.tree.map(lambda p, i=i: p[i], params["params"]["MLP_0"]) for i in range(2)]
    return np.stack([mlp(member, x)[..., 0] for member in members])


def policy64(params, obs):
    mean = np.tanh(mlp(params["params"]["MLP_0"], obs))
    return mean, np.exp(np.clip(params["params"]["log_std"], -5, 2))


def sample64(params, obs, noise):
    mean, std = policy64(params, obs)
    return np.clip(mean + std * noise, -1, 1)


def log_prob64(params, obs, action):  # (B,)
    mean, std = policy64(params, obs)
    return np.sum(-0.5 * ((action - mean) / std) ** 2 - np.log(std * np.sqrt(2 * np.pi)), -1)


def critic_loss64(q, p, b, noise, cfg):
    """A row that is done has no future; the others that of the policy's action at next_obs."""
    next_action = sample64(p.actor, b.next_obs, noise)
    future = np.minimum(*q64(p.target, b.next_obs, next_action))
    target = b.reward + cfg.gamma * np.where(b.done == 1, 0, future)
    first, second = q64(q, b.obs, b.action)
    return np.mean((first - target) ** 2) + np.mean((second - target) ** 2)


def weight64(p, b, noise, cfg):  # (B,); noise (n, B, A)
    """Each critic's mean over the policy's own actions, then the smaller, as in jaxrl."""
    own = np.mean([q64(p.critic, b.obs, sample64(p.actor, b.obs, x)) for x in noise], 0)
    gap = np.minimum(*q64(p.critic, b.obs, b.action)) - np.minimum(*own)
    return np.minimum(np.exp(cfg.beta * gap), cfg.max_weight)


def actor_loss64(pi, p, b, noise, cfg):
    return -np.mean(weight64(p, b, noise, cfg) * log_prob64(pi, b.obs, b.action))


LOSSES = {
    "critic": (jax.jit(awac.critic_loss, static_argnums=4), critic_loss64, (B,)),
    "actor": (jax.jit(awac.actor_loss, static_argnums=4), actor_loss64, (3, B)),
}


# --- Golden values ---


@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_the_papers(name, state, batch):
    ours, paper, shape = LOSSES[name]
    loss, info = ours(getattr(state, name).params, state, batch, KEY, CFG)
    p = params64(state)
    expected = paper(getattr(p, name), p, f64(batch), normal(KEY, *shape), CFG)
    np.testing.assert_allclose(loss, expected, rtol=2e-5)
    assert info[f"{name}_loss"] == loss


def test_golden_values_see_every_part(state, batch):
    """Weights on both sides of the clip, actions beyond 1, critics that take turns at the min."""
    p, b, noise = params64(state), f64(batch), normal(KEY, 3, B)
    weight = weight64(p, b, noise, CFG)
    assert 0 < np.sum(weight == CFG.max_weight) < B
    mean, std = policy64(p.actor, b.obs)
    assert 0.1 < np.mean(np.abs(mean + std * noise) > 1) < 0.9
    for obs, q in ((b.next_obs, p.target), (b.obs, p.critic)):
        first, second = q64(q, obs, b.action)
        assert 0 < np.sum(first < second) < B


@pytest.fixture(scope="module")
def updated(state, batch):
    return UPDATE(state, batch, KEY)


def test_one_update_is_the_papers(state, batch, updated):
    """Q against the old target; the policy against the new Q; then the target."""
    new, info = updated
    p, b = params64(state), f64(batch)
    for name, key in zip(("critic", "actor"), jax.random.split(KEY), strict=True):
        _, paper, shape = LOSSES[name]
        noise = normal(key, *shape)
        loss = partial(paper, p=p, b=b, noise=noise, cfg=CFG)
        np.testing.assert_allclose(info[f"{name}_loss"], loss(getattr(p, name)), rtol=2e-5)
        grads = gradient(loss, f64(getattr(p, name)))  # of a copy: the weights stay as they are
        assert_first_adam_step(getattr(state, name), getattr(new, name), grads, CFG.lr)
        if name == "critic":
            old = weight64(p, b, normal(jax.random.split(KEY)[1], 3, B), CFG).mean()
            p.critic = f64(new.critic.params)
    now = weight64(p, b, noise, CFG).mean()
    np.testing.assert_allclose(info["weight"], now, rtol=2e-5)
    assert abs(now - old) > 1e-3  # else the line above cannot tell the new Q from the old
    q_data = q64(f64(state.critic.params), b.obs, b.action).mean()
    np.testing.assert_allclose(info["q_data"], q_data, rtol=2e-5)


def test_target_moves_at_every_update(state, batch):
    for i in range(3):
        old = f64(state.target)
        state, _ = UPDATE(state, batch, jax.random.key(i))
        critic = f64(state.critic.params)
        expected = jax.tree.map(lambda t, q: 0.9 * t + 0.1 * q, old, critic)
        chex.assert_trees_all_close(f64(state.target), expected, rtol=1e-6, atol=1e-6)


def test_update_leaves_the_rest_alone(state, updated):
    new, _ = updated
    chex.assert_trees_all_equal((new.obs_mean, new.obs_std), (state.obs_mean, state.obs_std))
    for name in ("actor", "critic"):
        assert getattr(new, name).step == getattr(state, name).step + 1


def test_actors_learning_rate_falls_to_zero_by_a_cosine(state, data, batch):
    cfg = replace(CFG, lr_decay=True)
    actor = jax.eval_shape(partial(awac.init, cfg=cfg), KEY, data).actor  # of its optimiser
    actor = actor.replace(params=state.actor.params, step=0)
    moments, schedule = actor.tx.init(actor.params)
    step = jax.jit(lambda x: awac.descend(awac.actor_loss, x, state, batch, KEY, cfg)[0])
    for count, share in ((0, 1), (500, 0.5), (1000, 0), (2000, 0)):  # of num_updates = 1000
        late = actor.replace(opt_state=(moments, schedule._replace(count=jnp.int32(count))))
        before, after = (x.params["params"]["log_std"] for x in (late, step(late)))
        np.testing.assert_allclose(np.abs(after - before), share * CFG.lr, rtol=1e-3, atol=1e-8)


# --- Structure ---


def test_shapes(state, batch):
    q = jax.eval_shape(state.critic.apply_fn, state.target, batch.obs, batch.action)
    chex.assert_shape(q, (2, B))
    for samples in (1, 3):
        cfg = replace(CFG, num_samples=samples)
        gap = jax.eval_shape(partial(awac.advantage, cfg=cfg), state, batch, KEY)
        chex.assert_shape(gap, (B,))
    for name, (loss, *_) in LOSSES.items():
        params = getattr(state, name).params
        out, info = jax.eval_shape(partial(loss, cfg=CFG), params, state, batch, KEY)
        chex.assert_shape([out, *info.values()], ())
    chex.assert_shape(jax.eval_shape(awac.act, state, batch.obs), (B, A))
    chex.assert_shape(jax.eval_shape(awac.act, state, batch.obs[0]), (A,))


def other_row(batch, row):
    """The batch with another transition in that row."""
    new = Batch(*(x[row] + 0.3 for x in batch))._replace(done=1 - batch.done[row])
    return jax.tree.map(lambda x, y: x.at[row].set(y), batch, new)


def test_a_rows_advantage_depends_on_that_row_alone(state, batch):
    advantage = jax.jit(partial(awac.advantage, cfg=CFG))
    before, after = (advantage(state, b, KEY) for b in (batch, other_row(batch, 5)))
    same = np.arange(B) != 5
    np.testing.assert_allclose(after[same], before[same], rtol=1e-5, atol=1e-6)
    assert abs(after[5] - before[5]) > 1e-2


@pytest.mark.parametrize("name", LOSSES)
def test_a_rows_share_of_the_loss_depends_on_that_row_alone(name, state, batch):
    """Another row 5 changes the loss by as much whatever row 9 is: nothing of shape (B, B), and
    no softmax over the batch."""
    params, loss = getattr(state, name).params, LOSSES[name][0]

    def value(b):
        return float(loss(params, state, b, KEY, CFG)[0])

    nine = other_row(batch, 9)
    change = value(other_row(batch, 5)) - value(batch)
    np.testing.assert_allclose(value(other_row(nine, 5)) - value(nine), change, rtol=1e-3)
    assert abs(change) > 1e-2 and abs(value(nine) - value(batch)) > 1e-2


def test_time_limits_bootstrap_and_terminals_do_not(state, batch):
    def loss(done, next_obs):
        rows = batch._replace(done=jnp.full(B, done), next_obs=next_obs)
        return LOSSES["critic"][0](state.critic.params, state, rows, KEY, CFG)[0]

    assert loss(0.0, batch.next_obs) != loss(0.0, batch.next_obs + 1)
    assert loss(1.0, batch.next_obs) == loss(1.0, batch.next_obs + 1)
    b = f64(batch)
    error = q64(f64(state.critic.params), b.obs, b.action) - b.reward
    np.testing.assert_allclose(loss(1.0, batch.next_obs), np.sum(error**2) / B, rtol=1e-5)


def test_next_actions_are_those_at_next_observations(state, batch):
    """A policy that goes by its observation: only next_obs may change the target's action."""
    q = jax.tree.map(jnp.zeros_like, state.critic.params)  # so that the loss is 2 mean target^2
    rows = batch._replace(done=jnp.zeros(B))
    here, there = rows._replace(obs=rows.obs + 1), rows._replace(next_obs=rows.next_obs + 1)
    losses = [LOSSES["critic"][0](q, state, b, KEY, CFG)[0] for b in (rows, here, there)]
    assert losses[0] == losses[1] != losses[2]


def test_without_beta_it_is_bc(state, batch):
    """exp(0) = 1: the gradient of BC's gaussian head, to the last parameter."""
    ours = jax.jit(jax.grad(awac.actor_loss, has_aux=True), static_argnums=4)
    ours, info = ours(state.actor.params, state, batch, KEY, replace(CFG, beta=0.0))
    imitation = jax.jit(jax.grad(bc.actor_loss, has_aux=True), static_argnums=3)
    theirs, _ = imitation(state.actor.params, state, batch, bc.Config(head="gaussian"))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert info["weight"] == 1


def test_critics_start_apart_and_the_target_with_them(fresh):
    kernel = fresh.critic.params["params"]["MLP_0"]["Dense_0"]["kernel"]  # (2, 8, 5)
    assert not np.any(np.isclose(kernel[0], kernel[1]))
    chex.assert_trees_all_equal(fresh.target, fresh.critic.params)


def test_observations_statistics_are_the_datas(fresh, data):
    np.testing.assert_allclose(fresh.obs_mean, np.mean(data.obs, 0), rtol=1e-5)
    np.testing.assert_allclose(fresh.obs_std, np.std(data.obs, 0) + 1e-3, rtol=1e-5)


# --- Rewards, and values by the data's name ---


@pytest.mark.parametrize(
    ("env", "beta", "shift"),
    [
        ("halfcheetah-medium-v2", 3.0, 0.0),
        ("antmaze-umaze-v2", 10.0, -1.0),
        ("maze2d-umaze-v1", 10.0, 0.0),
        ("pen-human-v1", 10.0, 0.0),
        ("D4RL/door/human-v2", 10.0, 0.0),
        ("D4RL/pen/human-v2", 10.0, 0.0),
        ("mine/pendulum/medium-v0", 3.0, 0.0),  # is no pen
    ],
)
def test_values_of_the_paper(env, beta, shift):
    cfg = experiment.resolve(awac.Config(env=env), awac.TUNED)
    assert (cfg.beta, cfg.shift_reward, cfg.scale_reward) == (beta, shift, False)


@pytest.mark.parametrize(
    ("flags", "reward"),
    [
        ({}, [1.0, 2.0, 5.0]),
        ({"shift_reward": -1.0}, [0.0, 1.0, 4.0]),
        ({"scale_reward": True, "shift_reward": -1.0}, [499.0, 999.0, 2499.0]),  # returns 3 and 5
    ],
)
def test_rewards_are_scaled_then_shifted(flags, reward, monkeypatch):
    obs, done = np.zeros((3, 1), np.float32), np.zeros(3, np.float32)
    arrays = obs, obs, np.float32([1, 2, 5]), obs, done, np.array([0, 2]), np.array([2, 1])
    data = datasets.Dataset("mine", "", *arrays, None, None, {})
    trained = []

    class Run:
        def __init__(self, cfg, data): ...

        restore = staticmethod(lambda state: state)
        steps = staticmethod(lambda: [100])
        record = staticmethod(lambda step, metrics, returns: trained.append(metrics))
        save = finish = staticmethod(lambda *_: None)

    monkeypatch.setattr(experiment, "Run", Run)
    monkeypatch.setattr(awac, "init", lambda key, data, cfg: data.obs.mean(0))
    monkeypatch.setattr(
        awac, "train_chunk", lambda state, data, key, step, cfg: (state, data.reward)
    )
    awac.train(replace(CFG, batch_size=2, eval_episodes=0, **flags), data)
    np.testing.assert_allclose(trained[0], [reward], rtol=1e-6)


# --- A bandit ---


def test_in_a_bandit_it_picks_the_better_action_where_bc_does_not():
    """In 30 % of the rows the action is 0.6 s and pays 1, else it is -0.6 s and pays nothing."""
    n = 1000
    side = np.where(np.arange(n) % 2, 1.0, -1.0)
    good = np.arange(n) // 2 % 10 < 3
    action = np.where(good, 0.6, -0.6) * side
    columns = side[:, None], action[:, None], good, 0 * side[:, None], np.ones(n)
    data = Batch(*(jnp.asarray(x, jnp.float32) for x in columns))
    cfg = awac.Config(
        widths=(32,), batch_size=256, num_updates=800, log_every=800, lr=5e-3, polyak=0.05,
        num_samples=4,
    )  # fmt: skip
    start = INIT(KEY, data, cfg)

    def train(beta):
        return awac.train_chunk(start, data, KEY, cfg.log_every, replace(cfg, beta=beta))[0]

    states = jax.jit(jax.vmap(train))(jnp.array([0.0, 1.0, 10.0]))
    sides = jnp.array([[-1.0], [1.0]])
    towards = jax.vmap(awac.act, (0, None))(states, sides)[..., 0] * sides[:, 0]  # (beta, side)
    np.testing.assert_allclose(towards[0], -0.24, atol=0.08)  # BC: 0.3 x 0.6 - 0.7 x 0.6
    assert np.all((towards[1] > towards[0] + 0.1) & (towards[1] < 0.5))
    np.testing.assert_allclose(towards[2], 0.6, atol=0.08)
    assert np.all(0.6 * np.sign(towards[0]) < 0)  # BC is on the worse side

    q = jax.vmap(lambda s, a: s.critic.apply_fn(s.critic.params, sides, a), (0, None))
    for sign, pays in ((0.6, 1.0), (-0.6, 0.0)):
        np.testing.assert_allclose(q(states, sign * sides), pays, atol=0.1)


# --- A world with known values ---

# Three states. In FIRST any action leads on to SECOND, for nothing; there a positive action pays 1,
# any other nothing, and that is the end. Seven of ten actions of the data are negative. LOOP pays
# 0.1 and leads to itself; only time limits end it, so that it is worth 0.1 / (1 - gamma).
FIRST, SECOND, LOOP = range(3)


def test_critics_value_the_policy_that_there_is():
    """Of beta = 0, behaviour cloning, and of 10; not the data's actions, nor the best ones."""
    rng, s = np.random.default_rng(0), np.arange(600) % 3
    action = rng.uniform(0, 1, 600) * np.where(np.arange(600) % 10 < 3, 1, -1)
    reward = np.select([s == SECOND, s == LOOP], [action > 0, 0.1], 0)
    to = np.where(s == LOOP, LOOP, SECOND)
    rows = Batch(np.eye(3)[s], action[:, None], reward, np.eye(3)[to], s == SECOND)
    data = Batch(*(jnp.asarray(x, jnp.float32) for x in rows))
    cfg = awac.Config(
        widths=(32, 32), batch_size=64, log_every=3000, lr=3e-3, polyak=0.05, gamma=0.8,
        normalize=False, num_samples=4,
    )  # fmt: skip
    start = INIT(KEY, data, cfg)

    @jax.jit
    @jax.vmap
    def train(beta):
        """Critics' values of own actions by state, of the data's by row; how often own ones pay."""
        state, _ = awac.train_chunk(start, data, KEY, cfg.log_every, replace(cfg, beta=beta))
        obs = jnp.broadcast_to(jnp.eye(3), (2000, 3, 3))
        own = state.actor.apply_fn(state.actor.params, obs).sample(seed=KEY).clip(-1, 1)
        q = partial(state.critic.apply_fn, state.critic.params)
        pays = jnp.mean(own[:, SECOND] > 0)
        return q(obs, own).mean((0, 1)), q(data.obs, data.action).mean(0), pays

    own, q, pays = train(jnp.array([0.0, 10.0]))
    assert pays[0] < 0.5 and pays[1] > 0.8  # clones do what is common, AWAC what pays
    np.testing.assert_allclose(own[:, SECOND], pays, atol=0.1)
    np.testing.assert_allclose(own[:, LOOP], 0.1 / (1 - cfg.gamma), atol=0.1)
    after = np.broadcast_to(cfg.gamma * pays[:, None], (2, 200))  # whatever the action in FIRST
    np.testing.assert_allclose(q[:, s == FIRST], after, atol=0.1)
