"""Tests fourteen claims of offline RL in small worlds where true values are known.

The corridor has five places in a row. Action a in [-1, 1] steps right with probability (1 + a) / 2,
else left (at the first place: it stays). Leaving by the right end pays 1 and ends the episode. So Q
is linear in a, and the value of a policy depends only on its mean actions and solves five linear
equations.

The ledge has positions x in [-1, 1]. Action a moves to x + 0.2 a and pays x / 2 + a, minus
10 (a - 0.3)^2 beyond a = 0.3. Episodes do not end. The value of a policy solves linear equations on
a grid.

    python -m benchmarks.studies.claims               # results/claims.json and results/claims/*.png
    python -m benchmarks.studies.claims --only iql

The files in algorithms/ do the learning, with small networks and several seeds. Bars and bands go
from the lowest seed to the highest. Two claims are about the world of stitching.py, where no
episode takes the best path. Three are about models, see claims_models.py.
"""

import itertools
import json
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import NormalDist

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.studies import claims_models, claims_pictures, stitching
from common import datasets, experiment

ROOT = Path(__file__).resolve().parents[2]

NORMAL = np.array([NormalDist().inv_cdf((i + 0.5) / 40) for i in range(40)])  # equally likely
NETS = dict(env="claims", widths=(32,), normalize=False, batch_size=128)


@dataclass(frozen=True)
class Config:
    only: str = ""  # name of the one claim to test; empty: all
    results: str = str(ROOT / "benchmarks/results")  # folder for claims.json and claims/


# --- The corridor ---

PLACES, GAMMA, MIDDLE = np.arange(5), 0.9, 2
SEEN = (-1.0, 0.4)  # range of the data's uniform actions, for IQL and AWAC


def corridor_q(v, action, effort=0.0):
    """Q (..., 5, K) of actions (K,) or (..., 5, K), followed by a policy with value v (..., 5).

    effort: an action costs effort a^2.
    """
    ahead = np.concatenate([GAMMA * v[..., 1:], np.ones_like(v[..., :1])], -1)[..., None]
    behind = GAMMA * np.concatenate([v[..., :1], v[..., :-1]], -1)[..., None]
    right = (1 + action) / 2
    return right * ahead + (1 - right) * behind - effort * action**2


def corridor_value(mean, square=0.0, effort=0.0):
    """V (..., 5) of a policy with mean E[a] (..., 5); square: E[a^2], needed with an effort."""
    right = (1 + np.asarray(mean, float)) / 2
    move = np.zeros((*right.shape, len(PLACES)))
    move[..., PLACES[:-1], PLACES[1:]] = right[..., :-1]
    move[..., PLACES[1:], PLACES[:-1]] = 1 - right[..., 1:]
    move[..., 0, 0] = 1 - right[..., 0]
    pays = right * (PLACES[-1] == PLACES) - effort * square
    return np.linalg.solve(np.eye(len(PLACES)) - GAMMA * move, pays[..., None])[..., 0]


def corridor_best(effort=0.0):
    """V (5,) of the best policy."""
    v = np.zeros(len(PLACES))
    for _ in range(500):
        v = corridor_q(v, np.linspace(-1, 1, 201), effort).max(1)
    return v


def corridor_data(rng, action, effort=0.0):
    """A Batch with one row for each of the actions (N,), at the places in turn."""
    place = np.arange(len(action)) % len(PLACES)
    to = place + np.where(rng.random(len(action)) < (1 + action) / 2, 1, -1)
    done, eye = to == len(PLACES), np.eye(len(PLACES))
    rows = eye[place], action[:, None], done - effort * action**2
    rows += eye[to.clip(0, PLACES[-1])], done
    return datasets.Batch(*(np.asarray(x, np.float32) for x in rows))


# --- The ledge ---

LEDGE_GAMMA, EDGE, GRID = 0.95, 0.3, np.linspace(-1, 1, 101)
TRIED = (-0.7, EDGE)  # range of the data's uniform actions


def ledge_step(x, action):
    """Next positions and rewards."""
    fall = 10 * np.maximum(action - EDGE, 0) ** 2
    return np.clip(x + 0.2 * action, -1, 1), x / 2 + action - fall


@partial(np.vectorize, signature="(g,k)->(g)")
def ledge_value(actions):
    """V (..., G) on GRID of a policy whose K actions (..., G, K) are equally likely."""
    to, pays = ledge_step(GRID[:, None], actions)
    near = np.maximum(1 - np.abs(to[:, :, None] - GRID) / (GRID[1] - GRID[0]), 0)  # interpolates
    return np.linalg.solve(np.eye(len(GRID)) - LEDGE_GAMMA * near.mean(1), pays.mean(1))


