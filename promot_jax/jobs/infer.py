"""Job `infer`: generates for inputs of a file or the command line."""

import json
import os
import re
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from promot_jax import files, trees
from promot_jax.decoding.settings import Decoding
from promot_jax.distributed import hosts
from promot_jax.errors import UserError, half_character
from promot_jax.experiments.initial_params import saved_prompts
from promot_jax.experiments.session import open_session
from promot_jax.experiments.settings import Experiment
from promot_jax.report.terminal import printable
from promot_jax.results.provenance import commit, versions


def infer(workdir: Path, experiment: Experiment, inputs: str | Sequence[str]) -> None:
    """Job: text in, text out.

    Args:
        workdir: gets `outputs.jsonl`: input, prompt, raw output and the output up to its first line's end, per line.
        experiment: model and prompts.
        inputs: texts; or one, with white space in it; or a file, "-" for standard input: plain text with one input per
            line, or (`.jsonl`, or standard input that starts with `{"input"`) `{"input": ..., "prompt": name}` per
            line. Without "prompt" an input gets the first soft prompt of `prompt_path`, with "prompt": "" none.

    Raises:
        UserError: no such file, a malformed line, or an unknown prompt.
    """
    started = time.monotonic()
    if isinstance(inputs, str):
        texts = hosts.decide(partial(_inputs, inputs), "the inputs")
    else:
        texts = [(text, None) for text in inputs]
    for number, (text, _) in enumerate(texts, 1):
        if problem := half_character(text):
            raise UserError(f"Input {number} {problem}.")
    session = open_session(experiment, reads_data=False)
    from promot_jax.evaluation.sampler import Request

    params: trees.Tree = {"model": session.base.params}
    if experiment.prompt_path:
        params["prompt"] = saved_prompts(session)
    default = next(iter(params.get("prompt", {})), "")
    print(_announced(default, experiment.evaluation.decoding), flush=True)
    requests = [Request(text, default if prompt is None else prompt) for text, prompt in texts]
    outputs = session.sampler.ask(params, requests)
    answers = [session.sampler.answer(output).strip() for output in outputs]
    rows = [
        {"input": request.text, "prompt": request.prompt, "raw": output, "output": answer}
        for request, output, answer in zip(requests, outputs, answers, strict=True)
    ]
    files.write_rows(workdir / "outputs.jsonl", rows)
    summary = {"job": "infer", "model": experiment.checkpoint, "base": session.base.base, "n": len(rows)}
    summary |= {"seconds": time.monotonic() - started, "versions": versions(), "commit": commit()}
    files.write(summary, workdir / "results.json")
    for row in rows:
        print(printable(f"{row['prompt'] or '-'} | {row['input']} -> {row['output']}"), flush=True)


def _announced(prompt: str, decoding: Decoding) -> str:
    """What an output is of, and where it ends."""
    applied = f"Inputs that name no soft prompt have that of {prompt!r} prepended." if prompt else "No soft prompt."
    stop = f"at {decoding.stop!r} or " if decoding.stop else ""
    return f"{applied} Outputs end {stop}after {decoding.max_tokens} tokens (Decoding.stop, Decoding.max_tokens)."


def _inputs(path: str) -> list[tuple[str, str | None]]:
    """Reads the inputs: texts, each with the name of its prompt where the file gives one."""
    if any(map(str.isspace, path)) and not os.path.exists(path):
        return [(path, None)]
    try:
        whole = sys.stdin.read() if path == "-" else Path(path).read_text("utf-8")
        whole = re.sub("^\ufeff", "", whole, flags=re.MULTILINE)  # byte order marks, also of files that were joined
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read the inputs in {path!r}: {error}.") from error
    lines = whole.removesuffix("\n").split("\n") if whole else []  # splitlines() would cut at U+2028 within a text
    if not path.endswith(".jsonl") and not (path == "-" and whole.startswith('{"input"')):
        return [(line, None) for line in lines if line]
    texts: list[tuple[str, str | None]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, prompt = row["input"], row.get("prompt")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            text = prompt = None
        if not isinstance(text, str) or not isinstance(prompt, str | None):
            raise UserError(f'{path} line {number} is not {{"input": text, "prompt": name}}.')
        texts.append((text, prompt))
    return texts
