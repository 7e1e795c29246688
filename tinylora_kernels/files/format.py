"""The adapter file, without any model: bytes to a checked AdapterFile and back.

A safetensors file (8 bytes of header length, a JSON header, raw tensors) that any safetensors reader opens:

    v              [groups, u]  the trained numbers, in v_dtype; 13 in float32 are 52 bytes
    basis.<i>      [r, out]     float32 (float64 for float64 weights), only for modules whose singular vectors the
                                weight does not determine, or on request
    sigma.<i>      [r]          beside each basis, in its dtype; [k, r] of a fused projection in k parts, whose bases
                                stand side by side (method/parts.py)
    __metadata__   one entry, "tinylora": a JSON object with exactly the keys of METADATA_KEYS

The object holds columns: names[i], shapes[i] = [out, in], groups[i] (numbered by first appearance), weights[i] (the
fingerprint of the frozen weight, 32 hex digits) and sketches[i] (base64 of the float32 [r, 4] sketch of its basis) all
describe adapted module i, in named_modules order.  The config has a field "fused" only where it is used.
sha256 is the digest of the whole file with its own 64 digits read as zeros, so a flipped bit anywhere is seen.

Nothing in a file is trusted: the digest is checked before anything is parsed, every length, count, type and key before
it is used, nothing is allocated by a number that the file merely claims, no work grows faster than the file, no name is
used as a path, and whatever is wrong is one AdapterError.
"""
from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from ..common.atomic import open_regular
from ..common.words import dtype_name, one_line
from ..factors.svd import SKETCH_COLUMNS
from ..method.config import LoRAXSConfig, TinyLoRAConfig
from ..method.selection import is_expression

Json = dict[str, Any]  # an object of a file: its values are checked before they are used
Extents = dict[str, tuple[torch.dtype, list[int], int, int]]  # tensor name -> (dtype, shape, start, end) in the payload

VERSION = 1
METHODS: dict[str, type[TinyLoRAConfig] | type[LoRAXSConfig]] = {"tiny_lora": TinyLoRAConfig, "lora_xs": LoRAXSConfig}
METADATA_KEYS = ("version", "sha256", "method", "config", "names", "shapes", "groups", "weights", "sketches")
# Of a config: where it runs, not what it is; and by what modules were selected, which a file names one by one.
RUNTIME_FIELDS = {"backend", "cache", "exclude_modules", "layers_to_transform", "layers_pattern"}
OPTIONAL_FIELDS = {"fused"}  # of a config: written only where they are not None
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_HEADER = 64 << 20  # a hundred thousand modules fit
MAX_NAME = 4096
MAX_PARTS = 4096
MAX_DIMENSION = 1 << 31
MAX_FOREIGN_HEADER = 1 << 20  # bytes looked at to say what a file is that is none of ours
NO_DIGEST = "0" * 64
_DIGEST = re.compile(rb'sha256\\*"\s*:\s*\\*"([0-9a-f]{64})')  # in JSON in a JSON string: the quotes are escaped


class AdapterError(ValueError):
    """An adapter file, or a model it does not fit; one line that says what is wrong.  Nothing has been changed."""


@dataclass(frozen=True)
class AdaptedModule:
    """One adapted module of a file; ``basis`` [r, out] and ``sigma`` [r] or [k, r] only where the file carries them."""

    name: str
    shape: tuple[int, int]
    group: int
    fingerprint: str
    sketch: Tensor
    basis: Tensor | None = None
    sigma: Tensor | None = None

    @property
    def stored(self) -> tuple[Tensor, Tensor] | None:
        """(basis, sigma) where the file carries them."""
        return None if self.basis is None or self.sigma is None else (self.basis, self.sigma)


