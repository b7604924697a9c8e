"""One training run: its folder, its steps, its lines on the terminal."""

import os
import time
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import numpy as np

from common.experiment import checkpoint, commands, files, folders, plots, runtime, statistics
from common.experiment.checkpoint import RunError
from common.experiment.divergence import Divergence
from common.experiment.loggers import Loggers
from common.experiment.progress import Display
from common.experiment.records import TIMING, Records


class Run:
    """A run in `<out>/<algorithm>/<dataset>/<time>-s<seed>/`, new or resumed.

    cfg: a config from `resolve`. dataset: datasets.Dataset.
    folder: Path of the run folder. step: step of the last checkpoint, 0 before the first.

    The folder is locked until `finish`, or until `steps` is left early. Raises RunError if it
    cannot be written, and if a resumed run does not fit the dataset or is damaged.
    """

    def __init__(self, cfg, dataset):
        runtime.keep_programs()
        self.cfg, self.dataset, self.folder, self.step = cfg, dataset, Path(cfg.resume), 0
        self._display, self._facts, self._saved = Display(), runtime.machine(), None
        self._chunks, self._stopping, self._outcome = 0, False, ""
        self._seeds = cfg.seed + np.arange(cfg.num_seeds)
        with ExitStack() as lock, self._writing():
            if not cfg.resume:
                self.folder = folders.create(cfg, dataset, self._facts)
            lock.enter_context(checkpoint.lock(self.folder))
            self._records = Records(self.folder, self._seeds)
            self._divergence = Divergence(self.folder, self._seeds, dataset)
            if cfg.resume:
                self._reopen()
            self._loggers = Loggers(self.folder, self._seeds, vars(cfg) if cfg.wandb else None)
            self._lock = lock.pop_all()
        runtime.last_words = self._resume_hint() if self.step else "Nothing is saved yet."
        behaviour = self._describe(dataset.returns())
        self.log(f"{dataset.name}: {len(dataset.obs):,} transitions, behaviour's {behaviour}")
        seeds = "1 seed" if cfg.num_seeds == 1 else f"{cfg.num_seeds} seeds"
        self.log(f"{cfg.num_updates:,} updates of {seeds} on {self._facts['device']}")
        self.log(f"Run folder: {commands.short(self.folder)}")
        if self.step < cfg.num_updates:
            self._display.start(self.step, cfg.num_updates)

    def _reopen(self):
        """Reads the last checkpoint and what was recorded up to it."""
        files.refuse_links(self.folder)
        info = folders.read(self.folder)
        if not folders.is_same_data(info, self.dataset):
            name = self.dataset.name
            raise RunError(f"{name} is not the data that {self.folder} was started with.")
        if self._facts["jax"] != (began := info.get("jax", self._facts["jax"])):
            raise RunError(f"{self.folder} was started with the JAX settings {began}, not with "
                           f"{self._facts['jax']}.")  # fmt: skip
        self.step, self._saved = checkpoint.read(self.folder, keep_damaged=True)
        if self.step < self.cfg.num_updates and not os.access(self.folder, os.W_OK):
            raise RunError(f"{self.folder} cannot be written to.")
        how = "Restore it from a copy, or start a new run"
        try:
            episodes = self.cfg.eval_episodes if self.step >= self.cfg.eval_every else 0
            self._records.reopen(self.step, self.cfg.log_every, episodes)
            self._divergence.reopen(self.step)
        except FileNotFoundError as error:
            if self.step:
                raise RunError(f"{error.filename} is missing. {how}.") from None
        except (ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
            name = "metrics.csv, returns.json or diverged.json"
            raise RunError(f"{self.folder}: {name} is damaged: {error}. {how}.") from None
        if info["config"].get("num_updates") != self.cfg.num_updates:  # the run is extended
            folders.extend(self.folder, info, self.cfg.num_updates)
        changed = [name for name, value in self._facts.items() if value != info.get(name)]
        if changed:
            what = " and ".join(changed)
            self.log(f"Note: {what} differ from the start of the run; results may differ in bits.")

    @property
    def returns(self):
        """(S, episodes) of the newest evaluation; None before the first."""
        return self._records.returns()

    @contextmanager
    def _writing(self):
        """Turns an OSError into a RunError that says how to resume."""
        try:
            yield
        except OSError as error:
            hint = f" {self._resume_hint()}" if self.step else ""
            place = error.filename or self.folder
            raise RunError(f"Cannot use {place}: {error.strerror or error}.{hint}") from None

    def log(self, line):
        """Prints a line, above the progress bar if one is shown."""
        self._display.log(line)

    def _resume_hint(self):
        command = commands.resume(self.cfg, self.folder)
        return f"Saved up to step {self.step:,}. To continue: {command}"

    def _describe(self, returns):
        """Mean and deviation of returns (n,) in words, as normalised scores if they exist."""
        score = self.dataset.score(returns)
        name, x = ("score", score) if np.isfinite(score).all() else ("return", returns)
        return f"{name} {x.mean():.1f}" + (f" +- {x.std():.1f}" if len(x) > 1 else "")

    def restore(self, state):
        """`state`, or in a resumed run the checkpoint's, sharded over the devices.

        state: a pytree with the seeds on axis 0. Raises RunError if the checkpoint does not fit.
        """
        saved, self._saved = self._saved, None
        return runtime.shard_seeds(state if saved is None else checkpoint.fill(state, saved))

    def steps(self):
        """Yields log_every, 2 log_every, ..., num_updates, from the last checkpoint on.

        The first Ctrl-C (or SIGTERM) ends the run once the current chunk is saved, the second ends
        it at once, at the last checkpoint. Both say how to resume; the exit code is 130. Half a
        chunk cannot be saved, because the state that it started from has been donated.
        """
        total, every = self.cfg.num_updates, self.cfg.log_every
        if self.step >= total:
            return self.log("This run is finished, nothing is left to do.")
        if self.step:
            self.log(f"Resumed at step {self.step:,}.")
        with (
            ExitStack() as lock,
            closing(self._loggers),
            runtime.on_interrupt(self._stop_soon, self._stop_now),
        ):
            lock.push(self._lock)
            try:
                for step in range(self.step + every, total + 1, every):
                    self._begin = time.perf_counter()
                    yield step
                    if self._stopping and self.step == step < total:
                        self._display.stop()
                        self.log(f"Stopped. {self._resume_hint()}")
                        raise SystemExit(130)
                lock.pop_all()  # `finish` releases it
            finally:
                self._display.stop()

    def _stop_soon(self):
        self._stopping = True
        self.log("Stopping once this chunk is saved. Ctrl-C again stops at once.")

    def _stop_now(self):
        self._display.stop()
        self.log(f"Stopped at once. {self._resume_hint()}")
        os._exit(130)

    def record(self, step, metrics, returns=None):
        """Writes to metrics.csv, returns.json, TensorBoard and the terminal.

        metrics: {name: (S,)}, the same names at every call. returns: (S, episodes), undiscounted;
        None between evaluations. updates_per_second includes the time of an evaluation.

        A seed that diverges is stopped: its numbers are nan from then on and its last good state is
        saved; the other seeds continue. Raises RunError once every seed has diverged, ValueError
        for metrics of another shape or other names.
        """
        cfg, count = self.cfg, self.cfg.num_seeds
        metrics = {name: np.asarray(x) for name, x in metrics.items()}  # waits for the chunk
        wrong = {name: x.shape for name, x in metrics.items() if x.shape != (count,)}
        if wrong:
            raise ValueError(f"metrics must have shape ({count},), but these have not: {wrong}")
        seconds = time.perf_counter() - self._begin
        self._chunks += 1
        mean, std = np.full(count, np.nan), np.full(count, np.nan)
        diverged = self._divergence.diverged
        if evaluated := returns is not None and np.size(returns) > 0:
            returns = np.where(diverged[:, None], np.nan, returns)
            mean, std = np.mean(returns, 1), np.std(returns, 1)
        columns = {"return_mean": mean, "return_std": std, "score": self.dataset.score(mean)}
        columns |= {name: np.where(diverged, np.nan, x) for name, x in metrics.items()}
        timing = self._records.seconds + seconds, cfg.log_every / seconds
        timing = np.tile(timing, (count, 1)).T.round(3)
        columns |= dict(zip(TIMING, timing, strict=True))
        with self._writing():
            self._records.add(step, columns)
            if evaluated:
                self._records.add_returns(step, returns)
            self._loggers.write(step, columns)
            new = self._divergence.watch(step, metrics, self.step)
        if np.isfinite(mean).any():
            self._outcome = self._describe(mean[np.isfinite(mean)])
        means = {name: x.mean() for name, x in metrics.items()}
        due = evaluated or step % cfg.eval_every == 0
        self._display.update(step, cfg.log_every / seconds, means, self._outcome, due)
        self._warn_if_long(seconds)
        self._divergence.stop_if_all(new)
        for message in new:
            self.log(message)

    def _warn_if_long(self, seconds):
        """After the first compiled chunk: the hours of a long run on a CPU."""
        hours = self.cfg.num_updates / self.cfg.log_every * seconds / 3600
        if self._chunks == 2 and hours > 0.5 and self._facts["device"].startswith("CPU"):
            self.log(f"On this CPU the whole run takes {hours:.1f} hours.")

    def save(self, step, state):
        """Writes a checkpoint when one is due, and keeps the one before it.

        One is due every `save_every` updates if the config has that field, else every `eval_every`,
        and when the run ends or is stopped.
        """
        every = getattr(self.cfg, "save_every", self.cfg.eval_every)
        due = step % every < self.cfg.log_every
        if due or self._stopping or step == self.cfg.num_updates:
            with self._writing():
                checkpoint.save(self.folder, step, self._divergence.with_last_good(state))
            self.step = step
            runtime.last_words = self._resume_hint()

    def finish(self):
        """Draws curve.png and prints the final score with its interval.

        Diverged seeds are left out. Does nothing if the run was already finished when resumed.
        """
        with self._lock:
            self._finish()

    def _finish(self):
        path, dataset = self.folder / "curve.png", self.dataset
        if not self._chunks and path.exists():
            return
        columns, last = self._records.columns(), self._records.returns(self.cfg.num_updates)
        levels = np.array([dataset.returns().mean(), dataset.returns().max()])
        if self._divergence.messages:
            self.log("\n".join(self._divergence.messages))
            left = ~self._divergence.diverged
            columns = {name: x[:, left] for name, x in columns.items()}
            last = None if last is None else last[left]
        name = "return"
        if np.isfinite(dataset.score(levels)).all():
            name, levels = "score", dataset.score(levels)
            last = None if last is None else dataset.score(last)
        with self._writing():
            title = f"{folders.algorithm(self.cfg)} on {dataset.name}"
            plots.plot(path, title, columns, {"data's mean": levels[0], "data's best": levels[1]})
        if last is not None:
            summary = statistics.summary(last)
            self.log(f"Final {name} {summary}; the data's mean is {levels[0]:.1f}.")
        self.log(f"Curve: {commands.short(path)}")
        self.log(commands.after(self.cfg, self.folder, dataset))
