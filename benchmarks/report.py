"""Collects finished runs and writes the generated tables and pictures.

    python -m benchmarks.report runs/iql/... runs/cql/...   # adds these runs to results/runs first
    python -m benchmarks.report                             # tables and pictures of all results

A run's JSON holds its command, config, commit, versions, device, curve and the returns of every
evaluation. A page of PAGES shows a table between `<!-- NAME -->` and `<!-- end of NAME -->`, where
NAME is one of TABLES.
"""

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import tyro

from benchmarks.markdown import markdown
from benchmarks.scores import figures
from benchmarks.scores import tables as score_tables
from benchmarks.scores.runs import NAMES, add, comparable_runs, finished, merge, short
from benchmarks.speed import tables as speed_tables
from benchmarks.studies import choosing, claims_pictures, online, settling, sweep
from common.experiment import statistics

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "benchmarks/README.md")
IN_PART = ("support", "behaviours", "edac")  # claims that hold in part, as their notes say


@dataclass(frozen=True)
class Config:
    runs: tyro.conf.Positional[tuple[str, ...]] = ()  # run folders to add
    stopped: bool = False  # also those of runs that were stopped, with their last evaluation
    results: str = str(ROOT / "benchmarks/results")  # where the results lie


def value_table(rows):
    """The numbers of studies/values.py."""
    names = ["dataset", "run", "updates", "Q, data's action", "true", "Q, policy's action", "true"]
    lines = []
    for row in sorted(rows, key=lambda r: (r["dataset"], r["run"])):
        numbers = [f"{row[k]:.1f}" for k in ("q_data", "true_data", "q_pi", "true_pi")]
        lines.append([row["dataset"], row["run"], f"{row['num_updates']:,}", *numbers])
    return markdown(names, lines)


ARROWS = {"rises": " ↑", "falls": " ↓", "": ""}  # a Q that still moves


def settling_table(rows):
    """Scores and Q of studies/settling.py; an arrow marks a Q that still moves."""
    names = ["dataset (data's mean)", "run", "seeds"]
    names += [f"{what} at {step:,}" for what in ("score", "Q") for step in settling.POINTS]
    lines = []
    for row in rows:
        found = [settling.summary(row, step) for step in settling.POINTS]
        scores, q = ["–"] * len(found), ["" if row["q"] == {} else "–"] * len(found)
        for i, (mean, (low, high), value, moving) in ((i, x) for i, x in enumerate(found) if x):
            scores[i] = f"{mean:z.1f}" + f" [{low:z.1f}, {high:z.1f}]" * bool(low < high)
            q[i] = "" if value is None else f"{value:.0f}{ARROWS[moving]}"
        data = f"{short(row['dataset'])} ({row['data_score']:.1f})"
        seeds = len(row["scores"][str(settling.POINTS[0])])
        lines.append([data, row["run"], seeds, *scores, *q])
    return markdown(names, lines)


def model_table(rows):
    """The models' errors of studies/settling.py."""
    names = ["model", "error on the holdout", "actions", "after 1 step"]
    names += [f"after {len(rows[0]['data']['errors'])} steps", "reward, model - true"]
    lines = []
    for row in rows:
        first = [f"{row['max_epochs']} epochs", f"{row['holdout']:.2f}"]
        for who, title in (("data", "the data's"), ("policy", "the policy's")):
            errors, bias = row[who]["errors"], row[who]["reward_bias"]
            cells = [f"{errors[0]:.2f}", f"{errors[-1]:.2f}", f"{bias:+z.2f}"]
            lines.append([*first, title, *cells])
            first = ["", ""]
    return markdown(names, lines)


def checkpoint_table(rows):
    """Q, true returns and replay buffers of studies/settling.py."""
    names = ["updates", "Q, policy's action", "true", "buffer outside the data's range", "cut"]
    lines = [
        [
            f"{row['step']:,}",
            f"{row['q_pi']:.1f}{ARROWS[row['moving']]}",
            f"{row['true_pi']:.1f}",
            *(f"{row[k]:.1%}" for k in ("outside", "cut")),
        ]
        for row in rows
    ]
    return markdown(names, lines)


