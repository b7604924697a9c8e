"""Downloads a file completely or not at all, within a deadline whatever the peer sends."""

import contextlib
import hashlib
import os
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from functools import partial
from urllib.parse import urlsplit

from common import evaluation
from common.datasets import checked, readers
from common.datasets.checked import MAGIC, DatasetError

PATIENCE = 4.0  # seconds without an answer after which an address counts as unreachable
STALL = 20.0  # seconds; in each such span a download must have a mean rate of SLOWEST
SLOWEST = 1024  # bytes per second
LONGEST = 12 * 3600.0  # seconds for one file
LARGEST = 16 * 2**30  # bytes, limit for a file of unknown size


def probe(urls: list[str]) -> dict[str, str]:
    """{url: "" if it, or its proxy, accepts connections, else why not}.

    Takes at most PATIENCE seconds for all addresses together, name service included.
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
    """Runs work(event) in a thread of its own while it downloads; its result, or what it raised.

    count: () -> bytes so far. Raises OSError once a span of STALL seconds has brought less than
    SLOWEST bytes per second, or LONGEST seconds have passed, whatever the peer sends or does not
    send. The thread is then abandoned with its event set.
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
    """Bytes of all files below a folder."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def download(url, target, source):
    """Downloads `url` to the Path `target`, completely or not at all.

    The body must be HDF5, as long as the server says, with the size and hash of the Source; without
    a known hash it must be readable in D4RL's layout. Raises OSError, ValueError or HTTPException.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f"{target.name}.*.part"):  # of a killed process
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
    """Writes the body at `url` to an open file; its SHA-256. got[0]: set to the bytes so far."""
    request = urllib.request.Request(url, headers={"User-Agent": "stillwater"})
    digest, head, shown = hashlib.sha256(), b"", time.monotonic()
    with urllib.request.urlopen(request, timeout=2 * STALL) as body:
        if body.status != 200:
            raise OSError(f"answers HTTP {body.status}, not with the whole file")
        length = int(body.headers.get("Content-Length") or source.size)
        if source.size and length != source.size:
            raise OSError(f"offers {length:,} bytes where D4RL's file has {source.size:,}")
        while (chunk := body.read1(2**20)) and not stop.is_set():  # may be few bytes
            head = (head + chunk)[:40] if len(head) < 8 else head
            if head[:8] != MAGIC[: len(head)]:
                raise OSError(f"sent no HDF5 file but {head!r} ...")
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
    """Raises OSError unless a file is readable in D4RL's layout."""
    try:
        file = checked.CheckedFile(path)
        readers.read_d4rl(file, evaluation.Env(limit=source.limit))
        file.close()
    except DatasetError as error:
        raise OSError(f"refused, {str(error).removeprefix(f'{path}: ')}") from None
