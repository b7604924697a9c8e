"""Does the Decision Transformer obey? The return that it achieves against the return asked for.

    python -m benchmarks.studies.targets runs/dt/... runs/dt/...

Writes targets.json and targets.png to benchmarks/results.

Returns from the data's worst to a fifth beyond its best, each of ten episodes of a run's first
seed, on the environment seeds of every evaluation.
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
    targets: int = 7  # returns asked for, evenly spread
    episodes: int = 10  # for each
    results: str = str(ROOT / "benchmarks/results")  # where everything goes


def measure(run, cfg):
    """What a run's first seed was asked for, and achieved, as plain data."""
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
    """A panel for each dataset: every episode, the mean, and what obedience would be."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(rows), figsize=(4.6 * len(rows), 4.2), squeeze=False)
    for axis, row in zip(axes[0], rows, strict=True):
        asked, achieved = np.array(row["asked"]), np.array(row["achieved"])
        axis.axvspan(
            *np.array(row["data_returns"])[[0, 4]], color="0.94", label="returns in the data"
        )
        axis.axvspan(*np.array(row["data_returns"])[[1, 3]], color="0.85", label="half of them")
        axis.plot(asked, asked, color="0.3", ls="--", lw=1.2, label="achieved = asked")
        axis.scatter(np.repeat(asked, achieved.shape[1]), achieved.ravel(), s=8, alpha=0.4)
        axis.plot(asked, achieved.mean(1), lw=2, label="mean of the episodes")
        axis.set(title=row["dataset"], xlabel="return asked for")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("return achieved")
    axes[0, 0].legend(frameon=False, fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(cfg: Config):
    rows = [measure(run, cfg) for run in cfg.runs]
    for row in rows:
        for asked, achieved in zip(row["asked"], row["achieved"], strict=True):
            print(f"{row['dataset']}: asked {asked:.0f}, achieved {np.mean(achieved):.0f}")
    results = Path(cfg.results)
    results.mkdir(parents=True, exist_ok=True)
    record = experiment.machine() | {"rows": rows}
    (results / "targets.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    plot(rows, results / "targets.png")


if __name__ == "__main__":
    main(tyro.cli(Config))
