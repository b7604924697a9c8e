"""BC: losses and a step in float64, which episodes %BC keeps, worlds with known answers."""

from dataclasses import replace
from functools import partial

import bc
import chex
import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run
from float64 import assert_first_adam_step, f64, gradient, mlp, random_batch, scramble, shifted

from common import datasets, evaluation
from common.datasets import Batch
from common.experiment import plots

CFG = bc.Config(widths=(8, 8), batch_size=16, num_updates=1000, log_every=100, lr=1e-2)
CONFIGS = {"deterministic": CFG, "gaussian": replace(CFG, head="gaussian")}
KEY = jax.random.key(0)
B = 16
INIT = jax.jit(bc.init, static_argnums=2)  # compiled once for the tests that need a fresh state
CHUNK = jax.jit(bc.train_chunk, static_argnums=4)


@pytest.fixture(scope="module")
def data():
    return shifted(200)


@pytest.fixture(scope="module")
def fresh(data):
    return INIT(KEY, data, CFG)


@pytest.fixture(scope="module")
def batch():
    return random_batch(B, seed=1)


@pytest.fixture(scope="module")
def state(fresh):
    return fresh.replace(actor=fresh.actor.replace(params=scramble(fresh.actor.params, 0)))


# --- The losses in numpy ---


def squared_error64(params, b):
    error = np.tanh(mlp(params["params"]["MLP_0"], b.obs)) - b.action
    return np.sum(error**2) / error.size  # over rows and dimensions


def negative_log_likelihood64(params, b):
    mean = np.tanh(mlp(params["params"]["MLP_0"], b.obs))
    std = np.exp(np.clip(params["params"]["log_std"], -5, 2))
    each = 0.5 * ((b.action - mean) / std) ** 2 + np.log(std) + 0.5 * np.log(2 * np.pi)
    return np.sum(each) / len(b.action)  # the density's logarithm is a sum over dimensions


LOSSES = {"deterministic": squared_error64, "gaussian": negative_log_likelihood64}


@pytest.mark.parametrize("head", LOSSES)
def test_loss(head, state, batch):
    loss, info = bc.actor_loss(state.actor.params, state, batch, CONFIGS[head])
    np.testing.assert_allclose(loss, LOSSES[head](f64(state.actor.params), f64(batch)), rtol=2e-5)
    assert info["actor_loss"] == loss


@pytest.mark.parametrize(("log_std", "clipped"), [(10, 2), (-10, -5), (0.3, 0.3)])
def test_gaussian_heads_std_is_clipped_and_knows_no_state(log_std, clipped, state, batch):
    params = jax.tree.map(lambda x: x, state.actor.params)
    params["params"]["log_std"] = jnp.full(2, float(log_std))
    pi = state.actor.apply_fn(params, batch.obs)
    np.testing.assert_allclose(pi.stddev(), np.full((B, 2), np.exp(clipped)), rtol=1e-5)
    loss, _ = bc.actor_loss(params, state, batch, CONFIGS["gaussian"])
    np.testing.assert_allclose(loss, negative_log_likelihood64(f64(params), f64(batch)), rtol=1e-4)


@pytest.mark.parametrize("head", LOSSES)
def test_one_update_goes_down_the_gradient(head, state, batch):
    new, info = jax.jit(partial(bc.update, cfg=CONFIGS[head]))(state, batch, KEY)
    p, b = f64(state.actor.params), f64(batch)
    np.testing.assert_allclose(info["actor_loss"], LOSSES[head](p, b), rtol=2e-5)
    grads = gradient(lambda x: LOSSES[head](x, b), p)
    assert_first_adam_step(state.actor, new.actor, grads, CFG.lr)
    still = np.all(grads["params"]["log_std"] == 0)
    assert still == (head == "deterministic")  # whose squared error has no std to learn
    assert LOSSES[head](f64(new.actor.params), b) < LOSSES[head](p, b)
    chex.assert_trees_all_equal((new.obs_mean, new.obs_std), (state.obs_mean, state.obs_std))
    assert new.actor.step == state.actor.step + 1


