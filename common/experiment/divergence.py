"""Which seeds of a run have diverged, and their last good states."""

import json

import jax
import numpy as np
from flax import serialization

from common import checkpoint
from common.checkpoint import RunError

EXPLODED = 1e3  # a Q-value is, beyond so many times what any episode of the data could earn


class Divergence:
    """The seeds of a run that have diverged: diverged.json in its folder.

    A seed has when a metric of it is not finite, or a Q-value, a metric q_..., has exploded.
    seeds: (S,) int.
    """

    def __init__(self, folder, seeds, data):
        self._folder, self._seeds, self._found = folder, seeds, {}
        self._limit = max(1.0, float(np.abs(data.reward).max() * data.length.max())) * EXPLODED

    def reopen(self, step):
        """Those that had at `step`, from the disk. Raises ValueError, KeyError, ... if damaged."""
        self._found = {seed: x for seed, x in read(self._folder).items() if x["step"] <= step}

    @property
    def gone(self):
        """(S,) bool."""
        return np.isin(self._seeds.astype(str), [*self._found])

    @property
    def messages(self):
        """A sentence for each."""
        return [x["message"] for x in self._found.values()]

    def watch(self, step, metrics, good):
        """A sentence for each seed that has diverged since the last time, to the disk, too.

        metrics: {name: (S,)}; good: step of the last checkpoint, 0: there is none.
        """
        told = len(self._found)
        kept = f"its last good checkpoint is that of step {good:,}"
        for name, x in metrics.items():
            bad = ~np.isfinite(x) | (name.startswith("q_") & (np.abs(x) > self._limit))
            for i in np.flatnonzero(bad & ~self.gone):
                what = f"Seed {self._seeds[i]} has diverged, {name} is {x[i]:.3g} at step {step:,}"
                message = f"{what}: {kept if good else 'it has no good checkpoint'}."
                self._found[str(self._seeds[i])] = {"step": step, "message": message}
        if new := self.messages[told:]:
            path = self._folder / "diverged.json"
            checkpoint.write(path, json.dumps(self._found, indent=1) + "\n")
        return new

    def stop_if_none_is_left(self, new):
        """Raises RunError with the sentences `new` if every seed has diverged."""
        if self.gone.all():
            how = "Smaller learning rates, or a stronger penalty on Q, may help"
            raise RunError("\n".join([*new, f"No seed is left in {self._folder}. {how}."]))

    def mended(self, state):
        """`state`, but of the seeds that have diverged what the last checkpoint has."""
        gone = self.gone
        _, saved = checkpoint.read(self._folder) if gone.any() else (0, None)
        if saved is None:
            return state

        def mend(x, good):
            return np.where(gone.reshape(-1, *[1] * (x.ndim - 1)), good, x)

        return jax.tree.map(mend, serialization.to_state_dict(jax.device_get(state)), saved)


def read(folder):
    """{seed: {"step": ..., "message": ...}} of a run folder."""
    path = folder / "diverged.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}
