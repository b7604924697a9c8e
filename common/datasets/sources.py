"""From a dataset's name to a file on this machine, downloaded if it must be."""

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
from pathlib import Path
from urllib.parse import urlsplit

from common.datasets.d4rl import D4RL_HOST, D4RL_MIRROR, Source, d4rl_names

MINARI_HOST = "https://huggingface.co/datasets/farama-minari/"  # as minari.download_dataset
BUNDLED = Path(__file__).resolve().parents[2] / "data"
OFFLINE = "stillwater/hopper/medium-replay-v0"  # in BUNDLED
MAGIC = b"\x89HDF\r\n\x1a\n"
PATIENCE = 4.0  # seconds until an address without an answer counts as unreachable
STALL = 20.0  # seconds without a byte that end a download, as does, from then on, a mean rate below
SLOWEST = 1024  # bytes a second
LARGEST = 16 * 2**30  # bytes of a file whose size is unknown


class DatasetError(SystemExit):
    """A dataset that cannot be had or read. A command ends with its one message and exit code 1."""


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
    folders.append(Path("~/.d4rl/datasets").expanduser())
    file = Path(source.path).name
    for path in (folder / sub for folder in folders for sub in (file, source.path)):
        if path.is_file():
            return source._replace(path=path), "local file"
    target = folders[0] / file
    tried = probe([D4RL_HOST + source.path, D4RL_MIRROR + file])
    for url in (url for url, answer in tried.items() if not answer):
        try:
            download(url, target, source.size, source.sha256)
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

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                minari.download_dataset(name, force_download=True)  # completes a partial one
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
        where, proxies = urlsplit(url), urllib.request.getproxies()
        if where.scheme in proxies and not urllib.request.proxy_bypass(where.hostname):
            proxy = proxies[where.scheme]
            where = urlsplit(proxy if "//" in proxy else f"//{proxy}")
        port = where.port or {"https": 443}.get(where.scheme, 80)
        try:
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


def download(url, target, size=0, sha256=""):
    """`url` to the file `target`, whole or not at all. Raises OSError or HTTPException.

    The body must be HDF5, as long as the server says, and of `size` bytes and `sha256` if known.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f"{target.name}.*.part"):  # by a run that was killed
        if time.time() - left.stat().st_mtime > 3600:
            left.unlink(missing_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    request = urllib.request.Request(url, headers={"User-Agent": "stillwater"})
    digest, done, head = hashlib.sha256(), 0, b""
    began = shown = time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=STALL) as body, open(part, "wb") as file:
            length = int(body.headers.get("Content-Length") or size)
            if size and length != size:
                raise OSError(f"offers {length:,} bytes where D4RL's file has {size:,}")
            while chunk := body.read1(2**20):  # what has come, be it little
                head = (head + chunk)[:40] if len(head) < 8 else head
                if head[:8] != MAGIC[: len(head)]:
                    raise OSError(f"sent no HDF5 file; it begins with {head!r}")
                digest.update(chunk)
                file.write(chunk)
                done += len(chunk)
                if time.monotonic() - began > STALL + done / SLOWEST:
                    raise OSError(f"sends less than {SLOWEST:,} bytes a second")
                if done > (most := length or LARGEST):
                    raise OSError(f"sends more than {most:,} bytes")
                if time.monotonic() - shown > 2:
                    shown = time.monotonic()
                    print(f"{url}: {done / 2**20:,.0f} of {length / 2**20:,.0f} MiB",
                          file=sys.stderr)  # fmt: skip
        if done < max(length, 1):
            raise OSError(f"broke off after {done:,} of {length:,} bytes")
        if sha256 and digest.hexdigest() != sha256:
            raise OSError(f"refused, SHA-256 {digest.hexdigest()} is not D4RL's {sha256}")
        os.replace(part, target)
    except urllib.error.HTTPError as error:
        error.close()
        raise OSError(f"HTTP {error.code} {error.reason}") from None
    finally:
        part.unlink(missing_ok=True)
