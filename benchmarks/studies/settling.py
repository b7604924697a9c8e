"""What does COMBO need? Runs that differ in one setting: their scores, their Q and their models.

    python -m benchmarks.studies.settling runs/combo/... runs/cql/... --checkpoints runs/combo/...

Of every run it collects, at each evaluation:

    scores  of each seed, the mean of its episodes
    q       Q at the policy's actions, the mean over the last `log_every` updates (metrics.csv)

Q still moves if it changed by more than 2 % in the last 10,000 updates. Its time constant is 1 /
(polyak (1 - gamma)) updates, 20,000 with the usual .005 and .99; an exponential approach that
changes by 2 % in half of that has another 3 % ahead of it.

--checkpoints: folders of one run of combo.py, copied while it trained, in the order of its updates.
Of each it measures, for the first seed:

    q_pi, true_pi  Q at the policy's actions and the return that they earn, see values.py
    outside        share of the replay buffer's rows beyond the data's range in some coordinate
    cut            share of the model's steps that were not stored, since a coordinate was farther
                   out than the range is wide, or since their rollout had stopped before

With the last policy it then compares models with the simulator: that of the checkpoint and those
of --models, other runs of combo.py on the same data. They start at states of the data and take the
data's actions, which they were fitted to, or the policy's:

    holdout        squared error on the holdout, as `model epoch` lines show it
    errors         of the state after 1, 2, ... steps: root mean square of (model - simulator) /
                   (standard deviation in the data), sampled as in rollouts
    reward_bias    mean of the model's reward minus the true one, at states of the simulator

Writes settling.json and settling.png to benchmarks/results. What settling.json holds already stays,
unless it is measured anew. A run that was stopped counts up to its last evaluation.
"""

import csv
import json
import math
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.scores.runs import NAMES, behaviour, collect, origin, score, short, text
from benchmarks.studies import values
from common import datasets, evaluation, experiment
from common.experiment import statistics

ROOT = Path(__file__).resolve().parents[2]

POINTS = 20_000, 50_000, 100_000  # updates that the table shows
SPAN, MOVES = 10_000, 0.02  # a Q that changes by a larger share in so many updates still moves
SIMULATOR = "algorithms/simulator.py"  # runs of simulator.py, as runs.command writes them
USUAL = {  # settings that a name leaves out, and how it says others
    "num_actions": (1, "{} actions"),
    "max_epochs": (100, "model of {} epochs"),
    "rho": ("mixture", "rho {}"),
    "real_fraction": (0.5, "f {:g}"),
    "polyak": (0.005, "polyak {:g}"),
    "num_updates": (100_000, "actor's rate 0 at {:,}"),
}


@dataclass(frozen=True)
class Config:
    runs: tyro.conf.Positional[tuple[str, ...]]  # run folders
    checkpoints: tuple[str, ...] = ()  # copies of one run of combo.py, in the order of its updates
    models: tuple[str, ...] = ()  # run folders of combo.py with other models
    num_states: int = 200  # states of the data where the simulator starts
    steps: int = 5  # length of a comparison without looking at the simulator
    bias_steps: int = 200  # steps of the policy over which the reward's bias is averaged
    horizon: int = 500  # steps of a true return; 0.99^500 = 0.007
    seed: int = 0  # of the drawn states and of the policy's samples
    results: str = str(ROOT / "benchmarks/results")  # folder for settling.json and settling.png


def label(run):
    """A collected run's name in table and picture."""
    name, own = NAMES[run["algorithm"]], run["config"]
    if SIMULATOR in run["command"]:
        return f"{name}, beta {own['beta']:g}, the simulator as its model"
    words = [name, f"beta {own['beta']:g}"] if name == "COMBO" else [name]
    words += [say.format(own[k]) for k, (usual, say) in USUAL.items() if own.get(k, usual) != usual]
    return ", ".join(words)