@partial(np.vectorize, signature="(g),(n),(n)->(n)")
def ledge_q(v, x, action):
    """Q (..., N) of actions at positions x, followed by a policy with value v (..., G)."""
    to, pays = ledge_step(x, action)
    return pays + LEDGE_GAMMA * np.interp(to, GRID, v)


def ledge_best():
    """V (G,) of the best policy, by policy iteration over 201 actions."""
    best, choices = np.zeros((len(GRID), 1)), np.linspace(-1, 1, 201)
    for _ in range(20):
        v = ledge_value(best)
        q = [ledge_q(v, GRID, np.full(len(GRID), a)) for a in choices]
        best = choices[np.argmax(q, 0)][:, None]
    return v


def ledge_rows(x, action):
    """A Batch of the steps from positions x (N,) by actions (N,)."""
    to, pays = ledge_step(x, action)
    rows = x[:, None], action[:, None], pays, to[:, None], np.zeros(len(x))
    return datasets.Batch(*(np.asarray(x, np.float32) for x in rows))


def ledge_data(rows=4000, seed=0):
    """A Batch of random positions and actions; no action goes beyond the edge."""
    rng = np.random.default_rng(seed)
    return ledge_rows(rng.uniform(-1, 1, rows), rng.uniform(*TRIED, rows))


# --- Training: S seeds for each of V values of one field of a config, together ---


def config(name, **settings):
    """(the algorithm's module, its config as `train` uses it)."""
    module = experiment.module(name)
    return module, experiment.resolve(
        module.Config(**NETS | settings), getattr(module, "TUNED", {})
    )


def train(name, data, field=None, values=None, seeds=5, terminal=None, adapt=None, **settings):
    """Yields states (V, S, ...) after each `log_every` updates.

    data: a Batch, or V of them (V, N, ...) if `field` is None. field, values: the field of the
    config that varies and its V values. terminal: COMBO's termination function. adapt: a function
    that changes a fresh State.
    """
    module, own = config(name, **settings)
    extra, of_data = {} if terminal is None else {"terminal": terminal}, None if field else 0
    values = jnp.array(values, jnp.float32) if field else jnp.zeros(len(data.reward))
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    fold = jax.vmap(jax.random.fold_in, (0, None))

    def start(data, key):
        state = module.init(key, data, own)
        return adapt(state) if adapt else state

    def chunk(value, state, data, key, step):
        cfg = replace(own, **{field: value}) if field else own
        return module.train_chunk(state, data, key, step, cfg, **extra)[0]

    start = jax.vmap(jax.vmap(start, (None, 0)), (of_data, None), axis_size=len(values))
    state = jax.jit(start)(data, fold(keys, 0))
    if name == "brac" and field == "alpha":
        weight = {"weight": jnp.repeat(values[:, None], seeds, 1)}
        state = state.replace(alpha=state.alpha.replace(params=weight))
    if terminal is not None:  # COMBO: a model for each seed, shared by all values
        dynamics = module.fit_dynamics(keys, data, own, lambda line: None)
        dynamics = jax.tree.map(lambda x: jnp.stack([x] * len(values)), dynamics)
        state = state.replace(dynamics=dynamics)
    if name == "brac":
        clone = partial(module.clone_chunk, cfg=own)
        clone = jax.vmap(jax.vmap(clone, (0, None, 0, None)), (0, of_data, None, None))
        state, _ = jax.jit(clone)(state, data, fold(keys, 1), jnp.arange(own.clone_updates))
    chunk = jax.vmap(jax.vmap(chunk, (None, 0, None, 0, None)), (0, 0, of_data, None, None))
    chunk = jax.jit(chunk)
    for step in range(own.log_every, own.num_updates + 1, own.log_every):
        state = chunk(values, state, data, keys, step)
        yield state


def trained(*args, updates, **settings):
    """The states after the last update."""
    return list(train(*args, num_updates=updates, log_every=updates, **settings))[-1]


def each(function, state, *inputs):
    """function(State of one run, *inputs) for all runs: (V, S, ...) float64.

    inputs: (N, D) for all runs, or (V, S, N, D).
    """
    runs = jax.tree.leaves(state)[0].shape[:2]
    inputs = [jnp.broadcast_to(jnp.float32(x), (*runs, *np.shape(x)[-2:])) for x in inputs]
    out = jax.jit(jax.vmap(jax.vmap(function)))(state, *inputs)
    return jax.tree.map(lambda x: np.asarray(x, float), out)


