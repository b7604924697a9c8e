"""Conservative Q-Learning (CQL). Kumar, Zhou, Tucker, Levine 2020, arXiv:2006.04779.

Soft actor-critic with a critic that is pushed down at actions that the data lacks and up at the
data's own, so that the policy's value is a lower bound of its true value.

    min_Q  alpha E_s~D[ log sum_a exp Q(s, a) - E_a~D[Q(s, a)] ]
           + E_D[ (r + gamma Q_target(s', a') - Q(s, a))^2 ],   a' ~ pi(. | s')       (4)

Run: python algorithms/cql.py --env halfcheetah-medium-v2

The sum over actions is an integral. It is estimated for each critic with importance weights from 10
uniform actions, 10 of pi(. | s) and 10 of pi(. | s') (Appendix F). Options:
- `--variant rho`: log E_a~pi[exp Q(s, a)] for the sum, the solution for the regulariser -KL(mu, pi)
- `--variant rho-weighted`: E_a~pi[Q exp Q] / E_a~pi[exp Q], as the paper writes CQL(rho) (Appendix
  A); its weights learn, too, so its gradient is not that of log E_a~pi[exp Q]
- `--variant var`: E_a[Q] + sqrt(Var_a[Q] / n(s)) over uniform actions (Appendix A); n(s) are the
  visits to s, for which `--count` stands where states are continuous
- `--lagrange GAP`: alpha is tuned to hold the bracket at this gap
- `--max-backup`: the target takes the best of 10 next actions
- `--num-actions 1`: a sixth of the arithmetic; the sum then runs over 3 actions
- `--alpha 0`: plain SAC, which fails on offline data

Settings and updates are those of the trusted port (github.com/young-geng/CQL): whole squared
errors, not halved; no entropy in the target. Differs from the port:
- CQL(rho), CQL(var) (absent)
- the data's own next_obs, so rows at time limits count (dropped)
- actions of the data are not clipped (to 0.999)
"""

import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

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
    actor_lr: float = 3e-4  # Adam, the policy's and the temperature's
    critic_lr: float = 3e-4  # Adam, the critics'
    polyak: float = 0.005  # step of the target network
    widths: tuple[int, ...] = (256, 256)  # hidden layers of every network
    normalize: bool = False  # standardise observations
    # --- CQL ---
    alpha: float = 5.0  # weight of the penalty, Eq. (4)
    num_actions: int = 10  # sampled actions of each of the three kinds
    variant: Literal["H", "rho", "rho-weighted", "var"] = "H"  # what is pushed down; H: Eq. (4)
    count: float = 1.0  # visits that a state counts in CQL(var), in (0, inf)
    lagrange: float | None = None  # gap that alpha is tuned for; default: alpha is fixed
    max_backup: bool = False  # the target takes the best of num_actions next actions


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


class TanhNormal(distrax.Transformed):
    """tanh(u), u ~ N(mean, std^2), independent over the last axis."""

    def __init__(self, mean, std):
        gaussian = distrax.MultivariateNormalDiag(mean, std)
        super().__init__(gaussian, distrax.Block(distrax.Tanh(), 1))

    def mode(self):
        """The median, tanh(mean)."""
        return jnp.tanh(self.distribution.mean())


class Actor(nn.Module):
    """pi(a | s), a tanh-squashed Gaussian; a learned affine map starts its std small."""

    widths: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, obs):
        mean, log_std = jnp.split(MLP(self.widths, 2 * self.action_dim)(obs), 2, -1)
        scale = self.param("log_std_scale", nn.initializers.constant(1.0), ())
        shift = self.param("log_std_shift", nn.initializers.constant(-1.0), ())
        return TanhNormal(mean, jnp.exp((scale * log_std + shift).clip(-20, 2)))


