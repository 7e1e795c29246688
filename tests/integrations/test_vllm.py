"""The parts of the vLLM plugin that need no vLLM: its setting, what fits an engine, contents and their ids, the table's
numbers. tests/integrations/vllm has the engine.
"""
from __future__ import annotations

import asyncio
import dataclasses
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import tinylora_kernels as tk
from tinylora_kernels.files.format import AdapterError, read
from tinylora_kernels.integrations.vllm import adapters as core_side
from tinylora_kernels.integrations.vllm import numbers_path, plugin
from tinylora_kernels.integrations.vllm.adapters import Adapters, decode, encode
from tinylora_kernels.integrations.vllm.family import Checkpoint, Family, Projections, Recipe, factorize, recipe_of
from tinylora_kernels.integrations.vllm.manager import Manager
from tinylora_kernels.integrations.vllm.requests import DEFAULT, INLINE
from tinylora_kernels.integrations.vllm.settings import Settings
from tinylora_kernels.integrations.vllm.verl import vectors_in
from tinylora_kernels.ops import reference


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for name, size in {"a": 24, "b": 16, "fused": 32}.items():
            setattr(self, name, nn.Linear(20, size, bias=False))


def adapter(tmp_path, name="first", draw=0, model=None, xs=False, **options):
    """A file of an adapted Model, and the model."""
    options = {"target_modules": ["a", "b", "fused"], "cache": False} | options
    model = model or Model()
    if xs:
        tk.apply_lora_xs(model, tk.LoRAXSConfig(**options), progress=False)
    else:
        tk.apply_tiny_lora(model, tk.TinyLoRAConfig(**options), progress=False)
    for v in tk.trainable_vectors(model):
        v.data.normal_(generator=torch.Generator().manual_seed(draw))
    path = tmp_path / f"{name}.safetensors"
    tk.save_adapter(model, path)
    return path, model


@dataclasses.dataclass
class Request:
    lora_name: str
    lora_int_id: int
    lora_path: str
    load_inplace: bool = False


class Workers:
    """What the core tells its workers."""

    def __init__(self):
        self.held: dict[int, str] = {}
        self.running: list[int] = []

    def add(self, request):
        self.held[request.lora_int_id] = request.lora_path

    def remove(self, lora_id):
        del self.held[lora_id]


def make_core(path, **options):
    workers = Workers()
    family = Family(path, **options)
    not_found = lambda *_: FileNotFoundError()  # noqa: E731
    core = Adapters(family, Request, workers.add, workers.remove, lambda: workers.running, not_found)
    return core, workers


# The setting


def test_the_setting_is_a_path_or_a_map():
    assert Settings.of({}) is None and Settings.of(None) is None and Settings.of({"other": 1}) is None
    assert Settings.of({"tinylora": "x"}) == Settings("x", 4096, True)
    assert Settings.of({"tinylora": {"adapters": "x", "own_seeds": False}}) == Settings("x", 4096, False)
    file = {"adapters": "x"}
    for wrong in (3, [], {"capacity": 3}, {"adapters": 3}, file | {"capacity": True}, file | {"k": 1}):
        with pytest.raises(ValueError, match="additional_config") as info:
            Settings.of({"tinylora": wrong})
        assert "\n" not in str(info.value)


# What fits an engine


def test_a_family_takes_other_seeds_groups_and_methods_of_one_base_and_rank(tmp_path):
    family = Family(adapter(tmp_path)[0])
    for options in ({"seed": 3}, {"n_tie": 2, "trainable_dim": 5}, {"alpha": 2.0, "scaling": "sqrt"},
                    {"xs": True, "rank": 2},
                    {"target_modules": ["b"]}):  # fmt: skip
        family.check(read(adapter(tmp_path, "other", **options)[0]))
    shared = Family(tmp_path / "first.safetensors", own_seeds=False)
    shared.check(read(adapter(tmp_path, "again", draw=5)[0]))
    refused = (({"seed": 3}, "seed is 3 there, this engine serves 0"), ({"n_tie": 3}, "tie groups are not"))
    for options, message in refused:
        with pytest.raises(AdapterError, match=message):
            shared.check(read(adapter(tmp_path, "other", **options)[0]))


