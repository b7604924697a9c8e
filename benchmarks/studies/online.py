"""Offline, then online: what the hand-over costs, and how soon it is regained.

    python -m benchmarks.studies.online commands    # prints the public commands, to run next
    python -m benchmarks.studies.online report      # results/online.json and online.png, the table

Each method learns from data alone, then takes a step of the environment before every update. RLPD
has no offline phase. CQL is Cal-QL without calibration, continued as it is. Curves are means of
WINDOW evaluations. Of each seed are measured:

    before   the score at the hand-over
    lowest   the lowest score after it, of evaluations that all come after it
    end      the last score
    steps    in the environment until the score, once below `before`, is back there
    usual    before - lowest of a hand-over that did not happen, as many updates earlier

The lowest of many noisy scores lies below their mean, whether or not anything is lost; `usual` says
how far.
"""

import shlex
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

from benchmarks.markdown import markdown
from benchmarks.scores import runs
from common import experiment
from common.experiment import statistics

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"

HOPPER, MAZE = "stillwater/hopper/medium-replay-v0", "stillwater/pointmaze-umaze/waypoint-v0"
CALIBRATED = "--critic-widths 64 64 --num-actions 1"
FLAGS = {
    "iql": "",
    "awac": "",
    "cal_ql": CALIBRATED,
    "cal_ql --no-calibrate": CALIBRATED,
    "rlpd": "--utd 2 --random-steps 1000",
}
SAME = "--widths 64 64 --batch-size 128 --polyak 0.02 --log-every 500 --eval-every 500"
MAZES = {"rlpd": "--min-critics 1 --backup-entropy False"}  # the authors' settings for mazes
NAMES = {"iql": "IQL", "awac": "AWAC", "cal_ql": "Cal-QL", "rlpd": "RLPD"}
NAMES |= {"cal_ql --no-calibrate": "CQL, as it is"}
COLOURS = dict(zip(NAMES.values(), ("C0", "C2", "C1", "C3", "0.4"), strict=True))
WINDOW = 3  # evaluations


@dataclass(frozen=True)
class Commands:
    """Prints the command of each method on each dataset."""

    offline: int = 20_000  # updates on data alone
    online: int = 10_000  # updates with a step of the environment before each
    num_seeds: int = 3  # seeds trained together
    out: str = "runs/online"  # folder for the runs


@dataclass(frozen=True)
class Report:
    """Writes results/online.json and online.png, and prints the table of all finished runs."""

    stopped: bool = False  # also runs that went online and were stopped
    out: str = "runs/online"  # folder with the runs
    results: str = str(RESULTS)  # folder for the results


def commands(cfg):
    """[words after `python`] of each method on each dataset."""
    found = []
    for dataset in (HOPPER, MAZE):
        for name, flags in FLAGS.items():
            file, *own = name.split()
            length = f"--num-updates {cfg.offline + cfg.online} --online-steps {cfg.online}"
            if file == "rlpd":
                length = f"--num-updates {cfg.online}"
            own += [flags, MAZES.get(name, "") if dataset == MAZE else "", SAME, length]
            words = f"algorithms/{file}.py --env {dataset} {' '.join(own)}"
            found.append(shlex.split(f"{words} --num-seeds {cfg.num_seeds} --out {cfg.out}"))
    return found


def curve(run):
    """What a run of `runs.collect` scored, as plain data.

    steps: of the environment until each evaluation, below 0 before the hand-over.
    """
    own, name = run["config"], run["algorithm"]
    if not own.get("calibrate", True):
        name += " --no-calibrate"
    hand_over = own["num_updates"] - own.get("online_steps", own["num_updates"])
    waited = own.get("random_steps", 0)
    scores = runs.score(run, np.array(list(run["curve"].values())).T)
    return {
        "run": NAMES[name],
        **{key: run[key] for key in ("dataset", "command", "commit", "device")},
        "data_score": round(float(runs.score(run, run["data"]["mean_return"])), 2),
        "steps": [int(step) - hand_over + waited for step in run["curve"]],
        "scores": np.round(scores, 2).tolist(),
    }


def smooth(scores):
    """Means of WINDOW evaluations (S, T - WINDOW + 1), each at the last of its window."""
    return np.lib.stride_tricks.sliding_window_view(scores, WINDOW, axis=1).mean(-1)


