"""A gin file for each table and figure of the paper: listed, and run for two steps on a tiny model and tiny data."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import paper_rows
import pytest
import seqio
from random_results import read_comparison

from promot_jax import main, methods
from promot_jax.checkpoints.t5x import write
from promot_jax.config import binding, gin_files
from promot_jax.data import batches
from promot_jax.models import T5Config, build

FOLDER = gin_files.folder() / "paper"
FILES = sorted(path.stem for path in FOLDER.glob("*.gin") if path.stem != "common")
LENGTHS = {"rte": (512, 8), "wmt14_enfr": (256, 256), "rte_enfr": (512, 256), "snli": (256, 8), "openbookqa": (256, 8)}
COMPARISONS = [name for name in FILES if "gradients" not in name]
SIZES = {"vocab_size": 384, "emb_dim": 16, "num_heads": 2, "num_encoder_layers": 2, "num_decoder_layers": 1}
SIZES |= {"head_dim": 8, "mlp_dim": 24}
TINY = """\
PROMPT_LENGTH = 4
TRAIN_STEPS = 2
PROMPT_TRAIN_STEPS = 2
EVAL_PERIOD = 2
PROMPT_EVAL_PERIOD = 2
BATCH_SIZE = 2
DATA_SHARDS = 1
Decoding.max_tokens = 2
Evaluation.examples = 1
Evaluation.target_examples = 2
Evaluation.curve_examples = 1
Evaluation.curve_target_examples = 1
Evaluation.tokens_per_batch = 1000000
"""


def bound(name: str) -> dict[str, object]:
    """The arguments that a file gives to its job, and the job's name as "job"."""
    overrides = [("INITIAL_CHECKPOINT_PATH", "MODEL")]
    job = binding.bind(main.CONFIGURABLES, [FOLDER / f"{name}.gin"], overrides)
    return {"job": job.func.__name__, **job.keywords}


@pytest.mark.parametrize("name", FILES)
def test_each_file_says_what_it_is_and_how_to_run_it(name: str) -> None:
    text = (FOLDER / f"{name}.gin").read_text("utf-8")
    header = re.match(r"(#.*\n)+", text)
    assert header and f"python -m promot_jax.main --gin_file=paper/{name}.gin" in header[0]
    assert "Hardware:" in header[0] and "Time:" in header[0] and "Expected" in header[0]
    assert len(text.splitlines()) < 40 and "include" in text


@pytest.mark.parametrize("name", COMPARISONS)
def test_each_file_has_the_papers_settings(name: str) -> None:
    arguments = bound(name)
    assert arguments["job"] == "compare"
    experiment, tuning = arguments["experiment"], arguments["tuning"]
    assert (tuning.model.batch_size, tuning.model.optimizer.learning_rate) == (64, 1e-3)
    assert tuning.model.steps == (20000 if "tradeoff" in name else 1000) and tuning.prompt.steps == 5000
    decoder = name == "decoder_enfr"
    assert (experiment.prompt_length, tuning.prompt.optimizer.learning_rate) == ((50, 0.3) if decoder else (100, 0.2))
    assert experiment.evaluation.decoding.beams == 4 and experiment.evaluation.sentinel != decoder
    assert experiment.modules == "promot_jax.tasks.paper"
    for training in (tuning.prompt, tuning.model):
        assert (training.optimizer.name, training.batch_size, training.pack) == ("adafactor", 64, False)
        assert (training.dropout_rate, training.label_smoothing) == (0.1, 0.1)
    assert (tuning.prompt.eval_period, tuning.model.eval_period) == (1000, 100)
    assert (experiment.prompt_init.method, experiment.prompt_init.scale) == ("uniform", 0.5)
    assert experiment.evaluation.shots == ((1,) if name == "table1_samples" else (1, 4))
    assert experiment.evaluation.max_input_length == 1024  # of articles; other inputs are shorter
    for task, lengths in (arguments["tasks"] or {experiment.task: experiment.feature_lengths}).items():
        assert (lengths["inputs"], lengths["targets"]) == LENGTHS[task]
        assert experiment.evaluation.decoding.max_tokens >= lengths["targets"]  # the paper cuts no translation
    for method in arguments["methods"]:
        assert methods.parse(method)[0] in methods.METHODS


