"""Off-policy evaluation (OPE): what policies are worth, from recorded data alone.

A policy pi earns V = E[ G ], G = sum_t gamma^t r_t; the data were recorded by another policy b. An
episode is as likely under pi as under b times rho_0:t, the product of pi(a | s) / b(a | s) up to
step t. Means are over episodes; w_t is rho_0:t divided by its mean.

    IS     mean[ rho_0:T-1 G ]                          importance sampling
    PDIS   mean[ sum_t gamma^t rho_0:t r_t ]            per decision
    WIS    mean[ w_T-1 G ]                              weighted
    WPDIS  mean[ sum_t gamma^t w_t r_t ]
    DR     mean[ sum_t gamma^t (rho_0:t (r_t - Q(s_t, a_t)) + rho_0:t-1 V(s_t)) ]   doubly robust
    WDR    the same with w for rho
    FQE    mean[ V(s_0) ],   Q(s, a) = r + gamma V(s'),   V(s) = E[ Q(s, a') ], a' ~ pi(. | s)

IS, PDIS and DR are unbiased if b is known, and their variance grows exponentially with the length
of an episode. The mean of w is one, so WIS, WPDIS and WDR stay near the data's returns; their bias
falls with the number of episodes. FQE has no weights; it is wrong where the data lack pi's actions.

- DR: Jiang, Li 2016, arXiv:1511.03722, in its closed form
- WDR: Thomas, Brunskill 2016, arXiv:1604.00923
- FQE: Le, Voloshin, Yue 2019, arXiv:1903.08738
- settings and measures: DOPE, Fu et al. 2021, arXiv:2103.16596

Run: python algorithms/ope.py --policies runs/iql/... runs/cql/... --env hopper-medium-v2 --truth
     python algorithms/ope.py --policies ... --polyak 0.05 --num-updates 20000   # a tenth the time

A deterministic policy has no density. What is evaluated is pi(. | s) = N(act(s), std^2), truncated
to [-1, 1], or act(s) with a random action instead in a share epsilon of the steps where actions are
discrete; --truth runs that policy, too. b is stored with the data or cloned, and the output says
which. Returns end where an episode of the data ends: estimates compare with --truth if the data's
episodes are whole. FQE goes on after a time limit. Its interval is that of the start states alone.
An estimate marked "collapsed" rests on fewer than ten episodes. Differs from the code of DOPE
(google-research/policy_eval):
- values are discounted sums (times 1 - gamma)
- rewards are divided by their std and not shifted, so that a terminal state is worth 0 (shifted)
- no bootstrap weights and no noise on rewards in the fit
- terminal states end the doubly robust sum, too (not masked)
- DR and WDR take Q fitted to the same episodes
"""

import json
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
from jax.scipy.stats import truncnorm
from scipy.stats import rankdata

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # finds common/
from common import datasets, evaluation, experiment  # noqa: E402

ESTIMATORS = "FQE WDR DR WPDIS PDIS WIS IS".split()
INSIDE = 1 - 1e-4  # where actions are clipped for a cloned density, which is infinite at 1
FEW = 10  # effective episodes; weights with fewer have collapsed
BLOCK = 2**14  # rows that a network sees at once
CHUNK = 1_000  # updates of a compiled call


