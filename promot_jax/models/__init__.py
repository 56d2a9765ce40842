"""Model families behind one interface; nothing outside this folder asks which family it holds."""

from promot_jax.models.decoder import DecoderConfig, DecoderModel

__all__ = ["DecoderConfig", "DecoderModel", "build"]


def build(config: DecoderConfig) -> DecoderModel:
    """Returns the model of a config."""
    return DecoderModel(config)
