"""Behavior Regularized Actor Critic (BRAC). Wu, Tucker, Nachum 2019, arXiv:1911.11361.

Actor-critic that pays for leaving the data: a divergence D between the policy and the behaviour,
which is cloned first, is subtracted from the value, from the policy's objective alone, or from the
reward.

    V(s)    = E[ Q_target(s, a) - alpha D(s) ],   a ~ pi(. | s)        --penalty value, BRAC-v
    L_Q     = E[ (r + gamma V(s') - Q(s, a))^2 ]
    L_pi    = E[ alpha D(s) - Q(s, a) ],   a ~ pi(. | s)
    L_alpha = -E[ alpha (D(s) - target) ]                              --target-divergence
    D(s)    = E[ log pi(a | s) - log b(a | s) ],   a ~ pi(. | s)       --divergence kl
            = E[ k(a, a') + k(b, b') - 2 k(a, b) ],   k = exp(-|a - b|_1 / sigma)          mmd
            = max_c E[ c(s, a) - c(s, b) ],   |gradient of c| <= 1                 wasserstein

Run: python algorithms/brac.py --env halfcheetah-medium-v2 --num-seeds 4

`--penalty policy`, BRAC-p, has no D in V. `--penalty reward` learns from r - alpha D(s) instead.
Its Q is BRAC-v's less alpha D(s); no action changes D(s), so the policy's gradient is the same.
Q is the smaller of two critics. Settings of the authors' command (google-research,
behavior_regularized_offline_rl), which with a learned c has --alpha 10 --actor-lr 3e-6 --penalty
policy; they search alpha and the policy's rate for each dataset. Differs from the authors' code:
- PyTorch's initialisation (Keras's)
- target critics start as the critics (at weights of their own)
- the action in Q is one of those that estimate D (one more)
- under wasserstein, b at s' is the cloned behaviour's (the data's next action)
- all steps of c are made on one batch (on a new one each)
- alpha and the weight of the clone's entropy are clipped themselves (their gradients)
- the weight of the policy's entropy is fixed (an option learns it)
- acts by the policy's mode (or by the best of 10 samples)
Otherwise the updates are the authors' (benchmarks/parity).
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
import optax
import tyro
from flax import struct
from flax.training.train_state import TrainState

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # finds common/
from common import datasets, evaluation, experiment  # noqa: E402

EDGE = 1 - 1e-3  # largest action whose density under the behaviour is asked for


@dataclass(frozen=True)
class Config:
    env: str = "stillwater/hopper/medium-replay-v0"  # D4RL or Minari name, .hdf5 file; several: A,B
    env_id: str = ""  # Gymnasium id to score on; only for a bare file
    env_module: str = ""  # Python module of yours to import, which registers the environment
    seed: int = 0  # first seed
    num_seeds: int = 1  # seeds trained together under vmap
    num_updates: int = 500_000  # gradient steps
    log_every: int = 1_000  # gradient steps of a compiled chunk and between rows of metrics.csv
    eval_every: int = 10_000  # gradient steps between evaluations
    eval_episodes: int = 10  # episodes per evaluation and seed
    out: str = "runs"  # where run folders go
    resume: str = ""  # run folder to continue
    wandb: bool = False  # also log to Weights & Biases
    batch_size: int = 256  # transitions per gradient step
    gamma: float = 0.99  # discount
    actor_lr: float = 3e-4  # Adam, the policy's
    critic_lr: float = 1e-3  # Adam, the critics', alpha's and that of c
    polyak: float = 0.005  # step of the target network
    widths: tuple[int, ...] = (300, 300)  # hidden layers of the critics and of c
    normalize: bool = False  # standardise observations
    # --- BRAC ---
    actor_widths: tuple[int, ...] = (200, 200)  # hidden layers of policy and behaviour
    divergence: Literal["kl", "mmd", "wasserstein"] = "kl"  # D
    penalty: Literal["value", "policy", "reward"] = "value"  # what alpha D(s) is subtracted from
    alpha: float = 0.1  # weight of D, in [0, 500]
    target_divergence: float | None = None  # alpha learns to hold D there; None: fixed, in [0, inf)
    entropy: float = 0.0  # weight of the policy's entropy
    num_samples: int = 4  # actions of the policy for an estimate of D
    sigma: float = 20.0  # width of the MMD's kernel, in (0, inf)
    c_steps: int = 3  # steps of c in an update
    warm_start: int = 20_000  # first updates: the policy learns from D alone, in [0, inf)
    clone_updates: int = 300_000  # gradient steps of the behaviour, before all others
    clone_lr: float = 5e-4  # Adam, the behaviour's


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
    """pi(a | s), a tanh-squashed Gaussian with log std between -5 and 0."""

    widths: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, obs):
        mean, log_std = jnp.split(MLP(self.widths, 2 * self.action_dim)(obs), 2, -1)
        return TanhNormal(mean, jnp.exp(2.5 * jnp.tanh(log_std) - 2.5))


class Critic(nn.Module):
    """Q(s, a) of one member; the ensemble is a vmap over parameters."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, obs, action):
        return MLP(self.widths, 1)(jnp.concatenate([obs, action], -1)).squeeze(-1)


