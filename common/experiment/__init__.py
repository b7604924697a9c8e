"""A run and its folder: config, metrics, checkpoint, resume, progress, curve. Knows no algorithm.

    cfg = resolve(cfg, TUNED, dataset)
    run = Run(cfg, dataset)
    state = run.restore(state)  # as given, or the checkpoint's
    for step in run.steps():  # log_every, 2 log_every, ..., num_updates
        ...
        run.record(step, metrics, returns)
        run.save(step, state)
    run.finish()

A trained policy for your own code: `evaluation.load_policy`.
"""

import inspect
import json
import os
import re
import shlex
import sys
import time
from contextlib import closing, contextmanager, suppress
from datetime import datetime
from pathlib import Path

import numpy as np

from common.experiment import checkpoint, config, divergence, plots, runtime, statistics
from common.experiment.checkpoint import RunError
from common.experiment.config import build, module, read, resolve
from common.experiment.divergence import Divergence
from common.experiment.loggers import Loggers
from common.experiment.progress import Display
from common.experiment.runtime import machine

__all__ = [
    "Run",
    "RunError",
    "TIMING",
    "build",
    "last_step",
    "machine",
    "module",
    "read",
    "resolve",
    "restore",
    "statistics",
]

TIMING = ("seconds", "updates_per_second")  # the last columns, the only ones that differ by run


