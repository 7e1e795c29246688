"""What names an adapter is a name, None or an integer; nothing that merely could be taken for one runs as one."""
from __future__ import annotations

import decimal
import fractions
import re

import numpy as np
import pytest
import torch

from tests.cases import error
from tests.guarantees.whole import dense_model
from tests.models import TARGETS, tiny_decoder
from tinylora_kernels import AdapterBank, TinyLoRAConfig, apply_tiny_lora
from tinylora_kernels.functional import tiny_lora_update
from tinylora_kernels.ops import dispatch

BACKENDS = [name for name, why_not in dispatch.table("cpu") if why_not is None]
TOKENS = torch.randint(0, 17, (2, 5), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def bank():
    config = TinyLoRAConfig(trainable_dim=3, n_tie=100, target_modules=TARGETS, cache=False)
    bank = AdapterBank(apply_tiny_lora(tiny_decoder(), config, progress=False), 8)
    for name in ("a", "b", ("tuple", 3)):
        bank.add(name, 0.3 * torch.randn(1, 3))
    return bank


@pytest.fixture(scope="module")
def truths(bank):
    numbers = [*(bank.vectors(name) for name in bank.names()), torch.zeros(1, 3)]
    return [dense_model(bank.model, v)(TOKENS) for v in numbers]  # by id, -1 last


INTEGERS = [
    ["b", None], ("b", None), [1, -1], (1, -1), [["b"], [None]], [[1], [-1]], [np.int64(1), np.int8(-1)],
    [torch.tensor(1), torch.tensor(-1, dtype=torch.int16)], [np.array(1), None],
    torch.tensor([1, -1]), np.array([1, -1]),
    torch.tensor([1, -1], dtype=torch.int8), torch.tensor([[1], [-1]], dtype=torch.int32), np.array([[1], [-1]]),
    np.array([1, -1], dtype=">i4"), np.array([9, 1, 9, -1])[1::2], torch.tensor([9, 1, 9, -1])[1::2], range(1, -2, -2),
    ["b", -1], [1, None], np.array(["b", None]), [np.str_("b"), None], np.array([["b"], [None]]), np.array([1, None]),
    torch.tensor([[1] * 5, [-1] * 5]), np.array([[1] * 5, [-1] * 5]),]  # fmt: skip


@pytest.mark.parametrize("ids", INTEGERS, ids=repr)
def test_names_none_and_integers_in_any_form(bank, truths, ids):
    with torch.no_grad(), bank.use(ids):
        found = bank.model(TOKENS)
    assert error(found[0], truths[1][0]) < 2e-5
    assert error(found[1], truths[-1][1]) < 2e-5


def test_unsigned_ids_and_names_that_are_tuples(bank, truths):
    for ids in (torch.tensor([2, 0], dtype=torch.uint8), np.array([2, 0], dtype=np.uint64), [("tuple", 3), "a"]):
        with torch.no_grad(), bank.use(ids):
            found = bank.model(TOKENS)
        assert error(found, torch.stack([truths[2][0], truths[0][1]])) < 2e-5


WRONG = [
    [True, False], [1, True], [np.bool_(True)], [torch.tensor(True)], torch.tensor([True]), np.array([True]),
    [0.5], [1.0], [np.float32(1)], [torch.tensor(1.0)], torch.tensor([0.5]), torch.tensor([1.0]), np.array([1.0]),
    torch.tensor([1.0], dtype=torch.bfloat16), [1j], [0j], torch.tensor([1j]), np.array([1j]), [float("nan")],
    [decimal.Decimal(1)], [fractions.Fraction(1)], [np.array(True)], [np.array([0, 1])], [torch.tensor([0, 1])],
    np.array(["a", 0.5], dtype=object), np.array([b"a"]), np.array("a"),
    {"a"}, {"a": 1}, iter(["a"]), (n for n in "ab"), 1, None, True, 0.5,
    b"a", [{}], [([],)], torch.tensor([1], device="meta"), torch.tensor([[1]]).to_sparse(),
    [[0, 1], [0]], [[0], 0], [[0], ["a", "b"]],
]  # fmt: skip
IMPOSSIBLE = [
    [], [[]], (), torch.tensor([], dtype=torch.int64), torch.tensor(1), np.array(1), np.zeros((0, 3), dtype=int),
    range(0), [8], [-2], [3], [2**31], [2**63], [-(2**63)], [2**64 - 1], [10**400], torch.tensor([-(2**63)]),
    torch.tensor([2**40]), torch.tensor([2**64 - 1], dtype=torch.uint64),
    np.array([2**64 - 1], dtype=np.uint64), np.array([-2]),
    torch.tensor([-2]), torch.tensor([0, 7]), torch.tensor([255], dtype=torch.uint8), [["a", 9]],
]  # fmt: skip
UNKNOWN = [["c"], ["a", "c"], [("tuple", 4)], "c", [["a"], ["c"]], [frozenset()]]


REFUSED = [
    *((ValueError, ids) for ids in WRONG), *((IndexError, ids) for ids in IMPOSSIBLE),
    *((KeyError, ids) for ids in UNKNOWN),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "ids"), REFUSED, ids=lambda value: re.sub(" at 0x.*", "", repr(value))[:60])
def test_anything_else_is_one_error_before_anything_has_run(bank, kind, ids):
    with pytest.raises(kind) as info:
        with bank.use(ids):
            pytest.fail("it ran")
    message = info.value.args[0]
    assert message.startswith("adapter") and "\n" not in message and len(message) < 250
    with torch.no_grad():  # and nothing stays
        bank.model(TOKENS)


NO_NAMES = [None, 1, True, 0.5, 1j, np.int64(3), np.float64(2), np.bool_(True), torch.tensor(1), ["x"], {}, ([],)]


@pytest.mark.parametrize("name", NO_NAMES, ids=repr)
def test_names_are_hashable_and_no_numbers(bank, name):
    with pytest.raises(ValueError, match="^adapter name: expected a name, found"):
        bank.add(name)
    assert len(bank) == 3


FAR = [(ids, torch.int64) for ids in ([2**31], [2**40], [-(2**40)], [2**63 - 1], [-(2**63)])]
NEAR = [
    (ids, dtype)
    for ids in ([-2], [2], [2**31 - 1], [-(2**31)], [0, -2], [0, 2])
    for dtype in (torch.int32, torch.int64)
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("ids", "dtype"), NEAR + FAR, ids=repr)
def test_the_ops_refuse_ids_that_no_adapter_has(backend, ids, dtype):
    y, basis, projection = torch.randn(4, 6), torch.randn(2, 6), torch.randn(3, 2, 2)
    before = y.clone()
    with pytest.raises(IndexError, match="adapter"):
        tiny_lora_update(y, basis, torch.randn(2, 3), projection, None, torch.tensor(ids, dtype=dtype), backend=backend)
    assert torch.equal(y, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ids", [
    torch.tensor([0.0]), torch.tensor([True]), torch.tensor([0], dtype=torch.int16), torch.tensor(0),
    torch.tensor([[0]]), torch.tensor([0], dtype=torch.uint8),
    torch.tensor([0, 1, 0]), torch.tensor([], dtype=torch.int64),
    torch.tensor([0], device="meta"),
], ids=repr)  # fmt: skip
def test_the_ops_refuse_what_are_no_ids(backend, ids):
    y, basis, projection = torch.randn(4, 6), torch.randn(2, 6), torch.randn(3, 2, 2)
    with pytest.raises(ValueError, match="adapter_ids: expected"):
        tiny_lora_update(y, basis, torch.randn(2, 3), projection, None, ids, backend=backend)
