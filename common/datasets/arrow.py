"""Minari datasets in its arrow and parquet formats, a folder for each episode; needs pyarrow."""

import hashlib

from common.datasets.checked import COPIES, MEMORY, DatasetError
from common.datasets.memory import Arrays
from common.experiment import files, runtime

SUFFIXES = (".arrow", ".parquet")


def paths(folder):
    """The files below a folder that hold arrays, in order; no links."""
    found = [path for path in folder.rglob("*") if path.suffix in SUFFIXES]
    return sorted(path for path in found if path.is_file() and not path.is_symlink())


class ArrowFolder(Arrays):
    """The `data` folder of a Minari dataset in place of an HDF5 file."""

    def __init__(self, path):
        super().__init__(path, {})
        self.left, self._episode = min(MEMORY, runtime.free_memory() // COPIES), ""
        try:
            import pyarrow.dataset

            self._open = pyarrow.dataset.dataset
        except ImportError:
            why = "a Minari dataset in its arrow or parquet format needs a package"
            raise DatasetError(f"{path}: {why}: pip install pyarrow") from None

    def sha256(self):
        """The SHA-256 of the names and contents of its files."""
        digest = hashlib.sha256()
        for path in paths(self.path):
            with open(path, "rb") as file:
                digest.update(path.relative_to(self.path).as_posix().encode())
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def episodes(self):
        """Names of the folders that hold an episode, in order."""
        folders = {path.parent.name for path in paths(self.path)}
        names = sorted(filter(str.isdecimal, folders), key=int)
        told = files.read_json(self.path / "metadata.json").get("total_episodes")
        if told != len(names):
            self.warn([f"warning: metadata.json tells of {told} episodes, {len(names)} are there"])
        return names

    def item(self, field):
        """The array or the dict of arrays at `field`, of which one episode is kept."""
        episode, *names = field.split("/")
        if episode != self._episode:
            try:
                self._arrays = self._read(episode)
            except DatasetError:
                raise
            except Exception as error:  # pyarrow raises many kinds for a damaged file
                raise self.refusal(episode, f"cannot be read: {error}") from None
            self._episode = episode
        here = self._arrays
        for name in names:
            here = here.get(name) if isinstance(here, dict) else None
        return here

    def _read(self, episode):
        """{name: array, or dict of arrays}; Minari pads all but the observations by a row."""
        parts = paths(self.path / episode)
        data = self._open([str(path) for path in parts], format=parts[0].suffix[1:])
        names = "observations", "actions", "rewards", "terminations", "truncations"
        width = sum(itemsize(data.schema.field(name).type) for name in names)
        self.left -= (need := data.count_rows() * width)
        if self.left < 0:
            why = f"declares {need:,} bytes, more than this machine has memory for"
            raise self.refusal(episode, why)
        table = data.to_table(columns=list(names))
        table.validate(full=True)
        arrays = {name: numbers(table[name].combine_chunks()) for name in names}
        return {name: x if name == "observations" else x[:-1] for name, x in arrays.items()}


def itemsize(kind):
    """Bytes, at least, of a value of an Arrow type."""
    if kind.num_fields and hasattr(kind, "list_size"):
        return kind.list_size * itemsize(kind.value_type)
    return sum(itemsize(kind.field(i).type) for i in range(kind.num_fields)) or 8


def numbers(array):
    """A NumPy array of an Arrow array, (N,) or of lists of one size (N, D); a dict of a struct."""
    if array.null_count:
        raise ValueError("some values are missing")
    if hasattr(array.type, "list_size"):
        return numbers(array.flatten()).reshape(len(array), -1)
    if array.type.num_fields:
        return {field.name: numbers(array.field(i)) for i, field in enumerate(array.type)}
    return array.to_numpy(zero_copy_only=False)
