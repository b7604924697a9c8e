"""Flow Q-Learning (FQL). Park, Li, Levine 2025, arXiv:2502.02538.

A flow model imitates the data, whatever shape their actions have. A second network, the policy,
learns to jump from noise to the end of the flow in one step, and to go where Q is larger: Q never
has to be differentiated through the steps of the flow.

    L_flow = E[ |v(s, x_t, t) - (a - z)|^2 ],   x_t = (1 - t) z + t a,   z ~ N(0, I), t ~ U(0, 1)
    x_1    = z + integral of v(s, x_t, t) dt from x_0 = z, in 10 Euler steps      the flow's action
    L_pi   = E[ alpha |mu(s, z) - x_1|^2 - Q(s, mu(s, z)) / mean |Q| ]
    L_Q    = E[ (r + gamma Q_target(s', mu(s', z')) - Q(s, a))^2 ]

Run: python algorithms/fql.py --env halfcheetah-medium-v2 --num-seeds 4

`--chunk h` is Q-chunking (Li, Zhou, Levine 2025, arXiv:2507.07969): an action is a chunk of h
actions, which are carried out without looking. Q's target then spans h steps without a bias,

    y = r_t + gamma r_t+1 + ... + gamma^h Q_target(s_t+h, mu(s_t+h, z'))

Squares are means over action dimensions, and Q is the mean of two critics. A chunk that an episode
cuts short teaches the flow its steps, and Q nothing.

As the authors' code, not the paper: Q is divided by its mean size, which their README advises for
new tasks; on the tasks of their paper TUNED has their alpha, for the undivided Q. The target moves
towards the critics of before their step. Differs from the authors' code:
- PyTorch's initialisation (uniform by the mean of fan-in and fan-out, biases 0)
- alpha 0.3 where they have none: the one of their list (0.03 to 10) next to TD3+BC's 1 / 2.5
- an Adam for each network (one for all; the same numbers)
Otherwise the updates are theirs (benchmarks/parity).
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

# Values that depend on the dataset, as in the authors' code; the longest matching name wins.
THEIRS = dict(normalize_q=False)  # their alphas are for Q as it is
TUNED = {
    "default": dict(alpha=0.3, normalize_q=True, smaller_q=False, gamma=0.99, shift_reward=0.0),
    # D4RL
    "antmaze": THEIRS | dict(alpha=10.0, shift_reward=-1.0),
    "antmaze-large": dict(alpha=3.0),
    **dict.fromkeys(
        ("pen", "hammer-cloned", "relocate-human"), THEIRS | dict(alpha=1e4, smaller_q=True)
    ),
    "pen-expert": dict(alpha=3e3),
    **dict.fromkeys(("door", "hammer", "relocate"), THEIRS | dict(alpha=3e4, smaller_q=True)),
    # OGBench, whose rewards of a single task are -1 and 0 as they are
    "singletask": dict(shift_reward=0.0),
    "antmaze-large-navigate": dict(alpha=10.0, smaller_q=True),
    "antmaze-giant-navigate": dict(alpha=10.0, smaller_q=True, gamma=0.995),
    "humanoidmaze": THEIRS | dict(alpha=30.0, gamma=0.995),
    "antsoccer": THEIRS | dict(alpha=10.0, gamma=0.995),
    **dict.fromkeys(("cube", "scene"), THEIRS | dict(alpha=300.0)),
    "puzzle": THEIRS | dict(alpha=1000.0),
}

# A datasets.Batch whose action is a chunk (N, h, A), its reward the discounted sum over the chunk,
# its next_obs and done those of the chunk's last step; and which steps the episode has, (N, h).
Chunks = namedtuple("Chunks", (*datasets.Batch._fields, "valid"))


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
    gamma: float | None = None  # discount; default 0.99, OGBench's long mazes 0.995
    lr: float = 3e-4  # Adam
    polyak: float = 0.005  # step of the target network
    widths: tuple[int, ...] = (512, 512, 512, 512)  # hidden layers of every network
    normalize: bool = False  # standardise observations
    # --- FQL ---
    alpha: float | None = None  # weight of staying at the flow; default 0.3, try 0.03 to 10
    normalize_q: bool | None = None  # divide Q by its mean size in L_pi; default on
    smaller_q: bool | None = None  # Q_target is the smaller critic, not the mean; default off
    flow_steps: int = 10  # Euler steps of the flow
    chunk: int = 1  # h, actions that are chosen and carried out together; Q-chunking has 5
    shift_reward: float | None = None  # added to every reward; default 0, D4RL's antmaze -1


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


class Field(nn.Module):
    """The flow's velocity v(s, x, t), or without t the one-step policy mu(s, z)."""

    widths: tuple[int, ...]
    out: int

    @nn.compact
    def __call__(self, *inputs):
        x = jnp.concatenate(inputs, -1)
        for width in self.widths:
            x = nn.gelu(Dense(width)(x))
        return Dense(self.out)(x)


