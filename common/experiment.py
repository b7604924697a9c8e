"""A run and its folder: config, metrics, checkpoint, resume, progress, curve. Knows no algorithm.

    run = Run(resolve(cfg), data)
    state = run.restore(state)  # as given, or the checkpoint's
    for step in run.steps():  # eval_every, 2 eval_every, ..., num_updates
        ...
        run.record(step, metrics, returns)
        run.save(step, state)
    run.finish()

A trained policy in your own code: `policy = load_policy("runs/iql/..."); action = policy(obs)`.
"""

import dataclasses
import hashlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from functools import partial
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from rich.console import Console

from common.datasets import Batch

PROJECT = Path(__file__).resolve().parents[1]
PACKAGES = "jax jaxlib flax optax distrax gymnasium mujoco numpy".split()
RULES = {  # pattern of a field's name: what its value must be
    "num_updates|eval_every|save_every|num_seeds|batch_size": ("at least 1", lambda x: x >= 1),
    "seed|eval_episodes": ("at least 0", lambda x: x >= 0),
    "gamma|polyak": ("between 0 and 1", lambda x: 0 <= x <= 1),
    "(.+_)?lr": ("above 0", lambda x: 0 < x < np.inf),
}


class RunError(SystemExit):
    """Something the user can put right: one message on stderr, exit code 1, no traceback."""


def resolve(cfg, paper=None):
    """The config to run: `cfg` filled and checked, or the one stored in the folder `cfg.resume`.

    paper: {part of a dataset's name: {field: value}} fills fields that are None; the longest part
    within `cfg.env` wins, then "default". RunError: an impossible value, or with `resume` a flag
    that conflicts with the stored config (`resume`, `out` and `wandb` may differ).
    """
    if cfg.resume:
        folder = Path(cfg.resume).expanduser().resolve()
        stored = _stored(folder, type(cfg))[0]
        typed = {word.split("=")[0].strip("-").replace("-", "_") for word in sys.argv[1:]}
        for field in dataclasses.fields(cfg):
            name, value, own = field.name, getattr(cfg, field.name), getattr(stored, field.name)
            asked = value != field.default or {name, "no_" + name} & typed
            if asked and value != own and name not in ("resume", "out", "wandb"):
                raise RunError(f"{_flag(name)} {value} conflicts with the resumed run's {own}.")
        return dataclasses.replace(stored, resume=str(folder), wandb=cfg.wandb)
    values, paper = {}, paper or {}
    for part in ["default", *sorted((part for part in paper if part in cfg.env), key=len)]:
        values |= paper.get(part, {})
    cfg = dataclasses.replace(cfg, **{k: v for k, v in values.items() if getattr(cfg, k) is None})
    for name, value in vars(cfg).items():
        for pattern, (rule, good) in RULES.items():
            if re.fullmatch(pattern, name) and value is not None and not good(value):
                raise RunError(f"{_flag(name)} {value} must be {rule}.")
    total, every = cfg.num_updates, min(cfg.eval_every, cfg.num_updates)
    if total % every:
        near = f"{total // every * every} and {(total // every + 1) * every} are the nearest"
        raise RunError(f"--num-updates {total} is no multiple of --eval-every {every}: {near}.")
    return dataclasses.replace(cfg, eval_every=every)


