"""Off-policy evaluation: every estimator against enumeration and SCOPE-RL, FQE, the command."""

import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import ope
import pytest
import tiny
from commands import run
from float64 import random_batch
from scipy import stats

from common import datasets
from common.datasets import Batch

ROOT = Path(__file__).parents[2]
GAMMA = 0.9
UNBIASED = ("IS", "PDIS", "DR")
WEIGHTED = ("WIS", "WPDIS", "WDR")
CFG = ope.Config(widths=(16,), batch_size=16, gamma=GAMMA, num_updates=10, clone_updates=10)

# --- Two states, two actions, three steps; an episode may end early ---

STEPS, STATES, ACTIONS, OVER = 3, 2, 2, 2
RNG = np.random.default_rng(0)
MOVE = RNG.dirichlet(np.ones(STATES + 1), (STATES, ACTIONS))  # the last column: the episode ends
REWARD = RNG.normal(size=(STATES, ACTIONS))
B, PI = RNG.dirichlet(np.ones(ACTIONS), (2, STATES))
Q_WRONG = RNG.normal(size=(STATES, ACTIONS))


def value(policy):
    """V(s) of each number of steps left, (STEPS + 1, STATES + 1); the ended state is worth 0."""
    v = np.zeros((STEPS + 1, STATES + 1))
    for left in range(1, STEPS + 1):
        v[left, :STATES] = (policy * (REWARD + GAMMA * MOVE @ v[left - 1])).sum(1)
    return v


def exact_q(left):
    """Q of pi with so many steps left."""
    return REWARD + GAMMA * MOVE @ value(PI)[left - 1]


def enumerate_episodes(q_of):
    """(Trajectories of every possible course from state 0, its probability under b).

    q_of: steps left -> Q (STATES, ACTIONS), from which V follows.
    """
    rows, chances = [], []
    for actions in itertools.product(range(ACTIONS), repeat=STEPS):
        for states in itertools.product(range(STATES + 1), repeat=STEPS):  # after each action
            s, chance, columns, over = 0, 1.0, np.zeros((4, STEPS)), False
            for t, (a, later) in enumerate(zip(actions, states, strict=True)):
                if over:  # one way to write an ended episode
                    chance *= float(a == 0 and later == OVER)
                    continue
                q = q_of(STEPS - t)[s]
                log_ratio = np.log(PI[s, a] / B[s, a])
                columns[:, t] = REWARD[s, a], log_ratio, q[a], PI[s] @ q
                chance *= B[s, a] * MOVE[s, a, later]
                s, over = later, later == OVER
            rows.append(columns)
            chances.append(chance)
    return ope.Trajectories(*np.moveaxis(rows, 1, 0)), np.array(chances)


@pytest.mark.parametrize("q_of", [lambda left: Q_WRONG, exact_q], ids=["wrong Q", "exact Q"])
def test_the_expectation_of_every_estimator_is_the_value(q_of):
    """IS, PDIS and DR of one episode are unbiased whatever Q is; the weighted ones are exact with
    every course as often as it comes."""
    data, chance = enumerate_episodes(q_of)
    assert abs(chance.sum() - 1) < 1e-12
    truth = value(PI)[STEPS, 0]
    found = ope.estimate(data, GAMMA, chance)
    for name in UNBIASED + WEIGHTED:
        assert abs(found[name] - truth) < 1e-12, name
    alone = ope.estimate(data, GAMMA, np.eye(len(chance)))  # each course by itself
    for name in UNBIASED:
        assert abs(chance @ alone[name] - truth) < 1e-12, name
    assert abs(chance @ alone["WIS"] - value(B)[STEPS, 0]) < 1e-12  # of one episode: b's return
    if q_of is exact_q:
        assert abs(found["FQE"] - truth) < 1e-12


def test_with_the_exact_q_doubly_robust_has_less_variance():
    data, chance = enumerate_episodes(exact_q)
    alone = ope.estimate(data, GAMMA, np.eye(len(chance)))
    variance = {name: chance @ (alone[name] - value(PI)[STEPS, 0]) ** 2 for name in UNBIASED}
    assert variance["DR"] < 0.5 * variance["PDIS"] < variance["IS"]