class Critic(nn.Module):
    """Q(s, a) of one member, with LayerNorm; the ensemble is a vmap over parameters."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, obs, action):
        x = jnp.concatenate([obs, action], -1)
        for width in self.widths:
            x = nn.LayerNorm()(nn.gelu(Dense(width)(x)))
        return Dense(1)(x).squeeze(-1)


@struct.dataclass
class State:
    actor: TrainState  # mu
    flow: TrainState  # v
    critic: TrainState  # two members, parameters stacked on axis 0
    target: dict  # Polyak average of critic.params
    obs_mean: jax.Array  # (D,)
    obs_std: jax.Array  # (D,)


def init(key, data, cfg):
    """Fresh networks and optimisers for one seed; `data`, a Batch, gives sizes and statistics."""
    k_actor, k_flow, k_critic = jax.random.split(key, 3)
    obs, action = data.obs[0], jnp.zeros(cfg.chunk * data.action.shape[-1])
    field, critic = Field(cfg.widths, len(action)), Critic(cfg.widths)
    q_params = jax.vmap(critic.init, (0, None, None))(jax.random.split(k_critic, 2), obs, action)

    def learner(apply_fn, params):
        return TrainState.create(apply_fn=apply_fn, params=params, tx=optax.adam(cfg.lr))

    return State(
        actor=learner(field.apply, field.init(k_actor, obs, action)),
        flow=learner(field.apply, field.init(k_flow, obs, action, jnp.zeros(1))),
        critic=learner(jax.vmap(critic.apply, (0, None, None)), q_params),
        target=q_params,
        obs_mean=data.obs.mean(0) if cfg.normalize else jnp.zeros_like(obs),
        obs_std=data.obs.std(0) + 1e-3 if cfg.normalize else jnp.ones_like(obs),
    )


# A loss is differentiated by its first argument; everything in `state` is a constant.


def flow_loss(v_params, state, batch, key):
    """The velocity on straight lines from noise to the data's chunks."""
    k_noise, k_t = jax.random.split(key)
    action = batch.action.reshape(len(batch.action), -1)  # (B, h A)
    z, t = jax.random.normal(k_noise, action.shape), jax.random.uniform(k_t, (len(action), 1))
    v = state.flow.apply_fn(v_params, batch.obs, (1 - t) * z + t * action, t)
    error = ((v - (action - z)) ** 2).reshape(batch.action.shape)
    loss = jnp.mean(error * batch.valid[..., None])
    return loss, {"flow_loss": loss}


def flow_action(state, obs, z, cfg):
    """x_1, where the flow from z ends, in [-1, 1]; shape (B, h A)."""

    def euler(x, t):
        t = jnp.full((len(x), 1), t)
        return x + state.flow.apply_fn(state.flow.params, obs, x, t) / cfg.flow_steps, None

    x, _ = jax.lax.scan(euler, z, jnp.arange(cfg.flow_steps) / cfg.flow_steps)
    return x.clip(-1, 1)


def critic_loss(q_params, state, batch, key, cfg):
    """One-step regression of both critics, a step being a chunk."""
    z = jax.random.normal(key, (len(batch.action), batch.action[0].size))
    next_action = state.actor.apply_fn(state.actor.params, batch.next_obs, z).clip(-1, 1)
    q_next = state.critic.apply_fn(state.target, batch.next_obs, next_action)  # (2, B)
    q_next = q_next.min(0) if cfg.smaller_q else q_next.mean(0)
    target = batch.reward + cfg.gamma**cfg.chunk * (1 - batch.done) * q_next
    action = batch.action.reshape(z.shape)
    q = state.critic.apply_fn(q_params, batch.obs, action)  # (2, B)
    loss = jnp.mean((q - target) ** 2 * batch.valid[:, -1])
    return loss, {"critic_loss": loss, "q_data": q.mean()}


