"""Hidden state: when is a sequence model helpful?

A point walks along a corridor to a junction and turns to one side or the other. One side pays 1,
the other -1. The first observation shows which side pays. In the hidden world no later one does, in
the seen world all do. The data's walker knows the side and turns to it three times in four.

    python -m benchmarks.studies.hidden                   # trains all methods in both worlds
    python -m benchmarks.studies.hidden --only BC IQL     # some; keeps the others' results

Writes hidden.json to benchmarks/results after each method, and hidden.png.
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure

from benchmarks.arrays import arrays
from benchmarks.scores.runs import text
from common import datasets, experiment

ROOT = Path(__file__).resolve().parents[2]

STEP, ARM, LIMIT = 0.2, 0.5, 15  # length of a step at action 1; of an arm; time limit
WORLDS = {"hidden": False, "seen": True}

SMALL = dict(batch_size=128, widths=(64, 64))
DT = dict(targets=(1.0,), rtg_scale=1.0, width=32, lr=1e-3, warmup=100, context=LIMIT)
UNET = dict(horizon=16, diffusion_steps=20, multiples=(1, 2), width=16, lr=1e-3, end_return=0.0)
UNET |= dict(num_updates=4000, ddim_steps=5, gamma=1.0, batch_size=32)
DIFFUSER = UNET | dict(guide_scale=1.0, guide_stop=1, samples=8, return_scale=1.0)
DECISION = UNET | dict(target=1.0, inverse_widths=(64, 64))
RUNS = {  # method: (file, settings)
    "BC": ("bc", SMALL),
    "RvS, asked for 1": ("rvs", SMALL | dict(target=1.0, horizon=LIMIT)),
    "IQL": ("iql", SMALL | dict(gamma=0.95, lr=1e-3)),
    "Diffuser": ("diffuser", DIFFUSER),
    "Decision Diffuser": ("decision_diffuser", DECISION),
    "DT, context 4": ("dt", DT | dict(context=4)),
    "DT, asked for 1": ("dt", DT),
}
WAYS = {"a plan a step": dict(plan_every=1), "one plan": dict(plan_every=LIMIT)}  # of diffusers


@dataclass(frozen=True)
class Config:
    only: tuple[str, ...] = tuple(RUNS)  # methods to train
    updates: int = 2000  # gradient steps, unless RUNS says otherwise
    seeds: int = 3  # of each method, trained together
    episodes: int = 40  # for each seed, half of them with either side
    seed: int = 0  # first seed, also of the data
    results: str = str(ROOT / "benchmarks/results")  # folder for hidden.json and hidden.png


def move(position, action):
    """One step from positions (..., 2): along the corridor, x from 0 to 1, then sideways."""
    moved = position + STEP * np.clip(action, -1, 1)
    turns = position[..., 0] >= 1
    x = np.where(turns, 1, moved[..., 0].clip(0, 1))
    y = np.where(turns, moved[..., 1].clip(-ARM, ARM), 0)
    return np.float32(np.stack([x, y], -1))


def pays(position, side):
    """(rewards, ends), each (...), of arriving at positions (..., 2); side (...): 1 or -1."""
    done = np.abs(position[..., 1]) >= ARM
    return np.float32(done * np.sign(position[..., 1]) * side), done


def look(position, side, time, seen):
    """Observations (..., 3): the position, and the side that pays where it is shown, else 0."""
    shown = side * float(seen or time == 0)
    return np.float32(np.concatenate([position, shown[..., None]], -1))


def starts(rng, episodes):
    """Positions (E, 2) at the corridor's begin and sides (E,), half of either."""
    x = rng.uniform(0, 0.1, episodes)
    return np.float32(np.stack([x, 0 * x], 1)), np.resize(np.float32([1, -1]), episodes)


def dataset(seen, seed=0, episodes=1000):
    """A Dataset of noisy walks. Nothing in the corridor tells where a walk will turn."""
    rng, rows, length = np.random.default_rng(seed), [], []
    for i, (position, side) in enumerate(zip(*starts(rng, episodes), strict=True)):
        turn, done, time = side if i % 8 < 6 else -side, False, 0
        while not done:
            towards = [0, turn] if position[0] >= 1 else [1, 0]
            action = np.float32((0.8 * np.array(towards) + rng.normal(0, 0.2, 2)).clip(-1, 1))
            new = move(position, action)
            reward, done = pays(new, side)
            obs, next_obs = look(position, side, time, seen), look(new, side, time + 1, seen)
            rows.append((obs, action, reward, next_obs, np.float32(done)))
            position, time = new, time + 1
        length.append(time)
    own, length = [np.stack(x) for x in zip(*rows, strict=True)], np.array(length)
    return datasets.Dataset(
        "junction", "", *own, np.cumsum(length) - length, length, None, None, {}
    )