def test_doubly_robust_is_the_recursion_of_its_paper():
    """V_t = V(s_t) + rho_t (r_t + gamma V_t+1 - Q(s_t, a_t)), backwards."""
    rng = np.random.default_rng(1)
    data = ope.Trajectories(*rng.normal(size=(4, 6, 5)))
    total = np.zeros(6)
    for t in reversed(range(5)):
        rho = np.exp(data.log_ratio[:, t])
        total = data.v[:, t] + rho * (data.reward[:, t] + GAMMA * total - data.q[:, t])
    got = ope.estimate(data, GAMMA, np.ones(6))["DR"]
    np.testing.assert_allclose(got, total.mean(), rtol=1e-12)


def test_the_policy_that_recorded_the_data_has_their_mean_return():
    data, chance = enumerate_episodes(exact_q)
    data = data._replace(log_ratio=0 * data.log_ratio, q=0 * data.q, v=0 * data.v)
    found = ope.estimate(data, GAMMA, chance)
    for name in UNBIASED + WEIGHTED:
        assert abs(found[name] - value(B)[STEPS, 0]) < 1e-12, name


def bandit(actions):
    """Episodes of one step: b = (.5, .5), pi = (.9, .1), rewards (1, 0), Q exact."""
    pi, reward = np.array([0.9, 0.1]), np.array([1.0, 0.0])
    columns = [x[list(actions)][:, None] for x in (reward, np.log(pi / 0.5), reward)]
    return ope.Trajectories(*columns, np.full((len(actions), 1), 0.9))


def test_known_answers():
    """A bandit, and two steps with ratios 2 and 0.5."""
    one, two = (ope.estimate(bandit(x), 1.0, np.ones(len(x))) for x in ((0, 1), (0, 0, 1)))
    assert abs(one["IS"] - 0.9) < 1e-12 and abs(one["WIS"] - 0.9) < 1e-12
    assert abs(two["IS"] - 1.2) < 1e-12 and abs(two["WIS"] - 1.8 / 1.9) < 1e-12
    assert abs(two["DR"] - 0.9) < 1e-12
    zero = np.zeros((1, 2))
    data = ope.Trajectories(zero + 1, np.log([[2, 0.5]]), zero, zero)
    found = ope.estimate(data, 1.0, np.ones(1))
    assert abs(found["IS"] - 2) < 1e-12 and abs(found["PDIS"] - 3) < 1e-12


def test_equal_to_scope_rl():
    """Of scope-rl 0.2.1, discrete/basic_estimators.py on these arrays; it adds 1e-10 to the sums
    that weights are divided by."""
    rng = np.random.default_rng(0)
    n, steps, actions = 5, 4, 3
    action, reward = rng.integers(0, actions, n * steps), rng.normal(size=n * steps)
    b, pi = (rng.dirichlet(np.ones(actions), n * steps) for _ in range(2))
    q, rows = rng.normal(size=(n * steps, actions)), np.arange(n * steps)
    log_ratio = np.log(pi[rows, action] / b[rows, action])
    columns = reward, log_ratio, q[rows, action], (pi * q).sum(1)
    data = ope.Trajectories(*(ope.pad(x, np.full(n, steps)) for x in columns))
    got = ope.estimate(data, 0.9, np.ones(n))
    for name, expected in SCOPE_RL.items():
        np.testing.assert_allclose(got[name], expected, rtol=1e-8, err_msg=name)


SCOPE_RL = {
    "FQE": 0.07061683943058941,
    "WDR": 1.0899872384314349,
    "DR": 7.864348443043815,
    "WPDIS": 1.2098885297038142,
    "PDIS": 8.425290633061406,
    "WIS": 2.0073900483570375,
    "IS": 15.766059037823263,
}

# --- Weights ---


def test_episodes_keep_their_weight_after_their_end():
    length = np.array([1, 3])
    padded = ope.pad(np.log([2.0, 3.0, 5.0, 7.0]), length)
    rho, share = ope.weights(padded)
    np.testing.assert_allclose(rho, [[2, 2, 2], [3, 15, 105]])
    np.testing.assert_allclose(share, rho / rho.max(0))


def test_long_episodes_neither_overflow_nor_underflow():
    """A thousand steps whose ratios multiply to e^2000 and e^-6000."""
    data = ope.Trajectories(*np.ones((4, 2, 1000)))
    data = data._replace(log_ratio=np.array([[2.0], [-6.0]]) * np.ones((2, 1000)))
    for count in (np.ones(2), np.array([0.0, 2.0])):  # a resample may leave out the heavy one
        found = ope.estimate(data, 0.99, count)
        assert all(np.isfinite(x) for x in found.values())
        assert abs(found["WIS"] - (1 - 0.99**1000) / 0.01) < 1e-8