@dataclass(frozen=True)
class Config:
    policies: tuple[str, ...] = ()  # run folders; each seed of a run is a policy
    env: str = ""  # dataset to estimate from; default: that of the first run
    env_id: str = ""  # Gymnasium id for --truth; only for a bare file
    env_module: str = ""  # Python module of yours to import, which registers the environment
    seed: int = 0  # of fits, samples and resampling
    num_updates: int = 200_000  # gradient steps of FQE
    clone_updates: int = 50_000  # gradient steps of the cloned behaviour
    batch_size: int = 256  # transitions per gradient step
    gamma: float = 0.995  # discount, in [0, 1)
    lr: float = 3e-4  # AdamW with weight decay 1e-5
    polyak: float = 0.005  # step of the target network
    widths: tuple[int, ...] = (256, 256)  # hidden layers of every network
    std: float = 0.1  # noise of the evaluated policies
    epsilon: float = 0.1  # of discrete actions: how often a random one is taken instead
    discrete: tyro.conf.Suppress[bool] = False  # kind of actions; the dataset decides
    clip: tuple[float, float] = (-6.0, 2.0)  # log of one step's ratio to a cloned behaviour
    samples: int = 10  # actions that V(s) averages over
    resamples: int = 1_000  # bootstrap samples of an interval
    rank: str = "FQE"  # estimator that orders the policies
    truth: bool = False  # also run the policies in the environment
    episodes: int = 20  # episodes of a policy with --truth
    k: int = 1  # of regret@k: the best of the k policies that rank first
    out: str = ""  # .json file for the results


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


class Behaviour(nn.Module):
    """b(a | s): a tanh-squashed Gaussian with log std between -5 and 2, or of discrete actions."""

    widths: tuple[int, ...]
    action_dim: int
    discrete: bool

    @nn.compact
    def __call__(self, obs):
        if self.discrete:
            logits = MLP(self.widths, self.action_dim)(obs)
            return distrax.OneHotCategorical(logits, dtype=obs.dtype)
        mean, log_std = jnp.split(MLP(self.widths, 2 * self.action_dim)(obs), 2, -1)
        return TanhNormal(mean, jnp.exp(log_std.clip(-5, 2)))


class Critic(nn.Module):
    """Q(s, a) of one member; the ensemble is a vmap over parameters."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, obs, action):
        return MLP(self.widths, 1)(jnp.concatenate([obs, action], -1)).squeeze(-1)


# --- The policies ---


def noisy(key, mean, cfg):
    """Actions of pi around act's actions `mean` (..., A)."""
    if cfg.discrete:
        k_whether, k_which = jax.random.split(key)
        shape, count = mean.shape[:-1], mean.shape[-1]
        other = jax.nn.one_hot(jax.random.randint(k_which, shape, 0, count), count)
        return jnp.where(jax.random.uniform(k_whether, (*shape, 1)) < cfg.epsilon, other, mean)
    low, high = (-1 - mean) / cfg.std, (1 - mean) / cfg.std
    return mean + cfg.std * jax.random.truncated_normal(key, low, high)


def log_prob(mean, action, cfg):
    """log pi(a | s) (...) of actions (..., A) around `mean` (..., A)."""
    if cfg.discrete:
        return jnp.log((1 - cfg.epsilon) * (mean * action).sum(-1) + cfg.epsilon / mean.shape[-1])
    low, high = (-1 - mean) / cfg.std, (1 - mean) / cfg.std
    return truncnorm.logpdf(action, low, high, mean, cfg.std).sum(-1)


class Policies(NamedTuple):
    """The seeds of one run."""

    folder: str
    names: list  # (S,)
    state: object  # seeds on axis 0
    act: object  # (state, carry, obs (S, E, D), reward (S, E), key) -> (action (S, E, A), carry)


def load(folder, dataset):
    """The Policies of a run folder. SystemExit if they do not fit the dataset, or have a memory."""
    module, cfg, state = evaluation.load(folder)
    info, _ = experiment.read(Path(folder).expanduser().resolve())
    sizes = [dataset.obs.shape[1], dataset.num_actions or dataset.action.shape[1]]
    if info["dims"][1:] != sizes:
        had = f"{info['dims'][1:]} observations and actions, {dataset.name} {sizes}"
        raise SystemExit(f"{folder} has {had}.")
    if bool(info["dataset"].get("num_actions")) != (dataset.num_actions > 0):
        kinds = "one has discrete actions, the other not"
        raise SystemExit(f"{folder} does not fit {dataset.name}: {kinds}.")
    act = jax.vmap(module.policy(cfg), (0, 0, 0, 0, None))
    obs = jnp.zeros((cfg.num_seeds, 1, sizes[0]))
    _, carry = jax.eval_shape(act, state, None, obs, obs[..., 0], jax.random.key(0))
    if jax.tree.leaves(carry):
        why = "has a memory, so it is no function of the state alone"
        raise SystemExit(f"{folder}: a policy of {info['algorithm']} {why}.")
    names = [f"{info['algorithm']} s{cfg.seed + i}" for i in range(cfg.num_seeds)]
    return Policies(folder, names, state, jax.jit(act))


