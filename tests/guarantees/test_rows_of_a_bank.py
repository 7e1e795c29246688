"""Every row of a layer's input runs the adapter of its entry, or the call is refused: whatever the layout."""
from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.cases import error
from tests.guarantees.whole import dense_model
from tinylora_kernels import AdapterBank, TinyLoRAConfig, apply_tiny_lora
from tinylora_kernels.linear import plan
from tinylora_kernels.model.adapted import adapted_layers

WIDTH, WORDS = 24, 17
NAMES = ["a", "b", "c"]


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(x)))


class Experts(nn.Module):
    """Experts in a list, each called with the rows that chose it, in the order in which torch.where finds them."""

    def __init__(self, experts=4, chosen=2):
        super().__init__()
        self.router = nn.Linear(WIDTH, experts)
        self.experts, self.chosen = nn.ModuleList(MLP() for _ in range(experts)), chosen

    def forward(self, x):
        flat = x.reshape(-1, WIDTH)
        weights, index = self.router(flat).softmax(-1).topk(self.chosen)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            slot, rows = torch.where((index == number).T)
            out = out.index_add(0, rows, expert(flat[rows]) * weights[rows, slot, None])
        return out.view(x.shape)


class Flattened(MLP):
    """As OPT's decoder layer: the batch as [b T, E]."""

    def forward(self, x):
        return super().forward(x.reshape(-1, WIDTH)).view(x.shape)


class TimeFirst(MLP):
    """As fairseq's encoders and Longformer's attention: [T, b, E] inside. A prompt's tokens see those before them."""

    def forward(self, x):
        x = x.transpose(0, 1)
        return super().forward(x.cumsum(0)).cumsum(0).transpose(0, 1)


