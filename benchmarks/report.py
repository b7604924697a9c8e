"""Finished runs -> one JSON each under benchmarks/results/runs; of all of them, README's tables.

    python benchmarks/report.py runs/iql/... runs/cql/...   # adds these runs, then as below
    python benchmarks/report.py                             # README's tables and curves.png

A run's JSON holds its command, config, commit, versions, device, curve and every return of its last
evaluation. Intervals are 95 % bootstrap over seeds and episodes.
"""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT))  # finds common/
from common import curve  # noqa: E402


@dataclass(frozen=True)
class Config:
    runs: tyro.conf.Positional[tuple[str, ...]] = ()  # run folders to add
    results: str = str(ROOT / "benchmarks/results")  # where everything goes


def collect(folder):
    """What a run folder says of itself, as plain data."""
    info = json.loads((folder / "config.json").read_text("utf-8"))
    returns = json.loads((folder / "returns.json").read_text("utf-8"))
    config, dataset = info["config"], info["dataset"]
    if str(config["num_updates"]) not in returns:
        raise SystemExit(f"{folder} has not finished: nothing at update {config['num_updates']:,}")
    made = dataset["metadata"].get("stillwater", {})
    words = [Path(info["command"][0]).name, *info["command"][1:]]
    if "--out" in words:  # says nothing but where the run folder was
        at = words.index("--out")
        words = words[:at] + words[at + 2 :]
    return {
        "algorithm": info["algorithm"],
        "dataset": dataset["name"],
        "env_id": dataset["env_id"],
        "command": "python algorithms/" + " ".join(words),
        "config": {k: v for k, v in config.items() if k not in ("out", "resume", "wandb")},
        **{k: info[k] for k in ("commit", "versions", "device")},
        "data": {
            **{k: dataset[k] for k in ("mean_return", "best_return", "sha256")},
            "ref_min": dataset["ref_min_score"],
            "ref_max": dataset["ref_max_score"],
            "policy_return": made.get("medium_policy_return"),
        },
        "curve": {step: np.mean(x, 1).round(2).tolist() for step, x in returns.items()},
        "returns": returns[str(config["num_updates"])],
    }


def title(run):
    """The algorithm with the options that make it another one."""
    config = run["config"]
    if run["algorithm"] == "cql" and config["alpha"] == 0:
        return "SAC (cql --alpha 0)"
    if run["algorithm"] == "diffuser":
        return "Diffuser"
    name = run["algorithm"].upper()
    if run["algorithm"] == "bc" and config["fraction"] < 1:
        name = f"{config['fraction']:.0%}BC"
    if run["algorithm"] == "iql" and not config["normalize"]:
        name += " --no-normalize"
    if run["algorithm"] == "awac" and len(run["config"]["widths"]) > 2:
        name += f", {len(run['config']['widths'])} layers"
    return name + (f", beta {config['beta']:g}" if run["algorithm"] == "combo" else "")


def merge(runs):
    """Runs that differ in their seeds alone as one."""
    groups = defaultdict(list)
    for run in runs:
        config = {k: v for k, v in run["config"].items() if k not in ("seed", "num_seeds")}
        groups[run["algorithm"], run["dataset"], json.dumps(config)].append(run)
    for group in groups.values():
        curve = {t: sum((run["curve"][t] for run in group), []) for t in group[0]["curve"]}
        yield group[0] | {"curve": curve, "returns": sum((run["returns"] for run in group), [])}


