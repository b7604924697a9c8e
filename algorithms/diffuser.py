"""Diffuser. Janner, Du, Tenenbaum, Levine 2022, arXiv:2205.09991.

Planning as sampling: a diffusion model of whole trajectories, states and actions together, samples
one that begins at the current state. The gradient of a learned return guides it to a good one,
whose first action is taken. In a maze the last state, the goal, is given as well, and a controller
tracks the planned states.

    q(x_t | x_0)          = N(sqrt(abar_t) x_0, (1 - abar_t) I)           the cosine schedule abar
    L(theta)              = E[ |x_0 - f(x_t, t)|^2 ]                      f predicts x_0
    L(psi)                = E[ (R(x_0) - J(x_t, t))^2 ]                   return of the noisy x_0
    q(x_{t-1} | x_t, x_0) = N(mu_t(x_0, x_t), sigma_t^2 I)                the posterior
    x_{t-1}               ~ N(mu_t(f(y, t), y), sigma_t^2 I),   y = x_t + w sigma_t^2 grad J(x_t, t)

The known states replace those of every x_t (inpainting). The idea is in `model_loss`, `value_loss`
and `plan`; the U-Net in the section Networks.

Run: python algorithms/diffuser.py --env halfcheetah-medium-v2 --plan-every 4 --ddim-steps 5

Settings are those of the authors' code. Differs from it:
- a batch of 64 (two of 32)
- averaged weights from the first update on, moved at each (after 2,000, at every tenth)
- J trains as long as f (200,000 updates)
- windows begin at every step (not within the last H of the 1,000 that an episode may have)
- the loss beyond an episode's end is masked (zeros are learned)
- 1e-3 is added to each std or half range (nothing)
- returns are learned divided by `return_scale`, and J multiplied by it (raw)
- the best plan has the largest J after the last denoising step (before it)
- upsampling by a convolution of size 3 to two steps (transposed, size 4)
- no attention at halfcheetah's horizon of 4 (linear attention)
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

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
MAZE = dict(goal=True, plan_every=0, action_weight=1.0, multiples=(1, 4, 8), diffusion_steps=256)
TUNED = {
    "default": dict(
        horizon=32, diffusion_steps=20, multiples=(1, 2, 4, 8), guide_scale=0.1, guide_stop=2,
        goal=False, plan_every=1, action_weight=10.0,
    ),
    "halfcheetah": dict(horizon=4, multiples=(1, 4, 8), guide_scale=0.001, guide_stop=4),
    "hopper-medium-expert": dict(guide_scale=0.0001, guide_stop=4),
    **{f"{maze}-umaze": MAZE | dict(horizon=128, diffusion_steps=64)
       for maze in ("pointmaze", "maze2d")},
    **{f"{maze}-medium": MAZE | dict(horizon=256) for maze in ("pointmaze", "maze2d")},
    **{f"{maze}-large": MAZE | dict(horizon=384) for maze in ("pointmaze", "maze2d")},
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    env: str = "stillwater/hopper/medium-replay-v0"  # D4RL or Minari name, .hdf5 file; several: A,B
    env_id: str = ""  # Gymnasium id to score on; only for a bare file
    env_module: str = ""  # Python module of yours to import, which registers the environment
    seed: int = 0  # first seed
    num_seeds: int = 1  # seeds trained together under vmap
    num_updates: int = 1_000_000  # gradient steps
    log_every: int = 1_000  # gradient steps of a compiled chunk and between rows of metrics.csv
    eval_every: int = 100_000  # gradient steps between evaluations
    eval_episodes: int = 10  # episodes per evaluation and seed
    out: str = "runs"  # where run folders go
    resume: str = ""  # run folder to continue
    wandb: bool = False  # also log to Weights & Biases
    batch_size: int = 64  # windows per gradient step
    gamma: float = 0.997  # discount of the returns that guide
    lr: float = 2e-4  # Adam, both networks
    normalize: bool = True  # standardise observations and actions; with a goal: to [-1, 1]
    # --- Diffuser ---
    horizon: int | None = None  # H, steps of a plan; default 32, halfcheetah 4, mazes 128 to 384
    diffusion_steps: int | None = None  # T, from data to noise; default 20, mazes 64 or 256
    multiples: tuple[int, ...] | None = None  # of width, by level; default 1 2 4 8 or 1 4 8
    width: int = 32  # of the U-Net's first level
    ema: float = 0.995  # decay of the averaged weights, with which plans are made, in [0, 1]
    action_weight: float | None = None  # of the first action in the loss; default 10, mazes 1
    end_return: float = -100.0  # added to the return at terminal states
    return_scale: float = 1_000.0  # returns are divided by it, in (0, inf)
    # --- Planning ---
    goal: bool | None = None  # obs are x, y, vx, vy, goal x, goal y; default off, mazes on
    samples: int = 64  # plans of which the best is kept; 1 with a goal
    guide_scale: float | None = None  # w; default 0.1, halfcheetah 0.001, in [0, inf)
    guide_steps: int = 2  # gradient steps for each denoising step, in [0, inf)
    guide_stop: int | None = None  # no guide at t below this; default 2, in [0, inf)
    plan_every: int | None = None  # steps to a plan; default 1, mazes 0: one plan, in [0, inf)
    ddim_steps: int = 0  # deterministic denoising steps (DDIM); 0: all, with noise
    warm_start: int = 0  # denoising steps from the previous plan; 0: always from noise


# --- Networks ---


def mish(x):
    """x tanh(softplus(x)), with a single exponential."""
    e = jnp.exp(jnp.minimum(x, 20))
    return x * (e * e + 2 * e) / (e * e + 2 * e + 2)


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


class Conv(nn.Module):
    """A convolution along time as one matrix product, on a CPU much faster than XLA's own."""

    width: int
    size: int = 5
    stride: int = 1

    @nn.compact
    def __call__(self, x):  # (B, H, C) -> (B, H / stride, width)
        half, length = self.size // 2, x.shape[1]
        x = jnp.pad(x, ((0, 0), (half, half), (0, 0)))
        shifted = [x[:, i : i + length : self.stride] for i in range(self.size)]
        return Dense(self.width)(jnp.concatenate(shifted, -1))