def actions(policies, obs, key):
    """act's actions (S, N, A) at obs (N, D); where act samples, one for each row."""
    seeds, found = len(policies.names), []
    for i in range(0, len(obs), BLOCK):
        rows = jnp.broadcast_to(obs[i : i + BLOCK], (seeds, *obs[i : i + BLOCK].shape))
        key_i = jax.random.fold_in(key, i)
        action, _ = policies.act(policies.state, None, rows, jnp.zeros(rows.shape[:2]), key_i)
        found.append(np.asarray(action.clip(-1, 1)))
    return np.concatenate(found, 1)


# --- The behaviour ---


# A loss is differentiated by its first argument; everything else is a constant.


def clone_loss(b_params, behaviour, obs, action):
    """Negative log-likelihood of the data's actions."""
    loss = -behaviour.apply_fn(b_params, obs).log_prob(action).mean()
    return loss, {"clone_loss": loss}


def descend(loss_fn, learner, *args):
    """One optimiser step on loss_fn(learner.params, *args)."""
    grads, info = jax.grad(loss_fn, has_aux=True)(learner.params, *args)
    return learner.apply_gradients(grads=grads), info


def cloned(data, key, cfg):
    """log b(a | s) (N,) of the data's rows under a behaviour that is fitted to them."""
    k_init, k_rows = jax.random.split(key)
    if not cfg.discrete:
        data = data._replace(action=data.action.clip(-INSIDE, INSIDE))
    net = Behaviour(cfg.widths, data.action.shape[-1], cfg.discrete)
    behaviour = TrainState.create(
        apply_fn=net.apply, params=net.init(k_init, data.obs[0]), tx=optax.adam(cfg.lr)
    )

    @jax.jit
    def chunk(behaviour, data, steps):
        def one(behaviour, t):
            k = jax.random.fold_in(k_rows, t)
            rows = jax.random.randint(k, (cfg.batch_size,), 0, len(data.reward))
            return descend(clone_loss, behaviour, behaviour, data.obs[rows], data.action[rows])

        return jax.lax.scan(one, behaviour, steps)[0]

    for steps in portions(cfg.clone_updates):
        behaviour = chunk(behaviour, data, steps)

    def log_b(row):
        return behaviour.apply_fn(behaviour.params, row[0]).log_prob(row[1])

    return np.asarray(jax.lax.map(log_b, (data.obs, data.action), batch_size=BLOCK), np.float64)


def portions(updates):
    """The numbers of the updates, in arrays of CHUNK."""
    return [jnp.arange(i, min(i + CHUNK, updates)) for i in range(0, updates, CHUNK)]


# --- Fitted Q evaluation, of all policies at once ---


@struct.dataclass
class State:
    critic: TrainState  # its output times 1 / (1 - gamma) is Q
    target: dict  # Polyak average of critic.params


def init(key, data, cfg):
    """Fresh Q of one policy; `data`, a Batch, gives sizes."""
    net = Critic(cfg.widths)
    params, tx = net.init(key, data.obs[0], data.action[0]), optax.adamw(cfg.lr, weight_decay=1e-5)
    return State(TrainState.create(apply_fn=net.apply, params=params, tx=tx), params)


def q_value(state, params, obs, action, cfg):
    """Q(s, a), (...)."""
    return state.critic.apply_fn(params, obs, action) / (1 - cfg.gamma)


