"""Decision Diffuser: losses, guidance and whole plans by hand; conditions; composition, learned.

Its schedule, U-Net and denoising steps are diffuser.py's text, tested there.
"""

from dataclasses import replace
from functools import partial

import chex
import decision_diffuser as dd
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from float64 import assert_first_adam_step, f64, gradient

from common import datasets, experiment

D, A = 3, 2
H, T, E = 4, 6, 3
CFG = dd.Config(
    horizon=H, diffusion_steps=T, multiples=(1, 2), width=8, inverse_widths=(8,), batch_size=6,
    log_every=50, gamma=0.9, lr=1e-2, ema=0.9, drop=0.25, end_return=-100.0, target=0.9,
    regions=(0, 5.0, 99.0, 2, -99.0, 4.0), guidance=1.2, temperature=0.5, plan_every=1,
)  # fmt: skip
KEY = jax.random.key(0)
LENGTHS, TERMINAL = (9, 2, 5), 8  # rows 0-8, which end truly, 9-10, shorter than a window, 11-15
FAST = dict(compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time
WINDOWS = jax.jit(dd.minibatch, static_argnums=3, **FAST)
ADAM = optax.adam(CFG.lr)


@pytest.fixture(scope="module")
def dataset():
    rng, rows = np.random.default_rng(0), sum(LENGTHS)
    obs = (5 + 3 * rng.normal(size=(rows, D))).astype(np.float32)
    action = rng.uniform(-1, 1, (rows, A)).astype(np.float32)
    reward, done = rng.normal(size=rows).astype(np.float32), np.zeros(rows, np.float32)
    done[TERMINAL] = 1
    arrays = obs, action, reward, obs, done, np.cumsum([0, *LENGTHS[:-1]]), np.array(LENGTHS)
    return datasets.Dataset("noise", "", *arrays, None, None, {})


@pytest.fixture(scope="module")
def data(dataset):
    return jax.tree.map(jnp.asarray, dd.shares(dataset.steps(CFG.gamma, CFG.end_return)))


@pytest.fixture(scope="module")
def state(data):
    return jax.jit(dd.init, static_argnums=2, **FAST)(KEY, data, CFG)


@pytest.fixture(scope="module")
def batch(state, data):
    """Windows of 4, 2, 1, 2, 4 and 3 steps."""
    return WINDOWS(state, data, jnp.array([1, 7, 8, 9, 11, 13]), CFG)


def fake(state, model, params=None, **nets):
    """A state whose networks are functions of (parameters, inputs)."""
    learners, own = {}, {"model": model, **nets}
    for name, net in own.items():
        kept = {} if params is None else params[name]
        learners[name] = TrainState.create(apply_fn=net, params=kept, tx=ADAM)
    ema = {name: learners[name].params for name in learners}
    return state.replace(ema=state.ema | ema, **learners)


def pointwise(x, t, y, keep):
    """What anyone can compute: it depends on the step and on the condition, if there is one."""
    shift = (keep * (y @ np.arange(1.0, 1 + y.shape[-1])))[:, None, None]
    return 0.3 * x + 0.1 * t[:, None, None] + 0.2 * shift


def model(params, x, given):
    return pointwise(x, *given)


def known(state, seed=3):
    return jnp.float32(np.random.default_rng(seed).normal(size=(E, D))), None


# --- The network's condition ---


def test_the_embedding_holds_the_step_and_the_condition(state):
    """W numbers of t as in diffuser.py; beside them W of y, or zeros."""
    net, width = dd.TimeEmbedding(8), 8
    t, y, keep = (
        jnp.array([0, 3.0]),
        jnp.float32([[0.5, 0, 1], [1, 2, 3]]),
        jnp.array([True, False]),
    )
    params = net.init(KEY, (t, y, keep))
    found, p = net.apply(params, (t, y, keep)), f64(params)["params"]

    def mish(x):
        return x * np.tanh(np.logaddexp(0, x))

    def dense(name, x):
        return x @ p[name]["kernel"].T + p[name]["bias"]

    for i in range(2):
        angle = float(t[i]) * np.exp(-np.log(10_000) * np.arange(4) / 3)
        x = np.concatenate([np.sin(angle), np.cos(angle)])
        x = dense("Dense_0", mish(dense("Dense_1", x)))
        np.testing.assert_allclose(found[i, :width], x, rtol=1e-4, atol=1e-5)
        told = f64(y[i])
        for name in ("Dense_4", "Dense_3", "Dense_2"):  # the outer layer was made first
            told = dense(name, mish(told) if name != "Dense_4" else told)
        np.testing.assert_allclose(
            found[i, width:], told if i == 0 else np.zeros(8), rtol=1e-4, atol=1e-5
        )


def test_what_is_not_kept_does_not_count(state, batch):
    """Other conditions: the same prediction without, another with them."""
    net = jax.jit(state.model.apply_fn, **FAST)
    t, other = jnp.arange(6), batch.y + 1

    def predict(y, keep):
        return net(state.model.params, batch.x, (t, y, jnp.full(6, keep)))

    np.testing.assert_array_equal(predict(batch.y, False), predict(other, False))
    assert np.abs(predict(batch.y, True) - predict(other, True)).max() > 1e-3
    assert np.abs(predict(batch.y, True) - predict(batch.y, False)).max() > 1e-3


# --- Windows and their conditions ---


def test_windows(batch, data):
    """Standardised observations, raw actions, nothing of another episode."""
    obs = f64(data.obs)
    obs = (obs - obs.mean(0)) / (obs.std(0) + 1e-3)
    rows = [[1, 2, 3, 4], [7, 8], [8], [9, 10], [11, 12, 13, 14], [13, 14, 15]]
    for x, action, mask, mine in zip(batch.x, batch.action, batch.mask, rows, strict=True):
        np.testing.assert_array_equal(mask, np.arange(H) < len(mine))
        np.testing.assert_allclose(x[: len(mine)], obs[mine], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(action[: len(mine)], data.action[np.array(mine)])


def test_regions_by_hand(batch, data):
    """Visited at some step that the episode has: column 0 from 5 on, column 2 below 4."""
    rows = [[1, 2, 3, 4], [7, 8], [8], [9, 10], [11, 12, 13, 14], [13, 14, 15]]
    for y, mine in zip(batch.y, rows, strict=True):
        obs = np.array(data.obs)[mine]
        inside = [(obs[:, 0] >= 5).any(), (obs[:, 2] < 4).any()]
        assert y[1:].tolist() == [1 if x else -1 for x in inside]
        np.testing.assert_allclose(y[0], data.returns_to_go[mine[0]])
    assert -1 < batch.y[:, 1:].mean() < 1


def test_regions_on_average(data):
    cfg = replace(CFG, region_mean=True)
    obs = jnp.array([[[0.0, 0, 9], [11, 0, 9], [-99, 0, -99], [99, 0, -99]]])
    mask = jnp.array([[True, True, False, False]])
    assert dd.visited(obs, mask, cfg).tolist() == [[True, False]]
    assert dd.visited(obs, mask, CFG).tolist() == [[True, False]]
    assert dd.visited(obs - 1, mask, cfg).tolist() == [[False, False]]
    assert dd.visited(obs - 1, mask, CFG).tolist() == [[True, False]]


def test_returns_are_shares_of_their_range(dataset):
    """Of the discounted returns to go of all steps, with what a terminal state costs."""
    steps = dataset.steps(0.9, -100.0)
    found, returns = dd.shares(steps).returns_to_go, f64(steps.returns_to_go)
    assert found.min() == 0 and found.max() == 1 and found.argmin() == TERMINAL
    np.testing.assert_allclose(found, (returns - returns.min()) / np.ptp(returns), rtol=1e-5)
    level = dd.shares(steps._replace(returns_to_go=np.ones(16, np.float32)))
    np.testing.assert_array_equal(level.returns_to_go, 0)


def test_a_quarter_of_the_windows_is_told_nothing():
    """And the others one condition each, drawn without a look at the window."""
    n = 40_000
    y = jnp.tile(jnp.float32([[0.5, 1, 1], [0.5, -1, -1]]), (n // 2, 1))
    batch = dd.Window(None, None, None, y)
    choose = jax.jit(dd.chosen, static_argnums=2)
    told, keep = choose(batch, KEY, CFG)
    assert abs(float(keep.mean()) - 0.75) < 0.01
    which = np.array(told) != 0
    np.testing.assert_array_equal(told, np.where(which, y, 0))
    np.testing.assert_array_equal(which.sum(1), 1)
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        np.testing.assert_allclose(which[rows].mean(0), 1 / 3, atol=0.01)
        assert abs(float(keep[rows].mean()) - 0.75) < 0.01
    told, _ = choose(batch, KEY, replace(CFG, target=None))  # no window is told its return
    np.testing.assert_allclose((np.array(told) != 0).mean(0), [0, 0.5, 0.5], atol=0.01)
    returns = dd.Window(None, None, None, y[:, :1])
    assert not choose(returns, KEY, replace(CFG, target=None))[1].any()


# --- Losses ---


@pytest.fixture
def frozen(monkeypatch):
    """Times and noise of a loss are known, and each window is told its return: (times, noise)."""
    rng = np.random.default_rng(7)
    t, noise = rng.integers(0, T, 6), rng.normal(size=(6, H, D)).astype(np.float32)
    monkeypatch.setattr(jax.random, "randint", lambda key, shape, low, high: jnp.array(t))
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.array(noise))
    told = np.arange(6) % 3 > 0
    monkeypatch.setattr(dd, "chosen", lambda batch, key, cfg: (batch.y, jnp.array(told)))
    return t, noise, told


def noisy64(batch, t, noise):
    x, abar = f64(batch.x), dd.schedule(T)[t][:, None, None]
    x = np.sqrt(abar) * x + np.sqrt(1 - abar) * noise
    x[:, 0] = batch.x[:, 0]  # known
    return x


def test_model_loss_by_hand(state, batch, frozen):
    """Of x_0; the first state and what lies beyond the episode's end cost nothing."""
    t, noise, told = frozen
    x, mask = noisy64(batch, t, noise), f64(batch.mask)
    error = (pointwise(x, t, f64(batch.y), told) - f64(batch.x)) ** 2
    error[:, 0] = 0
    expected = np.sum(error.mean(-1) * mask) / mask.sum()
    loss, info = dd.model_loss({}, fake(state, model), batch, KEY, CFG)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert info["model_loss"] == loss


def pairs64(batch):
    """States, next states and actions within the episodes."""
    rows = [(i, h) for i in range(6) for h in range(H - 1) if batch.mask[i, h + 1]]
    x, action = f64(batch.x), f64(batch.action)
    return np.array([[*x[i, h], *x[i, h + 1]] for i, h in rows]), [action[i, h] for i, h in rows]


def test_inverse_loss_by_hand(state, batch):
    """Between each two states of an episode: 3, 1, 0, 1, 3 and 2 of them."""
    pairs, actions = pairs64(batch)
    assert len(pairs) == 10
    inverse = fake(
        state, model, inverse=lambda params, pair: jnp.sin(pair[..., :A]) - pair[..., D:5]
    )
    loss, _ = dd.inverse_loss({}, inverse, batch)
    expected = np.mean((np.sin(pairs[:, :A]) - pairs[:, D:5] - actions) ** 2)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_update_by_hand(state, batch, frozen):
    """A step of Adam on either loss; then both averages move a tenth of the way."""
    rng, (t, noise, told) = np.random.default_rng(1), frozen
    forms = {"model": {"w": (D, D), "c": 3}, "inverse": {"w": (2 * D, A), "b": A}}
    params = {
        net: {k: jnp.float32(0.3 * rng.normal(size=v)) for k, v in form.items()}
        for net, form in forms.items()
    }

    def predict(p, x, given):
        t, y, keep = given
        return x @ p["w"] + 0.1 * t[:, None, None] + (keep * (y @ p["c"]))[:, None, None]

    def inverse(p, pair):
        return pair @ p["w"] + p["b"]

    own = fake(state, predict, params, inverse=inverse)
    x, mask, (pairs, actions) = noisy64(batch, t, noise), f64(batch.mask), pairs64(batch)

    def model64(p):
        error = (predict(p, x, (t, f64(batch.y), told)) - f64(batch.x)) ** 2
        return np.sum(error[:, 1:].mean(-1) * mask[:, 1:]) / mask.sum()

    losses = {"model": model64, "inverse": lambda p: np.mean((inverse(p, pairs) - actions) ** 2)}
    new, info = dd.update(own, batch, KEY, CFG)
    assert info.keys() == {"model_loss", "inverse_loss"}
    for name, loss in losses.items():
        before, after = getattr(own, name), getattr(new, name)
        np.testing.assert_allclose(info[f"{name}_loss"], loss(f64(before.params)), rtol=1e-5)
        assert_first_adam_step(before, after, gradient(loss, f64(before.params)), CFG.lr)
        expected = jax.tree.map(
            lambda old, now: 0.9 * old + 0.1 * now, f64(own.ema[name]), f64(after.params)
        )
        chex.assert_trees_all_close(f64(new.ema[name]), expected, rtol=1e-5, atol=1e-7)


def test_linear_dynamics_are_inverted():
    """s' = s + B a: f recovers a, from pairs it did not see."""
    rng, steps = np.random.default_rng(0), 64
    dynamics = np.array([[0.5, 0.2], [-0.3, 0.4]])
    action = rng.uniform(-1, 1, (400, steps, 2))
    x = np.cumsum(np.concatenate([rng.normal(size=(400, 1, 2)), action @ dynamics.T], 1), 1)
    x = x[:, :-1] - x[:, :1]
    mask = jnp.ones((400, steps), bool)
    rows = dd.Window(jnp.float32(x), jnp.float32(action), mask, None)
    net = dd.MLP((32,), 2)
    learner = TrainState.create(
        apply_fn=net.apply,
        params=net.init(KEY, jnp.zeros(4)),
        tx=optax.adam(optax.cosine_decay_schedule(1e-2, 1500)),
    )

    def one(learner, key):
        i = jax.random.randint(key, (8,), 0, 300)
        window = jax.tree.map(lambda x: x[i], rows)
        own = dd.State(None, learner, None, None, None, None, None)
        return dd.descend(dd.inverse_loss, learner, own, window)

    learner, _ = jax.jit(lambda s: jax.lax.scan(one, s, jax.random.split(KEY, 1500)), **FAST)(
        learner
    )
    pair = np.concatenate([x[300:, :-1], x[300:, 1:]], -1)
    error = learner.apply_fn(learner.params, jnp.float32(pair)) - action[300:, :-1]
    assert np.sqrt(np.mean(np.square(error))) < 0.02


# --- Guidance ---


def guided(state, x, cfg, t=3):
    return dd.guided(state, x, jnp.int32(t), cfg)


@pytest.fixture(scope="module")
def x():
    return jnp.float32(np.random.default_rng(2).normal(size=(E, H, D)))


def test_without_weight_no_condition_and_with_weight_one_the_conditional_model(state, x):
    """Bit for bit, and one batch is as good as two calls."""
    t, rows = jnp.full(E, 3), np.float32([[0.9, 0, 0]] * E)
    net = partial(state.model.apply_fn, state.ema["model"])
    with_it = net(x, (t, rows, jnp.ones(E)))
    without = net(x, (t, 0 * rows, jnp.zeros(E)))
    found = {w: guided(state, x, replace(CFG, guidance=w)) for w in (0.0, 1.0, 2.5)}
    np.testing.assert_allclose(found[0.0], without, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1.0], with_it, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        found[2.5], without + 2.5 * (with_it - without), rtol=1e-4, atol=1e-5
    )
    assert np.abs(with_it - without).max() > 1e-3
    exact = fake(state, model)
    both = (pointwise(x, t, rows, k * jnp.ones(E)) for k in (0, 1))
    for w, x0 in zip((0.0, 1.0), both, strict=True):
        np.testing.assert_array_equal(guided(exact, x, replace(CFG, guidance=w)), x0)


def test_guidance_adds_what_is_wanted_and_subtracts_what_is_not(state, x):
    """Of the fake model: 0.2 for the whole return, 0.4 and 0.6 for the regions."""
    exact = fake(state, model)
    base = 0.3 * x + 0.3
    for how, shift in [
        (dict(), 0.9 * 0.2),
        (dict(target=None), 0),
        (dict(target=None, wanted=(0,)), 0.4),
        (dict(target=None, wanted=(0, 1)), 0.4 + 0.6),
        (dict(target=None, unwanted=(1,)), -0.6),
        (dict(target=0.5, wanted=(1,), unwanted=(0,)), 0.5 * 0.2 + 0.6 - 0.4),
    ]:
        found = guided(exact, x, replace(CFG, guidance=1.5, **how))
        np.testing.assert_allclose(found, base + 1.5 * shift, rtol=1e-5, atol=1e-5)


# --- Plans ---


def plan64(state, first, draws, cfg):
    """By the fake model, one step after another; draws: noise of the start and of each step."""
    abar, low, high = dd.schedule(T), f64(state.low), f64(state.high)
    times = [round(t) for t in np.linspace(T - 1, 0, cfg.ddim_steps or T)]
    x = cfg.temperature * draws[0]
    x[:, 0] = first
    for i, t in enumerate(times):
        now, past = abar[t], abar[times[i + 1]] if i + 1 < len(times) else 1.0
        x0 = np.clip(0.3 * x + 0.1 * t + cfg.guidance * 0.9 * 0.2, low, high)
        if cfg.ddim_steps:
            x = np.sqrt(past) * x0 + np.sqrt(1 - past) * (x - np.sqrt(now) * x0) / np.sqrt(1 - now)
        else:
            keep = now / past
            variance = (1 - keep) * (1 - past) / (1 - now)
            mean = np.sqrt(past) * (1 - keep) * x0 + np.sqrt(keep) * (1 - past) * x
            x = mean / (1 - now) + cfg.temperature * np.sqrt(variance) * draws[1 + i]
        x[:, 0] = first
    return x


@pytest.mark.parametrize(("ddim_steps", "temperature"), [(0, 0.5), (0, 1.0), (3, 0.5)])
def test_a_plan_by_hand(state, ddim_steps, temperature):
    how = dict(ddim_steps=ddim_steps, temperature=temperature)
    cfg, first = replace(CFG, **how), known(state)
    k_start, k_steps = jax.random.split(KEY)
    keys = [k_start, *jax.random.split(k_steps, ddim_steps or T)]
    draws = [np.array(jax.random.normal(key, (E, H, D)), float) for key in keys]
    found = jax.jit(dd.plan, static_argnums=3)(fake(state, model), first, KEY, cfg)
    expected = plan64(state, first[0], draws, cfg)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-4)


def test_the_known_state_is_in_its_place_at_every_step(state):
    seen = []

    def watch(params, x, given):
        seen.append(np.array(x))
        return pointwise(x, *given)

    first = known(state)
    with jax.disable_jit():
        plan = dd.plan(fake(state, watch), first, KEY, CFG)
    assert len(seen) == T
    for x in (*seen, plan):
        np.testing.assert_array_equal(x[:E, 0], first[0])
    assert all(np.ptp(x[:E, 1:]) > 0.1 for x in seen)


def test_at_temperature_zero_chance_has_no_say(state):
    plan = jax.jit(dd.plan, static_argnums=3)
    cold, warm = replace(CFG, temperature=0.0), CFG
    found = {
        cfg: [plan(fake(state, model), known(state), jax.random.key(i), cfg) for i in range(2)]
        for cfg in (cold, warm)
    }
    np.testing.assert_array_equal(*found[cold])
    assert np.abs(found[warm][0] - found[warm][1]).max() > 0.1


def gaussian(center, spread):
    """x_0 of data N(center, spread^2), exactly: E[x_0 | x_t]."""

    def x0(x, abar):
        gain = abar**0.5 * spread**2 / (abar * spread**2 + 1 - abar)
        return center + gain * (x - abar**0.5 * center)

    return x0


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.0])
def test_exact_models_of_gaussians_give_their_means(state, weight):
    """N(0, 0.5^2) without the condition and N(0.8, 0.5^2) with it: at w = 1 the mean of the plans
    is the condition's, within 3 standard errors; at w = 2 it lies beyond."""
    abar, steps = jnp.float32(dd.schedule(20)), 20

    def exact(params, x, given):
        t, y, keep = given
        now = abar[t.astype(int)][:, None, None]
        return gaussian(0.8 * keep[:, None, None], 0.5)(x, now)

    n = 4000
    cfg = replace(CFG, diffusion_steps=steps, guidance=weight, temperature=1.0)
    own = fake(state.replace(low=jnp.full(1, -9.0), high=jnp.full(1, 9.0)), exact)
    plans = jax.jit(dd.plan, static_argnums=3)(own, (jnp.zeros((n, 1)), None), KEY, cfg)
    found, error = plans[:, 1:].mean(), plans[:, 1:].std() / np.sqrt(n * (H - 1))
    if weight < 2:
        np.testing.assert_allclose(found, 0.8 * weight, atol=3 * error + 2e-3)
        np.testing.assert_allclose(plans[:, 1:].std(), 0.5, rtol=0.2)  # in 20 steps
    else:
        assert found > 0.8 + 20 * error


