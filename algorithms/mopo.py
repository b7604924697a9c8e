"""Model-based Offline Policy Optimization (MOPO). Yu et al. 2020, arXiv:2005.13239.

Roll the policy out in a learned model and learn from real and imagined steps by soft actor-critic.
The policy would seek out the states where the model errs in its favour, so that each imagined
reward pays for the model's uncertainty u(s, a). If u bounds the model's error, the return with this
penalty is a lower bound of the true return, and a policy may leave the data as far as that pays.

    r~(s, a) = r(s, a) - penalty_scale u(s, a)          (Algorithm 1)
    u(s, a)  = max_i || std_i(s, a) ||                  (Section 4.3)

    Model: an ensemble of N(mean_i(s, a), std_i(s, a)^2) for (s' - s, r), by maximum likelihood.
    Policy: soft actor-critic on a fraction f of the data's steps and 1 - f of the model's.

`--penalty-scale 0` is MBPO (Janner et al. 2019, arXiv:1906.08253) on a fixed dataset: nothing keeps
its policy from the model's errors. The idea is in `uncertainty` and `rollout`.

Run: python algorithms/mopo.py --env halfcheetah-medium-v2
On a CPU: --num-updates 100000 --eval-every 5000 --max-epochs 100; 64.6 [32.0, 87.2] over three
seeds on the bundled hopper data (mean 11.1, MBPO 42.5)

`--uncertainty` chooses u: `std`, the largest norm of a member's std over s' and r (the authors');
`disagreement`, the largest distance of a member's mean s' from the members' mean; `spread`, the
std of the members' means of s', its root mean square over the state's entries. All members count,
not the elites alone, and the data's own steps are not penalised. A learned std tells how noisy the
data are; where data end, the other two grow far more (benchmarks/README.md, Claims).

Updates are those of the authors' code (github.com/tianheyu927/mopo): policy, temperature and
critics each against the others as they were. Settings are those of the trusted port, OfflineRL-Kit
(github.com/yihaosun1124/OfflineRL-Kit), which has scores on D4RL v2. Differs from the port:
- policy, temperature and critics learn from each other's last parameters (critics come first)
- the temperature has no upper bound (1)
- the policy's rate falls with each update (with each 1,000th)
- log std has CQL's learned affine map and a floor of -20 (none, -5)
- rollouts stop at states farther out than the data's range is wide (where a value exceeds 100)
- Dynamics as in combo.py, whose docstring lists what differs there
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

# Values that depend on the dataset, as in the port; the longest matching name wins.
TUNED = {
    "default": dict(horizon=5, penalty_scale=2.5),
    "halfcheetah-medium": dict(horizon=5, penalty_scale=0.5),
    "halfcheetah-medium-replay": dict(horizon=5, penalty_scale=0.5),
    "halfcheetah-medium-expert": dict(horizon=5, penalty_scale=2.5),
    "hopper-medium": dict(horizon=5, penalty_scale=5.0),
    "hopper-medium-replay": dict(horizon=5, penalty_scale=2.5),
    "hopper-medium-expert": dict(horizon=5, penalty_scale=5.0),
    "walker2d-medium": dict(horizon=5, penalty_scale=0.5),
    "walker2d-medium-replay": dict(horizon=1, penalty_scale=2.5),
    "walker2d-medium-expert": dict(horizon=1, penalty_scale=2.5),
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
    actor_lr: float = 1e-4  # Adam; the policy's by a cosine to 0 until num_updates
    critic_lr: float = 3e-4  # Adam, the critics'
    polyak: float = 0.005  # step of the target network
    widths: tuple[int, ...] = (256, 256)  # hidden layers of policy and critics
    normalize: bool = False  # standardise observations
    # --- MOPO ---
    penalty_scale: float | None = None  # weight of u; default 2.5, see TUNED, 0: MBPO, in [0, inf)
    uncertainty: Literal["std", "disagreement", "spread"] = "std"  # u(s, a), see above
    backup_entropy: bool = True  # the target counts the entropy of the next action
    real_fraction: float = 0.05  # f, the data's share of a minibatch, in (0, 1)
    horizon: int | None = None  # steps of a model rollout; default 5, see TUNED
    rollout_every: int = 1_000  # gradient steps between rollouts
    rollout_batch: int = 50_000  # states of the data from which a rollout starts
    retain: int = 5  # rollouts that the replay buffer holds
    termination: bool = True  # rollouts stop at the environment's terminal states
    save_every: int = 20_000  # gradient steps between checkpoints, which hold the replay buffer
    # --- Dynamics ---
    model_widths: tuple[int, ...] = (200, 200, 200, 200)  # hidden layers of a member
    model_decay: tuple[float, ...] = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)  # weight decay by layer
    model_lr: float = 1e-3  # Adam
    num_members: int = 7  # trained networks
    num_elites: int = 5  # networks used in rollouts, the best on the holdout
    patience: int = 5  # epochs without a gain of 1 % by any member, after which training ends
    max_epochs: int = 1_000  # limit of training


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


# --- Dynamics ---


class Gaussian(nn.Module):
    """One member: mean and log-variance of (s' - s, r) for a standardised (s, a)."""

    widths: tuple[int, ...]
    out: int

    @nn.compact
    def __call__(self, x):
        for width in self.widths:
            x = nn.swish(Dense(width)(x))
        mean, logvar = jnp.split(Dense(2 * self.out)(x), 2, -1)
        upper = self.param("upper", nn.initializers.constant(0.5), (self.out,))
        lower = self.param("lower", nn.initializers.constant(-10.0), (self.out,))
        logvar = upper - nn.softplus(upper - logvar)
        return mean, lower + nn.softplus(logvar - lower)


@struct.dataclass
class Dynamics:
    params: dict  # of Gaussian, members stacked on axis 0; once trained, the best first
    mean: jax.Array  # (D + A,) of the inputs
    std: jax.Array  # (D + A,), inf for columns that carry nothing


@struct.dataclass
class Fit:
    """A model in training, with M members."""

    model: TrainState
    dynamics: Dynamics  # each member as it was at its lowest holdout error
    error: jax.Array  # (M,) that error
    stale: jax.Array  # epochs since any member last gained
    bootstrap: jax.Array  # (M, N) each member's rows of the data, drawn with replacement
    holdout: jax.Array  # (H,) rows kept for validation


def known_rows(data):
    """(N,) bool: the rows of a Batch whose next_obs is known, see datasets.Batch."""
    return (data.done == 0) | (data.next_obs != data.obs).any(-1)


def model_pairs(data, rows):
    """Inputs (s, a) and targets (s' - s, r) at those rows of a Batch."""
    obs, action, reward, next_obs, _ = jax.tree.map(lambda x: x[rows], data)
    inputs = jnp.concatenate([obs, action], -1)
    return inputs, jnp.concatenate([next_obs - obs, reward[..., None]], -1)


def init_fit(key, data, cfg):
    """A fresh ensemble for one seed, and the rows that each member learns from."""
    k_params, k_holdout, k_bootstrap = jax.random.split(key, 3)
    rows = jax.random.permutation(k_holdout, len(data.reward))
    size = min(len(rows) // 5, 1000)
    holdout, train = rows[:size], rows[size:]
    inputs, targets = model_pairs(data, train)
    mean, std = inputs.mean(0), inputs.std(0)
    still = std < jnp.maximum(1e-3, 1e-5 * abs(mean))  # less than the model's noise or rounding
    net = Gaussian(cfg.model_widths, targets.shape[-1])
    params = jax.vmap(net.init, (0, None))(jax.random.split(k_params, cfg.num_members), inputs[0])
    return Fit(
        model=TrainState.create(apply_fn=net.apply, params=params, tx=optax.adam(cfg.model_lr)),
        dynamics=Dynamics(params, mean, jnp.where(still, jnp.inf, std + 1e-6)),
        error=jnp.full(cfg.num_members, jnp.inf, jnp.float32),
        stale=jnp.zeros((), int),
        bootstrap=jax.random.choice(k_bootstrap, train, (cfg.num_members, len(train))),
        holdout=holdout,
    )


def predict(params, dynamics, inputs, cfg):
    """One member's mean and log-variance of (s' - s, r), (R, D + 1), at (s, a), (R, D + A)."""
    net = Gaussian(cfg.model_widths, params["params"]["upper"].shape[-1])
    return net.apply(params, (inputs - dynamics.mean) / dynamics.std)


def model_loss(params, fit, inputs, targets, cfg):
    """One member: negative log-likelihood, weight decay, a pull on the bounds of the variance."""
    mean, logvar = predict(params, fit.dynamics, inputs, cfg)
    nll = jnp.mean((mean - targets) ** 2 * jnp.exp(-logvar) + logvar)
    p = params["params"]
    kernels = [p[f"Dense_{i}"]["kernel"] for i in range(len(cfg.model_widths) + 1)]
    decay = sum(c / 2 * jnp.sum(w**2) for c, w in zip(cfg.model_decay, kernels, strict=True))
    return nll + decay + 0.01 * jnp.sum(p["upper"] - p["lower"])


def fit_epoch(fit, data, key, cfg):
    """One pass of each member over its rows, then its holdout error."""

    def step(model, rows):  # (M, B)
        grad = jax.vmap(jax.value_and_grad(model_loss), (0, None, 0, 0, None))
        losses, grads = grad(model.params, fit, *model_pairs(data, rows), cfg)
        return model.apply_gradients(grads=grads), losses.sum()

    rows = jax.random.permutation(key, fit.bootstrap, 1, independent=True)
    size = min(cfg.batch_size, rows.shape[1])
    steps = rows.shape[1] // size
    rows = rows[:, : steps * size].reshape(-1, steps, size).swapaxes(0, 1)  # (steps, M, B)
    model, losses = jax.lax.scan(step, fit.model, rows)

    inputs, targets = model_pairs(data, fit.holdout)
    members = jax.vmap(partial(predict, cfg=cfg), (0, None, None))
    mean, _ = members(model.params, fit.dynamics, inputs)  # (M, H, D + 1)
    error = jnp.mean((mean - targets) ** 2, (1, 2))
    gained = (error < 0.99 * fit.error) & (fit.stale < cfg.patience)  # (M,)
    keep = jax.vmap(lambda gained, *x: jax.tree.map(partial(jnp.where, gained), *x))
    new, old = (model.params, error), (fit.dynamics.params, fit.error)
    best, lowest = keep(gained, new, old)
    dynamics, stale = fit.dynamics.replace(params=best), jnp.where(gained.any(), 0, fit.stale + 1)
    fit = fit.replace(model=model, dynamics=dynamics, error=lowest, stale=stale)
    return fit, {"train_loss": losses.mean(), "holdout_error": error}


def elites(fit, count):
    """The `count` members with the lowest holdout error, the best first."""
    best = jnp.argsort(fit.error)[:count]
    params = jax.tree.map(lambda x: x[best], fit.dynamics.params)
    return fit.dynamics.replace(params=params)


def fit_dynamics(keys, data, cfg, log, count=None):
    """Each seed's best `count` members, by default its elites.

    They train by epochs until no member's holdout error falls.
    """
    data = jax.tree.map(lambda x: x[known_rows(data)], data)
    fold = jax.vmap(jax.random.fold_in, (0, None))
    keys = fold(keys, jnp.uint32(2**31))  # beyond every update's
    fit = jax.jit(jax.vmap(partial(init_fit, cfg=cfg), (0, None)))(fold(keys, 0), data)
    train = jax.jit(jax.vmap(partial(fit_epoch, cfg=cfg), (0, None, 0)), donate_argnums=0)
    for epoch in range(1, cfg.max_epochs + 1):
        fit, info = train(fit, data, fold(keys, epoch))
        error, best = jnp.mean(info["holdout_error"]), jnp.sort(fit.error)[:, : cfg.num_elites]
        log(f"model epoch {epoch}: holdout error {error:.4f}, best of the elites {best.mean():.4f}")
        if (fit.stale >= cfg.patience).all():
            break
    return jax.jit(jax.vmap(partial(elites, count=count or cfg.num_elites)))(fit)


def model_step(dynamics, obs, action, key, cfg):
    """Sampled s' (R, D) and r (R,); each of E elites predicts R / E consecutive rows."""
    params = jax.tree.map(lambda x: x[: cfg.num_elites], dynamics.params)
    x = jnp.concatenate([obs, action], -1)
    x = x.reshape(cfg.num_elites, -1, x.shape[-1])
    mean, logvar = jax.vmap(partial(predict, cfg=cfg), (0, None, 0))(params, dynamics, x)
    step = mean + jnp.exp(logvar / 2) * jax.random.normal(key, mean.shape)
    step = step.reshape(len(obs), -1)
    still = jnp.isinf(dynamics.std[: obs.shape[-1]])
    return obs + jnp.where(still, 0, step[:, :-1]), step[:, -1]


# --- Replay buffer of model data ---


@struct.dataclass
class ReplayBuffer:
    rows: datasets.Batch  # the last `capacity` rows added
    total: jax.Array  # rows ever added

    @property
    def filled(self):
        return jnp.minimum(self.total, len(self.rows.reward))


def add(buffer, batch, keep):
    """Appends the rows of `batch` where `keep`, at most `capacity`; the oldest are overwritten."""
    capacity = len(buffer.rows.reward)
    slot = (buffer.total + jnp.cumsum(keep) - 1) % capacity
    slot = jnp.where(keep, slot, capacity)  # out of bounds, dropped
    rows = jax.tree.map(lambda old, new: old.at[slot].set(new, mode="drop"), buffer.rows, batch)
    return ReplayBuffer(rows, buffer.total + keep.sum())


@struct.dataclass
class State:
    actor: TrainState
    critic: TrainState  # two members, parameters stacked on axis 0
    temperature: TrainState  # weight of the entropy, SAC's alpha
    target: dict  # Polyak average of critic.params
    obs_mean: jax.Array  # (D,)
    obs_std: jax.Array  # (D,)
    dynamics: Dynamics  # all members
    buffer: ReplayBuffer


def init(key, data, cfg):
    """Fresh networks and optimisers for one seed; `data`, a Batch, gives sizes and statistics."""
    k_actor, k_critic, k_fit = jax.random.split(key, 3)
    obs, action = data.obs[0], data.action[0]
    actor, critic = Actor(cfg.widths, action.shape[-1]), Critic(cfg.widths)
    temperature = Positive(1.0)
    q_params = jax.vmap(critic.init, (0, None, None))(jax.random.split(k_critic, 2), obs, action)
    actor_lr = optax.cosine_decay_schedule(cfg.actor_lr, cfg.num_updates)
    capacity = cfg.retain * cfg.rollout_batch * cfg.horizon
    rows = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape[1:]), x.dtype), data)

    def learner(apply_fn, params, lr):
        return TrainState.create(apply_fn=apply_fn, params=params, tx=optax.adam(lr))

    return State(
        actor=learner(actor.apply, actor.init(k_actor, obs), actor_lr),
        critic=learner(jax.vmap(critic.apply, (0, None, None)), q_params, cfg.critic_lr),
        temperature=learner(temperature.apply, temperature.init(key), cfg.actor_lr),
        target=q_params,
        obs_mean=data.obs.mean(0) if cfg.normalize else jnp.zeros_like(obs),
        obs_std=data.obs.std(0) + 1e-3 if cfg.normalize else jnp.ones_like(obs),
        dynamics=elites(init_fit(k_fit, data, cfg), cfg.num_members),  # untrained, see fit_dynamics
        buffer=ReplayBuffer(rows, jnp.zeros((), int)),
    )


