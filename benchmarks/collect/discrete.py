"""Collects datasets with discrete actions: trains DQN online, then records its policies.

    python -m benchmarks.collect.discrete --env-id CartPole-v1 --kind replay

    random   uniform actions
    medium   the first policy that reached half of the way from uniform actions to the best policy;
             in each episode epsilon is 0.2, or 0.001 with probability 0.2
    replay   random whole episodes from the training, in order
    expert   the best policy, with epsilon 0.001

With probability epsilon an action is uniform, else it has the largest Q. The behaviour's
probability of every action is stored with each row, for off-policy evaluation: in Minari's infos,
`probability` (T, A). A time limit is a truncation, never a termination. The result is a Minari
dataset with its provenance: `<out>/stillwater/<env>/<kind>-v0/data/{metadata.json,main_data.hdf5}`.

Other environments with discrete actions need their packages and perhaps a time limit:

    --env-id LunarLander-v3
    --env-id 'MinAtar/Breakout-v1 {"max_episode_steps": 1000}' --env-module MODULE

All kinds of one environment and seed share one DQN, which is algorithms/discrete_cql.py with
--alpha 0 on the replay that it fills. Every 1,000 steps its greedy policy is scored in ten
episodes: these are the policies to choose from. The mixture of epsilons is that of Fujimoto et al.
2019, arXiv:1910.01708; the score is 0 at the return of uniform actions and 100 at that of the best
policy, both measured here.
"""

import json
import re
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium
import jax
import numpy as np
import tyro
from flax import serialization

from algorithms import discrete_cql
from benchmarks.collect import recording
from benchmarks.collect.recording import (
    FIELDS,
    cut,
    episode_returns,
    export,
    thin,
    write,
)
from common import datasets, evaluation
from common.experiment import runtime

EPISODES = 100  # that measure a policy's return
NAMES = (*FIELDS, "probability")  # columns of a recording
EPSILONS = {  # of an episode: [(epsilon, its probability)]
    "random": [(1.0, 1.0)],
    "medium": [(0.2, 0.8), (0.001, 0.2)],
    "expert": [(0.001, 1.0)],
    "greedy": [(0.0, 1.0)],
}
MADE_BY = {"random": "uniform actions"}  # the others: DQN


@dataclass(frozen=True)
class Config:
    env_id: str = "CartPole-v1"  # Gymnasium id
    env_module: str = ""  # Python module to import, which registers the environment
    kind: Literal["random", "medium", "replay", "expert"] = "replay"  # policies that act
    seed: int = 0  # of DQN, the environments and the recorded actions
    num_steps: int = 20_000  # transitions in the dataset at most
    dqn_steps: int = 50_000  # environment steps of DQN's training
    medium_fraction: float = 0.5  # of the way from the random to the best return
    out: str = "data"  # folder for Minari datasets
    work: str = "runs/collect"  # folder for DQN
    # --- DQN ---
    start_steps: int = 1_000  # steps with uniform actions and without updates
    explore_steps: int = 10_000  # steps in which epsilon falls to its last value
    last_epsilon: float = 0.05  # share of uniform actions from then on
    score_every: int = 1_000  # steps between policies to choose from
    batch_size: int = 128  # transitions per gradient step; one gradient step per environment step
    gamma: float = 0.99  # discount
    lr: float = 1e-4  # Adam
    polyak: float = 0.005  # step of the target network
    widths: tuple[int, ...] = (128, 128)  # hidden layers


class Trained(NamedTuple):
    """A training of DQN: its rows in order, and its policies."""

    rows: dict  # {name: array (N, ...)} of FIELDS and "probability"
    steps: list  # (P,) environment steps before each policy
    returns: list  # (P,) mean greedy returns
    states: list  # (P,) discrete_cql.State


update = jax.jit(discrete_cql.update, static_argnames="cfg", donate_argnums=0)
greedy = jax.jit(discrete_cql.act)