def q_value(state, obs, action):
    """Q (N,) at obs (N, D) and action (N, 1), the smaller of the two critics'."""
    return state.critic.apply_fn(state.critic.params, obs, action).min(0)


def gaussian(state, obs):
    """Mean and std (N,) of the policy at obs (N, D), before any tanh."""
    pi = state.actor.apply_fn(state.actor.params, obs)
    pi = pi if isinstance(pi, distrax.MultivariateNormalDiag) else pi.distribution
    return pi.mean()[:, 0], pi.stddev()[:, 0]


def likely_actions(state, obs, squash):
    """40 equally likely actions of each run's policy at obs (N, D): (V, S, N, 40).

    squash: from the Gaussian to an action.
    """
    mean, std = each(gaussian, state, obs)
    return squash(mean[..., None] + std[..., None] * NORMAL)


def chosen_actions(name, state, obs, samples=20, **settings):
    """Actions that each run's policy takes at obs (N, D), drawn anew: (V, S, N, samples)."""
    module, own = config(name, **settings)
    act = module.policy(own)

    def draw(state, obs):
        once = lambda key: act(state, None, obs, jnp.zeros(len(obs)), key)[0][:, 0]  # noqa: E731
        return jax.vmap(once, out_axes=1)(jax.random.split(jax.random.key(0), samples))

    return each(draw, state, obs)


def on_the_ledge(state, x):
    """For the policy of each run: its value, and means over its actions at x (N,) or (V, S, N).

    {"value": (V, S, G) on GRID, "predicted": Q of its actions by the critics, "earned": their true
    Q, "beyond": share of actions outside the data; the last three (V, S)}.
    """
    v = ledge_value(likely_actions(state, GRID[:, None], np.tanh))
    action = likely_actions(state, x[..., None], np.tanh)[..., ::4]  # (V, S, N, 10)
    x = np.repeat(x, action.shape[-1], -1)
    action = action.reshape(*v.shape[:2], -1)
    predicted = each(q_value, state, x[..., None], action[..., None]).mean(2)
    earned, beyond = ledge_q(v, x, action).mean(2), np.mean(action > EDGE, 2)
    return {"value": v, "predicted": predicted, "earned": earned, "beyond": beyond}


def spread(x):
    """Mean, lowest and highest of x (..., S) over the seeds."""
    return {"mean": np.mean(x, -1), "lowest": np.min(x, -1), "highest": np.max(x, -1)}


# --- The claims: each function returns plain data ---

OFF = dict(num_actions=4, actor_lr=1e-3, critic_lr=1e-3, polyak=0.02)
ON_LEDGE = OFF | dict(gamma=LEDGE_GAMMA, widths=(32, 32))
IN_CORRIDOR = dict(gamma=GAMMA, lr=3e-3, polyak=0.02)


def naive(updates=4000, every=400, seeds=5):
    """SAC and CQL on the ledge: Q of the policy's own actions, predicted and true, by updates.

    After the last update, for actions at x = 0: the error of Q, and its one-step error, which is
    the difference between Q and the true reward plus the predicted value of the next position.
    """
    data, rng, curves = ledge_data(), np.random.default_rng(1), []
    x, sweep = rng.uniform(-1, 1, 200), np.linspace(-1, 1, 41)
    settings = ON_LEDGE | dict(num_updates=updates, eval_every=every, seeds=seeds)
    for state in train("cql", data, "alpha", [0.0, 1.0], **settings):
        curves.append(on_the_ledge(state, x))
    q = each(q_value, state, np.zeros((41, 1)), sweep[:, None])  # (2, S, 41)
    to, pays = ledge_step(0.0, sweep)
    own = likely_actions(state, to[:, None], np.tanh).reshape(2, seeds, -1, 1)
    v = each(q_value, state, np.repeat(to, 40)[:, None], own).reshape(2, seeds, 41, 40).mean(3)
    step, whole = q - pays - LEDGE_GAMMA * v, q - ledge_q(curves[-1]["value"], 0 * sweep, sweep)
    found = {"updates": every * (1 + np.arange(len(curves))), "actions": sweep, "seen": TRIED}
    found["best possible"] = np.interp(x, GRID, ledge_best()).mean()
    for i, who in enumerate(("SAC", "CQL")):
        names = ("predicted", "earned", "beyond")
        found[who] = {name: spread([curve[name][i] for curve in curves]) for name in names}
        found[who] |= {"error": spread(whole[i].T), "error of one step": spread(step[i].T)}
    return found


