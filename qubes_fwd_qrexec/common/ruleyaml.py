# SPDX-License-Identifier: GPL-2.0-or-later
"""Rules in YAML: the document that `exchange` has in JSON, where PyYAML is installed.

Every value is the text that stands there, while YAML itself takes ``enabled: no`` for false and ``22:22`` for
1342. No object is made of a tag. Aliases are refused, as by them a short document could be a long one.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from . import exchange
from .errors import RuleError, StoreError, TextError
from .exchange import Document
from .rules import NamedRule
from .values import QubeName, parse_yes_no

_DOCUMENT = "document"


def _library() -> Any:
    try:
        import yaml
    except ImportError:
        missing = "PyYAML, which is not installed: install python3-pyyaml (Debian: python3-yaml)"
        raise StoreError(f"YAML needs {missing}, or take --format json") from None
    return yaml


def print_document(rules: Iterable[NamedRule], tunnels: Mapping[QubeName, bool]) -> str:
    """Raises `StoreError` without PyYAML."""
    text: str = _library().safe_dump(exchange.as_json(rules, tunnels), sort_keys=False)
    return text


def parse_document(text: str) -> Document:
    """Parse what `print_document` prints. Raises `RuleError`, and `StoreError` without PyYAML."""
    yaml = _library()
    try:
        # A tree of what stands there: nothing is made of it yet.
        data = _value(yaml.compose(text, Loader=yaml.SafeLoader), set())
    except yaml.YAMLError as error:
        raise RuleError(_DOCUMENT, f"not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise RuleError(_DOCUMENT, "not YAML that holds forwards: too deep") from None
    if isinstance(data, dict):
        if data.get("version") in ("1", "2"):
            data["version"] = int(data["version"])
        if isinstance(data.get("tunnels"), dict):
            data["tunnels"] = {qube: _mark(qube, value) for qube, value in data["tunnels"].items()}
    return exchange.parse_data(data)


def _value(node: Any, seen: set[int]) -> object:
    """Texts, lists and objects. A node that was seen before is one that an alias stands for."""
    if id(node) in seen:
        raise RuleError(_DOCUMENT, "an alias (*NAME) is not read; write out what it stands for")
    seen.add(id(node))
    kind = getattr(node, "id", None)
    if kind == "mapping":
        return exchange.without_doubles([(_key(key), _value(value, seen)) for key, value in node.value])
    if kind == "sequence":
        return [_value(each, seen) for each in node.value]
    return None if node is None else node.value


def _key(node: Any) -> str:
    if not isinstance(node.value, str):
        raise RuleError(_DOCUMENT, "a key is a text")
    return node.value


def _mark(qube: str, value: object) -> object:
    try:
        return parse_yes_no(value) if isinstance(value, str) else value
    except TextError as error:
        raise RuleError(f"tunnel {qube!a}", str(error)) from None
