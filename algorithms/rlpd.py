"""RL with prior data (RLPD). Ball, Smith, Kostrikov, Levine 2023, arXiv:2302.02948.

Soft actor-critic online from the start, with nothing learned beforehand: half of every batch comes
from the data, half from the replay buffer. Layer normalisation keeps Q from growing beyond the
data, an ensemble of ten critics and 20 updates of Q for each step learn fast from few steps.

    L_Q(theta_i) = E[ (y - Q_i(s, a))^2 ]
    y            = r + gamma (min_{j in Z} Q_target_j(s', a') - alpha log pi(a' | s')),  a' ~ pi
    L_pi(phi)    = E[ alpha log pi(a | s) - mean_i Q_i(s, a) ],   a ~ pi(. | s)
    L_alpha      = alpha (entropy of pi + A / 2),   A action dimensions

Z are `min_critics` critics, drawn anew for each update of Q.

Run: python algorithms/rlpd.py --env halfcheetah-medium-v2 --num-seeds 4

It is no offline method: each update follows a step of the environment, and its scores compare with
those of other files only after their online steps. An update is `utd` updates of Q on minibatches
of their own, each followed by its targets, then one of the policy and of alpha on the last one.
The first `random_steps` actions are random, and nothing is learned meanwhile. The authors' three
layers for AntMaze and Adroit: --widths 256 256 256. Differs from the authors' code
(github.com/ikostrikov/rlpd):
- PyTorch's initialisation (Xavier)
- half of the rows of a minibatch come first (rows of both halves alternate)
- rows at time limits of the data count (dropped)
- actions of the data are not clipped (to 1 - 1e-5)
"""

import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

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
    "default": dict(min_critics=2, backup_entropy=True, shift_reward=0.0),
    "antmaze": dict(min_critics=1, backup_entropy=False, shift_reward=-1.0),
    **dict.fromkeys(("pen", "door", "relocate"), dict(backup_entropy=False)),
}


@dataclass(frozen=True)
class Config:
    env: str = "stillwater/hopper/medium-replay-v0"  # D4RL or Minari name, .hdf5 file; several: A,B
    env_id: str = ""  # Gymnasium id to score on; only for a bare file
    env_module: str = ""  # Python module of yours to import, which registers the environment
    seed: int = 0  # first seed
    num_seeds: int = 1  # seeds trained together under vmap
    num_updates: int = 250_000  # gradient steps
    log_every: int = 1_000  # gradient steps of a compiled chunk and between rows of metrics.csv
    eval_every: int = 5_000  # gradient steps between evaluations
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
    # --- RLPD ---
    utd: int = 20  # updates of Q in one update, each on a minibatch of its own
    num_critics: int = 10  # members of the ensemble
    min_critics: int | None = None  # how many y takes the smallest of; default 2, antmaze 1
    backup_entropy: bool | None = None  # in y; default on, mazes and adroit off
    shift_reward: float | None = None  # added to every reward; default 0, antmaze -1
    random_steps: int = 5_000  # before the first step with an update; these go on until num_updates
    pretrain_updates: int = 0  # first updates, on data alone, in [0, inf)


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


class NormedMLP(nn.Module):
    """An MLP with layer normalisation before each ReLU."""

    widths: tuple[int, ...]
    out: int

    @nn.compact
    def __call__(self, x):
        for width in self.widths:
            x = nn.relu(nn.LayerNorm()(Dense(width)(x)))
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
    """pi(a | s), a tanh-squashed Gaussian with log std between -20 and 2."""

    widths: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, obs):
        mean, log_std = jnp.split(MLP(self.widths, 2 * self.action_dim)(obs), 2, -1)
        return TanhNormal(mean, jnp.exp(log_std.clip(-20, 2)))


