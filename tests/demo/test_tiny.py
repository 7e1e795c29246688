"""The tiny decoder: its cache, its corpus, its training script and its checkpoint."""
import random

import pytest
import torch

from demo import pretrain_tiny, tiny
from demo.evaluation import evaluate
from demo.models import load_model
from demo.pretrain_tiny import main, write_reply
from demo.tasks import task


def test_encode_and_decode_are_inverse():
    assert tiny.decode(tiny.encode(tiny.ALPHABET)) == tiny.ALPHABET
    with pytest.raises(ValueError, match=r"found \['\?'\]"):
        tiny.encode("3?")


def test_cached_forward_equals_the_whole():
    model = tiny.load_checkpoint()
    ids = torch.tensor([tiny.encode("345_____=72#2."), tiny.encode("991_____=80#9.")])
    whole = model(ids).logits
    cache = tiny.KeyValueCache()
    parts = [model(chunk, past_key_values=cache).logits for chunk in ids.split([9, 1, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole[:, -2:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("writer", ["careful", "hasty", "verbose"])
def test_every_written_result_is_true(writer):
    rng = random.Random(0)
    for _ in range(200):
        digits = [rng.randrange(10) for _ in range(rng.randint(2, tiny.MAX_DIGITS))]
        reply = write_reply(digits, writer, rng)
        assert reply.endswith(f"#{sum(digits) % 10}.") and len(reply) <= tiny.MAX_REPLY_TOKENS
        tiny.encode(reply)
        if writer != "verbose":  # running sums, as far as they were written
            sums = [sum(digits[: i + 2]) % 10 for i in range(len(digits) - 1)]
            written = [int(c) for c in reply.split("#")[0]]
            assert written == sums[: len(written)]


def test_checkpoint_is_small_and_about_half_right():
    assert tiny.CHECKPOINT.stat().st_size < 1_300_000
    problems = task("digit-sums")
    found = evaluate(load_model("tiny"), problems.held_out[:300], 1.0, problems.max_new_tokens)
    assert 0.4 < found.greedy.accuracy < 0.6


def test_a_stopped_training_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_tiny, "KEPT_EVERY", 2)
    state = tmp_path / "run.state"
    whole = pretrain_tiny.pretrain(steps=4, width=32, state=state)  # its last state: before the third step
    assert torch.load(state, weights_only=True)["step"] == 2
    drawn = []
    draw = pretrain_tiny.draw_batch
    monkeypatch.setattr(pretrain_tiny, "draw_batch", lambda rng: drawn.append(draw(rng)) or drawn[-1])
    resumed = pretrain_tiny.pretrain(steps=4, width=32, state=state)
    assert len(drawn) == 2
    for found, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("width, parameters", [(64, 157_184), (tiny.WIDTH, 615_424)])
def test_a_width_has_its_checkpoint(width, parameters):
    model = load_model("tiny" if width == tiny.WIDTH else f"tiny-{width}")
    assert sum(p.numel() for p in model.module.parameters()) == parameters
    assert model.name == f"tiny decoder, {parameters / 1e6:.1f}M"


def test_a_missing_width_comes_with_the_command():
    with pytest.raises(FileNotFoundError, match="tiny-544.*python -m demo.pretrain_tiny --width WIDTH"):
        load_model("tiny-544")


def test_training_script_lowers_the_loss_and_writes_a_checkpoint(tmp_path, capsys):
    path = tmp_path / "tiny.safetensors"
    main(["--steps", "3", "--out", str(path)])
    model = tiny.load_checkpoint(path)
    assert sum(p.numel() for p in model.parameters()) == 615_424
