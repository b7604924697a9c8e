"""The policy of a trained run, loaded from its folder and called on observations."""

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
    """A policy without memory in the form of one with memory.

    act: (state, obs) -> action. Returns (state, carry, obs, reward, key) -> (action, carry).
    """
    return lambda state, carry, obs, reward, key: (act(state, obs), carry)


class Policy:
    """The policy of one seed; keeps its memory, if it has any, between the steps of an episode."""

    def __init__(self, act, state):
        """act: (state, carry, obs, reward, key) -> (action, carry), as an algorithm's `policy`."""
        self._act, self._state = jax.jit(act), state
        self.reset()

    def reset(self):
        """Begins an episode: forgets the memory."""
        self._carry, self._key = None, jax.random.key(0)

    def __call__(self, obs, reward=0.0):
        """Action (A,) or (E, A) in [-1, 1], a NumPy array, for obs (D,) or (E, D).

        reward: of the last step, a number or (E,); only policies with memory use it.
        """
        rows = jnp.atleast_2d(jnp.asarray(obs, jnp.float32))
        reward = jnp.broadcast_to(jnp.float32(reward), rows.shape[:1])
        self._key, key = jax.random.split(self._key)
        action, self._carry = self._act(self._state, self._carry, rows, reward, key)
        return np.asarray(action.clip(-1, 1)).reshape(*np.shape(obs)[:-1], -1)


def load(run):
    """(the algorithm's module, its config, its state with seeds on axis 0) of a run folder.

    The state is that of the last checkpoint. Raises RunError if the folder holds no run, or no
    checkpoint that fits this program.
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

    run: the run folder. seed_index: counted from 0, whatever the run's first seed is. Raises
    RunError as `load` does.
    """
    module, cfg, state = load(run)
    return Policy(module.policy(cfg), jax.tree.map(lambda x: x[seed_index], state))


def recorded(run):
    """Returns (S, episodes) in lists that training recorded at the last checkpoint, or None."""
    folder = Path(os.path.expanduser(run)).resolve()
    step, path = experiment.last_step(folder), folder / "returns.json"
    returns = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return returns.get(str(step))