def never(obs, action, next_obs):
    """`--no-termination`: no state is terminal."""
    return jnp.zeros(len(next_obs), bool)


def uncertainty(dynamics, obs, action, cfg):
    """u(s, a), (R,), of all M members."""
    x = jnp.concatenate([obs, action], -1)
    member = partial(predict, dynamics=dynamics, inputs=x, cfg=cfg)
    mean, logvar = jax.lax.map(member, dynamics.params)  # (M, R, D + 1), one member at a time
    if cfg.uncertainty == "std":
        return jnp.linalg.norm(jnp.exp(logvar / 2), axis=-1).max(0)
    next_obs = mean[..., :-1]
    if cfg.uncertainty == "disagreement":
        return jnp.linalg.norm(next_obs - next_obs.mean(0), axis=-1).max(0)
    return jnp.sqrt(next_obs.var(0).mean(-1))


def rollout(state, data, key, cfg, terminal):
    """The policy in the model: a Batch of horizon * R rows, and a mask of those before an end.

    terminal(obs, action, next_obs) -> bool (R,): the environment's terminal states. A step of the
    model to a state that no data come near is left out, and its rollout stops. Rewards are
    penalised.
    """
    k_start, k_steps = jax.random.split(key)
    low = jnp.minimum(data.obs, data.next_obs).min(0)
    high = jnp.maximum(data.obs, data.next_obs).max(0)
    least, most = data.reward.min(), data.reward.max()
    start = jax.random.randint(k_start, (cfg.rollout_batch,), 0, len(data.reward))

    def step(carry, key):
        k_order, k_action, k_model = jax.random.split(key, 3)
        order = jax.random.permutation(k_order, cfg.rollout_batch)  # each row meets another elite
        obs, alive = carry[0][order], carry[1][order]
        pi = state.actor.apply_fn(state.actor.params, normalise(state, obs))
        action = pi.sample(seed=k_action)
        next_obs, reward = model_step(state.dynamics, obs, action, k_model, cfg)
        reward = reward.clip(2 * least - most, 2 * most - least)
        if cfg.penalty_scale:
            reward -= cfg.penalty_scale * uncertainty(state.dynamics, obs, action, cfg)
        alive &= ((next_obs >= 2 * low - high) & (next_obs <= 2 * high - low)).all(-1)
        done = terminal(obs, action, next_obs)
        row = datasets.Batch(obs, action, reward, next_obs, done.astype(jnp.float32))
        return (next_obs, alive & ~done), (row, alive)

    carry = data.obs[start], jnp.ones(cfg.rollout_batch, bool)
    _, rows = jax.lax.scan(step, carry, jax.random.split(k_steps, cfg.horizon))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)