class Block(nn.Module):
    """Residual block: two convolutions, conditioned on the diffusion step."""

    width: int

    @nn.compact
    def __call__(self, x, t):  # (B, H, C), (B, W)
        y = mish(nn.GroupNorm(8, epsilon=1e-5)(Conv(self.width)(x)))
        y += Dense(self.width)(mish(t))[:, None]
        y = mish(nn.GroupNorm(8, epsilon=1e-5)(Conv(self.width)(y)))
        return y + (x if x.shape[-1] == self.width else Dense(self.width)(x))


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding (B, W) of the diffusion step t (B,), and an MLP on it."""

    width: int

    @nn.compact
    def __call__(self, t):
        rate = jnp.exp(-np.log(10_000) * jnp.linspace(0, 1, self.width // 2))
        x = jnp.concatenate([jnp.sin(t[:, None] * rate), jnp.cos(t[:, None] * rate)], -1)
        return Dense(self.width)(mish(Dense(4 * self.width)(x)))


class UNet(nn.Module):
    """A U-Net along time: what is predicted, (B, H, C), from x_t (B, H, C) and t."""

    width: int
    multiples: tuple[int, ...]

    @nn.compact
    def __call__(self, x, t):
        channels, widths = x.shape[-1], [self.width * m for m in self.multiples]
        t, levels = TimeEmbedding(self.width)(t), []
        for width in widths:
            if levels:
                x = Conv(x.shape[-1], 3, 2)(x)
            x = Block(width)(Block(width)(x, t), t)
            levels.append(x)
        x = Block(widths[-1])(Block(widths[-1])(x, t), t)
        for width in reversed(widths[:-1]):
            x = Block(width)(jnp.concatenate([x, levels.pop()], -1), t)
            x = Conv(2 * width, 3)(Block(width)(x, t))
            x = x.reshape(len(x), -1, width)  # each step becomes two
        x = mish(nn.GroupNorm(8, epsilon=1e-5)(Conv(self.width)(x)))
        return Dense(channels)(x)


class ReturnModel(nn.Module):
    """J(x_t, t), (B,): the downward half of the U-Net, continued to a single number."""

    width: int
    multiples: tuple[int, ...]

    @nn.compact
    def __call__(self, x, t):
        t = TimeEmbedding(self.width)(t)
        for width in (self.width * m for m in self.multiples):
            x = Conv(width, 3, 2)(Block(width)(Block(width)(x, t), t))
        for width in (x.shape[-1] // 2, x.shape[-1] // 4):
            x = Conv(width, 3, 2)(Block(width)(x, t))
        x = jnp.concatenate([x.reshape(len(x), -1), t], -1)
        return Dense(1)(mish(Dense((x.shape[-1] - self.width) // 2)(x))).squeeze(-1)


# --- Diffusion ---


class Denoising(NamedTuple):
    """Coefficients of x_s ~ N(x0 f(x_t, t) + xt x_t, std^2), from step t to the next lower s."""

    t: np.ndarray  # falling
    x0: np.ndarray
    xt: np.ndarray
    std: np.ndarray
    variance: np.ndarray  # sigma^2 of the posterior, which scales the guide


def schedule(steps):
    """abar (steps,) float64, the share of x_0's variance in x_t: the cosine schedule."""
    f = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(1 - (1 - f[1:] / f[:-1]).clip(max=0.999))


