"""The device code that is embedded in the library: its sources, and for the architectures of a wheel what NVRTC made.

    8 bytes: length of the header | header, JSON | the sources and, for each target, its modules, LZMA

setup.py runs this file without the package: it imports neither it nor torch.
"""
from __future__ import annotations

import functools
import json
import lzma
import struct
from collections.abc import Mapping

Module = tuple[int, int]  # of an element type, by its number, and a rank
_ALIGNED = {"lc": 0, "lp": 4, "pb": 4}  # instructions of 16 bytes
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 24, **_ALIGNED}]
_CHECK = lzma.CHECK_SHA256


def pack(source: str, compiler: str, code: Mapping[str, Mapping[Module, bytes]]) -> bytes:
    """The archive of these sources and, for each target ("sm_90"), the code of each module."""
    parts = [lzma.compress(source.encode(), check=_CHECK)]
    images = []
    for target, modules in code.items():
        together = lzma.compress(b"".join(modules.values()), check=_CHECK, filters=_FILTERS)
        sizes = [[element, rank, len(data)] for (element, rank), data in modules.items()]
        images.append({"target": target, "bytes": len(together), "modules": sizes})
        parts.append(together)
    header = json.dumps({"compiler": compiler, "source": len(parts[0]), "images": images}).encode()
    return struct.pack("<q", len(header)) + header + b"".join(parts)


class Archive:
    """What `pack` packed.

    Attributes:
        compiler: "NVRTC 12.9".
        targets: what there is machine code or PTX for, as ("sm_90", ..., "compute_100").
    """

    def __init__(self, data: bytes):
        (length,) = struct.unpack_from("<q", data)
        header = json.loads(data[8 : 8 + length])
        begin = 8 + length + header["source"]
        self.compiler: str = header["compiler"]
        self._source = data[8 + length : begin]
        self._images: dict[str, tuple[list[list[int]], bytes]] = {}
        for image in header["images"]:
            self._images[image["target"]] = image["modules"], data[begin : begin + image["bytes"]]
            begin += image["bytes"]
        self.targets = tuple(self._images)

    @functools.cached_property
    def source(self) -> str:
        """The device code as one source."""
        return lzma.decompress(self._source).decode()

    @functools.lru_cache(maxsize=1)  # noqa: B019 - a process has one archive
    def modules(self, target: str) -> dict[Module, bytes]:
        """The code of every module for a target."""
        sizes, together = self._images[target]
        data, begin, found = lzma.decompress(together), 0, {}
        for element, rank, size in sizes:
            found[element, rank] = data[begin : begin + size]
            begin += size
        return found