def beside_peers(runs, peers):
    """[(dataset, algorithm, updates, our scores (S, E), peer's name, its scores)]."""
    groups = defaultdict(list)
    for peer in sorted(peers, key=lambda p: (p["algorithm"], p["updates"], p["seed"])):
        groups[NAMES[peer["algorithm"]], peer["data"]["name"], peer["updates"]].append(peer)
    found = []
    for (algorithm, dataset, updates), group in groups.items():
        low, high = group[0]["data"]["ref"]
        theirs = [peer["returns"][str(updates)] for peer in group]
        scores = [
            100 * (np.array(returns) - low) / (high - low)
            for returns in (ours(runs, algorithm, dataset, updates), theirs)
        ]
        found.append((dataset, algorithm, updates, scores[0], group[0]["peer"]["name"], scores[1]))
    return found


def peers_table(runs, peers):
    """The scores of other implementations beside ours, same data and updates."""

    def cell(score):
        ends = "{:.1f}, {:.1f}".format(*statistics.interval(statistics.of_seeds(score)))
        return f"{score.mean():.1f} [{ends}], {len(score)} seed{'s' * (len(score) > 1)}"

    names = ["dataset", "algorithm", "updates", "ours", "peer", "theirs"]
    lines = [
        [dataset, algorithm, f"{updates:,}", cell(own), peer, cell(theirs)]
        for dataset, algorithm, updates, own, peer, theirs in beside_peers(runs, peers)
    ]
    return markdown(names, lines)


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
    """The largest relative difference of each kind of number, by `benchmarks.parity`."""
    kinds = {  # the first whose words are in a quantity's name
        "losses": ("loss of", "loss", "error", "gap"),
        "gradients": ("gradient",),
        "weights after updates": ("after", "average", "parameters"),
        "other": ("",),
    }
    lines, groups = [], defaultdict(lambda: defaultdict(list))
    for row in rows:
        names = (kind for kind, words in kinds.items() if any(w in row["quantity"] for w in words))
        if not row["differs"]:
            groups[row["algorithm"], row["peer"]][next(names)].append(row["difference"])
    for (algorithm, peer), found in groups.items():
        cells = [f"{max(found[kind]):.0e}" if found[kind] else "" for kind in kinds]
        total = sum(map(len, found.values()))
        lines.append([NAMES.get(algorithm, algorithm.upper()), peer, *cells, total])
    return markdown(["algorithm", "peer", *kinds, "numbers"], lines)


def resume_table(rows):
    """The numbers of faults/resume.py."""
    phases = ["starting", "compiling", "training", "evaluating", "between metrics and checkpoint"]
    phases += ["writing the checkpoint"]
    lines = []
    for row in rows:
        name = NAMES.get(row["algorithm"], row["algorithm"].upper())
        cells = [name, row["kills"], *(row["phases"].get(x, 0) for x in phases)]
        cells += [row.get("twice_in_a_row", 0), row["runs"]]
        lines.append([*cells, f"{row['runs_with_equal_bits']} of {row['runs']}"])
    names = ["", "kills", *phases, "twice in a row", "runs", "equal bits at the end"]
    return markdown(names, lines)


def harm_table(rows):
    """The numbers of faults/harm.py."""
    lines = [[row["kind"], row["cases"], row["before"], row["after"]] for row in rows]
    totals = [sum(row[key] for row in rows) for key in ("cases", "before", "after")]
    return markdown(["kind", "cases", "passed before", "now"], [*lines, ["all", *totals]])


def planning_table(rows):
    """The numbers of studies/planning.py."""
    names = ["dataset", "algorithm", "planner", "ms a step, 1 episode", "10 episodes", "score"]
    lines = []
    for row in rows:
        score = ""  # measured with --no-scores
        if scores := row.get("scores"):
            low, high = statistics.interval(np.array([scores]))
            score = f"{np.mean(scores):.1f} [{low:.1f}, {high:.1f}], {len(scores)} episodes"
        times = [f"{row[k]:,.0f}" if row[k] >= 100 else f"{row[k]:.2g}" for k in ("ms_1", "ms_10")]
        who = NAMES[row["algorithm"]]
        lines.append([row["dataset"], who, row["variant"], *times, score])
    return markdown(names, lines)


