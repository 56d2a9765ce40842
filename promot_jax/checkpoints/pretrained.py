"""A base model from what lies at `INITIAL_CHECKPOINT_PATH`: Hugging Face, T5X, GGUF, an asset, or a finished run."""

import dataclasses
import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from promot_jax import assets, methods, trees
from promot_jax.checkpoints.answers import Answers, of_folder, of_gguf, template_of
from promot_jax.checkpoints.huggingface import generation
from promot_jax.checkpoints.huggingface import load as hf
from promot_jax.checkpoints.huggingface.config import family_of
from promot_jax.checkpoints.locate import is_remote, locate, spelled
from promot_jax.checkpoints.orbax import Saved
from promot_jax.checkpoints.placement import Placed, place
from promot_jax.checkpoints.t5x.load import Checkpoint, is_checkpoint, is_prompt, refuse_tensorflow
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.models import CONFIGS, Config, Model, build
from promot_jax.params import lora
from promot_jax.params.fingerprint import fingerprint as fingerprint_of
from promot_jax.results import records
from promot_jax.results.schema import StageRecord

if TYPE_CHECKING:
    from promot_jax.data.vocabularies.tokenizer import Vocabulary

from promot_jax.checkpoints.stage_folder import STAGE_FILE, describe, overlay

_PADDING = 128  # rows; tables are padded to multiples of 64 or 128


class ModelText(NamedTuple):
    """What a model reads and writes text with."""

    vocabulary: "Vocabulary"  # its tokenizer
    continues: bool  # `Model.continues`
    answers: Answers  # end tokens and chat template


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model ready to train or to ask."""

    model: Model  # family and config
    params: trees.Tree  # `params["model"]`, float32, placed on the mesh
    vocabulary: "Vocabulary"
    base: str  # fingerprint of the base model; a fine-tuned model has that of the one it started from
    fingerprint: str  # of these very parameters
    path: str  # where it was loaded from, as given
    leaves: dict[str, int]  # how many were loaded, new and unused
    # End tokens and chat template that came with it.
    answers: Answers = dataclasses.field(default_factory=Answers)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer, the tokenizer's end of sequence first."""
        ids = dict.fromkeys((self.vocabulary.eos_id, *self.answers.end_ids))
        return tuple(i for i in ids if 0 <= i < self.model.config.vocab_size)

    @property
    def accepts(self) -> tuple[str, ...]:
        """Fingerprints of the models whose prompts fit: itself, and the one it was fine-tuned from."""
        return (self.fingerprint, self.base)


def load(
    path: str,
    partitioner: Partitioner,
    *,
    config: Config | None = None,
    vocabulary: str = "",
    dtype: str = "float32",
) -> Pretrained:
    """Loads a model; every leaf comes from the checkpoint, none is left at a random value.

    Args:
        path: "asset:NAME"; a `.gguf` file; the folder of a Hugging Face model; a T5X checkpoint, its file or its folder
            or one of several, of which the newest counts; each of them local, "hf://ORGANISATION/NAME[@REVISION]" (with
            "/FILE.gguf" after it for GGUF; not T5X) or "gs://BUCKET/PATH"; or the folder of a finished run that
            trained a model.
        partitioner: where the parameters go.
        config: sizes, for a checkpoint that carries none (T5X), and how long the sequences may be; one that does is
            held against them. None takes the checkpoint's.
        vocabulary: path of the tokenizer (`vocabularies.load`), for a checkpoint that carries none; "" takes its own.
        dtype: of activations and products.

    Raises:
        UserError: nothing there, a format that is not read, or a checkpoint that does not fit `config` or its own.
    """
    return _load(path, partitioner, _Options(config, vocabulary, dtype), ())


@dataclasses.dataclass(frozen=True)
class _Options:
    """Arguments of `load`, and the stages that are being loaded on top of what `_load` is asked for."""

    config: Config | None
    vocabulary: str
    dtype: str
    stages: tuple[Path, ...] = ()


def _load(path: str, partitioner: Partitioner, options: _Options, without: Collection[str]) -> Pretrained:
    """As `load`, with a `jax.ShapeDtypeStruct` for the leaves `without`: they are read for the fingerprints only."""
    path, local = _located(path)
    if hf.is_folder(local):
        sizes, placed, leaves, text = _read_hf(local, partitioner, without, options)
    elif is_checkpoint(local):
        sizes, placed, leaves, text = _read_t5x(local, partitioner, without, options)
    elif (stage := _stage_folder(local)) is not None:
        return _load_stage(stage, path, partitioner, options, without)
    else:
        sizes, placed, leaves, text = _read_gguf(_gguf_file(path, local), partitioner, without, options)
    from promot_jax.data.vocabularies.load import within

    sizes = agree(sizes, options.config, path)
    tokenizer = within(text.vocabulary, sizes.vocab_size, path)  # ids from there on are soft prompts
    config = dataclasses.replace(sizes, dtype=options.dtype, dropout_rate=0.0)  # in training it is the stage's
    base = placed.fingerprint
    return Pretrained(build(config, partitioner), placed.params, tokenizer, base, base, path, leaves, text.answers)


