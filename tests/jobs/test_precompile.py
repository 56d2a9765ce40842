"""The job `precompile`: what it compiles and reports, on this machine's device, and for a TPU that is not there."""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest
from test_gin_files import bound

from promot_jax import main, methods, trees
from promot_jax.distributed import preemption
from promot_jax.errors import PreemptedError, UserError
from promot_jax.jobs import precompile as job_module
from promot_jax.jobs.precompile import precompile
from promot_jax.methods.promot import STAGE2
from promot_jax.precompile import hlo, measure, programs, topology
from promot_jax.precompile.estimate import estimate
from promot_jax.precompile.programs import PROGRAMS, Programs
from promot_jax.precompile.roofline import CHIPS
from promot_jax.precompile.summary import markdown, sentence
from promot_jax.training import step
from promot_jax.training.objective import START

MODEL = """\
Experiment.model = @T5Config()
T5Config.vocab_size = 512
T5Config.emb_dim = 128
T5Config.num_heads = 4
T5Config.num_encoder_layers = 2
T5Config.num_decoder_layers = 2
T5Config.head_dim = 32
T5Config.mlp_dim = 256
T5Config.remat = "full"
TASK_FEATURE_LENGTHS = {"inputs": 28, "targets": 8}
PROMPT_LENGTH = 4
BATCH_SIZE = 4
Decoding.max_tokens = 6
Decoding.beams = 2
"""


@pytest.fixture(name="files", scope="module")
def _files(tmp_path_factory):
    """The gin files of a run, a small model's among them."""
    path = tmp_path_factory.mktemp("model") / "small.gin"
    path.write_text(MODEL)
    return ("precompile.gin", "paper.gin", str(path))


@pytest.fixture(name="small", scope="module")
def _small(files):
    """Programs for this machine's one device, counted as a v5e."""
    arguments = bound(*files)
    partitioner = dataclasses.replace(arguments["experiment"].partitioner, devices=tuple(jax.devices()))
    return Programs(arguments["experiment"], arguments["tuning"], partitioner, "v5e:1x1", 1)


def test_the_gin_file_compiles_what_the_paper_trains(files):
    arguments = bound(*files, TOPOLOGY="v5p:2x2x2")
    assert arguments["job"] == "precompile" and arguments["topology"] == "v5p:2x2x2"
    assert {"stage1", "stage2", "finetune", "score", "decode"} == set(arguments["programs"])
    assert arguments["experiment"].dtype == "bfloat16" and arguments["tuning"].model.optimizer.name == "adafactor"


# Steps whose arguments are those of another one: losses, patterns and texts are methods' own tests.
LIKE_OTHERS = {"attention_only", "dft", "eaft", "flow", "gate_up_only", "hard_prompt", "hard_prompt_long", "lora_all"}
LIKE_OTHERS |= {"replay", "stm", "talr"}


@pytest.mark.parametrize(
    "program", [pytest.param(name, marks=[pytest.mark.slow] * (name in LIKE_OTHERS)) for name in PROGRAMS]
)
def test_programs_are_lowered_from_shapes(small, program):
    before = len(jax.live_arrays())
    lowered, arguments = small.lower(program)

    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(arguments))
    assert len(jax.live_arrays()) - before < 20  # constants of the programs, no parameters
    flat = trees.flatten({name: tree for name, tree in arguments["parameters"].items() if name != START})
    stage = small.stage(program)
    assert (START in arguments["parameters"]) == bool(stage and stage.uses_start)
    trained = f"{stage.trains[0]}/" if stage else "model/" if program == "gradient" else "-"
    kernels = {path: leaf.dtype for path, leaf in flat.items() if path.endswith(("/kernel", "/embedding", "/task"))}
    assert all(str(dtype) == "float32" for path, dtype in kernels.items() if path.startswith((trained, "prompt/")))
    frozen = {str(dtype) for path, dtype in kernels.items() if not path.startswith((trained, "prompt/"))}
    # A step for a TPU has them in bfloat16 (`test_frozen_weights_of_a_step_for_a_tpu`), one for this CPU has not.
    assert frozen == (set() if trained == "model/" else {"float32"} if stage else {"bfloat16"})
    assert any(path.startswith("prompt/") for path in flat) == (stage.prompt if stage else program != "decode")
    assert any(path.startswith("lora/") for path in flat) == bool(stage and stage.lora)
    assert ("optimizer" in arguments) == (program in methods.alone())
    assert lowered.as_text().startswith("module")