# --- Structure ---


@pytest.mark.parametrize("head", LOSSES)
def test_a_rows_loss_depends_on_that_row_alone(head, state, batch):
    loss = partial(bc.actor_loss, cfg=CONFIGS[head])
    rows = jax.tree.map(lambda x: x[:, None], batch)
    each, _ = jax.vmap(loss, (None, None, 0))(state.actor.params, state, rows)
    chex.assert_shape(each, (B,))
    whole, info = loss(state.actor.params, state, batch)
    chex.assert_shape([whole, *info.values()], ())
    np.testing.assert_allclose(whole, each.mean(), rtol=1e-5)


@pytest.mark.parametrize("head", LOSSES)
def test_rewards_ends_and_next_states_play_no_part(head, state, batch):
    other = batch._replace(reward=-batch.reward, done=1 - batch.done, next_obs=batch.obs)
    losses = [bc.actor_loss(state.actor.params, state, b, CONFIGS[head])[0] for b in (batch, other)]
    assert losses[0] == losses[1]


def test_shapes_of_actions(state, batch):
    chex.assert_shape(jax.eval_shape(bc.act, state, batch.obs), (B, 2))
    chex.assert_shape(jax.eval_shape(bc.act, state, batch.obs[0]), (2,))


def test_observations_are_normalised_once_for_training_and_acting(fresh, data):
    rows = jnp.array([3, 3, 8])
    batch = bc.minibatch(fresh, data, rows)
    mean, std = np.mean(data.obs, 0), np.std(data.obs, 0) + 1e-3
    np.testing.assert_allclose(batch.obs, (data.obs[rows] - mean) / std, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(batch.action, data.action[rows])
    actor = f64(fresh.actor.params)["params"]["MLP_0"]
    expected = np.tanh(mlp(actor, (f64(data.obs) - mean) / std))
    np.testing.assert_allclose(bc.act(fresh, data.obs), expected, rtol=1e-4, atol=1e-5)


def test_without_normalising_observations_are_as_they_come(data):
    raw = INIT(KEY, data, replace(CFG, normalize=False))
    np.testing.assert_array_equal(bc.normalise(raw, data.obs), data.obs)


# --- %BC: the best episodes ---


def episodes(*rewards, done=None):
    """A Dataset with these rewards, a list an episode; obs[i] = i, action[i] = 0."""
    length = np.array([len(r) for r in rewards])
    reward = np.concatenate(rewards).astype(np.float32)
    rows = np.arange(len(reward), dtype=np.float32)[:, None]
    done = np.zeros_like(reward) if done is None else np.float32(done)
    arrays = rows, np.zeros_like(rows), reward, rows + 1, done, np.cumsum(length) - length, length
    return datasets.Dataset("mine", "", *arrays, None, None, {})


def kept(data, fraction):
    """Numbers of the episodes that %BC keeps; all their rows or none."""
    rows = bc.best_episodes(data, fraction)
    chex.assert_shape(rows, data.reward.shape)
    parts = np.split(rows, data.start[1:])
    assert all(part.all() or not part.any() for part in parts)
    return [i for i, part in enumerate(parts) if part.all()]


# Returns 3, 5, -1, 5, 4: the longest is the worst, the largest single reward is in the fourth.
FIVE = episodes([1, 1, 1], [5], [-0.5, 0, 0, 0, -0.5], [-4, 9], [2, 2])


@pytest.mark.parametrize(
    ("fraction", "best"),
    [
        (1.0, [0, 1, 2, 3, 4]),
        (0.8, [0, 1, 3, 4]),
        (0.6, [1, 3, 4]),
        (0.59, [1, 3]),  # a share of 2.95 episodes are 2
        (0.4, [1, 3]),
        (0.2, [1]),  # of equal ones the earlier
    ],
)
def test_best_episodes(fraction, best):
    assert kept(FIVE, fraction) == best


def test_a_share_is_of_what_was_typed():
    """0.29 * 100 is 28.999999999999996."""
    assert 0.29 * 100 < 29
    assert len(kept(episodes(*([i] for i in range(100))), 0.29)) == 29


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.19])
def test_a_share_without_an_episode_is_refused(fraction):
    with pytest.raises(SystemExit, match=f"--fraction {fraction} of 5 episodes is none"):
        kept(FIVE, fraction)


