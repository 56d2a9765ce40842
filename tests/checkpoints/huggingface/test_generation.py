"""What generation_config.json sets: refused, or named, where transformers' own greedy answer is another with it."""

import json
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
import transformers

import promot_jax.data  # noqa: F401, silences TensorFlow
from promot_jax.checkpoints import pretrained
from promot_jax.checkpoints.huggingface import generation
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("one_torch_thread")
# Keys that leave the greedy answer of one input as it is, or that are a run's own: lengths, beams, sampling, speed,
# what is returned, and the tokens that `checkpoints.answers` and the tokenizer read.
OF_A_RUN = {
    "assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight", "assistant_lookbehind",
    "cache_config", "cache_implementation", "compile_config", "continuous_batching_config", "disable_compile",
    "diversity_penalty", "do_sample", "early_stopping", "eos_token_id", "epsilon_cutoff", "eta_cutoff",
    "is_assistant", "length_penalty", "low_memory", "max_cache_len", "max_length", "max_matching_ngram_size",
    "max_new_tokens", "max_time", "min_p", "num_assistant_tokens", "num_assistant_tokens_schedule", "num_beam_groups",
    "num_beams", "num_return_sequences", "output_attentions", "output_hidden_states", "output_logits", "output_scores",
    "pad_token_id", "prefill_chunk_size", "prompt_lookup_num_tokens", "remove_invalid_values", "renormalize_logits",
    "return_dict_in_generate", "speculation_type", "target_lookbehind", "temperature", "top_h", "top_k", "top_p",
    "transformers_version", "typical_p", "use_cache", "use_mtp", "_from_model_config",
}  # fmt: skip


def saved(folder: Path, kind: str, change: dict[str, Any], file: str = generation.GENERATION) -> Path:
    """A tiny model whose file says `change`, too; without generation_config.json where another file says it."""
    hf_models.save(folder, kind)
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    if file != generation.GENERATION:
        (folder / generation.GENERATION).unlink()
    return folder


def theirs(folder: Path) -> list[int]:
    """The greedy answer of transformers to a fixed input, the first token of an encoder-decoder's with it."""
    model, _ = hf_models.load(folder)
    ids = torch.tensor([[5, 6, 7, 6, 7]])
    with torch.no_grad():
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, use_cache=False)
    return [int(i) for i in found[0, 0 if model.config.is_encoder_decoder else ids.shape[1] :]]


def test_every_key_is_listed() -> None:
    known = {*generation.OF_THE_MODEL, *generation.START, *generation.PREFERENCES} | OF_A_RUN
    assert vars(transformers.GenerationConfig()).keys() <= known
    assert not OF_A_RUN & generation.PREFERENCES.keys()


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("t5", {"decoder_start_token_id": 5}),
        ("mt5", {"decoder_start_token_id": 5}),
        ("t5", {"decoder_start_token_id": None, "bos_token_id": 5}),
        ("t5", {"forced_bos_token_id": 9}),
        ("t5", {"forced_eos_token_id": 9}),
        ("llama", {"forced_eos_token_id": 9}),
    ],
)
def test_an_answer_that_starts_or_ends_otherwise_is_refused(tmp_path: Path, kind: str, change: dict[str, Any]) -> None:
    plain = saved(tmp_path / "plain", kind, {})
    folder = saved(tmp_path / "changed", kind, change)
    assert theirs(folder) != theirs(plain)
    for load in (pretrained.load_text, lambda path: pretrained.load(path, Partitioner())):
        with pytest.raises(UserError, match=rf"{generation.GENERATION} sets {[*change][-1]} = \d, which our models do"):
            load(str(folder))


def test_it_is_read_where_transformers_reads_it(tmp_path: Path) -> None:
    """Without generation_config.json it is config.json that says how to generate."""
    folder = saved(tmp_path / "a", "t5", {"forced_bos_token_id": 9}, "config.json")
    assert theirs(folder)[1] == 9
    with pytest.raises(UserError, match=r"config\.json sets forced_bos_token_id = 9"):
        pretrained.load_text(str(folder))


def test_soft_prompts_that_are_never_generated_are_no_preference(tmp_path: Path) -> None:
    """The last tokens of the table, as `with_prompts/` of our own exports has them; others are one."""
    size = json.loads((saved(tmp_path / "plain", "t5", {}) / "config.json").read_text())["vocab_size"]
    for number, (suppressed, named) in enumerate([([size - 2, size - 1], 0), ([size - 2], 1), ([5, size - 1], 1)]):
        folder = saved(tmp_path / str(number), "t5", {"suppress_tokens": suppressed})
        assert len(generation.read(folder)) == named


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("repetition_penalty", 9.0),
        ("no_repeat_ngram_size", 1),
        ("suppress_tokens", [224]),
        ("begin_suppress_tokens", [224]),
        ("bad_words_ids", [[224]]),
        ("sequence_bias", [[[224], -1e4]]),
    ],
)
def test_a_preference_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: Any) -> None:
    plain = saved(tmp_path / "plain", "t5", {})
    folder = saved(tmp_path / "changed", "t5", {key: value})
    answer = theirs(plain)
    assert answer[1] == 224 and theirs(folder) != answer
    capsys.readouterr()

    pretrained.load(str(folder), Partitioner())

    said = f"Warning: {folder} prefers {key} = {value} in generation, which is not applied.\n"
    assert capsys.readouterr().out == said


def test_neutral_values_and_those_of_a_run_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As instruct models are published: sampling, lengths, and penalties that are none."""
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "max_length": 4096}
    neutral = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0, "forced_bos_token_id": None}
    folder = saved(tmp_path / "a", "t5", sampling | neutral | {"decoder_start_token_id": 0, "bos_token_id": 2})
    capsys.readouterr()

    pretrained.load(str(folder), Partitioner())

    assert capsys.readouterr().out == ""
