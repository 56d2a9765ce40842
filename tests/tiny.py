"""A Llama-family model that trains in seconds: random weights and a byte-level BPE tokenizer, as a GGUF file.

Also imported by processes that tests start. Sizes and metadata are those of `METADATA`; tests change what they need.
"""

import io
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import pre_tokenizers

F32 = gguf.GGMLQuantizationType.F32
EMBED, HEADS, KV_HEADS, HEAD_DIM, MLP, LAYERS = 32, 4, 2, 8, 64, 2


def _bpe(words: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """All bytes, and merges that make one token of each word and of its beginnings."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges: list[str] = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append(f"{word[: end - 1]} {word[end - 1]}")
    return tokens, merges


TOKENS, MERGES = _bpe(("Ġgood", "Ġbad", "Ġwas", "ĠReview", "Label", "ĊĊ"))
TOKEN_TYPES = [3, 3, 3, *[1] * (len(TOKENS) - 3)]  # control tokens, then ordinary ones
METADATA: dict[str, Any] = {
    "llama.block_count": LAYERS,
    "llama.context_length": 512,
    "llama.embedding_length": EMBED,
    "llama.feed_forward_length": MLP,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.rope.freq_base": 1e5,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": HEAD_DIM,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": TOKEN_TYPES,
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.eos_token_id": 0,
}


def vocabulary() -> Any:
    """The tokenizer of the GGUF file, without writing one."""
    from promot_jax.data.vocabularies.tokenizer import TokenizerVocabulary

    return TokenizerVocabulary.from_gguf(METADATA | {"tokenizer.ggml.token_type": np.array(TOKEN_TYPES)})


def tensors(seed: int = 0, tied: bool = True, head_dim: int = HEAD_DIM, vocab: int = len(TOKENS)) -> dict[str, Any]:
    """Random weights under GGUF's names, in the order of the file, (out, in)."""
    rng = np.random.default_rng(seed)
    queries, keys = HEADS * head_dim, KV_HEADS * head_dim
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (vocab, EMBED), "output_norm": (EMBED,)}
    shapes |= {} if tied else {"output": (vocab, EMBED)}
    for i in range(LAYERS):
        layer = {"attn_norm": (EMBED,), "attn_q": (queries, EMBED), "attn_k": (keys, EMBED), "attn_v": (keys, EMBED)}
        layer |= {"attn_output": (EMBED, queries), "ffn_norm": (EMBED,), "ffn_gate": (MLP, EMBED)}
        layer |= {"ffn_up": (MLP, EMBED), "ffn_down": (EMBED, MLP)}
        shapes |= {f"blk.{i}.{key}": shape for key, shape in layer.items()}

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.standard_normal(shape)
        return (1 + noise / 10 if len(shape) == 1 else noise * shape[1] ** -0.5).astype(np.float32)

    return {f"{key}.weight": draw(shape) for key, shape in shapes.items()}


