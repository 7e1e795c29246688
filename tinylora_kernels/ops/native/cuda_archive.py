"""The device code that is embedded in the library: its sources, and for the architectures of a wheel what NVRTC made.

    8 bytes: length of the header | header, JSON | the sources and, for each generation, its modules, LZMA

Machine code of one generation is compressed together: that of sm_89 differs from that of sm_86 by 1%. setup.py runs
this file without the package: it imports neither it nor torch.
"""
from __future__ import annotations

import functools
import itertools
import json
import lzma
import struct
from collections.abc import Mapping

Module = tuple[int, int]  # of an element type, by its number, and a rank
_CHECK = lzma.CHECK_SHA256
_INSTRUCTIONS = {"lc": 0, "lp": 4, "pb": 4}  # of 16 bytes
_TEXT = {"lc": 3, "lp": 0, "pb": 0}


def _generation(target: str) -> tuple[str, int]:
    """"sm_86" -> ("sm", 8); sm_100 and sm_120 are one."""
    kind, architecture = target.split("_")
    return kind, min(int(architecture) // 10, 10)


def _compressed(data: bytes, properties: dict[str, int]) -> bytes:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 26, **properties}]
    return lzma.compress(data, check=_CHECK, filters=filters)


def pack(source: str, compiler: str, code: Mapping[str, Mapping[Module, bytes]]) -> bytes:
    """The archive of these sources and, for each target ("sm_90"), the code of each module."""
    parts, streams = [_compressed(source.encode(), _TEXT)], []
    for (kind, _), targets in itertools.groupby(code, key=_generation):
        sizes: list[tuple[str, list[tuple[int, int, int]]]] = []
        together: list[bytes] = []
        for target in targets:
            modules = code[target]
            sizes.append((target, [(element, rank, len(data)) for (element, rank), data in modules.items()]))
            together += modules.values()
        parts.append(_compressed(b"".join(together), _INSTRUCTIONS if kind == "sm" else _TEXT))
        streams.append({"bytes": len(parts[-1]), "targets": sizes})
    header = json.dumps({"compiler": compiler, "source": len(parts[0]), "streams": streams}).encode()
    return struct.pack("<q", len(header)) + header + b"".join(parts)


class Archive:
    """What `pack` packed.

    Attributes:
        compiler: "NVRTC 12.9"; "" where nothing was compiled.
        targets: what there is machine code or PTX for, as ("sm_90", ..., "compute_100").

    Raises:
        ValueError: it is not one of this version's.
    """

    def __init__(self, data: bytes):
        (length,) = struct.unpack_from("<q", data)
        header = json.loads(data[8 : 8 + length])
        if header.keys() != {"compiler", "source", "streams"}:
            raise ValueError(f"an archive of device code: expected another header than {sorted(header)}")
        begin = 8 + length + header["source"]
        self.compiler: str = header["compiler"]
        self._source = data[8 + length : begin]
        self._streams: dict[str, tuple[list[tuple[str, list[list[int]]]], bytes]] = {}
        for stream in header["streams"]:
            compressed = data[begin : begin + stream["bytes"]]
            self._streams |= {target: (stream["targets"], compressed) for target, _ in stream["targets"]}
            begin += stream["bytes"]
        self.targets = tuple(self._streams)

    @functools.cached_property
    def source(self) -> str:
        """The device code as one source."""
        return lzma.decompress(self._source).decode()

    @functools.lru_cache(maxsize=2)  # noqa: B019 - a process has one archive
    def modules(self, target: str) -> dict[Module, bytes]:
        """The code of every module for a target."""
        targets, compressed = self._streams[target]
        data, begin, found = lzma.decompress(compressed), 0, {}
        for name, sizes in targets:
            for element, rank, size in sizes:
                if name == target:
                    found[element, rank] = data[begin : begin + size]
                begin += size
        return found
