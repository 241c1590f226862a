"""Annotation files in COCO format, read with messages that name the file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_annotation_file(path: Path) -> dict[str, Any]:
    """
    Read an annotation file as a mapping; its entries are not looked at.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8, not (whole) JSON, or another thing than a mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such annotation file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(
            f"{path} is not a JSON file: {error}; expected a whole annotation file in COCO format: "
            "make or download it again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds {type(content).__name__}, expected an annotation file in COCO format, a "
            'mapping with "images", "annotations" and "categories"'
        )
    return content


def read_categories(path: Path) -> list[Mapping[str, Any]]:
    """
    Return the categories of an annotation file in the order of their ids.

    Raises:
        FileNotFoundError, ValueError: as `read_annotation_file`; or the categories are unusable.
    """
    categories = read_annotation_file(path).get("categories")
    check_categories(f"{path}", categories)
    return sorted(categories or [], key=lambda category: int(category["id"]))


def read_class_names(path: Path) -> list[str]:
    """Return the class names of an annotation file in the order of the ids; see the categories."""
    return [str(category["name"]) for category in read_categories(path)]


def check_categories(where: str, categories: Any) -> None:
    """
    Check that categories are a list with distinct whole ids and names.

    Raises:
        ValueError: they are not; the message starts with `where`.
    """
    if not categories:
        raise ValueError(f"{where} lists no categories")
    check_entries(where, "category", categories, ("id", "name"))
    for category in categories:
        if not is_whole(category["id"]):
            raise ValueError(
                f"{where}: category id {shown(category['id'])} is no whole number; number the "
                "categories, and use the same numbers as category_id of the annotations"
            )
        if not isinstance(category["name"], str):
            raise ValueError(
                f"{where}: category {category['id']} has the name {shown(category['name'])}, "
                "expected a text"
            )


def check_entries(where: str, kind: str, entries: Any, needed: tuple[str, ...]) -> None:
    """
    Check that entries are a list of mappings with the needed keys and distinct ids.

    Raises:
        ValueError: they are not; the message starts with `where` and names the entry.
    """
    if not isinstance(entries, list):
        raise ValueError(
            f"{where}: its {kind} entries are {shown(entries)}, expected a list of mappings"
        )
    seen: set[Any] = set()
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValueError(
                f"{where}: {kind} entry number {position} is {shown(entry)}, expected a mapping "
                f"with {list(needed)}"
            )
        missing = [key for key in needed if key not in entry]
        if missing:
            found = shown(entry.get("id"))
            raise ValueError(f"{where}: {kind} {found} lacks {missing} of {list(needed)}")
        found = entry["id"]
        if not (is_whole(found) or isinstance(found, str)):
            raise ValueError(
                f"{where}: {kind} entry number {position} has the id {shown(found)}, expected a "
                "whole number"
            )
        if found in seen:
            raise ValueError(f"{where}: two entries have the {kind} id {found}")
        seen.add(found)


def is_whole(value: Any) -> bool:
    """Return whether a value read from JSON is a whole number; true and 1.0 are none."""
    return type(value) is int


def shown(value: Any) -> str:
    """Return a value as a message shows it: as Python writes it, and not too long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
