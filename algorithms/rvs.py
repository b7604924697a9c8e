"""Offline RL via supervised learning (RvS). Emmons et al. 2021, arXiv:2112.10751.

Imitate the data's actions, each given what it led to, then ask for the best outcome. No value
function, no bootstrapping and no sequence model: an MLP with two wide layers.

    L_pi(phi) = E[ -log pi(a | s, omega) ]
    RvS-R:  omega_t = (r_t + ... + r_T) / (H - t),   H the length of the longest episode
    RvS-G:  omega_t = the place at a later step of the episode
    acting: omega_t = the return asked for / H, or the goal

Run: python algorithms/rvs.py --env halfcheetah-medium-v2 --target 6000       # RvS-R
     python algorithms/rvs.py --env stillwater/pointmaze-umaze/waypoint-v0    # RvS-G
     python algorithms/rvs.py --batch-size 256 --widths 256 256               # small, for a CPU

Options of RvS-R:
- `--decreasing`: rewards are subtracted from the return asked for, and H - t steps are left for it
- `--no-average`: omega is the sum of the rewards, not their average

Settings and updates are those of the authors' code (github.com/scottemmons/rvs). Differs from it:
- minibatches are drawn with replacement (2,000 epochs of permutations; 20,000 updates in AntMaze)
- RvS-G draws episodes by their length (all equally often)
- one return is asked for (several shares of the expert's; the best result is reported)
- PyTorch's initialisation (orthogonal, with a small last layer)
- the last episode of a file counts even if it is not finished (dropped)
- the kitchen is conditioned on returns only (also on goals)
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import distrax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import struct
from flax.training.train_state import TrainState

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # finds common/
from common import datasets, evaluation, experiment  # noqa: E402

# Values that depend on the dataset, as in the authors' code; the longest matching name wins.
TUNED = {
    "default": dict(goal=False, dropout=0.0),
    **dict.fromkeys(("antmaze", "pointmaze"), dict(goal=True)),
    "kitchen": dict(dropout=0.1),
}


@dataclass(frozen=True)
class Config:
    env: str = "stillwater/hopper/medium-replay-v0"  # D4RL or Minari name, .hdf5 file; several: A,B
    env_id: str = ""  # Gymnasium id to score on; only for a bare file
    env_module: str = ""  # Python module of yours to import, which registers the environment
    seed: int = 0  # first seed
    num_seeds: int = 1  # seeds trained together under vmap
    num_updates: int = 100_000  # gradient steps
    log_every: int = 100  # gradient steps of a compiled chunk and between rows of metrics.csv
    eval_every: int = 5_000  # gradient steps between evaluations
    eval_episodes: int = 10  # episodes per evaluation and seed
    out: str = "runs"  # where run folders go
    resume: str = ""  # run folder to continue
    wandb: bool = False  # also log to Weights & Biases
    batch_size: int = 16_384  # transitions per gradient step
    lr: float = 1e-3  # Adam
    widths: tuple[int, ...] = (1024, 1024)  # hidden layers of every network
    normalize: bool = False  # standardise observations
    # --- RvS ---
    target: float | None = None  # return to ask for; default the data's best
    horizon: int | None = None  # H; default steps of the data's longest episode, in [1, inf)
    average: bool = True  # omega is the average reward to go; else the return to go
    decreasing: bool = False  # subtract what was earned from the return asked for
    goal: bool | None = None  # omega is a later place; default off, mazes on
    place: tuple[int, ...] = (0, 1)  # columns of obs; as many at its end are the goal, in [0, inf)
    dropout: float | None = None  # of hidden layers in training; default 0, kitchen 0.1, in [0, 1)


class Rows(NamedTuple):
    """N rows in their order, and what they lead to."""

    obs: jax.Array  # (N, D)
    action: jax.Array  # (N, A) in [-1, 1]
    outcome: jax.Array  # (N, K) omega of RvS-R; the place, of RvS-G
    time: jax.Array  # (N,) int32, steps since the episode's start
    end: jax.Array  # (N,) int32, the row after the episode's last


class Batch(NamedTuple):
    obs: jax.Array  # (B, D) normalised, without the goal
    action: jax.Array  # (B, A)
    outcome: jax.Array  # (B, K) omega


class Dense(nn.Module):
    """x W^T + b with PyTorch's initialisation; W is (out, in), so that a CPU need not transpose its
    gradient."""

    width: int

    @nn.compact
    def __call__(self, x):
        bound = x.shape[-1] ** -0.5
        uniform = partial(jax.random.uniform, minval=-bound, maxval=bound)
        w = self.param("kernel", uniform, (self.width, x.shape[-1]))
        return x @ w.T + self.param("bias", uniform, (self.width,))


class Actor(nn.Module):
    """pi(a | s, omega) = N(f(s, omega), std^2), std independent of both."""

    widths: tuple[int, ...]
    action_dim: int
    dropout: float

    @nn.compact
    def __call__(self, obs, outcome, train=False):
        x = jnp.concatenate([obs, outcome], -1)
        for width in self.widths:
            x = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(Dense(width)(x)))
        mean = Dense(self.action_dim)(x)
        log_std = self.param("log_std", nn.initializers.zeros, (self.action_dim,))
        return distrax.MultivariateNormalDiag(mean, jnp.broadcast_to(jnp.exp(log_std), mean.shape))


def split(obs, cfg):
    """Observations (..., D) without the goal, and the goal, which is their end in RvS-G."""
    size = obs.shape[-1] - (len(cfg.place) if cfg.goal else 0)
    return obs[..., :size], obs[..., size:]


@struct.dataclass
class State:
    actor: TrainState
    obs_mean: jax.Array  # (D,)
    obs_std: jax.Array  # (D,)


def init(key, data, cfg):
    """A fresh network and optimiser for one seed; `data`, Rows, gives sizes and statistics."""
    obs, goal = split(data.obs, cfg)
    actor = Actor(cfg.widths, data.action.shape[-1], cfg.dropout)
    params = actor.init(key, obs[0], goal[0] if cfg.goal else jnp.zeros(1))
    return State(
        actor=TrainState.create(apply_fn=actor.apply, params=params, tx=optax.adam(cfg.lr)),
        obs_mean=obs.mean(0) if cfg.normalize else jnp.zeros_like(obs[0]),
        obs_std=obs.std(0) + 1e-3 if cfg.normalize else jnp.ones_like(obs[0]),
    )


def actor_loss(pi_params, state, batch, key, cfg):
    """Negative log-likelihood of the actions, given what they led to."""
    rngs = {"dropout": key}
    pi = state.actor.apply_fn(pi_params, batch.obs, batch.outcome, train=True, rngs=rngs)
    loss = -jnp.mean(pi.log_prob(batch.action))
    return loss, {"actor_loss": loss, "std": pi.stddev().mean()}


def descend(loss_fn, learner, *args):
    """One optimiser step on loss_fn(learner.params, *args)."""
    grads, info = jax.grad(loss_fn, has_aux=True)(learner.params, *args)
    return learner.apply_gradients(grads=grads), info


def update(state, batch, key, cfg):
    """One step of imitation; `key` draws the dropout."""
    actor, info = descend(actor_loss, state.actor, state, batch, key, cfg)
    return state.replace(actor=actor), info


def normalise(state, obs):
    """Observations (..., D) as the networks see them."""
    return (obs - state.obs_mean) / state.obs_std


def two_steps(data, rows, key):
    """Two steps of each row's episode, drawn: rows of the earlier and of the later."""
    start = rows - data.time[rows]
    length = data.end[rows] - start
    k_one, k_other = jax.random.split(key)
    one = start + jax.random.randint(k_one, rows.shape, 0, jnp.maximum(length - 1, 1))
    other = start + jax.random.randint(k_other, rows.shape, 0, length)
    return jnp.minimum(one, other), jnp.maximum(one, other)


