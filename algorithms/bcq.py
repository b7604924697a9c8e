"""Batch-Constrained deep Q-learning (BCQ). Fujimoto, Meger, Precup 2018, arXiv:1812.02900.

Q-learning over actions that the data could contain: a variational autoencoder samples them, a
network perturbs a sample by at most phi, and the policy takes the candidate with the largest Q.

    G(s)    = tanh decoder(s, z),   z ~ N(0, 1) clipped to [-0.5, 0.5]
    a_i     = clip(G(s) + xi(s, G(s)), -1, 1),   |xi| <= phi
    L_VAE   = E[ (a - tanh decoder(s, z))^2 + KL(q(z | s, a) || N(0, 1)) / 2 ],   z ~ q(z | s, a)
    y       = r + gamma max_i [ lam min_j Q_j'(s', a_i) + (1 - lam) max_j Q_j'(s', a_i) ]
    L_Q     = E[ sum_j (y - Q_j(s, a))^2 ]
    L_xi    = E[ -Q_1(s, a_1) ]
    pi(s)   = argmax_i Q_1(s, a_i)

Run: python algorithms/bcq.py --env halfcheetah-medium-v2 --num-seeds 4

In y, Q' and xi are Polyak averages. L_VAE averages the square and the KL over dimensions too.
Settings and updates are the authors' (github.com/sfujim/BCQ, benchmarks/parity). Differs from the
authors' code by its random numbers alone.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import tyro
from flax import struct
from flax.training.train_state import TrainState

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # finds common/
from common import datasets, evaluation, experiment  # noqa: E402


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
    lr: float = 1e-3  # Adam
    polyak: float = 0.005  # step of the target networks
    widths: tuple[int, ...] = (400, 300)  # hidden layers of critics and perturbation
    normalize: bool = False  # standardise observations
    # --- BCQ ---
    vae_widths: tuple[int, ...] = (750, 750)  # hidden layers of encoder and decoder
    phi: float = 0.05  # largest perturbation of an action, in [0, 2]
    lam: float = 0.75  # weight of the smaller critic in the target, in [0, 1]
    num_samples: int = 10  # candidates for the target
    eval_samples: int = 100  # candidates for acting


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


class Perturbation(nn.Module):
    """a + xi(s, a), clipped to the actions' bounds; |xi| <= phi in every dimension."""

    widths: tuple[int, ...]
    phi: float

    @nn.compact
    def __call__(self, obs, action):
        xi = MLP(self.widths, action.shape[-1])(jnp.concatenate([obs, action], -1))
        return (action + self.phi * jnp.tanh(xi)).clip(-1, 1)


class Critic(nn.Module):
    """Q(s, a) of one member; the ensemble is a vmap over parameters."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, obs, action):
        return MLP(self.widths, 1)(jnp.concatenate([obs, action], -1)).squeeze(-1)


@struct.dataclass
class State:
    vae: TrainState  # G, the behaviour
    actor: TrainState  # xi, the perturbation
    critic: TrainState  # two members, parameters stacked on axis 0
    target: dict  # Polyak average of critic.params
    target_actor: dict  # Polyak average of actor.params
    obs_mean: jax.Array  # (D,)
    obs_std: jax.Array  # (D,)


def init(key, data, cfg):
    """Fresh networks and optimisers for one seed; `data`, a Batch, gives sizes and statistics."""
    k_vae, k_actor, k_critic = jax.random.split(key, 3)
    obs, action = data.obs[0], data.action[0]
    vae, critic = VAE(cfg.vae_widths, action.shape[-1]), Critic(cfg.widths)
    actor = Perturbation(cfg.widths, cfg.phi)
    pi_params = actor.init(k_actor, obs, action)
    q_params = jax.vmap(critic.init, (0, None, None))(jax.random.split(k_critic, 2), obs, action)

    def learner(apply_fn, params, lr):
        return TrainState.create(apply_fn=apply_fn, params=params, tx=optax.adam(lr))

    return State(
        vae=learner(vae.apply, vae.init(k_vae, obs, action, key), cfg.lr),
        actor=learner(actor.apply, pi_params, cfg.lr),
        critic=learner(jax.vmap(critic.apply, (0, None, None)), q_params, cfg.lr),
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


def candidates(pi_params, state, obs, key, n):
    """n actions (n, ..., A) for each of obs (..., D): samples of the VAE, perturbed."""
    obs = jnp.broadcast_to(obs, (n, *obs.shape))
    action = jnp.tanh(state.vae.apply_fn(state.vae.params, obs, key, method="sample"))
    return state.actor.apply_fn(pi_params, obs, action)


def critic_loss(q_params, state, batch, key, cfg):
    """One-step regression of both critics onto y: members are mixed first, then the best taken."""
    action = candidates(state.target_actor, state, batch.next_obs, key, cfg.num_samples)
    obs = jnp.broadcast_to(batch.next_obs, (*action.shape[:-1], batch.next_obs.shape[-1]))
    q_next = state.critic.apply_fn(state.target, obs, action)  # (2, N, B)
    q_next = (cfg.lam * q_next.min(0) + (1 - cfg.lam) * q_next.max(0)).max(0)  # (B,)
    target = batch.reward + cfg.gamma * (1 - batch.done) * q_next
    q = state.critic.apply_fn(q_params, batch.obs, batch.action)  # (2, B)
    loss = jnp.mean((q - target) ** 2, 1).sum()
    return loss, {"critic_loss": loss, "q_data": q.mean()}


def actor_loss(pi_params, state, batch, key):
    """The perturbation climbs Q_1 at one candidate for each state."""
    action = candidates(pi_params, state, batch.obs, key, 1)[0]
    loss = -state.critic.apply_fn(state.critic.params, batch.obs, action)[0].mean()
    return loss, {"actor_loss": loss, "q_pi": -loss}


def descend(loss_fn, learner, *args):
    """One optimiser step on loss_fn(learner.params, *args)."""
    grads, info = jax.grad(loss_fn, has_aux=True)(learner.params, *args)
    return learner.apply_gradients(grads=grads), info


def update(state, batch, key, cfg):
    """VAE first; then Q with the new VAE; then the perturbation against both; then the targets."""
    k_vae, k_critic, k_actor = jax.random.split(key, 3)
    vae, vae_info = descend(vae_loss, state.vae, state, batch, k_vae)
    state = state.replace(vae=vae)
    critic, q_info = descend(critic_loss, state.critic, state, batch, k_critic, cfg)
    state = state.replace(critic=critic)
    actor, pi_info = descend(actor_loss, state.actor, state, batch, k_actor)
    target = optax.incremental_update(critic.params, state.target, cfg.polyak)
    target_actor = optax.incremental_update(actor.params, state.target_actor, cfg.polyak)
    state = state.replace(actor=actor, target=target, target_actor=target_actor)
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
    cfg = experiment.resolve(cfg, {}, dataset)
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
    cfg = experiment.resolve(cfg)  # --resume: the run's own config
    train(cfg, datasets.load(cfg.env, cfg.env_id))


if __name__ == "__main__":
    main(tyro.cli(Config))
