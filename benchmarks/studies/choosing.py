"""Which policy to take: estimates from data, or episodes in the environment?

    python -m benchmarks.studies.choosing RUN ...     # writes results/choosing.json and .png
    python -m benchmarks.studies.choosing             # the picture and table alone

RUN are run folders; each seed of each is a policy. Of the policies on one dataset every estimator
of algorithms/ope.py makes a ranking. Beside them stands a bandit, which plays K episodes and takes
the policy with the best mean (Unifloral, Jackson et al. 2025, arXiv:2504.11453): the first episodes
go to the policies in random order, then each to the largest

    mean + span sqrt(2 ln t / n),   n episodes of the policy, t of all; span: of returns so far

A user has `candidates` of the policies, drawn at random, and takes one. All choices are judged by
the mean return of the half of the recorded episodes that no choice is made by; the bandit draws
from the other half, and "the environment" means choosing by all of that half. Intervals are 95 %
and redraw the policies (with replacement). Differs from Unifloral's code:
- other episodes judge than those that the bandit draws from (the same)
- the bonus is scaled by the returns seen so far (not scaled)
- a policy without an episode cannot be taken (has mean 0)
- intervals redraw the policies (the repetitions of the simulation)
"""

import importlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

from benchmarks.markdown import markdown
from benchmarks.scores.runs import NAMES, origin, short, text
from common import datasets, evaluation, experiment

ROOT = Path(__file__).resolve().parents[2]

SHOWN = {  # ways to choose in the picture: colour and line
    "the environment": ("k", "--"),
    "FQE": ("C0", "-"),
    "WDR": ("C2", "-"),
    "WIS": ("C4", "-"),
    "any": ("0.5", ":"),
}
METHODS = "bc td3_bc awac iql cql".split()
FIRST = 10_000  # first seed of the environment in recorded episodes; that of the true values is 0


@dataclass(frozen=True)
class Config:
    runs: tyro.conf.Positional[tuple[str, ...]] = ()  # run folders
    episodes: int = 60  # recorded of each policy; every other one judges
    truth_episodes: int = 20  # of the policy with noise that the estimators are about
    gamma: float = 0.99  # discount of estimates
    num_updates: int = 10_000  # gradient steps of FQE
    clone_updates: int = 10_000  # gradient steps of the cloned behaviour
    lr: float = 1e-3  # of both
    polyak: float = 0.05  # step of FQE's target network
    widths: tuple[int, ...] = (64, 64)  # hidden layers of both
    candidates: int = 8  # policies to choose from
    draws: int = 5_000  # draws of candidates
    resamples: int = 200  # draws of the policies for an interval
    seed: int = 0  # of fits and draws
    results: str = str(ROOT / "benchmarks/results")  # folder for choosing.json and choosing.png


# --- Estimates and recorded episodes ---


def measure(ope, folders, dataset, cfg):
    """Rows of the policies in these run folders, all on one Dataset."""
    names = "gamma num_updates clone_updates lr polyak widths seed".split()
    same = {name: getattr(cfg, name) for name in names}
    loaded = [ope.load(folder, dataset) for folder in folders]
    own = ope.Config(**same, truth=True, episodes=cfg.truth_episodes, resamples=1)
    rows, source = ope.ope(own, dataset, loaded)
    print(f"Behaviour: {source}.")
    returns = [
        evaluation.evaluate(
            partial(run.act, run.state), dataset.env_id, len(run.names), cfg.episodes, FIRST
        )
        for run in loaded
    ]
    for row, one in zip(rows, np.concatenate(returns), strict=True):
        folder = row.pop("folder")
        _, trained = experiment.read(Path(folder).expanduser().resolve())
        row |= {"updates": trained.num_updates, **origin(folder)}
        row["scores"] = np.round(dataset.score(one), 2).tolist()
        for name in ope.ESTIMATORS:
            del row[name]["interval"]  # of one resample
    return rows


def by_dataset(folders):
    """{dataset's name: run folders}."""
    found = {}
    for folder in folders:
        info, _ = experiment.read(Path(folder).expanduser().resolve())
        found.setdefault(info["dataset"]["name"], []).append(folder)
    return found


# --- Choices ---


