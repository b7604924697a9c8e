"""The cost of the diffusers' plans: milliseconds for each environment step, and the score.

    python -m benchmarks.studies.planning runs/diffuser/... runs/decision_diffuser/...

Measures the exact planner and faster variants (DDIM with fewer steps, several actions of a plan, a
warm start from the last plan) on the first seed of each run. Writes planning.json to
benchmarks/results, where rows of other datasets and algorithms stay. For runs in a maze it also
draws plans.png: plans, and the paths that followed.

With --no-scores it measures only times, which need an otherwise idle machine, and keeps earlier
scores of the same run.
"""

import json
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.scores.runs import origin
from common import datasets, evaluation, experiment

ROOT = Path(__file__).resolve().parents[2]

EXACT = dict(plan_every=1, ddim_steps=0, warm_start=0, samples=64)
ALONE = dict(plan_every=1, ddim_steps=0)  # Decision Diffuser's, one plan an episode
VARIANTS = {  # planners of diffuser.py, for a high return and for a goal, and decision_diffuser.py
    "diffuser": {
        "exact": EXACT,
        "DDIM, 5 steps": EXACT | dict(ddim_steps=5),
        "plan every 2": EXACT | dict(plan_every=2),
        "plan every 4": EXACT | dict(plan_every=4),
        "warm start, 5 steps": EXACT | dict(warm_start=5),
        "16 samples": EXACT | dict(samples=16),
        "DDIM 5, every 2, 16 samples": dict(ddim_steps=5, plan_every=2, warm_start=0, samples=16),
    },
    "decision_diffuser": {
        "exact": ALONE,
        "DDIM, 5 steps": ALONE | dict(ddim_steps=5),
        "plan every 2": ALONE | dict(plan_every=2),
        "plan every 4": ALONE | dict(plan_every=4),
        "DDIM 5, every 2": dict(ddim_steps=5, plan_every=2),
    },
    "diffuser with a goal": {
        "no plan, straight to the goal": None,
        "exact, one plan": dict(plan_every=0),
        "DDIM, 16 steps, one plan": dict(plan_every=0, ddim_steps=16),
        "DDIM, 4 steps, one plan": dict(plan_every=0, ddim_steps=4),
        "plan every 32": dict(plan_every=32),
        "plan every 32, warm start 16": dict(plan_every=32, warm_start=16),
    },
}

SAME = "command", "commit", "variant"  # equal in rows whose scores are kept


@dataclass(frozen=True)
class Config:
    runs: tyro.conf.Positional[tuple[str, ...]]  # run folders of diffuser.py
    episodes: int = 10  # for each score
    plans: int = 5  # plans to time; the median counts
    scores: bool = True  # also evaluate, which is slow
    results: str = str(ROOT / "benchmarks/results")  # folder for planning.json and plans.png


def seconds(policy, obs, episodes, length, plans):
    """Median seconds to make a plan for `episodes` episodes at once.

    length: environment steps that a plan serves, which are all called; 0: a plan serves the whole
    episode. The first plan of an episode is not timed unless it is the only one.
    """
    inputs = jnp.asarray(obs[None, :episodes]), jnp.zeros((1, episodes))
    key, times = jax.random.key(0), []
    _, begun = jax.block_until_ready(policy(None, *inputs, key))
    jax.block_until_ready(policy(begun, *inputs, key))  # compiled
    for _ in range(plans):
        start, carry = time.perf_counter(), begun if length else None
        for _ in range(length or 1):
            _, carry = policy(carry, *inputs, key)
        jax.block_until_ready(carry)
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def goal(own):
    """Whether plans of this Config end at a goal."""
    return getattr(own, "goal", False)


def straight(carry, obs, reward, key):
    """Diffuser's controller in a maze without a plan: it tracks the goal itself."""
    return (obs[..., 4:6] - obs[..., :2]) + (0 - obs[..., 2:4]), 0


