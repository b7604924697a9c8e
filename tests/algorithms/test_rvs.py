"""RvS: what a row led to, likelihood and step in float64, what is asked for, tiny worlds."""

from dataclasses import replace
from functools import partial

import chex
import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rvs
from float64 import assert_first_adam_step, f64, gradient, mlp, random_batch, scramble

from common import datasets, evaluation, experiment
from common.experiment import plots

CFG = rvs.Config(
    widths=(8, 8), batch_size=16, num_updates=100, log_every=4, eval_every=100, lr=1e-2,
    target=6.0, horizon=6, goal=False, dropout=0.0,
)  # fmt: skip
GOAL = replace(CFG, goal=True)
KEY = jax.random.key(0)
D, A = 3, 2
INIT = jax.jit(rvs.init, static_argnums=2)  # compiled once for the tests that need a fresh state
MEAN = jax.jit(lambda s, obs, outcome: s.actor.apply_fn(s.actor.params, obs, outcome).mode())
ACT = jax.jit(rvs.act, static_argnums=5)
CHUNK = jax.jit(rvs.train_chunk, static_argnums=4)
LENGTHS = np.array([3, 1, 4, 6])


def dataset(reward=None, lengths=LENGTHS, **columns):
    """Episodes of these lengths; what is not given is noise, and nothing ends at a terminal."""
    n, rows = sum(lengths), random_batch(sum(lengths), D + 2, A)
    columns = {"reward": reward, **columns}
    rows = rows._replace(**{k: v for k, v in columns.items() if v is not None})
    arrays = [np.float32(x) for x in rows._replace(done=np.zeros(n))]
    start = np.cumsum(lengths) - lengths
    return datasets.Dataset("mine", "", *arrays, start, np.array(lengths), None, None, {})


@pytest.fixture(scope="module")
def data():
    return rvs.hindsight(dataset(), CFG)


@pytest.fixture(scope="module")
def fresh(data):
    return INIT(KEY, data, CFG)


@pytest.fixture(scope="module")
def state(fresh):
    return fresh.replace(actor=fresh.actor.replace(params=scramble(fresh.actor.params, 0)))


# --- What a row led to ---


def test_average_reward_to_go_by_hand():
    """Rewards 1, 2, 3 in an episode of three steps, where the longest has four."""
    reward = np.float32([1, 2, 3, 4, 4, 4, 4, -1])
    found = rvs.hindsight(dataset(reward, [3, 4, 1]), replace(CFG, horizon=4)).outcome
    chex.assert_shape(found, (8, 1))
    expected = [6 / 4, 5 / 3, 3 / 2, 4, 4, 4, 4, -1 / 4]
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-6)


def test_return_to_go_by_hand():
    reward = np.float32([1, 2, 3, 4, 4, 4, 4, -1])
    found = rvs.hindsight(dataset(reward, [3, 4, 1]), replace(CFG, average=False)).outcome
    np.testing.assert_allclose(found[:, 0], [6, 5, 3, 16, 12, 8, 4, -1], rtol=1e-6)


def test_places_are_columns_of_the_observations():
    whole = dataset()
    found = rvs.hindsight(whole, replace(GOAL, place=(1, 2)))
    np.testing.assert_array_equal(found.outcome, whole.obs[:, 1:3])


def test_two_steps_are_drawn_as_by_the_authors():
    """One of all but the last step, one of all; of three steps that makes six equal pairs."""
    data = rvs.hindsight(dataset(lengths=[3, 1, 6]), GOAL)
    rows = jnp.zeros(60_000, int).at[:3].set(jnp.array([3, 9, 4]))
    earlier, later = (np.asarray(x) for x in jax.jit(rvs.two_steps)(data, rows, KEY))
    assert (earlier[0], later[0]) == (3, 3)  # an episode of a single step
    assert np.all((earlier[1:3] >= 4) & (earlier[1:3] <= later[1:3]) & (later[1:3] <= 9))
    share = np.zeros((3, 3))
    np.add.at(share, (earlier[3:], later[3:]), 1 / (len(rows) - 3))
    expected = np.array([[1, 2, 1], [0, 1, 1], [0, 0, 0]]) / 6
    np.testing.assert_allclose(share, expected, atol=0.01)