def test_plans_survive_a_small_error_of_the_model(state):
    """x_0 of N(0.8, 0.1^2), wrong by 0.03, also where x_t is noise alone: so are the plans."""
    abar = jnp.float32(dd.schedule(20))

    def wrong(params, x, given):
        now = abar[given[0].astype(int)][:, None, None]
        return gaussian(0.8, 0.1)(x, now) + 0.03

    own = fake(state.replace(low=jnp.full(1, -9.0), high=jnp.full(1, 9.0)), wrong)
    cfg = replace(CFG, diffusion_steps=20, ddim_steps=5)
    plans = jax.jit(dd.plan, static_argnums=3)(own, (jnp.zeros((200, 1)), None), KEY, cfg)
    assert 0 < plans[:, 1:].mean() - 0.8 < 0.2


# --- Acting ---


def test_actions_lead_from_what_is_seen_to_the_plans_next_state(state, data):
    """A plan serves two steps; f sees the observation itself, not the planned one."""
    cfg = replace(CFG, plan_every=2)
    own = fake(state, model, inverse=lambda params, pair: pair)
    obs = jnp.float32(5 + np.random.default_rng(0).normal(size=(4, E, D)))
    act, carry, plans = jax.jit(dd.act, static_argnums=5), None, []
    for i in range(4):
        pair, carry = act(own, carry, obs[i], jnp.zeros(E), jax.random.key(i), cfg)
        plans.append(np.array(carry.x))
        np.testing.assert_allclose(pair[:, :D], dd.normalise(state, obs[i]), rtol=1e-5)
        np.testing.assert_array_equal(pair[:, D:], plans[-1][:, 1 + i % 2])
    np.testing.assert_array_equal(plans[0], plans[1])
    np.testing.assert_array_equal(plans[2], plans[3])
    assert np.abs(plans[1] - plans[2]).max() > 0.1
    np.testing.assert_allclose(plans[2][:, 0], dd.normalise(state, obs[2]), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("hopper-medium-expert-v2", (100, 200, 128, (1, 4, 8))),
        ("hopper-medium-v2", (32, 20, 32, (1, 2, 4, 8))),
        ("stillwater/hopper/medium-replay-v0", (32, 20, 32, (1, 2, 4, 8))),
    ],
)
def test_values_of_a_dataset(name, sizes):
    """The authors' sizes where they have them."""
    cfg = experiment.resolve(dd.Config(env=name), dd.TUNED)
    assert (cfg.horizon, cfg.diffusion_steps, cfg.width, cfg.multiples) == sizes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(horizon=6, multiples=(1, 2, 4)), "--horizon 6: must be a multiple of 4"),
        (dict(width=12), "--width 12: must be a multiple of 8"),
        (dict(plan_every=4), "--plan-every 4: must be below --horizon 4"),
        (dict(ddim_steps=7), "--ddim-steps must not exceed"),
        (dict(horizon=10), "--horizon 10: the longest episode of noise has 9 steps"),
        (dict(regions=(1, 2)), "--regions: needs three numbers each"),
        (dict(regions=(3, 0, 1)), "--regions: columns of noise are 0 to 2"),
        (dict(regions=(0.5, 0, 1)), "--regions: columns of noise are 0 to 2"),
        (dict(wanted=(2,)), "--wanted, --unwanted: there are 2 --regions"),
        (dict(regions=None, unwanted=(0,)), "--wanted, --unwanted: there are 0 --regions"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message, dataset):
    dd.check(CFG, dataset)
    with pytest.raises(SystemExit) as error:
        dd.check(replace(CFG, **changes), dataset)
    assert str(error.value).startswith(message)


