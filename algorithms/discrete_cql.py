"""Conservative Q-Learning (CQL) for discrete actions. Kumar, Zhou, Tucker, Levine 2020,
arXiv:2006.04779.

Deep Q-learning with a critic that is pushed down at all actions and up at the data's own. The sum
over actions is exact, and the policy is the action with the largest Q.

    min_Q  alpha E_s~D[ log sum_a exp Q(s, a) - E_a~D[Q(s, a)] ]
           + E_D[ huber(r + gamma Q_target(s', a') - Q(s, a)) ],   a' = argmax_a Q(s', a)      (4)
    pi(s) = argmax_a Q(s, a)

Run: python algorithms/discrete_cql.py --env stillwater/cartpole/replay-v0

huber(u) is u^2 / 2 up to |u| = 1 and |u| - 1/2 beyond. Options:
- `--variant rho`: log E_a~rho[exp Q(s, a)] for the sum; rho, the last policy, is the softmax of
  Q_target / temperature, and the policy itself at a low `--temperature`
- `--variant rho-weighted`: E_a~rho[Q exp Q] / E_a~rho[exp Q] (Appendix A); its weights learn, too
- `--variant var`: E_a[Q] + sqrt(Var_a[Q] / n(s)) over uniform actions (Appendix A); `--count`
  stands for n(s), the visits to s
- `--num-quantiles N`: QR-DQN; Q is the mean of N quantiles of the return, each fitted by
  sum_i mean_j |tau_i - 1[u_ij < 0]| huber(u_ij), u_ij = target_j - quantile_i
- `--no-double`: the target network chooses a', as in the authors' code
- `--alpha 0`: plain double DQN, which fails on narrow data

Differs from the authors' code (github.com/aviralkumar2907/CQL, Atari):
- double DQN on vectors with two layers, and the settings of discrete BCQ's authors for vectors
  (QR-DQN with 200 quantiles on images)
- the target is a Polyak average (copied every 2,000 updates)
- alpha 1, theirs for a tenth of the data (4 for a hundredth)
- CQL(rho), CQL(var) (absent)
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

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
    # --- CQL ---
    alpha: float = 1.0  # weight of the penalty, Eq. (4)
    variant: Literal["H", "rho", "rho-weighted", "var"] = "H"  # what is pushed down; H: Eq. (4)
    temperature: float = 1.0  # of rho, softmax(Q_target / temperature), in (0, inf)
    count: float = 1.0  # visits that a state counts in CQL(var), in (0, inf)
    num_quantiles: int = 0  # of the return, QR-DQN; 0: its mean alone, DQN
    double: bool = True  # the network itself chooses the target's action, not the target network


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


class Critic(nn.Module):
    """Q(s, a) of every action as N quantiles of the return (..., A, N), whose mean is Q."""

    widths: tuple[int, ...]
    num_actions: int
    num_quantiles: int

    @nn.compact
    def __call__(self, obs):
        z = MLP(self.widths, self.num_actions * self.num_quantiles)(obs)
        return z.reshape(*z.shape[:-1], self.num_actions, self.num_quantiles)


@struct.dataclass
class State:
    critic: TrainState
    target: dict  # Polyak average of critic.params
    obs_mean: jax.Array  # (D,)
    obs_std: jax.Array  # (D,)


def init(key, data, cfg):
    """A fresh network and optimiser for one seed; `data`, a Batch, gives sizes and statistics."""
    obs, action = data.obs[0], data.action[0]
    critic = Critic(cfg.widths, action.shape[-1], max(cfg.num_quantiles, 1))
    params = critic.init(key, obs)
    return State(
        critic=TrainState.create(apply_fn=critic.apply, params=params, tx=optax.adam(cfg.lr)),
        target=params,
        obs_mean=data.obs.mean(0) if cfg.normalize else jnp.zeros_like(obs),
        obs_std=data.obs.std(0) + 1e-3 if cfg.normalize else jnp.ones_like(obs),
    )


# A loss is differentiated by its first argument; everything in `state` is a constant.


def greedy(q):
    """The action with the largest Q (..., A): 1 there, 0 elsewhere."""
    return jax.nn.one_hot(q.argmax(-1), q.shape[-1])


def td_target(state, batch, cfg):
    """Quantiles of r + gamma Q_target(s', a'), a' = argmax_a Q(s', a); shape (B, N)."""
    z_next = state.critic.apply_fn(state.target, batch.next_obs)  # (B, A, N)
    z_choice = z_next
    if cfg.double:
        z_choice = state.critic.apply_fn(state.critic.params, batch.next_obs)
    best = greedy(z_choice.mean(-1))  # (B, A)
    z_next = jnp.sum(z_next * best[..., None], 1)  # (B, N)
    return batch.reward[:, None] + cfg.gamma * (1 - batch.done[:, None]) * z_next


def td_loss(z, target, cfg):
    """The loss of each row (B,), from quantiles z of Q(s, a) and of the target, both (B, N)."""
    u = target[:, None, :] - z[:, :, None]  # (B, N, N)
    if cfg.num_quantiles == 0:
        return optax.huber_loss(u).squeeze((1, 2))
    tau = (jnp.arange(cfg.num_quantiles) + 0.5) / cfg.num_quantiles
    return jnp.sum(jnp.mean(jnp.abs(tau[:, None] - (u < 0)) * optax.huber_loss(u), 2), 1)


def pushed_down(q, log_rho, cfg):
    """What the penalty pushes down at each state (B,), from Q and log rho of all actions (B, A)."""
    if cfg.variant == "rho":
        return jax.nn.logsumexp(q + log_rho, -1)
    if cfg.variant == "rho-weighted":
        return jnp.sum(jax.nn.softmax(q + log_rho) * q, -1)
    if cfg.variant == "var":
        return q.mean(-1) + jnp.sqrt(q.var(-1) / cfg.count + 1e-12)  # differentiable at equal Q
    return jax.nn.logsumexp(q, -1)


def critic_loss(q_params, state, batch, cfg):
    """Temporal difference and conservative penalty, Eq. (4)."""
    z = state.critic.apply_fn(q_params, batch.obs)  # (B, A, N)
    q, z_data = z.mean(-1), jnp.sum(z * batch.action[..., None], 1)  # (B, A), (B, N)
    log_rho = None
    if cfg.variant.startswith("rho"):  # the last policy
        old = state.critic.apply_fn(state.target, batch.obs).mean(-1)
        log_rho = jax.nn.log_softmax(old / cfg.temperature)
    gap = jnp.mean(pushed_down(q, log_rho, cfg) - z_data.mean(-1))
    td = jnp.mean(td_loss(z_data, td_target(state, batch, cfg), cfg))
    loss = td + cfg.alpha * gap
    info = {"critic_loss": loss, "td_loss": td, "gap": gap}
    return loss, info | {"q_data": z_data.mean(), "q_pi": q.max(-1).mean()}


def descend(loss_fn, learner, *args):
    """One optimiser step on loss_fn(learner.params, *args)."""
    grads, info = jax.grad(loss_fn, has_aux=True)(learner.params, *args)
    return learner.apply_gradients(grads=grads), info


def update(state, batch, key, cfg):
    """The critic, then the target."""
    del key  # nothing is sampled
    critic, info = descend(critic_loss, state.critic, state, batch, cfg)
    target = optax.incremental_update(critic.params, state.target, cfg.polyak)
    return state.replace(critic=critic, target=target), info


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
    """The action (..., A) with the largest Q for obs (..., D)."""
    return greedy(state.critic.apply_fn(state.critic.params, normalise(state, obs)).mean(-1))


def policy(cfg):
    """`act` as evaluation calls it: (state, carry, obs, reward, key) -> (action, carry)."""
    return evaluation.stateless(act)


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
