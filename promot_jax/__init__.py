"""ProMoT: prompt tuning, then model tuning, so that a fine-tuned language model keeps its in-context learning.

From Python, `promot_jax.api` in short: `import promot_jax as pj; model = pj.load("org/name")`.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from promot_jax.api import Decoding, Model, Task, load

__all__ = ["Decoding", "Model", "Task", "__version__", "load"]
__version__ = "0.1.0"

# In a checkout tasks/ lies beside this package, in a wheel inside it; either way it is imported as promot_jax.tasks.
_checkout = Path(__file__).resolve().parent.parent
if not (Path(__file__).parent / "tasks").is_dir() and (_checkout / "tasks" / "__init__.py").is_file():
    __path__.append(str(_checkout))


def __getattr__(name: str) -> Any:
    """Imports the API when it is first used: a plain `import promot_jax` takes no time."""
    if name in __all__:
        return getattr(importlib.import_module("promot_jax.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The API's names too."""
    return sorted({*globals(), *__all__})
