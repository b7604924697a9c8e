"""Functions shared by the parity checks. Importing it needs only NumPy, as peers' environments do.

A tree is a dict of dicts of arrays, like Flax parameters. A flat dict joins its names with "/".
"""

import importlib

import numpy as np


def jit(function, **options):
    """jax.jit without XLA's optimisations, which compiles in half the time."""
    import jax

    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **options)


def start(name, batches, **settings):
    """(config, fresh state) of algorithms/<name>.py.

    batches: {field of Batch: array with the batches on axis 0}. settings: of the config.
    """
    import jax

    from common.datasets import Batch

    module = importlib.import_module(f"algorithms.{name}")
    cfg = module.Config(**settings)
    return cfg, module.init(jax.random.key(0), Batch(**tree_map(lambda x: x[0], batches)), cfg)


def tree_map(f, *trees):
    """The tree of f(leaf, leaf, ...) over trees of the same structure."""
    if hasattr(trees[0], "items"):
        return {name: tree_map(f, *(tree[name] for tree in trees)) for name in trees[0]}
    return f(*trees)


def flatten(tree, prefix=""):
    """The flat dict {"prefix/outer/inner": array} of a tree, in sorted order."""
    if not hasattr(tree, "items"):
        return {prefix: np.asarray(tree)}
    flat = {}
    for name in sorted(tree):
        flat |= flatten(tree[name], f"{prefix}/{name}" if prefix else name)
    return flat


def unflatten(flat, prefix):
    """The tree below "prefix/" in a flat dict, or the array named `prefix`."""
    if prefix in flat:
        return flat[prefix]
    tree = {}
    for name, leaf in flat.items():
        if name.startswith(prefix + "/"):
            *outer, last = name[len(prefix) + 1 :].split("/")
            node = tree
            for key in outer:
                node = node.setdefault(key, {})
            node[last] = leaf
    return tree


def vector(tree):
    """All leaves of a tree in one vector (n,), in sorted order of names."""
    return np.concatenate([leaf.ravel() for leaf in flatten(tree).values()])


def scramble(tree, rng, scale=0.3):
    """The tree plus noise, so that no bias is 0 and no two networks are equal."""
    noise = lambda x: (x + scale * rng.normal(size=np.shape(x))).astype(np.float32)  # noqa: E731
    return tree_map(noise, tree)


def random_batches(rng, count=3, rows=32, obs_dim=3, action_dim=2):
    """{field: array} of `count` random Batches on axis 0; about a third of the rows are done."""
    return {
        "obs": rng.normal(size=(count, rows, obs_dim)).astype(np.float32),
        "action": rng.uniform(-0.95, 0.95, (count, rows, action_dim)).astype(np.float32),
        "reward": rng.normal(size=(count, rows)).astype(np.float32),
        "next_obs": rng.normal(size=(count, rows, obs_dim)).astype(np.float32),
        "done": (rng.random((count, rows)) < 1 / 3).astype(np.float32),
    }