# --- Learned ---


@pytest.mark.slow
def test_two_conditions_on_independent_axes_compose():
    """After a first state of 0, (a, b) = (+-1, +-1), each with its own coin. Told one thing at a
    time, it plans (1, b) for `a positive`, (1, 1) for both, and -1 where that is to be avoided."""
    rng = np.random.default_rng(0)
    signs = rng.choice([-1.0, 1.0], (500, 1, 2))
    obs = np.concatenate([np.zeros((500, 1, 2)), np.repeat(signs, H - 1, 1)], 1)
    obs[:, 1:] += 0.2 * rng.normal(size=(500, H - 1, 2))
    obs, rows = obs.reshape(-1, 2).astype(np.float32), 500 * H
    zeros, start = np.zeros(rows, np.float32), H * np.arange(500)
    arrays = obs, np.zeros((rows, 1), np.float32), zeros, obs, zeros, start, np.full(500, H)
    data = datasets.Dataset("signs", "", *arrays, None, None, {})
    cfg = replace(
        CFG, diffusion_steps=10, multiples=(1,), width=16, batch_size=64, log_every=500, lr=3e-3,
        regions=(0, 0.5, 9.0, 1, 0.5, 9.0), target=None, normalize=False, temperature=1.0,
        ema=0.98,
    )  # fmt: skip
    data = jax.tree.map(jnp.asarray, dd.shares(data.steps()))

    def train():
        def one(state, key):
            k_rows, k_update = jax.random.split(key)
            rows = H * jax.random.randint(k_rows, (cfg.batch_size,), 0, 500)  # whole episodes
            return dd.update(state, dd.minibatch(state, data, rows, cfg), k_update, cfg)

        return jax.lax.scan(one, dd.init(KEY, data, cfg), jax.random.split(KEY, 900))[0]

    state = jax.jit(train, **FAST)()
    start = jnp.zeros((200, 2)), None

    def means(**how):
        plans = jax.jit(dd.plan, static_argnums=3, **FAST)(state, start, KEY, replace(cfg, **how))
        return np.array(plans[:, 1:].mean((0, 1)))

    np.testing.assert_allclose(means(guidance=0.0), [0, 0], atol=0.4)
    a, both, neither = means(wanted=(0,)), means(wanted=(0, 1)), means(unwanted=(0, 1))
    np.testing.assert_allclose(a, [1, 0], atol=0.4)
    np.testing.assert_allclose(both, [1, 1], atol=0.2)
    assert np.all(neither < -0.6)