@contextmanager
def without_the_data_term(cql):
    """Within: CQL's critics are not pushed up at the data's actions, Eq. (1) instead of (2)."""
    whole = cql.critic_loss

    def critic_loss(q_params, state, batch, key, cfg):
        loss, info = whole(q_params, state, batch, key, cfg)
        return loss + cfg.alpha * 2 * info["q_data"], info  # the loss is the sum of two critics'

    cql.critic_loss = critic_loss
    try:
        yield
    finally:
        cql.critic_loss = whole


def tabular(alpha, keep, behaviour, policy, actions):
    """The fixed point (5, K) of CQL's Eq. (1), or with keep = 1 of Eq. (2), for mu = policy.

    Each iteration minimises  alpha (mu - keep behaviour) Q + behaviour (Q - T)^2 / 2  over Q at
    each (s, a); T is the exact backup of the last Q under the policy.
    """
    q = np.zeros_like(policy)
    for _ in range(500):
        target = corridor_q((policy * q).sum(1), actions)
        q = target - alpha * (policy - keep * behaviour) / behaviour
    return q


def conservative(updates=3000, seeds=5, alpha=0.2):
    """CQL's Q without and with the data term against the true Q: in a table, and learned.

    For each: Q of pairs (s, a), and its mean under the policy at each s. The penalty is on the
    policy's own actions, as in Theorem 3.2; CQL(rho) has this approximately, since it prefers
    actions with a large Q.
    """
    found, actions, eye = {}, np.linspace(-1, 1, 9), np.eye(len(PLACES))
    behaviour = np.exp(actions / 2) * np.ones((len(eye), 1))
    policy = behaviour * np.where(actions < -0.6, 0.1, 1)  # avoids two actions of the data
    behaviour, policy = (p / p.sum(1, keepdims=True) for p in (behaviour, policy))
    true = corridor_q(corridor_value(policy @ actions), actions)
    for keep, how in enumerate(("without", "with")):
        q = tabular(alpha, keep, behaviour, policy, actions)
        means = (policy * true).sum(1), (policy * q).sum(1)
        found["table, " + how] = {"pairs": (true, q), "policy": means}

    rng, cql = np.random.default_rng(0), experiment.module("cql")
    good, wild = rng.normal(0.8, 0.25, 40_000), rng.uniform(-1, 1, 40_000)
    shown = np.where(rng.random(40_000) < 0.7, good, wild)
    data = corridor_data(rng, shown[np.abs(shown) < 1][:20_000])
    settings = OFF | dict(critic_lr=3e-3, gamma=GAMMA, variant="rho", updates=updates, seeds=seeds)
    run = partial(trained, "cql", data, "alpha", [alpha], **settings)
    actions, obs = np.linspace(-0.95, 0.95, 20), np.repeat(eye, 20, 0)
    with without_the_data_term(cql):
        states = [run()]
    for state, how in zip([*states, run()], ("without", "with"), strict=True):
        own = likely_actions(state, eye, np.tanh)  # (1, S, 5, 40)
        v = corridor_value(own.mean(-1))
        q = each(q_value, state, obs, np.tile(actions, len(eye))[:, None])
        mean = each(q_value, state, np.repeat(eye, 40, 0), own.reshape(1, seeds, -1, 1))
        mean = mean.reshape(*own.shape).mean(-1)
        pairs = corridor_q(v, actions), q.reshape(1, seeds, len(eye), -1)
        found["network, " + how] = {"pairs": pairs, "policy": (v, mean)}
    for points in found.values():
        for kind, (true, learned) in list(points.items()):
            points[kind] = {"true": np.ravel(true), "learned": np.ravel(learned)}
            points[f"share of {kind} above the truth"] = np.mean(learned > true)
    return found


def expectile_value(tau, actions):
    """IQL's exact V (5,): at each place the expectile of Q over equally likely actions (K,)."""
    v = np.zeros(len(PLACES))
    for _ in range(1000):
        q = corridor_q(v, actions)
        weight = np.where(q < v[:, None], 1 - tau, tau)
        v = (weight * q).sum(1) / weight.sum(1)
    return v


