"""What every job shares: the model, the data and how they are evaluated, as plain settings."""

import dataclasses
from collections.abc import Mapping, Sequence

from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.evaluation.settings import Evaluation
from promot_jax.models import Config
from promot_jax.params.soft_prompts import PromptInit


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The model and the data of a run; the macro that sets a field stands behind it."""

    # Base model: "asset:NAME", a `.gguf` file, a Hugging Face folder (local, `hf://` or `gs://`), a T5X checkpoint, or
    # a finished run's folder.
    checkpoint: str  # INITIAL_CHECKPOINT_PATH
    task: str  # SeqIO task or mixture to train on, MIXTURE_OR_TASK_NAME
    modules: str | Sequence[str]  # that register tasks, MIXTURE_OR_TASK_MODULE
    feature_lengths: Mapping[str, int]  # `inputs`, `targets` in tokens, without the prompt, TASK_FEATURE_LENGTHS
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
        lengths = self.feature_lengths
        if set(lengths) != {"inputs", "targets"} or not all(isinstance(n, int) and n > 0 for n in lengths.values()):
            raise UserError(f"TASK_FEATURE_LENGTHS is {lengths}; give 'inputs' and 'targets' in tokens.")

    def with_shots(self, shots: int) -> "Experiment":
        """The experiment on its task's form with exemplars in front of every input (`rte_1shot`), and room for them."""
        if not shots:
            return self
        inputs, targets = self.feature_lengths["inputs"], self.feature_lengths["targets"]
        lengths = {"inputs": inputs * (1 + shots) + targets * shots, "targets": targets}
        return dataclasses.replace(self, task=f"{self.task}_{shots}shot", feature_lengths=lengths)
