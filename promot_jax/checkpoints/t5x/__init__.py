"""Native T5X checkpoints: msgpack with Zarr arrays beside it."""
