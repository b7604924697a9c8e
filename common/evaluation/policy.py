"""The policy of a trained run, loaded from its folder and called on observations."""

import os
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from common import experiment
from common.evaluation.environments import EvaluationError, inspect
from common.experiment import runtime


def stateless(act):
    """A policy without memory in the form of one with memory.

    act: (state, obs) -> action. Returns (state, carry, obs, reward, key) -> (action, carry).
    """
    return lambda state, carry, obs, reward, key: (act(state, obs), carry)


class Policy:
    """The policy of one seed; keeps its memory, if it has any, between the steps of an episode."""

    def __init__(self, act, state, obs_dim=None, bounds=None, discrete=False):
        """act: (state, carry, obs, reward, key) -> (action, carry), see an algorithm's `policy`.

        obs_dim: D, to check observations; None: no check. bounds: (low, high) of the returned
        actions, each (A,) or (1,); None: -1 and 1. discrete: the action is the number of the
        largest entry.
        """
        self._act, self._state, self._dim = jax.jit(act), state, obs_dim
        self._bounds, self._discrete = bounds, discrete
        self.reset()

    def reset(self):
        """Begins an episode: forgets the memory."""
        self._carry, self._key = None, jax.random.key(0)

    def __call__(self, obs, reward=0.0):
        """Action (A,) or (E, A) within the bounds, a NumPy array, for obs (D,) or (E, D).

        Discrete actions are whole numbers, of shape () or (E,).

        reward: of the last step, a number or (E,); only policies with memory use it. Raises
        ValueError for an obs of another shape.
        """
        shape = np.shape(obs)
        if len(shape) not in (1, 2) or self._dim not in (None, shape[-1]):
            expected = "D" if self._dim is None else self._dim
            raise ValueError(f"obs has shape {shape}, not ({expected},) or (E, {expected}).")
        rows = jnp.atleast_2d(jnp.asarray(obs, jnp.float32))
        reward = jnp.broadcast_to(jnp.float32(reward), rows.shape[:1])
        self._key, key = jax.random.split(self._key)
        action, self._carry = self._act(self._state, self._carry, rows, reward, key)
        action = np.asarray(action.clip(-1, 1)).reshape(*shape[:-1], -1)
        if self._discrete:
            return action.argmax(-1)
        if self._bounds is None:
            return action
        low, high = self._bounds
        return low + (action + 1) / 2 * (high - low)


def load(run):
    """(the algorithm's module, its config, its state with seeds on axis 0) of a run folder.

    The state is that of the last checkpoint. Raises RunError if the folder holds no run, or no
    checkpoint that fits this program.
    """
    runtime.check_device()
    folder = Path(os.path.expanduser(run)).resolve()
    info, cfg = experiment.read(folder)
    module, (n, d, a) = experiment.module(*experiment.source(info)), info["dims"]
    shapes = module.datasets.Batch((n, d), (n, a), (n,), (n, d), (n,))
    data = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda x: type(x) is tuple,
    )
    keys = jax.vmap(jax.random.key)(jnp.arange(cfg.num_seeds))
    try:
        template = jax.eval_shape(jax.vmap(partial(module.init, cfg=cfg), (0, None)), keys, data)
    except Exception as error:  # sizes that do not fit each other
        raise experiment.RunError(f"{folder / 'config.json'} is damaged: {error}") from error
    state, messages = experiment.restore(folder, template)
    for message in messages:
        print(experiment.printable(message), file=sys.stderr)
    return module, cfg, state


def load_policy(run, seed_index=0, units="unit"):
    """The Policy of one seed of a run: `action = policy(obs)`; `policy.reset()` begins an episode.

    run: the run folder. seed_index: counted from 0, whatever the run's first seed is. units: "unit"
    for actions in [-1, 1]; "environment" for actions within the environment's own bounds, or the
    data's if there is no environment. Discrete actions are whole numbers in either case. Raises
    RunError as `load` does, and EvaluationError for a seed that the run does not have.
    """
    if units not in ("unit", "environment"):
        raise ValueError(f'units {units!r}: must be "unit" or "environment".')
    module, cfg, state = load(run)
    choose_seed(run, cfg, seed_index, "seed_index")
    info, _ = experiment.read(Path(os.path.expanduser(run)).resolve())
    discrete = bool(info["dataset"].get("num_actions"))
    bounds = action_bounds(info) if units == "environment" and not discrete else None
    state = jax.tree.map(lambda x: x[seed_index], state)
    return Policy(module.policy(cfg), state, info["dims"][1], bounds, discrete)


def action_bounds(info):
    """Action bounds (low, high), each (A,) or (1,), of a run. info: from experiment.read."""
    data = info["dataset"]
    try:
        low, high = (np.array(data[f"action_{end}"], np.float32) for end in ("low", "high"))
        if low.shape != high.shape or low.shape not in ((1,), (info["dims"][2],)):
            raise ValueError
    except (KeyError, TypeError, ValueError):  # an older run without them
        env = inspect(data["env_id"])
        low, high = env.low, env.high
    return low, high


def choose_seed(run, cfg, index, name):
    """Raises EvaluationError unless a run has a seed `index`. name: of the argument, to report."""
    if not 0 <= index < cfg.num_seeds:
        seeds = f"{run} holds seeds 0 to {cfg.num_seeds - 1}, counted from 0"
        raise EvaluationError(f"{name} {index}: {seeds}.")


def recorded(run):
    """Returns (S, episodes) in lists that training recorded at the last checkpoint, or None."""
    folder = Path(os.path.expanduser(run)).resolve()
    _, cfg = experiment.read(folder)
    step = experiment.last_step(folder)
    try:
        returns = experiment.read_returns(folder, cfg.num_seeds, cfg.eval_episodes)
    except FileNotFoundError:
        returns = {}
    except (OSError, ValueError, TypeError, OverflowError) as error:
        raise experiment.RunError(f"{folder / 'returns.json'} is damaged: {error}.") from None
    return returns.get(str(step))
