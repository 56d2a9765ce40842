"""Job `chat`: what several models answer to an input that is typed, one below the other."""

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from promot_jax import trees
from promot_jax.distributed import hosts
from promot_jax.errors import UserError, half_character
from promot_jax.experiments.initial_params import saved_prompts
from promot_jax.experiments.session import Session, open_session
from promot_jax.experiments.settings import Experiment
from promot_jax.params import soft_prompts
from promot_jax.report.terminal import printable

_LINE_BREAK = "\\n"  # typed for a line break within an input


class _Model(NamedTuple):
    label: str
    session: Session
    params: trees.Tree
    prompt: str  # name of its soft prompt, "" for none


def chat(workdir: Path, experiment: Experiment, models: Mapping[str, str]) -> None:
    """Job: reads inputs from the terminal, a line each, and prints what each model answers, until an empty line.

    A model whose run trained a soft prompt answers twice: with the prompt prepended, and stripped.

    Args:
        workdir: gets nothing.
        experiment: how outputs are decoded; its checkpoint is not used.
        models: label to checkpoint, as `INITIAL_CHECKPOINT_PATH` takes it.

    Raises:
        UserError: no model, several hosts, or a model that cannot be loaded.
    """
    if not models:
        raise UserError("There is no model to chat with: set MODELS, as in gin/chat.gin.")
    if hosts.count() > 1:
        raise UserError("A chat runs on one host.")
    loaded = [_load(experiment, label, path) for label, path in models.items()]
    if plain := [model.label for model in loaded if not model.prompt]:
        print(f"Without a soft prompt in their folder: {', '.join(plain)}.", flush=True)
    width = max(len(label) for label, *_ in loaded)
    print(f"Type an input, {_LINE_BREAK} for a line break in it. An empty line ends the chat.", flush=True)
    for text in _typed():
        if problem := half_character(text):
            print(f"The input {problem}.", flush=True)
            continue
        for model in loaded:
            for name in dict.fromkeys((model.prompt, "")):
                try:
                    answer = _answer(model, text, name)
                except UserError as error:  # an input that is too long
                    answer = f"({error})"
                print(f"  {model.label:{width}} {_kind(model, name):15} {answer}", flush=True)


def _load(experiment: Experiment, label: str, path: str) -> _Model:
    prompted = _has_prompt(path)
    own = dataclasses.replace(experiment, checkpoint=path, prompt_path=path if prompted else "")
    session = open_session(own, reads_data=False)
    params: trees.Tree = {"model": session.base.params}
    if prompted:
        params["prompt"] = saved_prompts(session)
    return _Model(label, session, params, next(iter(params.get("prompt", {})), ""))


def _has_prompt(path: str) -> bool:
    """Whether a run's folder holds a soft prompt."""
    if not Path(path).is_dir():
        return False
    try:
        soft_prompts.array_path(path)
    except UserError:
        return False
    return True


def _answer(model: _Model, text: str, prompt: str) -> str:
    from promot_jax.data.vocabularies.controls import unmarked
    from promot_jax.evaluation.sampler import Request

    ((_, raw, _),) = model.session.sampler.stream(model.params, [Request(unmarked(text), prompt)])
    return printable(model.session.sampler.answer(raw).strip())


def _kind(model: _Model, prompt: str) -> str:
    if not model.prompt:
        return ""
    return "with its prompt" if prompt else "stripped"


def _typed() -> Iterator[str]:
    """The inputs, until an empty line or the end of the input."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        try:
            line = sys.stdin.readline().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"The input is not UTF-8: {error}.") from error
        if not line:
            return
        yield line.replace(_LINE_BREAK, "\n")