def table(runs):
    """Markdown: last evaluation against the data and against the policy that made it."""
    names = [
        "dataset",
        "algorithm",
        "updates",
        "seeds x episodes",
        "return [95 % interval]",
        "score",
    ]
    names += ["data's mean return", "behaviour policy, sampled / greedy"]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for run in sorted(runs, key=lambda r: (r["dataset"], title(r))):
        returns, data = np.array(run["returns"]), run["data"]
        low, high = curve.interval(returns)
        score = 100 * (returns.mean() - data["ref_min"]) / (data["ref_max"] - data["ref_min"])
        policy = data["policy_return"]
        cells = [
            run["dataset"],
            title(run),
            f"{run['config']['num_updates']:,}",
            "{} x {}".format(*returns.shape),
            f"{returns.mean():.0f} [{low:.0f}, {high:.0f}]",
            f"{score:.1f}",
            f"{data['mean_return']:.0f}",
            f"{policy['sampled']:.0f} / {policy['deterministic']:.0f}" if policy else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


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
    for peer in sorted(peers, key=lambda p: p["algorithm"]):
        (low, high), name = peer["data"]["ref"], peer["data"]["name"]
        what = peer["algorithm"].upper(), name, peer["updates"]
        (ours,) = [
            run["returns"]
            for run in runs
            if (title(run), run["dataset"], run["config"]["num_updates"]) == what
        ]
        cells = []
        for returns in (ours, [peer["returns"][str(peer["updates"])]]):
            score = 100 * (np.array(returns) - low) / (high - low)
            ends = "{:.1f}, {:.1f}".format(*curve.interval(score))
            seeds = f"{len(score)} seed{'s' * (len(score) > 1)}"
            cells.append(f"{score.mean():.1f} [{ends}], {seeds}")
        cells = [name, what[0], f"{what[2]:,}", cells[0], peer["peer"]["name"], cells[1]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


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
        low, high = curve.interval(np.array([row["scores"]]))
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


def plot(runs, path):
    """A panel for each dataset: return against updates, mean of the seeds and their range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    panels = defaultdict(list)
    for run in runs:
        panels[run["dataset"]].append(run)
    names = sorted({title(run) for run in runs})
    colors = dict(zip(names, pyplot.get_cmap("tab20").colors, strict=False))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.6 * len(panels), 4.4), squeeze=False)
    for axis, (dataset, group) in zip(axes[0], sorted(panels.items()), strict=True):
        for run in sorted(group, key=title):
            x, y = np.array([*map(int, run["curve"])]), np.array([*run["curve"].values()])
            axis.plot(x, y.mean(1), color=colors[title(run)], lw=2, label=title(run))
            axis.fill_between(x, y.min(1), y.max(1), color=colors[title(run)], alpha=0.15, lw=0)
        data = group[0]["data"]
        axis.axhline(data["mean_return"], color="0.3", ls="--", lw=1.2, label="data's mean")
        if data["policy_return"]:
            policy = data["policy_return"]["deterministic"]
            axis.axhline(policy, color="0.3", ls=":", lw=1.2, label="behaviour policy, greedy")
        axis.set(title=dataset, xlabel="gradient updates", xscale="log")
        axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
        below = dict(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
        axis.legend(frameon=False, fontsize=8, **below)
    axes[0, 0].set_ylabel("return of an episode")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(cfg: Config):
    results = Path(cfg.results)
    (results / "runs").mkdir(parents=True, exist_ok=True)
    for folder in map(Path, cfg.runs):
        run = collect(folder)
        parts = run["algorithm"], run["dataset"].replace("/", "-"), folder.resolve().name
        name = "-".join(parts) + ".json"
        (results / "runs" / name).write_text(json.dumps(run, indent=1) + "\n", "utf-8")
    runs, peers = (
        [json.loads(path.read_text("utf-8")) for path in sorted((results / kind).glob("*.json"))]
        for kind in ("runs", "peers")
    )
    runs = list(merge(runs))
    if not runs:
        raise SystemExit(f"no runs in {results / 'runs'}")
    values, planning, stitching, parity, resume = (
        json.loads((results / f"{name}.json").read_text("utf-8"))
        for name in ("values", "planning", "stitching", "parity", "resume")
    )
    tables = {
        "scores": table(runs),
        "peers": peers_table(runs, peers),
        "parity": parity_table(parity),
        "resume": resume_table(resume["rows"]),
        "values": value_table(values),
        "planning": planning_table(planning),
        "stitching": stitching_table(stitching["runs"]),
    }
    plot(runs, results / "curves.png")
    readme = ROOT / "README.md"
    text = readme.read_text("utf-8")
    for mark, content in tables.items():
        before, rest = text.split(f"<!-- {mark} -->\n")
        after = rest.split(f"<!-- end of {mark} -->")[1]
        text = f"{before}<!-- {mark} -->\n{content}<!-- end of {mark} -->{after}"
    readme.write_text(text, "utf-8")


if __name__ == "__main__":
    main(tyro.cli(Config))