class Critic(nn.Module):
    """Q(s, a) of one member; the ensemble is a vmap over parameters."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, obs, action):
        return NormedMLP(self.widths, 1)(jnp.concatenate([obs, action], -1)).squeeze(-1)


class Positive(nn.Module):
    """One learned positive number: a temperature or a multiplier."""

    start: float

    @nn.compact
    def __call__(self):
        return jnp.exp(self.param("log", nn.initializers.constant(math.log(self.start)), ()))


@struct.dataclass
class State:
    actor: TrainState
    critic: TrainState  # num_critics members, parameters stacked on axis 0
    temperature: TrainState  # weight of the entropy, alpha
    target: dict  # Polyak average of critic.params
    replay: datasets.Batch  # rows of the environment, in their order
    end: jax.Array  # (rows,), 1 at the last row of an episode
    obs_mean: jax.Array  # (D,)
    obs_std: jax.Array  # (D,)


def init(key, data, cfg):
    """Fresh networks and optimisers for one seed; `data`, a Batch, gives sizes and statistics."""
    k_actor, k_critic = jax.random.split(key)
    obs, action = data.obs[0], data.action[0]
    actor, critic = Actor(cfg.widths, action.shape[-1]), Critic(cfg.widths)
    temperature, k_members = Positive(1.0), jax.random.split(k_critic, cfg.num_critics)
    q_params = jax.vmap(critic.init, (0, None, None))(k_members, obs, action)
    steps = cfg.num_updates - cfg.pretrain_updates
    steps += cfg.random_steps if steps else 0

    def learner(apply_fn, params, lr):
        return TrainState.create(apply_fn=apply_fn, params=params, tx=optax.adam(lr))

    return State(
        actor=learner(actor.apply, actor.init(k_actor, obs), cfg.actor_lr),
        critic=learner(jax.vmap(critic.apply, (0, None, None)), q_params, cfg.critic_lr),
        temperature=learner(temperature.apply, temperature.init(key), cfg.actor_lr),
        target=q_params,
        replay=jax.tree.map(lambda x: jnp.zeros((steps, *x.shape[1:])), data),
        end=jnp.zeros(steps),
        obs_mean=data.obs.mean(0) if cfg.normalize else jnp.zeros_like(obs),
        obs_std=data.obs.std(0) + 1e-3 if cfg.normalize else jnp.ones_like(obs),
    )


# A loss is differentiated by its first argument; everything in `state` is a constant.


def subset_backup(state, batch, key, cfg):
    """y (B,): the smallest of `min_critics` random targets, less the entropy's price."""
    k_pi, k_members = jax.random.split(key)
    pi = state.actor.apply_fn(state.actor.params, batch.next_obs)
    action, log_pi = pi.sample_and_log_prob(seed=k_pi)
    members = jax.random.choice(k_members, cfg.num_critics, (cfg.min_critics,), replace=False)
    params = jax.tree.map(lambda x: x[members], state.target)
    next_q = state.critic.apply_fn(params, batch.next_obs, action).min(0)
    if cfg.backup_entropy:
        next_q -= state.temperature.apply_fn(state.temperature.params) * log_pi
    return batch.reward + cfg.gamma * (1 - batch.done) * next_q


def critic_loss(q_params, state, batch, key, cfg):
    """Temporal difference, the mean over all critics."""
    target = subset_backup(state, batch, key, cfg)
    q_data = state.critic.apply_fn(q_params, batch.obs, batch.action)  # (N, B)
    loss = jnp.mean((q_data - target) ** 2)
    return loss, {"critic_loss": loss, "q_data": q_data.mean()}


def actor_loss(pi_params, state, batch, key):
    """L_pi, with the mean of all critics."""
    pi = state.actor.apply_fn(pi_params, batch.obs)
    action, log_pi = pi.sample_and_log_prob(seed=key)
    q = state.critic.apply_fn(state.critic.params, batch.obs, action)  # (N, B)
    temperature = state.temperature.apply_fn(state.temperature.params)
    loss = jnp.mean(temperature * log_pi - q.mean(0))
    return loss, {"actor_loss": loss, "entropy": -log_pi.mean(), "q_pi": q.mean()}


def temperature_loss(params, state, entropy, target_entropy):
    """L_alpha; descending it raises alpha while the policy's entropy is below the target."""
    temperature = state.temperature.apply_fn(params)
    return temperature * (entropy - target_entropy), {"temperature": temperature}


def descend(loss_fn, learner, *args):
    """One optimiser step on loss_fn(learner.params, *args)."""
    grads, info = jax.grad(loss_fn, has_aux=True)(learner.params, *args)
    return learner.apply_gradients(grads=grads), info


def critic_step(state, batch, key, cfg):
    """One update of all critics, then of their targets."""
    critic, info = descend(critic_loss, state.critic, state, batch, key, cfg)
    target = optax.incremental_update(critic.params, state.target, cfg.polyak)
    return state.replace(critic=critic, target=target), info


def update(state, batches, key, cfg):
    """The critics on each of `batches` (utd, B, ...), then policy and alpha on the last of them."""
    k_critic, k_actor = jax.random.split(key)

    def one(state, x):
        return critic_step(state, *x, cfg)

    state, q_info = jax.lax.scan(one, state, (batches, jax.random.split(k_critic, cfg.utd)))
    batch, q_info = jax.tree.map(lambda x: x[-1], batches), jax.tree.map(jnp.mean, q_info)
    actor, pi_info = descend(actor_loss, state.actor, state, batch, k_actor)
    entropy, target_entropy = pi_info["entropy"], -batch.action.shape[-1] / 2
    temperature, t_info = descend(
        temperature_loss, state.temperature, state, entropy, target_entropy
    )
    return state.replace(actor=actor, temperature=temperature), pi_info | t_info | q_info


def normalise(state, obs):
    """Observations (..., D) as the networks see them."""
    return (obs - state.obs_mean) / state.obs_std


