"""Composition: Decision Diffuser is asked for conditions together that it learned one at a time.

A point walks in a maze, from its left end to its right end and back. Two corridors lead there, an
upper and a lower one, and it takes either, or rests at an end. Each window of the data is told
whether it visits the upper corridor, or whether it visits the lower one, never both facts together.
Then plans from the left end are asked for one corridor, for both (AND), for not the upper one
(NOT), and for the upper and not the lower one. Inverse dynamics follow the plans' states in the
maze, where a wall stops the point.

    python -m benchmarks.studies.composition
    python -m benchmarks.studies.composition --states FOLDER    # keeps what was trained there

Data are of two kinds: with episodes that visit both corridors, and without any such episode, where
walks that began in one corridor go on in it. Writes composition.json and composition.png to
benchmarks/results.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import serialization

from benchmarks.arrays import arrays
from benchmarks.scores.runs import text
from common import datasets, experiment

ROOT = Path(__file__).resolve().parents[2]

HALF = np.array([2.5, 1.5])  # half the maze's width and height
BLOCK = np.array([1.5, 0.5])  # half those of the block in its middle
ENDS = np.array([[-2.0, 0.0], [2.0, 0.0]])  # left and right
HEIGHT, STEP, LIMIT = 1.0, 0.5, 64  # of a corridor's middle; of a step at action 1; of an episode
UPPER, LOWER = (1, 0.7, 9.0), (1, -9.0, -0.7)  # regions: columns of obs, low, high

SETTINGS = dict(
    horizon=32, diffusion_steps=20, multiples=(1, 2, 4), width=16, batch_size=64, lr=1e-3,
    regions=UPPER + LOWER, target=None, inverse_widths=(64, 64), plan_every=31, guidance=3.0,
    temperature=1.0,
)  # fmt: skip
ASKED = {  # title: settings of a plan
    "nothing": dict(guidance=0.0),
    "upper": dict(wanted=(0,)),
    "lower": dict(wanted=(1,)),
    "upper AND lower": dict(wanted=(0, 1)),
    "NOT upper": dict(unwanted=(0,)),
    "upper, NOT lower": dict(wanted=(0,), unwanted=(1,)),
}
KINDS = ("both corridors in some episodes", "one corridor in each episode")
VISITED = ("upper", "lower", "both", "neither")


@dataclass(frozen=True)
class Config:
    updates: int = 8000  # gradient steps
    plans: int = 150  # for each question
    seed: int = 0  # of the data and of the training
    states: str = ""  # folder of trained states; one that is there is not trained again
    results: str = str(ROOT / "benchmarks/results")  # folder for the .json and the .png


def move(position, action):
    """One step from positions (..., 2). Each axis alone stops at a wall."""
    for axis in (0, 1):
        new = position.copy()
        new[..., axis] += STEP * np.clip(action[..., axis], -1, 1)
        free = np.all(np.abs(new) <= HALF, -1) & np.any(np.abs(new) >= BLOCK, -1)
        position = np.where(free[..., None], new, position)
    return np.float32(position)


def way(rng, here, side):
    """Places from one end to the other, through the upper (side 1) or lower corridor (-1)."""
    corners = [[x, side * HEIGHT] for x in (ENDS[here, 0], ENDS[1 - here, 0])]
    return np.array([*corners, ENDS[1 - here]]) + rng.uniform(-0.2, 0.2, (3, 2))


def walk(rng, mixed):
    """An episode: rows (obs, action, next_obs). mixed: each way may be through either corridor."""
    here, side, rows, ahead = int(rng.integers(2)), rng.choice([-1, 1]), [], []
    obs, rest = np.float32(ENDS[here] + rng.uniform(-0.2, 0.2, 2)), int(rng.integers(10))
    while len(rows) < LIMIT:
        if not ahead and rest == 0:
            ahead, here = list(way(rng, here, side)), 1 - here
        if ahead and np.abs(ahead[0] - obs).max() < STEP:
            ahead.pop(0)
            if not ahead:
                rest = int(rng.integers(25))
                side = rng.choice([-1, 1]) if mixed else side
        rest = max(rest - 1, 0)
        towards = ((ahead[0] if ahead else ENDS[here]) - obs) / STEP
        action = np.float32((towards + rng.normal(0, 0.2, 2)).clip(-1, 1))
        next_obs = move(obs, action)
        rows.append((obs, action, next_obs))
        obs = next_obs
    return rows


def dataset(mixed, seed=0, episodes=400):
    """A Dataset of such walks, without rewards."""
    rng = np.random.default_rng(seed)
    walks = [walk(rng, mixed) for _ in range(episodes)]
    obs, action, next_obs = (np.stack(x) for x in zip(*sum(walks, []), strict=True))
    zeros, start = np.zeros(len(obs), np.float32), LIMIT * np.arange(episodes)
    own = obs, action, zeros, next_obs, zeros, start, np.full(episodes, LIMIT)
    return datasets.Dataset("two corridors", "", *own, None, None, {})


def train(data, cfg, path=None):
    """(module, its Config, state), trained as by the file's `train`; kept in the file `path`."""
    module = experiment.module("decision_diffuser")
    sizes = dict(seed=cfg.seed, num_updates=cfg.updates, env=data.name)
    own = module.Config(**SETTINGS, **sizes, log_every=cfg.updates, eval_every=cfg.updates)
    first, rows = arrays(module, data, own)
    key = jax.random.key(cfg.seed)
    state = jax.jit(partial(module.init, cfg=own))(key, first)
    kept = {"ema": state.ema, "low": state.low, "high": state.high}  # what plans depend on
    if path and path.exists():
        return module, own, state.replace(**serialization.from_bytes(kept, path.read_bytes()))
    state, _ = jax.jit(partial(module.train_chunk, cfg=own))(state, rows, key, cfg.updates)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(serialization.to_bytes({name: getattr(state, name) for name in kept}))
    return module, own, state


