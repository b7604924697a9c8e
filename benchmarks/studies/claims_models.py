"""Three claims about learned models, two of them by enumeration of small random worlds.

- ensemble: an ensemble of networks and an exact Gaussian process on the same points of a curve.
- mopo: the return with MOPO's penalty is below the true return if u bounds the model's error.
- bound: COMBO's value is a lower bound, tighter than CQL's while the model is good, and its policy
  is not worse than the behaviour beyond a bound.

A world has five states, three actions, known rewards in [0, 1] and discount 0.9. Policies and
occupancies are arrays (S, A), transitions T (S, A, S). claims.py runs these functions.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from common import experiment
from common.datasets import Batch

GAMMA, STATES, ACTIONS = 0.9, 5, 3


# --- Small worlds ---


def random_worlds(count, seed=0, rows=200, skill=0.0):
    """Worlds as dicts: transitions T, rewards r, first states mu, a behaviour b, its occupancy d,
    transitions seen in `rows` of its steps, and wrong transitions W. skill: how much the behaviour
    prefers better actions."""
    rng, size = np.random.default_rng(seed), (STATES, ACTIONS)
    for _ in range(count):
        world = {"T": rng.dirichlet(np.full(STATES, 0.3), size), "r": rng.uniform(0, 1, size)}
        world["W"] = rng.dirichlet(np.full(STATES, 0.3), size)
        world["mu"] = rng.dirichlet(np.ones(STATES))
        world["b"] = 0.9 * rng.dirichlet(np.full(ACTIONS, 1.5), STATES) + 0.1 / ACTIONS
        if skill:
            world["b"] = better(world, skill)
        world["d"] = occupancy(world["T"], world["b"], world["mu"])
        counts = np.maximum(rng.multinomial(rows, world["d"].ravel()), 1)  # each pair once
        seen = [rng.multinomial(n, p) / n for n, p in zip(counts, world["T"].reshape(-1, STATES))]  # noqa: B905
        yield world | {"seen": np.reshape(seen, (*size, STATES))}


def occupancy(T, pi, mu):
    """Discounted share of each pair (..., S, A) under policies pi (..., S, A)."""
    P = np.einsum("...sa,...sat->...ts", pi, np.broadcast_to(T, (*pi.shape, STATES)))
    start = np.broadcast_to((1 - GAMMA) * mu[:, None], (*pi.shape[:-1], 1))
    return np.linalg.solve(np.eye(STATES) - GAMMA * P, start) * pi


def q_values(T, pi, r):
    """Q (..., S, A) of policies pi, with rewards r (..., S, A)."""
    T, r = np.broadcast_to(T, (*pi.shape, STATES)), np.broadcast_to(r, pi.shape)
    P = np.einsum("...sat,...tb->...satb", T, pi).reshape(*pi.shape[:-2], *[STATES * ACTIONS] * 2)
    q = np.linalg.solve(np.eye(STATES * ACTIONS) - GAMMA * P, r.reshape(*pi.shape[:-2], -1, 1))
    return q.reshape(pi.shape)


def returns(q, pi, mu):
    """Value (...,) of the first state's action, E_mu,pi[Q]."""
    return np.einsum("s,...sa,...sa->...", mu, pi, q)


def deterministic():
    """Every policy that never varies: (A^S, S, A)."""
    return np.eye(ACTIONS)[np.array(list(itertools.product(range(ACTIONS), repeat=STATES)))]


def better(world, skill=3.0):
    """A policy better than the behaviour: a softmax of the behaviour's Q."""
    q = q_values(world["T"], world["b"], world["r"])
    pi = np.exp(skill * (q - q.max(1, keepdims=True)) / q.std())
    return pi / pi.sum(1, keepdims=True)


# --- MOPO's lemma ---


