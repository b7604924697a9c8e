"""Pictures of scores, from merged runs (runs.py) on one source's data, and of speed."""

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot, ticker

from benchmarks.scores.runs import (
    behaviour,
    finished,
    matrix,
    score,
    short,
)
from common.experiment import statistics

OKABE_ITO = "0.6 0.2 #e69f00 #0072b2 #d55e00 #cc79a7 #009e73 #56b4e9".split()
KINDS = {  # a panel for each: more lines than these cannot be told apart
    "imitation": "BC|BC-categorical|10%BC|RvS|DT|Diffuser|Decision Diffuser",
    "policy constraint": "TD3+BC|ReBRAC|BCQ|discrete BCQ|BEAR|BRAC|FQL",
    "implicit constraint": "AWR|AWAC|IQL",
    "value": "SAC|DQN|EDAC|CQL|discrete CQL|Cal-QL|RLPD",
    "model": "MBPO|MOPO|MOBILE|COMBO",
}
KINDS = {kind: names.split("|") for kind, names in KINDS.items()}
COLORS = {
    name: color
    for names in KINDS.values()
    for name, color in zip(names, OKABE_ITO[::-1], strict=False)
}
LEVELS = {"data's mean": "--", "behaviour policy, greedy": ":"}
DASHES = {True: "-", False: (0, (3, 1))}  # more than one seed; one


def curves(runs, path):
    """Score against updates, mean of the seeds and their range: a row of panels for each kind.

    The runs of the headline's table; a column for each dataset.
    """
    datasets, best = finished(runs)
    kinds = kinds_of({name for name, _ in best})
    size = 3.6 * len(datasets) + 2.2, 2.1 * len(kinds) + 0.6
    shape = dict(figsize=size, sharex=True, sharey=True, squeeze=False)
    figure, axes = pyplot.subplots(len(kinds), len(datasets), **shape)
    for row, (kind, names) in zip(axes, kinds.items(), strict=True):
        for axis, dataset in zip(row, datasets, strict=True):
            found = {name: best[name, dataset] for name in names}
            for name, run in found.items():
                x = np.array(sorted(run["curve"]))
                y = [run["curve"][t] for t in x]
                lows, highs, mean = np.min(y, 1), np.max(y, 1), np.mean(y, 1)
                axis.plot(x, mean, color=COLORS[name], lw=1.8, ls=DASHES[len(y[0]) > 1])
                axis.plot(x[-1], mean[-1], "o", color=COLORS[name], ms=5)
                axis.fill_between(x, lows, highs, color=COLORS[name], alpha=0.15, lw=0)
            run = next(iter(found.values()))
            levels = behaviour(run)
            for name in LEVELS.keys() & levels:
                axis.axhline(score(run, levels[name]), color="k", ls=LEVELS[name], lw=1, zorder=1)
            axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
            clean(axis)
        row[0].set_ylabel("normalised score")
        beside(row[-1], kind, names)
    for axis, dataset in zip(axes[0], datasets, strict=True):
        axis.set_title(short(dataset), fontsize=11)
    for axis in axes[-1]:
        axis.set(xlabel="gradient updates", xlim=(0, None))
    lines = []
    for label, style in LEVELS.items():
        if any(label in behaviour(run) for run in best.values()):
            lines.append(pyplot.Line2D([], [], color="k", ls=style, lw=1, label=label))
    if any(len(run["scores"]) == 1 for run in best.values()):
        lines.append(pyplot.Line2D([], [], color="0.5", ls=DASHES[False], lw=1.8, label="one seed"))
    finish(figure, lines, path)


def kinds_of(found):
    """{kind: names} of KINDS, of those names alone that are found."""
    kinds = {kind: [x for x in names if x in found] for kind, names in KINDS.items()}
    return {kind: names for kind, names in kinds.items() if names}


def beside(axis, kind, names):
    """A legend of the names to the right of a panel, under the kind."""
    lines = [pyplot.Line2D([], [], color=COLORS[name], lw=3, label=name) for name in names]
    place = dict(loc="center left", bbox_to_anchor=(1, 0.5), alignment="left")
    axis.legend(handles=lines, title=kind, fontsize=9.5, frameon=False, **place)


