"""MOBILE: U(s, a) by hand, whose target it lowers, the clamp, the order of an update.

Its model, buffer and minibatches are COMBO's, text for text; test_combo.py has their tests.
"""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import mobile
import numpy as np
import pytest

from common import experiment
from common.datasets import Batch

SMALL = dict(
    num_updates=1000, log_every=20, batch_size=16, widths=(16, 16), rollout_every=10, horizon=2,
    rollout_batch=20, retain=2, model_widths=(8, 8), model_decay=(0.0,) * 3, num_members=3,
    num_elites=2, beta=1.0, clamp=False, temperature=0.0, real_fraction=0.25, num_samples=4,
)  # fmt: skip


def config(**values):
    return mobile.Config(**SMALL | values)


@lru_cache
def rows(size=16):
    rng = np.random.default_rng(0)
    draw = (rng.normal(size=(size, 2)), rng.uniform(-1, 1, (size, 1)), rng.normal(size=size),
            rng.normal(size=(size, 2)), rng.random(size) < 0.3)  # fmt: skip
    return Batch(*(jnp.array(x, jnp.float32) for x in draw))


@lru_cache
def fresh():
    state = jax.jit(partial(mobile.init, cfg=config()))(jax.random.key(0), rows())
    return jax.tree.map(jnp.copy, state)


def by_hand(mean, std=1e-9):
    """The State with elites that predict mean and std, (E, D + 1), whatever they are asked, and a
    target critic of two equal members with Q(s, a) = s[0]."""
    mean, std = (jnp.broadcast_to(jnp.float32(x), (2, 3)) for x in (mean, std))
    params = jax.tree.map(jnp.zeros_like, fresh().dynamics.params["params"])
    params["Dense_2"]["bias"] = jnp.concatenate([mean, 2 * jnp.log(std)], -1)
    bounds = {"upper": params["upper"] + 90, "lower": params["lower"] - 90}
    dynamics = fresh().dynamics.replace(params={"params": params | bounds})

    def q(params, obs, action):
        return jnp.stack([obs[..., 0]] * 2)

    return fresh().replace(dynamics=dynamics, critic=fresh().critic.replace(apply_fn=q))


def inconsistency(state, seed=0, batch=None, **values):
    run = jax.jit(partial(mobile.inconsistency, cfg=config(**values)))
    return np.asarray(run(state, batch or rows(), jax.random.key(seed)))


# --- U(s, a) ---


def test_two_members_one_apart_on_either_side():
    """Q' is s' itself, which is s + 1 or s - 1: their std, of n - 1, is the root of 2."""
    state = by_hand([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])
    np.testing.assert_allclose(inconsistency(state), np.sqrt(2), rtol=1e-4)


def test_what_q_does_not_depend_on_costs_nothing():
    """The members disagree about the second entry of s' and about the reward."""
    state = by_hand([[0.5, 9.0, 9.0], [0.5, -9.0, -9.0]])
    assert np.abs(inconsistency(state)).max() < 1e-5


def test_the_models_own_noise_is_averaged_out():
    """Members that agree, with std 2: U is the std of two means of S samples, mean square 4 / S."""
    many = jax.tree.map(lambda x: jnp.tile(x, (100, *[1] * (x.ndim - 1))), rows())
    for samples in (1, 16):
        found = inconsistency(by_hand(0.0, [2.0, 1e-9, 1e-9]), batch=many, num_samples=samples)
        np.testing.assert_allclose(np.mean(found**2), 4 / samples, rtol=0.15)


def test_the_smaller_critic_and_the_states_as_the_networks_see_them():
    """Q' is the smaller of s[0] and 3 - s[0], of normalised states: (s' - 5) / 2."""
    state = by_hand([[0.0, 0.0, 0.0], [4.0, 0.0, 0.0]])

    def q(params, obs, action):
        return jnp.stack([obs[..., 0], 3 - obs[..., 0]])

    state = state.replace(
        critic=state.critic.replace(apply_fn=q), obs_mean=jnp.full(2, 5.0), obs_std=jnp.full(2, 2.0)
    )
    before = np.asarray(rows().obs)[:, 0]  # normalised; a step of 4 is one of 2
    values = np.minimum([before, before + 2], 3 - np.array([before, before + 2]))
    np.testing.assert_allclose(inconsistency(state), values.std(0, ddof=1), rtol=1e-3, atol=1e-5)


# --- The target ---


def targets(state, **values):
    run = jax.jit(partial(mobile.backup, cfg=config(**values)))
    return [np.asarray(x) for x in run(state, rows(), jax.random.key(0))]


