"""Decision Transformer (DT). Chen et al. 2021, arXiv:2106.01345.

Offline RL as sequence modelling: a causal transformer reads the last K steps and predicts the
action that led to the return asked for. No value function, no bootstrapping.

    tau     = (R_1, s_1, a_1, R_2, s_2, a_2, ...),   R_t = r_t + r_{t+1} + ... + r_T
    token   = LayerNorm(embed(R_t or s_t or a_t) + embed(t))
    L(phi)  = E[ |a_t - pi(R_{t-K+1}, s_{t-K+1}, a_{t-K+1}, ..., R_t, s_t)|^2 ]
    acting:   R_1 = the return asked for,   R_{t+1} = R_t - r_t

Run: python algorithms/dt.py --env halfcheetah-medium-v2 --targets 12000 6000

Like the authors' code: dropout on the embeddings too; time embeddings stop at step 1,000. Differs
from the authors' code:
- all weights start from N(0, 0.02^2) as in GPT-2 (embeddings and head as in PyTorch)
- observations are divided by std + 1e-3 (1e-6)
- the last block computes only the state tokens, which predict the actions (all tokens)
- no heads for states and returns (present, but trained by no loss)
- without --targets one return is asked for (two, each in turn)
"""

import math
import sys
from dataclasses import dataclass, replace
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
from jax.extend.random import threefry_2x32

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # finds common/
from common import datasets, evaluation, experiment  # noqa: E402

# The larger of the two returns that the authors' code asks for on D4RL's data, and its scale.
TUNED = {
    f"{env}-{policy}-v2": dict(targets=(target,))
    for env, target in {"halfcheetah": 12000.0, "hopper": 3600.0, "walker2d": 5000.0}.items()
    for policy in ("medium", "medium-replay", "medium-expert")
} | dict.fromkeys(("halfcheetah", "hopper", "walker2d"), dict(rtg_scale=1000.0))


@dataclass(frozen=True)
class Config:
    env: str = "stillwater/hopper/medium-replay-v0"  # D4RL or Minari name, .hdf5 file; several: A,B
    env_id: str = ""  # Gymnasium id to score on; only for a bare file
    env_module: str = ""  # Python module of yours to import, which registers the environment
    seed: int = 0  # first seed
    num_seeds: int = 1  # seeds trained together under vmap
    num_updates: int = 100_000  # gradient steps
    log_every: int = 1_000  # gradient steps of a compiled chunk and between rows of metrics.csv
    eval_every: int = 5_000  # gradient steps between evaluations
    eval_episodes: int = 10  # episodes per evaluation and seed
    out: str = "runs"  # where run folders go
    resume: str = ""  # run folder to continue
    wandb: bool = False  # also log to Weights & Biases
    batch_size: int = 64  # windows per gradient step
    lr: float = 1e-4  # AdamW
    normalize: bool = True  # standardise observations
    # --- DT ---
    targets: tuple[float, ...] | None = None  # returns to ask for; default TUNED or data's best
    rtg_scale: float | None = None  # divides returns; default TUNED or by the data, in (0, inf)
    context: int = 20  # K, the steps that the transformer sees
    layers: int = 3  # blocks of the transformer
    heads: int = 1  # of attention, a divisor of width
    width: int = 128  # of a token
    dropout: float = 0.1  # of embeddings, attention and residuals in training, in [0, 1)
    max_time: int = 1_000  # time embeddings; later steps share the last one
    weight_decay: float = 1e-4  # of AdamW, on all parameters
    clip: float = 0.25  # largest norm of the gradient, in (0, inf]
    warmup: int = 10_000  # gradient steps in which the learning rate rises to lr, in [0, inf)


class Window(NamedTuple):
    """K steps of an episode: what is learned from, and what acting remembers."""

    obs: jax.Array  # (B, K, D) normalised
    action: jax.Array  # (B, K, A)
    returns_to_go: jax.Array  # (B, K) return from this step to the episode's end / rtg_scale
    time: jax.Array  # (B, K) int32 step within the episode
    mask: jax.Array  # (B, K) False: padding, on the left


gpt2_dense = partial(nn.Dense, kernel_init=nn.initializers.normal(0.02))


