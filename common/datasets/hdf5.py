"""Reads arrays of an HDF5 file without libhdf5's own decompression.

libhdf5 says where an array is stored; this module reads and decompresses it. libhdf5 trusts chunks
and reads beyond the end of one that is shorter than it declares: one damaged file in a thousand
killed the process (benchmarks/faults/fuzz.py).
"""

import itertools
import math
import zlib

import h5py
import numpy as np

GZIP, SHUFFLE, FLETCHER32, LZF = 1, 2, 3, 32000  # HDF5's numbers of the supported filters

NAMES = {
    GZIP: "gzip", SHUFFLE: "shuffle", FLETCHER32: "fletcher32", 4: "szip", 5: "nbit",
    6: "scaleoffset", LZF: "lzf", 32001: "blosc", 32004: "lz4", 32008: "bitshuffle", 32015: "zstd",
    32026: "blosc2",
}  # fmt: skip


class NotStored(ValueError):
    """An array that is incomplete or stored in a way that is not supported."""


def array(path, item):
    """The values of `item`, an h5py.Dataset of the file `path`, with its shape and dtype.

    Raises NotStored, ValueError, zlib.error.
    """
    kind, how = item.dtype, item.id.get_create_plist()
    if h5py.h5t.py_create(kind, logical=True) != item.id.get_type():
        raise NotStored("holds numbers in a format unknown to NumPy")
    kind = np.dtype(np.uint8) if kind.kind == "b" else kind  # keeps bytes that are neither 0 nor 1
    if item.size == 0:
        return np.empty(item.shape, kind)
    if how.get_layout() == h5py.h5d.CONTIGUOUS and item.id.get_offset() is not None:
        with open(path, "rb") as file:
            values = np.fromfile(file, kind, item.size, offset=item.id.get_offset())
        return values.reshape(item.shape)
    if how.get_layout() == h5py.h5d.COMPACT:  # in the file's header, which libhdf5 has checked
        values = np.empty(item.shape, kind)
        item.id.read(h5py.h5s.ALL, h5py.h5s.ALL, values, item.id.get_type())
        return values
    if how.get_layout() != h5py.h5d.CHUNKED:
        raise NotStored("is declared but was never written")
    filters = [how.get_filter(i) for i in range(how.get_nfilters())]
    names = [name for name, *_ in filters]
    if set(names) - {GZIP, SHUFFLE, FLETCHER32, LZF} or len(set(names)) < len(names):
        told = ", ".join(NAMES.get(name, str(name)) for name in names)
        how = "`h5repack -f GZIP=4 OLD.hdf5 NEW.hdf5` writes a file that is read"
        how += ", with the plugin of that filter" if max(names) > 255 else ""
        raise NotStored(f"is packed by {told}; gzip, lzf, shuffle and fletcher32 are read: {how}")
    values, step, chunks = np.empty(item.shape, kind), item.chunks, []
    grid = [range(0, n, size) for n, size in zip(item.shape, step, strict=True)]
    if item.id.get_num_chunks() != math.prod(map(len, grid)):
        why = "a recorder reserved more rows than it filled? Cut the arrays to those"
        raise NotStored(f"a chunk was never written ({why})")
    item.id.chunk_iter(chunks.append)
    if {chunk.chunk_offset for chunk in chunks} != set(itertools.product(*grid)):
        raise NotStored("its chunks do not cover the array")
    with open(path, "rb") as file:
        end = file.seek(0, 2)
        for at, skipped, offset, size in chunks:
            if offset + size > end:
                raise NotStored("a chunk lies beyond the end of the file")
            file.seek(offset)
            chunk = unpack(file.read(size), filters, skipped, math.prod(step) * kind.itemsize)
            chunk = np.frombuffer(chunk, kind).reshape(step)
            place = tuple(map(slice, at, np.add(at, step)))  # NumPy cuts it at the end of the array
            part = values[place]
            part[...] = chunk[tuple(map(slice, part.shape))]
    return values


def unpack(raw, filters, skipped, size):
    """The `size` bytes of a chunk with its filters undone, the last first.

    filters: (number, flags, parameters, name) as in h5py. skipped: a bit for each filter that this
    chunk omits. Raises ValueError, zlib.error.
    """
    for i, (name, _, parameters, _) in reversed([*enumerate(filters)]):
        if skipped >> i & 1:
            continue
        if name == GZIP:
            packed = zlib.decompressobj()
            raw = packed.decompress(raw, size + 8)  # no bomb; 4 bytes are fletcher32's
            if not packed.eof:
                raise ValueError("a compressed chunk has no end")
        elif name == LZF:
            raw = unpack_lzf(raw, size)
        elif name == SHUFFLE and (width := parameters[0]) > 1:  # all first bytes come first
            whole = len(raw) - len(raw) % width
            raw = np.frombuffer(raw[:whole], np.uint8).reshape(width, -1).T.tobytes() + raw[whole:]
        elif name == FLETCHER32:
            raw, stored = raw[:-4], np.frombuffer(raw[-4:], "<u2")
            words = np.frombuffer(raw + b"\0" * (len(raw) % 2), ">u2").astype(np.int64)
            sums = words.sum(), (words * np.arange(len(words), 0, -1) % 65535).sum()
            if len(stored) < 2 or any((a - b) % 65535 for a, b in zip(sums, stored, strict=True)):
                raise ValueError("a checksum is wrong")
    if len(raw) != size:
        raise ValueError(f"a chunk has {len(raw):,} bytes, not {size:,}")
    return raw


def unpack_lzf(raw, most):
    """The bytes that LZF packed: literals, and copies of what came up to 8 KiB before.

    most: bytes, about, after which it stops. Raises ValueError.
    """
    out, at = bytearray(), 0
    while at < len(raw) and len(out) <= most:
        length, first = raw[at] >> 5, raw[at]
        if length == 0:  # the next 1 to 32 bytes as they are
            out += raw[at + 1 : at + 2 + first]
            at += 2 + first
            continue
        long = length == 7
        if at + long + 1 >= len(raw):
            raise ValueError("a compressed chunk has no end")
        length += 2 + (raw[at + 1] if long else 0)
        back = ((first & 31) << 8 | raw[at + long + 1]) + 1
        if back > len(out):
            raise ValueError("a compressed chunk copies bytes from before its start")
        part = bytes(out[-back:][:length])
        out += (part * (length // back + 1))[:length]  # a copy may overlap itself
        at += 2 + long
    return bytes(out)
