"""Calibrated Q-Learning (Cal-QL). Nakamoto, Zhai, Singh et al. 2023, arXiv:2303.05479.

CQL for a policy that will go online. CQL's Q may lie far below every true value, and then the first
good action found online is unlearned at once. So Q at the policy's actions is pushed down only as
far as the value of the policy that recorded the data, which the data's own returns estimate.

    min_Q  alpha (E_s[log sum_a exp max(Q(s, a), G(s))] - E_s,a~D[Q(s, a)])  +  TD(Q)
    TD(Q)  = E[ (r + gamma max_a' Q_target(s', a') - Q(s, a))^2 ],  a' of 10 samples of pi(. | s')
    G_t    = r_t + gamma G_t+1, the return-to-go; G = -inf: CQL

Run: python algorithms/cal_ql.py --env antmaze-medium-diverse-v2
     python algorithms/cal_ql.py --num-updates 2000000 --online-steps 1000000   # both phases

The sum runs over uniform actions and samples of pi(. | s) and pi(. | s'), weighted by 1 / density;
the maximum is taken at the samples of pi alone. Online, the penalty and its calibration stay, and
half of each batch is data. `--no-calibrate` is CQL that goes online as it is.

After the last row G is 0. In an episode that a time limit ends, with one and the same reward in
every row (a maze whose goal was not reached), G is r / (1 - gamma), as in the authors' code. Where
other rewards are negative, G is too high shortly before a time limit.
Settings are those of the authors' code for AntMaze; it has no locomotion. Differs from it
(github.com/nakamotoo/Cal-QL):
- PyTorch's initialisation (orthogonal)
- an update follows every step of the environment (as many updates after each episode as it had
  steps)
- rows of an unfinished episode, whose G is unknown, are not drawn; until the first episode has
  ended, the whole batch is data
- actions of the data are not clipped (to 0.99999)
- the data's own next_obs, so rows at time limits count (dropped)
"""

import math
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
    "default": dict(scale_reward=1.0, shift_reward=0.0),
    "antmaze": dict(lagrange=0.8, scale_reward=10.0, shift_reward=-5.0),
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
    actor_lr: float = 1e-4  # Adam, the policy's and the temperature's
    critic_lr: float = 3e-4  # Adam, the critics'
    polyak: float = 0.005  # step of the target network
    widths: tuple[int, ...] = (256, 256)  # hidden layers of the policy
    normalize: bool = False  # standardise observations
    # --- Cal-QL ---
    critic_widths: tuple[int, ...] = (256, 256, 256, 256)  # hidden layers of the critics
    alpha: float = 5.0  # weight of the penalty
    num_actions: int = 10  # sampled actions of each of the three kinds
    calibrate: bool = True  # push Q down to the return-to-go only
    lagrange: float | None = None  # gap that alpha is tuned for; default: alpha is fixed
    max_backup: bool = True  # the target takes the best of num_actions next actions
    scale_reward: float | None = None  # rewards times this; default 1, antmaze 10
    shift_reward: float | None = None  # added afterwards; default 0, antmaze -5
    online_steps: int = 0  # one before each of the last updates until num_updates, in [0, inf)
    data_share: float = 0.5  # of an online batch, in [0, 1]


class Labelled(NamedTuple):
    """N transitions of a Batch with their returns-to-go."""

    obs: jax.Array  # (N, D)
    action: jax.Array  # (N, A)
    reward: jax.Array  # (N,)
    next_obs: jax.Array  # (N, D)
    done: jax.Array  # (N,)
    to_go: jax.Array  # (N,)


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
    replay: datasets.Batch  # rows of online steps, in their order
    end: jax.Array  # (online_steps,), 1 at the last row of an episode
    to_go: jax.Array  # (online_steps,), returns-to-go of the rows of ended episodes
    ready: jax.Array  # number of those rows
    obs_mean: jax.Array  # (D,)
    obs_std: jax.Array  # (D,)


