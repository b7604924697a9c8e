"""Config of a run: filled, checked, stored as JSON and read again. Knows no algorithm."""

import dataclasses
import importlib.util
import inspect
import json
import math
import os
import re
import subprocess
import sys
import types
import typing
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import jax

from common.checkpoint import RunError

PROJECT = Path(__file__).resolve().parents[1]
PACKAGES = ["jax", "jaxlib", "flax", "optax", "distrax", "gymnasium", "mujoco", "numpy"]
RULES = {  # pattern of a field's name: what each number in it must be; else finite
    "seed": ("from 0 to 2,147,483,647", lambda x: 0 <= x < 2**31),
    "num_seeds": ("from 1 to 1,000", lambda x: 1 <= x <= 1_000),
    "num_updates|(save|rollout)_every|batch_size|rollout_batch": (
        "from 1 to 2,147,483,647", lambda x: 1 <= x < 2**31,
    ),
    "eval_every": ("from 1 to 10,000,000", lambda x: 1 <= x <= 10**7),  # a key for each update
    "eval_episodes": ("from 0 to 10,000", lambda x: 0 <= x <= 10_000),
    "(.+_)?widths?|layers|heads|multiples|max_time|context|horizon|diffusion_steps|samples": (
        "from 1 to 16,384", lambda x: 1 <= x <= 2**14,
    ),
    "num_(samples|actions|members|elites)|retain|patience|max_epochs": (
        "from 1 to 16,384", lambda x: 1 <= x <= 2**14,
    ),
    "warmup|guide_(steps|stop)|plan_every|ddim_steps|warm_start": (
        "from 0 to 2,147,483,647", lambda x: 0 <= x < 2**31,
    ),
    "gamma|polyak|ema|tau": ("between 0 and 1", lambda x: 0 <= x <= 1),
    "real_fraction": ("above 0 and below 1", lambda x: 0 < x < 1),
    "dropout": ("at least 0 and below 1", lambda x: 0 <= x < 1),
    "fraction": ("above 0, at most 1", lambda x: 0 < x <= 1),
    "(.+_)?lr|(rtg|return)_scale": ("above 0", lambda x: 0 < x < math.inf),
    "max_weight|clip": ("above 0", lambda x: x > 0),  # inf: none
    "alpha|beta|(.+_)?(decay|weight)|guide_scale": ("at least 0", lambda x: 0 <= x < math.inf),
    ".+": ("a finite number", lambda x: abs(x) < math.inf),
}  # fmt: skip


def resolve(cfg, paper=None):
    """The config to run: `cfg` filled and checked, or the one stored in the folder `cfg.resume`.

    paper: {part of a dataset's name: {field: value}} fills fields that are None; of the parts
    within `cfg.env` the longest wins, then "default". RunError: an impossible value, or a flag that
    conflicts with the stored config (`resume`, `out` and `wandb` may differ).
    """
    cfg = _resumed(cfg) if cfg.resume else cfg
    values, name = {}, re.sub("[^a-z0-9]+", "-", cfg.env.lower())
    for part in ["default", *sorted((part for part in paper or {} if part in name), key=len)]:
        values |= (paper or {}).get(part, {})
    cfg = dataclasses.replace(cfg, **{k: v for k, v in values.items() if getattr(cfg, k) is None})
    where = f"{cfg.resume}/config.json: " if cfg.resume else ""  # nobody typed it
    for name, value in vars(cfg).items():
        _check(where, name, value)
    if cfg.seed + cfg.num_seeds > 2**31:
        raise RunError(f"--seed {cfg.seed}: the last seed must be 2,147,483,647 or less.")
    total, every = cfg.num_updates, min(cfg.eval_every, cfg.num_updates)
    if total % every:
        near = f"{total // every * every} and {(total // every + 1) * every} are the nearest"
        raise RunError(f"--num-updates {total} is no multiple of --eval-every {every}: {near}.")
    return dataclasses.replace(cfg, eval_every=every)


def _check(where, name, value):
    """RunError unless `value`, or each number in it, is as RULES say; others than numbers pass."""
    if isinstance(value, tuple):
        if not value:
            raise RunError(f"{where}{_flag(name)}: needs at least one value.")
        for one in value:
            _check(where, name, one)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        rule, good = next(RULES[pattern] for pattern in RULES if re.fullmatch(pattern, name))
        if not good(value):
            raise RunError(f"{where}{_flag(name)} {value}: must be {rule}.")


