"""Stitching: which methods combine parts of two episodes into a better one?

A point in the plane moves by at most 0.25 a step along each axis. The data hold three kinds of
paths:

    F <- A -> B -> D     from A to F, which pays 5, and from A over B to D, which pays 0;
              B -> C     from B to C, which pays 10.

The best path from A leads over B to C. It is in no episode, but each of its steps is in the data. A
method that learns the value of states finds it. A method that takes episodes as a whole sees at
most 5 from A and goes to F.

    python -m benchmarks.studies.stitching                    # trains all methods
    python -m benchmarks.studies.stitching --only BCQ BEAR    # some; keeps the others' results

Writes stitching.json and stitching.png to benchmarks/results, after each method.
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.arrays import arrays
from benchmarks.scores.runs import text
from common import datasets, experiment

ROOT = Path(__file__).resolve().parents[2]

PLACES = {"A": (-1, 0), "B": (0, 0), "C": (1, 1), "D": (1, -1), "F": (-1, -1)}
PATHS = ("AF", "ABD", "BC")
PAYS = {"C": 10.0, "F": 5.0, "D": 0.0}  # an episode ends at each of these
STEP, RADIUS, LIMIT = 0.25, 0.2, 24  # length of a step at action 1, radius of a place, time limit

SMALL = dict(batch_size=128, widths=(64, 64))
TD = SMALL | dict(gamma=0.95)
COMBO = dict(actor_lr=3e-4, model_widths=(64, 64), model_decay=(0.0,) * 3, max_epochs=30)
COMBO |= dict(rollout_batch=1000, rho="model", beta=5.0)
DT = dict(targets=(10.0,), rtg_scale=10.0, context=8, width=64, lr=1e-3, warmup=200)
DT |= dict(num_updates=1000, eval_every=1000)
DIFFUSER = dict(horizon=8, diffusion_steps=20, multiples=(1, 2), width=32, lr=1e-3, gamma=0.95)
DIFFUSER |= dict(guide_scale=3.0, guide_stop=1, samples=16, end_return=0.0, return_scale=10.0)
DIFFUSER |= dict(num_updates=2000, eval_every=2000, ddim_steps=10, plan_every=2)
AWR = dict(actor_lr=1e-3, critic_lr=0.05, std=0.4, temperature=0.3)
VAE = TD | dict(vae_widths=(64, 64))
BOTH = TD | dict(actor_lr=1e-3, critic_lr=1e-3)
BRAC = dict(actor_widths=(64, 64), clone_updates=2000, clone_lr=1e-3, warm_start=1000)
RUNS = {  # method: (file, settings)
    "BC": ("bc", SMALL),
    "%BC, best half": ("bc", SMALL | dict(fraction=0.5)),
    "DT, asked for 10": ("dt", DT),
    "RvS, asked for 10": ("rvs", SMALL | dict(target=10.0)),
    "Diffuser": ("diffuser", DIFFUSER),
    "TD3+BC": ("td3_bc", TD | dict(lr=1e-3)),
    "ReBRAC": ("rebrac", BOTH),
    "ReBRAC, beta 0.1": ("rebrac", BOTH | dict(beta1=0.1, beta2=0.1)),
    "SAC": ("sac", BOTH),
    "EDAC": ("edac", BOTH),
    "BCQ": ("bcq", VAE),
    "BEAR": ("bear", VAE | dict(warm_start=1000)),
    "BRAC, alpha 1": ("brac", BOTH | BRAC | dict(alpha=1.0)),
    "AWR": ("awr", TD | AWR),
    "AWAC": ("awac", TD | dict(lr=1e-3)),
    "IQL": ("iql", TD | dict(lr=1e-3, tau=0.9)),
    "CQL": ("cql", TD),
    "CQL, alpha 0.2": ("cql", TD | dict(alpha=0.2)),
    "COMBO": ("combo", TD | COMBO),
}


@dataclass(frozen=True)
class Config:
    only: tuple[str, ...] = tuple(RUNS)  # methods to train
    updates: int = 8000  # gradient steps, unless RUNS says otherwise
    seeds: int = 3  # of each method, trained together
    episodes: int = 20  # from A, for each seed
    seed: int = 0  # first seed, also of the data
    results: str = str(ROOT / "benchmarks/results")  # folder for stitching.json and stitching.png


def move(position, action):
    """One step from positions (..., 2): next positions, rewards (...), ends (...)."""
    position = position + STEP * np.clip(action, -1, 1)
    reached = {p: np.linalg.norm(position - PLACES[p], axis=-1) < RADIUS for p in PAYS}
    pays = sum(PAYS[p] * reached[p] for p in PAYS)
    return position.astype(np.float32), np.float32(pays), np.any(list(reached.values()), 0)


def walk(rng, path):
    """A noisy episode along the places of `path`: rows (obs, action, reward, next_obs, done)."""
    obs, rows, ahead = np.float32(PLACES[path[0]] + rng.normal(0, 0.05, 2)), [], list(path[1:])
    while True:
        if len(ahead) > 1 and np.linalg.norm(obs - PLACES[ahead[0]]) < RADIUS:
            ahead.pop(0)
        towards = (np.array(PLACES[ahead[0]]) - obs) / STEP
        action = towards / max(1, np.abs(towards).max()) + rng.normal(0, 0.15, 2)
        action = np.float32(action.clip(-1, 1))
        next_obs, reward, done = move(obs, action)
        rows.append((obs, action, reward, next_obs, np.float32(done)))
        if done:
            return rows
        obs = next_obs


def dataset(seed=0, episodes=600):
    """A Dataset with equally many episodes along each of PATHS."""
    rng = np.random.default_rng(seed)
    walks = [walk(rng, PATHS[i % len(PATHS)]) for i in range(episodes)]
    length = np.array([len(rows) for rows in walks])
    arrays = [np.stack(x) for x in zip(*sum(walks, []), strict=True)]
    start = np.cumsum(length) - length
    return datasets.Dataset("crossroads", "", *arrays, start, length, 0.0, max(PAYS.values()), {})


def ended(obs, action, next_obs):
    """The termination function for COMBO's rollouts: next_obs (..., 2) -> bool (...)."""
    places = jnp.array([PLACES[p] for p in PAYS], jnp.float32)
    return (jnp.linalg.norm(next_obs[..., None, :] - places, axis=-1) < RADIUS).any(-1)


