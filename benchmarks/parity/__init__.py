"""What the files of the parity checks share; needs numpy alone, so that it runs everywhere.

A tree is a dict of dicts of arrays, as Flax keeps parameters; flat, its names are joined by "/".
"""

import importlib

import numpy as np


def jit(function, **options):
    """jax.jit to the same mathematics, compiled in half the time: there is little to run."""
    import jax

    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **options)


def start(name, batches, **settings):
    """A config and a fresh state of algorithms/<name>.py; batches: fields of Batches on axis 0."""
    import jax

    from common.datasets import Batch

    module = importlib.import_module(f"algorithms.{name}")
    cfg = module.Config(**settings)
    return cfg, module.init(jax.random.key(0), Batch(**tree_map(lambda x: x[0], batches)), cfg)


def tree_map(f, *trees):
    """A tree of f(leaf, leaf, ...) from trees of one structure."""
    if hasattr(trees[0], "items"):
        return {name: tree_map(f, *(tree[name] for tree in trees)) for name in trees[0]}
    return f(*trees)


def flatten(tree, prefix=""):
    """{"prefix/outer/inner": array} of a tree, names in sorted order."""
    if not hasattr(tree, "items"):
        return {prefix: np.asarray(tree)}
    flat = {}
    for name in sorted(tree):
        flat |= flatten(tree[name], f"{prefix}/{name}" if prefix else name)
    return flat


def unflatten(flat, prefix):
    """The tree below "prefix/" of a flat dict; an array where `prefix` is the name of one."""
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
    """All leaves of a tree end to end, by sorted names: (n,)."""
    return np.concatenate([leaf.ravel() for leaf in flatten(tree).values()])


def scramble(tree, rng, scale=0.3):
    """The same tree plus noise: no bias is 0 and no two networks are equal."""
    noise = lambda x: (x + scale * rng.normal(size=np.shape(x))).astype(np.float32)  # noqa: E731
    return tree_map(noise, tree)


def random_batches(rng, count=3, rows=32, obs_dim=3, action_dim=2):
    """Fields of `count` Batches, stacked on axis 0; a third of the rows is done."""
    return {
        "obs": rng.normal(size=(count, rows, obs_dim)).astype(np.float32),
        "action": rng.uniform(-0.95, 0.95, (count, rows, action_dim)).astype(np.float32),
        "reward": rng.normal(size=(count, rows)).astype(np.float32),
        "next_obs": rng.normal(size=(count, rows, obs_dim)).astype(np.float32),
        "done": (rng.random((count, rows)) < 1 / 3).astype(np.float32),
    }