def test_of_many_equal_episodes_the_first_are_taken():
    data = episodes(*([i % 2] for i in range(40)))  # numpy's default sort would mix them
    assert kept(data, 0.25) == list(range(1, 20, 2))


def test_returns_are_not_discounted_and_long_episodes_stay_whole():
    """A reward after 1499 steps counts in full, and for all rows of its episode."""
    data = episodes([1.0], [0] * 1499 + [1.1], [1.05])
    assert kept(data, 0.34) == [1]


def test_an_episode_that_a_time_limit_ended_is_one(tmp_path, monkeypatch):
    """Cut at terminals alone, the first two were one of return 9, and the last was none."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    n = 9
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["observations"] = np.arange(n, dtype=np.float32)[:, None]
        file["next_observations"] = np.arange(1, n + 1, dtype=np.float32)[:, None]
        file["actions"] = np.zeros((n, 1), np.float32)
        file["rewards"] = np.float32([0, 0, 0, 3, 3, 3, 4, 2, 6])
        file["terminals"] = np.arange(n) == 6
        file["timeouts"] = np.isin(np.arange(n), [2, 5, 8])
    data = datasets.load(str(tmp_path / "a.hdf5"))
    assert data.returns().tolist() == [0, 9, 4, 8]
    assert kept(data, 0.25) == [1]
    assert kept(data, 0.5) == [1, 3]
    rows = bc.best_episodes(data, 0.5)
    assert data.transitions().obs[rows].ravel().tolist() == [3, 4, 5, 7, 8]


# --- Worlds with known answers ---


@pytest.mark.parametrize("head", LOSSES)
def test_a_few_rows_are_learned_by_heart(head):
    few = random_batch(6, seed=2)
    few = few._replace(obs=100 + 20 * few.obs)  # far from what a network can take raw
    cfg = replace(CONFIGS[head], widths=(32, 32), log_every=2000, lr=1e-3)
    state, _ = CHUNK(INIT(KEY, few, cfg), few, KEY, cfg.log_every, cfg)
    np.testing.assert_allclose(bc.act(state, few.obs), few.action, atol=0.03)


def two_behaviours():
    """40 episodes by turns: action 0.6 earns 1 a step, -0.2 earns nothing; the states are alike."""
    good = np.repeat(np.arange(40) % 2, 5)
    data = episodes(*good.reshape(40, 5))
    obs = np.tile(np.arange(5, dtype=np.float32), 40)[:, None]
    action = np.where(good, 0.6, -0.2).astype(np.float32)[:, None]
    return replace(data, obs=obs, action=action, next_obs=obs)


@pytest.mark.parametrize(("fraction", "answer"), [(1.0, 0.2), (0.5, 0.6)])
def test_bc_is_as_good_as_the_data_and_half_of_it_as_the_better_half(
    fraction, answer, tmp_path, monkeypatch
):
    data = two_behaviours()
    monkeypatch.setattr(datasets, "load", lambda *args: data)
    monkeypatch.setattr(plots, "plot", lambda *args: None)  # slow
    monkeypatch.setattr("sys.argv", ["bc.py"])
    bc.main(
        replace(
            CFG, env="mine", out=str(tmp_path), fraction=fraction, num_updates=600, eval_every=600,
            eval_episodes=0, batch_size=64, lr=3e-3,
        )
    )  # fmt: skip
    (folder,) = tmp_path.glob("bc/mine/*")
    policy = evaluation.load_policy(folder)
    np.testing.assert_allclose(policy(data.obs), np.full((200, 1), answer), atol=0.06)


def test_gaussian_head_learns_mean_and_spread():
    """The likelihood's maximum: mean 0.2, standard deviation 0.4."""
    batch = Batch(*map(jnp.asarray, two_behaviours().transitions()))
    cfg = replace(CONFIGS["gaussian"], batch_size=128, log_every=800, lr=3e-3)
    state, _ = CHUNK(INIT(KEY, batch, cfg), batch, KEY, cfg.log_every, cfg)
    pi = state.actor.apply_fn(state.actor.params, bc.normalise(state, batch.obs))
    np.testing.assert_allclose(pi.mode(), np.full((200, 1), 0.2), atol=0.06)
    np.testing.assert_allclose(pi.stddev(), np.full((200, 1), 0.4), atol=0.03)


