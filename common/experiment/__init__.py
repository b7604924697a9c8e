"""A run and its folder: config, metrics, checkpoints, resuming, progress. Knows no algorithm.

    cfg = experiment.resolve(cfg, TUNED, dataset)
    run = experiment.Run(cfg, dataset)
    state = run.restore(state)  # the checkpoint's state in a resumed run, else `state`
    for step in run.steps():  # log_every, 2 log_every, ..., num_updates
        ...
        run.record(step, metrics, returns)
        run.save(step, state)
    run.finish()

`read`, `build`, `module`, `restore` and `last_step` read a run folder; `statistics` summarises
scores over seeds. To use a trained policy in your own code: `evaluation.load_policy`.
"""

from common.experiment import statistics
from common.experiment.checkpoint import RunError
from common.experiment.config import resolve
from common.experiment.folders import build, last_step, module, read, restore
from common.experiment.records import TIMING
from common.experiment.run import Run
from common.experiment.runtime import machine

__all__ = [
    "TIMING",
    "Run",
    "RunError",
    "build",
    "last_step",
    "machine",
    "module",
    "read",
    "resolve",
    "restore",
    "statistics",
]
