"""
Yaml without code: of Python's tags, those of Detectron2's own files alone.

They are `!!python/tuple`, and `!!python/object/apply:eval` with an expression of numbers, which is
worked out by `arithmetic` and not by Python.
"""

from collections.abc import Mapping
from typing import Any

import yaml

from kd_det.config.arithmetic import evaluate

_EVAL = "tag:yaml.org,2002:python/object/apply:eval"
_TUPLE = "tag:yaml.org,2002:python/tuple"
_STANDARD = "tag:yaml.org,2002:"
_MERGE = "tag:yaml.org,2002:merge"  # <<: *name
_MAX_ITEMS = 100_000


class RefusedYamlError(ValueError):
    """A yaml file asks for what only running its code would give, or says something twice."""


def parse_yaml(text: str, path: str) -> Any:
    """
    Read yaml of plain values.

    Args:
        text: what the file holds.
        path: of the file, for messages.

    Returns:
        Mappings, lists, tuples, numbers, strings; whatever the outermost value is.

    Raises:
        RefusedYamlError: another tag, an expression that is not of numbers alone, a mapping that
            has a key twice, or aliases that stand for more than 100,000 values; the message names
            the file and what was found.
        yaml.YAMLError: it is no yaml.
    """
    loader = _PlainLoader(text)
    loader.path = path
    try:
        content = loader.get_single_data()
        if _count(content, {}) > _MAX_ITEMS:
            raise RefusedYamlError(
                f"{path}: written out, its aliases (*name) stand for more than {_MAX_ITEMS} "
                "values; write what they stand for"
            )
        return content
    except RecursionError as error:
        raise RefusedYamlError(
            f"{path} is nested too deeply, or an alias (*name) stands inside of what it names"
        ) from error
    except yaml.YAMLError:
        raise
    except ValueError as error:
        if isinstance(error, RefusedYamlError):
            raise
        raise RefusedYamlError(f"{path}: a value is out of its range ({error})") from error
    finally:
        loader.dispose()


class _PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader with Detectron2's two tags, refusing others, and keys given twice."""

    path = ""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Compose a mapping; by itself PyYAML would keep the last of equal keys."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            before = first.setdefault((key.tag, key.value), key)
            if before is not key:
                raise RefusedYamlError(
                    f"{_where(self, key)}: the key {key.value} stands in line "
                    f"{before.start_mark.line + 1} already, and one of the two would be lost; put "
                    f"what they hold under one {key.value}, or take one away."
                )
        return node


def _read_tuple(loader: _PlainLoader, node: yaml.Node) -> tuple[Any, ...]:
    if not isinstance(node, yaml.SequenceNode):
        raise RefusedYamlError(f"{_where(loader, node)}: !!python/tuple expects a list")
    return tuple(loader.construct_sequence(node, deep=True))


def _read_expression(loader: _PlainLoader, node: yaml.Node) -> Any:
    items = node.value if isinstance(node, yaml.SequenceNode) else []
    if len(items) != 1 or not isinstance(items[0], yaml.ScalarNode):
        raise RefusedYamlError(
            f"{_where(loader, node)}: {_short(node.tag)} expects a list of one expression of "
            "numbers"
        )
    try:
        return evaluate(items[0].value)
    except ValueError as error:
        raise RefusedYamlError(
            f"{_where(loader, node)}: {_short(node.tag)} holds {items[0].value!r:.200}; expected "
            f"numbers, lists and arithmetic alone, but {error}. Nothing of it was run. Write the "
            "values out."
        ) from error


def _refuse(loader: _PlainLoader, node: yaml.Node) -> Any:
    raise RefusedYamlError(
        f"{_where(loader, node)}: the tag {_short(node.tag)} is not read, since it may run code. "
        "Nothing of it was run. Of Python's tags !!python/tuple and, with numbers alone, "
        "!!python/object/apply:eval are: write the value out."
    )


def _where(loader: _PlainLoader, node: yaml.Node) -> str:
    return f"{loader.path}, line {node.start_mark.line + 1}"


def _short(tag: str) -> str:
    return f"!!{tag[len(_STANDARD) :]}" if tag.startswith(_STANDARD) else tag


def _count(value: Any, known: dict[int, int]) -> int:
    """Return how many values there are with all aliases written out."""
    if not isinstance(value, Mapping | list | tuple | set):
        return 1
    if id(value) not in known:
        items = value.values() if isinstance(value, Mapping) else value
        known[id(value)] = 1 + sum(_count(item, known) for item in items)
    return known[id(value)]


_PlainLoader.add_constructor(_EVAL, _read_expression)
_PlainLoader.add_constructor(_TUPLE, _read_tuple)
_PlainLoader.add_constructor(None, _refuse)
