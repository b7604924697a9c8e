"""From a dataset's name to a file on this machine, downloaded if it must be."""

import contextlib
import difflib
import hashlib
import http.client
import os
import re
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from common import evaluation, experiment
from common.datasets.d4rl import D4RL_HOST, D4RL_MIRROR, Source, d4rl_names

MINARI_HOST = "https://huggingface.co/datasets/farama-minari/"  # as minari.download_dataset
BUNDLED = Path(__file__).resolve().parents[2] / "data"
OFFLINE = "stillwater/hopper/medium-replay-v0"  # in BUNDLED
MAGIC = b"\x89HDF\r\n\x1a\n"
PATIENCE = 4.0  # seconds until an address without an answer counts as unreachable
STALL = 20.0  # seconds in which a download must bring, from its beginning on, a mean rate of
SLOWEST = 1024  # bytes a second
LONGEST = 12 * 3600.0  # seconds for one file
LARGEST = 16 * 2**30  # bytes of a file whose size is unknown


class DatasetError(experiment.UserError):
    """A dataset that cannot be found or read."""


def find(name: str, env_id: str = "") -> tuple[Source, str]:
    """The dataset `name` and where it came from. Raises DatasetError if it cannot be had."""
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
        if path.suffix in (".hdf5", ".h5") and not path.is_file():
            what = "a folder, not a file" if path.is_dir() else "no such file"
            raise DatasetError(f"{path.absolute()}: {what}. {offline_hint()}")
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
    raise DatasetError(
        f"{name!r} is no dataset: neither a D4RL name"
        f"{' (did you mean ' + ' or '.join(near) + '?)' if near else ''}, nor a Minari id such as "
        f"mujoco/hopper/medium-v0, nor an .hdf5 file. {offline_hint()}"
    )


def find_d4rl(name, source):
    """A copy that the user has, else a download from D4RL's host, else from the mirror."""
    own = os.environ.get("D4RL_DATASET_DIR")
    folders = [Path(os.path.expanduser(own))] if own else []
    folders.append(Path(os.path.expanduser("~/.d4rl/datasets")))
    file = Path(source.path).name
    for path in (folder / sub for folder in folders for sub in (file, source.path)):
        if path.is_file():
            return source._replace(path=path), "local file"
    target = folders[0] / file
    tried = probe([D4RL_HOST + source.path, D4RL_MIRROR + file])
    for url in (url for url, answer in tried.items() if not answer):
        try:
            download(url, target, source)
            return source._replace(path=target), url
        except (OSError, ValueError, http.client.HTTPException) as error:
            tried[url] = str(error) or type(error).__name__
    raise unavailable(name, tried, file, folders)


def minari_folder():
    """Where minari keeps its datasets."""
    return Path(os.path.expanduser(os.environ.get("MINARI_DATASETS_PATH") or "~/.minari/datasets"))


def local_minari(name):
    """(HDF5 file, origin) of a Minari dataset, bundled or the user's own, or None."""
    for folder, origin in ((BUNDLED, "bundled"), (minari_folder(), "local file")):
        data = folder / name / "data"
        if (data / "metadata.json").is_file() and (data / "main_data.hdf5").is_file():
            return data / "main_data.hdf5", origin
    return None


def find_minari(name, env_id):
    """A local copy, else a download by minari."""
    tried = {} if local_minari(name) else download_minari(name)
    found = local_minari(name)
    if not found:
        file = f"{name}/data/ (with metadata.json and main_data.hdf5)"
        raise unavailable(name, tried, file, [BUNDLED, minari_folder()])
    path, origin = found
    return Source(path, "Minari", env_id), next(iter(tried), origin)


def download_minari(name):
    """minari's own download, which reads metadata as plain JSON: {address: what came of it}."""
    if name.startswith("stillwater/"):
        return {"network": "not asked; the repository's data/ has it, or "
                           "`python -m benchmarks.collect` makes it"}  # fmt: skip
    tried = probe([MINARI_HOST + name.split("/")[0]])
    for url in (url for url, answer in tried.items() if not answer):
        try:
            import minari  # takes a second

            def work(watch, name=name):
                minari.download_dataset(name, force_download=True)  # completes a partial one

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                patiently(work, lambda: size_of(minari_folder()))
            tried[url] = "came without data/main_data.hdf5: only HDF5 is read"
        except Exception as error:  # its HTTP client's errors are no OSError
            tried[url] = f"{type(error).__name__}: {error}".splitlines()[0]
    return tried


def unavailable(name, tried, file, folders):
    """The one message for a dataset that cannot be had: what was tried, and what would work."""
    lines = [f"{name} cannot be had:", *(f"  {folder}: not there" for folder in folders)]
    lines += [f"  {url}: {answer}" for url, answer in tried.items()]
    lines += [f"Put {file} into {' or '.join(map(str, folders))}.", offline_hint()]
    return DatasetError("\n".join(lines))


def offline_hint():
    if (BUNDLED / OFFLINE).is_dir():
        return f"Works offline: --env {OFFLINE}"
    return "Works offline: --env FILE.hdf5 --env-id Hopper-v5, a file of your own in D4RL's layout"