def denoising(steps, ddim_steps=0):
    """The denoising steps: all of them by the posterior, or a few deterministic ones by DDIM."""
    t = np.linspace(steps - 1, 0, ddim_steps or steps).round().astype(np.int32)
    now = schedule(steps)[t]
    past = np.append(now[1:], 1.0)  # abar at the next lower time
    keep = now / past
    variance = (1 - keep) * (1 - past) / (1 - now)
    if ddim_steps:  # Song et al. 2021, arXiv:2010.02502, Eq. (12) with sigma = 0
        std, xt = np.zeros(len(t)), np.sqrt((1 - past) / (1 - now))
        x0 = np.sqrt(past) - np.sqrt(now) * xt
    else:
        std, xt = np.sqrt(variance), np.sqrt(keep) * (1 - past) / (1 - now)
        x0 = np.sqrt(past) * (1 - keep) / (1 - now)
    return Denoising(t, *np.float32([x0, xt, std, variance]))


def condition(x, known):
    """x (B, H, C) with its known states in place: the first, and with a goal the last."""
    first, last = known
    x = x.at[:, 0, -first.shape[-1] :].set(first)
    return x if last is None else x.at[:, -1, -last.shape[-1] :].set(last)


# --- Training ---


class Window(NamedTuple):
    """H steps of an episode."""

    x: jax.Array  # (B, H, A + D) actions and observations, normalised
    mask: jax.Array  # (B, H) False beyond the episode's end
    returns_to_go: jax.Array  # (B,) return from the first step to the episode's end, / return_scale


@struct.dataclass
class State:
    model: TrainState
    value: TrainState | None  # J; None: plans lead to a goal
    ema: dict  # averages of their parameters
    obs_mean: jax.Array  # (D,)
    obs_std: jax.Array  # (D,)
    action_mean: jax.Array  # (A,)
    action_std: jax.Array  # (A,)


def scaling(x, cfg):
    """Mean and std of the rows of x (N, D); with a goal, middle and half range: to [-1, 1]."""
    if not cfg.normalize:
        return jnp.zeros_like(x[0]), jnp.ones_like(x[0])
    low, high = x.min(0), x.max(0)
    return ((low + high) / 2, (high - low) / 2 + 1e-3) if cfg.goal else (x.mean(0), x.std(0) + 1e-3)


def init(key, data, cfg):
    """Fresh networks and optimisers for one seed; `data`, a Batch, gives sizes and statistics."""
    k_model, k_value = jax.random.split(key)
    obs_mean, obs_std = scaling(data.obs, cfg)
    action_mean, action_std = scaling(data.action, cfg)
    channels = len(action_mean) + len(plan_features(obs_mean, cfg))

    def learner(net, key):
        params = net.init(key, jnp.zeros((1, cfg.horizon, channels)), jnp.zeros(1))
        return TrainState.create(apply_fn=net.apply, params=params, tx=optax.adam(cfg.lr))

    model = learner(UNet(cfg.width, cfg.multiples), k_model)
    value = None if cfg.goal else learner(ReturnModel(cfg.width, cfg.multiples), k_value)
    return State(
        model=model,
        value=value,
        ema={"model": model.params} | ({} if cfg.goal else {"value": value.params}),
        obs_mean=obs_mean,
        obs_std=obs_std,
        action_mean=action_mean,
        action_std=action_std,
    )


# A loss is differentiated by its first argument; everything in `state` is a constant.


def diffuse(state, batch, key, cfg):
    """(x_t, t, known): noised trajectories at uniform steps t, known states in place."""
    k_t, k_noise = jax.random.split(key)
    states = batch.x[..., len(state.action_mean) :]
    known = states[:, 0], states[:, -1] if cfg.goal else None
    t = jax.random.randint(k_t, (len(batch.x),), 0, cfg.diffusion_steps)
    abar = jnp.float32(schedule(cfg.diffusion_steps))[t][:, None, None]
    noise = jax.random.normal(k_noise, batch.x.shape)
    return condition(jnp.sqrt(abar) * batch.x + jnp.sqrt(1 - abar) * noise, known), t, known