def fall(steps, scores, at=0):
    """Of each seed: (before (S,), lowest (S,), steps until `before` is regained (S,), inf: never).

    at: where the hand-over is; scores (S, T) until a later one count up to as many steps after it
    as there are steps after 0.
    """
    steps, mean = np.array(steps), smooth(np.array(scores))
    ends, starts = steps[WINDOW - 1 :], steps[: 1 - WINDOW]
    before = mean[:, ends == at][:, 0]
    after = (starts > at) & (ends <= at + steps[-1])
    ends, mean = ends[after] - at, mean[:, after]
    below = mean < before[:, None]
    back = np.maximum.accumulate(below, 1) & ~below
    regained = np.where(back.any(1), ends[back.argmax(1)], np.inf)
    return before, mean.min(1), np.where(below.any(1), regained, 0)


def summary(row):
    """{measure: (S,)} of a row of `curve`, see the top; without a hand-over only `end`."""
    steps, scores = row["steps"], np.array(row["scores"])
    found = {"end": smooth(scores)[:, -1]}
    if steps[0] < 0:
        before, lowest, regained = fall(steps, scores)
        earlier, lower, _ = fall(steps, scores, -steps[-1])
        found |= {"before": before, "lowest": lowest, "steps": regained, "usual": earlier - lower}
    return found


def report(cfg):
    """Collects the finished runs below --out: {"rows": [...]}, also to a file."""
    found = []
    for path in sorted(Path(cfg.out).glob("*/*/*/config.json")):
        with suppress(SystemExit, FileNotFoundError):  # not finished
            found.append(curve(runs.collect(path.parent, cfg.stopped)))
    found = [row for row in found if row["steps"][-WINDOW] > 0]
    if not found:
        raise SystemExit(f"{cfg.out}: no finished run.")
    order = list(NAMES.values())
    found.sort(key=lambda row: (row["dataset"], order.index(row["run"])))
    record = {**experiment.machine(), "rows": found}
    results = Path(cfg.results)
    results.mkdir(parents=True, exist_ok=True)
    (results / "online.json").write_text(runs.text(record), "utf-8")
    plot(found, results / "online.png")
    print(table(record), end="")
    return record


def table(record):
    """The measures of all rows, in Markdown; scores are means and ranges of the seeds."""

    def cell(x):
        low, high = statistics.interval(x[None])
        return f"{x.mean():z.1f} [{low:z.1f}, {high:z.1f}]"

    def steps(x):
        return ", ".join("never" if np.isinf(one) else f"{one:,.0f}" for one in np.sort(x))

    lines = []
    for row in record["rows"]:
        x = summary(row)
        cells = ["–"] * 4 + [cell(x["end"]), "–"]
        if "before" in x:
            lost = x["before"] - x["lowest"]
            cells = [*map(cell, (x["before"], x["lowest"], lost)), f"{x['usual'].mean():.1f}"]
            cells += [cell(x["end"]), steps(x["steps"])]
        data = f"{runs.short(row['dataset'])} ({row['data_score']:.1f})"
        lines.append([data, row["run"], f"{row['steps'][-1]:,}", *cells])
    names = [
        "dataset (data's mean)",
        "",
        "steps",
        "before",
        "lowest after",
        "fall",
        "usual fall",
        "end",
    ]
    return markdown([*names, "steps to regain, each seed"], lines)


def plot(rows, path):
    """A panel for each dataset: scores over the steps since the hand-over."""
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    figure = Figure((5.6 * len(datasets), 4.2), dpi=120, layout="constrained")
    axes = figure.subplots(1, len(datasets), squeeze=False)[0]
    for axis, dataset in zip(axes, datasets, strict=True):
        group = [row for row in rows if row["dataset"] == dataset]
        for row in group:
            x, mean = np.array(row["steps"][WINDOW - 1 :]), smooth(np.array(row["scores"]))
            colour = COLOURS[row["run"]]
            axis.plot(x, mean.mean(0), color=colour, lw=1.8, label=row["run"])
            axis.fill_between(x, mean.min(0), mean.max(0), color=colour, alpha=0.12, lw=0)
        axis.axhline(group[0]["data_score"], color="0.3", ls=":", lw=1.2, label="data's mean")
        axis.axvline(0, color="k", ls="--", lw=1)
        axis.text(0, 1, " hand-over", va="top", transform=axis.get_xaxis_transform())
        axis.set(title=runs.short(dataset), xlabel="steps in the environment; updates before 0")
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_formatter("{x:,.0f}")
    axes[0].set_ylabel("score")
    axes[0].legend(frameon=False, fontsize=9, loc="upper left")
    figure.savefig(path)


def main(cfg: Commands | Report):
    if isinstance(cfg, Report):
        report(cfg)
    else:
        for words in commands(cfg):
            print(f"python {shlex.join(words)}")


if __name__ == "__main__":
    main(tyro.cli(Commands | Report, description=__doc__))