def test_the_effective_number_of_episodes():
    """All with equal weights; one where one weight is everything."""
    data = ope.Trajectories(*np.zeros((4, 20, 3)))
    assert ope.effective(data, 0.9) == pytest.approx(dict.fromkeys(ope.ESTIMATORS, 20))
    log_ratio = np.zeros((20, 3))
    log_ratio[0, 1] = 50
    sizes = ope.effective(data._replace(log_ratio=log_ratio), 0.9)
    assert sizes["WIS"] == pytest.approx(1) and sizes["FQE"] == 20
    assert sizes["WPDIS"] == pytest.approx((20 + 0.9 + 0.81) / (1 + 0.9 + 0.81))


def test_the_interval_is_the_bootstraps():
    """Of a mean: near 1.96 standard errors; and FQE's is that of the start states."""
    rng = np.random.default_rng(0)
    data = ope.Trajectories(*np.zeros((4, 400, 1)))._replace(reward=rng.normal(3, 1, (400, 1)))
    low, high = ope.intervals(data, 0.9, 2_000, 0)["IS"]
    error = data.reward.std() / 20
    assert abs(high - low - 2 * 1.96 * error) < 0.2 * error
    assert ope.intervals(data, 0.9, 100, 0)["FQE"] == [0.0, 0.0]


# --- The policies ---


def test_samples_and_density_are_those_of_the_truncated_normal():
    """Near a bound and far from it; the density integrates to one over [-1, 1]."""
    mean = jnp.array([0.95, -0.2])
    drawn = np.asarray(ope.noisy(jax.random.key(0), jnp.broadcast_to(mean, (4000, 2)), CFG))
    assert np.abs(drawn).max() <= 1 + 1e-6
    for i, m in enumerate(np.asarray(mean, float)):
        low, high = (-1 - m) / CFG.std, (1 - m) / CFG.std
        assert stats.kstest(drawn[:, i], stats.truncnorm(low, high, m, CFG.std).cdf).pvalue > 0.01
    grid = jnp.linspace(-1, 1, 2001)
    density = jnp.exp(ope.log_prob(mean[:1], grid[:, None], CFG))
    assert abs(float(jnp.trapezoid(density, grid)) - 1) < 1e-3


def test_discrete_samples_and_probabilities():
    """Of act's action 1 - epsilon + epsilon / A, of others epsilon / A."""
    cfg = replace(CFG, discrete=True, epsilon=0.3)
    mean = jax.nn.one_hot(jnp.full(6000, 2), 3)
    drawn = np.asarray(ope.noisy(jax.random.key(0), mean, cfg))
    assert set(map(tuple, drawn)) == {(1, 0, 0), (0, 1, 0), (0, 0, 1)}
    chance = np.exp(ope.log_prob(mean[:3], jnp.eye(3), cfg))
    np.testing.assert_allclose(chance, [0.1, 0.1, 0.8], rtol=1e-6)
    np.testing.assert_allclose(drawn.mean(0), chance, atol=4 * np.sqrt(0.2 / 6000))


def test_a_cloned_discrete_behaviour_has_the_datas_frequencies():
    """Action 0 in 90 % of one half of the rows, in 20 % of the other."""
    obs = np.repeat([-1.0, 1.0], 100)[:, None].astype(np.float32)
    first = np.repeat([1, 0, 1, 0], [90, 10, 20, 80])
    zero = np.zeros(200, np.float32)
    data = Batch(obs, np.eye(2, dtype=np.float32)[1 - first], zero, obs, zero)
    cfg = replace(CFG, discrete=True, clone_updates=500, batch_size=256, lr=1e-2)
    got = np.exp(ope.cloned(jax.tree.map(jnp.asarray, data), jax.random.key(0), cfg))
    np.testing.assert_allclose(got[[0, 95, 105, 150]], [0.9, 0.1, 0.2, 0.8], atol=0.05)


