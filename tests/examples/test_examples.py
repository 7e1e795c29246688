"""The programs of examples/ themselves, on a model of 0.1M parameters: they learn, serve and export what they say."""
from __future__ import annotations

import importlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.examples.adder import LARGEST, QUESTION, save_adder
from tinylora_kernels import (
    TinyLoRAConfig,
    apply_tiny_lora,
    inspect_adapter,
    load_adapter,
    save_adapter,
    trainable_vectors,
)

transformers = pytest.importorskip("transformers", minversion="5", reason="the examples need transformers >= 5")
EXAMPLES = Path(__file__).parents[2] / "examples"
SUMS = [(a, b) for a in range(1, LARGEST + 1) for b in range(1, LARGEST + 1)]


@pytest.fixture(scope="module")
def adder(tmp_path_factory) -> str:
    return str(save_adder(tmp_path_factory.mktemp("adder")))


@pytest.fixture
def run(adder, monkeypatch, capsys):
    """run("sft", "--steps", 3): the program's output."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def call(name: str, *arguments) -> str:
        capsys.readouterr()
        importlib.import_module(name).main(["--model", adder, *map(str, arguments)])
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory) -> Path:
    """A clone of openai/gsm8k, as a hub gives it, of sums."""
    from datasets import Dataset

    clone = tmp_path_factory.mktemp("gsm8k")
    (clone / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n"
        "  - {split: train, path: main/train-*}\n  - {split: test, path: main/test-*}\n---\n"
    )
    rows = [(QUESTION.format(a, b), f"{a} + {b} = <<{a}+{b}={a + b}>>{a + b}\n#### {a + b}") for a, b in SUMS]
    for split, repeated in {"train": rows, "test": 6 * rows}.items():
        questions, answers = zip(*repeated, strict=True)
        data = Dataset.from_dict({"question": list(questions), "answer": list(answers)})
        (clone / "main").mkdir(exist_ok=True)
        data.to_parquet(str(clone / "main" / f"{split}-00000-of-00001.parquet"))
    return clone


def shares(output: str) -> list[float]:
    """Every "57%" and "57.1%" of the output, as 0.57 and 0.571."""
    return [float(number) / 100 for number in re.findall(r"([\d.]+)%", output)]


def bare(directory, dtype: torch.dtype | str = torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)


def test_grpo_loop_learns_and_writes_what_it_learned(run, adder, tmp_path):
    out = tmp_path / "adder.safetensors"
    rewards = shares(run("grpo_loop", "--steps", 20, "--lr", 0.01, "--largest", LARGEST, "--out", out))[1:-1]
    assert len(rewards) == 20 and sum(rewards[:3]) / 3 < 0.75 and sum(rewards[-5:]) / 5 > 0.85
    model = load_adapter(bare(adder), out, cache=False)
    grpo = importlib.import_module("grpo_loop")
    words, _ = grpo.load(adder)
    assert grpo.accuracy(model, words, sum(grpo.additions(LARGEST), [])) > 0.9


def test_the_end_of_a_reply_is_learned_and_nothing_behind_it(run, adder):
    grpo = importlib.import_module("grpo_loop")
    words, model = grpo.load(adder)
    tokens, seen, mask, texts = grpo.sample(model, words, ["What is 1 + 1?", "What is 2 + 3?"], 12, 0.7)
    width = tokens.shape[1] - mask.shape[1]
    assert tokens.shape == seen.shape and torch.equal(seen[:, width:].bool(), mask)
    for row, kept, text in zip(tokens[:, width:], mask, texts, strict=True):
        assert words.decode(row[kept]) == text + words.eos_token and not kept[len(text) + 1 :].any()


OF_AUTHORS = {  # what a generation_config.json may hold
    "nothing": {}, "a penalty": {"repetition_penalty": 1.3}, "min_p": {"min_p": 0.9}, "typical_p": {"typical_p": 0.5},
    "bad words": {"bad_words_ids": [[20], [21], [22]]}, "suppressed": {"suppress_tokens": [20, 21, 22, 23]},
    "n-grams": {"no_repeat_ngram_size": 2}, "cutoffs": {"epsilon_cutoff": 0.05, "eta_cutoff": 0.05},
    "a bias": {"sequence_bias": [[[20], 5.0]]},
    "top": {"top_k": 3, "top_p": 0.5, "temperature": 0.3, "do_sample": True},
    "lengths": {"min_new_tokens": 5, "max_length": 7, "exponential_decay_length_penalty": (2, 2.0)},
    "a last token": {"forced_eos_token_id": 2}, "beams": {"num_beams": 2},
    "several": {"num_beams": 2, "num_return_sequences": 2},
    "first tokens": {"begin_suppress_tokens": [20, 21, 22]}, "guidance": {"guidance_scale": 2.0},
}  # fmt: skip


def restless(directory):
    """The adder with scores near even, so that whatever changes them shows, and replies end anywhere."""
    model = bare(directory)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.05)
    return model


@pytest.mark.parametrize(
    ("name", "ends"),
    [*((name, [2, 5]) for name in OF_AUTHORS), *(("nothing", ends) for ends in (2, [5, 30, 40], None))],
)
def test_what_is_sampled_from_is_what_is_trained(run, adder, monkeypatch, name, ends):
    from tinylora_kernels import token_log_probs

    grpo = importlib.import_module("grpo_loop")
    (words, _), model, scores = grpo.load(adder), restless(adder), []
    model.generation_config = transformers.GenerationConfig(eos_token_id=ends, pad_token_id=0, **OF_AUTHORS[name])
    generate, before = model.generate, model.generation_config.to_dict()

    def recorded(*args, **kwargs):
        out = generate(*args, **kwargs, output_scores=True, return_dict_in_generate=True)
        scores.extend(out.scores)
        return out.sequences

    monkeypatch.setattr(model, "generate", recorded)
    torch.manual_seed(0)
    tokens, seen, mask, texts = grpo.sample(model, words, ["What is 1 + 1?"] * 96, 16, 0.7)
    assert model.generation_config.to_dict() == before and len(tokens) == len(texts) == 96
    length = mask.shape[1]
    logits = model(tokens, attention_mask=seen, logits_to_keep=length + 1).logits[:, :-1]
    trained = token_log_probs(logits, tokens[:, -length:], 0.7).detach()
    sampled = torch.stack(scores, 1).float().log_softmax(-1).gather(2, tokens[:, -length:].unsqueeze(2)).squeeze(2)
    assert torch.allclose(trained[mask], sampled[mask], atol=1e-4)
    own = {2, *(ends if isinstance(ends, list) else [])}  # and the tokenizer's, which sft.py teaches
    for row, kept in zip(tokens[:, -length:].tolist(), mask.tolist(), strict=True):
        end = next((place for place, token in enumerate(row) if token in own), length - 1)
        assert kept == [place <= end for place in range(length)]
    assert not mask.all() and mask[:, -1].any()  # some end, some do not
    greedy = grpo.sample(model, words, ["What is 1 + 1?"], 6)
    place = greedy[0].shape[1] - greedy[2].shape[1]
    with torch.no_grad():
        assert torch.equal(model(greedy[0]).logits[:, place - 1 : -1].argmax(-1), greedy[0][:, place:])


def test_a_failed_sample_leaves_the_model_s_own_config(run, adder, monkeypatch):
    grpo = importlib.import_module("grpo_loop")
    words, model = grpo.load(adder)
    theirs = model.generation_config
    monkeypatch.setattr(model, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        grpo.sample(model, words, ["What is 1 + 1?"], 3)
    assert model.generation_config is theirs


@pytest.mark.parametrize("source", ["own answers", "a file"])
def test_sft_without_a_pair_says_so(run, tmp_path, monkeypatch, source):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(importlib.import_module("sft"), "reward", lambda reply, answer: 0.0)
    (data := tmp_path / "pairs.jsonl").write_text("")
    options = ["--data", data] if source == "a file" else []
    with pytest.raises(SystemExit, match="^pairs: expected at least one .*found none in ") as error:
        run("sft", "--largest", LARGEST, "--out", tmp_path / "sft.safetensors", *options)
    assert "\n" not in str(error.value) and not (tmp_path / "sft.safetensors").exists()


@pytest.mark.parametrize("source", ["own answers", "a file"])
def test_sft_makes_its_pairs_likelier(run, adder, tmp_path, source):
    options, out = ["--steps", 10, "--largest", LARGEST, "--out", tmp_path / "sft.safetensors"], ()
    if source == "a file":
        data = tmp_path / "pairs.jsonl"
        pairs = [{"prompt": QUESTION.format(a, b), "reply": str(a + b)} for a, b in SUMS]
        data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        options += ["--data", data]
    out = run("sft", *options, "--lr", 0.01)
    perplexities = [float(value) for value in re.findall(r"perplexity ([\d.]+)", out)]
    assert len(perplexities) == 10 and perplexities[-1] < 1.15 < perplexities[0]
    assert shares(out)[-1] == 1.0 and inspect_adapter(tmp_path / "sft.safetensors").v.abs().sum() > 0


def test_sft_learns_replies_and_their_end_alone(run, adder):
    sft = importlib.import_module("sft")
    words, _ = sft.load(adder)
    tokens, labels = sft.encode(words, [("What is 1 + 2?", "3"), ("What is 1 + 2?", "3 or so")])
    learned = [words.decode(row[row != -100]) for row in labels]
    assert learned == ["3</s>", "3 or so</s>"] and torch.equal(tokens[labels != -100], labels[labels != -100])


def test_sweep_finds_the_rate_that_learns(run, adder, tmp_path):
    out = tmp_path / "best.safetensors"
    printed = run(
        "sweep", "--lr", 1e-9, 0.01, "--seeds", 2, "--steps", 12, "--largest", LARGEST, "--out", out
    )  # fmt: skip
    scores = {line.split(":")[0]: shares(line)[0] for line in printed.splitlines() if line.startswith("lr ")}
    assert list(scores) == ["lr 1e-09, seed 0", "lr 1e-09, seed 1", "lr 0.01, seed 0", "lr 0.01, seed 1"]
    assert scores["lr 1e-09, seed 0"] == scores["lr 1e-09, seed 1"] < max(scores.values())
    assert f"{out}: lr 0.01, seed" in printed
    assert inspect_adapter(out).config.seed == int(re.search(r"best.safetensors: lr 0.01, seed (\d)", printed)[1])
    load_adapter(bare(adder), out, cache=False)


def make_adapter(directory, file: Path, seed: int = 0) -> None:
    """An adapter of random numbers."""
    config = TinyLoRAConfig(trainable_dim=4, seed=seed, cache=False)
    model = apply_tiny_lora(bare(directory, "auto"), config, progress=False)
    for v in trainable_vectors(model):
        v.data.normal_(std=0.3, generator=torch.Generator().manual_seed(seed))
    save_adapter(model, file)


@pytest.fixture(scope="module")
def adapters(adder, tmp_path_factory) -> dict[str, Path]:
    """Two files with other numbers, one of them with another seed."""
    folder = tmp_path_factory.mktemp("adapters")
    files = {"alice": folder / "alice.safetensors", "bob": folder / "bob.safetensors"}
    for seed, file in enumerate(files.values()):
        make_adapter(adder, file, seed)
    return files


def test_serve_bank_answers_each_request_by_its_adapter(run, adder, adapters, monkeypatch):
    requests = [
        {**({"adapter": name} if name else {}), "prompt": QUESTION.format(a, b)}
        for a, b in SUMS[:4]
        for name in ("alice", None, "bob")
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(json.dumps(request) + "\n" for request in requests)))
    named = [f"{name}={file}" for name, file in adapters.items()]
    replies = [json.loads(line) for line in run("serve_bank", *named, "--batch", 5, "--length", 4).splitlines()]
    assert [{**reply, "reply": 0} for reply in replies] == [{**request, "reply": 0} for request in requests]
    grpo = importlib.import_module("grpo_loop")
    words, base = grpo.load(adder)
    alone = {name: load_adapter(bare(adder), file, cache=False) for name, file in adapters.items()} | {None: base}
    wanted = {
        name: [grpo.sample(model, words, [QUESTION.format(a, b)], 4)[-1][0] for a, b in SUMS[:4]]
        for name, model in alone.items()
    }
    assert {name: [r["reply"] for r in replies if r.get("adapter") == name] for name in wanted} == wanted
    assert wanted["alice"] != wanted[None] != wanted["bob"] != wanted["alice"]


@pytest.mark.parametrize("off", [-1, 0, 1])
def test_serve_bank_takes_as_many_requests_as_a_prompt_has_tokens(run, adder, adapters, monkeypatch, off):
    grpo = importlib.import_module("grpo_loop")
    words, _ = grpo.load(adder)
    chat = [{"role": "user", "content": QUESTION.format(1, 2)}]
    size = off + len(words.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])
    names = (["alice", "bob"] * size)[:size]
    requests = [{"adapter": name, "prompt": chat[0]["content"]} for name in names]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(json.dumps(request) + "\n" for request in requests)))
    files = [f"{name}={file}" for name, file in adapters.items()]
    printed = run("serve_bank", *files, "--batch", size, "--length", 3)
    replies = [json.loads(line)["reply"] for line in printed.splitlines()]
    assert replies == (replies[:2] * size)[:size] and replies[0] != replies[1]


def test_export_and_merge_compares_what_it_writes(run, adder, adapters, tmp_path):
    pytest.importorskip("peft", minversion="0.21")
    printed = run("export_and_merge", adapters["alice"], "--out", tmp_path / "out")
    off = shares("".join(line for line in printed.splitlines() if "off by" in line))  # through PEFT, merged, in place
    assert len(off) == 3 and max(off) < 0.001
    assert re.search(r"down_proj +bfloat16 .*\n(.*\n)*all modules: [\d.]+% of the update survives", printed)
    tokens = torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(0))
    adapted, again = load_adapter(bare(adder), adapters["alice"], cache=False), bare(tmp_path / "out" / "merged")
    assert torch.allclose(again(tokens).logits, adapted(tokens).logits, atol=1e-3)
    assert (bare(adder)(tokens).logits - adapted(tokens).logits).abs().max() > 0.1


def test_accelerate_peft_trains_what_peft_saves(run, adder, tmp_path):
    peft = pytest.importorskip("peft", minversion="0.21")
    printed = run("accelerate_peft", "--rounds", 2, "--tokens", 2, 8, "--out", tmp_path / "new")
    assert re.search(r"PEFT: \d+ ms a step\naccelerated: \d+ ms a step\n0 layers stay PEFT's\n", printed)
    model = peft.PeftModel.from_pretrained(bare(adder), tmp_path / "new")
    trained = {name: p.clone() for name, p in model.named_parameters() if "tinylora_v" in name}
    run("accelerate_peft", "--adapter", tmp_path / "new", "--rounds", 1, "--tokens", 2, 8, "--out", tmp_path / "next")
    model = peft.PeftModel.from_pretrained(bare(adder), tmp_path / "next")
    assert trained and all(not torch.equal(p, trained[name]) for name, p in model.named_parameters() if name in trained)


# GSM8K


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("so \\boxed{72}", 1), ("\\boxed{72.00}.", 1), ("it is $1,072", 0), ("72 apples", 1), ("-72", 0), ("no", 0),
        ("72, or rather 73", 0), ("The answer is 72.", 1),
    ],
)  # fmt: skip
def test_gsm8k_counts_the_last_number(run, reply, right):
    assert importlib.import_module("gsm8k").is_right(reply, "72") == right
    assert importlib.import_module("gsm8k").is_right("1072 in all", "1,072") == 1


def test_gsm8k_reads_a_clone_of_the_data(run, gsm8k):
    data = importlib.import_module("gsm8k").problems(str(gsm8k), "train")
    assert len(data) == 16 and data.column_names == ["answer", "prompt"] and data[0]["answer"] == "2"
    assert data[0]["prompt"][0]["content"].startswith("What is 1 + 1?\nPlease reason")


@pytest.mark.parametrize("engine", ["server", None], ids=["vLLM's server", "transformers"])
def test_gsm8k_through_trl(run, adder, gsm8k, tmp_path, monkeypatch, engine):
    pytest.importorskip("trl", minversion="1.16", reason="the example needs trl >= 1.16")
    from trl.generation import vllm_generation

    from tests.integrations.test_trl import Engine

    class Server(Engine):
        def __init__(self, **kwargs):
            super().__init__()
            self.model = bare(adder, torch.bfloat16)

    servers = []
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    client = lambda **kwargs: servers.append(Server()) or servers[-1]  # noqa: E731
    monkeypatch.setattr(vllm_generation, "VLLMClient", client, raising=False)
    printed = run(
        "gsm8k_trl", "--data", gsm8k, "--out", tmp_path, "--n-tie", 1, "--epochs", 6, "--problems", 4, "--length", 1,
        "--lr", 0.02, *(["--vllm", engine] if engine else []),
    )  # fmt: skip
    assert "14 numbers are trained" in printed
    before, after = (shares(line)[0] for line in printed.splitlines() if "of the test set" in line)
    assert 0.3 < before < 0.7 and after > before + 0.1
    adapted = load_adapter(bare(adder, torch.bfloat16), tmp_path / "adapter.safetensors", cache=False)
    assert len(servers) == (engine == "server")
    if servers:  # what the engine ran last is what was saved
        tokens = torch.tensor([[5, 6, 7, 8]])
        assert torch.allclose(servers[0].model(tokens).logits, adapted(tokens).logits, atol=0.3)
        assert len(servers[0].synced) >= 24
    checkpoint = next(tmp_path.glob("checkpoint-*"))
    assert (checkpoint / "adapter_model.safetensors").is_file() and not (checkpoint / "model.safetensors").exists()


def test_gsm8k_on_two_processes_with_fsdp2(run, adder, gsm8k, tmp_path):
    out = tmp_path / "gsm8k.safetensors"
    options = ["--data", gsm8k, "--n-tie", "2", "--epochs", "4", "--problems", "8", "--length", "3", "--lr", "0.05"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         EXAMPLES / "gsm8k_fsdp2.py", "--model", adder, "--out", out, *options],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    steps = [line for line in done.stdout.splitlines() if "of the answers right" in line]
    assert len(steps) == 8 and shares(steps[-1])[0] > shares(steps[0])[0]
    grpo, data = importlib.import_module("grpo_loop"), importlib.import_module("gsm8k")
    words, _ = grpo.load(adder)
    model = load_adapter(bare(adder), out, cache=False)
    rows = list(data.problems(str(gsm8k), "test"))
    replies = grpo.sample(model, words, [row["prompt"][0]["content"] for row in rows], 3)[-1]
    greedy = sum(data.is_right(text, row["answer"]) for text, row in zip(replies, rows, strict=True)) / len(rows)
    assert shares(done.stdout)[-1] == pytest.approx(greedy, abs=5e-4) and greedy > 0.6
