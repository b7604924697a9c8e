"""How does the score depend on one setting? Runs of one algorithm that differ in it.

    python -m benchmarks.studies.sweep alpha runs/fql/... runs/fql/... --updates 50000

Every run counts with the evaluation after --updates, so that longer runs can stand beside shorter
ones if their learning rate is constant. Writes sweep.json to benchmarks/results, where other
algorithms and settings stay.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from benchmarks.markdown import markdown
from benchmarks.scores.runs import HOW_LONG, NAMES, collect, score, short
from common.experiment import statistics

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Config:
    flag: tyro.conf.Positional[str]  # the setting, as in the algorithm's Config
    runs: tyro.conf.Positional[tuple[str, ...]]  # run folders
    updates: int  # gradient steps after which the runs are compared
    results: str = str(ROOT / "benchmarks/results")  # folder for sweep.json


def others(run, flag):
    """The settings of a collected run but for the flag, its length, its seeds and its dataset."""
    names = {flag, *(name.replace("-", "_") for name in HOW_LONG)}
    return {name: value for name, value in run["config"].items() if name not in names}


def rows(runs, flag, updates):
    """Rows of the table, as plain data; SystemExit if the runs differ in more than the flag."""
    for run in runs[1:]:
        for name, value in others(run, flag).items():
            if others(runs[0], flag).get(name) != value or run["algorithm"] != runs[0]["algorithm"]:
                raise SystemExit(f"{run['folder']} differs in more than {flag}: {name} is {value}")
    return [
        {
            "algorithm": run["algorithm"],
            "flag": flag,
            "value": run["config"][flag],
            "dataset": run["dataset"],
            "updates": updates,
            "scores": score(run, np.array(run["evaluations"][str(updates)])).round(2).tolist(),
            **{key: run[key] for key in ("command", "commit", "device")},
        }
        for run in runs
    ]


def table(found):
    """A line for each value, a column for each dataset."""
    datasets = sorted({row["dataset"] for row in found})
    lines = defaultdict(lambda: [""] * len(datasets))
    for row in sorted(found, key=lambda row: (row["algorithm"], row["flag"], row["value"])):
        mean, scores = np.mean(row["scores"]), np.array(row["scores"])
        low, high = statistics.interval(statistics.of_seeds(scores))
        name = f"{NAMES[row['algorithm']]}, {row['flag']} {row['value']:g}"
        cells = lines[name, f"{row['updates']:,}", f"{len(scores)} x {scores.shape[1]}"]
        cells[datasets.index(row["dataset"])] = f"{mean:z.1f} [{low:z.1f}, {high:z.1f}]"
    names = ["", "updates", "seeds x episodes", *map(short, datasets)]
    return markdown(names, [[*key, *cells] for key, cells in lines.items()])


def main(cfg: Config):
    path = Path(cfg.results) / "sweep.json"
    known = json.loads(path.read_text("utf-8")) if path.exists() else []
    runs = [collect(Path(folder), stopped=True) for folder in cfg.runs]
    found = rows(runs, cfg.flag, cfg.updates)
    measured = {(row["algorithm"], row["flag"]) for row in found}
    found += [row for row in known if (row["algorithm"], row["flag"]) not in measured]
    path.write_text("[\n" + ",\n".join(map(json.dumps, found)) + "\n]\n", "utf-8")
    print(table(found), end="")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