def test_the_first_file_of_a_directory_counts(tmp_path):
    with pytest.raises(AdapterError, match="no adapter file"):
        Family(tmp_path)
    adapter(tmp_path, "b", seed=1)
    adapter(tmp_path, "a", seed=2)
    assert Family(tmp_path).adapter.config.seed == 2
    token = Family(tmp_path).token
    adapter(tmp_path, "a", seed=2, draw=9)
    assert Family(tmp_path, token=token).token == token  # other numbers mean the same
    adapter(tmp_path, "0", seed=7)
    with pytest.raises(AdapterError, match="another adapter than when the engine was configured"):
        Family(tmp_path, token=token)


KINDS = [{}, {"xs": True, "rank": 2}, {"fused": {"fused": (16, 8, 8)}}, {"n_tie": 2}]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_recipe_crosses_processes(options, tmp_path):
    path, _ = adapter(tmp_path, **options)
    recipe = recipe_of(read(path))
    assert Recipe.decode(recipe.text) == recipe and hash(Recipe.decode(recipe.text)) == hash(recipe)
    assert recipe.shape == tuple(read(path).v.shape)


# The table's numbers


@pytest.mark.parametrize("options", [
    {"trainable_dim": 3}, {"trainable_dim": 13, "n_tie": 2, "seed": 4}, {"xs": True, "rank": 3},
    {"fused": {"fused": (16, 8, 8)}, "frozen_rank": 1}, {"target_modules": ["fused", "a"], "alpha": 0.5},
], ids=str)  # fmt: skip
def test_mixing_matrices_are_those_of_the_layers(options, tmp_path):
    """On all units, and on the few that a stage of a pipeline holds."""
    path, model = adapter(tmp_path, **options)
    family = Family(path)
    weights = {name: getattr(model, name).base.weight.detach() for name in family.modules}
    units = [
        unit for name, module in family.modules.items()
        for unit in factorize(module, family.adapter.config, weights[name], with_right=True)
    ]  # fmt: skip
    recipe, v = recipe_of(family.adapter), family.adapter.v.float()
    rows, mixing = Projections(family, units).mixing(recipe, v)
    assert sorted(rows.tolist()) == list(range(len(units)))
    found = {(units[row].module, units[row].part): m for row, m in zip(rows.tolist(), mixing, strict=True)}
    for name, layer in tk.adapted_layers(model).items():
        whole = reference.contract(layer.v.detach().double(), layer.projection.double())
        r, sizes = family.rank, layer.parts
        for part in range(len(sizes)) if sizes else (None,):
            block = slice(None) if part is None else slice(part * r, (part + 1) * r)
            torch.testing.assert_close(found[name, part].double(), whole[block, block], rtol=1e-6, atol=1e-7)
    stage = units[1:]
    rows, few = Projections(family, stage).mixing(recipe, v)
    for row, m in zip(rows.tolist(), few, strict=True):
        assert torch.equal(m, found[stage[row].module, stage[row].part])
    for unit in units:
        whole = weights[unit.module].double()
        sizes = family.adapter.config.parts(unit.module, len(whole))
        if sizes:
            whole = whole.split(sizes)[unit.part]
        torch.testing.assert_close(unit.right.double(), unit.basis.double() @ whole, rtol=1e-5, atol=1e-6)


def test_another_base_is_refused_by_name(tmp_path):
    path, _ = adapter(tmp_path)
    family = Family(path)
    with pytest.raises(AdapterError, match="^b: the adapters were trained on another base weight than the one served"):
        factorize(family.modules["b"], family.adapter.config, torch.randn(16, 20), False)
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(AdapterError, match="^b: no b.weight in the served checkpoint"):
        Checkpoint(str(tmp_path / "checkpoint")).weight("b")


