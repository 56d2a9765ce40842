"""A bound of a training step: its matrix products with the decoder's weights, one by one, by XLA in float32.

Nothing else is computed, neither attention's own products nor what stands between products, and each runs again and
again on the same arrays. A step that takes twice as long as this spends half of its time on something else.
"""

import collections
import statistics
import time

REPEATS = 5


def measure(
    folder: str, stage: str, rows: int, prompt: int, inputs: int, targets: int, steps: int, vocabulary: str = ""
) -> dict[str, float]:
    """Seconds of the products of an update; arguments as of `ours.train_step`.

    Each kernel takes part in two products, forward and for the gradient of its input, and in a third one for its own
    gradient where the stage trains the model. The head, which may be the table of embeddings, does so at the target
    tokens alone.
    """
    import jax
    import jax.numpy as jnp

    from promot_jax import trees
    from promot_jax.checkpoints import pretrained
    from promot_jax.distributed.partitioning import Partitioner

    del steps
    params = trees.flatten(pretrained.load(folder, Partitioner(), vocabulary=vocabulary).params)
    tied = not any(path.endswith("logits_dense/kernel") for path in params)
    counts: collections.Counter[tuple[int, int, int]] = collections.Counter()
    for path, leaf in params.items():
        head = path.endswith("logits_dense/kernel") or (tied and path.endswith("embedding"))
        if not head and not path.endswith("kernel"):
            continue
        layers, wide, out = (1, *leaf.shape[::-1]) if path.endswith("embedding") else (1, *leaf.shape)[-3:]
        tokens = rows * (targets if head else prompt + inputs + targets)
        counts[tokens, wide, out] += layers
        counts[tokens, out, wide] += layers
        if stage != "stage1":
            counts[wide, tokens, out] += layers
    product = jax.jit(jnp.dot)
    seconds = flops = 0.0
    for (m, k, n), count in counts.items():
        a, b = jnp.ones((m, k)), jnp.ones((k, n))
        product(a, b).block_until_ready()
        times = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            product(a, b).block_until_ready()
            times.append(time.perf_counter() - began)
        seconds += count * statistics.median(times)
        flops += count * 2.0 * m * k * n
    return {"seconds": seconds, "gflops_per_s": flops / seconds / 1e9}
