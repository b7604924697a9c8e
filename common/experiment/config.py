"""Config of a run: filled, checked, stored as JSON and read again. Knows no algorithm."""

import dataclasses
import functools
import importlib.util
import inspect
import json
import math
import os
import re
import sys
import types
import typing
from contextlib import suppress
from pathlib import Path

from common.experiment.checkpoint import RunError
from common.experiment.runtime import PROJECT

INT32 = 2**31 - 1
SHARED = {  # ranges of the fields that all algorithms share
    "seed": (0, INT32),
    "num_seeds": (1, 1_000),
    "num_updates": (1, INT32),
    "log_every": (1, 10_000_000),
    "eval_every": (1, 10_000_000),
    "eval_episodes": (0, 10_000),
    "batch_size": (1, INT32),
}
WORDS = {"[": "at least", "(": "above", "]": "at most", ")": "below"}


def resolve(cfg, tuned=None, dataset=None):
    """The config to run: `cfg` filled and checked, or the one stored in the folder `cfg.resume`.

    tuned: {words of a dataset's name: {field: value}} fills fields that are None; of the keys that
    are whole words of a known name the longest wins, then "default". dataset: what is trained on,
    if it is loaded; `cfg.env` becomes its name.

    Ranges: a comment that ends in `in [0, 1)` declares its field's range. Otherwise an int is at
    least 1, or 0 if that is its default, and at most 16,384 where the default is a small number; a
    float is finite, and negative only where the default is. SHARED has those of the shared fields.

    Raises RunError for an impossible value, for one that contradicts the dataset, and for a flag
    that conflicts with the stored config (`resume`, `out` and `wandb` may differ).
    """
    cfg = _resumed(cfg) if cfg.resume else cfg
    if dataset is not None:
        cfg = dataclasses.replace(cfg, env=dataset.name)
    values = _tuned(tuned or {}, cfg.env)
    cfg = dataclasses.replace(cfg, **{k: v for k, v in values.items() if getattr(cfg, k) is None})
    where = f"{cfg.resume}/config.json: " if cfg.resume else ""  # nobody typed it
    comments = _comments(type(cfg))
    for field in dataclasses.fields(cfg):
        rule, good = _range(field, comments.get(field.name, ""))
        _check(f"{where}{_flag(field.name)}", getattr(cfg, field.name), rule, good)
    if cfg.seed + cfg.num_seeds > 2**31:
        raise RunError(f"--seed {cfg.seed}: the last seed must be 2,147,483,647 or less.")
    if dataset is not None:
        _agree(cfg, dataset)
    total, every = cfg.num_updates, min(cfg.eval_every, cfg.num_updates)
    if total % every:
        near = f"{total // every * every} and {(total // every + 1) * every} are the nearest"
        raise RunError(f"--num-updates {total} is no multiple of --eval-every {every}: {near}.")
    log_every = next(n for n in range(min(cfg.log_every, every), 0, -1) if every % n == 0)
    return dataclasses.replace(cfg, eval_every=every, log_every=log_every)


def _tuned(tuned, name):
    """{field: value} for a dataset; a path to a user's own file has nothing but the defaults."""
    known = re.fullmatch(r"([\w-]+/)*[\w-]+-v\d+", name, re.ASCII)
    words = "-" + re.sub("[^a-z0-9]+", "-", name.lower()) + "-"
    keys = [key for key in tuned if known and f"-{key}-" in words]
    values = {}
    for key in ["default", *sorted(keys, key=len)]:
        values |= tuned.get(key, {})
    return values


def _comments(kind):
    """{field: comment} of a Config's source; {} where there is none to read."""
    with suppress(OSError, TypeError):
        lines = re.findall(r"^ +(\w+): .*#(.*)$", inspect.getsource(kind), re.MULTILINE)
        return dict(lines)
    return {}


def _range(field, comment):
    """(words, test of a number) of what a field may be."""
    if declared := re.search(r"in ([\[(])(\S+), (\S+)([])])$", comment.strip()):
        left, low, high, right = declared.groups()
        above = (lambda x: x >= float(low)) if left == "[" else (lambda x: x > float(low))
        below = (lambda x: x <= float(high)) if right == "]" else (lambda x: x < float(high))
        words = [f"{WORDS[left]} {low}", *([f"{WORDS[right]} {high}"] if high != "inf" else [])]
        return ", ".join(words), lambda x: above(x) and below(x)
    name, default, kinds = field.name, field.default, str(field.type)
    if "int" in kinds and "float" not in kinds:
        sizes = default if isinstance(default, tuple) else (default or 0,)
        low, high = SHARED.get(name, (int(default != 0), 16_384 if max(sizes) <= 1_000 else INT32))
        return f"from {low} to {high:,}", lambda x: low <= x <= high
    if name in ("gamma", "polyak"):
        return "between 0 and 1", lambda x: 0 <= x <= 1
    if name == "lr" or name.endswith("_lr"):
        return "above 0", lambda x: 0 < x < math.inf
    if isinstance(default, float) and default >= 0:
        return "at least 0", lambda x: 0 <= x < math.inf
    return "a finite number", lambda x: abs(x) < math.inf


def _check(name, value, rule, good):
    """RunError unless `value`, or each number in it, is good; others than numbers pass."""
    if isinstance(value, tuple):
        if not value:
            raise RunError(f"{name}: needs at least one value.")
        for one in value:
            _check(name, one, rule, good)
    elif isinstance(value, int | float) and not isinstance(value, bool) and not good(value):
        raise RunError(f"{name} {value}: must be {rule}.")


def _agree(cfg, dataset):
    """RunError where a config contradicts its Dataset."""
    if cfg.eval_episodes and not dataset.env_id:
        how = "name one with --env-id, or train unscored with --eval-episodes 0"
        raise RunError(f"{dataset.name} has no environment to be scored on: {how}.")
    if cfg.batch_size > (rows := len(dataset.obs)):
        why = f"{dataset.name} has only {rows:,} transitions"
        raise RunError(f"--batch-size {cfg.batch_size}: {why}. Choose a smaller one.")


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
    """Name of the file that defines the config's class."""
    return Path(inspect.getfile(type(cfg))).stem


@functools.cache
def module(name):
    """algorithms/<name>.py, imported: the only code ever executed for a run folder."""
    path = PROJECT / "algorithms" / f"{name}.py"
    if not (name.isidentifier() and path.is_file()):
        raise RunError(f"There is no algorithm {name!r} in {path.parent}.")
    spec = importlib.util.spec_from_file_location(f"algorithms.{name}", path)
    sys.modules[spec.name] = found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found