def actor_loss(pi_params, state, batch, key, cfg):
    """The distance to the flow's action from the same noise, and Q."""
    z = jax.random.normal(key, (len(batch.action), batch.action[0].size))
    action = state.actor.apply_fn(pi_params, batch.obs, z)
    distance = jnp.mean((action - flow_action(state, batch.obs, z, cfg)) ** 2)
    q = state.critic.apply_fn(state.critic.params, batch.obs, action.clip(-1, 1)).mean(0)  # (B,)
    scale = 1 / jax.lax.stop_gradient(jnp.abs(q).mean()) if cfg.normalize_q else 1.0
    loss = cfg.alpha * distance - scale * q.mean()
    return loss, {"actor_loss": loss, "distillation_loss": distance, "q_pi": q.mean()}


def descend(loss_fn, learner, *args):
    """One optimiser step on loss_fn(learner.params, *args)."""
    grads, info = jax.grad(loss_fn, has_aux=True)(learner.params, *args)
    return learner.apply_gradients(grads=grads), info


def update(state, batch, key, cfg):
    """Critics, flow and policy, each against the others as they were before; then the target."""
    k_critic, k_flow, k_actor = jax.random.split(key, 3)
    critic, q_info = descend(critic_loss, state.critic, state, batch, k_critic, cfg)
    flow, flow_info = descend(flow_loss, state.flow, state, batch, k_flow)
    actor, pi_info = descend(actor_loss, state.actor, state, batch, k_actor, cfg)
    # the authors' code: towards the critics of before their step
    target = optax.incremental_update(state.critic.params, state.target, cfg.polyak)
    state = state.replace(critic=critic, flow=flow, actor=actor, target=target)
    return state, q_info | flow_info | pi_info


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


def act(state, carry, obs, reward, key, cfg):
    """Actions (E, A) for obs (E, D); carry: the chunk that is carried out, and how far it is."""
    (size,) = state.actor.params["params"][f"Dense_{len(cfg.widths)}"]["bias"].shape
    z = jax.random.normal(key, (len(obs), size))
    chosen = state.actor.apply_fn(state.actor.params, normalise(state, obs), z).clip(-1, 1)
    chunk, age = chosen.reshape(len(obs), cfg.chunk, -1), jnp.int32(0)
    if carry is not None:
        old, age = carry[0], (carry[1] + 1) % cfg.chunk
        chunk = jnp.where(age == 0, chunk, old)
    return chunk[:, age], (chunk, age)


def policy(cfg):
    """`act` as evaluation calls it: (state, carry, obs, reward, key) -> (action, carry)."""
    return partial(act, cfg=cfg)


def check(cfg, dataset):
    """SystemExit where the data have no chunk of that length."""
    if cfg.chunk > (longest := dataset.length.max()):
        why = f"the longest episode of {dataset.name} has {longest:,} steps"
        raise SystemExit(f"--chunk {cfg.chunk}: {why}. Choose a smaller one.")


def action_chunks(dataset, cfg):
    """The chunks that begin at each row, Chunks; rewards shifted."""
    rows, end = dataset.transitions(), np.repeat(dataset.start + dataset.length, dataset.length)
    index, valid = map(np.asarray, datasets.windows(np.arange(len(end)), end, cfg.chunk))
    reward = np.where(valid, rows.reward[index] + np.float32(cfg.shift_reward), 0)
    return Chunks(
        obs=rows.obs,
        action=rows.action[index],
        reward=reward @ np.float32(cfg.gamma ** np.arange(cfg.chunk)),
        next_obs=rows.next_obs[index[:, -1]],
        done=rows.done[index[:, -1]],
        valid=np.float32(valid),
    )


def train(cfg, dataset):
    """Trains `cfg.num_seeds` policies on a Dataset; their State, seeds on axis 0."""
    cfg = experiment.resolve(cfg, TUNED, dataset)
    check(cfg, dataset)
    run = experiment.Run(cfg, dataset)
    data = action_chunks(dataset, cfg)

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
