"""What a run shows on the terminal: a progress bar, or plain lines without a terminal."""

import atexit
import time
from datetime import timedelta

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from common.experiment import files, runtime

QUIET = 60.0  # seconds without a line, in a log that is not a terminal


class Display:
    """Shows the step, updates per second, the time left, the newest losses and the newest score.

    On a terminal these are a bar and a line below it, both gone when the run ends.
    """

    def __init__(self, console=None):
        self.console = console or Console()
        columns = TextColumn("{task.description}"), BarColumn(20), TaskProgressColumn()
        self._bar = Progress(*columns, TimeElapsedColumn(), TextColumn("{task.fields[rate]}"))
        self._news, self._first, self._printed = "", None, 0.0
        self._live = Live(get_renderable=self._render, console=self.console, transient=True)

    def _render(self):
        news = Text(self._news, no_wrap=True, overflow="ellipsis")
        return Group(self._bar.get_renderable(), news)

    def log(self, line):
        """Prints a line, above the bar if one is shown."""
        line = "\n".join(map(files.printable, line.split("\n")))
        try:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        except (OSError, ValueError) as error:  # no reason to lose the training
            runtime.give_up_stdout(error)
            self.console = Console(quiet=True, force_terminal=False)

    def start(self, step, total):
        """Shows the bar, which pulses until the first chunk has been compiled and is done."""
        self._total, self._printed = total, time.monotonic()
        self._news = "Setting up and compiling ..."
        if self.console.is_terminal:
            self._task = self._bar.add_task(f"{step:,}/{total:,}", total=None, rate="")
            self._live.start()
            atexit.register(self._live.stop)  # a program that ends early shows its cursor again
        else:
            self.log(self._news)

    def stop(self):
        """Removes the bar."""
        self._live.stop()

    def update(self, step, speed, metrics, outcome, evaluated):
        """Moves the bar after a chunk; prints a line after an evaluation.

        speed: updates per second. metrics: {name: mean over seeds}. outcome: the newest evaluation
        in words, "" before the first.
        """
        now = time.monotonic()
        if compiled := self._first is not None:
            first, began = self._first
            left = (self._total - step) * (now - began) / (step - first)
        else:  # compilation makes the first chunk slow
            self._first, left = (step, now), (self._total - step) / speed
        rate = f"{speed:,.0f} updates/s{'' if compiled else ' (with compiling)'}"
        rate += f"  {timedelta(seconds=round(left))} left"
        losses = "  ".join(f"{name} {x:.3g}" for name, x in metrics.items() if "loss" in name)
        done = f"{step:,}/{self._total:,}"
        if self.console.is_terminal:
            self._news = "  ".join(filter(None, [outcome, losses]))
            state = dict(completed=step, total=self._total, description=done, rate=rate)
            self._bar.update(self._task, **state)
        if evaluated or (now - self._printed > QUIET and not self.console.is_terminal):
            self._printed = now
            line = f"{step:{len(f'{self._total:,}')},}/{self._total:,}  {step / self._total:4.0%}"
            self.log("  ".join(filter(None, [line, rate, outcome, "" if evaluated else losses])))