# A loss is differentiated by its first argument; everything in `state` is a constant.


def soft_backup(state, batch, key, cfg):
    """r + gamma (Q_target(s', a') - temperature log pi(a' | s')), a' ~ pi(. | s'); shape (B,)."""
    pi = state.actor.apply_fn(state.actor.params, batch.next_obs)
    action, log_pi = pi.sample_and_log_prob(seed=key)
    next_q = state.critic.apply_fn(state.target, batch.next_obs, action).min(0)  # (B,)
    if cfg.backup_entropy:
        next_q -= state.temperature.apply_fn(state.temperature.params) * log_pi
    return batch.reward + cfg.gamma * (1 - batch.done) * next_q


def critic_loss(q_params, state, batch, key, cfg):
    """Temporal difference of both critics; the data's rows come first."""
    num_real = int(cfg.real_fraction * cfg.batch_size)
    target = soft_backup(state, batch, key, cfg)
    q = state.critic.apply_fn(q_params, batch.obs, batch.action)  # (2, B)
    loss = jnp.mean((q - target) ** 2, 1).sum()
    q_data, q_model = q[:, :num_real].mean(), q[:, num_real:].mean()
    return loss, {"critic_loss": loss, "q_data": q_data, "q_model": q_model}


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


def train_chunk(state, data, key, step, cfg, terminal):
    """The `log_every` updates up to update `step`, a rollout before each `rollout_every` of them.

    Metrics averaged. Update t draws from fold_in(key, t): a run does not depend on how it is cut
    into chunks.
    """
    num_real = int(cfg.real_fraction * cfg.batch_size)

    def keys(t):
        return jax.random.split(jax.random.fold_in(key, t), 4)

    def one(state, t):
        _, k_real, k_model, k_update = keys(t)
        rows = jax.random.randint(k_real, (num_real,), 0, len(data.reward))
        real = minibatch(state, data, rows)
        rows = jax.random.randint(k_model, (cfg.batch_size - num_real,), 0, state.buffer.filled)
        model = minibatch(state, state.buffer.rows, rows)
        batch = jax.tree.map(lambda *x: jnp.concatenate(x), real, model)
        return update(state, batch, k_update, cfg)

    def imagine(state, t):
        rows = rollout(state, data, keys(t)[0], cfg, terminal)
        return state.replace(buffer=add(state.buffer, *rows))

    def block(state, steps):
        due = (steps[0] - 1) % cfg.rollout_every == 0
        state = jax.lax.cond(due, imagine, lambda state, _: state, state, steps[0])
        return jax.lax.scan(one, state, steps)

    steps = step - jnp.arange(cfg.log_every)[::-1]
    steps = steps.reshape(-1, min(cfg.rollout_every, cfg.log_every))
    state, metrics = jax.lax.scan(block, state, steps)
    return state, jax.tree.map(jnp.mean, metrics)


