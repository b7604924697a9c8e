"""Cal-QL: its penalty in float64 and against CQL, returns-to-go of both phases, mixed batches."""

from dataclasses import replace
from functools import partial

import cal_ql
import cql
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import f64, mlp, random_batch, scramble

from common import datasets

CFG = cal_ql.Config(
    widths=(8, 8), critic_widths=(8, 8), batch_size=16, num_actions=3, gamma=0.9, alpha=2.0,
    scale_reward=2.0, shift_reward=-1.0, num_updates=40, online_steps=30,
)  # fmt: skip
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def batch():
    rows = random_batch()
    return cal_ql.Labelled(*rows, jnp.linspace(-1, 1, len(rows.reward)))


@pytest.fixture(scope="module")
def state(batch):
    fresh = jax.jit(partial(cal_ql.init, cfg=CFG))(KEY, batch)
    nets = {name: getattr(fresh, name) for name in ("actor", "critic")}
    moved = {k: v.replace(params=scramble(v.params, i)) for i, (k, v) in enumerate(nets.items())}
    return fresh.replace(**moved, target=scramble(fresh.target, 9))


# --- The penalty ---


def test_only_the_policys_actions_are_calibrated():
    """Q (-5, 2) with G = 0: (0, 2), without a gradient for the first."""
    cfg = replace(CFG, num_actions=1)
    q = jnp.array([[[-7.0], [-5.0], [2.0]]])  # uniform, pi(. | s), pi(. | s')
    got = cal_ql.calibrated(q, jnp.zeros(1), cfg)
    np.testing.assert_array_equal(got[0, :, 0], [-7, 0, 2])
    slope = jax.grad(lambda q: cal_ql.calibrated(q, jnp.zeros(1), cfg).sum())(q)
    np.testing.assert_array_equal(slope[0, :, 0], [1, 0, 1])


@pytest.mark.parametrize("lagrange", [None, 0.5])
def test_the_loss_in_float64(state, batch, lagrange):
    cfg = replace(CFG, lagrange=lagrange)
    loss, info = cal_ql.critic_loss(state.critic.params, state, batch, KEY, cfg)
    k_backup, k_propose = jax.random.split(KEY)
    target = f64(cal_ql.backup(state, batch, k_backup, cfg))
    action, log_density = f64(cal_ql.propose(state, batch, k_propose, cfg))
    params, rows, total, below = f64(state.critic.params)["params"], f64(batch), 0, []
    for i in range(2):
        member = jax.tree.map(lambda x, i=i: x[i], params["MLP_0"])

        def q(action, member=member):
            obs = np.broadcast_to(rows.obs, (*action.shape[:-1], rows.obs.shape[-1]))
            return mlp(member, np.concatenate([obs, action], -1))[..., 0]

        other = q(action)  # (9, B)
        below.append(other[3:] < rows.to_go)
        other[3:] = np.maximum(other[3:], rows.to_go)
        gap = np.mean(np.log(np.exp(other - log_density).sum(0)) - q(rows.action))
        total += np.mean((q(rows.action) - target) ** 2)
        total += CFG.alpha * (np.e if lagrange else 1) * gap
    np.testing.assert_allclose(loss, total, rtol=1e-5)
    np.testing.assert_allclose(info["below"], np.mean(below), rtol=1e-6)
    assert 0.1 < info["below"] < 0.9


@pytest.mark.parametrize("how", ["no return", "no calibration"])
def test_without_a_lower_bound_it_is_cql(state, batch, how):
    """Loss and gradient, with CQL's own code."""
    mine, cfg = batch, CFG
    if how == "no return":
        mine = batch._replace(to_go=jnp.full_like(batch.to_go, -jnp.inf))
    else:
        cfg = replace(CFG, calibrate=False)
    theirs = cql.Config(num_actions=3, gamma=0.9, alpha=2.0, max_backup=True)
    rows = datasets.Batch(*batch[:5])
    args = state.critic.params, state
    got = jax.value_and_grad(cal_ql.critic_loss, has_aux=True)(*args, mine, KEY, cfg)
    expected = jax.value_and_grad(cql.critic_loss, has_aux=True)(*args, rows, KEY, theirs)
    assert float(got[0][0]) == pytest.approx(float(expected[0][0]), rel=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), got[1], expected[1])


