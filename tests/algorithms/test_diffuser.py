"""Diffuser: posterior, U-Net, losses and whole plans against float64; acting; a small world."""

import math
from dataclasses import replace
from functools import partial

import chex
import diffuser
import flax.linen as nn
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
CFG = diffuser.Config(
    horizon=H, diffusion_steps=T, multiples=(1, 4), width=8, batch_size=6, log_every=50,
    gamma=0.9, lr=1e-2, ema=0.9, action_weight=10.0, end_return=-100.0, return_scale=50.0,
    goal=False, samples=2, guide_scale=0.3, guide_steps=2, guide_stop=2, plan_every=1,
)  # fmt: skip
MAZE = replace(CFG, goal=True, plan_every=0, action_weight=1.0)
KEY = jax.random.key(0)
LENGTHS = 9, 2, 5  # one episode is shorter than a window
FIRST = 0, 9, 11  # its rows: 0-8, 9-10, 11-15
TERMINAL = 8  # the first episode alone ends truly
WINDOWS = jax.jit(diffuser.minibatch, static_argnums=3)
PLAN = jax.jit(diffuser.plan, static_argnums=3)
ACT = jax.jit(diffuser.act, static_argnums=5)


def dataset(lengths=LENGTHS, obs_dim=D, seed=0):
    rng, rows = np.random.default_rng(seed), sum(lengths)
    obs = (5 + 3 * rng.normal(size=(rows, obs_dim))).astype(np.float32)
    action = rng.uniform(-1, 1, (rows, A)).astype(np.float32)
    reward, done = rng.normal(size=rows).astype(np.float32), np.zeros(rows, np.float32)
    done[TERMINAL] = 1
    start = np.cumsum([0, *lengths[:-1]])
    arrays = obs, action, reward, obs, done, start, np.array(lengths)
    return datasets.Dataset("noise", "", *arrays, None, None, {})


@pytest.fixture(scope="module")
def data():
    return jax.tree.map(jnp.asarray, dataset().steps(CFG.gamma, CFG.end_return))


@pytest.fixture(scope="module")
def walk():
    """Data of a maze: x, y, their velocities and the goal."""
    return jax.tree.map(jnp.asarray, dataset(obs_dim=6).steps())


def random_state(data, cfg, seed=0):
    """A state of `init`'s shapes with random parameters, none of them 0, and other averages."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(partial(diffuser.init, cfg=cfg), KEY, data)  # compiles nothing

    def draw(path, x):
        kind = path[-1].key
        fan_in = x.shape[-1] if kind == "kernel" else 10
        return jnp.float32(rng.normal(size=x.shape) / np.sqrt(fan_in) + (kind == "scale"))

    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    params = [jax.tree_util.tree_map_with_path(draw, shapes.ema) for _ in range(2)]
    learners = {name: getattr(state, name).replace(params=params[0][name]) for name in state.ema}
    for name in ("obs", "action"):
        mean, std = diffuser.scaling(getattr(data, name), cfg)
        learners |= {f"{name}_mean": mean, f"{name}_std": std}
    return state.replace(ema=params[1], **learners)


@pytest.fixture(scope="module")
def state(data):
    return random_state(data, CFG)


@pytest.fixture(scope="module")
def maze(walk):
    return random_state(walk, MAZE)


def fake(state, **nets):
    """A state whose networks are functions of (x, t), without parameters."""

    def learner(net):
        return TrainState.create(apply_fn=lambda params, x, t: net(x, t), params={}, tx=ADAM)

    learners = {name: learner(net) for name, net in nets.items()}
    return state.replace(ema=state.ema | dict.fromkeys(nets, {}), **learners)


ADAM = optax.adam(CFG.lr)


def affine(params, x, t):
    return x @ params["w"] + params["b"] + 0.1 * t[:, None, None]


def affine_j(params, x, t):
    return (x * params["w"]).sum((1, 2)) + params["b"] + 0.1 * t


def small(state, seed=0):
    """A state with affine maps for networks: compiled at once, and computed by anyone."""
    rng, c = np.random.default_rng(seed), A + D
    forms = {"model": {"w": (c, c), "b": c}, "value": {"w": (H, c), "b": ()}}
    params, ema = (
        {net: {k: jnp.float32(0.3 * rng.normal(size=v)) for k, v in form.items()}
         for net, form in forms.items()}
        for _ in range(2)
    )  # fmt: skip
    learners = {
        net: TrainState.create(apply_fn=apply, params=params[net], tx=ADAM)
        for net, apply in {"model": affine, "value": affine_j}.items()
    }
    return state.replace(ema=ema, **learners)


def pointwise(x, t):
    """A model that anyone can compute: of numpy or of jax arrays."""
    t = t[:, None, None] if np.ndim(t) else t
    return 0.5 * x / (1 + 0.3 * t) + 0.1 * t


# --- The schedule and its posterior ---


def abar64(steps):
    """Nichol and Dhariwal 2021, Eqs. (17): by Python's floats, one beta after another."""
    f = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    out = [1.0]
    for before, now in zip(f, f[1:], strict=False):
        out.append(out[-1] * (1 - min(1 - now / before, 0.999)))
    return np.array(out[1:])


@pytest.mark.parametrize("steps", [1, 5, 20, 256])
def test_schedule_is_the_cosine(steps):
    abar = diffuser.schedule(steps)
    assert abar.dtype == np.float64
    np.testing.assert_allclose(abar, abar64(steps), rtol=1e-12)
    assert np.all(np.diff(abar) < 0) and 0 < abar[-1] < 1e-3 + (steps == 1)
    closed = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps)]
    np.testing.assert_allclose(abar[:-1], np.array(closed[1:]) / closed[0], rtol=1e-9)


