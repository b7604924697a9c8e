"""RLPD: losses in float64, subsets, many steps of Q in one update, halves of a minibatch."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlpd
from float64 import f64, random_batch, scramble

CFG = rlpd.Config(
    widths=(8, 8), batch_size=8, gamma=0.9, polyak=0.1, utd=3, num_critics=4, min_critics=2,
    backup_entropy=True, shift_reward=0.0, num_updates=30, random_steps=10, pretrain_updates=0,
)  # fmt: skip
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def batch():
    return random_batch()


@pytest.fixture(scope="module")
def state(batch):
    fresh = jax.jit(partial(rlpd.init, cfg=CFG))(KEY, batch)
    nets = {name: getattr(fresh, name) for name in ("actor", "critic")}
    moved = {k: v.replace(params=scramble(v.params, i)) for i, (k, v) in enumerate(nets.items())}
    temperature = fresh.temperature.replace(params={"params": {"log": jnp.float32(-0.7)}})
    return fresh.replace(**moved, temperature=temperature, target=scramble(fresh.target, 9))


def q64(params, i, obs, action):
    """Q of member i in numpy: linear, layer normalisation, ReLU, twice; then linear."""
    net, x = params["params"]["NormedMLP_0"], np.concatenate([obs, action], -1)
    for j in range(3):
        dense = net[f"Dense_{j}"]
        x = x @ dense["kernel"][i].T + dense["bias"][i]
        if j < 2:
            norm = net[f"LayerNorm_{j}"]
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
            x = np.maximum(x * norm["scale"][i] + norm["bias"][i], 0)
    return x[..., 0]


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_target_and_the_loss_in_float64(state, batch, size, entropy):
    """min over the drawn members alone; with all of them drawn, over all."""
    cfg = replace(CFG, min_critics=size, backup_entropy=entropy)
    k_pi, k_members = jax.random.split(KEY)
    pi = state.actor.apply_fn(state.actor.params, batch.next_obs)
    action, log_pi = f64(pi.sample_and_log_prob(seed=k_pi))
    members = np.asarray(jax.random.choice(k_members, 4, (size,), replace=False))
    assert len(set(members)) == size
    rows, target = f64(batch), f64(state.target)
    low = np.min([q64(target, i, rows.next_obs, action) for i in members], 0)
    y = rows.reward + 0.9 * (1 - rows.done) * (low - entropy * np.exp(-0.7) * log_pi)
    params = f64(state.critic.params)
    errors = [(q64(params, i, rows.obs, rows.action) - y) ** 2 for i in range(4)]
    loss, _ = rlpd.critic_loss(state.critic.params, state, batch, KEY, cfg)
    np.testing.assert_allclose(loss, np.mean(errors), rtol=1e-4)


def test_the_policy_ascends_the_mean_of_all_critics(state, batch):
    """Its gradient is the mean of the gradients with one critic at a time."""
    slope = jax.grad(rlpd.actor_loss, has_aux=True)
    whole, _ = slope(state.actor.params, state, batch, KEY)
    parts = []
    for i in range(4):
        one = jax.tree.map(lambda x, i=i: x[i : i + 1], state.critic.params)
        alone = state.replace(critic=state.critic.replace(params=one))
        parts.append(slope(state.actor.params, alone, batch, KEY)[0])
    mean = jax.tree.map(lambda *x: sum(x) / 4, *parts)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), whole, mean)


def test_the_temperature_follows_the_entropy(state):
    """Its loss is alpha (entropy - target); below the target alpha rises."""
    slope = jax.grad(rlpd.temperature_loss, has_aux=True)
    below, info = slope(state.temperature.params, state, -5.0, -1.0)
    np.testing.assert_allclose(info["temperature"], np.exp(-0.7), rtol=1e-6)
    np.testing.assert_allclose(below["params"]["log"], np.exp(-0.7) * -4, rtol=1e-6)


def test_an_update_is_many_steps_of_q_and_one_of_the_policy(state, batch):
    """Critics and targets as by three single steps in turn; the policy sees the last minibatch."""
    batches = jax.tree.map(lambda *x: jnp.stack(x), *(random_batch(8, seed=i) for i in range(3)))
    got, _ = jax.jit(partial(rlpd.update, cfg=CFG))(state, batches, KEY)
    k_critic, k_actor = jax.random.split(KEY)
    now, step = state, jax.jit(partial(rlpd.critic_step, cfg=CFG))
    for i, k in enumerate(jax.random.split(k_critic, 3)):
        now, _ = step(now, jax.tree.map(lambda x, i=i: x[i], batches), k)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, got.critic.params, now.critic.params)
    jax.tree.map(close, got.target, now.target)
    last = jax.tree.map(lambda x: x[-1], batches)
    actor, info = rlpd.descend(rlpd.actor_loss, state.actor, now, last, k_actor)
    jax.tree.map(close, got.actor.params, actor.params)
    temperature, _ = rlpd.descend(
        rlpd.temperature_loss, state.temperature, now, info["entropy"], -1.0
    )
    close(got.temperature.params["params"]["log"], temperature.params["params"]["log"])
    assert int(got.critic.step - state.critic.step) == 3
    assert int(got.actor.step - state.actor.step) == 1


def test_every_minibatch_is_half_data_and_half_environment(state, batch, monkeypatch):
    """Rewards of data are 1, of filled rows 2, of others 3."""
    seen = []

    def update(state, batches, key, cfg):
        seen.append(np.asarray(batches.reward))
        return state, {}

    monkeypatch.setattr(rlpd, "update", update)
    reward = jnp.full(40, 3.0).at[:15].set(2.0)
    held = state.replace(replay=state.replay._replace(reward=reward))
    for seed in range(20):
        rlpd.learn(held, batch._replace(reward=jnp.ones(16)), jax.random.key(seed), 5, CFG)
    seen = np.array(seen)  # (20, 3, 8)
    assert set(np.unique(seen)) == {1.0, 2.0}
    np.testing.assert_array_equal((seen == 1).sum(-1), 4)


def test_the_first_actions_are_uniform(state):
    """Until online updates begin; then the policy's samples."""
    obs = jnp.ones(3)
    keys = jax.random.split(KEY, 500)
    first = jax.vmap(lambda k: rlpd.explore_first(state, obs, k, jnp.int32(-3), CFG))(keys)
    later = jax.vmap(lambda k: rlpd.explore_first(state, obs, k, 1, CFG))(keys)
    own = jax.vmap(lambda k: rlpd.explore(state, obs, k, 1))(keys)
    np.testing.assert_array_equal(later, own)
    assert abs(float(first.mean())) < 0.1 and abs(float(first.std()) - 3**-0.5) < 0.05
