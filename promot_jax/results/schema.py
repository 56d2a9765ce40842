"""What a run leaves, as records: `results.json` of runs and comparisons, `stage.json`, gradient alignments.

The scores in them are those of `promot_jax.results.scores`. Numbers of shots are text ("1", "4").
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from promot_jax.results import records
from promot_jax.results.example_scores import ByEvaluation
from promot_jax.results.provenance import commit, versions
from promot_jax.results.records import NULL, Document, Record
from promot_jax.results.scores import Count, Icl, Interval, Percent, Sample, StepEvaluation, Target, Tested


class Matched(Record, frozen=True, kw_only=True):
    """Scores of a run's checkpoint at matched target score, on the validation split."""

    step: Count
    target: Target | None = NULL
    icl: dict[str, Icl] = {}

    def __post_init__(self) -> None:
        """Raises ValueError for ICL scores without a number of shots."""
        _check_shots(self.icl)


class Run(Document, frozen=True, kw_only=True):
    """One run: a method trained and evaluated on the test split."""

    method: str  # its name
    seed: Count  # of the whole run
    steps: dict[str, Count]  # updates by stage; empty for the pretrained model
    seconds: float | None = NULL  # wall-clock time of training and evaluation
    target: Target | None  # score of the fine-tuned task, None where it was not evaluated
    icl: dict[str, Icl]  # ICL scores by number of shots
    curve: list[StepEvaluation]  # evaluations during training
    example_scores: ByEvaluation = {}  # scores of single examples of the test split; absent from older results
    versions: dict[str, str | None] = {}  # of packages
    commit: str | None = NULL  # of the code
    model: str | None = None  # path of the base model
    base: str | None = None  # fingerprint of the base model
    best_step: dict[str, Count] = {}  # of the checkpoint that was chosen, by stage
    leaves: dict[str, Count] = {}  # how many parameters' leaves were loaded, new and unused
    samples: list[Sample] = []  # outputs for the report
    # what the run was done with, flat; `curve_shots` says at how many shots curves were evaluated
    settings: dict[str, Any] = {}
    matched: Matched | None = None  # scores at matched target score, in a comparison
    # those of the same checkpoint on the test split, where they are known of every method
    matched_test: Tested | None = None
    varied: dict[str, float] = {}  # settings of a run that a comparison did not choose

    def __post_init__(self) -> None:
        """Raises ValueError for ICL scores without a number of shots."""
        _check_shots(self.icl)

    def at(self, checkpoint: "Checkpoint") -> "Scored | None":
        """The scores of one of its checkpoints."""
        if checkpoint == "best":
            return self
        return self.matched if checkpoint == "matched" else self.matched_test

    @classmethod
    def of(cls, **fields: Any) -> "Run":
        """A run with the versions and commit at hand, checked.

        Raises:
            UserError: a value does not fit its field.
        """
        return records.checked(cls(versions=versions(), commit=commit(), **fields))


# The best checkpoint on the test split; that at matched target score on the validation and on the test split.
Checkpoint = Literal["best", "matched", "matched_test"]
Scored = Run | Matched | Tested  # what has a target score and ICL scores


class CellState(Record, frozen=True, kw_only=True):
    """State of one cell of a sweep."""

    method: str
    seed: Count
    varied: dict[str, float] = {}
    folder: str = ""
    state: Annotated[str, Meta(pattern="^(finished|failed|running|missing)$")]
    message: str = ""


class Failure(Document, frozen=True, kw_only=True):
    """How a cell failed (`failed.json`)."""

    message: str  # of the error
    lasting: bool  # whether it would fail again
    settings: str  # digest of the cell's settings
    time: str = ""  # when


class Spread(Record, frozen=True, kw_only=True):
    """Mean and spreads of one score over seeds and draws of exemplars."""

    mean: float  # over seeds, of the means over draws
    # Student's interval of that mean over the seeds (over the draws of a single seed, which then say nothing about
    # other seeds), within [0, 100]; None for fewer than three values
    ci95: Interval | None = NULL
    low: float  # range of the seeds' means
    high: float
    # standard deviation between the seeds' means; None for one seed
    sd_seeds: float | None = NULL
    # that of draws within a seed, pooled over seeds; None for one draw of each
    sd_draws: float | None = NULL
    seeds: Count  # how many there are
    draws: Count


class Candidate(Record, frozen=True, kw_only=True):
    """Settings of a method that a comparison tried, with their scores on the validation split."""

    varied: dict[str, float]  # the settings
    validation: Percent | None = NULL  # target score, mean over seeds
    icl: Percent | None = NULL  # ICL normalised average, mean over seeds
    seeds: dict[str, Percent | None]  # target score by seed