@pytest.mark.parametrize("steps", [1, 5, 20, 64, 256])
def test_posterior_is_the_product_of_two_gaussians(steps):
    """q(x_{t-1} | x_t, x_0) is q(x_{t-1} | x_0) q(x_t | x_{t-1}), normalised: at every t."""
    abar, found = np.append(1.0, abar64(steps)), diffuser.denoising(steps)
    np.testing.assert_array_equal(found.t, np.arange(steps)[::-1])
    for i, t in enumerate(found.t):
        before, now = abar[t], abar[t + 1]
        alpha = now / before
        if t == 0:  # x_{t-1} is x_0 itself
            x0, xt, variance = 1.0, 0.0, 0.0
        else:
            precision = 1 / (1 - before) + alpha / (1 - alpha)  # of the product
            variance = 1 / precision
            x0 = variance * np.sqrt(before) / (1 - before)
            xt = variance * np.sqrt(alpha) / (1 - alpha)
        mine = [found.x0[i], found.xt[i], found.std[i], found.variance[i]]
        np.testing.assert_allclose(mine, [x0, xt, np.sqrt(variance), variance], rtol=2e-6)


@pytest.mark.parametrize(("steps", "few"), [(20, 20), (20, 5), (20, 2), (256, 256), (256, 10)])
def test_ddim_carries_a_noisy_point_to_less_of_the_same_noise(steps, few):
    """From sqrt(abar) x_0 + sqrt(1 - abar) e to the same x_0 and e at the next lower time."""
    abar, found = abar64(steps), diffuser.denoising(steps, few)
    assert (len(found.t), found.t[0], found.t[-1]) == (few, steps - 1, 0)
    assert np.all(np.diff(found.t) < 0)
    np.testing.assert_array_equal(found.std, 0)
    now, past = abar[found.t], np.append(abar[found.t[1:]], 1.0)
    # x_0 x0 + x_t xt = sqrt(past) x_0 + sqrt(1 - past) e, for every x_0 and e
    np.testing.assert_allclose(found.x0 + found.xt * np.sqrt(now), np.sqrt(past), rtol=1e-5)
    np.testing.assert_allclose(found.xt * np.sqrt(1 - now), np.sqrt(1 - past), rtol=1e-5)


def test_times_of_ddim_are_distinct():
    for steps in range(1, 33):
        for few in range(1, steps + 1):
            assert len({*diffuser.denoising(steps, few).t.tolist()}) == few


# --- The networks ---


