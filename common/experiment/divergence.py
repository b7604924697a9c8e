"""The seeds of a run that have diverged, and their last good states."""

import json
import os

import jax
import numpy as np
from flax import serialization

from common.experiment import checkpoint, files
from common.experiment.checkpoint import RunError

EXPLODED = 1e3  # limit of a Q-value, in units of the most that an episode of the data could earn


class Divergence:
    """The seeds of a run that have diverged, kept in its folder's diverged.json.

    A seed has diverged once one of its metrics is not finite or a `q_*` metric exceeds EXPLODED.

    folder: Path. seeds: (S,) int. dataset: the Dataset that is trained on.
    """

    def __init__(self, folder, seeds, dataset):
        self._folder, self._seeds, self._found = folder, seeds, {}
        most = float(np.abs(dataset.reward).max() * dataset.length.max())  # of an episode
        self._limit = max(1.0, most) * EXPLODED

    def reopen(self, step):
        """Reads the seeds that had diverged by `step`. Raises ValueError or KeyError if damaged."""
        self._found = {seed: x for seed, x in read(self._folder).items() if x["step"] <= step}

    @property
    def diverged(self):
        """(S,) bool: the seeds that have diverged."""
        return np.isin(self._seeds.astype(str), [*self._found])

    @property
    def messages(self):
        """A sentence about each diverged seed."""
        return [x["message"] for x in self._found.values()]

    def watch(self, step, metrics, good):
        """Finds seeds that have diverged since the last call; sentences about them, kept on disk.

        metrics: {name: (S,)}. good: step of the last checkpoint, 0 if there is none.
        """
        told = len(self._found)
        kept = f"Its last good checkpoint is from step {good:,}."
        for name, x in metrics.items():
            bad = ~np.isfinite(x) | (name.startswith("q_") & (np.abs(x) > self._limit))
            for i in np.flatnonzero(bad & ~self.diverged):
                what = f"Seed {self._seeds[i]} has diverged: {name} is {x[i]:.3g} at step {step:,}."
                message = f"{what} {kept if good else 'It has no good checkpoint.'}"
                self._found[str(self._seeds[i])] = {"step": step, "message": message}
        if new := self.messages[told:]:
            path = self._folder / "diverged.json"
            files.write(path, json.dumps(self._found, indent=1) + "\n")
        return new

    def stop_if_all(self, new):
        """Raises RunError with the sentences `new` if every seed has diverged."""
        if self.diverged.all():
            how = "A smaller learning rate or a stronger penalty on Q may help."
            raise RunError("\n".join([*new, f"No seed is left in {self._folder}. {how}"]))

    def with_last_good(self, state):
        """`state`, with the last checkpoint's values for the seeds that have diverged."""
        diverged = self.diverged
        _, saved = checkpoint.read(self._folder) if diverged.any() else (0, None)
        if saved is None:
            return state

        def replace(x, good):
            return np.where(diverged.reshape(-1, *[1] * (x.ndim - 1)), good, x)

        return jax.tree.map(replace, serialization.to_state_dict(jax.device_get(state)), saved)


def read(folder):
    """{seed: {"step": ..., "message": ...}} of the diverged seeds in a run folder.

    Raises OSError, and ValueError for damaged content.
    """
    path = folder / "diverged.json"
    found = files.read_json(path) if os.path.lexists(path) else {}
    try:
        pairs = {seed: (int(x["step"]), str(x["message"])) for seed, x in found.items()}
    except (LookupError, TypeError, OverflowError):
        raise ValueError("diverged.json: a seed has no step or no message") from None
    return {seed: {"step": step, "message": message} for seed, (step, message) in pairs.items()}