class Selection(Record, frozen=True, kw_only=True):
    """All settings that a comparison tried of a method, and the chosen one."""

    chosen: dict[str, float]
    candidates: list[Candidate]


class Comparison(Document, frozen=True, kw_only=True):
    """Runs of several methods."""

    methods: dict[str, list[Run]]  # runs by method, one per seed
    cells: list[CellState] = []  # state of each cell of the sweep
    spread: dict[str, dict[str, dict[str, Spread]]] = {}  # by `Checkpoint`, method and score
    selection: dict[str, Selection] = {}  # settings that were tried, by method
    margin: float = 0.0  # points of target score that were given up for ICL where settings were chosen
    others: list[Run] = []  # finished runs with settings that were not chosen

    def __post_init__(self) -> None:
        """Raises ValueError for a run under another method's name, or two runs of one seed."""
        for method, runs in self.methods.items():
            for index, run in enumerate(runs):
                place = f"methods.{method}[{index}]"
                if run.method != method:
                    raise ValueError(f"{place}.method should be {method!r}, but is {run.method!r}")
                if run.seed in {other.seed for other in runs[:index]}:
                    raise ValueError(f"{place}.seed should be a seed of its own, but is {run.seed}")

    @property
    def runs(self) -> list[Run]:
        """All chosen runs."""
        return [run for runs in self.methods.values() for run in runs]


class StageRecord(Document, frozen=True, kw_only=True):
    """A finished stage (`stage.json`): what the next stage and a model's loader go by."""

    stage: str  # its name
    trains: list[str] | str  # parameter subtrees that it updated
    checkpoint: str  # path of the base model
    base: str  # fingerprint of the base model
    best_step: Count  # of the checkpoint that was chosen
    steps: Count = 0  # updates
    score: Percent | None = NULL  # target score at `best_step`, on the validation split
    seed: Count = 0  # of the run
    seconds: float = 0.0  # of training and evaluation
    skipped: Count | None = None  # training examples that were too long
    dropped_shots: Count | None = None  # exemplars that did not fit into the training inputs
    curve: list[StepEvaluation]  # evaluations during training
    lora: dict[str, Any] | None = None  # fields of `Lora`, where LoRA stays in the model
    run: str = ""  # digest of the settings, which its checkpoints have too; "" in those of earlier versions


class Alignment(Record, frozen=True, kw_only=True):
    """Cosines between the gradients of real and shuffled targets, at one step, over batches."""

    step: Count  # of training
    prompt: str  # name of the soft prompt that was prepended, "" for none
    scope: str  # which layers
    group: str  # which parameters
    mean: float | None  # over the batches; None where a gradient was zero
    std: float | None
    low: float | None
    high: float | None
    n: Count  # batches


class GradientAlignment(Document, frozen=True, kw_only=True):
    """What the job `gradient_alignment` leaves."""

    job: Literal["gradient_alignment"]  # names the job
    run: str = ""  # folder of the stage
    stage: str  # name of the stage
    task: str  # it was fine-tuned on
    model: str = ""  # path of the base model
    base: str = ""  # fingerprint of the base model
    seed: Count  # of the run
    batches: Count  # how many were looked at
    batch_size: Count = 0  # rows of each
    label_smoothing: float = 0.0  # of the loss
    changed: float  # share of the rows, in [0, 1], whose target changed
    points: list[Alignment]  # the cosines
    seconds: float | None = None  # that it took
    versions: dict[str, str | None] = {}  # of packages
    commit: str | None = None  # of the code


def read(path: str | os.PathLike[str]) -> Run | Comparison:
    """Reads and checks a run or a comparison, from a file or the folder of a `results.json`.

    Raises:
        UserError: there is no such file, or it is not in the layout of its type.
    """
    path = Path(path) / "results.json" if Path(path).is_dir() else Path(path)
    document = records.load(path)
    if isinstance(document, dict) and "methods" in document:
        return records.parse(document, Comparison, repr(str(path)))
    return records.parse(document, Run, repr(str(path)))


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Reads the `results.json` of a run's folder; raises as `read`."""
    return records.read(Path(folder) / "results.json", Run)


def _check_shots(icl: Mapping[str, Icl]) -> None:
    for shots in icl:
        if not shots.isdecimal():
            raise ValueError(f"icl.{shots} should be keyed by a number of shots")