def minibatch(state, data, rows):
    """Those rows of a Batch, observations normalised."""
    batch = jax.tree.map(lambda x: x[rows], data)
    obs, next_obs = normalise(state, batch.obs), normalise(state, batch.next_obs)
    return batch._replace(obs=obs, next_obs=next_obs)


def train_chunk(state, data, key, step, cfg):
    """The `log_every` updates up to update `step`, on data alone, a Batch of N rows.

    Metrics averaged. Update t draws from fold_in(key, t): a run does not depend on how it is cut
    into chunks.
    """

    def one(state, t):
        k_rows, k_update = jax.random.split(jax.random.fold_in(key, t))
        rows = jax.random.randint(k_rows, (cfg.utd, cfg.batch_size), 0, len(data.reward))
        return update(state, minibatch(state, data, rows), k_update, cfg)

    state, metrics = jax.lax.scan(one, state, step - jnp.arange(cfg.log_every)[::-1])
    return state, jax.tree.map(jnp.mean, metrics)


def explore(state, obs, key, t):
    """A sample of the policy for obs (D,), before online update t."""
    pi = state.actor.apply_fn(state.actor.params, normalise(state, obs))
    return pi.sample(seed=jax.random.split(jax.random.fold_in(key, t), 3)[2]).clip(-1, 1)


def explore_first(state, obs, key, t, cfg):
    """`explore`, but a uniform action until online updates begin."""
    action = explore(state, obs, key, t)
    k = jax.random.split(jax.random.fold_in(key, t), 3)[1]
    uniform = jax.random.uniform(k, action.shape, minval=-1, maxval=1)
    return jnp.where(t > cfg.pretrain_updates, action, uniform)


def learn(state, data, key, t, cfg):
    """Online update t: half of each minibatch from the data, half from the environment so far."""
    k_rows, k_update, _ = jax.random.split(jax.random.fold_in(key, t), 3)
    k_known, k_new = jax.random.split(k_rows)
    shape, count = (cfg.utd, cfg.batch_size // 2), t - cfg.pretrain_updates + cfg.random_steps
    known = minibatch(state, data, jax.random.randint(k_known, shape, 0, len(data.reward)))
    new = minibatch(state, state.replay, jax.random.randint(k_new, shape, 0, count))
    batches = jax.tree.map(lambda x, y: jnp.concatenate([x, y], 1), known, new)
    return update(state, batches, k_update, cfg)


def act(state, obs):
    """The policy's median action for obs (..., D)."""
    return state.actor.apply_fn(state.actor.params, normalise(state, obs)).mode()


def policy(cfg):
    """`act` as evaluation calls it: (state, carry, obs, reward, key) -> (action, carry)."""
    return evaluation.stateless(act)


def check(cfg, dataset):
    """SystemExit for settings that contradict each other, and without an environment."""
    if cfg.pretrain_updates > cfg.num_updates or cfg.pretrain_updates % cfg.log_every:
        rule = f"must be a multiple of --log-every {cfg.log_every}, at most --num-updates"
        raise SystemExit(f"--pretrain-updates {cfg.pretrain_updates}: {rule} {cfg.num_updates}.")
    if cfg.batch_size % 2:
        raise SystemExit(f"--batch-size {cfg.batch_size}: must be even, half of it is data.")
    if cfg.min_critics > cfg.num_critics:
        most = f"must be at most --num-critics {cfg.num_critics}"
        raise SystemExit(f"--min-critics {cfg.min_critics}: {most}.")
    if not dataset.env_id:
        raise SystemExit(f"{dataset.name} has no environment to learn in; name one with --env-id.")


def train(cfg, dataset):
    """Trains `cfg.num_seeds` policies on a Dataset; their State, seeds on axis 0."""
    cfg = experiment.resolve(cfg, TUNED, dataset)
    check(cfg, dataset)
    run = experiment.Run(cfg, dataset)

    def transform(reward):
        return reward + cfg.shift_reward

    data = dataset.transitions()
    data = data._replace(reward=transform(data.reward))

    keys = jax.vmap(jax.random.key)(cfg.seed + jnp.arange(cfg.num_seeds))
    start = jax.jit(jax.vmap(partial(init, cfg=cfg), (0, None)))
    state = run.restore(start(jax.vmap(jax.random.fold_in, (0, None))(keys, 0), data))
    chunk = jax.vmap(partial(train_chunk, cfg=cfg), (0, None, 0, None))
    chunk = jax.jit(chunk, donate_argnums=0)
    policies = jax.jit(jax.vmap(policy(cfg), (0, 0, 0, 0, None)))
    if cfg.pretrain_updates < cfg.num_updates:
        actor, learner = partial(explore_first, cfg=cfg), partial(learn, cfg=cfg)
        where = dataset.env_id, cfg, cfg.pretrain_updates, cfg.random_steps
        chunk = evaluation.alternate(chunk, actor, learner, transform, *where)

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