def test_the_step_is_the_one_that_trains(small, monkeypatch):
    """Not a twin of it: what `make_step` builds, with the stage's optimizer."""
    asked = []
    make_step = step.make_step
    monkeypatch.setattr(programs, "make_step", lambda *given: asked.append(given) or make_step(*given))
    small.lower("stage2")
    ((model, _, stage, training, shardings),) = asked
    assert stage == STAGE2 and training == small.tuning.of(STAGE2)
    assert model.config.dropout_rate == training.dropout_rate == 0.1
    assert set(vars(shardings)) == {"params", "optimizer", "step"}


def test_figures_of_one_device_agree_with_the_model(small):
    """Compiled for this machine: its products are those that the model asks for, recomputed layers once more."""
    entry = measure.measure(small, "stage2")
    assert entry["failed_checks"] == [] and entry["verdict"].startswith("fits")
    assert 0.7 < entry["model_share"] < 1.0
    shapes = jax.eval_shape(small.model().init, jax.random.key(0))
    expected = 4 * (trees.count({"model": shapes}) + 4 * 128)
    assert entry["memory"]["parameters"] == expected
    assert entry["memory"]["optimizer"] < expected / 20  # Adafactor's moments are factored
    assert entry["step_seconds"] == max(entry["seconds"].values()) and entry["collectives"] == {}
    table = markdown([entry | {"slices": 1}])
    assert "| stage2 | v5e:1x1 | 1 | 4 |" in table
    assert len({line.count("|") for line in table.splitlines()}) == 1


def test_figures_that_fail_a_check_are_not_shown(small, monkeypatch):
    monkeypatch.setattr(measure, "flops", lambda given, program: (1e6, (0.9, 1.1)))
    entry = measure.measure(small, "score") | {"slices": 1}
    assert "times what the model asks for" in entry["failed_checks"][0]
    assert not {"flops", "bytes", "step_seconds", "collectives"} & set(entry)
    assert "times what the model asks for" in sentence(entry)
    assert markdown([entry]).splitlines()[-1].endswith("|  |  |  |  |  |  |  |")


@pytest.fixture(name="here")
def _here(monkeypatch):
    """Topologies that are this machine's device."""
    monkeypatch.setattr(job_module, "topology_devices", lambda topology, slices: (Chip(),))


@dataclasses.dataclass(frozen=True)
class Chip:
    coords: tuple[int, ...] = (0, 0, 0)
    core_on_chip: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"


def test_what_was_measured_is_not_compiled_again(files, tmp_path, monkeypatch, here, capsys):
    measured = []

    def counted(given, program):
        measured.append((program, given.tuning.model.batch_size))
        memory = {"parameters": 1.0, "optimizer": 0.0, "base": 0.0, "total": 20 * 2**30}
        mesh = {"data": 1, "fsdp": 1, "model": 1}
        entry = {"program": program, "topology": given.topology, "mesh": mesh, "batch": 4, "memory": memory}
        return entry | {"verdict": "does not fit: 20 of 16 GiB"}

    monkeypatch.setattr(job_module, "measure", counted)
    job = {**bound(*files), "topology": ("v5e:1x1",), "programs": ("stage1", "score")}
    del job["job"]
    for _ in range(2):
        precompile(tmp_path, **job)
    assert measured == [("stage1", 4), ("score", 4)]
    precompile(tmp_path, **{**job, "rows_per_chip": 2})
    assert measured[2:] == [("stage1", 2), ("score", 2)]
    assert len(json.loads((tmp_path / "precompile.json").read_text())) == 4
    with monkeypatch.context() as patch:
        patch.setattr(preemption, "stops", lambda: True)
        precompile(tmp_path, **job)  # nothing is left to do
        with pytest.raises(PreemptedError, match="Preempted between two programs"):
            precompile(tmp_path, **{**job, "rows_per_chip": 8})
    assert len(measured) == 4
    assert (tmp_path / "precompile.md").read_text().count("**too much**") == 2
    assert "[score] does not fit: 20 of 16 GiB." in capsys.readouterr().out
    (tmp_path / "precompile.json").write_text("[")
    with pytest.raises(UserError, match=r"cannot be read as JSON.*; delete it to compile again"):
        precompile(tmp_path, **job)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topology": "v9:4x4"}, "Unknown topology 'v9:4x4': write one like v4:4x4x4; chips: v4, v5e, v5p, v6e"),
        ({"programs": ("gradients",)}, r"Unknown program 'gradients' \(did you mean 'gradient'\?\)"),
        ({"experiment": None}, "Which model"),
    ],
)
def test_what_cannot_be_compiled_is_refused(files, tmp_path, change, message):
    job = bound(*files)
    if "experiment" in change:
        change = {"experiment": dataclasses.replace(job["experiment"], model=None)}
    del job["job"]
    with pytest.raises(UserError, match=message):
        precompile(tmp_path, **{**job, **change})
    assert not [*tmp_path.iterdir()]


