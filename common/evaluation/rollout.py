"""Runs whole episodes of many policies at once."""

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from common.evaluation.environments import make
from common.experiment import runtime


@functools.lru_cache(maxsize=2)
def _pool(env_id, count):
    return [make(env_id) for _ in range(count)]


def evaluate(policy, env_id, num_seeds, episodes, seed=0, gamma=1.0):
    """Returns of whole episodes, (num_seeds, episodes) float64.

    policy: (carry, obs (S, E, D), reward (S, E), key) -> (action (S, E, A), carry) for S seeds and
        E episodes, which all begin together. It is called once per time step, always with these
        shapes in float32. carry is the policy's own memory, any pytree: None at the first step,
        then what the policy returned (so a jitted policy with memory compiles twice). reward is
        what the last action earned, 0 at first. key is fold_in(key(seed), time step). Actions are
        clipped to [-1, 1].
    env_id: as for `make`; raises EvaluationError as `make` does.
    seed: episode j of every policy is reset with environment seed `seed + j`, so that all policies
        and all evaluations have the same starts.
    gamma: discount, in [0, 1].

    An ended episode is not stepped or reset; its policy sees the last observation until the longest
    episode ends. If an action is not finite, the returns of that seed are nan and the other seeds
    continue. With 0 episodes no environment is made.

    Environments are kept for the next call, so calls must not overlap in several threads. They are
    stepped on all cores: MuJoCo releases Python's lock, and episodes are independent.
    """
    return outcomes(policy, env_id, num_seeds, episodes, seed, gamma)[0]


def outcomes(policy, env_id, num_seeds, episodes, seed=0, gamma=1.0):
    """(returns, successes) of `evaluate`, each (num_seeds, episodes) float64.

    success: the largest `success` that the environment's info told at any step; nan if it has none.
    """
    if episodes == 0:
        return np.zeros((2, num_seeds, 0))
    return rollout(policy, _pool(env_id, num_seeds * episodes), num_seeds, seed, gamma)


_threads = functools.cache(ThreadPoolExecutor)


def stepped(envs, rows, action):
    """(row, result of its environment's step) for each of `rows`, which the cores share."""

    def some(part):
        return [(i, envs[i].step(action[i])) for i in part]

    workers = min(runtime.cores(), len(rows))
    if workers == 1:
        return some(rows)
    ends = [len(rows) * k // workers for k in range(workers + 1)]
    parts = [rows[begin:end] for begin, end in itertools.pairwise(ends)]
    return itertools.chain.from_iterable(_threads(workers).map(some, parts))


def told(info):
    """The number `success` of an environment's info, or nan."""
    try:
        return float(info["success"])
    except (KeyError, TypeError, ValueError):
        return np.nan


_fold_in = jax.jit(jax.random.fold_in)


def rollout(policy, envs, num_seeds, seed, gamma=1.0):
    """`outcomes` in the given environments; episode j of seed s is row s * E + j."""
    rows, shape = len(envs), (num_seeds, len(envs) // num_seeds)
    start = [env.reset(seed=seed + i % shape[1])[0] for i, env in enumerate(envs)]
    obs, reward, returns = np.float32(start), np.zeros(rows, np.float32), np.zeros(rows)
    success = np.full(rows, np.nan)
    key, carry, active = jax.random.key(seed), None, range(rows)
    for t in itertools.count():
        inputs = obs.reshape(*shape, -1), reward.reshape(shape), _fold_in(key, t)
        action, carry = policy(carry, *inputs)
        action = np.asarray(action, np.float32).reshape(rows, *envs[0].action_space.shape)
        if not np.isfinite(action).all():
            failed = {i // shape[1] for i in active if not np.isfinite(action[i]).all()}
            returns.reshape(shape)[list(failed)] = np.nan
            active = [i for i in active if i // shape[1] not in failed]

        action, running = action.clip(-1, 1), []
        obs, reward = obs.copy(), np.zeros_like(reward)  # copies: the carry may hold the old arrays
        for i, result in stepped(envs, active, action):
            obs[i], gained, terminated, truncated, info = result
            gained = np.asarray(gained, float).item()  # some environments return an array of one
            reward[i] = gained
            returns[i] += gamma**t * gained
            success[i] = np.fmax(success[i], told(info))
            if not (terminated or truncated):
                running.append(i)
        active = running
        if not active:
            return returns.reshape(shape), success.reshape(shape)