def q_pi(folder):
    """{updates as str: q_pi of each seed} in a run's metrics.csv; {} for methods without it."""
    q = defaultdict(list)
    with open(Path(folder) / "metrics.csv", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if "q_pi" in row:
                q[row["step"]].append(round(float(row["q_pi"]), 1))
    return dict(q)


def curve(folder):
    """The scores and the Q of a run at its evaluations, as plain data."""
    run, q = collect(Path(folder), stopped=True), q_pi(folder)
    level = behaviour(run)["data's mean"]
    return {
        "run": label(run),
        "dataset": run["dataset"],
        "data_score": round(score(run, level), 2),
        "command": run["command"].replace(SIMULATOR, "-m benchmarks.studies.simulator"),
        **{key: run[key] for key in ("commit", "device")},
        "scores": {
            step: np.round(score(run, np.array(x)), 2).tolist() for step, x in run["curve"].items()
        },
        "q": {step: q[step] for step in run["curve"] if step in q},
    }


def moves(q, step):
    """The share by which Q changed in the SPAN updates until `step`; None if Q is not known.

    q: {updates as str: of each seed}.
    """
    if not {str(step), str(step - SPAN)} <= q.keys():
        return None
    before, now = (np.mean(q[str(x)]) for x in (step - SPAN, step))
    return (now - before) / abs(before)


def direction(q, step):
    """ "rises" or "falls" if Q still moves at `step`, else ""."""
    change = moves(q, step)
    if change is None or abs(change) <= MOVES:
        return ""
    return "rises" if change > 0 else "falls"


def summary(row, step):
    """(mean score, its interval, mean Q or None, direction) of a curve's row at `step`.

    None if it was stopped before.
    """
    if str(step) not in row["scores"]:
        return None
    scores = np.array([row["scores"][str(step)]])
    q = row["q"].get(str(step))
    mean = None if q is None else float(np.mean(q))
    return float(scores.mean()), statistics.interval(scores), mean, direction(row["q"], step)


def follow(envs, policy, obs, key, steps):
    """States (steps + 1, n, D), actions and rewards of a policy from obs (n, D), nan after an end.

    policy: (obs (n, D), key) -> action (n, A).
    """
    for env, o in zip(envs, obs, strict=True):
        values.place(env, o)
    obs, alive = np.array(obs, np.float32), np.ones(len(obs), bool)
    states, actions, rewards = [obs], [], []
    for t in range(steps):
        action = np.asarray(policy(obs, jax.random.fold_in(key, t))).clip(-1, 1)
        obs, reward, going = np.full_like(obs, np.nan), np.full(len(obs), np.nan), alive.copy()
        for i in np.flatnonzero(alive):
            obs[i], reward[i], ended, _, _ = envs[i].step(action[i])
            going[i] = not ended
        states.append(obs)
        actions.append(action)
        rewards.append(reward)
        obs, alive = np.where(going[:, None], obs, np.nan), going
    return np.stack(states), np.stack(actions), np.stack(rewards)


def recorded(data, rows, steps):
    """As `follow`, the data's own steps from those rows of a Dataset."""
    at = rows + np.arange(steps)[:, None]  # (steps, n)
    return np.concatenate([data.obs[at], data.next_obs[at[-1:]]]), data.action[at], data.reward[at]


def inside(data, steps):
    """Rows of a Dataset after which its episode goes on for `steps` steps."""
    starts = [
        s + np.arange(max(0, n - steps)) for s, n in zip(data.start, data.length, strict=True)
    ]
    return np.concatenate(starts)


def compare(step, track, std, length):
    """Errors of a model along a track of the simulator, see the top.

    step: (obs (n, D), action (n, A), key) -> (next_obs, reward), a sampled step of the model.
    track: of `follow`. std: (D,), the unit of an error; inf leaves a coordinate out.
    """
    states, actions, rewards = track
    guess, errors, carries = states[0], [], np.isfinite(std)
    for t in range(length):
        guess, _ = step(guess, actions[t], jax.random.key(t))
        gap = ((np.asarray(guess) - states[t + 1]) / std)[:, carries]
        errors.append(float(np.sqrt(np.nanmean(gap**2))))
    bias = [
        np.asarray(step(states[t], actions[t], jax.random.key(t))[1]) - rewards[t]
        for t in range(len(rewards))
    ]
    return {"errors": errors, "reward_bias": float(np.nanmean(bias))}


def holdout_error(module, own, dynamics, data):
    """The elites' mean squared error on the rows that the fit of the run's first seed left out."""
    data = jax.tree.map(lambda x: x[module.known_rows(data)], data)
    key = jax.random.fold_in(jax.random.key(own.seed), jnp.uint32(2**31))  # as fit_dynamics
    fit = jax.jit(partial(module.init_fit, cfg=own))(jax.random.fold_in(key, 0), data)
    inputs, targets = module.model_pairs(data, fit.holdout)
    x = (inputs - dynamics.mean) / dynamics.std
    mean, _ = jax.vmap(fit.model.apply_fn, (0, None))(dynamics.params, x)
    return float(jnp.mean((mean - targets) ** 2))


def sampler(module, state):
    """The policy as it acts in rollouts: (obs, key) -> action."""

    @jax.jit
    def sample(obs, key):
        pi = state.actor.apply_fn(state.actor.params, module.normalise(state, obs))
        return pi.sample(seed=key)

    return sample


def models(folder, cfg):
    """Rows of the models' errors, with the policy of a run's checkpoint."""
    module, own, state = evaluation.load(folder)
    state = jax.tree.map(lambda x: x[0], state)
    data = datasets.load(own.env, own.env_id)
    rows = np.random.default_rng(cfg.seed).choice(inside(data, cfg.steps), cfg.num_states, False)
    envs = [evaluation.make(data.env_id, max_episode_steps=cfg.bias_steps + 1) for _ in rows]
    key = jax.random.key(cfg.seed)
    tracks = {
        "data": recorded(data, rows, cfg.steps),
        "policy": follow(envs, sampler(module, state), data.obs[rows], key, cfg.bias_steps),
    }
    found = []
    for other in (*cfg.models, folder):
        _, its, state = evaluation.load(other)
        dynamics = jax.tree.map(lambda x: x[0], state.dynamics)
        step = jax.jit(partial(module.model_step, dynamics, cfg=its))
        row = {**origin(other), "max_epochs": its.max_epochs}
        row["holdout"] = holdout_error(module, its, dynamics, data.transitions())
        unit = np.asarray(dynamics.std)[: data.obs.shape[1]]
        for name, track in tracks.items():  # every elite predicts every row
            tiled = [np.tile(x, (1, its.num_elites, 1)[: x.ndim]) for x in track]
            row[name] = compare(step, tiled, unit, cfg.steps)
        found.append(row)
    return found


def buffer_shares(buffer, data, step, own):
    """Shares `outside` and `cut` of one seed's replay buffer, see the top. data: a Batch."""
    low = np.minimum(data.obs, data.next_obs).min(0)
    high = np.maximum(data.obs, data.next_obs).max(0)
    next_obs = np.asarray(buffer.rows.next_obs)[: int(buffer.filled)]
    rollouts = math.ceil(step / own.rollout_every)
    made = rollouts * own.rollout_batch * own.horizon
    return {
        "outside": float(((next_obs < low) | (next_obs > high)).any(-1).mean()),
        "cut": 1 - int(buffer.total) / made,
    }


def checkpoint(folder, cfg):
    """Q, the true return and the replay buffer at a checkpoint of combo.py."""
    module, own, state = evaluation.load(folder)
    step = experiment.last_step(Path(folder))
    buffer = jax.tree.map(lambda x: x[0], state.buffer)
    settings = {key: getattr(cfg, key) for key in ("num_states", "horizon", "seed")}
    found = values.measure(folder, values.Config(runs=(), **settings))
    names = "q_data", "true_data", "q_pi", "true_pi"
    return {
        **origin(folder),
        "step": step,
        "moving": direction(q_pi(folder), step),
        **{name: found[name] for name in names},
        **buffer_shares(buffer, datasets.load(own.env, own.env_id).transitions(), step, own),
    }


def plot(rows, path):
    """Draws scores and Q of the runs on the dataset with the most of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [row["dataset"] for row in rows]
    dataset = max(names, key=names.count)
    rows = [row for row in rows if row["dataset"] == dataset and row["q"]]
    groups = defaultdict(list)  # a line of panels for each weight; other methods in grey
    for row in rows:
        groups[", ".join(row["run"].split(", ")[:2]) if "beta" in row["run"] else ""].append(row)
    others = groups.pop("", [])
    figure, axes = pyplot.subplots(
        len(groups), 2, figsize=(13, 3.7 * len(groups)), sharex=True, sharey="col", squeeze=False
    )
    for (left, right), (name, group) in zip(axes, groups.items(), strict=True):
        looks = [{"color": "0.5", "ls": dash} for dash in ("-", "--", ":", "-.")][: len(others)]
        looks += [{"color": f"C{i}"} for i in range(len(group))]
        for row, look in zip(others + group, looks, strict=True):
            for axis, found in ((left, row["scores"]), (right, row["q"])):
                steps, x = [int(t) for t in found], np.array(list(found.values()))
                axis.plot(steps, x.mean(1), label=row["run"], lw=1.6, **look)
                axis.fill_between(steps, x.min(1), x.max(1), alpha=0.1, lw=0, color=look["color"])
        left.axhline(rows[0]["data_score"], color="0.3", ls=":", lw=1.2)
        left.annotate("data's mean", (0, rows[0]["data_score"]), (3, 3), textcoords="offset points")
        left.set(title=f"{short(dataset)}, {name}: score")
        right.set(title="Q at the policy's actions", ylim=(0, None))
        right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(0)
        axis.xaxis.set_major_formatter("{x:,.0f}")
    for axis in axes[-1]:
        axis.set_xlabel("updates")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(cfg: Config):
    results = Path(cfg.results)
    path = results / "settling.json"
    stored = json.loads(path.read_text("utf-8")) if path.exists() else {}
    rows = [*stored.get("runs", []), *map(curve, cfg.runs)]
    rows = {(row["dataset"], row["run"]): row for row in rows}  # the later one of a name
    rows = [rows[name] for name in sorted(rows)]
    for row in rows:
        for step in (step for step in POINTS if summary(row, step)):
            mean, (low, high), q, moving = summary(row, step)
            words = "" if q is None else f", Q {q:.0f} {moving}"
            name = f"{short(row['dataset'])}, {row['run']}, {step:,}"
            print(f"{name}: {mean:.1f} [{low:.1f}, {high:.1f}]{words}")
    found = {k: stored[k] for k in ("checkpoints", "models") if k in stored} | {"runs": rows}
    if cfg.checkpoints:
        found["checkpoints"] = [checkpoint(folder, cfg) for folder in cfg.checkpoints]
        found["models"] = models(cfg.checkpoints[-1], cfg)
    folders = "runs", "checkpoints", "models", "results"
    settings = {k: v for k, v in vars(cfg).items() if k not in folders}
    record = experiment.machine() | {"config": settings}
    results.mkdir(parents=True, exist_ok=True)
    path.write_text(text(record | found), "utf-8")
    plot(rows, results / "settling.png")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
