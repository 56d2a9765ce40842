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
    """The model and the data of a run.

    Attributes:
        checkpoint: base model (`INITIAL_CHECKPOINT_PATH`): "asset:NAME", a `.gguf` file, a Hugging Face folder (local,
            `hf://` or `gs://`), a T5X checkpoint, or a finished run's folder.
        task: SeqIO task or mixture to train on (`MIXTURE_OR_TASK_NAME`).
        modules: modules that register tasks (`MIXTURE_OR_TASK_MODULE`).
        feature_lengths: `inputs` and `targets` in tokens, without the prompt (`TASK_FEATURE_LENGTHS`).
        icl_mixture: mixture of the in-context learning tasks, without the number of shots (`ICL_MIXTURE`).
        prompt_length: rows of the soft prompt.
        prompt_init: how it starts.
        prompt_path: trained prompts where a job takes them (`PROMPT_PATH`): a file or stage 1's folder, or several by
            name, `{"sentiment": "runs/a", ...}`; "" for none.
        prompt_task: the name of a prompt that has no description (`PROMPT_TASK`): a released array, or one in a T5X
            checkpoint. It is then used although its base model is not verified.
        force_prompt: take a prompt that was trained on another base model.
        seed: of data order, initialisation and dropout.
        dtype: of activations and products, "float32" or "bfloat16".
        evaluation: what is evaluated, and when.
        partitioner: the mesh.
        model: sizes, for checkpoints that carry none; they must agree with one that does. None takes the checkpoint's.
        vocabulary: path of the tokenizer (`VOCABULARY`), for checkpoints that carry none; "" takes the checkpoint's.
        data_shards: parts that the training data are read in (`DATA_SHARDS`); a batch takes as many rows from each. Not
            the number of hosts, which may change from start to start and changes no batch: each host reads the shards
            of its rows, so that with at least as many shards as hosts none reads more than its part.
        cache_dirs: folders with SeqIO caches (`SEQIO_CACHE_DIRS`), as `launch/cache_tasks.sh` builds them; tasks that
            lie in none of them are read from their sources.
    """

    checkpoint: str
    task: str
    modules: str | Sequence[str]
    feature_lengths: Mapping[str, int]
    icl_mixture: str
    prompt_length: int = 16
    prompt_init: PromptInit = PromptInit()
    prompt_path: str | Mapping[str, str] = ""
    prompt_task: str = ""
    force_prompt: bool = False
    seed: int = 0
    dtype: str = "float32"
    evaluation: Evaluation = Evaluation()
    partitioner: Partitioner = Partitioner()
    model: Config | None = None
    vocabulary: str = ""
    data_shards: int = 1
    cache_dirs: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        """Raises UserError for values that cannot be."""
        if self.seed < 0 or self.prompt_length < 1:
            raise UserError(
                f"SEED is not negative and PROMPT_LENGTH at least 1, not {self.seed}, {self.prompt_length}."
            )
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