def ogbench_table(runs):
    """The numbers of studies/ogbench.py."""
    lines = []
    for run in sorted(runs.values(), key=lambda run: (run["dataset"], run["updates"], run["run"])):
        solved = 100 * np.array(run["successes"])
        low, high, mark = score_tables.ends({"scores": solved})
        size = score_tables.count(len(solved), each=f" x {solved.shape[1]}")
        cells = [short(run["dataset"]), run["run"], f"{run['updates']:,}", size]
        cells += [f"{solved.mean():.0f} [{low:.0f}, {high:.0f}]{mark}"]
        lines.append([*cells, f"{np.mean(run['returns']):.0f}"])
    names = ["dataset", "algorithm", "updates", "seeds x episodes", "solved, % [95 % interval]"]
    table = markdown([*names, "return"], lines)
    return f"{table}\n{score_tables.legend(table)}\n"


def stitching_table(runs):
    """The numbers of studies/stitching.py."""
    lines = [[who, f"{run['to_C']:.0%}", f"{run['to_F']:.0%}"] for who, run in runs.items()]
    return markdown(["", "A to C", "A to F"], lines)


def generalisation_table(record):
    """The numbers of studies/generalisation."""
    lines = []
    for task, found in record.items():
        for what, title in (("mean", "data's mean"), ("best", "data's best episode")):
            lines.append([task, f"*{title}*", f"*{found['data'][what]:,.0f}*", "", ""])
        for row in found["rows"]:
            cell = f"{row['mean']:,.0f} [{row['low']:,.0f}, {row['high']:,.0f}]"
            seeds = f"{row['seeds']}" + f", {row['diverged']} diverged" * bool(row["diverged"])
            lines.append([task, row["run"], cell, f"{row['updates']:,}", seeds])
    return markdown(["task", "policy", "return [95 % interval]", "updates", "seeds"], lines)


def trust_table(stored):
    """One number and one link for each claim of the first page."""
    parity = [row for row in stored("parity") if not row["differs"]]
    names = {row["algorithm"] for row in parity}
    worst = max(row["difference"] for row in parity)
    gaps = [own.mean() - theirs.mean() for *_, own, _, theirs in beside_peers(*stored.runs())]
    resume, fuzz = stored("resume")["rows"], stored("fuzz")
    total, equal, kills = (
        sum(row[key] for row in resume) for key in ("runs", "runs_with_equal_bits", "kills")
    )
    bad = sum(fuzz["counts"][kind] for kind in ("exception", "crashed", "hung", "grew"))

    def link(title):
        return f"[{title.lower()}](benchmarks/README.md#{title.lower().replace(' ', '-')})"

    lines = [
        [
            "Losses, gradients and weights equal those of the authors' code or a trusted port.",
            f"largest relative difference of {len(parity)} numbers in {len(names)} algorithms: "
            f"{worst:.0e}",
            link("Parity"),
        ],
        [
            "Scores equal those of other code on the same data.",
            f"{len(gaps)} comparisons, at most {max(0, -min(gaps)):.1f} points below",
            link("Scores of other code"),
        ],
        [
            "A killed and resumed run ends with the same bits.",
            f"{equal} of {total} runs, {kills} kills",
            link("Resuming"),
        ],
        [
            "A damaged file is read or refused, never crashes or hangs the reader.",
            f"{bad} of {fuzz['files']:,} damaged HDF5 files do harm",
            link("Damaged files"),
        ],
        [
            "The papers' claims hold where the true values are known.",
            f"{len(stored('claims'))} claims, {len(IN_PART)} of them in part",
            link("Claims"),
        ],
    ]
    return markdown(["claim", "measured", "details"], lines)


