"""What a run records while it trains: metrics.csv and returns.json."""

import json

import numpy as np

from common.experiment import files
from common.experiment.checkpoint import RunError

TIMING = ("seconds", "updates_per_second")  # last columns, the only ones that differ between runs


def read_returns(folder, seeds, episodes):
    """{step: (seeds, episodes) nested lists} in returns.json, step a decimal number.

    Raises OSError, and ValueError or TypeError for damaged content.
    """
    returns = files.read_json(folder / "returns.json")
    shapes = {np.shape(np.array(x, float)) for at, x in returns.items() if int(at) >= 0}
    if shapes - {(seeds, episodes)}:
        raise ValueError(f"returns.json has not {episodes} returns of each seed")
    return returns


class Records:
    """The metrics and returns of a run, in memory and in its folder.

    metrics.csv has one row for each chunk and seed; returns.json holds {step: (S, episodes)}.

    folder: Path. seeds: (S,) int.
    """

    def __init__(self, folder, seeds):
        self._folder, self._seeds = folder, seeds
        self._reopened = False
        self._lines, self._returns = [], {}  # lines: of metrics.csv, the header first

    def reopen(self, step, chunk, episodes):
        """Reads what was recorded up to `step`; later rows are made again.

        chunk: updates between two rows of a seed. episodes: of one seed's evaluation, 0 if there
        was none by then. Raises FileNotFoundError, and ValueError, TypeError or IndexError for
        damaged content.
        """
        header, *lines = files.read(self._folder / "metrics.csv").decode("utf-8").splitlines()
        lines = [line for line in lines if int(line.split(",")[0]) <= step]
        table = np.array([line.split(",") for line in lines], float)  # rows of equal length
        count = step // chunk * len(self._seeds)
        if len(table) != count or (count and table.shape[1] != len(header.split(","))):
            raise ValueError(f"not {count} whole rows up to step {step}")
        returns = read_returns(self._folder, len(self._seeds), episodes) if episodes else {}
        returns = {at: x for at, x in returns.items() if int(at) <= step}
        self._lines, self._returns, self._reopened = [header, *lines], returns, True

    @property
    def empty(self):
        """Whether no chunk has been recorded yet."""
        return len(self._lines) < 2

    @property
    def seconds(self):
        """Seconds of training and evaluation so far."""
        return 0.0 if self.empty else float(self._lines[-1].split(",")[-2])

    def add(self, step, columns):
        """Appends a row for each seed. columns: {name: (S,)}, the same names at every call."""
        header = ",".join(["step", "seed", *columns])
        if self._lines and self._lines[0] != header:
            kind = RunError if self._reopened else ValueError
            columns = f"metrics.csv has the columns {self._lines[0]}, not {header}"
            raise kind(f"{self._folder}: {columns}")
        self._lines = self._lines or [header]
        for row in zip(self._seeds, *columns.values(), strict=True):
            self._lines.append(",".join(map(str, (step, *row))))
        files.write(self._folder / "metrics.csv", "\n".join(self._lines) + "\n")

    def add_returns(self, step, returns):
        """Keeps the returns (S, episodes) of the evaluation at `step`."""
        self._returns[str(step)] = returns.tolist()
        files.write(self._folder / "returns.json", json.dumps(self._returns) + "\n")

    def columns(self):
        """{name: (T, S)} of the T chunks so far, `step` and `seed` among them."""
        header, *rows = (line.split(",") for line in self._lines)
        table = np.array(rows, float).reshape(-1, len(self._seeds), len(header))
        return dict(zip(header, np.moveaxis(table, -1, 0), strict=True))

    def returns(self, step=None):
        """(S, episodes) of the evaluation at `step`, or of the newest; None if there is none."""
        step = max(map(int, self._returns), default=None) if step is None else step
        found = self._returns.get(str(step))
        return None if found is None else np.array(found)
