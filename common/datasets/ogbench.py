"""OGBench's single tasks (Park et al. 2024, arXiv:2410.20092): local .npz files, or its download.

    python algorithms/fql.py --env cube-single-play-singletask-task1-v0    # pip install ogbench

The files hold trajectories without rewards. The package labels them for a task, by the state s:
reward 0 (for several objects the number of wrong ones, negative) and no value beyond where the task
is done. So a row is terminal where it is done, not where a trajectory of the file ends; such an end
is a time limit. A row whose task is done is an episode's last.
"""

import contextlib
import os
import re
import warnings
import zipfile
from pathlib import Path

from common.datasets import downloads
from common.datasets.checked import COPIES, MEMORY, DatasetError
from common.experiment import runtime

FIELDS = {"observations", "actions", "terminals", "qpos", "qvel", "button_states"}
FOLDER = "~/.ogbench/data"  # the package's own


def split(name):
    """(Gymnasium id, name of the file without .npz) of a single task's dataset; None for others."""
    found = re.fullmatch(r"([a-z0-9-]+)-([a-z]+)-(singletask(?:-task[1-5])?)-(v\d+)", name)
    if not found:
        return None
    world, kind, task, version = found.groups()
    return f"{world}-{task}-{version}", f"{world}-{kind}-{version}"


def arrays(name):
    """(arguments of datasets.from_arrays, where they are from). Raises DatasetError."""
    env_id, stem = split(name)
    package(name)
    path, origin = find(stem)
    check(path)
    env = None
    try:
        import gymnasium
        from ogbench import relabel_utils, utils

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its spaces are of float64
            env = gymnasium.make(env_id)
            data = utils.load_dataset(path, add_info=True)
            relabel_utils.relabel_dataset(env_id, env, data)
    except Exception as error:  # of a damaged file, or of an unknown task
        raise DatasetError(f"{path}: cannot be read for {name}: {error}") from None
    finally:
        if env is not None:
            env.close()
    done = data["masks"] == 0
    return {
        "obs": data["observations"],
        "action": data["actions"],
        "reward": data["rewards"],
        "done": done,
        "timeout": (data["terminals"] > 0) & ~done,
        "next_obs": data["next_observations"],
        "env_id": env_id,
    }, origin


def package(name):
    """Imports ogbench, which registers its environments. Raises DatasetError without it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ogbench  # noqa: F401
    except ImportError as error:
        raise DatasetError(f"{name} is OGBench's: pip install ogbench ({error}).") from None


def find(stem):
    """(Path of a local file, origin), downloaded by the package if need be. Raises DatasetError."""
    folder = Path(os.path.expanduser(os.environ.get("OGBENCH_DATASET_DIR") or FOLDER))
    path = folder / f"{stem}.npz"
    if path.is_file():
        return path, "local file"
    from ogbench import utils

    url = f"{utils.DATASET_URL}/{path.name}"
    (why,) = downloads.probe([url]).values()
    if not why:
        try:

            def work(stop):
                with contextlib.redirect_stdout(None):
                    utils.download_datasets([stem], str(folder))

            downloads.patiently(work, lambda: downloads.size_of(folder))
            return path, url
        except Exception as error:  # of its HTTP client
            why = f"{type(error).__name__}: {error}".splitlines()[0]
    raise DatasetError(
        f"{stem} was not found:\n  {path}: not there\n  {url}: {why}\n"
        f"Put {path.name} into {folder}, or name another folder by $OGBENCH_DATASET_DIR."
    )


def check(path):
    """Raises DatasetError unless the file is an .npz that fits into memory."""
    most = min(MEMORY, runtime.free_memory() // COPIES)
    try:
        with zipfile.ZipFile(path) as file:
            need = sum(x.file_size for x in file.infolist() if x.filename[:-4] in FIELDS)
            names = {x.filename for x in file.infolist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise DatasetError(f"{path}: cannot be opened: {error}") from None
    for field in ("observations", "actions", "terminals", "qpos"):
        if f"{field}.npy" not in names:
            raise DatasetError(f"{path}: {field}: missing")
    if need > most:
        raise DatasetError(f"{path}: needs {need:,} bytes; this machine has memory for {most:,}.")