@dataclass(frozen=True)
class AdapterFile:
    """A checked adapter file.

    Attributes:
        config: the TinyLoRAConfig or LoRAXSConfig it was trained with (runtime fields at their defaults).
        v: [groups, u] the trained numbers.
        modules: the adapted modules in named_modules order.
        size: bytes on disk.
    """

    config: TinyLoRAConfig | LoRAXSConfig
    v: Tensor
    modules: list[AdaptedModule]
    size: int = 0


def encode(adapter: AdapterFile) -> bytes:
    """The file's bytes; equal adapters give equal bytes.

    Raises:
        AdapterError: the bytes could not be read again: a module's name is not printable, or too long, for instance.
    """
    modules = adapter.modules
    tensors = {"v": adapter.v}
    for i, module in enumerate(modules):
        if module.stored:
            tensors[f"basis.{i}"], tensors[f"sigma.{i}"] = module.stored
    metadata = {
        "version": VERSION,
        "sha256": NO_DIGEST,
        "method": next(name for name, kind in METHODS.items() if kind is type(adapter.config)),
        "config": encode_config(adapter.config),
        "names": [module.name for module in modules],
        "shapes": [list(module.shape) for module in modules],
        "groups": [module.group for module in modules],
        "weights": [module.fingerprint for module in modules],
        "sketches": [base64.b64encode(_raw(module.sketch.float())).decode() for module in modules],
    }
    header: Json = {"__metadata__": {"tinylora": json.dumps(metadata, separators=(",", ":"), allow_nan=False)}}
    dtype_names = {dtype: name for name, dtype in DTYPES.items()}
    payload = bytearray()
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):  # stable; keeps alignment
        start = len(payload)
        payload += _raw(tensor)
        header[name] = {
            "dtype": dtype_names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, len(payload)]
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # safetensors aligns the payload to 8 bytes
    data = len(text).to_bytes(8, "little") + text + bytes(payload)
    data = data.replace(NO_DIGEST.encode(), hashlib.sha256(data).hexdigest().encode(), 1)
    try:
        _read(io.BytesIO(data), len(data))
    except AdapterError as error:
        raise AdapterError(f"{error}; no file could be loaded again, and nothing was written") from None
    return data


def read(path: str | os.PathLike[str]) -> AdapterFile:
    """Read and check a file.

    Raises:
        AdapterError: it is not an intact adapter file of this format; the message starts with the path.
        OSError: it cannot be opened, or is no regular file.
    """
    with open_regular(path) as file:
        try:
            return _read(file, os.fstat(file.fileno()).st_size)
        except AdapterError as error:
            raise AdapterError(f"{os.fspath(path)}: {error}") from None


def _read(file: BinaryIO, size: int) -> AdapterFile:
    head = file.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > min(MAX_HEADER, size - 8):
        raise AdapterError(f"not a safetensors file, or truncated: a header of {length} bytes in {size}")
    text = file.read(length)
    payload = file.read(size - 8 - length + 1)
    if len(text) < length or len(payload) != size - 8 - length:
        raise AdapterError("truncated: the file ends before its tensors do")
    intact = _expect_digest(head + text, payload)
    if not intact and length > MAX_FOREIGN_HEADER:
        raise AdapterError(f"not an adapter: a header of {length} bytes without the entry 'tinylora' and its sha256")
    header = _json_object(text, "header")
    metadata = _metadata(header)
    extents = _tensor_extents(header, len(payload))
    if not intact:
        raise AdapterError("metadata: the sha256 digest is not written plainly once")
    return _decode(metadata, extents, payload, size)