def minibatch(state, data, rows, key, cfg):
    """A Batch of those rows; in RvS-G, of two steps of the episode of each."""
    rows, later = two_steps(data, rows, key) if cfg.goal else (rows, rows)
    obs, _ = split(data.obs[rows], cfg)
    return Batch(normalise(state, obs), data.action[rows], data.outcome[later])


def train_chunk(state, data, key, step, cfg):
    """The `log_every` updates up to update `step`, on minibatches of `data`, Rows.

    Metrics averaged. Update t draws from fold_in(key, t): a run does not depend on how it is cut
    into chunks.
    """

    def one(state, t):
        k_rows, k_later, k_update = jax.random.split(jax.random.fold_in(key, t), 3)
        rows = jax.random.randint(k_rows, (cfg.batch_size,), 0, len(data.obs))
        return update(state, minibatch(state, data, rows, k_later, cfg), k_update, cfg)

    state, metrics = jax.lax.scan(one, state, step - jnp.arange(cfg.log_every)[::-1])
    return state, jax.tree.map(jnp.mean, metrics)


def act(state, carry, obs, reward, key, cfg):
    """Mean actions (E, A) for obs (E, D); carry: the return asked for (E,) and the steps left."""
    del key  # there is no dropout
    obs, outcome = split(obs, cfg)
    if not cfg.goal:
        target, steps = carry or (jnp.full(obs.shape[:-1], cfg.target), jnp.array(cfg.horizon))
        target = target - reward if cfg.decreasing else target
        outcome = (target / jnp.maximum(steps, 1) if cfg.average else target)[..., None]
        carry = target, steps - 1 if cfg.decreasing else steps
    pi = state.actor.apply_fn(state.actor.params, normalise(state, obs), outcome)
    return pi.mode().clip(-1, 1), carry


