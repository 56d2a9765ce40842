"""What every job shares: the model, the data and how they are evaluated, as plain settings."""

import dataclasses
from collections.abc import Mapping, Sequence

from promot_jax.decoding import Decoding
from promot_jax.errors import UserError
from promot_jax.models import Config
from promot_jax.partitioning import Partitioner
from promot_jax.prompts import PromptInit


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is evaluated, and when.

    Attributes:
        shots: exemplars per prompt in the closing evaluation; every number is a table of its own.
        examples: per ICL task in the closing evaluation.
        target_examples: of the fine-tuning task in the closing evaluation.
        split: of the closing evaluation; no choice is made on it.
        curve_shots: exemplars per prompt at every checkpoint.
        curve_examples: per ICL task at every checkpoint; 0 leaves ICL out of the curve.
        curve_target_examples: of the fine-tuning task at every checkpoint.
        curve_draws: as `exemplar_draws`, at every checkpoint: those at matched target score are reported.
        curve_split: split that checkpoints are compared and chosen on.
        exemplar_seed: chooses the exemplars, with the task and the example.
        exemplar_draws: of the closing evaluation, each with other exemplars. Scores are those of the first draw; the
            others say how far the exemplars move them.
        samples: outputs per task and number of shots that the results hold, for the report.
        tokens_per_batch: of prompts decoded together, each as often as it has beams.
        max_input_length: tokens of a prompt; whole exemplars are dropped until it fits.
        decoding: how outputs are chosen.
        sentinel: for a T5 or mT5 that knows span corruption only: inputs end with `<extra_id_0>`, and the answer is
            what the output says between it and `<extra_id_1>`. Training inputs stay as they are, and so does the
            fine-tuning task where a prompt or the model has been trained; in context the sentinel stays.
    """

    shots: tuple[int, ...] = (1, 4)
    examples: int = 100
    target_examples: int = 500
    split: str = "test"
    curve_shots: int = 1
    curve_examples: int = 30
    curve_target_examples: int = 200
    curve_draws: int = 1
    curve_split: str = "validation"
    exemplar_seed: int = 0
    exemplar_draws: int = 1
    samples: int = 5
    tokens_per_batch: int = 4096
    max_input_length: int = 1024
    decoding: Decoding = Decoding()
    sentinel: bool = False

    def __post_init__(self) -> None:
        """Raises UserError for counts that cannot be."""
        least = (self.examples, self.target_examples, self.curve_target_examples, self.exemplar_draws, self.curve_draws)
        if min(*least, self.max_input_length) < 1:
            raise UserError("Evaluation needs at least one example and draw, and room for one input token.")
        counts = (self.curve_examples, self.curve_shots, self.exemplar_seed, self.samples, self.tokens_per_batch)
        if min(*counts, *self.shots, 0) < 0:
            raise UserError("Evaluation's counts and seeds are not negative.")


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