def test_a_checkpoint_has_to_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--gin_file=paper/rte.gin"]) == 2
    assert "add --gin.INITIAL_CHECKPOINT_PATH=VALUE" in capsys.readouterr().err


def test_each_table_and_figure_is_listed() -> None:
    page = (Path(__file__).parents[1] / "docs" / "paper.md").read_text("utf-8")
    assert sorted(re.findall(r"^\|.*`paper/(\w+)\.gin`", page, re.M)) == FILES


@pytest.fixture(name="workspace", scope="module")
def _workspace(tiny_folder: Path) -> Iterator[Path]:
    """The data; a tiny T5 as T5X writes it, and the tiny decoder, each with a gin file for after the paper's."""
    paper_rows.prepare_all(tiny_folder / "tfds")
    model = build(T5Config(**SIZES))
    write.write(tiny_folder / "t5", 0, jax.jit(model.init)(jax.random.key(0)))
    lines = [f'INITIAL_CHECKPOINT_PATH = "{tiny_folder / "t5"}"', 'VOCABULARY = "bytes"']
    lines += [f"T5Config.{name} = {size}" for name, size in SIZES.items()]
    (tiny_folder / "t5.gin").write_text(TINY + "\n".join(lines))
    decoder = [f'INITIAL_CHECKPOINT_PATH = "{tiny_folder / "tiny.gguf"}"', "Experiment.model = None"]
    decoder.append("Evaluation.max_input_length = 480")  # its context is 512
    (tiny_folder / "decoder.gin").write_text(TINY + "\n".join(decoder))
    seqio.set_tfds_data_dir_override(str(tiny_folder / "tfds"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "WIDTHS", (1024,))  # compiling is most of the time
        yield tiny_folder
    seqio.set_tfds_data_dir_override(None)


def run(name: str, workspace: Path, *overrides: str) -> Path:
    """Runs a file on a tiny model and returns its workdir."""
    own = "decoder.gin" if name == "decoder_enfr" else "t5.gin"
    files = [f"--gin_file=paper/{name}.gin", f"--gin_file={workspace / own}"]
    workdir = workspace / "-".join([name, *map(str, map(len, overrides))])
    assert main.main([*files, f"--workdir={workdir}", *overrides]) == 0
    return workdir


def test_one_of_them_runs_on_less(workspace: Path) -> None:
    workdir = run("figure1_icl_loss", workspace, "--gin.ICL_MIXTURE=cb", "--gin.Evaluation.shots=(1,)")
    (finetuned,) = read_comparison(workdir).methods["finetune"]
    assert finetuned.target.task == "rte" and finetuned.steps == {"finetune": 2}
    assert [list(point.tasks) for point in finetuned.curve] == [["cb"], ["cb"]]
    for number in (3, 7):
        gin_file, out = f"--gin_file=paper/figure{number}_gradients.gin", workspace / f"figure{number}"
        where = f'RUN = "{workdir}/finetune/seed_0/finetune"\nSTEPS = (0, 2)\nBATCHES = 1\n'
        own = (workspace / "t5.gin").read_text("utf-8").partition("INITIAL_CHECKPOINT_PATH")
        (workspace / "gradients.gin").write_text(where + own[1] + own[2])
        assert main.main([gin_file, f"--gin_file={workspace / 'gradients.gin'}", f"--workdir={out}"]) == 0
        points = json.loads((out / "results.json").read_text())["points"]
        assert {point["step"] for point in points} == {0, 2}
        assert {point["scope"] for point in points} == {"last decoder layer", "all layers"}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPARISONS)
def test_each_file_runs(name: str, workspace: Path) -> None:
    workdir, arguments = run(name, workspace), bound(name)
    experiment = arguments["experiment"]
    for task in arguments["tasks"] or [""]:
        found = read_comparison(workdir / task)
        assert list(found.methods) == list(arguments["methods"])
        assert {cell.state for cell in found.cells} == {"finished"}
        for one in (one for runs in found.methods.values() for one in runs):
            assert set(one.steps.values()) <= {2} and one.target.n >= 1
            asked = {shots: len(entry.tasks) for shots, entry in one.icl.items()}
            assert asked == {str(k): 8 for k in experiment.evaluation.shots if experiment.icl_mixture}
        assert (workdir / task / "report.md").is_file()
