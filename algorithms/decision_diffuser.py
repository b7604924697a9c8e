"""Decision Diffuser. Ajay, Du, Gupta, Tenenbaum, Jaakkola, Agrawal 2022, arXiv:2211.15657.

Decisions by a conditional generative model alone: no value function and no gradient of one. A
diffusion model of the states to come is told what shall be true of them, a high return, a
constraint or a skill. Inverse dynamics turn the plan's next state into an action.

    q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I)               states alone; cosine schedule
    L(theta)     = E[ |x_0 - f(x_t, b y, t)|^2 ],   b = 0 with probability p      y the condition
    L(phi)       = E[ |a - g(s, s')|^2 ]                             inverse dynamics
    x0hat        = f(x, 0, t) + w sum_i +-(f(x, y_i, t) - f(x, 0, t))             guidance
    x_{t-1}      ~ N(mu_t(x0hat, x_t), (alpha sigma_t)^2 I),   alpha < 1          low temperature
    action       = g(s, plan's next state)

The sum is composition: plans for which all y_i hold (AND, +) or do not hold (NOT, -), also if the
data have no such example. The known state replaces the first of every x_t (inpainting). The idea is
in `model_loss`, `guided` and `plan`; the U-Net in the section Networks.

Run: python algorithms/decision_diffuser.py --env halfcheetah-medium-v2 --plan-every 4

A return is the share of the data's range, (R - min) / (max - min) over all steps, and `--target`
asks for one. `--regions 1 0.5 9 1 -9 -0.5` are two more conditions: column 1 of the observation is
between 0.5 and 9 at some step of the plan, or between -9 and -0.5 (a constraint); with
`--region-mean` on average over the plan (a skill). `--wanted 0 --unwanted 1` asks for the first and
not the second, whatever the return with `--target None`. A window is told one condition at a time.

Default sizes are for a CPU. Those of the authors' code, 1.2 TFLOP a plan, are AUTHORS, used where
they published them. Differs from it:
- returns by the data's range (divided by 400, chosen for one dataset)
- f predicts x_0, as Diffuser's (the noise, from which x_0 follows; guidance is the same; see
  benchmarks/README, What Decision Diffuser predicts)
- standardised observations, x_0 clipped to their range (by their distribution, to [-1, 1])
- a batch of 64 (two of 32)
- averaged weights from the first update on, moved at each (after 2,000, at every tenth)
- windows begin at every step (not within the last H of the 1,000 that an episode may have)
- the loss beyond an episode's end is masked (zeros are learned)
- each loss has an Adam (half their sum, one Adam)
- g acts on the observation itself, also when a plan serves several steps (one plan a step)
- upsampling by a convolution of size 3 to two steps (transposed, size 4)
The paper has T = 100, w between 1.2 and 1.8, a history of 20 states, and alpha scales sigma^2.
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

# Values that depend on the dataset; the longest matching name wins.
AUTHORS = dict(horizon=100, diffusion_steps=200, width=128, multiples=(1, 4, 8))
TUNED = {
    "default": dict(horizon=32, diffusion_steps=20, width=32, multiples=(1, 2, 4, 8)),
    "hopper-medium-expert": AUTHORS,
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
    eval_every: int = 100_000  # gradient steps between evaluations
    eval_episodes: int = 10  # episodes per evaluation and seed
    out: str = "runs"  # where run folders go
    resume: str = ""  # run folder to continue
    wandb: bool = False  # also log to Weights & Biases
    batch_size: int = 64  # windows per gradient step
    gamma: float = 0.99  # discount of the returns that are asked for
    lr: float = 2e-4  # Adam, both networks
    normalize: bool = True  # standardise observations
    # --- Decision Diffuser ---
    horizon: int | None = None  # H, states of a plan; default 32, the authors' 100
    diffusion_steps: int | None = None  # T, from data to noise; default 20, the authors' 200
    multiples: tuple[int, ...] | None = None  # of width, by level; default 1 2 4 8
    width: int | None = None  # of the U-Net's first level; default 32, the authors' 128
    inverse_widths: tuple[int, ...] = (256, 256)  # hidden layers of g
    ema: float = 0.995  # decay of the averaged weights, with which plans are made, in [0, 1]
    drop: float = 0.25  # p, share of windows that are learned without a condition, in [0, 1]
    end_return: float = -100.0  # added to the return at terminal states
    regions: tuple[float, ...] | None = None  # more conditions: column of obs, low, high of each
    region_mean: bool = False  # a region is where a plan is on average; else at any step
    # --- Planning ---
    target: float | None = 0.9  # return asked for, of the data's range; None: no return, in [0, 2]
    wanted: tuple[int, ...] | None = None  # regions asked for, counted from 0, in [0, inf)
    unwanted: tuple[int, ...] | None = None  # regions to avoid, in [0, inf)
    guidance: float = 1.2  # w; 0: no condition, 1: the conditional model, in [0, inf)
    temperature: float = 0.5  # alpha, of all noise in sampling; 0: the same plan always, in [0, 1]
    plan_every: int = 1  # steps to a plan
    ddim_steps: int = 0  # deterministic denoising steps (DDIM); 0: all, with noise


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


class MLP(nn.Module):
    widths: tuple[int, ...]
    out: int

    @nn.compact
    def __call__(self, x):
        for width in self.widths:
            x = nn.relu(Dense(width)(x))
        return Dense(self.out)(x)


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
    """Embedding (B, 2 W) of the diffusion step and, beside it, of the condition: 0 without one."""

    width: int

    @nn.compact
    def __call__(self, given):
        t, y, keep = given  # (B,), (B, K), (B,)
        rate = jnp.exp(-np.log(10_000) * jnp.linspace(0, 1, self.width // 2))
        x = jnp.concatenate([jnp.sin(t[:, None] * rate), jnp.cos(t[:, None] * rate)], -1)
        x = Dense(self.width)(mish(Dense(4 * self.width)(x)))
        y = Dense(self.width)(mish(Dense(4 * self.width)(mish(Dense(self.width)(y)))))
        return jnp.concatenate([x, keep[:, None] * y], -1)


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

    x: jax.Array  # (B, H, D) observations, normalised
    action: jax.Array  # (B, H, A)
    mask: jax.Array  # (B, H) False beyond the episode's end
    y: jax.Array  # (B, K) all conditions: the return in [0, 1]; each region 1, or -1 if not in it


@struct.dataclass
class State:
    model: TrainState
    inverse: TrainState  # g
    ema: dict  # averages of their parameters
    obs_mean: jax.Array  # (D,)
    obs_std: jax.Array  # (D,)
    low: jax.Array  # (D,) the data's smallest observations, normalised
    high: jax.Array  # (D,) the largest


def init(key, data, cfg):
    """Fresh networks and optimisers for one seed; `data`, a Batch, gives sizes and statistics."""
    k_model, k_inverse = jax.random.split(key)
    obs, action = data.obs[0], data.action[0]
    mean = data.obs.mean(0) if cfg.normalize else jnp.zeros_like(obs)
    std = data.obs.std(0) + 1e-3 if cfg.normalize else jnp.ones_like(obs)

    def learner(net, key, *inputs):
        params = net.init(key, *inputs)
        return TrainState.create(apply_fn=net.apply, params=params, tx=optax.adam(cfg.lr))

    x, y = jnp.zeros((1, cfg.horizon, len(obs))), jnp.zeros((1, 1 + len(regions(cfg))))
    unet = UNet(cfg.width, cfg.multiples)
    model = learner(unet, k_model, x, (jnp.zeros(1), y, jnp.ones(1)))
    pair = jnp.concatenate([obs, obs])
    inverse = learner(MLP(cfg.inverse_widths, len(action)), k_inverse, pair)
    return State(
        model=model,
        inverse=inverse,
        ema={"model": model.params, "inverse": inverse.params},
        obs_mean=mean,
        obs_std=std,
        low=(data.obs.min(0) - mean) / std,
        high=(data.obs.max(0) - mean) / std,
    )


# A loss is differentiated by its first argument; everything in `state` is a constant.


def chosen(batch, key, cfg):
    """(y (B, K), keep (B,)): for each window one of its conditions, drawn blindly, or none."""
    k_which, k_drop = jax.random.split(key)
    count, first = batch.y.shape[1], 0 if cfg.target is not None else 1
    which = jax.random.randint(k_which, (len(batch.y),), first, max(count, first + 1))
    y = batch.y * (jnp.arange(count) == which[:, None])
    keep = jax.random.uniform(k_drop, which.shape) >= cfg.drop
    return y, keep & (which < count)


def model_loss(params, state, batch, key, cfg):
    """Squared error of the denoised states; the known one costs nothing."""
    k_t, k_noise, k_condition = jax.random.split(key, 3)
    t = jax.random.randint(k_t, (len(batch.x),), 0, cfg.diffusion_steps)
    abar = jnp.float32(schedule(cfg.diffusion_steps))[t][:, None, None]
    noise = jax.random.normal(k_noise, batch.x.shape)
    x = jnp.sqrt(abar) * batch.x + jnp.sqrt(1 - abar) * noise
    x = condition(x, (batch.x[:, 0], None))
    x0 = state.model.apply_fn(params, x, (t, *chosen(batch, k_condition, cfg)))
    error = ((x0 - batch.x) ** 2).at[:, 0].set(0)
    loss = jnp.sum(error.mean(-1) * batch.mask) / batch.mask.sum()
    return loss, {"model_loss": loss}


def inverse_loss(params, state, batch):
    """Squared error of the action between each two states of the window."""
    pair = jnp.concatenate([batch.x[:, :-1], batch.x[:, 1:]], -1)
    error = (state.inverse.apply_fn(params, pair) - batch.action[:, :-1]) ** 2
    mask = batch.mask[:, 1:]
    loss = jnp.sum(error.mean(-1) * mask) / mask.sum().clip(1)
    return loss, {"inverse_loss": loss}


def descend(loss_fn, learner, *args):
    """One optimiser step on loss_fn(learner.params, *args)."""
    grads, info = jax.grad(loss_fn, has_aux=True)(learner.params, *args)
    return learner.apply_gradients(grads=grads), info


def update(state, batch, key, cfg):
    """The model and the inverse dynamics; then their averages."""
    model, info = descend(model_loss, state.model, state, batch, key, cfg)
    inverse, inverse_info = descend(inverse_loss, state.inverse, state, batch)
    params = {"model": model.params, "inverse": inverse.params}
    ema = optax.incremental_update(params, state.ema, 1 - cfg.ema)
    return state.replace(model=model, inverse=inverse, ema=ema), info | inverse_info


def normalise(state, obs):
    """Observations (..., D) as the networks see them."""
    return (obs - state.obs_mean) / state.obs_std


def regions(cfg):
    """(R, 3): column, low and high of each region."""
    return np.reshape(cfg.regions or (), (-1, 3))


def visited(obs, mask, cfg):
    """Which regions windows obs (B, H, D) visit, or are in on average; (B, R)."""
    column, low, high = regions(cfg).T
    place, mask = obs[..., column.astype(int)], mask[..., None]  # (B, H, R), (B, H, 1)
    if cfg.region_mean:
        place = jnp.sum(place * mask, 1, keepdims=True) / mask.sum(1, keepdims=True)
    return jnp.any((place >= low) & (place < high) & mask, 1)


def minibatch(state, data, rows, cfg):
    """The windows of Steps that begin at those rows, cut at the episode's end."""
    index, mask = datasets.windows(rows, data.end, cfg.horizon)
    obs, returns = data.obs[index], data.returns_to_go[rows][:, None]
    inside = jnp.where(visited(obs, mask, cfg), 1.0, -1.0)
    y = jnp.concatenate([returns, inside], 1)
    return Window(normalise(state, obs), data.action[index], mask, y)


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
    x: jax.Array  # (E, H, D) normalised
    age: jax.Array  # environment steps since it was made


