"""Finished runs, collected from their folders; named, merged and chosen for tables and figures."""

import csv
import io
import json
import re
import tarfile
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import numpy as np

NAMES = {  # algorithms in their standard setting; with other flags it is a variant
    "bc": "BC",
    "bc --fraction 0.1": "10%BC",
    "sac": "SAC",
    "td3_bc": "TD3+BC",
    "rebrac": "ReBRAC",
    "edac": "EDAC",
    "bcq": "BCQ",
    "bear": "BEAR",
    "brac": "BRAC",
    "awr": "AWR",
    "awac": "AWAC",
    "iql": "IQL",
    "fql": "FQL",
    "cql": "CQL",
    "cal_ql": "Cal-QL",
    "mopo --penalty-scale 0": "MBPO",
    "mopo": "MOPO",
    "combo": "COMBO",
    "mobile": "MOBILE",
    "rvs": "RvS",
    "bc --head categorical": "BC-categorical",
    "discrete_cql --alpha 0": "DQN",
    "discrete_bcq": "discrete BCQ",
    "discrete_cql": "discrete CQL",
    "dt": "DT",
    "diffuser": "Diffuser",
    "decision_diffuser": "Decision Diffuser",
    "rlpd": "RLPD",
}
STANDARD = tuple(NAMES.values())
DISCRETE = ("BC-categorical", "DQN", "discrete BCQ", "discrete CQL")  # on data of their own
HOW_LONG = """env env-id out seed num-seeds num-updates log-every eval-every eval-episodes
save-every""".split()
SHORT = {  # flags of the short budget, see __main__
    "cql": ["num-actions"],
    **dict.fromkeys(("mopo", "mobile"), "max-epochs widths".split()),
    "discrete_bcq": ["widths"],
    "discrete_cql": ["widths"],
    "cal_ql": ["num-actions"],
    "combo": "num-actions max-epochs widths".split(),
    "fql": ["widths"],
    "rvs": "batch-size widths".split(),
    "dt": ["warmup"],
    "decision_diffuser": "batch-size lr".split(),
    "diffuser": "batch-size lr plan-every ddim-steps samples".split(),
}
ROBOTS = ("HalfCheetah", "Hopper", "Walker2d", "Ant-")


def command(info):
    """What was typed for a run, of its config.json; without --out, which only says where."""
    words = [Path(info["command"][0]).name, *info["command"][1:]]
    if "--out" in words:
        at = words.index("--out")
        words = words[:at] + words[at + 2 :]
    return "python algorithms/" + " ".join(words)


def origin(folder):
    """What makes a run folder's policy anew: {"command": ..., "commit": ...}."""
    info = json.loads((Path(folder) / "config.json").read_text("utf-8"))
    return {"command": command(info), "commit": info["commit"]}


