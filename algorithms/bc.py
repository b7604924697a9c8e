"""Behaviour cloning (BC) and %BC, the baselines of every table.

BC imitates the data's actions: at best it is as good as the policy that collected them (Pomerleau
1988). %BC imitates only the episodes with the highest returns, which is what offline RL has to
beat (Chen et al. 2021, arXiv:2106.01345).

    L_pi(phi) = E[ |mean(s) - a|^2 ]     --head deterministic
    L_pi(phi) = E[ -log pi(a | s) ]      --head gaussian
    L_pi(phi) = E[ -log pi(a | s) ]      --head categorical, for discrete actions

Run: python algorithms/bc.py --env halfcheetah-medium-v2                  # BC
     python algorithms/bc.py --env halfcheetah-medium-v2 --fraction 0.1   # 10%BC
     python algorithms/bc.py --env stillwater/cartpole/replay-v0 --head categorical

Settings and updates are those of the trusted port, CORL (github.com/tinkoff-ai/CORL): the squared
error is averaged over the action's dimensions. The Gaussian head is the policy of CORL's AWAC with
a tanh on its mean. The categorical head takes the likeliest action. Differs from the port:
- an episode ends where the data say so (only at terminals and after every 1,000 steps)
- %BC ranks episodes by undiscounted return (discounted)
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

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

ACTIONS = ("continuous", "discrete")  # the kinds that this file takes


@dataclass(frozen=True)
class Config:
    env: str = "stillwater/hopper/medium-replay-v0"  # D4RL or Minari name, .hdf5 file; several: A,B
    env_id: str = ""  # Gymnasium id to score on; only for a bare file
    env_module: str = ""  # Python module of yours to import, which registers the environment
    seed: int = 0  # first seed
    num_seeds: int = 1  # seeds trained together under vmap
    num_updates: int = 1_000_000  # gradient steps
    log_every: int = 1_000  # gradient steps of a compiled chunk and between rows of metrics.csv
    eval_every: int = 10_000  # gradient steps between evaluations
    eval_episodes: int = 10  # episodes per evaluation and seed
    out: str = "runs"  # where run folders go
    resume: str = ""  # run folder to continue
    wandb: bool = False  # also log to Weights & Biases
    batch_size: int = 256  # transitions per gradient step
    lr: float = 3e-4  # Adam
    widths: tuple[int, ...] = (256, 256)  # hidden layers of every network
    normalize: bool = True  # standardise observations
    # --- BC ---
    fraction: float = 1.0  # of the episodes, by highest return; 0.1 is 10%BC, in (0, 1]
    head: Literal["deterministic", "gaussian", "categorical"] = "deterministic"  # see the losses


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


class MLP(nn.Module):
    widths: tuple[int, ...]
    out: int

    @nn.compact
    def __call__(self, x):
        for width in self.widths:
            x = nn.relu(Dense(width)(x))
        return Dense(self.out)(x)


class Actor(nn.Module):
    """pi(a | s) = N(tanh f(s), std^2), std independent of s."""

    widths: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, obs):
        mean = jnp.tanh(MLP(self.widths, self.action_dim)(obs))
        log_std = self.param("log_std", nn.initializers.zeros, (self.action_dim,)).clip(-5, 2)
        return distrax.MultivariateNormalDiag(mean, jnp.broadcast_to(jnp.exp(log_std), mean.shape))


class Categorical(nn.Module):
    """pi(a | s) of discrete actions, as vectors with a 1 at one of them."""

    widths: tuple[int, ...]
    num_actions: int

    @nn.compact
    def __call__(self, obs):
        return distrax.OneHotCategorical(MLP(self.widths, self.num_actions)(obs), dtype=obs.dtype)


@struct.dataclass
class State:
    actor: TrainState
    obs_mean: jax.Array  # (D,)
    obs_std: jax.Array  # (D,)


def init(key, data, cfg):
    """A fresh network and optimiser for one seed; `data`, a Batch, gives sizes and statistics."""
    obs, action = data.obs[0], data.action[0]
    actor = (Categorical if cfg.head == "categorical" else Actor)(cfg.widths, action.shape[-1])
    return State(
        actor=TrainState.create(
            apply_fn=actor.apply, params=actor.init(key, obs), tx=optax.adam(cfg.lr)
        ),
        obs_mean=data.obs.mean(0) if cfg.normalize else jnp.zeros_like(obs),
        obs_std=data.obs.std(0) + 1e-3 if cfg.normalize else jnp.ones_like(obs),
    )


def actor_loss(pi_params, state, batch, cfg):
    """Squared error of the mean action, or negative log-likelihood."""
    pi = state.actor.apply_fn(pi_params, batch.obs)
    if cfg.head in ("gaussian", "categorical"):
        loss = -jnp.mean(pi.log_prob(batch.action))
    else:
        loss = jnp.mean((pi.mode() - batch.action) ** 2)
    return loss, {"actor_loss": loss}


def descend(loss_fn, learner, *args):
    """One optimiser step on loss_fn(learner.params, *args)."""
    grads, info = jax.grad(loss_fn, has_aux=True)(learner.params, *args)
    return learner.apply_gradients(grads=grads), info


def update(state, batch, key, cfg):
    """One step of imitation."""
    del key  # BC samples nothing
    actor, info = descend(actor_loss, state.actor, state, batch, cfg)
    return state.replace(actor=actor), info


def normalise(state, obs):
    """Observations (..., D) as the networks see them."""
    return (obs - state.obs_mean) / state.obs_std


def minibatch(state, data, rows):
    """Those rows of a Batch, observations normalised."""
    batch = jax.tree.map(lambda x: x[rows], data)
    obs, next_obs = normalise(state, batch.obs), normalise(state, batch.next_obs)
    return batch._replace(obs=obs, next_obs=next_obs)


def train_chunk(state, data, key, step, cfg):
    """The `log_every` updates up to update `step`, on minibatches of `data`, a Batch of N rows.

    Metrics averaged. Update t draws from fold_in(key, t): a run does not depend on how it is cut
    into chunks.
    """

    def one(state, t):
        k_rows, k_update = jax.random.split(jax.random.fold_in(key, t))
        rows = jax.random.randint(k_rows, (cfg.batch_size,), 0, len(data.reward))
        return update(state, minibatch(state, data, rows), k_update, cfg)

    state, metrics = jax.lax.scan(one, state, step - jnp.arange(cfg.log_every)[::-1])
    return state, jax.tree.map(jnp.mean, metrics)


def act(state, obs):
    """The policy's mean action for obs (..., D)."""
    return state.actor.apply_fn(state.actor.params, normalise(state, obs)).mode().clip(-1, 1)


