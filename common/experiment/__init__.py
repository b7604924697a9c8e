"""A run and its folder: config, metrics, checkpoints, resuming, progress. Knows no algorithm.

    cfg = experiment.resolve(cfg, TUNED, dataset)
    run = experiment.Run(cfg, dataset)
    state = run.restore(state)  # the checkpoint's state in a resumed run, else `state`
    for step in run.steps():  # log_every, 2 log_every, ..., num_updates
        ...
        run.record(step, metrics, returns)
        run.save(step, state)
    run.finish()

`read`, `read_returns`, `restore` and `last_step` read a run folder; `statistics` summarises scores
over seeds. `files`, `plots` and `runtime` serve the other two packages as well: safe reading and
writing, figures, the machine. To use a trained policy in your own code: `evaluation.load_policy`.
"""

from common.experiment import files, plots, runtime, statistics
from common.experiment.checkpoint import RunError
from common.experiment.config import read, resolve
from common.experiment.files import UserError, printable
from common.experiment.folders import last_step, module, restore, source
from common.experiment.records import TIMING, read_returns
from common.experiment.run import Run
from common.experiment.runtime import machine

__all__ = [
    "TIMING",
    "Run",
    "RunError",
    "UserError",
    "files",
    "last_step",
    "machine",
    "module",
    "plots",
    "printable",
    "read",
    "read_returns",
    "resolve",
    "restore",
    "runtime",
    "source",
    "statistics",
]
