"""Select, partition, merge and cover nested parameter dicts by path: pure functions.

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
    """Splits a tree in two by path; `merge` puts it together again.

    Args:
        tree: nested dict.
        chosen: says of a path whether its leaf goes to the first tree.
    """
    flat = flatten(tree)
    return (
        unflatten({path: leaf for path, leaf in flat.items() if chosen(path)}),
        unflatten({path: leaf for path, leaf in flat.items() if not chosen(path)}),
    )


def merge(*trees: Mapping[str, Any]) -> Tree:
    """Joins trees with no path in common.

    Raises:
        ValueError: two trees hold the same path.
    """
    flat: dict[str, Any] = {}
    for tree in trees:
        for path, leaf in flatten(tree).items():
            if path in flat:
                raise ValueError(f"{path} is in two trees")
            flat[path] = leaf
    return unflatten(flat)


def interpolate(first: Mapping[str, Any], second: Mapping[str, Any], share: float) -> Tree:
    """Returns `(1 - share) * first + share * second`; at 0 and 1 the leaves themselves, bit for bit."""
    if share in (0, 1):
        return dict(second if share else first)
    ends = flatten(second)
    return unflatten({path: (1 - share) * leaf + share * ends[path] for path, leaf in flatten(first).items()})


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern matches a whole path; a `UserError` names one that is broken."""
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as error:
        raise UserError(f"The path pattern {pattern!r} is not a regular expression: {error}.") from error


def lookup(rules: Sequence[tuple[str, Any]], path: str) -> Any:
    """Returns the value of the first rule whose pattern matches the whole path.

    Args:
        rules: `(regular expression, value)` in order.
        path: of one leaf.

    Raises:
        UserError: no rule matches, or a pattern is broken.
    """
    for pattern, value in rules:
        if matches(pattern, path):
            return value
    raise UserError(f"No pattern covers the parameter {path!r}; add a row for it, or end the list with '.*'.")


def cover(rules: Sequence[tuple[str, Any]], paths: Iterable[str]) -> dict[str, Any]:
    """Gives every path the value of its first rule; every rule but a closing ".*" must be some path's first.

    Raises:
        UserError: as `lookup`, or a rule that no path takes.
    """
    found = {path: lookup(rules, path) for path in paths}
    for index, (pattern, _) in enumerate(rules):
        taken = (path for path in found if re.fullmatch(pattern, path))
        earlier = rules[:index]
        if pattern != ".*" and all(any(re.fullmatch(other, path) for other, _ in earlier) for path in taken):
            raise UserError(f"The pattern {pattern!r} matches no parameter{nearest(pattern, found)}.")
    return found


def count(tree: Mapping[str, Any]) -> int:
    """Number of parameters."""
    return sum(int(np.prod(leaf.shape)) for leaf in flatten(tree).values())
