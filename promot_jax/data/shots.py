"""Names of k-shot forms, `<name>_<k>shot`, of tasks, mixtures and methods."""

import re


def split(name: str) -> tuple[str, int | None]:
    """Splits `rte_4shot` into `rte` and 4; the number is None for a name that ends otherwise."""
    match = re.fullmatch(r"(.+)_(\d+)shot", name)
    return (match[1], int(match[2])) if match else (name, None)