def encode_config(config: TinyLoRAConfig | LoRAXSConfig) -> Json:
    """The config as JSON values; a map of tie groups is written as "map", the groups stand in their column."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in RUNTIME_FIELDS}
    values["v_dtype"] = dtype_name(config.v_dtype)
    if not isinstance(config.tying, str):
        values["tying"] = "map"
    if config.target_modules is not None and not isinstance(config.target_modules, str):
        values["target_modules"] = list(config.target_modules)
    return {name: value for name, value in values.items() if name not in OPTIONAL_FIELDS or value is not None}


def _raw(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def _metadata(header: Json) -> Json:
    """The adapter's own object; keys, version and the shape of the digest are checked, nothing else yet."""
    entries = header.get("__metadata__")
    if not isinstance(entries, dict) or "tinylora" not in entries:
        raise AdapterError("a safetensors file, but not an adapter: its metadata has no entry 'tinylora'")
    _check_keys(entries, ("tinylora",), "the safetensors metadata")
    if not isinstance(entries["tinylora"], str):
        raise AdapterError(f"metadata: expected a string, found {_shown(entries['tinylora'])}")
    metadata = _json_object(entries["tinylora"], "metadata")
    version = metadata.get("version")
    if type(version) is not int or version != VERSION:
        raise AdapterError(f"format version {_shown(version)}; this release reads version {VERSION}")
    _check_keys(metadata, METADATA_KEYS, "metadata")
    if not isinstance(metadata["sha256"], str) or not re.fullmatch(r"[0-9a-f]{64}", metadata["sha256"]):
        raise AdapterError(f"metadata: sha256 must be 64 hexadecimal digits, found {_shown(metadata['sha256'])}")
    return metadata


def _tensor_extents(header: Json, payload_size: int) -> Extents:
    """Where each tensor lies; together they must cover the payload once, without gap or overlap."""
    extents: Extents = {}
    position = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict):
            raise AdapterError(f"tensor {_shown(name)}: expected an object, found {_shown(entry)}")
        _check_keys(entry, ("dtype", "shape", "data_offsets"), f"tensor {_shown(name)}")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise AdapterError(f"tensor {_shown(name)}: expected one of {', '.join(DTYPES)}, found {_shown(dtype)}")
        if not _is_counts(shape, MAX_DIMENSION) or len(shape) > 2 or not _is_counts(offsets, 1 << 62):
            raise AdapterError(f"tensor {_shown(name)}: bad shape {_shown(shape)} or offsets {_shown(offsets)}")
        size = DTYPES[dtype].itemsize
        for dimension in shape:
            size *= dimension
        if offsets != [position, position + size]:
            raise AdapterError(f"tensor {_shown(name)}: expected bytes {position} to {position + size}, "
                               f"found {_shown(offsets)}")  # fmt: skip
        extents[name] = (DTYPES[dtype], shape, position, position + size)
        position += size
    if position != payload_size:
        raise AdapterError(f"truncated or extended: {payload_size} bytes of tensors, expected {position}")
    return extents


def _expect_digest(head: bytes, payload: bytes) -> bool:
    """Whether the digest is there, once; raises where it does not match. Nothing is parsed before that."""
    found = _DIGEST.findall(head)
    if len(found) != 1 or head.count(found[0]) != 1:
        return False
    digest = hashlib.sha256(head.replace(found[0], NO_DIGEST.encode()))
    digest.update(payload)
    if digest.hexdigest().encode() != found[0]:
        raise AdapterError("damaged: the SHA-256 digest does not match the contents")
    return True