def test_a_cloned_behaviour_is_the_density_that_data_come_from():
    """Actions around -0.5 in one half of the states, around 0.5 in the other."""
    rng = np.random.default_rng(0)
    obs = rng.choice([-1.0, 1.0], (2_000, 1)).astype(np.float32)
    action = np.tanh(np.arctanh(0.5 * obs) + 0.3 * rng.normal(size=obs.shape)).astype(np.float32)
    zero = np.zeros(2_000, np.float32)
    data = jax.tree.map(jnp.asarray, Batch(obs, action, zero, obs, zero))
    cfg = replace(CFG, clone_updates=1_500, batch_size=256, lr=1e-2)
    got = ope.cloned(data, jax.random.key(0), cfg)
    u = np.arctanh(action.astype(float))
    exact = stats.norm.logpdf(u, np.arctanh(0.5 * obs), 0.3) - np.log(1 - action.astype(float) ** 2)
    assert abs(got - exact[:, 0]).mean() < 0.1


# --- FQE ---


def test_the_backup():
    """In float64: no value after a terminal, and none beyond what can be earned."""
    data = random_batch(16)
    state = ope.init(jax.random.key(0), data, CFG)
    action = jnp.zeros_like(data.action)
    q = np.asarray(ope.q_value(state, state.target, data.next_obs, action, CFG), float)
    expected = data.reward + GAMMA * (1 - data.done) * q
    got = ope.bellman(state, data, action, (-1e9, 1e9), CFG)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    got = ope.bellman(state, data, action, (-0.1, 0.1), CFG)
    np.testing.assert_allclose(got, np.clip(expected, -0.1, 0.1), rtol=1e-5)


def chain(done):
    """s0 -> s1 -> end with rewards 0 and 1, whatever is done; `done` ends it."""
    obs, next_obs = np.float32([[0], [1]]), np.float32([[1], [1]])
    zero = np.zeros((2, 1), np.float32)
    rows = Batch(obs, zero, np.float32([0, 1]), next_obs, np.float32([0, done]))
    return jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x), 8, 0), rows)


@pytest.mark.parametrize(("done", "q1"), [(1, 1.0), (0, 1 / (1 - 0.5))])
def test_fqe_of_a_chain(done, q1):
    """Q(s0) = gamma Q(s1); without the terminal the reward of s1 comes for ever. Two policies."""
    data = chain(done)
    cfg = replace(CFG, gamma=0.5, num_updates=1_500, lr=1e-2, polyak=0.05, std=0.01)
    mean = jnp.zeros((2, 16, 1))
    q, v = ope.fit(data, mean, mean, jax.random.key(0), cfg)
    for x in (q, v):
        np.testing.assert_allclose(x[:, [0, 8]], [[0.5 * q1, q1]] * 2, atol=0.05)


