"""A tiny algorithm in the shape of the real ones, for test_experiment.py; no environment needed."""

import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import struct

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # finds common/
from common import datasets, evaluation, experiment  # noqa: E402

TUNED = {"default": dict(tau=0.7), "hopper": dict(tau=0.6), "hopper-medium": dict(tau=0.9)}


@dataclass(frozen=True)
class Config:
    env: str = "stillwater/hopper/medium-v0"
    env_id: str = ""
    env_module: str = ""
    seed: int = 0
    num_seeds: int = 2
    num_updates: int = 50
    log_every: int = 1_000
    eval_every: int = 10
    eval_episodes: int = 3
    out: str = "runs"
    resume: str = ""
    wandb: bool = False
    batch_size: int = 4
    gamma: float = 0.99
    lr: float = 0.1
    actor_lr: float | None = None
    save_every: int = 10
    normalize: bool = True
    widths: tuple[int, ...] = (3, 2)
    nested: tuple[tuple[float, ...], ...] = ((1 / 3, 1e-45), (0.1,))
    tau: float | None = None
    delay: float = 0.0  # seconds between chunk and record


@struct.dataclass
class State:
    x: jax.Array
    count: jax.Array
    obs_mean: jax.Array
    more: dict


def init(key, data, cfg):
    x = jax.random.normal(key, data.action.shape[1:])
    more = {
        "pair": (x, x + 1),
        "none": None,
        "weak": 0.5,
        "empty": {},
        "half": x.astype(jnp.bfloat16),
    }
    return State(x, jnp.int32(0), data.obs.mean(0), more)


def train_chunk(state, data, key, step, cfg):
    def one(state, t):
        rows = jax.random.randint(
            jax.random.fold_in(key, t), (cfg.batch_size,), 0, len(data.reward)
        )
        error = data.action[rows].mean(0) - state.x
        state = state.replace(x=state.x + cfg.lr * error, count=state.count + 1)
        return state, {"loss": jnp.sum(error**2), "q_data": state.x[0], "q_pi": state.x[1]}

    state, metrics = jax.lax.scan(one, state, step - jnp.arange(cfg.log_every)[::-1])
    return state, jax.tree.map(jnp.mean, metrics)


def act(state, obs):
    return jnp.tanh(state.x + 0.1 * (obs - state.obs_mean).sum(-1, keepdims=True))


def policy(cfg):
    return evaluation.stateless(act)


def dataset(name):
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(60, 5)).astype(np.float32)
    action = rng.uniform(-1, 1, (60, 2)).astype(np.float32)
    reward, done = rng.normal(10, 3, 60).astype(np.float32), np.zeros(60, np.float32)
    arrays = (obs, action, reward, obs, done, np.arange(0, 60, 10), np.full(6, 10))
    return datasets.Dataset(name, "Hopper-v4", *arrays, 0.0, 200.0, {"sha256": "0" * 64})


@cache
def compiled(cfg):
    """init and train_chunk of all seeds; kept, because the tests start many runs."""
    start = jax.jit(jax.vmap(partial(init, cfg=cfg), (0, None)))
    chunk = jax.vmap(partial(train_chunk, cfg=cfg), (0, None, 0, None))
    return start, jax.jit(chunk, donate_argnums=0)


def main(cfg, stop=None, kill=None, spoil=()):
    """stop: leave after the save of that step; kill: end this process before it.

    spoil: (step, index of a seed, metric, value): from that step on its state is nan.
    """
    cfg = experiment.resolve(cfg, TUNED)
    data = dataset(cfg.env)
    run = experiment.Run(cfg, data)
    batch = data.transitions()
    keys = jax.vmap(jax.random.key)(cfg.seed + jnp.arange(cfg.num_seeds))
    fold = jax.vmap(jax.random.fold_in, (0, None))
    start, chunk = compiled(replace(cfg, out="", resume="", delay=0.0, save_every=1))
    state = run.restore(start(fold(keys, 0), batch))
    for step in run.steps():
        state, metrics = chunk(state, batch, keys, step)
        for at, i, name, value in spoil:
            if step >= at:
                state = state.replace(x=state.x.at[i].set(jnp.nan))
                metrics[name] = metrics[name].at[i].set(value)
        time.sleep(cfg.delay)
        returns = (
            100 + 20 * np.asarray(state.x).sum(1, keepdims=True) + np.arange(cfg.eval_episodes)
        )
        run.record(step, metrics, returns if step % cfg.eval_every == 0 else None)
        if step == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        run.save(step, state)
        if step == stop:
            return run
    run.finish()
    return run


if __name__ == "__main__":
    main(tyro.cli(Config))