@struct.dataclass
class State:
    behaviour: TrainState  # b, fixed once it is cloned
    clone_entropy: TrainState  # weight of the behaviour's entropy, {"weight": number}
    actor: TrainState
    critic: TrainState  # two members, parameters stacked on axis 0
    target: dict  # Polyak average of critic.params
    alpha: TrainState  # weight of D, {"weight": number}
    c: TrainState  # of the Wasserstein distance
    obs_mean: jax.Array  # (D,)
    obs_std: jax.Array  # (D,)


def init(key, data, cfg):
    """Fresh networks and optimisers for one seed; `data`, a Batch, gives sizes and statistics."""
    k_actor, k_critic, k_behaviour, k_c = jax.random.split(key, 4)
    obs, action = data.obs[0], data.action[0]
    actor, critic = Actor(cfg.actor_widths, action.shape[-1]), Critic(cfg.widths)
    q_params = jax.vmap(critic.init, (0, None, None))(jax.random.split(k_critic, 2), obs, action)

    def learner(apply_fn, params, lr):
        return TrainState.create(apply_fn=apply_fn, params=params, tx=optax.adam(lr))

    return State(
        behaviour=learner(actor.apply, actor.init(k_behaviour, obs), cfg.clone_lr),
        clone_entropy=learner(None, {"weight": jnp.float32(1)}, cfg.clone_lr),
        actor=learner(actor.apply, actor.init(k_actor, obs), cfg.actor_lr),
        critic=learner(jax.vmap(critic.apply, (0, None, None)), q_params, cfg.critic_lr),
        target=q_params,
        alpha=learner(None, {"weight": jnp.float32(cfg.alpha)}, cfg.critic_lr),
        c=learner(critic.apply, critic.init(k_c, obs, action), cfg.critic_lr),
        obs_mean=data.obs.mean(0) if cfg.normalize else jnp.zeros_like(obs),
        obs_std=data.obs.std(0) + 1e-3 if cfg.normalize else jnp.ones_like(obs),
    )


# A loss is differentiated by its first argument; everything in `state` is a constant.


def behaviour_loss(b_params, state, batch, key):
    """Likelihood of the data's actions, and the entropy of the behaviour by its weight."""
    b = state.behaviour.apply_fn(b_params, batch.obs)
    _, log_b = b.sample_and_log_prob(seed=key)
    weight = state.clone_entropy.params["weight"]
    loss = jnp.mean(weight * log_b - b.log_prob(batch.action.clip(-EDGE, EDGE)))
    return loss, {"behaviour_loss": loss}


def clone_entropy_loss(params, state, batch, key):
    """Its descent raises the weight while the behaviour's entropy is below -A, A dimensions."""
    b = state.behaviour.apply_fn(state.behaviour.params, batch.obs)
    _, log_b = b.sample_and_log_prob(seed=key)
    return jnp.mean(params["weight"] * (batch.action.shape[-1] - log_b)), {}


