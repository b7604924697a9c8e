"""Checked arrays of an HDF5 file that nobody vouches for.

Only numbers stored in the file itself are read: no pickles, no links, no code. Declared sizes are
compared with the size of the file before memory is allocated.
"""

import contextlib
import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np

from common import experiment
from common.datasets import hdf5
from common.experiment import runtime

MAGIC = b"\x89HDF\r\n\x1a\n"  # first bytes of an HDF5 file
MEMORY = 16 * 2**30  # bytes that the arrays of one file may take
COPIES = 4  # of these arrays exist while episodes are made
DEFLATE = 1100  # the best compression ratio of gzip, about
MOST_ACTIONS = 1024  # discrete ones
IMAGE = 4096  # numbers in an image that is read as a vector, at most
REMEDY = "Encode them as columns (N, D) and call datasets.from_arrays"


class DatasetError(experiment.UserError):
    """A dataset that cannot be found or read."""


class CheckedFile:
    """An open HDF5 file; whatever is wrong raises a DatasetError that names file, field and row."""

    def __init__(self, path: Path):
        self.path, self.left = path, min(MEMORY, runtime.free_memory() // COPIES)
        self.notes, self.ordered, self.parts = [], True, ""
        try:
            self.bytes = path.stat().st_size
            check_magic(path, self.bytes)
            self.file = h5py.File(path, "r", locking=False)
        except Exception as error:  # h5py raises many kinds for a damaged file, here and below
            raise DatasetError(f"{path}: cannot be opened: {error}") from None

    def close(self):
        """Closes the file."""
        self.file.close()

    def sha256(self):
        """The SHA-256 of the file, in hexadecimal."""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def refusal(self, field, why):
        """The DatasetError for a field."""
        return DatasetError(f"{self.path}: {field}: {why}")

    def missing(self):
        """The message for a missing field, with the names that the file has."""
        with contextlib.suppress(Exception):
            names = [name for name, _ in zip(self.file, range(8), strict=False)]
            return f"missing; the file has {', '.join(names) or 'nothing'}"
        return "missing"

    def episodes(self):
        """Names of Minari's episodes, groups at the top of the file, in order."""
        try:
            names = [name for name in self.file if re.fullmatch(r"episode_\d+", name, re.ASCII)]
        except Exception as error:
            raise self.refusal("episodes", f"cannot be listed: {error}") from None
        return sorted(names, key=lambda name: (len(name), name))

    def item(self, field):
        """The group or array at `field`, or None; links are refused."""
        here = self.file
        try:
            for name in field.split("/"):
                link = here.get(name, getlink=True) if isinstance(here, h5py.Group) else None
                if link is None:
                    return None
                if not isinstance(link, h5py.HardLink):
                    kind = "an external" if isinstance(link, h5py.ExternalLink) else "a soft"
                    raise self.refusal(field, f"is {kind} link, which is not followed")
                here = here[name]
        except Exception as error:
            raise self.refusal(field, f"cannot be read: {error}") from None
        return here

    def is_column(self, field, item, ndim):
        """Whether `item` is a column (N, 1) of numbers where (N,) is asked for.

        Refuses what is not an array of numbers with `ndim` axes.
        """
        kind, shape = item.dtype, item.shape
        if kind.kind not in "fiub":
            raise self.refusal(field, f"holds {kind} values, not numbers")
        if ndim == 1 and shape is not None and len(shape) == 2 and shape[1] == 1:
            return True
        if ndim > 2 and shape is not None and math.prod(shape[1:]) > IMAGE:
            raise self.refusal(field, wrong_shape(shape, kind, 2))
        if shape is None or len(shape) != ndim or 0 in shape[1:]:
            raise self.refusal(field, wrong_shape(shape, kind, ndim))
        return False

    def stored(self, field, ndim):
        """Numbers at `field`, of their own dtype, `ndim` axes; only the first may have length 0."""
        item = self.item(field)
        if not isinstance(item, h5py.Dataset):
            raise self.refusal(field, self.missing() if item is None else "a group, not an array")
        try:
            if item.is_virtual or item.external:
                raise self.refusal(field, "its data are in other files, which are not opened")
            is_column = self.is_column(field, item, ndim)
            size = math.prod(item.shape)
            need = item.dtype.itemsize * max(size, math.prod(item.chunks or (1,)))
            if need > DEFLATE * self.bytes + 2**16 or need > self.left:
                raise self.refusal(
                    field,
                    f"declares {size:,} values, {need:,} bytes, in a file of {self.bytes:,}; "
                    f"this machine has memory for {self.left:,}",
                )
            self.left -= need
            values = hdf5.array(self.path, item)
            return values[:, 0] if is_column else values
        except hdf5.NotStored as error:
            raise self.refusal(field, str(error)) from None
        except Exception as error:
            raise self.refusal(field, f"cannot be read: {error}") from None

    def array(self, field, ndim):
        """The numbers at `field` as float32, all finite."""
        raw = self.stored(field, ndim)
        with np.errstate(over="ignore", invalid="ignore"):  # too large for float32 becomes inf
            values = raw.astype(np.float32, copy=False)
        finite = np.isfinite(values)
        if not finite.all():
            row, *column = np.argwhere(~finite)[0]
            where = f"row {row}" + (f", column {column[0]}" if column else "")
            raise self.refusal(field, f"{where}: {raw[(row, *column)]} is not a finite float32")
        return values

    def flags(self, field):
        """(N,) bool, from booleans or the numbers 0 and 1."""
        values = self.array(field, 1)
        wrong = np.flatnonzero((values != 0) & (values != 1))
        if wrong.size:
            raise self.refusal(field, f"row {wrong[0]}: {values[wrong[0]]} is neither 0 nor 1")
        return values > 0

    def obs(self, field, env):
        """Observations (N, D). A dict of a goal environment gives `observation` and `desired_goal`.

        If `observation` lacks the position, as in AntMaze, `achieved_goal` comes first. Another
        dict gives its vectors in the order of their names. A small image gives its numbers in the
        order of its axes. `parts` says in words what was done.
        """
        group = self.item(field)
        try:
            names = sorted(group) if isinstance(group, Mapping) else None
        except Exception as error:
            raise self.refusal(field, f"cannot be listed: {error}") from None
        if names is None:
            shape = getattr(group, "shape", None) or ()
            values = self.array(field, max(len(shape), 2))
            if values.ndim > 2:
                self.parts = f"{' x '.join(map(str, shape[1:]))} numbers in the order of their axes"
                values = values.reshape(len(values), -1)
        else:
            parts = {name: self.array(f"{field}/{name}", 2) for name in names}
            if len(set(map(len, parts.values()))) != 1:
                raise self.refusal(field, "its parts differ in length, or there are none")
            names = order(parts)
            self.parts = ", then ".join(names)
            values = np.concatenate([parts[name] for name in names], 1)
        if (values.shape[1], env.obs_dim) == (111, 27) and not values[:, 27:].any():
            values = values[:, :27]  # D4RL's Ant has contact forces, all zero; v4 has none
        if env.obs_dim and values.shape[1] != env.obs_dim:
            raise self.refusal(
                field, f"{values.shape[1]} columns where {env.env_id} has {env.obs_dim}"
            )
        return values

    def actions(self, field, env):
        """Actions (N, A) within the environment's bounds up to rounding, or discrete ones (N,).

        Without an environment, whole numbers (N,) are discrete actions.
        """
        kind, shape = (getattr(self.item(field), name, None) for name in ("dtype", "shape"))
        is_list = shape is not None and len(shape) == 1 and kind.kind in "iub"
        if env.num_actions or (is_list and not env.env_id):
            return self.choices(field, env)
        values = self.array(field, 2)
        if env.env_id and values.shape[1:] != env.low.shape:
            raise self.refusal(
                field, f"{values.shape[1]} columns, not {env.env_id}'s {len(env.low)}"
            )
        if env.clip:
            return values.clip(env.low, env.high)
        slack = 1e-5 * (env.high - env.low)
        wrong = np.argwhere((values < env.low - slack) | (values > env.high + slack))
        if wrong.size:
            row, column = wrong[0]
            low, high = (np.broadcast_to(x, values.shape[1])[column] for x in (env.low, env.high))
            raise self.refusal(
                field,
                f"row {row}, column {column}: {values[row, column]:.7g} is not within the action's "
                f"bounds {low:g} and {high:g}" + (f" of {env.env_id}" if env.env_id else ""),
            )
        return values

    def choices(self, field, env):
        """Discrete actions (N,) int32, from 0 to one less than their number."""
        values = self.array(field, 1)
        count = env.num_actions or min(int(values.max(initial=0)) + 1, MOST_ACTIONS)
        wrong = np.flatnonzero((values != np.floor(values)) | (values < 0) | (values >= count))
        if wrong.size:
            where = f" of {env.env_id}" if env.env_id else ""
            why = f"is not one of the actions 0 to {count - 1}{where}"
            raise self.refusal(field, f"row {wrong[0]}: {values[wrong[0]]:g} {why}")
        return values.astype(np.int32)

    def warn(self, notes, ordered=True):
        """Keeps notes for the user, and whether the rows are in the order of their recording."""
        self.notes += notes
        self.ordered &= ordered

    def same_length(self, sizes):
        """Refuses fields of unequal length. sizes: {field: rows}."""
        if len(set(sizes.values())) > 1:
            rows = ", ".join(f"{field} {size:,}" for field, size in sizes.items())
            raise DatasetError(f"{self.path}: numbers of rows differ: {rows}")


def order(parts):
    """The names of a dict of observations that make one array, in their order.

    parts: {name: (N, d)} in the order of names.
    """
    if parts.keys() == {"achieved_goal", "observation", "desired_goal"}:
        place, _, seen = parts.values()
        located = np.array_equal(seen[:, : place.shape[1]], place)
        return ["achieved_goal"] * (not located) + ["observation", "desired_goal"]
    return list(parts)


def check_magic(path, size):
    """Raises ValueError unless a file of `size` bytes has MAGIC, if need be after a user block."""
    with open(path, "rb") as file:
        for start in (0, *(2**k for k in range(9, size.bit_length()))):
            file.seek(start)
            if file.read(8) == MAGIC:
                return
        file.seek(0)
        raise ValueError(f"not an HDF5 file (it begins with {file.read(8)!r})")


def wrong_shape(shape, dtype, ndim):
    """The message for an array that does not have `ndim` axes."""
    if ndim == 2 and shape is not None and len(shape) == 1 and dtype.kind in "iub":
        why = "discrete values where vectors are needed"
        return f"has shape {shape} and whole numbers: {why}. {REMEDY}, one column a value"
    if ndim == 2 and shape is not None and len(shape) > 2:
        why = f"images of more than {IMAGE:,} numbers, but the algorithms here take vectors"
        return f"has shape {shape}: {why}. {REMEDY}"
    return f"has shape {shape}, needs {ndim} axes"
