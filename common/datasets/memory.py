"""Arrays in memory, checked by the code that checks files."""

import hashlib

import numpy as np

from common.datasets.checked import CheckedFile, DatasetError

FIELDS = {  # D4RL's name of a field: the argument of datasets.from_arrays
    "observations": "obs",
    "actions": "action",
    "rewards": "reward",
    "terminals": "done",
    "timeouts": "timeout",
    "next_observations": "next_obs",
}


class Arrays(CheckedFile):
    """Arrays in place of a file. fields: {argument of datasets.from_arrays: array or None}."""

    def __init__(self, name, fields):
        self.path, self.notes, self.ordered, self._arrays = name, [], True, {}
        self.parts = ""
        for stored, argument in FIELDS.items():
            if fields.get(argument) is not None:
                try:
                    self._arrays[stored] = np.asarray(fields[argument])
                except ValueError as error:  # lists of unequal length
                    raise self.refusal(stored, str(error)) from None

    def sha256(self):
        """The SHA-256 of names, shapes, dtypes and values; a resumed run compares it."""
        digest = hashlib.sha256()
        for name, x in self._arrays.items():
            digest.update(f"{name} {x.dtype.str} {x.shape} ".encode())
            digest.update(x.tobytes())
        return digest.hexdigest()

    def refusal(self, field, why):
        return DatasetError(f"{self.path}: {FIELDS.get(field, field)}: {why}")

    def item(self, field):
        return self._arrays.get(field)

    def stored(self, field, ndim):
        x = self.item(field)
        if not isinstance(x, np.ndarray):
            raise self.refusal(field, "missing" if x is None else "a dict, not an array")
        return x[:, 0] if self.is_column(field, x, ndim) else x

    def same_length(self, sizes):
        super().same_length({FIELDS.get(field, field): size for field, size in sizes.items()})

    def close(self):
        """Nothing is open."""