def bellman(state, batch, next_action, bounds, cfg):
    """r + gamma Q_target(s', a') (B,), within what any policy can earn."""
    q_next = q_value(state, state.target, batch.next_obs, next_action, cfg)
    return (batch.reward + cfg.gamma * (1 - batch.done) * q_next).clip(*bounds)


def critic_loss(q_params, state, batch, next_action, bounds, cfg):
    """One-step regression onto `bellman`, both times 1 - gamma."""
    target = bellman(state, batch, next_action, bounds, cfg)
    q = q_value(state, q_params, batch.obs, batch.action, cfg)
    loss = jnp.mean(((q - target) * (1 - cfg.gamma)) ** 2)
    return loss, {"critic_loss": loss}


def fit_chunk(state, data, next_mean, key, steps, bounds, cfg):
    """The updates `steps` of one policy's Q; next_mean (N, A): act's actions at next_obs."""

    def one(state, t):
        k_rows, k_next = jax.random.split(jax.random.fold_in(key, t))
        rows = jax.random.randint(k_rows, (cfg.batch_size,), 0, len(data.reward))
        batch = jax.tree.map(lambda x: x[rows], data)
        next_action = noisy(k_next, next_mean[rows], cfg)
        args = state, batch, next_action, bounds, cfg
        critic, info = descend(critic_loss, state.critic, *args)
        target = optax.incremental_update(critic.params, state.target, cfg.polyak)
        return State(critic, target), info

    state, metrics = jax.lax.scan(one, state, steps)
    return state, jax.tree.map(jnp.mean, metrics)


