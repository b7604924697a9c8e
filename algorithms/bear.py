"""Bootstrapping Error Accumulation Reduction (BEAR). Kumar et al. 2019, arXiv:1906.00949.

Actor-critic whose policy may choose any action that the data support, however rarely: a multiplier
alpha, learned with the policy, keeps the maximum mean discrepancy (MMD) between a few samples of
the policy and of the behaviour, a variational autoencoder (VAE), below eps.

    MMD(s)^2 = E[ k(u, u') + k(v, v') - 2 k(u, v) ],   u of the VAE, v of pi, both before the tanh
    k(u, v)  = exp(-|u - v|_1 / (2 sigma)), or exp(-|u - v|^2 / (2 sigma)) under --gaussian True
    y        = r + gamma max_i [ lam min_j Q_j'(s', a_i) + (1 - lam) max_j Q_j'(s', a_i) ]
    L_Q      = E[ sum_j (y - Q_j(s, a))^2 ],   a_i ~ pi'(. | s')
    L_pi     = E[ alpha MMD(s) - min_j mean_i Q_j(s, a_i) ],   a_i ~ pi(. | s)
    L_alpha  = -E[ alpha (MMD(s) - eps) ]
    pi(s)    = argmax_i Q_1(s, a_i)

Run: python algorithms/bear.py --env halfcheetah-medium-v2 --num-seeds 4

Q' and pi' are Polyak averages; the VAE's loss is BCQ's. Settings of the authors' commands
(github.com/aviralkumar2907/BEAR). Differs from the authors' code:
- log std of the policy clipped to [-20, 2] (not clipped), as in their later code
- no penalty on the spread of the critics (an option, off)
Otherwise the updates are the authors' (benchmarks/parity). `--form d4rl` is their later code
(github.com/rail-berkeley/d4rl_evaluations): no pi'; samples of pi are not clipped; the policy is
updated with the critic from before its own update, at a single sample. Its other settings:
--batch-size 256 --widths 256 256 --actor-lr 1e-4 --critic-lr 3e-4 --num-matches 4 --sigma 20
--warm-start 40000 --eval-samples 100.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

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
    "default": dict(gaussian=False, sigma=10.0),
    "walker2d": dict(gaussian=True, sigma=20.0),
    "ant": dict(gaussian=True, sigma=20.0),
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
    batch_size: int = 100  # transitions per gradient step
    gamma: float = 0.99  # discount
    actor_lr: float = 1e-3  # Adam, the policy's
    critic_lr: float = 1e-3  # Adam, the critics' and the VAE's
    polyak: float = 0.005  # step of the target networks
    widths: tuple[int, ...] = (400, 300)  # hidden layers of policy and critics
    normalize: bool = False  # standardise observations
    # --- BEAR ---
    vae_widths: tuple[int, ...] = (750, 750)  # hidden layers of encoder and decoder
    gaussian: bool | None = None  # kernel of the MMD; default Laplacian, walker2d and ant Gaussian
    sigma: float | None = None  # width of the kernel; default 10, walker2d and ant 20, in (0, inf)
    eps: float = 0.05  # largest MMD that costs nothing, in [0, inf)
    num_matches: int = 5  # samples of policy and of VAE in an MMD
    multiplier_lr: float = 1e-3  # Adam, the multiplier's
    fixed_multiplier: float | None = None  # instead of a learned one, in [0, inf)
    ensemble: Literal["min", "mean"] = "min"  # of the critics, in the policy's loss
    lam: float = 0.75  # weight of the smaller critic in the target, in [0, 1]
    num_samples: int = 10  # actions for the target
    eval_samples: int = 10  # actions for acting
    warm_start: int = 20_000  # first updates: the policy learns from the MMD alone, in [0, inf)
    form: Literal["authors", "d4rl"] = "authors"  # of an update: the first or the later code


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


class VAE(nn.Module):
    """The behaviour: an encoder q(z | s, a), and a decoder of (s, z) to actions before the tanh."""

    widths: tuple[int, ...]
    action_dim: int

    def setup(self):
        self.encoder = MLP(self.widths, 4 * self.action_dim)  # mean and log std of 2 A latents
        self.decoder = MLP(self.widths, self.action_dim)

    def __call__(self, obs, action, key):
        """The action decoded from a sample of q, and the mean and std of q."""
        mean, log_std = jnp.split(self.encoder(jnp.concatenate([obs, action], -1)), 2, -1)
        std = jnp.exp(log_std.clip(-4, 15))
        z = mean + std * jax.random.normal(key, std.shape)
        return jnp.tanh(self.decoder(jnp.concatenate([obs, z], -1))), mean, std

    def sample(self, obs, key):
        """For each of obs (..., D) an action that is likely in the data, before its tanh."""
        z = jax.random.normal(key, (*obs.shape[:-1], 2 * self.action_dim)).clip(-0.5, 0.5)
        return self.decoder(jnp.concatenate([obs, z], -1))


class Actor(nn.Module):
    """Mean and standard deviation of v, where tanh(v), v ~ N(mean, std^2), is an action of pi."""

    widths: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, obs):
        mean, log_std = jnp.split(MLP(self.widths, 2 * self.action_dim)(obs), 2, -1)
        return mean, jnp.exp(log_std.clip(-20, 2))


class Critic(nn.Module):
    """Q(s, a) of one member; the ensemble is a vmap over parameters."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, obs, action):
        return MLP(self.widths, 1)(jnp.concatenate([obs, action], -1)).squeeze(-1)


