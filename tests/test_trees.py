"""Pure functions on parameter paths."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promot_jax import trees
from promot_jax.errors import UserError
from promot_jax.params.fingerprint import fingerprint

KEYS = st.text("abc_0", min_size=1, max_size=3)
TREES = st.dictionaries(
    KEYS, st.recursive(st.integers(), lambda inner: st.dictionaries(KEYS, inner, min_size=1, max_size=3))
)
PARAMS = {
    "model": {"mlp": {"wi": np.ones((2, 3)), "wo": np.ones((3, 2))}, "norm": np.ones(3)},
    "prompt": {"a": np.ones((4, 2))},
}


@given(TREES)
def test_unflatten_undoes_flatten(tree):
    flat = trees.flatten(tree)

    assert trees.unflatten(flat) == tree
    assert not any(isinstance(leaf, dict) for leaf in flat.values())


@given(TREES, st.sets(KEYS))
def test_merge_undoes_partition(tree, keys):
    first, second = trees.partition(tree, lambda path: path.split("/")[0] in keys)

    assert set(first) == set(tree) & keys and set(second) == set(tree) - keys
    assert trees.merge(first, second) == tree == trees.merge(second, first)


def test_flatten_sorts_by_path():
    assert list(trees.flatten({"b": {"z": 0, "a": 1}, "a": 2})) == ["a", "b/a", "b/z"]
    assert list(trees.flatten(PARAMS)) == ["model/mlp/wi", "model/mlp/wo", "model/norm", "prompt/a"]


def test_partition_keeps_the_leaves_themselves():
    chosen, rest = trees.partition(PARAMS, lambda path: path.startswith("model/mlp/"))

    assert chosen["model"]["mlp"]["wi"] is PARAMS["model"]["mlp"]["wi"]
    assert trees.flatten(rest).keys() == {"model/norm", "prompt/a"}


def test_merge_refuses_a_path_twice():
    with pytest.raises(ValueError, match="model/norm is in two trees"):
        trees.merge(PARAMS, {"model": {"norm": 0}})


def test_first_match_of_the_whole_path_wins():
    rules = [("model/mlp/wi", 1), ("model/mlp/.*", 2), ("mlp/.*", 3), (".*", 4)]

    assert [trees.lookup(rules, path) for path in trees.flatten(PARAMS)] == [1, 2, 4, 4]


def test_every_path_needs_a_rule():
    with pytest.raises(UserError, match="No pattern covers the parameter 'model/norm'"):
        trees.lookup([("norm", 1), ("model", 2)], "model/norm")
    with pytest.raises(UserError, match=r"'model/\(' is not a regular expression"):
        trees.lookup([("model/(", 1)], "model/norm")


def test_cover_gives_every_path_its_value():
    paths = trees.flatten(PARAMS)

    assert trees.cover([("model/.*", False), (".*", True)], paths) == dict(
        zip(paths, [False, False, False, True], strict=True)
    )
    assert trees.cover([("model/.*", 1), ("prompt/.*", 2), (".*", 3)], paths)["prompt/a"] == 2  # ".*" may be idle


@pytest.mark.parametrize(
    "rules",
    [
        [("model/nrom", 1), (".*", 2)],  # misspelt
        [("model/.*", 1), ("model/norm", 2), (".*", 3)],  # after a rule that matches all its paths
        [("model/.*|prompt/.*", 1), ("model/n.*", 2), (".*", 3)],
    ],
)
def test_a_rule_without_effect_is_refused(rules):
    with pytest.raises(UserError, match=r"The pattern 'model/n.*' matches no parameter \("):
        trees.cover(rules, trees.flatten(PARAMS))


def test_count():
    assert trees.count(PARAMS) == 6 + 6 + 3 + 8
    assert trees.count({"scalar": np.float32(0)}) == 1


def test_fingerprint_is_of_bits_not_of_containers():
    base = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": {"c": np.zeros(2, np.float32)}}
    same = {"b": {"c": jnp.zeros(2)}, "a": np.asfortranarray(base["a"])}

    assert fingerprint(base) == fingerprint(same)


def _one_bit(array):
    changed = array.copy()
    changed.view(np.uint32)[0] ^= 1
    return changed


@pytest.mark.parametrize(
    "change",
    [
        _one_bit,
        lambda array: np.where(array == 0, -array, array),  # -0.0
        lambda array: array.reshape(3, 2),
        lambda array: array.astype(np.float64),
        lambda array: jnp.asarray(array, jnp.bfloat16),
    ],
)
def test_fingerprint_changes_with_every_bit(change):
    array = np.arange(6, dtype=np.float32)

    assert fingerprint({"a": change(array)}) != fingerprint({"a": array})


def test_fingerprint_changes_with_the_path():
    array = np.ones(3, np.float32)

    assert len({fingerprint(tree) for tree in ({"a": array}, {"b": array}, {"a": {"b": array}})}) == 3
    two = {"a": array, "b": array * 2}
    assert fingerprint(two) != fingerprint({"a": two["b"], "b": two["a"]})