def test_a_minibatch_of_rvs_r_is_its_rows_and_of_rvs_g_two_steps(fresh):
    whole, rows = dataset(), jnp.array([2, 2, 7, 13])
    data = rvs.hindsight(whole, CFG)
    batch = rvs.minibatch(fresh, data, rows, KEY, CFG)
    expected = data.obs[rows], data.action[rows], data.outcome[rows]
    chex.assert_trees_all_equal(tuple(batch), expected)
    data = rvs.hindsight(whole, GOAL)
    start = INIT(KEY, data, replace(GOAL, normalize=True))
    earlier, later = rvs.two_steps(data, rows, KEY)
    batch = rvs.minibatch(start, data, rows, KEY, GOAL)
    mean, std = whole.obs[:, :D].mean(0), whole.obs[:, :D].std(0) + 1e-3
    expected = (whole.obs[earlier, :D] - mean) / std
    np.testing.assert_allclose(batch.obs, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(batch.action, whole.action[earlier])
    np.testing.assert_array_equal(batch.outcome, whole.obs[later, :2])  # as it is


# --- The likelihood in numpy ---


def loss64(params, b):
    """Negative log-likelihood of a Gaussian whose std knows neither state nor outcome."""
    p = params["params"]
    layers = {k: v for k, v in p.items() if k != "log_std"}
    error = (mlp(layers, np.concatenate([b.obs, b.outcome], -1)) - b.action) / np.exp(p["log_std"])
    each = 0.5 * error**2 + p["log_std"] + 0.5 * np.log(2 * np.pi)
    return np.mean(np.sum(each, -1))


def test_one_update_goes_down_the_gradient(state, data):
    batch = rvs.minibatch(state, data, jnp.arange(14), KEY, CFG)
    new, info = jax.jit(partial(rvs.update, cfg=CFG))(state, batch, KEY)
    p, b = f64(state.actor.params), f64(batch)
    np.testing.assert_allclose(info["actor_loss"], loss64(p, b), rtol=2e-5)
    np.testing.assert_allclose(info["std"], np.exp(p["params"]["log_std"]).mean(), rtol=2e-5)
    grads = gradient(lambda x: loss64(x, b), p)
    assert_first_adam_step(state.actor, new.actor, grads, CFG.lr)
    assert np.abs(grads["params"]["log_std"]).min() > 1e-3
    assert loss64(f64(new.actor.params), b) < loss64(p, b)


def test_std_rests_where_it_is_the_residuals(state, data):
    """Its gradient is 0 where its square is the mean squared error of each dimension."""
    batch = rvs.minibatch(state, data, jnp.arange(14), KEY, CFG)
    mean = MEAN(state, batch.obs, batch.outcome)
    params = jax.tree.map(lambda x: x, state.actor.params)
    params["params"]["log_std"] = 0.5 * jnp.log(jnp.mean((mean - batch.action) ** 2, 0))
    gradient = jax.jit(jax.grad(rvs.actor_loss, has_aux=True), static_argnums=4)
    grads, _ = gradient(params, state, batch, KEY, CFG)
    np.testing.assert_allclose(grads["params"]["log_std"], 0, atol=1e-5)


def test_dropout_is_drawn_in_training_and_not_in_acting(state, data):
    actor = rvs.Actor(CFG.widths, A, 0.5)
    dropping = state.replace(actor=state.actor.replace(apply_fn=actor.apply))
    batch = rvs.minibatch(state, data, jnp.arange(14), KEY, CFG)
    loss = jax.jit(partial(rvs.actor_loss, cfg=CFG))

    def two(state):
        return [loss(state.actor.params, state, batch, jax.random.key(i))[0] for i in (1, 2)]

    assert two(state)[0] == two(state)[1]
    assert abs(two(dropping)[0] - two(dropping)[1]) > 1e-3
    acting = [ACT(s, None, data.obs, 0.0, KEY, CFG)[0] for s in (state, dropping)]
    np.testing.assert_array_equal(*acting)


# --- What is asked for ---


def asked(cfg, rewards):
    """Outcomes that the network is given in one episode, the rewards of its steps known."""

    def apply(params, obs, outcome):
        return distrax.MultivariateNormalDiag(outcome / 100, jnp.ones_like(outcome))

    state = rvs.State(
        actor=rvs.TrainState.create(apply_fn=apply, params={}, tx=rvs.optax.sgd(1.0)),
        obs_mean=jnp.zeros(D), obs_std=jnp.ones(D),
    )  # fmt: skip
    carry, found = None, []
    for reward in [0.0, *rewards]:
        action, carry = rvs.act(state, carry, jnp.zeros((1, D)), jnp.array([reward]), KEY, cfg)
        found.append(100 * action[0, 0])
    return np.array(found)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(), [1.5, 1.5, 1.5, 1.5, 1.5, 1.5]),
        (dict(average=False), [6, 6, 6, 6, 6, 6]),
        (dict(decreasing=True), [6 / 4, 5 / 3, 3 / 2, 1, -1, -2]),  # one step is always left
        (dict(decreasing=True, average=False), [6, 5, 3, 1, -1, -2]),
    ],
)
def test_returns_asked_for(settings, expected):
    """Of 6 in at most four steps, where steps earn 1, 2, 2, 2 and 1."""
    found = asked(replace(CFG, horizon=4, **settings), [1.0, 2.0, 2.0, 2.0, 1.0])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_what_is_asked_for_is_what_training_saw(data):
    """Whoever earns the rewards of the longest episode, asked for its return, meets its omegas."""
    reward = np.float32([1, 2, 0.5, 3])
    for settings in (dict(), dict(average=False)):
        cfg = replace(CFG, decreasing=True, target=6.5, horizon=4, **settings)
        seen = rvs.hindsight(dataset(reward, [4]), cfg).outcome[:, 0]
        np.testing.assert_allclose(asked(cfg, reward[:-1]), seen, rtol=1e-5)


