"""The search for a layout: what its estimates say, what it compiles, and the gin file that it leaves."""

import dataclasses

import numpy as np
import pytest
from test_gin_files import bound

from promot_jax import trees
from promot_jax.errors import UserError
from promot_jax.jobs import precompile as job_module
from promot_jax.jobs.precompile import precompile
from promot_jax.precompile import measure, roofline
from promot_jax.precompile.estimate import estimate
from promot_jax.precompile.programs import Programs
from promot_jax.precompile.search import Layout, layouts, search

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
BATCH_SIZE = 16
"""


@dataclasses.dataclass(frozen=True)
class Chip:
    coords: tuple[int, ...]
    core_on_chip: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"
    process_index: int = 0


CHIPS = tuple(Chip((i, 0, 0)) for i in range(8))


@pytest.fixture(name="files", scope="module")
def _files(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small.gin"
    path.write_text(MODEL)
    return ("paper.gin", str(path))


@pytest.fixture(name="given", scope="module")
def _given(files):
    """A layout on eight chips, fsdp 2 x model 4, remat full."""
    arguments = bound("precompile.gin", *files, "meshes/2d.gin")
    partitioner = dataclasses.replace(arguments["experiment"].partitioner, devices=CHIPS)
    return Programs(arguments["experiment"], arguments["tuning"], partitioner, "v5e:2x4", 8)


@pytest.fixture(name="guess")
def _guess(given):
    shapes = trees.flatten(given.params(with_prompt=False)["model"])

    def guess(**changes):
        layout = dataclasses.replace(Layout.of(given), **changes)
        return estimate(layout.applied(given), "stage2", shapes)

    return guess


def test_all_meshes_that_divide_are_tried(given):
    found = layouts(given, "stage2")
    meshes = {(layout.data, layout.fsdp, layout.model) for layout in found}
    assert all(np.prod(mesh) == 8 and mesh[2] in (1, 2, 4) for mesh in meshes)  # four heads do not divide over eight
    assert {(1, 8, 1), (8, 1, 1), (2, 2, 2), (1, 2, 4)} <= meshes
    assert all(16 % (layout.data * layout.fsdp * layout.microbatches) == 0 for layout in found)
    assert {layout.remat for layout in found} == {"none", "dots", "attention", "mlp", "full"}
    assert Layout.of(given) in found


def test_what_the_estimate_says_of_a_layout(given, guess):
    needed, _ = measure.flops(given, "stage2")
    assert guess(remat="none").compute == pytest.approx(needed / 8 / roofline.CHIPS["v5e"].flops)
    order = [guess(remat=remat).compute for remat in ("none", "attention", "full")]
    assert order[0] == guess(remat="dots").compute < order[1] < order[2] < 4 / 3 * order[0]
    memory = [guess(remat=remat).memory for remat in ("full", "mlp", "dots", "none")]
    assert memory == sorted(memory) and len({*memory}) == 4
    assert guess(microbatches=4).memory < guess().memory and guess(microbatches=4).links > guess().links
    assert guess(weight_dtype="bfloat16").memory < guess().memory
    alone = guess(data=8, fsdp=1, model=1)  # sends gradients alone, and holds everything
    weights = sum(leaf.size for leaf in trees.flatten(given.params(with_prompt=False)["model"]).values())
    assert alone.links == pytest.approx(2 * 4 * weights * 7 / 8 / roofline.CHIPS["v5e"].links)
    assert alone.memory > guess().memory


def figures(seconds, verdict="fits"):
    entry = {"verdict": verdict, "memory": {"total": 2.0**30}, "topology": "v5e:2x4", "slices": 1, "batch": 16}
    entry |= {"failed_checks": [], "flops": 1e12, "bytes": 1e9, "collectives": {}, "bound": "links"}
    return entry | {"step_seconds": seconds, "utilization": 0.5, "compile_cpu_seconds": 1.0, "compile_seconds": 1.0}


def test_the_promising_are_compiled_first_and_the_best_wins(given):
    asked = []

    def compiled(programs):
        asked.append(Layout.of(programs))
        return figures(1.0 if len(asked) == 3 else 2.0, "does not fit" if len(asked) == 4 else "fits")

    ranked, note = search(given, "stage2", 5, compiled)
    assert len(asked) == len(ranked) == 5 and asked[0] == Layout.of(given)
    assert ranked[0] == (asked[2], figures(1.0)) and ranked[-1][0] == asked[3]
    assert "5 were compiled" in note
    guesses = layouts(given, "stage2")
    assert guesses[asked[1]].seconds == pytest.approx(min(guess.seconds for guess in guesses.values()), rel=0.01)


def test_a_search_ends_when_no_layout_can_be_faster(given):
    """The given one takes as long as the products alone: no other can beat it."""
    least = min(guess.compute for guess in layouts(given, "stage2").values())
    ranked, _ = search(given, "stage2", 100, lambda programs: figures(least))
    assert len(ranked) == 1


def test_a_search_that_finds_nothing_says_so(given):
    with pytest.raises(UserError, match="No layout was found that fits"):
        search(given, "stage2", 3, lambda programs: figures(1.0, "does not fit: 20 of 16 GiB"))


def test_the_job_writes_a_gin_file_that_a_run_takes(files, tmp_path, monkeypatch, capsys):
    measured = []

    def counted(programs, program):
        measured.append((program, Layout.of(programs)))
        return figures(1.0 / len(measured))

    monkeypatch.setattr(job_module, "topology_devices", lambda topology, slices: CHIPS)
    monkeypatch.setattr(job_module, "measure", counted)
    job = bound("precompile.gin", *files, "meshes/2d.gin", TOPOLOGY="v5e:2x4", SEARCH=True, TRIALS=4)
    del job["job"]
    for _ in range(2):
        precompile(tmp_path, **job)
    assert len(measured) == 4 and {program for program, _ in measured} == {"stage2"}

    best = measured[-1][1]
    run = bound("promot.gin", *files, str(tmp_path / "layout.gin"))
    partitioner, training = run["experiment"].partitioner, run["tuning"].model
    assert (partitioner.data, partitioner.fsdp, partitioner.model) == (best.data, best.fsdp, best.model)
    assert run["experiment"].model.remat == best.remat
    assert (training.weight_dtype, training.microbatches) == (best.weight_dtype, best.microbatches)
    assert "(as given)" in (tmp_path / "search.md").read_text()
    assert f"[search] {best}" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"topology": ("v5e:2x4", "v5e:4x4")}, {"search_program": "decode"}, {"trials": 0}])
def test_what_cannot_be_searched_is_refused(files, tmp_path, change):
    job = bound("precompile.gin", *files, SEARCH=True)
    del job["job"]
    with pytest.raises(UserError, match="A search takes one TOPOLOGY, at least one of TRIALS"):
        precompile(tmp_path, **{**job, **change})
