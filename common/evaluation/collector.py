"""Steps environments one step at a time, for training with them."""

from functools import partial

import jax
import numpy as np

from common.evaluation.environments import make
from common.evaluation.rollout import stepped


class Collector:
    """One environment for each of S seeds; an episode follows the last one.

    obs: (S, D) float32, what each environment shows now.

    Each episode is reset with an environment seed of its own, so what an environment does follows
    from that and from the actions since then. A later Collector can go on where one stopped.
    """

    def __init__(self, env_id, seeds, action=(), end=()):
        """env_id: as for `make`; raises EvaluationError as `make` does. seeds: (S,) int.

        To go on after n steps: action (S, n, A) and end (S, n), as `step` returned them. The
        actions of the unfinished episodes are taken again.
        """
        self._envs = [make(env_id) for _ in seeds]
        self._seeds, self._episode = np.asarray(seeds), np.zeros(len(seeds), int)
        self.obs = np.stack([self._reset(i) for i in range(len(seeds))])
        for i, ends in enumerate(np.asarray(end, bool)):
            self._episode[i] = ends.sum()
            self.obs[i] = self._reset(i)
            begin = np.flatnonzero(ends)[-1] + 1 if ends.any() else 0
            for a in np.asarray(action[i], np.float32)[begin:]:
                self.obs[i] = self._envs[i].step(a)[0]

    def _reset(self, i):
        """The first observation of the next episode of seed i."""
        words = np.random.SeedSequence([self._seeds[i], self._episode[i]]).generate_state(1)
        return np.float32(self._envs[i].reset(seed=int(words[0] >> 1))[0])

    def step(self, action):
        """One step of every environment: (obs, action, reward, next_obs, done, end) in float32.

        action: (S, A), clipped to [-1, 1]; one that is not finite becomes 0. The returned shapes
        are (S, D), (S, A), (S,), (S, D), (S,), (S,). done: 1 at a true terminal. end: 1 at the last
        step of an episode, at a time limit too; even then next_obs is of the same episode.
        """
        obs, rows = self.obs, range(len(self._envs))
        action = np.nan_to_num(np.asarray(action, np.float32), posinf=0, neginf=0).clip(-1, 1)
        next_obs, (reward, done, end) = np.empty_like(obs), np.zeros((3, len(obs)), np.float32)
        for i, (seen, gained, terminated, truncated, _) in stepped(self._envs, rows, action):
            next_obs[i], reward[i] = seen, np.asarray(gained, float).item()
            done[i], end[i] = terminated, terminated or truncated
        self.obs = next_obs.copy()
        for i in np.flatnonzero(end):
            self._episode[i] += 1
            self.obs[i] = self._reset(i)
        return obs, action, reward, next_obs, done, end


@partial(jax.jit, donate_argnums=0)
def _store(held, rows, at):
    """Arrays (S, M, ...) with `rows` (S, ...) at index `at` of axis 1, written in place."""
    return jax.tree.map(lambda x, y: x.at[:, at].set(y), held, rows)


def alternate(chunk, explore, learn, transform, env_id, cfg, first, wait=0):
    """`chunk` until update `first`; from then on a step of the environment before every update.

    chunk: (state, data, keys, step) -> (state, metrics) of all seeds: updates up to `step`.
    explore: (state, obs (D,), key, t) -> action (A,) of one seed, to take before update t.
    learn: (state, data, key, t) -> (state, metrics) of one seed: update t.
    transform: of rewards, as those of `data` have been.
    env_id: as for `make`; raises EvaluationError as `make` does.
    cfg: with seed, num_seeds and log_every, the updates of a call.
    wait: steps of the environment between update `first` and the next; `explore` sees t = first -
        wait + 1, ..., first there.

    A state has `replay`, a Batch of (S, M, ...), and `end` (S, M), 1 at the last row of an episode.
    The first t - first + wait rows are filled when update t is made.

    Returns a function to use like `chunk`. A resumed run goes on in the same episodes.
    """
    seeds, envs = cfg.seed + np.arange(cfg.num_seeds), None
    act = jax.jit(jax.vmap(explore, (0, 0, 0, None)))
    learn = jax.jit(jax.vmap(learn, (0, None, 0, None)), donate_argnums=0)

    def take_step(state, keys, t):
        obs, action, reward, *others, end = envs.step(act(state, envs.obs, keys, t))
        rows = type(state.replay)(obs, action, transform(reward), *others), end
        replay, end = _store((state.replay, state.end), rows, t - first - 1 + wait)
        return state.replace(replay=replay, end=end)

    def both(state, data, keys, step):
        nonlocal envs
        if step <= first:
            return chunk(state, data, keys, step)
        begin, found = step - cfg.log_every, []
        filled = begin - first + wait if begin > first else 0
        if envs is None:
            told = (x[:, :filled] for x in (state.replay.action, state.end))
            envs = Collector(env_id, seeds, *map(np.asarray, told))
        for t in range(first - wait + 1 + filled, step + 1):
            state = take_step(state, keys, t)
            if t > first:
                state, metrics = learn(state, data, keys, t)
                found.append(metrics)
        found = jax.device_get(found)
        return state, {name: np.mean([x[name] for x in found], 0) for name in found[0]}

    return both
