"""GGUF reader: exact weights, agreement with the gguf package and transformers, one clear error for anything else."""

import functools
import random
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
import tiny
from tiny_tokenizers import train

from promot_jax import assets
from promot_jax.checkpoints import placement as places
from promot_jax.checkpoints import pretrained
from promot_jax.checkpoints.gguf import load as convert
from promot_jax.checkpoints.gguf.file import opened
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.models.decoder import DecoderConfig, DecoderModel
from promot_jax.params.fingerprint import fingerprint

F32, Q8_0, Q4_1 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1
METADATA: dict[str, Any] = tiny.METADATA | {
    "tokenizer.ggml.tokens": [f"t{i}" for i in range(40)],
    "tokenizer.ggml.token_type": [3, *[1] * 39],
    "tokenizer.ggml.merges": ["t 1"],
}
tiny_tensors = functools.partial(tiny.tensors, vocab=40)


def write(path: Path, weights: dict[str, np.ndarray], metadata: dict[str, Any] = METADATA, **options: Any) -> Path:
    """Writes a GGUF file of 40 tokens."""
    return tiny.write(path, weights, metadata, **options)


def read(path: Path) -> tuple[DecoderConfig, dict[str, Any], dict[str, Any]]:
    loaded = convert.read(path, Partitioner())
    assert loaded.placed.fingerprint == fingerprint(loaded.placed.params)
    return loaded.config, jax.tree.map(np.asarray, loaded.placed.params), loaded.metadata


def rotate(x: np.ndarray, position: float, interleaved: bool) -> np.ndarray:
    """Rotary position on [head_dim]: of neighbouring pairs, or of the two halves."""
    half = len(x) // 2
    pairs = x.reshape(half, 2) if interleaved else x.reshape(2, half).T
    turned = pairs.astype(complex) @ [1, 1j] * np.exp(1j * position * 1e5 ** (-np.arange(half) / half))
    both = np.stack([turned.real, turned.imag])
    return both.T.ravel() if interleaved else both.ravel()


@pytest.fixture(name="tiny_file")
def _tiny_file(tmp_path: Path) -> Path:
    return write(tmp_path / "tiny.gguf", tiny_tensors())


@pytest.mark.parametrize("kind", [F32, Q8_0, Q4_1, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16])
def test_every_tensor_lands_in_its_place(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    tensors = tiny_tensors(tied=False)
    path = write(tmp_path / "m.gguf", tensors, kind=kind)
    config, params, metadata = read(path)
    assert config == DecoderConfig(
        vocab_size=40, emb_dim=32, num_heads=4, num_kv_heads=2, num_layers=2, head_dim=8, mlp_dim=64, rope_theta=1e5,
        norm_eps=1e-5, tied_embeddings=False, max_length=512,
    )  # fmt: skip
    assert convert.read_config(path).items() <= vars(config).items()
    assert metadata["tokenizer.ggml.tokens"] == METADATA["tokenizer.ggml.tokens"]

    def stored(key: str) -> np.ndarray:
        value = tensors[f"{key}.weight"]
        return gguf.quants.dequantize(gguf.quants.quantize(value, kind), kind) if value.ndim == 2 else value

    np.testing.assert_array_equal(params["token_embedder"]["embedding"], stored("token_embd"))
    np.testing.assert_array_equal(params["decoder"]["logits_dense"]["kernel"], stored("output").T)
    np.testing.assert_array_equal(params["decoder"]["decoder_norm"]["scale"], stored("output_norm"))
    layers = params["decoder"]["layers"]
    for i in range(2):
        blk = f"blk.{i}."
        np.testing.assert_array_equal(layers["pre_self_attention_layer_norm"]["scale"][i], stored(blk + "attn_norm"))
        np.testing.assert_array_equal(layers["pre_mlp_layer_norm"]["scale"][i], stored(blk + "ffn_norm"))
        for ours, theirs in {"wi_0": "ffn_gate", "wi_1": "ffn_up", "wo": "ffn_down"}.items():
            np.testing.assert_array_equal(layers["mlp"][ours]["kernel"][i], stored(blk + theirs).T)
        attention = layers["self_attention"]
        for ours, theirs in {"value": "attn_v", "out": "attn_output"}.items():
            np.testing.assert_array_equal(attention[ours]["kernel"][i], stored(blk + theirs).T)
        for ours, theirs, heads in (("query", "attn_q", 4), ("key", "attn_k", 2)):
            value = stored(blk + theirs)
            halves = value.reshape(heads, 4, 2, 32).swapaxes(1, 2).reshape(value.shape)
            np.testing.assert_array_equal(attention[ours]["kernel"][i], halves.T)


def test_attention_scores_survive_the_change_of_rotary_layout(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    params = read(write(tmp_path / "m.gguf", tensors))[1]
    attention = params["decoder"]["layers"]["self_attention"]
    x = np.random.default_rng(1).standard_normal((2, 32))
    for head in range(2):
        rows = slice(8 * head, 8 * head + 8)
        stored = [tensors[f"blk.1.attn_{kind}.weight"][rows] @ token for kind, token in zip("qk", x, strict=True)]
        ours = [token @ attention[kind]["kernel"][1][:, rows] for kind, token in zip(("query", "key"), x, strict=True)]
        theirs = rotate(stored[0], 9, interleaved=True) @ rotate(stored[1], 4, interleaved=True)
        np.testing.assert_allclose(rotate(ours[0], 9, False) @ rotate(ours[1], 4, False), theirs, rtol=1e-5)


def test_parameters_are_those_of_the_decoder(tiny_file: Path) -> None:
    config, params, _ = read(tiny_file)
    want = jax.eval_shape(DecoderModel(config).init, jax.random.key(0))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), want
    )