def test_policies_fitted_together_are_as_those_fitted_alone():
    data = random_batch(32)
    means = jax.random.uniform(jax.random.key(1), (2, 3, 32, 2), minval=-1, maxval=1)
    q, v = ope.fit(data, *means, jax.random.key(0), CFG)
    alone_q, alone_v = ope.fit(data, *means[:, 1:2], jax.random.key(0), CFG)
    np.testing.assert_allclose(q[1], alone_q[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(v[1], alone_v[0], rtol=1e-4, atol=1e-4)
    assert np.abs(v[0] - v[1]).max() > 1e-3


# --- Measures ---


def test_ranking_measures():
    truth, values = np.array([0, 0.5, 1]), np.array([1, 0.9, 0])
    assert ope.spearman(values, truth) == pytest.approx(-1)
    assert [ope.regret(values, truth, k) for k in (1, 2, 3)] == pytest.approx([1, 0.5, 0])
    a, b = np.array([1, 2, 2, 5.0]), np.array([2, 1, 4, 4.0])
    assert ope.spearman(a, b) == pytest.approx(stats.spearmanr(a, b)[0])


# --- The command ---


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of tiny runs of IQL, RvS and discrete BCQ; the data of the first two."""
    folder = tmp_path_factory.mktemp("ope")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        data = tiny.dataset(folder / "tiny.hdf5")
        for name in ("iql", "rvs", "discrete_bcq"):
            own = tiny.dataset(folder / "discrete.hdf5", name) if name in tiny.DISCRETE else data
            where = ["--env", own.name, "--env-id", own.env_id, "--out", folder]
            small = tiny.settings(name) | {"num_updates": 10, "eval_every": 10, "eval_episodes": 0}
            code, _, errors = run(name, *where, *tiny.flags(small))
            assert code == 0, errors
        yield {path.parts[-3]: path for path in folder.glob("*/*/*") if path.is_dir()}, data


SMALL = "--num-updates 20 --clone-updates 20 --widths 8 --batch-size 8 --resamples 50".split()


def test_the_command_estimates_ranks_and_measures(runs, tmp_path):
    folders, data = runs
    out = tmp_path / "ope.json"
    where = ["--env", data.name, "--env-id", data.env_id, "--out", out]
    code, text, errors = run(
        "ope", "--policies", folders["iql"], *where, *SMALL, "--truth", "--episodes", 2
    )
    assert code == 0, errors
    assert "cloned from the data in 20 updates" in text
    assert "Ranking by FQE" in text and "Spearman" in text and "collapsed" in text
    found = json.loads(out.read_text())
    assert [row["policy"] for row in found["rows"]] == ["iql s0", "iql s1"]
    for row in found["rows"]:
        for name in ope.ESTIMATORS:
            low, high = row[name]["interval"]
            assert low <= high and np.isfinite(row[name]["value"])
            assert 1 - 1e-9 <= row[name]["effective"] <= 4 + 1e-9
    assert found["measures"]["FQE"].keys() == {"error", "spearman", "regret@1"}


def test_discrete_actions(runs, tmp_path):
    """The same command; a random action instead in a share epsilon of the steps."""
    folders, _ = runs
    folder = folders["discrete_bcq"]
    info = json.loads((folder / "config.json").read_text())["dataset"]
    where = ["--env", info["name"], "--env-id", info["env_id"]]
    code, text, errors = run(
        "ope", "--policies", folder, *where, *SMALL, "--truth", "--episodes", 2
    )
    assert code == 0, errors
    assert "2 policies, epsilon 0.1" in text and "discrete_bcq s1" in text and "Spearman" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--policies", "RVS"], "a policy of rvs has a memory"),
        ([], "--policies: name at least one run folder"),
        (["--policies", "IQL", "--gamma", "1"], "--gamma 1.0: must be at least 0 and below 1"),
        (["--policies", "IQL", "--std", "0"], "--std 0.0: must be above 0"),
        (["--policies", "IQL", "--epsilon", "0"], "--epsilon 0.0: must be above 0"),
        (["--policies", "IQL", "--rank", "x"], "--rank x: must be one of FQE"),
        (["--policies", "IQL", "--env", "stillwater/halfcheetah/medium-v0"], "11.*17"),
    ],
)
def test_refusals(runs, words, message):
    folders, data = runs
    words = [folders.get(x.lower(), x) for x in words]
    if "--env" not in words:
        words += ["--env", data.name, "--env-id", data.env_id]
    code, _, errors = run("ope", *words, *SMALL)
    assert code == 1 and len(errors.strip().splitlines()) == 1
    assert re.search(message, errors), errors


def test_stored_probabilities_are_used():
    """They are exact, so nothing is cloned: those of the actions that were taken."""
    data = datasets.load("stillwater/cartpole/replay-v0")
    log_b, source = ope.behaviour_log_prob(data, None, None, CFG)
    stored = datasets.infos(data, "probability")
    assert source == "stored with the data" and stored.shape == (len(data.obs), 2)
    np.testing.assert_allclose(stored.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(log_b, np.log(stored[range(len(stored)), data.action]), rtol=1e-6)
    assert np.exp(log_b).mean() > 0.5  # most actions are the likelier ones
    assert datasets.infos(data, "nothing") is None


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_a_probability_that_cannot_be_is_refused(value, monkeypatch):
    """Its weight would be infinite, or wrong."""
    data = datasets.load("stillwater/cartpole/replay-v0")
    wrong = np.full((len(data.obs), 2), value, np.float32)
    monkeypatch.setattr(datasets, "infos", lambda *_: wrong)
    with pytest.raises(SystemExit, match="probability not in"):
        ope.behaviour_log_prob(data, None, None, CFG)


def test_damaged_probabilities(tmp_path):
    folder = shutil.copytree(ROOT / "data/stillwater/cartpole/replay-v0", tmp_path / "set-v0")
    with h5py.File(folder / "data/main_data.hdf5", "r+") as file:
        rows = file["episode_3/infos/probability"][:-1]
        del file["episode_3/infos/probability"]
        file["episode_3/infos/probability"] = rows
    data = datasets.load(str(folder))
    with pytest.raises(datasets.DatasetError, match="infos/probability: numbers of rows differ"):
        datasets.infos(data, "probability")