def request(cfg):
    """(y (n, K), sign (n,)): the conditions of plans, with -1 for those that must not hold."""
    wanted, unwanted = cfg.wanted or (), cfg.unwanted or ()
    y = np.eye(1 + len(regions(cfg)))[[1 + i for i in (*wanted, *unwanted)]]
    sign = np.repeat([1, -1], [len(wanted), len(unwanted)])
    if cfg.target is not None:
        y = np.concatenate([cfg.target * np.eye(1, y.shape[1]), y])
        sign = np.append(1, sign)
    return np.float32(y), np.float32(sign)


def guided(state, x, t, cfg):
    """x0hat (E, H, D) of x at step t: without a condition and with each, in one batch."""
    y, sign = request(cfg)
    rows, n = len(x), len(sign)
    y = np.concatenate([np.zeros((1, y.shape[1])), y])
    given = jnp.full((1 + n) * rows, t), np.repeat(y, rows, 0), np.repeat([0, *[1] * n], rows)
    x0 = state.model.apply_fn(state.ema["model"], jnp.tile(x, (1 + n, 1, 1)), given)
    weight = cfg.guidance * sign
    weight = np.append(1 - weight.sum(), weight)  # the same sum: exact where w is 0 or 1
    return jnp.tensordot(np.float32(weight), x0.reshape(1 + n, *x.shape), 1)


