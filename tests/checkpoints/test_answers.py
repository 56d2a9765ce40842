"""End tokens and chat templates: what transformers and llama.cpp take from the same files, in decoding and export."""

import json
from pathlib import Path
from typing import Any

import hf_models
import jax
import numpy as np
import pytest
import tiny
import torch
import transformers

import promot_jax.data  # noqa: F401, silences TensorFlow
from promot_jax.checkpoints import export, pretrained
from promot_jax.checkpoints.answers import of_gguf
from promot_jax.decoding.generate import generate
from promot_jax.decoding.settings import Decoding
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.evaluation.sampler import Request, Sampler
from promot_jax.evaluation.settings import Evaluation
from promot_jax.main import main

pytestmark = pytest.mark.usefixtures("one_torch_thread")
CHAT = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>\n{% endfor %}"
MESSAGES = [{"role": "user", "content": "the cat"}]
TEXTS = ("the cat sat", "Label: 12", "x")
SETTINGS = Evaluation(decoding=Decoding(max_tokens=12, stop=""))


def folder(path: Path, template: Any = None, **config: Any) -> Path:
    """A Llama, as transformers saves it; its generation config as given, none for None."""
    hf_models.save(path, "llama", tie_word_embeddings=True)
    if template is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(path)
    for name, ends in config.items():
        file = path / f"{name}.json"
        if ends is None:
            file.unlink()
        else:
            file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": ends}))
    return path


@pytest.mark.parametrize(
    ("config", "ends"),
    [
        ({"generation_config": [2, 0]}, (0, 2)),
        ({"generation_config": [5, 7], "config": [9]}, (0, 5, 7)),
        ({"generation_config": 5}, (0, 5)),
        ({"generation_config": None, "config": [9, 0, 4]}, (0, 9, 4)),
        ({"generation_config": None, "config": None}, None),
    ],
)
def test_ends_are_those_of_transformers(tmp_path: Path, config: dict[str, Any], ends: tuple[int, ...] | None) -> None:
    """The tokenizer's end of sequence comes first, as training ends every target with it."""
    made = folder(tmp_path / "m", **{name: value for name, value in config.items() if ends})
    theirs = hf_models.load(made)[0].generation_config.eos_token_id
    found = pretrained.load(str(made), Partitioner()).end_ids
    assert set(found) == {0, *(theirs if isinstance(theirs, list) else [theirs])} and found == (ends or (0,))


def test_a_run_keeps_the_ends_and_the_template_of_its_model(tmp_path: Path) -> None:
    metadata = tiny.METADATA | {"tokenizer.ggml.eot_token_id": 7, "tokenizer.chat_template": CHAT}
    folder = tiny.workspace(tmp_path)
    base = pretrained.load(str(tiny.write(tmp_path / "tiny.gguf", tiny.tensors(), metadata)), Partitioner())
    assert main(tiny.command(folder, "finetune.gin", tmp_path / "run")) == 0
    trained = pretrained.load(str(tmp_path / "run"), Partitioner())
    assert trained.end_ids == base.end_ids == (0, 7, 2) and trained.answers.chat_template == CHAT


