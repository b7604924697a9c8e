"""Metrics for TensorBoard and, if asked for, Weights & Biases."""

import time
from math import isfinite

from common.experiment.checkpoint import RunError


class Loggers:
    """Writes `<folder>/tensorboard/s<seed>/`, one TensorBoard run for each seed.

    folder: Path. seeds: (S,) int. wandb: a config (dict) to log to Weights & Biases as well, in the
    project "stillwater"; or None. Raises RunError if the package of wandb is missing.
    """

    def __init__(self, folder, seeds, wandb=None):
        self.folder, self.seeds, self.wandb, self.writers = folder, seeds, None, None
        if wandb is not None:
            try:
                from wandb import init
            except ImportError:
                raise RunError("--wandb needs a package: pip install wandb") from None
            name = "-".join(folder.parts[-3:])  # algorithm, dataset, time and seed
            options = {"project": "stillwater", "name": name, "id": name, "resume": "allow"}
            self.wandb = init(dir=str(folder), config=wandb, **options)

    def write(self, step, columns):
        """Logs the columns {name: (S,)} of one step; a value that is not finite leaves a gap."""
        from tensorboardX.event_file_writer import EventsWriter  # no thread, unlike SummaryWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        if self.writers is None:
            folders = [self.folder / "tensorboard" / f"s{seed}" for seed in self.seeds]
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            self.writers = [EventsWriter(str(folder / "events")) for folder in folders]
            start = SessionLog(status=SessionLog.START)  # hides later steps of a killed process
            for writer in self.writers:
                writer.write_event(Event(wall_time=time.time(), step=step, session_log=start))
        for i, (seed, writer) in enumerate(zip(self.seeds, self.writers, strict=True)):
            values = {name: float(x[i]) for name, x in columns.items() if isfinite(x[i])}
            for name, value in values.items():
                event = Event(wall_time=time.time(), step=step, summary=scalar(name, value))
                writer.write_event(event)
            writer.flush()
            if self.wandb:
                self.wandb.log({f"s{seed}/{name}": x for name, x in values.items()}, step=step)

    def close(self):
        """Completes the files and ends the run at W&B."""
        for writer in self.writers or []:
            writer.close()
        if self.wandb:
            self.wandb.finish()
        self.writers = self.wandb = None
