"""Batch-Constrained deep Q-learning (BCQ) for discrete actions. Fujimoto, Conti, Ghavamzadeh,
Pineau 2019, arXiv:1910.01708.

Double deep Q-learning over the actions that the data could contain: those whose probability, in a
network that imitates the data, is more than tau times that of the likeliest action.

    A(s)     = { a : G(a | s) / max_b G(b | s) > tau }
    a'       = argmax_{a in A(s')} Q(s', a)
    L_Q      = E[ huber(r + gamma Q_target(s', a') - Q(s, a)) ]
    L_G      = E[ -log G(a | s) + 0.01 mean_b i(b | s)^2 ],   G = softmax(i)
    pi(s)    = argmax_{a in A(s)} Q(s, a)

Run: python algorithms/discrete_bcq.py --env stillwater/cartpole/replay-v0

huber(u) is u^2 / 2 up to |u| = 1 and |u| - 1/2 beyond. With tau 0 every action is allowed: double
DQN. Settings and updates are the authors' for observations that are vectors
(github.com/sfujim/BCQ, benchmarks/parity). Differs from the authors' code:
- no images: Q and G are separate networks
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

ACTIONS = ("discrete",)  # the kinds that this file takes


@dataclass(frozen=True)
class Config:
    env: str = "stillwater/cartpole/replay-v0"  # D4RL or Minari name, .hdf5 file; several: A,B
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
    batch_size: int = 64  # transitions per gradient step
    gamma: float = 0.99  # discount
    lr: float = 3e-4  # Adam
    polyak: float = 0.005  # step of the target network
    widths: tuple[int, ...] = (256, 256)  # hidden layers of every network
    normalize: bool = False  # standardise observations
    # --- BCQ ---
    tau: float = 0.3  # least share of the likeliest action's probability, in [0, 1)
    logit_decay: float = 0.01  # weight of the imitation's squared logits


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


@struct.dataclass
class State:
    critic: TrainState  # Q of every action
    actor: TrainState  # i, logits of the behaviour G
    target: dict  # Polyak average of critic.params
    obs_mean: jax.Array  # (D,)
    obs_std: jax.Array  # (D,)


def init(key, data, cfg):
    """Fresh networks and optimisers for one seed; `data`, a Batch, gives sizes and statistics."""
    k_critic, k_actor = jax.random.split(key)
    obs, action = data.obs[0], data.action[0]
    net = MLP(cfg.widths, action.shape[-1])

    def learner(params):
        return TrainState.create(apply_fn=net.apply, params=params, tx=optax.adam(cfg.lr))

    critic = learner(net.init(k_critic, obs))
    return State(
        critic=critic,
        actor=learner(net.init(k_actor, obs)),
        target=critic.params,
        obs_mean=data.obs.mean(0) if cfg.normalize else jnp.zeros_like(obs),
        obs_std=data.obs.std(0) + 1e-3 if cfg.normalize else jnp.ones_like(obs),
    )


# A loss is differentiated by its first argument; everything in `state` is a constant.


def choose(state, obs, cfg):
    """For each of obs (..., D) the action with the largest Q among those that are likely in the
    data: 1 there, 0 elsewhere (..., A)."""
    q = state.critic.apply_fn(state.critic.params, obs)  # (..., A)
    behaviour = jax.nn.softmax(state.actor.apply_fn(state.actor.params, obs))
    likely = behaviour / behaviour.max(-1, keepdims=True) > cfg.tau
    return jax.nn.one_hot(jnp.where(likely, q, -1e8).argmax(-1), q.shape[-1])


def critic_loss(q_params, state, batch, cfg):
    """Double DQN: Q chooses the next action among the likely ones, the target values it."""
    q_next = state.critic.apply_fn(state.target, batch.next_obs)  # (B, A)
    q_next = jnp.sum(q_next * choose(state, batch.next_obs, cfg), 1)  # (B,)
    target = batch.reward + cfg.gamma * (1 - batch.done) * q_next
    q = jnp.sum(state.critic.apply_fn(q_params, batch.obs) * batch.action, 1)  # (B,)
    loss = jnp.mean(optax.huber_loss(q, target))
    return loss, {"critic_loss": loss, "q_data": q.mean(), "q_next": q_next.mean()}


def actor_loss(pi_params, state, batch, cfg):
    """Imitation of the data's actions, with logits held small."""
    logits = state.actor.apply_fn(pi_params, batch.obs)  # (B, A)
    imitation = optax.softmax_cross_entropy(logits, batch.action).mean()
    loss = imitation + cfg.logit_decay * jnp.mean(logits**2)
    return loss, {"actor_loss": loss, "imitation_loss": imitation}


def descend(loss_fn, learner, *args):
    """One optimiser step on loss_fn(learner.params, *args)."""
    grads, info = jax.grad(loss_fn, has_aux=True)(learner.params, *args)
    return learner.apply_gradients(grads=grads), info


def update(state, batch, key, cfg):
    """Q and the imitation, each with the other as it was; then the target."""
    del key  # nothing is sampled
    critic, q_info = descend(critic_loss, state.critic, state, batch, cfg)
    actor, pi_info = descend(actor_loss, state.actor, state, batch, cfg)
    target = optax.incremental_update(critic.params, state.target, cfg.polyak)
    return state.replace(critic=critic, actor=actor, target=target), q_info | pi_info


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


def act(state, obs, cfg):
    """The chosen action (..., A) for obs (..., D)."""
    return choose(state, normalise(state, obs), cfg)


def policy(cfg):
    """`act` as evaluation calls it: (state, carry, obs, reward, key) -> (action, carry)."""
    return evaluation.stateless(partial(act, cfg=cfg))


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