@partial(jax.jit, static_argnums=(0, 3))
def planned(module, state, first, own, key):
    return module.plan(state, (first, None), key, own)


@jax.jit
def action(state, obs, ahead):
    return state.inverse.apply_fn(state.ema["inverse"], jnp.concatenate([obs, ahead], -1))


def follow(module, own, state, cfg):
    """(plans, paths) from the left end, (E, H, 2) each: what is planned, and what follows."""
    obs = np.tile(np.float32(ENDS[0]), (cfg.plans, 1))
    key, paths = jax.random.key(cfg.seed), [obs]
    plans = planned(module, state, module.normalise(state, obs), own, key)
    for t in range(1, own.horizon):
        towards = action(state, module.normalise(state, obs), plans[:, t])
        obs = move(obs, np.asarray(towards))
        paths.append(obs)
    return np.asarray(plans * state.obs_std + state.obs_mean), np.stack(paths, 1)


def visits(paths):
    """{what: share of paths (..., H, 2) that visit the upper corridor alone, the lower, ...}."""
    upper, lower = (
        np.any((paths[..., c] >= low) & (paths[..., c] < high), -1)
        for c, low, high in (UPPER, LOWER)
    )
    found = upper & ~lower, lower & ~upper, upper & lower, ~upper & ~lower
    return {name: float(x.mean()) for name, x in zip(VISITED, found, strict=True)}


def through_walls(paths):
    """The share of paths (..., H, 2) that are within the block at some step."""
    return float(np.all(np.abs(paths) < BLOCK, -1).any(-1).mean())


def draw(runs, path):
    """A row for each kind of data, a panel for each question. runs: {kind: {asked: entry}}."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = 2.5 * len(ASKED), 0.4 + 2.1 * len(runs)
    figure, axes = pyplot.subplots(len(runs), len(ASKED), figsize=size, squeeze=False)
    for number, (kind, entries) in enumerate(runs.items()):
        row = axes[number]
        for axis, (asked, entry) in zip(row, entries.items(), strict=True):
            block = pyplot.Rectangle(-BLOCK, *(2 * BLOCK), color="0.8")
            axis.add_patch(block)
            for line in entry["shown"]:
                axis.plot(*(np.array(line).T / 100), color="C0", lw=1, alpha=0.35)
            axis.plot(*ENDS[0], "ko", ms=5)
            shares = [f"{x:.0%} {name}" for name, x in entry["paths"].items() if x >= 0.005]
            axis.set_xlabel("\n".join([", ".join(shares[:2]), ", ".join(shares[2:])]), fontsize=8)
            axis.set(xlim=(-HALF[0], HALF[0]), ylim=(-HALF[1], HALF[1]), xticks=[], yticks=[])
            axis.set_aspect("equal")
            if number == 0:
                axis.set_title(asked)
        row[0].set_ylabel(kind.replace(" in ", "\nin "), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(cfg: Config):
    results, runs = Path(cfg.results), {}
    results.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in vars(cfg).items() if k not in ("results", "states")}
    for number, kind in enumerate(KINDS):
        path = Path(cfg.states) / f"composition-{number}.msgpack" if cfg.states else None
        module, own, state = train(dataset(kind == KINDS[0], cfg.seed), cfg, path)
        runs[kind] = {}
        for asked, how in ASKED.items():
            plans, paths = follow(module, replace(own, **how), state, cfg)
            found = {"plans": visits(plans), "paths": visits(paths)}
            found["plans_through_walls"] = through_walls(plans)
            lines = np.round(100 * paths[:: max(len(paths) // 20, 1)]).astype(int)
            runs[kind][asked] = found | {"shown": lines.tolist()}
            print(f"{kind}, {asked}: {found}", flush=True)
        record = experiment.machine() | {"config": settings, "runs": runs}
        (results / "composition.json").write_text(text(record), "utf-8")
    draw(runs, results / "composition.png")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