def test_a_batch_that_does_not_divide_is_refused(small):
    eight = np.array([dataclasses.replace(Chip(), coords=(i, 0, 0)) for i in range(8)])
    wide = dataclasses.replace(small, partitioner=dataclasses.replace(small.partitioner, devices=tuple(eight)))
    with pytest.raises(UserError, match="A batch of 4 rows does not divide over 8 data shards; change BATCH_SIZE"):
        wide.batch(wide.model(), 4, 0)


def test_a_compiler_that_refuses_says_how_much_is_needed():
    """The messages of libtpu 0.0.52 and of earlier ones."""
    said = "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    said += "temporaries (18.50G) exceeds available HBM (15.75G). HLO module: jit_step."
    assert measure._needed(said, arguments=2.0**30) == 19.5 * 2**30
    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 512.0M of 15.75G hbm."
    assert measure._needed(said, arguments=2.0**30) == 2**29
    assert measure._needed("INTERNAL: something else", arguments=0.0) is None


def test_libtpu_is_asked_for(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'promot_jax\[precompile\]'"):
        topology.topology_devices("v4:2x2x1")


# ---- with libtpu -----------------------------------------------------------------------------------------------------

# Of which the chip's tiles, 8 by 128, are not mostly padding.
SIZES = {
    "T5Config.emb_dim": 512,
    "T5Config.num_heads": 8,
    "T5Config.head_dim": 64,
    "T5Config.mlp_dim": 1024,
    "T5Config.vocab_size": 2048,
    "TASK_FEATURE_LENGTHS": {"inputs": 124, "targets": 128},
    "BATCH_SIZE": 16,
}
TPU_SIZES = [f"--gin.{name}={value!r}" for name, value in SIZES.items()]


DECODER = """\
Experiment.model = @DecoderConfig()
DecoderConfig.vocab_size = 2048
DecoderConfig.emb_dim = 512
DecoderConfig.num_heads = 8
DecoderConfig.num_kv_heads = 4
DecoderConfig.num_layers = 6
DecoderConfig.head_dim = 64
DecoderConfig.mlp_dim = 1024
DecoderConfig.window = 128
DecoderConfig.global_every = 3
DecoderConfig.attention_softcap = 50.0
TASK_FEATURE_LENGTHS = {"inputs": 380, "targets": 128}
PROMPT_LENGTH = 4
BATCH_SIZE = 8
"""


@pytest.mark.libtpu
def test_topologies():
    cores = topology.topology_devices("v4:2x2x1")
    assert len(cores) == 4 and len({tuple(core.coords) for core in cores}) == 4  # a v4 chip is one device
    assert len({device.slice_index for device in topology.topology_devices("v5e:4x4", 2)}) == 2
    with pytest.raises(UserError, match="libtpu knows no topology 'v4:3x3x7'"):
        topology.topology_devices("v4:3x3x7")


@pytest.mark.libtpu
def test_frozen_weights_of_a_step_for_a_tpu(files):
    arguments = bound(*files)
    devices = tuple(topology.topology_devices("v4:2x1x1"))
    partitioner = dataclasses.replace(arguments["experiment"].partitioner, devices=devices)
    _, given = Programs(arguments["experiment"], arguments["tuning"], partitioner, "v4:2x1x1", 1).lower("stage1")
    kernels = {str(leaf.dtype) for path, leaf in trees.flatten(given["parameters"]).items() if path.endswith("/kernel")}
    assert kernels == {"bfloat16"}


@pytest.mark.libtpu
def test_the_command_compiles_for_a_tpu(files, tmp_path, capsys):
    arguments = [f"--gin_file={name}" for name in (*files, "meshes/2d.gin")]
    arguments += ['--gin.PROGRAMS=("stage1","decode")', "--gin.Partitioner.model=2", f"--workdir={tmp_path}"]
    arguments += TPU_SIZES
    assert main.main([*arguments, "--gin.TOPOLOGY=v4:2x1x1"]) == 0
    found = json.loads((tmp_path / "precompile.json").read_text()).values()
    assert [entry["chips"] for entry in found] == [2, 2] and [entry["devices"] for entry in found] == [2, 2]
    assert all(entry["failed_checks"] == [] and entry["verdict"].startswith("fits") for entry in found)
    assert all(entry["collectives"] for entry in found)
    assert "at least" in capsys.readouterr().out


@pytest.mark.libtpu
def test_between_slices_go_the_gradients_and_little_else(files, tmp_path):
    arguments = [f"--gin_file={name}" for name in (*files, "meshes/slices.gin")]
    arguments += ['--gin.PROGRAMS=("stage2",)', "--gin.SLICES=2", f"--workdir={tmp_path}"]
    arguments += TPU_SIZES
    assert main.main([*arguments, "--gin.TOPOLOGY=v5e:2x2"]) == 0
    (entry,) = json.loads((tmp_path / "precompile.json").read_text()).values()
    assert entry["failed_checks"] == [] and entry["slices"] == 2 and entry["chips"] == 8
    # Of two slices, each sends its sums once: float32, in as many parts as a slice has chips.
    gradients = entry["memory"]["parameters"]
    assert gradients <= entry["network"] < 1.1 * gradients + 2**20
    assert entry["seconds"]["network"] == entry["network"] / 3.125e9
    assert "GB between slices | " in (tmp_path / "precompile.md").read_text()


@pytest.mark.libtpu
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_a_decoder_trains_by_splash_attention_on_a_mesh(files, tmp_path, remat):
    """Windows in two of three layers, a soft cap, grouped heads: the kernels compile, their products are counted."""
    (tmp_path / "decoder.gin").write_text(DECODER + f"DecoderConfig.remat = '{remat}'\n")
    settings = bound(*files[:2], str(tmp_path / "decoder.gin"), "meshes/2d.gin", **{"Partitioner.model": 2})
    partitioner = dataclasses.replace(settings["experiment"].partitioner, devices=topology.topology_devices("v4:2x2x1"))
    given = Programs(settings["experiment"], settings["tuning"], partitioner, "v4:2x2x1", 4)
    lowered, _ = given.lower("stage2")
    compiled = lowered.compile()
    text = compiled.as_text()
    assert all(f"splash_mha_{kernel}_segmented" in text for kernel in ("fwd", "dkv", "dq"))
    figures = measure._figures(given, "stage2", compiled, CHIPS["v4"])
    assert figures["failed_checks"] == [] and 0.7 < figures["model_share"] < 1.0
    layers, rows, heads, length, head_dim = 6, 8, 8, 512, 64
    product = 2 * layers * rows * heads * length * length * head_dim / given.chips
    # "dots" keeps what the backward kernels need of the forward one.
    products = 2 + 4 + 3 + 2 * (remat == "full")
    assert hlo.Program(text).cost.kernel_flops == products * product


@pytest.mark.libtpu
def test_the_command_searches_a_layout(files, tmp_path, capsys):
    """The estimates that order the layouts are near what the compiler makes of them."""
    arguments = [f"--gin_file={name}" for name in (*files, "meshes/2d.gin")]
    arguments += ["--gin.SEARCH=True", "--gin.TRIALS=2", "--gin.Partitioner.model=2", f"--workdir={tmp_path}"]
    assert main.main([*arguments, *TPU_SIZES, "--gin.TOPOLOGY=v4:2x2x1"]) == 0
    found = [*json.loads((tmp_path / "precompile.json").read_text()).values()]
    assert len(found) == 2 and all(entry["failed_checks"] == [] for entry in found)
    assert (tmp_path / "layout.gin").is_file() and "| fsdp 2 x model 2 (as given) | full |" in capsys.readouterr().out
    settings = bound(*files, "meshes/2d.gin", **SIZES)
    partitioner = dataclasses.replace(
        settings["experiment"].partitioner, model=2, devices=topology.topology_devices("v4:2x2x1")
    )
    given = Programs(settings["experiment"], settings["tuning"], partitioner, "v4:2x2x1", 4)
    guess = estimate(given, "stage2", trees.flatten(given.params(with_prompt=False)["model"]))
    entry = found[0]
    assert guess.compute == pytest.approx(entry["seconds"]["compute"], rel=0.1)
    assert guess.links == pytest.approx(entry["seconds"]["links"], rel=0.2)
    assert guess.memory < 1.2 * entry["memory"]["total"]