def resolved(who, data, cfg, **more):
    """(module, its Config) of a method of RUNS; more: settings in place of its own."""
    name, settings = RUNS[who]
    module = experiment.module(name)
    sizes = dict(seed=cfg.seed, num_seeds=cfg.seeds, num_updates=cfg.updates)
    sizes |= dict(log_every=cfg.updates, eval_every=cfg.updates, env=data.name)
    own = module.Config(**sizes | settings | more)
    if name == "rvs":
        own = replace(own, horizon=int(data.length.max()))
    return module, experiment.resolve(own, getattr(module, "TUNED", {}))


def train(who, data, cfg, **more):
    """(policy, states of all seeds) of a method of RUNS, trained as by its file's `train`."""
    name, _ = RUNS[who]
    module, own = resolved(who, data, cfg, **more)
    chunk, (first, batch) = partial(module.train_chunk, cfg=own), arrays(module, data, own)
    keys = jax.vmap(jax.random.key)(cfg.seed + jnp.arange(cfg.seeds))
    state = jax.jit(jax.vmap(partial(module.init, cfg=own), (0, None)))(keys, first)
    if name == "brac":
        state = module.clone_behaviour(keys, state, batch, own, lambda line: None)
    if name == "combo":
        state = state.replace(dynamics=module.fit_dynamics(keys, batch, own, lambda line: None))
        chunk = partial(chunk, terminal=ended)
    chunk = jax.jit(jax.vmap(chunk, (0, None, 0, None)))
    state, _ = chunk(state, batch, keys, cfg.updates)
    return jax.vmap(module.policy(own), (0, 0, 0, 0, None)), state


