"""Offline datasets as flat arrays: D4RL names, Minari ids, HDF5 files.

    dataset = datasets.load("halfcheetah-medium-v2")  # or "mujoco/hopper/medium-v0", or "my.hdf5"
    dataset = datasets.from_arrays(obs, action, reward, done, timeout)  # or arrays in memory
    dataset = datasets.load(["hopper-medium-v2", "hopper-expert-v2"])  # or several, joined
    data = dataset.transitions()  # a Batch; for sequence models: dataset.steps() and windows

This command shows what is in a dataset:

    python -m common.datasets NAME [--env-id Hopper-v5] [--plot FILE.png]

Loaded arrays are kept in $XDG_CACHE_HOME/stillwater or ~/.cache/stillwater, safe to delete.
"""

from common.datasets.checked import CheckedFile, DatasetError
from common.datasets.d4rl import REFERENCE, Source
from common.datasets.dataset import Batch, Dataset, Steps, windows
from common.datasets.loading import from_arrays, infos, join, load, read

__all__ = [
    "REFERENCE",
    "Batch",
    "CheckedFile",
    "Dataset",
    "DatasetError",
    "Source",
    "Steps",
    "from_arrays",
    "infos",
    "join",
    "load",
    "read",
    "windows",
]
