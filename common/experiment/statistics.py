"""The statistics of benchmarks/report.py. The score of a seed is its mean over the episodes of an
evaluation; x (K, S) holds those of S seeds on each of K datasets.

Bootstrap: seeds are drawn with replacement within each dataset, the datasets stay ("stratified",
Agarwal et al. 2021, arXiv:2108.13264). The lowest of three seeds is drawn three times in one of 27
resamples, more than 2.5 %: on one dataset the interval of two or three seeds is their range.
The interquartile mean is common/curve.py's, as at the end of a run.
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
