"""Statistics over seeds and episodes: bootstrap intervals, IQM, performance profiles.

The score of a seed is the mean over the episodes of an evaluation. Scores of S seeds on K datasets
are arrays (K, S). The bootstrap draws seeds with replacement within each dataset ("stratified",
Agarwal et al. 2021, arXiv:2108.13264). With three seeds on one dataset, one resample in 27 (3.7 %)
holds the lowest seed three times; so a 95 % interval of two or three seeds is their range.
"""

import numpy as np


def resamples(x, size=2000):
    """`size` bootstrap resamples of x (K, S): (size, K, S)."""
    drawn = np.random.default_rng(0).integers(x.shape[1], size=(size, *x.shape))
    return np.take_along_axis(x[None], drawn, 2)


def interval(x, statistic=np.mean, size=2000):
    """(low, high): 95 % percentile bootstrap interval of `statistic` of x (K, S)."""
    return np.percentile([statistic(y) for y in resamples(x, size)], [2.5, 97.5])


def of_seeds(x):
    """Scores (1, S) of the seeds in x (S, E), E episodes on one dataset.

    With one seed the episodes take the place of the seeds: (1, E).
    """
    return x.mean(1)[None] if len(x) > 1 else x


def iqm(x):
    """Interquartile mean: the mean of the middle half of all values."""
    x = np.sort(x, axis=None)
    return x[x.size // 4 : x.size - x.size // 4].mean()


def summary(x):
    """Mean, IQM and interval of x (S, E), E episodes of S seeds, in words."""
    (low, high), (s, e) = interval(of_seeds(x)), x.shape
    parts = f"IQM {iqm(of_seeds(x)):.1f}, 95 % interval {low:.1f} to {high:.1f}"
    return f"{x.mean():.1f} ({parts}, {s} seed{'s' * (s > 1)} x {e} episode{'s' * (e > 1)})"


def profile(x, tau):
    """Share (T,) of the runs in x (..., K, S) with a score above tau (T,)."""
    return (x[..., None] > tau).mean((-3, -2))


def profile_band(x, tau, size=2000):
    """95 % bootstrap interval (2, T) of the profile at tau (T,)."""
    return np.percentile(profile(resamples(x, size), tau), [2.5, 97.5], axis=0)


def time_to(level, steps, scores):
    """The first of steps (T,) after which scores (T,) stay at `level` or above, or None."""
    below = np.flatnonzero(~(np.asarray(scores) >= level))  # nan is below
    first = below[-1] + 1 if below.size else 0
    return steps[first] if first < len(steps) else None
