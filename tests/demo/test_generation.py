"""Trees of tokens against whole sequences one by one: same tokens, same log-probabilities, same gradients."""
import pytest
import torch

from demo import generation
from demo.generation import Assignment, Completions, Replies, completion_log_probs, draw, generate, invert
from demo.models import PROJECTIONS, load_model
from tinylora_kernels import TinyLoRAConfig, apply_tiny_lora, trainable_vectors
from tinylora_kernels.bank.bank import AdapterBank

PROMPTS = ["345_____=", "34______=", "9911____="]
UNEQUAL = ["345_____=", "345____=", "345=", "3="]  # a common beginning, and ends at different depths
NESTED = ["34_", "34_=", "34_=7", "34_="]  # prompts that go on as replies to others do, and one twice
SHAPES = pytest.mark.parametrize(
    "prompts", [PROMPTS, UNEQUAL, NESTED, PROMPTS[:1]], ids=["field", "unequal", "nested", "one"]
)


@pytest.fixture
def adapted():
    """The tiny decoder with 13 numbers away from zero, in float64: differences are the algorithm's."""
    model = load_model("tiny")
    model.module.double()
    config = TinyLoRAConfig(
        trainable_dim=13, n_tie=21, target_modules=PROJECTIONS, v_dtype=torch.float64, cache=False
    )
    apply_tiny_lora(model.module, config, progress=False)
    with torch.no_grad():
        for vector in trainable_vectors(model.module):
            vector.copy_(0.02 * torch.randn(vector.shape, generator=torch.Generator().manual_seed(1)))
    return model


def encoded(model, prompts):
    return [model.encode(prompt) for prompt in prompts]


def whole_log_probs(model, prompt, reply):
    """log p of each reply token from one forward without cache or padding."""
    ids = torch.tensor([prompt + reply])
    scores = model.module(ids[:, :-1]).logits[0].log_softmax(-1)  # [S - 1, V]
    return scores.gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]


@pytest.fixture(params=[generation.ROW, 70, 1], ids=lambda row: f"rows of {row}")
def rows(request, monkeypatch):
    """How many tokens share a row: all of a batch, some prompts', one prompt's."""
    monkeypatch.setattr(generation, "ROW", request.param)


@SHAPES
def test_log_probs_and_gradients_are_those_of_whole_sequences(adapted, prompts, rows):
    ids = encoded(adapted, prompts)
    completions = generate(adapted, ids, [1.0] * 4, 12, torch.Generator().manual_seed(0))
    found = completion_log_probs(adapted, ids, completions, temperature=1.0)
    expected = torch.zeros_like(found)
    for row, keep in enumerate(completions.mask):
        reply = completions.tokens[row][keep].tolist()
        expected[row, : len(reply)] = whole_log_probs(adapted, ids[row // 4], reply)
    torch.testing.assert_close(found[completions.mask], expected[completions.mask], rtol=0, atol=1e-10)

    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=found.dtype) * completions.mask
    (v,) = trainable_vectors(adapted.module)
    (gradient,) = torch.autograd.grad((found * weights).sum(), v)
    (reference,) = torch.autograd.grad((expected * weights).sum(), v)
    torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-9)


@SHAPES
def test_greedy_replies_are_the_argmax_of_whole_sequences(adapted, prompts, rows):
    ids = encoded(adapted, prompts)
    completions = generate(adapted, ids, [0.0], 16)
    for prompt, tokens, keep in zip(ids, completions.tokens, completions.mask, strict=True):
        reply = tokens[keep].tolist()
        for length, token in enumerate(reply):
            scores = adapted.module(torch.tensor([prompt + reply[:length]])).logits[0, -1]
            assert scores.argmax() == token
        assert reply[-1] == adapted.end_id or len(reply) == 16


def computed(model, call):
    """Tokens that the model was given meanwhile, padding included."""
    given = []
    handle = model.module.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        call()
    finally:
        handle.remove()
    return sum(given)


