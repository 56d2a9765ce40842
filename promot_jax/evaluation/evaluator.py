"""Evaluates a model on SeqIO tasks: reads examples, composes k-shot prompts, generates, post-processes, scores."""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from promot_jax import trees
from promot_jax.data import examples as text
from promot_jax.data.exemplars import choose, compose
from promot_jax.data.task_functions import judge, scores
from promot_jax.data.vocabularies.controls import unmarked
from promot_jax.decoding.output_text import SENTINELS
from promot_jax.errors import UserError, users_code
from promot_jax.evaluation.format_share import format_share
from promot_jax.evaluation.label_likelihood import Judged, accuracies
from promot_jax.evaluation.sampler import Request, Sampler
from promot_jax.progress.items import shown
from promot_jax.results import bootstrap
from promot_jax.results.records import replace
from promot_jax.results.scores import Icl, Output, Score, Target

Params = dict[str, Any]

DRAW_STRIDE = 1_000_003  # between the exemplar seeds of a run's draws, so that no draw is another seed's first one
LONGEST_OF = 1000  # training targets that a task's longest output is estimated from


@dataclasses.dataclass(frozen=True)
class Question:
    """One example as the model is prompted with it."""

    task: str
    example: text.Example
    request: Request
    dropped_shots: int  # exemplars that did not fit


S = TypeVar("S", bound=Score)


@dataclasses.dataclass(frozen=True)
class Scored(Generic[S]):
    """One task's outputs and scores."""

    entry: S  # the score
    rows: list[Output]  # one output per example
    sample: bootstrap.Sample  # what the bootstrap resamples


class _Answer(NamedTuple):
    """One example's output as it is scored."""

    row: Output
    target: Any  # post-processed
    output: Any  # post-processed
    judged: Judged  # of the label set


