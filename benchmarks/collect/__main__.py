"""Collects offline datasets by D4RL's protocol: trains SAC online, then records its policies.

    python -m benchmarks.collect --env-id Hopper-v5 --kind medium

    random         uniform actions
    medium         the policy whose return first reached a third of an expert's
    medium-replay  all transitions from the training of the medium policy, in order
    expert         the policy at the end of training
    medium-expert  medium and expert, half each
    waypoint       PointMaze only: a controller walks to one random target after another

Actions are sampled. A time limit is a truncation, never a termination. The result is a Minari
dataset with its provenance: `<out>/stillwater/<env>/<kind>-v0/data/{metadata.json,main_data.hdf5}`.

All kinds of one environment and seed share one SAC run. Ctrl-C saves it, and the same command
continues it. SAC is algorithms/sac.py on the replay that it fills; the protocol is that of Fu et
al. 2020, arXiv:2004.07219.

The bundled sets are older than that: their SAC had the same settings, no affine map of the log std,
and updated the critics before the policy. Their metadata is of the time when they were collected.
"""

import itertools
import json
import os
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import serialization

from algorithms import sac
from benchmarks.collect import recording, waypoints
from benchmarks.collect.recording import FIELDS, cut, episode_returns, play, thin, write
from common import datasets, evaluation

MADE_BY = {"random": "uniform actions", "waypoint": "waypoint controller"}  # the others: SAC


@dataclass(frozen=True)
class Config:
    env_id: str = "Hopper-v5"  # Gymnasium id
    # policies that act
    kind: Literal["random", "medium", "medium-replay", "expert", "medium-expert", "waypoint"] = (
        "medium"
    )
    seed: int = 0  # of SAC, the environments and the recorded actions
    num_steps: int = 100_000  # transitions in the dataset at most
    sac_steps: int = 1_000_000  # environment steps of SAC's training; the last policy is the expert
    medium_fraction: float = 1 / 3  # of the way from the random to the expert return
    expert_return: float | None = None  # return with score 100; None: D4RL's reference
    out: str = "data"  # folder for Minari datasets
    work: str = "runs/collect"  # folder for SAC's checkpoints
    # --- SAC ---
    start_steps: int = 5_000  # steps with uniform actions and without updates
    batch_size: int = 256  # transitions per gradient step; one gradient step per environment step
    gamma: float = 0.99  # discount
    lr: float = 3e-4  # Adam, every network and the temperature
    polyak: float = 0.005  # step of the target network
    widths: tuple[int, ...] = (256, 256)  # hidden layers of every network


def online(cfg):
    """The Config of algorithms/sac.py."""
    return sac.Config(
        batch_size=cfg.batch_size,
        gamma=cfg.gamma,
        actor_lr=cfg.lr,
        critic_lr=cfg.lr,
        polyak=cfg.polyak,
        widths=cfg.widths,
    )


update = jax.jit(sac.update, static_argnames="cfg", donate_argnums=0)


@jax.jit
def sample(actor, obs, key):
    """Actions a ~ pi(. | obs) in [-1, 1], shape (..., A)."""
    return actor.apply_fn(actor.params, obs).sample(seed=key)


@jax.jit
def mode(actor, obs):
    """The policy's median action, shape (..., A)."""
    return actor.apply_fn(actor.params, obs).mode()


class Replay:
    """All transitions of a run in order: arrays of `FIELDS`, with `size` rows filled."""

    def __init__(self, env, capacity):
        d, a = env.observation_space.shape[0], env.action_space.shape[0]
        shapes = {"obs": (d,), "action": (a,), "next_obs": (d,)}
        dtypes = {"terminated": bool, "truncated": bool}
        self.size = 0
        self.rows = {
            k: np.zeros((capacity, *shapes.get(k, ())), dtypes.get(k, np.float32)) for k in FIELDS
        }

    def add(self, *values):
        for k, v in zip(FIELDS, values, strict=True):
            self.rows[k][self.size] = v
        self.size += 1

    def minibatch(self, rng, n):
        i = rng.integers(0, self.size, n)
        return datasets.Batch(*(self.rows[k][i] for k in FIELDS[:5]))

    def filled(self):
        return {k: v[: self.size] for k, v in self.rows.items()}