@struct.dataclass
class State:
    vae: TrainState  # the behaviour
    actor: TrainState
    critic: TrainState  # two members, parameters stacked on axis 0
    multiplier: TrainState  # alpha, learned as its logarithm
    target: dict  # Polyak average of critic.params
    target_actor: dict  # Polyak average of actor.params
    obs_mean: jax.Array  # (D,)
    obs_std: jax.Array  # (D,)


def init(key, data, cfg):
    """Fresh networks and optimisers for one seed; `data`, a Batch, gives sizes and statistics."""
    k_vae, k_actor, k_critic, k_multiplier = jax.random.split(key, 4)
    obs, action = data.obs[0], data.action[0]
    vae, critic = VAE(cfg.vae_widths, action.shape[-1]), Critic(cfg.widths)
    actor = Actor(cfg.widths, action.shape[-1])
    pi_params = actor.init(k_actor, obs)
    q_params = jax.vmap(critic.init, (0, None, None))(jax.random.split(k_critic, 2), obs, action)
    log_alpha = jax.random.normal(k_multiplier) if cfg.form == "authors" else jnp.zeros(())

    def learner(apply_fn, params, lr):
        return TrainState.create(apply_fn=apply_fn, params=params, tx=optax.adam(lr))

    return State(
        vae=learner(vae.apply, vae.init(k_vae, obs, action, key), cfg.critic_lr),
        actor=learner(actor.apply, pi_params, cfg.actor_lr),
        critic=learner(jax.vmap(critic.apply, (0, None, None)), q_params, cfg.critic_lr),
        multiplier=learner(None, {"log": log_alpha}, cfg.multiplier_lr),
        target=q_params,
        target_actor=pi_params,
        obs_mean=data.obs.mean(0) if cfg.normalize else jnp.zeros_like(obs),
        obs_std=data.obs.std(0) + 1e-3 if cfg.normalize else jnp.ones_like(obs),
    )


# A loss is differentiated by its first argument; everything in `state` is a constant.


def vae_loss(vae_params, state, batch, key):
    """Error of the reconstructed action plus half of KL(q(z | s, a) || N(0, 1)), both as means."""
    action, mean, std = state.vae.apply_fn(vae_params, batch.obs, batch.action, key)
    error = jnp.mean((action - batch.action) ** 2)
    kl = -0.5 * jnp.mean(1 + jnp.log(std**2) - mean**2 - std**2)
    loss = error + 0.5 * kl
    return loss, {"vae_loss": loss, "vae_error": error, "vae_kl": kl}


def sample(pi_params, state, obs, key, n, limit=jnp.inf):
    """n values (n, ..., A) of v for each of obs (..., D), `limit` standard deviations at most."""
    mean, std = state.actor.apply_fn(pi_params, obs)
    return mean + std * jax.random.normal(key, (n, *mean.shape)).clip(-limit, limit)


def candidates(pi_params, state, obs, key, n):
    """n actions (n, ..., A) of the policy for each of obs (..., D)."""
    return jnp.tanh(sample(pi_params, state, obs, key, n))


def mmd(x, y, cfg):
    """MMD of samples x and y (N, B, A) for each of B states."""

    def kernel(x, y):
        gap = x[:, None] - y  # (N, N, B, A)
        distance = jnp.sum(gap**2 if cfg.gaussian else jnp.abs(gap), -1)
        return jnp.exp(-distance / (2 * cfg.sigma)).mean((0, 1))

    return jnp.sqrt(kernel(x, x) + kernel(y, y) - 2 * kernel(x, y) + 1e-6)


