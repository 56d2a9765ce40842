"""Pure functions on nested parameter dicts: partition, merge, and match paths.

A path is the keys joined by "/": `model/decoder/layers/mlp/wo/kernel`.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from promot_jax.errors import UserError, nearest

Tree = dict[str, Any]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns `{path: leaf}`, sorted by path at every level."""
    flat: dict[str, Any] = {}
    for key in sorted(tree):
        path = f"{prefix}/{key}" if prefix else key
        if isinstance(tree[key], Mapping):
            flat.update(flatten(tree[key], path))
        else:
            flat[path] = tree[key]
    return flat


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """Inverse of `flatten` (empty subtrees are not kept)."""
    tree: Tree = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = leaf
    return tree


def partition(tree: Mapping[str, Any], chosen: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """Splits a tree into the leaves whose path is `chosen` and the rest; inverse of `merge`."""
    first: dict[str, Any] = {}
    second: dict[str, Any] = {}
    for path, leaf in flatten(tree).items():
        (first if chosen(path) else second)[path] = leaf
    return unflatten(first), unflatten(second)


def merge(*trees: Mapping[str, Any]) -> Tree:
    """Joins trees with no path in common.

    Raises:
        ValueError: two trees hold the same path.
    """
    flat: dict[str, Any] = {}
    for tree in trees:
        leaves = flatten(tree)
        if twice := flat.keys() & leaves.keys():
            raise ValueError(f"{min(twice)} is in two trees")
        flat |= leaves
    return unflatten(flat)


def interpolate(first: Mapping[str, Any], second: Mapping[str, Any], share: float) -> Tree:
    """Returns `(1 - share) * first + share * second`; at 0 and 1 the leaves themselves, bitwise."""
    if share in (0, 1):
        return dict(second if share else first)
    ends = flatten(second)
    return unflatten({path: (1 - share) * leaf + share * ends[path] for path, leaf in flatten(first).items()})


def matches(pattern: str, path: str) -> bool:
    """Returns whether a pattern matches the whole path.

    Raises:
        UserError: the pattern is not a regular expression.
    """
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as error:
        raise UserError(f"The path pattern {pattern!r} is not a regular expression: {error}.") from error


def lookup(rules: Sequence[tuple[str, Any]], path: str) -> Any:
    """Returns the value of the first rule, `(regular expression, value)`, whose pattern matches the whole path.

    Raises:
        UserError: no rule matches, or a pattern is not a regular expression.
    """
    for pattern, value in rules:
        if matches(pattern, path):
            return value
    raise UserError(f"No pattern covers the parameter {path!r}; add a row for it, or end the list with '.*'.")


def cover(rules: Sequence[tuple[str, Any]], paths: Iterable[str]) -> dict[str, Any]:
    """Returns `{path: value of its first matching rule}`; every rule but ".*" must be the first match of some path.

    Raises:
        UserError: as `lookup`, or a rule is no path's first match.
    """
    indexed = [(pattern, index) for index, (pattern, _) in enumerate(rules)]
    first = {path: lookup(indexed, path) for path in paths}
    used = set(first.values())
    for pattern, index in indexed:
        if pattern != ".*" and index not in used:
            raise UserError(f"The pattern {pattern!r} matches no parameter{nearest(pattern, first)}.")
    return {path: rules[index][1] for path, index in first.items()}


def count(tree: Mapping[str, Any]) -> int:
    """Returns the number of parameters."""
    return sum(int(np.prod(leaf.shape)) for leaf in flatten(tree).values())