def test_convolution_is_xlas():
    """As one matrix product, of odd sizes, with and without a stride; and its gradient."""
    rng = np.random.default_rng(0)
    for size, stride, length in [(5, 1, 8), (5, 1, 1), (3, 2, 8), (3, 2, 1)]:
        x, kernel, bias, weight = (
            jnp.float32(rng.normal(size=shape))
            for shape in [(2, length, 4), (size, 4, 6), 6, (2, -(-length // stride), 6)]
        )

        def mine(x, kernel, bias, size=size, stride=stride):
            params = {"params": {"Dense_0": {"kernel": kernel.reshape(-1, 6).T, "bias": bias}}}
            return diffuser.Conv(6, size, stride).apply(params, x)

        def xlas(x, kernel, bias, size=size, stride=stride):
            pad, order = [(size // 2, size // 2)], ("NHC", "HIO", "NHC")
            y = jax.lax.conv_general_dilated(x, kernel, (stride,), pad, dimension_numbers=order)
            return y + bias

        def both(f, *args, weight=weight):
            return f(*args), jax.grad(lambda *args: jnp.sum(weight * f(*args)), (0, 1, 2))(*args)

        found = (jax.jit(both, static_argnums=0)(f, x, kernel, bias) for f in (mine, xlas))
        chex.assert_trees_all_close(*found, rtol=1e-4, atol=1e-4)


def test_mish():
    x = np.array([-300.0, -50, -5, -1, -1e-3, 0, 1e-3, 1, 5, 19.9, 20.1, 50, 300])
    expected = x * np.tanh(np.logaddexp(0, x))
    mine, slope = jax.jit(jax.vmap(jax.value_and_grad(diffuser.mish)))(jnp.float32(x))
    np.testing.assert_allclose(mine, expected, rtol=2e-5, atol=1e-20)
    assert np.isfinite(slope).all()
    np.testing.assert_allclose(slope[-3:], 1, rtol=1e-6)


def dense64(p, x):
    return x @ p["kernel"].T + p["bias"]


def mish64(x):
    return x * np.tanh(np.logaddexp(0, x))


def conv64(p, x, size, stride=1):
    """Of one sequence (H, C), step by step; what lies outside is 0."""
    p, half = p["Dense_0"], size // 2
    kernel, out = p["kernel"].T.reshape(size, x.shape[-1], -1), []
    for i in range(0, len(x), stride):
        y = p["bias"].copy()
        for k in range(size):
            if 0 <= i + k - half < len(x):
                y += x[i + k - half] @ kernel[k]
        out.append(y)
    return np.stack(out)


def norm64(p, x, groups=8):
    """Over time and over an eighth of the channels."""
    y = x.reshape(len(x), groups, -1)
    y = y - y.mean((0, 2), keepdims=True)
    y = y / np.sqrt((y**2).mean((0, 2), keepdims=True) + 1e-5)
    return y.reshape(x.shape) * p["scale"] + p["bias"]


def block64(p, x, t):
    y = mish64(norm64(p["GroupNorm_0"], conv64(p["Conv_0"], x, 5)))
    y = y + dense64(p["Dense_0"], mish64(t))
    y = mish64(norm64(p["GroupNorm_1"], conv64(p["Conv_1"], y, 5)))
    return y + (dense64(p["Dense_1"], x) if "Dense_1" in p else x)


def time64(p, t, width):
    half = width // 2
    angle = [t * math.exp(-math.log(10_000) * i / (half - 1)) for i in range(half)]
    x = np.array([math.sin(a) for a in angle] + [math.cos(a) for a in angle])
    return dense64(p["Dense_0"], mish64(dense64(p["Dense_1"], x)))


# In Outer()(Inner()(x)), Outer is made first: its name has the lower number.


def unet64(params, x, t, width, levels):
    """Of one trajectory (H, C), as the paper's Figure A1; the first level has no way across."""
    p, conv, across, n = params["params"], iter(range(99)), [], 0
    t = time64(p["TimeEmbedding_0"], t, width)
    for level in range(levels):
        x = conv64(p[f"Conv_{next(conv)}"], x, 3, 2) if level else x
        x, n = block64(p[f"Block_{n}"], block64(p[f"Block_{n + 1}"], x, t), t), n + 2
        across.append(x)
    x, n = block64(p[f"Block_{n}"], block64(p[f"Block_{n + 1}"], x, t), t), n + 2
    for _ in range(levels - 1):
        x = np.concatenate([x, across.pop()], -1)
        x, n = block64(p[f"Block_{n + 1}"], block64(p[f"Block_{n}"], x, t), t), n + 2
        x = conv64(p[f"Conv_{next(conv)}"], x, 3)
        x = np.stack(np.split(x, 2, -1), 1).reshape(2 * len(x), -1)
    x = mish64(norm64(p["GroupNorm_0"], conv64(p[f"Conv_{next(conv)}"], x, 5)))
    return dense64(p["Dense_0"], x)


def return64(params, x, t, width, levels):
    p, t = params["params"], time64(params["params"]["TimeEmbedding_0"], t, width)
    for i in range(levels):
        x = block64(p[f"Block_{2 * i}"], block64(p[f"Block_{2 * i + 1}"], x, t), t)
        x = conv64(p[f"Conv_{i}"], x, 3, 2)
    for i in range(2):
        x = block64(p[f"Block_{2 * levels + i}"], x, t)
        x = conv64(p[f"Conv_{levels + i}"], x, 3, 2)
    hidden = mish64(dense64(p["Dense_1"], np.concatenate([x.ravel(), t])))
    assert len(hidden) == x.size // 2
    return dense64(p["Dense_0"], hidden)[0]


def test_networks_are_the_papers(state):
    """U-Net and J of two levels, one trajectory at a time."""
    x = jnp.float32(np.random.default_rng(0).normal(size=(3, 8, A + D)))
    t = jnp.array([0, 2, 5])
    mine = jax.jit(state.model.apply_fn)(state.model.params, x, t)
    chex.assert_shape(mine, x.shape)
    for i in range(3):
        paper = unet64(f64(state.model.params), f64(x[i]), int(t[i]), 8, 2)
        np.testing.assert_allclose(mine[i], paper, rtol=1e-3, atol=1e-4)
    value = jax.jit(state.value.apply_fn)
    j = value(state.value.params, x[:, :H], t)
    chex.assert_shape(j, (3,))
    for i in range(3):
        paper = return64(f64(state.value.params), f64(x[i, :H]), int(t[i]), 8, 2)
        np.testing.assert_allclose(j[i], paper, rtol=1e-3, atol=1e-4)
    same = jnp.repeat(x[:1, :H], 3, 0)  # but of other times
    assert np.ptp(value(state.value.params, same, t)) > 1e-3


@pytest.mark.parametrize(
    ("horizon", "multiples"), [(4, (1, 4, 8)), (32, (1, 2, 4, 8)), (128, (1, 4, 8))]
)
def test_shapes_of_the_papers_networks(horizon, multiples):
    x, t = jnp.zeros((2, horizon, 14)), jnp.zeros(2, int)
    for kind, shape in (diffuser.UNet, x.shape), (diffuser.ReturnModel, (2,)):
        net = kind(32, multiples)
        out = jax.eval_shape(lambda net=net: net.init_with_output(KEY, x, t)[0])
        assert out.shape == shape


# --- Losses ---


@pytest.fixture
def frozen(monkeypatch):
    """Times and noise of a loss are known: (times, noise)."""
    rng = np.random.default_rng(7)
    t, noise = rng.integers(0, T, 6), rng.normal(size=(6, H, A + 6)).astype(np.float32)
    monkeypatch.setattr(jax.random, "randint", lambda key, shape, low, high: jnp.array(t))
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.array(noise[..., : shape[-1]]))
    return t, noise


@pytest.fixture(params=["guided", "goal"])
def kind(request, state, maze, data, walk):
    """(state, batch, cfg) with windows of 4, 2, 1, 2, 4 and 3 steps, where no goal moves them."""
    rows = jnp.array([1, 7, 8, 9, 11, 13])
    if request.param == "guided":
        return state, WINDOWS(state, data, rows, CFG), CFG
    return maze, WINDOWS(maze, walk, rows, MAZE), MAZE


def noisy64(batch, t, noise, cfg):
    """x_t, trajectory by trajectory, the known states put in."""
    x, abar = f64(batch.x), abar64(T)
    for n in range(len(x)):
        clean = x[n].copy()
        x[n] = np.sqrt(abar[t[n]]) * clean + np.sqrt(1 - abar[t[n]]) * noise[n, :, : x.shape[-1]]
        x[n, 0, A:] = clean[0, A:]
        if cfg.goal:
            x[n, -1, A:] = clean[-1, A:]
    return x


def test_model_loss_by_hand(kind, frozen):
    """The first action counts action_weight times, known states and padding not at all."""
    state, batch, cfg = kind
    state, t = fake(state, model=pointwise), frozen[0]
    cfg = replace(cfg, action_weight=7.0)
    clean, x = f64(batch.x), noisy64(batch, *frozen, cfg)
    mine, info = diffuser.model_loss({}, state, batch, KEY, cfg)
    total = steps = 0
    for n in range(len(x)):
        for h in range(H):
            for c in range(x.shape[-1]):
                error = (pointwise(x[n, h, c], t[n]) - clean[n, h, c]) ** 2
                known = c >= A and (h == 0 or (h == H - 1 and cfg.goal))
                weight = 0 if known else 7 if h == 0 else 1
                total += weight * error * bool(batch.mask[n, h]) / x.shape[-1]
            steps += bool(batch.mask[n, h])
    np.testing.assert_allclose(mine, total / steps, rtol=1e-5)
    assert info["model_loss"] == mine
    assert steps == (16 if not cfg.goal else 22)


def test_value_loss_by_hand(state, data, frozen):
    batch = WINDOWS(state, data, jnp.array([1, 7, 8, 9, 11, 13]), CFG)
    state = fake(state, value=lambda x, t: jnp.sum(jnp.sin(x) * jnp.arange(H)[:, None], (1, 2)) + t)
    x = noisy64(batch, *frozen, CFG)
    j = (np.sin(x) * np.arange(H)[:, None]).sum((1, 2)) + frozen[0]
    mine, _ = diffuser.value_loss({}, state, batch, KEY, CFG)
    np.testing.assert_allclose(mine, np.mean((j - f64(batch.returns_to_go)) ** 2), rtol=1e-5)


def test_times_are_uniform(state):
    """Each of 0 to T - 1 as often, over many keys; and noise of its own in every row."""
    batch = diffuser.Window(jnp.zeros((4000, H, A + D)), jnp.ones((4000, H), bool), None)
    x, t, _ = jax.jit(diffuser.diffuse, static_argnums=3)(state, batch, KEY, CFG)
    x, t = np.array(x), np.array(t)
    np.testing.assert_allclose(np.bincount(t, minlength=T) / 4000, 1 / T, atol=0.03)
    for i in range(T):
        np.testing.assert_allclose(np.var(x[t == i][:, 1:]), 1 - abar64(T)[i], rtol=0.1)


def test_update_by_hand(state, data, frozen):
    """One step of Adam on either loss; then both averages move a tenth of the way."""
    batch, state = WINDOWS(state, data, jnp.array([1, 7, 8, 9, 11, 13]), CFG), small(state)
    clean, x, t = f64(batch.x), noisy64(batch, *frozen, CFG), f64(frozen[0])
    weight = np.repeat(f64(batch.mask)[..., None], A + D, -1)
    weight[:, 0, :A] *= 10
    weight[:, 0, A:] = 0

    def model64(params):
        error = (affine(params, x, t) - clean) ** 2
        return np.sum(weight * error) / (A + D) / np.sum(f64(batch.mask))

    def value64(params):
        return np.mean((affine_j(params, x, t) - f64(batch.returns_to_go)) ** 2)

    new, info = diffuser.update(state, batch, KEY, CFG)
    assert info.keys() == {"model_loss", "value_loss", "j"}
    for name, loss in ("model", model64), ("value", value64):
        before, after = getattr(state, name), getattr(new, name)
        np.testing.assert_allclose(info[f"{name}_loss"], loss(f64(before.params)), rtol=1e-5)
        assert_first_adam_step(before, after, gradient(loss, f64(before.params)), CFG.lr)
        trees = f64(state.ema[name]), f64(after.params)
        expected = jax.tree.map(lambda old, now: 0.9 * old + 0.1 * now, *trees)
        chex.assert_trees_all_close(f64(new.ema[name]), expected, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_equal(new.action_std, state.action_std)


def test_both_networks_meet_noise_of_their_own(state, data, monkeypatch):
    batch, keys = WINDOWS(state, data, jnp.arange(6), CFG), []
    diffuse = diffuser.diffuse
    monkeypatch.setattr(diffuser, "diffuse", lambda *a: (keys.append(a[2]), diffuse(*a))[1])
    diffuser.update(small(state), batch, KEY, CFG)
    assert len(keys) == len({tuple(jax.random.key_data(k).tolist()) for k in keys}) == 2


# --- Windows and returns ---


def test_windows(state, data):
    """Actions before observations, both standardised; nothing of another episode."""
    batch = WINDOWS(state, data, jnp.array([1, 7, 9, 13, 15]), CFG)
    obs, action = f64(data.obs), f64(data.action)
    obs, action = ((x - x.mean(0)) / (x.std(0) + 1e-3) for x in (obs, action))
    rows = [[1, 2, 3, 4], [7, 8], [9, 10], [13, 14, 15], [15]]
    for window, mask, mine in zip(np.array(batch.x), batch.mask, rows, strict=True):
        np.testing.assert_array_equal(mask, np.arange(H) < len(mine))
        expected = np.concatenate([action[mine], obs[mine]], -1)
        np.testing.assert_allclose(window[: len(mine)], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(
            window[len(mine) :], np.repeat(window[[len(mine) - 1]], H - len(mine), 0)
        )


def test_returns_are_discounted_to_the_episodes_end_and_true_ends_cost(state, data):
    batch, reward = WINDOWS(state, data, jnp.arange(16), CFG), f64(data.reward)
    reward[TERMINAL] -= 100
    for row in range(16):
        end = next(f + n for f, n in zip(FIRST, LENGTHS, strict=True) if row < f + n)
        returns_to_go = sum(0.9**k * reward[i] for k, i in enumerate(range(row, end))) / 50
        np.testing.assert_allclose(batch.returns_to_go[row], returns_to_go, rtol=1e-5, atol=1e-6)


def test_with_a_goal_windows_are_whole_and_all_of_them(maze, walk):
    """9 steps hold six whole windows, 5 steps two; one episode is shorter: cut, not left out."""
    batch = WINDOWS(maze, walk, jnp.arange(16), MAZE)
    obs = f64(diffuser.normalise(maze, walk.obs))[:, :4]
    begins = [int(np.abs(obs - f64(x[0, A:])).sum(1).argmin()) for x in batch.x]
    assert begins == [0, 1, 2, 3, 4, 5, 0, 1, 2, 9, 9, 11, 12, 11, 12, 11]
    np.testing.assert_array_equal(batch.mask.sum(1), [H] * 9 + [2, 2] + [H] * 5)
    np.testing.assert_allclose(batch.x[9, -1, A:], obs[10], rtol=1e-5)  # at rest at its end
    chex.assert_shape(batch.x, (16, H, A + 4))


def test_with_a_goal_a_long_episode_does_not_overflow(maze):
    n = 100_000
    data = dataset((n,), obs_dim=6)
    data.obs[:] = np.arange(n)[:, None] / n
    steps = jax.tree.map(jnp.asarray, data.steps())
    free = maze.replace(obs_mean=jnp.zeros(6), obs_std=jnp.ones(6))
    rows = jnp.array([0, 1, 46_342, n - H, n - H + 1, n - 1])
    begins = WINDOWS(free, steps, rows, MAZE).x[:, 0, A] * n
    np.testing.assert_allclose(begins, [0, 1, 46_342, n - H, 0, H - 2], atol=0.1)


@pytest.mark.parametrize("goal", [False, True])
def test_scaling(goal):
    x = jnp.array([[0.0, 3], [4, 3], [2, 3]])
    mean, std = diffuser.scaling(x, replace(CFG, goal=goal))
    expected = [2, 3], ([2, 0] if goal else [np.sqrt(8 / 3), 0])
    np.testing.assert_allclose((mean, std - 1e-3), expected, atol=1e-6)
    mean, std = diffuser.scaling(x, replace(CFG, goal=goal, normalize=False))
    np.testing.assert_array_equal((mean, std), ([0, 0], [1, 1]))


# --- Plans in numpy: one trajectory, one entry at a time ---


class Draws:
    """Stands for jax.random.normal; what it drew is kept."""

    def __init__(self, seed=0):
        self._rng, self.drawn = np.random.default_rng(seed), []

    def __call__(self, key, shape):
        self.drawn.append(np.float32(self._rng.normal(size=shape)))
        return jnp.array(self.drawn[-1])


def coupled(x, t):
    """A model in which every step sees the one before it, so that what is known counts."""
    return 2 * pointwise(x, t) + 0.5 * x[..., np.arange(H) - 1, :]


def bowl(x, t):
    """A J whose gradient depends on x, t and the step of the trajectory."""
    return -((x - 0.5) ** 2 * (1 + jnp.arange(H)[:, None])).sum((1, 2)) * (1 + 0.1 * t) / 50


def bowl_slope64(x, t):  # of return_scale J
    return -2 * (x - 0.5) * (1 + np.arange(H)[:, None]) * (1 + 0.1 * t)


def pin64(x, first, last):
    x[0, A:] = first
    if last is not None:
        x[-1, A:] = last


def plan64(draws, first, last, cfg, old=None):
    """Plans (n, H, C) of n starts, each `samples` times in a row; best picked elsewhere."""
    abar, plans = abar64(cfg.diffusion_steps), []
    count = cfg.ddim_steps or cfg.diffusion_steps
    times = [round(x) for x in np.linspace(cfg.diffusion_steps - 1, 0, count)]
    if old is not None:
        times = times[-cfg.warm_start :]
    for n in range(len(first)):
        goal = None if last is None else last[n]
        x = np.float64(draws[0][n])
        if old is not None:
            x = np.sqrt(abar[times[0]]) * old[n] + np.sqrt(1 - abar[times[0]]) * x
        pin64(x, first[n], goal)
        for i, t in enumerate(times):
            now, past = abar[t], abar[times[i + 1]] if i + 1 < len(times) else 1.0
            alpha = now / past
            variance = (1 - alpha) * (1 - past) / (1 - now)
            if not cfg.goal and t >= cfg.guide_stop:
                for _ in range(cfg.guide_steps):
                    x = x + cfg.guide_scale * variance * bowl_slope64(x, t)
                    pin64(x, first[n], goal)
            x0 = coupled(x, t)
            x0 = x0.clip(-1, 1) if cfg.goal else x0
            if cfg.ddim_steps:
                noise = (x - np.sqrt(now) * x0) / np.sqrt(1 - now)
                x = np.sqrt(past) * x0 + np.sqrt(1 - past) * noise
            else:
                mean = np.sqrt(past) * (1 - alpha) * x0 + np.sqrt(alpha) * (1 - past) * x
                x = mean / (1 - now) + np.sqrt(variance) * draws[i + 1][n]
            pin64(x, first[n], goal)
        plans.append(x)
    return np.stack(plans)


@pytest.mark.parametrize("goal", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"ddim_steps": 3}, {"warm_start": 2}, {"ddim_steps": 4, "warm_start": 3},
     {"guide_stop": 0}, {"guide_steps": 1, "guide_scale": -2.0}],
)  # fmt: skip
def test_whole_plans_by_hand(options, goal, state, maze, monkeypatch):
    """Guided, to a goal, by DDIM, from the plan before; with the known put in at every step."""
    cfg = replace(MAZE if goal else CFG, **options)
    one = fake(maze, model=coupled) if goal else fake(state, model=coupled, value=bowl)
    copies, width = (1 if goal else cfg.samples), (4 if goal else D)
    rng = np.random.default_rng(5)
    first, last = rng.normal(size=(2, E, width))
    last = last if goal else None
    old = rng.normal(size=(E, H, A + width)) if cfg.warm_start else None
    draws = Draws()
    monkeypatch.setattr(jax.random, "normal", draws)
    known = jax.tree.map(jnp.float32, (first, last))
    with jax.disable_jit():
        mine = diffuser.plan(one, known, KEY, cfg, None if old is None else jnp.float32(old))
    chex.assert_shape(mine, (E, H, A + width))

    def repeated(x):
        return None if x is None else np.repeat(x, copies, 0)

    plans = plan64(draws.drawn, *map(repeated, (first, last)), cfg, repeated(old))
    plans = plans.reshape(E, copies, *plans.shape[1:])
    values = np.stack([f64(bowl(jnp.float32(p), 0)) for p in plans])
    best = np.stack([p[v.argmax()] for p, v in zip(plans, values, strict=True)])
    np.testing.assert_allclose(mine, best, rtol=2e-4, atol=2e-5)
    np.testing.assert_array_equal(mine[:, 0, A:], known[0])
    if goal:
        np.testing.assert_array_equal(mine[:, -1, A:], known[1])


def test_plans_come_from_the_averages_and_depend_on_the_key(state):
    state, known = small(state), (jnp.ones((E, D)), None)
    plan = PLAN(state, known, KEY, CFG)
    learned = {name: getattr(state, name).params for name in ("model", "value")}
    trained = {name: getattr(state, name).replace(params=state.ema[name]) for name in learned}
    np.testing.assert_array_equal(plan, PLAN(state.replace(**trained), known, KEY, CFG))
    for name, params in learned.items():
        other = state.replace(ema=state.ema | {name: params})
        assert np.abs(plan - PLAN(other, known, KEY, CFG)).max() > 1e-3
    assert np.abs(plan - PLAN(state, known, jax.random.key(1), CFG)).max() > 1e-3
    assert np.ptp(plan[..., :A], 0).min() > 1e-3  # a noise of its own for every episode


def test_more_guidance_and_more_samples_earn_more(state):
    state = fake(state, model=lambda x, t: 0.5 * x, value=bowl)
    known, cfg = (jnp.zeros((200, D)), None), replace(CFG, samples=1, guide_scale=0.05)
    options = [{"guide_stop": T}, {}, {"guide_stop": T, "samples": 8}]
    none, guided, best = (
        float(bowl(PLAN(state, known, KEY, replace(cfg, **o)), 0).mean()) for o in options
    )
    assert guided > none + 1e-3 and best > none + 1e-3


@pytest.mark.parametrize("few", [0, 64])
def test_sampling_a_known_gaussian(few, state):
    """With its true E[x_0 | x_t] for f, means and stds come back: DDPM, and DDIM of all steps."""
    cfg = replace(CFG, diffusion_steps=64, samples=1, guide_scale=0.0, ddim_steps=few)
    rng, abar = np.random.default_rng(0), jnp.float32(abar64(64))
    mean, std = rng.normal(size=(H, A + D)), rng.uniform(0.3, 1.5, (H, A + D))

    def posterior_mean(x, t):
        a = abar[t][:, None, None]
        return mean + jnp.sqrt(a) * std**2 / (a * std**2 + 1 - a) * (x - jnp.sqrt(a) * mean)

    state = fake(state, model=posterior_mean, value=lambda x, t: jnp.zeros(len(x)))
    x = f64(PLAN(state, (jnp.zeros((4000, D)), None), KEY, cfg))
    free = np.ones((H, A + D), bool)
    free[0, A:] = False
    np.testing.assert_allclose(x.mean(0)[free], mean[free], atol=0.12)  # 5 standard errors
    np.testing.assert_allclose(x.std(0)[free] / std[free], 1, atol=0.1)


# --- Acting ---


def plans_of(record):
    """Stands for `plan`: its n-th call gives plans of n, n + 0.1, ...; `record` keeps `old`."""

    def plan(state, known, key, cfg, old=None):
        record.append(old)
        shape = len(known[0]), cfg.horizon, A + known[0].shape[-1]
        steps = jnp.arange(cfg.horizon)[:, None] / 10
        return jnp.broadcast_to(len(record) + steps, shape)

    return plan


@pytest.mark.parametrize("every", [1, 3, 4])
def test_plan_every(every, state, monkeypatch):
    """A plan's actions one after another, then a new one; the old one comes shifted by as many."""
    old, cfg, carry = [], replace(CFG, plan_every=every), None
    monkeypatch.setattr(diffuser, "plan", plans_of(old))
    with jax.disable_jit():
        for step in range(9):
            inputs = jnp.ones((E, D)), jnp.zeros(E), KEY
            action, carry = diffuser.act(state, carry, *inputs, cfg)
            planned = 1 + step // every + step % every / 10
            assert len(old) == 1 + step // every
            expected = planned * f64(state.action_std) + f64(state.action_mean)
            np.testing.assert_allclose(action, np.tile(expected, (E, 1)), rtol=1e-5)
    assert old[0] is None
    shifted = [1 + min(i + every, H - 1) / 10 for i in range(H)]
    np.testing.assert_allclose(old[1][0, :, 0], shifted, rtol=1e-6)


def test_a_plan_is_made_only_when_due_for_every_seed_alone(state, monkeypatch):
    """Compiled, and counted as it runs: under vmap all would be made and thrown away."""
    made, plan = [], diffuser.plan

    def counting(*args):
        jax.debug.callback(lambda: made.append(1))
        return plan(*args)

    monkeypatch.setattr(diffuser, "plan", counting)
    cfg, carry = replace(CFG, plan_every=3, ddim_steps=2, warm_start=1), None
    states = jax.tree.map(lambda *x: jnp.stack(x), small(state), small(state, 1))
    policy = jax.jit(jax.vmap(diffuser.policy(cfg), (0, 0, 0, 0, None)))  # which scores and films
    for step in range(7):
        obs = jax.random.normal(jax.random.key(step), (2, E, D))
        action, carry = policy(states, carry, obs, jnp.zeros((2, E)), KEY)
        chex.assert_shape(action, (2, E, A))
        jax.effects_barrier()
        assert len(made) == 2 * (1 + step // 3)
        if step % 3 == 0:
            first = jax.vmap(diffuser.normalise)(states, obs)
            np.testing.assert_array_equal(carry.x[:, :, 0, A:], first)
    assert np.any(action[0] != action[1])


def test_with_a_goal_the_plan_is_made_once_and_tracked(maze, monkeypatch):
    """a = (p' - p) + (v' - v), by hand, to the plan's next state; after its end, to the last."""
    old, carry, asked = [], None, []
    rng = np.random.default_rng(4)
    course = rng.normal(size=(E, H, A + 4))

    def plan(state, known, key, cfg, old=None):
        asked.append(known)
        return jnp.float32(course)

    monkeypatch.setattr(diffuser, "plan", plan)
    mean, std = f64(maze.obs_mean), f64(maze.obs_std)
    for step in range(H + 3):
        obs = rng.normal(size=(E, 6))
        inputs = jnp.float32(obs), jnp.zeros(E), KEY
        action, carry = diffuser.act(maze, carry, *inputs, MAZE)
        for e in range(E):
            x, y, vx, vy = course[e, min(step + 1, H - 1), A:] * std[:4] + mean[:4]
            px, py, pvx, pvy = obs[e, :4]
            expected = [x - px + vx - pvx, y - py + vy - pvy]
            np.testing.assert_allclose(action[e], expected, rtol=1e-4, atol=1e-4)
        if step == 0:
            ((first, last),) = asked
            begin, goal = (obs[:, :4] - mean[:4]) / std[:4], np.zeros((E, 4))
            goal[:, :2] = obs[:, 4:]
            np.testing.assert_allclose(first, begin, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(last, (goal - mean[:4]) / std[:4], rtol=1e-4, atol=1e-4)
    assert len(asked) == 1 and not old


def test_a_goal_that_no_observation_shows_is_an_error(maze):
    maze = maze.replace(obs_mean=jnp.zeros(4), obs_std=jnp.ones(4))
    with pytest.raises(ValueError, match="goal x, goal y"):
        diffuser.act(maze, None, jnp.zeros((E, 4)), jnp.zeros(E), KEY, MAZE)


# --- Configs ---

HOPPER = dict(horizon=32, diffusion_steps=20, multiples=(1, 2, 4, 8), guide_scale=0.1, guide_stop=2)
CHEETAH = dict(horizon=4, diffusion_steps=20, multiples=(1, 4, 8), guide_scale=0.001, guide_stop=4)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ("hopper-medium-replay-v2", HOPPER),
        ("stillwater/hopper/medium-replay-v0", HOPPER),
        ("walker2d-medium-v2", HOPPER),
        ("hopper-medium-expert-v2", HOPPER | dict(guide_scale=0.0001, guide_stop=4)),
        ("halfcheetah-medium-v2", CHEETAH),
        ("stillwater/halfcheetah/medium-v0", CHEETAH),
        ("stillwater/pointmaze-umaze/waypoint-v0", dict(horizon=128, diffusion_steps=64)),
        ("stillwater/pointmaze-medium/waypoint-v0", dict(horizon=256, diffusion_steps=256)),
        ("D4RL/pointmaze/umaze-v2", dict(horizon=128, diffusion_steps=64)),
        ("D4RL/pointmaze/medium-v2", dict(horizon=256, diffusion_steps=256)),
        ("D4RL/pointmaze/large-v2", dict(horizon=384, diffusion_steps=256)),
        ("maze2d-umaze-v1", dict(horizon=128, diffusion_steps=64)),
        ("maze2d-medium-dense-v1", dict(horizon=256, diffusion_steps=256)),
        ("maze2d-large-v1", dict(horizon=384, diffusion_steps=256)),
        ("mine.hdf5", HOPPER),
        ("antmaze-umaze-v2", HOPPER),
    ],
)
def test_settings_of_the_authors_by_dataset(env, expected):
    cfg = experiment.resolve(diffuser.Config(env=env), diffuser.TUNED)
    assert {name: getattr(cfg, name) for name in expected} == expected
    goal = "pointmaze" in env or "maze2d" in env
    other = dict(goal=True, plan_every=0, multiples=(1, 4, 8), action_weight=1.0)
    other = other if goal else dict(goal=False, plan_every=1, action_weight=10.0)
    assert {name: getattr(cfg, name) for name in other} == other
    assert experiment.resolve(diffuser.Config(env=env, horizon=64), diffuser.TUNED).horizon == 64
    assert None not in vars(cfg).values()
    diffuser.check(cfg, dataset((400,), obs_dim=6 if goal else D))


@pytest.mark.parametrize(
    "wrong",
    [dict(horizon=5), dict(multiples=(1, 2, 4, 8), horizon=4), dict(width=12), dict(plan_every=5),
     dict(ddim_steps=7), dict(warm_start=7), dict(ddim_steps=3, warm_start=4),
     dict(multiples=(1, 2))],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(wrong):
    diffuser.check(CFG, dataset())
    with pytest.raises(SystemExit, match="--"):
        diffuser.check(replace(CFG, **wrong), dataset())


# --- The start, and what a run is fed ---


class Dense(nn.Module):
    """Stands for both networks: compiled at once."""

    width: int
    multiples: tuple[int, ...]

    @nn.compact
    def __call__(self, x, t):
        return nn.Dense(self.width)(x)


@pytest.mark.parametrize("goal", [False, True])
def test_a_fresh_state(goal, data, walk, monkeypatch):
    """Statistics of all rows, averages that begin as the weights, Adam of `lr`; a goal has no J."""
    monkeypatch.setattr(diffuser, "UNet", Dense)
    monkeypatch.setattr(diffuser, "ReturnModel", Dense)
    cfg, rows = (MAZE, walk) if goal else (CFG, data)
    batch = datasets.Batch(rows.obs, rows.action, None, None, None)  # as when a run is loaded
    state = diffuser.init(KEY, batch, cfg)
    for name in ("obs", "action"):
        x = f64(getattr(rows, name))
        mean, std = x.mean(0), x.std(0)
        if goal:
            mean, std = (x.max(0) + x.min(0)) / 2, (x.max(0) - x.min(0)) / 2
        np.testing.assert_allclose(getattr(state, f"{name}_mean"), mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(getattr(state, f"{name}_std"), std + 1e-3, rtol=1e-5)
    names = ["model"] if goal else ["model", "value"]
    assert list(state.ema) == names and (state.value is None) == goal
    for name in names:
        learner = getattr(state, name)
        chex.assert_trees_all_equal(state.ema[name], learner.params)
        after = learner.apply_gradients(grads=jax.tree.map(jnp.ones_like, learner.params))
        expected = jax.tree.map(lambda x: x - cfg.lr, f64(learner.params))
        chex.assert_trees_all_close(f64(after.params), expected, rtol=1e-5, atol=1e-6)
    kernels = [getattr(state, name).params["params"]["Dense_0"]["kernel"] for name in names]
    assert {kernel.shape[0] for kernel in kernels} == {A + 4 if goal else A + D}
    assert goal or np.abs(kernels[0] - kernels[1]).max() > 0.1  # drawn by keys of their own


def test_every_row_begins_a_window_as_often(state, data, monkeypatch):
    """So episodes are drawn in proportion to their length; counted in train_chunk itself."""
    rows = len(data.obs)
    ids = jnp.arange(rows, dtype=jnp.float32)[:, None].repeat(D, 1)
    state = state.replace(obs_mean=jnp.zeros(D), obs_std=jnp.ones(D))

    def count(state, batch, key, cfg):
        return state, {i: jnp.mean(batch.x[:, 0, A] == i) for i in range(rows)}

    monkeypatch.setattr(diffuser, "update", count)
    cfg = replace(CFG, log_every=5000)
    share = jax.jit(partial(diffuser.train_chunk, cfg=cfg))(
        state, data._replace(obs=ids), KEY, 5000
    )[1]
    share = np.array([share[i] for i in range(rows)])
    np.testing.assert_allclose(share, 1 / rows, atol=5 * np.sqrt(1 / rows / 30_000))


def test_a_run_learns_discounted_returns_with_their_ends(monkeypatch):
    def steps(self, *args):
        raise InterruptedError(*args)

    monkeypatch.setattr(datasets.Dataset, "steps", steps)
    monkeypatch.setattr(diffuser.experiment, "Run", lambda *_: None)
    cfg = replace(CFG, gamma=0.9, end_return=-7.0, eval_episodes=0)
    with pytest.raises(InterruptedError) as asked:
        diffuser.train(cfg, dataset())
    assert asked.value.args == (0.9, -7.0)


def test_the_best_plan_is_that_of_the_largest_j_without_noise(state):
    """All candidates of E episodes are the plans of E * samples episodes with one sample each."""
    j = {"model": lambda x, t: 0.5 * x, "value": lambda x, t: (1 - t) * x.sum((1, 2))}
    state, cfg = fake(state, **j), replace(CFG, samples=1, guide_stop=T, ddim_steps=1)
    first = jnp.arange(E * D, dtype=jnp.float32).reshape(E, D)
    plans = f64(PLAN(state, (jnp.repeat(first, 8, 0), None), KEY, cfg)).reshape(E, 8, H, A + D)
    best = PLAN(state, (first, None), KEY, replace(cfg, samples=8))
    expected = plans[np.arange(E), plans.sum((2, 3)).argmax(1)]
    np.testing.assert_allclose(best, expected, rtol=1e-5, atol=1e-6)


def test_acting_for_several_seeds(state, monkeypatch):
    """The policy of several is act for each of them: its own plans, statistics and observations."""

    def plan(state, known, key, cfg, old=None):
        x = state.ema["model"]["b"] + jax.random.normal(key, (E, H, A + D))
        return diffuser.condition(x if old is None else x + old, known)

    monkeypatch.setattr(diffuser, "plan", plan)
    cfg, seeds = replace(CFG, plan_every=2), [small(state), small(state, 1)]
    seeds[1] = seeds[1].replace(action_std=jnp.full(A, 2.0), obs_mean=jnp.ones(D))
    states = jax.tree.map(lambda *x: jnp.stack(x), *seeds)
    policy = jax.jit(jax.vmap(diffuser.policy(cfg), (0, 0, 0, 0, None)))
    one = jax.jit(partial(diffuser.act, cfg=cfg))
    carry, carries = None, [None, None]
    for step in range(4):
        key = jax.random.key(step)
        obs, reward = jax.random.normal(key, (2, E, D)), jnp.ones((2, E))
        action, carry = policy(states, carry, obs, reward, key)
        chex.assert_shape(action, (2, E, A))
        for i, alone in enumerate(seeds):
            mine, carries[i] = one(alone, carries[i], obs[i], reward[i], key)
            np.testing.assert_allclose(action[i], mine, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(carry.x[i], carries[i].x, rtol=1e-5, atol=1e-6)
    assert np.abs(action[0] - action[1]).max() > 0.1


# --- A small world ---

# A square without walls. The data walk straight, at one pace, from drawn places to others.
WORLD = replace(
    MAZE, horizon=8, diffusion_steps=8, width=32, multiples=(1,), batch_size=32, lr=4e-3, ema=0.98,
    log_every=900,
)  # fmt: skip


@pytest.fixture(scope="module")
def world():
    rng, episodes = np.random.default_rng(0), 500
    ends = rng.uniform(-0.75, 0.75, (2, episodes, 1, 2))
    place = ends[0] + np.linspace(0, 1, 8)[:, None] * (ends[1] - ends[0])  # (episodes, 8, 2)
    speed = np.diff(place, axis=1, prepend=place[:, :1])
    speed[:, -1] = 0
    obs = np.concatenate([place, speed, np.zeros_like(place)], -1).reshape(-1, 6)
    action = np.diff(speed, axis=1, append=0 * speed[:, :1]).reshape(-1, 2)
    obs, action, zero = np.float32(obs), np.float32(action), np.zeros(len(obs), np.float32)
    arrays = obs, action, zero, obs, zero, np.arange(episodes) * 8, np.full(episodes, 8)
    data = datasets.Dataset("", "", *arrays, None, None, {}).steps()
    return jax.tree.map(jnp.asarray, data)


def test_plans_lead_from_start_to_goal(world):
    """Trained from `init`: straight, at the pace needed, with the velocities that belong to it."""
    batch = datasets.Batch(world.obs, world.action, None, None, None)  # as when a run is loaded
    fresh = jax.jit(partial(diffuser.init, cfg=WORLD))(KEY, batch)
    low, high = (f(np.array(world.obs), 0) for f in (np.min, np.max))
    np.testing.assert_allclose(diffuser.normalise(fresh, low)[:4], -1, atol=0.02)
    np.testing.assert_allclose(diffuser.normalise(fresh, high)[:4], 1, atol=0.02)
    chex.assert_trees_all_equal(fresh.ema, {"model": fresh.model.params})
    assert fresh.value is None
    state, info = jax.jit(partial(diffuser.train_chunk, cfg=WORLD))(
        fresh, world, KEY, WORLD.log_every
    )
    assert info.keys() == {"model_loss"}

    ends = np.random.default_rng(1).uniform(-0.6, 0.6, (2, 50, 2))
    obs = np.concatenate([ends[0], np.zeros((50, 2)), ends[1]], -1)
    _, carry = ACT(state, None, jnp.float32(obs), jnp.zeros(50), KEY, WORLD)
    plan = f64(carry.x[..., 2:] * state.obs_std[:4] + state.obs_mean[:4])
    place, speed = plan[..., :2], plan[..., 2:]
    np.testing.assert_allclose(plan[:, 0], obs[:, :4], atol=1e-5)
    np.testing.assert_allclose(place[:, -1], ends[1], atol=1e-5)
    line = ends[0][:, None] + np.linspace(0, 1, 8)[:, None] * (ends[1] - ends[0])[:, None]
    assert np.linalg.norm(place - line, axis=-1).max() < 0.1
    assert np.abs(np.diff(place, axis=1) - speed[:, 1:])[:, :-1].max() < 0.1
