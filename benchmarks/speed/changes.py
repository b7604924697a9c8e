"""The effect of a change on speed: a row of benchmarks.speed before and after a commit.

    python -m benchmarks.speed.changes                    # the rows of CHANGES, some minutes
    python -m benchmarks.speed.changes --before main --after HEAD --rows iql cql

Both commits are unpacked into temporary folders, where each is timed by its own benchmarks.speed,
in turns. Writes benchmarks/results/changes.json, unless commits are given.
"""

import io
import json
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from benchmarks.speed import __main__ as speed
from common import experiment

ROOT = Path(__file__).resolve().parents[2]

CHANGES = (  # (what changed, commit, row, cores)
    ("kernels (out, in): no transposed gradients", "5707632", "iql", 1),
    ("dropout from 16 random bits, not 32", "4d2bad8", "dt", 1),
    ("environments stepped on all cores", "cb247ff", "evaluation", 2),
)


@dataclass(frozen=True)
class Config:
    rows: tuple[str, ...] = ("iql",)  # rows to compare between two commits
    before: str = ""  # commit; empty: the rows of CHANGES
    after: str = "HEAD"  # commit
    cores: int = 1  # cores for each row
    rounds: int = 3  # measurements of each commit, in turns
    out: str = str(ROOT / "benchmarks/results/changes.json")  # file to write


def git(*words):
    return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, check=True).stdout


def unpack(commit, folder):
    """Writes the files of a commit to a folder; the folder."""
    with tarfile.open(fileobj=io.BytesIO(git("archive", commit))) as files:
        files.extractall(folder, filter="data")
    return folder


def compare(row, before, after, cores, rounds):
    """(microseconds before, microseconds after) of a row, lists of `rounds` measurements."""
    taken = [], []
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        folders = unpack(before, Path(one)), unpack(after, Path(two))
        for _ in range(rounds):
            for folder, us in zip(folders, taken, strict=True):
                words = ["--row", f"{row}:1", "--seconds", "5"]
                us.append(speed.apart("benchmarks.speed", words, cores, folder)["us"])
    return taken


def main(cfg: Config):
    asked = [("", cfg.after, row, cfg.cores) for row in cfg.rows] if cfg.before else CHANGES
    facts = experiment.machine() | {"rows": []}
    for what, after, row, cores in asked:
        pair = cfg.before or f"{after}^", after
        commits = [git("rev-parse", commit).decode().strip() for commit in pair]
        taken = compare(row, *commits, cores, cfg.rounds)
        old, new = map(np.median, taken)
        print(f"{row}: {old / 1000:.3g} ms, then {new / 1000:.3g}: {old / new:.2f} times as fast")
        names = ("what", "row", "cores", "before", "after", "us_before", "us_after")
        values = (what, row, cores, *commits, *taken)
        facts["rows"].append(dict(zip(names, values, strict=True)))
    if not cfg.before:
        Path(cfg.out).write_text(json.dumps(facts, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
