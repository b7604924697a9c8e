"""An array of an HDF5 file as it lies there, without libhdf5's own unpacking.

libhdf5 tells where an array lies; the array itself is read and unpacked here, since libhdf5 trusts
chunks and reads beyond those whose contents are shorter than they say: one damaged file in a
thousand killed the process (benchmarks/faults/fuzz.py).
"""

import itertools
import math
import zlib

import h5py
import numpy as np

GZIP, SHUFFLE, FLETCHER32 = 1, 2, 3  # HDF5's numbers of the filters that are known


class NotStored(ValueError):
    """An array that is not wholly there, or in a way that is not read."""


def array(path, item):
    """The numbers of an h5py.Dataset in the file `path`, of its own dtype.

    Raises NotStored, ValueError, zlib.error.
    """
    kind, how = item.dtype, item.id.get_create_plist()
    if h5py.h5t.py_create(kind, logical=True) != item.id.get_type():
        raise NotStored("holds numbers in a format that numpy has not")
    kind = np.dtype(np.uint8) if kind.kind == "b" else kind  # a byte of neither 0 nor 1 shows
    if item.size == 0:
        return np.empty(item.shape, kind)
    if how.get_layout() == h5py.h5d.CONTIGUOUS and item.id.get_offset() is not None:
        with open(path, "rb") as file:
            values = np.fromfile(file, kind, item.size, offset=item.id.get_offset())
        return values.reshape(item.shape)
    if how.get_layout() != h5py.h5d.CHUNKED:
        raise NotStored("is declared, but was never written")
    filters = [how.get_filter(i) for i in range(how.get_nfilters())]
    names = [name for name, *_ in filters]
    if set(names) - {GZIP, SHUFFLE, FLETCHER32} or len(set(names)) < len(names):
        why = "gzip, shuffle and fletcher32 are read, each once"
        raise NotStored(f"is packed by HDF5's filters {names}: {why}")
    values, step, chunks = np.empty(item.shape, kind), item.chunks, []
    grid = [range(0, n, size) for n, size in zip(item.shape, step, strict=True)]
    if item.id.get_num_chunks() != math.prod(map(len, grid)):
        raise NotStored("a part of it was never written")
    item.id.chunk_iter(chunks.append)
    if {chunk.chunk_offset for chunk in chunks} != set(itertools.product(*grid)):
        raise NotStored("its parts do not make up the whole")
    with open(path, "rb") as file:
        end = file.seek(0, 2)
        for at, skipped, offset, size in chunks:
            if offset + size > end:
                raise NotStored("a part of it lies beyond the file's end")
            file.seek(offset)
            chunk = unpack(file.read(size), filters, skipped, math.prod(step) * kind.itemsize)
            chunk = np.frombuffer(chunk, kind).reshape(step)
            place = tuple(map(slice, at, np.add(at, step)))  # numpy cuts it at the array's end
            part = values[place]
            part[...] = chunk[tuple(map(slice, part.shape))]
    return values


def unpack(raw, filters, skipped, size):
    """The `size` bytes of a chunk, the last filter undone first. Raises ValueError, zlib.error.

    filters: (number, flags, parameters, name), as h5py tells them; skipped: bits of those left out.
    """
    for i, (name, _, parameters, _) in reversed([*enumerate(filters)]):
        if skipped >> i & 1:
            continue
        if name == GZIP:
            packed = zlib.decompressobj()
            raw = packed.decompress(raw, size + 8)  # a bomb bursts here; 4 are fletcher32's
            if not packed.eof:
                raise ValueError("a packed part of it has no end")
        elif name == SHUFFLE and (width := parameters[0]) > 1:  # first bytes come first, ...
            whole = len(raw) - len(raw) % width
            raw = np.frombuffer(raw[:whole], np.uint8).reshape(width, -1).T.tobytes() + raw[whole:]
        elif name == FLETCHER32:
            raw, told = raw[:-4], np.frombuffer(raw[-4:], "<u2")
            words = np.frombuffer(raw + b"\0" * (len(raw) % 2), ">u2").astype(np.int64)
            sums = words.sum(), (words * np.arange(len(words), 0, -1) % 65535).sum()
            if len(told) < 2 or any((a - b) % 65535 for a, b in zip(sums, told, strict=True)):
                raise ValueError("a checksum of it is wrong")
    if len(raw) != size:
        raise ValueError(f"a part of it has {len(raw):,} bytes, not {size:,}")
    return raw
