"""Finished runs -> one JSON each under benchmarks/results/runs; of all of them, README's tables.

    python -m benchmarks.report runs/iql/... runs/cql/...   # adds these runs, then as below
    python -m benchmarks.report                             # README's tables and the pictures

A run's JSON holds its command, config, commit, versions, device, curve and the returns of every
evaluation. scores/runs.py merges and chooses runs; tables.py and figures.py of scores/ and speed/
show them.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from benchmarks.scores import figures
from benchmarks.scores import tables as score_tables
from benchmarks.scores.runs import add, comparable_runs, merge
from benchmarks.speed import tables as speed_tables
from common.experiment import statistics

ROOT = Path(__file__).resolve().parents[1]

SCORES = {  # marks in the README, and who writes there
    "headline": score_tables.headline,
    "scores": score_tables.long_table,
    "aggregate": score_tables.aggregate,
    "time": score_tables.time_table,
}


@dataclass(frozen=True)
class Config:
    runs: tyro.conf.Positional[tuple[str, ...]] = ()  # run folders to add
    results: str = str(ROOT / "benchmarks/results")  # where everything goes


def value_table(rows):
    """Markdown of values.py's numbers."""
    names = ["dataset", "run", "updates", "Q, data's action", "true", "Q, policy's action", "true"]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in sorted(rows, key=lambda r: (r["dataset"], r["run"])):
        numbers = [f"{row[k]:.1f}" for k in ("q_data", "true_data", "q_pi", "true_pi")]
        cells = [row["dataset"], row["run"], f"{row['num_updates']:,}", *numbers]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def peers_table(runs, peers):
    """Markdown of the scores of other implementations beside ours, same data and updates."""
    names = ["dataset", "algorithm", "updates", "ours", "peer", "theirs"]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    groups = defaultdict(list)
    for peer in sorted(peers, key=lambda p: (p["algorithm"], p["updates"], p["seed"])):
        groups[peer["algorithm"].upper(), peer["data"]["name"], peer["updates"]].append(peer)
    for (algorithm, dataset, updates), group in groups.items():
        (low, high), cells = group[0]["data"]["ref"], []
        theirs = [peer["returns"][str(updates)] for peer in group]
        for returns in (ours(runs, algorithm, dataset, updates), theirs):
            score = 100 * (np.array(returns) - low) / (high - low)
            ends = "{:.1f}, {:.1f}".format(*statistics.interval(statistics.of_seeds(score)))
            seeds = f"{len(score)} seed{'s' * (len(score) > 1)}"
            cells.append(f"{score.mean():.1f} [{ends}], {seeds}")
        cells = [dataset, algorithm, f"{updates:,}", cells[0], group[0]["peer"]["name"], cells[1]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def ours(runs, title, dataset, updates):
    """Returns (S, E) after so many updates: at the end of a run, or in a longer one whose learning
    rate does not depend on its length."""
    found = [run for run in runs if (run["title"], run["dataset"]) == (title, dataset)]
    for run in sorted(found, key=lambda run: run["updates"]):
        if run["updates"] == updates:
            return run["returns"]
        if run["config"].get("lr_decay") is False and str(updates) in run["evaluations"]:
            return run["evaluations"][str(updates)]
    raise SystemExit(f"no run of {title} on {dataset} has {updates:,} updates, as a peer's has")


def parity_table(rows):
    """Markdown of `python -m benchmarks.parity`: the largest difference of each kind of number."""
    kinds = {  # the first whose words are in a quantity's name
        "losses": ("loss of", "loss", "error", "gap"),
        "gradients": ("gradient",),
        "weights after updates": ("after", "average", "parameters"),
        "other": ("",),
    }
    lines = ["| algorithm | peer | " + " | ".join(kinds) + " | numbers |"]
    lines.append("|" + "---|" * (len(kinds) + 3))
    groups = defaultdict(lambda: defaultdict(list))
    for row in rows:
        names = (kind for kind, words in kinds.items() if any(w in row["quantity"] for w in words))
        if not row["differs"]:
            groups[row["algorithm"], row["peer"]][next(names)].append(row["difference"])
    for (algorithm, peer), found in groups.items():
        cells = [f"{max(found[kind]):.0e}" if found[kind] else "" for kind in kinds]
        total = sum(map(len, found.values()))
        lines.append(f"| {algorithm.upper()} | {peer} | {' | '.join(cells)} | {total} |")
    return "\n".join(lines) + "\n"


def resume_table(rows):
    """Markdown of resume.py's numbers."""
    phases = ["training", "evaluating", "writing the checkpoint"]
    names = ["", "kills", *phases, "runs", "equal bits at the end"]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = [row["algorithm"].upper(), row["kills"], *(row["phases"].get(x, 0) for x in phases)]
        cells += [row["runs"], f"{row['runs_with_equal_bits']} of {row['runs']}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def planning_table(rows):
    """Markdown of planning.py's numbers."""
    names = ["dataset", "Diffuser's planner", "ms a step, 1 episode", "10 episodes", "score"]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        low, high = statistics.interval(np.array([row["scores"]]))
        score = (
            f"{np.mean(row['scores']):.1f} [{low:.1f}, {high:.1f}], {len(row['scores'])} episodes"
        )
        times = [f"{row[k]:,.0f}" if row[k] >= 100 else f"{row[k]:.2g}" for k in ("ms_1", "ms_10")]
        cells = [row["dataset"], row["variant"], *times, score]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def stitching_table(runs):
    """Markdown of stitching.py's numbers."""
    lines = ["| | " + " | ".join(runs) + " |", "|" + "---|" * (len(runs) + 1)]
    for name, key in (("A to C", "to_C"), ("A to F", "to_F")):
        cells = [f"{run[key]:.0%}" for run in runs.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def load(results):
    """(merged runs, peers) of all that lies below `results`."""
    runs, peers = (
        [json.loads(path.read_text("utf-8")) for path in sorted((results / kind).glob("*.json"))]
        for kind in ("runs", "peers")
    )
    for run in runs:
        if run["data"]["ref_max"] is None:
            print(f"left out, as nothing says which returns score 0 and 100: {run['command']}")
    return list(merge(run for run in runs if run["data"]["ref_max"] is not None)), peers


def draw(runs, source, results):
    """The pictures of runs on one source's data."""
    if runs:
        figures.curves(runs, results / score_tables.picture("curves", source))
    datasets, found, _ = comparable_runs(runs)
    if len(datasets) > 1 and found:
        figures.profiles(datasets, found, results / score_tables.picture("profiles", source))


def main(cfg: Config):
    results = Path(cfg.results)
    for folder in map(Path, cfg.runs):
        add(folder, results)
    runs, peers = load(results)
    if not runs:
        raise SystemExit(f"no runs in {results / 'runs'}")
    values, planning, stitching, parity, resume, profile, changes = (
        json.loads((results / f"{name}.json").read_text("utf-8"))
        for name in "values planning stitching parity resume profile changes".split()
    )
    ours_by_cores, other_people = speed_tables.load(results)
    tables = {
        **{mark: score_tables.by_source(runs, write) for mark, write in SCORES.items()},
        "peers": peers_table(runs, peers),
        "parity": parity_table(parity),
        "resume": resume_table(resume["rows"]),
        "values": value_table(values["rows"]),
        "planning": planning_table(planning["rows"]),
        "stitching": stitching_table(stitching["runs"]),
        "speed": speed_tables.own_table(ours_by_cores),
        "speed of seeds": speed_tables.seeds_table(ours_by_cores),
        "profile": speed_tables.profile_table(profile),
        "changes": speed_tables.changes_table(changes),
        "speed of peers": speed_tables.peers_table(ours_by_cores, other_people),
    }
    figures.speed(ours_by_cores, results / "speed.png")
    for source in score_tables.SOURCES:
        draw(score_tables.of_source(runs, source), source, results)
    readme = ROOT / "README.md"
    text = readme.read_text("utf-8")
    for mark, content in tables.items():
        before, rest = text.split(f"<!-- {mark} -->\n")
        after = rest.split(f"<!-- end of {mark} -->")[1]
        text = f"{before}<!-- {mark} -->\n{content}<!-- end of {mark} -->{after}"
    readme.write_text(text, "utf-8")


if __name__ == "__main__":
    main(tyro.cli(Config))
