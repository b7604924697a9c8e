"""Statistics over seeds and episodes. A seed's score is the mean over its evaluation's episodes.

Scores of S seeds on K datasets are arrays (K, S). The bootstrap draws seeds with replacement within
each dataset ("stratified", Agarwal et al. 2021, arXiv:2108.13264). The lowest of three seeds is
drawn three times in one of 27 resamples, more than 2.5 %: on one dataset the interval of two or
three seeds is their range.
"""

import numpy as np


def resamples(x, size=2000):
    """(size, K, S): x with its seeds drawn anew."""
    drawn = np.random.default_rng(0).integers(x.shape[1], size=(size, *x.shape))
    return np.take_along_axis(x[None], drawn, 2)


def interval(x, statistic=np.mean, size=2000):
    """(low, high): 95 % percentile bootstrap interval of `statistic` of x (K, S)."""
    return np.percentile([statistic(y) for y in resamples(x, size)], [2.5, 97.5])


def of_seeds(x):
    """(1, S) for the above, of x (S, E) on one dataset; of one seed its episodes, (1, E)."""
    return x.mean(1)[None] if len(x) > 1 else x


def iqm(x):
    """Interquartile mean: of the middle half of all values."""
    x = np.sort(x, axis=None)
    return x[x.size // 4 : x.size - x.size // 4].mean()


def summary(x):
    """Words for the outcomes x (S, E) of E episodes of S seeds."""
    (low, high), (s, e) = interval(of_seeds(x)), x.shape
    parts = f"IQM {iqm(of_seeds(x)):.1f}, 95 % interval {low:.1f} to {high:.1f}"
    return f"{x.mean():.1f} ({parts}, {s} seed{'s' * (s > 1)} x {e} episode{'s' * (e > 1)})"


def profile(x, tau):
    """(T,) shares of all runs in x (..., K, S) whose score is above each of tau (T,)."""
    return (x[..., None] > tau).mean((-3, -2))


def profile_band(x, tau, size=2000):
    """(2, T): 95 % bootstrap interval of the profile at each of tau."""
    return np.percentile(profile(resamples(x, size), tau), [2.5, 97.5], axis=0)


def time_to(level, steps, scores):
    """The first of steps (T,) from which on scores (T,) stay at `level` or above; None: never."""
    below = np.flatnonzero(~(np.asarray(scores) >= level))  # nan is below
    first = below[-1] + 1 if below.size else 0
    return steps[first] if first < len(steps) else None
