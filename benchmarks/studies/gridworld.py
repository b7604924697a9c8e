"""Tests CQL's claims for discrete actions in a grid of 25 cells where true values are known.

Four actions move a step; with probability 0.1 the step is in a random direction. At the border one
stays. A step costs 0.1, and the corner opposite the start ends the episode. So the value of a
policy solves 25 linear equations.

    python -m benchmarks.studies.gridworld        # results/gridworld.json and results/gridworld.png

The claims (arXiv:2006.04779):
- Q without the data term is below the truth at every (s, a); with it, only in expectation under
  the policy (Theorems 3.1 and 3.2)
- where the data hold one action at each place, the argmax of Q-learning takes actions that the
  data never took, and CQL's does not
- CQL(var)'s own penalty shrinks as 1 / sqrt(n(s)) (Appendix A)

discrete_cql.py learns with small networks and five seeds.
"""

import json
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from benchmarks.studies import claims
from common import datasets, experiment

SIDE, GAMMA, COST, SLIP, GOAL = 5, 0.9, 0.1, 0.1, 24
MOVES = np.array([(0, 1), (1, 0), (0, -1), (-1, 0)])  # up, right, down, left
CELLS, ACTIONS = SIDE * SIDE, len(MOVES)
NETS = dict(gamma=GAMMA, lr=3e-3, polyak=0.02, widths=(32,))
COUNTS = (4, 16, 64, 256)  # visits


@dataclass(frozen=True)
class Config:
    results: str = str(claims.ROOT / "benchmarks/results")  # folder for gridworld.json and .png


# --- The world ---


def cell(x, y):
    """The number of a place."""
    return x * SIDE + y


def world():
    """P (S, A, S), the probability of each next cell."""
    p = np.zeros((CELLS, ACTIONS, CELLS))
    for x in range(SIDE):
        for y in range(SIDE):
            ends = [cell(*np.clip((x + dx, y + dy), 0, SIDE - 1)) for dx, dy in MOVES]
            for a in range(ACTIONS):
                p[cell(x, y), a, ends[a]] += 1 - SLIP
                for end in ends:
                    p[cell(x, y), a, end] += SLIP / ACTIONS
    return p


P = world()
PLACES = np.delete(np.arange(CELLS), GOAL)  # where one acts


def backup(v):
    """Q (S, A) of an action followed by values v (S,)."""
    return -COST + GAMMA * P @ np.where(np.arange(CELLS) == GOAL, 0, v)


def true_q(policy):
    """Q (S, A) of a policy (S, A)."""
    move = np.einsum("sa,sat->st", policy, P) * (np.arange(CELLS) != GOAL)
    v = np.linalg.solve(np.eye(CELLS) - GAMMA * move, np.full(CELLS, -COST))
    return backup(v)


def best_q():
    """Q (S, A) of the best policy."""
    q = np.zeros((CELLS, ACTIONS))
    for _ in range(500):
        q = backup(q.max(1))
    return q


def greedy(q):
    """The policy (..., S, A) that takes the largest Q."""
    return np.eye(ACTIONS)[q.argmax(-1)]


def rows(rng, behaviour, count):
    """A Batch of steps from random places by a behaviour (S, A)."""
    place = rng.choice(PLACES, count)
    action = (rng.random(count)[:, None] > behaviour[place].cumsum(1)).sum(1)
    to = (rng.random(count)[:, None] > P[place, action].cumsum(1)).sum(1).clip(0, CELLS - 1)
    cells, one = np.eye(CELLS), np.eye(ACTIONS)
    columns = cells[place], one[action], np.full(count, -COST), cells[to], to == GOAL
    return datasets.Batch(*(np.asarray(x, np.float32) for x in columns))


# --- The claims ---


def tabular(alpha, keep, behaviour, policy):
    """The fixed point (S, A) of CQL's Eq. (1), or with keep = 1 of Eq. (2), for mu = policy.

    Each iteration minimises  alpha (mu - keep behaviour) Q + behaviour (Q - T)^2 / 2  over Q at
    each (s, a); T is the exact backup of the last Q under the policy.
    """
    q = np.zeros_like(policy)
    for _ in range(500):
        q = backup((policy * q).sum(1)) - alpha * (policy - keep * behaviour) / behaviour
    return q