def _decode(metadata: Json, extents: Extents, payload: bytes, size: int) -> AdapterFile:
    def tensor(name: str, dtype: torch.dtype, shape: list[int]) -> Tensor:
        if name not in extents:
            raise AdapterError(f"tensor {name} is missing")
        found_dtype, found_shape, start, end = extents.pop(name)
        if found_dtype is not dtype or found_shape != shape:
            raise AdapterError(f"tensor {name}: expected {dtype} {shape}, found {found_dtype} {found_shape}")
        value = torch.frombuffer(bytearray(payload[start:end]), dtype=dtype).view(shape)
        if not bool(torch.isfinite(value).all()):
            raise AdapterError(f"tensor {name}: it holds NaN or infinity")
        return value

    names, shapes, groups = _columns(metadata)
    config = _decode_config(metadata["method"], metadata["config"], names, groups)
    rank = config.rank
    v = tensor("v", config.v_dtype, [max(groups) + 1, config.numbers])
    modules = []
    for i, (name, shape, group) in enumerate(zip(names, shapes, groups, strict=True)):
        parts = _parts(config, name, shape)
        if rank > min(*shape, *(parts or ())):
            raise AdapterError(f"{_shown(name)}: rank {rank} above the smaller side of its shape {shape} or of a part")
        stored = extents.get(f"basis.{i}")
        precision = torch.float64 if stored and stored[0] is torch.float64 else torch.float32
        basis = tensor(f"basis.{i}", precision, [rank, shape[0]]) if stored else None
        sigma = tensor(f"sigma.{i}", precision, [len(parts), rank] if parts else [rank]) if stored else None
        if sigma is not None and not bool((sigma > 0).all()):
            raise AdapterError(f"tensor sigma.{i}: singular values must be positive")
        sketch = _decode_sketch(metadata["sketches"][i], rank, name)
        modules.append(AdaptedModule(name, (shape[0], shape[1]), group, metadata["weights"][i], sketch, basis, sigma))
    if extents:
        raise AdapterError(f"unknown tensor {_shown(next(iter(extents)))}")
    return AdapterFile(config, v, modules, size)


def _parts(config: TinyLoRAConfig | LoRAXSConfig, name: str, shape: list[int]) -> tuple[int, ...] | None:
    try:
        return config.parts(name, shape[0])
    except ValueError as error:
        raise AdapterError(f"config: {one_line(error)}") from None


def _columns(metadata: Json) -> tuple[list[str], list[list[int]], list[int]]:
    columns = {key: metadata[key] for key in ("names", "shapes", "groups", "weights", "sketches")}
    for key, column in columns.items():
        if not isinstance(column, list) or len(column) != len(metadata["names"]) or not column:
            raise AdapterError(f"metadata: {key} must be a list with one entry for each module")
    highest = -1
    in_order = (columns[key] for key in ("names", "shapes", "groups", "weights"))
    for name, shape, group, weight in zip(*in_order, strict=True):
        if not _is_name(name):
            raise AdapterError(f"metadata: {_shown(name)} is not a module name")
        if not _is_counts(shape, MAX_DIMENSION) or len(shape) != 2:
            raise AdapterError(f"metadata: {_shown(name)} has no shape [out, in], found {_shown(shape)}")
        if type(group) is not int or not 0 <= group <= highest + 1:
            raise AdapterError(f"metadata: {_shown(name)}: group {_shown(group)} is not numbered by appearance")
        highest = max(highest, group)
        if not isinstance(weight, str) or not re.fullmatch(r"[0-9a-f]{32}", weight):
            raise AdapterError(f"metadata: {_shown(name)} has no fingerprint of 32 hexadecimal digits")
    if len(set(columns["names"])) != len(columns["names"]):
        raise AdapterError("metadata: a module name appears twice")
    return columns["names"], columns["shapes"], columns["groups"]