def act(state, obs):
    """The policy's median action for obs (..., D)."""
    return state.actor.apply_fn(state.actor.params, normalise(state, obs)).mode()


def policy(cfg):
    """`act` as evaluation calls it: (state, carry, obs, reward, key) -> (action, carry)."""
    return evaluation.stateless(act)


def check(cfg, dataset):
    """SystemExit where sizes do not fit each other or the data."""
    few, many = sorted((cfg.log_every, cfg.rollout_every))
    if many % few:
        raise SystemExit(
            f"--log-every {cfg.log_every}, --rollout-every {cfg.rollout_every}: one must be a "
            "multiple of the other."
        )
    if cfg.rollout_batch % cfg.num_elites or not 1 <= cfg.num_elites <= cfg.num_members:
        raise SystemExit("--num-elites must divide --rollout-batch, and be at most --num-members.")
    if not 1 <= int(cfg.real_fraction * cfg.batch_size) < cfg.batch_size:
        raise SystemExit("--real-fraction must leave rows of the data and of the model.")
    if len(cfg.model_decay) != len(cfg.model_widths) + 1:
        raise SystemExit("--model-decay needs one value more than --model-widths.")
    if (size := cfg.num_seeds * cfg.retain * cfg.rollout_batch * cfg.horizon) > 10**9:
        raise SystemExit(f"--retain, --rollout-batch, --horizon: {size:,} rows are too many.")
    if known_rows(dataset.transitions()).sum() < 5:  # one of them for the holdout
        raise SystemExit(f"{dataset.name}: a model needs 5 rows whose next_obs is known, or more.")


def train(cfg, dataset):
    """Trains `cfg.num_seeds` policies on a Dataset; their State, seeds on axis 0."""
    cfg = experiment.resolve(cfg, TUNED, dataset)
    check(cfg, dataset)
    terminal = evaluation.termination(dataset.env_id) if cfg.termination else never
    run = experiment.Run(cfg, dataset)
    data = dataset.transitions()

    keys = jax.vmap(jax.random.key)(cfg.seed + jnp.arange(cfg.num_seeds))
    start = jax.jit(jax.vmap(partial(init, cfg=cfg), (0, None)))
    state = run.restore(start(jax.vmap(jax.random.fold_in, (0, None))(keys, 0), data))
    if run.step == 0:
        dynamics = fit_dynamics(keys, data, cfg, run.log, cfg.num_members)
        state = run.restore(state.replace(dynamics=dynamics))
    chunk = jax.vmap(partial(train_chunk, cfg=cfg, terminal=terminal), (0, None, 0, None))
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
