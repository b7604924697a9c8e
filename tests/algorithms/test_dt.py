"""DT: the transformer against float64, what its masks hide, windows, acting, a world that obeys."""

from dataclasses import replace
from functools import partial

import chex
import dt
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.training.train_state import TrainState
from float64 import f64, scramble

from common import datasets, experiment

CFG = dt.Config(
    context=4, layers=2, heads=2, width=8, dropout=0.1, max_time=10, batch_size=8, log_every=100,
    lr=1e-2, warmup=5, weight_decay=0.5, rtg_scale=2.0, targets=(3.0, 1.0),
)  # fmt: skip
K, D, A = CFG.context, 3, 2
KEY = jax.random.key(0)
LENGTHS = 9, 2, 5  # one episode is shorter than a window
CALM = replace(CFG, dropout=0.0, clip=1e9)
FIRST = 0, 9, 11  # its rows: 0-8, 9-10, 11-15
INIT = jax.jit(dt.init, static_argnums=2)


def dataset(lengths=LENGTHS, seed=0):
    rng, rows = np.random.default_rng(seed), sum(lengths)
    obs = (5 + 3 * rng.normal(size=(rows, D))).astype(np.float32)
    action = rng.uniform(-1, 1, (rows, A)).astype(np.float32)
    reward, done = rng.normal(size=rows).astype(np.float32), np.zeros(rows, np.float32)
    start = np.cumsum([0, *lengths[:-1]])
    arrays = obs, action, reward, obs, done, start, np.array(lengths)
    return datasets.Dataset("noise", "", *arrays, None, None, {})


@pytest.fixture(scope="module")
def data():
    return jax.tree.map(jnp.asarray, dataset().steps())


@pytest.fixture(scope="module")
def state(data):
    """Parameters away from their start, where every bias is 0."""
    fresh = INIT(KEY, data, CFG)
    return fresh.replace(actor=fresh.actor.replace(params=scramble(fresh.actor.params, 1)))


@pytest.fixture(scope="module")
def batch(state, data):
    """Windows of 4, 2, 1, 2, 4 and 3 steps."""
    return WINDOWS(state, data, jnp.array([1, 7, 8, 9, 11, 13]), CFG)


def of_config(state, cfg):
    """The same parameters with the transformer and a fresh optimiser of another config."""
    actor = jax.eval_shape(partial(dt.init, cfg=cfg), KEY, dataset().steps()).actor  # of its shapes
    actor = TrainState.create(apply_fn=actor.apply_fn, params=state.actor.params, tx=actor.tx)
    return state.replace(actor=actor)


UPDATE = jax.jit(dt.update, static_argnums=3)
WINDOWS = jax.jit(dt.minibatch, static_argnums=3)
FORWARD = jax.jit(lambda state, window: state.actor.apply_fn(state.actor.params, window))
ACT = jax.jit(dt.act, static_argnums=5)


# --- The transformer in numpy, from the paper: of the steps that exist, token by token ---


def dense64(p, x):
    return x @ p["kernel"] + p["bias"]


def norm64(p, x):
    x = x - x.mean()
    return x / np.sqrt(np.mean(x**2) + 1e-5) * p["scale"] + p["bias"]


def block64(p, tokens, heads):
    width = len(tokens[0])
    h = [norm64(p["LayerNorm_0"], x) for x in tokens]
    q, k, v = np.split(np.stack([dense64(p["Dense_0"], x) for x in h]), 3, -1)
    out = []
    for i, x in enumerate(tokens):
        mixed = []
        for cols in np.split(np.arange(width), heads):
            score = [q[i, cols] @ k[j, cols] / np.sqrt(len(cols)) for j in range(i + 1)]
            share = np.exp(score) / np.sum(np.exp(score))
            mixed.append(sum(w * v[j, cols] for j, w in enumerate(share)))
        x = x + dense64(p["Dense_1"], np.concatenate(mixed))
        hidden = np.maximum(dense64(p["Dense_2"], norm64(p["LayerNorm_1"], x)), 0)
        out.append(x + dense64(p["Dense_3"], hidden))
    return out