def measure(run, cfg, known):
    """Rows of the table for one run. known: earlier rows, whose scores can be kept."""
    module, own, state = evaluation.load(run)
    data = datasets.load(own.env, own.env_id)
    limit = evaluation.make(data.env_id).spec.max_episode_steps
    state, rows = jax.tree.map(lambda x: x[:1], state), []
    algorithm = module.__name__.rpartition(".")[2]
    for name, settings in VARIANTS[algorithm + " with a goal" * goal(own)].items():
        if settings is None:
            policy, every = straight, 0
        else:
            policy = jax.jit(jax.vmap(module.policy(replace(own, **settings)), (0, 0, 0, 0, None)))
            policy, every = partial(policy, state), settings["plan_every"]
        row = {"dataset": own.env, "algorithm": algorithm, "variant": name}
        row |= {"num_updates": own.num_updates}
        row |= origin(run)
        for episodes in (1, 10):
            spent = seconds(policy, data.obs, episodes, every, cfg.plans)
            row[f"ms_{episodes}"] = 1000 * spent / (every or limit)
        if cfg.scores:
            returns = evaluation.evaluate(policy, data.env_id, 1, cfg.episodes)
            row |= {"returns": returns[0].tolist(), "scores": data.score(returns[0]).tolist()}
        else:
            same = [old for old in known if all(old.get(k) == row[k] for k in SAME)]
            row |= {k: old[k] for old in same for k in ("returns", "scores") if k in old}
        print({k: v for k, v in row.items() if k != "returns"}, flush=True)
        rows.append(row)
    return rows


def walk(policy, env_id, episodes):
    """Plans made at the start (E, H, channels), and the paths that followed (E, T, 2)."""
    plans, ways = [], []

    def watched(carry, obs, reward, key):
        action, carry = policy(carry, obs, reward, key)
        plans.append(carry.x)
        ways.append(obs[0, :, :2])
        return action, carry

    evaluation.evaluate(watched, env_id, 1, episodes)
    return np.asarray(plans[0][0]), np.stack(ways, 1)


def plot(run, path):
    """Draws six episodes in a maze: plans and the paths that followed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    module, own, state = evaluation.load(run)
    data = datasets.load(own.env, own.env_id)
    state = jax.tree.map(lambda x: x[:1], state)
    policy = partial(jax.jit(jax.vmap(module.policy(own), (0, 0, 0, 0, None))), state)
    plans, ways = walk(policy, data.env_id, 6)
    mean, std = state.obs_mean[0, :2], state.obs_std[0, :2]
    plans = np.asarray(plans[..., data.action.shape[1] :][..., :2] * std + mean)
    maze = evaluation.make(data.env_id).unwrapped.maze
    figure, axes = pyplot.subplots(2, 3, figsize=(9, 6.4))
    for axis, planned, walked in zip(axes.flat, plans, ways, strict=True):
        for i, line in enumerate(maze.maze_map):
            for j, cell in enumerate(line):
                if cell == 1:
                    x, y = maze.cell_rowcol_to_xy(np.array([i, j]))
                    axis.add_patch(pyplot.Rectangle((x - 0.5, y - 0.5), 1, 1, color="0.85"))
        axis.plot(*walked.T, color="C1", lw=2.5, label="path")
        axis.plot(*planned.T, color="C0", lw=0, marker=".", ms=4, label="plan")
        axis.plot(*walked[0], "ko", ms=6, label="start")
        axis.plot(*data.obs[0, 4:6], "r*", ms=13, label="goal")
        axis.set(xticks=[], yticks=[])
        axis.set_aspect("equal")
    axes[0, 0].legend(loc="center left", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(cfg: Config):
    results = Path(cfg.results)
    results.mkdir(parents=True, exist_ok=True)
    path = results / "planning.json"
    known = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []
    rows = [row for run in cfg.runs for row in measure(run, cfg, known)]
    measured = {(row["dataset"], row["algorithm"]) for row in rows}
    rows += [row for row in known if (row["dataset"], row["algorithm"]) not in measured]
    record = experiment.machine() | {"rows": rows}
    path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    for run in cfg.runs:
        if goal(evaluation.load(run)[1]):
            plot(run, results / "plans.png")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