def online(cfg):
    """The Config of algorithms/discrete_cql.py."""
    names = "batch_size", "gamma", "lr", "polyak", "widths"
    return discrete_cql.Config(alpha=0.0, **{name: getattr(cfg, name) for name in names})


def draw(probability, rng):
    """An action (A,), 1 at one and 0 elsewhere, of these probabilities (A,)."""
    return np.eye(len(probability), dtype=np.float32)[rng.choice(len(probability), p=probability)]


def mixed(best, epsilon):
    """Probabilities (A,) of the actions, from the best action (A,)."""
    p = epsilon / len(best) + (1 - epsilon) * np.asarray(best, np.float64)
    return p / p.sum()


def play(envs, state, kind, rng, num_steps):
    """Whole episodes, in rounds of one per environment, until there are `num_steps` rows.

    state: of the policy. kind: of EPSILONS. Returns {name: array} of FIELDS and "probability".
    """
    values, weights = zip(*EPSILONS[kind], strict=True)

    def begin():
        epsilon = rng.choice(values, len(envs), p=weights)

        def take(best, i):
            p = mixed(best, epsilon[i])
            return draw(p, rng), p

        return take

    def policy(obs):
        return greedy(state, obs.astype(np.float32))

    return recording.play(envs, policy, rng, num_steps, begin, NAMES)


def fresh(cfg, env):
    """DQN before training."""
    d, a = env.observation_space.shape[0], env.action_space.shape[0]
    shapes = datasets.Batch((1, d), (1, a), (1,), (1, d), (1,))
    sizes = datasets.Batch(*(np.zeros(shape, np.float32) for shape in shapes))
    init = jax.jit(partial(discrete_cql.init, cfg=online(cfg)))
    return jax.tree.map(jax.numpy.copy, init(jax.random.key(cfg.seed), sizes))  # to be donated


def train(cfg, env):
    """Trains DQN: a Trained."""
    state, own, rng = fresh(cfg, env), online(cfg), np.random.default_rng(cfg.seed)
    d, a = env.observation_space.shape, env.action_space.shape
    shapes = {"obs": d, "action": a, "next_obs": d, "probability": a}
    kinds = {"terminated": bool, "truncated": bool, "probability": np.float64}
    rows = {
        name: np.zeros((cfg.dqn_steps, *shapes.get(name, ())), kinds.get(name, np.float32))
        for name in NAMES
    }
    steps, returns, states = [], [], []
    obs, _ = env.reset(seed=cfg.seed)
    for step in range(cfg.dqn_steps):
        way = min(max(step - cfg.start_steps, 0) / cfg.explore_steps, 1)
        p = mixed(greedy(state, obs.astype(np.float32)), 1 + way * (cfg.last_epsilon - 1))
        action = draw(p, rng)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        row = obs, action, reward, next_obs, terminated, truncated, p
        for name, value in zip(NAMES, row, strict=True):
            rows[name][step] = value
        obs = env.reset()[0] if terminated or truncated else next_obs
        if step >= cfg.start_steps:
            chosen = rng.integers(0, step + 1, cfg.batch_size)
            batch = datasets.Batch(*(rows[name][chosen].astype(np.float32) for name in NAMES[:5]))
            state, _ = update(state, batch, None, own)
        if (step + 1) % cfg.score_every == 0:
            kept = jax.tree.map(np.array, state)  # a copy: the buffers are donated
            policy = partial(act, kept)
            score = evaluation.evaluate(policy, cfg.env_id, 1, 10, seed=cfg.seed).mean()
            steps, returns, states = [*steps, step + 1], [*returns, float(score)], [*states, kept]
            print(f"{step + 1:>9,} steps  return {score:8.1f}", flush=True)
    return Trained(rows, steps, returns, states)


def act(state, carry, obs, *_):
    """The greedy policy as evaluation calls it."""
    return greedy(state, obs), carry


