"""Data sets of the Hugging Face hub, through the package `datasets`."""

import re
from typing import Any

from promot_jax.errors import UserError


def load(path: str) -> dict[str, list[dict[str, Any]]]:
    """Loads `hf://organisation/name[:configuration][@revision]`: rows by the data set's own names of splits.

    The numbers of a class label become its names. No code of a data set is run.

    Raises:
        UserError: a malformed address, the package is missing, or the data set cannot be loaded.
    """
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+?)(?::([\w.-]+))?(?:@([\w./-]+))?", path, re.ASCII)
    if not match:
        raise UserError(f"{path!r} is no data set; write hf://organisation/name[:configuration][@revision].")
    name, configuration, revision = match.groups()
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"Loading {path} needs the package datasets: pip install promot_jax[datasets].") from error
    try:
        loaded = datasets.load_dataset(name, configuration, revision=revision)
        return {split: _named(table) for split, table in loaded.items()}
    except Exception as error:  # its own errors, and those of its HTTP library
        raise UserError(f"Cannot load {path}: {' '.join(str(error).split()) or type(error).__name__}.") from error


def _named(table: Any) -> list[dict[str, Any]]:
    """The rows of a table, with names for the numbers of class labels; -1 is a missing one."""
    names = {column: feature.names for column, feature in table.features.items() if hasattr(feature, "names")}
    rows = [dict(row) for row in table]
    for row in rows:
        for column, known in names.items():
            value = row[column]
            row[column] = known[value] if isinstance(value, int) and value >= 0 else None
    return rows