def draw(pi_params, state, obs, known, key, cfg):
    """For each state an action of the policy (B, A), its log density (B,) and D (B,), estimated.

    known: the data's actions (B, A) there, for wasserstein; None: the behaviour's.
    """
    k_pi, k_b = jax.random.split(key)
    pi = state.actor.apply_fn(pi_params, obs)
    b = state.behaviour.apply_fn(state.behaviour.params, obs)
    action, log_pi = pi.sample_and_log_prob(seed=k_pi, sample_shape=cfg.num_samples)  # (N, B, A)
    if cfg.divergence == "kl":
        divergence = jnp.mean(log_pi - b.log_prob(action.clip(-EDGE, EDGE)), 0)
    elif cfg.divergence == "mmd":
        divergence = squared_mmd(action, b.sample(seed=k_b, sample_shape=cfg.num_samples), cfg)
    else:
        known = b.sample(seed=k_b) if known is None else known
        c = partial(state.c.apply_fn, state.c.params)
        many = jnp.broadcast_to(obs, (*action.shape[:-1], obs.shape[-1]))
        divergence = c(many, action).mean(0) - c(obs, known)
    return action[0], log_pi[0], divergence


def squared_mmd(x, y, cfg):
    """Squared MMD of samples x and y (N, B, A) for each of B states, Laplacian kernel."""

    def kernel(x, y):
        distance = jnp.abs(x[:, None] - y).sum(-1)  # (N, N, B)
        return jnp.exp(-distance / cfg.sigma).mean((0, 1))

    return kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)


def c_loss(c_params, state, batch, key):
    """c tells the policy's actions from the data's; slopes above 1 between them are punished."""
    k_pi, k_between = jax.random.split(key)
    action = state.actor.apply_fn(state.actor.params, batch.obs).sample(seed=k_pi)
    c = partial(state.c.apply_fn, c_params)
    part = jax.random.uniform(k_between, (len(action), 1))
    between = action + part * (batch.action - action)
    slope = jax.grad(lambda x: c(batch.obs, x).sum())(between)
    slope = jnp.sqrt(jnp.sum(slope**2, -1) + 1e-8)
    excess = 5 * jnp.mean(jnp.maximum(slope - 1, 0) ** 2)
    loss = jnp.mean(c(batch.obs, batch.action) - c(batch.obs, action)) + excess
    return loss, {"c_loss": loss}


def critic_loss(q_params, state, batch, key, cfg):
    """One-step regression onto r + gamma V(s'), the penalty in V or in r; it has no gradient."""
    k_next, k_now = jax.random.split(key)
    pi_params, alpha = state.actor.params, state.alpha.params["weight"]
    action, log_pi, divergence = draw(pi_params, state, batch.next_obs, None, k_next, cfg)
    v = state.critic.apply_fn(state.target, batch.next_obs, action).min(0) - cfg.entropy * log_pi
    reward = batch.reward
    if cfg.penalty == "value":
        v -= alpha * divergence
    elif cfg.penalty == "reward":
        reward -= alpha * draw(pi_params, state, batch.obs, batch.action, k_now, cfg)[2]
    target = reward + cfg.gamma * (1 - batch.done) * v
    q = state.critic.apply_fn(q_params, batch.obs, batch.action)  # (2, B)
    loss = jnp.mean((q - target) ** 2, 1).sum()
    return loss, {"critic_loss": loss, "q_data": q.mean()}


def actor_loss(pi_params, state, batch, key, cfg):
    """Q, from `warm_start` on, less alpha D, plus the weighted entropy."""
    action, log_pi, divergence = draw(pi_params, state, batch.obs, batch.action, key, cfg)
    q = state.critic.apply_fn(state.critic.params, batch.obs, action).min(0)
    penalty = state.alpha.params["weight"] * divergence + cfg.entropy * log_pi
    loss = jnp.mean(penalty - jnp.where(state.actor.step > cfg.warm_start, q, 0))
    return loss, {"actor_loss": loss, "q_pi": q.mean(), "divergence": divergence.mean()}