@contextmanager
def without_the_data_term(module):
    """Within: the critic is not pushed up at the data's actions, Eq. (1) instead of (2)."""
    whole = module.critic_loss

    def critic_loss(q_params, state, batch, cfg):
        loss, info = whole(q_params, state, batch, cfg)
        return loss + cfg.alpha * info["q_data"], info

    module.critic_loss = critic_loss
    try:
        yield
    finally:
        module.critic_loss = whole


def learned(data, field, values, updates, **settings):
    """Q (V, seeds, S, A) of discrete_cql.py for values of a field of its Config."""
    state = claims.trained("discrete_cql", data, field, values, updates=updates, **NETS | settings)

    def q(state, obs):
        return state.critic.apply_fn(state.critic.params, obs).mean(-1)

    return claims.each(q, state, np.eye(CELLS))


def bounds(updates=3000, seeds=5, alpha=0.03):
    """Q of pairs without and with the data term, and its mean under the policy, beside the truth.

    In the table the policy is half uniform and half the best one, and mu is the policy. The network
    learns its own policy, the argmax, for which the truth is computed; CQL(rho) with a low
    temperature has mu = policy up to ties. In CQL(H) mu is the softmax of Q, far from the policy
    where values differ by less than 1, as here.
    """
    good, uniform = greedy(best_q()), np.full((CELLS, ACTIONS), 1 / ACTIONS)
    behaviour, policy = 0.7 * uniform + 0.3 * good, 0.5 * uniform + 0.5 * good
    found, truth = {}, true_q(policy)[PLACES]
    for keep, how in enumerate(("without", "with")):
        q, pi = tabular(alpha, keep, behaviour, policy)[PLACES], policy[PLACES]
        means = (pi * truth).sum(1), (pi * q).sum(1)
        found[f"table, {how}"] = {"pairs": (truth, q), "policy": means}
    module, data = (
        experiment.module("discrete_cql"),
        rows(np.random.default_rng(0), behaviour, 20_000),
    )
    own = dict(seeds=seeds, variant="rho", temperature=0.01)
    with without_the_data_term(module):
        q = {"without": learned(data, "alpha", [alpha], updates, **own)}
    q["with"] = learned(data, "alpha", [alpha], updates, **own)
    q["CQL(H)"] = learned(data, "alpha", [alpha], updates, seeds=seeds)
    for how, (each,) in q.items():
        pi, truth = greedy(each), np.array([true_q(greedy(x)) for x in each])
        pairs = truth[:, PLACES], each[:, PLACES]
        found[f"network, {how}"] = {
            "pairs": pairs,
            "policy": tuple((pi[:, PLACES] * x).sum(2) for x in pairs),
        }
    return found


def narrow(updates=3000, seeds=5, alpha=0.2):
    """Data of one action at each place: up, at the top right. What DQN and CQL do there."""
    top = np.arange(CELLS) % SIDE == SIDE - 1
    behaviour = np.eye(ACTIONS)[np.where(top, 1, 0)]
    data = rows(np.random.default_rng(0), behaviour, 5_000)
    q = learned(data, "alpha", [0.0, alpha], updates, seeds=seeds)
    found, start = {"behaviour": behaviour.argmax(1)}, cell(0, 0)
    found["value of the behaviour"] = (behaviour * true_q(behaviour)).sum(1)[start]
    found["best value"] = best_q()[start].max()
    for who, each in zip(("DQN", "CQL"), q, strict=True):
        taken = each.argmax(-1)  # (seeds, S)
        found[who] = {
            "actions": taken[0],
            "never in the data": (taken != behaviour.argmax(1))[:, PLACES].mean(1),
            "predicted": each.max(-1)[:, start],
            "earned": np.array([(greedy(x) * true_q(greedy(x))).sum(1)[start] for x in each]),
        }
    return found


