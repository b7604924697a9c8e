"""What a run shows on the terminal: a progress bar, or plain lines where there is no terminal."""

from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn


class Display:
    """A bar with updates per second, time left, the newest losses and the newest outcome."""

    def __init__(self):
        self.console = Console()
        columns = TextColumn("{task.description}"), BarColumn(24), TaskProgressColumn()
        columns += (TextColumn("{task.fields[news]}"),)
        self._bar = Progress(*columns, console=self.console, transient=True)
        self._task = None

    def log(self, line):
        """Print a line, above the bar where there is one."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def start(self, step, total):
        """Show the bar; the first chunk includes compiling."""
        text = f"Compiling, then updates {step + 1:,} to {total:,} ..."
        if self.console.is_terminal:
            self._bar.start()
            self._task = self._bar.add_task("updates", total=total, completed=step, news=text)
        else:
            self.log(text)

    def stop(self):
        """Take the bar away."""
        if self._task is not None:
            self._bar.stop()

    def update(self, step, total, speed, compiling, metrics, outcome, evaluated):
        """After a chunk: the bar moves; a line is printed where an evaluation has come.

        speed: updates per second; metrics: {name: mean over seeds}; outcome: words for the newest
        evaluation, "" before the first.
        """
        left = timedelta(seconds=round((total - step) / speed))
        rate = f"{speed:,.0f} updates/s{' (with compiling)' if compiling else ''}  {left} left"
        losses = "  ".join(f"{name} {x:.3g}" for name, x in metrics.items() if "loss" in name)
        if self._task is not None:
            done = f"{step:,}/{total:,}"
            news = "  ".join(filter(None, [rate, outcome, losses]))
            self._bar.update(self._task, completed=step, description=done, news=news)
        if evaluated:
            line = f"{step:{len(f'{total:,}')},}/{total:,}  {step / total:4.0%}  {rate}"
            self.log("  ".join(filter(None, [line, outcome])))
