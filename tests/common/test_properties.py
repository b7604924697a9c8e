"""Properties of every input, which hypothesis tries to break; it tries the same each time."""

import collections
import os
import tempfile
from pathlib import Path

import combo
import h5py
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import datasets
from common.datasets import Batch, checked, loading, readers

# Derandomised: the same in each run. No deadline: the first example compiles.
steady = settings(deadline=None, derandomize=True, database=None, max_examples=100,
                  suppress_health_check=list(HealthCheck))  # fmt: skip
small = st.integers(-5, 5)


# --- Episodes ---


@st.composite
def files(draw):
    """Rows of a file in D4RL's layout, obs = (row, noise), with any pattern of ends and seams."""
    n = draw(st.integers(1, 30))
    flags = st.lists(st.booleans(), min_size=n, max_size=n)
    fields = {
        "observations": np.stack([np.arange(n), draw(st.integers(0, 9)) * np.ones(n)], 1),
        "actions": np.zeros((n, 1)),
        "rewards": np.array(draw(st.lists(small, min_size=n, max_size=n)), np.float32),
        "terminals": np.array(draw(flags)),
    }
    seams = np.array(draw(flags)) & draw(st.booleans())  # ends that nothing but next_obs tells
    if draw(st.booleans()):
        fields["timeouts"] = np.array(draw(flags))
    if draw(st.booleans()) or "timeouts" not in fields:
        following = fields["observations"] + [1, 0]
        fields["next_observations"] = following + 100 * seams[:, None]
    else:
        seams[:] = False
    return fields, seams


