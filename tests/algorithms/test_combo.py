"""COMBO in float64 numpy, its model on a linear system, its rollouts, buffer and minibatches."""

import collections
import dataclasses
from functools import lru_cache, partial

import combo
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.datasets import Batch

# The world: s' = s A + a B, r = s . C; with the actions in [-1, 1] it stays within about 3.
A = np.array([[0.9, 0.3], [-0.3, 0.8]])
B = np.array([[0.1, 0.5]])
C = np.array([1.0, -0.5])
NEVER, AT_ONCE = np.inf, -np.inf


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
        num_updates=1000, log_every=20, batch_size=16, critic_lr=3e-3, widths=(8, 8),
        beta=1.0, rollout_every=10, horizon=2,
        rollout_batch=20, retain=2, model_widths=(16, 16), model_decay=(2.5e-5, 5e-5, 1e-4),
        num_members=3, num_elites=2, num_actions=10,
    )  # fmt: skip
    return combo.Config(**small | values)


@lru_cache
def compiled(name, cfg):
    return jax.jit(partial(getattr(combo, name), cfg=cfg))


def ends(life, obs, next_obs):
    """A terminal function by table: the second entry of s' reaches life[first entry of s]."""
    name = obs[:, 0].astype(int).clip(0, len(life) - 1)
    return next_obs[:, 1] >= life[name]


@lru_cache
def compiled_rollout(cfg):
    def roll(state, data, key, life):
        return combo.rollout(state, data, key, cfg, lambda s, a, s2: ends(life, s, s2))

    return jax.jit(roll)


@lru_cache
def compiled_chunk(cfg):
    def chunk(state, data, key, beta, life):
        own = dataclasses.replace(cfg, beta=beta)
        return combo.train_chunk(
            state, data, key, cfg.log_every, own, lambda s, a, s2: ends(life, s, s2)
        )

    return jax.jit(chunk)


@lru_cache
def fresh():
    """A State on the world's data, every parameter moved off its start, target unlike critic."""
    state = compiled("init", config())(jax.random.key(0), world_data())
    rng = np.random.default_rng(0)

    def move(params):
        noise = partial(rng.normal, 0, 0.1)
        return jax.tree.map(lambda x: np.asarray(x) + np.float32(noise(x.shape)), params)

    learners = {
        name: getattr(state, name).replace(params=move(getattr(state, name).params))
        for name in ("actor", "critic", "temperature")
    }
    dynamics = state.dynamics.replace(params=move(state.dynamics.params))
    state = state.replace(**learners, target=move(state.target), dynamics=dynamics)
    return jax.tree.map(jnp.asarray, state)


def fresh_fit():
    return compiled("init_fit", config())(jax.random.key(0), world_data())


def epoch(fit, data=None, seed=1):
    data = world_data() if data is None else data
    return compiled("fit_epoch", config())(fit, data, jax.random.key(seed))


def fitted(seeds, cfg, data):
    """(elites with the seeds on axis 0, number of epochs)."""
    lines = []
    keys = jax.vmap(jax.random.key)(jnp.array(seeds))
    dynamics = combo.fit_dynamics(keys, data, cfg, lines.append)
    assert [f"epoch {i + 1}:" in line for i, line in enumerate(lines)] == [True] * len(lines)
    return dynamics, len(lines)


def member(tree, i):
    return jax.tree.map(lambda x: np.asarray(x)[i], tree)


