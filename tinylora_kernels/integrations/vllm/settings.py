"""The one documented setting: --additional-config '{"tinylora": "adapters/"}', or a map of the fields below."""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KEY = "tinylora"
CAPACITY = 4096


@dataclass(frozen=True)
class Settings:
    """What an engine serves.

    Attributes:
        adapters: an adapter file, or a directory of them. The file (the first of the directory) says which modules and
            which rank are served; the files of a directory are served by their names.
        capacity: adapters in the table at once, per worker; those beyond it wait in host memory.
        own_seeds: every adapter brings its seed and tie groups, at 4 r r bytes a module; False: all have those of the
            first file, at 4 bytes a number.
        token: family.token_of the first file as the engine was configured; set by the plugin.
    """

    adapters: str
    capacity: int = CAPACITY
    own_seeds: bool = True
    token: str = ""

    @classmethod
    def of(cls, additional_config: Any) -> Settings | None:
        """None where the key is not set.

        Raises:
            ValueError: it is set to something else than a path or a map of the fields.
        """
        given = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
        if given is None:
            return None
        if isinstance(given, str):
            given = {"adapters": given}
        fields = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(given, Mapping) or "adapters" not in given or not set(given) <= set(fields):
            raise ValueError(
                f"additional_config[{KEY!r}]: expected a path or a map with adapters and, if need be, capacity and "
                f"own_seeds, found {given!r}"
            )
        found = cls(**given)
        kinds = {"adapters": str, "capacity": int, "own_seeds": bool, "token": str}
        for name, kind in kinds.items():
            if type(getattr(found, name)) is not kind or (name == "capacity" and found.capacity < 1):
                value = getattr(found, name)
                raise ValueError(f"additional_config[{KEY!r}]: {name}: expected {kind.__name__}, found {value!r}")
        return found
