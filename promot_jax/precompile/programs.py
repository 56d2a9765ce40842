"""Compiles a model's programs for TPUs that are not there, and says what each needs: the job `precompile`.

XLA:TPU comes with the package `libtpu` and compiles for any topology on any machine. Programs are the real ones (the
training step with its optimizer, the loss, beam search), on the real mesh, from shapes alone: nothing is allocated.
"""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import resource
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from promot_jax import methods, trees
from promot_jax.decoding.generate import generate
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.experiments.settings import Experiment
from promot_jax.files import plain
from promot_jax.methods.base import Stage
from promot_jax.models import Model, build
from promot_jax.params import freezing
from promot_jax.params.dtypes import cast_weights
from promot_jax.params.lora import Lora
from promot_jax.precompile import hlo, roofline
from promot_jax.training import optimizer as optim
from promot_jax.training.losses import chunked_cross_entropy
from promot_jax.training.objective import START
from promot_jax.training.settings import Tuning
from promot_jax.training.step import held, make_step

Json = dict[str, Any]
PROGRAMS = (*methods.alone(), "gradient", "score", "decode")  # training steps of stages, and what is no training
_FIGURES = 2  # counts up when figures are made otherwise, so that earlier ones are not taken for them
# How often a training step may compute what the model asks for: layers a second time where they are recomputed.
_RECOMPUTED = {"none": 0.0, "dots": 0.15, "full": 1.0}


def topology_devices(topology: str, slices: int = 1) -> tuple[Any, ...]:
    """The devices of TPU slices that need not exist.

    Raises:
        UserError: libtpu is not installed, or knows no such topology.
    """
    if topology.partition(":")[0] not in roofline.CHIPS:
        raise UserError(f"Unknown topology {topology!r}: write one like v4:4x4x4; chips: {', '.join(roofline.CHIPS)}.")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("Compiling for TPUs needs the package libtpu: pip install 'promot_jax[precompile]'.")
    import libtpu
    from jax.experimental import topologies

    # The compiler alone: no chip is looked for, here or at a metadata server.
    jax.config.update("jax_platforms", "cpu")
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_LIBRARY_PATH=libtpu.get_library_path(),
        TPU_ACCELERATOR_TYPE="v4-8",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # several such runs may go on side by side
    )
    try:
        options = {"num_slices": slices} if slices > 1 else {}
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except Exception as error:  # of whatever type this jaxlib chooses
        raise UserError(f"libtpu knows no topology {topology!r}: {str(error).splitlines()[0]}.") from error
    return tuple(description.devices)


