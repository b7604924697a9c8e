"""What models of sequences read: Dataset.steps by hand, and windows that never leave an episode."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import datasets

# --- Steps ---

# Three episodes, ended by time after three rows, by a terminal after two, by a terminal at once.
REWARD = [1.0, 2.0, 4.0, 3.0, -1.0, 5.0]
DONE = [0, 0, 0, 0, 1, 1]
LENGTH = [3, 2, 1]


def dataset(reward, done, length):
    rng, n = np.random.default_rng(0), len(reward)
    obs, next_obs = rng.normal(size=(2, n, 3)).astype(np.float32)
    action = rng.uniform(-1, 1, (n, 2)).astype(np.float32)
    length = np.array(length, np.int64)
    arrays = obs, action, np.float32(reward), next_obs, np.float32(done), length.cumsum() - length
    return datasets.Dataset("mine", "", *arrays, length, None, None, {})


@pytest.fixture(scope="module")
def data():
    return dataset(REWARD, DONE, LENGTH)


def test_steps_by_hand(data):
    steps = data.steps()
    for name in ("obs", "action", "reward", "done"):
        assert getattr(steps, name) is getattr(data, name)
    assert steps.time.tolist() == [0, 1, 2, 0, 1, 0]
    assert steps.end.tolist() == [3, 3, 3, 5, 5, 6]
    assert steps.returns_to_go.tolist() == [7, 6, 4, 2, -1, 5]
    assert steps.time.dtype == steps.end.dtype == np.int32
    assert steps.returns_to_go.dtype == np.float32
    np.testing.assert_array_equal(steps.returns_to_go[data.start], data.returns())


def test_returns_to_go_are_discounted_from_each_row_on(data):
    returns_to_go = data.steps(gamma=0.5).returns_to_go
    assert returns_to_go.tolist() == [1 + 0.5 * 2 + 0.25 * 4, 2 + 0.5 * 4, 4, 3 - 0.5, -1, 5]
    assert data.steps(gamma=0.0).returns_to_go.tolist() == REWARD


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_at_end_counts_at_true_terminals_alone(data, gamma):
    """Not at the time limit of the first episode; the reward itself stays."""
    steps, plain = data.steps(gamma, at_end=-100.0), data.steps(gamma)
    gap = steps.returns_to_go - plain.returns_to_go
    np.testing.assert_allclose(gap, [0, 0, 0, -100 * gamma, -100, -100], rtol=1e-6)
    assert steps.reward.tolist() == data.reward.tolist() == REWARD


@pytest.mark.parametrize("gamma", [1.0, 0.99])
def test_returns_to_go_are_summed_in_float64(gamma):
    """Of a long episode, whose running sum in float32 goes astray; episodes of all lengths."""
    rng = np.random.default_rng(0)
    length = [1, 20_000, 7, 1, 300]
    reward = rng.uniform(0, 1, sum(length)).astype(np.float32)
    reward[1] += 3e5  # counted last
    reward[20_000] += 1e6  # counted first
    data = dataset(reward, np.zeros(len(reward)), length)
    expected = []
    for first, n in zip(data.start, length, strict=True):
        total, backwards = 0.0, []
        for r in reversed(reward[first : first + n].astype(np.float64)):
            total = r + gamma * total
            backwards.append(total)
        expected += backwards[::-1]
    np.testing.assert_array_equal(data.steps(gamma).returns_to_go, np.float32(expected))


# --- Windows ---

END = jnp.array([5, 5, 5, 5, 5, 7, 7, 8])  # rows 0 to 4, 5 and 6, 7
WINDOWS = jax.jit(datasets.windows, static_argnums=(2, 3))
T, F = True, False


@pytest.mark.parametrize(
    ("row", "index", "mask", "left_index", "left_mask"),
    [
        (0, [0, 1, 2], [T, T, T], [0, 1, 2], [T, T, T]),  # the episode's start
        (1, [1, 2, 3], [T, T, T], [1, 2, 3], [T, T, T]),
        (2, [2, 3, 4], [T, T, T], [2, 3, 4], [T, T, T]),  # the last whole window
        (3, [3, 4, 4], [T, T, F], [3, 3, 4], [F, T, T]),  # what follows is of another episode
        (4, [4, 4, 4], [T, F, F], [4, 4, 4], [F, F, T]),
        (5, [5, 6, 6], [T, T, F], [5, 5, 6], [F, T, T]),  # an episode shorter than the window
        (7, [7, 7, 7], [T, F, F], [7, 7, 7], [F, F, T]),  # the last row of all
    ],
)
def test_windows_by_hand(row, index, mask, left_index, left_mask):
    for left, expected in ((False, (index, mask)), (True, (left_index, left_mask))):
        for cut in (WINDOWS, datasets.windows):
            assert tuple(x.tolist() for x in cut(row, END, 3, left)) == expected


@pytest.mark.parametrize("left", [False, True])
def test_a_window_of_one_step_is_its_row(left):
    rows = np.arange(8)
    index, mask = WINDOWS(rows, END, 1, left)
    assert index.tolist() == rows[:, None].tolist() and mask.all()


@pytest.mark.parametrize("left", [False, True])
def test_windows_for_rows_of_any_shape(left):
    rows = np.array([[0, 3, 4], [5, 6, 7]])
    index, mask = WINDOWS(rows, END, 4, left)
    chex.assert_shape([index, mask], (2, 3, 4))
    assert index.dtype == jnp.int32 and mask.dtype == bool
    for i in np.ndindex(2, 3):
        alone = WINDOWS(rows[i], END, 4, left)
        chex.assert_trees_all_equal((index[i], mask[i]), alone)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("size", [1, 2, 5, 30])  # 30: longer than every episode
def test_windows_of_random_episodes_hold_what_follows_their_row_and_no_more(size, left):
    rng = np.random.default_rng(size)
    length = rng.integers(1, 12, 60)
    n = length.sum()
    data = dataset(rng.normal(size=n), np.zeros(n), length)
    steps, episode = data.steps(), np.repeat(np.arange(60), length)
    index, mask = map(np.asarray, WINDOWS(np.arange(n), steps.end, size, left))
    assert index.min() >= 0 and index.max() < n  # padding, too, is a row of the data,
    assert np.all(episode[index] == episode[:, None])  # and of the same episode
    for row in range(n):
        own = index[row][mask[row]]
        kept = min(size, steps.end[row] - row)
        assert own.tolist() == list(range(row, row + kept))
        padded = [F] * (size - kept)
        assert mask[row].tolist() == (padded + [T] * kept if left else [T] * kept + padded)
        nearest = row if left else row + kept - 1
        assert np.all(index[row][~mask[row]] == nearest)
        assert steps.time[own].tolist() == list(range(steps.time[row], steps.time[row] + kept))
