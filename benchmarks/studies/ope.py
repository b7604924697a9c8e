"""Why importance sampling fails on long episodes, where the truth is exact.

Two places; action 0 stays and action 1 moves to the other place. Being at the second place pays 1,
and a move fails with probability 0.2. The data's policy b draws actions evenly; the evaluated
policy pi moves from the first place and stays at the second with probability 0.8. Episodes have
2 to 50 steps without discount. Values divided by the number of steps are shown.

    python -m benchmarks.studies.ope        # writes results/ope.json and results/ope.png

For every length each estimator of algorithms/ope.py sees `repeats` datasets of `episodes` episodes.
Doubly robust ones are given Q times 0.8, as a model that is 20 % wrong. The deviation of importance
sampling follows exactly from its second moment; samples alone show too little of it, because the
rare episodes that make the mean right are in none of them.
"""

import importlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

from common import experiment

ROOT = Path(__file__).resolve().parents[2]

MOVE = np.array([[[1, 0], [0.2, 0.8]], [[0, 1], [0.8, 0.2]]])  # [place, action, next place]
PAY = np.array([[0.0, 0.0], [1.0, 1.0]])  # [place, action]
B, PI = np.full((2, 2), 0.5), np.array([[0.2, 0.8], [0.8, 0.2]])
WRONG = 0.8  # factor of Q that doubly robust estimators are given
COLOURS = {"IS": "C3", "PDIS": "C1", "DR": "C2", "WIS": "C4", "WPDIS": "C5", "WDR": "C0"}


@dataclass(frozen=True)
class Config:
    lengths: tuple[int, ...] = (2, 3, 5, 7, 10, 15, 20, 30, 50)  # steps of an episode
    episodes: int = 200  # of a dataset
    repeats: int = 1_000  # datasets of a length
    seed: int = 0  # of the episodes
    results: str = str(ROOT / "benchmarks/results")  # folder for ope.json and ope.png


def values(policy, steps):
    """(Q (steps + 1, 2, 2), V (steps + 1, 2)) by the number of steps left."""
    q, v = np.zeros((steps + 1, 2, 2)), np.zeros((steps + 1, 2))
    for left in range(1, steps + 1):
        q[left] = PAY + MOVE @ v[left - 1]
        v[left] = (policy * q[left]).sum(1)
    return q, v


def deviation(steps):
    """Standard deviation of rho_0:T-1 G of one episode, exact.

    Backwards, of every place: E[rho^2], E[rho^2 G] and E[rho^2 G^2] under b.
    """
    square = PI**2 / B
    zero, one, two = np.ones(2), np.zeros(2), np.zeros(2)
    for _ in range(steps):
        ahead = [MOVE @ x for x in (zero, one, two)]  # (2, 2) each
        zero, one, two = (
            (square * ahead[0]).sum(1),
            (square * (PAY * ahead[0] + ahead[1])).sum(1),
            (square * (PAY**2 * ahead[0] + 2 * PAY * ahead[1] + ahead[2])).sum(1),
        )
    return float(np.sqrt(two[0] - values(PI, steps)[1][steps, 0] ** 2))


def draw(rng, episodes, steps):
    """Places, actions (episodes, steps) of b from the first place."""
    place, places, actions = np.zeros(episodes, int), [], []
    for _ in range(steps):
        action = (rng.random(episodes) < B[place, 1]).astype(int)
        places.append(place)
        actions.append(action)
        place = (rng.random(episodes) < MOVE[place, action, 1]).astype(int)
    return np.stack(places, 1), np.stack(actions, 1)


def measure(ope, rng, steps, cfg):
    """One row of results: for each estimator mean and deviation of its value, a step."""
    q, v = values(PI, steps)
    left, found, sizes = np.arange(steps, 0, -1), [], []
    for _ in range(cfg.repeats):
        s, a = draw(rng, cfg.episodes, steps)
        columns = PAY[s, a], np.log(PI[s, a] / B[s, a]), WRONG * q[left, s, a], WRONG * v[left, s]
        data = ope.Trajectories(*columns)
        found.append(ope.estimate(data, 1.0, np.ones(cfg.episodes)))
        sizes.append(ope.effective(data, 1.0)["IS"])
    row = {"steps": steps, "truth": float(v[steps, 0]) / steps, "effective": float(np.mean(sizes))}
    row["exact IS deviation"] = deviation(steps) / np.sqrt(cfg.episodes) / steps
    for name in COLOURS:
        x = np.array([one[name] for one in found]) / steps
        row[name] = {"mean": float(x.mean()), "deviation": float(x.std())}
        row[name]["error"] = float(np.sqrt(np.mean((x - row["truth"]) ** 2)))
    return row


def draw_picture(path, rows, cfg):
    """Deviation on the left, mean with its error on the right, over the length of an episode."""
    figure = Figure((9, 3.9), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = np.array([row["steps"] for row in rows])
    for name, colour in COLOURS.items():
        x = np.array([[row[name]["mean"], row[name]["deviation"]] for row in rows])
        left.plot(steps, x[:, 1], color=colour, marker=".", label=name)
        error = 1.96 * x[:, 1] / np.sqrt(cfg.repeats)
        right.errorbar(steps, x[:, 0], error, color=colour, marker=".", capsize=2)
    exact = [row["exact IS deviation"] for row in rows]
    left.plot(steps, exact, "--", color=COLOURS["IS"], label="IS, exact")
    right.plot(steps, [row["truth"] for row in rows], "k--", label="truth")
    left.set(yscale="log", xlabel="steps of an episode", title="standard deviation")
    right.set(xlabel="steps of an episode", title="mean estimate a step", ylim=(-0.1, 1.1))
    left.legend(frameon=False, ncols=2)
    right.legend(frameon=False)
    figure.suptitle(f"Estimates from {cfg.episodes} episodes", fontsize=11)
    figure.savefig(path)


def main(cfg: Config):
    ope, rng = importlib.import_module("algorithms.ope"), np.random.default_rng(cfg.seed)
    rows = [measure(ope, rng, steps, cfg) for steps in cfg.lengths]
    for row in rows:
        told = "  ".join(f"{x} {row[x]['mean']:.3f}+-{row[x]['deviation']:.3f}" for x in COLOURS)
        print(f"{row['steps']:3} steps, truth {row['truth']:.3f}: {told}")
    about = {"episodes": cfg.episodes, "repeats": cfg.repeats, "seed": cfg.seed}
    path = Path(cfg.results)
    path.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"rows": rows, **about, **experiment.machine()}, indent=1)
    (path / "ope.json").write_text(text + "\n", "utf-8")
    draw_picture(path / "ope.png", rows, cfg)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
