"""How often do policies solve OGBench's tasks, trained on data of our own? pip install ogbench

    python -m benchmarks.studies.ogbench runs/iql/stillwater-cube-single-play-v0/...

The last checkpoint of each run plays whole episodes; OGBench's environment says whether one is
solved. Adds the runs to benchmarks/results/ogbench.json. Data come from benchmarks.collect.ogbench.
"""

import json
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import jax
import tyro

from benchmarks.scores.runs import NAMES, origin, text
from common import evaluation, experiment

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Config:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # run folders
    episodes: int = 20  # of each seed
    out: str = str(ROOT / "benchmarks/results/ogbench.json")  # file to add to


def measure(run, episodes):
    """The row of results of a run."""
    module, cfg, state = evaluation.load(run)
    info, _ = experiment.read(run)
    act = jax.jit(jax.vmap(module.policy(cfg), (0, 0, 0, 0, None)))
    env_id = info["dataset"]["env_id"]
    returns, successes = evaluation.outcomes(partial(act, state), env_id, cfg.num_seeds, episodes)
    name, machine = NAMES[info["algorithm"]], experiment.machine()
    machine["versions"]["ogbench"] = version("ogbench")
    return {
        "run": f"{name}, alpha {cfg.alpha:g}" if name == "FQL" else name,
        **origin(run),
        **{name: machine[name] for name in ("versions", "device")},
        "dataset": cfg.env,
        "env_id": env_id,
        "updates": experiment.last_step(run),
        "successes": successes.tolist(),
        "returns": returns.tolist(),
    }


def main(cfg: Config):
    out = Path(cfg.out)
    rows = json.loads(out.read_text("utf-8")) if out.exists() else {}
    for run in cfg.runs:
        row = rows[f"{run.parent.parent.name}-{run.name}"] = measure(run, cfg.episodes)
        found = [sum(one) / len(one) for one in row["successes"]]
        print(f"{row['run']}, {row['dataset']}: {', '.join(f'{x:.0%}' for x in found)}", flush=True)
        out.write_text(text(rows), "utf-8")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
