"""What a user can run: a stage, a method, methods compared, ICL evaluation, inference, export, gradient alignment.

Jobs are plain functions of plain settings; `main` binds them from gin files.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from promot_jax import compare as comparison
from promot_jax import hosts, results, runs, stages, trees
from promot_jax.errors import UserError, nearest
from promot_jax.experiment import Experiment
from promot_jax.grid import Grid
from promot_jax.train import Training
from promot_jax.tuning import Tuning, require

Json = dict[str, Any]


def train_stage(workdir: Path, experiment: Experiment, stage: str, training: Training) -> None:
    """Job: trains one stage and evaluates what it leaves.

    Args:
        workdir: of the run.
        experiment: model and data; stage 2 takes its prompt, or one for each task of a mixture, from `prompt_path`.
        stage: "stage1" (prompt tuning), "stage2" (model tuning behind frozen prompts), "finetune", or another one that
            is a whole method.
        training: how.

    Raises:
        UserError: an unknown stage, a stage 2 without a prompt, or a rival without the setting that makes it one.
    """
    plan = {stages.STAGE2.name: ("promot", stages.STAGE2)}
    for name, all_ in stages.METHODS.items():
        if len(all_) == 1:
            plan.setdefault(all_[0].name, (name, all_[0]))
    if stage not in plan:
        raise UserError(f"Unknown stage {stage!r}{nearest(stage, plan)}.")
    method, chosen = plan[stage]
    require(chosen, training)
    if chosen is stages.STAGE2 and not experiment.prompt_path:
        raise UserError("Stage 2 needs a trained prompt: set PROMPT_PATH to a prompt.npy or to stage 1's folder.")
    session = runs.open_session(experiment)
    session.evaluator.check_queries()
    if chosen is stages.STAGE2:
        params = {"model": session.base.params, "prompt": runs.task_prompts(session)}
    else:
        params = runs.start(session, [chosen], training.lora)
    params = runs.run_stage(session, workdir, chosen, training, params)
    run = hosts.decide(lambda: _earlier(workdir, method), "an earlier run")
    if run is None:
        shape, keeps = training.lora, chosen.keeps_lora
        run = runs.close(session, workdir, method, params, {stage: workdir}, shape=shape, keeps_lora=keeps)
    for key, value in runs.settings_of(experiment).items():
        if (was := run["settings"].get(key, runs.YOUNGER.get(key))) != value:
            raise UserError(
                f"{workdir} was evaluated with {key} = {was}, now it is {value}: give another --workdir, or delete its "
                "results.json to evaluate it again."
            )
    _print_table([run])


def promot(workdir: Path, experiment: Experiment, tuning: Tuning) -> None:
    """Job: ProMoT end to end: pretrained evaluation, stage 1, stage 2, strip, evaluation, report."""
    session = runs.open_session(experiment)
    finished = [
        runs.run_method(session, workdir / "pretrained", "pretrained", tuning),
        runs.run_method(session, workdir, "promot", tuning),
    ]
    _report(workdir, finished)


def train_method(workdir: Path, experiment: Experiment, tuning: Tuning, method: str) -> None:
    """Job: one method end to end: its stages, strip, evaluation, report.

    Args:
        workdir: of the run; each stage has a folder in it.
        experiment: model and data.
        tuning: settings of the stages.
        method: a key of `stages.METHODS`.
    """
    stages.method(method)
    session = runs.open_session(experiment)
    _report(workdir, [runs.run_method(session, workdir, method, tuning)])


def compare(
    workdir: Path,
    experiment: Experiment,
    tuning: Tuning,
    methods: Sequence[str],
    seeds: int | Sequence[int] = (0,),
    learning_rates: Mapping[str, Sequence[float]] | None = None,
    strengths: Mapping[str, Sequence[float]] | None = None,
    tasks: Mapping[str, Mapping[str, int]] | None = None,
    wait: bool = True,
    stale: float = 600.0,
    report: str = "",
    margin: float = 0.0,
    serve: int | None = None,
) -> None:
    """Job: runs tasks x seeds x methods x settings, each cell in a folder of its own, and reports them.

    Safe to kill and run again: finished cells are kept, the others go on where they stopped. The same command on
    further machines that share the folder takes on cells that nobody works on.

    Args:
        workdir: of the comparison. A cell lies in `<method>/seed_<seed>`; with tasks in a folder of each task, with
            settings to try in one of each: `<task>/<method>/lr_<rate>/seed_<seed>`.
        experiment: model and data; its seed is replaced by each of `seeds`, the exemplars' seed too.
        tuning: settings of the stages, the same for every method.
        methods: keys of `stages.METHODS`; with `_1shot` behind, trained with one exemplar in front of every input, in
            inputs with room for another input and a target.
        seeds: one or several.
        learning_rates: to try, by kind of stage: `{"prompt": (0.1, 0.2), "model": (1e-4, 1e-3)}`; further kinds are
            "lora_optimizer" and, where `tuning` has it, "joint_prompt". A method with both kinds runs with every pair.
        strengths: to try, of what sets rivals apart: `{"l2sp": (0.01, 0.1), "kl": (0.1, 1.0), "freeze": (15, 20)}`. Of
            each method the settings that are best on the validation split are reported; all are written down.
        tasks: to fine-tune on, each with its `feature_lengths` (`{}` for the experiment's); None for the experiment's.
        wait: at the end for cells that run elsewhere; otherwise they are reported as running.
        stale: seconds without a sign of life after which the cell of another machine is taken over.
        report: folder in `workdir` for results and report, "" for `workdir` itself: comparisons of other methods or
            seeds over the same cells each have their own.
        margin: settings are chosen by target score; of those at most so many points below the best, by ICL.
        serve: port of this machine on which `report.html` is served while cells run; None serves nothing.
    """
    wanted = [seeds] if isinstance(seeds, int) else list(seeds)
    rates, others = learning_rates or {}, strengths or {}
    if twice := sorted({*rates} & {*others}):
        raise UserError(f"LEARNING_RATES and STRENGTHS both name {', '.join(twice)}.")
    varied = {**rates, **others}
    grid = Grid(workdir, experiment, tuning, list(methods), wanted, varied, tasks or {}, report, margin)
    comparison.run(grid, wait, stale, serve)


def icl_eval(workdir: Path, experiment: Experiment, icl_prompt: str | None = None) -> None:
    """Job: evaluates a model on the fine-tuning task and on in-context learning, behind prompts where they are given.

    Args:
        workdir: of the evaluation.
        experiment: model, data and prompts. A single prompt stands in front of everything; of several by name each
            stands in front of its own task of the training mixture, as in the closing evaluation of a run.
        icl_prompt: name of the prompt that the ICL tasks stand behind, "" for none; None for the only one there is.

    Raises:
        UserError: of several prompts none is chosen for the ICL tasks, or one that is not there.
    """
    given = experiment.prompt_path
    names = () if isinstance(given, str) else tuple(given)
    if icl_prompt is None and len(names) > 1 and experiment.icl_mixture:
        raise UserError(
            f"PROMPT_PATH names several prompts ({', '.join(names)}): set ICL_PROMPT to the one that the ICL tasks "
            'stand behind, or to "" for none.'
        )
    hosts.decide(lambda: _earlier(workdir, "icl_eval"), "an earlier run")
    session = runs.open_session(experiment)
    params: trees.Tree = {"model": session.base.params}
    name = ""
    target: str | Mapping[str, str] = ""
    if given:
        by_task = names and experiment.task
        params["prompt"] = runs.task_prompts(session) if by_task else runs.saved_prompts(session)
        target = name = next(iter(params["prompt"]))
        if by_task:
            target = runs.prompts_of_tasks(experiment, params["prompt"])
    if icl_prompt and icl_prompt not in params.get("prompt", {}):
        raise UserError(f"ICL_PROMPT is {icl_prompt!r}, which is none of the prompts in PROMPT_PATH.")
    chosen = name if icl_prompt is None else icl_prompt
    run = runs.evaluate(session, workdir, "icl_eval", params, target_prompt=target, icl_prompt=chosen, stages={})
    _print_table([run])


def infer(workdir: Path, experiment: Experiment, inputs: str | Sequence[str]) -> None:
    """Job: text in, text out.

    Args:
        workdir: gets `outputs.jsonl`: input, prompt, raw output and the output up to its first line's end, per line.
        experiment: model and prompts.
        inputs: texts; or a file, "-" for standard input: plain text with one input per line, or (`.jsonl`)
            `{"input": ..., "prompt": name}` per line. Without "prompt" an input stands behind the first of the
            prompts in `prompt_path`, with "prompt": "" behind none.

    Raises:
        UserError: no such file, a malformed line, or an unknown prompt.
    """
    from promot_jax.evaluation import Request, write_rows

    started = time.monotonic()
    if isinstance(inputs, str):
        asked = hosts.decide(partial(_inputs, inputs), "the inputs")
    else:
        asked = [(text, None) for text in inputs]
    session = runs.open_session(experiment)
    params: trees.Tree = {"model": session.base.params}
    if experiment.prompt_path:
        params["prompt"] = runs.saved_prompts(session)
    default = next(iter(params.get("prompt", {})), "")
    requests = [Request(text, default if prompt is None else prompt) for text, prompt in asked]
    outputs = session.evaluator.ask(params, requests)
    answers = [session.evaluator.answer(output).strip() for output in outputs]
    rows = [
        {"input": request.text, "prompt": request.prompt, "raw": output, "output": answer}
        for request, output, answer in zip(requests, outputs, answers, strict=True)
    ]
    write_rows(workdir / "outputs.jsonl", rows)
    summary = {"job": "infer", "model": experiment.checkpoint, "base": session.base.base, "n": len(rows)}
    summary |= {"seconds": time.monotonic() - started, "versions": results.versions(), "commit": results.commit()}
    results.write(summary, workdir / "results.json")
    for row in rows:
        print(_printable(f"{row['prompt'] or '-'} | {row['input']} -> {row['output']}"), flush=True)


def export(
    workdir: Path, experiment: Experiment, dtype: str = "float32", formats: Sequence[str] = ("huggingface", "t5x")
) -> None:
    """Job: writes a model in the formats of others: stripped, and with its prompts as tokens where there are any.

    Args:
        workdir: gets `stripped/` and, with prompts, `with_prompts/` (Hugging Face folders), and `t5x/checkpoint_0`;
            none of them may be there already.
        experiment: model and prompts (`prompt_path`).
        dtype: of the Hugging Face folders, "float32" or "bfloat16"; T5X checkpoints are float32.
        formats: which to write, of "huggingface" and "t5x".

    Raises:
        UserError: an unknown format, a folder that is there already, or a model that a format cannot hold.
    """
    from promot_jax.convert import export as folders
    from promot_jax.convert import t5x

    started = time.monotonic()
    for name in formats:
        if name not in ("huggingface", "t5x"):
            raise UserError(f"Unknown export format {name!r}{nearest(name, ('huggingface', 't5x'))}.")
    if hosts.count() > 1:
        raise UserError("An export runs on one host, which holds the whole model in memory: start it there alone.")
    wanted = {"stripped": "huggingface", "with_prompts": "huggingface", "t5x": "t5x"}
    targets = [workdir / name for name, kind in wanted.items() if kind in formats]
    targets = [target for target in targets if experiment.prompt_path or target.name != "with_prompts"]
    for target in targets:  # before the model is read
        if target.exists():
            raise UserError(f"{target} exists already; delete it, or give another --workdir.")
    base = runs.load_base(experiment)
    prompts = runs.load_prompts(experiment, base) if experiment.prompt_path else {}
    for target in targets:
        if target.name == "t5x":
            t5x.write(target, 0, base.params)
        else:
            folders.write(target, base, prompts if target.name == "with_prompts" else None, dtype)
        print(f"{target}: {trees.count(base.params):,} parameters.", flush=True)
    summary: Json = {"job": "export", "model": experiment.checkpoint, "base": base.base, "dtype": dtype}
    summary |= {"fingerprint": base.fingerprint, "prompts": {name: len(rows) for name, rows in prompts.items()}}
    summary |= {"seconds": time.monotonic() - started, "versions": results.versions(), "commit": results.commit()}
    results.write(summary, workdir / "results.json")


def gradient_alignment(
    workdir: Path, experiment: Experiment, run: str, steps: Sequence[int] | int = (0,), batches: int = 8
) -> None:
    """Job: how far a stage's gradients depend on which input has which target (paper, figures 3 and 7).

    Args:
        workdir: gets `results.json` and `gradient_alignment.svg`. As `<comparison>/analyses/<name>` it becomes part of
            the comparison's report.
        experiment: modules of the tasks, and the mesh; model, task and seed are the run's own.
        run: folder of the stage, finished or running (`runs/demo/finetune/seed_0/finetune`).
        steps: those looked at, whose checkpoints were kept (`Training.keep_period`); 0 is before the first update.
        batches: of the run's own, from the first one on.

    Raises:
        UserError: not a stage's folder, a checkpoint that was not kept, or a workdir of other results.
    """
    from promot_jax import charts, figures, revisit
    from promot_jax.analysis import gradient_alignment as alignment

    wanted = [steps] if isinstance(steps, int) else list(steps)
    if not wanted or min(wanted) < 0 or len(set(wanted)) < len(wanted) or batches < 1:
        raise UserError(f"Gradient alignment needs batches and steps, each step once, not {batches} at {wanted}.")
    if hosts.decide((workdir / "results.json").exists, "earlier results"):
        raise UserError(f"{workdir} holds results already; delete it, or give another --workdir.")
    started = time.monotonic()
    opened = revisit.open_stage(Path(run), experiment)
    found = alignment.along(opened, wanted, batches)
    found |= {"seconds": time.monotonic() - started, "versions": results.versions(), "commit": results.commit()}
    results.write(found, workdir / "results.json")
    for chart in figures.gradient_alignment(found):
        results.write_text(workdir / f"{chart.name}.svg", charts.document(chart))


def _inputs(path: str) -> list[tuple[str, str | None]]:
    """Reads what to ask: texts, each with the name of its prompt where the file gives one."""
    try:
        whole = sys.stdin.read() if path == "-" else Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read the inputs in {path!r}: {error}.") from error
    lines = whole.removesuffix("\n").split("\n") if whole else []  # splitlines() would cut at U+2028 within a text
    if not path.endswith(".jsonl"):
        return [(line, None) for line in lines if line]
    asked: list[tuple[str, str | None]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            text, prompt = row["input"], row.get("prompt")
        except (ValueError, KeyError, TypeError, AttributeError):
            text = prompt = None
        if not isinstance(text, str) or not isinstance(prompt, str | None):
            raise UserError(f'{path} line {number} is not {{"input": text, "prompt": name}}.')
        asked.append((text, prompt))
    return asked


def _printable(text: str) -> str:
    """Text for a terminal: control characters, which could move the cursor or worse, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def _earlier(workdir: Path, method: str) -> Json | None:
    """The finished run in a folder, if there is one; that of another method is not to be written over."""
    if not (workdir / "results.json").is_file():
        return None
    run = results.read(workdir)
    if run.get("method") != method:
        raise UserError(f"{workdir} holds results of {run.get('method', 'a comparison')!r}; give another --workdir.")
    return run


def _print_table(finished: Sequence[Json]) -> None:
    from promot_jax import report

    print("\n" + report.table(results.comparison(finished)), flush=True)


def _report(workdir: Path, finished: Sequence[Json]) -> None:
    from promot_jax import report

    if not hosts.is_writer():
        return
    _print_table(finished)
    print(f"\nReport: {report.write(results.comparison(finished), workdir)}", flush=True)