def titles(who):
    """{title: how it acts} of a method of RUNS: settings that its training does not need."""
    if "Diffuser" not in who:
        return {who: {}}
    return {f"{who}, {way}": how for way, how in WAYS.items()}


def train(who, data, cfg):
    """(module, its Config, states of all seeds) of a method, trained as by its file's `train`."""
    name, settings = RUNS[who]
    module = experiment.module(name)
    sizes = dict(seed=cfg.seed, num_seeds=cfg.seeds, num_updates=cfg.updates, env=data.name)
    own = experiment.resolve(module.Config(**sizes | settings), getattr(module, "TUNED", {}))
    own = replace(own, log_every=own.num_updates)  # one chunk
    first, rows = arrays(module, data, own)
    keys = jax.vmap(jax.random.key)(cfg.seed + jnp.arange(cfg.seeds))
    state = jax.jit(jax.vmap(partial(module.init, cfg=own), (0, None)))(keys, first)
    chunk = jax.vmap(partial(module.train_chunk, cfg=own), (0, None, 0, None))
    state, _ = jax.jit(chunk)(state, rows, keys, own.num_updates)
    return module, own, state


def play(policy, state, seen, cfg):
    """Returns (S, E) of a file's policy: 1 for the side that pays, -1 for the other, 0 for none."""
    position, side = starts(np.random.default_rng(cfg.seed), cfg.episodes)
    shape = cfg.seeds, cfg.episodes
    position, side = np.broadcast_to(position, (*shape, 2)), np.broadcast_to(side, shape)
    policy = jax.jit(partial(jax.vmap(policy, (0, 0, 0, 0, None)), state))
    carry = None
    reward, ended, returns = np.zeros(shape, np.float32), np.zeros(shape, bool), np.zeros(shape)
    for time in range(LIMIT):
        obs = look(position, side, time, seen)
        action, carry = policy(carry, obs, reward, jax.random.key(time))
        position = np.where(ended[..., None], position, move(position, np.asarray(action)))
        reward, done = pays(position, side)
        reward, ended = reward * ~ended, ended | done
        returns += reward
    return returns


def shares(returns):
    """{where: share of the episodes (S, E), of each seed}."""
    ends = {"right": returns == 1, "wrong": returns == -1, "nowhere": returns == 0}
    return {name: np.round(x.mean(1), 4).tolist() for name, x in ends.items()}


def draw(runs, path):
    """A panel for each world: where the episodes of each method end."""
    figure = Figure((9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    colours = {"right": "C0", "wrong": "C3", "nowhere": "0.8"}
    for axis, (world, found) in zip(axes, runs.items(), strict=True):
        names = list(found)[::-1]
        left = np.zeros(len(names))
        for end, colour in colours.items():
            share = np.array([np.mean(found[who][end]) for who in names])
            axis.barh(names, share, left=left, color=colour, label=end)
            left += share
        axis.axvline(0.5, color="k", lw=0.8, ls=":")
        axis.set(title=f"side {'shown at every step' if WORLDS[world] else 'shown at the start'}")
        axis.set(xlim=(0, 1), xlabel="share of the episodes")
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=3, loc="outside lower center")
    figure.savefig(path, dpi=130)


def main(cfg: Config):
    results = Path(cfg.results)
    results.mkdir(parents=True, exist_ok=True)
    file = results / "hidden.json"
    runs = {world: {} for world in WORLDS}
    if file.exists():
        runs = json.loads(file.read_text("utf-8"))["runs"]
    settings = {k: v for k, v in vars(cfg).items() if k not in ("results", "only")}
    facts = experiment.machine()
    for world, seen in WORLDS.items():
        data = dataset(seen, cfg.seed)
        for who in cfg.only:
            module, own, state = train(who, data, cfg)
            for title, how in titles(who).items():
                found = shares(play(module.policy(replace(own, **how)), state, seen, cfg))
                runs[world][title] = found | {"commit": facts["commit"]}
                print(f"{world:7} {title:34}", {k: f"{np.mean(x):.0%}" for k, x in found.items()})
            order = [title for who in RUNS for title in titles(who)]
            runs[world] = {title: runs[world][title] for title in order if title in runs[world]}
            file.write_text(text(facts | {"config": settings, "runs": runs}), "utf-8")
    draw(runs, results / "hidden.png")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