class Run:
    """One training run in `<out>/<algorithm>/<dataset>/<time>-s<seed>/`, new or resumed.

    folder: its Path. step: that of the last checkpoint, 0 before the first.
    """

    def __init__(self, cfg, dataset):
        runtime.keep_programs()
        self.cfg, self.dataset, self.folder, self.step = cfg, dataset, Path(cfg.resume), 0
        self._display, self._lines, self._returns = Display(), [], {}
        self._seconds, self._chunks, self._stopping, self._outcome = 0.0, 0, False, ""
        self._saved, self._facts = None, machine()
        self._seeds = cfg.seed + np.arange(cfg.num_seeds)
        with self._writing():
            if not cfg.resume:
                self._create()
            self._divergence = Divergence(self.folder, self._seeds, dataset)
            if cfg.resume:
                self._reopen()
        self._loggers = Loggers(self.folder, self._seeds, vars(cfg) if cfg.wandb else None)
        behaviour = self._words(dataset.returns())
        self.log(f"{dataset.name}: {len(dataset.obs):,} transitions, behaviour's {behaviour}")
        seeds = "1 seed" if cfg.num_seeds == 1 else f"{cfg.num_seeds} seeds"
        self.log(f"{cfg.num_updates:,} updates of {seeds} on {self._facts['device']}")
        self.log(f"Run folder: {_short(self.folder)}")

    def _create(self):
        cfg, dataset, returns = self.cfg, self.dataset, self.dataset.returns()
        algorithm = config.algorithm(cfg)
        name = re.sub(r"[^\w.-]+", "-", dataset.name).strip("-.")[-100:]
        parent = Path(os.path.expanduser(cfg.out)).resolve() / algorithm / name
        parent.mkdir(parents=True, exist_ok=True)
        stem = f"{datetime.now():%Y%m%d-%H%M%S}-s{cfg.seed}"
        for end in ["", *(f"-{i}" for i in range(2, 1000))]:  # several may start in one second
            self.folder = parent / (stem + end)
            with suppress(FileExistsError):
                self.folder.mkdir()
                break
        about = {"name": dataset.name, "env_id": dataset.env_id, **dataset.provenance}
        about |= {"ref_min_score": dataset.ref_min, "ref_max_score": dataset.ref_max}
        about |= {"mean_return": float(returns.mean()), "best_return": float(returns.max())}
        info = {"algorithm": algorithm, "config": vars(cfg), "dataset": about, **self._facts}
        info |= {"command": sys.argv, "dims": self._dims()}
        checkpoint.write(self.folder / "config.json", json.dumps(info, indent=2) + "\n")

    def _dims(self):
        return [*self.dataset.obs.shape, self.dataset.action.shape[1]]  # N, D, A

    def _reopen(self):
        info = config.read(self.folder)
        self.step, self._saved = checkpoint.read(self.folder, keep_damaged=True)
        began, now = info["dataset"].get("sha256"), self.dataset.provenance.get("sha256")
        if began != now or info["dims"] != self._dims():
            raise RunError(f"{self.dataset.name} is not the data that {self.folder} began with.")
        if self.step < self.cfg.num_updates and not os.access(self.folder, os.W_OK):
            raise RunError(f"{self.folder} cannot be written to, it is read-only.")
        how = "Bring it back from a copy, or begin a new run"
        try:  # what came after the checkpoint is made again
            header, *lines = (self.folder / "metrics.csv").read_text("utf-8").splitlines()
            lines = [line for line in lines if int(line.split(",")[0]) <= self.step]
            table = np.array([line.split(",") for line in lines], float)  # of one length
            count = self.step // self.cfg.log_every * self.cfg.num_seeds
            if len(table) != count or (count and table.shape[1] != len(header.split(","))):
                raise ValueError(f"not {count} whole rows up to step {self.step}")
            self._lines = [header, *lines]
            self._seconds = float(table[-1, -2]) if count else 0.0
            returns = json.loads((self.folder / "returns.json").read_text("utf-8"))
            self._returns = {step: x for step, x in returns.items() if int(step) <= self.step}
            self._divergence.reopen(self.step)
            shapes = {np.shape(np.array(x, float)) for x in self._returns.values()}
            if shapes - {(self.cfg.num_seeds, self.cfg.eval_episodes)}:
                raise ValueError(f"not {self.cfg.eval_episodes} returns of each seed")
        except FileNotFoundError as error:
            if self.step:
                raise RunError(f"{error.filename} is missing. {how}.") from None
        except (ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
            name = "metrics.csv, returns.json or diverged.json"
            raise RunError(f"{self.folder}: {name} is damaged: {error}. {how}.") from None
        changed = [name for name, value in self._facts.items() if value != info.get(name)]
        if changed:
            self.log(f"Note: {' and '.join(changed)} differ from the start's; so may the bits.")

    @property
    def returns(self):
        """(S, episodes) of the newest evaluation; None before the first."""
        steps = sorted(map(int, self._returns))
        return np.array(self._returns[str(steps[-1])]) if steps else None

    @contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            hint = f" {self._hint()}" if self.step else ""
            place = error.filename or self.folder
            raise RunError(f"Cannot use {place}: {error.strerror or error}.{hint}") from None

    def log(self, line):
        """Print a line, above the progress bar where there is one."""
        self._display.log(line)

    def _hint(self):
        script, folder = _short(inspect.getfile(type(self.cfg))), _short(self.folder)
        command = f"python {shlex.quote(script)} --resume {shlex.quote(folder)}"
        return f"Saved up to step {self.step:,}. To continue: {command}"

    def _words(self, returns):
        """Words for returns (n,): their normalised score where there is one."""
        score = self.dataset.score(returns)
        name, x = ("score", score) if np.isfinite(score).all() else ("return", returns)
        return f"{name} {x.mean():.1f}" + (f" +- {x.std():.1f}" if len(x) > 1 else "")

    def restore(self, state):
        """`state`, or the checkpoint's where the run is resumed; sharded over the devices."""
        saved, self._saved = self._saved, None
        return runtime.shard_seeds(state if saved is None else checkpoint.fill(state, saved))

    def steps(self):
        """Yields log_every, 2 log_every, ..., num_updates; resumed, those after the checkpoint.

        A first Ctrl-C (or SIGTERM) lets the current chunk end and saves it, a second stops at once,
        at the last checkpoint; both say how to resume, exit code 130. Half a chunk cannot be saved:
        the state that it started from has been donated.
        """
        total, every = self.cfg.num_updates, self.cfg.log_every
        if self.step >= total:
            return self.log("This run is finished, nothing is left to do.")
        if self.step:
            self.log(f"Resumed at step {self.step:,}.")
        with (
            checkpoint.lock(self.folder),
            closing(self._loggers),
            runtime.on_interrupt(self._stop_soon, self._stop_now),
        ):
            self._display.start(self.step, total)
            try:
                for step in range(self.step + every, total + 1, every):
                    self._begin = time.perf_counter()
                    yield step
                    if self._stopping and self.step == step < total:
                        self._display.stop()
                        self.log(f"Stopped. {self._hint()}")
                        raise SystemExit(130)
            finally:
                self._display.stop()

    def _stop_soon(self):
        self._stopping = True
        self.log("Stopping when this chunk is done and saved. Again: stop at once.")

    def _stop_now(self):
        self._display.stop()
        self.log(f"Stopped at once. {self._hint()}")
        os._exit(130)

    def record(self, step, metrics, returns=None):
        """To metrics.csv, returns.json, TensorBoard and the terminal.

        metrics: {name: (S,)}, the same names each time. returns: (S, episodes), undiscounted; None
        between evaluations. updates_per_second includes the time of an evaluation.

        A seed that diverges is stopped: its numbers are nan from then on, and its last good state
        is the one that is saved; the others go on. Raises RunError when no seed is left.
        """
        cfg, count = self.cfg, self.cfg.num_seeds
        metrics = {name: np.asarray(x) for name, x in metrics.items()}  # waits for the chunk
        wrong = {name: x.shape for name, x in metrics.items() if x.shape != (count,)}
        if wrong:
            raise ValueError(f"metrics must have the shape ({count},), these have not: {wrong}")
        seconds = time.perf_counter() - self._begin
        self._seconds += seconds
        self._chunks += 1
        mean, std = np.full(count, np.nan), np.full(count, np.nan)
        diverged = self._divergence.diverged
        if evaluated := returns is not None and np.size(returns) > 0:
            returns = np.where(diverged[:, None], np.nan, returns)
            mean, std = np.mean(returns, 1), np.std(returns, 1)
            self._returns[str(step)] = returns.tolist()
        columns = {"return_mean": mean, "return_std": std, "score": self.dataset.score(mean)}
        columns |= {name: np.where(diverged, np.nan, x) for name, x in metrics.items()}
        timing = np.tile([self._seconds, cfg.log_every / seconds], (count, 1)).T.round(3)
        columns |= dict(zip(TIMING, timing, strict=True))
        header = ",".join(["step", "seed", *columns])
        if self._lines and self._lines[0] != header:
            raise ValueError(f"metrics.csv has the columns {self._lines[0]}, not {header}")
        self._lines = self._lines or [header]
        for row in zip(self._seeds, *columns.values(), strict=True):
            self._lines.append(",".join(map(str, (step, *row))))
        with self._writing():
            checkpoint.write(self.folder / "metrics.csv", "\n".join(self._lines) + "\n")
            if evaluated:
                checkpoint.write(self.folder / "returns.json", json.dumps(self._returns) + "\n")
            self._loggers.write(step, columns)
            new = self._divergence.watch(step, metrics, self.step)
        self._progress(step, cfg.log_every / seconds, metrics, mean[np.isfinite(mean)], evaluated)
        self._divergence.stop_if_all(new)
        for message in new:
            self.log(message)

    def _progress(self, step, speed, metrics, mean, evaluated):
        total = self.cfg.num_updates
        self._outcome = self._words(mean) if mean.size else self._outcome
        means = {name: x.mean() for name, x in metrics.items()}
        compiling = self._chunks == 1
        due = evaluated or step % self.cfg.eval_every == 0
        self._display.update(step, total, speed, compiling, means, self._outcome, due)
        hours = total / speed / 3600
        if self._chunks == 2 and hours > 0.5 and self._facts["device"].startswith("CPU"):
            self.log(f"On this CPU the whole run takes {hours:.1f} hours.")

    def save(self, step, state):
        """A checkpoint where one is due: every `save_every` updates, if cfg has it, or eval_every.

        The checkpoint before it is kept.
        """
        every = getattr(self.cfg, "save_every", self.cfg.eval_every)
        due = step % every < self.cfg.log_every
        if due or self._stopping or step == self.cfg.num_updates:
            with self._writing():
                checkpoint.save(self.folder, step, self._divergence.with_last_good(state))
            self.step = step

    def finish(self):
        """curve.png, and the last lines: the score with its interval, how to film the policy."""
        path, dataset = self.folder / "curve.png", self.dataset
        if not self._chunks and path.exists():
            return  # resumed after its end
        header, *lines = (line.split(",") for line in self._lines)
        table = np.array(lines, float).reshape(-1, self.cfg.num_seeds, len(header))
        columns = dict(zip(header, np.moveaxis(table, -1, 0), strict=True))
        levels = np.array([dataset.returns().mean(), dataset.returns().max()])
        last = np.array(self._returns.get(str(self.cfg.num_updates), []))
        if self._divergence.messages:  # what follows is about the other seeds
            self.log("\n".join(self._divergence.messages))
            left = ~self._divergence.diverged
            columns = {name: x[:, left] for name, x in columns.items()}
            last = last[left] if last.size else last
        name = "return"
        if np.isfinite(dataset.score(levels)).all():
            name, levels, last = "score", dataset.score(levels), dataset.score(last)
        with self._writing():
            title = f"{config.algorithm(self.cfg)} on {dataset.name}"
            plots.plot(path, title, columns, {"data's mean": levels[0], "data's best": levels[1]})
        if last.size:
            self.log(
                f"Final {name} {statistics.summary(last)}; the data's mean is {levels[0]:.1f}."
            )
        self.log(f"Curve: {_short(path)}")
        folder = shlex.quote(_short(self.folder))
        self.log(f"Video: python -m common.evaluation {folder} --video run.mp4")


def _short(path):
    return min(str(path), os.path.relpath(path), key=len)


def restore(folder, template):
    """(state, sentences about diverged seeds) of a run folder's newest whole checkpoint.

    template: a pytree of arrays or shapes. Raises RunError where there is none, or none that fits.
    """
    _, saved = checkpoint.read(folder)
    if saved is None:
        raise RunError(f"{folder} has no checkpoint yet.")
    messages = [seed["message"] for seed in divergence.read(folder).values()]
    return checkpoint.fill(template, saved), messages


def last_step(folder):
    """The step of a run folder's newest whole checkpoint, 0 before the first."""
    return checkpoint.read(folder)[0]