def poison(data):
    """For `adapt` of train: Q becomes NaN at each pair (s, a) that is not a row of the data."""

    def adapt(state):
        apply = state.critic.apply_fn

        def poisoned(params, obs, action):
            same = (obs[..., None, :] == data.obs).all(-1)
            same &= (action[..., None, :] == data.action).all(-1)
            return jnp.where(same.any(-1), apply(params, obs, action), jnp.nan)

        return state.replace(critic=state.critic.replace(apply_fn=poisoned))

    return adapt


def poisoned(name, field, data, updates=200):
    """All learned numbers, as vectors, after normal training and with Q poisoned off the data."""
    runs = [
        trained(name, data, field, [1.0], seeds=1, adapt=adapt, updates=updates)
        for adapt in (None, poison(data))
    ]
    return [np.concatenate([np.ravel(x) for x in jax.tree.leaves(state)]) for state in runs]


def references():
    """Values at the middle place: of the behaviour, of the best action in the data, of the best."""
    actions = {"behaviour": np.mean(SEEN), "best in the data": SEEN[1], "best": 1.0}
    return {who: corridor_value(np.full(len(PLACES), a))[MIDDLE] for who, a in actions.items()}


def implicit(updates=4000, seeds=5, taus=(0.5, 0.7, 0.9, 0.97, 0.99)):
    """IQL's V at the middle place for each tau, learned and exact; whether a poisoned Q matters."""
    rng = np.random.default_rng(0)
    data = corridor_data(rng, rng.uniform(*SEEN, 20_000))
    state = trained("iql", data, "tau", taus, updates=updates, seeds=seeds, **IN_CORRIDOR)
    eye, curve = np.eye(len(PLACES)), 1 - np.geomspace(0.5, 0.003, 30)
    v = each(lambda s, obs: s.value.apply_fn(s.value.params, obs), state, eye)
    exact = [expectile_value(tau, np.linspace(*SEEN, 400))[MIDDLE] for tau in curve]
    found = references() | {"taus": taus, "V": spread(v[..., MIDDLE])}
    usual, off = poisoned("iql", "tau", jax.tree.map(lambda x: x[:500], data))
    found["same bits with Q = NaN off the data"] = np.array_equal(usual, off)
    return found | {"exact": {"taus": curve, "V": exact}}


def awac_actions(lam, actions, clip=100.0):
    """Mean actions (5,) at AWAC's fixed point: a Gaussian fitted to weighted actions (K,)."""
    mean, std = np.full(len(PLACES), actions.mean()), actions.std()
    for _ in range(300):
        own = np.clip(mean[:, None] + std * NORMAL, -1, 1)
        v = corridor_value(own.mean(1))
        gap = corridor_q(v, actions)[:, :, None] - corridor_q(v, own)[:, None]
        weight = np.exp(np.minimum(gap / lam, np.log(clip))).mean(2)  # (5, K)
        mean = (weight * actions).sum(1) / weight.sum(1)
        square = (weight * (actions - mean[:, None]) ** 2).sum() / weight.sum()
        std = np.sqrt(square).clip(np.exp(-5), np.exp(2))
    return mean


def weighted(updates=4000, seeds=5, lambdas=(3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003)):
    """The value of AWAC's mean action at the middle place for each lambda, learned and exact."""
    rng, betas = np.random.default_rng(0), 1 / np.array(lambdas)
    data = corridor_data(rng, rng.uniform(*SEEN, 20_000))
    state = trained("awac", data, "beta", betas, updates=updates, seeds=seeds, **IN_CORRIDOR)
    v = corridor_value(each(gaussian, state, np.eye(len(PLACES)))[0])
    curve, actions = np.geomspace(lambdas[0], lambdas[-1], 25), np.linspace(*SEEN, 200)
    exact = [corridor_value(awac_actions(lam, actions))[MIDDLE] for lam in curve]
    found = references() | {"lambdas": lambdas, "V": spread(v[..., MIDDLE])}
    return found | {"exact": {"lambdas": curve, "V": exact}}


def model_based(updates=4000, seeds=5, betas=(0.0, 0.5, 1.0, 2.0, 5.0)):
    """COMBO on the ledge: Q of its policy at the model's states, predicted and true, by beta."""
    import combo

    sizes = dict(model_widths=(32, 32), model_decay=(0.0,) * 3, num_members=3, num_elites=3)
    sizes |= dict(max_epochs=30, rollout_batch=300, rollout_every=200, horizon=5, seeds=seeds)
    run = partial(trained, "combo", ledge_data(), "beta", betas, terminal=combo.never)
    state = run(updates=updates, **ON_LEDGE | sizes)
    x = np.asarray(state.buffer.rows.obs[:, :, ::37, 0], float)  # 203 of 7500
    found = on_the_ledge(state, x)
    del found["value"]
    return {"betas": betas} | {name: spread(x) for name, x in found.items()}