def profiles(datasets, found, path):
    """Share of all runs, of seeds and datasets, whose score is above tau; 95 % bootstrap bands."""
    kinds, scores = kinds_of(found), {name: matrix(runs) for name, runs in found.items()}
    every = np.concatenate([x.ravel() for x in scores.values()])
    tau = np.linspace(min(0, every.min()) - 1, every.max() + 3, 400)
    shape = dict(figsize=(8.2, 2.1 * len(kinds) + 0.7), sharex=True, sharey=True, squeeze=False)
    figure, axes = pyplot.subplots(len(kinds), 1, **shape)
    for axis, (kind, names) in zip(axes[:, 0], kinds.items(), strict=True):
        for name in names:
            x = scores[name]
            line = {"color": COLORS[name], "lw": 1.8, "ls": DASHES[x.shape[1] > 1]}
            axis.step(tau, statistics.profile(x, tau), **line)
            if x.shape[1] > 1:
                band = statistics.profile_band(x, tau)
                axis.fill_between(tau, *band, color=COLORS[name], alpha=0.12, lw=0, step="pre")
        axis.yaxis.set_major_formatter(ticker.PercentFormatter(1))
        clean(axis)
        beside(axis, kind, names)
    axes[0, 0].set_title(f"share of runs above a score: {', '.join(map(short, datasets))}")
    axes[-1, 0].set_xlabel("normalised score")
    finish(figure, [], path)


def speed(ours, path):
    """Share of the machine's rate on one core and on two; updates of all seeds, to one seed's."""
    height = 1.5 + 0.19 * sum(row["seeds"] == 1 for row in ours[1]["rows"])
    figure, (bars, lines) = pyplot.subplots(1, 2, figsize=(10.5, height))
    for i, (cores, file) in enumerate(ours.items()):
        rows = [row for row in file["rows"] if row["seeds"] == 1 and "share" in row]
        y = np.arange(len(rows)) + (i - 0.5) * 0.38
        label = f"{cores} core" + "s" * (cores > 1)
        shares = [row["share"] for row in rows]
        bars.barh(y, shares, 0.36, color=OKABE_ITO[3 + i], label=label)
        bars.set_yticks(range(len(rows)), shown := [row["row"] for row in rows])
    bars.invert_yaxis()
    bars.axvline(1, color="k", lw=1, ls=":")
    bars.set(xlabel="share of the rate of its matrix products alone")
    bars.xaxis.set_major_formatter(ticker.PercentFormatter(1))
    bars.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=9.5)
    several = {row["row"] for row in ours[1]["rows"] if row["seeds"] > 1}
    names = [name for name in shown if name in several and "," not in name]  # each algorithm once
    for name, color in zip(names, OKABE_ITO, strict=False):
        rows = [row for row in ours[1]["rows"] if row["row"] == name]
        seeds, us = np.array([[row["seeds"], row["us"]] for row in rows]).T
        y = seeds * us[0] / us
        lines.plot(seeds, y, "o-", color=color, lw=1.8, ms=4, label=name)
    lines.axhline(1, color="k", lw=1, ls=":")
    lines.set(xlabel="seeds, on one core", ylabel="updates per second of all, to one seed's")
    lines.set_xscale("log", base=2)
    lines.xaxis.set_major_formatter("{x:.0f}")
    lines.set_ylim(0, None)
    for axis in (bars, lines):
        clean(axis)
    handles, _ = lines.get_legend_handles_labels()
    finish(figure, handles, path)


def clean(axis):
    axis.grid(color="0.92")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def finish(figure, lines, path):
    """Saves it with one legend below, unless there are no lines."""
    columns = max(3, min(len(lines), int(figure.get_figwidth() / 2)))
    figure.tight_layout()
    below = dict(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=columns, frameon=False)
    if lines:
        figure.legend(handles=lines, fontsize=9.5, **below)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)