def read(fields):
    """What datasets.load makes of the file: (its arrays, or the message of the refusal)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.hdf5")
        with h5py.File(path, "w") as file:
            for name, values in fields.items():
                file[name] = values
        try:
            rows = readers.read_d4rl(checked.CheckedFile(path), readers.Env())
        except datasets.DatasetError as error:
            return str(error).replace(folder, ""), None
        return loading.flatten(rows, readers.Env())


@steady
@given(files())
def test_episodes_partition_the_rows_that_are_kept(drawn):
    """Whatever ends where: each row is of one episode, none crosses, done is a true terminal."""
    fields, seams = drawn
    arrays, dropped = read(fields)
    n, terminal = len(fields["rewards"]), fields["terminals"]
    end = terminal | seams | fields.get("timeouts", False)
    end[-1] = True
    told = "next_observations" in fields
    kept = np.flatnonzero(np.ones(n, bool) if told else ~end | terminal)  # else: next_obs unknown
    assert dropped == n - len(kept)

    start, length = arrays["start"], arrays["length"]
    assert (length > 0).all() and length.sum() == len(kept)
    assert start.tolist() == (np.cumsum(length) - length).tolist()
    assert arrays["obs"][:, 0].tolist() == kept.tolist()
    assert arrays["done"].tolist() == terminal[kept].tolist()

    episode = np.repeat(np.arange(len(start)), length)
    of_file = np.cumsum(np.r_[0, end[:-1]])[kept]  # the file's own episodes, some now empty
    assert episode.tolist() == np.unique(of_file, return_inverse=True)[1].tolist()
    last = np.zeros(len(kept), bool)
    last[start + length - 1] = True
    assert not arrays["done"][~last].any()

    following = arrays["next_obs"][:, 0]
    for i, row in enumerate(kept):
        if told:
            assert following[i] == row + 1 + 100 * seams[row]
        else:  # a terminal stands in itself, and no other row is of another episode
            assert following[i] == (row if terminal[row] else row + 1)
            assert terminal[row] or not end[row]
    returns = datasets.Dataset(
        "", "", **arrays, ref_min=None, ref_max=None, provenance={}
    ).returns()
    assert returns.sum() == fields["rewards"][kept].sum()
    for i, (a, b) in enumerate(zip(start, start + length, strict=True)):
        assert returns[i] == fields["rewards"][kept[a:b]].sum()


# --- Windows ---

WINDOWS = jax.jit(datasets.windows, static_argnums=(2, 3))
SIZES = (1, 2, 5, 9)  # compiled once each: 40 rows, padded by episodes of one step


@steady
@given(st.lists(st.integers(1, 8), min_size=1, max_size=5), st.sampled_from(SIZES), st.booleans())
def test_windows_are_the_steps_that_follow_in_the_episode(lengths, size, left):
    lengths = lengths + [1] * (40 - sum(lengths))
    first, index, mask = 0, *map(np.asarray, WINDOWS(np.arange(40), ends(lengths), size, left))
    for length in lengths:
        for row in range(first, first + length):
            steps = list(range(row, first + length))[:size]  # what a list would do
            padding = size - len(steps)
            whole = [steps[0]] * padding + steps if left else steps + [steps[-1]] * padding
            assert index[row].tolist() == whole
            real = [False] * padding + [True] * len(steps)
            assert mask[row].tolist() == (real if left else real[::-1])
        first += length


def ends(lengths):
    return np.repeat(np.cumsum(lengths), lengths).astype(np.int32)


# --- COMBO's ring ---

PUSH, CAPACITY, SIZE = jax.jit(combo.add), 7, 5


@steady
@given(st.lists(st.lists(st.booleans(), min_size=SIZE, max_size=SIZE), max_size=8))
def test_the_ring_holds_what_a_deque_would(pushes):
    """The last rows kept, in their order from the oldest; what was never written is not sampled."""
    poison = Batch(*(jnp.full((CAPACITY, *x), jnp.nan) for x in ((2,), (1,), (), (2,), ())))
    ring, held = combo.ReplayBuffer(poison, jnp.zeros((), int)), collections.deque(maxlen=CAPACITY)
    for i, keep in enumerate(pushes):
        ids = np.arange(SIZE, dtype=np.float32) + i * SIZE + 1
        pair = np.stack([ids, -ids], 1)
        ring = PUSH(ring, Batch(pair, ids[:, None], ids, pair, ids), np.array(keep))
        held.extend(ids[keep])
        filled, total = int(ring.filled), int(ring.total)
        assert filled == len(held) and total == sum(map(sum, pushes[: i + 1]))
        oldest = total % CAPACITY if filled == CAPACITY else 0
        order = (oldest + np.arange(filled)) % CAPACITY
        assert np.asarray(ring.rows.reward)[order].tolist() == list(held)
        rows = Batch(*(np.asarray(x)[:filled] for x in ring.rows))  # rows 0 to filled are sampled
        assert all(np.isfinite(x).all() for x in rows)
        ids = rows.reward.tolist()  # a row stays together
        assert rows.obs[:, 0].tolist() == rows.next_obs[:, 0].tolist() == ids
        assert rows.action[:, 0].tolist() == (-rows.obs[:, 1]).tolist() == rows.done.tolist() == ids


# --- Scores ---

number = st.floats(-1e6, 1e6)


@steady
@given(number, st.floats(1e-3, 1e6), st.lists(number, min_size=1, max_size=9), st.floats(0, 1))
def test_scores_are_affine(low, span, returns, share):
    """0 and 100 at the references, in between in proportion, and they can be taken back."""
    high = low + span
    data = datasets.Dataset(*["", ""], *[np.zeros(1)] * 7, low, high, {})
    assert data.score(low) == 0 and abs(data.score(high) - 100) < 1e-12
    scale, score = 100 / (high - low), data.score(np.array(returns))
    rounding = 1e-9 * (1 + scale)  # the last digits of a return
    assert abs(data.score(low + share * span) - 100 * share) <= rounding
    assert score.shape == (len(returns),) and score.dtype == np.float64
    np.testing.assert_allclose(low + score / scale, returns, rtol=1e-9, atol=1e-6)
    assert (np.diff(score[np.argsort(returns)]) >= 0).all()
    assert np.isnan(datasets.Dataset("", "", *[np.zeros(1)] * 7, None, None, {}).score(low))


def test_the_examples_are_always_the_same():
    assert steady.derandomize and steady.deadline is None
    assert "HYPOTHESIS_PROFILE" not in os.environ