def fit(data, mean, next_mean, key, cfg):
    """Q at the data's actions and V, (P, N) each, of P policies by a vmap over all of them.

    mean, next_mean: act's actions (P, N, A) at obs and next_obs.
    """
    low, high = min(0.0, float(data.reward.min())), max(0.0, float(data.reward.max()))
    bounds = low / (1 - cfg.gamma), high / (1 - cfg.gamma)
    if cfg.num_updates < (enough := round(5 / cfg.polyak / (1 - cfg.gamma))):
        print(f"Note: Q settles in some {enough:,} updates, FQE makes {cfg.num_updates:,}.")
    k_init, k_fit, k_value = jax.random.split(key, 3)
    keys = jnp.broadcast_to(k_init, len(mean))  # all begin and draw alike: only the policies differ
    state = jax.jit(jax.vmap(partial(init, cfg=cfg), (0, None)))(keys, data)
    chunk = jax.vmap(partial(fit_chunk, bounds=bounds, cfg=cfg), (0, None, 0, None, None))
    chunk = jax.jit(chunk, donate_argnums=0)
    for steps in portions(cfg.num_updates):
        state, metrics = chunk(state, data, next_mean, k_fit, steps)
        if (done := int(steps[-1]) + 1) % max(1, cfg.num_updates // 5) < CHUNK:
            loss = float(metrics["critic_loss"].mean())
            print(f"FQE: {done:,}/{cfg.num_updates:,} updates, critic_loss {loss:.3g}")

    def values(row):
        state, obs, action, mean, key = row
        q = q_value(state, state.target, obs, action, cfg)
        drawn = noisy(key, jnp.broadcast_to(mean, (cfg.samples, *mean.shape)), cfg)
        many = jnp.broadcast_to(obs, (cfg.samples, *obs.shape))
        return q, q_value(state, state.target, many, drawn, cfg).mean(0)

    @jax.jit
    def all_values(state, mean):
        def one(row):
            return values((state, *row))

        keys = jax.random.split(k_value, len(data.obs))
        return jax.lax.map(one, (data.obs, data.action, mean, keys), batch_size=BLOCK)

    found = [
        all_values(jax.tree.map(lambda x, i=i: x[i], state), mean[i]) for i in range(len(mean))
    ]
    q, v = (np.stack([np.asarray(x[j], np.float64) for x in found]) for j in (0, 1))
    return q, v


# --- Estimators ---


class Trajectories(NamedTuple):
    """n episodes of one policy, float64; all arrays are 0 after an episode's last step."""

    reward: np.ndarray  # (n, T)
    log_ratio: np.ndarray  # (n, T) log pi(a | s) - log b(a | s)
    q: np.ndarray  # (n, T) Q(s_t, a_t)
    v: np.ndarray  # (n, T) V(s_t)


def pad(rows, length):
    """(n, T) of rows (N,) in n episodes, one after another."""
    padded = np.zeros((len(length), length.max()))
    padded[np.arange(length.max()) < length[:, None]] = rows
    return padded


def weights(log_ratio):
    """rho_0:t (n, T), and the same divided by the largest of a step; neither over- nor underflows.

    After its last step an episode keeps its weight.
    """
    total = np.cumsum(log_ratio, 1)
    return np.exp(total.clip(-700, 700)), np.exp((total - total.max(0)).clip(min=-700))


def estimate(data, gamma, count):
    """{estimator: value (...)} of Trajectories, episode i of which counts count[..., i] times."""
    discount = gamma ** np.arange(data.reward.shape[1])
    rho, share = weights(data.log_ratio)
    total = count.sum(-1, keepdims=True)

    def mean(weight, x):
        return count @ (weight * x) / total

    def weighted(weight, x):
        return count @ (weight * x) / (count @ weight)

    def doubly_robust(mean, weight):
        before = np.concatenate([np.ones_like(weight[:, :1]), weight[:, :-1]], 1)  # rho_0:t-1
        return (mean(weight, data.reward - data.q) + mean(before, data.v)) @ discount

    whole = (data.reward @ discount)[:, None]  # G, (n, 1)
    return {
        "FQE": mean(1, data.v[:, :1])[..., 0],
        "WDR": doubly_robust(weighted, share),
        "DR": doubly_robust(mean, rho),
        "WPDIS": weighted(share, data.reward) @ discount,
        "PDIS": mean(rho, data.reward) @ discount,
        "WIS": weighted(share[:, -1:], whole)[..., 0],
        "IS": mean(rho[:, -1:], whole)[..., 0],
    }


def effective(data, gamma):
    """{estimator: effective number of episodes}, (sum w)^2 / sum w^2 of its weights.

    Of estimators with weights for every step: the mean over steps, discounted.
    """
    _, share = weights(data.log_ratio)
    size = share.sum(0) ** 2 / (share**2).sum(0)  # (T,)
    discount = gamma ** np.arange(len(size))
    by_step, n = float(size @ discount / discount.sum()), float(len(share))
    steps = dict.fromkeys(("WDR", "DR", "WPDIS", "PDIS"), by_step)
    return {"FQE": n, **steps, "WIS": float(size[-1]), "IS": float(size[-1])}


def intervals(data, gamma, resamples, seed):
    """{estimator: (low, high)}, 95 % by the bootstrap over episodes."""
    n = len(data.reward)
    count = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples)
    found = estimate(data, gamma, count.astype(float))
    return {name: np.percentile(x, (2.5, 97.5)).tolist() for name, x in found.items()}


# --- How good the estimates are ---


def true_values(policies, env_id, cfg):
    """Discounted returns (S, episodes) of the policies in the environment."""

    @jax.jit
    def policy(carry, obs, reward, key):
        k_act, k_noise = jax.random.split(key)
        mean, carry = policies.act(policies.state, carry, obs, reward, k_act)
        return noisy(k_noise, mean.clip(-1, 1), cfg), carry

    seeds = len(policies.names)
    return evaluation.evaluate(policy, env_id, seeds, cfg.episodes, cfg.seed, cfg.gamma)


def spearman(a, b):
    """Rank correlation of two vectors; nan if one is constant."""
    a, b = (rankdata(x) - (len(x) + 1) / 2 for x in (a, b))
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale else float("nan")