def test_a_high_return_takes_the_policys_actions_out_of_the_penalty(state, batch):
    """With G above every Q only uniform actions and the data's have a gradient; q_data stays."""
    high = batch._replace(to_go=jnp.full_like(batch.to_go, 1e3))
    _, info = cal_ql.critic_loss(state.critic.params, state, high, KEY, CFG)
    _, plain = cal_ql.critic_loss(state.critic.params, state, batch, KEY, CFG)
    assert info["below"] == 1 and info["q_data"] == plain["q_data"]
    assert info["td_loss"] == plain["td_loss"] and info["gap"] > plain["gap"]


# --- Returns-to-go ---


def episodes(lengths, done, reward):
    """A Dataset of such episodes and rewards."""
    start = np.cumsum([0, *lengths[:-1]])
    ends = np.zeros(sum(lengths), np.float32)
    ends[start + lengths - 1] = done
    rows = random_batch(sum(lengths))
    arrays = (np.asarray(x) for x in (rows.obs, rows.action))
    fields = [*arrays, np.float32(reward), np.asarray(rows.next_obs), ends, start]
    return datasets.Dataset("x", "", *fields, np.array(lengths), None, None, {})


def test_returns_to_go_of_both_phases():
    """A terminal, a cut, a failure (equal rewards until the time limit); the same two ways."""
    lengths, done = [3, 4, 3, 2], [1, 0, 0, 1]
    reward = [1, 2, 3, 1, 0, 2, 5, -1, -1, -1, -1, -1]
    data = episodes(lengths, done, reward)
    got = cal_ql.returns_to_go(data, data.reward, CFG.gamma)
    expected = []
    for begin, size in zip(data.start, lengths, strict=True):
        for t in range(begin, begin + size):
            left = data.reward[t : begin + size]
            expected.append((CFG.gamma ** np.arange(len(left))) @ left)
    expected[7:10] = [-10, -10, -10]
    np.testing.assert_allclose(got, expected, rtol=1e-5)

    end = np.zeros(30, np.float32)
    end[data.start + np.array(lengths) - 1] = 1

    def padded(x):
        return jnp.asarray(np.concatenate([x, np.full((30 - len(x), *x.shape[1:]), 9, np.float32)]))

    replay = datasets.Batch(*(padded(np.asarray(x)) for x in data.transitions()))
    close, ready = jax.jit(partial(cal_ql.close_episode, limit=5, cfg=CFG)), []
    state = jax.jit(partial(cal_ql.init, cfg=CFG))(KEY, cal_ql.Labelled(*replay, jnp.zeros(30)))
    state = state.replace(replay=replay, end=jnp.asarray(end))
    for at in range(12):
        state = close(state, at)
        ready.append(int(state.ready))
        np.testing.assert_array_equal(state.to_go[ready[-1] :], 0)
    assert ready == [0, 0, 3, 3, 3, 3, 7, 7, 7, 10, 10, 12]
    np.testing.assert_allclose(state.to_go[:12], got, rtol=1e-5)


# --- Batches ---


def seen_rewards(state, data, cfg, count, monkeypatch):
    """Rewards (count, B) of the batches of online updates after 20 steps."""
    found = []

    def update(state, batch, key, cfg):
        found.append(np.asarray(batch.reward))
        return state, {}

    monkeypatch.setattr(cal_ql, "update", update)
    for seed in range(count):
        cal_ql.learn(state, data, jax.random.key(seed), 30, limit=20, cfg=cfg)
    return np.array(found)


@pytest.mark.parametrize(("share", "known"), [(0.5, 8), (0.25, 4), (1.0, 16), (0.0, 0)])
def test_halves_of_a_batch(share, known, state, batch, monkeypatch):
    """Rewards of data are 1, of ended episodes 2, of the unfinished one 3, of empty rows 4."""
    reward = jnp.repeat(jnp.array([2.0, 3.0, 4.0]), jnp.array([15, 5, 10]), total_repeat_length=30)
    state = state.replace(
        replay=state.replay._replace(reward=reward), end=jnp.zeros(30).at[14].set(1), ready=15
    )
    data = batch._replace(reward=jnp.ones(16))
    got = seen_rewards(state, data, replace(CFG, data_share=share), 20, monkeypatch)
    np.testing.assert_array_equal((got == 1).sum(1), known)
    np.testing.assert_array_equal((got == 2).sum(1), 16 - known)


def test_until_the_first_episode_has_ended_a_batch_is_data(state, batch, monkeypatch):
    state = state.replace(replay=state.replay._replace(reward=jnp.full(30, 3.0)))
    got = seen_rewards(state, batch._replace(reward=jnp.ones(16)), CFG, 5, monkeypatch)
    assert (got == 1).all()
