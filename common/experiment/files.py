"""Files that may be anyone's: read without a hang, written through no link; their text, printable.

Run folders and caches may come from someone else or from a crash. All that reads or writes them
does it by these functions.
"""

import errno
import json
import os
import stat
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

LARGEST = 2**30  # bytes of a text file


def printable(text):
    """Text from outside, without terminal codes, line breaks and characters that are not UTF-8."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


class UserError(SystemExit):
    """An error that the user can correct: a command ends with its message and exit code 1."""

    def __init__(self, message):
        super().__init__("\n".join(map(printable, str(message).split("\n"))))


def open_plain(path):
    """A plain file, opened to read its bytes. Raises OSError, for a pipe and a device too."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # before it is opened: that may wait or do harm
        raise OSError(errno.EINVAL, "It is not a plain file", str(path))
    return open(path, "rb")


def read(path, most=LARGEST):
    """The bytes of a plain file. Raises OSError as `open_plain`, and for more than `most` bytes."""
    with open_plain(path) as file:
        if os.fstat(file.fileno()).st_size > most:
            raise OSError(errno.EFBIG, f"It has more than {most:,} bytes", str(path))
        return file.read()


def read_json(path, most=LARGEST):
    """The object (dict) in a JSON file. Raises OSError, and ValueError for any other content."""
    return parse_json(read(path, most).decode("utf-8"))


def parse_json(text):
    """The object (dict) in a JSON text. Raises ValueError for any other content."""
    try:
        value = json.loads(text)
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


@contextmanager
def asked_for(flag, path):
    """For writing the file `path` that a flag names: makes its folder, words an OSError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written: {error.strerror or error}.") from None


def refuse_links(folder):
    """Raises OSError for a link, pipe or device anywhere in a folder: it leads elsewhere.

    Only in wandb/ links may lead to other places in the folder, as W&B makes them.
    """
    for place, folders, names in os.walk(folder):
        for path in (Path(place, name) for name in (*folders, *names)):
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
                continue
            of_wandb = path.parent != folder and path.relative_to(folder).parts[0] == "wandb"
            if of_wandb and path.resolve().is_relative_to(folder):
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


def make_folder(folder):
    """Makes a folder and those above it that are missing, for this user alone (mode 0700)."""
    for path in reversed([folder, *folder.parents]):
        if not path.exists():
            path.mkdir(mode=0o700, exist_ok=True)


def make_private(folder):
    """Makes a folder that nobody else can write to. Raises OSError if somebody could.

    From the root on, each folder on the way belongs to this user or to root; others may write only
    where a sticky bit keeps them from renaming what is not theirs.
    """
    make_folder(folder)
    if not hasattr(os, "geteuid"):  # Windows
        return
    folder = folder.resolve()
    for path in (folder, *folder.parents):
        about = path.stat()
        sticky = about.st_mode & stat.S_ISVTX and path != folder
        if about.st_uid not in (0, os.geteuid()) or (about.st_mode & 0o022 and not sticky):
            raise OSError(errno.EPERM, "Others can write to it", str(path))