def spread(updates=4000, seeds=5, alpha=0.5):
    """How much CQL(var) lowers the spread of Q over the actions, by the visits n to a state.

    The data are uniform, so that the rest of the penalty is 0 on average, and end after a step. At
    each place the penalised Q has a standard deviation of std - alpha / sqrt(n), if that is not
    negative: the minimum of  alpha std(Q) / sqrt(n) + mean (Q - T)^2 / 2.
    """
    rng, uniform = np.random.default_rng(0), np.full((CELLS, ACTIONS), 1 / ACTIONS)
    data = rows(rng, uniform, 20_000)
    pays = rng.normal(0, 0.5, (CELLS, ACTIONS)).astype(np.float32)  # of a pair; the world's is even
    reward = pays[data.obs.argmax(1), data.action.argmax(1)]
    data = data._replace(reward=reward, done=np.ones(len(reward), np.float32))
    settings = dict(alpha=alpha, variant="var", seeds=seeds)
    q = learned(data, "count", COUNTS, updates, **settings)[:, :, PLACES]
    own = pays[PLACES].std(1)
    wanted = np.minimum(own, alpha / np.sqrt(COUNTS)[:, None])
    lost = own - q.std(-1)  # (V, seeds, places)
    return {
        "counts": COUNTS,
        "exact": wanted.mean(1),
        "alpha / sqrt(n)": alpha / np.sqrt(COUNTS),
        "lost": claims.spread(lost.mean(2)),
    }


STUDIES = {"bounds": bounds, "narrow": narrow, "spread": spread}


# --- The picture ---


def draw(found, path):
    """Three panels a row: the bounds in a table and a network, the narrow data, the spread."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    table, network, map_, last = figure.subplots(1, 4)
    for axis, kind in ((table, "table"), (network, "network")):
        for how, colour in (("without", "C1"), ("with", "C0")):
            pairs, means = (found["bounds"][f"{kind}, {how}"][k] for k in ("pairs", "policy"))
            pairs, means = ([np.ravel(x) for x in both] for both in (pairs, means))
            axis.scatter(*pairs, 9, colour, alpha=0.5, lw=0, label=f"{how} the data term: Q(s, a)")
            label = "mean of these under the policy"
            axis.scatter(*means, 22, colour, ec="k", marker="D", label=label, zorder=3)
        low = min(*axis.get_xlim(), *axis.get_ylim())
        axis.plot([low, 0], [low, 0], color="0.3", lw=1, ls="--")
        axis.set(xlabel="true Q", ylabel="learned Q")
    table.set(title="a table, exact")
    table.legend(fontsize=7)
    network.set(title="discrete_cql.py, 5 seeds")
    for who, colour, shift in (
        ("behaviour", "0.6", -0.22),
        ("DQN", "C3", 0.0),
        ("CQL", "C0", 0.22),
    ):
        of = found["narrow"][who]
        taken = np.array(of if who == "behaviour" else of["actions"])[PLACES]
        x, y = PLACES // SIDE + shift, PLACES % SIDE
        map_.quiver(x, y, *MOVES[taken].T, color=colour, scale=14, width=0.008, label=who)
    map_.scatter(GOAL // SIDE, GOAL % SIDE, 120, "C2", marker="*")
    map_.set(xlim=(-0.6, 4.6), ylim=(-0.6, 4.9), xticks=[], yticks=[])
    never = {who: np.mean(found["narrow"][who]["never in the data"]) for who in ("DQN", "CQL")}
    words = ", ".join(f"{who} {share:.0%}" for who, share in never.items())
    map_.set(title=f"one action at each place;\nactions never in the data: {words}")
    map_.legend(fontsize=7, ncols=3, loc="upper center")
    of = found["spread"]
    last.plot(of["counts"], of["alpha / sqrt(n)"], "0.6", label="alpha / sqrt(n)")
    last.plot(of["counts"], of["exact"], "k--", lw=1, label="exact")
    claims.claims_pictures.dots(last, of["counts"], of["lost"], "discrete_cql.py, 5 seeds", "C0")
    last.set(xscale="log", yscale="log", xlabel="n(s), visits", ylabel="spread of Q lost")
    last.set(title="CQL(var)")
    last.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main(cfg: Config):
    results = Path(cfg.results)
    start, found = time.time(), {name: study() for name, study in STUDIES.items()}
    found = json.loads(json.dumps(found, default=lambda x: np.round(np.asarray(x), 5).tolist()))
    facts = {**experiment.machine(), "seconds": round(time.time() - start)}
    text = json.dumps({"command": "python -m benchmarks.studies.gridworld", **facts, **found})
    (results / "gridworld.json").write_text(text + "\n", "utf-8")
    draw(found, results / "gridworld.png")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