def test_each_token_is_computed_once(adapted):
    """The common beginning, prompts, and what replies have in common; an end token and the last one not at all."""
    ids = encoded(adapted, UNEQUAL)
    completions = generate(adapted, ids, [0.0, 1.0, 1.0, 1.0, 1.0, 1.0], 12, torch.Generator().manual_seed(0))
    nodes = {tuple(prompt[: i + 1]) for prompt in ids for i in range(len(prompt))}
    for row, keep in enumerate(completions.mask):
        reply = completions.tokens[row][keep].tolist()
        nodes |= {(*ids[row // 6], *reply[: i + 1]) for i in range(len(reply) - 1)}
    assert computed(adapted, lambda: completion_log_probs(adapted, ids, completions, 1.0)) == len(nodes)
    again = torch.Generator().manual_seed(0)
    assert computed(adapted, lambda: generate(adapted, ids, [0.0, *[1.0] * 5], 12, again)) == len(nodes)
    assert len(nodes) < 0.5 * sum(len(ids[row // 6]) + int(keep.sum()) for row, keep in enumerate(completions.mask))


@pytest.mark.parametrize("length, rows", [(4, 1), (40, 2), (150, 6), (300, 11), (6000, 18)])
def test_rows_hold_about_as_many_tokens_as_they_may(adapted, length, rows):
    """Prompts are not torn apart before their replies alone fill a row."""
    replies = Replies(adapted, encoded(adapted, PROMPTS) * 2, 3, length)
    sizes = torch.bincount(torch.tensor(replies.rows))
    assert len(sizes) == rows == len(replies.forest.trees) and sizes.max() - sizes.min() <= 3
    assert sizes.max() == 1 or sizes.max() * length <= 1.2 * 512
    if rows <= 6:
        assert all(len(set(replies.rows[3 * i : 3 * i + 3])) == 1 for i in range(6))


def test_replies_that_are_one_are_computed_once(adapted):
    ids = encoded(adapted, PROMPTS)
    one, five = (lambda n=n: generate(adapted, ids, [0.0] * n, 16) for n in (1, 5))
    assert computed(adapted, one) == computed(adapted, five)
    alone, together = one(), five()
    assert torch.equal(together.tokens, alone.tokens.repeat_interleave(5, 0))


def test_sequences_beyond_a_sliding_window_are_refused(adapted):
    adapted.window = 12
    ids = encoded(adapted, PROMPTS)
    generate(adapted, ids, [0.0], 3)
    with pytest.raises(ValueError, match="sees 12 tokens"):
        generate(adapted, ids, [1.0] * 20, 8, torch.Generator().manual_seed(0))


def test_a_reply_does_not_depend_on_its_batch(adapted):
    together = generate(adapted, encoded(adapted, PROMPTS), [0.0], 16)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(adapted, encoded(adapted, [prompt]), [0.0], 16)
        assert alone.tokens[0][alone.mask[0]].tolist() == together.tokens[row][together.mask[row]].tolist()


def test_replies_end_at_the_end_token_or_the_budget(adapted):
    completions = generate(adapted, encoded(adapted, PROMPTS), [1.0] * 50, 4, torch.Generator().manual_seed(0))
    lengths = completions.mask.sum(dim=1)
    assert completions.tokens.shape[1] <= 4 and lengths.min() >= 1
    for tokens, keep, length in zip(completions.tokens, completions.mask, lengths, strict=True):
        assert keep[:length].all() and not keep[length:].any()
        assert adapted.end_id not in tokens[: length - 1]
        assert length == 4 or tokens[length - 1] == adapted.end_id


def test_mixed_temperatures_keep_the_greedy_reply(adapted):
    ids = encoded(adapted, PROMPTS)
    alone = generate(adapted, ids, [0.0], 16)
    mixed = generate(adapted, ids, [0.0, 1.0], 16, torch.Generator().manual_seed(0))
    for row in range(len(ids)):
        assert alone.tokens[row][alone.mask[row]].tolist() == mixed.tokens[2 * row][mixed.mask[2 * row]].tolist()


def test_samples_follow_the_tempered_distribution():
    scores = torch.tensor([[0.0, 9.0, 0.0], [1.0, 0.0, -1.0]])
    places, uniform = torch.ones(20000).long(), torch.rand(20000, generator=torch.Generator().manual_seed(0)).double()
    drawn = draw(scores, places, torch.full((20000,), 0.5), uniform)
    expected = (scores[1] / 0.5).softmax(0)
    found = torch.bincount(drawn, minlength=3) / 20000
    torch.testing.assert_close(found, expected, atol=0.015, rtol=0)  # four standard deviations of 20,000 draws
    places, temperatures = torch.tensor([0, 1, 1, 0]), torch.tensor([0.0, 0.0, 1e-3, 5.0])
    mixed = draw(scores, places, temperatures, torch.tensor([0.9] * 4).double())
    assert mixed.tolist() == [1, 0, 0, 2]


def test_select_prompts_keeps_whole_groups_and_trims_columns():
    tokens = torch.arange(24).view(6, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()
    kept = Completions(tokens, mask, samples=2).select_prompts(torch.tensor([1, 2]))
    assert torch.equal(kept.tokens, tokens[2:, :2]) and torch.equal(kept.mask, mask[2:, :2])


@pytest.mark.parametrize("prompts", [PROMPTS, UNEQUAL, NESTED], ids=["field", "unequal", "nested"])
def test_prompts_under_different_adapters_are_each_what_they_are_alone(adapted, prompts):
    """Replies by their own random numbers, log-probabilities and gradients; the common beginning differs by adapter."""
    bank = AdapterBank(adapted.module, 2, trainable=True)
    generator = torch.Generator().manual_seed(5)
    values = {name: 0.05 * torch.randn(1, 13, generator=generator) for name in ("a", "b")}
    for name, value in values.items():
        bank.add(name, value)
    ids = encoded(adapted, prompts)
    names = ["ab"[i % 2] for i in range(len(prompts))]
    uniform = torch.rand(len(prompts) * 4, 12, generator=generator, dtype=torch.float64)
    adapters = Assignment(bank, torch.tensor([bank.slot(name) for name in names]))
    together = generate(adapted, ids, [1.0] * 4, 12, uniform=uniform, adapters=adapters)
    found = completion_log_probs(adapted, ids, together, 1.0, adapters)
    (gradient,) = torch.autograd.grad(found[together.mask].sum(), bank.parameters())
    (v,) = trainable_vectors(adapted.module)
    for name, value in values.items():
        own = [i for i, chosen in enumerate(names) if chosen == name]
        rows = torch.cat([torch.arange(4 * i, 4 * i + 4) for i in own])
        with torch.no_grad():
            v.copy_(value[0])
        alone = generate(adapted, [ids[i] for i in own], [1.0] * 4, 12, uniform=uniform[rows])
        expected = together.select_prompts(torch.tensor(own))
        assert torch.equal(alone.mask, expected.mask)
        assert torch.equal(alone.tokens[alone.mask], expected.tokens[expected.mask])
        scores = completion_log_probs(adapted, [ids[i] for i in own], alone, 1.0)
        chosen = found[rows][:, : alone.mask.shape[1]]
        torch.testing.assert_close(chosen[alone.mask], scores[alone.mask], rtol=0, atol=1e-6)
        (single,) = torch.autograd.grad(scores[alone.mask].sum(), v)
        torch.testing.assert_close(gradient[bank.slot(name)].double(), single, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vocabulary", [1, 7, 256, 257, 5000])
def test_sampling_inverts_the_cumulative_distribution(vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    probabilities = torch.randn(2000, vocabulary, generator=generator).mul(4).softmax(dim=1)
    probabilities[:, ::3] = 0.0 if vocabulary > 1 else 1.0  # never to be chosen
    number = torch.rand(2000, generator=generator, dtype=torch.float64)
    number[:10], number[10:20] = 0.0, 1 - 2.0**-53
    which = torch.randint(2000, (2000,), generator=generator)
    found = invert(probabilities, number, which)
    cumulative = probabilities.double().cumsum(dim=1)[which]
    expected = torch.searchsorted(cumulative, number[:, None] * cumulative[:, -1:], right=True).squeeze(1)
    assert probabilities[which].gather(1, found[:, None]).min() > 0
    inner = slice(20, None)
    assert torch.equal(found[inner], expected[inner])
