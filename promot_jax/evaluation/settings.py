"""Settings of evaluations: during training (the curve) and at its end."""

import dataclasses

from promot_jax.decoding.settings import Decoding
from promot_jax.errors import UserError

EXEMPLARS = ("per_example", "per_task")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is evaluated, and when."""

    shots: tuple[int, ...] = (1, 4)  # exemplars per prompt in the final evaluation; every number is a table of its own
    examples: int = 100  # per ICL task in the final evaluation
    target_examples: int = 500  # of the fine-tuning task in the final evaluation
    split: str = "test"  # of the final evaluation; no choice is made on it
    curve_shots: int = 1  # exemplars per prompt at every checkpoint
    curve_examples: int = 30  # per ICL task at every checkpoint; 0 leaves ICL out of the curve
    curve_target_examples: int = 200  # of the fine-tuning task at every checkpoint
    curve_draws: int = 1  # as `exemplar_draws`, at every checkpoint: those at matched target score are reported
    curve_split: str = "validation"  # split that checkpoints are compared and chosen on
    # Whether every evaluation of a stage that tunes the model scores the test split too, as the final evaluation does:
    # the points of a frontier. Checkpoints are still chosen on `curve_split`.
    curve_test: bool = False
    exemplar_seed: int = 0  # chooses the exemplars, with the task and the example
    # Whose exemplars they are: "per_example" draws for every example; "per_task" once per task, so that prompts share
    # their beginning, whose keys and values are then computed once. Without training examples that are evaluated.
    exemplars: str = "per_example"
    # Of the final evaluation, each with other exemplars. Scores are those of the first draw; the others say how far the
    # exemplars move them.
    exemplar_draws: int = 1
    # Whether tasks with a label set are scored by likelihood too, beside generation: lm-eval's `acc` and `acc_norm`.
    likelihood: bool = False
    # Whether each evaluation of a stage that tunes the model measures KL(base || tuned) of the next token, on the
    # targets of the fine-tuning task and of the ICL tasks. It takes two forward passes over the curve's examples.
    divergence: bool = False
    samples: int = 5  # outputs per task and number of shots that the results hold, for the report
    tokens_per_batch: int = 4096  # of prompts and labels processed together; in a beam search, times its beams
    # Prompts and outputs, padding included, whose keys and values are held at once: those of rows decoded together.
    cache_tokens: int = 16384
    max_input_length: int = 1024  # tokens of a prompt; whole exemplars are dropped until it fits
    decoding: Decoding = Decoding()  # how outputs are chosen
    # For a T5 or mT5 that knows span corruption only: inputs end with `<extra_id_0>`, and the answer is what the output
    # says between it and `<extra_id_1>`. Training inputs stay as they are, and so does the fine-tuning task where a
    # prompt or the model has been trained; in context the sentinel stays.
    sentinel: bool = False

    def __post_init__(self) -> None:
        """Raises UserError for counts that cannot be."""
        if self.exemplars not in EXEMPLARS:
            raise UserError(
                f"Evaluation.exemplars is {self.exemplars!r}; use one of {', '.join(map(repr, EXEMPLARS))}."
            )
        least = (self.examples, self.target_examples, self.curve_target_examples, self.exemplar_draws, self.curve_draws)
        if min(*least, self.max_input_length) < 1:
            raise UserError("Evaluation needs at least one example and draw, and room for one input token.")
        counts = (
            self.curve_examples,
            self.curve_shots,
            self.exemplar_seed,
            self.samples,
            self.tokens_per_batch,
            self.cache_tokens,
        )
        if min(*counts, *self.shots, 0) < 0:
            raise UserError("Evaluation's counts and seeds are not negative.")