def penalised(worlds=100, error=0.3, shares=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)):
    """Of all worlds' deterministic policies, by u as a share of the model's error: how often the
    penalised return exceeds the true one, and how far at most.

    Two errors: the largest of any policy, gamma |E_model[V] - E_true[V]|, which is the smallest u
    that bounds them all; and the distance of distributions, gamma / (1 - gamma) times the total
    variation. For each the policy of the largest penalised return, too: how often it earns less
    than any other policy's return minus twice its penalties, which Theorem 4.4 excludes.
    """
    pi = deterministic()
    found = {name: [] for name in ("error", "distance")}
    for world in random_worlds(worlds):
        model = (1 - error) * world["T"] + error * world["W"]
        q = q_values(world["T"], pi, world["r"])
        true, v = returns(q, pi, world["mu"]), np.einsum("psa,psa->ps", pi, q)
        exact = GAMMA * np.abs(np.einsum("sat,pt->psa", model - world["T"], v)).max(0)
        variation = np.abs(model - world["T"]).sum(-1) / 2 * GAMMA / (1 - GAMMA)
        for name, u in (("error", exact), ("distance", variation)):
            free = returns(q_values(model, pi, world["r"]), pi, world["mu"])
            paid = returns(q_values(model, pi, u), pi, world["mu"])  # with rewards u
            rows = []
            for share in shares:
                chosen = np.argmax(free - share * paid)
                rows.append([
                    np.mean(free - share * paid > true + 1e-9),
                    np.max(free - share * paid - true),
                    true[chosen] < np.max(true - 2 * share * paid) - 1e-9,
                ])  # fmt: skip
            found[name].append(rows)
    out = {"shares": shares, "policies": len(pi) * worlds}
    for name, rows in found.items():
        above, excess, worse = np.moveaxis(np.array(rows, float), -1, 0)
        out[name] = {"above": above.mean(0), "excess": excess.max(0), "worse": worse.mean(0)}
    return out


# --- COMBO's bound ---


def combo_q(world, pi, error, beta, f=0.5):
    """COMBO's fixed point Q (..., S, A) with mu = pi, and the penalty (rho - d) / d_f.

    At each pair a share f d / d_f of the targets comes from the data, the others from the model.
    """
    model = (1 - error) * world["T"] + error * world["W"]
    rho = occupancy(model, pi, world["mu"])
    d_f = f * world["d"] + (1 - f) * rho
    share = (f * world["d"] / d_f)[..., None]
    penalty = (rho - world["d"]) / d_f
    T = share * world["seen"] + (1 - share) * model
    return q_values(T, pi, world["r"] - beta * penalty), penalty


def cql_q(world, pi, beta):
    """CQL's fixed point: transitions of the data alone."""
    return q_values(world["seen"], pi, world["r"] - beta * (pi / world["b"] - 1))


def smallest(free, per_beta, certainty):
    """(the smallest beta with which this share of values is below the truth, their mean distance).

    Values minus the truth are free + beta per_beta.
    """
    needed = np.where(free <= 0, 0, np.where(per_beta < 0, -free / per_beta, np.inf))
    beta = np.quantile(needed, certainty, method="higher")
    return beta, -np.mean(free + beta * per_beta)


def bound(worlds=200, errors=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0), tried=40):
    """By the model's error, the share of wrong transitions in it.

    tight: how far below the truth COMBO's and CQL's value lie with the smallest beta of each that
    makes a lower bound of 95 % of worlds. improved: what the best of all deterministic policies and
    the behaviour by COMBO's value earns more than the behaviour, in `tried` worlds of a good
    behaviour, by beta; the bound of that.
    """
    gaps = {"CQL": [], **{e: [] for e in errors}}
    for world in random_worlds(worlds):
        pi = better(world)
        true = returns(q_values(world["T"], pi, world["r"]), pi, world["mu"])
        for who in gaps:
            q = [
                cql_q(world, pi, beta) if who == "CQL" else combo_q(world, pi, who, beta)[0]
                for beta in (0.0, 1.0)
            ]
            free, paid = (returns(x, pi, world["mu"]) - true for x in q)
            gaps[who].append((free, paid - free))
    tight = {who: smallest(*np.transpose(x), 0.95) for who, x in gaps.items()}
    found = {"errors": errors, "CQL": dict(zip(("beta", "distance"), tight["CQL"], strict=True))}
    each = np.transpose([tight[e] for e in errors])
    found["COMBO"] = dict(zip(("beta", "distance"), each, strict=True))
    found["betas"] = (0.0, 0.05, 0.2)
    gains = np.array(
        [
            [improved(w, e, found["betas"]) for e in errors]
            for w in random_worlds(tried, seed=1, skill=6)
        ]
    )  # fmt: skip  (W, E, betas, 2)
    gain, least = gains[..., 0], gains[..., 1]
    found["gain"] = {"mean": gain.mean(0), "lowest": gain.min(0)}
    found["least"], found["below the bound"] = least.min(0), np.mean(gain < least - 1e-9)
    found["worse"] = np.mean(gain < -1e-9, 0)  # than the behaviour
    return found