def policy(cfg):
    """`act` as evaluation calls it: (state, carry, obs, reward, key) -> (action, carry)."""
    return partial(act, cfg=cfg)


def hindsight(dataset, cfg):
    """The arrays of a Dataset as Rows."""
    steps = dataset.steps()
    outcome = steps.returns_to_go / (cfg.horizon - steps.time if cfg.average else 1)
    outcome = steps.obs[:, cfg.place] if cfg.goal else np.float32(outcome[:, None])
    return Rows(steps.obs, steps.action, outcome, steps.time, steps.end)


def check(cfg, dataset):
    """SystemExit where no goal or no such return can be asked for."""
    if cfg.horizon < (longest := dataset.length.max()):
        why = f"the longest episode of {dataset.name} has {longest:,} steps"
        raise SystemExit(f"--horizon {cfg.horizon}: {why}. Choose as many or more.")
    if not cfg.goal:
        return
    if not dataset.env_id:
        raise SystemExit(f"--goal: observations of {dataset.name} hold no goal; try --no-goal.")
    columns, left = cfg.place, dataset.obs.shape[1] - len(cfg.place)
    if max(columns) >= left:
        raise SystemExit(f"--place {columns}: must be below {left}, where the goal begins.")


def train(cfg, dataset):
    """Trains `cfg.num_seeds` policies on a Dataset; their State, seeds on axis 0."""
    cfg = experiment.resolve(cfg, TUNED, dataset)
    if cfg.horizon is None:
        cfg = replace(cfg, horizon=int(dataset.length.max()))
    if cfg.target is None:
        cfg = replace(cfg, target=float(dataset.returns().max()))
    check(cfg, dataset)
    run = experiment.Run(cfg, dataset)
    data = hindsight(dataset, cfg)

    keys = jax.vmap(jax.random.key)(cfg.seed + jnp.arange(cfg.num_seeds))
    start = jax.jit(jax.vmap(partial(init, cfg=cfg), (0, None)))
    state = run.restore(start(jax.vmap(jax.random.fold_in, (0, None))(keys, 0), data))
    chunk = jax.vmap(partial(train_chunk, cfg=cfg), (0, None, 0, None))
    chunk = jax.jit(chunk, donate_argnums=0)
    policies = jax.jit(jax.vmap(policy(cfg), (0, 0, 0, 0, None)))

    for step in run.steps():  # log_every, 2 log_every, ..., num_updates
        state, metrics = chunk(state, data, keys, step)
        returns = None
        if step % cfg.eval_every == 0:
            returns = evaluation.evaluate(
                partial(policies, state), dataset.env_id, cfg.num_seeds, cfg.eval_episodes
            )
        run.record(step, metrics, returns)
        run.save(step, state)
    run.finish()
    return state


def main(cfg: Config):
    cfg = experiment.resolve(cfg, TUNED)  # --resume: the run's own config
    train(cfg, datasets.load(cfg.env, cfg.env_id))


if __name__ == "__main__":
    main(tyro.cli(Config))