def ceiling(updates=3000, seeds=3, means=(-0.5, -0.25, 0.0, 0.25, 0.5), efforts=(0.0, 0.2)):
    """Values at the middle place of behaviours and of policies learned from them: (efforts, means).

    A behaviour is uniform around its mean action; in its corridor an action costs effort a^2.
    """
    rng, width, shape = np.random.default_rng(0), 0.4, (len(efforts), len(means))
    effort, mean = (x.ravel() for x in np.meshgrid(efforts, means, indexing="ij"))
    rows = [
        corridor_data(rng, rng.uniform(m - width, m + width, 5000), e)
        for e, m in zip(effort, mean, strict=True)
    ]
    data, eye = jax.tree.map(lambda *x: np.stack(x), *rows), np.eye(len(PLACES))
    sizes = dict(updates=updates, seeds=seeds)
    own = sizes | dict(lr=IN_CORRIDOR["lr"])
    states = {
        "BC": trained("bc", data, **own),
        "BC, sampled": trained("bc", data, head="gaussian", **own),
        "IQL": trained("iql", data, tau=0.95, beta=100.0, **sizes | IN_CORRIDOR),
    }
    flat = np.ones(len(PLACES))
    behaviour = [
        corridor_value(m * flat, m**2 + width**2 / 3, e) for e, m in zip(effort, mean, strict=True)
    ]
    found = {"means": means, "efforts": efforts}
    found["best"] = np.array([corridor_best(e)[MIDDLE] for e in efforts])
    found["behaviour"] = np.array(behaviour)[:, MIDDLE].reshape(shape)
    for who, state in states.items():
        action = likely_actions(state, eye, lambda x: x.clip(-1, 1))
        if "sampled" not in who:
            action = each(gaussian, state, eye)[0][..., None]
        v = corridor_value(action.mean(-1), (action**2).mean(-1), effort[:, None, None])
        found[who] = spread(v[..., MIDDLE].reshape(*shape, seeds))
    return found


CLONE = dict(clone_updates=1000, clone_lr=3e-3, warm_start=200)  # of BRAC
ACTOR_CRITIC = dict(gamma=GAMMA, actor_lr=1e-3, critic_lr=3e-3, polyak=0.02)
BRAC = ACTOR_CRITIC | CLONE | dict(actor_widths=(32,))


def divergence(state, obs, own):
    """BRAC's D (N,) at obs (N, D). own: its module and config."""
    module, cfg = own
    return module.draw(state.actor.params, state, obs, None, jax.random.key(1), cfg)[2]


def moved(updates=2000, seeds=3, alpha=0.2):
    """BRAC's Q with the penalty in the value and in the reward, at pairs of the corridor.

    {"Q of the value", "alpha D", "Q of the reward"}: one number for each seed, place and action;
    {"values"}: of the policies at the middle place, by penalty.
    """
    rng, eye, actions = np.random.default_rng(0), np.eye(len(PLACES)), np.linspace(*SEEN, 8)
    data, found = corridor_data(rng, rng.uniform(*SEEN, 20_000)), {"values": {}}
    pairs = np.repeat(eye, len(actions), 0), np.tile(actions, len(eye))[:, None]
    for penalty in ("value", "reward"):
        settings = BRAC | dict(penalty=penalty, alpha=alpha)
        state = trained("brac", data, "alpha", [alpha], updates=updates, seeds=seeds, **settings)
        q = each(q_value, state, *pairs)[0]  # (S, pairs)
        action = chosen_actions("brac", state, eye, 1, **settings).mean(-1)
        found["values"][penalty] = spread(corridor_value(action)[0, :, MIDDLE])
        found[f"Q of the {penalty}"] = q.ravel()
        if penalty == "value":
            d = each(
                partial(divergence, own=config("brac", **settings, num_samples=400)), state, eye
            )
            found["alpha D"] = alpha * np.repeat(d[0], len(actions), 1).ravel()
    return found


GOOD, BAD, NOISE = 0.2, -0.6, 0.05  # mean actions of two behaviours on the ledge, their deviation
CONSTRAINED = dict(gamma=LEDGE_GAMMA, widths=(32, 32), polyak=0.02, actor_lr=1e-3, critic_lr=1e-3)
CLONED = CONSTRAINED | CLONE | dict(actor_widths=(32, 32))
MATCHED = CONSTRAINED | dict(vae_widths=(32, 32), warm_start=200, sigma=1.0)