def probe(urls: list[str]) -> dict[str, str]:
    """Whether each address (or the proxy before it) takes connections: "" or why not.

    Takes PATIENCE seconds at most, name service included, for all of them together.
    """
    answers = dict.fromkeys(urls, f"no answer within {PATIENCE:g} s")

    def ask(url):
        try:
            where, proxies = urlsplit(url), urllib.request.getproxies()
            if where.scheme in proxies and not urllib.request.proxy_bypass(where.hostname):
                proxy = proxies[where.scheme]
                where = urlsplit(proxy if "//" in proxy else f"//{proxy}")
            port = where.port or {"https": 443}.get(where.scheme, 80)
            socket.create_connection((where.hostname, port), PATIENCE).close()
            answers[url] = ""
        except (OSError, ValueError) as error:
            answers[url] = f"no connection ({error})"

    threads = [threading.Thread(target=ask, args=(url,), daemon=True) for url in urls]
    deadline = time.monotonic() + PATIENCE
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return dict(answers)


def patiently(work, count):
    """Runs work() in a thread of its own while it downloads: its result, or what it raised.

    count: () -> bytes so far. Raises OSError once STALL seconds have brought less than SLOWEST
    bytes a second, or LONGEST seconds have passed, whatever the peer sends or does not send.
    The thread is then left behind: it sees the event that it is called with.
    """
    stop, box = threading.Event(), {}

    def run():
        try:
            box["value"] = work(stop)
        except BaseException as error:
            box["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    began = mark = time.monotonic()
    before = count()
    try:
        while thread.is_alive():
            thread.join(min(0.5, STALL / 4))
            now, done = time.monotonic(), count()
            if now - began > LONGEST:
                raise OSError(f"takes longer than {LONGEST / 3600:.0f} hours")
            if now - mark > STALL:
                if thread.is_alive() and done - before < STALL * SLOWEST:
                    raise OSError(f"sends less than {SLOWEST:,} bytes a second")
                mark, before = now, done
    finally:
        stop.set()
    if "error" in box:
        raise box["error"]
    return box["value"]


def size_of(folder):
    """Bytes of all files in a folder."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def download(url, target, source):
    """`url` to the file `target`, whole or not at all. Raises OSError or HTTPException.

    The body must be HDF5, as long as the server says, and of the source's size and hash; where no
    hash is known, it must read as the layout that it claims.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f"{target.name}.*.part"):  # by a run that was killed
        if time.time() - left.stat().st_mtime > 3600:
            left.unlink(missing_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    got = [0]  # bytes
    try:
        with open(part, "wb") as file:
            sha256 = patiently(partial(transfer, url, file, source, got), lambda: got[0])
        if source.sha256 and sha256 != source.sha256:
            raise OSError(f"refused, SHA-256 {sha256} is not D4RL's {source.sha256}")
        if not source.sha256:
            try_to_read(part, source)
        os.replace(part, target)
    except urllib.error.HTTPError as error:
        error.close()
        raise OSError(f"HTTP {error.code} {error.reason}") from None
    finally:
        part.unlink(missing_ok=True)


def transfer(url, file, source, got, stop):
    """Writes the body at `url` to an open file: its SHA-256. got[0]: bytes so far."""
    request = urllib.request.Request(url, headers={"User-Agent": "stillwater"})
    digest, head, shown = hashlib.sha256(), b"", time.monotonic()
    with urllib.request.urlopen(request, timeout=2 * STALL) as body:
        if body.status != 200:
            raise OSError(f"answers HTTP {body.status}, not with the whole file")
        length = int(body.headers.get("Content-Length") or source.size)
        if source.size and length != source.size:
            raise OSError(f"offers {length:,} bytes where D4RL's file has {source.size:,}")
        while (chunk := body.read1(2**20)) and not stop.is_set():  # what has come, be it little
            head = (head + chunk)[:40] if len(head) < 8 else head
            if head[:8] != MAGIC[: len(head)]:
                raise OSError(f"sent no HDF5 file; it begins with {head!r}")
            digest.update(chunk)
            file.write(chunk)
            got[0] += len(chunk)
            if got[0] > (most := length or LARGEST):
                raise OSError(f"sends more than {most:,} bytes")
            if time.monotonic() - shown > 2:
                shown = time.monotonic()
                print(f"{url}: {got[0] / 2**20:,.0f} of {length / 2**20:,.0f} MiB", file=sys.stderr)
    if got[0] < max(length, 1):
        raise OSError(f"broke off after {got[0]:,} of {length:,} bytes")
    return digest.hexdigest()


def try_to_read(path, source):
    """Raises OSError unless a file reads as one of D4RL's."""
    from common.datasets import readers  # imports this module

    try:
        reader = readers.Reader(path)
        readers.read_d4rl(reader, evaluation.Env(limit=source.limit))
        reader.file.close()
    except DatasetError as error:
        raise OSError(f"refused, {str(error).removeprefix(f'{path}: ')}") from None
