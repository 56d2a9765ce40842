"""What every job shares: the model, the data and how they are evaluated, as plain settings."""

import dataclasses
import inspect
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from promot_jax.data import shots
from promot_jax.data.files import DataFile
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.evaluation.settings import Evaluation
from promot_jax.models import Config
from promot_jax.params.soft_prompts import PromptInit
from promot_jax.trackers.settings import Tracker


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The model and the data of a run; the macro that sets a field is in its comment."""

    # Base model: "asset:NAME", a `.gguf` file, a Hugging Face folder (local, `hf://` or `gs://`), a T5X checkpoint, or
    # a finished run's folder.
    checkpoint: str  # INITIAL_CHECKPOINT_PATH
    task: str  # SeqIO task or mixture to train on, MIXTURE_OR_TASK_NAME
    modules: str | Sequence[str]  # that register tasks beside the package's own, MIXTURE_OR_TASK_MODULE
    # `{"inputs": ..., "targets": ...}` in tokens, without the prompt; or such lengths by task. None, or a task that is
    # not named: those of its data (`data_check.with_lengths`).
    feature_lengths: Mapping[str, Any] | None  # TASK_FEATURE_LENGTHS
    icl_mixture: str  # the in-context learning tasks, without the number of shots, ICL_MIXTURE
    prompt_length: int = 16  # rows of the soft prompt
    prompt_init: PromptInit = PromptInit()
    # Trained prompts where a job takes them: a file or stage 1's folder, or several by name,
    # `{"sentiment": "runs/a", ...}`; "" for none.
    prompt_path: str | Mapping[str, str] = ""  # PROMPT_PATH
    # Name of a prompt without description (a released array, or in a T5X checkpoint); its base model is not verified.
    prompt_task: str = ""  # PROMPT_TASK
    force_prompt: bool = False  # take a prompt that was trained on another base model
    seed: int = 0  # of data order, initialisation and dropout
    dtype: str = "float32"  # of activations and products; or "bfloat16"
    evaluation: Evaluation = Evaluation()
    partitioner: Partitioner = Partitioner()
    model: Config | None = None  # sizes, for checkpoints that carry none; they must agree with one that does
    vocabulary: str = ""  # path of the tokenizer, for checkpoints that carry none, VOCABULARY
    # Parts that the training data are read in; a batch takes as many rows from each. Not the number of hosts, which may
    # change from start to start and changes no batch: each host reads the shards of its rows, so that with at least as
    # many shards as hosts none reads more than its part.
    data_shards: int = 1  # DATA_SHARDS
    # Folders with SeqIO caches, as `launch/cache_tasks.sh` builds them; tasks in none are read from their sources.
    cache_dirs: str | Sequence[str] = ()  # SEQIO_CACHE_DIRS
    data: DataFile | None = None  # the user's own data, which `task` is
    tracker: Tracker = Tracker()  # beside TensorBoard, TRACKER

    def __post_init__(self) -> None:
        """Raises UserError for values that cannot be."""
        if self.seed < 0 or self.prompt_length < 1:
            raise UserError(
                f"SEED is not negative and PROMPT_LENGTH at least 1, not {self.seed}, {self.prompt_length}."
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f'Experiment.dtype is "float32" or "bfloat16", not {self.dtype!r}.')
        if self.data_shards < 1:
            raise UserError(f"DATA_SHARDS is at least 1, not {self.data_shards}.")
        given = self.feature_lengths
        for lengths in [] if given is None else given.values() if _by_task(given) else [given]:
            if not _are_lengths(lengths):
                raise UserError(
                    f"TASK_FEATURE_LENGTHS is {given}; give 'inputs' and 'targets' in tokens, such lengths by task, or "
                    "None for those of the data."
                )

    @property
    def given_lengths(self) -> Mapping[str, int] | None:
        """The lengths that are set for the task, with room for its exemplars; None where its data decide."""
        given = self.feature_lengths
        if given is None or not _by_task(given):
            return given
        base, count = shots.split(self.task)
        if self.task in given or base not in given:
            return given.get(self.task)
        return with_exemplars(given[base], count or 0)

    @property
    def lengths(self) -> Mapping[str, int]:
        """The lengths in tokens, `inputs` and `targets`.

        Raises:
            UserError: they are those of the data, which are not known yet (`data_check.with_lengths`).
        """
        if not self.given_lengths:
            raise UserError("This job does not read the data: set TASK_FEATURE_LENGTHS to the lengths in tokens.")
        return self.given_lengths

    def with_shots(self, count: int) -> "Experiment":
        """The experiment on its task's form with exemplars in front of every input (`rte_1shot`), and room for them."""
        if not count:
            return self
        given = self.feature_lengths
        lengths = given if given is None or _by_task(given) else with_exemplars(given, count)
        return dataclasses.replace(self, task=f"{self.task}_{count}shot", feature_lengths=lengths)


def with_exemplars(lengths: Mapping[str, int], count: int) -> dict[str, int]:
    """The lengths of a task's examples with room in the inputs for `count` exemplars."""
    inputs, targets = lengths["inputs"], lengths["targets"]
    return {"inputs": inputs * (1 + count) + targets * count, "targets": targets}


def _by_task(given: Mapping[str, Any]) -> bool:
    return any(isinstance(value, Mapping) for value in given.values())


def _are_lengths(given: Any) -> bool:
    named = isinstance(given, Mapping) and set(given) == {"inputs", "targets"}
    return named and all(isinstance(length, int) and length > 0 for length in given.values())


def experiment(**settings: Any) -> Experiment:
    """`Experiment` as gin configures it: a user's own data are its task, in the place of MIXTURE_OR_TASK_NAME.

    A number of shots stays: `reviews_1shot` with DATA = "reviews.csv".
    """
    found = Experiment(**settings)
    data = found.data
    if data is None or not data.path:
        return dataclasses.replace(found, data=None)
    return found if shots.split(found.task)[0] == data.task else dataclasses.replace(found, task=data.task)


experiment.__signature__ = inspect.signature(Experiment)  # type: ignore[attr-defined]  # what gin binds by
experiment.__annotations__ = typing.get_type_hints(Experiment)
