"""Whole episodes of many policies at once."""

import functools
import itertools
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from common.evaluation.environments import make


@functools.lru_cache(maxsize=2)
def _pool(env_id, count):
    return [make(env_id) for _ in range(count)]


def evaluate(policy, env_id, num_seeds, episodes, seed=0):
    """Undiscounted returns of whole episodes, (num_seeds, episodes) float64.

    policy: (carry, obs (S, E, D), reward (S, E), key) -> (action (S, E, A), carry) for S seeds and
        E episodes, which all begin together. Called once per time step, always with these shapes
        in float32. carry is the policy's own memory, any pytree: None at the first step, then what
        it returned (so a jitted one with memory compiles twice, one without it once). reward is
        what the action before earned, 0 at first; key is fold_in(key(seed), time step). Actions
        are clipped to [-1, 1].
    seed: episode j of every policy seed is reset with environment seed `seed + j`: all seeds and
        all evaluations meet the same starts.

    An episode that has ended is not stepped any more: there is no autoreset whose step could be
    counted, and the policy sees its last observation until the longest episode has ended. A seed
    with an action that is not finite has failed: its returns are all nan, the others go on.
    No episodes: an empty array, and no environment is made. Raises EvaluationError as `make`.
    Environments are kept and shared: not for several threads. They are stepped on all cores: MuJoCo
    computes without Python's lock, and no episode knows of another.
    """
    if episodes == 0:
        return np.zeros((num_seeds, 0))
    return rollout(policy, _pool(env_id, num_seeds * episodes), num_seeds, seed)


def _cores():
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()


_threads = functools.cache(ThreadPoolExecutor)


def _stepped(envs, rows, action):
    """(row, what its environment's step returns) for these rows; each core has a part of them."""

    def some(part):
        return [(i, envs[i].step(action[i])) for i in part]

    workers = min(_cores(), len(rows))
    if workers == 1:
        return some(rows)
    ends = [len(rows) * k // workers for k in range(workers + 1)]
    parts = [rows[begin:end] for begin, end in itertools.pairwise(ends)]
    return itertools.chain.from_iterable(_threads(workers).map(some, parts))


_fold_in = jax.jit(jax.random.fold_in)  # compiled at its first call


def rollout(policy, envs, num_seeds, seed):
    """`evaluate` in given environments; episode j of seed s is row s * E + j."""
    rows, shape = len(envs), (num_seeds, len(envs) // num_seeds)
    start = [env.reset(seed=seed + i % shape[1])[0] for i, env in enumerate(envs)]
    obs, reward, returns = np.float32(start), np.zeros(rows, np.float32), np.zeros(rows)
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
        obs, reward = obs.copy(), np.zeros_like(reward)  # anew: a carry may hold the old arrays
        for i, result in _stepped(envs, active, action):
            obs[i], gained, terminated, truncated, _ = result
            reward[i] = gained
            returns[i] += gained
            if not (terminated or truncated):
                running.append(i)
        active = running
        if not active:
            return returns.reshape(shape)