def model_loss(params, state, batch, key, cfg):
    """Squared error of the denoised trajectory; known states cost nothing."""
    x, t, known = diffuse(state, batch, key, cfg)
    error = (condition(state.model.apply_fn(params, x, t), known) - batch.x) ** 2
    error = error.at[:, 0, : len(state.action_mean)].multiply(cfg.action_weight)
    loss = jnp.sum(error.mean(-1) * batch.mask) / batch.mask.sum()
    return loss, {"model_loss": loss}


def value_loss(params, state, batch, key, cfg):
    """Squared error of the return predicted from the noisy trajectory."""
    x, t, _ = diffuse(state, batch, key, cfg)
    j = state.value.apply_fn(params, x, t)
    loss = jnp.mean((j - batch.returns_to_go) ** 2)
    return loss, {"value_loss": loss, "j": j.mean()}


def descend(loss_fn, learner, *args):
    """One optimiser step on loss_fn(learner.params, *args)."""
    grads, info = jax.grad(loss_fn, has_aux=True)(learner.params, *args)
    return learner.apply_gradients(grads=grads), info


def update(state, batch, key, cfg):
    """Both networks, each with its own noise; then their averages."""
    k_model, k_value = jax.random.split(key)
    model, info = descend(model_loss, state.model, state, batch, k_model, cfg)
    value, params = None, {"model": model.params}
    if not cfg.goal:
        value, value_info = descend(value_loss, state.value, state, batch, k_value, cfg)
        params["value"], info = value.params, info | value_info
    ema = optax.incremental_update(params, state.ema, 1 - cfg.ema)
    return state.replace(model=model, value=value, ema=ema), info


def normalise(state, obs):
    """Observations (..., D) as the networks see them."""
    return (obs - state.obs_mean) / state.obs_std


def plan_features(obs, cfg):
    """The part of an observation (..., D) that is planned: all but the goal's position."""
    return obs[..., :4] if cfg.goal else obs  # D4RL's maze2d files have no column for the goal


def minibatch(state, data, rows, cfg):
    """The windows of Steps that begin at those rows, cut at the episode's end.

    With a goal, rows are moved to earlier ones, so that every window is whole: its end is a goal.
    """
    if cfg.goal:
        time = data.time[rows]
        whole = (data.end[rows] - rows + time - cfg.horizon + 1).clip(1)  # windows of the episode
        rows = rows - time + time % whole
    index, mask = datasets.windows(rows, data.end, cfg.horizon)
    action = (data.action[index] - state.action_mean) / state.action_std
    obs = plan_features(normalise(state, data.obs[index]), cfg)
    return Window(
        jnp.concatenate([action, obs], -1), mask, data.returns_to_go[rows] / cfg.return_scale
    )


def train_chunk(state, data, key, step, cfg):
    """The `log_every` updates up to update `step`, on windows of `data`, Steps of N rows.

    Metrics averaged. Update t draws from fold_in(key, t): a run does not depend on how it is cut
    into chunks.
    """

    def one(state, t):
        k_rows, k_update = jax.random.split(jax.random.fold_in(key, t))
        rows = jax.random.randint(k_rows, (cfg.batch_size,), 0, len(data.reward))
        return update(state, minibatch(state, data, rows, cfg), k_update, cfg)

    state, metrics = jax.lax.scan(one, state, step - jnp.arange(cfg.log_every)[::-1])
    return state, jax.tree.map(jnp.mean, metrics)


# --- Planning ---


class Plan(NamedTuple):
    x: jax.Array  # (E, H, A + D) normalised
    age: jax.Array  # environment steps since it was made


def plan(state, known, key, cfg, old=None):
    """The best of `samples` trajectories for each of E episodes, (E, H, A + D).

    known: first states (E, D), and last ones or None. old: plans that a warm start begins from.
    """
    copies = 1 if cfg.goal else cfg.samples
    known = jax.tree.map(lambda s: jnp.repeat(s, copies, 0), known)  # (E * copies, D)
    steps = denoising(cfg.diffusion_steps, cfg.ddim_steps)
    size = len(known[0]), cfg.horizon, len(state.action_mean) + known[0].shape[-1]
    k_start, k_steps = jax.random.split(key)
    x = jax.random.normal(k_start, size)
    if old is not None and cfg.warm_start:
        steps = jax.tree.map(lambda c: c[-cfg.warm_start :], steps)
        abar = schedule(cfg.diffusion_steps)[steps.t[0]]
        x = np.sqrt(abar) * jnp.repeat(old, copies, 0) + np.sqrt(1 - abar) * x

    def j(x, t):
        t = jnp.full(len(x), t)
        return cfg.return_scale * state.value.apply_fn(state.ema["value"], x, t)

    def guide(x, step):
        for _ in range(cfg.guide_steps):
            grad = jax.grad(lambda x: j(x, step.t).sum())(x)
            x = condition(x + cfg.guide_scale * step.variance * grad, known)
        return x

    def denoise(x, inputs):
        step, key = inputs
        if not cfg.goal:
            x = jax.lax.cond(step.t >= cfg.guide_stop, guide, lambda x, step: x, x, step)
        x0 = state.model.apply_fn(state.ema["model"], x, jnp.full(len(x), step.t))
        x0 = x0.clip(-1, 1) if cfg.goal else x0
        x = step.x0 * x0 + step.xt * x + step.std * jax.random.normal(key, size)
        return condition(x, known), None

    x, _ = jax.lax.scan(
        denoise, condition(x, known), (steps, jax.random.split(k_steps, len(steps.t)))
    )
    if cfg.goal:
        return x
    value, x = j(x, 0).reshape(-1, copies), x.reshape(-1, copies, *x.shape[1:])
    return x[jnp.arange(len(x)), value.argmax(1)]