def acting(name, state, settings):
    """Of each run's policy on the ledge (V, S): mean action, what it earns, share of actions beyond
    the edge."""
    action = chosen_actions(name, state, GRID[:, None], 10, **settings)
    earned = ledge_value(action).mean(-1)
    return {
        "action": action.mean((2, 3)),
        "earned": earned,
        "beyond": np.mean(action > EDGE, (2, 3)),
    }


def support(updates=1500, seeds=2, kl=(0.1, 0.3, 1.0, 3.0), mmd=(0.3, 1.0, 3.0, 10.0)):
    """What policies earn on the ledge, whose data are wide and dull: held to the data's density by
    BRAC, at several weights, and to its support by BEAR and BCQ."""
    data, found = ledge_data(), {"best": ledge_best().mean(), "runs": {}}
    found["behaviour"] = ledge_value(np.tile(np.linspace(*TRIED, 40), (len(GRID), 1))).mean()
    bcq = dict(gamma=LEDGE_GAMMA, widths=(32, 32), polyak=0.02, lr=1e-3, vae_widths=(32, 32))
    runs = [  # name, settings, field that varies, its values, their labels
        ("brac", CLONED, "alpha", kl, [f"KL\n{alpha:g}" for alpha in kl]),
        ("brac", CLONED | dict(divergence="mmd", sigma=0.3), "alpha", mmd,
         [f"MMD\n{alpha:g}" for alpha in mmd]),
        ("bear", MATCHED | dict(multiplier_lr=0.01), "eps", [0.05], ["BEAR"]),
        ("bcq", bcq, "lam", [0.75], ["BCQ"]),
        ("bcq", bcq | dict(phi=0.3), "lam", [0.75], ["BCQ\nphi 0.3"]),
    ]  # fmt: skip
    for name, settings, field, values, labels in runs:
        state = trained(name, data, field, values, updates=updates, seeds=seeds, **settings)
        how = {k: spread(v) for k, v in acting(name, state, settings).items()}
        for i, label in enumerate(labels):
            found["runs"][label] = {k: {m: x[i] for m, x in v.items()} for k, v in how.items()}
    return found


def two_behaviours(updates=1500, seeds=3, shares=(0.0, 0.25, 0.5, 0.75)):
    """Mean action and earnings on the ledge of policies learned from data of two behaviours at the
    same positions, by the share of the bad one."""
    rng, rows = np.random.default_rng(0), 8000

    def mixture(share):
        mean = np.where(rng.random(rows) < share, BAD, GOOD)
        return ledge_rows(rng.uniform(-1, 1, rows), rng.normal(mean, NOISE))

    data = jax.tree.map(lambda *x: np.stack(x), *map(mixture, shares))
    runs = {
        "CQL": ("cql", CONSTRAINED | dict(num_actions=4, alpha=1.0)),
        "BRAC": ("brac", CLONED | dict(alpha=1.0)),
        "BEAR": ("bear", MATCHED),
    }
    found = {"shares": shares, "actions": {"the good behaviour": GOOD, "the bad one": BAD}}
    for who, (name, settings) in runs.items():
        state = trained(name, data, updates=updates, seeds=seeds, **settings)
        how = acting(name, state, settings)
        found[who] = {"each action": how["action"]} | {k: spread(v) for k, v in how.items()}
    return found


# --- The crossroads of stitching.py ---


def first_rows(data, path):
    """First rows of the episodes along one of its PATHS."""
    return data.start[stitching.PATHS.index(path) :: len(stitching.PATHS)]


def earned(data, gamma):
    """By how much the way to B pays more from A than that to F: in the data; if it went on to C."""
    to_f, to_b, from_b = (first_rows(data, path) for path in ("AF", "ABD", "BC"))
    returns = data.steps(gamma).returns_to_go
    at_b = np.linalg.norm(data.obs - stitching.PLACES["B"], axis=1) < stitching.RADIUS
    steps = np.array([np.argmax(at_b[row:]) for row in to_b])  # to B
    best = np.mean(gamma**steps) * returns[from_b].mean()
    return returns[to_b].mean() - returns[to_f].mean(), best - returns[to_f].mean()