def load(run):
    """(algorithm's module, cfg, state with seeds on axis 0) of a run folder's last checkpoint."""
    folder = Path(run).expanduser().resolve()
    cfg, module, (n, d, a) = _stored(folder)
    shapes = Batch((n, d), (n, a), (n,), (n, d), (n,))
    data = Batch(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    keys = jax.vmap(jax.random.key)(jnp.arange(cfg.num_seeds))
    template = jax.eval_shape(jax.vmap(partial(module.init, cfg=cfg), (0, None)), keys, data)
    step, saved = _read_checkpoint(folder)
    if step is None:
        raise RunError(f"{folder} has no checkpoint yet.")
    return module, cfg, _fill(template, saved)


def load_policy(run, seed_index=0):
    """obs (..., D) -> action (..., A) in [-1, 1], numpy: the policy of one seed of a run."""
    module, _, state = load(run)
    act, state = jax.jit(module.act), jax.tree.map(lambda x: x[seed_index], state)
    return lambda obs: np.asarray(act(state, jnp.asarray(obs, jnp.float32)))


class Run:
    """One training run in `<out>/<algorithm>/<dataset>/<time>-s<seed>/`, new or resumed.

    folder: its Path. start: the step of the checkpoint it continues from; None for a fresh start.
    """

    def __init__(self, cfg, data):
        self.cfg, self.data, self.folder, self.start = cfg, data, Path(cfg.resume), None
        self._console, self._lines, self._returns, self._warned = Console(), [], {}, set()
        self._boards, self._speeds, self._stopping, self._tree = None, [], False, None
        self._wandb = _wandb() if cfg.wandb else None
        with self._writing():
            if cfg.resume:
                self._reopen()
            else:
                self._create(_algorithm(type(cfg)), data.returns())
        self._saved, device = self.start, _machine()["device"]
        returns = self._outcome(data.returns())
        self.say(f"{data.name}: {len(data.obs):,} transitions, behaviour's {returns} an episode")
        self.say(f"{cfg.num_updates:,} updates, {cfg.num_seeds} seed(s), on {device}")
        self.say(f"Run folder: {_short(self.folder)}")

    def _create(self, algorithm, returns):
        cfg, data = self.cfg, self.data
        dataset = re.sub(r"[^\w.-]+", "-", data.name).strip("-.")[-100:]
        parent = Path(cfg.out).expanduser().resolve() / algorithm / dataset
        parent.mkdir(parents=True, exist_ok=True)
        stem = f"{datetime.now():%Y%m%d-%H%M%S}-s{cfg.seed}"
        for copy in range(1, 1000):  # two may start in the same second
            self.folder = parent / (stem if copy == 1 else f"{stem}-{copy}")
            with suppress(FileExistsError):
                self.folder.mkdir()
                break
        facts = {
            **{"name": data.name, "env_id": data.env_id, **data.provenance},
            **{"ref_min_score": data.ref_min, "ref_max_score": data.ref_max},
            **{"mean_return": float(returns.mean()), "best_return": float(returns.max())},
        }
        info = {"algorithm": algorithm, "config": vars(cfg), "dataset": facts, **_machine()}
        info |= {"command": sys.argv, "dims": [*data.obs.shape, data.action.shape[1]]}
        _write(self.folder / "config.json", json.dumps(info, indent=2))

    def _reopen(self):
        self.start, self._tree = _read_checkpoint(self.folder)
        last = -1 if self.start is None else self.start
        with suppress(FileNotFoundError):
            header, *lines = (self.folder / "metrics.csv").read_text("utf-8").splitlines()
            self._lines = [header, *(x for x in lines if int(x.split(",")[0]) <= last)]
            returns = json.loads((self.folder / "returns.json").read_text("utf-8"))
            self._returns = {step: x for step, x in returns.items() if int(step) <= last}

    def say(self, line):
        """Print one line, above the progress line."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _outcome(self, returns):
        score = self.data.score(returns)
        name, x = ("score", score) if np.isfinite(score).all() else ("return", returns)
        return f"{name} {x.mean():.1f}" + (f" +- {x.std():.1f}" if len(x) > 1 else "")

    def _hint(self):
        script, folder = _short(inspect.getfile(type(self.cfg))), _short(self.folder)
        kept = "no checkpoint yet" if self._saved is None else f"checkpoint: step {self._saved:,}"
        return f"({kept}) To continue: python {shlex.quote(script)} --resume {shlex.quote(folder)}"

    @contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            place = error.filename or self.folder
            raise RunError(f"Cannot write {place}: {error.strerror}. {self._hint()}") from None

    def restore(self, state):
        """`state` as given, or with the checkpoint's contents when the run is a resumed one."""
        tree, self._tree = self._tree, None
        return state if tree is None else _fill(state, tree)

    def steps(self):
        """Yields eval_every, 2 eval_every, ..., num_updates; resumed, those after the checkpoint.

        The first Ctrl-C (or SIGTERM) lets the chunk under way be evaluated and saved, the second
        stops at once, at the last checkpoint; both say how to resume, exit code 130. A thread
        hears them, since the main one is deaf while XLA works; nothing is saved half-way through
        a chunk, since the chunk has eaten (donated) the state it started from.
        """
        total, every = self.cfg.num_updates, self.cfg.eval_every
        first = (self.start or 0) + every
        if first > total:
            return self.say(f"Finished already, all {total:,} updates.")
        if self.start is not None:
            self.say(f"Resumed at step {self.start:,}.")
        with self._console.status("Compiling, then the first chunk ...") as self._status:
            if not self._console.is_terminal:
                self.say(f"Compiling, then a chunk of {every:,} updates ...")
            with self._listening():
                for step in range(first, total + 1, every):
                    self._mark = time.perf_counter()
                    yield step
                    if self._stopping and step < total:
                        break
        if self._stopping and step < total:
            self.say(f"Stopped. {self._hint()}")
            raise SystemExit(130)

    @contextmanager
    def _listening(self):
        if threading.current_thread() is not threading.main_thread():
            yield  # no signals here
            return

        def listen():
            while heard := os.read(ear, 1):
                if heard[0] in before and self._stopping:
                    self._status.stop()
                    self.say(f"Stopped at once. {self._hint()}")
                    os._exit(130)
                elif heard[0] in before:
                    self._stopping = True
                    self.say("Stopping when this chunk is saved; once more to stop at once.")

        ear, mouth = os.pipe()
        os.set_blocking(mouth, False)
        deaf = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGINT, signal.SIGTERM)}
        before, wakeup = deaf, signal.set_wakeup_fd(mouth)
        threading.Thread(target=listen, daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(mouth)

    def record(self, step, metrics, returns=None):
        """metrics.csv, returns.json, TensorBoard and the terminal.

        metrics: {name: (S,)}; returns: (S, episodes), undiscounted, or None if not evaluated.
        """
        cfg, count = self.cfg, self.cfg.num_seeds
        metrics = {name: np.asarray(x) for name, x in metrics.items()}  # waits for the chunk
        self._speeds.append(cfg.eval_every / (time.perf_counter() - self._mark))
        returns = np.zeros((count, 0)) if returns is None else np.asarray(returns)
        mean = std = np.full(count, np.nan)
        if returns.size:
            mean, std = returns.mean(1), returns.std(1)
            self._returns[str(step)] = returns.tolist()
        seconds = [float(x.split(",")[-2]) for x in self._lines[-1:] if self._lines[1:]]
        seconds = sum(seconds) + cfg.eval_every / self._speeds[-1]
        columns = {"step": np.full(count, step), "seed": cfg.seed + np.arange(count)}
        columns |= {"return_mean": mean, "return_std": std, "score": self.data.score(mean)}
        columns |= metrics | {"seconds": np.full(count, seconds)}
        columns |= {"updates_per_second": np.full(count, self._speeds[-1])}
        header = ",".join(columns)
        if self._lines and self._lines[0] != header:
            raise ValueError(f"metrics.csv has the columns {self._lines[0]}, not {header}")
        rows = list(zip(*columns.values(), strict=True))
        self._lines = [*(self._lines or [header]), *(",".join(map(str, row)) for row in rows)]
        with self._writing():
            _write(self.folder / "metrics.csv", "\n".join(self._lines) + "\n")
            _write(self.folder / "returns.json", json.dumps(self._returns))
            self._log(step, {k: v for k, v in columns.items() if k not in ("step", "seed")})
        self._progress(step, mean)
        for name, x in metrics.items():
            for seed in columns["seed"][~np.isfinite(x)]:
                if (name, seed) not in self._warned:
                    self.say(f"Warning: {name} of seed {seed} is not finite at step {step:,}.")
                    self._warned.add((name, seed))

    def _log(self, step, columns):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        seeds = [f"s{self.cfg.seed + i}" for i in range(self.cfg.num_seeds)]
        if self._boards is None:
            for seed in seeds:
                (self.folder / "tensorboard" / seed).mkdir(parents=True, exist_ok=True)
            paths = [str(self.folder / "tensorboard" / seed / "events") for seed in seeds]
            self._boards = [EventsWriter(path) for path in paths]
            purge = SessionLog(status=SessionLog.START)  # hides what a killed process wrote later
            for board in self._boards:
                board.write_event(Event(wall_time=time.time(), step=step, session_log=purge))
        for i, (seed, board) in enumerate(zip(seeds, self._boards, strict=True)):
            values = {name: float(x[i]) for name, x in columns.items()}
            for name, value in values.items():
                summary = scalar(name, value)
                board.write_event(Event(wall_time=time.time(), step=step, summary=summary))
            board.flush()
            if self._wandb:
                self._wandb.log({f"{seed}/{k}": v for k, v in values.items()}, step=step)

    def _progress(self, step, mean):
        total, speed = self.cfg.num_updates, self._speeds[-1]
        left = timedelta(seconds=round((total - step) / speed))
        line = f"{step:>{len(f'{total:,}')},}/{total:,} {step / total:4.0%}  {speed:,.0f} updates/s"
        line += f"  {left} left" + "  (compiling included)" * (len(self._speeds) == 1)
        self.say(line + (f"  {self._outcome(mean)}" if np.isfinite(mean).all() else ""))
        if len(self._speeds) == 2 and jax.default_backend() == "cpu" and left > timedelta(hours=1):
            self.say(f"The whole run takes {total / speed / 3600:.1f} hours on this CPU.")
        self._status.update(f"{step:,} of {total:,} updates; {left} left")

    def save(self, step, state):
        """The checkpoint; with `cfg.save_every`, only so often, at the end and on Ctrl-C."""
        every, total = self.cfg.eval_every, self.cfg.num_updates
        due = step % getattr(self.cfg, "save_every", every) < every
        if due or self._stopping or step == total:
            with self._writing():
                _write_checkpoint(self.folder, step, state)
            self._saved = step

    def finish(self):
        """curve.png and the last lines on the terminal."""
        if self.start == self.cfg.num_updates and (self.folder / "curve.png").exists():
            return
        folder = _short(self.folder)
        with self._writing():
            self._plot()
        if self._returns:
            x = self.data.score(np.array(self._returns[max(self._returns, key=int)]))
            low, high = _interval(x)
            middle = np.sort(x.ravel())[x.size // 4 : x.size - x.size // 4].mean()
            self.say(f"Final {self._outcome(x)} IQM {middle:.1f} {low} {high}")
        self.say(f"Curve: {folder}/curve.png")
        self.say(f"Video: python -m common.evaluation {shlex.quote(folder)} --video run.mp4")
        if self._wandb:
            self._wandb.finish()

    def _plot(self):
        pass


def _interval(x):
    """95 % bootstrap interval of the mean of x (S, E): seeds drawn first, then their episodes."""
    rng, (s, e) = np.random.default_rng(0), x.shape
    seeds = rng.integers(s, size=(2000, s, 1))
    means = x[seeds, rng.integers(e, size=(2000, s, e))].mean((1, 2))
    return np.percentile(means, [2.5, 97.5])


def _short(path):
    return min(str(path), os.path.relpath(path), key=len)


def _flag(name):
    return "--" + name.replace("_", "-")


def _algorithm(kind):
    return Path(inspect.getfile(kind)).stem


def _wandb():
    raise RunError("--wandb needs its package: pip install wandb")


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _stored(folder, kind=None):
    """(config, algorithm's module or None, dims) of a run; `kind`: its Config where it is known."""
    module = None
    try:
        info = json.loads((folder / "config.json").read_text("utf-8"))
        name = info["algorithm"]
        if kind is None:
            module = _import(name)
            kind = module.Config
        elif name != _algorithm(kind):
            raise RunError(f"{folder} is a run of {name}, not of {_algorithm(kind)}.")
        cfg = kind(**{key: _tuples(value) for key, value in info["config"].items()})
        return cfg, module, info["dims"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{folder} is no run folder of this program: {error}.") from None


def _import(name):
    """The module algorithms/<name>.py: the only code ever executed for a run folder."""
    path = PROJECT / "algorithms" / f"{name}.py"
    if not (name.isidentifier() and path.is_file()):
        raise RunError(f"There is no algorithm {name!r} in {path.parent}.")
    spec = importlib.util.spec_from_file_location(f"algorithms.{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _machine():
    """Versions, commit and device: what a run's bits depend on besides its config."""
    versions = {x.name: x.version for x in metadata.distributions() if x.name in PACKAGES}
    versions["python"], commit = sys.version.split()[0], ""
    git = ["git", "-C", str(PROJECT), "describe", "--always", "--abbrev=40", "--exclude=*"]
    with suppress(OSError):
        commit = subprocess.run([*git, "--dirty=+changes"], capture_output=True, text=True).stdout
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    device = f"CPU, {os.cpu_count()} cores" if device.endswith("x cpu") else device
    return {"versions": versions, "commit": commit.strip() or None, "device": device}


def _write(path, content):
    """Whole or not at all: written under another name, flushed to the disk, renamed."""
    with open(path.with_name(path.name + ".tmp"), "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def _write_checkpoint(folder, step, state):
    """checkpoint.tmp -> checkpoint -> checkpoint.old: one of them is complete at any instant."""
    new, now, old = (folder / f"checkpoint{suffix}" for suffix in (".tmp", "", ".old"))
    tree = {"step": step, "state": serialization.to_state_dict(jax.device_get(state))}
    raw = serialization.msgpack_serialize(tree, in_place=True)
    note = {"step": step, "sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        _write(new / "state.msgpack", raw)
        _write(new / "checkpoint.json", json.dumps(note))
        if now.exists():
            shutil.rmtree(old, ignore_errors=True)
            now.rename(old)
        new.rename(now)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _read_checkpoint(folder):
    """(step, state dict) of the newest whole checkpoint; (None, None) before the first."""
    damaged = []
    for path in filter(Path.exists, (folder / "checkpoint", folder / "checkpoint.old")):
        try:
            note = json.loads((path / "checkpoint.json").read_text("utf-8"))
            raw = (path / "state.msgpack").read_bytes()
            if hashlib.sha256(raw).hexdigest() != note["sha256"]:
                raise ValueError(f"state.msgpack ({len(raw)} bytes) is not what was written")
            tree = serialization.msgpack_restore(raw)
            for line in damaged:
                print(f"{line} Taking {path.name}, of step {tree['step']:,}.", file=sys.stderr)
            return tree["step"], tree["state"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            damaged.append(f"{path} is damaged: {error}.")
    if damaged:
        raise RunError("\n".join([*damaged, f"No whole checkpoint is left in {folder}."]))
    return None, None


def _fill(template, saved):
    """`template`, a pytree of arrays or shapes, with the leaves of the state dict `saved`."""

    def place(key, like, x):
        if (x.shape, x.dtype) != (like.shape, like.dtype):
            name, (a, b) = jax.tree_util.keystr(key), (x.shape, like.shape)
            raise ValueError(f"{name} is {x.dtype}{a}, expected {like.dtype}{b}")
        # a copy, for the chunk to donate
        return jnp.array(x, device=like.sharding if isinstance(like, jax.Array) else None)

    like = serialization.to_state_dict(template)
    try:
        leaves = jax.tree_util.tree_map_with_path(place, like, saved)
    except (ValueError, AttributeError) as error:
        raise RunError(f"The checkpoint does not fit this program: {error}.") from None
    return serialization.from_state_dict(template, leaves)
