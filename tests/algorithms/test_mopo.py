"""MOPO: u(s, a) by hand, where it is paid and by whom, MBPO, and a world with a known best action.

Its model, buffer and minibatches are COMBO's, text for text; test_combo.py has their tests.
"""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import mopo
import numpy as np
import pytest
import sac

from common.datasets import Batch

SMALL = dict(
    num_updates=1000, log_every=20, batch_size=16, widths=(16, 16), rollout_every=10, horizon=2,
    rollout_batch=20, retain=2, model_widths=(8, 8), model_decay=(0.0,) * 3, num_members=4,
    num_elites=2, penalty_scale=1.0, real_fraction=0.25,
)  # fmt: skip


def config(**values):
    return mopo.Config(**SMALL | values)


@lru_cache
def data(rows=200):
    rng = np.random.default_rng(0)
    draw = (rng.normal(size=(rows, 2)), rng.uniform(-1, 1, (rows, 1)), rng.normal(size=rows),
            rng.normal(size=(rows, 2)), rng.random(rows) < 0.1)  # fmt: skip
    return Batch(*(jnp.array(x, jnp.float32) for x in draw))


@lru_cache
def fresh(cfg=None):
    cfg = cfg or config()
    return jax.jit(partial(mopo.init, cfg=cfg))(jax.random.key(0), data())


def by_hand(mean, std):
    """Dynamics of members that predict mean and std, (M, D + 1), whatever they are asked."""
    params = jax.tree.map(jnp.zeros_like, fresh().dynamics.params["params"])
    params["Dense_2"]["bias"] = jnp.concatenate([mean, 2 * jnp.log(std)], -1)
    bounds = {"upper": params["upper"] + 30, "lower": params["lower"] - 30}
    return fresh().dynamics.replace(params={"params": params | bounds})


def u(mean, std, kind="std"):
    """u of the members above at three pairs (s, a), which are all the same."""
    dynamics = by_hand(*(jnp.broadcast_to(jnp.float32(x), (4, 3)) for x in (mean, std)))
    found = mopo.uncertainty(dynamics, jnp.ones((3, 2)), jnp.ones((3, 1)), config(uncertainty=kind))
    assert found.shape == (3,)
    np.testing.assert_allclose(found, found[0], rtol=1e-6)
    return found[0]


# --- u(s, a) ---


def test_the_norm_is_over_next_state_and_reward():
    assert np.isclose(u(0.0, 0.3), 0.3 * np.sqrt(3), rtol=1e-5)
    np.testing.assert_allclose(u(0.0, [0.1, 0.2, 2.0]), np.sqrt(0.01 + 0.04 + 4), rtol=1e-5)


def test_a_member_that_is_no_elite_counts():
    """The elites are the first two."""
    std = np.full((4, 3), 0.1)
    std[3] = 5.0
    np.testing.assert_allclose(u(0.0, std), 5 * np.sqrt(3), rtol=1e-5)
    mean = np.zeros((4, 3))
    mean[3] = 4.0, 0.0, 9.0  # of the mean of all, (1, 0), 3 away; the reward does not count
    np.testing.assert_allclose(u(mean, 0.1, "disagreement"), 3.0, rtol=1e-5)
    np.testing.assert_allclose(u(mean, 0.1, "spread"), np.sqrt(3 / 2), rtol=1e-5)  # variances 3, 0


@pytest.mark.parametrize("kind", ["disagreement", "spread"])
def test_members_that_agree_are_certain_whatever_their_std(kind):
    assert u([0.4, -0.7, 1.0], 3.0, kind) < 1e-6


# --- Who pays ---


@pytest.mark.parametrize("kind", ["std", "disagreement", "spread"])
def test_imagined_rewards_pay_for_u_and_nothing_else_changes(kind):
    def rolled(scale):
        cfg = config(penalty_scale=scale, uncertainty=kind)
        roll = jax.jit(partial(mopo.rollout, cfg=cfg, terminal=mopo.never))
        return roll(fresh(), data(), jax.random.key(0))

    (free, kept), (paid, kept_too) = rolled(0.0), rolled(2.5)
    np.testing.assert_array_equal(kept, kept_too)
    for name in ("obs", "action", "next_obs", "done"):
        np.testing.assert_array_equal(getattr(free, name), getattr(paid, name))
    found = mopo.uncertainty(fresh().dynamics, free.obs, free.action, config(uncertainty=kind))
    assert np.std(found) > 1e-3
    np.testing.assert_allclose(paid.reward, free.reward - 2.5 * found, rtol=1e-5, atol=1e-5)