def critic_loss(q_params, state, batch, key, cfg):
    """One-step regression of both critics onto y: members are mixed first, then the best taken."""
    pi_params = state.target_actor if cfg.form == "authors" else state.actor.params
    action = candidates(pi_params, state, batch.next_obs, key, cfg.num_samples)
    obs = jnp.broadcast_to(batch.next_obs, (*action.shape[:-1], batch.next_obs.shape[-1]))
    q_next = state.critic.apply_fn(state.target, obs, action)  # (2, N, B)
    q_next = (cfg.lam * q_next.min(0) + (1 - cfg.lam) * q_next.max(0)).max(0)  # (B,)
    target = batch.reward + cfg.gamma * (1 - batch.done) * q_next
    q = state.critic.apply_fn(q_params, batch.obs, batch.action)  # (2, B)
    loss = jnp.mean((q - target) ** 2, 1).sum()
    return loss, {"critic_loss": loss, "q_data": q.mean()}


def actor_loss(pi_params, state, batch, key, cfg):
    """Mean Q of the policy's actions, from `warm_start` on, less the weighted MMD."""
    k_vae, k_pi = jax.random.split(key)
    obs = jnp.broadcast_to(batch.obs, (cfg.num_matches, *batch.obs.shape))
    u = state.vae.apply_fn(state.vae.params, obs, k_vae, method="sample")  # (N, B, A)
    limit = 0.5 if cfg.form == "authors" else jnp.inf
    v = sample(pi_params, state, batch.obs, k_pi, cfg.num_matches, limit)
    gap = mmd(u, v, cfg)
    used = cfg.num_matches if cfg.form == "authors" else 1
    q = state.critic.apply_fn(state.critic.params, obs[:used], jnp.tanh(v[:used])).mean(1)  # (2, B)
    q = q.min(0) if cfg.ensemble == "min" else q.mean(0)
    alpha = jnp.exp(state.multiplier.params["log"])
    alpha = alpha if cfg.fixed_multiplier is None else cfg.fixed_multiplier
    loss = jnp.mean(alpha * gap - jnp.where(state.actor.step < cfg.warm_start, 0, q))
    return loss, {"actor_loss": loss, "q_pi": q.mean(), "mmd": gap.mean()}


def dual_loss(params, gap, cfg):
    """Its descent raises the multiplier while the MMD is above eps."""
    alpha = jnp.exp(params["log"])
    return -alpha * (gap - cfg.eps), {"multiplier": alpha}


def descend(loss_fn, learner, *args):
    """One optimiser step on loss_fn(learner.params, *args)."""
    grads, info = jax.grad(loss_fn, has_aux=True)(learner.params, *args)
    return learner.apply_gradients(grads=grads), info


def update(state, batch, key, cfg):
    """VAE first, then Q, then the policy with both new, then the multiplier; then the targets."""
    k_vae, k_critic, k_actor = jax.random.split(key, 3)
    vae, vae_info = descend(vae_loss, state.vae, state, batch, k_vae)
    state = state.replace(vae=vae)
    critic, q_info = descend(critic_loss, state.critic, state, batch, k_critic, cfg)
    if cfg.form == "authors":  # else the policy is updated with the critic from before its step
        state = state.replace(critic=critic)
    actor, pi_info = descend(actor_loss, state.actor, state, batch, k_actor, cfg)
    if cfg.fixed_multiplier is None:
        multiplier, info = descend(dual_loss, state.multiplier, pi_info["mmd"], cfg)
        params = jax.tree.map(lambda log: log.clip(-5, 10), multiplier.params)
        state = state.replace(multiplier=multiplier.replace(params=params))
        pi_info |= info
    target = optax.incremental_update(critic.params, state.target, cfg.polyak)
    target_actor = optax.incremental_update(actor.params, state.target_actor, cfg.polyak)
    state = state.replace(critic=critic, actor=actor, target=target, target_actor=target_actor)
    return state, vae_info | q_info | pi_info


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


def act(state, obs, key, cfg):
    """Of `eval_samples` candidates for obs (..., D), the one with the largest Q_1."""
    obs = normalise(state, obs)
    action = candidates(state.actor.params, state, obs, key, cfg.eval_samples)  # (N, ..., A)
    obs = jnp.broadcast_to(obs, (*action.shape[:-1], obs.shape[-1]))
    best = state.critic.apply_fn(state.critic.params, obs, action)[0].argmax(0)
    return jnp.take_along_axis(action, best[None, ..., None], 0)[0]


def policy(cfg):
    """`act` as evaluation calls it: (state, carry, obs, reward, key) -> (action, carry)."""
    return lambda state, carry, obs, reward, key: (act(state, obs, key, cfg), carry)


def train(cfg, dataset):
    """Trains `cfg.num_seeds` policies on a Dataset; their State, seeds on axis 0."""
    cfg = experiment.resolve(cfg, TUNED, dataset)
    run = experiment.Run(cfg, dataset)
    data = dataset.transitions()

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
