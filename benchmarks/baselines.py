"""The timed work of the other programs: PyTorch with transformers and peft, and lm-eval. See `ours`.

They get their best settings: all cores, sdpa attention, a fused optimizer, no gradient checkpointing, no padding mask
where nothing is padded, batches sorted by length. What has to be tried (torch.compile, batch sizes) the questions race.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.memory import Peak
from benchmarks.ours import loaded
from benchmarks.prompts import read
from benchmarks.steps import FIRST_PROMPT_ID, WARM_UP, drawn_rows

Measures = dict[str, float]
IGNORED = -100  # label of positions without a loss


def train_step(
    folder: str,
    stage: str,
    rows: int,
    prompt: int,
    inputs: int,
    targets: int,
    steps: int,
    compiled: bool = False,
    target_logits: bool = False,
    bfloat16: bool = False,
) -> Measures:
    """Median seconds of an update: peft's prompt tuning in "stage1", else full fine-tuning with transformers.

    Args:
        folder: of the model.
        stage: "stage1", "stage2" (with fixed prompt embeddings prepended) or "finetune".
        rows: of the batch, each full.
        prompt: rows of the soft prompt, 0 for none.
        inputs: tokens per row, without the prompt.
        targets: tokens per row.
        steps: measured updates.
        compiled: whether torch.compile is used.
        target_logits: whether the head computes the targets' logits only, in a loss written by hand, which neither
            peft nor the Trainer offers.
        bfloat16: whether products are in bfloat16 (autocast).
    """
    import torch

    _all_cores()
    model = _model(folder)
    vocab = model.config.vocab_size
    peak = Peak()
    rows_of_prompt = model.get_input_embeddings().weight[FIRST_PROMPT_ID : FIRST_PROMPT_ID + prompt].detach().clone()
    loss, trained = _loss(model, stage, rows_of_prompt, target_logits)
    if compiled:
        loss = torch.compile(loss)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    autocast = torch.autocast("cpu", torch.bfloat16) if bfloat16 else contextlib.nullcontext()
    seconds, losses = [], []
    for ids, answers in _first(WARM_UP + steps, drawn_rows(vocab, rows, inputs, targets)):
        began = time.perf_counter()
        with autocast:
            value = loss(torch.from_numpy(ids), torch.from_numpy(answers))
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(value.item())
        seconds.append(time.perf_counter() - began)
        print(f"step {len(losses)}: loss {losses[-1]:.5f}", flush=True)
    return {"seconds": float(np.median(seconds[WARM_UP:])), "first_loss": losses[0], **peak.measures()}


def _loss(model: Any, stage: str, rows_of_prompt: Any, target_logits: bool) -> tuple[Callable[..., Any], list[Any]]:
    """The loss of input and target ids, and the parameters that it trains."""
    import torch

    prompt = torch.nn.Parameter(rows_of_prompt) if stage == "stage1" else rows_of_prompt
    if stage == "stage1":
        model.requires_grad_(False)
    if stage == "stage1" and not target_logits:
        return _peft_loss(model, prompt)
    trained = [prompt] if stage == "stage1" else list(model.parameters())
    embed = model.get_input_embeddings()
    encodes = model.config.is_encoder_decoder

    def arguments(ids: Any, answers: Any) -> dict[str, Any]:
        sequence = ids if encodes else torch.cat((ids, answers), 1)
        if not len(prompt):
            return {"input_ids": sequence}
        return {"inputs_embeds": torch.cat((prompt.expand(len(ids), -1, -1), embed(sequence)), 1)}

    def by_labels(ids: Any, answers: Any) -> Any:
        before = 0 if encodes else len(prompt) + ids.shape[1]
        labels = torch.nn.functional.pad(answers, (before, 0), value=IGNORED)
        return model(**arguments(ids, answers), labels=labels, use_cache=False).loss

    def by_targets(ids: Any, answers: Any) -> Any:
        hidden = model.model(**arguments(ids, answers), use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, -answers.shape[1] - 1 : -1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), answers.flatten())

    return by_targets if target_logits else by_labels, trained


def _peft_loss(model: Any, prompt: Any) -> tuple[Callable[..., Any], list[Any]]:
    import peft
    import torch

    encodes = model.config.is_encoder_decoder
    config = peft.PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM" if encodes else "CAUSAL_LM",
        num_virtual_tokens=len(prompt),
        num_transformer_submodules=1,  # the prompt is the encoder's alone
        prompt_tuning_init="RANDOM",
    )
    tuned = peft.get_peft_model(model, config)
    embedding = next(parameter for parameter in tuned.parameters() if parameter.requires_grad)
    with torch.no_grad():
        embedding.copy_(prompt)

    def loss(ids: Any, answers: Any) -> Any:
        sequence = ids if encodes else torch.cat((ids, answers), 1)
        labels = answers if encodes else torch.nn.functional.pad(answers, (ids.shape[1], 0), value=IGNORED)
        return tuned(input_ids=sequence, labels=labels, use_cache=False).loss

    return loss, [embedding]


def load(folder: str, files: list[str], gguf_file: str = "") -> Measures:
    """Seconds to load a checkpoint in float32, and its tokenizer; every weight is read once."""
    import transformers

    _all_cores()
    peak, began = Peak(), time.perf_counter()
    options = {"gguf_file": gguf_file} if gguf_file else {}
    transformers.AutoTokenizer.from_pretrained(folder, **options)
    model = _model(folder, **options)
    for parameter in model.parameters():  # a mapped file is read when it is used
        parameter.sum()
    return loaded(time.perf_counter() - began, files) | peak.measures()


def generate(
    folder: str,
    prompts: str,
    max_tokens: int,
    beams: int,
    batch_size: int,
    stop: str = "ids",
    bfloat16: bool = False,
    every: int = 1,
) -> Measures:
    """Seconds for the outputs of the prompts of a file, in batches sorted by length, after a batch to warm up.

    Args:
        folder: of the model.
        prompts: a file of `benchmarks.prompts`.
        max_tokens: longest output.
        beams: width of the search; 1 is greedy.
        batch_size: prompts at a time.
        stop: how outputs end at a line break: "ids", every token with one ends the sequence; or "strings".
        bfloat16: whether the model is in bfloat16.
        every: 1 for all prompts, 2 for every second one, and so on.
    """
    import torch
    import transformers

    _all_cores()
    model = _model(folder, **({"dtype": torch.bfloat16} if bfloat16 else {}))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token_id = tokenizer.pad_token_id or 0
    ends = [model.generation_config.eos_token_id]
    options: dict[str, Any] = {"stop_strings": "\n", "tokenizer": tokenizer}
    if stop == "ids":
        ends += [i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])]
        options = {"eos_token_id": list(dict.fromkeys(np.hstack(ends).tolist()))}
    if beams > 1:
        options |= {"num_beams": beams, "length_penalty": 0.6}
    texts = sorted((row["text"] for row in read(prompts)[::every]), key=lambda text: -len(tokenizer.encode(text)))
    batches = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    peak = Peak()

    def outputs(batch: list[str]) -> list[str]:
        encoded = tokenizer(batch, return_tensors="pt", padding=True)
        with torch.inference_mode():
            ids = model.generate(
                **encoded, max_new_tokens=max_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id, **options
            )
        decoded = tokenizer.batch_decode(ids[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.split("\n", 1)[0] for text in decoded]

    outputs(batches[-1])
    began = time.perf_counter()
    texts = [text for batch in batches for text in outputs(batch)]
    seconds = time.perf_counter() - began
    tokens = sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    return {"seconds": seconds, "tokens_per_s": tokens / seconds, "tokens": tokens, **peak.measures()}


def lm_eval(
    folder: str, prompts: str, batch_size: int, task_limits: bool, bfloat16: bool = False, every: int = 1
) -> Measures:
    """Seconds for the outputs of the prompts of a file by lm-eval's transformers back end, after loading.

    Args:
        folder: of the model.
        prompts: a file of `benchmarks.prompts`.
        batch_size: of lm-eval.
        task_limits: whether each task bounds its outputs as this package's evaluation does, instead of all by 48.
        bfloat16: whether the model is in bfloat16.
        every: 1 for all prompts, 2 for every second one, and so on.
    """
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    _all_cores()
    dtype = "bfloat16" if bfloat16 else "float32"
    model = HFLM(folder, backend="causal", device="cpu", dtype=dtype, batch_size=batch_size, attn_implementation="sdpa")
    requests = []
    for index, row in enumerate(read(prompts)[::every]):
        limit = row["limit"] if task_limits else 48
        settings = {"until": ["\n"], "do_sample": False, "max_gen_toks": limit}
        requests.append(Instance("generate_until", {}, (row["text"], settings), index))
    peak, began = Peak(), time.perf_counter()
    outputs = model.generate_until(requests, disable_tqdm=True)
    seconds = time.perf_counter() - began
    return {"generation_seconds": seconds, "characters": sum(map(len, outputs)), **peak.measures()}


def write_random(folder: str, kind: str, sizes: dict[str, int], tokenizer: str = "") -> Measures:
    """Writes a random model: "T5", without dropout, or "Llama" with tied embeddings; and the tokenizer of a folder."""
    import torch
    import transformers

    torch.manual_seed(0)
    options: dict[str, Any] = {**sizes, "tie_word_embeddings": True}
    if kind == "T5":
        config = transformers.T5Config(**options, dropout_rate=0.0, decoder_start_token_id=0)
        model = transformers.T5ForConditionalGeneration(config)
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options, max_position_embeddings=8192))
    model.save_pretrained(folder)
    if tokenizer:
        transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return {"parameters": sum(parameter.numel() for parameter in model.parameters())}


def _model(folder: str, **options: Any) -> Any:
    """A model in float32, in training mode, which changes nothing without dropout."""
    import torch
    import transformers

    encodes = (Path(folder) / "config.json").is_file() and '"t5"' in (Path(folder) / "config.json").read_text("utf-8")
    kind = transformers.AutoModelForSeq2SeqLM if encodes else transformers.AutoModelForCausalLM
    return kind.from_pretrained(folder, **{"dtype": torch.float32, "attn_implementation": "sdpa", **options})


def _all_cores() -> None:
    import os

    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))


def _first(count: int, items: Iterator[Any]) -> Iterator[Any]:
    return (item for _, item in zip(range(count), items, strict=False))
