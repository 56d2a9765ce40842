"""ProMoT from Python: load a model, train a soft prompt and the model, generate, evaluate, strip, export.

    import promot_jax as pj

    task = pj.Task("reviews", train=[("A delight. Good or bad?", "good"), ("Dull. Good or bad?", "bad"), ...])
    base = pj.load("HuggingFaceTB/SmolLM2-135M-Instruct")
    prompted = base.tune_prompt(task, steps=200, learning_rate=0.02)  # stage 1: the model is frozen
    tuned = prompted.tune_model(task, steps=60, learning_rate=1.5e-4)  # stage 2: the prompt is frozen and prepended

    tuned.generate(["Warm and wise. Good or bad?"])  # with the soft prompt prepended
    tuned.strip().generate(["The capital of France is"])  # without it: the plain model
    tuned.evaluate(task).score
    tuned.export("exported")

Objects are immutable: each step returns a new `Model`. Everything else (other methods, comparisons, reports, several
hosts) is run from gin files.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promot_jax import files, trees
from promot_jax.checkpoints.pretrained import Pretrained
from promot_jax.decoding.settings import Decoding
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.evaluation.settings import Evaluation
from promot_jax.experiments.initial_params import fresh_prompt, load_prompts
from promot_jax.experiments.session import Session, check_data, load_base
from promot_jax.experiments.settings import Experiment
from promot_jax.experiments.stage import run_stage
from promot_jax.methods.base import Stage
from promot_jax.methods.finetune import FINETUNE
from promot_jax.methods.promot import STAGE1, STAGE2
from promot_jax.models import Config
from promot_jax.params.fingerprint import fingerprint
from promot_jax.params.soft_prompts import PromptInit
from promot_jax.results.scores import Target
from promot_jax.training.optimizer import Optimizer
from promot_jax.training.settings import Training

if TYPE_CHECKING:
    from promot_jax.evaluation.sampler import Sampler

__all__ = ["Decoding", "Model", "Task", "load"]

Row = tuple[str, str] | Mapping[str, str | float]
Split = Sequence[Row]


@dataclasses.dataclass(frozen=True)
class Task:
    """A task: rows of text, registered with SeqIO under its name when it is first used.

    A row is a pair (input, target), or a mapping from fields to texts or numbers that the format strings `inputs` and
    `targets` are filled with. Where `validation` or `test` is not given, a tenth of the training rows is held out for
    it, chosen by a hash of the row.
    """

    name: str  # letters, digits and underscores; its soft prompt is called so too
    train: Split  # training, and exemplars
    validation: Split = ()  # checkpoints are chosen on it
    test: Split = ()  # for `Model.evaluate`
    inputs: str = "{input}"  # format string of the input, over the fields of a row
    targets: str = "{target}"  # and of the target
    labels: Sequence[str] = ()  # label set of a classification task, scored by accuracy; others by exact match

    def register(self) -> str:
        """Registers the task with SeqIO, unless it is; returns its name.

        Raises:
            UserError: another task has this name, or too few rows are given to hold some out.
        """
        from promot_jax.tasks import metrics, register, templates  # silences TensorFlow, before seqio

        # isort: split
        import seqio

        if _registered.get(self.name) != self or self.name not in seqio.TaskRegistry.names():
            rows = self._splits()
            template = templates.Template(self.inputs, self.targets)
            metric = metrics.accuracy if self.labels else metrics.exact_match
            register.register(self.name, rows.__getitem__, template, [metric], labels=self.labels)
            _registered[self.name] = self
        return self.name

    def _splits(self) -> dict[str, list[Mapping[str, str | float]]]:
        from promot_jax.data.rows import hold_out

        given = {name: _mappings(rows) for name, rows in (("validation", self.validation), ("test", self.test))}
        missing = [name for name, rows in given.items() if not rows]
        splits = given | hold_out(_mappings(self.train), missing, lambda row: "\0".join(map(str, row.values())))
        if empty := [name for name, rows in splits.items() if not rows]:
            raise UserError(f"Task {self.name!r} has too few rows to hold some out for {empty[0]!r}: give these rows.")
        return splits


_registered: dict[str, Task] = {}
_PAIR = ("input", "target")  # fields of a row that is a pair


def _mappings(rows: Split) -> list[Mapping[str, str | float]]:
    found: list[Mapping[str, str | float]] = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping) and (isinstance(row, str) or len(row) != len(_PAIR)):
            raise UserError(
                f"Row {number} is {row!r}; give a pair (input, target), or a mapping from fields to values."
            )
        found.append(row if isinstance(row, Mapping) else dict(zip(_PAIR, row, strict=True)))
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model with its tokenizer and its soft prompts; `load` makes one."""

    base: Pretrained  # architecture, weights and tokenizer
    prompts: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # soft prompts by name, `[length, embed]`
    partitioner: Partitioner = Partitioner()  # where parameters and batches are placed

    @property
    def params(self) -> trees.Tree:
        """`{"model": ..., "prompt": {name: [length, embed]}}`."""
        return {"model": self.base.params} | ({"prompt": dict(self.prompts)} if self.prompts else {})

    def strip(self) -> "Model":
        """The model without its soft prompts."""
        return dataclasses.replace(self, prompts={})

    def generate(
        self, texts: Sequence[str], *, prompt: str | None = None, decoding: Decoding = Decoding(max_tokens=48)
    ) -> list[str]:
        """Generates an output for each text.

        Args:
            texts: inputs.
            prompt: name of the soft prompt to prepend, "" for none; None for the only one, if there is one.
            decoding: greedy, sampled or beam search, and how long; by default an output ends at the end of its first
                line, or after 48 tokens.

        Raises:
            UserError: an unknown soft prompt, several of which none is named, or an input that is too long.
        """
        from promot_jax.evaluation.sampler import Request

        name = self.only_prompt() if prompt is None else prompt
        sampler = self._sampler(decoding)
        outputs = sampler.ask(self.params, [Request(text, name) for text in texts])
        return [sampler.answer(output).strip() for output in outputs]

    def only_prompt(self) -> str:
        """The name of the model's soft prompt, "" where it has none; raises UserError where it has several."""
        if len(self.prompts) > 1:
            raise UserError(f"The model has several soft prompts: name one of {', '.join(sorted(self.prompts))}.")
        return next(iter(self.prompts), "")

    def evaluate(self, task: Task | str, split: str = "test", *, shots: int = 0, limit: int = 500) -> Target:
        """Scores the model on a task, with the soft prompt of the task's name prepended if there is one.

        Args:
            task: a task, or the name of a SeqIO task or mixture that is registered.
            split: to evaluate on.
            shots: exemplars from the training split in front of each input (in-context learning).
            limit: most examples.

        Returns:
            `score` on [0, 100], its 95 % interval `ci95`, `metric` and number of examples `n`.

        Raises:
            UserError: an unknown task or split.
        """
        from promot_jax.data import examples
        from promot_jax.evaluation.evaluator import Evaluator

        name = task if isinstance(task, str) else task.register()
        prompt = name if name in self.prompts else ""
        evaluator = Evaluator(self._sampler(), task=examples.get(f"{name}_{shots}shot" if shots else name).name, icl="")
        return evaluator.target(self.params, split, limit, prompt).entry

    def tune_prompt(
        self,
        task: Task | str,
        *,
        steps: int,
        learning_rate: float,
        batch_size: int = 8,
        length: int = 16,
        init: PromptInit = PromptInit("vocabulary"),
        workdir: str | Path | None = None,
        seed: int = 0,
    ) -> "Model":
        """Stage 1 of ProMoT: trains a new soft prompt for a task, with the model frozen.

        Args:
            task: a task, or the name of a SeqIO task that is registered.
            steps: updates.
            learning_rate: of AdamW, after a warm-up of a tenth of the steps.
            batch_size: rows of an update.
            length: rows of the soft prompt.
            init: how it starts.
            workdir: where checkpoints and curves stay: the same call resumes, and `load` reads the prompt from there;
                None keeps nothing.
            seed: of the data's order and the prompt's start.

        Returns:
            The model with the soft prompt of the step whose validation score is the highest.

        Raises:
            UserError: rows or settings that cannot be used.
        """
        options = {"prompt_length": length, "prompt_init": init, "seed": seed}
        session = self._session(task, options)
        params = {"model": self.base.params, "prompt": fresh_prompt(session, STAGE1)}
        tuned = _run(session, STAGE1, params, _training(steps, learning_rate, batch_size), workdir)
        return dataclasses.replace(self, prompts={**self.prompts, **tuned["prompt"]})

    def tune_model(
        self,
        task: Task | str,
        *,
        steps: int,
        learning_rate: float,
        batch_size: int = 8,
        workdir: str | Path | None = None,
        seed: int = 0,
    ) -> "Model":
        """Stage 2 of ProMoT: trains the model with the task's frozen soft prompt prepended.

        The prompt is the one of the task's name, or else the only one. A model without soft prompts is fine-tuned as
        usual.

        Args:
            task: a task, or the name of a SeqIO task that is registered.
            steps: updates.
            learning_rate: of AdamW, after a warm-up of a tenth of the steps.
            batch_size: rows of an update.
            workdir: where checkpoints and curves stay: the same call resumes, and `load` reads the model from there;
                None keeps nothing.
            seed: of the data's order.

        Returns:
            The model of the step whose validation score is the highest.

        Raises:
            UserError: rows or settings that cannot be used, or several prompts of which none is the task's.
        """
        session = self._session(task, {"seed": seed})
        name = session.experiment.task
        prompt = name if name in self.prompts else self.only_prompt()
        params: trees.Tree = {"model": self.base.params} | ({"prompt": {name: self.prompts[prompt]}} if prompt else {})
        stage = STAGE2 if prompt else FINETUNE
        tuned = _run(session, stage, params, _training(steps, learning_rate, batch_size), workdir)["model"]
        path = self.base.path if workdir is None else str(workdir)
        base = dataclasses.replace(self.base, params=tuned, fingerprint=fingerprint(tuned), path=path)
        return dataclasses.replace(self, base=base)

    def export(
        self, folder: str | Path, formats: Sequence[str] = ("huggingface", "peft"), dtype: str = "float32"
    ) -> list[Path]:
        """Writes the model for other programs, as the job `export` does.

        Args:
            folder: gets `stripped/`, `with_prompts/` and `peft/`, each with a README.md that says how to use it.
            formats: which to write, of "huggingface", "peft" and "t5x".
            dtype: of the Hugging Face folders, "float32" or "bfloat16".

        Returns:
            The folders.

        Raises:
            UserError: a folder that is there already, or a model that a format cannot hold.
        """
        from promot_jax.checkpoints import formats as written
        from promot_jax.checkpoints import run_card

        exported = written.Exported(self.base, self.prompts, dtype=dtype, card=run_card.card_of(self.base.path))
        names = written.folders(formats, prompts=bool(self.prompts))
        return [written.write(Path(folder), name, exported) for name in names]

    def _sampler(self, decoding: Decoding = Decoding()) -> "Sampler":
        from promot_jax.evaluation.sampler import Sampler

        return Sampler(self.base, Evaluation(decoding=decoding), self.partitioner)

    def _session(self, task: Task | str, options: Mapping[str, Any]) -> Session:
        """A session on a task, with room for the longest of its training examples that are looked at."""
        from promot_jax.data import examples, lengths, validation

        name, vocabulary = task if isinstance(task, str) else task.register(), self.base.vocabulary
        parts, continues = examples.task_names(name), self.base.model.continues
        rows = [row for part in parts for row in lengths.measure(part, "train", vocabulary, continues).rows]
        experiment = Experiment(
            checkpoint=self.base.path,
            task=name,
            modules=(),
            feature_lengths={
                "inputs": max(row.inputs for row in rows),
                "targets": max(row.targets for row in rows),
            },
            icl_mixture="",
            dtype=self.base.model.config.dtype,
            partitioner=self.partitioner,
            **options,
        )
        validation.check(parts, parts, ("validation", "test"))
        check_data(experiment)
        return Session(experiment, self.base, self._sampler())