class Critic(nn.Module):
    """Q(s, a) of one member; the ensemble is a vmap over parameters."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, obs, action):
        return MLP(self.widths, 1)(jnp.concatenate([obs, action], -1)).squeeze(-1)


class Positive(nn.Module):
    """One learned positive number: a temperature or a multiplier."""

    start: float

    @nn.compact
    def __call__(self):
        return jnp.exp(self.param("log", nn.initializers.constant(math.log(self.start)), ()))


@struct.dataclass
class State:
    actor: TrainState
    critic: TrainState  # two members, parameters stacked on axis 0
    temperature: TrainState  # weight of the entropy, SAC's alpha
    multiplier: TrainState  # of the penalty; learned under --lagrange only
    target: dict  # Polyak average of critic.params
    obs_mean: jax.Array  # (D,)
    obs_std: jax.Array  # (D,)


def init(key, data, cfg):
    """Fresh networks and optimisers for one seed; `data`, a Batch, gives sizes and statistics."""
    k_actor, k_critic = jax.random.split(key)
    obs, action = data.obs[0], data.action[0]
    actor, critic = Actor(cfg.widths, action.shape[-1]), Critic(cfg.widths)
    temperature, multiplier = Positive(1.0), Positive(math.e)
    q_params = jax.vmap(critic.init, (0, None, None))(jax.random.split(k_critic, 2), obs, action)

    def learner(apply_fn, params, lr):
        return TrainState.create(apply_fn=apply_fn, params=params, tx=optax.adam(lr))

    return State(
        actor=learner(actor.apply, actor.init(k_actor, obs), cfg.actor_lr),
        critic=learner(jax.vmap(critic.apply, (0, None, None)), q_params, cfg.critic_lr),
        temperature=learner(temperature.apply, temperature.init(key), cfg.actor_lr),
        multiplier=learner(multiplier.apply, multiplier.init(key), cfg.critic_lr),
        target=q_params,
        obs_mean=data.obs.mean(0) if cfg.normalize else jnp.zeros_like(obs),
        obs_std=data.obs.std(0) + 1e-3 if cfg.normalize else jnp.ones_like(obs),
    )


# A loss is differentiated by its first argument; everything in `state` is a constant.


def backup(state, batch, key, cfg):
    """r + gamma Q_target(s', a'), a' ~ pi(. | s'), the smaller of two critics; shape (B,)."""
    pi = state.actor.apply_fn(state.actor.params, batch.next_obs)
    action = pi.sample(seed=key, sample_shape=cfg.num_actions if cfg.max_backup else 1)  # (N, B, A)
    obs = jnp.broadcast_to(batch.next_obs, (*action.shape[:-1], batch.next_obs.shape[-1]))
    next_q = state.critic.apply_fn(state.target, obs, action).min(0).max(0)  # (2, N, B) -> (B,)
    return batch.reward + cfg.gamma * (1 - batch.done) * next_q


def propose(state, batch, key, cfg):
    """Actions to push down, and the log of their density at s: (N, B, A), (N, B).

    A third of them uniform, a third from pi(. | s), a third from pi(. | s').
    """
    k_uniform, k_pi, k_next = jax.random.split(key, 3)
    n, (size, dim) = cfg.num_actions, batch.action.shape
    uniform = jax.random.uniform(k_uniform, (n, size, dim), minval=-1, maxval=1)
    pi = state.actor.apply_fn(state.actor.params, batch.obs)
    action, log_pi = pi.sample_and_log_prob(seed=k_pi, sample_shape=n)
    pi_next = state.actor.apply_fn(state.actor.params, batch.next_obs)
    next_action, next_log_pi = pi_next.sample_and_log_prob(seed=k_next, sample_shape=n)
    actions = jnp.concatenate([uniform, action, next_action])
    return actions, jnp.concatenate([jnp.full((n, size), dim * jnp.log(0.5)), log_pi, next_log_pi])


def reference(state, batch, key, cfg):
    """Actions of rho (N, B, A): the current policy, or uniform in CQL(var)."""
    if cfg.variant == "var":
        shape = cfg.num_actions, *batch.action.shape
        return jax.random.uniform(key, shape, minval=-1, maxval=1)
    pi = state.actor.apply_fn(state.actor.params, batch.obs)
    return pi.sample(seed=key, sample_shape=cfg.num_actions)


def lowered(q, log_density, cfg):
    """What the penalty pushes down at each state, (2, B), from Q (2, N, B) of proposed actions."""
    if cfg.variant == "rho-weighted":
        return jnp.sum(jax.nn.softmax(q, 1) * q, 1)
    if cfg.variant == "var":
        return q.mean(1) + jnp.sqrt(q.var(1) / cfg.count + 1e-12)  # differentiable at equal Q
    return jax.nn.logsumexp(q - log_density, 1)  # up to the constant log N


def critic_loss(q_params, state, batch, key, cfg):
    """Temporal difference and conservative penalty of both critics, Eq. (4)."""
    k_backup, k_propose = jax.random.split(key)
    target = backup(state, batch, k_backup, cfg)
    if cfg.variant == "H":
        action, log_density = propose(state, batch, k_propose, cfg)
    else:  # expectations under rho: its density drops out
        action, log_density = reference(state, batch, k_propose, cfg), 0.0
    obs = jnp.broadcast_to(batch.obs, (*action.shape[:-1], batch.obs.shape[-1]))
    q_data = state.critic.apply_fn(q_params, batch.obs, batch.action)  # (2, B)
    q_other = state.critic.apply_fn(q_params, obs, action)  # (2, N, B)
    td = jnp.mean((q_data - target) ** 2, 1)  # (2,)
    gap = jnp.mean(lowered(q_other, log_density, cfg) - q_data, 1)  # (2,)
    multiplier = 1.0 if cfg.lagrange is None else state.multiplier.apply_fn(state.multiplier.params)
    loss = jnp.sum(td + cfg.alpha * multiplier * gap)
    info = {"critic_loss": loss, "td_loss": td.sum(), "gap": gap.mean(), "q_data": q_data.mean()}
    return loss, info


def multiplier_loss(params, state, gap, cfg):
    """Dual ascent: the penalty grows while the gap is above `lagrange`, Appendix F."""
    return -cfg.alpha * state.multiplier.apply_fn(params) * (gap - cfg.lagrange), {}


def actor_loss(pi_params, state, batch, key):
    """Soft actor-critic's policy: E[temperature log pi(a | s) - Q(s, a)]."""
    pi = state.actor.apply_fn(pi_params, batch.obs)
    action, log_pi = pi.sample_and_log_prob(seed=key)
    q = state.critic.apply_fn(state.critic.params, batch.obs, action)  # (2, B)
    temperature = state.temperature.apply_fn(state.temperature.params)
    loss = jnp.mean(temperature * log_pi - q.min(0))
    return loss, {"actor_loss": loss, "entropy": -log_pi.mean(), "q_pi": q.mean()}


def temperature_loss(params, state, entropy, target_entropy):
    """Descending it raises the temperature while the policy's entropy is below the target."""
    temperature = state.temperature.apply_fn(params)
    return jnp.log(temperature) * (entropy - target_entropy), {"temperature": temperature}


def descend(loss_fn, learner, *args):
    """One optimiser step on loss_fn(learner.params, *args)."""
    grads, info = jax.grad(loss_fn, has_aux=True)(learner.params, *args)
    return learner.apply_gradients(grads=grads), info


def update(state, batch, key, cfg):
    """Policy, temperature and critics, each against the others as they were; then the target."""
    k_actor, k_critic = jax.random.split(key)
    actor, pi_info = descend(actor_loss, state.actor, state, batch, k_actor)
    entropy, dim = pi_info["entropy"], batch.action.shape[-1]
    temperature, t_info = descend(temperature_loss, state.temperature, state, entropy, -dim)
    critic, q_info = descend(critic_loss, state.critic, state, batch, k_critic, cfg)
    if cfg.lagrange is not None:
        multiplier, _ = descend(multiplier_loss, state.multiplier, state, q_info["gap"], cfg)
        state = state.replace(multiplier=multiplier)
    target = optax.incremental_update(critic.params, state.target, cfg.polyak)
    state = state.replace(actor=actor, temperature=temperature, critic=critic, target=target)
    return state, pi_info | t_info | q_info


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
    """The policy's median action for obs (..., D)."""
    return state.actor.apply_fn(state.actor.params, normalise(state, obs)).mode()


def policy(cfg):
    """`act` as evaluation calls it: (state, carry, obs, reward, key) -> (action, carry)."""
    return evaluation.stateless(act)


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
