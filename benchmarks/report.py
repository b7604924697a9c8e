"""Finished runs -> one JSON each under benchmarks/results/runs; of all of them, README's tables.

    python benchmarks/report.py runs/iql/... runs/cql/...   # adds these runs, then as below
    python benchmarks/report.py                             # README's tables and the pictures

A run's JSON holds its command, config, commit, versions, device, curve and the returns of every
evaluation. score_runs.py merges and chooses runs, stats.py counts, score_tables.py, speed_tables.py
and figures.py show.
"""

import csv
import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT))  # finds common/
from benchmarks import figures, score_tables, speed_tables, stats  # noqa: E402
from benchmarks.score_runs import command, merge, together  # noqa: E402

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


def add(folder, results):
    """Writes the run's JSON below `results`: its Path."""
    run = collect(folder)
    parts = run["algorithm"], run["dataset"].replace("/", "-"), folder.resolve().name
    path = results / "runs" / ("-".join(parts) + ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in run.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
    return path


def collect(folder):
    """What a run folder says of itself, as plain data.

    evaluations: {updates: (S, E) returns to two decimals}; returns: the last one's in full; curve:
    {updates: (S,) means}; seconds: {updates: of training and evaluating until then}.
    """
    info = json.loads((folder / "config.json").read_text("utf-8"))
    returns = json.loads((folder / "returns.json").read_text("utf-8"))
    config, dataset = info["config"], info["dataset"]
    if str(config["num_updates"]) not in returns:
        raise SystemExit(f"{folder} has not finished: nothing at update {config['num_updates']:,}")
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["step"] in returns]
    made = dataset["metadata"].get("stillwater", {})
    return {
        "algorithm": info["algorithm"],
        "dataset": dataset["name"],
        "env_id": dataset["env_id"],
        "command": command(info),
        "config": {k: v for k, v in config.items() if k not in ("out", "resume", "wandb")},
        **{k: info[k] for k in ("commit", "versions", "device")},
        "data": {
            **{k: dataset[k] for k in ("mean_return", "best_return", "sha256")},
            "ref_min": dataset["ref_min_score"],
            "ref_max": dataset["ref_max_score"],
            "policy_return": made.get("medium_policy_return"),
            "source": whose(dataset),
        },
        "curve": {step: np.mean(x, 1).round(2).tolist() for step, x in returns.items()},
        "seconds": {row["step"]: float(row["seconds"]) for row in rows},
        "evaluations": {step: np.round(x, 2).tolist() for step, x in returns.items()},
        "returns": returns[str(config["num_updates"])],
    }


def whose(dataset):
    """Whose data: our own (collect.py leaves its settings in them), D4RL's, or another's."""
    if "stillwater" in dataset["metadata"]:
        return "ours"
    return "D4RL" if dataset["layout"] == "D4RL" and dataset["verified"] is not False else "other"


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
            ends = "{:.1f}, {:.1f}".format(*stats.interval(stats.of_seeds(score)))
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
        low, high = stats.interval(np.array([row["scores"]]))
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
    datasets, found, _ = together(runs)
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
