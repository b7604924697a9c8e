"""Metrics for TensorBoard, and for Weights & Biases when asked."""

import time
from math import isfinite

from common.experiment.checkpoint import RunError


class Loggers:
    """Writes to `<folder>/tensorboard/s<seed>/`: a run for each seed, drawn in one plot.

    wandb: a config (dict) to log to Weights & Biases too, under the project "stillwater"; or None.
    """

    def __init__(self, folder, seeds, wandb=None):
        self.folder, self.seeds, self.wandb, self.writers = folder, seeds, None, None
        if wandb is not None:
            try:
                from wandb import init
            except ImportError:
                raise RunError("--wandb needs its package: pip install wandb") from None
            name = "-".join(folder.parts[-3:])  # algorithm, dataset, time and seed
            options = {"project": "stillwater", "name": name, "id": name, "resume": "allow"}
            self.wandb = init(dir=str(folder), config=wandb, **options)

    def write(self, step, columns):
        """columns: {name: (S,)}; a value that is not finite leaves a gap."""
        from tensorboardX.event_file_writer import EventsWriter  # no thread, unlike SummaryWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        if self.writers is None:
            folders = [self.folder / "tensorboard" / f"s{seed}" for seed in self.seeds]
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            self.writers = [EventsWriter(str(folder / "events")) for folder in folders]
            start = SessionLog(status=SessionLog.START)  # hides what a killed process wrote later
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
        """Complete the files; end the run at W&B."""
        for writer in self.writers or []:
            writer.close()
        if self.wandb:
            self.wandb.finish()
        self.writers = self.wandb = None