def improved(world, error, betas):
    """For each beta: (what the best policy by COMBO's value earns more than the behaviour, the
    least that it can earn more by the errors of its value and the behaviour's)."""
    pi = np.concatenate([world["b"][None], deterministic()])  # (P, S, A)
    true = returns(q_values(world["T"], pi, world["r"]), pi, world["mu"])
    free = returns(combo_q(world, pi, error, 0.0)[0], pi, world["mu"])
    paid = returns(combo_q(world, pi, error, 1.0)[0], pi, world["mu"]) - free
    rows = []
    for beta in betas:
        best = np.argmax(free + beta * paid)
        wrong = np.abs(free - true)  # of the mixture of model and data
        least = beta * (paid[0] - paid[best]) - wrong[best] - wrong[0]
        rows.append((true[best] - true[0], least))
    return rows


# --- An ensemble and a Gaussian process ---

NOISE = 0.05  # std of the points


def curve(x):
    return np.sin(3 * x)


def gaussian_process(x, y, at):
    """Mean and std at `at` (K,) of an exact GP with squared-exponential kernel and known noise, its
    length and amplitude by the largest marginal likelihood on a grid."""

    def kernel(a, b, length, scale):
        return scale**2 * np.exp(-(((a[:, None] - b) / length) ** 2) / 2)

    def evidence(length, scale):
        factor = np.linalg.cholesky(kernel(x, x, length, scale) + NOISE**2 * np.eye(len(x)))
        return -np.sum(np.linalg.solve(factor, y) ** 2) / 2 - np.log(np.diag(factor)).sum()

    grid = itertools.product(np.geomspace(0.1, 2, 25), np.geomspace(0.3, 3, 10))
    length, scale = max(grid, key=lambda pair: evidence(*pair))
    inverse = np.linalg.inv(kernel(x, x, length, scale) + NOISE**2 * np.eye(len(x)))
    cross = kernel(at, x, length, scale)
    variance = scale**2 - np.einsum("ij,jk,ik->i", cross, inverse, cross)
    return cross @ inverse @ y, np.sqrt(np.maximum(variance, 0)), float(length)


def ensemble(points=200, seeds=5, epochs=1000):
    """mopo.py's own model of s' - s = r = curve(s) + noise, with s from -1 to -0.2 and from 0.2 to
    1, and the exact GP of the same points: means, stds, and MOPO's u of each kind."""
    mopo = experiment.module("mopo")
    rng = np.random.default_rng(0)
    x = rng.uniform(0.2, 1, points) * rng.choice([-1, 1], points)
    y, at = curve(x) + NOISE * rng.normal(size=points), np.linspace(-2, 2, 81)
    nothing = np.zeros(points)
    rows = Batch(x[:, None], nothing[:, None], y, (x + y)[:, None], nothing)
    data = jax.tree.map(jnp.float32, rows)
    sizes = dict(model_widths=(64, 64), model_decay=(1e-5, 2e-5, 2e-5), batch_size=32)
    cfg = mopo.Config(**sizes, patience=20, max_epochs=epochs)
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    dynamics = mopo.fit_dynamics(keys, data, cfg, lambda line: None, cfg.num_members)

    obs, action = jnp.float32(at[:, None]), jnp.zeros((len(at), 1))
    members = jax.vmap(
        lambda one: jax.vmap(lambda p: mopo.predict(p, one, jnp.append(obs, action, 1), cfg))(
            one.params
        )
    )
    mean, _ = members(dynamics)  # (seeds, M, K, 2)
    mean = np.asarray(mean[..., 0])
    found = {
        "seen": ((-1.0, -0.2), (0.2, 1.0)),
        "at": at,
        "points": {"x": x, "y": y},
        "curve": curve(at),
    }
    gp_mean, gp_std, length = gaussian_process(x, y, at)
    found["GP"] = {"mean": gp_mean, "std": gp_std, "length": length}
    found["members"] = mean[0]  # of the first seed
    found["ensemble"] = {"mean": mean[0].mean(0), "std": mean[0].std(0)}
    for kind in ("std", "disagreement", "spread"):
        own = mopo.Config(**sizes, uncertainty=kind)
        u = jax.vmap(lambda one, own=own: mopo.uncertainty(one, obs, action, own))(dynamics)
        found[kind] = np.asarray(u)  # (seeds, K)
    return found


CLAIMS = {"ensemble": ensemble, "mopo": penalised, "bound": bound}