def test_answers_end_at_any_of_them(tmp_path: Path) -> None:
    """Greedy decoding ends where transformers' own does; a beam search has nothing behind an end."""
    made = folder(tmp_path / "m")
    model, tokenizer = hf_models.load(made)
    rows = [tokenizer(text).input_ids for text in TEXTS]
    whole = [hf_models.generate(model, row) for row in rows]
    ends = [0, whole[0][3], whole[1][5]]
    folder_config = made / "generation_config.json"
    folder_config.write_text(json.dumps(json.loads(folder_config.read_text()) | {"eos_token_id": ends}))
    model, _ = hf_models.load(made)
    want = []
    for row in rows:
        with torch.no_grad():
            ids = model.generate(torch.tensor([row]), do_sample=False, max_new_tokens=12)[0, len(row) :].tolist()
        want.append(tokenizer.decode([i for i in ids if i not in ends]))
    base = pretrained.load(str(made), Partitioner())
    sampler = Sampler(base, SETTINGS, Partitioner())
    assert sampler.ask({"model": base.params}, [Request(text) for text in TEXTS]) == want
    assert sum(len(text) < len(tokenizer.decode(ids)) for text, ids in zip(want, whole, strict=True)) >= 2

    tokens = np.zeros((len(rows), 16), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    inputs = {"tokens": tokens, "lengths": np.array([len(row) for row in rows], np.int32)}
    beam = Decoding(max_tokens=12, beams=3, stop="")
    limits, key = np.full(len(rows), 12, np.int32), jax.random.key(0)
    for ids in np.asarray(generate(base.model, beam, base.params, None, inputs, sampler._stops, limits, key)).tolist():
        answer = [i for i in ids if i >= 0]
        assert not set(answer[:-1]) & set(ends)


def test_ends_that_are_no_ids(tmp_path: Path) -> None:
    """transformers' generate takes an id or a list of ids, and fails at these within its loop."""
    for wrong in ("2", [2, "x"], [True], {"a": 1}):
        made = folder(tmp_path / str(wrong).strip("{}[]").replace("'", ""))
        (made / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(UserError, match="neither an id nor a list"):
            pretrained.load(str(made), Partitioner())


def test_ends_and_template_of_a_gguf_file(tmp_path: Path) -> None:
    """llama.cpp's `special_eog_ids`: the ids of `eos`, `eot` and `eom`, and tokens by their well-known names."""
    tokens = ["</s>", "a", "<|im_end|>", "b", "<end_of_turn>", "c"]
    told = {f"tokenizer.ggml.{key}_token_id": i for key, i in {"eos": 0, "eot": 3, "eom": 5}.items()}
    assert of_gguf(told | {"tokenizer.ggml.tokens": tokens}, "f").end_ids == (0, 3, 5, 2, 4)
    metadata = tiny.METADATA | {"tokenizer.ggml.eot_token_id": 7, "tokenizer.chat_template": CHAT}
    base = pretrained.load(str(tiny.write(tmp_path / "a.gguf", tiny.tensors(), metadata)), Partitioner())
    assert base.end_ids == (0, 7, tiny.TOKENS.index("<|im_end|>")) and base.answers.chat_template == CHAT
    several = metadata | {"tokenizer.chat_templates": ["tool_use"], "tokenizer.chat_template.tool_use": "tools"}
    base = pretrained.load(str(tiny.write(tmp_path / "b.gguf", tiny.tensors(), several)), Partitioner())
    assert base.answers.chat_template == {"default": CHAT, "tool_use": "tools"}
    export.write(tmp_path / "out", base)
    model, tokenizer = hf_models.load(tmp_path / "out")
    assert model.generation_config.eos_token_id == list(base.end_ids) and tokenizer.chat_template["tool_use"] == "tools"
    for wrong in ({"tokenizer.chat_template": 3}, {"tokenizer.ggml.eot_token_id": "x"}):
        with pytest.raises(UserError):
            of_gguf(wrong, "f")


@pytest.mark.parametrize("template", [CHAT, {"default": CHAT, "rag": "{{ messages[0]['content'] }}"}, None])
def test_ends_and_template_survive_an_export(tmp_path: Path, template: Any) -> None:
    """Reference: transformers reads the export as it reads the source."""
    made = folder(tmp_path / "m", template, generation_config=[2, 0])
    base = pretrained.load(str(made), Partitioner())
    export.write(tmp_path / "stripped", base)
    export.write(tmp_path / "prompted", base, {"a": np.full((3, 32), 0.5, np.float32)})
    source = transformers.AutoTokenizer.from_pretrained(made)
    for path in (tmp_path / "stripped", tmp_path / "prompted"):
        model, tokenizer = hf_models.load(path)
        assert set(model.generation_config.eos_token_id) == set(model.config.eos_token_id) == {0, 2}
        assert tokenizer.chat_template == source.chat_template == template
        again = pretrained.load(str(path), Partitioner())
        assert again.end_ids == base.end_ids and again.answers.chat_template == template
        if template:
            texts = [one.apply_chat_template(MESSAGES, tokenize=False) for one in (tokenizer, source)]
            assert texts[0] == texts[1] and "the cat" in texts[0]


def test_templates_that_cannot_be_read(tmp_path: Path) -> None:
    """transformers reads a text, or a list of named texts; these are neither."""
    made = folder(tmp_path / "m")
    file = made / "tokenizer_config.json"
    plain = json.loads(file.read_text())
    for wrong in (3, [3], [{"name": "a"}], {"name": "b"}):
        file.write_text(json.dumps(plain | {"chat_template": wrong}))
        with pytest.raises(UserError, match=r"chat_template in .* is neither text nor a list"):
            pretrained.load(str(made), Partitioner())
    file.write_text(json.dumps(plain))
    (tmp_path / "secret").write_text("x")
    (made / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="is not a file of that folder"):
        pretrained.load(str(made), Partitioner())
    (made / "chat_template.jinja").unlink()
    (made / "chat_template.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"chat template in .* cannot be read"):
        pretrained.load(str(made), Partitioner())