def test_a_workers_table_holds_what_ran_last(tmp_path):
    """Ids of the tokens, eviction of what does not run, zeros for modules an adapter leaves alone, warming up."""
    path, model = adapter(tmp_path, trainable_dim=3)
    manager = Manager(Settings(str(path), capacity=2), max_tokens=8, max_sequences=2, device=torch.device("cpu"))
    weights = {name: getattr(model, name).base.weight.detach() for name in manager.family.modules}
    config = manager.family.adapter.config
    manager.make_table([u for n, m in manager.family.modules.items() for u in factorize(m, config, weights[n], False)])
    core, workers = make_core(path)
    bound = [core.bind(Request(f"n{i}", i + 1, numbers_path(torch.full((3, 3), 0.1 * (i + 1)))))[1] for i in range(3)]
    only_b = adapter(tmp_path, "b", target_modules=["b"])[0]
    bound.append(core.bind(Request("b", 9, str(only_b)))[1])
    for content in bound:
        core.ensure(content)
        manager.add_adapter(Request("", content.id, workers.held[content.id]))

    def step(*which):
        tokens = tuple(0 if i is None else bound[i].id for i in which)
        manager.set_active_adapters(set(), SimpleNamespace(index_mapping=tokens))
        return manager.ids[: len(which)].tolist()

    first = step(0, None, 1, 0)
    assert first[1] == -1 and first[0] == first[3] != first[2]
    expected = manager.projections.mixing(manager.family.recipe, bound[0].v)[1]
    assert torch.equal(manager.table[:, first[0]], expected.flatten(1))
    assert step(1, 2) == [first[2], first[0]]  # 0 ran longest ago
    assert step(3) != [-1] and manager.table[:, step(3)[0]].abs().amax(1).count_nonzero() == 1
    assert step(None, None) == [-1, -1]
    manager.remove_adapter(bound[3].id)
    dummy = Request("warmup_1", 1, "/not/a/real/path")
    assert manager.add_dummy_lora(dummy, 8) and 1 in manager.list_adapters()
    manager.remove_all_adapters()
    assert manager.list_adapters() == {content.id for content in bound[:3]}
    with pytest.raises(ValueError, match="capacity is 2, and a step may run 4 adapters"):
        Manager(Settings(str(path), capacity=2), 8, 4, torch.device("cpu"))


# Contents and their ids


def test_numbers_and_recipes_reach_the_workers(tmp_path):
    path, _ = adapter(tmp_path)
    family = Family(path)
    other = read(adapter(tmp_path, "other", seed=9, draw=3)[0])
    for found in (family.adapter, other):
        content = core_side.Content(5, "x", recipe_of(found), found.v.float())
        recipe, v = decode(encode(content, family), family)
        assert recipe == content.recipe and torch.equal(v, content.v)
    assert len(encode(core_side.Content(5, "x", family.recipe, family.adapter.v), family)) < 40


def test_equal_numbers_are_one_content_and_other_numbers_another_id(tmp_path):
    path, _ = adapter(tmp_path)
    core, workers = make_core(path)
    one, two = (numbers_path(torch.full((3, 1), float(i))) for i in range(2))
    first = core.bind(Request("x", 1, one))
    assert core.bind(Request("y", 2, one))[1] is first[1] and core.bind(Request("x", 1, two))[1] is not first[1]
    assert first[0].lora_name == first[0].lora_path == first[1].path and first[0].lora_int_id == first[1].id
    assert first[1].id >= core_side.FIRST_ID and not workers.held
    core.ensure(first[1])
    assert list(workers.held) == [first[1].id]


def test_a_default_is_for_requests_that_name_none(tmp_path):
    core, _ = make_core(adapter(tmp_path)[0])
    assert core.bind(None) is None
    core.add(Request(DEFAULT, 1, numbers_path(torch.ones(3, 1)), load_inplace=True))
    assert torch.equal(core.bind(None)[1].v, torch.ones(3, 1)) and core.ids() == set()
    core.add(Request(DEFAULT, 1, INLINE))
    assert core.bind(None) is None