def _decode_config(
    method: object, values: object, names: list[str], groups: list[int]
) -> TinyLoRAConfig | LoRAXSConfig:
    if not isinstance(method, str) or method not in METHODS:
        raise AdapterError(f"metadata: method must be one of {', '.join(METHODS)}, found {_shown(method)}")
    if not isinstance(values, dict):
        raise AdapterError(f"metadata: config must be an object, found {_shown(values)}")
    kind = METHODS[method]
    fields = [f.name for f in dataclasses.fields(kind) if f.name not in RUNTIME_FIELDS]
    _check_keys(values, [name for name in fields if name in values or name not in OPTIONAL_FIELDS], "config")
    values = dict(values)
    targets = values["target_modules"]
    if not (targets is None or isinstance(targets, (str, list))):
        raise AdapterError(f"config: target_modules must be null, a string or a list, found {_shown(targets)}")
    if not all(_is_name(target) for target in ([targets] if isinstance(targets, str) else targets or [])):
        raise AdapterError("config: target_modules holds something that is not a module name")
    if is_expression(targets):
        raise AdapterError(f"config: target_modules must name modules, found the expression {_shown(targets)}")
    fused = values.get("fused", {})
    if not isinstance(fused, dict) or not all(
        _is_name(name) and (_is_count(entry) or _is_counts(entry, MAX_DIMENSION)) for name, entry in fused.items()
    ):
        raise AdapterError("config: fused must be an object of module names and their parts")
    for field in ("tying", "scaling", "init", "v_dtype"):
        if not isinstance(values[field], str):
            raise AdapterError(f"config: {field} must be a string, found {_shown(values[field])}")
    if values["tying"] == "map":
        values["tying"] = dict(zip(names, groups, strict=True))
    dtypes = {dtype_name(dtype): dtype for dtype in DTYPES.values()}
    if values["v_dtype"] not in dtypes:
        raise AdapterError(f"config: v_dtype must be one of {', '.join(dtypes)}, found {_shown(values['v_dtype'])}")
    values["v_dtype"] = dtypes[values["v_dtype"]]
    try:
        config = kind(**values)
        float(config.alpha)
    except (ValueError, TypeError, OverflowError) as error:
        raise AdapterError(f"config: {one_line(error)}") from None
    return config


def _decode_sketch(text: object, rank: int, name: str) -> Tensor:
    try:
        raw = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except (binascii.Error, ValueError):
        raw = b""
    if len(raw) != 4 * SKETCH_COLUMNS * rank:
        raise AdapterError(f"metadata: {_shown(name)} has no sketch of {SKETCH_COLUMNS * rank} numbers")
    sketch = torch.frombuffer(bytearray(raw), dtype=torch.float32).view(rank, SKETCH_COLUMNS)
    if not bool(torch.isfinite(sketch).all()):
        raise AdapterError(f"metadata: the sketch of {_shown(name)} holds NaN or infinity")
    return sketch


def _json_object(text: bytes | str, what: str) -> Json:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> Json:
        keys = dict(pairs)
        if len(keys) != len(pairs):
            raise ValueError("a key appears twice")
        return keys

    def refuse_constant(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(
            text if isinstance(text, str) else text.decode("utf-8"),
            object_pairs_hook=without_duplicates, parse_constant=refuse_constant,
        )  # fmt: skip
    except RecursionError:
        raise AdapterError(f"{what}: nested too deeply") from None
    except ValueError as error:  # JSON, UTF-8, and integers of absurd length
        raise AdapterError(f"{what}: not valid JSON ({one_line(error)})") from None
    if not isinstance(value, dict):
        raise AdapterError(f"{what}: expected an object, found {_shown(value)}")
    return value


def _check_keys(found: Json, expected: Iterable[str], what: str) -> None:
    expected = list(expected)
    missing = [key for key in expected if key not in found]
    unknown = [key for key in found if key not in expected]
    if missing or unknown:
        problem = f"{_shown(missing[0])} is missing" if missing else f"unknown field {_shown(unknown[0])}"
        raise AdapterError(f"{what}: {problem}")


def _is_name(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME and value.isprintable()


def _is_counts(value: object, below: int) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < below for item in value)


def _is_count(value: object) -> bool:
    """Of parts: a hostile file cannot ask for more than a few."""
    return type(value) is int and 2 <= value <= MAX_PARTS


def _shown(value: object) -> str:
    """A value from a file in an error message: printable, one line, short."""
    if isinstance(value, str):
        return ascii(value) if len(value) <= 120 else ascii(value[:120]) + "..."
    if isinstance(value, list) and len(value) <= 4 and all(type(item) is int for item in value):
        return "[" + ", ".join(_shown(item) for item in value) + "]"
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 200:
        return "an integer of absurd length"
    return ascii(value)[:60]
