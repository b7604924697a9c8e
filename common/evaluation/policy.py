"""A trained run's policy: loaded from its folder, called on observations."""

import json
import os
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from common import experiment


def stateless(act):
    """`act(state, obs) -> action` in the form of policies with memory: (state, carry, obs, reward,
    key) -> (action, carry)."""
    return lambda state, carry, obs, reward, key: (act(state, obs), carry)


class Policy:
    """One seed's policy; keeps its memory, if it has one, between the steps of an episode."""

    def __init__(self, act, state):
        """act: (state, carry, obs, reward, key) -> (action, carry), see an algorithm's `policy`."""
        self._act, self._state = jax.jit(act), state
        self.reset()

    def reset(self):
        """Begin an episode."""
        self._carry, self._key = None, jax.random.key(0)

    def __call__(self, obs, reward=0.0):
        """obs (D,) or (E, D) -> action (A,) or (E, A) in [-1, 1], numpy.

        reward: of the last step, a number or (E,); only policies with memory use it.
        """
        rows = jnp.atleast_2d(jnp.asarray(obs, jnp.float32))
        reward = jnp.broadcast_to(jnp.float32(reward), rows.shape[:1])
        self._key, key = jax.random.split(self._key)
        action, self._carry = self._act(self._state, self._carry, rows, reward, key)
        return np.asarray(action.clip(-1, 1)).reshape(*np.shape(obs)[:-1], -1)


def load(run):
    """(the algorithm's module, cfg, state) of a run folder's last checkpoint, seeds on axis 0.

    Raises RunError where the folder holds no run, or no checkpoint that fits this program.
    """
    folder = Path(os.path.expanduser(run)).resolve()
    info = experiment.read(folder)
    module, (n, d, a) = experiment.module(info["algorithm"]), info["dims"]
    cfg = experiment.build(module.Config, info["config"], folder)
    shapes = module.datasets.Batch((n, d), (n, a), (n,), (n, d), (n,))
    data = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda x: type(x) is tuple,
    )
    keys = jax.vmap(jax.random.key)(jnp.arange(cfg.num_seeds))
    template = jax.eval_shape(jax.vmap(partial(module.init, cfg=cfg), (0, None)), keys, data)
    state, messages = experiment.restore(folder, template)
    for message in messages:
        print(message, file=sys.stderr)
    return module, cfg, state


def load_policy(run, seed_index=0):
    """The Policy of one seed of a run: `action = policy(obs)`; `policy.reset()` begins an episode.

    run: its folder; seed_index: counted from 0, whatever the run's first seed. Raises RunError.
    """
    module, cfg, state = load(run)
    return Policy(module.policy(cfg), jax.tree.map(lambda x: x[seed_index], state))


def recorded(run):
    """The returns (S, episodes) that training recorded at the last checkpoint, or None."""
    folder = Path(os.path.expanduser(run)).resolve()
    step, path = experiment.last_step(folder), folder / "returns.json"
    returns = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return returns.get(str(step))