def stitched(updates=4000, seeds=5, lams=(0.0, 0.5, 0.95, 1.0)):
    """At stitching.py's A: the advantage of going to B over that of going to F, by AWR's lambda and
    by AWAC, and the share of episodes that arrive at C."""
    data, cfg = stitching.dataset(), stitching.Config(updates=updates, seeds=seeds)
    ways, key = [first_rows(data, path) for path in ("AF", "ABD")], jax.random.key(0)
    rows = np.concatenate(ways)
    runs = {f"lambda {lam:g}": ("AWR", {"lam": lam}) for lam in lams} | {"AWAC": ("AWAC", {})}
    found = {"lams": lams, "gap": [], "to C": []}
    for who, more in runs.values():
        module, own = stitching.resolved(who, data, cfg, **more)
        act, state = stitching.train(who, data, cfg, **more)

        def advantages(state, module=module, own=own):
            if module.__name__.endswith("awr"):
                whole = module.Episodes(data.transitions(), data.start + data.length - 1)
                v = state.value.apply_fn(state.value.params, module.normalise(state, data.obs))
                return (module.label(state, whole, own)[0] - v / (1 - own.gamma))[rows]
            batch = module.minibatch(state, data.transitions(), rows)
            return module.advantage(state, batch, key, replace(own, num_samples=20))

        gap = np.asarray(jax.jit(jax.vmap(advantages))(state), float)  # (S, F's rows and B's)
        to_f, to_b = np.split(gap, [len(ways[0])], 1)
        found["gap"].append(to_b.mean(1) - to_f.mean(1))
        _, returns = stitching.episodes_from_a(act, state, cfg)
        found["to C"].append(np.mean(returns == stitching.PAYS["C"], 1))
    found |= {name: spread(found[name]) for name in ("gap", "to C")}
    found["of the data"], found["best"] = earned(data, stitching.TD["gamma"])
    return found


def ensembles(updates=3000, seeds=3, members=(2, 10), etas=(0.0, 1.0)):
    """At stitching.py's A, by N and eta: the return that Q predicts of the policy's action, the
    discounted return that the policy earns, and the share of episodes that arrive at C."""
    data, cfg = stitching.dataset(), stitching.Config(updates=updates, seeds=seeds)
    gamma, found = stitching.TD["gamma"], {"members": members, "etas": etas}
    found["best"] = stitching.PAYS["C"] * gamma**7  # on the eighth step
    rows = {"predicted": [], "earned": [], "to C": []}
    for n, eta in itertools.product(members, etas):
        act, state = stitching.train("EDAC", data, cfg, num_critics=n, eta=eta)
        path, returns = stitching.episodes_from_a(act, state, cfg)
        action, _ = act(state, None, path[0], None, jax.random.key(0))
        q = jax.vmap(lambda s, *x: s.critic.apply_fn(s.critic.params, *x).min(0))
        rows["predicted"].append(np.mean(q(state, path[0], action), 1))
        steps = np.any(np.diff(path, axis=0), -1).sum(0)
        rows["earned"].append(np.mean(returns * gamma ** (steps - 1.0), 1))
        rows["to C"].append(np.mean(returns == stitching.PAYS["C"], 1))
    shape = len(members), len(etas), seeds
    return found | {name: spread(np.reshape(x, shape)) for name, x in rows.items()}


CLAIMS = {"naive": naive, "cql": conservative, "iql": implicit}
CLAIMS |= {"awac": weighted, "combo": model_based, "bc": ceiling, "awr": stitched}
CLAIMS |= {"support": support, "behaviours": two_behaviours, "brac": moved, "edac": ensembles}
CLAIMS |= claims_models.CLAIMS


def plain(x):
    """Arrays as lists of numbers with four digits, for JSON."""
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    if isinstance(x, bool | str | int):
        return x
    return np.vectorize(lambda v: float(f"{v:.4g}"), otypes=[float])(x).tolist()


def main(cfg: Config):
    if cfg.only and cfg.only not in CLAIMS:
        raise SystemExit(f"--only {cfg.only}: must be one of {', '.join(CLAIMS)}.")
    results = Path(cfg.results)
    (results / "claims").mkdir(parents=True, exist_ok=True)
    file = results / "claims.json"
    record = json.loads(file.read_text("utf-8")) if file.exists() else {}
    for name in [cfg.only] if cfg.only else CLAIMS:
        start = time.process_time()
        found = plain(CLAIMS[name]())
        seconds = round(time.process_time() - start, 1)
        claims_pictures.draw(name, found, results / "claims" / f"{name}.png")
        record[name] = {"cpu_seconds": seconds, "machine": experiment.machine(), "found": found}
        file.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        print(f"{name:6} {seconds:6.1f} s")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