def plan(state, known, key, cfg):
    """States to come for each of E episodes, (E, H, D); known: first states (E, D), and None."""
    steps = denoising(cfg.diffusion_steps, cfg.ddim_steps)
    size = len(known[0]), cfg.horizon, known[0].shape[-1]
    k_start, k_steps = jax.random.split(key)

    def denoise(x, inputs):
        step, key = inputs
        x0 = guided(state, x, step.t, cfg)
        noise = cfg.temperature * step.std * jax.random.normal(key, size)
        x = step.x0 * x0.clip(state.low, state.high) + step.xt * x + noise
        return condition(x, known), None

    x = condition(cfg.temperature * jax.random.normal(k_start, size), known)
    x, _ = jax.lax.scan(denoise, x, (steps, jax.random.split(k_steps, len(steps.t))))
    return x


def act(state, carry, obs, reward, key, cfg):
    """Actions (E, A) for obs (E, D), towards the next state of the plan."""
    first = normalise(state, obs)

    def renew(_):
        return Plan(plan(state, (first, None), key, cfg), jnp.int32(0))

    if carry is None:
        carry = renew(carry)
    else:
        carry = carry._replace(age=carry.age + 1)
        carry = jax.lax.cond(carry.age >= cfg.plan_every, renew, lambda old: old, carry)
    pair = jnp.concatenate([first, carry.x[:, carry.age + 1]], -1)
    return state.inverse.apply_fn(state.ema["inverse"], pair), carry