def reference(cfg, env):
    """(return with score 0, return with score 100, their source in words)."""
    name = cfg.env_id.rsplit("-", 1)[0]
    if name in datasets.REFERENCE and cfg.expert_return is None:
        return *datasets.REFERENCE[name], "D4RL"
    if cfg.expert_return is None:
        raise SystemExit(f"{cfg.env_id} has no reference return: give one with --expert-return")
    rng = np.random.default_rng(cfg.seed)
    uniform = partial(rng.uniform, -1, 1, (1, *env.action_space.shape))
    rows = play([env], lambda _: uniform(), rng, 20_000)
    worst = float(np.mean(episode_returns(rows)))
    return worst, cfg.expert_return, "uniform actions over 20,000 steps, and --expert-return"


def save(folder, step, state, replay, returns):
    """Writes a checkpoint of SAC."""
    with open(folder / "replay.tmp", "wb") as f:
        np.savez(f, **replay.filled())
    os.replace(folder / "replay.tmp", folder / "replay.npz")
    write(folder / "sac.msgpack", serialization.to_bytes(state))
    write(folder / "progress.json", json.dumps({"step": step, "returns": returns}).encode())


def check_settings(cfg, folder):
    """Raises SystemExit if the SAC run in `folder` was started with other settings."""
    kept = {k: v for k, v in asdict(cfg).items() if k not in ("kind", "num_steps", "out", "work")}
    kept = json.dumps(kept | {"sac_steps": 0, "by": "sac.py"})  # more steps are allowed later
    path = folder / "settings.json"
    if path.exists() and path.read_text() != kept:
        raise SystemExit(f"{folder} was started with other settings; choose another --work")
    write(path, kept.encode())


def load(folder, state, replay):
    """(state, replay, steps so far, returns so far) of the checkpoint, or as given without one."""
    if not (folder / "progress.json").exists():
        return state, replay, 0, []
    progress = json.loads((folder / "progress.json").read_text())
    rows = np.load(folder / "replay.npz", allow_pickle=False)
    replay.size = progress["step"]
    for k in FIELDS:
        replay.rows[k][: replay.size] = rows[k][: replay.size]
    replay.rows["truncated"][replay.size - 1] |= not replay.rows["terminated"][replay.size - 1]
    state = serialization.from_bytes(state, (folder / "sac.msgpack").read_bytes())
    return jax.tree.map(jnp.asarray, state), replay, progress["step"], progress["returns"]


def train(cfg, env, folder, goal):
    """Trains SAC: (state, replay, steps until the medium policy).

    The medium policy is that at which the last ten episodes first average `goal`. For the kinds
    with an expert, training continues to the end. folder: for checkpoints and the medium policy.
    """
    replay, own = Replay(env, cfg.sac_steps), online(cfg)
    sizes = datasets.Batch(*(replay.rows[k][:1] for k in FIELDS[:5]))
    state = jax.jit(partial(sac.init, cfg=own))(jax.random.key(cfg.seed), sizes)
    state = jax.tree.map(jnp.copy, state)  # donated buffers must not be shared
    state, replay, done, returns = load(folder, state, replay)
    rng = np.random.default_rng([cfg.seed, done])
    key = jax.random.fold_in(jax.random.key(cfg.seed), 1 + done)
    medium = folder / "medium.msgpack"
    finish = cfg.sac_steps if "expert" in cfg.kind else 0
    began, first = time.time(), done
    obs, _ = env.reset(seed=int(rng.integers(2**31)))
    episode = 0.0
    try:
        while not medium.exists() or done < finish:
            if done >= cfg.sac_steps:
                raise SystemExit(f"--sac-steps {done}: SAC has not reached a return of {goal:.0f}.")
            key, k_act, k_update = jax.random.split(key, 3)
            if done < cfg.start_steps:
                action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
            else:
                action = np.asarray(sample(state.actor, obs, k_act))
            next_obs, reward, terminated, truncated, _ = env.step(action)
            replay.add(obs, action, reward, next_obs, terminated, truncated)
            obs, done, episode = next_obs, done + 1, episode + reward
            if terminated or truncated:
                obs, _ = env.reset()
                returns, episode = [*returns, float(episode)], 0.0
                if np.mean(returns[-10:]) >= goal and len(returns) > 10 and not medium.exists():
                    save(folder, done, state, replay, returns)
                    write(folder / "medium.json", json.dumps({"step": done}).encode())
                    write(medium, serialization.to_bytes(state.actor.params))
            if done >= cfg.start_steps:
                state, _ = update(state, replay.minibatch(rng, cfg.batch_size), k_update, own)
            if done % 5_000 == 0:
                rate, recent = (done - first) / (time.time() - began), np.mean(returns[-10:] or 0)
                print(f"{done:>9,} steps  return {recent:8.1f}  {rate:5.0f} steps/s", flush=True)
            if done % 20_000 == 0:
                save(folder, done, state, replay, returns)
    except KeyboardInterrupt:
        save(folder, done, state, replay, returns)
        raise SystemExit(f"\nStopped at {done:,} steps; the same command continues.") from None
    save(folder, done, state, replay, returns)
    return state, replay, json.loads((folder / "medium.json").read_text())["step"]


