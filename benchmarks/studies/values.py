"""Is Q conservative? The return that the critics predict against the return that the policy earns.

    python -m benchmarks.studies.values runs/cql/... runs/combo/...

The simulator starts at states drawn from the data, takes the data's action or the policy's, and
then follows the policy. Q(s, a) is the smaller of the run's two critics:

    q_data, q_pi        mean Q at the data's actions and at the policy's
    true_data, true_pi  mean discounted return from there, by Monte Carlo in the simulator

A lower bound has q_pi <= true_pi. Writes benchmarks/results/values.json.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.scores.runs import origin
from common import datasets, evaluation, experiment

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Config:
    runs: tyro.conf.Positional[tuple[str, ...]]  # run folders of actor-critic algorithms
    num_states: int = 200  # states drawn from the data
    horizon: int = 500  # steps of a return; 0.99^500 = 0.007
    seed: int = 0  # of the drawn states and of the policy's samples
    out: str = str(ROOT / "benchmarks/results/values.json")  # file to write


def place(env, obs):
    """Sets a Hopper, Walker2d or HalfCheetah to the state of obs (D,), at x = 0."""
    num_q = env.unwrapped.model.nq
    env.reset()
    env.unwrapped.set_state(np.r_[0.0, obs[: num_q - 1]], np.asarray(obs[num_q - 1 :], float))


def true_returns(envs, policy, obs, action, key, gamma, horizon):
    """Discounted returns (n,) of action (n, A) at obs (n, D), followed by the policy.

    policy: (obs (n, D), key) -> action (n, A).
    """
    for env, o in zip(envs, obs, strict=True):
        place(env, o)
    obs, total, alive = np.array(obs), np.zeros(len(obs)), list(range(len(obs)))
    for t in range(horizon):
        for i in list(alive):
            obs[i], reward, terminated, _, _ = envs[i].step(action[i])
            total[i] += gamma**t * reward
            if terminated:
                alive.remove(i)
        action = np.asarray(policy(obs, jax.random.fold_in(key, t))).clip(-1, 1)
    return total


def measure(run, cfg):
    """The row of results for the first seed of a run."""
    module, own, state = evaluation.load(run)
    state = jax.tree.map(lambda x: x[0], state)
    data = datasets.load(own.env, own.env_id)
    rows = np.random.default_rng(cfg.seed).choice(len(data.obs), cfg.num_states, replace=False)
    obs, action = data.obs[rows], data.action[rows]

    @jax.jit
    def sample(obs, key):
        pi = state.actor.apply_fn(state.actor.params, module.normalise(state, obs))
        return pi.sample(seed=key)

    @jax.jit
    def q(obs, action):
        obs = module.normalise(state, obs)
        return state.critic.apply_fn(state.critic.params, obs, action).min(0)

    k_action, k_data, k_pi = jax.random.split(jax.random.key(cfg.seed), 3)
    own_action = np.asarray(sample(obs, k_action)).clip(-1, 1)
    envs = [evaluation.make(data.env_id, max_episode_steps=cfg.horizon + 1) for _ in rows]
    true = partial(true_returns, envs, sample, obs, gamma=own.gamma, horizon=cfg.horizon)
    title = Path(module.__file__).stem.upper()
    if title == "CQL" and own.alpha == 0:
        title = "SAC (cql --alpha 0)"
    if title == "COMBO":
        title += f", beta {own.beta:g}"
    return {
        "run": title,
        **origin(run),
        "dataset": own.env,
        "num_updates": own.num_updates,
        "q_data": float(jnp.mean(q(obs, action))),
        "true_data": float(true(action, k_data).mean()),
        "q_pi": float(jnp.mean(q(obs, own_action))),
        "true_pi": float(true(own_action, k_pi).mean()),
    }


def main(cfg: Config):
    rows = [measure(run, cfg) for run in cfg.runs]
    for row in rows:
        print(", ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{v}" for k, v in row.items()))
    settings = {k: v for k, v in vars(cfg).items() if k not in ("runs", "out")}
    record = experiment.machine() | {"config": settings, "rows": rows}
    Path(cfg.out).write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