def add(folder, results, stopped=False):
    """Writes the run's JSON below `results`: its Path. stopped: the run need not have finished."""
    run = collect(folder, stopped)
    path = results / "runs" / file_name(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and json.loads(path.read_text("utf-8"))["command"] != run["command"]:
        raise SystemExit(f"{folder}: {path.name} is another run's. Rename the folder.")
    path.write_text(text(run), "utf-8")
    return path


def file_name(run):
    """Where a collected run's JSON is kept below results/runs."""
    return "-".join([run["algorithm"], run["dataset"].replace("/", "-"), run["folder"]]) + ".json"


def text(record):
    """JSON with a line for each key, and for each object in a list or dict of objects."""
    lines = []
    for key, value in record.items():
        whole, rows = json.dumps(value), value.values() if isinstance(value, dict) else value
        if isinstance(value, list | dict) and value and all(isinstance(x, dict) for x in rows):
            parts = [json.dumps(x) for x in rows]
            if isinstance(value, dict):
                parts = [f"{json.dumps(k)}: {x}" for k, x in zip(value, parts, strict=True)]
            whole = whole[0] + "\n  " + ",\n  ".join(parts) + "\n " + whole[-1]
        lines.append(f" {json.dumps(key)}: {whole}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def pack(folders, archive):
    """Writes the JSONs of these run folders, those that have finished, to a .tar.gz: how many."""
    count = 0
    with tarfile.open(archive, "w:gz") as tar:
        for folder in folders:
            with suppress(SystemExit):  # not finished
                raw = text(run := collect(folder)).encode()
                info = tarfile.TarInfo(file_name(run))
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
                count += 1
    return count


def unpack(archive, results):
    """Adds the JSONs of a .tar.gz that `pack` wrote to results/runs: how many.

    Only plain files are read, and only what parses as a run is written, under its own name.
    """
    count = 0
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            if not member.isfile() or not re.fullmatch(r"[\w.-]+\.json", member.name):
                raise SystemExit(f"{archive}: {member.name!r} is not the name of a result.")
            run = json.loads(tar.extractfile(member).read().decode())
            if member.name != file_name(run):
                raise SystemExit(f"{archive}: {member.name!r} does not hold the run that it names.")
            path = results / "runs" / member.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text(run), "utf-8")
            count += 1
    return count


def collect(folder, stopped=False):
    """What a run folder says of itself, as plain data.

    stopped: its result is that of its last evaluation, whether or not it has finished.

    evaluations: {updates: (S, E) returns to two decimals}; returns: the last one's in full; curve:
    {updates: (S,) means}; seconds: {updates: of training and evaluating until then}.
    """
    info = json.loads((folder / "config.json").read_text("utf-8"))
    returns = json.loads((folder / "returns.json").read_text("utf-8"))
    config, dataset = info["config"], info["dataset"]
    last = max(map(int, returns)) if stopped else config["num_updates"]
    if str(last) not in returns:
        raise SystemExit(f"{folder} has not finished: nothing at update {last:,}")
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["step"] in returns]
    made = dataset["metadata"].get("stillwater", {})
    return {
        "algorithm": info["algorithm"],
        "folder": folder.resolve().name,
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
        "returns": returns[str(last)],
    }


def whose(dataset):
    """Whose data: our own (collect.py leaves its settings in them), D4RL's, or another's."""
    if "stillwater" in dataset["metadata"]:
        return "ours"
    return "D4RL" if dataset["layout"] == "D4RL" and dataset["verified"] is not False else "other"


def title(run):
    """The algorithm, and the flags that make it another one."""
    name, words = run["algorithm"], run["command"].replace("=", " ")
    skip = "|".join([*HOW_LONG, *SHORT.get(name, [])])
    flags = re.findall(rf"--(?!(?:{skip})(?= |$))\S+(?: (?!--)\S+)*", words.replace("_", "-"))
    if [name, *flags] == ["cql", "--alpha 0"]:
        return "SAC (cql --alpha 0)"
    label = NAMES.get(name, name.upper())
    for known, other in NAMES.items():
        first, *own = known.split(" ", 1)
        if first == name and own and own[0] in flags:
            label = other
            flags.remove(own[0])
    return " ".join([label, *flags])


def merge(runs):
    """Runs that differ in their seeds alone as one, with what the tables and figures need.

    Of two runs of one seed the later one counts. A seed that diverged is left out, and counted.
    scores (S, E): of the last evaluation. curve: {updates: (S,) scores}.
    """
    groups = defaultdict(list)
    for run in runs:
        config = {k: v for k, v in run["config"].items() if k not in ("seed", "num_seeds")}
        what = run["algorithm"], run["dataset"], run["data"]["sha256"], json.dumps(config)
        groups[what].append(run)
    for group in groups.values():
        seeds = {}
        for run in group:
            for i, returns in enumerate(run["returns"]):
                seeds[run["config"]["seed"] + i] = (run, i, np.isfinite(returns).all())
        found = [(run, i) for _, (run, i, finite) in sorted(seeds.items()) if finite]
        if not found:
            continue
        last = group[-1]
        returns = np.array([run["returns"][i] for run, i in found])
        curve, evaluations = {}, {}
        for t in last["curve"]:
            evaluations[t] = [run["evaluations"][t][i] for run, i in found]
            curve[int(t)] = score(last, np.array([run["curve"][t][i] for run, i in found]))
        yield last | {
            "title": min(map(title, group), key=len),  # without defaults spelled out
            "updates": max(map(int, last["curve"])),
            **{"returns": returns.tolist(), "scores": score(last, returns)},
            "evaluations": evaluations,
            **{"curve": curve, "diverged": len(seeds) - len(found)},
        }


