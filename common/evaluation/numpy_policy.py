"""A policy that Stillwater exported as arrays, for NumPy alone: no JAX, nothing else of Stillwater.

    python -m common.evaluation runs/iql/... --export policy.npz    # writes this file beside it

    from numpy_policy import NumpyPolicy
    policy = NumpyPolicy("policy.npz")
    action = policy(obs)  # obs (..., D) -> action (..., A) in the environment's own units

The policy is a multilayer perceptron with ReLU on standardised observations; the action is the tanh
of its first A outputs.
"""

import numpy as np


class NumpyPolicy:
    """Reads the file once; calls are plain matrix products."""

    def __init__(self, path):
        with np.load(path, allow_pickle=False) as arrays:
            self.arrays = {name: arrays[name] for name in arrays.files}
        self.depth = sum(name.startswith("kernel_") for name in self.arrays)

    def __call__(self, obs):
        """obs (..., D) -> action (..., A) between the environment's bounds."""
        a = self.arrays
        x = (np.asarray(obs, np.float32) - a["obs_mean"]) / a["obs_std"]
        for i in range(self.depth):
            x = x @ a[f"kernel_{i}"].T + a[f"bias_{i}"]  # kernels are (out, in)
            x = np.maximum(x, 0) if i < self.depth - 1 else x
        unit = np.tanh(x[..., : len(a["low"])]).clip(-1, 1)
        return a["low"] + (unit + 1) / 2 * (a["high"] - a["low"])