def regret(estimates, truth, k):
    """What the best of the k policies with the largest estimates lacks, as a share of the range."""
    first = np.argsort(-np.asarray(estimates), kind="stable")[:k]
    span = np.max(truth) - np.min(truth)
    return float((np.max(truth) - np.max(np.asarray(truth)[first])) / span) if span else 0.0


def measures(rows, k):
    """{estimator: {absolute error, Spearman, regret@k}} of rows with a truth."""
    truth, found = np.array([row["truth"] for row in rows]), {}
    for name in ESTIMATORS:
        values = np.array([row[name]["value"] for row in rows])
        error = float(np.abs(values - truth).mean())
        found[name] = {"error": error, "spearman": spearman(values, truth)}
        found[name][f"regret@{k}"] = regret(values, truth, k)
    return found


# --- The command ---


def behaviour_log_prob(dataset, data, key, cfg):
    """(log b(a | s) (N,), where it is from)."""
    stored = datasets.infos(dataset, "probability") if dataset.num_actions else None
    if stored is not None:
        chosen = np.take_along_axis(stored, dataset.action[:, None], 1)[:, 0]
        if not ((chosen > 0) & (chosen <= 1)).all():
            raise SystemExit(
                f"{dataset.name}: an action was taken with a probability not in (0, 1]."
            )
        return np.log(np.float64(chosen)), "stored with the data"
    return cloned(data, key, cfg), f"cloned from the data in {cfg.clone_updates:,} updates"


def ope(cfg, dataset, runs):
    """A row for each policy of `runs`, a list of Policies: {policy, folder, estimates, truth}."""
    k_act, k_clone, k_fit = jax.random.split(jax.random.key(cfg.seed), 3)
    mean = np.concatenate([actions(run, dataset.obs, k_act) for run in runs])  # (P, N, A)
    next_mean = np.concatenate([actions(run, dataset.next_obs, k_act) for run in runs])
    middle, width = dataset.obs.mean(0), dataset.obs.std(0) + 1e-3
    scale = float(dataset.reward.std()) or 1.0
    data = dataset.transitions()._replace(
        obs=(dataset.obs - middle) / width,
        next_obs=(dataset.next_obs - middle) / width,
        reward=dataset.reward / np.float32(scale),
    )
    data = jax.tree.map(jnp.asarray, data)
    log_b, source = behaviour_log_prob(dataset, data, k_clone, cfg)
    print(f"Behaviour: {source}.")
    log_pi = [np.asarray(log_prob(x, data.action, cfg), np.float64) for x in mean]
    limits = (-np.inf, np.inf) if source.startswith("stored") else cfg.clip
    q, v = fit(data, jnp.asarray(mean), jnp.asarray(next_mean), k_fit, cfg)
    rows, names = [], [(name, run.folder) for run in runs for name in run.names]
    for i, (name, folder) in enumerate(names):
        columns = dataset.reward, (log_pi[i] - log_b).clip(*limits), scale * q[i], scale * v[i]
        episodes = Trajectories(*(pad(x, dataset.length) for x in columns))
        values = estimate(episodes, cfg.gamma, np.ones(len(dataset.length)))
        ranges = intervals(episodes, cfg.gamma, cfg.resamples, cfg.seed)
        sizes, row = effective(episodes, cfg.gamma), {"policy": name, "folder": str(folder)}
        for x in ESTIMATORS:
            row[x] = {"value": float(values[x]), "interval": ranges[x], "effective": sizes[x]}
        rows.append(row)
    if cfg.truth:
        returns = np.concatenate([true_values(run, dataset.env_id, cfg) for run in runs])
        for row, x in zip(rows, returns, strict=True):
            row |= {"truth": float(x.mean()), "truth_sem": float(x.std() / np.sqrt(len(x)))}
    return rows, source