def behaviour(run):
    """{name: return} of what a run learned from."""
    data = run["data"]
    policy = data["policy_return"] or {}
    names = {"sampled": "behaviour policy, sampled", "deterministic": "behaviour policy, greedy"}
    return {"data's mean": data["mean_return"]} | {names[k]: x for k, x in policy.items()}


def score(run, x):
    low, high = run["data"]["ref_min"], run["data"]["ref_max"]
    return 100 * (x - low) / (high - low)


def short(dataset):
    return dataset.removeprefix("stillwater/").removesuffix("-v0")


def chosen(runs):
    """{(title, dataset): run} in standard settings; of two the longer, then that of more seeds."""
    runs = sorted(runs, key=lambda run: (run["updates"], len(run["scores"])))
    best = {(run["title"], run["dataset"]): run for run in runs if run["title"] in STANDARD}
    return dict(sorted(best.items(), key=lambda item: (STANDARD.index(item[0][0]), item[0][1])))


def settled(run):
    """Whether the run's critic, if it bootstraps one, has settled.

    Q's slowest mode approaches its fixed point with a time constant of 1 / (polyak (1 - gamma))
    updates; five of them leave 0.7 % of the distance. Methods without a target network are settled.
    """
    polyak = run["config"].get("polyak")
    return polyak is None or run["updates"] * polyak * (1 - run["config"]["gamma"]) > 4.999


def finished(runs):
    """(datasets, {(title, dataset): run}): what the first page shows, of locomotion runs.

    The datasets are those on which at least half of the methods have settled; a method is in if it
    has settled on all of them.
    """
    best = chosen(run for run in runs if is_locomotion(run) and settled(run))
    titles = {title for title, _ in best}
    where = defaultdict(set)
    for title, dataset in best:
        where[dataset].add(title)
    datasets = sorted(name for name, found in where.items() if 2 * len(found) >= len(titles))
    titles = {title for title in titles if all((title, name) in best for name in datasets)}
    found = {(t, d): run for (t, d), run in best.items() if t in titles and d in datasets}
    return datasets, found


def is_locomotion(run):
    """Whether the run is about locomotion."""
    return run["env_id"].startswith(ROBOTS)


def comparable_runs(runs):
    """(datasets, {title: runs}, titles): algorithms that have them all; those that do not.

    The datasets: of locomotion, those that at least half of the algorithms have. Runs: one on each,
    settled and of equally many updates, as many as possible; seeds beyond the fewest on a dataset
    are cut off.
    """
    runs = [run for run in runs if is_locomotion(run) and settled(run)]
    runs = [run for run in runs if run["title"] in STANDARD]
    have = defaultdict(set)
    for run in runs:
        have[run["dataset"]].add(run["title"])
    titles = sorted({run["title"] for run in runs}, key=STANDARD.index)
    datasets = [name for name in sorted(have) if 2 * len(have[name]) >= len(titles)]
    found = {}
    for name in titles:
        for updates in sorted({run["updates"] for run in runs}):
            same = [run for run in runs if (run["title"], run["updates"]) == (name, updates)]
            best = {dataset: run for (_, dataset), run in chosen(same).items()}
            if all(dataset in best for dataset in datasets):
                found[name] = [best[dataset] for dataset in datasets]
    return datasets, found, [name for name in titles if name not in found]


def matrix(runs):
    """(K, S) scores of one algorithm on K datasets, each seed's the mean of its episodes."""
    seeds = min(len(run["scores"]) for run in runs)
    return np.array([run["scores"][:seeds].mean(1) for run in runs])