def load(
    path: str,
    *,
    prompt: str | Mapping[str, str] = "",
    dtype: str = "float32",
    vocabulary: str = "",
    config: Config | None = None,
    partitioner: Partitioner = Partitioner(),
) -> Model:
    """Loads a model and its soft prompts.

    Args:
        path: a Hugging Face folder or "org/name" of the hub, a GGUF file, "asset:NAME", a T5X checkpoint, or the folder
            of a finished run.
        prompt: a trained soft prompt: its file, or the folder of the run that trained it; several by name; "" for none.
        dtype: of activations, "float32" or "bfloat16".
        vocabulary: path of the tokenizer, for a checkpoint that carries none (T5X).
        config: sizes, for a checkpoint that carries none (T5X).
        partitioner: where parameters and batches are placed.

    Raises:
        UserError: nothing there, a format that is not read, or a prompt of another model.
    """
    experiment = Experiment(
        checkpoint=path,
        task="",
        modules=(),
        feature_lengths={"inputs": 1, "targets": 1},  # of training, which asks for its own
        icl_mixture="",
        prompt_path=prompt,
        dtype=dtype,
        model=config,
        vocabulary=vocabulary,
        partitioner=partitioner,
    )
    base = load_base(experiment)
    prompts = partitioner.place({"prompt": load_prompts(experiment, base)})["prompt"] if prompt else {}
    return Model(base, prompts, partitioner)


def _training(steps: int, learning_rate: float, batch_size: int) -> Training:
    """AdamW with a warm-up of a tenth of the steps, evaluated and saved four times."""
    optimizer = Optimizer("adamw", learning_rate, warmup_steps=steps // 10, clip_norm=1.0)
    return Training(steps, batch_size, eval_period=max(steps // 4, 1), optimizer=optimizer)


def _run(
    session: Session, stage: Stage, params: trees.Tree, training: Training, workdir: str | Path | None
) -> trees.Tree:
    """Runs a stage in its folder, or in one that is deleted afterwards."""
    with _folder(workdir) as folder:
        return run_stage(session, folder, stage, training, params)


@contextlib.contextmanager
def _folder(workdir: str | Path | None) -> Iterator[Path]:
    if workdir is not None:
        files.check_workdir(Path(workdir))
        yield Path(workdir)
        return
    with tempfile.TemporaryDirectory(prefix="promot_jax-") as folder:
        yield Path(folder)
