"""Ensemble-Diversified Actor-Critic (EDAC) and SAC-N. An, Moon, Kim, Song 2021, arXiv:2110.01548.

Soft actor-critic with N critics, of which the smallest counts. Critics disagree at actions that the
data lacks, so the minimum of many is pessimistic there. EDAC needs fewer of them: it pushes apart
the gradients of Q with respect to the data's actions, so that critics disagree more nearby.

    L_Q  = sum over critics i of E_D[ (y - Q_i(s, a))^2 ]
           + eta E_D[ sum over i != j of cos(grad_a Q_i(s, a), grad_a Q_j(s, a)) / (N - 1) ]
    y    = r + gamma (min_j Q_target_j(s', a') - temperature log pi(a' | s')),   a' ~ pi(. | s')
    L_pi = E[ temperature log pi(a | s) - min_j Q_j(s, a) ],   a ~ pi(. | s)

Run: python algorithms/edac.py --env halfcheetah-medium-v2

`--eta 0` is SAC-N. Its authors then take more critics: 10 on halfcheetah, 20 on walker2d, 500 on
hopper-medium and 200 on the other hopper datasets (`--num-critics`).

Differs from the authors' code:
- PyTorch's initialisation (hidden biases 0.1, last layers within 1e-3 and 3e-3 of 0)
- a learned affine map of log std, floor -20, as in sac.py (no map, floor -5)
- the exact log density of a tanh (1e-6 added inside the logarithm)
- rewards as they are on Adroit (standardised), with CORL's values in TUNED
- the data's own next_obs, so that rows at time limits count (next row's observation)
Otherwise the updates are theirs (benchmarks/parity).
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

# The authors' values for the three robots, CORL's for the rest; the longest matching name wins.
TUNED = {
    "default": dict(num_critics=10, eta=1.0),
    "hopper": dict(num_critics=50),
    "halfcheetah-medium-expert": dict(eta=5.0),
    "walker2d-medium-expert": dict(eta=5.0),
    "maze2d": dict(eta=0.1),
    "pen": dict(num_critics=20, eta=10.0),
    "pen-human": dict(eta=1000.0),
    **dict.fromkeys(("door", "hammer", "relocate"), dict(num_critics=50, eta=200.0)),
}


@dataclass(frozen=True)
class Config:
    env: str = "stillwater/hopper/medium-replay-v0"  # D4RL or Minari name, .hdf5 file; several: A,B
    env_id: str = ""  # Gymnasium id to score on; only for a bare file
    env_module: str = ""  # Python module of yours to import, which registers the environment
    seed: int = 0  # first seed
    num_seeds: int = 1  # seeds trained together under vmap
    num_updates: int = 3_000_000  # gradient steps
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
    widths: tuple[int, ...] = (256, 256, 256)  # hidden layers of every network
    normalize: bool = False  # standardise observations
    # --- EDAC ---
    num_critics: int | None = None  # members N of the ensemble; default 10, hopper 50
    eta: float | None = None  # weight of the similarity; default 1, 0 is SAC-N, in [0, inf)
    backup_entropy: bool = True  # the target counts the entropy of the next action


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
    critic: TrainState  # N members, parameters stacked on axis 0
    temperature: TrainState  # weight of the entropy, SAC's alpha
    target: dict  # Polyak average of critic.params
    obs_mean: jax.Array  # (D,)
    obs_std: jax.Array  # (D,)


def init(key, data, cfg):
    """Fresh networks and optimisers for one seed; `data`, a Batch, gives sizes and statistics."""
    k_actor, k_critic = jax.random.split(key)
    obs, action = data.obs[0], data.action[0]
    actor, critic = Actor(cfg.widths, action.shape[-1]), Critic(cfg.widths)
    temperature = Positive(1.0)
    k_members = jax.random.split(k_critic, cfg.num_critics)
    q_params = jax.vmap(critic.init, (0, None, None))(k_members, obs, action)

    def learner(apply_fn, params, lr):
        return TrainState.create(apply_fn=apply_fn, params=params, tx=optax.adam(lr))

    return State(
        actor=learner(actor.apply, actor.init(k_actor, obs), cfg.actor_lr),
        critic=learner(jax.vmap(critic.apply, (0, None, None)), q_params, cfg.critic_lr),
        temperature=learner(temperature.apply, temperature.init(key), cfg.actor_lr),
        target=q_params,
        obs_mean=data.obs.mean(0) if cfg.normalize else jnp.zeros_like(obs),
        obs_std=data.obs.std(0) + 1e-3 if cfg.normalize else jnp.ones_like(obs),
    )


# A loss is differentiated by its first argument; everything in `state` is a constant.


def soft_backup(state, batch, key, cfg):
    """r + gamma (Q_target(s', a') - temperature log pi(a' | s')), a' ~ pi(. | s'); shape (B,)."""
    pi = state.actor.apply_fn(state.actor.params, batch.next_obs)
    action, log_pi = pi.sample_and_log_prob(seed=key)
    next_q = state.critic.apply_fn(state.target, batch.next_obs, action).min(0)  # (B,)
    if cfg.backup_entropy:
        next_q -= state.temperature.apply_fn(state.temperature.params) * log_pi
    return batch.reward + cfg.gamma * (1 - batch.done) * next_q


def ensemble_similarity(q_params, batch, cfg):
    """sum over i != j of cos(grad_a Q_i(s, a), grad_a Q_j(s, a)) / (N - 1), the mean over rows.

    With unit gradients g_i the sum is |sum g_i|^2 - sum |g_i|^2, without N^2 products.
    """

    def total(params, action):
        return Critic(cfg.widths).apply(params, batch.obs, action).sum()

    slope = jax.vmap(jax.grad(total, 1), (0, None))(q_params, batch.action)  # (N, B, A)
    slope /= optax.safe_norm(slope, 1e-10, axis=-1, keepdims=True)
    cosines = jnp.sum(slope.sum(0) ** 2 - (slope**2).sum(0), -1)  # (B,)
    return cosines.mean() / (cfg.num_critics - 1)


def critic_loss(q_params, state, batch, key, cfg):
    """Temporal difference of all critics, and the similarity of their gradients, L_Q."""
    k_backup, _ = jax.random.split(key)  # CQL draws the actions of its penalty from the second
    target = soft_backup(state, batch, k_backup, cfg)
    q_data = state.critic.apply_fn(q_params, batch.obs, batch.action)  # (N, B)
    td = jnp.mean((q_data - target) ** 2, 1).sum()
    similarity = ensemble_similarity(q_params, batch, cfg) if cfg.eta else 0.0
    loss = td + cfg.eta * similarity
    info = {"critic_loss": loss, "td_loss": td, "similarity": similarity, "q_data": q_data.mean()}
    return loss, info


def actor_loss(pi_params, state, batch, key):
    """Soft actor-critic's policy: E[temperature log pi(a | s) - Q(s, a)]."""
    pi = state.actor.apply_fn(pi_params, batch.obs)
    action, log_pi = pi.sample_and_log_prob(seed=key)
    q = state.critic.apply_fn(state.critic.params, batch.obs, action)  # (N, B)
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


def check(cfg, dataset):
    """SystemExit if there is no second critic to differ from."""
    if cfg.eta and cfg.num_critics < 2:
        raise SystemExit(f"--num-critics {cfg.num_critics}: must be at least 2, or --eta 0.")


def train(cfg, dataset):
    """Trains `cfg.num_seeds` policies on a Dataset; their State, seeds on axis 0."""
    cfg = experiment.resolve(cfg, TUNED, dataset)
    check(cfg, dataset)
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
