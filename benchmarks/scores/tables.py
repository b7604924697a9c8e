"""Tables of scores in Markdown, from merged runs (runs.py).

A table holds runs on the data of one source only. statistics.py computes the intervals.
"""

from collections import defaultdict

import numpy as np

from benchmarks.markdown import markdown
from benchmarks.scores.runs import (
    DISCRETE,
    behaviour,
    chosen,
    comparable_runs,
    finished,
    matrix,
    score,
    settled,
    short,
)
from common.experiment import statistics

SOURCES = {  # of data, and what a table says of them
    "ours": "our own data, collected by `benchmarks/collect`",
    "D4RL": "D4RL's own data",
    "other": "data of others",
}
MARKS = {  # a mark, and what it says below a table that holds it
    "°": "one seed: interval and IQM are over its episodes.",
    "†": "preliminary, fewer than five seeds.",
    "‡": "the critic has not settled: fewer than 5 / (polyak (1 - gamma)) updates.",
}


def legend(text):
    """The sentences of the marks that `text` holds."""
    return " ".join(f"{mark} {words}" for mark, words in MARKS.items() if mark in text)


def by_source(runs, write):
    """`write` of the runs on each source's data, one after the other, each under its name."""
    texts = {name: write(of_source(runs, name)) for name in SOURCES}
    parts = [f"On {SOURCES[name]}:\n\n{text}" for name, text in texts.items() if text]
    return "\n".join(parts)


def of_source(runs, name):
    return [run for run in runs if run["data"]["source"] == name]


def picture(name, source):
    """The file below results."""
    return f"{name}.png" if source == "ours" else f"{name}-{source}.png"


def link(label, name, runs, folder="results"):
    """A picture below `folder`, as the page's own folder sees it."""
    return f"![{label}]({folder}/{picture(name, runs[0]['data']['source'])})\n"


def count(n, gone=0, each=""):
    """How many seeds, marked if too few, and how many diverged."""
    return f"{n}{each}{' †' * (n < 5)}" + (f", {gone} diverged" if gone else "")


def ends(run):
    """The interval of a run's score, and its mark."""
    low, high = statistics.interval(statistics.of_seeds(run["scores"]))
    return low, high, "°" if len(run["scores"]) == 1 else ""


def long_table(runs):
    """Every algorithm, variant and budget, below what its data and their policy are worth."""
    groups = defaultdict(list)
    for run in sorted(runs, key=lambda run: (run["title"], run["updates"])):
        groups[run["dataset"]].append(run)
    rows = []
    for dataset, group in sorted(groups.items()):
        dataset = short(dataset)
        for name, x in behaviour(group[0]).items():
            rows.append([dataset, f"*{name}*", "", "", f"{score(group[0], x):.1f}", "", f"{x:.0f}"])
        for run in group:
            (low, high, mark), mean = ends(run), run["scores"].mean()
            seeds, episodes = run["scores"].shape
            trimmed = statistics.iqm(statistics.of_seeds(run["scores"]))
            size = count(seeds, run["diverged"], f" x {episodes}")
            updates = f"{run['updates']:,}{' ‡' * (not settled(run))}"
            cells = [dataset, run["title"], updates, size]
            cells += [f"{mean:.1f} [{low:.1f}, {high:.1f}]{mark}", f"{trimmed:.1f}"]
            rows.append([*cells, f"{np.mean(run['returns']):.0f}"])
    names = ["dataset", "algorithm", "updates", "seeds x episodes", "score [95 % interval]"]
    text = markdown([*names, "IQM", "return"], rows)
    return f"{text}\n{legend(text)}\n" if rows else ""


def headline(runs):
    """A row a method, a column a locomotion dataset: score +- half of the interval's width.

    Only finished runs, see runs.finished.
    """
    datasets, best = finished(runs)
    if not best:
        return ""
    curves = link("Learning curves", "curves", runs, "benchmarks/results")
    return f"{side_by_side(datasets, best)}\n{curves}"


def discrete_table(runs):
    """The same for discrete actions: each method's longest runs that have settled."""
    best = chosen(run for run in runs if run["title"] in DISCRETE and settled(run))
    return side_by_side(sorted({dataset for _, dataset in best}), best) if best else ""


def side_by_side(datasets, best):
    """A row a method, a column a dataset. best: {(title, dataset): run}."""
    level = {run["dataset"]: score(run, run["data"]["mean_return"]) for run in best.values()}
    rows = [["*data's mean*", *(f"*{level[dataset]:.1f}*" for dataset in datasets), "", ""]]
    for name in dict.fromkeys(name for name, _ in best):
        found, cells = [best[name, x] for x in datasets if (name, x) in best], []
        for dataset in datasets:
            if (name, dataset) not in best:
                cells.append("")
                continue
            run = best[name, dataset]
            low, high, mark = ends(run)
            cells.append(f"{run['scores'].mean():.1f} ± {(high - low) / 2:.1f}{mark}")
        updates = [f"{run['updates']:,}" for run in found]
        seeds = [count(len(run["scores"]), run["diverged"]) for run in found]
        same = [x[0] if len(set(x)) == 1 else " / ".join(x) for x in (updates, seeds)]
        rows.append([name, *cells, *same])
    text = markdown(["score", *map(short, datasets), "updates", "seeds"], rows)
    words = legend(text)
    return f"{text}\n{words}\n" if words else text


def aggregate(runs):
    """Algorithms over all the datasets that most have."""
    datasets, found, left_out = comparable_runs(runs)
    rows = []
    for name, group in found.items():
        x = matrix(group)
        gone = sum(run["diverged"] for run in group)
        cells = [name, f"{group[0]['updates']:,}", count(x.shape[1], gone)]
        for statistic in (np.mean, statistics.iqm):
            text = " [{:.1f}, {:.1f}]".format(*statistics.interval(x, statistic))
            cells.append(f"{statistic(x):.1f}" + (text if x.shape[1] > 1 else ""))
        rows.append(cells)
    if len(datasets) < 2 or not rows:
        return ""
    names = ["algorithm", "updates on each", "seeds", "mean score [95 % interval]", "IQM [95 %]"]
    words = f"Over {', '.join(map(short, datasets))}. "
    if left_out:
        words += f"Not on each with equally many updates: {', '.join(left_out)}. "
    text = markdown(names, rows)
    text += f"\n{words}One seed has no interval. {legend(text)}\n\n"
    return text + link("Performance profiles", "profiles", runs)


def time_table(runs):
    """When the mean score of the seeds comes to stay at that of the data's mean episode.

    Only runs whose critic has settled.
    """
    best = chosen(run for run in runs if settled(run) and run["title"] not in DISCRETE)
    datasets, rows = sorted({dataset for _, dataset in best}), []
    for name in dict.fromkeys(name for name, _ in best):
        cells = [name]
        for dataset in datasets:
            run = best.get((name, dataset))
            if run is None:
                cells.append("")
                continue
            steps, level = sorted(run["curve"]), score(run, run["data"]["mean_return"])
            t = statistics.time_to(level, steps, [run["curve"][step].mean() for step in steps])
            at_most = "<= " * (t == steps[0])
            cells.append(f"{at_most}{t:,}" if t else f"not in {run['updates']:,}")
        rows.append(cells)
    return markdown(["updates", *map(short, datasets)], rows) if best else ""
