"""Files that may be anyone's: read without a hang, written through no link; their text, printable.

Run folders and caches may come from someone else or from a crash. All that reads or writes them
does it by these functions.
"""

import errno
import json
import os
import stat
import zlib
from contextlib import suppress
from pathlib import Path

LARGEST = 2**30  # bytes of a text file


def printable(text):
    """Text from outside, without terminal codes, line breaks and characters that are not UTF-8."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


class UserError(SystemExit):
    """An error that the user can correct: a command ends with its message and exit code 1."""

    def __init__(self, message):
        super().__init__("\n".join(map(printable, str(message).split("\n"))))


def read(path, most=LARGEST):
    """The bytes of a plain file. Raises OSError for a pipe, a device and more than `most` bytes."""
    path = Path(path)
    if not stat.S_ISREG(path.stat().st_mode):  # before it is opened, which a device may act upon
        raise OSError(errno.EINVAL, "It is not a plain file", str(path))
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe by now: no waiting
    with open(number, "rb") as file:
        raw = file.read(min(most, os.fstat(number).st_size) + 1)
    if len(raw) > most:
        raise OSError(errno.EFBIG, f"It has more than {most:,} bytes", str(path))
    return raw


def read_json(path, most=LARGEST):
    """The object (dict) in a JSON file. Raises OSError, and ValueError for any other content."""
    try:
        value = json.loads(read(path, most).decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it does not hold a JSON object")
    return value


def write(path, content):
    """Writes text or bytes to a temporary name, flushes them to the disk and renames the file.

    A reader sees the old or the new content, never a part of it. A link in the file's place or in
    that of the temporary one is replaced, not followed. Raises OSError.
    """
    temporary = path.with_name(path.name + ".tmp")
    with suppress(FileNotFoundError):
        temporary.unlink()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL  # EXCL follows no link
    with open(os.open(temporary, flags, 0o666), "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def refuse_links(folder):
    """Raises OSError for a link, pipe or device anywhere in a folder: it leads elsewhere.

    Only in wandb/ links may lead to other places in the folder, as W&B makes them.
    """
    for place, folders, names in os.walk(folder):
        for path in (Path(place, name) for name in (*folders, *names)):
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
                continue
            if path.relative_to(folder).parts[0] == "wandb" and path.parent != folder:
                if path.resolve().is_relative_to(folder):
                    continue
            raise OSError(errno.ELOOP, "It is a link, a pipe or a device. Remove it", str(path))


def checksum(array):
    """CRC-32 of a numpy array's dtype, shape and numbers: 0.05 s for a million rows of hopper."""
    about = repr((array.dtype.str, array.shape)).encode()
    return zlib.crc32(array.tobytes() if not array.flags.c_contiguous else array, zlib.crc32(about))


def cache_folder():
    """$XDG_CACHE_HOME/stillwater or ~/.cache/stillwater. Raises OSError if there is no home."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(root):
        raise OSError(errno.ENOENT, "There is no absolute path to a home", root)
    return Path(root, "stillwater")


def make_private(folder):
    """Makes a folder that nobody else can write to. Raises OSError if somebody could.

    From the root on, each folder on the way belongs to this user or to root; others may write only
    where a sticky bit keeps them from renaming what is not theirs. New folders have mode 0700.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(made):
        path.mkdir(mode=0o700)
    if not hasattr(os, "geteuid"):  # Windows
        return
    folder = folder.resolve()
    for path in (folder, *folder.parents):
        about = path.stat()
        open_to_others = about.st_mode & 0o022 and (
            path == folder or not about.st_mode & stat.S_ISVTX
        )
        if about.st_uid not in (0, os.geteuid()) or open_to_others:
            raise OSError(errno.EPERM, "Others can write to it", str(path))