def test_what_nobody_refers_to_is_forgotten_and_what_runs_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(core_side, "FORGOTTEN_FROM", 3)
    core, workers = make_core(adapter(tmp_path)[0])
    running = core.bind(Request("p", 1, numbers_path(torch.full((3, 1), 100.0))))[1]
    core.ensure(running)
    workers.running = [running.id]
    for i in range(20):
        core.add(Request("p", 1, numbers_path(torch.full((3, 1), float(i)))))
    assert len(workers.held) < 8 and running.id in workers.held
    workers.running = []
    for i in range(20):
        core.add(Request("p", 1, numbers_path(torch.full((3, 1), -1.0 - i))))
    assert running.id not in workers.held and len(core._contents) < 8


def test_the_token_of_numbers_must_be_the_familys(tmp_path):
    path, _ = adapter(tmp_path)
    core, _ = make_core(path)
    v = torch.zeros(3, 1)
    core.bind(Request("x", 1, numbers_path(v, core.family.token)))
    with pytest.raises(AdapterError, match="adapter 'x': the numbers are of another config or base"):
        core.bind(Request("x", 1, numbers_path(v, Family(adapter(tmp_path, "other", seed=1)[0]).token)))


def test_a_refused_file_changes_nothing_and_its_place_is_not_told(tmp_path):
    core, workers = make_core(adapter(tmp_path)[0])
    good = adapter(tmp_path, "good", seed=5)[0]
    core.add(Request("x", 1, str(good)))
    before = dict(workers.held)
    bad = adapter(tmp_path, "bad", frozen_rank=1)[0]
    with pytest.raises(AdapterError, match="^adapter 'x': its rank is 1, this engine serves rank 2$"):
        core.add(Request("x", 1, str(bad), load_inplace=True))
    (tmp_path / "dir.safetensors").mkdir()
    with pytest.raises(AdapterError, match=r"^adapter 'x': the adapter file cannot be read \(Is a directory\)$"):
        core.add(Request("x", 1, str(tmp_path / "dir.safetensors")))
    assert workers.held == before and core.bind(Request("x", 1, str(good)))[1].id in before


def test_requests_are_bound_on_several_threads(tmp_path):
    core, _ = make_core(adapter(tmp_path)[0])
    paths = [numbers_path(torch.full((3, 1), float(i))) for i in range(50)]
    found: list[dict[str, int]] = [{} for _ in range(8)]

    def bind(own):
        for path in paths:
            own[path] = core.bind(Request("x", 1, path))[1].id

    threads = [threading.Thread(target=bind, args=(own,)) for own in found]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert all(own == found[0] for own in found) and len(set(found[0].values())) == 50


# Beside vLLM


def test_the_probe_says_what_is_missing():
    problems = plugin.missing()
    try:
        import vllm  # noqa: F401
    except ImportError:
        assert len(problems) == len(plugin.NEEDED) and problems[0].startswith("no vllm.")
    else:
        assert problems == []


def test_a_probe_names_a_parameter_that_is_gone(monkeypatch):
    needed = plugin.Needed("json", "dumps", ("obj", "colour")), plugin.Needed("json", "no.such")
    monkeypatch.setattr(plugin, "NEEDED", needed)
    assert plugin.missing() == ["json.dumps takes no colour", "no json.no.such"]


def test_the_vectors_in_a_stream_of_weights_are_those_of_the_groups():
    model = tk.apply_tiny_lora(
        Model(), tk.TinyLoRAConfig(trainable_dim=2, target_modules=["a", "b", "fused"], n_tie=2, cache=False)
    )
    for v in tk.trainable_vectors(model):
        v.data.normal_()
    found = asyncio.run(vectors_in(iter(model.state_dict().items())))
    assert torch.equal(found, torch.stack([v.detach() for v in tk.trainable_vectors(model)]))

    async def stream():
        for item in model.state_dict().items():
            yield item

    assert torch.equal(asyncio.run(vectors_in(stream())), found)
    with pytest.raises(AdapterError, match="holds no trained vector"):
        asyncio.run(vectors_in(iter(Model().state_dict().items())))
