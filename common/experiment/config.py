"""The config of a run: filled from TUNED, checked, or taken from a resumed run."""

import dataclasses
import inspect
import itertools
import math
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

from common.experiment import folders, runtime
from common.experiment.checkpoint import RunError

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
    """The config to run: `cfg` filled and checked, or the config stored in the folder `cfg.resume`.

    tuned: {key: {field: value}} fills the fields that are None. A key applies if the dataset has a
    known name (not a path) and the key consists of whole words of it, or of each of several names;
    the longest such key wins, then the key "default". dataset: the Dataset to train on; its name
    becomes `cfg.env`, and the values that come from a key other than "default" are printed.

    A repeated --env on the command line names several datasets, "A,B".

    Ranges: a comment that ends in `in [0, 1)` declares its field's range. Without one an int is at
    least 1 (0 if its default is 0) and at most 16,384 if its default is a small number; a float is
    finite, and negative only if its default is. SHARED has the ranges of the shared fields.

    A resumed run keeps its config. Only `resume`, `out` and `wandb` may differ, and `env` if the
    data have moved. A larger `num_updates` extends the run, unless the comment of a field that is
    set contains "until num_updates", which marks a schedule.

    Raises RunError for a value out of range, for one that contradicts the dataset, and for a flag
    that conflicts with the stored config.
    """
    if "--resume=" in sys.argv or ("--resume", "") in itertools.pairwise(sys.argv):
        raise RunError("--resume '': needs a run folder.")
    if len(names := _typed_names()) > 1:
        cfg = dataclasses.replace(cfg, env=",".join(names))
    runtime.last_words = f"{cfg.resume} is as it was." if cfg.resume else "Nothing is saved yet."
    runtime.open_streams()
    if dataset is None:  # called by a command, not by a notebook
        runtime.end_at_interrupt()
    cfg = _resumed(cfg) if cfg.resume else cfg
    runtime.import_own(getattr(cfg, "env_module", ""))
    if dataset is not None:
        cfg = dataclasses.replace(cfg, env=dataset.name)
        if not _is_known(dataset.name):  # the command line needs it to resume
            cfg = dataclasses.replace(cfg, env_id=dataset.env_id)
    cfg = _filled(cfg, tuned or {}, told=dataset is not None)
    _in_range(cfg, f"{cfg.resume}/config.json: " if cfg.resume else "")  # nobody typed it
    if dataset is not None:
        _agree(cfg, dataset)
    total, every = cfg.num_updates, min(cfg.eval_every, cfg.num_updates)
    if total % every:
        near = f"the nearest are {total // every * every} and {(total // every + 1) * every}"
        rule = f"must be a multiple of --eval-every {every}"
        raise RunError(f"--num-updates {total}: {rule}; {near}.")
    log_every = next(n for n in range(min(cfg.log_every, every), 0, -1) if every % n == 0)
    return dataclasses.replace(cfg, eval_every=every, log_every=log_every)


def read(folder, kind=None):
    """(config.json's content, its config as the dataclass `kind`) of a run folder.

    kind: None: that of the algorithm's own file. Raises RunError, and where `resolve` would.
    """
    info = folders.read(folder)
    kind = kind or folders.module(*folders.source(info)).Config
    cfg = folders.build(kind, info["config"], folder)
    _in_range(cfg, f"{folder / 'config.json'}: ")
    return info, cfg


def _in_range(cfg, where):
    """Raises RunError for a field out of its range; `where` comes first in the message."""
    comments = _comments(type(cfg))
    for field in dataclasses.fields(cfg):
        rule, good = _range(field, comments.get(field.name, ""))
        _check(f"{where}{_flag(field.name)}", getattr(cfg, field.name), rule, good)
    if cfg.seed + cfg.num_seeds > 2**31:
        raise RunError(f"{where}--seed {cfg.seed}: the last seed must be 2,147,483,647 or less.")


def _filled(cfg, tuned, told):
    """`cfg` with TUNED's values for its dataset. told: print those that the name decides."""
    names = ["-" + re.sub("[^a-z0-9]+", "-", x) + "-" for x in cfg.env.lower().split(",")]
    known = _is_known(cfg.env)
    keys = [key for key in tuned if known and all(f"-{key}-" in name for name in names)]
    chosen = {}  # {field: key}
    for key in ["default", *sorted(keys, key=len)]:
        chosen |= dict.fromkeys(tuned.get(key, {}), key)
    empty = {name: tuned[key][name] for name, key in chosen.items() if getattr(cfg, name) is None}
    cfg = dataclasses.replace(cfg, **empty)
    for key in keys if told else []:
        taken = {name: x for name, x in tuned[key].items() if chosen[name] == key}
        taken = {name: x for name, x in taken.items() if getattr(cfg, name) == x}
        if taken:
            print("Tuned values:", ", ".join(f"{k} {x}" for k, x in taken.items()), f"({key})")
    return cfg