@dataclasses.dataclass(frozen=True)
class Room:
    """Programs of one experiment on one topology.

    Attributes:
        experiment: model, lengths, prompt, decoding.
        tuning: how stages train.
        partitioner: with the topology's devices.
        topology: its name.
        chips: how many it has; a chip may be listed as several devices.
    """

    experiment: Experiment
    tuning: Tuning
    partitioner: Partitioner
    topology: str
    chips: int

    def fingerprint(self) -> str:
        """Of all that the figures depend on."""
        partitioner = dataclasses.replace(self.partitioner, devices=())
        said = dataclasses.asdict(self.experiment) | {"partitioner": None, "checkpoint": "", "modules": ""}
        found = importlib.util.find_spec("libtpu") and importlib.metadata.version("libtpu")
        compilers = [jax.__version__, found, _FIGURES]
        settings = [said, dataclasses.asdict(partitioner), dataclasses.asdict(self.tuning), compilers]
        return hashlib.sha256(json.dumps(plain(settings), sort_keys=True).encode()).hexdigest()[:16]

    # ---- programs ----------------------------------------------------------------------------------------------------

    def model(self, dropout_rate: float = 0.0) -> Model:
        """The model, with the dtype of the experiment."""
        assert self.experiment.model is not None
        config = dataclasses.replace(self.experiment.model, dtype=self.experiment.dtype, dropout_rate=dropout_rate)
        return build(config, self.partitioner)

    def params(self, with_prompt: bool = True, lora: Lora | None = None) -> trees.Tree:
        """Shapes of all parameters, float32, where they lie."""
        model = self.model()
        shapes: trees.Tree = {"model": jax.eval_shape(model.init, jax.random.key(0))}
        if with_prompt:
            rows = (self.experiment.prompt_length, model.config.emb_dim)
            shapes["prompt"] = {"task": jax.ShapeDtypeStruct(rows, jnp.float32)}
        if lora is not None:
            shapes["lora"] = jax.eval_shape(lora.init, jax.random.key(0), shapes["model"])
        specs, mesh = self.partitioner.specs(shapes), self.partitioner.mesh()
        flat = trees.flatten(shapes)
        return trees.unflatten({path: _placed(leaf, NamedSharding(mesh, specs[path])) for path, leaf in flat.items()})

    def batch(self, model: Model, rows: int, prompt: int) -> trees.Tree:
        """Shapes of a training batch."""
        lengths = self.experiment.feature_lengths
        layout = model.layout([[]], lengths["inputs"] + prompt, lengths["targets"])
        if rows % self.partitioner.rows():
            raise UserError(
                f"A batch of {rows} rows does not divide over {self.partitioner.rows()} data shards; change BATCH_SIZE."
            )
        sharding = self.partitioner.row_sharding()
        return {
            name: jax.ShapeDtypeStruct((rows, *array.shape[1:]), array.dtype, sharding=sharding)
            for name, array in layout.items()
        }

    def lower(self, program: str) -> tuple[Any, Json]:
        """The lowered program, and the trees of its arguments: `parameters`, `optimizer`."""
        if stage := self.stage(program):
            return self._stage(stage)
        training, prompt = self.tuning.model, self.experiment.prompt_length
        model = self.model()
        if program == "decode":
            return self._decode(model)
        params = self.params()
        if program == "gradient":
            params = _changed(lambda tree: held(tree, training), params)
        if program == "score":
            params = _changed(lambda tree: cast_weights(tree, model.config.dtype), params)
        batch = self.batch(model, training.batch_size, prompt)

        def loss(trained: Any, table: Any, batch: Any) -> jax.Array:
            hidden = model.hidden(trained, table, batch)
            return chunked_cross_entropy(model, trained, hidden, batch["targets"], batch["weights"], 0.0)

        table = params["prompt"]["task"]
        if program == "gradient":
            out = jax.tree.map(lambda leaf: leaf.sharding, params["model"])
            lowered = jax.jit(jax.grad(loss), out_shardings=out).lower(params["model"], table, batch)
        else:
            lowered = jax.jit(loss).lower(params["model"], table, batch)
        return lowered, {"parameters": params}

    def stage(self, program: str) -> Stage | None:
        """The stage whose training step a program is, None for the others."""
        name = methods.alone().get(program)
        return self.tuning.method(name).alone if name else None

    def _stage(self, stage: Stage) -> tuple[Any, Json]:
        """The training step of a stage, as `training.loop` makes it."""
        training = self.tuning.of(stage)
        model = self.model(training.dropout_rate)
        params = self.params(stage.prompt, stage.lora)
        trained, frozen = freezing.split(params, stage.trains, training.freeze)
        if "model" not in trained:
            frozen = _changed(lambda tree: cast_weights(tree, model.config.dtype), frozen)
        if stage.uses_start:
            frozen = frozen | {START: trained.get("model", {})}
        trained = _changed(lambda tree: held(tree, training), trained)
        transform = optim.build(training.steps, training.optimizer, prompt=training.prompt_optimizer)
        abstract = jax.eval_shape(transform.init, trained)
        optimizer = jax.tree.map(_placed, abstract, self.partitioner.like(abstract, trained))
        replicated = self.partitioner.replicated()
        state = {"params": trained, "optimizer": optimizer, "step": _placed(jnp.int32(0), replicated)}
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        step: Any = make_step(model, transform, stage, training, shardings)
        prompt = self.experiment.prompt_length if stage.prompt else 0
        batch = self.batch(model, training.batch_size, prompt)
        key = _placed(jax.eval_shape(lambda: jax.random.key(0)), replicated)
        lowered = step.lower(state, frozen, batch, key)
        return lowered, {"parameters": {**trained, **frozen}, "optimizer": optimizer}

    def _decode(self, model: Model) -> tuple[Any, Json]:
        """Beam search of the plain model, as `Evaluator.ask` calls it."""
        params = self.params(with_prompt=False)
        params = _changed(lambda tree: cast_weights(tree, model.config.dtype), params)
        rows, length = self.tuning.model.batch_size, self.experiment.feature_lengths["inputs"]
        split, replicated = self.partitioner.row_sharding(), self.partitioner.replicated()
        inputs = {
            "tokens": jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=split),
            "lengths": jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=split),
        }
        stops = jax.ShapeDtypeStruct((model.config.vocab_size,), jnp.bool_, sharding=replicated)
        limits = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=replicated)
        key = _placed(jax.eval_shape(lambda: jax.random.key(0)), replicated)
        settings = self.experiment.evaluation.decoding
        lowered = generate.lower(model, settings, params["model"], None, inputs, stops, limits, key)
        return lowered, {"parameters": params}

    # ---- figures -----------------------------------------------------------------------------------------------------

    def flops(self, program: str) -> tuple[float, tuple[float, float]]:
        """FLOPs that the model asks for in a program, and how often they may be computed: at least, at most."""
        model, settings = self.model().config, self.experiment.evaluation.decoding
        lengths, rows = self.experiment.feature_lengths, self.tuning.model.batch_size
        inputs, targets = lengths["inputs"], lengths["targets"]
        if program == "decode":
            return roofline.decoding_flops(model, rows, inputs, settings.max_tokens, settings.beams), (0.9, 1.25)
        stage = self.stage(program)
        if stage is None or stage.prompt:
            inputs += self.experiment.prompt_length
        if stage:
            rows = self.tuning.of(stage).batch_size
        forward = roofline.forward_flops(model, rows, inputs, targets, targets)
        # Behind the forward pass: gradients of activations, and of weights where these are trained.
        passes = 1 if program == "score" else 2 if stage and "model" not in stage.trains else 3
        passes += bool(stage and stage.objective.uses_start)  # the model at the start, forward
        again = _RECOMPUTED[str(model.remat)] if program != "score" else 0.0
        return passes * forward, (0.95, 1.1 * (passes + again) / passes)

    def measure(self, program: str) -> Json:
        """Compiles a program and returns its figures per chip; those that fail a check are left out."""
        chip = roofline.CHIPS[self.topology.partition(":")[0]]
        devices = self.partitioner.mesh().size
        cores = devices // self.chips
        lowered, arguments = self.lower(program)
        stage = self.stage(program)
        training = self.tuning.of(stage) if stage else self.tuning.model
        mesh = {axis: int(size) for axis, size in self.partitioner.mesh().shape.items()}
        entry: Json = {"program": program, "topology": self.topology, "chips": self.chips, "devices": devices}
        entry |= {"mesh": mesh, "batch": training.batch_size}
        arguments_bytes = {name: cores * _bytes_per_device(tree) for name, tree in arguments.items()}
        # A run keeps the model it started from, in float32: every evaluation and method comes back to it.
        kept = 0.0 if program == "gradient" else cores * _bytes_per_device(self.params(with_prompt=False))
        started, busy = time.monotonic(), time.process_time()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            needed = _needed(str(error), sum(arguments_bytes.values()) / cores)
            if needed is None:
                raise
            memory = {"optimizer": 0.0, **arguments_bytes, "base": kept, "total": kept + cores * needed}
            return entry | {"memory": memory, "verdict": roofline.verdict(memory, chip, stage is not None)}
        entry["compile_seconds"] = time.monotonic() - started
        entry["compile_cpu_seconds"] = time.process_time() - busy
        entry["compile_peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        sizes = compiled.memory_analysis()
        output = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        entry["device"] = {
            "arguments": sizes.argument_size_in_bytes,
            "temporaries": sizes.temp_size_in_bytes,
            "outputs": output,
        }
        memory = {
            "optimizer": 0.0,
            **arguments_bytes,
            "temporaries": cores * sizes.temp_size_in_bytes,
            "outputs": cores * output,
        }
        memory |= {"base": kept}
        memory["total"] = kept + cores * (sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + output)
        entry |= {
            "memory": memory,
            "verdict": roofline.verdict(memory, chip, stage is not None or program == "gradient"),
        }
        text = compiled.as_text()
        steps = self.experiment.evaluation.decoding.max_tokens - 1
        cost, once = hlo.Program(text, steps).cost, hlo.Program(text, once=True).cost
        asked, share = self.flops(program)
        entry["failed_checks"] = roofline.checks(
            cost,
            once,
            compiled.cost_analysis(),
            sizes.argument_size_in_bytes,
            asked,
            devices,
            share,
            slices=len({getattr(device, "slice_index", 0) for device in self.partitioner.mesh().devices.flat}),
            trains="model" in stage.trains if stage else program == "gradient",
        )
        if entry["failed_checks"]:
            return entry
        entry |= {
            "flops": cores * cost.flops,
            "model_share": asked / (devices * cost.flops),
            "bytes": cores * cost.bytes,
            "collectives": {kind: cores * sent for kind, sent in cost.collectives.items()},
            "collective_counts": dict(cost.counts),
            "network": cores * cost.network,
            **roofline.bounds(cost, chip, cores),
        }
        entry["utilization"] = asked / (self.chips * chip.flops * entry["step_seconds"])
        return entry


def _needed(message: str, arguments: float) -> float | None:
    """Bytes that a program needs on a device, where a compiler's message says that these are too many; else None."""
    alone = re.search(r"required for HLO temporaries \(([\d.]+)([GM])\) exceeds available HBM", message)
    found = alone or re.search(r"[Uu]sed ([\d.]+)([GM]) of [\d.]+[GM] hbm", message)
    if not found:
        return None
    return float(found[1]) * {"G": 1, "M": 1 / 1024}[found[2]] * roofline.GIB + (arguments if alone else 0.0)


def _placed(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _changed(change: Callable[[Any], Any], placed: Any) -> Any:
    """Shapes of what a function makes of a tree, leaf by leaf, where the tree's own lie."""
    return jax.tree.map(lambda leaf, own: _placed(leaf, own.sharding), jax.eval_shape(change, placed), placed)


def _bytes_per_device(tree: Any) -> float:
    """Bytes of a tree's part on one device."""
    sizes = (np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    return float(sum(sizes))
