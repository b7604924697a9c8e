"""COMBO against float64 numpy, its model on a linear system, its rollouts, ring and minibatches."""

import collections
from functools import lru_cache, partial

import combo
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.datasets import Batch

# The world: s' = s A + a B, r = s . C; with the actions in [-1, 1] it stays within about 3.
A = np.array([[0.9, 0.3], [-0.3, 0.8]])
B = np.array([[0.1, 0.5]])
C = np.array([1.0, -0.5])


def world_step(obs, action):
    return obs @ A + action @ B, obs @ C


@lru_cache
def world_data(episodes=20, length=20, seed=0):
    """Episodes of the world one after the other; each begins far from where the last one ended."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(episodes):
        obs = rng.uniform(-2, 2, 2)
        for _ in range(length):
            action = rng.uniform(-1, 1, 1)
            next_obs, reward = world_step(obs, action)
            rows.append((obs, action, reward, next_obs, 0.0))
            obs = next_obs
    return Batch(*(jnp.array(np.stack(column), jnp.float32) for column in zip(*rows, strict=True)))


def config(**values):
    small = dict(
        batch_size=16, widths=(8, 8), eval_every=20, rollout_every=10, beta=1.0, horizon=2,
        rollout_batch=20, retain=2, model_widths=(16, 16), model_decay=(2.5e-5, 5e-5, 1e-4),
        num_members=3, num_elites=2,
    )  # fmt: skip
    return combo.Config(**small | values)


@lru_cache
def fresh(cfg, seed=0):
    """A State on the world's data, every parameter moved off its start, target unlike critic."""
    state = jax.jit(partial(combo.init, cfg=cfg))(jax.random.key(seed), world_data())
    rng = np.random.default_rng(seed)
    move = partial(jax.tree.map, lambda x: x + jnp.float32(rng.normal(0, 0.1, x.shape)))
    actor, critic, temperature = (
        learner.replace(params=move(learner.params))
        for learner in (state.actor, state.critic, state.temperature)
    )
    dynamics = state.dynamics.replace(params=move(state.dynamics.params))
    return state.replace(
        actor=actor, critic=critic, temperature=temperature, target=move(state.target),
        dynamics=dynamics,
    )  # fmt: skip


@lru_cache
def fresh_fit(cfg, seed=0):
    return jax.jit(partial(combo.init_fit, cfg=cfg))(jax.random.key(seed), world_data())


def epoch(fit, cfg, data=None, seed=1):
    data = world_data() if data is None else data
    return jax.jit(partial(combo.fit_epoch, cfg=cfg))(fit, data, jax.random.key(seed))


def fitted(seeds, cfg, data):
    """(elites with the seeds on axis 0, number of epochs)."""
    lines = []
    keys = jax.vmap(jax.random.key)(jnp.array(seeds))
    dynamics = combo.fit_dynamics(keys, data, cfg, lines.append)
    assert [f"epoch {i + 1}:" in line for i, line in enumerate(lines)] == [True] * len(lines)
    return dynamics, len(lines)