def act(state, carry, obs, reward, key, cfg):
    """Actions (E, A) for obs (E, D): the plan's own; with a goal, those that track its states."""
    first, last = plan_features(normalise(state, obs), cfg), None
    if cfg.goal:  # the plan ends at rest at the goal
        if obs.shape[-1] != 6:
            raise ValueError(f"Not x, y, vx, vy, goal x, goal y: observations {obs.shape}.")
        rest = jnp.zeros_like(obs).at[:, :2].set(obs[:, -2:])
        last = plan_features(normalise(state, rest), cfg)
    known = first, last

    def renew(old):
        shifted = jnp.roll(old.x, -cfg.plan_every, 1)
        shifted = shifted.at[:, -cfg.plan_every :].set(old.x[:, -1:])
        return Plan(plan(state, known, key, cfg, shifted), jnp.int32(0))

    if carry is None:
        carry = Plan(plan(state, known, key, cfg), jnp.int32(0))
    else:
        carry = carry._replace(age=carry.age + 1)
        if cfg.plan_every:
            carry = jax.lax.cond(carry.age >= cfg.plan_every, renew, lambda old: old, carry)
    dim = len(state.action_mean)
    if not cfg.goal:
        return carry.x[:, carry.age, :dim] * state.action_std + state.action_mean, carry
    mean, std = plan_features(state.obs_mean, cfg), plan_features(state.obs_std, cfg)
    ahead = carry.x[:, (carry.age + 1).clip(max=cfg.horizon - 1), dim:] * std + mean
    error = ahead - plan_features(obs, cfg)  # of x, y and their velocities
    return error[:, :2] + error[:, 2:4], carry


def policy(cfg):
    """`act` as evaluation calls it: (state, carry, obs, reward, key) -> (action, carry)."""
    # one seed after another: vmap would compute a new plan at each step, used or not
    return jax.custom_batching.sequential_vmap(partial(act, cfg=cfg))


def check(cfg, dataset):
    """SystemExit where sizes do not fit each other or the data."""
    halvings = len(cfg.multiples) - 1
    if cfg.horizon % 2**halvings:
        raise SystemExit(f"--horizon {cfg.horizon}: must be a multiple of {2**halvings}.")
    if cfg.width % 8 or cfg.width * cfg.multiples[-1] % 32:  # eight groups in every layer
        raise SystemExit("--width must be a multiple of 8, and of 32 with the last of --multiples.")
    if cfg.plan_every > cfg.horizon:
        raise SystemExit(f"--plan-every {cfg.plan_every}: a plan has only {cfg.horizon} steps.")
    steps = cfg.ddim_steps or cfg.diffusion_steps
    if not cfg.warm_start <= steps <= cfg.diffusion_steps:
        raise SystemExit("--warm-start must not exceed --ddim-steps, nor that --diffusion-steps.")
    if cfg.horizon > (longest := dataset.length.max()):
        why = f"the longest episode of {dataset.name} has {longest:,} steps"
        raise SystemExit(f"--horizon {cfg.horizon}: {why}. Choose a smaller one.")
    if cfg.goal and dataset.obs.shape[1] not in (4, 6):
        raise SystemExit(
            f"--goal: {dataset.name} is no maze, its observations are not x, y, vx, vy."
        )


def train(cfg, dataset):
    """Trains `cfg.num_seeds` policies on a Dataset; their State, seeds on axis 0."""
    cfg = experiment.resolve(cfg, TUNED, dataset)
    check(cfg, dataset)
    run = experiment.Run(cfg, dataset)
    data = dataset.steps(cfg.gamma, cfg.end_return)

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
