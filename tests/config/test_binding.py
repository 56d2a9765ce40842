"""Wrong settings of the package's own jobs: one sentence that names the setting as it was typed."""

import re
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from promot_jax import main
from promot_jax.config import binding, gin_files
from promot_jax.errors import UserError

# Setting as typed, and how the message starts. At commit 0979974 each ended in a traceback, started a run, or was named
# by a parameter that nobody had typed (`model/Training.steps`).
WRONG = [
    (f"SEED={2**63}", "SEED has to stay below 4294967296 in size, not 9223372036854775808."),
    ("SEED=4294967296", "SEED has to stay below 4294967296 in size"),
    ("SEEDS=(0, 4294967296)", "SEEDS has to stay below 4294967296 in size, not (0, 4294967296)."),
    ("TRAIN_STEPS=99999999999", "TRAIN_STEPS has to stay below"),
    ("STALE=1e400", "STALE has to be finite, not inf."),
    ("LORA_ALPHA=-1e400", "LORA_ALPHA has to be finite, not -inf."),
    ("VARIED={'learning_rate': (1e400,)}", "VARIED has to be finite"),
    ("run.job=@Experiment", "--gin.run.job: run.job is @Experiment, which is no job"),
    ("run.job=@Optimizer", "--gin.run.job: run.job is @Optimizer, which is no job"),
    ("run.job=@run", "--gin.run.job: run.job is @run, which is no job"),
    ("run.job=%SEED", "No job is chosen"),
    ("A=%A", "--gin.A: these settings refer to each other in a circle: A -> A."),
    ("TRAIN_STEPS=%TRAIN_STEPS", "--gin.TRAIN_STEPS: these settings refer to each other in a circle"),
    ("Experiment.evaluation=@Experiment()", "--gin.Experiment.evaluation: these settings refer to each other"),
    ("Evaluation.decoding=@Evaluation()", "--gin.Evaluation.decoding: these settings refer to each other"),
    ("Experiment.prompt_init=@PromptInit", "Experiment.prompt_init has to be @PromptInit(), not @PromptInit."),
    (
        "TRAIN_STEPS=-1",
        "steps, batch_size, eval_period, microbatches and log_period must be at least 1 (TRAIN_STE",
    ),
    ("TRAIN_STEPS=1.5", "TRAIN_STEPS has to be an integer, not 1.5."),
    ("TRAIN_STEPS='4'", "TRAIN_STEPS has to be an integer, not '4'."),
    ("MARGIN=@Experiment", "MARGIN has to be a number, not @Experiment."),
    ("TASKS=4", "TASKS has to be a mapping or None, not 4."),
    ("TASK_FEATURE_LENGTHS=48", "TASK_FEATURE_LENGTHS has to be a mapping or None, not 48."),
    ("MIXTURE_OR_TASK_MODULE=3", "MIXTURE_OR_TASK_MODULE has to be a text or a list of texts, not 3."),
    ("METHODS=3", "METHODS has to be a list of texts, not 3."),
    ("WAIT=1", "WAIT has to be True or False, not 1."),
    ("REPORT=a\0b", "REPORT has to be text in UTF-8 without"),
    ("REPORT=\udcff", "REPORT has to be text in UTF-8 without"),
    ("SEED=\udcff", "SEED has to be text"),
    ("VARIED={[1]: 2}", "--gin.VARIED: a value cannot be read (unhashable type: 'list')."),
    ("VARIED=" + "[" * 3000, "--gin.VARIED"),
    ("SEED=" + "1" * 5000, "SEED has to be an integer"),
    ("..=3", "--gin..."),
    ("STEPS.=3", "--gin.STEPS."),
    ("Experiment.dtype='int8'", 'Experiment.dtype is "float32" or "bfloat16", not \'int8\''),
    ("PromptInit.first=-1", "A prompt's scale is positive and first is not negative, not 0.5, -1"),
    ("LEARNING_RATE=-1", "Optimizer.learning_rate is -1; it has to be finite and not negative (LEARNING_RATE = -1)."),
]


def bound(setting: str) -> "partial[None]":
    """The job `compare` with a setting."""
    _, overrides = main.parse_flags([f"--gin.{setting}"])
    return binding.bind(main.CONFIGURABLES, [gin_files.folder() / "compare.gin"], overrides)


@pytest.mark.parametrize(("setting", "message"), WRONG, ids=lambda text: ascii(text)[:30])
def test_wrong_setting_is_named_as_typed(setting: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        bound(setting)
    assert str(caught.value).startswith(message), str(caught.value)[:300]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("STALE=1e300", "STALE is 1e+300"),  # Event.wait raises OverflowError in the lease's thread
        ("STALE=0", "STALE is 0"),
        ("SERVE=-1", "SERVE is -1, which is no port"),
        ("SERVE=70000", "SERVE is 70000, which is no port"),
        ("REPORT=" + "x" * 300, "REPORT becomes a folder"),
        ("SEEDS=-1", "Seeds are not negative"),
    ],
)
def test_wrong_setting_is_named_before_the_model_loads(
    setting: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("promot_jax.sweep.scheduler.open_session", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=re.escape(message)):
        bound(setting)(workdir=tmp_path)


def test_jax_keeps_32_bits_of_a_seed() -> None:
    """The reference of the limit: `jax.random.key` without 64-bit types takes 2**32 for 0, and says nothing."""
    first, second, last = (jax.random.key_data(jax.random.key(seed)) for seed in (0, 2**32, 2**32 - 1))
    assert np.array_equal(first, second) and not np.array_equal(first, last)


def test_gin_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    """Editors on Windows write one; the lines are read as RFC 3629 allows, without it."""
    path = tmp_path / "mine.gin"
    path.write_bytes(b"\xef\xbb\xbfTASK = 'x'\r\n")
    assert gin_files.settings([path])["", "TASK", ""].value == "x"