def write(
    path: Path,
    weights: dict[str, np.ndarray],
    metadata: dict[str, Any] | None = None,
    arch: str = "llama",
    kind: gguf.GGMLQuantizationType = F32,
) -> Path:
    """Writes a GGUF file; matrices are stored as `kind`."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (METADATA if metadata is None else metadata).items():
        add: dict[type, Any] = {
            str: writer.add_string,
            bool: writer.add_bool,
            float: writer.add_float32,
            int: writer.add_uint32,
        }
        (writer.add_array if isinstance(value, list) else add[type(value)])(key, value)
    for key, value in weights.items():
        stored = kind if value.ndim == 2 else F32
        writer.add_tensor(key, gguf.quants.quantize(value, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def from_params(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our parameters by path, back under GGUF's names and in its layout, tied embeddings."""
    stacked = {"attn_norm": "pre_self_attention_layer_norm/scale", "ffn_norm": "pre_mlp_layer_norm/scale"}
    stacked |= {"attn_q": "self_attention/query/kernel", "attn_k": "self_attention/key/kernel"}
    stacked |= {"attn_v": "self_attention/value/kernel", "attn_output": "self_attention/out/kernel"}
    stacked |= {"ffn_gate": "mlp/wi_0/kernel", "ffn_up": "mlp/wi_1/kernel", "ffn_down": "mlp/wo/kernel"}
    found = {"token_embd": params["model/token_embedder/embedding"]}
    found["output_norm"] = params["model/decoder/decoder_norm/scale"]
    for name, path in stacked.items():
        for i, leaf in enumerate(params[f"model/decoder/layers/{path}"]):
            leaf = leaf.T  # kernels are (in, out) in our layout
            if name in ("attn_q", "attn_k"):  # rotary pairs are neighbours in the file
                leaf = leaf.reshape(-1, 2, HEAD_DIM // 2, EMBED).swapaxes(1, 2).reshape(leaf.shape)
            found[f"blk.{i}.{name}"] = leaf
    return {f"{key}.weight": np.ascontiguousarray(value) for key, value in found.items()}


GIN = """\
# The tiny model and tasks, for any run of the package: given after its gin file.
INITIAL_CHECKPOINT_PATH = "{checkpoint}"
MIXTURE_OR_TASK_MODULE = "tiny_tasks"
MIXTURE_OR_TASK_NAME = "tiny_review"
TASK_FEATURE_LENGTHS = {{"inputs": 32, "targets": 3}}
ICL_MIXTURE = "tiny_icl"
PROMPT_LENGTH = 4
TRAIN_STEPS = 6
PROMPT_TRAIN_STEPS = 6
EVAL_PERIOD = 2
PROMPT_EVAL_PERIOD = 2
BATCH_SIZE = 4
LEARNING_RATE = 1e-2
PROMPT_LEARNING_RATE = 1e-2
WARMUP_STEPS = 0
PROMPT_WARMUP_STEPS = 0
Optimizer.schedule = "constant"
prompt/Optimizer.schedule = "constant"
Training.log_period = 1
Experiment.dtype = "float32"
Evaluation.exemplar_seed = 0
PromptInit.first = 0
Decoding.max_tokens = 8
Evaluation.shots = (1, 3)
Evaluation.examples = 6
Evaluation.target_examples = 10
Evaluation.curve_examples = 4
Evaluation.curve_target_examples = 6
Evaluation.tokens_per_batch = 512
Evaluation.max_input_length = 96
"""


SENTENCE = "the film was good and the cast was bad but a plot of old songs made it all end in a joke"
PIECES = 40


def sentencepiece_model(path: Path, sentinels: int = 0, **options: Any) -> Path:
    """Trains a SentencePiece model as T5's is (padding 0, EOS 1, unknown 2, no beginning), as mT5's with sentinels.

    `options` are SentencePiece's, in the place of these.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    words, model = SENTENCE.split(), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(words[i:] + words[:i]) for i in range(len(words))), model_writer=model,
        **{"vocab_size": PIECES, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 2} | options,
    )  # fmt: skip
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    for i in reversed(range(sentinels)):
        proto.pieces.add(piece=f"\u2581<extra_id_{i}>", score=0.0, type=proto.SentencePiece.USER_DEFINED)
    path.write_bytes(proto.SerializeToString())
    return path


def workspace(folder: Path) -> Path:
    """Writes `tiny.gguf` and `tiny.gin` into a folder, and returns it."""
    write(folder / "tiny.gguf", tensors())
    (folder / "tiny.gin").write_text(GIN.format(checkpoint=folder / "tiny.gguf"))
    return folder


def command(folder: Path, gin_file: str, workdir: Path, **macros: object) -> list[str]:
    """Arguments of `promot_jax.main` for a run of the package on the tiny model in `folder`."""
    overrides = [f"--gin.{name}={value}" for name, value in macros.items()]
    return [f"--gin_file={gin_file}", f"--gin_file={folder / 'tiny.gin'}", f"--workdir={workdir}", *overrides]
