"""An algorithm's `act` as a policy: in the form that evaluation takes, and for one's own code."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from common.evaluation import stateless


def pure(module, cfg):
    """(state, carry, obs, reward, key) -> (action, carry) for one seed, of an algorithm's file.

    Its `act` is either act(state, obs) or, with memory, act(state, carry, obs, reward, key, cfg).
    """
    if len(inspect.signature(module.act).parameters) == 2:
        return stateless(module.act)
    return partial(module.act, cfg=cfg)


def of_seeds(module, cfg):
    """The same for all seeds, on axis 0, as the file itself evaluates them; not jitted."""
    if hasattr(module, "act_all"):
        return partial(module.act_all, cfg=cfg)
    return jax.vmap(pure(module, cfg), (0, 0, 0, 0, None))


class Policy:
    """Calls `act`, see `pure`, and keeps its memory from one step of an episode to the next."""

    def __init__(self, act, state):
        self._act, self._state = jax.jit(act), state
        self.reset()

    def reset(self):
        """Begin an episode."""
        self._carry, self._key = None, jax.random.key(0)

    def __call__(self, obs, reward=0.0):
        """obs (D,) or (E, D) -> action (A,) or (E, A) in [-1, 1], numpy.

        reward: what the last action earned, a number or (E,); only policies with memory ask for it.
        """
        rows = jnp.atleast_2d(jnp.asarray(obs, jnp.float32))
        reward = jnp.broadcast_to(jnp.float32(reward), rows.shape[:1])
        self._key, key = jax.random.split(self._key)
        action, self._carry = self._act(self._state, self._carry, rows, reward, key)
        return np.asarray(action.clip(-1, 1)).reshape(*np.shape(obs)[:-1], -1)
