"""Plain values of configurations, manifests and training states: strict JSON and YAML.

Refused: tags, aliases, interpolations, class paths, duplicate keys, and deep nesting.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import yaml

from bionemo_esm.model.tar_format import quoted
from bionemo_esm.model.tensor_io import without_duplicates

if TYPE_CHECKING:
    from torch import Tensor

_DEEPEST = 32
_CLASS_KEYS = ("_target_", "target", "cls", "_partial_", "_recursive_", "_convert_", "_args_")
"""Keys by which Hydra, NeMo and other frameworks over OmegaConf name something to import and call."""


def parse_json(content: bytes) -> Any:
    """Parse JSON in UTF-8. Raises `ValueError` for invalid JSON, a duplicate key and deep nesting."""
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=without_duplicates)
        _check_depth(value)
        return value
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_yaml(content: bytes) -> Any:
    """Parse YAML. Raises `ValueError` for invalid YAML, tags, aliases and duplicate keys."""
    try:
        return yaml.load(content, Loader=_PlainLoader)  # noqa: S506 - a SafeLoader that does less
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def _check_depth(value: Any) -> None:
    """Raise `ValueError` for deep nesting, without recursion."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [part for item in level for part in _parts(item)]
        if not level:
            return
    raise ValueError(f"it is nested more than {_DEEPEST} deep")


def _parts(value: Any) -> Iterable[Any]:
    """Return the lists and mappings directly within a list or mapping."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [item for item in items if isinstance(item, dict | list)]


class _PlainLoader(yaml.SafeLoader):
    """YAML without tags, duplicate keys, and aliases, which can make a small file expand without limit."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise yaml.YAMLError("anchors and aliases are not allowed")
        if getattr(event, "tag", None) is not None:
            raise yaml.YAMLError(f"the tag {quoted(event.tag)} is not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.YAMLError("merge keys are not allowed")
        mapping = super().construct_mapping(node, deep)
        if len(mapping) != len(node.value):
            raise yaml.YAMLError("a key appears twice")
        return mapping


def check_plain(value: Any, place: str = "", depth: int = 0) -> None:
    """Raise `ValueError`, naming the place, for anything but plain data."""
    if depth > _DEEPEST:
        raise ValueError(f"{place}: nested more than {_DEEPEST} deep")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_key(key, place or "the top")
            check_plain(item, f"{place}.{key}" if place else key, depth + 1)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            check_plain(item, f"{place}[{number}]", depth + 1)
    else:
        _check_scalar(value, place)


def _check_scalar(value: Any, place: str) -> None:
    if isinstance(value, str):
        if "${" in value or value.lower().startswith("nemo:"):
            raise ValueError(f"{place}: {quoted(value)} refers to something outside the file; refused")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{place}: {value} is not a finite number")
    elif type(value) is int:
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{place}: an integer beyond 64 bits")
    elif not isinstance(value, bool | None):
        raise ValueError(f"{place}: {type(value).__name__} is not plain data")


def _check_key(key: Any, place: str) -> None:
    if not isinstance(key, str):
        raise ValueError(f"{place}: key {quoted(key)} is not a string")
    if key.lower() in _CLASS_KEYS:
        raise ValueError(f"{place}: key {quoted(key)} names a class to be built; refused")


def take_out_tensors(value: Any, place: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Split a tree of plain values and tensors into a tree for JSON and its tensors by their places.

    Tuples are distinguished from lists, and mappings with other keys than strings from mappings of strings. Raises
    `TypeError`, naming the place, for any other value. `put_tensors_back` is the inverse.
    """
    import torch

    tensors: dict[str, Tensor] = {}

    def plain(item: Any, place: str) -> Any:
        if isinstance(item, torch.Tensor):
            while place in tensors or place == "__metadata__":  # a.b may be one key or two
                place += "'"
            tensors[place] = item
            return {"$tensor": place}
        if isinstance(item, Mapping):
            pairs = [[key, plain(part, f"{place}.{key}" if place else str(key))] for key, part in item.items()]
            if all(isinstance(key, str) and not key.startswith("$") for key in item):
                return dict(pairs)
            return {"$items": [[plain(key, f"{place}: a key"), part] for key, part in pairs]}
        if isinstance(item, list | tuple):
            parts = [plain(part, f"{place}.{number}") for number, part in enumerate(item)]
            return parts if isinstance(item, list) else {"$tuple": parts}
        if type(item) in (str, int, float, bool, type(None)):
            return item
        raise TypeError(f"{place}: a {type(item).__name__} cannot be stored; only plain values and tensors can")

    return plain(value, place), tensors


def put_tensors_back(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the tree that `take_out_tensors` has split.

    Raises `ValueError` for a tensor that is missing, and for anything that `take_out_tensors` does not write.
    """
    if isinstance(value, list):
        return [put_tensors_back(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"$tensor": str(name), **rest} if not rest and name in tensors:
            return tensors[name]
        case {"$tuple": list(parts), **rest} if not rest:
            return tuple(put_tensors_back(part, tensors) for part in parts)
        case {"$items": list(pairs), **rest} if not rest and all(isinstance(p, list) and len(p) == 2 for p in pairs):
            return {put_tensors_back(key, tensors): put_tensors_back(item, tensors) for key, item in pairs}
    for key in value:
        if key.startswith("$"):
            raise ValueError(f"{quoted(value)} stands for nothing that is there")
    return {key: put_tensors_back(item, tensors) for key, item in value.items()}
