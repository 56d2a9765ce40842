"""Model families with one interface, `Model`: training, evaluation and decoding work with any family."""

from promot_jax.distributed.partitioning import Partitioner
from promot_jax.models.base import Family, Params
from promot_jax.models.decoder import DecoderConfig, DecoderModel
from promot_jax.models.t5 import T5Config, T5Model

__all__ = ["CONFIGS", "Config", "DecoderConfig", "DecoderModel", "Model", "Params", "T5Config", "T5Model", "build"]

Config = DecoderConfig | T5Config
CONFIGS: dict[str, type[Config]] = {"decoder": DecoderConfig, "t5": T5Config}  # by the family name in format readers
Model = Family[Config]


def build(config: Config, partitioner: Partitioner | None = None) -> Model:
    """Returns the model of a config; the partitioner shards its activations, None leaves them to the compiler."""
    return T5Model(config, partitioner) if isinstance(config, T5Config) else DecoderModel(config, partitioner)