def alpha_loss(params, state, batch, key, cfg):
    """Its descent raises alpha while D is above its target."""
    divergence = draw(state.actor.params, state, batch.obs, batch.action, key, cfg)[2]
    loss = -params["weight"] * (divergence.mean() - cfg.target_divergence)
    return loss, {"alpha": params["weight"]}


def descend(loss_fn, learner, *args):
    """One optimiser step on loss_fn(learner.params, *args)."""
    grads, info = jax.grad(loss_fn, has_aux=True)(learner.params, *args)
    return learner.apply_gradients(grads=grads), info


def clipped(learner, high):
    """A learner of one number, which is kept in [0, high]."""
    return learner.replace(params=jax.tree.map(lambda x: x.clip(0, high), learner.params))


def clone(state, batch, key):
    """The behaviour, then the weight of its entropy."""
    k_behaviour, k_entropy = jax.random.split(key)
    behaviour, info = descend(behaviour_loss, state.behaviour, state, batch, k_behaviour)
    state = state.replace(behaviour=behaviour)
    learner, _ = descend(clone_entropy_loss, state.clone_entropy, state, batch, k_entropy)
    return state.replace(clone_entropy=clipped(learner, jnp.inf)), info


def update(state, batch, key, cfg):
    """Target first; then Q; then the policy against the new Q; then c; then alpha."""
    k_critic, k_actor, k_c, k_alpha = jax.random.split(key, 4)
    target = optax.incremental_update(state.critic.params, state.target, cfg.polyak)
    state = state.replace(target=target)
    critic, q_info = descend(critic_loss, state.critic, state, batch, k_critic, cfg)
    state = state.replace(critic=critic)
    actor, info = descend(actor_loss, state.actor, state, batch, k_actor, cfg)
    state, info = state.replace(actor=actor), info | q_info
    if cfg.divergence == "wasserstein":
        c, c_info = jax.lax.scan(
            lambda c, k: descend(c_loss, c, state, batch, k),
            state.c,
            jax.random.split(k_c, cfg.c_steps),
        )
        state, info = state.replace(c=c), info | jax.tree.map(jnp.mean, c_info)
    if cfg.target_divergence is not None:
        alpha, alpha_info = descend(alpha_loss, state.alpha, state, batch, k_alpha, cfg)
        state, info = state.replace(alpha=clipped(alpha, 500)), info | alpha_info
    return state, info


def normalise(state, obs):
    """Observations (..., D) as the networks see them."""
    return (obs - state.obs_mean) / state.obs_std


def minibatch(state, data, rows):
    """Those rows of a Batch, observations normalised."""
    batch = jax.tree.map(lambda x: x[rows], data)
    obs, next_obs = normalise(state, batch.obs), normalise(state, batch.next_obs)
    return batch._replace(obs=obs, next_obs=next_obs)


def clone_chunk(state, data, key, steps, cfg):
    """The updates `steps` of the behaviour, on minibatches of `data`; metrics averaged."""

    def one(state, t):
        k_rows, k_clone = jax.random.split(jax.random.fold_in(key, t))
        rows = jax.random.randint(k_rows, (cfg.batch_size,), 0, len(data.reward))
        return clone(state, minibatch(state, data, rows), k_clone)

    state, metrics = jax.lax.scan(one, state, steps)
    return state, jax.tree.map(jnp.mean, metrics)


def clone_behaviour(keys, state, data, cfg, log):
    """The behaviour of each seed, cloned in chunks of `log_every` updates; the new state."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, jnp.uint32(2**31))  # beyond every update's
    chunk = jax.vmap(partial(clone_chunk, cfg=cfg), (0, None, 0, None))
    chunk = jax.jit(chunk, donate_argnums=0)
    for first in range(0, cfg.clone_updates, cfg.log_every):
        steps = jnp.arange(first, min(first + cfg.log_every, cfg.clone_updates))
        state, metrics = chunk(state, data, keys, steps)
        log(f"behaviour, update {steps[-1] + 1:,}: loss {metrics['behaviour_loss'].mean():.4f}")
    return state


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
    if run.step == 0:
        state = run.restore(clone_behaviour(keys, state, data, cfg, run.log))
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
