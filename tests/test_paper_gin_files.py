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
    early = name in ("figure1_icl_loss", "figure2_format_share")  # drawn for steps 0 to 500 by 50
    assert (
        tuning.model.steps == (500 if early else 20000 if "tradeoff" in name else 1000) and tuning.prompt.steps == 5000
    )
    decoder = name == "decoder_enfr"
    assert (experiment.prompt_length, tuning.prompt.optimizer.learning_rate) == ((50, 0.3) if decoder else (100, 0.2))
    assert experiment.evaluation.decoding.beams == 4 and experiment.evaluation.sentinel != decoder
    assert experiment.modules == "promot_jax.tasks.paper"
    for training in (tuning.prompt, tuning.model):
        assert (training.optimizer.name, training.batch_size, training.pack) == ("adafactor", 64, False)
        assert (training.dropout_rate, training.label_smoothing) == (0.1, 0.1)
    assert (tuning.prompt.eval_period, tuning.model.eval_period) == (1000, 50 if early else 100)
    assert (experiment.prompt_init.method, experiment.prompt_init.scale) == ("uniform", 0.5)
    assert experiment.evaluation.shots == ((1,) if name == "table1_samples" else (1, 4))
    assert experiment.evaluation.max_input_length == 1024  # of articles; other inputs are shorter
    for task, lengths in (arguments["tasks"] or {experiment.task: experiment.feature_lengths}).items():
        assert (lengths["inputs"], lengths["targets"]) == LENGTHS[task]
        assert experiment.evaluation.decoding.max_tokens >= lengths["targets"]  # the paper cuts no translation
    for method in arguments["methods"]:
        assert methods.parse(method)[0] in methods.METHODS


# The reference of all numbers below is the paper (arXiv 2211.00635): its tables 2 to 6 and 9 to 15, its figures 3 to 7.
# Averages of eight tasks at 1 shot; of table 2, 6, 9 and 15 single scores; of figures cosines.
PRINTED = {
    "supervised": "91.34 92.06 92.78 39.28 41.80 41.30 88.53 88.91 89.62 73.60 77.2 81.6",
    "rte": "47.65 17.52 15.43 20.10 22.26 18.75 16.56 21.24 22.33",
    "enfr": "17.52 9.15 18.87 19.91 18.75 11.67 20.64 21.99",
    "multitask": "17.52 20.06 25.88 22.62 26.17",
    "ablations": "90.97 92.06 93.86 0.75 0.03 0.83 17.82",
    "table9_1shot": "92.78 93.86 39.41 41.19",
    "table10_snli_openbookqa": "17.52 16.20 19.83 0.00 17.40 1.32",
    "table11_multitask_4shot": "18.75 20.81 26.31",
    "t5_xxl_rte": "19.75 14.07 22.23 91.7 93.5 93.14",
    "mt5_xl_enfr": "13.59 8.61 14.40 32.47 35.84 36.46",
    "decoder_enfr": "26.09 17.80 22.37 13.62 33.04 32.02",
    "lora": "39.09 39.97 41.19 4.98 5.19 13.63",
    "figure3_gradients": "0.98 0.10 0.96 0.08 0.99 0.05 0.20",
    "figure7_gradients": ".98 .85 .87 .76 .10 .96 .67 .58 .56 .08",
}


@pytest.mark.parametrize("name", PRINTED)
def test_headers_carry_the_papers_numbers(name: str) -> None:
    header = (FOLDER / f"{name}.gin").read_text("utf-8").partition("include")[0]
    assert set(PRINTED[name].split()) <= set(re.findall(r"\d*\.\d+", header))


# What the pages of results say of the paper, by the beginning of the paragraph: tables 3, 4, 5, 10 and 14.
COMPARED = {
    ("findings/one_setting.md", "ProMoT ends above the pretrained model"): "20.10 18.87 25.88 17.52 26.09 17.80 22.37 "
    "17.40",
    ("findings/one_setting.md", "Translation does less harm than labels"): "17.52 0.00 9.15 15.43 16.20",
    ("findings/one_setting.md", "The difference is largest with several tasks"): "0.00 17.40",
    ("results.md", "6. And on a task without labels?"): "17.52 9.15 15.43 16.20 0.00",
    ("results.md", "7. And with several tasks at once?"): "0.00 17.40 9.15 18.87",
    ("results.md", "11. Does ProMoT end above the pretrained model?"): "26.09 17.80 22.37 17.40 17.52",
}


@pytest.mark.parametrize(("page", "claim"), COMPARED)
def test_results_are_held_against_the_papers_numbers(page: str, claim: str) -> None:
    text = (Path(__file__).parents[1] / "docs" / page).read_text("utf-8")
    paragraph = re.split(r"\n(?:- )?\*\*|\n#", text.partition(f"**{claim}")[2])[0]
    numbers = set(COMPARED[page, claim].split())
    assert numbers <= set(re.findall(r"\d*\.\d+", paragraph)) & set(" ".join(PRINTED.values()).split())


@pytest.mark.parametrize(
    ("name", "tasks", "trained"),
    [
        ("figure5_tradeoff", ["wmt14_enfr"], ["finetune", "promot"]),
        ("figure6_tradeoff", ["wmt14_enfr"], ["finetune", "promot"]),
        ("table9_1shot", ["rte", "wmt14_enfr"], ["prompt_tuning_1shot", "promot_1shot"]),
        ("table10_snli_openbookqa", ["snli", "openbookqa"], ["pretrained", "finetune", "promot"]),
    ],
)
def test_tables_and_figures_compare_what_the_paper_compares(name: str, tasks: list[str], trained: list[str]) -> None:
    arguments = bound(name)
    assert list(arguments["methods"]) == trained
    assert list(arguments["tasks"] or [arguments["experiment"].task]) == tasks


def test_figures_3_and_7_are_of_steps_0_to_400() -> None:
    assert bound("figure7_gradients")["steps"] == (0, 100, 200, 300, 400) and bound("figure3_gradients")["steps"] == (
        0,
        400,
    )


def test_one_run_measures_both() -> None:
    for one, other in (("figure5_tradeoff", "figure6_tradeoff"), ("multitask", "table11_multitask_4shot")):
        assert bound(one) == bound(other)


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


@pytest.mark.slow
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
