"""What a run has left on the disk, for one's own code.

policy = load_policy("runs/iql/..."); action = policy(obs)
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from common import checkpoint, config, divergence
from common.checkpoint import RunError
from common.datasets import Batch
from common.policy import Policy, pure


def load(run):
    """(algorithm's module, cfg, state) of a run folder's last checkpoint, seeds on axis 0."""
    folder = Path(os.path.expanduser(run)).resolve()
    info = config.read(folder)
    module, (n, d, a) = config.module(info["algorithm"]), info["dims"]
    cfg = config.build(module.Config, info["config"], folder)
    shapes = Batch((n, d), (n, a), (n,), (n, d), (n,))
    data = Batch(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    keys = jax.vmap(jax.random.key)(jnp.arange(cfg.num_seeds))
    template = jax.eval_shape(jax.vmap(partial(module.init, cfg=cfg), (0, None)), keys, data)
    _, saved = checkpoint.read(folder)
    if saved is None:
        raise RunError(f"{folder} has no checkpoint yet.")
    for seed in divergence.read(folder).values():
        print(seed["message"], file=sys.stderr)
    return module, cfg, checkpoint.fill(template, saved)


def load_policy(run, seed_index=0):
    """The Policy of one seed of a run: action = policy(obs); policy.reset() begins an episode."""
    module, cfg, state = load(run)
    return Policy(pure(module, cfg), jax.tree.map(lambda x: x[seed_index], state))


def recorded(run):
    """The returns (S, episodes) that training recorded at the last checkpoint, or None."""
    folder = Path(os.path.expanduser(run)).resolve()
    (step, _), path = checkpoint.read(folder), folder / "returns.json"
    returns = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return returns.get(str(step))
