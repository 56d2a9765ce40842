"""The few-shot prompts that both sides generate for: those of the ICL evaluation, in a file of JSON lines."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import FOLDER, run_process
from promot_jax import files

SHOTS = 4


def ensure(folder: Path, examples: int, exemplars: str = "per_example") -> Path:
    """The file of prompts of the demo's ICL tasks, made unless it is there.

    Args:
        folder: of the model, whose tokenizer decides how many exemplars fit.
        examples: per task.
        exemplars: how they are drawn (`Evaluation.exemplars`).
    """
    path = FOLDER / f"prompts_{folder.name}_{examples}_{exemplars}.jsonl"
    if not path.is_file():
        settings = {"folder": str(folder), "examples": examples, "exemplars": exemplars, "out": str(path)}
        run_process("benchmarks.prompts:write", settings)
    return path


def read(path: str) -> list[dict[str, Any]]:
    """The prompts: `text`, and `limit`, the longest output in tokens that the evaluation gives it room for."""
    import json

    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def write(folder: str, examples: int, exemplars: str, out: str) -> dict[str, float]:
    """Lets the evaluation compose its prompts for a sampler that only writes them down."""
    from promot_jax.decoding.settings import Decoding
    from promot_jax.evaluation.evaluator import Evaluator
    from promot_jax.evaluation.sampler import Reply, Request, Sampler
    from promot_jax.evaluation.settings import Evaluation
    from promot_jax.experiments.session import open_session
    from promot_jax.experiments.settings import Experiment

    recorded: list[Request] = []

    class Recorder(Sampler):
        def stream(self, params: Any, requests: Any) -> Iterator[Reply]:
            recorded.extend(requests)
            return (Reply(index, "", {}) for index in range(len(requests)))

    settings = Evaluation(examples=examples, shots=(SHOTS,), decoding=Decoding(max_tokens=48), exemplars=exemplars)
    experiment = Experiment(
        folder, "", "promot_jax.tasks.demo", {"inputs": 48, "targets": 2}, "demo_icl", evaluation=settings
    )
    session = open_session(experiment)
    recorder = Recorder(session.base, settings, experiment.partitioner)
    params = {"model": session.base.params}
    Evaluator(recorder, task="", icl="demo_icl").icl(params, SHOTS, "test", examples, intervals=False)
    rows = [{"text": one.text, "limit": min(one.limit, settings.decoding.max_tokens)} for one in recorded]
    files.write_rows(out, rows)
    return {"prompts": len(rows)}
