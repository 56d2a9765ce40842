"""ProMoT: prompt tuning, then model tuning, so that a fine-tuned language model keeps its in-context learning."""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout tasks/ lies beside this package, in a wheel inside it; either way it is imported as promot_jax.tasks.
_checkout = Path(__file__).resolve().parent.parent
if not (Path(__file__).parent / "tasks").is_dir() and (_checkout / "tasks" / "__init__.py").is_file():
    __path__.append(str(_checkout))