def test_without_a_penalty_u_is_not_even_computed(monkeypatch):
    """MBPO: the members that are no elites may be anything."""
    monkeypatch.setattr(mopo, "uncertainty", None)
    cfg = config(penalty_scale=0.0)
    broken = jax.tree.map(lambda x: x.at[2:].set(jnp.nan), fresh().dynamics.params)
    state = fresh().replace(dynamics=fresh().dynamics.replace(params=broken))
    rows, _ = mopo.rollout(state, data(), jax.random.key(0), cfg, mopo.never)
    whole, _ = mopo.rollout(fresh(), data(), jax.random.key(0), cfg, mopo.never)
    for one, other in zip(rows, whole, strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(TypeError):
        mopo.rollout(state, data(), jax.random.key(0), config(), mopo.never)


def test_the_datas_own_rewards_are_not_penalised(monkeypatch):
    """Rewards of the data are 7, those of the model 1e9 or, penalised, far below."""
    cfg = config(penalty_scale=1e9, real_fraction=1 - 1 / 16)
    rows = data()._replace(reward=jnp.full(200, 7.0))

    def update(state, batch, key, cfg):
        info = {"data": jnp.sum(batch.reward == 7), "model": jnp.sum(batch.reward < -1e6)}
        return state, info | {"last": batch.reward[-1] < -1e6}

    monkeypatch.setattr(mopo, "update", update)
    chunk = jax.jit(partial(mopo.train_chunk, cfg=cfg, terminal=mopo.never))
    _, info = chunk(fresh(cfg), rows, jax.random.key(0), 20)
    assert (info["data"], info["model"], info["last"]) == (15, 1, 1)


# --- Learning ---


def test_the_updates_are_soft_actor_critics():
    """Of the same rows: SAC's own loss, and its policy's and temperature's to the letter."""
    state, rows, key = fresh(), jax.tree.map(lambda x: x[:16], data()), jax.random.key(1)
    loss, _ = mopo.critic_loss(state.critic.params, state, rows, jax.random.split(key)[0], config())
    expected, _ = sac.critic_loss(state.critic.params, state, rows, key, sac.Config())
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_q_is_reported_of_the_datas_rows_and_of_the_models():
    state, rows = fresh(), jax.tree.map(lambda x: x[:16], data())
    _, info = mopo.critic_loss(state.critic.params, state, rows, jax.random.key(0), config())
    q = state.critic.apply_fn(state.critic.params, rows.obs, rows.action)
    np.testing.assert_allclose(info["q_data"], q[:, :4].mean(), rtol=1e-5)
    np.testing.assert_allclose(info["q_model"], q[:, 4:].mean(), rtol=1e-5)


@pytest.mark.parametrize(("scale", "low", "high"), [(0.0, 0.8, 1.0), (10.0, 0.0, 0.55)])
def test_the_penalty_keeps_the_policy_where_the_model_is_certain(monkeypatch, scale, low, high):
    """One step of r(a) = a, known exactly for |a| <= 1/2; beyond, u = |a| - 1/2 and the model says
    what it will. The best action is 1 with no penalty, and the edge of the known at a scale above
    1, from which a policy that varies keeps away."""
    cfg = config(
        penalty_scale=scale, gamma=0.0, actor_lr=3e-3, critic_lr=1e-2, num_updates=4000,
        log_every=400, rollout_every=100, rollout_batch=200, horizon=1, batch_size=64,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    action = rng.uniform(-0.5, 0.5, (200, 1))
    rows = data()._replace(
        action=jnp.float32(action), reward=jnp.float32(action[:, 0]), next_obs=data().obs
    )

    def model_step(dynamics, obs, action, key, cfg):
        return obs, action[:, 0]

    def uncertainty(dynamics, obs, action, cfg):
        return jnp.maximum(abs(action[:, 0]) - 0.5, 0)

    monkeypatch.setattr(mopo, "model_step", model_step)
    monkeypatch.setattr(mopo, "uncertainty", uncertainty)
    state = jax.jit(partial(mopo.init, cfg=cfg))(jax.random.key(0), rows)
    cold = jax.tree.map(lambda x: x - 7, state.temperature.params)  # entropy earns nothing
    state = state.replace(temperature=state.temperature.replace(params=cold))
    chunk = jax.jit(partial(mopo.train_chunk, cfg=cfg, terminal=mopo.never))
    state, _ = chunk(state, rows, jax.random.key(1), cfg.log_every)
    actions = mopo.act(state, rows.obs)
    assert low < actions.min() and actions.max() <= high, (actions.min(), actions.max())
