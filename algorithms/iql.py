"""Implicit Q-Learning (IQL). Kostrikov, Nair, Levine 2021, arXiv:2110.06169.

Learn the value of the best action *in the data* without evaluating Q at any other action: an upper
expectile of Q(s, a) over the data's actions takes the place of max_a Q(s, a).

    L_V(psi)   = E[ |tau - 1(u < 0)| u^2 ],   u = Q_target(s, a) - V(s)          (5)
    L_Q(theta) = E[ (r + gamma V(s') - Q(s, a))^2 ]                              (6)
    L_pi(phi)  = E[ -exp(beta (Q_target(s, a) - V(s))) log pi(a | s) ]           (7)

Run: python algorithms/iql.py --env halfcheetah-medium-v2 --num-seeds 4
     python algorithms/iql.py --num-updates 2000000 --online-steps 1000000   # offline, then online

The authors' code and this file, not the paper: Q_target is the smaller of two target critics, the
exponential is clipped at 100, the policy is updated with the new V. Differs from the authors' code:
- PyTorch's initialisation (orthogonal)
- observations are standardised (raw)
- the data's own next_obs, so rows at time limits count (dropped)
- actions of the data are not clipped (to 1 - 1e-5)
- no dropout on Adroit and Kitchen (0.1)
- rewards of online steps are transformed as those of the data (not scaled)
"""

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

# Values that depend on the dataset, as in the paper; the longest matching name wins.
TUNED = {
    "default": dict(tau=0.7, beta=3.0, scale_reward=True, shift_reward=0.0),
    "antmaze": dict(tau=0.9, beta=10.0, scale_reward=False, shift_reward=-1.0),
    **dict.fromkeys(
        ("pen", "door", "hammer", "relocate", "kitchen"), dict(beta=0.5, scale_reward=False)
    ),
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
    lr: float = 3e-4  # Adam
    polyak: float = 0.005  # step of the target network
    widths: tuple[int, ...] = (256, 256)  # hidden layers of every network
    normalize: bool = True  # standardise observations
    # --- IQL ---
    lr_decay: bool = True  # actor's rate falls to 0 by a cosine until num_updates; not if online
    tau: float | None = None  # expectile, Eq. (5); default 0.7, antmaze 0.9, in (0, 1)
    beta: float | None = None  # inverse temperature, Eq. (7); default 3, antmaze 10, in [0, inf)
    max_weight: float = 100.0  # clip of the exponential in Eq. (7), in (0, inf]
    scale_reward: bool | None = None  # by 1000 / (best - worst return); default on, antmaze off
    shift_reward: float | None = None  # added to every reward; default 0, antmaze -1
    online_steps: int = 0  # one before each of the last updates until num_updates, in [0, inf)


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
    """pi(a | s) = N(tanh f(s), std^2), std independent of s."""

    widths: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, obs):
        mean = jnp.tanh(MLP(self.widths, self.action_dim)(obs))
        log_std = self.param("log_std", nn.initializers.zeros, (self.action_dim,)).clip(-5, 2)
        return distrax.MultivariateNormalDiag(mean, jnp.broadcast_to(jnp.exp(log_std), mean.shape))


class Critic(nn.Module):
    """Q(s, a) of one member; the ensemble is a vmap over parameters."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, obs, action):
        return MLP(self.widths, 1)(jnp.concatenate([obs, action], -1)).squeeze(-1)


class Value(nn.Module):
    """V(s)."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, obs):
        return MLP(self.widths, 1)(obs).squeeze(-1)


@struct.dataclass
class State:
    actor: TrainState
    critic: TrainState  # two members, parameters stacked on axis 0
    value: TrainState
    target: dict  # Polyak average of critic.params
    replay: datasets.Batch  # rows of online steps, in their order
    end: jax.Array  # (online_steps,), 1 at the last row of an episode
    obs_mean: jax.Array  # (D,)
    obs_std: jax.Array  # (D,)


def init(key, data, cfg):
    """Fresh networks and optimisers for one seed; `data`, a Batch, gives sizes and statistics."""
    k_actor, k_critic, k_value = jax.random.split(key, 3)
    obs, action = data.obs[0], data.action[0]
    actor = Actor(cfg.widths, action.shape[-1])
    critic, value = Critic(cfg.widths), Value(cfg.widths)
    q_params = jax.vmap(critic.init, (0, None, None))(jax.random.split(k_critic, 2), obs, action)
    decay = cfg.lr_decay and not cfg.online_steps
    actor_lr = optax.cosine_decay_schedule(cfg.lr, cfg.num_updates) if decay else cfg.lr

    def learner(apply_fn, params, lr):
        return TrainState.create(apply_fn=apply_fn, params=params, tx=optax.adam(lr))

    return State(
        actor=learner(actor.apply, actor.init(k_actor, obs), actor_lr),
        critic=learner(jax.vmap(critic.apply, (0, None, None)), q_params, cfg.lr),
        value=learner(value.apply, value.init(k_value, obs), cfg.lr),
        target=q_params,
        replay=jax.tree.map(lambda x: jnp.zeros((cfg.online_steps, *x.shape[1:])), data),
        end=jnp.zeros(cfg.online_steps),
        obs_mean=data.obs.mean(0) if cfg.normalize else jnp.zeros_like(obs),
        obs_std=data.obs.std(0) + 1e-3 if cfg.normalize else jnp.ones_like(obs),
    )