def test_tied_head_sizes_of_their_own_and_defaults(tmp_path: Path) -> None:
    wide = METADATA | {"llama.attention.key_length": 16, "llama.attention.value_length": 16}
    del wide["llama.rope.dimension_count"], wide["llama.rope.freq_base"]
    config, params, _ = read(write(tmp_path / "m.gguf", tiny_tensors(head_dim=16), wide))
    assert (config.head_dim, config.rope_theta, config.tied_embeddings) == (16, 1e4, True)
    assert params["decoder"]["layers"]["self_attention"]["query"]["kernel"].shape == (2, 32, 64)
    assert "logits_dense" not in params["decoder"]


def test_blocks_of_rows_do_not_show(tiny_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read(tiny_file)[1]
    monkeypatch.setattr(places, "_BLOCK", 7 * 32)  # heads have eight rows: their halves are apart in most blocks
    np.testing.assert_equal(read(tiny_file)[1], whole)


def test_header_agrees_with_the_gguf_package(tiny_file: Path) -> None:
    reader = gguf.GGUFReader(tiny_file)
    with opened(tiny_file) as file:
        metadata, tensors = file.metadata, file.tensors
    assert {key for key in reader.fields if not key.startswith("GGUF.")} == set(metadata)
    for key, value in metadata.items():
        assert reader.fields[key].contents() == (value.tolist() if isinstance(value, np.ndarray) else value)
    assert {t.name: (tuple(t.shape[::-1]), t.data_offset, t.n_bytes) for t in reader.tensors} == {
        key: (tensor.shape, tensor.start, tensor.size) for key, tensor in tensors.items()
    }


def test_rope_factors(tmp_path: Path) -> None:
    """Of one: nothing is scaled. As converters write them for Llama 3.1: recognised. Others: refused."""
    metadata = {key: value for key, value in METADATA.items() if key != "llama.rope.dimension_count"}
    metadata |= {"llama.attention.key_length": 64, "llama.attention.value_length": 64, "llama.rope.freq_base": 5e5}
    tensors = tiny_tensors(head_dim=64)

    def scaling(factors: np.ndarray) -> tuple[Any, ...]:
        path = write(tmp_path / "m.gguf", tensors | {convert.ROPE_FACTORS: factors.astype(np.float32)}, metadata)
        config = read(path)[0]
        return config.rope_factor, config.rope_low_turns, config.rope_high_turns, config.rope_original_length

    assert scaling(np.ones(32)) == (1.0, 0.0, 0.0, 0)
    wavelengths = 2 * np.pi * 5e5 ** (np.arange(32) / 32)
    smooth = np.clip((8192 / wavelengths - 1) / 3, 0, 1)
    assert 0 < np.sum((smooth > 0) & (smooth < 1)) < 32
    llama = 1 / (smooth + (1 - smooth) / 32)
    assert scaling(llama) == (32.0, 1.0, 4.0, 8192)
    for other in (np.full(32, 8.0), llama**2, llama[:-1], -llama, np.full(32, np.nan)):
        with pytest.raises(UserError, match="rotary frequencies"):
            scaling(other)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.block_count", None, "lacks the metadata 'llama.block_count'"),
        ("llama.attention.layer_norm_rms_epsilon", None, "layer_norm_rms_epsilon"),
        ("llama.context_length", "long", "positive int"),
        ("llama.block_count", 0, "positive int"),
        ("llama.block_count", 2**32 - 1, "4294967295 layers"),
        ("llama.block_count", 3, "missing: blk.2.attn_norm.weight, .* and 5 more"),
        ("llama.block_count", 1, "unexpected: blk.1"),
        ("llama.attention.head_count", 5, "does not divide into 5 heads"),
        ("llama.attention.head_count_kv", 3, "do not divide"),
        ("llama.attention.head_count", [4, 4], "a list"),
        ("llama.attention.head_count", 8, "dimension_count"),
        ("llama.attention.value_length", 4, "value_length"),
        ("llama.embedding_length", 64, "head size 16"),
        ("llama.feed_forward_length", 32, r"wrong shape: blk.0.ffn_gate.weight \(64, 32\) instead of \(32, 32\)"),
        ("llama.expert_count", 8, "expert_count = 8"),
        ("llama.rope.scaling.type", "yarn", "scaling.type = 'yarn'"),
        ("llama.rope.scaling.factor", 4.0, "scaling.factor"),
        ("llama.vocab_size", 41, "40 embedding rows for a vocabulary of 41"),
        ("tokenizer.ggml.tokens", ["a"], "vocabulary of 1"),
        ("split.count", 2, "one part of several"),
        ("llama.rope.freq_base", float("nan"), "positive float"),
    ],
)
def test_metadata_that_does_not_fit_is_one_error(tmp_path: Path, key: str, value: Any, message: str) -> None:
    metadata = {name: said for name, said in (METADATA | {key: value}).items() if said is not None}
    with pytest.raises(UserError, match=message) as caught:
        read(write(tmp_path / "m.gguf", tiny_tensors(), metadata))
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_neutral_metadata_changes_nothing(tmp_path: Path) -> None:
    extra = {"llama.expert_count": 0, "llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 1.0}
    read(write(tmp_path / "m.gguf", tiny_tensors(), METADATA | extra | {"llama.vocab_size": 40}))


def test_a_vocabulary_stands_in_for_an_unknown_rule(tmp_path: Path) -> None:
    """The way out that the refusal names: the tokenizer of the same model as Hugging Face publishes it."""
    path = tiny.write(tmp_path / "mpt.gguf", tiny.tensors(), tiny.METADATA | {"tokenizer.ggml.pre": "mpt"})
    with pytest.raises(UserError, match=r"[sS]et VOCABULARY"):
        pretrained.load(str(path), Partitioner())
    tiny.vocabulary().save(tmp_path / "tokenizer")
    loaded = pretrained.load(str(path), Partitioner(), vocabulary=str(tmp_path / "tokenizer"))
    assert loaded.vocabulary.encode("a good film") == tiny.vocabulary().encode("a good film")


def test_a_sentencepiece_model_stands_in_where_the_table_is_padded(tmp_path: Path) -> None:
    """As a Llama's `tokenizer.model` for rows that no token of it has: SentencePiece's ids and BOS, no sentinels."""
    oracle, _ = train(prefix=True)
    (tmp_path / "tokenizer.model").write_bytes(oracle.serialized_model_proto())
    rows = oracle.get_piece_size() + 112
    named = {"tokenizer.ggml.tokens": [str(i) for i in range(rows)], "tokenizer.ggml.token_type": [3] * rows}
    path = tiny.write(tmp_path / "a.gguf", tiny.tensors(vocab=rows), tiny.METADATA | named)
    vocabulary = pretrained.load(str(path), Partitioner(), vocabulary=str(tmp_path / "tokenizer.model")).vocabulary
    assert (vocabulary.add_bos, vocabulary.bos_id, vocabulary.sentinels) == (True, oracle.bos_id(), {})
    assert list(vocabulary.encode("the cat")) == oracle.encode("the cat")


def test_tensors_that_do_not_fit_are_one_error(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    del tensors["blk.1.attn_q.weight"]
    tensors["blk.0.attn_q.bias"] = np.zeros(32, np.float32)
    with pytest.raises(UserError, match=r"missing: blk.1.attn_q.weight; unexpected: blk.0.attn_q.bias\."):
        read(write(tmp_path / "m.gguf", tensors))
    del tensors["token_embd.weight"]
    with pytest.raises(UserError, match="lacks the embedding table"):
        read(write(tmp_path / "m.gguf", tensors))
    bad = tiny_tensors()
    bad["blk.0.ffn_up.weight"][3, 3] = np.nan
    with pytest.raises(UserError, match=r"mlp/wi_1/kernel that are not finite"):
        read(write(tmp_path / "m.gguf", bad))


def test_other_architectures_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"architecture 'mamba'; llama, .* are read"):
        convert.read_config(write(tmp_path / "m.gguf", tiny_tensors(), arch="mamba"))


def test_what_is_not_a_gguf_file(tmp_path: Path, tiny_file: Path) -> None:
    for content, message in (
        (b"", "ends early"),
        (b"PK\x03\x04" + bytes(99), "does not start"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(99), "byte order"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0) + bytes(999), "tensors, more than"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60) + bytes(999), "metadata entries, more than"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62) + bytes(99), "ends early"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 2**40) + bytes(99), "strings, more than"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1) + bytes(99), "unknown type 9"),
        (b"GGUF" + struct.pack("<IQQQ1sIQQIQ", 3, 1, 0, 1, b"t", 2, 2**62, 2**62, 0, 0), "beyond the end"),
        (tiny_file.read_bytes()[:-40], "beyond the end"),
    ):
        (tmp_path / "bad.gguf").write_bytes(content)
        with pytest.raises(UserError, match=message):
            read(tmp_path / "bad.gguf")
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(UserError, match="Cannot read"):
            convert.read_metadata(path)