def policy(cfg):
    """`act` as evaluation calls it: (state, carry, obs, reward, key) -> (action, carry)."""
    return evaluation.stateless(act)


def check(cfg, dataset):
    """Raises SystemExit unless the head is for the dataset's kind of actions."""
    if (cfg.head == "categorical") != (dataset.num_actions > 0):
        kind = "discrete" if dataset.num_actions else "continuous"
        use = "it" if dataset.num_actions else "another one"
        why = f"{dataset.name} has {kind} actions, and categorical is for discrete ones"
        raise SystemExit(f"--head {cfg.head}: {why}: use {use}.")


def best_episodes(data, fraction):
    """Rows (N,) bool of the share of the episodes with the largest returns, rounded down."""
    order = np.argsort(-data.returns(), kind="stable")
    count = int(round(fraction * len(order), 6))  # 0.29 of 100, a little below 29 in floats, is 29
    if count == 0:
        raise SystemExit(f"--fraction {fraction} of {len(order)} episodes is none: raise it.")
    best = np.zeros(len(order), bool)
    best[order[:count]] = True
    return np.repeat(best, data.length)


def train(cfg, dataset):
    """Trains `cfg.num_seeds` policies on a Dataset; their State, seeds on axis 0."""
    cfg = experiment.resolve(cfg, {}, dataset)
    check(cfg, dataset)
    rows = best_episodes(dataset, cfg.fraction)
    if cfg.fraction < 1 and rows.sum() < cfg.batch_size:
        left = f"leaves {rows.sum():,} transitions, fewer than --batch-size {cfg.batch_size}"
        raise SystemExit(f"--fraction {cfg.fraction} {left}.")
    run = experiment.Run(cfg, dataset)
    data = jax.tree.map(lambda x: x[rows], dataset.transitions())

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
    cfg = experiment.resolve(cfg)  # --resume: the run's own config
    train(cfg, datasets.load(cfg.env, cfg.env_id))


if __name__ == "__main__":
    main(tyro.cli(Config))