def policy64(params, obs, action, returns_to_go, time, cfg=CFG):
    """Actions (T, A) of T steps of one episode, no padding; the last row of `action` is unused."""
    p, tokens = params["params"], []
    for t in range(len(obs)):
        when = p["Embed_0"]["embedding"][min(time[t], cfg.max_time - 1)]
        for name, x in (
            ("Dense_0", returns_to_go[t : t + 1]),
            ("Dense_1", obs[t]),
            ("Dense_2", action[t]),
        ):
            tokens.append(norm64(p["LayerNorm_0"], dense64(p[name], x) + when))
    for i in range(cfg.layers):
        tokens = block64(p[f"Block_{i}"], tokens, cfg.heads)
    return np.stack(
        [np.tanh(dense64(p["head"], norm64(p["LayerNorm_1"], x))) for x in tokens[1::3]]
    )


def windows64(params, batch):
    """[actions (T, A)] of the windows of a batch, each of its own T steps."""
    rows = zip(
        *(f64(x) for x in batch[:3]), np.array(batch.time), np.array(batch.mask), strict=True
    )
    return [policy64(params, *(x[mask] for x in row)) for *row, mask in rows]


def loss64(params, batch):
    error = [
        (mine - f64(a)[m]) ** 2
        for mine, a, m in zip(
            windows64(params, batch), batch.action, np.array(batch.mask), strict=True
        )
    ]
    return np.concatenate(error).mean()


# --- Golden values ---


def test_transformer_is_the_papers(state, batch):
    """Left padding, heads, causality, the last block's shortcut: as if padding were not there."""
    action = FORWARD(state, batch)
    chex.assert_shape(action, (len(batch.obs), K, A))
    for mine, paper in zip(action, windows64(f64(state.actor.params), batch), strict=True):
        np.testing.assert_allclose(mine[K - len(paper) :], paper, rtol=1e-4, atol=1e-5)
    assert np.std(action) > 0.1


def moments(state):
    """Adam's first and so far only one: (1 - 0.9) g of the clipped gradient."""
    return f64(state.actor.opt_state[1][0].mu)


@pytest.fixture(scope="module")
def calm(state):
    """Without dropout and clipping."""
    return of_config(state, CALM)


@pytest.fixture(scope="module")
def updated(calm, batch):
    return UPDATE(calm, batch, KEY, CALM)


def test_loss_is_the_mean_over_the_steps_that_are_not_padding(calm, batch, updated):
    params = f64(calm.actor.params)
    assert list(updated[1]) == ["actor_loss"]
    np.testing.assert_allclose(updated[1]["actor_loss"], loss64(params, batch), rtol=1e-5)
    each = [loss64(params, jax.tree.map(lambda x, i=i: x[i : i + 1], batch)) for i in range(6)]
    assert abs(np.mean(each) - updated[1]["actor_loss"]) > 1e-3  # each step counts the same


def test_gradient_is_the_papers(calm, batch, updated):
    """Along random directions, by central differences in float64."""
    grads = jax.tree.map(lambda m: 10 * m, moments(updated[0]))
    params, rng = f64(calm.actor.params), np.random.default_rng(0)
    for _ in range(3):
        way = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
        ahead, back = (
            jax.tree.map(lambda x, d, s=s: x + s * d, params, way) for s in (1e-6, -1e-6)
        )
        slope = sum(np.sum(g * d) for g, d in zip(*map(jax.tree.leaves, (grads, way)), strict=True))
        expected = (loss64(ahead, batch) - loss64(back, batch)) / 2e-6
        np.testing.assert_allclose(slope, expected, rtol=1e-3)


# --- Masks ---


def disturb(batch, field, step):
    """That field of that step changed in every window."""
    new = {"time": lambda x: (x + 3) % CFG.max_time}.get(field, lambda x: x + 1)
    x = getattr(batch, field)
    return batch._replace(**{field: x.at[:, step].set(new(x[:, step]))})


@pytest.fixture(scope="module")
def full(state, data):
    """Windows without padding."""
    batch = WINDOWS(state, data, jnp.array([0, 1, 3, 5, 11, 12]), CFG)
    assert batch.mask.all()
    return batch


@pytest.mark.parametrize("field", ["obs", "returns_to_go", "action", "time"])
@pytest.mark.parametrize("step", range(K))
def test_future_changes_nothing_and_the_past_does(field, step, state, full):
    """An action is seen from the next step on, the rest from its own."""
    before, after = FORWARD(state, full), FORWARD(state, disturb(full, field, step))
    seen = step + (field == "action")
    np.testing.assert_array_equal(before[:, :seen], after[:, :seen])
    assert np.all(np.abs(before - after)[:, seen:].max(-1) > 1e-5)