def record(cfg, env, goal):
    """(rows of the dataset, {name: array} of `FIELDS`; facts about the policies)."""
    rng = np.random.default_rng([cfg.seed, 1])
    envs = [evaluation.make(cfg.env_id) for _ in range(10)]
    if cfg.kind == "random":
        uniform = partial(rng.uniform, -1, 1, (len(envs), *env.action_space.shape))
        return cut(play(envs, lambda _: uniform(), rng, cfg.num_steps), cfg.num_steps), {}
    folder = Path(cfg.work) / f"{cfg.env_id}-s{cfg.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    check_settings(cfg, folder)
    state, replay, medium_step = train(cfg, env, folder, goal)
    medium = serialization.from_bytes(state.actor.params, (folder / "medium.msgpack").read_bytes())
    actors = {"medium": state.actor.replace(params=medium), "expert": state.actor}
    about, parts = {"medium_at_step": medium_step}, []
    replayed = cfg.kind == "medium-replay"
    kinds = ["medium"] if replayed else cfg.kind.split("-")
    for kind in kinds:
        actor, key = actors[kind], jax.random.key(int(rng.integers(2**31)))
        keys = (jax.random.fold_in(key, i) for i in itertools.count())
        greedy = play(envs, partial(mode, actor), rng, 1)
        sampled = play(envs, lambda o, a=actor, k=keys: sample(a, o, next(k)), rng,
                       1 if replayed else cfg.num_steps // len(kinds))  # fmt: skip
        about[f"{kind}_policy_return"] = {
            "sampled": float(episode_returns(sampled).mean()),
            "deterministic": float(episode_returns(greedy).mean()),
        }
        parts.append(cut(sampled, cfg.num_steps // len(kinds)))
    if replayed:
        seen = {k: v[:medium_step] for k, v in replay.filled().items()}
        return thin(seen, cfg.num_steps, rng), about
    return {k: np.concatenate([p[k] for p in parts]) for k in FIELDS}, about


def record_walk(cfg, env):
    """(rows of a waypoint dataset, cut into episodes of the time limit; as `reference`)."""
    goal = evaluation.goal_cell(cfg.env_id)
    if goal is None:
        raise SystemExit(f"--kind waypoint needs PointMaze's UMaze, Medium or Large: {cfg.env_id}")
    worst = waypoints.returns(env, 100, cfg.seed).mean()
    best = waypoints.returns(env, 100, cfg.seed, goal).mean()
    obs, action, reward, next_obs = waypoints.walk(env, cfg.num_steps, cfg.seed)
    truncated = np.arange(1, cfg.num_steps + 1) % env.spec.max_episode_steps == 0
    values = obs, action, reward, next_obs, np.zeros(cfg.num_steps, bool), truncated
    source = "our own, not D4RL's: means of 100 episodes of uniform actions, and of the controller"
    rows = dict(zip(FIELDS, values, strict=True))
    return rows, (float(worst), float(best), source + " walking to the goal and staying there")


def main(cfg: Config):
    env = evaluation.make(cfg.env_id)
    if evaluation.inspect(cfg.env_id).num_actions:
        raise SystemExit(f"{cfg.env_id} has discrete actions: use benchmarks.collect.discrete")
    if cfg.kind == "waypoint":
        rows, ref = record_walk(cfg, env)
        about = {}
    else:
        ref = reference(cfg, env)
        goal = ref[0] + cfg.medium_fraction * (ref[1] - ref[0])
        rows, about = record(cfg, env, goal)
    low, high = env.unwrapped.action_space.low, env.unwrapped.action_space.high
    action = low + (rows["action"] + 1) / 2 * (high - low)
    action = np.clip(action, low, high).astype(np.float32)
    path = recording.export(
        cfg,
        rows | {"action": action},
        env.observation_space.shape,
        gymnasium.spaces.Box(low, high, dtype=np.float32),
        ref,
        about,
        made_by=MADE_BY.get(cfg.kind, "SAC"),
        packages=["mujoco", *["gymnasium-robotics"] * (cfg.kind == "waypoint")],
    )
    returns = episode_returns(rows)
    print(f"{path}: {len(rows['reward']):,} steps, {len(returns):,} episodes, return "
          f"{returns.mean():.1f} +- {returns.std():.1f}")  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