def test_overlapping_tensors_cannot_unfold_a_small_file(tmp_path: Path) -> None:
    """A thousand layers that all point at the same bytes would ask for a thousand times the file's size."""
    layers = 1000
    entries = [(f"blk.{i}.{key}.weight", 256, 256) for i in range(layers) for key in ("attn_q", "ffn_up")]
    infos = b"".join(
        struct.pack(f"<Q{len(name)}sIQQIQ", len(name), name.encode(), 2, rows, columns, 2, 0)
        for name, rows, columns in entries
    )
    header = b"GGUF" + struct.pack("<IQQ", 3, len(entries), 0) + infos
    (tmp_path / "m.gguf").write_bytes(header + bytes(64 + 256 * 256 // 32 * 18))
    with pytest.raises(UserError, match="overlaps"):
        read(tmp_path / "m.gguf")


def mutated(data: bytes, rng: random.Random, header: int) -> bytes:
    """One to three random damages, most of them in the header."""
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(header if rng.random() < 0.9 else len(damaged)) % max(1, len(damaged))
        wild = rng.choice([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, rng.getrandbits(64), rng.getrandbits(8)])
        match rng.randrange(6):
            case 0:
                damaged[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                damaged[at : at + 8] = struct.pack("<Q", wild)
            case 2:
                damaged[at : at + 4] = struct.pack("<I", wild & 0xFFFFFFFF)
            case 3:
                del damaged[at : at + rng.randint(1, 64)]
            case 4:
                damaged[at:at] = rng.randbytes(rng.randint(1, 64))
            case _:
                del damaged[rng.randrange(len(damaged)) :]
    return bytes(damaged)


def read_mutated(tmp_path: Path, count: int, seed: int) -> int:
    """Reads damaged copies of small files; returns how many were read as valid."""
    originals = []
    for kind in (F32, Q4_1):
        data = write(tmp_path / "m.gguf", tiny_tensors(), kind=kind).read_bytes()
        with opened(tmp_path / "m.gguf") as file:
            originals.append((data, min(tensor.start for tensor in file.tensors.values())))
    rng, valid, path = random.Random(seed), 0, tmp_path / "damaged.gguf"
    for i in range(count):
        path.write_bytes(mutated(*(originals[i % 2][0], rng, originals[i % 2][1])))
        began, message = time.perf_counter(), ""
        tracemalloc.start()
        try:
            config, params, _ = read(path)
            valid += 1
            assert params["token_embedder"]["embedding"].shape == (config.vocab_size, config.emb_dim)
        except UserError as error:
            message = str(error)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert len(message) < 1500, f"file {i} of seed {seed}"
        assert time.perf_counter() - began < 5, f"file {i} of seed {seed}"
        assert peak < 40 * len(originals[i % 2][0]), f"file {i} of seed {seed}"
    return valid


def test_damaged_files_are_user_errors_or_valid(tmp_path: Path) -> None:
    assert 0 < read_mutated(tmp_path, 100, seed=1) < 60


@pytest.mark.slow
def test_many_damaged_files_are_user_errors_or_valid(tmp_path: Path) -> None:
    read_mutated(tmp_path, 2000, seed=2)


def smollm2() -> Path:
    """The real model."""
    try:
        return assets.resolve("asset:smollm2-135m-instruct")
    except UserError as error:
        pytest.skip(f"the model cannot be fetched: {error}")


@pytest.mark.real
def test_smollm2_is_read_whole() -> None:
    config, params, metadata = read(smollm2())
    assert config == DecoderConfig(
        vocab_size=49152, emb_dim=576, num_heads=9, num_kv_heads=3, num_layers=30, head_dim=64, mlp_dim=1536,
        rope_theta=1e5, norm_eps=1e-5, tied_embeddings=True, max_length=8192,
    )  # fmt: skip
    leaves = jax.tree.leaves(params)
    assert sum(leaf.size for leaf in leaves) == 134_515_008 and metadata["general.license"] == "apache-2.0"
    assert all(leaf.dtype == np.float32 and leaf.std() > 0.01 for leaf in leaves)


@pytest.mark.real
@pytest.mark.slow
def test_smollm2_equals_transformers() -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    loader = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    path = smollm2()
    with torch.device("meta"):
        skeleton = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=30))
    oracle = loader.load_gguf_checkpoint(path, return_tensors=True, model_to_load=skeleton)
    weights = {key: value.numpy() for key, value in oracle["tensors"].items()}
    layers = (params := read(path)[1])["decoder"]["layers"]
    np.testing.assert_array_equal(params["token_embedder"]["embedding"], weights["model.embed_tokens.weight"])
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    for i in range(30):
        for ours, theirs in names.items():
            want = weights[f"model.layers.{i}.self_attn.{theirs}.weight"].T
            np.testing.assert_array_equal(layers["self_attention"][ours]["kernel"][i], want)
        for ours, theirs in {"wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"}.items():
            want = weights[f"model.layers.{i}.mlp.{theirs}.weight"].T
            np.testing.assert_array_equal(layers["mlp"][ours]["kernel"][i], want)