class Dropout(nn.Module):
    """nn.Dropout with 16 random bits an element; the 64 of nn.Dropout cost a fifth of an update."""

    rate: float

    @nn.compact
    def __call__(self, x, train):
        if not train:
            return x
        key = jax.random.bits(self.make_rng("dropout"), (2,))  # all bits here would hash twice
        bits = threefry_2x32(key, jnp.arange((x.size + 1) // 2, dtype=jnp.uint32))
        bits = jax.lax.bitcast_convert_type(bits, jnp.uint16).reshape(-1)[: x.size]
        keep = bits.reshape(x.shape) >= round(2**16 * self.rate)
        return jnp.where(keep, x / (1 - self.rate), 0)


class Block(nn.Module):
    """Attention and MLP of GPT-2, each on a normalised input, added to the residual stream."""

    heads: int
    dropout: float
    last: bool  # of the transformer: computes the state tokens alone

    @nn.compact
    def __call__(self, x, mask, train):  # (B, T, W), (B, T, T) which token sees which
        width = x.shape[-1]
        drop = partial(Dropout(self.dropout), train=train)
        qkv = gpt2_dense(3 * width)(nn.LayerNorm(1e-5)(x))
        q, k, v = (y.reshape(*y.shape[:2], self.heads, -1) for y in jnp.split(qkv, 3, -1))
        if self.last:
            x, q, mask = x[:, 1::3], q[:, 1::3], mask[:, 1::3]
        score = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(width / self.heads)
        score = jnp.where(mask[:, None], score, -1e9)  # finite: padding sees nothing, without NaN
        y = jnp.einsum("bhqk,bkhd->bqhd", drop(nn.softmax(score)), v).reshape(x.shape)
        x = x + drop(gpt2_dense(width)(y))
        y = nn.relu(gpt2_dense(4 * width)(nn.LayerNorm(1e-5)(x)))
        return x + drop(gpt2_dense(width)(y))


class Transformer(nn.Module):
    """Actions (B, K, A) in [-1, 1], each from its step's return and state and all steps before."""

    layers: int
    heads: int
    width: int
    dropout: float
    max_time: int
    action_dim: int

    @nn.compact
    def __call__(self, window, train=False):
        tokens = window.returns_to_go[..., None], window.obs, window.action
        tokens = jnp.stack([gpt2_dense(self.width)(x) for x in tokens], 2)  # (B, K, 3, W)
        embed = nn.Embed(self.max_time, self.width, embedding_init=nn.initializers.normal(0.02))
        tokens += embed(window.time.clip(0, self.max_time - 1))[:, :, None]
        x = nn.LayerNorm(1e-5)(tokens.reshape(len(tokens), -1, self.width))  # (B, 3 K, W)
        x = Dropout(self.dropout)(x, train)
        causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        mask = causal & jnp.repeat(window.mask, 3, 1)[:, None]  # (B, 3 K, 3 K)
        for i in range(self.layers):
            x = Block(self.heads, self.dropout, i == self.layers - 1)(x, mask, train)
        return jnp.tanh(gpt2_dense(self.action_dim, name="head")(nn.LayerNorm(1e-5)(x)))


@struct.dataclass
class State:
    actor: TrainState
    obs_mean: jax.Array  # (D,)
    obs_std: jax.Array  # (D,)


def empty(episodes, obs_dim, action_dim, cfg):
    """Windows of padding alone."""
    shape = episodes, cfg.context
    return Window(
        obs=jnp.zeros((*shape, obs_dim)),
        action=jnp.zeros((*shape, action_dim)),
        returns_to_go=jnp.zeros(shape),
        time=jnp.full(shape, -1, jnp.int32),
        mask=jnp.zeros(shape, bool),
    )


def init(key, data, cfg):
    """A fresh network and optimiser for one seed; `data`, a Batch, gives sizes and statistics."""
    obs, action = data.obs[0], data.action[0]
    sizes = cfg.layers, cfg.heads, cfg.width, cfg.dropout, cfg.max_time
    actor = Transformer(*sizes, action.shape[-1])
    optimiser = optax.chain(
        optax.clip_by_global_norm(cfg.clip),
        optax.adamw(
            lambda count: cfg.lr * jnp.minimum((count + 1) / max(cfg.warmup, 1), 1),
            weight_decay=cfg.weight_decay,
        ),
    )
    params = actor.init(key, empty(1, len(obs), len(action), cfg))
    return State(
        actor=TrainState.create(apply_fn=actor.apply, params=params, tx=optimiser),
        obs_mean=data.obs.mean(0) if cfg.normalize else jnp.zeros_like(obs),
        obs_std=data.obs.std(0) + 1e-3 if cfg.normalize else jnp.ones_like(obs),
    )


def actor_loss(pi_params, state, batch, key, cfg):
    """Squared error of the actions, over the steps that are not padding."""
    action = state.actor.apply_fn(pi_params, batch, train=True, rngs={"dropout": key})
    error = jnp.mean((action - batch.action) ** 2, -1)  # (B, K)
    loss = jnp.sum(error * batch.mask) / batch.mask.sum()
    return loss, {"actor_loss": loss}


def descend(loss_fn, learner, *args):
    """One optimiser step on loss_fn(learner.params, *args)."""
    grads, info = jax.grad(loss_fn, has_aux=True)(learner.params, *args)
    return learner.apply_gradients(grads=grads), info


def update(state, batch, key, cfg):
    """One step of imitation of a Window; `key` draws the dropout."""
    actor, info = descend(actor_loss, state.actor, state, batch, key, cfg)
    return state.replace(actor=actor), info


def normalise(state, obs):
    """Observations (..., D) as the networks see them."""
    return (obs - state.obs_mean) / state.obs_std


def minibatch(state, data, rows, cfg):
    """The windows of Steps that begin at those rows, cut at the episode's end."""
    index, mask = datasets.windows(rows, data.end, cfg.context, left=True)
    returns_to_go = data.returns_to_go[index] / cfg.rtg_scale
    return Window(
        normalise(state, data.obs[index]), data.action[index], returns_to_go, data.time[index], mask
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


def asked(targets, episodes):
    """The return asked for in each episode, (episodes,): the targets in blocks of equal size."""
    if not targets:
        raise ValueError("--targets: DT acts towards a return, so at least one is needed.")
    return np.float32(targets)[np.arange(episodes) * len(targets) // max(episodes, 1)]


def act(state, carry, obs, reward, key, cfg):
    """Actions (E, A) for obs (E, D), episodes as in `asked`; carry: the last K steps, a Window."""
    del key  # there is no dropout
    if carry is None:
        (action_dim,) = state.actor.params["params"]["head"]["bias"].shape
        carry = empty(*obs.shape, action_dim, cfg)
        target = asked(cfg.targets, len(obs)) / cfg.rtg_scale
        carry = carry._replace(returns_to_go=carry.returns_to_go.at[:, -1].set(target))
    new = Window(
        obs=normalise(state, obs),
        action=jnp.zeros_like(carry.action[:, -1]),  # not known yet; its own state does not see it
        returns_to_go=carry.returns_to_go[:, -1] - reward / cfg.rtg_scale,
        time=carry.time[:, -1] + 1,
        mask=jnp.ones(len(obs), bool),
    )
    carry = jax.tree.map(lambda old, x: jnp.concatenate([old[:, 1:], x[:, None]], 1), carry, new)
    action = state.actor.apply_fn(state.actor.params, carry)[:, -1]
    return action, carry._replace(action=carry.action.at[:, -1].set(action))


def policy(cfg):
    """`act` as evaluation calls it: (state, carry, obs, reward, key) -> (action, carry)."""
    return partial(act, cfg=cfg)


def report(run, targets):
    """Logs the return asked for and the return achieved, of the newest evaluation (S, E)."""
    if run.returns is not None:
        target = asked(targets, run.returns.shape[1])
        for value in dict.fromkeys(target):
            achieved = run.returns[:, target == value].mean()
            run.log(f"Asked for {value:,.0f}, achieved {achieved:,.0f}.")


def check(cfg, dataset):
    """SystemExit where sizes do not fit each other or the data."""
    if cfg.width % cfg.heads:
        raise SystemExit(f"--heads {cfg.heads}: must divide --width {cfg.width}.")
    if 0 < cfg.eval_episodes < len(cfg.targets or ()):
        raise SystemExit(f"--targets: {len(cfg.targets)} of them need as many --eval-episodes.")
    if cfg.context > (longest := dataset.length.max()):
        why = f"the longest episode of {dataset.name} has {longest:,} steps"
        raise SystemExit(f"--context {cfg.context}: {why}. Choose a smaller one.")


def train(cfg, dataset):
    """Trains `cfg.num_seeds` policies on a Dataset; their State, seeds on axis 0."""
    cfg = experiment.resolve(cfg, TUNED, dataset)
    returns = dataset.returns()
    if cfg.targets is None:
        cfg = replace(cfg, targets=(float(returns.max()),))
    if cfg.rtg_scale is None:  # the power of ten below the data's largest return
        largest = float(abs(returns).max()) or 1.0
        cfg = replace(cfg, rtg_scale=10.0 ** math.floor(math.log10(largest)))
    check(cfg, dataset)
    run = experiment.Run(cfg, dataset)
    data = dataset.steps()

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
    report(run, cfg.targets)
    run.finish()
    return state


def main(cfg: Config):
    cfg = experiment.resolve(cfg, TUNED)  # --resume: the run's own config
    train(cfg, datasets.load(cfg.env, cfg.env_id))


if __name__ == "__main__":
    main(tyro.cli(Config))