def load_text(path: str, *, config: Config | None = None, vocabulary: str = "") -> ModelText:
    """Loads what a model reads and writes text with, without its parameters: arguments and errors as of `load`."""
    return _load_text(path, _Options(config, vocabulary, ""))


def _load_text(path: str, options: _Options) -> ModelText:
    path, local = _located(path)
    if hf.is_folder(local):
        return _text_of_folder(local, options.vocabulary)
    if is_checkpoint(local):
        return _text_of_t5x(local, options.config, options.vocabulary)
    if (stage := _stage_folder(local)) is None:
        return _text_of_gguf(_gguf_file(path, local), options.vocabulary)
    described = describe(stage)
    assert described is not None  # `_stage_folder` has looked
    return _load_text(described.checkpoint, _on_stage(options, stage))


def _on_stage(options: _Options, folder: Path) -> _Options:
    """The options for the model that a stage was trained from. Raises UserError for a circle of stages."""
    if folder.resolve() in options.stages:
        raise UserError(f"{folder} names a checkpoint that was trained from it; put its own {STAGE_FILE} back.")
    return dataclasses.replace(options, stages=(*options.stages, folder.resolve()))


def _located(path: str) -> tuple[str, Path]:
    """The path as it is meant, and where that lies here."""
    path = spelled(path)
    local = locate(path) if is_remote(path) else Path(path)
    try:
        local.exists()
    except OSError as error:  # a name that is too long, say
        raise UserError(f"Cannot read {path[:200]!r}: {error.strerror or error}.") from error
    refuse_tensorflow(local)
    return path, local


def _gguf_file(path: str, local: Path) -> Path:
    file = local if is_remote(path) else assets.resolve(path)
    if not file.is_file():
        raise UserError(
            f"No checkpoint at {str(file)!r}; set INITIAL_CHECKPOINT_PATH to the folder of a Hugging Face model, of a "
            "T5X checkpoint or of a finished run, a .gguf file, or asset:NAME."
        )
    return file


def _text_of_folder(folder: Path, vocabulary: str) -> ModelText:
    from promot_jax.data.vocabularies.load import load as load_vocabulary

    for name in ("tokenizer.json", "tokenizer_config.json", "spiece.model", "tokenizer.model"):
        if os.path.lexists(folder / name):
            hf.inside(folder, name)
    generation.read(folder)  # may refuse
    family = family_of(hf.read_json(folder, hf.CONFIG).get("model_type"))
    tokenizer = load_vocabulary(vocabulary or folder)
    return ModelText(tokenizer, family == "decoder", of_folder(folder, Path(vocabulary or folder)))


def _text_of_t5x(folder: Path, config: Config | None, vocabulary: str) -> ModelText:
    if config is None or not vocabulary:
        raise UserError(
            f"{folder} is a T5X checkpoint, which carries neither sizes nor a tokenizer: give the gin file of its "
            "model (gin/models/) and set VOCABULARY to the path of its tokenizer."
        )
    from promot_jax.data.vocabularies.load import load as load_vocabulary

    continues = build(config).continues
    return ModelText(load_vocabulary(vocabulary), continues, Answers((), template_of(Path(vocabulary))))


def _text_of_gguf(file: Path, vocabulary: str) -> ModelText:
    from promot_jax.checkpoints.gguf.load import read_metadata
    from promot_jax.data.vocabularies.load import load as load_vocabulary
    from promot_jax.data.vocabularies.tokenizer import TokenizerVocabulary

    metadata = read_metadata(file)
    answers = of_gguf(metadata, file.name)
    if not vocabulary:
        return ModelText(TokenizerVocabulary.from_gguf(metadata), True, answers)
    template = template_of(Path(vocabulary)) or answers.chat_template
    return ModelText(load_vocabulary(vocabulary), True, answers._replace(chat_template=template))


_Read = tuple[Config, Placed, dict[str, int], ModelText]


def _read_hf(folder: Path, partitioner: Partitioner, without: Collection[str], options: _Options) -> _Read:
    """A Hugging Face folder, with its tokenizer unless another is given."""
    text = _text_of_folder(folder, options.vocabulary)

    def accept(family: str, sizes: dict[str, Any]) -> None:
        agree(CONFIGS[family](**sizes), options.config, str(folder))

    loaded = hf.read(folder, partitioner, without, accept)
    if preferred := generation.read(folder):
        print(f"Warning: {folder} prefers {', '.join(preferred)} in generation, which is not applied.", flush=True)
    leaves = {"loaded": len(trees.flatten(loaded.placed.params)), "new": 0, "unused": len(loaded.unused)}
    return CONFIGS[loaded.family](**loaded.config), loaded.placed, leaves, text


def _read_t5x(folder: Path, partitioner: Partitioner, without: Collection[str], options: _Options) -> _Read:
    """A T5X checkpoint: of each leaf only what this host's devices hold, one leaf at a time."""
    config = options.config
    text = _text_of_t5x(folder, config, options.vocabulary)
    assert config is not None  # as the line above says
    like = jax.eval_shape(build(config).init, jax.random.key(0))
    checkpoint = Checkpoint(folder, {name: leaf.shape for name, leaf in trees.flatten(like).items()})
    if any(map(is_prompt, checkpoint.unused)):
        print(f"{folder} holds a soft prompt, too; PROMPT_PATH may name the same path to use it.", flush=True)
    placed = place(checkpoint.shapes, checkpoint.read, partitioner, without)
    return config, placed, checkpoint.leaves, text


