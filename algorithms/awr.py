"""Advantage-weighted regression (AWR). Peng, Kumar, Zhang, Levine 2019, arXiv:1910.00177.

Two regressions in turn: a value function onto the returns of the data, then a policy onto the
data's actions, each weighted by how far its return exceeds the value. There is no Q: an action is
worth what its own episode earned after it.

    V   = argmin_V   E[ (R - V(s))^2 / 2 ]
    pi  = argmax_pi  E[ exp((R - V(s)) / beta) log pi(a | s) ]
    R_t = r_t + gamma ((1 - lambda) V(s_{t+1}) + lambda R_{t+1})       TD(lambda); 1: Monte Carlo

After an episode's last row R_{t+1} is V(s_{t+1}) at a time limit and 0 at a terminal.

Run: python algorithms/awr.py --env halfcheetah-medium-v2 --num-seeds 4

Settings and iterations are those of the authors' code (github.com/xbpeng/awr), not the paper's:
advantages are standardised over all rows and divided by 1 (paper: raw ones by 0.05, here
`--no-standardize --temperature 0.05`), and mean actions beyond [-1, 1] are penalised. The policy's
updates are counted, not those of V. Differs from the authors' code:
- all rows of the dataset (a buffer of the last 50,000, with 2,048 new ones in each iteration)
- minibatches are drawn with replacement (in the order of a permutation)
- PyTorch's initialisation (Xavier, and weights below 0.01 in the policy's last layer)
- observations are divided by the dataset's std + 0.001 (a running std, at least 0.01)
- the std is 0.4 for a robot that is not listed (0.2)
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import distrax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import tyro
from flax import struct
from flax.training.train_state import TrainState

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # finds common/
from common import datasets, evaluation, experiment  # noqa: E402

# Values that depend on the dataset, as in the authors' code; the longest matching name wins.
TUNED = {
    "default": dict(actor_lr=5e-5, std=0.4),
    "hopper": dict(actor_lr=1e-4),
    "walker2d": dict(actor_lr=2.5e-5),
    "humanoid": dict(actor_lr=1e-5),
    "ant": dict(std=0.2),
}


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
    gamma: float = 0.99  # discount
    actor_lr: float | None = None  # SGD, the policy's; default 5e-5, hopper 1e-4, walker2d 2.5e-5
    critic_lr: float = 0.01  # SGD, the value function's
    widths: tuple[int, ...] = (128, 64)  # hidden layers of every network
    normalize: bool = True  # standardise observations
    # --- AWR ---
    momentum: float = 0.9  # of SGD, in [0, 1)
    lam: float = 0.95  # lambda of the returns, in [0, 1]
    temperature: float = 1.0  # beta, in (0, inf)
    standardize: bool = True  # advantages over all rows, before they are divided by beta
    max_weight: float = 20.0  # clip of the exponential, in (0, inf]
    critic_steps: int = 200  # gradient steps of the value function in an iteration
    actor_steps: int = 1_000  # gradient steps of the policy in an iteration
    std: float | None = None  # of the policy, not learned; default 0.4, ant 0.2, in (0, inf)
    bound_weight: float = 10.0  # of the penalty on mean actions beyond [-1, 1], in [0, inf)


class Episodes(NamedTuple):
    rows: datasets.Batch  # N transitions, episode after episode
    last: jax.Array  # (E,) int32 the last row of each episode


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
    """pi(a | s) = N(f(s), std^2), std fixed."""

    widths: tuple[int, ...]
    action_dim: int
    std: float

    @nn.compact
    def __call__(self, obs):
        mean = MLP(self.widths, self.action_dim)(obs)
        return distrax.MultivariateNormalDiag(mean, jnp.full_like(mean, self.std))


class Value(nn.Module):
    """V(s)."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, obs):
        return MLP(self.widths, 1)(obs).squeeze(-1)


@struct.dataclass
class State:
    actor: TrainState
    value: TrainState  # its network gives (1 - gamma) V(s), which is of a reward's size
    obs_mean: jax.Array  # (D,)
    obs_std: jax.Array  # (D,)


def init(key, data, cfg):
    """Fresh networks and optimisers for one seed; `data`, a Batch, gives sizes and statistics."""
    k_actor, k_value = jax.random.split(key)
    obs, action = data.obs[0], data.action[0]
    actor, value = Actor(cfg.widths, action.shape[-1], cfg.std), Value(cfg.widths)

    def learner(apply_fn, params, lr):
        return TrainState.create(apply_fn=apply_fn, params=params, tx=optax.sgd(lr, cfg.momentum))

    return State(
        actor=learner(actor.apply, actor.init(k_actor, obs), cfg.actor_lr),
        value=learner(value.apply, value.init(k_value, obs), cfg.critic_lr),
        obs_mean=data.obs.mean(0) if cfg.normalize else jnp.zeros_like(obs),
        obs_std=data.obs.std(0) + 1e-3 if cfg.normalize else jnp.ones_like(obs),
    )


def lambda_returns(v, v_end, data, cfg):
    """R (N,) from V(s_t) (N,) and, after the last row of each episode, V(s_{t+1}) (E,).

    R_t = c_t + d_t R_{t+1}: such maps compose in any grouping, in log N parallel steps.
    """
    v_next = jnp.roll(v, -1).at[data.last].set((1 - data.rows.done[data.last]) * v_end)
    d = jnp.full_like(v, cfg.gamma * cfg.lam).at[data.last].set(0)
    c = data.rows.reward + (cfg.gamma - d) * v_next

    def compose(later, earlier):
        return earlier[0] + earlier[1] * later[0], earlier[1] * later[1]

    return jax.lax.associative_scan(compose, (c, d), reverse=True)[0]