class Evaluator:
    """Evaluates a fine-tuning task and an ICL mixture with a sampler; parameters are given at each call."""

    def __init__(self, sampler: Sampler, *, task: str, icl: str):
        """Prepares the evaluation.

        Args:
            sampler: model, tokenizer and settings of the evaluation.
            task: the fine-tuning task, whose label set the format share counts; "" for none.
            icl: ICL mixture without the number of shots, or "" for none.
        """
        self._sampler, self._settings, self._vocabulary = sampler, sampler.settings, sampler.base.vocabulary
        self._task, self._icl = task, icl
        self._base = trees.flatten(sampler.base.params)
        self._tuned = sampler.base.fingerprint != sampler.base.base  # by the run that it is loaded from
        self._base_icl: dict[tuple[int, str, int, bool, int], tuple[Icl, list[Output]]] = {}

    def check_queries(self) -> None:
        """Raises UserError for a query longer than inputs may be: before training, not in the evaluation after it.

        Articles, which are cut, are left out.
        """
        settings = self._settings
        evaluations = [(self._task, settings.split, settings.target_examples)]
        evaluations.append((self._task, settings.curve_split, settings.curve_target_examples))
        if self._icl:
            for shots in settings.shots[:1]:
                evaluations.append((f"{self._icl}_{shots}shot", settings.split, settings.examples))
            curve = f"{self._icl}_{settings.curve_shots}shot"
            evaluations.append((curve, settings.curve_split, settings.curve_examples))
        for task, split, limit in evaluations:
            for name in text.task_names(task) if task and limit else ():
                for example in _read(name, split, limit):
                    if not example.suffix:
                        compose(example, [], self._count, settings.max_input_length)

    def _count(self, value: str) -> int:
        return len(self._vocabulary.encode(value))

    def target(self, params: Params, split: str, limit: int, prompt: str | Mapping[str, str] = "") -> Scored[Target]:
        """Scores the fine-tuning task as it is trained on, with its soft prompt prepended if one is named.

        So with no exemplar, or with as many as a k-shot task asks for. A mixture scores its tasks' mean, with the entry
        of each under `tasks`, and its tasks may each name a prompt of their own. Training inputs have no sentinel: only
        the model that no stage has trained, without a soft prompt, gets one.
        """
        names = text.task_names(self._task)
        untrained = self._is_base(params) and not self._tuned
        scored = self._run(params, names, split, limit, prompt=prompt, sentinel=untrained)
        parts = list(scored.values())
        if len(parts) == 1:
            (part,) = parts
            return Scored(Target(task=self._task, **msgspec.structs.asdict(part.entry)), part.rows, part.sample)
        scores = {name: part.entry.score or 0.0 for name, part in scored.items()}
        entry = Target(
            task=self._task,
            metric="norm_avg",
            score=bootstrap.normalized_average(scores),
            ci95=bootstrap.average_interval({name: part.sample for name, part in scored.items()}),
            n=sum(part.entry.n for part in parts),
            tasks={text.base_task(name): part.entry for name, part in scored.items()},
        )
        return Scored(entry, [row for part in parts for row in part.rows], [])

    def icl(
        self,
        params: Params,
        shots: int,
        split: str,
        limit: int,
        prompt: str = "",
        intervals: bool = True,
        draws: int = 1,
    ) -> tuple[Icl, list[Output]]:
        """Scores the ICL mixture at a number of shots, stripped unless a prompt is named.

        `intervals` asks for bootstrap intervals, which take longer than the scores where a user's metric is computed
        anew for each resample. With several `draws` every example is evaluated that often, each time with
        other exemplars; the scores are those of the first.

        Returns:
            The scores, with several draws also those of each, and one output per example and draw.
        """
        entry, rows = self._icl_draw(params, shots, split, limit, prompt, intervals, 0)
        if draws == 1:
            return entry, rows
        scores, drawn = [entry.draw()], [replace(row, draw=0) for row in rows]
        for draw in range(1, draws):
            further, rows = self._icl_draw(params, shots, split, limit, prompt, False, draw)
            scores.append(further.draw())
            drawn += [replace(row, draw=draw) for row in rows]
        return replace(entry, draws=scores), drawn

    def _icl_draw(
        self, params: Params, shots: int, split: str, limit: int, prompt: str, intervals: bool, draw: int
    ) -> tuple[Icl, list[Output]]:
        # Every method starts at the base model: its scores are computed once.
        is_base = not prompt and self._is_base(params)
        key = (shots, split, limit, intervals, draw)
        if is_base and key in self._base_icl:
            return self._base_icl[key]
        names = text.task_names(f"{self._icl}_{shots}shot")
        scored = self._run(params, names, split, limit, prompt=prompt, intervals=intervals, draw=draw)
        tasks = {text.base_task(name): part for name, part in scored.items()}
        samples = {name: part.sample for name, part in tasks.items()}
        rows = [row for part in tasks.values() for row in part.rows]
        entry = Icl.of(
            {name: part.entry for name, part in tasks.items()},
            ci95=bootstrap.average_interval(samples) if intervals else None,
            dropped_shots=sum(row.dropped_shots for row in rows),
        )
        found = entry, rows
        if is_base:
            self._base_icl[key] = found
        return found

    def _is_base(self, params: Params) -> bool:
        model = trees.flatten(params["model"])
        return all(model[path] is leaf for path, leaf in self._base.items())

    def _run(
        self,
        params: Params,
        names: Sequence[str],
        split: str,
        limit: int,
        *,
        prompt: str | Mapping[str, str],
        intervals: bool = True,
        draw: int = 0,
        sentinel: bool | None = None,
    ) -> dict[str, Scored[Score]]:
        """Asks all tasks at once, so that their prompts share batches, and scores each; `draw` chooses exemplars.

        `sentinel` says whether tasks without a prompt end with one, the others not; None: all do.
        """
        questions: list[Question] = []
        for name in names:
            task_prompt = prompt if isinstance(prompt, str) else prompt.get(name, "")
            with_sentinel = sentinel is None or (sentinel and not task_prompt)
            questions += self._questions(name, split, limit, task_prompt, draw, with_sentinel)
        waiting = collections.Counter(question.task for question in questions)
        answers: dict[int, _Answer] = {}
        scored: dict[str, Scored[Score]] = {}
        requests = [question.request for question in questions]
        stream = self._sampler.stream(params, requests)
        with contextlib.closing(shown(stream, len(questions), _listed(names))) as outputs:
            for index, raw, likelihoods in outputs:
                question = questions[index]
                answers[index] = self._judged(question, raw, likelihoods)
                waiting[question.task] -= 1
                if not waiting[question.task]:  # all of its outputs are there; the device goes on with other tasks
                    of_task = [answers[i] for i, other in enumerate(questions) if other.task == question.task]
                    scored[question.task] = self._score(question.task, of_task, intervals)
        return {name: scored[name] for name in names}

    def _questions(self, name: str, split: str, limit: int, prompt: str, draw: int, sentinel: bool) -> list[Question]:
        settings = self._settings
        seed = settings.exemplar_seed + draw * DRAW_STRIDE
        examples = _read(name, split, limit)
        if not examples:
            raise UserError(f"Task {name!r} has no example in its split {split!r}.")
        # Sentinels stand around the answer.
        steps = _longest_output(self._vocabulary, name) + (len(SENTINELS) if settings.sentinel else 0)
        once = settings.exemplars == "per_task"
        evaluated = frozenset(example.inputs for example in examples) if once else frozenset()
        questions = []
        for example in examples:
            if once:
                chosen = _task_exemplars(name, seed, evaluated, example.shots)
            else:
                chosen = _exemplars(name, seed, example.id, example.inputs, example.shots)
            composed, dropped = compose(example, chosen, self._count, settings.max_input_length)
            group = f"{name} {dropped}" if once else ""  # what starts with another exemplar shares nothing
            labels = tuple(label.strip() for label in example.labels) if settings.likelihood else ()
            request = Request(composed, prompt, steps, group, sentinel, labels)
            questions.append(Question(name, example, request, dropped))
        return questions

    def _judged(self, question: Question, raw: str, likelihoods: dict[str, float]) -> _Answer:
        example, request, dropped = question.example, question.request, question.dropped_shots
        prompt = unmarked(request.text)
        judged = judge(text.get(question.task), example, self._sampler.answer(raw))
        row = Output(
            task=text.base_task(question.task),
            id=example.id,
            shots=example.shots,
            dropped_shots=dropped,
            input=prompt,
            query=len(prompt) - len(unmarked(example.inputs)) if dropped < example.shots else 0,
            target=judged.target,
            raw=raw,
            output=judged.output,
            score=judged.score,
            likelihoods={**likelihoods},
            statistics=judged.statistics,
        )
        return _Answer(row, judged.target, judged.output, (likelihoods, example.targets.strip()))

    def _score(self, name: str, answers: Sequence[_Answer], intervals: bool) -> Scored[Score]:
        task, rows = text.get(name), [answer.row for answer in answers]
        targets, answered = [answer.target for answer in answers], [answer.output for answer in answers]
        metrics = scores(task, targets, answered)
        metric = next(iter(metrics))
        sample = bootstrap.Outputs(targets, answered, task.metric_fns[0])
        with users_code(f"Metric {metric!r} of task {name!r}, computed anew for part of the examples,"):
            ci95 = bootstrap.interval(sample) if intervals else None
        share = None if self._shares_labels(name) else format_share([str(answer) for answer in answered], self._labels)
        entry = Score(
            metric=metric,
            score=metrics[metric],
            ci95=ci95,
            n=len(rows),
            format_share=share,
            metrics={**metrics},
            **accuracies([answer.judged for answer in answers]),
        )
        return Scored(entry, rows, sample)

    @functools.cached_property
    def _labels(self) -> frozenset[str]:
        """The fine-tuning task's label set, over all tasks of a mixture."""
        return frozenset().union(*map(_labels_of, text.task_names(self._task))) if self._task else frozenset()

    def _shares_labels(self, name: str) -> bool:
        """Whether a task's own answers are among the fine-tuning task's labels: they are right, and no collapse."""
        return format_share([*_labels_of(name)], self._labels) not in (None, 0.0)