def test_episodes_are_asked_side_by_side(state):
    """Each subtracts its own rewards; under vmap each seed keeps its own memory."""
    obs, reward = jax.random.normal(KEY, (3, D + 2)), jnp.array([0.0, 1.0, -2.0])
    policy = rvs.policy(replace(CFG, decreasing=True))

    @partial(jax.jit, static_argnums=0)
    def second(policy, state, obs, reward):
        _, carry = policy(state, None, obs, 0 * reward, KEY)
        return policy(state, carry, obs, reward, KEY)[0]

    together = second(policy, state, obs, reward)
    for i in range(3):
        alone = second(policy, state, obs[i : i + 1], reward[i : i + 1])
        np.testing.assert_allclose(alone[0], together[i], rtol=1e-5)
    assert not np.allclose(second(policy, state, obs, 0 * reward), together, atol=1e-3)
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), (state, obs, reward))
    seeds = second(jax.vmap(policy, (0, 0, 0, 0, None)), *twice)
    np.testing.assert_allclose(seeds[1], together, rtol=1e-5)


def test_a_goal_is_the_end_of_the_observation(state, data):
    """And no part of what is normalised."""
    start = INIT(KEY, rvs.hindsight(dataset(), GOAL), replace(GOAL, normalize=True))
    obs = jax.random.normal(KEY, (4, D + 2))
    act = jax.jit(rvs.policy(GOAL))
    action, carry = act(start, None, obs, jnp.zeros(4), KEY)
    assert carry is None
    mean = MEAN(start, rvs.normalise(start, obs[:, :D]), obs[:, D:])
    np.testing.assert_allclose(action, mean.clip(-1, 1), rtol=1e-5)
    farther, _ = act(start, None, obs.at[:, D:].add(1.0), jnp.zeros(4), KEY)
    assert np.abs(farther - action).min() > 1e-4


# --- Chunks and seeds ---


def test_a_chunk_of_many_seeds_is_the_chunks_of_each():
    """Four updates of two seeds under vmap, and two by two of each alone; RvS-G draws the most."""
    data, cfg = rvs.hindsight(dataset(), GOAL), GOAL
    keys = jax.vmap(jax.random.key)(jnp.arange(2))
    start = [INIT(key, data, cfg) for key in keys]
    many = jax.jit(jax.vmap(partial(rvs.train_chunk, cfg=cfg), (0, None, 0, None)))
    many, _ = many(jax.tree.map(lambda *x: jnp.stack(x), *start), data, keys, 4)
    short = jax.jit(partial(rvs.train_chunk, cfg=replace(cfg, log_every=2)))
    for i in range(2):
        alone, _ = short(start[i], data, keys[i], 2)
        alone, _ = short(alone, data, keys[i], 4)
        mine = jax.tree.map(lambda x, i=i: x[i], many.actor.params)
        chex.assert_trees_all_close(mine, alone.actor.params, rtol=1e-4, atol=1e-5)
    bias = many.actor.params["params"]["Dense_0"]["bias"]
    assert np.abs(bias[0] - bias[1]).min() > 1e-4


# --- The rest of the file ---


@pytest.mark.parametrize(
    ("env", "goal", "dropout"),
    [
        ("halfcheetah-medium-v2", False, 0.0),
        ("kitchen-mixed-v0", False, 0.1),
        ("D4RL/antmaze/umaze-v1", True, 0.0),
        ("stillwater/pointmaze-umaze/waypoint-v0", True, 0.0),
        ("my/antmazes.hdf5", False, 0.0),
    ],
)
def test_values_of_the_authors(env, goal, dropout):
    cfg = experiment.resolve(rvs.Config(env=env), rvs.TUNED)
    assert (cfg.goal, cfg.dropout) == (goal, dropout)