# --- Discrete actions ---

CHOICES = replace(CFG, head="categorical")


def chosen(batch):
    """Discrete actions in place of vectors: the largest entry's."""
    return batch._replace(action=jax.nn.one_hot(batch.action.argmax(-1), batch.action.shape[-1]))


def test_a_categorical_step_is_that_of_the_likelihood(batch):
    batch = chosen(random_batch(B, action_dim=3, seed=1))
    fresh = INIT(KEY, batch, CHOICES)
    state = fresh.replace(actor=fresh.actor.replace(params=scramble(fresh.actor.params, 0)))
    new, info = jax.jit(partial(bc.update, cfg=CHOICES))(state, batch, KEY)
    b, params = f64(batch), f64(state.actor.params)

    def loss(params):
        logits = mlp(params["params"]["MLP_0"], b.obs)
        log_pi = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return -np.mean(log_pi[np.arange(B), b.action.argmax(1)])

    np.testing.assert_allclose(info["actor_loss"], loss(params), rtol=2e-5)
    assert_first_adam_step(state.actor, new.actor, gradient(loss, params), CFG.lr)
    logits = mlp(params["params"]["MLP_0"], b.obs)  # of observations that are not normalised
    same = state.replace(obs_mean=jnp.zeros(3), obs_std=jnp.ones(3))
    np.testing.assert_array_equal(bc.act(same, batch.obs), np.eye(3)[logits.argmax(1)])


def test_the_likeliest_action_is_that_of_most_rows():
    """Two of three rows take action 1 where the first observation is positive, else action 0."""
    rng = np.random.default_rng(0)
    obs = rng.choice([-1.0, 1.0], (300, 3))
    action = np.where(np.arange(300) % 3 == 0, 2, obs[:, 0] > 0)
    data = Batch(obs, np.eye(3)[action], np.zeros(300), obs, np.ones(300))
    data = jax.tree.map(jnp.float32, data)
    state = INIT(KEY, data, CHOICES)
    for step in range(CFG.log_every, 501, CFG.log_every):
        state, _ = CHUNK(state, data, KEY, step, CHOICES)
    np.testing.assert_array_equal(bc.act(state, data.obs).argmax(1), obs[:, 0] > 0)


@pytest.mark.parametrize(
    ("head", "action", "message"),
    [
        ("deterministic", [0, 1], "--head deterministic: .*discrete actions.*: use it"),
        ("gaussian", [0, 1], "--head gaussian: .*discrete actions"),
        ("categorical", [[0.0], [1.0]], "--head categorical: .*continuous actions.*another one"),
    ],
)
def test_a_head_for_other_actions_is_refused(head, action, message, tmp_path):
    data = datasets.from_arrays(np.zeros((2, 3)), action, [0, 0], [0, 1], [0, 0])
    cfg = bc.Config(head=head, batch_size=1, eval_episodes=0, out=str(tmp_path))
    with pytest.raises(SystemExit, match=message):
        bc.train(cfg, data)
    assert not list(tmp_path.iterdir())


def test_discrete_actions_train_by_the_command(tmp_path, monkeypatch):
    """On the bundled CartPole, scored in the environment."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = "--env stillwater/cartpole/replay-v0 --head categorical --num-updates 20 --widths 8"
    words += " --eval-episodes 1 --batch-size 8"
    code, out, err = run("bc", *words.split(), "--out", tmp_path)
    assert code == 0, err
    assert "Final score" in out