def member(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def same(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return [bool(jnp.array_equal(x, y)) for x, y in pairs]


def finite(tree):
    return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


# --- The same networks in float64 numpy ---


def double(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def net(layers, x, activation):
    count = sum(name.startswith("Dense") for name in layers)
    for i in range(count):
        x = x @ layers[f"Dense_{i}"]["kernel"] + layers[f"Dense_{i}"]["bias"]
        x = activation(x) if i < count - 1 else x
    return x


def relu(x):
    return np.maximum(x, 0)


def swish(x):
    return x / (1 + np.exp(-x))


def softplus(x):
    return np.logaddexp(x, 0)


def gaussian(params, x):
    """Mean and log-variance of one member at standardised inputs."""
    p = double(params)["params"]
    mean, logvar = np.split(net(p, x, swish), 2, -1)
    logvar = p["upper"] - softplus(p["upper"] - logvar)
    return mean, p["lower"] + softplus(logvar - p["lower"])


def critics(params, obs, action):
    """Q of both critics, (2, ...)."""
    x = np.concatenate([np.broadcast_to(obs, (*action.shape[:-1], obs.shape[-1])), action], -1)
    members = [member(double(params)["params"]["MLP_0"], i) for i in range(2)]
    return np.stack([net(layers, x, relu)[..., 0] for layers in members])


def policy(params, obs):
    """Mean and std of the Gaussian under the tanh."""
    p = double(params)["params"]
    mean, log_std = np.split(net(p["MLP_0"], obs, relu), 2, -1)
    log_std = p["log_std_scale"] * log_std + p["log_std_shift"]
    return mean, np.exp(np.clip(log_std, -20, 2))


def log_density(params, obs, action):
    """log pi(action | obs) of the tanh-Gaussian."""
    mean, std = policy(params, obs)
    z = (np.arctanh(action) - mean) / std
    normal = -0.5 * z**2 - np.log(std) - 0.5 * np.log(2 * np.pi)
    return np.sum(normal - np.log(1 - action**2), -1)


# --- Dynamics ---


def far_bounds(params):
    """Both bounds at work: logvar heads beyond the upper and the lower one."""
    head = params["params"]["Dense_2"]
    bias = head["bias"].at[3:].set(jnp.array([4.0, -14.0, -1.0]))
    return {"params": {**params["params"], "Dense_2": {**head, "bias": bias}}}


@pytest.mark.parametrize("bounds", ["near", "far"])
def test_model_loss_is_the_equation(bounds):
    cfg, fit = config(model_decay=(0.03, 0.02, 0.05)), fresh_fit(config())
    params = member(fresh(config()).dynamics.params, 0)  # biases and bounds off their start
    params = far_bounds(params) if bounds == "far" else params
    inputs, targets = combo.model_pairs(world_data(), jnp.arange(50))

    x = (double(inputs) - double(fit.dynamics.mean)) / double(fit.dynamics.std)
    mean, logvar = gaussian(params, x)
    nll = np.mean((mean - double(targets)) ** 2 * np.exp(-logvar) + logvar)
    p = double(params)["params"]
    decay = sum(
        c / 2 * np.sum(p[f"Dense_{i}"]["kernel"] ** 2) for i, c in enumerate(cfg.model_decay)
    )
    pull = 0.01 * np.sum(p["upper"] - p["lower"])
    assert min(abs(nll), decay, pull) > 0.1  # each of the three is seen
    loss = combo.model_loss(params, fit, inputs, targets, cfg)
    np.testing.assert_allclose(loss, nll + decay + pull, rtol=1e-5)


def test_the_bounds_of_the_variance_are_pulled_together_and_each_members_own():
    cfg, fit = config(), fresh_fit(config())
    params = member(fit.dynamics.params, 0)
    head = params["params"]["Dense_2"]
    bias = head["bias"].at[3:].set(-3.0)  # between the bounds of 0.5 and -10: only the pull is left
    kernel = head["kernel"].at[:, 3:].set(0.0)
    params = {"params": {**params["params"], "Dense_2": {"kernel": kernel, "bias": bias}}}
    pairs = combo.model_pairs(world_data(), jnp.arange(50))
    grads = jax.grad(combo.model_loss)(params, fit, *pairs, cfg)["params"]
    assert (grads["upper"] > 0).all()  # descent lowers it
    assert (grads["lower"] < 0).all()  # and raises this one
    assert fit.dynamics.params["params"]["upper"].shape == (cfg.num_members, 3)


def test_the_pairs_stay_within_their_row():
    data, rows = world_data(), np.array([39, 0, 19, 20, 399])  # 19, 39 and 399 end an episode
    inputs, targets = combo.model_pairs(data, rows)
    obs, action, reward, next_obs, _ = (np.asarray(x)[rows] for x in data)
    np.testing.assert_array_equal(inputs, np.concatenate([obs, action], 1))
    np.testing.assert_array_equal(targets, np.concatenate([next_obs - obs, reward[:, None]], 1))
    truth, _ = world_step(obs, action)
    np.testing.assert_allclose(obs + targets[:, :2], truth, atol=1e-5)


@pytest.mark.parametrize(("episodes", "size"), [(20, 80), (300, 1000)])
def test_the_holdout_is_in_nobodys_rows(episodes, size):
    cfg, data = config(model_widths=(4,), model_decay=(0.0, 0.0)), world_data(episodes)
    fit = jax.jit(partial(combo.init_fit, cfg=cfg))(jax.random.key(0), data)
    rows, holdout = np.arange(20 * episodes), np.asarray(fit.holdout)
    train = np.setdiff1d(rows, holdout)
    assert len(holdout) == len(np.unique(holdout)) == size
    assert fit.bootstrap.shape == (cfg.num_members, len(train))
    assert np.isin(fit.bootstrap, train).all()
    seen = [np.unique(x) for x in np.asarray(fit.bootstrap)]
    for one in seen:  # drawn with replacement: 1 - 1/e of the rows
        assert 0.55 < len(one) / len(train) < 0.71
    assert len(np.intersect1d(seen[0], seen[1])) < 0.6 * len(train)
    inputs, _ = combo.model_pairs(double(data), train)
    np.testing.assert_allclose(fit.dynamics.mean, inputs.mean(0), atol=1e-5)
    np.testing.assert_allclose(fit.dynamics.std, inputs.std(0), atol=1e-5)


def test_a_member_learns_from_its_own_rows_alone():
    cfg, data = config(), world_data()
    fit = fresh_fit(cfg)
    mine, other = np.asarray(fit.bootstrap[0]), np.asarray(fit.bootstrap[1])

    def trained(row):
        poisoned = data._replace(reward=data.reward.at[row].set(jnp.nan))
        after, _ = epoch(fit, cfg, poisoned)
        return [finite(member(after.model.params, i)) for i in range(cfg.num_members)], after

    good, after = trained(fit.holdout)
    assert good == [True] * cfg.num_members
    assert same(after.dynamics, fit.dynamics).count(False) == 0  # an error of nan is no gain
    good, _ = trained(np.setdiff1d(mine, other)[0])
    assert good[:2] == [False, True]


def test_a_member_keeps_its_best_after_a_gain_of_one_percent():
    cfg = config()
    fit = fresh_fit(cfg).replace(stale=jnp.array(cfg.patience - 1))
    first, info = epoch(fit, cfg)
    error = np.asarray(info["holdout_error"])
    inputs, targets = (double(x) for x in combo.model_pairs(world_data(), fit.holdout))
    x = (inputs - double(fit.dynamics.mean)) / double(fit.dynamics.std)
    for i in range(cfg.num_members):  # against nothing, each first epoch is a gain
        mean, _ = gaussian(member(first.model.params, i), x)
        np.testing.assert_allclose(error[i], np.mean((mean - targets) ** 2), rtol=1e-4)
        assert all(same(member(first.dynamics.params, i), member(first.model.params, i)))
    assert first.stale == 0

    old = error * np.array([1.005, 1.02, 0.9]) / 1.0  # gains of 0.5 % and 2 %, and a loss
    second, _ = epoch(fit.replace(error=jnp.array(old)), cfg)
    kept = [all(same(member(second.dynamics.params, i), member(fit.dynamics.params, i)))
            for i in range(3)]  # fmt: skip
    assert kept == [True, False, True]
    np.testing.assert_allclose(second.error, [old[0], error[1], old[2]], rtol=1e-6)
    assert second.stale == 0  # one gain is enough

    third, _ = epoch(fit.replace(error=jnp.array(error)), cfg)
    assert third.stale == cfg.patience

    for old in (jnp.inf, 1.0):  # frozen: whatever comes now is not kept, and no gain wakes it
        late = fit.replace(stale=jnp.array(cfg.patience), error=jnp.full(3, old))
        after, _ = epoch(late, cfg)
        assert all(same(after.dynamics, late.dynamics))
        assert all(same(after.error, late.error))
        assert after.stale > cfg.patience


def test_training_ends_when_nobody_gains():
    _, epochs = fitted([0], config(model_lr=0.0, patience=3), world_data())
    assert epochs == 1 + 3
    _, epochs = fitted([0], config(max_epochs=2), world_data())
    assert epochs == 2


def test_a_seed_that_ends_first_waits_unchanged():
    cfg = config(model_lr=0.02, patience=1, model_widths=(8,), model_decay=(0.0, 0.0))
    seeds = (0, 1, 2)
    alone = [fitted([seed], cfg, world_data()) for seed in seeds]
    lengths = [length for _, length in alone]
    assert len(set(lengths)) > 1, lengths  # or this test shows nothing
    together, length = fitted(seeds, cfg, world_data())
    assert length == max(lengths)
    for i, (dynamics, _) in enumerate(alone):
        for x, y in zip(jax.tree.leaves(together), jax.tree.leaves(dynamics), strict=True):
            np.testing.assert_allclose(x[i], y[0], rtol=1e-3, atol=1e-4)


def test_the_elites_are_the_best_as_they_were_at_their_best():
    cfg = config(num_members=4, num_elites=2)
    fit, _ = epoch(fresh_fit(cfg), cfg)
    fit, _ = epoch(fit.replace(error=jnp.array([0.0, 0.0, 0.0, 0.0])), cfg, seed=2)  # none kept
    assert not any(same(fit.model.params, fit.dynamics.params))
    elites = combo.elites(fit.replace(error=jnp.array([3.0, 0.5, jnp.inf, 0.2])), cfg)
    for member_, elite in ((3, 0), (1, 1)):
        assert all(same(member(elites.params, elite), member(fit.dynamics.params, member_)))
    assert all(same((elites.mean, elites.std), (fit.dynamics.mean, fit.dynamics.std)))


# --- Steps in the model ---


def silent(dynamics):
    """Without noise: the variance is held at e^-60."""
    p = dynamics.params["params"]
    bounds = {name: jnp.full_like(p[name], -60) for name in ("upper", "lower")}
    return dynamics.replace(params={"params": {**p, **bounds}})


def constant(dynamics, values, std=None):
    """Elite e predicts values[e], (D + 1,), whatever its input is."""
    p = jax.tree.map(jnp.zeros_like, dynamics.params["params"])
    last = max(name for name in p if name.startswith("Dense"))
    logvar = jnp.zeros_like(values) if std is None else 2 * jnp.log(std) + jnp.zeros_like(values)
    p[last]["bias"] = jnp.concatenate([values, logvar], -1)
    bounds = {"upper": p["upper"] + 30, "lower": p["lower"] - 30}
    dynamics = dynamics.replace(params={"params": {**p, **bounds}})
    return silent(dynamics) if std is None else dynamics


@pytest.fixture(scope="module")
def world():
    """Elites trained on the world."""
    cfg = config(batch_size=32, model_lr=3e-3, max_epochs=30)
    dynamics, _ = fitted([0], cfg, world_data(80))
    return member(dynamics, 0)


def test_each_row_is_served_by_one_elite_and_each_elite_serves_as_many():
    cfg = config(num_members=5, num_elites=3)
    dynamics = silent(fresh(cfg).dynamics)
    obs, action = world_data().obs[:12], world_data().action[:12]
    next_obs, reward = combo.model_step(dynamics, obs, action, jax.random.key(0), cfg)
    x = np.concatenate([obs, action], 1)
    x = (double(x) - double(dynamics.mean)) / double(dynamics.std)
    means = np.stack([gaussian(member(dynamics.params, e), x)[0] for e in range(3)])  # (3, 12, 3)
    step = np.concatenate([next_obs - obs, reward[:, None]], 1)
    served = np.isclose(means, step, atol=1e-4).all(-1)
    assert served.sum(0).tolist() == [1] * 12
    assert served.sum(1).tolist() == [4] * 3


def test_the_noise_has_the_models_std():
    cfg, std = config(), jnp.array([0.1, 0.5, 2.0])
    dynamics = constant(fresh(cfg).dynamics, jnp.zeros((2, 3)), std)
    obs, action = jnp.ones((6000, 2)), jnp.zeros((6000, 1))
    steps = []
    for seed in range(2):
        next_obs, reward = combo.model_step(dynamics, obs, action, jax.random.key(seed), cfg)
        steps.append(np.concatenate([next_obs - obs, reward[:, None]], 1))
        np.testing.assert_allclose(steps[-1].std(0), std, rtol=0.05)
        assert np.abs(steps[-1].mean(0) / std).max() < 0.05
    halves = np.concatenate([steps[0].reshape(2, -1, 3), steps[1].reshape(2, -1, 3)])  # by elites
    noise = (halves / std).transpose(0, 2, 1).reshape(12, -1)
    assert np.abs(np.corrcoef(noise) - np.eye(12)).max() < 0.1  # none is another's


def test_the_model_learns_the_world(world):
    cfg, data = config(), world_data(80, seed=1)  # other episodes
    next_obs, reward = combo.model_step(
        silent(world), data.obs, data.action, jax.random.key(0), cfg
    )
    truth, gain = world_step(double(data.obs), double(data.action))
    assert np.sqrt(np.mean((next_obs - truth) ** 2)) < 0.05 * np.std(truth - data.obs)
    assert np.sqrt(np.mean((reward - gain) ** 2)) < 0.05 * np.std(gain)


# --- Rollouts ---


def counting(cfg, size=40):
    """A model that counts: s = (id, step), s' = (id, step + 1), r = 1 + the number of the elite."""
    ids = jnp.arange(1.0, size + 1)
    data = Batch(
        jnp.stack([ids, 0 * ids], 1),
        jnp.zeros((size, 1)),
        0 * ids - 1,
        jnp.zeros((size, 2)),
        0 * ids,
    )
    values = jnp.stack([jnp.array([0.0, 1.0, 1.0 + e]) for e in range(cfg.num_elites)])
    state = fresh(cfg)
    return state.replace(dynamics=constant(state.dynamics, values)), data


def rolled(state, data, cfg, terminal, seed=0):
    """The rows that were kept, and how many were made."""
    roll = jax.jit(partial(combo.rollout, cfg=cfg, terminal=terminal))
    rows, keep = roll(state, data, jax.random.key(seed))
    return Batch(*(np.asarray(x)[np.asarray(keep)] for x in rows)), len(keep)


def at_once(obs, action, next_obs):
    return jnp.ones(len(obs), bool)


def test_a_rollout_that_ends_at_once_keeps_its_first_rows_as_ends():
    cfg = config(rollout_batch=400, horizon=3)
    state, data = counting(cfg)
    rows, made = rolled(state, data, cfg, at_once)
    assert (made, len(rows.reward)) == (1200, 400)
    assert rows.done.tolist() == [1.0] * 400
    assert rows.obs[:, 1].tolist() == [0.0] * 400
    assert set(rows.obs[:, 0]) == set(
        np.asarray(data.obs[:, 0])
    )  # any state of the data is a start


def test_a_rollout_that_never_ends_keeps_every_row():
    cfg = config(rollout_batch=400, horizon=3)
    rows, made = rolled(*counting(cfg), cfg, combo.never)
    assert made == len(rows.reward) == 1200
    assert not rows.done.any()
    assert collections.Counter(rows.obs[:, 1]) == {0: 400, 1: 400, 2: 400}


def test_nothing_comes_after_an_end_and_the_end_itself_is_kept():
    """An id's rollouts last 1 to 3 steps, or longer than the horizon."""
    cfg = config(rollout_batch=200, horizon=3)

    def terminal(obs, action, next_obs):
        return next_obs[:, 1] == obs[:, 0] % 4 + 1

    rows, _ = rolled(*counting(cfg), cfg, terminal)
    seen = collections.defaultdict(list)
    for (name, step), next_obs, done in zip(rows.obs, rows.next_obs, rows.done, strict=True):
        assert next_obs.tolist() == [name, step + 1]
        seen[name].append((step, done))
    assert len(seen) > 30
    for name, steps in seen.items():
        length = name % 4 + 1
        starts = sum(step == 0 for step, _ in steps)
        path = [(step, float(step + 1 == length)) for step in range(int(min(length, 3)))]
        assert collections.Counter(steps) == {row: starts for row in path}, name


def test_each_step_begins_where_one_ended_and_draws_its_elite_anew():
    cfg = config(rollout_batch=100, horizon=3)
    state, data = counting(cfg, 5000)
    rows, _ = rolled(state, data, cfg, combo.never)
    elite = collections.defaultdict(dict)  # id -> step -> elite
    for (name, step), reward in zip(rows.obs, rows.reward, strict=True):
        elite[name][step] = reward
    names = [n for n, c in collections.Counter(rows.obs[:, 0]).items() if c == 3]  # started once
    table = np.array([[elite[n][step] for step in range(3)] for n in names])
    assert len(table) > 80
    assert set(table.ravel()) == {1.0, 2.0}
    for one, two in ((0, 1), (1, 2), (0, 2)):  # half by chance, all or none otherwise
        assert 0.25 < np.mean(table[:, one] == table[:, two]) < 0.75
    for step in range(3):
        served = collections.Counter(rows.reward[rows.obs[:, 1] == step])
        assert served == {1.0: 50, 2.0: 50}


def test_a_rollout_in_the_world_follows_it(world):
    """Rows of noise-free rollouts, joined by their states, against the world from the start on."""
    cfg, data = config(rollout_batch=60, horizon=3), world_data()
    state = fresh(cfg).replace(dynamics=silent(world))
    rows, _ = rolled(state, data, cfg, combo.never)
    starts = {tuple(obs) for obs in np.asarray(data.obs)}
    after = {tuple(obs): i for i, obs in enumerate(rows.obs)}
    assert sum(tuple(obs) in starts for obs in rows.obs) == 60
    error, travelled = [], []
    for i, start in enumerate(rows.obs):
        if tuple(start) not in starts:
            continue
        truth, gain, row = np.float64(start), [], i
        for _ in range(3):
            truth, reward = world_step(truth, rows.action[row])
            gain.append(reward - rows.reward[row])
            end = rows.next_obs[row]
            row = after.get(tuple(end))
        assert row is None  # three steps, then no more
        error.append([*(end - truth), *gain])
        travelled.append(truth - start)
    assert np.sqrt(np.mean(np.square(error))) < 0.1 * np.std(travelled)


def test_rollouts_act_by_the_policy_on_normalised_states():
    cfg = config(normalize=True)
    state, data = counting(cfg)
    state = state.replace(obs_mean=jnp.array([20.0, 1.0]), obs_std=jnp.array([10.0, 0.5]))
    p = state.actor.params["params"]
    calm = {"log_std_scale": jnp.zeros(()), "log_std_shift": jnp.array(-20.0)}
    state = state.replace(actor=state.actor.replace(params={"params": {**p, **calm}}))
    rows, _ = rolled(state, data, cfg, combo.never)
    obs = (double(rows.obs) - [20.0, 1.0]) / [10.0, 0.5]
    mean, _ = policy(state.actor.params, obs)
    assert np.std(np.tanh(mean)) > 0.01
    np.testing.assert_allclose(rows.action, np.tanh(mean), atol=1e-5)
    np.testing.assert_allclose(combo.act(state, rows.obs), np.tanh(mean), atol=1e-5)


# --- The ring ---


def test_the_ring_is_first_in_first_out():
    capacity, size, rng = 7, 5, np.random.default_rng(0)
    ring = combo.Ring(
        Batch(jnp.zeros((7, 2)), jnp.zeros((7, 1)), jnp.zeros(7), jnp.zeros((7, 2)), jnp.zeros(7)),
        jnp.zeros((), int),
    )
    push, held = jax.jit(combo.push), collections.deque(maxlen=capacity)
    assert ring.filled == 0
    for i in range(60):
        ids = jnp.arange(1.0 + i * size, 1.0 + (i + 1) * size)
        keep = rng.random(size) < rng.choice([0.0, 0.3, 0.7, 1.0])
        batch = Batch(
            jnp.stack([ids, ids + 0.1], 1), ids[:, None], ids, jnp.stack([ids, -ids], 1), ids
        )
        ring = push(ring, batch, jnp.array(keep))
        held.extend(np.asarray(ids)[keep].tolist())
        assert ring.filled == len(held)
        rows = Batch(*(np.asarray(x)[: len(held)] for x in ring.rows))  # those that are sampled
        assert sorted(rows.reward.tolist()) == list(held)
        np.testing.assert_array_equal(rows.next_obs, np.stack([rows.reward, -rows.reward], 1))
        np.testing.assert_allclose(
            rows.obs - rows.reward[:, None], [[0.0, 0.1]] * len(held), atol=1e-4
        )
        np.testing.assert_array_equal(rows.action[:, 0], rows.done)
        if i == 2:
            assert 0 < len(held) < capacity or ring.total > capacity


def chunk(state, data, cfg, terminal=combo.never, seed=0):
    run = jax.jit(partial(combo.train_chunk, cfg=cfg, terminal=terminal))
    return run(state, data, jax.random.key(seed))


def test_nothing_beyond_the_filled_rows_is_sampled():
    cfg = config(retain=3, horizon=3)
    state = fresh(cfg)
    empty = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), state.ring.rows)
    state, metrics = chunk(
        state.replace(ring=state.ring.replace(rows=empty)), world_data(), cfg, at_once
    )
    assert state.ring.filled == 2 * cfg.rollout_batch < len(state.ring.rows.reward)
    assert finite(metrics)
    assert finite((state.actor.params, state.critic.params, state.target))


def test_a_chunk_makes_its_updates_and_its_rollouts():
    cfg = config(horizon=3)
    state, metrics = chunk(fresh(cfg), world_data(), cfg)
    assert state.critic.step == state.actor.step == state.temperature.step == cfg.eval_every
    assert state.ring.total == cfg.eval_every // cfg.rollout_every * cfg.rollout_batch * 3
    assert all(x.shape == () for x in metrics.values())


@pytest.mark.parametrize(("fraction", "real"), [(0.5, 8), (0.75, 12)])
def test_a_minibatch_holds_the_datas_rows_then_the_models(monkeypatch, fraction, real):
    """Rewards are -1 in the data, 1 or 2 in the model; obs[0] is a whole number from 1 to 40."""
    cfg = config(real_fraction=fraction, normalize=True)
    state, data = counting(cfg)
    state = state.replace(obs_mean=jnp.array([20.0, 1.0]), obs_std=jnp.array([8.0, 0.5]))

    def update(state, batch, key, cfg):
        assert batch.obs.shape == batch.next_obs.shape == (16, 2)
        ids = batch.obs[:, 0] * 8 + 20
        info = {
            "real": jnp.sum(batch.reward == -1) / 1.0,
            "first": jnp.all(batch.reward[:real] == -1) / 1.0,
            "model": jnp.all(batch.reward[real:] > 0) / 1.0,
            "whole": jnp.all((ids == jnp.round(ids)) & (ids >= 1) & (ids <= 40)) / 1.0,
            "step": jnp.max(batch.next_obs[real:, 1]),  # (2 - 1) / 0.5 after the second step
            "sum": ids.sum(),
        }
        return state.replace(
            temperature=state.temperature.replace(step=state.temperature.step + 1)
        ), info

    monkeypatch.setattr(combo, "update", update)
    state, info = chunk(state, data, cfg)
    assert state.temperature.step == cfg.eval_every
    assert info["real"] == real
    assert (info["first"], info["model"], info["whole"]) == (1, 1, 1)
    assert 1 < info["step"] <= 2
    _, other = chunk(state, data, cfg, seed=1)
    assert info["sum"] != other["sum"]


# --- The critics' loss ---


class Heard:
    """Actions drawn inside a loss: from which means, by which call."""

    def __init__(self, monkeypatch):
        self.sampled, self.proposed, self.uniform = [], [], []
        heard, draw = self, jax.random.uniform

        class TanhNormal(combo.TanhNormal):
            def sample(self, **kwargs):
                action = super().sample(**kwargs)
                heard.sampled.append((double(self.distribution.mean()), double(action)))
                return action

            def sample_and_log_prob(self, **kwargs):
                action, log_prob = super().sample_and_log_prob(**kwargs)
                heard.proposed.append((double(self.distribution.mean()), double(action)))
                return action, log_prob

        def uniform(*args, **kwargs):
            self.uniform.append(draw(*args, **kwargs))
            return self.uniform[-1]

        monkeypatch.setattr(combo, "TanhNormal", TanhNormal)
        monkeypatch.setattr(jax.random, "uniform", uniform)

    def at(self, kind, mean):
        """The one draw of that kind from a policy with these means."""
        (action,) = [a for m, a in getattr(self, kind) if np.allclose(m, mean, atol=1e-4)]
        return action


def mixed_batch(seed=0, size=16):
    rng = np.random.default_rng(seed)
    draw = (rng.normal(size=(size, 2)), rng.uniform(-0.9, 0.9, (size, 1)), rng.normal(size=size),
            rng.normal(size=(size, 2)), rng.random(size) < 0.3)  # fmt: skip
    return Batch(*(jnp.array(x, jnp.float32) for x in draw))


@pytest.mark.parametrize("max_backup", [False, True])
@pytest.mark.parametrize(("rho", "fraction"), [("mixture", 0.5), ("model", 0.75)])
def test_critic_loss_is_the_equation(monkeypatch, rho, fraction, max_backup):
    heard = Heard(monkeypatch)
    cfg = config(rho=rho, real_fraction=fraction, max_backup=max_backup, beta=1.7, gamma=0.9)
    state, batch = fresh(cfg), mixed_batch()
    hot = jax.tree.map(lambda x: x + 5, state.temperature.params)  # an entropy would be seen
    state = state.replace(temperature=state.temperature.replace(params=hot))
    params, real = state.critic.params, int(16 * fraction)
    loss, info = combo.critic_loss(params, state, batch, jax.random.key(0), cfg)

    obs, action, reward, next_obs, done = double(batch)
    assert 0 < done.sum() < 16
    pi = state.actor.params
    next_action = heard.at("sampled", policy(pi, next_obs)[0])
    assert next_action.shape == (10 if max_backup else 1, 16, 1)
    next_q = critics(state.target, next_obs, next_action).min(0).max(0)
    target = reward + 0.9 * (1 - done) * next_q
    q = critics(params, obs, action)
    td = np.mean((q - target) ** 2, 1)

    part = slice(real if rho == "model" else 0, None)
    (uniform,) = heard.uniform
    here = heard.at("proposed", policy(pi, obs[part])[0])
    there = heard.at("proposed", policy(pi, next_obs[part])[0])
    others = np.concatenate([double(uniform), here, there])  # (30, B, 1)
    assert others.shape == (30, len(obs[part]), 1)
    density = np.concatenate(
        [
            np.full(uniform.shape[:2], np.log(0.5)),
            log_density(pi, obs[part], here),
            log_density(pi, next_obs[part], there),
        ]
    )
    soft_max = np.log(np.sum(np.exp(critics(params, obs[part], others) - density), 1))  # (2, B)
    gap = soft_max.mean(1) - q[:, :real].mean(1)
    np.testing.assert_allclose(loss, np.sum(td + 1.7 * gap), rtol=1e-4)
    expected = {
        "critic_loss": loss, "td_loss": td.sum(), "gap": gap.mean(),
        "q_data": q[:, :real].mean(), "q_model": q[:, real:].mean(),
    }  # fmt: skip
    assert info.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(info[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("rho", ["mixture", "model"])
def test_the_penalty_pushes_down_sampled_actions_and_up_the_datas(rho):
    """Its gradient by each Q-value: a table is added to the networks' values."""
    cfg = config(rho=rho, real_fraction=0.75)
    state, batch, beta = fresh(cfg), mixed_batch(), 1.7
    states = 4 if rho == "model" else 16
    network = state.critic.apply_fn

    def tabular(params, obs, action):
        q = network(params["net"], obs, action)
        return q + params["pair" if action.ndim == 2 else "other"]

    state = state.replace(
        critic=state.critic.replace(apply_fn=tabular),
        target={"net": state.target, "other": jnp.zeros((2, 1, 16))},
    )
    table = {
        "net": state.critic.params,
        "pair": jnp.zeros((2, 16)),
        "other": jnp.zeros(
            (2, 30, states)
        ),  # per critic 30 actions at each state, or no shape fits
    }

    def gradient(beta):
        loss = partial(combo.critic_loss, cfg=config(rho=rho, real_fraction=0.75, beta=beta))
        grads, _ = jax.grad(loss, has_aux=True)(table, state, batch, jax.random.key(0))
        return double(grads)

    with_, without = gradient(beta), gradient(0.0)
    pair, other = with_["pair"] - without["pair"], with_["other"]
    np.testing.assert_allclose(pair[:, :12], -beta / 12, rtol=1e-4)  # descent raises the data's Q
    np.testing.assert_allclose(pair[:, 12:], 0, atol=1e-5)  # and not that of the model's actions
    assert (other > 0).all()  # descent lowers each of these
    np.testing.assert_allclose(other.sum(1), beta / states, rtol=1e-4)  # for each critic, at each s
    assert not without["other"].any()
    assert np.abs(without["pair"][:, 12:]).min() > 0  # the model's rows are in the TD error


# --- One update ---


def test_an_update_moves_the_learners_once_and_nothing_else():
    cfg = config(num_updates=100)
    old, batch = fresh(cfg), mixed_batch()
    new, info = jax.jit(partial(combo.update, cfg=cfg))(old, batch, jax.random.key(0))
    for name in ("dynamics", "ring", "obs_mean", "obs_std"):
        assert all(same(getattr(new, name), getattr(old, name))), name
    for name, lr in (
        ("actor", cfg.actor_lr),
        ("critic", cfg.critic_lr),
        ("temperature", cfg.actor_lr),
    ):
        before, after = getattr(old, name), getattr(new, name)
        assert after.step == before.step + 1
        steps = jax.tree.map(lambda x, y: np.abs(x - y).max(), after.params, before.params)
        np.testing.assert_allclose(max(jax.tree.leaves(steps)), lr, rtol=0.02)  # Adam's first step
        assert not any(same(after.params, before.params)), name

    target = jax.tree.map(
        lambda new, old: cfg.polyak * new + (1 - cfg.polyak) * old,
        double(new.critic.params), double(old.target),
    )  # fmt: skip
    moved = jax.tree.map(lambda x, y: x - y, double(new.target), double(old.target))
    for x, y, z in zip(*map(jax.tree.leaves, (new.target, target, moved)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
        assert np.abs(z).max() > 1e-5
    warmer = new.temperature.params["params"]["log"] > old.temperature.params["params"]["log"]
    assert warmer == (info["entropy"] < -1)  # its target is minus the number of action dimensions
    assert finite(info)


def test_the_policys_rate_ends_at_zero_the_others_do_not():
    cfg = config(num_updates=5)
    step, state = jax.jit(partial(combo.update, cfg=cfg)), fresh(cfg)
    for i in range(5):
        state, _ = step(state, mixed_batch(i), jax.random.key(i))
    late, _ = step(state, mixed_batch(9), jax.random.key(9))
    assert all(same(late.actor.params, state.actor.params))
    assert not any(same(late.critic.params, state.critic.params))
    assert not any(same(late.temperature.params, state.temperature.params))


# --- The whole ---


def trained(seeds, cfg, data):
    """As main does it: init, the model, one chunk."""
    keys = jax.vmap(jax.random.key)(jnp.array(seeds))
    fold = jax.vmap(jax.random.fold_in, (0, None))
    state = jax.jit(jax.vmap(partial(combo.init, cfg=cfg), (0, None)))(fold(keys, 0), data)
    dynamics, _ = fitted(seeds, cfg, data)
    run = jax.jit(jax.vmap(partial(combo.train_chunk, cfg=cfg, terminal=combo.never), (0, None, 0)))
    return run(state.replace(dynamics=dynamics), data, fold(keys, 60))


def test_a_seed_among_others_is_that_seed_alone_and_a_rerun_is_bit_equal():
    cfg, data = config(eval_every=60, rollout_every=20, max_epochs=3), world_data()
    both, alone, again = (trained(seeds, cfg, data) for seeds in ([3, 4], [4], [3, 4]))
    assert all(same(both, again))
    for x, y in zip(jax.tree.leaves(both), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(x[1], y[0], rtol=1e-5, atol=1e-5)
    one, two = member(both[0], 0), member(both[0], 1)
    for name in ("actor", "critic"):
        assert not any(same(getattr(one, name).params, getattr(two, name).params)[-2:])
    assert not any(same(one.dynamics.params, two.dynamics.params))
    assert not any(same(one.ring.rows[:4], two.ring.rows[:4]))


def test_the_penalty_lowers_the_values_of_the_models_states(world):
    data, key = world_data(80), jax.random.key(5)
    found = {}
    for beta in (0.0, 5.0):
        cfg = config(beta=beta, eval_every=400, rollout_every=100, critic_lr=1e-3)
        state, metrics = chunk(fresh(cfg).replace(dynamics=world), data, cfg)
        rows = jax.tree.map(lambda x, n=state.ring.filled: x[:n], state.ring.rows)
        actions = jax.random.uniform(key, (10, len(rows.reward), 1), minval=-1, maxval=1)
        obs = jnp.broadcast_to(rows.obs, (10, *rows.obs.shape))
        q_any = state.critic.apply_fn(state.critic.params, obs, actions).mean()
        q_own = state.critic.apply_fn(state.critic.params, rows.obs, rows.action).mean()
        q_data = state.critic.apply_fn(state.critic.params, data.obs, data.action).mean()
        found[beta] = np.array([q_any, q_own, q_data])
        assert finite(metrics)
    lower = found[5.0] - found[0.0]
    assert (lower[:2] < -0.1).all(), found
    assert lower[2] > lower[0], found  # the data's actions are held up against it
