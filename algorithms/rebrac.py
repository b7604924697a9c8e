"""ReBRAC. Tarasov, Kurenkov, Nikulin, Kolesnikov 2023, arXiv:2305.09836.

TD3+BC with two weights of imitation instead of one: the policy stays near the data's actions, and
the target counts how far the policy's next action is from the data's. Critics have LayerNorm.

    L_pi = E[ beta1 |pi(s) - a|^2 - Q(s, pi(s)) / mean over the minibatch of |Q| ]       (3)
    L_Q  = E[ (r + gamma (Q_target(s', a') - beta2 |a' - b|^2) - Q(s, a))^2 ]            (4)
    a'   = clip(pi_target(s') + clip(noise, -c, c), -1, 1),   b the data's action at s'

Run: python algorithms/rebrac.py --env halfcheetah-medium-v2 --num-seeds 4

|.|^2 is the sum over action dimensions. Rows that a time limit cuts off have no b and are left out.

As the authors' code, not the paper: Q is divided by its mean size, Q is the smaller of two critics
also for the policy, and the target policy follows the policy of before its step. Differs from the
authors' code:
- PyTorch's initialisation (hidden biases 0.1, last layers within 1e-3 and 3e-3 of 0)
- the policy and the targets move after updates 2, 4, ... (after updates 1, 3, ...)
- the data's own next_obs (next row's observation)
Otherwise the updates are theirs (benchmarks/parity). TUNED has their values; maze2d's are CORL's.
"""

import sys
from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from pathlib import Path

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

# The authors' beta1, beta2 where they are not 0.01, 0.01; the longest name that fits, see Config.
BETAS = {
    "halfcheetah-random": (0.001, 0.1), "halfcheetah-medium": (0.001, 0.01),
    "halfcheetah-medium-replay": (0.01, 0.001), "halfcheetah-medium-expert": (0.01, 0.1),
    "halfcheetah-full-replay": (0.001, 0.1), "hopper-random": (0.001, 0.01),
    "hopper-medium-replay": (0.05, 0.5), "hopper-medium-expert": (0.1, 0.01),
    "hopper-expert": (0.1, 0.1), "walker2d-random": (0.01, 0.0), "walker2d-medium": (0.05, 0.1),
    "walker2d-medium-replay": (0.05, 0.01), "walker2d-medium-expert": (0.01, 0.01),
    "walker2d-expert": (0.01, 0.5), "antmaze-umaze": (0.003, 0.002),
    "antmaze-umaze-diverse": (0.003, 0.001), "antmaze-medium-play": (0.001, 0.0005),
    "antmaze-medium-diverse": (0.001, 0.0), "antmaze-large-play": (0.002, 0.001),
    "antmaze-large-diverse": (0.002, 0.002), "pen-human": (0.1, 0.5), "pen-cloned": (0.05, 0.5),
    "door-human": (0.1, 0.1), "door-cloned": (0.01, 0.1), "door-expert": (0.05, 0.01),
    "hammer-human": (0.01, 0.5), "hammer-cloned": (0.1, 0.5), "relocate-human": (0.1, 0.01),
    "relocate-cloned": (0.1, 0.01), "relocate-expert": (0.05, 0.01),
}  # fmt: skip
LARGE = dict(batch_size=1024, actor_lr=1e-3, critic_lr=1e-3)
SMALL = dict(batch_size=256, actor_lr=3e-4, critic_lr=3e-4)
TUNED = {
    "default": LARGE | dict(gamma=0.99, reward_scale=1.0, beta1=0.01, beta2=0.01),
    "antmaze": SMALL | dict(gamma=0.999, reward_scale=100.0, critic_lr=5e-5),
    **dict.fromkeys(("pen", "door", "hammer", "relocate"), SMALL),
    **dict.fromkeys(("maze2d", "pointmaze"), SMALL | dict(beta1=0.003, beta2=0.001)),  # CORL's
    **{name: dict(beta1=beta1, beta2=beta2) for name, (beta1, beta2) in BETAS.items()},
}