def load_or_train(cfg, env):
    """The Trained of these settings, from the folder `work` if it is there."""
    name = re.sub(r"[^\w.-]+", "-", cfg.env_id)  # it may have options
    folder = Path(cfg.work) / f"{name}-s{cfg.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    left_out = "kind", "num_steps", "out", "work", "medium_fraction"
    settings = json.dumps({k: v for k, v in asdict(cfg).items() if k not in left_out})
    told = folder / "settings.json"
    if told.exists():
        if told.read_text("utf-8") != settings:
            raise SystemExit(f"{folder} was made with other settings; choose another --work")
        rows = dict(np.load(folder / "rows.npz", allow_pickle=False))
        raw = serialization.msgpack_restore((folder / "policies.msgpack").read_bytes())
        empty = fresh(cfg, env)
        kept = [raw["states"][str(i)] for i in range(len(raw["steps"]))]
        states = [serialization.from_state_dict(empty, x) for x in kept]
        return Trained(rows, list(raw["steps"]), list(raw["returns"]), states)
    trained = train(cfg, env)
    np.savez(folder / "rows.npz", **trained.rows)
    states = {str(i): serialization.to_state_dict(x) for i, x in enumerate(trained.states)}
    kept = {"steps": trained.steps, "returns": trained.returns, "states": states}
    write(folder / "policies.msgpack", serialization.msgpack_serialize(kept))
    write(told, settings.encode())
    return trained


def mean_return(envs, state, kind, seed):
    """The mean return of EPISODES episodes."""
    rng, rounds = np.random.default_rng([seed, 2]), range(EPISODES // len(envs))
    return float(np.mean([episode_returns(play(envs, state, kind, rng, 1)) for _ in rounds]))


def main(cfg: Config):
    runtime.import_own(cfg.env_module)
    env = evaluation.make(cfg.env_id)
    count = evaluation.inspect(cfg.env_id).num_actions
    if not count:
        raise SystemExit(f"{cfg.env_id} has no discrete actions: use benchmarks.collect")
    trained = load_or_train(cfg, env)
    envs = [evaluation.make(cfg.env_id) for _ in range(10)]
    best = max(range(len(trained.returns)), key=lambda i: (trained.returns[i], i))  # the last one
    worst = mean_return(envs, trained.states[0], "random", cfg.seed)
    ref = worst, mean_return(envs, trained.states[best], "greedy", cfg.seed)
    if ref[1] <= worst:
        told = f"DQN's best policy earns {ref[1]:.1f}, uniform actions {worst:.1f}"
        raise SystemExit(f"--dqn-steps {cfg.dqn_steps}: {told}: train longer.")
    goal = worst + cfg.medium_fraction * (trained.returns[best] - worst)
    medium = next(i for i, x in enumerate(trained.returns) if x >= goal)
    about = {"best_at_step": trained.steps[best], "medium_at_step": trained.steps[medium]}
    about["policies"] = dict(zip(map(str, trained.steps), trained.returns, strict=True))
    if cfg.kind == "replay":
        rows = thin(trained.rows, cfg.num_steps, np.random.default_rng([cfg.seed, 1]))
    else:
        state = trained.states[medium if cfg.kind == "medium" else best]
        rng = np.random.default_rng([cfg.seed, 1])
        rows = cut(play(envs, state, cfg.kind, rng, cfg.num_steps), cfg.num_steps)
        about[f"{cfg.kind}_policy_return"] = {
            "sampled": mean_return(envs, state, cfg.kind, cfg.seed),
            "deterministic": mean_return(envs, state, "greedy", cfg.seed),
        }
    rows |= {"action": rows["action"].argmax(1), "probability": np.float32(rows["probability"])}
    path = export(
        cfg,
        rows,
        env.observation_space.shape,
        gymnasium.spaces.Discrete(count),
        (*ref, f"means of {EPISODES} episodes: of uniform actions, and of DQN's best policy"),
        about,
        made_by=MADE_BY.get(cfg.kind, "DQN"),
        infos=["probability"],
    )
    returns = episode_returns(rows)
    print(f"{path}: {len(rows['reward']):,} steps, {len(returns):,} episodes, return "
          f"{returns.mean():.1f} +- {returns.std():.1f}")  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
