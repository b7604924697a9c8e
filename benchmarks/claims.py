"""What is said about offline RL, shown in two tiny worlds where the truth is known.

The corridor: five places in a row. Action a in [-1, 1] steps right with probability (1 + a) / 2,
else left (from the first place: nowhere). Leaving by the right end pays 1 and ends. Q is linear in
a, and the value of any policy, which hangs on its mean actions alone, is a linear system of five.

The ledge: a position x in [-1, 1] moves to x + 0.2 a and pays x / 2 + a; beyond a = 0.3 one falls,
which costs 10 (a - 0.3)^2. Nothing ends. The value of a policy is computed on a grid.

    python benchmarks/claims.py               # all; results/claims.json and results/claims/*.png
    python benchmarks/claims.py --only iql

All is learned by the files in algorithms/, five seeds each; bars and bands go from the least seed
to the greatest. That values are joined where no episode went, `benchmarks/stitching.py` shows.
"""

import importlib
import json
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT))  # finds common/
sys.path.insert(2, str(ROOT / "algorithms"))
from common import config, datasets, experiment  # noqa: E402

NORMAL = np.array([NormalDist().inv_cdf((i + 0.5) / 200) for i in range(200)])  # equal shares
NETS = dict(widths=(32, 32), normalize=False, batch_size=128)


@dataclass(frozen=True)
class Config:
    only: str = ""  # the one claim to make, of CLAIMS; empty: all
    results: str = str(ROOT / "benchmarks/results")  # where everything goes


# --- The corridor ---

PLACES, GAMMA = 5, 0.9


def corridor_q(v, action, effort=0.0):
    """Q(s, a) (5, K) of actions (5, K) or (K,), followed by a policy of value v (5,).

    An action costs effort * a^2.
    """
    ahead, behind = np.append(GAMMA * v[1:], 1.0), GAMMA * np.append(v[0], v[:-1])
    right = (1 + np.asarray(action, float)) / 2
    return right * ahead[:, None] + (1 - right) * behind[:, None] - effort * action**2


def corridor_value(mean, square=0.0, effort=0.0):
    """V (5,) of a policy from E[a] and E[a^2], each (5,) or one number for all places."""
    right = (1 + np.broadcast_to(mean, PLACES)) / 2
    move = np.diag(right[:-1], 1) + np.diag(1 - right[1:], -1)
    move[0, 0] = 1 - right[0]
    pays = np.append(np.zeros(PLACES - 1), right[-1]) - effort * np.broadcast_to(square, PLACES)
    return np.linalg.solve(np.eye(PLACES) - GAMMA * move, pays)


def corridor_data(rng, action, effort=0.0):
    """A Batch of one row for each of the actions (N,), the places in turn."""
    place = np.arange(len(action)) % PLACES
    to = place + np.where(rng.random(len(action)) < (1 + action) / 2, 1, -1)
    done, eye = to == PLACES, np.eye(PLACES)
    rows = eye[place], action[:, None], done - effort * action**2
    rows += eye[to.clip(0, PLACES - 1)], done
    return datasets.Batch(*(np.asarray(x, np.float32) for x in rows))


def corridor_best(effort=0.0):
    """V (5,) of the best policy."""
    v, actions = np.zeros(PLACES), np.linspace(-1, 1, 201)
    for _ in range(500):
        v = corridor_q(v, actions, effort).max(1)
    return v


# --- The ledge ---

LEDGE_GAMMA, EDGE, GRID = 0.95, 0.3, np.linspace(-1, 1, 201)


def ledge_step(x, action):
    """Next positions and rewards."""
    fall = 10 * np.maximum(action - EDGE, 0) ** 2
    return np.clip(x + 0.2 * action, -1, 1), x / 2 + action - fall


def ledge_value(actions):
    """V (201,) on GRID of a policy that takes each of its actions (201, K) equally often."""
    to, pays = ledge_step(GRID[:, None], actions)
    near = np.maximum(1 - np.abs(to[:, :, None] - GRID) / (GRID[1] - GRID[0]), 0)  # interpolates
    return np.linalg.solve(np.eye(len(GRID)) - LEDGE_GAMMA * near.mean(1), pays.mean(1))


def ledge_q(v, x, action):
    """Q of actions at x, of equal shape, followed by a policy of value v (201,)."""
    to, pays = ledge_step(x, action)
    return pays + LEDGE_GAMMA * np.interp(to, GRID, v)


def ledge_best():
    """V (201,) of the best policy, by policy iteration over 201 actions."""
    choices, best = np.linspace(-1, 1, 201), np.zeros((len(GRID), 1))
    for _ in range(20):
        v = ledge_value(best)
        best = choices[ledge_q(v, GRID[:, None], choices).argmax(1)][:, None]
    return v