# A loss is differentiated by its first argument; everything in `state` is a constant.


def advantage(v_params, state, batch):
    """Q_target(s, a) - V(s), shape (B,)."""
    q = state.critic.apply_fn(state.target, batch.obs, batch.action).min(0)
    return q - state.value.apply_fn(v_params, batch.obs)


def value_loss(v_params, state, batch, cfg):
    """Expectile regression of Q_target onto V, Eq. (5)."""
    u = advantage(v_params, state, batch)
    loss = jnp.mean(jnp.abs(cfg.tau - (u < 0)) * u**2)
    return loss, {"value_loss": loss}


def critic_loss(q_params, state, batch, cfg):
    """One-step regression onto r + gamma V(s'), Eq. (6)."""
    v_next = state.value.apply_fn(state.value.params, batch.next_obs)
    target = batch.reward + cfg.gamma * (1 - batch.done) * v_next
    q = state.critic.apply_fn(q_params, batch.obs, batch.action)  # (2, B)
    loss = jnp.mean((q - target) ** 2, 1).sum()
    return loss, {"critic_loss": loss, "q_data": q.mean()}


def actor_loss(pi_params, state, batch, cfg):
    """Imitation weighted by the exponential advantage, Eq. (7)."""
    weight = jnp.exp(cfg.beta * advantage(state.value.params, state, batch))
    weight = weight.clip(max=cfg.max_weight)
    pi = state.actor.apply_fn(pi_params, batch.obs)
    loss = -jnp.mean(weight * pi.log_prob(batch.action))
    return loss, {"actor_loss": loss, "weight": weight.mean()}


def descend(loss_fn, learner, *args):
    """One optimiser step on loss_fn(learner.params, *args)."""
    grads, info = jax.grad(loss_fn, has_aux=True)(learner.params, *args)
    return learner.apply_gradients(grads=grads), info


def update(state, batch, key, cfg):
    """V first; then the policy and Q against the new V; then the target."""
    del key  # IQL samples nothing
    value, v_info = descend(value_loss, state.value, state, batch, cfg)
    state = state.replace(value=value)
    actor, pi_info = descend(actor_loss, state.actor, state, batch, cfg)
    critic, q_info = descend(critic_loss, state.critic, state, batch, cfg)
    target = optax.incremental_update(critic.params, state.target, cfg.polyak)
    return state.replace(actor=actor, critic=critic, target=target), v_info | pi_info | q_info


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


def learn(state, data, key, t, cfg):
    """Online update t, on the data and the rows of the environment so far, all rows alike."""
    known, count = len(data.reward), t - cfg.num_updates + cfg.online_steps
    k_rows, k_update, _ = jax.random.split(jax.random.fold_in(key, t), 3)
    rows = jax.random.randint(k_rows, (cfg.batch_size,), 0, known + count)
    batches = minibatch(state, data, rows), minibatch(state, state.replay, rows - known)
    batch = jax.tree.map(lambda x, y: jax.vmap(jnp.where)(rows < known, x, y), *batches)
    return update(state, batch, k_update, cfg)


def act(state, obs):
    """The policy's mean action for obs (..., D)."""
    return state.actor.apply_fn(state.actor.params, normalise(state, obs)).mode().clip(-1, 1)


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


def train(cfg, dataset):
    """Trains `cfg.num_seeds` policies on a Dataset; their State, seeds on axis 0."""
    cfg = experiment.resolve(cfg, TUNED, dataset)
    check(cfg, dataset)
    run = experiment.Run(cfg, dataset)
    data, scale = dataset.transitions(), dataset.reward_scale() if cfg.scale_reward else 1

    def transform(reward):
        return reward * scale + cfg.shift_reward

    data = data._replace(reward=transform(data.reward))

    keys = jax.vmap(jax.random.key)(cfg.seed + jnp.arange(cfg.num_seeds))
    start = jax.jit(jax.vmap(partial(init, cfg=cfg), (0, None)))
    state = run.restore(start(jax.vmap(jax.random.fold_in, (0, None))(keys, 0), data))
    chunk = jax.vmap(partial(train_chunk, cfg=cfg), (0, None, 0, None))
    chunk = jax.jit(chunk, donate_argnums=0)
    policies = jax.jit(jax.vmap(policy(cfg), (0, 0, 0, 0, None)))
    if cfg.online_steps:
        learner, first = partial(learn, cfg=cfg), cfg.num_updates - cfg.online_steps
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