class Stored:
    """The results below a folder, each read once: `stored("parity")` is parity.json."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.runs, self.speed = cache(self._runs), cache(self._speed)
        self._read = cache(
            lambda name: json.loads((self.folder / f"{name}.json").read_text("utf-8"))
        )

    def __call__(self, name):
        return self._read(name)

    def _runs(self):
        """(merged runs, peers' runs)."""
        runs, peers = (
            [
                json.loads(path.read_text("utf-8"))
                for path in sorted(self.folder.glob(f"{x}/*.json"))
            ]
            for x in ("runs", "peers")
        )
        for run in runs:
            if run["data"]["ref_max"] is None:
                print(f"left out, its data have no reference returns: {run['command']}")
        return list(merge(run for run in runs if run["data"]["ref_max"] is not None)), peers

    def _speed(self):
        """(our rows, other code's rows), by cores."""
        return speed_tables.load(self.folder)


SCORES = (
    score_tables.headline,
    score_tables.long_table,
    score_tables.aggregate,
    score_tables.time_table,
)


def of_scores(write):
    """A table of the runs on each source's data."""
    return lambda stored: score_tables.by_source(stored.runs()[0], write)


TABLES = {  # name in a page: what stands there
    "headline": of_scores(score_tables.headline),
    "trust": trust_table,
    "speed summary": lambda stored: speed_tables.summary_table(*stored.speed()),
    "scores": of_scores(score_tables.long_table),
    "aggregate": of_scores(score_tables.aggregate),
    "time": of_scores(score_tables.time_table),
    "discrete": of_scores(score_tables.discrete_table),
    "peers": lambda stored: peers_table(*stored.runs()),
    "parity": lambda stored: parity_table(stored("parity")),
    "resume": lambda stored: resume_table(stored("resume")["rows"]),
    "harm": lambda stored: harm_table(stored("harm")["rows"]),
    "values": lambda stored: value_table(stored("values")["rows"]),
    "settling": lambda stored: settling_table(stored("settling")["runs"]),
    "settling models": lambda stored: model_table(stored("settling")["models"]),
    "settling checkpoints": lambda stored: checkpoint_table(stored("settling")["checkpoints"]),
    "sweep": lambda stored: sweep.table(stored("sweep")),
    "planning": lambda stored: planning_table(stored("planning")["rows"]),
    "online": lambda stored: online.table(stored("online")),
    "choosing": lambda stored: choosing.table(stored("choosing")),
    "stitching": lambda stored: stitching_table(stored("stitching")["runs"]),
    "generalisation": lambda stored: generalisation_table(stored("generalisation")),
    "ogbench": lambda stored: ogbench_table(stored("ogbench")),
    "speed": lambda stored: speed_tables.own_table(stored.speed()[0]),
    "speed of seeds": lambda stored: speed_tables.seeds_table(stored.speed()[0]),
    "speed of a million": lambda stored: speed_tables.million_table(stored("speed-seeds")),
    "profile": lambda stored: speed_tables.profile_table(stored("profile")),
    "changes": lambda stored: speed_tables.changes_table(stored("changes")),
    "speed of peers": lambda stored: speed_tables.peers_table(*stored.speed()),
}
BLOCK = re.compile(r"<!-- (?P<name>[a-z ]+) -->\n.*?<!-- end of (?P=name) -->", re.S)


def fill(page, stored):
    """The text of a page with its tables, and its algorithms' lines of code, as they are now."""

    def table(match):
        name = match["name"]
        return f"<!-- {name} -->\n{TABLES[name](stored)}<!-- end of {name} -->"

    def lines(match):
        text = (ROOT / "algorithms" / f"{match['file']}.py").read_text("utf-8")
        return f"{match['row']}{len(text.splitlines())} |"

    page = BLOCK.sub(table, page)
    return re.sub(
        r"^(?P<row>\|.*\(algorithms/(?P<file>\w+)\.py\).*\| )\d+ \|$", lines, page, flags=re.M
    )


def draw(runs, source, results):
    """The pictures of runs on one source's data."""
    if finished(runs)[1]:
        figures.curves(runs, results / score_tables.picture("curves", source))
    datasets, found, _ = comparable_runs(runs)
    if len(datasets) > 1 and found:
        figures.profiles(datasets, found, results / score_tables.picture("profiles", source))


def main(cfg: Config):
    results = Path(cfg.results)
    for folder in map(Path, cfg.runs):
        add(folder, results, cfg.stopped)
    stored = Stored(results)
    runs, _ = stored.runs()
    if not runs:
        raise SystemExit(f"no runs in {results / 'runs'}")
    figures.speed(stored.speed()[0], results / "speed.png")
    for name, claim in stored("claims").items():
        claims_pictures.draw(name, claim["found"], results / "claims" / f"{name}.png")
    for source in score_tables.SOURCES:
        draw(score_tables.of_source(runs, source), source, results)
    for page in (ROOT / name for name in PAGES):
        page.write_text(fill(page.read_text("utf-8"), stored), "utf-8")


if __name__ == "__main__":
    main(tyro.cli(Config))