def label(state, data, cfg):
    """Return and weight of every row under the present V, (N,) each."""

    def value(obs):
        return state.value.apply_fn(state.value.params, normalise(state, obs)) / (1 - cfg.gamma)

    v = jax.lax.map(value, data.rows.obs, batch_size=2**16)  # at once, a million rows take 1 GB
    returns = lambda_returns(v, value(data.rows.next_obs[data.last]), data, cfg)
    advantage = returns - v
    if cfg.standardize:
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-5)
    return returns, jnp.exp(advantage / cfg.temperature).clip(max=cfg.max_weight)


# A loss is differentiated by its first argument; everything in `state` is a constant.


def value_loss(v_params, state, obs, returns, cfg):
    """Regression of V onto the returns, both times 1 - gamma."""
    v = state.value.apply_fn(v_params, obs)  # (B,)
    loss = jnp.mean((v - (1 - cfg.gamma) * returns) ** 2) / 2
    return loss, {"value_loss": loss, "v_data": v.mean() / (1 - cfg.gamma)}


def actor_loss(pi_params, state, obs, action, weight, cfg):
    """Weighted imitation, and the penalty on mean actions beyond [-1, 1]."""
    pi = state.actor.apply_fn(pi_params, obs)
    beyond = jnp.maximum(jnp.abs(pi.mode()) - 1, 0)  # (B, A)
    penalty = jnp.mean(jnp.sum(beyond**2, -1)) / 2
    loss = cfg.bound_weight * penalty - jnp.mean(weight * pi.log_prob(action))
    return loss, {"actor_loss": loss, "weight": weight.mean()}


def descend(loss_fn, learner, *args):
    """One optimiser step on loss_fn(learner.params, *args)."""
    grads, info = jax.grad(loss_fn, has_aux=True)(learner.params, *args)
    return learner.apply_gradients(grads=grads), info


def normalise(state, obs):
    """Observations (..., D) as the networks see them."""
    return (obs - state.obs_mean) / state.obs_std


def minibatch(state, data, rows):
    """Those rows of arrays of which the first are observations; these normalised."""
    obs, *others = (x[rows] for x in data)
    return normalise(state, obs), *others


def regress(loss_fn, learner, state, data, key, steps, cfg):
    """`steps` optimiser steps of one learner on minibatches of `data`; metrics averaged."""

    def one(learner, key):
        rows = jax.random.randint(key, (cfg.batch_size,), 0, len(data[0]))
        return descend(loss_fn, learner, state, *minibatch(state, data, rows), cfg)

    learner, metrics = jax.lax.scan(one, learner, jax.random.split(key, steps))
    return learner, jax.tree.map(jnp.mean, metrics)


def update(state, data, key, cfg):
    """One iteration: V onto the returns under the old V, the policy by weights under the new."""
    k_value, k_actor = jax.random.split(key)
    rows = data.rows.obs, label(state, data, cfg)[0]
    value, v_info = regress(value_loss, state.value, state, rows, k_value, cfg.critic_steps, cfg)
    state = state.replace(value=value)
    rows = data.rows.obs, data.rows.action, label(state, data, cfg)[1]
    actor, pi_info = regress(actor_loss, state.actor, state, rows, k_actor, cfg.actor_steps, cfg)
    return state.replace(actor=actor), v_info | pi_info


def train_chunk(state, data, key, step, cfg):
    """The iterations up to update `step`, which each draw from fold_in(key, their last update)."""

    def one(state, t):
        return update(state, data, jax.random.fold_in(key, t), cfg)

    ends = step - jnp.arange(0, cfg.log_every, cfg.actor_steps)[::-1]
    state, metrics = jax.lax.scan(one, state, ends)
    return state, jax.tree.map(jnp.mean, metrics)


def act(state, obs):
    """The policy's mean action for obs (..., D)."""
    return state.actor.apply_fn(state.actor.params, normalise(state, obs)).mode().clip(-1, 1)


def policy(cfg):
    """`act` as evaluation calls it: (state, carry, obs, reward, key) -> (action, carry)."""
    return evaluation.stateless(act)


def check(cfg, dataset):
    """SystemExit where a chunk is not whole iterations, and where V has no scale."""
    if cfg.log_every % cfg.actor_steps:
        whole = f"must be a multiple of --actor-steps {cfg.actor_steps} that divides --eval-every"
        raise SystemExit(f"--log-every {cfg.log_every}: {whole}.")
    if cfg.gamma == 1:
        raise SystemExit("--gamma 1: must be below 1, the value function learns (1 - gamma) V.")


def train(cfg, dataset):
    """Trains `cfg.num_seeds` policies on a Dataset; their State, seeds on axis 0."""
    cfg = experiment.resolve(cfg, TUNED, dataset)
    check(cfg, dataset)
    run = experiment.Run(cfg, dataset)
    data = Episodes(dataset.transitions(), dataset.start + dataset.length - 1)

    keys = jax.vmap(jax.random.key)(cfg.seed + jnp.arange(cfg.num_seeds))
    start = jax.jit(jax.vmap(partial(init, cfg=cfg), (0, None)))
    state = run.restore(start(jax.vmap(jax.random.fold_in, (0, None))(keys, 0), data.rows))
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