def _listed(names: Sequence[str]) -> str:
    """Names of tasks for a line on the screen."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


@functools.lru_cache(maxsize=128)
def _labels_of(name: str) -> frozenset[str]:
    """A task's label set, which every example names; none of an open task."""
    first = text.read(name, "train", within=1)
    return frozenset(label for example in first for label in example.labels)


@functools.lru_cache(maxsize=128)
def _read(name: str, split: str, limit: int | None) -> list[text.Example]:
    """`text.read`, once per process: the same examples are evaluated at every checkpoint."""
    return text.pool(name, limit) if split == text.EXEMPLARS else text.read(name, split, limit=limit)


@functools.lru_cache(maxsize=100_000)
def _exemplars(name: str, seed: int, example_id: str, inputs: str, shots: int) -> list[text.Example]:
    """Exemplars of one example, once per process: a pool of thousands takes a while to rank."""
    pool = _read(name, text.EXEMPLARS, None) if shots else []
    return choose(text.base_task(name), seed, example_id, pool, shots, inputs)


@functools.lru_cache(maxsize=128)
def _task_exemplars(name: str, seed: int, evaluated: frozenset[str], shots: int) -> list[text.Example]:
    """Exemplars that all examples of a task share: of the training examples whose inputs are not evaluated."""
    pool = _read(name, text.EXEMPLARS, None) if shots else []
    return choose(text.base_task(name), seed, "", [each for each in pool if each.inputs not in evaluated], shots)


@functools.lru_cache(maxsize=128)
def _longest_output(vocabulary: Any, name: str) -> int:
    """Room for a task's outputs in tokens: half as much again as its longest training target, never those evaluated."""
    longest = max(
        (len(vocabulary.encode(example.targets)) for example in _read(name, text.EXEMPLARS, LONGEST_OF)), default=1
    )
    return longest + longest // 2 + 2
