"""Job `inspect_data`: shows what a run would be trained on, without loading its model."""

from pathlib import Path

from promot_jax import files
from promot_jax.errors import UserError
from promot_jax.experiments.data_check import report, with_lengths
from promot_jax.experiments.session import check_rows, text_of
from promot_jax.experiments.settings import Experiment


def inspect_data(workdir: Path, experiment: Experiment, show: int = 10) -> None:
    """Job: prints examples of the training task as the model reads them, with their lengths, and what is left out.

    Args:
        workdir: gets `examples.jsonl`, the examples shown.
        experiment: data, and the model whose tokenizer counts.
        show: number of examples of each task.

    Raises:
        UserError: data that cannot be used, or an experiment without a task.
    """
    if not experiment.task:
        raise UserError("There is nothing to show: set DATA or MIXTURE_OR_TASK_NAME.")
    check_rows([experiment])
    from promot_jax.data.encoding import Encoder, joined
    from promot_jax.data.examples import read, task_names
    from promot_jax.data.exemplars import WithExemplars
    from promot_jax.data.vocabularies.controls import unmarked

    text = text_of(experiment)
    experiment = with_lengths(experiment, text)
    limits, encoder = experiment.lengths, Encoder.of(text.vocabulary, continues=text.continues)
    rows = []
    for task in task_names(experiment.task):
        chosen = iter(read(task, "train", limit=show))
        stream = WithExemplars(chosen, experiment.seed, lambda value: len(encoder.inputs(value)), limits["inputs"])
        for number, example in enumerate(stream, 1):
            tokens = encoder.tokens(example)
            sizes = {"inputs": len(tokens.inputs), "targets": len(tokens.targets)}
            fits = all(sizes[key] <= limits[key] for key in sizes)
            row = {"task": task, "id": example.id, "input": unmarked(example.inputs), "target": example.targets}
            rows.append({**row, "tokens": sizes, "left_out": not fits})
            ends = "" if fits else ", longer than TASK_FEATURE_LENGTHS: left out"
            print(
                f"\n---- {task}, example {number}: {sizes['inputs']} input and {sizes['targets']} target tokens{ends}"
            )
            print(f"{unmarked(joined(example.inputs, f'[[{example.targets}]]'))}", flush=True)
    files.write_rows(workdir / "examples.jsonl", rows)
    print("\nTargets stand between [[ and ]]. The soft prompt comes before all this.\n", flush=True)
    report(experiment, text)
