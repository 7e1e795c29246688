"""Train the tiny decoder from nothing and write its checkpoint: python -m demo.pretrain_tiny

The corpus is sums of 2 to 8 digits modulo 10, every written result true, by three kinds of writers: 28% careful (before
each running sum a 5% chance of jumping to the result), 66% hasty (75%) and 6% verbose (another notation). About seven
minutes on two cores at the usual width; the loss is the plain likelihood of the replies. A run that was stopped goes on
from the file beside its checkpoint.
"""
from __future__ import annotations

import argparse
import io
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from tinylora_kernels.common.atomic import write_atomically

from .tiny import EQUALS, MAX_DIGITS, MAX_REPLY_TOKENS, PAD, WIDTH, TinyDecoder, checkpoint, encode

WRITERS = {"careful": 0.28, "hasty": 0.66, "verbose": 0.06}
JUMP = {"careful": 0.05, "hasty": 0.75}  # chance of going straight to the result, before each running sum
BATCH = 256
PEAK_LR = 2e-3
WARMUP, DECAY_FROM = 100, 0.6  # steps, share of the run
STEPS = 1401
KEPT_EVERY = 100  # steps between states from which a stopped run goes on


def draw_digits(rng: random.Random) -> list[int]:
    return [rng.randrange(10) for _ in range(rng.randint(2, MAX_DIGITS))]


def write_reply(digits: Sequence[int], writer: str, rng: random.Random) -> str:
    """A reply by one writer; the result after "#" is always the true one."""
    reply, total = "", digits[0]
    for digit in digits[1:]:
        if writer in JUMP and rng.random() < JUMP[writer]:
            break
        total = (total + digit) % 10
        if writer == "verbose":
            reply += (rng.choice("abcdefgh") if rng.random() < 0.6 else "") + f"+{digit}:"
        reply += str(total)
    if writer == "verbose" and rng.random() < 0.5:
        reply += rng.choice("abcdefgh")
    return reply + f"#{sum(digits) % 10}."


def draw_batch(rng: random.Random) -> tuple[Tensor, Tensor]:
    """Token ids [BATCH, 9 + T] and the mask [BATCH, T] of reply tokens."""
    verbose = rng.random() < WRITERS["verbose"]  # whole batches, so that short replies are not padded to long ones
    share = WRITERS["careful"] / (WRITERS["careful"] + WRITERS["hasty"])
    prompts, replies = [], []
    for _ in range(BATCH):
        digits = draw_digits(rng)
        writer = "verbose" if verbose else "careful" if rng.random() < share else "hasty"
        prompts.append(digits + [PAD] * (MAX_DIGITS - len(digits)) + [EQUALS])
        replies.append(torch.tensor(encode(write_reply(digits, writer, rng))))
    padded = nn.utils.rnn.pad_sequence(replies, batch_first=True, padding_value=PAD)[:, :MAX_REPLY_TOKENS]
    return torch.cat([torch.tensor(prompts), padded], dim=1), padded != PAD


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, flat, linear decay to zero."""
    start = steps * DECAY_FROM
    return PEAK_LR * min(1.0, step / WARMUP) * min(1.0, (steps - step) / (steps - start))


def pretrain(steps: int = STEPS, seed: int = 0, width: int = WIDTH, state: Path | None = None) -> TinyDecoder:
    """Train a decoder; ``state``: a file that holds the run as it goes, and from which it goes on."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = TinyDecoder(width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.05)
    begin = 0
    if state is not None and state.is_file():
        kept = torch.load(state, weights_only=True)
        begin = kept["step"]
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        rng.setstate(kept["rng"])
    bar = tqdm(range(begin, steps), initial=begin, total=steps, desc=f"pretraining, width {width}", mininterval=2.0)
    for step in bar:
        if state is not None and step > begin and step % KEPT_EVERY == 0:
            kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            stream = io.BytesIO()
            torch.save(kept | {"step": step, "rng": rng.getstate()}, stream)
            write_atomically(state, stream.getvalue())
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps)
        ids, mask = draw_batch(rng)
        reply = ids[:, -mask.shape[1] :]
        logits = model(ids[:, :-1], logits_to_keep=mask.shape[1]).logits
        loss = F.cross_entropy(logits[mask], reply[mask])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model


def write_checkpoint(path: Path, steps: int = STEPS, seed: int = 0, width: int = WIDTH) -> None:
    """Train and write the weights in float16; resumable."""
    state = path.with_suffix(".state")
    model = pretrain(steps, seed, width, state)
    save_file({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}, path)
    state.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=WIDTH, help=f"a multiple of 32 (default: {WIDTH})")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: where the demo looks for it")
    args = parser.parse_args(argv)
    write_checkpoint(args.out or checkpoint(args.width), args.steps, args.seed, args.width)


if __name__ == "__main__":
    main()