def same(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return [np.array_equal(x, y) for x, y in pairs]


def finite(tree):
    return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


# --- The same networks in float64 numpy ---


def double(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def net(layers, x, activation):
    count = sum(name.startswith("Dense") for name in layers)
    for i in range(count):
        x = x @ layers[f"Dense_{i}"]["kernel"].T + layers[f"Dense_{i}"]["bias"]
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
    bias = np.float32([*head["bias"][:3], 4.0, -14.0, -1.0])
    return {"params": {**params["params"], "Dense_2": {**head, "bias": bias}}}


@pytest.mark.parametrize("bounds", ["near", "far"])
def test_model_loss_is_the_equation(bounds):
    cfg, fit = config(model_decay=(0.03, 0.02, 0.05)), fresh_fit()
    params = member(fresh().dynamics.params, 0)  # biases and bounds off their start
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
    assert min(abs(nll), decay, pull) > 0.03  # each of the three is seen
    loss = combo.model_loss(params, fit, inputs, targets, cfg)
    np.testing.assert_allclose(loss, nll + decay + pull, rtol=1e-5)


def test_the_bounds_of_the_variance_are_pulled_together_and_each_members_own():
    cfg, fit = config(), fresh_fit()
    assert fit.dynamics.params["params"]["upper"].shape == (cfg.num_members, 3)
    p = dict(member(fit.dynamics.params, 0)["params"])
    mean_only = {
        "kernel": p["Dense_2"]["kernel"] * (np.arange(6) < 3)[:, None],
        "bias": p["Dense_2"]["bias"],
    }
    p |= {
        "Dense_2": mean_only,
        "upper": jnp.full(3, 20.0),
        "lower": jnp.full(3, -20.0),
    }  # both far off
    pairs = combo.model_pairs(world_data(), jnp.arange(50))
    gradient = jax.jit(jax.grad(partial(combo.model_loss, cfg=cfg)))
    grads = gradient({"params": p}, fit, *pairs)["params"]
    np.testing.assert_allclose(grads["upper"], 0.01, rtol=1e-3)  # descent lowers it
    np.testing.assert_allclose(grads["lower"], -0.01, rtol=1e-3)  # and raises this one


def test_the_pairs_stay_within_their_row():
    data, rows = world_data(), np.array([39, 0, 19, 20, 399])  # 19, 39 and 399 end an episode
    inputs, targets = combo.model_pairs(data, rows)
    obs, action, reward, next_obs, _ = (np.asarray(x)[rows] for x in data)
    np.testing.assert_array_equal(inputs, np.concatenate([obs, action], 1))
    np.testing.assert_array_equal(targets, np.concatenate([next_obs - obs, reward[:, None]], 1))
    truth, _ = world_step(obs, action)
    np.testing.assert_allclose(obs + targets[:, :2], truth, atol=1e-5)


def test_the_holdout_is_in_nobodys_rows():
    cfg, data, fit = config(), world_data(), fresh_fit()
    rows, holdout = np.arange(400), np.asarray(fit.holdout)
    train = np.setdiff1d(rows, holdout)
    assert len(holdout) == len(np.unique(holdout)) == 80
    assert fit.bootstrap.shape == (cfg.num_members, 320)
    assert np.isin(fit.bootstrap, train).all()
    seen = [np.unique(x) for x in np.asarray(fit.bootstrap)]
    for one in seen:  # drawn with replacement: 1 - 1/e of the rows
        assert 0.55 < len(one) / len(train) < 0.71
    for one, two in ((0, 1), (1, 2), (0, 2)):  # and by each member for itself: (1 - 1/e)^2
        assert len(np.intersect1d(seen[one], seen[two])) < 0.48 * len(train)
    inputs, _ = combo.model_pairs(double(data), train)
    np.testing.assert_allclose(fit.dynamics.mean, inputs.mean(0), atol=1e-5)
    np.testing.assert_allclose(fit.dynamics.std, inputs.std(0), atol=1e-5)
    many = jax.tree.map(lambda x: jax.ShapeDtypeStruct((6000, *x.shape[1:]), x.dtype), data)
    shapes = jax.eval_shape(partial(combo.init_fit, cfg=cfg), jax.random.key(0), many)
    assert shapes.holdout.shape == (1000,)
    assert shapes.bootstrap.shape == (cfg.num_members, 5000)


def test_a_member_learns_from_its_own_rows_alone():
    cfg, data = config(), world_data()
    fit = fresh_fit()
    mine, other = np.asarray(fit.bootstrap[0]), np.asarray(fit.bootstrap[1])

    def trained(row):
        poisoned = data._replace(reward=data.reward.at[row].set(jnp.nan))
        after, _ = epoch(fit, poisoned)
        return [finite(member(after.model.params, i)) for i in range(cfg.num_members)], after

    good, after = trained(fit.holdout)
    assert good == [True] * cfg.num_members
    assert same(after.dynamics, fit.dynamics).count(False) == 0  # an error of nan is no gain
    good, _ = trained(np.setdiff1d(mine, other)[0])
    assert good[:2] == [False, True]


def test_a_member_keeps_its_best_after_a_gain_of_one_percent():
    cfg = config()
    fit = fresh_fit().replace(stale=jnp.array(cfg.patience - 1))
    first, info = epoch(fit)
    error = np.asarray(info["holdout_error"])
    inputs, targets = (double(x) for x in combo.model_pairs(world_data(), fit.holdout))
    x = (inputs - double(fit.dynamics.mean)) / double(fit.dynamics.std)
    for i in range(cfg.num_members):  # against nothing, each first epoch is a gain
        mean, _ = gaussian(member(first.model.params, i), x)
        np.testing.assert_allclose(error[i], np.mean((mean - targets) ** 2), rtol=1e-4)
        assert all(same(member(first.dynamics.params, i), member(first.model.params, i)))
    assert first.stale == 0

    old = error * np.array([1.005, 1.02, 0.9])  # gains of 0.5 % and 2 %, and a loss
    second, _ = epoch(fit.replace(error=jnp.array(old)))
    kept = [all(same(member(second.dynamics.params, i), member(fit.dynamics.params, i)))
            for i in range(3)]  # fmt: skip
    assert kept == [True, False, True]
    np.testing.assert_allclose(second.error, [old[0], error[1], old[2]], rtol=1e-6)
    assert second.stale == 0  # one gain is enough

    third, _ = epoch(fit.replace(error=jnp.array(error)))
    assert third.stale == cfg.patience

    for old in (jnp.inf, 1.0):  # frozen: whatever comes now is not kept, and no gain wakes it
        late = fit.replace(stale=jnp.array(cfg.patience), error=jnp.full(3, old, jnp.float32))
        after, _ = epoch(late)
        assert all(same(after.dynamics, late.dynamics))
        assert all(same(after.error, late.error))
        assert after.stale > cfg.patience


@pytest.mark.parametrize("max_epochs", [1000, 5])
def test_training_ends_when_no_seed_gains_any_more(monkeypatch, max_epochs):
    """Scripted: a seed gains in its first epochs, as many as `holdout` says, then never again."""

    def init_fit(key, data, cfg):
        gains, zero = jax.random.randint(key, (), 1, 10), jnp.zeros((), int)
        dynamics = combo.Dynamics({"gains": jnp.full(3, gains)}, jnp.zeros(1), jnp.zeros(1))
        return combo.Fit(None, dynamics, jnp.arange(3.0), zero, jnp.zeros((), int), gains)

    def fit_epoch(fit, data, key, cfg):
        age = fit.bootstrap + 1
        stale = jnp.where(age <= fit.holdout, 0, fit.stale + 1)
        return fit.replace(bootstrap=age, stale=stale), {"holdout_error": jnp.zeros(3)}

    monkeypatch.setattr(combo, "init_fit", init_fit)
    monkeypatch.setattr(combo, "fit_epoch", fit_epoch)
    cfg = config(patience=3, max_epochs=max_epochs)
    dynamics, epochs = fitted(range(5), cfg, world_data())
    assert all(same(dynamics, fitted(range(5), cfg, world_data())[0]))
    gains = dynamics.params["gains"]
    assert gains.shape == (5, 2)
    assert len(set(gains[:, 0].tolist())) > 1  # or this test shows nothing
    assert epochs == min(gains.max() + 3, max_epochs)


def test_the_elites_are_the_best_as_they_were_at_their_best():
    fit, _ = epoch(fresh_fit())
    fit, _ = epoch(fit.replace(error=jnp.zeros(3)), seed=2)  # nothing is kept
    assert not any(same(fit.model.params, fit.dynamics.params))
    for error, best in (([3.0, jnp.inf, 0.2], [2, 0]), ([0.3, 0.2, 0.1], [2, 1])):
        elites = jax.jit(combo.elites, static_argnums=1)(fit.replace(error=jnp.array(error)), 2)
        for i, j in enumerate(best):
            assert all(same(member(elites.params, i), member(fit.dynamics.params, j)))
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
    cfg = config(batch_size=32, model_lr=3e-3, max_epochs=20)
    dynamics, _ = fitted([0], cfg, world_data(80))
    return member(dynamics, 0)


def test_each_row_is_served_by_one_elite_and_each_elite_serves_as_many():
    dynamics = silent(fresh().dynamics)
    obs, action = world_data().obs[:12], world_data().action[:12]
    next_obs, reward = compiled("model_step", config())(dynamics, obs, action, jax.random.key(0))
    x = np.concatenate([obs, action], 1)
    x = (double(x) - double(dynamics.mean)) / double(dynamics.std)
    means = np.stack([gaussian(member(dynamics.params, e), x)[0] for e in range(2)])  # (2, 12, 3)
    step = np.concatenate([next_obs - obs, reward[:, None]], 1)
    served = np.isclose(means, step, atol=1e-4).all(-1)
    assert served.sum(0).tolist() == [1] * 12
    assert served.sum(1).tolist() == [6] * 2


def test_the_noise_has_the_models_std():
    std = jnp.array([0.1, 0.5, 2.0])
    dynamics = constant(fresh().dynamics, jnp.zeros((2, 3)), std)
    obs, action = jnp.ones((6000, 2)), jnp.zeros((6000, 1))
    steps = []
    for seed in range(2):
        next_obs, reward = compiled("model_step", config())(
            dynamics, obs, action, jax.random.key(seed)
        )
        steps.append(np.concatenate([next_obs - obs, reward[:, None]], 1))
        np.testing.assert_allclose(steps[-1].std(0), std, rtol=0.05)
        assert np.abs(steps[-1].mean(0) / std).max() < 0.05
    halves = np.concatenate([steps[0].reshape(2, -1, 3), steps[1].reshape(2, -1, 3)])  # by elites
    noise = (halves / std).transpose(0, 2, 1).reshape(12, -1)
    assert np.abs(np.corrcoef(noise) - np.eye(12)).max() < 0.1  # none is another's


def test_the_model_learns_the_world(world):
    data = world_data(80, seed=1)  # other episodes
    step = compiled("model_step", config())
    next_obs, reward = step(silent(world), data.obs, data.action, jax.random.key(0))
    truth, gain = world_step(double(data.obs), double(data.action))
    assert np.sqrt(np.mean((next_obs - truth) ** 2)) < 0.05 * np.std(truth - data.obs)
    assert np.sqrt(np.mean((reward - gain) ** 2)) < 0.05 * np.std(gain)


# --- Rollouts ---


ROLL = config(rollout_batch=100, horizon=3)


def counting():
    """A model that counts: s = (id, step), s' = (id, step + 1), r = 1 + the number of the elite."""
    ids, zeros = jnp.arange(1.0, 401), jnp.zeros(400)
    pairs = jnp.stack([ids, zeros], 1)
    reward, far = jnp.linspace(-9, -1, 400), jnp.full((400, 2), 3.0)  # a range: to 7, to (799, 6)
    data = Batch(pairs, zeros[:, None], reward, far, zeros)
    values = jnp.array([[0.0, 1.0, 1.0], [0.0, 1.0, 2.0]])
    return fresh().replace(dynamics=constant(fresh().dynamics, values)), data


def rolled(state, data, life, seed=0):
    """The rows that were kept, and how many were made."""
    life = jnp.broadcast_to(jnp.float32(life), 401)
    rows, keep = compiled_rollout(ROLL)(state, data, jax.random.key(seed), life)
    return Batch(*(np.asarray(x)[np.asarray(keep)] for x in rows)), len(keep)


def test_a_rollout_that_ends_at_once_keeps_its_first_rows_as_ends():
    rows, made = rolled(*counting(), AT_ONCE)
    assert (made, len(rows.reward)) == (300, 100)
    assert rows.done.tolist() == [1.0] * 100
    assert rows.obs[:, 1].tolist() == [0.0] * 100
    names = rows.obs[:, 0]  # 100 draws among 1 to 400
    assert np.isin(names, np.arange(1, 401)).all()
    assert len(np.unique(names)) > 75
    assert names.min() < 30
    assert names.max() > 370


def test_a_rollout_that_never_ends_keeps_every_row():
    rows, made = rolled(*counting(), NEVER)
    assert made == len(rows.reward) == 300
    assert not rows.done.any()
    assert collections.Counter(rows.obs[:, 1]) == {0: 100, 1: 100, 2: 100}


def test_nothing_comes_after_an_end_and_the_end_itself_is_kept():
    """An id's rollouts last 1 to 3 steps, or longer than the horizon."""
    rows, _ = rolled(*counting(), np.arange(401) % 4 + 1)
    seen = collections.defaultdict(list)
    for (name, step), next_obs, done in zip(rows.obs, rows.next_obs, rows.done, strict=True):
        assert next_obs.tolist() == [name, step + 1]
        seen[name].append((step, done))
    assert len(seen) > 75
    for name, steps in seen.items():
        length = name % 4 + 1
        starts = sum(step == 0 for step, _ in steps)
        path = [(step, float(step + 1 == length)) for step in range(int(min(length, 3)))]
        assert collections.Counter(steps) == dict.fromkeys(path, starts), name


def test_each_step_begins_where_one_ended_and_draws_its_elite_anew():
    rows, _ = rolled(*counting(), NEVER)
    elite = collections.defaultdict(dict)  # id -> step -> elite
    for (name, step), reward in zip(rows.obs, rows.reward, strict=True):
        elite[name][step] = reward
    names = [n for n, c in collections.Counter(rows.obs[:, 0]).items() if c == 3]  # started once
    table = np.array([[elite[n][step] for step in range(3)] for n in names])
    assert len(table) > 50
    assert set(table.ravel()) == {1.0, 2.0}
    for one, two in ((0, 1), (1, 2), (0, 2)):  # half by chance, all or none otherwise
        assert 0.25 < np.mean(table[:, one] == table[:, two]) < 0.75
    for step in range(3):
        served = collections.Counter(rows.reward[rows.obs[:, 1] == step])
        assert served == {1.0: 50, 2.0: 50}


def test_a_rollout_in_the_world_follows_it(world):
    """Rows of noise-free rollouts, joined by their states, against the world from the start on."""
    data = world_data()
    rows, _ = rolled(fresh().replace(dynamics=silent(world)), data, NEVER)
    starts = {tuple(obs) for obs in np.asarray(data.obs)}
    after = {tuple(obs): i for i, obs in enumerate(rows.obs)}
    assert sum(tuple(obs) in starts for obs in rows.obs) == 100
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
    state, data = counting()
    state = state.replace(obs_mean=jnp.array([200.0, 1.0]), obs_std=jnp.array([100.0, 0.5]))
    p = state.actor.params["params"]
    calm = {"log_std_scale": jnp.zeros(()), "log_std_shift": jnp.array(-20.0)}
    state = state.replace(actor=state.actor.replace(params={"params": {**p, **calm}}))
    rows, _ = rolled(state, data, NEVER)
    obs = (double(rows.obs) - [200.0, 1.0]) / [100.0, 0.5]
    mean, _ = policy(state.actor.params, obs)
    assert np.std(np.tanh(mean)) > 0.01
    np.testing.assert_allclose(rows.action, np.tanh(mean), atol=1e-5)


def test_a_column_that_carries_nothing_changes_nothing():
    """Constants of any size, and what rounding makes of them: no input, no step, no end."""
    data, extra = world_data(), jnp.float32([0.0, 9.81, 1e6])
    noise = 1e-6 * np.random.default_rng(1).normal(size=(len(data.reward), 1))
    still = jnp.concatenate([jnp.tile(extra, (len(noise), 1)), jnp.float32(9.81 + noise)], 1)
    wide = data._replace(
        obs=jnp.concatenate([data.obs, still], 1),
        next_obs=jnp.concatenate([data.next_obs, still], 1),
        action=jnp.concatenate([data.action, jnp.full_like(data.action, 0.3)], 1),
    )
    state = compiled("init", config())(jax.random.key(0), wide)
    assert np.isinf(state.dynamics.std).tolist() == [False] * 2 + [True] * 4 + [False, True]
    assert not (
        np.asarray((wide.obs - state.dynamics.mean[:6]) / state.dynamics.std[:6])[:, 2:]
    ).any()
    cfg = config(rollout_batch=100, horizon=20)
    rows, keep = combo.rollout(
        state, wide, jax.random.key(0), cfg, lambda s, a, s2: combo.never(s, a, s2)
    )
    obs, next_obs = (
        np.asarray(rows.obs)[np.asarray(keep)],
        np.asarray(rows.next_obs)[np.asarray(keep)],
    )
    assert (obs[:, 2:] == next_obs[:, 2:]).all()
    assert (obs[:, 2:5] == extra).all()
    assert (obs[:, :2] != next_obs[:, :2]).any()


@pytest.mark.parametrize("far", [0.9, 1.1, jnp.nan])
def test_a_rollout_stops_where_no_data_come_near(far):
    """At a state farther beyond the data's range than that is wide; its row is not kept."""
    state, data = counting()
    data = data._replace(next_obs=data.obs.at[:, 1].set(1.0))  # from 0 to 1
    step = jnp.array([[0.0, 1 + far, 50.0], [0.0, 1 + far, 50.0]])
    state = state.replace(dynamics=constant(fresh().dynamics, step))
    rows, _ = rolled(state, data, NEVER)
    near = far < 1
    assert collections.Counter(rows.obs[:, 1].tolist()) == ({0.0: 100} if near else {})
    if near:  # the reward is at most as far from those of the data, which go from -9 to -1
        assert set(rows.reward.tolist()) == {7.0}


# --- The replay buffer ---


def test_the_replay_buffer_is_first_in_first_out():
    capacity, size, rng = 7, 5, np.random.default_rng(0)
    buffer = combo.ReplayBuffer(
        Batch(jnp.zeros((7, 2)), jnp.zeros((7, 1)), jnp.zeros(7), jnp.zeros((7, 2)), jnp.zeros(7)),
        jnp.zeros((), int),
    )
    add, held = jax.jit(combo.add), collections.deque(maxlen=capacity)
    assert buffer.filled == 0
    for i in range(60):
        ids = jnp.arange(1.0 + i * size, 1.0 + (i + 1) * size)
        keep = rng.random(size) < rng.choice([0.0, 0.3, 0.7, 1.0])
        batch = Batch(
            jnp.stack([ids, ids + 0.1], 1), ids[:, None], ids, jnp.stack([ids, -ids], 1), ids
        )
        buffer = add(buffer, batch, jnp.array(keep))
        held.extend(np.asarray(ids)[keep].tolist())
        assert buffer.filled == len(held)
        rows = Batch(*(np.asarray(x)[: len(held)] for x in buffer.rows))  # those that are sampled
        assert sorted(rows.reward.tolist()) == list(held)
        np.testing.assert_array_equal(rows.next_obs, np.stack([rows.reward, -rows.reward], 1))
        np.testing.assert_allclose(
            rows.obs - rows.reward[:, None], [[0.0, 0.1]] * len(held), atol=1e-4
        )
        np.testing.assert_array_equal(rows.action[:, 0], rows.done)
        if i == 2:
            assert 0 < len(held) < capacity or buffer.total > capacity


CHUNK = config(retain=3, horizon=3)


def chunk(state, data, beta=1.0, life=NEVER, seed=0):
    """20 updates, 2 rollouts of 20 rows a step; the buffer has room for 3."""
    rows = jax.tree.map(lambda x: jnp.full((180, *x.shape[1:]), jnp.nan), data)
    if len(state.buffer.rows.reward) != 180:  # what was never filled is poison
        state = state.replace(buffer=combo.ReplayBuffer(rows, jnp.zeros((), int)))
    life = jnp.broadcast_to(jnp.float32(life), 401)
    return compiled_chunk(CHUNK)(state, data, jax.random.key(seed), jnp.float32(beta), life)


@pytest.mark.parametrize(("life", "rows"), [(AT_ONCE, 40), (NEVER, 120)])
def test_a_chunk_makes_its_updates_and_rollouts_and_samples_filled_rows_alone(life, rows):
    state, metrics = chunk(fresh(), world_data(), life=life)
    assert state.critic.step == state.actor.step == state.temperature.step == 20
    assert state.buffer.filled == state.buffer.total == rows
    assert np.isnan(state.buffer.rows.reward[rows:]).all()
    assert finite(metrics)
    assert all(x.shape == () for x in metrics.values())
    assert finite((state.actor.params, state.critic.params, state.target))


def test_a_minibatch_holds_the_datas_rows_then_the_models(monkeypatch):
    """Rewards are negative in the data, 1 or 2 in the model; obs[0] is 1 to 400."""
    cfg = config(real_fraction=0.75)
    state, data = counting()
    state = state.replace(obs_mean=jnp.array([128.0, 1.0]), obs_std=jnp.array([64.0, 0.5]))

    def update(state, batch, key, cfg):
        assert batch.obs.shape == batch.next_obs.shape == (16, 2)
        names = batch.obs[:, 0] * 64 + 128
        info = {
            "real": jnp.sum(batch.reward < 0),
            "first": jnp.all(batch.reward[:12] < 0),
            "model": jnp.all(batch.reward[12:] > 0),
            "whole": jnp.all((names == jnp.round(names)) & (names >= 1) & (names <= 400)),
            "step": jnp.max(
                batch.next_obs[12:, 1]
            ),  # (1 - 1) / 0.5 or, a step later, (2 - 1) / 0.5
            "names": names.std(),
        }
        temperature = state.temperature.replace(step=state.temperature.step + 1)
        return state.replace(temperature=temperature), info

    monkeypatch.setattr(combo, "update", update)
    run = jax.jit(partial(combo.train_chunk, cfg=cfg, terminal=combo.never))
    state, info = run(state, data, jax.random.key(0), cfg.log_every)
    assert state.temperature.step == cfg.log_every
    assert info["real"] == 12
    assert (info["first"], info["model"], info["whole"]) == (1, 1, 1)
    assert 1 < info["step"] <= 2
    assert info["names"] > 80  # from all over the data: 115 if uniform


# --- The critics' loss ---


def heard(loss, *args):
    """The loss, and the actions drawn in it: from which means, by which call."""
    sampled, proposed, uniforms = [], [], []
    draw = jax.random.uniform

    class TanhNormal(combo.TanhNormal):
        def sample(self, **kwargs):
            action = super().sample(**kwargs)
            sampled.append((self.distribution.mean(), action))
            return action

        def sample_and_log_prob(self, **kwargs):
            action, log_prob = super().sample_and_log_prob(**kwargs)
            proposed.append((self.distribution.mean(), action))
            return action, log_prob

    def uniform(*args, **kwargs):
        if kwargs["maxval"] != 1:  # a layer's bound: flax looks at the shape of its weights
            return draw(*args, **kwargs)
        uniforms.append(draw(*args, **kwargs))
        return uniforms[-1]

    def run(*args):
        return loss(*args), sampled, proposed, uniforms

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(combo, "TanhNormal", TanhNormal)
        patch.setattr(jax.random, "uniform", uniform)
        return double(jax.jit(run)(*args))


def drawn(pairs, mean):
    """The one action drawn from a policy with these means."""
    (action,) = [action for found, action in pairs if np.allclose(found, mean, atol=1e-4)]
    return action


def mixed_batch(seed=0, size=16):
    rng = np.random.default_rng(seed)
    draw = (rng.normal(size=(size, 2)), rng.uniform(-0.9, 0.9, (size, 1)), rng.normal(size=size),
            rng.normal(size=(size, 2)), rng.random(size) < 0.3)  # fmt: skip
    return Batch(*(jnp.array(x, jnp.float32) for x in draw))


@pytest.mark.parametrize(
    ("rho", "fraction", "max_backup"), [("mixture", 0.5, False), ("model", 0.75, True)]
)
def test_critic_loss_is_the_equation(rho, fraction, max_backup):
    cfg = config(rho=rho, real_fraction=fraction, max_backup=max_backup, beta=1.7, gamma=0.9)
    state, batch = fresh(), mixed_batch()
    hot = jax.tree.map(lambda x: x + 5, state.temperature.params)  # an entropy would be seen
    state = state.replace(temperature=state.temperature.replace(params=hot))
    params, real = state.critic.params, int(16 * fraction)
    loss = partial(combo.critic_loss, cfg=cfg)
    (loss, info), sampled, proposed, uniforms = heard(loss, params, state, batch, jax.random.key(0))

    obs, action, reward, next_obs, done = double(batch)
    assert 0 < done.sum() < 16
    pi = state.actor.params
    next_action = drawn(sampled, policy(pi, next_obs)[0])
    assert next_action.shape == (10 if max_backup else 1, 16, 1)
    next_q = critics(state.target, next_obs, next_action).min(0).max(0)
    target = reward + 0.9 * (1 - done) * next_q
    q = critics(params, obs, action)
    td = np.mean((q - target) ** 2, 1)

    part = slice(real if rho == "model" else 0, None)
    (uniform,) = uniforms
    here = drawn(proposed, policy(pi, obs[part])[0])
    there = drawn(proposed, policy(pi, next_obs[part])[0])
    others = np.concatenate([uniform, here, there])  # (30, B, 1)
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
        "critic_loss": np.sum(td + 1.7 * gap), "td_loss": td.sum(), "gap": gap.mean(),
        "q_data": q[:, :real].mean(), "q_model": q[:, real:].mean(),
    }  # fmt: skip
    assert info.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(info[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("rho", ["mixture", "model"])
def test_the_penalty_pushes_down_sampled_actions_and_up_the_datas(rho):
    """Its gradient by each Q-value: a table is added to the networks' values."""
    state, batch, beta = fresh(), mixed_batch(), 1.7
    states = 4 if rho == "model" else 16
    network = state.critic.apply_fn

    def tabular(params, obs, action):
        q = network(params["net"], obs, action)
        return q + params["pair" if action.ndim == 2 else "other"]

    state = state.replace(
        critic=state.critic.replace(apply_fn=tabular),
        target={"net": state.target, "other": jnp.zeros((2, 1, 16))},
    )
    table = {  # per critic 30 actions at each state, or the shapes do not fit
        "net": state.critic.params,
        "pair": jnp.zeros((2, 16)),
        "other": jnp.zeros((2, 30, states)),
    }

    @jax.jit
    def gradient(beta):
        loss = partial(combo.critic_loss, cfg=config(rho=rho, real_fraction=0.75, beta=beta))
        return jax.grad(loss, has_aux=True)(table, state, batch, jax.random.key(0))[0]

    with_, without = double(gradient(beta)), double(gradient(0.0))
    pair, other = with_["pair"] - without["pair"], with_["other"]
    np.testing.assert_allclose(pair[:, :12], -beta / 12, rtol=1e-4)  # descent raises the data's Q
    np.testing.assert_allclose(pair[:, 12:], 0, atol=1e-5)  # and not that of the model's actions
    assert (other > 0).all()  # descent lowers each of these
    np.testing.assert_allclose(other.sum(1), beta / states, rtol=1e-4)  # for each critic, at each s
    assert not without["other"].any()
    assert np.abs(without["pair"][:, 12:]).min() > 0  # the model's rows are in the TD error


# --- One update ---


def test_an_update_moves_the_learners_once_and_nothing_else():
    cfg = config()
    old, batch = fresh(), mixed_batch()
    new, info = compiled("update", cfg)(old, batch, jax.random.key(0))
    for name in ("dynamics", "buffer", "obs_mean", "obs_std"):
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
    state = fresh()
    late = optax.tree_utils.tree_set(state.actor.opt_state, count=jnp.array(1000, jnp.int32))
    state = state.replace(actor=state.actor.replace(opt_state=late))
    new, _ = compiled("update", config())(state, mixed_batch(), jax.random.key(0))
    assert all(same(new.actor.params, state.actor.params))
    assert not any(same(new.critic.params, state.critic.params))
    assert not any(same(new.temperature.params, state.temperature.params))


# --- The whole ---


def test_the_penalty_lowers_the_values_of_the_models_states(world):
    """The data holds actions around 0.6 alone; the model is asked about all of them."""
    data, key, found = world_data(), jax.random.key(5), {}
    action = 0.6 + 0.1 * data.action
    next_obs, reward = (jnp.float32(x) for x in world_step(double(data.obs), double(action)))
    data = data._replace(action=action, next_obs=next_obs, reward=reward)
    for beta in (0.0, 5.0):
        state = fresh().replace(dynamics=world)
        for i in range(20):
            state, metrics = chunk(state, data, beta=beta, seed=i)
        assert finite(metrics)
        rows = state.buffer.rows
        actions = jax.random.uniform(key, (10, len(rows.reward), 1), minval=-1, maxval=1)
        pairs = (rows.obs, actions), (rows.obs, rows.action), (data.obs, data.action)
        found[beta] = np.array([critics(state.critic.params, *double(p)).mean() for p in pairs])
    lower = found[5.0] - found[0.0]
    assert (lower[:2] < -0.1).all(), found
    assert lower[2] > lower[0], found  # the data's actions are held up against it