def show(rows, episodes, cfg):
    """Prints estimates, ranking and, if the truth is known, measures."""
    rows = sorted(rows, key=lambda row: -row[cfg.rank]["value"])
    for row in rows:
        print(f"\n{row['policy']}  {row['folder']}")
        if "truth" in row:
            print(f"  truth {row['truth']:10.4g} +- {row['truth_sem']:.2g}")
        for name in ESTIMATORS:
            low, high = row[name]["interval"]
            size = row[name]["effective"]
            line = f"  {name:5} {row[name]['value']:10.4g}  [{low:.4g}, {high:.4g}]"
            if name != "FQE":
                line += f"  {size:.1f} effective of {episodes} episodes"
                line += "  collapsed" if size < FEW else ""
            print(line)
    print(f"\nRanking by {cfg.rank}")
    for i, row in enumerate(rows):
        told = f", truth {row['truth']:.4g}" if "truth" in row else ""
        print(f"  {i + 1:2}. {row['policy']}: {row[cfg.rank]['value']:.4g}{told}")
    collapsed = [x for x in ESTIMATORS if any(row[x]["effective"] < FEW for row in rows)]
    if collapsed:
        print(
            f"Warning: the weights of {', '.join(collapsed)} have collapsed: few episodes decide."
        )
    if "truth" in rows[0]:
        print(f"\n{'':6}{'error':>10}{'Spearman':>10}{f'regret@{cfg.k}':>10}")
        for name, x in measures(rows, cfg.k).items():
            print(f"{name:6}" + "".join(f"{value:10.3g}" for value in x.values()))


def check(cfg):
    """SystemExit for a setting that cannot be."""
    if not cfg.policies:
        raise SystemExit("--policies: name at least one run folder.")
    if cfg.rank not in ESTIMATORS:
        raise SystemExit(f"--rank {cfg.rank}: must be one of {', '.join(ESTIMATORS)}.")
    if not 0 <= cfg.gamma < 1:
        raise SystemExit(f"--gamma {cfg.gamma}: must be at least 0 and below 1.")
    if not 0 < cfg.std < np.inf:
        raise SystemExit(
            f"--std {cfg.std}: must be above 0; a policy without noise has no density."
        )
    if not 0 < cfg.epsilon <= 1:
        raise SystemExit(f"--epsilon {cfg.epsilon}: must be above 0 and at most 1.")
    for name in ("num_updates", "clone_updates", "batch_size", "samples", "resamples", "episodes"):
        if getattr(cfg, name) < 1:
            flag = name.replace("_", "-")
            raise SystemExit(f"--{flag} {getattr(cfg, name)}: must be at least 1.")


def main(cfg: Config):
    check(cfg)
    experiment.runtime.open_streams()
    experiment.runtime.import_own(cfg.env_module)
    first, _ = experiment.read(Path(cfg.policies[0]).expanduser().resolve())
    told = cfg.env, cfg.env_id
    dataset = datasets.load(*told if cfg.env else (first["dataset"]["name"], cfg.env_id))
    cfg = replace(cfg, discrete=dataset.num_actions > 0)
    if cfg.truth and not dataset.env_id:
        raise SystemExit(f"--truth: {dataset.name} has no environment; name one with --env-id.")
    runs = [load(folder, dataset) for folder in cfg.policies]
    count = sum(len(run.names) for run in runs)
    noise = f"epsilon {cfg.epsilon}" if cfg.discrete else f"std {cfg.std}"
    print(f"{dataset.name}: {len(dataset.length):,} episodes, {count} policies, {noise}")
    rows, source = ope(cfg, dataset, runs)
    show(rows, len(dataset.length), cfg)
    if cfg.out:
        found = {"config": vars(cfg), "dataset": dataset.name, "behaviour": source, "rows": rows}
        found |= {"measures": measures(rows, cfg.k)} if cfg.truth else {}
        with experiment.files.asked_for("--out", Path(cfg.out)):
            Path(cfg.out).write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(tyro.cli(Config))
