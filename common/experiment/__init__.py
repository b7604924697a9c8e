"""A run and its folder: config, metrics, checkpoint, resume, progress, curve. Knows no algorithm.

    run = Run(resolve(cfg), data)
    state = run.restore(state)  # as given, or the checkpoint's
    for step in run.steps():  # eval_every, 2 eval_every, ..., num_updates
        ...
        run.record(step, metrics, returns)
        run.save(step, state)
    run.finish()

A trained policy in your own code: see saved.py.
"""

import inspect
import json
import os
import re
import shlex
import sys
import time
from contextlib import closing, contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
from rich.console import Console

from common import checkpoint, config, curve, devices, interrupt
from common.boards import Boards
from common.checkpoint import RunError
from common.config import resolve
from common.divergence import Divergence
from common.saved import load, load_policy, recorded

__all__ = ["Run", "RunError", "TIMING", "load", "load_policy", "recorded", "resolve"]

TIMING = ("seconds", "updates_per_second")  # the columns in which equal runs differ: the last ones


class Run:
    """One training run in `<out>/<algorithm>/<dataset>/<time>-s<seed>/`, new or resumed.

    folder: its Path. step: that of the last checkpoint, 0 before the first. window: name of the
    field that tells how many steps of an episode are learned from at once, if it is not one.
    """

    def __init__(self, cfg, data, window=""):
        config.agree(cfg, data, window)
        devices.keep_programs()
        self.cfg, self.data, self.folder, self.step = cfg, data, Path(cfg.resume), 0
        self._console, self._lines, self._returns = Console(), [], {}
        self._seconds, self._speeds, self._stopping = 0.0, [], False
        self._saved, self._facts = None, config.machine()
        self._seeds = cfg.seed + np.arange(cfg.num_seeds)
        with self._writing():
            if not cfg.resume:
                self._create()
            self._diverged = Divergence(self.folder, self._seeds, data)
            if cfg.resume:
                self._reopen()
        self._boards = Boards(self.folder, self._seeds, vars(cfg) if cfg.wandb else None)
        behaviour = self._outcome(data.returns())
        self.log(f"{data.name}: {len(data.obs):,} transitions, behaviour's {behaviour} an episode")
        seeds = "1 seed" if cfg.num_seeds == 1 else f"{cfg.num_seeds} seeds"
        self.log(f"{cfg.num_updates:,} updates of {seeds} on {self._facts['device']}")
        self.log(f"Run folder: {_short(self.folder)}")

    def _create(self):
        cfg, data, returns = self.cfg, self.data, self.data.returns()
        algorithm = config.algorithm(cfg)
        dataset = re.sub(r"[^\w.-]+", "-", data.name).strip("-.")[-100:]
        parent = Path(os.path.expanduser(cfg.out)).resolve() / algorithm / dataset
        parent.mkdir(parents=True, exist_ok=True)
        stem = f"{datetime.now():%Y%m%d-%H%M%S}-s{cfg.seed}"
        for end in ["", *(f"-{i}" for i in range(2, 1000))]:  # several may start in one second
            self.folder = parent / (stem + end)
            with suppress(FileExistsError):
                self.folder.mkdir()
                break
        dataset = {"name": data.name, "env_id": data.env_id, **data.provenance}
        dataset |= {"ref_min_score": data.ref_min, "ref_max_score": data.ref_max}
        dataset |= {"mean_return": float(returns.mean()), "best_return": float(returns.max())}
        info = {"algorithm": algorithm, "config": vars(cfg), "dataset": dataset, **self._facts}
        info |= {"command": sys.argv, "dims": self._dims()}
        checkpoint.write(self.folder / "config.json", json.dumps(info, indent=2) + "\n")

    def _dims(self):
        return [*self.data.obs.shape, self.data.action.shape[1]]  # N, D, A

    def _reopen(self):
        info = config.read(self.folder)
        self.step, self._saved = checkpoint.read(self.folder, keep_damaged=True)
        began, now = info["dataset"].get("sha256"), self.data.provenance.get("sha256")
        if began != now or info["dims"] != self._dims():
            raise RunError(f"{self.data.name} is not the data that {self.folder} began with.")
        if self.step < self.cfg.num_updates and not os.access(self.folder, os.W_OK):
            raise RunError(f"{self.folder} cannot be written to, it is read-only.")
        how = "Bring it back from a copy, or begin a new run"
        try:  # what came after the checkpoint is made again
            header, *lines = (self.folder / "metrics.csv").read_text("utf-8").splitlines()
            lines = [line for line in lines if int(line.split(",")[0]) <= self.step]
            table = np.array([line.split(",") for line in lines], float)  # of one length
            count = self.step // self.cfg.eval_every * self.cfg.num_seeds
            if len(table) != count or (count and table.shape[1] != len(header.split(","))):
                raise ValueError(f"not {count} whole rows up to step {self.step}")
            self._lines = [header, *lines]
            self._seconds = float(table[-1, -2]) if count else 0.0
            returns = json.loads((self.folder / "returns.json").read_text("utf-8"))
            self._returns = {step: x for step, x in returns.items() if int(step) <= self.step}
            self._diverged.reopen(self.step)
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
            self.log(f"Note: another {' and '.join(changed)} than at the start; bits may differ.")

    @contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            hint = f" {self._hint()}" if self.step else ""
            place = error.filename or self.folder
            raise RunError(f"Cannot use {place}: {error.strerror or error}.{hint}") from None

    def log(self, line):
        """Print a line, above the progress line where there is one."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _hint(self):
        script, folder = _short(inspect.getfile(type(self.cfg))), _short(self.folder)
        command = f"python {shlex.quote(script)} --resume {shlex.quote(folder)}"
        return f"Saved up to step {self.step:,}. To continue: {command}"

    def _outcome(self, returns):
        """Words for returns (n,): their normalised score where there is one."""
        score = self.data.score(returns)
        name, x = ("score", score) if np.isfinite(score).all() else ("return", returns)
        return f"{name} {x.mean():.1f}" + (f" +- {x.std():.1f}" if len(x) > 1 else "")

    def restore(self, state):
        """`state`, or filled from the checkpoint when the run is a resumed one; on all devices."""
        saved, self._saved = self._saved, None
        return devices.spread(state if saved is None else checkpoint.fill(state, saved))

    def steps(self):
        """Yields eval_every, 2 eval_every, ..., num_updates; resumed, those after the checkpoint.

        A first Ctrl-C (or SIGTERM) lets the chunk under way end and be saved, a second stops at
        once, at the last checkpoint; both say how to resume, exit code 130. Half a chunk cannot be
        saved, since the state that it started from is gone (donated).
        """
        total, every = self.cfg.num_updates, self.cfg.eval_every
        if self.step >= total:
            return self.log("This run is finished, nothing is left to do.")
        resumed = f"Resumed at step {self.step:,}. " if self.step else ""
        status = f"{resumed}Compiling, then updates {self.step + 1:,} to {self.step + every:,} ..."
        if not self._console.is_terminal:
            self.log(status)
        with (
            checkpoint.alone(self.folder),
            closing(self._boards),
            self._console.status(status) as self._status,
            interrupt.heard(self._stop_soon, self._stop_now),
        ):
            for step in range(self.step + every, total + 1, every):
                self._begin = time.perf_counter()
                yield step
                if self._stopping and self.step == step < total:
                    self._status.stop()
                    self.log(f"Stopped. {self._hint()}")
                    raise SystemExit(130)

    def _stop_soon(self):
        self._stopping = True
        self.log("Stopping when this chunk is done and saved. Again: stop at once.")

    def _stop_now(self):
        self._status.stop()
        self.log(f"Stopped at once. {self._hint()}")
        os._exit(130)

    def record(self, step, metrics, returns=None):
        """To metrics.csv, returns.json, TensorBoard and the terminal.

        metrics: {name: (S,)}, the same names each time; returns: (S, episodes), undiscounted, None:
        not evaluated. updates_per_second counts the time of the evaluation, too.

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
        self._speeds.append(cfg.eval_every / seconds)
        mean, std, gone = np.full(count, np.nan), np.full(count, np.nan), self._diverged.gone
        if returns is not None and np.size(returns):
            returns = np.where(gone[:, None], np.nan, returns)
            mean, std = np.mean(returns, 1), np.std(returns, 1)
            self._returns[str(step)] = returns.tolist()
        columns = {"return_mean": mean, "return_std": std, "score": self.data.score(mean)}
        columns |= {name: np.where(gone, np.nan, x) for name, x in metrics.items()}
        timing = np.tile([self._seconds, self._speeds[-1]], (count, 1)).T.round(3)
        columns |= dict(zip(TIMING, timing, strict=True))
        header = ",".join(["step", "seed", *columns])
        if self._lines and self._lines[0] != header:
            raise ValueError(f"metrics.csv has the columns {self._lines[0]}, not {header}")
        self._lines = self._lines or [header]
        for row in zip(self._seeds, *columns.values(), strict=True):
            self._lines.append(",".join(map(str, (step, *row))))
        with self._writing():
            checkpoint.write(self.folder / "metrics.csv", "\n".join(self._lines) + "\n")
            checkpoint.write(self.folder / "returns.json", json.dumps(self._returns) + "\n")
            self._boards.write(step, columns)
        self._progress(step, mean[np.isfinite(mean)])
        with self._writing():
            new = self._diverged.watch(step, metrics, self.step)
        self._diverged.stop_if_none_is_left(new)
        for message in new:
            self.log(message)

    def _progress(self, step, mean):
        total, speed = self.cfg.num_updates, self._speeds[-1]
        left = timedelta(seconds=round((total - step) / speed))
        compiled = "" if self._speeds[1:] else " (with compiling)"
        outcome = f"  {self._outcome(mean)}" if mean.size else ""
        line = f"{step:{len(f'{total:,}')},}/{total:,}  {step / total:4.0%}"
        self.log(f"{line}  {speed:,.0f} updates/s{compiled}  {left} left{outcome}")
        hours = total / speed / 3600
        if len(self._speeds) == 2 and hours > 0.5 and self._facts["device"].startswith("CPU"):
            self.log(f"On this CPU the whole run takes {hours:.1f} hours.")
        next_ = f"Updates {step + 1:,} to {step + self.cfg.eval_every:,} ..."
        self._status.update(next_ if step < total else "Saving ...")

    def save(self, step, state):
        """A checkpoint, the one before it kept; only every `cfg.save_every`, if there is one."""
        every = self.cfg.eval_every
        due = step % getattr(self.cfg, "save_every", every) < every
        if due or self._stopping or step == self.cfg.num_updates:
            with self._writing():
                checkpoint.save(self.folder, step, self._diverged.mended(state))
            self.step = step

    def finish(self):
        """curve.png, and the last lines: score, its interval, how to film the policy."""
        path, data = self.folder / "curve.png", self.data
        if not self._speeds and path.exists():
            return  # resumed after its end
        header, *lines = (line.split(",") for line in self._lines)
        table = np.array(lines, float).reshape(-1, self.cfg.num_seeds, len(header))
        columns = dict(zip(header, np.moveaxis(table, -1, 0), strict=True))
        levels = np.array([data.returns().mean(), data.returns().max()])
        last = np.array(self._returns.get(str(self.cfg.num_updates), []))
        if self._diverged.messages:  # what follows is about the others
            self.log("\n".join(self._diverged.messages))
            left = ~self._diverged.gone
            columns = {name: x[:, left] for name, x in columns.items()}
            last = last[left] if last.size else last
        name = "return"
        if np.isfinite(data.score(levels)).all():
            name, levels, last = "score", data.score(levels), data.score(last)
        with self._writing():
            title = f"{config.algorithm(self.cfg)} on {data.name}"
            curve.plot(path, title, columns, {"data's mean": levels[0], "data's best": levels[1]})
        if last.size:
            self.log(f"Final {name} {curve.summary(last)}; the data's mean is {levels[0]:.1f}.")
        self.log(f"Curve: {_short(path)}")
        folder = shlex.quote(_short(self.folder))
        self.log(f"Video: python -m common.evaluation {folder} --video run.mp4")


def _short(path):
    return min(str(path), os.path.relpath(path), key=len)