def test_what_cannot_be_asked_for_is_refused():
    maze = replace(dataset(), env_id="PointMaze_UMaze-v3")
    rvs.check(GOAL, maze)
    rvs.check(CFG, dataset())
    with pytest.raises(SystemExit, match="--horizon 5: the longest episode of mine has 6 steps"):
        rvs.check(replace(CFG, horizon=5), dataset())
    with pytest.raises(SystemExit, match="--goal: observations of mine hold no goal"):
        rvs.check(GOAL, dataset())
    with pytest.raises(SystemExit, match=r"--place \(0, 3\): must be below 3"):
        rvs.check(replace(GOAL, place=(0, 3)), maze)


@pytest.mark.parametrize("target", [None, 2.5])
def test_trains_and_asks_for_the_datas_best_return(target, tmp_path, monkeypatch):
    """To a run folder and back: what was asked for is in the config that acts again."""
    monkeypatch.setattr(plots, "plot", lambda *args: None)  # slow
    monkeypatch.setattr("sys.argv", ["rvs.py"])
    whole = dataset(np.float32([1, 2, 0, 9, *[0.25] * 10]))
    sizes = dict(num_updates=4, eval_episodes=0, batch_size=8)
    cfg = replace(CFG, out=str(tmp_path), target=target, horizon=None, **sizes)
    state = rvs.train(cfg, whole)
    (folder,) = tmp_path.glob("rvs/mine/*")
    _, cfg, again = evaluation.load(folder)
    assert cfg.target == (9.0 if target is None else target)
    assert cfg.horizon == 6
    chex.assert_trees_all_equal(again.actor.params, state.actor.params)


# --- Worlds with known answers ---


def trained(data, cfg, steps):
    cfg = replace(cfg, widths=(32,), batch_size=128, lr=5e-3, log_every=steps)
    return CHUNK(INIT(KEY, data, cfg), data, KEY, steps, cfg)[0]


def test_whoever_asks_for_more_gets_the_actions_that_earned_it():
    """Episodes of one step: action 0.6 earns 1, action -0.2 earns 0; asked at random, it is BC."""
    good = np.arange(400) % 2
    action = np.where(good, 0.6, -0.2)[:, None] * [1, -1]
    whole = dataset(np.float32(good), np.ones(400, int), action=action)
    whole = replace(whole, obs=np.zeros((400, D), np.float32))
    data = rvs.hindsight(whole, CFG)
    state = trained(data, CFG, 400)

    targets = jnp.linspace(0, 1, 6)

    def towards(state):
        """Actions of episodes that ask for the targets, side by side."""
        carry = targets, jnp.array(CFG.horizon)
        return ACT(state, carry, jnp.zeros((6, D)), jnp.zeros(6), KEY, CFG)[0]

    action = towards(state)
    np.testing.assert_allclose(action[0], [-0.2, 0.2], atol=0.03)
    np.testing.assert_allclose(action[-1], [0.6, -0.6], atol=0.03)
    assert np.all(np.diff(action[:, 0]) > 0)
    shuffled = np.random.default_rng(0).permutation(data.outcome)
    blind = trained(data._replace(outcome=jnp.asarray(shuffled)), CFG, 400)
    np.testing.assert_allclose(towards(blind), np.tile([0.2, -0.2], (6, 1)), atol=0.1)


def test_whoever_is_given_a_goal_goes_there():
    """On a line, episodes of six steps to the left or to the right, from anywhere.

    The goal that the observations name is never reached, and its columns stand still: what is
    learned comes from the places alone that were reached later.
    """
    rng, count = np.random.default_rng(0), 200
    way = np.repeat(np.where(np.arange(count) % 2, 0.5, -0.5), 6)
    place = np.repeat(rng.uniform(-2, 2, count), 6) + way * np.tile(np.arange(6), count)
    obs = np.float32(np.stack([place, 0 * place, 0 * place + 9], 1))
    whole = dataset(lengths=[6] * count, action=way[:, None])
    cfg = replace(GOAL, place=(0,))
    state = trained(rvs.hindsight(replace(whole, obs=obs, next_obs=obs), cfg), cfg, 600)
    place, goal = (x.ravel() for x in np.meshgrid([-1.5, 0, 1.5], [-2.5, -1.0, 1.0, 2.5]))
    apart = np.abs(place - goal) > 0.9
    obs = jnp.float32(np.stack([place, 0 * place, goal], 1))
    action, _ = ACT(state, None, obs, jnp.zeros(len(obs)), KEY, cfg)
    np.testing.assert_allclose(action[apart, 0], 0.5 * np.sign(goal - place)[apart], atol=0.15)