# A datasets.Batch, and the data's action at next_obs, b (N, A).
Transitions = namedtuple("Transitions", (*datasets.Batch._fields, "next_action"))


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
    batch_size: int | None = None  # transitions per gradient step; default 1024, antmaze 256
    gamma: float | None = None  # discount; default 0.99, antmaze 0.999
    actor_lr: float | None = None  # Adam, the policy's; default 1e-3, antmaze 3e-4
    critic_lr: float | None = None  # Adam, the critics'; default 1e-3, antmaze 5e-5
    polyak: float = 0.005  # step of the target network
    widths: tuple[int, ...] = (256, 256, 256)  # hidden layers of every network
    normalize: bool = False  # standardise observations
    # --- ReBRAC ---
    beta1: float | None = None  # weight in the policy, Eq. (3); default 0.01, in [0, inf)
    beta2: float | None = None  # weight in the target, Eq. (4); default 0.01, in [0, inf)
    policy_delay: int = 2  # updates of the critics in a round, which ends with one of the policy
    policy_noise: float = 0.2  # standard deviation of the noise on a', in [0, inf)
    noise_clip: float = 0.5  # c, largest noise on a', in [0, inf)
    reward_scale: float | None = None  # factor of every reward; default 1, antmaze 100


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
    """pi(s) = tanh f(s), deterministic."""

    widths: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, obs):
        return jnp.tanh(MLP(self.widths, self.action_dim)(obs))


class Critic(nn.Module):
    """Q(s, a) of one member, with LayerNorm; the ensemble is a vmap over parameters."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, obs, action):
        x = jnp.concatenate([obs, action], -1)
        for width in self.widths:
            x = nn.LayerNorm()(nn.relu(Dense(width)(x)))
        return Dense(1)(x).squeeze(-1)


@struct.dataclass
class State:
    actor: TrainState
    critic: TrainState  # two members, parameters stacked on axis 0
    target_actor: dict  # Polyak average of actor.params
    target: dict  # Polyak average of critic.params
    obs_mean: jax.Array  # (D,)
    obs_std: jax.Array  # (D,)


def init(key, data, cfg):
    """Fresh networks and optimisers for one seed; `data`, a Batch, gives sizes and statistics."""
    k_actor, k_critic = jax.random.split(key)
    obs, action = data.obs[0], data.action[0]
    actor, critic = Actor(cfg.widths, action.shape[-1]), Critic(cfg.widths)
    pi_params = actor.init(k_actor, obs)
    q_params = jax.vmap(critic.init, (0, None, None))(jax.random.split(k_critic, 2), obs, action)

    def learner(apply_fn, params, lr):
        return TrainState.create(apply_fn=apply_fn, params=params, tx=optax.adam(lr))

    return State(
        actor=learner(actor.apply, pi_params, cfg.actor_lr),
        critic=learner(jax.vmap(critic.apply, (0, None, None)), q_params, cfg.critic_lr),
        target_actor=pi_params,
        target=q_params,
        obs_mean=data.obs.mean(0) if cfg.normalize else jnp.zeros_like(obs),
        obs_std=data.obs.std(0) + 1e-3 if cfg.normalize else jnp.ones_like(obs),
    )


# A loss is differentiated by its first argument; everything in `state` is a constant.


def smoothed_action(state, batch, key, cfg):
    """a', the target policy's action at s' with clipped noise; shape (B, A)."""
    noise = cfg.policy_noise * jax.random.normal(key, batch.action.shape)
    noise = noise.clip(-cfg.noise_clip, cfg.noise_clip)
    return (state.actor.apply_fn(state.target_actor, batch.next_obs) + noise).clip(-1, 1)


def critic_loss(q_params, state, batch, key, cfg):
    """One-step regression onto a target that counts the distance to the data, Eq. (4)."""
    next_action = smoothed_action(state, batch, key, cfg)
    q_next = state.critic.apply_fn(state.target, batch.next_obs, next_action).min(0)
    q_next -= cfg.beta2 * jnp.sum((next_action - batch.next_action) ** 2, -1)
    target = batch.reward + cfg.gamma * (1 - batch.done) * q_next
    q = state.critic.apply_fn(q_params, batch.obs, batch.action)  # (2, B)
    loss = jnp.mean((q - target) ** 2, 1).sum()
    return loss, {"critic_loss": loss, "q_data": q.mean()}


