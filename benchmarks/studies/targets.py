"""Does the Decision Transformer reach the return it is conditioned on?

    python -m benchmarks.studies.targets runs/dt/... runs/dt/...

The first seed of each run acts ten episodes for each target return, from the worst return in the
data to a fifth of the range above the best. Writes targets.json and targets.png to
benchmarks/results.
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import tyro

from benchmarks.scores.runs import origin
from common import datasets, evaluation, experiment

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Config:
    runs: tyro.conf.Positional[tuple[str, ...]]  # run folders of dt.py
    targets: int = 7  # number of target returns, evenly spread
    episodes: int = 10  # for each target
    results: str = str(ROOT / "benchmarks/results")  # folder for targets.json and targets.png


def measure(run, cfg):
    """Target returns and achieved returns of a run's first seed, as plain data."""
    module, own, state = evaluation.load(run)
    data = datasets.load(own.env, own.env_id)
    worst, best = data.returns().min(), data.returns().max()
    asked = np.linspace(worst, best + 0.2 * (best - worst), cfg.targets)
    own = replace(own, targets=tuple(map(float, asked)))
    act = jax.jit(jax.vmap(module.policy(own), (0, 0, 0, 0, None)))
    state = jax.tree.map(lambda x: x[:1], state)
    total = cfg.targets * cfg.episodes
    returns = evaluation.evaluate(partial(act, state), data.env_id, 1, total)
    return {
        "dataset": own.env,
        **origin(run),
        "num_updates": own.num_updates,
        "asked": asked.tolist(),
        "achieved": returns.reshape(cfg.targets, cfg.episodes).tolist(),
        "data_returns": np.quantile(data.returns(), [0, 0.25, 0.5, 0.75, 1]).tolist(),
    }


def plot(rows, path):
    """Draws a panel for each dataset: every episode, the mean, and achieved = target."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(rows), figsize=(4.6 * len(rows), 4.2), squeeze=False)
    for axis, row in zip(axes[0], rows, strict=True):
        asked, achieved = np.array(row["asked"]), np.array(row["achieved"])
        spans = np.array(row["data_returns"])  # quartiles
        axis.axvspan(spans[0], spans[4], color="0.94", label="returns in the data")
        axis.axvspan(spans[1], spans[3], color="0.85", label="middle half of them")
        axis.plot(asked, asked, color="0.3", ls="--", lw=1.2, label="achieved = target")
        axis.scatter(np.repeat(asked, achieved.shape[1]), achieved.ravel(), s=8, alpha=0.4)
        axis.plot(asked, achieved.mean(1), lw=2, label="mean of the episodes")
        axis.set(title=row["dataset"], xlabel="target return")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("achieved return")
    axes[0, 0].legend(frameon=False, fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(cfg: Config):
    rows = [measure(run, cfg) for run in cfg.runs]
    for row in rows:
        for asked, achieved in zip(row["asked"], row["achieved"], strict=True):
            print(f"{row['dataset']}: target {asked:.0f}, achieved {np.mean(achieved):.0f}")
    results = Path(cfg.results)
    results.mkdir(parents=True, exist_ok=True)
    record = experiment.machine() | {"rows": rows}
    (results / "targets.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    plot(rows, results / "targets.png")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