def policy(cfg):
    """`act` as evaluation calls it: (state, carry, obs, reward, key) -> (action, carry)."""
    # one seed after another: vmap would compute a new plan at each step, used or not
    return jax.custom_batching.sequential_vmap(partial(act, cfg=cfg))


def check(cfg, dataset):
    """SystemExit where sizes do not fit each other or the data."""
    halvings = len(cfg.multiples) - 1
    if cfg.horizon % 2**halvings:
        raise SystemExit(f"--horizon {cfg.horizon}: must be a multiple of {2**halvings}.")
    if cfg.width % 8:  # eight groups in every layer
        raise SystemExit(f"--width {cfg.width}: must be a multiple of 8.")
    if cfg.plan_every >= cfg.horizon:
        raise SystemExit(f"--plan-every {cfg.plan_every}: must be below --horizon {cfg.horizon}.")
    if cfg.ddim_steps > cfg.diffusion_steps:
        raise SystemExit("--ddim-steps must not exceed --diffusion-steps.")
    if cfg.horizon > (longest := dataset.length.max()):
        why = f"the longest episode of {dataset.name} has {longest:,} steps"
        raise SystemExit(f"--horizon {cfg.horizon}: {why}. Choose a smaller one.")
    if len(cfg.regions or ()) % 3:
        raise SystemExit("--regions: needs three numbers each, a column of obs, low and high.")
    dim, columns = dataset.obs.shape[1], regions(cfg)[:, 0]
    if any(x not in range(dim) for x in columns):
        raise SystemExit(f"--regions: columns of {dataset.name} are 0 to {dim - 1}.")
    if max((*(cfg.wanted or ()), *(cfg.unwanted or ())), default=-1) >= len(columns):
        raise SystemExit(f"--wanted, --unwanted: there are {len(columns)} --regions.")


def shares(steps):
    """The Steps with returns as shares of their range, in [0, 1]."""
    returns = steps.returns_to_go
    spread = np.ptp(returns) or 1.0
    return steps._replace(returns_to_go=(returns - returns.min()) / spread)


def train(cfg, dataset):
    """Trains `cfg.num_seeds` policies on a Dataset; their State, seeds on axis 0."""
    cfg = experiment.resolve(cfg, TUNED, dataset)
    check(cfg, dataset)
    run = experiment.Run(cfg, dataset)
    data = shares(dataset.steps(cfg.gamma, cfg.end_return))

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
