"""The programs of a run, lowered from shapes alone for devices that need not exist.

They are the real ones (the training step with its optimizer, the loss, beam search) on the real mesh; nothing is
allocated.
"""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from promot_jax import methods, trees
from promot_jax.decoding.generate import generate
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.experiments.settings import Experiment
from promot_jax.files import plain
from promot_jax.methods.base import Stage
from promot_jax.models import Model, build
from promot_jax.params.dtypes import cast_weights
from promot_jax.params.lora import Lora
from promot_jax.training import state
from promot_jax.training.losses import chunked_cross_entropy
from promot_jax.training.settings import Tuning
from promot_jax.training.state import leafwise, placed
from promot_jax.training.step import make_step

Json = dict[str, Any]
PROGRAMS = (*methods.alone(), "gradient", "score", "decode")  # training steps of stages, and what is no training
_FIGURES = 3  # counts up when figures are made otherwise, so that earlier ones are not taken for them


@dataclasses.dataclass(frozen=True)
class Programs:
    """The programs of one experiment on one topology."""

    experiment: Experiment  # model, lengths, prompt, decoding
    tuning: Tuning
    partitioner: Partitioner  # with the topology's devices
    topology: str
    chips: int  # of the topology; one may be listed as several devices

    def fingerprint(self) -> str:
        """Hash of all that the figures depend on."""
        partitioner = dataclasses.replace(self.partitioner, devices=())
        experiment = dataclasses.asdict(self.experiment) | {"partitioner": None, "checkpoint": "", "modules": ""}
        del experiment["tracker"]
        libtpu = importlib.util.find_spec("libtpu") and importlib.metadata.version("libtpu")
        compilers = [jax.__version__, libtpu, _FIGURES]
        settings = [experiment, dataclasses.asdict(partitioner), dataclasses.asdict(self.tuning), compilers]
        return hashlib.sha256(json.dumps(plain(settings), sort_keys=True).encode()).hexdigest()[:16]

    def lower(self, program: str) -> tuple[Any, Json]:
        """The lowered program, and the trees of its arguments: `parameters`, `optimizer`."""
        if stage := self.stage(program):
            return self._stage(stage)
        return self._decode() if program == "decode" else self._loss(gradient=program == "gradient")

    def stage(self, program: str) -> Stage | None:
        """The stage whose training step a program is, None for the others."""
        name = methods.alone().get(program)
        return self.tuning.method(name).alone if name else None

    # ---- shapes of arguments -----------------------------------------------------------------------------------------

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
        return trees.unflatten({path: placed(leaf, NamedSharding(mesh, specs[path])) for path, leaf in flat.items()})

    def batch(self, model: Model, rows: int, prompt: int) -> trees.Tree:
        """Shapes of a training batch."""
        lengths = self.experiment.lengths
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

    def _key(self) -> jax.ShapeDtypeStruct:
        return placed(jax.eval_shape(lambda: jax.random.key(0)), self.partitioner.replicated())

    # ---- programs ----------------------------------------------------------------------------------------------------

    def _stage(self, stage: Stage) -> tuple[Any, Json]:
        """The training step of a stage, as `loop.train` makes it."""
        if stage.objective.calibration_examples:  # whatever the losses are, the program is the same
            stage = dataclasses.replace(stage, objective=stage.objective.calibrated([1.0]))
        training = self.tuning.of(stage)
        model = self.model(training.dropout_rate)
        fresh, constants, _, transform = state.build(
            model, self.params(stage.prompt, stage.lora), stage, training, self.partitioner
        )
        batch = self.batch(model, training.batch_size, self.experiment.prompt_length if stage.prompt else 0)
        step: Any = make_step(model, transform, stage, training, state.shardings(fresh))
        lowered = step.lower(fresh, constants, batch, self._key())
        return lowered, {"parameters": {**fresh.params, **constants}, "optimizer": fresh.optimizer}

    def _loss(self, *, gradient: bool) -> tuple[Any, Json]:
        """The loss of a batch with a soft prompt prepended, forward only; or its gradient by the model's parameters."""
        model, training = self.model(), self.tuning.model

        def cast(tree: trees.Tree) -> trees.Tree:
            return state.in_weight_dtype(tree, training) if gradient else cast_weights(tree, model.config.dtype)

        params = leafwise(cast, self.params())

        def loss(weights: Any, table: Any, batch: Any) -> jax.Array:
            hidden = model.hidden(weights, table, batch)
            return chunked_cross_entropy(model, weights, hidden, batch["targets"], batch["weights"], 0.0)

        if gradient:
            places = jax.tree.map(lambda leaf: leaf.sharding, params["model"])
            program = jax.jit(jax.grad(loss), out_shardings=places)
        else:
            program = jax.jit(loss)
        batch = self.batch(model, training.batch_size, self.experiment.prompt_length)
        return program.lower(params["model"], params["prompt"]["task"], batch), {"parameters": params}

    def _decode(self) -> tuple[Any, Json]:
        """Beam search of the plain model, as `Sampler.ask` calls it."""
        model = self.model()
        params = leafwise(lambda tree: cast_weights(tree, model.config.dtype), self.params(with_prompt=False))
        rows, length = self.tuning.model.batch_size, self.experiment.lengths["inputs"]
        split, replicated = self.partitioner.row_sharding(), self.partitioner.replicated()
        inputs = {
            "tokens": jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=split),
            "lengths": jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=split),
        }
        stops = jax.ShapeDtypeStruct((model.config.vocab_size,), jnp.bool_, sharding=replicated)
        limits = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=replicated)
        settings = self.experiment.evaluation.decoding
        lowered = generate.lower(model, settings, params["model"], None, inputs, stops, limits, self._key())
        return lowered, {"parameters": params}
