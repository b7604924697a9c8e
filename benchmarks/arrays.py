"""What the files in algorithms/ learn from, for benchmarks that do not call their `train`."""

import jax


def arrays(module, dataset, cfg):
    """What `train` of an algorithm's file gives to its init and to its train_chunk; rewards
    unchanged."""
    rows, name = dataset.transitions(), module.__name__.rpartition(".")[2]
    if name == "awr":
        return rows, module.Episodes(rows, dataset.start + dataset.length - 1)
    if name == "cal_ql":
        rows = module.Labelled(*rows, module.returns_to_go(dataset, rows.reward, cfg.gamma))
    elif name in ("dt", "diffuser"):
        rows = dataset.steps(getattr(cfg, "gamma", 1.0))
    elif name == "decision_diffuser":
        rows = module.shares(dataset.steps(cfg.gamma, cfg.end_return))
    elif name == "rvs":
        rows = module.hindsight(dataset, cfg)
    elif name == "rebrac":
        rows = module.transitions(dataset)
    elif name == "fql":
        rows = module.action_chunks(dataset, cfg)
    elif name == "bc":
        best = module.best_episodes(dataset, cfg.fraction)
        rows = jax.tree.map(lambda x: x[best], rows)
    return rows, rows