@pytest.mark.parametrize("field", ["obs", "returns_to_go", "action", "time"])
def test_padding_changes_nothing(field, calm, batch, updated):
    x = getattr(batch, field)
    noise = (100 * jax.random.normal(KEY, x.shape)).astype(x.dtype)
    mask = jnp.reshape(batch.mask, (*batch.mask.shape, *[1] * (x.ndim - 2)))
    other = batch._replace(**{field: jnp.where(mask, x, noise)})
    before, after = FORWARD(calm, batch), FORWARD(calm, other)
    np.testing.assert_array_equal(before[batch.mask], after[batch.mask])
    assert np.any(before != after)  # what padding itself predicts: nobody asks
    learned = UPDATE(calm, other, KEY, CALM)
    assert learned[1] == updated[1]
    chex.assert_trees_all_close(moments(learned[0]), moments(updated[0]), rtol=1e-5, atol=1e-7)


def test_an_empty_window_is_no_nan(state):
    assert np.isfinite(FORWARD(state, dt.empty(6, D, A, CFG))).all()


def test_times_beyond_the_table_share_its_last_row(state, full):
    late = [full._replace(time=full.time * 0 + t) for t in (9, 10, 5000)]
    last, *beyond = (FORWARD(state, window) for window in late)
    for action in beyond:
        np.testing.assert_array_equal(action, last)
    assert np.any(FORWARD(state, full._replace(time=full.time * 0 + 8)) != last)


# --- Windows ---