def _is_known(name):
    """Whether a dataset's name, or each of several, is D4RL's or a Minari id, not a path."""
    one = r"([\w-]+/)*[\w-]+-v\d+"
    return re.fullmatch(rf"{one}(, *{one})*", name, re.ASCII) is not None


def _typed_names():
    """The values of --env on the command line, which may be repeated."""
    words, names = iter(sys.argv[1:]), []
    for word in words:
        flag, equals, value = word.partition("=")
        if flag == "--env":
            names.append(value if equals else next(words, ""))
    return names


def _comments(kind):
    """{field: comment} in a Config's source; {} if the source cannot be read."""
    with suppress(OSError, TypeError):
        lines = re.findall(r"^ +(\w+): .*#(.*)$", inspect.getsource(kind), re.MULTILINE)
        return dict(lines)
    return {}


def _range(field, comment):
    """(the range in words, a test of a number) for a field."""
    name, default, kinds = field.name, field.default, str(field.type)
    is_int = "int" in kinds and "float" not in kinds
    if declared := re.search(r"in ([\[(])(\S+), (\S+)([])])$", comment.strip()):
        left, low, high, right = declared.groups()
        if is_int and high == "inf":
            high, right = str(INT32), "]"
        above = (lambda x: x >= float(low)) if left == "[" else (lambda x: x > float(low))
        below = (lambda x: x <= float(high)) if right == "]" else (lambda x: x < float(high))
        words = [f"{WORDS[left]} {low}", *([f"{WORDS[right]} {high}"] if high != "inf" else [])]
        return " and ".join(words), lambda x: above(x) and below(x)
    if is_int:
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
    """Raises RunError unless `value`, or each number in a tuple, is good; non-numbers pass."""
    if isinstance(value, tuple):
        if not value:
            raise RunError(f"{name}: needs at least one value.")
        for one in value:
            _check(name, one, rule, good)
    elif isinstance(value, int | float) and not isinstance(value, bool) and not good(value):
        raise RunError(f"{name} {value}: must be {rule}.")


def _agree(cfg, dataset):
    """Raises RunError if a config contradicts its Dataset."""
    kind, name = "discrete" if dataset.num_actions else "continuous", folders.algorithm(cfg)
    if kind not in folders.takes(cfg):
        files = folders.files_for(kind, name)
        use = f"use {' or '.join(files[:3])}" if files else "use another file"
        raise RunError(f"{name}.py does not take the {kind} actions of {dataset.name}: {use}.")
    if cfg.eval_episodes and not dataset.env_id:
        how = "name one with --env-id, or train unscored with --eval-episodes 0"
        raise RunError(f"{dataset.name} has no environment to score on: {how}.")
    if cfg.batch_size > (rows := len(dataset.obs)):
        why = f"{dataset.name} has only {rows:,} transitions"
        raise RunError(f"--batch-size {cfg.batch_size}: {why}. Choose a smaller one.")


def _resumed(cfg):
    """The config stored in `cfg.resume`. Raises RunError for a flag that conflicts with it."""
    path = Path(os.path.expanduser(cfg.resume)).resolve()  # ~nobody stays as it is
    info, algorithm = folders.read(path), folders.algorithm(cfg)
    if info["algorithm"] != algorithm:
        raise RunError(f"{path} is a run of {info['algorithm']}, not of {algorithm}.")
    stored = folders.build(type(cfg), info["config"], path)
    changed = {"resume": str(path), "wandb": cfg.wandb}
    if hasattr(cfg, "env_module"):
        changed["env_module"] = cfg.env_module
    typed = {word.split("=")[0].strip("-").replace("-", "_") for word in sys.argv[1:]}
    for field in dataclasses.fields(cfg):
        name, value, own = field.name, getattr(cfg, field.name), getattr(stored, field.name)
        asked = value != field.default or {name, "no_" + name} & typed
        if not asked or value == own or name in ("resume", "out", "wandb", "env_module"):
            continue
        if name == "env":  # the data have moved: Run compares their hash
            changed["env"] = value
        elif name == "num_updates" and value > own:
            _extend(stored, value)
            changed["num_updates"] = value
        else:
            raise RunError(f"{_flag(name)} {value} conflicts with the resumed run's {own}.")
    if (own := getattr(stored, "env_module", "")) and not cfg.env_module:
        why = "which runs the code of that module: give it again to resume"
        raise RunError(f"{path} was started with --env-module {own}, {why}.")
    return dataclasses.replace(stored, **changed)


def _extend(cfg, num_updates):
    """Raises RunError if a schedule depends on the length of the run `cfg`."""
    for name, comment in _comments(type(cfg)).items():
        if "until num_updates" in comment and getattr(cfg, name):
            why = f"{name} {getattr(cfg, name)} is a schedule of {cfg.num_updates:,} updates"
            how = "start a new run of that length"
            if getattr(cfg, name) is True:
                how += f", with --no-{name.replace('_', '-')} if it is to be extended later"
            raise RunError(
                f"--num-updates {num_updates}: {why}, so the run cannot be extended; {how}."
            )


def _flag(name):
    return "--" + name.replace("_", "-")
