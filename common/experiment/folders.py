"""Creates a run folder and reads it: its config, its algorithm, its checkpoint."""

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
from datetime import datetime
from pathlib import Path

from common.experiment import checkpoint, divergence, files
from common.experiment.checkpoint import RunError
from common.experiment.runtime import PROJECT


def algorithm(cfg):
    """The name of the file that defines the config's class."""
    return Path(inspect.getfile(type(cfg))).stem


def script(cfg):
    """The file that defines the config's class."""
    return Path(inspect.getfile(type(cfg))).resolve()


def takes(cfg):
    """The kinds of actions that the algorithm's file takes: its ACTIONS, else continuous ones."""
    return getattr(sys.modules[type(cfg).__module__], "ACTIONS", ("continuous",))


def files_for(kind, name):
    """Names of the files in algorithms/ that take this kind of actions; namesakes of `name` first.

    They are read, not run.
    """
    found = {}
    for path in sorted((PROJECT / "algorithms").glob("*.py")):
        told = re.search(r"^ACTIONS = (.*)$", path.read_text("utf-8"), re.MULTILINE)
        found[path.name] = kind in told[1] if told else kind == "continuous"
    own = set(name.split("_"))
    names = [x for x, taken in found.items() if taken]
    return sorted(names, key=lambda x: -len(own & set(x.removesuffix(".py").split("_"))))


def is_beside_common(cfg):
    """Whether the algorithm's file is a copy beside common/ instead of in algorithms/."""
    return script(cfg).parent == PROJECT


def dims(dataset):
    """[N rows, D, A] of a Dataset."""
    return [*dataset.obs.shape, dataset.num_actions or dataset.action.shape[1]]


def checksums(dataset):
    """{name: CRC-32} of the arrays of a Dataset."""
    names = "obs action reward next_obs done start length".split()
    return {name: files.checksum(getattr(dataset, name)) for name in names}


def is_same_data(info, dataset):
    """Whether a Dataset is the one that config.json, `info`, tells of."""
    began = info["dataset"]
    return (
        info["dims"] == dims(dataset)
        and began.get("sha256") == dataset.provenance.get("sha256")
        and ("crc32" not in began or began["crc32"] == checksums(dataset))
    )


def create(cfg, dataset, facts):
    """Makes the folder of a new run with its config.json; its Path. Raises OSError.

    facts: of `runtime.machine`.
    """
    returns = dataset.returns()
    name = re.sub(r"[^\w.-]+", "-", dataset.name).strip("-.")[-100:]
    parent = Path(os.path.expanduser(cfg.out)).resolve() / algorithm(cfg) / name
    parent.mkdir(parents=True, exist_ok=True)
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-s{cfg.seed}"
    for end in ["", *(f"-{i}" for i in range(2, 1000))]:  # several may start in one second
        folder = parent / (stem + end)
        with suppress(FileExistsError):
            folder.mkdir()
            break
    about = {"name": dataset.name, "env_id": dataset.env_id, **dataset.provenance}
    about |= {"ref_min_score": dataset.ref_min, "ref_max_score": dataset.ref_max}
    about |= {"crc32": checksums(dataset), "num_actions": dataset.num_actions}
    about |= {"mean_return": float(returns.mean()), "best_return": float(returns.max())}
    info = {"algorithm": algorithm(cfg), "config": vars(cfg), "dataset": about, **facts}
    info |= {"command": sys.argv, "dims": dims(dataset), "beside_common": is_beside_common(cfg)}
    files.write(folder / "config.json", json.dumps(info, indent=2) + "\n")
    return folder


def extend(folder, info, num_updates):
    """Writes config.json with a larger `num_updates`. info: its content, which is changed."""
    info["config"]["num_updates"] = num_updates
    files.write(folder / "config.json", json.dumps(info, indent=2) + "\n")


def read(folder):
    """The content of config.json, a dict; its `dims` are N rows, D and A. Raises RunError."""
    path = folder / "config.json"
    try:
        info = files.read_json(path)
        values = [info[name] for name in ("algorithm", "config", "dataset")] + info["dims"]
        data = {"env_id": "", "ref_min_score": None, "ref_max_score": None} | info["dataset"]
        refs = [data["ref_min_score"], data["ref_max_score"]]
    except OSError as error:
        raise RunError(f"{folder} is not a run folder: {path.name}: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged: {error!r}.") from None
    numbers = all(type(x) in (int, float) for x in refs) and refs[1] - refs[0] < math.inf
    scored = refs == [None, None] or (numbers and refs[0] < refs[1])
    types = [*map(type, values), type(data["env_id"])]
    if types != [str, dict, dict, int, int, int, str] or min(values[3:]) < 1 or not scored:
        raise RunError(f"{path} is damaged: a value in it is of the wrong kind.")
    return info | {"dataset": data}


def build(kind, values, folder):
    """The dataclass `kind` from the JSON `values` of its fields. Raises RunError.

    JSON has lists for tuples; numbers, strings and None come back exactly.
    """

    def tuples(value):
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    path = folder / "config.json"
    unknown = ", ".join(values.keys() - {field.name for field in dataclasses.fields(kind)})
    if unknown:
        raise RunError(f"{path} has options unknown to this program: {unknown}.")
    values = {name: tuples(value) for name, value in values.items()}
    for field in dataclasses.fields(kind):
        if not _is_a(value := values.get(field.name, field.default), field.type):
            raise RunError(f"{path} is damaged: {field.name} is {value!r}.")
    return kind(**values)


def _is_a(value, kind):
    """Whether `value` has the type of a field; an int passes for a float."""
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return value in inner
    if isinstance(kind, types.UnionType):
        return any(_is_a(value, one) for one in inner)
    if inner:  # tuple[kind, ...]
        return isinstance(value, tuple) and all(_is_a(one, inner[0]) for one in value)
    return type(value) is kind or (kind is float and type(value) is int)


def source(info):
    """The arguments of `module` for a run. info: the content of its config.json."""
    return info["algorithm"], info.get("beside_common") is True


@functools.cache
def module(name, beside_common=False):
    """algorithms/<name>.py, or a copy beside common/: the only code that a run folder can make run.

    Raises RunError for a name without such a file.
    """
    path = (PROJECT if beside_common else PROJECT / "algorithms") / f"{name}.py"
    if not (re.fullmatch(r"[\w-]+", name) and path.is_file()):
        raise RunError(f"There is no algorithm {name!r} in {path.parent}.")
    package = "" if beside_common else "algorithms."
    spec = importlib.util.spec_from_file_location(package + name, path)
    sys.modules[spec.name] = found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def restore(folder, template):
    """(state, sentences about diverged seeds) from the newest intact checkpoint.

    template: a pytree of arrays or shapes. Raises RunError if there is no checkpoint or if it does
    not fit the template.
    """
    _, saved = checkpoint.read(folder)
    if saved is None:
        raise RunError(f"{folder} has no checkpoint yet.")
    try:
        messages = [seed["message"] for seed in divergence.read(folder).values()]
    except (OSError, ValueError) as error:
        raise RunError(f"{folder / 'diverged.json'} is damaged: {error}.") from None
    return checkpoint.fill(template, saved), messages


def last_step(folder):
    """The step of the newest intact checkpoint, 0 if there is none. Raises RunError."""
    return checkpoint.read(folder)[0]