@pytest.mark.parametrize(
    ("row", "rows"),
    [
        (0, [0, 1, 2, 3]),  # an episode's start
        (5, [5, 6, 7, 8]),  # the last whole window
        (6, [6, 7, 8]),  # cut at the end, never into the next episode
        (8, [8]),
        (9, [9, 10]),  # an episode shorter than a window
        (10, [10]),
        (15, [15]),  # the data's last row
    ],
)
def test_window(row, rows, state, data):
    window = jax.tree.map(lambda x: x[0], WINDOWS(state, data, jnp.full(6, row), CFG))
    n = len(rows)
    np.testing.assert_array_equal(window.mask, [False] * (K - n) + [True] * n)
    episode = np.searchsorted(FIRST, row, "right") - 1
    first, end = FIRST[episode], FIRST[episode] + LENGTHS[episode]
    np.testing.assert_array_equal(window.time[K - n :], np.array(rows) - first)
    obs, reward = f64(data.obs), f64(data.reward)
    expected = (obs[rows] - obs.mean(0)) / (obs.std(0) + 1e-3)
    np.testing.assert_allclose(window.obs[K - n :], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(window.action[K - n :], data.action[jnp.array(rows)])
    returns_to_go = [reward[i:end].sum() / CFG.rtg_scale for i in rows]  # to the episode's true end
    np.testing.assert_allclose(window.returns_to_go[K - n :], returns_to_go, rtol=1e-5, atol=1e-6)


def test_every_row_begins_a_window_as_often(state, data, monkeypatch):
    """So episodes are drawn in proportion to their length; counted in train_chunk itself."""
    rows = len(data.obs)
    ids = jnp.arange(rows, dtype=jnp.float32)[:, None].repeat(D, 1)
    state = state.replace(obs_mean=jnp.zeros(D), obs_std=jnp.ones(D))

    def count(state, batch, key, cfg):
        first = jnp.take_along_axis(batch.obs[..., 0], batch.mask.argmax(1)[:, None], 1)
        return state, {i: jnp.mean(first == i) for i in range(rows)}

    monkeypatch.setattr(dt, "update", count)
    cfg = replace(CFG, log_every=5000)
    share = jax.jit(partial(dt.train_chunk, cfg=cfg))(state, data._replace(obs=ids), KEY, 5000)[1]
    share = np.array([share[i] for i in range(rows)])
    np.testing.assert_allclose(share, 1 / rows, atol=5 * np.sqrt(1 / rows / 40_000))


# --- The start ---


def test_weights_start_as_gpt2s_and_nothing_but_observations_and_actions_is_read(data):
    batch = datasets.Batch(data.obs, data.action, None, None, None)  # as when a run is loaded
    fresh = INIT(KEY, batch, replace(CFG, normalize=False))
    leaves = jax.tree.leaves_with_path(fresh.actor.params)
    kinds = {"kernel": [], "embedding": [], "bias": [], "scale": []}
    for path, x in leaves:
        kinds[path[-1].key].append(np.ravel(x))
    for kind, x in ((kind, np.concatenate(x)) for kind, x in kinds.items()):
        mean, std = {"bias": (0, 0), "scale": (1, 0)}.get(kind, (0, 0.02))
        assert abs(x.mean() - mean) <= 5 * std / np.sqrt(x.size)
        assert abs(x.std() - std) <= 5 * std / np.sqrt(2 * x.size)
    np.testing.assert_array_equal(fresh.obs_mean, np.zeros(D))
    np.testing.assert_array_equal(fresh.obs_std, np.ones(D))


# --- Optimiser ---


def test_one_update(calm, updated):
    """Adam's first step, against the gradient, at a fifth of lr; and decay of all parameters."""
    new, _ = updated
    trees = jax.tree.leaves(f64(calm.actor.params)), jax.tree.leaves(f64(new.actor.params))
    for old, now, m in zip(*trees, jax.tree.leaves(moments(new)), strict=True):
        clear = (np.abs(m) > 1e-5) | (m == 0)  # elsewhere rounding decides the direction
        expected = old - CFG.lr / CFG.warmup * (np.sign(m) + CFG.weight_decay * old)
        np.testing.assert_allclose(now[clear], expected[clear], rtol=1e-5, atol=1e-5)
    assert new.actor.step == 1
    chex.assert_trees_all_equal((new.obs_mean, new.obs_std), (calm.obs_mean, calm.obs_std))


def test_learning_rate_warms_up_and_stays(state):
    """Along a constant gradient every step of Adam has the length lr."""
    tx = of_config(state, replace(CFG, weight_decay=0.0)).actor.tx
    grads, sizes, advance = jnp.array([0.1, -0.1, 0.05]), [], jax.jit(tx.update)
    memory = tx.init(grads)
    for _ in range(2 * CFG.warmup + 2):
        step, memory = advance(grads, memory, 0 * grads)
        sizes.append(step)
    ramp = CFG.lr * np.minimum(np.arange(1, 2 * CFG.warmup + 3) / CFG.warmup, 1)
    np.testing.assert_allclose(sizes, ramp[:, None] * [-1, 1, -1], rtol=1e-4)


@pytest.mark.parametrize(("size", "kept"), [(10.0, 0.25), (0.2, 0.2)])
def test_gradients_are_clipped_by_their_norm_over_all_parameters(size, kept, state):
    tx = state.actor.tx
    ones = {"a": jnp.ones((2, 3)), "b": jnp.ones(10)}  # of norm 4
    _, memory = tx.update({k: size / 4 * x for k, x in ones.items()}, tx.init(ones), ones)
    for moment in memory[1][0].mu.values():
        np.testing.assert_allclose(moment, np.full(moment.shape, 0.1 * kept / 4), rtol=1e-5)


# --- Dropout ---


def test_dropout_drops_and_keeps_the_mean():
    x = jnp.full((301, 333), 2.0)  # an odd number of elements
    drop = dt.Dropout(0.1)
    y = drop.apply({}, x, True, rngs={"dropout": KEY})
    np.testing.assert_allclose(np.unique(y), [0, 2 / 0.9], rtol=1e-6)
    assert abs(np.mean(y == 0) - 0.1) < 0.004  # 4 standard errors
    assert abs(np.mean((y[:-1] == 0) & (y[1:] == 0)) - 0.01) < 0.0015  # independently
    assert abs(np.mean((y[:, :-1] == 0) & (y[:, 1:] == 0)) - 0.01) < 0.0015
    other = drop.apply({}, x, True, rngs={"dropout": jax.random.key(1)})
    assert abs(np.mean((y == 0) & (other == 0)) - 0.01) < 0.0015
    np.testing.assert_array_equal(drop.apply({}, x, False), x)


def test_dropout_where_gpt2_has_it(state, full):
    """Embeddings; in every block attention's shares, its output and the MLP's."""
    seen = []

    def watch(call, args, kwargs, context):
        if isinstance(context.module, dt.Dropout):
            seen.append((args[0].shape, (args[1:] or (kwargs["train"],))[0]))
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        jax.eval_shape(partial(dt.actor_loss, cfg=CFG), state.actor.params, state, full, KEY)
    n, t, w = len(full.obs), 3 * K, CFG.width
    block = [(n, CFG.heads, t, t), (n, t, w), (n, t, w)]
    last = [(n, CFG.heads, K, t), (n, K, w), (n, K, w)]
    assert seen == [(shape, True) for shape in [(n, t, w), *block, *last]]


def test_dropout_while_training_only(state, batch, updated):
    """Every key trains on its own loss; acting, see below, knows no dropout."""
    losses = [UPDATE(state, batch, jax.random.key(i), CFG)[1]["actor_loss"] for i in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert updated[1]["actor_loss"] not in losses


# --- Acting ---


def test_acting_is_the_transformer_on_the_last_steps(state):
    """Over an episode longer than the context and the time table, rewards taken off the target."""
    rng, steps, episodes = np.random.default_rng(3), 12, 5
    obs = 5 + 3 * rng.normal(size=(steps, episodes, D))
    reward = rng.normal(size=(steps, episodes))
    reward[0] = 0
    carry, actions = None, []
    for t in range(steps):
        inputs = jnp.float32(obs[t]), jnp.float32(reward[t]), jax.random.key(t)
        action, carry = ACT(state, carry, *inputs, CFG)
        actions.append(f64(action))
        chex.assert_trees_all_equal_shapes(carry, dt.empty(episodes, D, A, CFG))
    seen = (obs - f64(state.obs_mean)) / f64(state.obs_std)
    returns_to_go = (np.array([3, 3, 3, 1, 1]) - np.cumsum(reward, 0)) / CFG.rtg_scale
    actions, params = np.stack(actions), f64(state.actor.params)
    for t in range(steps):
        part = slice(max(0, t + 1 - K), t + 1)
        for e in range(episodes):
            history = (x[part, e] for x in (seen, actions, returns_to_go))
            expected = policy64(params, *history, np.arange(steps)[part])[-1]
            np.testing.assert_allclose(actions[t, e], expected, rtol=1e-3, atol=2e-5)
    assert np.std(actions) > 0.1


def test_acting_for_several_seeds(state):
    """As `evaluate` calls it: jitted, seeds on axis 0, no carry at first."""
    seeds = [scramble(state, i) for i in range(2)]
    states = jax.tree.map(lambda *x: jnp.stack(x), *seeds)
    policy = jax.jit(jax.vmap(partial(dt.act, cfg=CFG), (0, 0, 0, 0, None)))
    obs, reward = jax.random.normal(KEY, (2, 5, D)), jnp.ones((2, 5))
    action, carry = policy(states, None, obs, 0 * reward, KEY)
    action, carry = policy(states, carry, obs + 1, reward, KEY)
    chex.assert_shape(action, (2, 5, A))
    for i, alone in enumerate(seeds):
        _, memory = ACT(alone, None, obs[i], 0 * reward[i], KEY, CFG)
        mine, _ = ACT(alone, memory, obs[i] + 1, reward[i], KEY, CFG)
        np.testing.assert_allclose(action[i], mine, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("targets", "episodes", "expected"),
    [
        ((5.0,), 3, [5, 5, 5]),
        ((5.0, 1.0), 4, [5, 5, 1, 1]),
        ((5.0, 1.0), 5, [5, 5, 5, 1, 1]),
        ((5.0, 3.0, 1.0), 7, [5, 5, 5, 3, 3, 1, 1]),
        ((5.0, 1.0), 1, [5]),
        ((5.0, 1.0), 0, []),
    ],
)
def test_targets_go_to_the_episodes_in_blocks(targets, episodes, expected):
    np.testing.assert_array_equal(dt.asked(targets, episodes), expected)


@pytest.mark.parametrize("targets", [(), None])
def test_no_target_is_an_error(targets, state):
    with pytest.raises(ValueError, match="--targets"):
        dt.act(state, None, jnp.zeros((2, D)), jnp.zeros(2), KEY, replace(CFG, targets=targets))


def test_report_tells_every_target_once(capsys):
    class Run:
        log = staticmethod(print)
        returns = np.array([[10.0, 20, 1, 2], [30, 40, 3, 4]])

    dt.report(Run, (3600.0, 1800.0))
    expected = "Asked for 3,600, achieved 25.\nAsked for 1,800, achieved 2.\n"
    assert capsys.readouterr().out == expected
    Run.returns = None
    dt.report(Run, (3600.0,))  # a run without evaluation
    assert capsys.readouterr().out == ""


# --- Targets of a run ---


@pytest.mark.parametrize(
    ("env", "targets"),
    [
        ("hopper-medium-replay-v2", (3600,)),
        ("halfcheetah-medium-expert-v2", (12000,)),
        ("walker2d-medium-v2", (5000,)),
        ("stillwater/hopper/medium-replay-v0", None),  # other data, of other returns
    ],
)
def test_targets_of_the_authors_are_for_their_data(env, targets):
    assert experiment.resolve(dt.Config(env=env), dt.TUNED).targets == targets
    assert experiment.resolve(dt.Config(env=env, targets=(7.0,)), dt.TUNED).targets == (7.0,)


def test_without_a_target_the_datas_best_return_is_recorded(monkeypatch):
    data = dataset()

    def run(cfg, *_):
        raise InterruptedError(cfg.targets)

    monkeypatch.setattr(dt.experiment, "Run", run)
    reward = f64(data.reward)
    best = max(reward[i : i + n].sum() for i, n in zip(FIRST, LENGTHS, strict=True))
    with pytest.raises(InterruptedError) as told:
        dt.train(dt.Config(context=4, batch_size=8, eval_episodes=0), data)
    np.testing.assert_allclose(told.value.args[0], (best,), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "returns", "scale"),
    [
        ("hopper-medium-v2", 3000.0, 1000.0),  # the authors' own
        ("halfcheetah-medium-v2", 12_000.0, 1000.0),
        ("my/hopper.hdf5", 0.5, 0.1),  # a path's words say nothing
        ("sparse-v0", 1.0, 1.0),
        ("sparse-v0", 87.0, 10.0),
        ("costs-v0", -350.0, 100.0),
        ("nothing-v0", 0.0, 1.0),
    ],
)
def test_the_scale_is_the_authors_or_the_datas(monkeypatch, name, returns, scale):
    """Without the authors' the largest return is from 1 to 10 as the transformer sees it."""
    n, zeros = 30, np.zeros((30, 1), np.float32)
    reward = np.full(n, returns / n, np.float32)
    data = datasets.from_arrays(zeros, zeros, reward, np.arange(n) == n - 1, name=name,
                                timeout=np.zeros(n))  # fmt: skip

    def run(cfg, *_):
        raise InterruptedError(cfg.rtg_scale)

    monkeypatch.setattr(dt.experiment, "Run", run)
    with pytest.raises(InterruptedError) as told:
        dt.train(dt.Config(context=4, batch_size=8, eval_episodes=0), data)
    np.testing.assert_allclose(told.value.args[0], scale, rtol=1e-6)


# --- A world in which the return asked for chooses the action ---

# Five steps; an action above 0 pays 1. The data act at random, so that of t steps left with n to
# earn, n / t of the actions pay: a policy that knows this earns exactly what it is asked for.
STEPS, EPISODES, SIZE = 5, 4000, 0.8
WORLD = dt.Config(
    context=3, layers=1, width=32, dropout=0.02, max_time=STEPS, lr=5e-3, warmup=50, rtg_scale=1.0,
    log_every=100, targets=tuple(map(float, range(6))),
)  # fmt: skip
CHUNK = jax.jit(dt.train_chunk, static_argnums=4)


@pytest.fixture(scope="module")
def world():
    rng, rows = np.random.default_rng(0), EPISODES * STEPS
    pays = rng.random((EPISODES, STEPS)) < rng.random((EPISODES, 1))  # all returns are as frequent
    action = np.where(pays, SIZE, -SIZE).reshape(-1, 1).astype(np.float32)
    obs, reward = rng.normal(size=(rows, 1)).astype(np.float32), np.float32(pays.ravel())
    start, length = np.arange(EPISODES) * STEPS, np.full(EPISODES, STEPS)
    arrays = obs, action, reward, obs, 0 * reward, start, length
    return jax.tree.map(jnp.asarray, datasets.Dataset("", "", *arrays, None, None, {}).steps())


def test_it_does_what_is_asked(world):
    state, rng = INIT(KEY, world, WORLD), np.random.default_rng(1)
    for i in range(1, 21):
        state, _ = CHUNK(state, world, KEY, i * WORLD.log_every, WORLD)
    earned, reward, carry = np.zeros(6), np.zeros(6), None
    for t in range(STEPS):
        noise = jnp.float32(rng.normal(size=(6, 1)))
        action, carry = ACT(state, carry, noise, jnp.float32(reward), KEY, WORLD)
        share = (np.arange(6) - earned) / (STEPS - t)
        np.testing.assert_allclose(action[:, 0], SIZE * (2 * share - 1), atol=0.25)
        reward = np.float64(action[:, 0] > 0)
        earned += reward
    np.testing.assert_array_equal(earned, np.arange(6))
