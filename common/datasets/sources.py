"""From a dataset's name to a file on this machine, downloaded if necessary."""

import difflib
import http.client
import os
import re
import warnings
from pathlib import Path

from common.datasets import arrow, downloads
from common.datasets.checked import DatasetError
from common.datasets.d4rl import D4RL_HOST, D4RL_MIRROR, Source, d4rl_names

MINARI_HOST = "https://huggingface.co/datasets/farama-minari/"  # as minari.download_dataset
BUNDLED = Path(__file__).resolve().parents[2] / "data"
OFFLINE = "stillwater/hopper/medium-replay-v0"  # in BUNDLED


def find(name: str, env_id: str = "") -> tuple[Source, str]:
    """(the Source of the dataset `name`, its origin in words). Raises DatasetError.

    env_id: Gymnasium id to score a user's file on; "" for the dataset's own.
    """
    if name in d4rl_names():
        source = d4rl_names()[name]
        if env_id not in ("", source.env_id):
            raise DatasetError(
                f"{name} is scored on {source.env_id or 'no environment of Gymnasium'}: "
                f"--env-id {env_id} is for a bare file (--env FILE.hdf5)"
            )
        return find_d4rl(name, source)
    path = Path(os.path.expanduser(name))
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise DatasetError(f"{path.absolute()}: a pipe or a device, not a file.")
        if found := minari_path(path):
            return Source(found, "Minari", env_id), "local file"
        if path.suffix in (".hdf5", ".h5") and not path.is_file():
            what = "a folder, not a file" if path.is_dir() else "no such file"
            moved = "If it has moved, --env gives its new path, also with --resume."
            raise DatasetError(f"{path.absolute()}: {what}. {moved} {offline_hint()}")
        is_file = path.is_file()
    except OSError as error:  # no permission; a name that is too long
        raise DatasetError(f"{name[:200]}: cannot be read: {error.strerror}.") from None
    if is_file:
        return Source(path.absolute(), "HDF5", env_id), "local file"
    near = difflib.get_close_matches(name, d4rl_names(), 3, 0.5)
    if re.fullmatch(r"([\w-]+/)*[\w-]+-v\d+", name, re.ASCII) and (
        "/" in name or not near or local_minari(name)
    ):
        return find_minari(name, env_id)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise DatasetError(
        f"unknown dataset {name!r}.{hint} Expected a D4RL name, a Minari id such as "
        f"mujoco/hopper/medium-v0, or an .hdf5 file. {offline_hint()}"
    )


def find_d4rl(name, source):
    """(Source with its path, origin): the user's copy, else a download from D4RL's host or mirror.

    Raises DatasetError.
    """
    own = os.environ.get("D4RL_DATASET_DIR")
    folders = [Path(os.path.expanduser(own))] if own else []
    folders.append(Path(os.path.expanduser("~/.d4rl/datasets")))
    file = Path(source.path).name
    for path in (folder / sub for folder in folders for sub in (file, source.path)):
        if path.is_file():
            return source._replace(path=path), "local file"
    target = folders[0] / file
    tried = downloads.probe([D4RL_HOST + source.path, D4RL_MIRROR + file])
    for url in (url for url, answer in tried.items() if not answer):
        try:
            downloads.download(url, target, source)
            return source._replace(path=target), url
        except (OSError, ValueError, http.client.HTTPException) as error:
            tried[url] = str(error) or type(error).__name__
    raise unavailable(name, tried, file, folders)


def minari_data(folder):
    """The HDF5 file of a Minari dataset, or `folder` in its arrow format; None if it has neither.

    folder: the one that holds metadata.json. Raises DatasetError for the layout before 0.5.
    """
    file = folder / "main_data.hdf5"
    if (folder / "metadata.json").is_file():
        return file if file.is_file() else folder if arrow.paths(folder) else None
    if file.is_file():
        raise DatasetError(
            f"{file}: a Minari dataset from before version 0.5, without metadata.json. Download it "
            "again, or read it with h5py and call datasets.from_arrays."
        )
    return None


def minari_path(path):
    """`minari_data` of a dataset's folder, its data folder or its file; None for other paths."""
    path = path.absolute()
    for folder in (path.parent,) if path.name == "main_data.hdf5" else (path, path / "data"):
        if found := minari_data(folder):
            return found
        if (folder / "metadata.json").is_file():
            why = "a Minari dataset without main_data.hdf5, .arrow or .parquet files"
            raise DatasetError(f"{folder}: {why}.")
    return None


def minari_folder():
    """The folder in which minari keeps its datasets."""
    return Path(os.path.expanduser(os.environ.get("MINARI_DATASETS_PATH") or "~/.minari/datasets"))


def local_minari(name):
    """(file or folder, origin) of a Minari dataset, bundled or in minari's folder, or None."""
    for folder, origin in ((BUNDLED, "bundled"), (minari_folder(), "local file")):
        if found := minari_data(folder / name / "data"):
            return found, origin
    return None


def find_minari(name, env_id):
    """(Source, origin) of a local copy, else of minari's download. Raises DatasetError."""
    tried = {} if local_minari(name) else download_minari(name)
    found = local_minari(name)
    if not found:
        file = f"{name}/data/ (with metadata.json and main_data.hdf5)"
        raise unavailable(name, tried, file, [BUNDLED, minari_folder()])
    path, origin = found
    return Source(path, "Minari", env_id), next(iter(tried), origin)


def download_minari(name):
    """Downloads with minari, which reads metadata as plain JSON: {address: what failed}."""
    if name.startswith("stillwater/"):
        return {"network": "not tried; the dataset is in the repository's data/, or made by "
                           "`python -m benchmarks.collect`"}  # fmt: skip
    tried = downloads.probe([MINARI_HOST + name.split("/")[0]])
    for url in (url for url, answer in tried.items() if not answer):
        try:
            import minari  # here, because it takes a second

            def work(stop):
                minari.download_dataset(name, force_download=True)  # completes a partial one

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                downloads.patiently(work, lambda: downloads.size_of(minari_folder()))
            tried[url] = "came without main_data.hdf5, .arrow or .parquet files in data/"
        except Exception as error:  # errors of its HTTP client are not OSErrors
            tried[url] = f"{type(error).__name__}: {error}".splitlines()[0]
    return tried


def unavailable(name, tried, file, folders):
    """The DatasetError for a dataset that is nowhere: what was tried, and what works offline."""
    lines = [f"{name} was not found:", *(f"  {folder}: not there" for folder in folders)]
    lines += [f"  {url}: {answer}" for url, answer in tried.items()]
    lines += [f"Put {file} into {' or '.join(map(str, folders))}.", offline_hint()]
    return DatasetError("\n".join(lines))


def offline_hint():
    """A sentence with a command that works without a network."""
    if (BUNDLED / OFFLINE).is_dir():
        return f"Works offline: --env {OFFLINE}"
    return "Works offline: --env FILE.hdf5 --env-id Hopper-v5, a file in D4RL's layout"