class Windows(MLP):
    """Windows of two tokens as samples of their own, [b T/2, 2, E], the windows of a prompt not side by side."""

    def forward(self, x):
        b, tokens, _ = x.shape
        x = x.view(b, tokens // 2, 2, WIDTH).transpose(0, 1).reshape(-1, 2, WIDTH)
        return super().forward(x).view(tokens // 2, b, 2, WIDTH).transpose(0, 1).reshape(b, tokens, WIDTH)


class Memory(MLP):
    """Cross attention: fc1 sees a memory [b, 4, E] of another length than the prompt's."""

    def forward(self, x):
        return x + self.fc2(torch.tanh(self.fc1(x.mean(1, keepdim=True).expand(-1, 4, -1)))).sum(1, keepdim=True)


class Pooled(MLP):
    """A pooler: the first token alone, [b, E]."""

    def forward(self, x):
        return x + super().forward(x[:, 0]).unsqueeze(1)


class Net(nn.Module):
    def __init__(self, middle: type[nn.Module] = MLP, positions=False, time_first=False):
        super().__init__()
        self.embed, self.first = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.positions = nn.Embedding(32, WIDTH) if positions else None
        self.middle, self.head = middle(), nn.Linear(WIDTH, WORDS)
        self.time = 0 if time_first else 1

    def forward(self, tokens=None, embeds=None):
        x = self.embed(tokens) if embeds is None else embeds
        if self.positions is not None:
            x = x + self.positions(torch.arange(x.shape[1]).unsqueeze(0))
        x = x + torch.tanh(self.first(x)).cumsum(self.time)
        return self.head(x + self.middle(x))


def banked(model, targets=("first", "fc1", "fc2", "head"), **options):
    config = TinyLoRAConfig(trainable_dim=3, n_tie=100, target_modules=list(targets), cache=False)
    bank = AdapterBank(apply_tiny_lora(model, config, progress=False), len(NAMES), **options)
    generator = torch.Generator().manual_seed(5)
    for name in NAMES:
        bank.add(name, 0.5 * torch.randn(1, 3, generator=generator))
    return bank


def net(*arguments, targets=("first", "fc1", "fc2", "head"), bank=None, **options):
    torch.manual_seed(0)
    return banked(Net(*arguments, **options), targets, **(bank or {}))


def truths(bank):
    """name -> the bare float64 model with this adapter in its weights; None: the bare base."""
    found = {name: dense_model(bank.model, bank.vectors(name)) for name in NAMES}
    return found | {None: dense_model(bank.model, torch.zeros(1, 3))}


def words(*shape, seed=0):
    return torch.randint(0, WORDS, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def expect_each_its_own(bank, tokens, names, ids=None, dim=0):
    """Every entry of the batch as it is alone under its adapter."""
    with bank.use(names if ids is None else ids):
        found = bank.model(tokens)
    alone = truths(bank)
    for i, name in enumerate(names):
        expected = alone[name](tokens.narrow(dim, i, 1))
        assert error(found.narrow(dim, i, 1), expected) < 2e-5, (i, name)


@pytest.mark.parametrize("middle", [MLP, TimeFirst, Memory], ids=lambda c: c.__name__)
@pytest.mark.parametrize("shape", [(3, 5), (3, 1), (3, 6), (3, 12)], ids=str)
def test_layouts_whose_shapes_tell(middle, shape):
    bank = net(middle)
    for names in (["a", "b", "c"], ["c", None, "a"], ["b", "b", None]):
        expect_each_its_own(bank, words(*shape), names)


@pytest.mark.parametrize("middle", [Experts, Flattened, Windows, Pooled], ids=lambda c: c.__name__)
@pytest.mark.parametrize("targets", [("fc1", "fc2"), ("first", "fc1")], ids=str)
def test_layouts_whose_shapes_do_not_tell_are_refused(middle, targets):
    """Forty batches of experts: counts that three entries divide are among them, which was enough once."""
    bank = net(middle, targets=targets)
    for seed in range(40 if middle is Experts else 5):
        for tokens in (words(3, 4, seed=seed), words(3, 8, seed=seed)):
            with bank.use(NAMES), pytest.raises(ValueError, match=r"middle.*expected an input \[3, ") as info:
                bank.model(tokens)
            assert "in_order" in str(info.value) and "\n" not in str(info.value)
    with bank.use(["b"] * 3):  # one adapter for all: any order is right
        found = bank.model(tokens).detach()
    assert error(found, truths(bank)["b"](tokens)) < 2e-5


@pytest.mark.parametrize("middle", [Flattened, Pooled], ids=lambda c: c.__name__)
def test_rows_that_the_user_says_are_in_order(middle):
    bank = net(middle, bank=dict(in_order=["fc1", "middle.fc2"]))
    for length in (4, 5, 1):
        expect_each_its_own(bank, words(3, length), ["a", None, "c"])
    every = net(middle, bank=dict(in_order=True))
    expect_each_its_own(every, words(3, 3), ["a", None, "c"], torch.tensor([[0], [-1], [2]]))
    with pytest.raises(ValueError, match="in_order: expected names of adapted modules, found 'fc3', which names none"):
        net(middle, bank=dict(in_order=["fc3"]))


@pytest.mark.parametrize("length", [2, 5, 6, 9])
def test_a_model_whose_time_comes_first(length):
    """[T, b]: refused where it is not said, for any T, multiples of the entries among them; right where it is."""
    bank = net(time_first=True)
    with bank.use(NAMES), pytest.raises(ValueError, match=r"its input \[\d, 3\]: expected a row for each of the 3"):
        bank.model(words(length, 3))
    expect_each_its_own(bank, words(length, 3), ["a", None, "c"], torch.tensor([[0, -1, 2]]), dim=1)


def test_as_many_tokens_as_prompts():
    """[3, 3] tells nothing of itself; a call of another length does, for the model and for each of its layers."""
    bank = net(time_first=True)
    with bank.use(NAMES), pytest.raises(ValueError, match="may be of its first dimension or, time first,"):
        bank.model(words(3, 3))
    # The ids say which is which for the model, not whether layers turn it over.
    with bank.use(torch.tensor([[0, 1, 2]])), pytest.raises(ValueError, match="^first: its input .* may have"):
        bank.model(words(3, 3))
    expect_each_its_own(bank, words(4, 3), NAMES, torch.tensor([[0, 1, 2]]), dim=1)
    expect_each_its_own(bank, words(3, 3), NAMES, torch.tensor([[0, 1, 2]]), dim=1)
    for middle in (MLP, TimeFirst):
        bank = net(middle)
        with bank.use(NAMES), pytest.raises(ValueError, match="first dimension"):
            bank.model(words(3, 3))
        expect_each_its_own(bank, words(3, 4), NAMES)
        expect_each_its_own(bank, words(3, 3), ["c", None, "a"])


class TokenWise(nn.Module):
    """Nothing passes from token to token, so that prompts can be packed without a mask."""

    def __init__(self):
        super().__init__()
        self.embed, self.middle, self.head = nn.Embedding(WORDS, WIDTH), MLP(), nn.Linear(WIDTH, WORDS)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(x + self.middle(x))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("flat", [False, True], ids=["shaped", "flat"])
def test_packed_prompts_take_ids_by_token(rows, flat):
    torch.manual_seed(0)
    bank = banked(TokenWise(), ("embed", "fc1", "fc2", "head"))
    tokens, ids = words(rows, 12), torch.tensor([[0] * 3 + [2] * 4 + [-1] * 5, [1] * 11 + [0]])[:rows]
    with bank.use([0, 2]), torch.no_grad():
        if rows == 1:
            with pytest.raises(ValueError, match=r"\[1, 12\]: expected a row for each .* ids by token \[1, 12\]"):
                bank.model(tokens)
    alone = truths(bank)
    expected = torch.stack([alone[name](tokens) for name in (*NAMES, None)]).gather(
        0, (ids % 4).view(1, rows, 12, 1).expand(-1, -1, -1, WORDS)
    )[0]
    with torch.no_grad(), bank.use(ids.flatten() if flat else ids):
        for _ in range(3):  # no plan of one call serves the next
            assert error(bank.model(tokens), expected) < 2e-5
    with bank.use(ids), pytest.raises(ValueError, match="expected ids of that shape"):
        bank.model(words(rows, 11))


def test_beams_are_told_by_their_prompts_and_other_multiples_refused():
    bank, prompts = net(), words(3, 5)
    beams = prompts.repeat_interleave(2, 0)
    with torch.no_grad(), bank.use(NAMES):
        found = bank.model(beams)
        step = bank.model(words(6, 1))  # the beams go their own ways from here on
    alone = truths(bank)
    for row in range(6):
        assert error(found[row : row + 1], alone[NAMES[row // 2]](beams[row : row + 1])) < 2e-5
        assert error(step[row : row + 1], alone[NAMES[row // 2]](words(6, 1)[row : row + 1])) < 2e-5
    both = torch.cat([prompts, prompts.flip(1)])  # chosen and rejected, conditional and unconditional
    repeated, same = prompts.repeat(2, 1), prompts[:1].expand(6, -1)
    for rows in (both, repeated, same, words(6, 5), words(5, 5), words(2, 5)):
        with bank.use(NAMES), pytest.raises(ValueError, match="expected a row for each of the 3 entries, or beams"):
            bank.model(rows)
    expect_each_its_own(bank, both, ["a", "b", "c", "a", "b", "c"])
    with torch.no_grad(), bank.use(NAMES):
        bank.model(beams)
        longer = bank.model(torch.cat([beams, words(6, 2)], 1))  # without a cache
        for row in range(6):
            begun = torch.cat([beams, words(6, 2)], 1)[row : row + 1]
            assert error(longer[row : row + 1], alone[NAMES[row // 2]](begun)) < 2e-5
        for other in (words(6, 5), words(6, 7), words(6, 4), beams.flip(1)[[0, 2, 1, 3, 4, 5]]):
            with pytest.raises(ValueError, match="expected a row for each of the 3 entries, or beams"):
                bank.model(other)
        bank.model(beams.flip(1))  # other prompts, and beams again


def test_a_table_of_positions_serves_no_entry():
    """[1, T], the same for all prompts."""
    bank = net(positions=True, targets=("positions", "first"))
    for length in (6, 7, 3):
        with bank.use(NAMES), pytest.raises(ValueError, match=r"^positions: expected .* found \[1, \d, E\]"):
            bank.model(words(3, length))


class Image(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.fc1, self.head = nn.Conv2d(3, WIDTH, 2, 2), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, pixels):
        x = self.patches(pixels).flatten(2).transpose(1, 2)  # [b, 16, E]
        return self.head((x + torch.tanh(self.fc1(x)).cumsum(1)).mean(1))


@pytest.mark.parametrize("size", [8, 4], ids=["16 patches", "as many as images"])
def test_images_embeddings_and_features(size):
    torch.manual_seed(0)
    bank = banked(Image(), ("patches", "fc1", "head"))
    images = torch.randn(4, 3, size, size)
    if size == 4:
        with bank.use(["a", "b", "c", None]), pytest.raises(ValueError, match="^fc1: its input .* may have"):
            bank.model(images)
        bank = banked(Image(), ("patches", "fc1", "head"), in_order=True)
    with torch.no_grad(), bank.use(["a", "b", "c", None]):
        found = bank.model(images)
    alone = truths(bank)
    for i, name in enumerate((*NAMES, None)):
        assert error(found[i : i + 1], alone[name](images[i : i + 1].double())) < 2e-5
    bank = net()
    embeds = torch.randn(3, 5, WIDTH)
    with torch.no_grad(), bank.use(NAMES):
        found = bank.model(embeds=embeds)
    for i, name in enumerate(NAMES):
        assert error(found[i : i + 1], truths(bank)[name](embeds=embeds[i : i + 1].double())) < 2e-5
    for features in (banked(nn.Sequential(MLP(), MLP()), ("fc1", "fc2")), banked(MLP(), ("fc1", "fc2"))):
        x = torch.randn(3, WIDTH)
        with torch.no_grad(), features.use(NAMES):
            for _ in range(3):
                found = features.model(x)
        for i, name in enumerate(NAMES):
            assert error(found[i : i + 1], truths(features)[name](x[i : i + 1].double())) < 2e-5


def test_experts_in_a_model_of_features():
    """[b, E]: all b rows may reach an expert, in another order."""
    torch.manual_seed(0)
    bank = banked(nn.Sequential(MLP(), Experts(experts=2)), ("fc1", "fc2"))
    for seed in range(10):
        x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(seed))
        with bank.use(NAMES), pytest.raises(ValueError, match=r"^1\.experts\.\d\.fc1: expected an input"):
            bank.model(x)


@pytest.mark.parametrize("part", ["middle", "middle.experts.0", "middle.fc1"])
def test_a_part_called_by_itself_is_the_model_to_its_layers(part):
    bank = net(Experts if "expert" in part else MLP)
    alone, module = truths(bank), bank.model.get_submodule(part)
    x = torch.randn(3, 4, WIDTH)
    for inputs in (x, x[:, 0]):
        with torch.no_grad(), bank.use(NAMES):
            if part == "middle.experts.0" and inputs.dim() == 2:
                with pytest.raises(ValueError, match="expected an input"):  # as it may be that its owner called it
                    module(inputs)
                continue
            found = module(inputs)
        for i, name in enumerate(NAMES):
            assert error(found[i], alone[name].get_submodule(part)(inputs[i].double())) < 2e-5
    bank = net(Experts)
    for seed in range(20):  # three rows for the first expert are among them
        x = torch.randn(3, 2, WIDTH, generator=torch.Generator().manual_seed(seed))
        with bank.use(NAMES), pytest.raises(ValueError, match=r"^middle\.experts\.\d\.fc1: .*expected a"):
            bank.model.middle(x)


@pytest.fixture(params=["plan as it is", "plan in Python"])
def plans(request, monkeypatch):
    if request.param == "plan in Python":
        monkeypatch.setattr(plan, "twin", None)


def test_a_plan_serves_no_other_shape(plans):
    """In one block: prompts, then tokens, then the same number of rows in shapes that tell nothing."""
    bank = net()
    layer, alone = bank.model.first, truths(bank)
    with torch.no_grad(), bank.use(NAMES):
        for length in (5, 1, 1, 1, 4, 3, 3):
            found = bank.model(words(3, length))
            for i, name in enumerate(NAMES):
                assert error(found[i : i + 1], alone[name](words(3, length)[i : i + 1])) < 2e-5
        assert any(layer._plan is not None for layer in adapted_layers(bank.model).values())
        turned = torch.randn(5, 3, WIDTH)
        for x in (torch.randn(12, WIDTH), torch.randn(3, WIDTH), turned, torch.randn(6, 2, WIDTH)):
            with pytest.raises(ValueError, match="^first: expected an input"):
                layer(x)
    with torch.no_grad(), bank.use(NAMES):  # the layer is the model here, with features
        for _ in range(3):
            layer(torch.randn(3, WIDTH))
        assert layer._plan is not None
        bank.model(words(3, 4))
        with pytest.raises(ValueError, match="^first: expected an input"):
            layer(torch.randn(3, WIDTH))


def test_gradients_and_recomputed_activations():
    torch.manual_seed(0)
    bank = banked(Net(TimeFirst), trainable=True)
    tokens, longer = words(3, 5), words(3, 7)
    found = []
    for run in (bank.model, lambda t: checkpoint(bank.model, t, use_reentrant=False)):
        with bank.use(["a", None, "c"]):
            both = run(tokens).square().sum() + run(longer).square().sum()  # two lengths before one backward pass
            (gradient,) = torch.autograd.grad(both, bank.parameters())
        found.append(gradient)
    assert torch.equal(*found) and found[0][0].any() and found[0][2].any() and not found[0][1].any()
    (table,) = bank.parameters()
    for row, name in ((0, "a"), (2, "c")):  # against differences of the dense model
        for i in range(3):
            step = torch.zeros(1, 3, dtype=torch.float64)
            step[0, i] = 1e-5
            ends = [dense_model(bank.model, bank.vectors(name).double() + sign * step) for sign in (1, -1)]
            sums = [sum(end(t[row : row + 1]).square().sum() for t in (tokens, longer)) for end in ends]
            assert float((sums[0] - sums[1]) / 2e-5) == pytest.approx(float(found[0][row, i]), rel=2e-4)


def test_copies_and_pickles_carry_no_bank():
    bank = net()
    twins = copy.deepcopy(bank.model), pickle.loads(pickle.dumps(bank.model))
    with torch.no_grad(), bank.use(NAMES):
        for twin in twins:
            assert error(twin(words(5, 3)), truths(bank)[None](words(5, 3))) < 2e-5
    bank.close()
    assert not any(module._forward_pre_hooks for module in bank.model.modules())


def test_stacked_experts_of_transformers_take_ids_by_token():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    bank = banked(transformers.MixtralForCausalLM(config).eval(), ("experts", "v_proj"))
    tokens = words(3, 7)
    with torch.no_grad():
        apart = []
        for i, name in enumerate(NAMES):
            with bank.use([name]):
                apart.append(bank.model(tokens[i : i + 1]).logits)
        apart = torch.cat(apart)
        for ids in (torch.arange(3), torch.arange(3).view(3, 1), torch.arange(3).view(3, 1).expand(3, 7)):
            with bank.use(ids):
                assert error(bank.model(tokens).logits, apart.double()) < 1e-5
        with bank.use(torch.arange(3)):  # beams
            beams = bank.model(tokens.repeat_interleave(2, 0)).logits
        assert error(beams, apart.repeat_interleave(2, 0).double()) < 1e-5
        with bank.use([0, 1]), pytest.raises(ValueError, match=r"input_ids \[1, 12\]: expected a row for each"):
            bank.model(input_ids=words(1, 12))
        with bank.use([0, 1]), pytest.raises(ValueError, match="experts.* expected an input"):
            bank.model(input_ids=words(2, 6))
            bank.model.model.layers[0].mlp(torch.randn(2, 3, 32))


def test_rows_are_beams_where_all_inputs_say_so():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    )  # fmt: skip
    bank = banked(transformers.LlamaForCausalLM(config).eval(), ("q_proj", "down_proj"))
    padded = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 1]])
    embeds = torch.randn(3, 3, 32).repeat_interleave(2, 0)
    with torch.no_grad(), bank.use(NAMES):
        bank.model(attention_mask=padded, inputs_embeds=embeds)
        with pytest.raises(ValueError, match=r"inputs_embeds \[6, 3\]: expected a row for each of the 3 entries"):
            bank.model(attention_mask=padded, inputs_embeds=torch.randn(6, 3, 32))
        bank.model.generate(words(3, 4), num_beams=2, max_new_tokens=3, do_sample=False)
        for length in (4, 6, 7):  # none of them goes on from what was generated
            with pytest.raises(ValueError, match="expected a row for each of the 3 entries, or beams"):
                bank.model(words(6, length))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("kind", ["Llama", "T5"])
def test_beam_search_of_each_prompt_is_that_of_its_adapter(kind, use_cache):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "Llama":
        config = transformers.LlamaConfig(
            vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        )  # fmt: skip
        bank = banked(transformers.LlamaForCausalLM(config).eval(), ("q_proj", "down_proj"))
    else:
        config = transformers.T5Config(
            vocab_size=WORDS, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
        bank = banked(transformers.T5ForConditionalGeneration(config).eval(), ("q", "wo"))
    options = dict(
        num_beams=2, max_new_tokens=5, do_sample=False, use_cache=use_cache, pad_token_id=0, eos_token_id=None
    )
    prompts = words(3, 5) % (WORDS - 1) + 1
    alone = []
    for i, name in enumerate(NAMES):
        with bank.use([name]):
            alone.append(bank.model.generate(prompts[i : i + 1], **options))
    with bank.use(NAMES):
        assert torch.equal(bank.model.generate(prompts, **options), torch.cat(alone))
    assert len(torch.cat(alone).unique(dim=0)) > 1
