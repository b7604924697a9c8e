"""What the files in algorithms/ learn from, for benchmarks that do not call their `train`."""

import jax


def arrays(module, dataset, cfg):
    """The arrays that `train` of an algorithm's file gives to its train_chunk; rewards unchanged.

    AWR's `init` takes the `rows` of its arrays, the others' take the arrays.
    """
    rows, name = dataset.transitions(), module.__name__.rpartition(".")[2]
    if name in ("dt", "diffuser"):
        return dataset.steps(getattr(cfg, "gamma", 1.0))
    if name == "rvs":
        return module.hindsight(dataset, cfg)
    if name == "rebrac":
        return module.transitions(dataset)
    if name == "awr":
        return module.Episodes(rows, dataset.start + dataset.length - 1)
    if name == "bc":
        best = module.best_episodes(dataset, cfg.fraction)
        return jax.tree.map(lambda x: x[best], rows)
    return rows