def actor_loss(pi_params, state, batch, cfg):
    """Q of the policy's action, scaled to size 1, against imitation, Eq. (3)."""
    action = state.actor.apply_fn(pi_params, batch.obs)
    q = state.critic.apply_fn(state.critic.params, batch.obs, action).min(0)  # (B,)
    scale = 1 / jax.lax.stop_gradient(jnp.abs(q).mean())
    imitation = jnp.sum((action - batch.action) ** 2, -1).mean()
    loss = cfg.beta1 * imitation - scale * q.mean()
    return loss, {"actor_loss": loss, "imitation_loss": imitation, "q_pi": q.mean()}


def descend(loss_fn, learner, *args):
    """One optimiser step on loss_fn(learner.params, *args)."""
    grads, info = jax.grad(loss_fn, has_aux=True)(learner.params, *args)
    return learner.apply_gradients(grads=grads), info


def update(state, batches, keys, cfg):
    """A round: the critics once on each of the minibatches on axis 0; then, with the new critics,
    the policy on the last of them; then the targets."""

    def learn(critic, row):
        return descend(critic_loss, critic, state, *row, cfg)

    critic, q_info = jax.lax.scan(learn, state.critic, (batches, keys))
    state = state.replace(critic=critic)
    last = jax.tree.map(lambda x: x[-1], batches)
    actor, pi_info = descend(actor_loss, state.actor, state, last, cfg)
    # the authors' code: towards the policy of before its step
    target_actor = optax.incremental_update(state.actor.params, state.target_actor, cfg.polyak)
    target = optax.incremental_update(critic.params, state.target, cfg.polyak)
    state = state.replace(actor=actor, target_actor=target_actor, target=target)
    return state, pi_info | jax.tree.map(jnp.mean, q_info)


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

    def draw(t):
        k_rows, k_update = jax.random.split(jax.random.fold_in(key, t))
        rows = jax.random.randint(k_rows, (cfg.batch_size,), 0, len(data.reward))
        return minibatch(state, data, rows), k_update

    def one(state, ts):
        return update(state, *jax.vmap(draw)(ts), cfg)

    ts = step - jnp.arange(cfg.log_every)[::-1]
    state, metrics = jax.lax.scan(one, state, ts.reshape(-1, cfg.policy_delay))
    return state, jax.tree.map(jnp.mean, metrics)


def act(state, obs):
    """The policy's action for obs (..., D)."""
    return state.actor.apply_fn(state.actor.params, normalise(state, obs))


def policy(cfg):
    """`act` as evaluation calls it: (state, carry, obs, reward, key) -> (action, carry)."""
    return evaluation.stateless(act)


def check(cfg, dataset):
    """SystemExit unless every chunk is a number of whole rounds."""
    if cfg.log_every % cfg.policy_delay:
        raise SystemExit(
            f"--log-every {cfg.log_every}: must be a multiple of --policy-delay {cfg.policy_delay}."
        )


def transitions(dataset):
    """All rows with their next action, but those cut off by a time limit: they have none."""
    rows = dataset.transitions()
    end = dataset.start + dataset.length - 1
    known = np.ones(len(rows.reward), bool)
    known[end] = rows.done[end] == 1  # what follows a terminal row does not count
    if not known.any():
        raise SystemExit(f"{dataset.name}: no row has a next action, all episodes are one step.")
    return Transitions(*(x[known] for x in (*rows, np.roll(rows.action, -1, 0))))


def train(cfg, dataset):
    """Trains `cfg.num_seeds` policies on a Dataset; their State, seeds on axis 0."""
    cfg = experiment.resolve(cfg, TUNED, dataset)
    check(cfg, dataset)
    run = experiment.Run(cfg, dataset)
    data = transitions(dataset)
    data = data._replace(reward=cfg.reward_scale * data.reward)

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
