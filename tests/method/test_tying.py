import numpy
import pytest

from tinylora_kernels.method.tying import assign_groups, module_kind

KINDS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
NAMES = [f"model.layers.{layer}.{kind}" for layer in range(28) for kind in KINDS]


@pytest.mark.parametrize("n_tie, groups", [(1, 196), (7, 28), (14, 14), (15, 14), (16, 13), (196, 1), (1000, 1)])
def test_tiled_counts_of_a_7b_model(n_tie, groups):
    assigned = assign_groups(NAMES, n_tie, "tiled")
    assert len(assigned) == 196
    assert sorted(set(assigned)) == list(range(groups))
    assert assigned == sorted(assigned)
    sizes = [assigned.count(group) for group in range(groups)]
    assert all(size == n_tie for size in sizes[:-1])
    assert 1 <= sizes[-1] <= n_tie


@pytest.mark.parametrize("n_tie, per_kind", [(1, 28), (3, 10), (4, 7), (28, 1), (29, 1)])
def test_structured_ties_one_kind_over_nearby_layers(n_tie, per_kind):
    assigned = assign_groups(NAMES, n_tie, "structured")
    assert len(set(assigned)) == 7 * per_kind
    members = {}
    for name, group in zip(NAMES, assigned, strict=True):
        members.setdefault(group, []).append(name)
    for names in members.values():
        assert len({module_kind(name) for name in names}) == 1
        layers = [int(name.split(".")[2]) for name in names]
        assert layers == list(range(layers[0], layers[0] + len(layers)))
        assert layers[0] % n_tie == 0


def test_groups_are_numbered_by_first_appearance():
    names = ["l.0.a", "l.0.b", "l.1.a", "l.1.b", "l.2.a", "l.2.b"]
    assert assign_groups(names, 2, "structured") == [0, 1, 0, 1, 2, 3]
    assert assign_groups(names[::-1], 2, "structured") == [0, 1, 0, 1, 2, 3]
    labels = {"l.0.a": "x", "l.0.b": 3, "l.1.a": None, "l.1.b": "x", "l.2.a": (1, 2), "l.2.b": 3}
    assert assign_groups(names, 1, labels) == [0, 1, 2, 0, 3, 1]


def test_kind_drops_layer_numbers_only():
    assert module_kind("model.layers.7.self_attn.q_proj") == "model.layers.self_attn.q_proj"
    assert module_kind("encoder.block2.0.conv1") == "encoder.block2.conv1"
    decoder = [f"{part}.layers.{i}.q_proj" for part in ("encoder", "decoder") for i in range(3)]
    assert assign_groups(decoder, 3, "structured") == [0, 0, 0, 1, 1, 1]


def test_no_modules_no_groups():
    assert assign_groups([], 4, "tiled") == []
    assert assign_groups([], 4, "structured") == []


@pytest.mark.parametrize("n_tie", [0, -3, 1.5, "2", None, True])
def test_bad_n_tie_is_named(n_tie):
    with pytest.raises(ValueError, match=f"n_tie .* got {n_tie!r}"):
        assign_groups(NAMES, n_tie, "tiled")


def test_numpy_integer_n_tie_is_accepted():
    assert assign_groups(NAMES, numpy.int64(16), "tiled") == assign_groups(NAMES, 16, "tiled")


def test_unknown_tying_is_named():
    with pytest.raises(ValueError, match="tying must be .* got 'diagonal'"):
        assign_groups(NAMES, 1, "diagonal")


def test_map_errors_name_the_modules():
    names = ["a.q", "a.k", "a.v"]
    with pytest.raises(ValueError, match="no group for a.k, a.v"):
        assign_groups(names, 1, {"a.q": 0})
    with pytest.raises(ValueError, match="tying map names a.x, not among"):
        assign_groups(names, 1, {"a.q": 0, "a.k": 0, "a.v": 1, "a.x": 1})
    with pytest.raises(ValueError, match=r"gives a.k the group \[1\], which is not hashable"):
        assign_groups(names, 1, {"a.q": 0, "a.k": [1], "a.v": 1})
    many = [f"m{i}" for i in range(9)]
    with pytest.raises(ValueError, match="m0, m1, m2, m3, m4 and 4 more"):
        assign_groups(many, 1, {})