def bandit(rng, returns, arms, pulls):
    """Places (R, pulls) in `arms` that have the best mean after each episode.

    returns (P, E): what episodes are drawn from. arms (R, M): policies of each repetition.
    """
    (size, m), rows = arms.shape, np.arange(len(arms))
    total, count = np.zeros((2, size, m))
    low, high = np.full(size, np.inf), np.full(size, -np.inf)
    first = rng.permuted(np.tile(np.arange(m), (size, 1)), axis=1)
    best = np.zeros((size, pulls), int)
    for t in range(pulls):
        at = first[:, t] if t < m else upper_bound(total, count, high - low, t).argmax(1)
        x = returns[arms[rows, at], rng.integers(returns.shape[1], size=size)]
        total[rows, at] += x
        count[rows, at] += 1
        low, high = np.minimum(low, x), np.maximum(high, x)
        best[:, t] = np.where(count > 0, total / np.maximum(count, 1), -np.inf).argmax(1)
    return best


def upper_bound(total, count, span, t):
    """What the bandit maximises (R, M); total and count (R, M) of t episodes, span (R,)."""
    return total / count + span[:, None] * np.sqrt(2 * np.log(t) / count)


def choose(rng, rows, estimators, arms, pulls):
    """{way: true score of its choice (R,)}, of "bandit" (R, pulls). arms (R, M): candidates."""
    scores = np.array([row["scores"] for row in rows])
    seen, truth = scores[:, ::2], scores[:, 1::2].mean(1)

    def best(value):
        return truth[arms[np.arange(len(arms)), value[arms].argmax(1)]]

    found = {name: best(np.array([row[name]["value"] for row in rows])) for name in estimators}
    found |= {"any": truth[arms].mean(1), "the environment": best(seen.mean(1))}
    places = bandit(rng, seen, arms, pulls)
    return found | {"bandit": truth[np.take_along_axis(arms, places, 1)]}


