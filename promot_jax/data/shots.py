"""Names of tasks: the modules with those of the package, and k-shot forms, `<name>_<k>shot`, of all names."""

import re

BUILT_IN = ("promot_jax.tasks.demo", "promot_jax.tasks.paper")  # modules of tasks that are always known


def split(name: str) -> tuple[str, int | None]:
    """Splits `rte_4shot` into `rte` and 4; the number is None for a name that ends otherwise."""
    match = re.fullmatch(r"(.+)_(\d+)shot", name)
    return (match[1], int(match[2])) if match else (name, None)