def agree(cfg, data, window=""):
    """RunError where a config contradicts its Dataset; window: the field that counts its steps."""
    if cfg.eval_episodes and not data.env_id:
        how = "name one with --env-id, or train unscored with --eval-episodes 0"
        raise RunError(f"{data.name} has no environment to be scored on: {how}.")
    if cfg.batch_size > (rows := len(data.obs)):
        why = f"{data.name} has only {rows:,} transitions"
        raise RunError(f"--batch-size {cfg.batch_size}: {why}. Choose a smaller one.")
    if window and (size := getattr(cfg, window)) > (longest := data.length.max()):
        why = f"the longest episode of {data.name} has {longest:,} steps"
        raise RunError(f"{_flag(window)} {size}: {why}. Choose a smaller one.")


def _resumed(cfg):
    folder = Path(os.path.expanduser(cfg.resume)).resolve()  # ~nobody stays as it is
    info = read(folder)
    if info["algorithm"] != algorithm(cfg):
        raise RunError(f"{folder} is a run of {info['algorithm']}, not of {algorithm(cfg)}.")
    stored = build(type(cfg), info["config"], folder)
    typed = {word.split("=")[0].strip("-").replace("-", "_") for word in sys.argv[1:]}
    for field in dataclasses.fields(cfg):
        name, value, own = field.name, getattr(cfg, field.name), getattr(stored, field.name)
        asked = value != field.default or {name, "no_" + name} & typed
        if asked and value != own and name not in ("resume", "out", "wandb"):
            raise RunError(f"{_flag(name)} {value} conflicts with the resumed run's {own}.")
    return dataclasses.replace(stored, resume=str(folder), wandb=cfg.wandb)


def _flag(name):
    return "--" + name.replace("_", "-")


def read(folder):
    """The config.json of a run folder, a dict; `dims` are N rows, D and A."""
    path = folder / "config.json"
    try:
        info = json.loads(path.read_text("utf-8"))
        values = [info[name] for name in ("algorithm", "config", "dataset")] + info["dims"]
    except OSError as error:
        raise RunError(f"{folder} is no run folder: {path.name}: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged: {error!r}.") from None
    if list(map(type, values)) != [str, dict, dict, int, int, int]:
        raise RunError(f"{path} is damaged: a value in it has the wrong type.")
    return info


def build(kind, values, folder):
    """The dataclass `kind` from JSON, exactly as it was: lists were tuples."""

    def tuples(value):
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    unknown = ", ".join(values.keys() - {field.name for field in dataclasses.fields(kind)})
    if unknown:
        raise RunError(f"{folder / 'config.json'} has options unknown to this program: {unknown}.")
    values = {name: tuples(value) for name, value in values.items()}
    for field in dataclasses.fields(kind):
        if not _is(value := values.get(field.name, field.default), field.type):
            raise RunError(f"{folder / 'config.json'} is damaged: {field.name} is {value!r}.")
    return kind(**values)


def _is(value, kind):
    """Whether a value is of a field's type; an int will do for a float."""
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return value in inner
    if isinstance(kind, types.UnionType):
        return any(_is(value, one) for one in inner)
    if inner:  # tuple[kind, ...]
        return isinstance(value, tuple) and all(_is(one, inner[0]) for one in value)
    return type(value) is kind or (kind is float and type(value) is int)


def algorithm(cfg):
    """The algorithm's name: that of the file which defines the config's class."""
    return Path(inspect.getfile(type(cfg))).stem


def module(name):
    """algorithms/<name>.py, imported: the only code ever executed for a run folder."""
    path = PROJECT / "algorithms" / f"{name}.py"
    if not (name.isidentifier() and path.is_file()):
        raise RunError(f"There is no algorithm {name!r} in {path.parent}.")
    spec = importlib.util.spec_from_file_location(f"algorithms.{name}", path)
    sys.modules[spec.name] = found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def machine():
    """Versions, commit and device: what a run's bits depend on besides its config."""
    versions = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    git, commit = ["git", "-C", str(PROJECT), "describe", "--always", "--abbrev=40"], ""
    with suppress(OSError):
        git += ["--exclude=*", "--dirty=+changes"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return {
        "versions": versions,
        "commit": commit or None,
        "device": f"CPU, {os.cpu_count()} cores" if device.endswith("x cpu") else device,
    }