def _read_gguf(file: Path, partitioner: Partitioner, without: Collection[str], options: _Options) -> _Read:
    """A GGUF file, with its tokenizer unless another is given."""
    from promot_jax.checkpoints.gguf import load as gguf

    agree(CONFIGS["decoder"](**gguf.read_config(file)), options.config, str(file))
    text = _text_of_gguf(file, options.vocabulary)
    loaded = gguf.read(file, partitioner, without)
    leaves = {"loaded": len(trees.flatten(loaded.placed.params)), "new": 0, "unused": 0}
    return loaded.config, loaded.placed, leaves, text


def agree(found: Config, given: Config | None, path: str) -> Config:
    """Returns the config to use: the checkpoint's own or, where a config is given that agrees with it, that one.

    A checkpoint may have some rows more in its tables than the model is said to have: copies are padded to a multiple.

    Args:
        found: of the checkpoint.
        given: `Experiment.model`.
        path: of the checkpoint, for the message.

    Raises:
        UserError: they differ in more than what may be chosen per run.
    """
    if given is None:
        return found
    if type(given) is type(found) and 0 < found.vocab_size - given.vocab_size < _PADDING:
        given = dataclasses.replace(given, vocab_size=found.vocab_size)
    free = ("dtype", "dropout_rate", "remat", "attention", "max_length")
    ours, theirs = ({"family": type(config).__name__, **vars(config)} for config in (given, found))
    keys = [key for key in theirs if key not in free and ours.get(key) != theirs[key]]
    if keys:
        differing = ", ".join(f"{key} {ours.get(key)} instead of {theirs[key]}" for key in keys[:4])
        raise UserError(
            f"{path} is another model than Experiment.model says: {differing}; leave out the gin file of "
            "the model, or give that of this checkpoint."
        )
    return given


def _stage_folder(path: Path) -> Path | None:
    """The folder of a stage that trained a model: the path itself, or that stage in a method's folder."""
    # Of a method's stages the one that made the model: WiSE-FT's comes after its fine-tuning.
    for folder in (path, *(path / name for name in reversed(methods.model_tuning()))):
        stage = describe(folder)
        if stage and ("model" in stage.trains or stage.lora):
            return folder
    if path.is_dir():
        raise UserError(
            f"{path} holds no finished run that trained a model, no Hugging Face model and no T5X checkpoint; give the "
            "folder of one, or a .gguf file."
        )
    return None


def trained_by(path: str) -> list[tuple[Path, StageRecord]]:
    """The finished stages that made the model at a path, the last one first; none where no run trained it.

    Args:
        path: as `load` takes it.

    Raises:
        UserError: a folder that holds no model.
    """
    found: dict[Path, StageRecord] = {}
    local = Path(path)
    while not is_remote(spelled(path)) and local.is_dir() and not hf.is_folder(local) and not is_checkpoint(local):
        folder = _stage_folder(local)
        stage = describe(folder) if folder else None
        assert folder is not None and stage is not None
        if folder.resolve() in found:  # trained from itself, which `load` refuses
            break
        found[folder.resolve()] = stage
        path, local = stage.checkpoint, Path(stage.checkpoint)
    return list(found.items())


def _load_stage(
    folder: Path, path: str, partitioner: Partitioner, options: _Options, without: Collection[str]
) -> Pretrained:
    """The base model with the leaves that a stage trained; of the base only the others are held."""
    stage = describe(folder)
    assert stage is not None
    options = _on_stage(options, folder)
    saved = Saved(folder / "checkpoints").shapes(stage.best_step)
    trained = {name.removeprefix("model/") for name in saved if name.startswith("model/")}
    source = _load(stage.checkpoint, partitioner, options, trained)
    if source.base != stage.base:
        raise UserError(
            f"{folder} was trained from a base model {stage.base[:12]}, but {stage.checkpoint} now "
            f"holds {source.base[:12]}; put the old file back."
        )
    start, shape = {"model": source.params}, None
    if stage.lora:
        shape = records.parse(stage.lora, lora.Lora, f"'lora' in {folder / STAGE_FILE}")
        sizes = [dims for name, dims in saved.items() if name.startswith("lora/")]
        if not sizes or any(shape.rank not in dims for dims in sizes):  # before it is allocated
            raise UserError(
                f"{folder / STAGE_FILE} names a LoRA rank of {shape.rank}, its checkpoint has another; put it back."
            )
        start |= partitioner.place({"lora": shape.init(jax.random.key(0), source.params)})
    params = lora.merge(overlay(folder, stage.best_step, start, some=True), shape)["model"]
    fingerprint = fingerprint_of(params)
    kept = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) if name in without else leaf
        for name, leaf in trees.flatten(params).items()
    }
    return dataclasses.replace(source, params=trees.unflatten(kept), path=path, fingerprint=fingerprint)