def episodes_from_a(act, state, cfg):
    """Positions (LIMIT + 1, S, E, 2), which stay after the end, and returns (S, E)."""
    rng, act = np.random.default_rng(cfg.seed), jax.jit(partial(act, state))
    shape = cfg.seeds, cfg.episodes
    obs = np.float32(PLACES["A"] + rng.normal(0, 0.05, (*shape, 2)))
    carry, reward, done, path = None, np.zeros(shape, np.float32), np.zeros(shape, bool), [obs]
    returns = np.zeros(shape)
    for t in range(LIMIT):
        action, carry = act(carry, obs, reward, jax.random.key(t))
        next_obs, reward, now = move(obs, np.asarray(action))
        obs, reward = np.where(done[..., None], obs, next_obs), reward * ~done
        returns, done = returns + reward, done | now
        path.append(obs)
    return np.stack(path), returns


def plot(data, paths, path):
    """Draws the data, then a panel for each method with its paths from A.

    paths: {title: positions (points, 2) of each episode}.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = len(paths) // 3 + 1
    figure, axes = pyplot.subplots(3, columns, figsize=(2.6 * columns, 8.4))
    ways = {"the data": [], **paths}
    for start, length in zip(data.start, data.length, strict=True):
        rows = slice(start, start + length)
        ways["the data"].append(np.vstack([data.obs[rows], data.next_obs[rows][-1:]]))
    for axis in axes.flat[len(ways) :]:
        axis.remove()
    for axis, (title, lines) in zip(axes.flat, ways.items(), strict=False):
        for line in lines[:60]:
            axis.plot(*line.T, color="C0" if title != "the data" else "0.6", lw=1, alpha=0.5)
        for place, xy in PLACES.items():
            axis.add_patch(pyplot.Circle(xy, RADIUS, fill=False, color="0.2", lw=0.8))
            pays = f" {PAYS[place]:g}" if place in PAYS else ""
            axis.annotate(place + pays, xy, (0, 11), textcoords="offset points", ha="center")
        axis.set(title=title, xlim=(-1.7, 1.7), ylim=(-1.7, 1.7), xticks=[], yticks=[])
        axis.set_aspect("equal")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def shown(path):
    """Twenty paths (LIMIT + 1, S, E, 2) up to their ends, in hundredths, for JSON."""
    lines = np.round(100 * path.reshape(LIMIT + 1, -1, 2).swapaxes(0, 1)).astype(int)
    lines = lines[:: len(lines) // 20]
    ends = [np.flatnonzero(np.any(np.diff(x, axis=0), 1)).max(initial=0) + 2 for x in lines]
    return [line[:end].tolist() for line, end in zip(lines, ends, strict=True)]


def draw(data, runs, path):
    """The picture of what stitching.json holds. runs: {method: its entry}."""
    lines = {}
    for who in (who for who in RUNS if "paths" in runs.get(who, {})):
        title = f"{who}: {runs[who]['to_C']:.0%} to C"
        lines[title] = [np.array(x) / 100 for x in runs[who]["paths"]]
    plot(data, lines, path)


def main(cfg: Config):
    results, data = Path(cfg.results), dataset(cfg.seed)
    results.mkdir(parents=True, exist_ok=True)
    file = results / "stitching.json"
    runs = json.loads(file.read_text("utf-8"))["runs"] if file.exists() else {}
    settings = {k: v for k, v in vars(cfg).items() if k not in ("results", "only")}
    facts = experiment.machine()
    for who in cfg.only:
        path, returns = episodes_from_a(*train(who, data, cfg), cfg)
        ends = {p: float((returns == PAYS[p]).mean()) for p in ("C", "F")}
        runs[who] = {"return": float(returns.mean()), "to_C": ends["C"], "to_F": ends["F"]}
        runs[who] |= {"commit": facts["commit"], "paths": shown(path)}
        print(
            f"{who:24} return {returns.mean():5.2f}  to C {ends['C']:4.0%}  to F {ends['F']:4.0%}"
        )
        runs = {who: runs[who] for who in RUNS if who in runs}
        file.write_text(text(facts | {"config": settings, "runs": runs}), "utf-8")
        draw(data, runs, results / "stitching.png")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
