"""Scores and outputs of evaluations, as records.

Scores are on [0, 100]; a number that does not exist (a NaN loss, the format share of an open task) is None, null in the
file. Fields whose default is `NULL` are always written, other fields only where they differ from their default.
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from msgspec import Meta

from promot_jax import methods
from promot_jax.errors import nearest
from promot_jax.results.bootstrap import normalized_average
from promot_jax.results.example_scores import ByEvaluation
from promot_jax.results.records import NULL, Record

Percent = Annotated[float, Meta(ge=0, le=100)]
Count = Annotated[int, Meta(ge=0)]
Interval = tuple[float, float]


class Score(Record, frozen=True, kw_only=True):
    """A metric's score on one task."""

    metric: str  # its name
    score: Percent | None = NULL  # on [0, 100]
    ci95: Interval | None = NULL  # bootstrap interval over examples
    n: Count  # number of examples
    # percentage of outputs in the fine-tuned task's label set; None where that is open, or the task has such labels
    format_share: Percent | None = NULL
    metrics: dict[str, float | None] = {}  # all metrics of the task, by name
    # accuracy of the label with the greatest log-likelihood, and with the greatest one per character (lm-eval); None
    # where it was not evaluated, or the task has no label set
    acc: Percent | None = None
    acc_norm: Percent | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for an interval of no order."""
        _check_interval(self.ci95)


class Target(Score, frozen=True, kw_only=True):
    """Score of the fine-tuned task."""

    task: str  # its name
    tasks: dict[str, Score] = {}  # of a mixture, the score of each task; its own score is their normalised average
    shots: Count = 0  # exemplars in front of its inputs, as in training


class Draw(Record, frozen=True, kw_only=True):
    """Scores of one draw of exemplars, without intervals."""

    norm_avg: Percent | None = NULL
    format_share: Percent | None = NULL
    tasks: dict[str, Percent | None] = {}


class Icl(Record, frozen=True, kw_only=True):
    """ICL scores at one number of shots."""

    # normalised average over the tasks; None unless every task has a score
    norm_avg: Percent | None = NULL
    ci95: Interval | None = NULL  # its bootstrap interval
    # mean over the tasks that have one: those that share no label with the fine-tuned task
    format_share: Percent | None = NULL
    acc: Percent | None = None  # mean of `Score.acc` over the tasks that have it
    acc_norm: Percent | None = None
    tasks: dict[str, Score]  # score of each task
    # scores of each draw of exemplars where there are several; all other scores are of the first
    draws: list[Draw] = []
    dropped_shots: Count | None = None  # exemplars that did not fit into the inputs

    def __post_init__(self) -> None:
        """Raises ValueError for an interval of no order."""
        _check_interval(self.ci95)

    @classmethod
    def of(cls, tasks: Mapping[str, Score], **fields: Any) -> "Icl":
        """The tasks with their normalised average and mean format share, and other fields; tasks weigh the same."""
        scores = {name: task.score for name, task in tasks.items() if task.score is not None}
        whole = bool(tasks) and len(scores) == len(tasks)
        return cls(
            norm_avg=normalized_average(scores) if whole else None,
            format_share=_mean(tasks, "format_share"),
            acc=_mean(tasks, "acc"),
            acc_norm=_mean(tasks, "acc_norm"),
            tasks=dict(tasks),
            **fields,
        )

    def draw(self) -> Draw:
        """Its scores as those of one draw."""
        scores = {name: task.score for name, task in self.tasks.items()}
        return Draw(norm_avg=self.norm_avg, format_share=self.format_share, tasks=scores)


class Tested(Record, frozen=True, kw_only=True):
    """Scores of one model on the test split."""

    target: Target | None = NULL  # of the fine-tuned task, with its soft prompt
    icl: dict[str, Icl] = {}  # by number of shots, stripped
    example_scores: ByEvaluation = {}  # of single examples


class StepEvaluation(Record, frozen=True, kw_only=True):
    """Evaluation at a step of training, on the validation split; an item of a curve."""

    step: Count  # counted from the start of its stage
    stage: str  # name of the stage
    loss: float | None = NULL  # mean training loss since the evaluation before
    validation_loss: float | None = None  # mean cross-entropy per target token of the fine-tuned task
    # the same on training examples, before the first update: how much there is to learn when the weights start to move
    initial_loss: float | None = None
    # mean KL(base || tuned) of the next token, prompt stripped, on targets of the fine-tuned task and of the ICL tasks
    kl_target: float | None = None
    kl_icl: float | None = None
    target: Percent | None = NULL  # score of the fine-tuned task
    icl: Percent | None = NULL  # ICL normalised average
    format_share: Percent | None = NULL  # mean over the ICL tasks, in percent
    target_ci95: Interval | None = None  # interval of `target`
    target_n: Count | None = None  # examples of the fine-tuned task
    tasks: dict[str, Score] = {}  # score of each ICL task
    draws: list[Draw] = []  # as in `Icl`
    test: Tested | None = None  # with `Evaluation.curve_test`
    # share of the fine-tuned model in a model between two (WiSE-FT), whose `step` is that in percent
    alpha: float | None = None
    # scores of single examples, where the stage tunes the model; absent from older results
    example_scores: ByEvaluation = {}

    def __post_init__(self) -> None:
        """Raises ValueError for a stage that no method has."""
        if self.stage not in (known := methods.stage_names()):
            raise ValueError(f"unknown stage {self.stage!r}{nearest(self.stage, known)}")


class Sample(Record, frozen=True, kw_only=True):
    """One output for the report, as text."""

    task: str  # name of the task, without its number of shots
    input: str  # the whole input, exemplars included
    target: str  # what is right
    output: str  # what the model wrote, post-processed
    shots: Count | None = None  # exemplars asked for; None in older results
    query: Count | None = None  # where in the input the query begins; None in older results
    score: Percent | None = None  # of this output alone, None where the metric has none of one example


class Output(Sample, frozen=True, kw_only=True):
    """One example with a model's output: a line of `outputs/*.jsonl`."""

    id: str  # of the example
    dropped_shots: Count  # exemplars that did not fit
    target: Any  # post-processed target
    raw: str  # the model's output
    output: Any  # post-processed output
    score: Percent | None = NULL
    draw: Count | None = None  # which draw of exemplars, where there are several
    step: Count | None = None  # of training, where it was evaluated during training
    likelihoods: dict[str, float | None] = {}  # log-likelihood of each label, where it was evaluated
    statistics: list[int | float] = []  # of a metric that is computed from their sums over examples (BLEU)

    def sample(self) -> Sample:
        """The output as the report shows it."""
        fields = {name: getattr(self, name) for name in Sample.__struct_fields__}
        return Sample(**fields | {name: _as_text(fields[name]) for name in ("target", "output")})


def first_of_each_task(rows: Iterable[Output], count: int) -> list[Sample]:
    """The first few outputs of each task."""
    by_task: dict[str, list[Output]] = {}
    for row in rows:
        by_task.setdefault(row.task, []).append(row)
    return [row.sample() for members in by_task.values() for row in members[:count]]


def _mean(tasks: Mapping[str, Score], name: str) -> float | None:
    """Mean of a field over the tasks that have it."""
    values = [value for task in tasks.values() if (value := getattr(task, name)) is not None]
    return sum(values) / len(values) if values else None


def _check_interval(interval: Interval | None) -> None:
    if interval is not None and not interval[0] <= interval[1]:
        raise ValueError(f"ci95 should be [low, high], but is {list(interval)}")


def _as_text(value: Any) -> str:
    """A post-processed target or output as a person reads it."""
    return " | ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