def ledge_data(rows=4000, seed=0):
    """A Batch of positions and actions at random, no action beyond the ledge."""
    rng = np.random.default_rng(seed)
    x, action = rng.uniform(-1, 1, rows), rng.uniform(-0.7, EDGE, rows)
    to, pays = ledge_step(x, action)
    rows = x[:, None], action[:, None], pays, to[:, None], np.zeros(rows)
    return datasets.Batch(*(np.asarray(x, np.float32) for x in rows))


# --- Training ---


def train(name, data, field=None, values=None, seeds=5, terminal=None, adapt=None, **settings):
    """States (V, S, ...) of each of V values of a config's field and S seeds, chunk by chunk.

    data: a Batch; or where there is no field V Batches, (V, N, ...). adapt: changes a fresh State.
    """
    module = importlib.import_module(name)
    own = module.Config(**NETS | dict(env="claims") | settings)
    own = experiment.resolve(own, getattr(module, "PAPER", {}))
    extra, of_data = {} if terminal is None else {"terminal": terminal}, None if field else 0
    values = jnp.zeros(len(data.reward)) if field is None else jnp.array(values, jnp.float32)
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    fold = jax.vmap(jax.random.fold_in, (0, None))

    def start(data, key):
        state = module.init(key, data, own)
        return adapt(state) if adapt else state

    def chunk(value, state, data, key):
        cfg = replace(own, **{field: value}) if field else own
        return module.train_chunk(state, data, key, cfg, **extra)[0]

    chunk = jax.vmap(jax.vmap(chunk, (None, 0, None, 0)), (0, 0, of_data, None))
    chunk = jax.jit(chunk, donate_argnums=1)
    start = jax.vmap(jax.vmap(start, (None, 0)), (of_data, None), axis_size=len(values))
    state = jax.jit(start)(data, fold(keys, 0))
    if terminal is not None:
        dynamics = module.fit_dynamics(keys, data, own, lambda line: None)
        dynamics = jax.tree.map(lambda x: jnp.stack([x] * len(values)), dynamics)
        state = state.replace(dynamics=dynamics)
    for i in range(own.num_updates // own.eval_every):
        state = chunk(values, state, data, fold(keys, i + 1))
        yield state


def last(states):
    """The last of an iterable."""
    return list(states)[-1]


def each(state, function):
    """function(State of one run) for all V x S of them: stacked (V, S, ...), in float64."""
    out = jax.jit(jax.vmap(jax.vmap(function)))(state)
    return jax.tree.map(lambda x: np.asarray(x, float), out)


def critics(obs, action):
    """For `each`: the smaller of two critics' Q at obs (N, D) and actions (N, 1); (N,)."""
    obs, action = jnp.float32(obs), jnp.float32(action)
    return lambda state: state.critic.apply_fn(state.critic.params, obs, action).min(0)


def gaussian(obs):
    """For `each`: mean and std of the policy's Gaussian at obs (N, D), before any tanh; (N,)."""

    def moments(state):
        pi = state.actor.apply_fn(state.actor.params, jnp.float32(obs))
        pi = getattr(pi, "distribution", pi)
        return pi.mean()[:, 0], pi.stddev()[:, 0]

    return moments


def spread(x):
    """Mean, least and greatest over the last axis, one value a seed."""
    return {"mean": np.mean(x, -1), "least": np.min(x, -1), "most": np.max(x, -1)}


# --- The claims: each function's result is plain data ---

OFF = dict(gamma=LEDGE_GAMMA, num_actions=4, actor_lr=1e-3, critic_lr=1e-3, polyak=0.02)


def naive(updates=4000, every=400, seeds=5):
    """SAC and CQL on the ledge: Q of the policy's own actions, believed and true, in training.

    And the error of Q(x = 0, a) after training, all a.
    """
    data, rng = ledge_data(), np.random.default_rng(1)
    x = rng.choice(data.obs[:, 0], 200).astype(float)
    sweep, curves = np.linspace(-1, 1, 41), []
    settings = OFF | dict(num_updates=updates, eval_every=every)
    for state in train("cql", data, "alpha", [0.0, 1.0], seeds, **settings):
        mean, std = each(state, gaussian(GRID[:, None]))
        actions = np.tanh(mean[..., None] + std[..., None] * NORMAL)  # (2, S, 201, 200)
        v = [[ledge_value(a[:, ::5]) for a in of_alpha] for of_alpha in actions]
        mean, std = each(state, gaussian(x[:, None]))
        action = np.tanh(mean + std * rng.normal(size=std.shape))
        beyond = np.mean(action > EDGE, 2)
        believed = [[] for _ in v]
        for i in range(len(v)):
            for j in range(seeds):
                one = jax.tree.map(lambda leaf, i=i, j=j: leaf[i : i + 1, j : j + 1], state)
                believed[i].append(each(one, critics(x[:, None], action[i, j][:, None]))[0, 0])
        true = [[ledge_q(v[i][j], x, action[i, j]) for j in range(seeds)] for i in range(len(v))]
        curves.append([np.mean(believed, 2), np.mean(true, 2), beyond])
    q = each(state, critics(np.zeros((41, 1)), sweep[:, None]))
    error = q - np.array([[ledge_q(v[i][j], 0.0, sweep) for j in range(seeds)] for i in range(2)])
    curves = np.array(curves)  # (T, 3, 2, S)
    found = {"updates": every * (1 + np.arange(len(curves))), "actions": sweep}
    found["best possible"] = np.interp(x, GRID, ledge_best()).mean()
    for i, who in enumerate(("SAC", "CQL")):
        names = ("believed", "true", "share beyond the data")
        found[who] = {name: spread(curves[:, k, i]) for k, name in enumerate(names)}
        found[who]["error"] = spread(error[i].T)
    return found


@contextmanager
def without_the_data_term(cql):
    """CQL's critics are pushed down at sampled actions and not up at the data's, its Eq. (1)."""
    whole = cql.critic_loss

    def critic_loss(q_params, state, batch, key, cfg):
        loss, info = whole(q_params, state, batch, key, cfg)
        return loss + cfg.alpha * 2 * info["q_data"], info  # the loss is the sum of two critics'

    cql.critic_loss = critic_loss
    try:
        yield
    finally:
        cql.critic_loss = whole


def tabular(weight, keep, behaviour, policy, actions):
    """The fixed point of CQL's Eq. (1), or with keep = 1 of Eq. (2), for mu = policy; (5, K).

    At each (s, a) the minimum over Q of  weight (mu - keep behaviour) Q + behaviour (Q - T)^2 / 2,
    where T is the exact backup of the last Q by `policy`.
    """
    q = np.zeros_like(policy)
    for _ in range(500):
        target = corridor_q((policy * q).sum(1), actions)
        q = target - weight * (policy - keep * behaviour) / behaviour
    return q


def conservative(updates=3000, seeds=5):
    """Q of CQL with and without its data term against the truth: in a table, and trained.

    Each: true and learned Q of pairs (s, a), and of the policy at each s.
    """
    found, actions = {}, np.linspace(-1, 1, 9)
    behaviour, policy = (np.exp(c * actions) * np.ones((PLACES, 1)) for c in (-0.5, 0.5))
    behaviour, policy = (p / p.sum(1, keepdims=True) for p in (behaviour, policy))
    true = corridor_q(corridor_value(policy @ actions), actions)
    for who, keep in (("without", 0), ("with", 1)):
        q = tabular(0.05, keep, behaviour, policy, actions)
        pairs = {"true": true.ravel(), "learned": q.ravel()}
        states = {"true": (policy * true).sum(1), "learned": (policy * q).sum(1)}
        found[f"table, {who}"] = {"pairs": pairs, "policy": states}

    rng, cql = np.random.default_rng(0), importlib.import_module("cql")
    action = rng.normal(-0.3, 0.6, 40_000)
    data = corridor_data(rng, action[np.abs(action) < 1][:20_000])
    settings = dict(gamma=GAMMA, num_actions=4, actor_lr=1e-3, critic_lr=3e-3, polyak=0.02)
    settings |= dict(num_updates=updates, eval_every=updates, widths=(32,))
    actions, eye = np.linspace(-0.95, 0.95, 20), np.eye(PLACES)
    obs, tried = np.repeat(eye, 20, 0), np.tile(actions, PLACES)[:, None]
    for who in ("without", "with"):
        run = partial(train, "cql", data, "alpha", [0.1], seeds, **settings)
        if who == "without":
            with without_the_data_term(cql):
                state = last(run())
        else:
            state = last(run())
        mean, std = (x[0] for x in each(state, gaussian(eye)))
        own = np.tanh(mean[..., None] + std[..., None] * NORMAL)  # (S, 5, 200)
        v = [corridor_value(a.mean(1)) for a in own]
        q = each(state, critics(obs, tried))[0].reshape(seeds, PLACES, 20)
        true = np.stack([corridor_q(x, actions) for x in v])
        pairs = {"true": true.ravel(), "learned": q.ravel()}
        mid = [  # E[Q] under the policy, of each seed
            each(
                jax.tree.map(lambda leaf, j=j: leaf[:, j : j + 1], state),
                critics(np.repeat(eye, 200, 0), own[j].reshape(-1, 1)),
            ).reshape(PLACES, 200).mean(1)
            for j in range(seeds)
        ]  # fmt: skip
        states = {"true": np.ravel(v), "learned": np.ravel(mid)}
        found[f"network, {who}"] = {"pairs": pairs, "policy": states}
    for found_of in found.values():
        for points in found_of.values():
            points["above"] = float(np.mean(points["learned"] > points["true"]))
    return found


SLOW = dict(widths=(32,), lr=3e-3, polyak=0.02, gamma=GAMMA)
LEFT = (-1.0, 0.4)  # between these the data's actions are uniform, for IQL and AWAC


def expectile_value(tau, actions):
    """V (5,) whose every entry is the expectile of Q over equally likely actions (K,)."""
    v = np.zeros(PLACES)
    for _ in range(1000):
        q = corridor_q(v, actions)
        weight = np.where(q < v[:, None], 1 - tau, tau)
        v = (weight * q).sum(1) / weight.sum(1)
    return v


def poison(data):
    """For train's `adapt`: Q is NaN at each pair (s, a) that is not a row of the data."""

    def adapt(state):
        apply = state.critic.apply_fn

        def poisoned(params, obs, action):
            same = (obs[..., None, :] == data.obs).all(-1)
            same &= (action[..., None, :] == data.action).all(-1)
            return jnp.where(same.any(-1), apply(params, obs, action), jnp.nan)

        return state.replace(critic=state.critic.replace(apply_fn=poisoned))

    return adapt


def implicit(updates=4000, seeds=5, taus=(0.5, 0.7, 0.9, 0.97, 0.99)):
    """IQL's V at the middle place for each tau; exact; and trained with Q poisoned off the data."""
    spots, rng = np.linspace(*LEFT, 400), np.random.default_rng(0)
    data = corridor_data(rng, rng.uniform(*LEFT, 20_000))
    settings = SLOW | dict(num_updates=updates, eval_every=updates)
    state = last(train("iql", data, "tau", taus, seeds, **settings))
    v = each(state, lambda s: s.value.apply_fn(s.value.params, jnp.eye(PLACES)))  # (T, S, 5)
    curve = 1 - np.geomspace(0.5, 0.003, 30)
    found = {"taus": taus, "V": spread(v[:, :, 2]), "curve": {"taus": curve}}
    found["curve"]["V"] = [expectile_value(tau, spots)[2] for tau in curve]
    for name, action in (("SARSA", np.mean(LEFT)), ("best in data", LEFT[1]), ("best", 1.0)):
        found[name] = corridor_value(action)[2]

    few, short = (
        jax.tree.map(lambda x: x[:500], data),
        settings | dict(num_updates=200, eval_every=200),
    )
    for name, field in (("iql", "tau"), ("awac", "beta")):
        runs = [
            last(train(name, few, field, [0.9], 1, adapt=a, **short)) for a in (None, poison(few))
        ]
        weights = [jax.tree.leaves((s.actor.params, s.critic.params)) for s in runs]
        same = all(np.array_equal(a, b) for a, b in zip(*weights, strict=True))
        found[f"{name}: same bits with Q = NaN off the data"] = same
    return found


def awac_value(lam, actions, clip=100.0):
    """Mean actions (5,) of AWAC's fixed point, its Gaussian fitted to weighted actions (K,)."""
    mean, std = np.full(PLACES, actions.mean()), actions.std()
    for _ in range(300):
        own = np.clip(mean[:, None] + std * NORMAL[::5], -1, 1)  # (5, 40)
        v = corridor_value(own.mean(1))
        gap = corridor_q(v, actions)[:, :, None] - corridor_q(v, own)[:, None]
        weight = np.minimum(np.exp(np.minimum(gap / lam, 700)), clip).mean(2)  # (5, K)
        mean = (weight * actions).sum(1) / weight.sum(1)
        std = np.sqrt((weight * (actions - mean[:, None]) ** 2).sum() / weight.sum())
        std = std.clip(np.exp(-5), np.exp(2))
    return mean


def weighted(updates=4000, seeds=5, lambdas=(3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003)):
    """The value at the middle place of AWAC's mean action, for each lambda; exact; and BC's."""
    rng = np.random.default_rng(0)
    data = corridor_data(rng, rng.uniform(*LEFT, 20_000))
    settings = SLOW | dict(num_updates=updates, eval_every=updates)
    state = last(train("awac", data, "beta", 1 / np.array(lambdas), seeds, **settings))
    mean, _ = each(state, gaussian(np.eye(PLACES)))
    v = [[corridor_value(m)[2] for m in of_lambda] for of_lambda in mean]
    curve, spots = np.geomspace(max(lambdas), min(lambdas), 25), np.linspace(*LEFT, 200)
    found = {"lambdas": lambdas, "V": spread(v), "mean action": spread(mean.mean(2))}
    found["curve"] = {"lambdas": curve}
    found["curve"]["V"] = [corridor_value(awac_value(lam, spots))[2] for lam in curve]
    for name, action in (("behaviour", np.mean(LEFT)), ("best in data", LEFT[1]), ("best", 1.0)):
        found[name] = corridor_value(action)[2]
    return found


def model_based(updates=4000, seeds=5, betas=(0.0, 0.5, 1.0, 2.0, 5.0)):
    """COMBO on the ledge: the policy's Q at the model's states, believed and true, for each beta."""
    import combo

    sizes = dict(model_widths=(32, 32), model_decay=(0.0,) * 3, num_members=3, num_elites=3)
    sizes |= dict(max_epochs=30, rollout_batch=300, rollout_every=200, horizon=5)
    settings = OFF | sizes | dict(num_updates=updates, eval_every=updates)
    run = train("combo", ledge_data(), "beta", betas, seeds, combo.never, **settings)
    state, rng = last(run), np.random.default_rng(1)
    believed, true, beyond = np.zeros((3, len(betas), seeds))
    for i in range(len(betas)):
        for j in range(seeds):
            one = jax.tree.map(lambda leaf, i=i, j=j: leaf[i : i + 1, j : j + 1], state)
            mean, std = (x[0, 0] for x in each(one, gaussian(GRID[:, None])))
            v = ledge_value(np.tanh(mean[:, None] + std[:, None] * NORMAL[::5]))
            x = rng.choice(np.asarray(one.ring.rows.obs[0, 0, :, 0], float), 500)
            mean, std = (x[0, 0] for x in each(one, gaussian(x[:, None])))
            action = np.tanh(mean + std * rng.normal(size=std.shape))
            believed[i, j] = each(one, critics(x[:, None], action[:, None])).mean()
            true[i, j] = ledge_q(v, x, action).mean()
            beyond[i, j] = np.mean(action > EDGE)
    parts = {"believed": believed, "true": true, "share beyond the data": beyond}
    return {"betas": betas} | {name: spread(x) for name, x in parts.items()}


def ceiling(updates=3000, seeds=3, means=(-0.5, -0.25, 0.0, 0.25, 0.5), efforts=(0.0, 0.2)):
    """Values at the middle place of the behaviour, BC and IQL, for behaviours uniform around each
    mean; in corridors where actions cost nothing, and effort * a^2."""
    width, rng = 0.4, np.random.default_rng(0)
    rows = [
        corridor_data(rng, rng.uniform(m - width, m + width, 5000), effort)
        for effort in efforts
        for m in means
    ]
    data = jax.tree.map(lambda *x: np.stack(x), *rows)
    fast = SLOW | dict(num_updates=updates, eval_every=updates)
    slow = {k: fast[k] for k in ("widths", "lr", "num_updates", "eval_every")}
    settings = {"BC": ("bc", slow), "BC, sampled": ("bc", slow | dict(head="gaussian"))}
    settings["IQL"] = ("iql", fast | dict(tau=0.95, beta=100.0))
    shape, found = (len(efforts), len(means), seeds), {"means": means, "efforts": efforts}
    for who, (name, own) in settings.items():
        mean, std = each(last(train(name, data, seeds=seeds, **own)), gaussian(np.eye(PLACES)))
        action = mean[..., None] + (std[..., None] * NORMAL if who == "BC, sampled" else 0)
        action = np.clip(action, -1, 1).reshape(*shape, PLACES, -1)
        moments = action.mean(-1), (action**2).mean(-1)
        v = np.zeros(shape)
        for i, j, k in np.ndindex(shape):
            v[i, j, k] = corridor_value(moments[0][i, j, k], moments[1][i, j, k], efforts[i])[2]
        found[who] = spread(v)
    for name in ("behaviour", "best"):
        found[name] = np.zeros((len(efforts), len(means)))
    for i, effort in enumerate(efforts):
        for j, m in enumerate(means):
            found["behaviour"][i, j] = corridor_value(m, m**2 + width**2 / 3, effort)[2]
        found["best"][i] = corridor_best(effort)[2]
    return found