def test_u_lowers_the_models_targets_alone():
    state = by_hand([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])
    (free, _), (paid, mean) = targets(state, beta=0.0), targets(state, beta=3.0)
    reward, next_obs, done = (np.asarray(rows()[i]) for i in (2, 3, 4))
    np.testing.assert_allclose(free, reward + 0.99 * (1 - done) * next_obs[:, 0], rtol=1e-5)
    np.testing.assert_array_equal(paid[:4], free[:4])
    np.testing.assert_allclose(paid[4:], free[4:] - 3 * np.sqrt(2), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(mean, np.sqrt(2), rtol=1e-4)


def test_the_clamp_is_at_zero():
    state = by_hand([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])
    (free, _), (clamped, _) = targets(state), targets(state, clamp=True)
    assert (free < 0).any() and (free > 0).any()
    np.testing.assert_array_equal(clamped, np.maximum(free, 0))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("halfcheetah-medium-replay-v2", (5, 0.1, True, 0.0)),
        ("stillwater/hopper/medium-v0", (5, 1.5, True, 0.2)),
        ("hopper-medium-expert-v2", (5, 1.5, True, 0.0)),
        ("walker2d-medium-replay-v2", (1, 0.5, True, 0.0)),
        ("antmaze-umaze-v2", (5, 0.5, False, 0.0)),
    ],
)
def test_the_clamp_and_the_fixed_temperature_are_the_named_datasets(name, expected):
    cfg = experiment.resolve(mobile.Config(env=name), mobile.TUNED)
    assert (cfg.horizon, cfg.beta, cfg.clamp, cfg.temperature) == expected


def test_a_file_of_ones_own_is_not_clamped(tmp_path):
    cfg = mobile.Config(env=str(tmp_path / "hopper-medium.hdf5"), env_id="Hopper-v5")
    assert not experiment.resolve(cfg, mobile.TUNED).clamp


# --- An update ---


def updated(state, **values):
    run = jax.jit(partial(mobile.update, cfg=config(**values)))
    return run(state, rows(), jax.random.key(0))


def test_the_loss_is_the_mean_over_rows_and_members():
    state = by_hand(0.0)
    network = fresh().critic
    state = state.replace(critic=network, target=jax.tree.map(jnp.zeros_like, state.target))
    loss, info = mobile.critic_loss(
        network.params, state, rows(), jax.random.key(0), config(beta=0.0)
    )
    q = np.asarray(network.apply_fn(network.params, rows().obs, rows().action))
    np.testing.assert_allclose(loss, np.mean((q - np.asarray(rows().reward)) ** 2), rtol=1e-5)
    np.testing.assert_allclose(info["q_data"], q[:, :4].mean(), rtol=1e-4)
    np.testing.assert_allclose(info["q_model"], q[:, 4:].mean(), rtol=1e-4)


def test_the_policy_learns_from_the_new_critics_and_the_old_temperature():
    state = fresh()
    new, info = updated(state)
    between = state.replace(critic=new.critic)
    k_actor, _ = jax.random.split(jax.random.key(0))
    expected, _ = mobile.actor_loss(state.actor.params, between, rows(), k_actor)
    earlier, _ = mobile.actor_loss(state.actor.params, state, rows(), k_actor)
    np.testing.assert_allclose(info["actor_loss"], expected, rtol=1e-5)
    assert abs(expected - earlier) > 1e-5


def test_the_policys_temperature_is_at_most_one():
    def loss(log):
        warm = jax.tree.map(lambda x: jnp.float32(log), fresh().temperature.params)
        state = fresh().replace(temperature=fresh().temperature.replace(params=warm))
        return mobile.actor_loss(state.actor.params, state, rows(), jax.random.key(0))[0]

    assert loss(0.0) == loss(1.0) == loss(3.0)
    assert loss(-1.0) != loss(0.0)


def test_a_fixed_temperature_stays():
    cfg = config(temperature=0.2)
    state = jax.jit(partial(mobile.init, cfg=cfg))(jax.random.key(0), rows())
    new, info = updated(state, temperature=0.2)
    for value in (info["temperature"], new.temperature.apply_fn(new.temperature.params)):
        np.testing.assert_allclose(value, 0.2, rtol=1e-6)
    learned, _ = updated(fresh())
    assert learned.temperature.apply_fn(learned.temperature.params) != 1


def test_identical_members_and_a_policy_that_does_not_vary_penalise_nothing():
    """U = 0, so that beta does not count."""
    actor = fresh().actor
    p = actor.params["params"]
    calm = p | {"log_std_scale": jnp.zeros(()), "log_std_shift": jnp.array(-20.0)}
    state = fresh().replace(dynamics=by_hand(0.3).dynamics)
    assert inconsistency(state).min() > 1e-4  # an action of its own for each next state
    state = state.replace(actor=actor.replace(params={"params": calm}))
    np.testing.assert_allclose(inconsistency(state), 0, atol=1e-5)
    (free, _), (paid, _) = targets(state, beta=0.0), targets(state, beta=10.0)
    np.testing.assert_allclose(paid, free, atol=1e-4)