def init(key, data, cfg):
    """Fresh networks and optimisers for one seed; `data` gives sizes and statistics."""
    k_actor, k_critic = jax.random.split(key)
    obs, action = data.obs[0], data.action[0]
    actor, critic = Actor(cfg.widths, action.shape[-1]), Critic(cfg.critic_widths)
    temperature, multiplier = Positive(1.0), Positive(math.e)
    q_params = jax.vmap(critic.init, (0, None, None))(jax.random.split(k_critic, 2), obs, action)

    def learner(apply_fn, params, lr):
        return TrainState.create(apply_fn=apply_fn, params=params, tx=optax.adam(lr))

    def rows(x):
        return jnp.zeros((cfg.online_steps, *x.shape[1:]))

    return State(
        actor=learner(actor.apply, actor.init(k_actor, obs), cfg.actor_lr),
        critic=learner(jax.vmap(critic.apply, (0, None, None)), q_params, cfg.critic_lr),
        temperature=learner(temperature.apply, temperature.init(key), cfg.actor_lr),
        multiplier=learner(multiplier.apply, multiplier.init(key), cfg.critic_lr),
        target=q_params,
        replay=jax.tree.map(rows, datasets.Batch(*data[:5])),
        end=jnp.zeros(cfg.online_steps),
        to_go=jnp.zeros(cfg.online_steps),
        ready=jnp.int32(0),
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


def calibrated(q, to_go, cfg):
    """Q (2, 3 N, B) of proposed actions; at those of the policy no lower than G (B,)."""
    uniform, own = q[:, : cfg.num_actions], q[:, cfg.num_actions :]
    return jnp.concatenate([uniform, jnp.maximum(own, to_go)], 1)


def critic_loss(q_params, state, batch, key, cfg):
    """Temporal difference and calibrated conservative penalty of both critics."""
    k_backup, k_propose = jax.random.split(key)
    target = backup(state, batch, k_backup, cfg)
    action, log_density = propose(state, batch, k_propose, cfg)
    obs = jnp.broadcast_to(batch.obs, (*action.shape[:-1], batch.obs.shape[-1]))
    q_data = state.critic.apply_fn(q_params, batch.obs, batch.action)  # (2, B)
    q_other = state.critic.apply_fn(q_params, obs, action)  # (2, 3 N, B)
    below = jnp.mean(q_other[:, cfg.num_actions :] < batch.to_go)
    if cfg.calibrate:
        q_other = calibrated(q_other, batch.to_go, cfg)
    td = jnp.mean((q_data - target) ** 2, 1)  # (2,)
    gap = jnp.mean(jax.nn.logsumexp(q_other - log_density, 1) - q_data, 1)  # (2,)
    multiplier = 1.0 if cfg.lagrange is None else state.multiplier.apply_fn(state.multiplier.params)
    loss = jnp.sum(td + cfg.alpha * multiplier * gap)
    info = {"critic_loss": loss, "td_loss": td.sum(), "gap": gap.mean(), "q_data": q_data.mean()}
    return loss, info | {"below": below}


def multiplier_loss(params, state, gap, cfg):
    """Dual ascent: the penalty grows while the gap is above `lagrange`, as in CQL."""
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


def explore(state, obs, key, t):
    """A sample of the policy for obs (D,), before online update t."""
    pi = state.actor.apply_fn(state.actor.params, normalise(state, obs))
    return pi.sample(seed=jax.random.split(jax.random.fold_in(key, t), 3)[2]).clip(-1, 1)


def close_episode(state, at, limit, cfg):
    """Returns-to-go of the episode that ends in row `at` of the replay buffer, if one does.

    limit: steps that an episode can have.
    """
    rows = at - jnp.arange(limit)  # the newest first
    ended = state.end[at] == 1
    inside = ended & (rows >= 0) & (jnp.cumsum(state.end[rows.clip(0)]) == 1)
    reward = jnp.where(inside, state.replay.reward[rows.clip(0)], 0)

    def compose(newer, older):
        return newer[0] * older[0], older[1] + older[0] * newer[1]

    _, to_go = jax.lax.associative_scan(compose, (jnp.full(limit, cfg.gamma), reward))
    stuck = jnp.all(~inside | (reward == reward[0])) & (state.replay.done[at] == 0)
    to_go = jnp.where(stuck, reward[0] / (1 - cfg.gamma), to_go)
    to_go = state.to_go.at[jnp.where(inside, rows, len(state.to_go))].set(to_go, mode="drop")
    return state.replace(to_go=to_go, ready=jnp.where(ended, at + 1, state.ready))


def learn(state, data, key, t, limit, cfg):
    """Online update t: `data_share` of its batch from the data, the rest from ended episodes."""
    state = close_episode(state, t - 1 - cfg.num_updates + cfg.online_steps, limit, cfg)
    k_rows, k_update, _ = jax.random.split(jax.random.fold_in(key, t), 3)
    k_known, k_new = jax.random.split(k_rows)
    shape = (cfg.batch_size,)
    known = jax.random.randint(k_known, shape, 0, len(data.reward))
    new = jax.random.randint(k_new, shape, 0, jnp.maximum(state.ready, 1))
    replay = Labelled(*state.replay, state.to_go)
    batches = minibatch(state, data, known), minibatch(state, replay, new)
    is_known = (jnp.arange(*shape) < round(cfg.data_share * cfg.batch_size)) | (state.ready == 0)
    batch = jax.tree.map(lambda x, y: jax.vmap(jnp.where)(is_known, x, y), *batches)
    return update(state, batch, k_update, cfg)


def act(state, obs):
    """The policy's median action for obs (..., D)."""
    return state.actor.apply_fn(state.actor.params, normalise(state, obs)).mode()


def policy(cfg):
    """`act` as evaluation calls it: (state, carry, obs, reward, key) -> (action, carry)."""
    return evaluation.stateless(act)


def check(cfg, dataset):
    """SystemExit where updates on data alone do not fill whole chunks."""
    if cfg.online_steps > cfg.num_updates or cfg.online_steps % cfg.log_every:
        rule = f"must be a multiple of --log-every {cfg.log_every}, at most --num-updates"
        raise SystemExit(f"--online-steps {cfg.online_steps}: {rule} {cfg.num_updates}.")
    if cfg.online_steps and not dataset.env_id:
        raise SystemExit(f"--online-steps: {dataset.name} has no environment; see --env-id.")
    if cfg.gamma == 1:
        raise SystemExit("--gamma 1: must be below 1, a failed episode is worth r / (1 - gamma).")


def returns_to_go(dataset, reward, gamma):
    """G (N,) of the data's rows with these rewards (N,), as `close_episode` does it."""
    to_go = replace(dataset, reward=reward).steps(gamma).returns_to_go
    low, high = (f.reduceat(reward, dataset.start) for f in (np.minimum, np.maximum))
    last = dataset.start + dataset.length - 1
    stuck = np.repeat((low == high) & (dataset.done[last] == 0), dataset.length)
    return np.where(stuck, reward / np.float32(1 - gamma), to_go)


def train(cfg, dataset):
    """Trains `cfg.num_seeds` policies on a Dataset; their State, seeds on axis 0."""
    cfg = experiment.resolve(cfg, TUNED, dataset)
    check(cfg, dataset)
    run = experiment.Run(cfg, dataset)

    def transform(reward):
        return reward * cfg.scale_reward + cfg.shift_reward

    data = dataset.transitions()
    data = data._replace(reward=transform(data.reward))
    data = Labelled(*data, returns_to_go(dataset, data.reward, cfg.gamma))

    keys = jax.vmap(jax.random.key)(cfg.seed + jnp.arange(cfg.num_seeds))
    start = jax.jit(jax.vmap(partial(init, cfg=cfg), (0, None)))
    state = run.restore(start(jax.vmap(jax.random.fold_in, (0, None))(keys, 0), data))
    chunk = jax.vmap(partial(train_chunk, cfg=cfg), (0, None, 0, None))
    chunk = jax.jit(chunk, donate_argnums=0)
    policies = jax.jit(jax.vmap(policy(cfg), (0, 0, 0, 0, None)))
    if cfg.online_steps:
        limit, first = evaluation.inspect(dataset.env_id).limit, cfg.num_updates - cfg.online_steps
        learner = partial(learn, limit=limit, cfg=cfg)
        chunk = evaluation.alternate(chunk, explore, learner, transform, dataset.env_id, cfg, first)

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
