"""Damage to files, and what has to hold when they are read: what the property tests of the readers share."""

import contextlib
import json
import random
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from promot_jax.errors import UserError


def nest(levels: int, kind: str) -> Any:
    """An object or list in itself, so many levels deep."""
    value: Any = 1
    for _ in range(levels):
        value = {"a": value} if kind == "{" else [value]
    return value


WILD = [
    None, True, -1, 0, 1, 2, 3.5, 1e300, 2**31, 2**63, 2**200, "", "x", "../../etc/passwd", "/etc/passwd", "\0",
    "x" * 9999, [], {}, [[]], float("nan"), nest(10, "{"), nest(10, "["), nest(200, "["),
]  # fmt: skip


def in_bytes(good: bytes, rng: random.Random) -> bytes:
    """One to three bits turned, bytes replaced, pieces lost, doubled or put in, or the end cut off."""
    data = bytearray(good)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data)) if data else 0
        match rng.randrange(7):
            case 0 | 1:
                data[at : at + 1] = bytes([(data[at] if data else 0) ^ 1 << rng.randrange(8)])
            case 2:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 3:
                data[at : at + rng.randint(1, 4)] = rng.choice(
                    [b"\xff" * 4, bytes(4), b"../.", b"/etc", b"1e99", b"[[{"]
                )
            case 4:
                del data[at : at + rng.randint(1, 64)]
            case 5:
                data[at:at] = bytes(data[at : at + rng.randint(1, 64)])
            case _:
                del data[rng.randrange(len(data) + 1) :]
    return bytes(data)


def in_json(good: bytes, rng: random.Random) -> bytes:
    """Still JSON: a value somewhere in it replaced, taken out, renamed or put elsewhere."""
    tree = json.loads(good)
    node, below = tree, tree
    while isinstance(below, dict | list) and below and (node is tree or rng.random() < 0.8):
        node = below
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        below = node[key]
    match rng.randrange(5):
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node[rng.choice(["x", "", "../x", key + "_"])] = node.pop(key)
        case 2 if isinstance(node, dict):
            node[key] = rng.choice(list(node.values()))
        case _:
            node[key] = rng.choice(WILD)
    return json.dumps(tree).encode()


def mutated(good: bytes, name: str, rng: random.Random) -> bytes:
    """A damaged copy of a file."""
    return (in_json if name.endswith(".json") and rng.random() < 0.5 else in_bytes)(good, rng)


@contextlib.contextmanager
def refused(messages: list[str], what: str, *, memory: int = 0, seconds: float = 5.0) -> Iterator[None]:
    """What is read inside is read, or refused in one short sentence, in bounded time and (if measured) memory."""
    began = time.process_time()
    if memory:
        tracemalloc.start()
    try:
        yield
    except UserError as error:
        messages.append(str(error))
    finally:
        peak = tracemalloc.get_traced_memory()[1] if memory else 0
        tracemalloc.stop()
    assert not messages or (len(messages[-1]) < 1500 and "\n" not in messages[-1]), what
    assert peak <= memory, f"{what}: {peak} bytes"
    assert time.process_time() - began < seconds, what


def damage(folder: Path, names: list[str], rng: random.Random) -> Iterator[str]:
    """Damages one of the files, says which, and mends it again, without end."""
    good = {name: (folder / name).read_bytes() for name in names}
    while True:
        name = rng.choice(names)
        (folder / name).write_bytes(mutated(good[name], name, rng))
        yield name
        (folder / name).write_bytes(good[name])