def choices(rows, estimators, cfg):
    """{way: {"score", "cost" and the interval of each}}, see the top; of "bandit" by episodes."""
    rng, count = np.random.default_rng(cfg.seed), len(rows)
    size, pulls = min(cfg.candidates, count), cfg.candidates * len(rows[0]["scores"]) // 2

    def score(pools, draws):
        """{way: mean over the draws from each of the pools (B, P) of policies: (B, ...)}."""
        arms = rng.permuted(np.repeat(pools, draws, 0), axis=1)[:, :size]
        found = choose(rng, rows, estimators, arms, pulls)
        return {k: x.reshape(-1, draws, *x.shape[1:]).mean(1) for k, x in found.items()}

    whole = score(np.arange(count)[None], cfg.draws)
    again = score(rng.integers(count, size=(cfg.resamples, count)), cfg.draws // cfg.resamples)
    found = {}
    for way in whole:
        found[way] = {"score": whole[way][0], "interval": ends(again[way])}
        lost, drawn = ((x["the environment"] - x[way].T).T for x in (whole, again))
        found[way] |= {"cost": lost[0], "cost_interval": ends(drawn)}
    return {way: {k: np.round(x, 2).tolist() for k, x in own.items()} for way, own in found.items()}


def ends(drawn):
    """95 % interval (2, ...) over axis 0."""
    return np.percentile(drawn, (2.5, 97.5), axis=0)


def accuracy(ope, rows, cfg):
    """{estimator: {absolute error, Spearman with its interval, regret@1}}."""
    found, rng = ope.measures(rows, 1), np.random.default_rng(cfg.seed)
    drawn = rng.integers(len(rows), size=(cfg.resamples, len(rows)))
    truth = np.array([row["truth"] for row in rows])
    for name, x in found.items():
        value = np.array([row[name]["value"] for row in rows])
        x["interval"] = ends([ope.spearman(value[i], truth[i]) for i in drawn]).tolist()
        if np.isnan(x["spearman"]):  # all estimates are equal
            x["spearman"] = x["interval"] = None
    return found


def worth(found, way):
    """Episodes after which the bandit chooses as well as another way, or None."""
    level = found[way]["score"]
    return next((k + 1 for k, x in enumerate(found["bandit"]["score"]) if x >= level), None)


# --- Table and picture ---


def table(record):
    """The measures of every estimator on every dataset, in Markdown."""
    lines = []
    for name, data in record["datasets"].items():
        found, count = data["choices"], len(data["choices"]["bandit"]["score"])
        for way, x in data["accuracy"].items():
            error = f"{x['error']:.1f}" if x["error"] < 100 else f"{x['error']:,.0f}"
            rank = "–"  # equal estimates have none
            if x["spearman"] is not None:
                rank = "{:.2f} [{:.2f}, {:.2f}]".format(x["spearman"], *x["interval"])
            cells = [error, rank, f"{x['regret@1']:.2f}"]
            lines.append([short(name), way, *cells, cost(found[way])])
            lines[-1].append(worth(found, way) or f"more than {count}")
        lines.append([short(name), "any policy", "", "", "", cost(found["any"]), ""])
    names = ["dataset", "chosen by", "absolute error", "Spearman", "regret@1", "cost, points"]
    return markdown([*names, "episodes of the bandit"], lines)


def cost(own):
    low, high = own["cost_interval"]
    return f"{own['cost']:z.1f} [{low:z.1f}, {high:z.1f}]"


def plot(record, path):
    """A row for each dataset: FQE against the truth, and scores of choices over episodes."""
    data = record["datasets"]
    figure = Figure((10.5, 3.9 * len(data)), dpi=110, layout="constrained")
    axes = figure.subplots(len(data), 2, squeeze=False)
    for (left, right), (name, one) in zip(axes, data.items(), strict=True):
        scatter(left, one["rows"])
        left.set(title=f"{short(name)}: {len(one['rows'])} policies")
        found = one["choices"]
        pulls = np.arange(len(found["bandit"]["score"])) + 1
        right.plot(pulls, found["bandit"]["score"], color="k", lw=1.8, label="bandit")
        right.fill_between(pulls, *found["bandit"]["interval"], color="k", alpha=0.1, lw=0)
        for way, (colour, dash) in SHOWN.items():
            right.axhline(found[way]["score"], color=colour, ls=dash, lw=1.5, label=way)
        right.set(xscale="log", xlabel="episodes in the environment", ylabel="score of the choice")
        right.set(title=f"one of {record['config']['candidates']} policies is chosen")
        right.xaxis.set_major_formatter("{x:g}")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False, fontsize=9)
    axes[0, 1].legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)


def scatter(axis, rows):
    """FQE's estimate over the true value: a colour for each method, filled if trained longest."""
    longest = max(row["updates"] for row in rows)
    for i, method in enumerate(METHODS):
        for is_long in (True, False):
            group = [row for row in rows if row["policy"].split()[0] == method]
            group = [row for row in group if (row["updates"] == longest) == is_long]
            x, y = [row["truth"] for row in group], [row["FQE"]["value"] for row in group]
            look = dict(label=NAMES[method]) if is_long else dict(facecolors="none")
            axis.scatter(x, y, s=28, edgecolors=f"C{i}", **dict(color=f"C{i}") | look)
    ends = [f(row["truth"] for row in rows) for f in (min, max)]
    axis.plot(ends, ends, color="0.5", lw=1)
    axis.set(xlabel="true value", ylabel="FQE's estimate")


def main(cfg: Config):
    ope, results = importlib.import_module("algorithms.ope"), Path(cfg.results)
    path = results / "choosing.json"
    record = json.loads(path.read_text("utf-8")) if path.exists() else {"datasets": {}}
    known = record["datasets"]
    for name, folders in by_dataset(cfg.runs).items():
        print(f"{name}: {len(folders)} runs", flush=True)
        rows = measure(ope, folders, datasets.load(name), cfg)
        known[name] = {**experiment.machine(), "rows": rows}
    for name, one in sorted(known.items()):
        one["accuracy"] = accuracy(ope, one["rows"], cfg)
        one["choices"] = choices(one["rows"], ope.ESTIMATORS, cfg)
        known[name] = known.pop(name)  # in the order of their names
    record["config"] = {k: v for k, v in vars(cfg).items() if k not in ("runs", "results")}
    path.write_text(text(record), "utf-8")
    plot(record, results / "choosing.png")
    print(table(record), end="")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
