"""A tiny random decoder with a tokenizer of single characters, made here, and adapters of several kinds over it."""
from __future__ import annotations

import json
from pathlib import Path

import torch

import tinylora_kernels as tk

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPTS = ["hello world", "abc", "0123 4567", "the quick brown fox"]
NEW = 16
SIZE = 0.3  # of the numbers: texts differ, and logits stay apart
# One rank and one base; everything else may differ. name: (config, whether the modules are a part of the others').
KINDS = {
    "untied": dict(trainable_dim=4, n_tie=1),
    "tied": dict(trainable_dim=13, n_tie=100),
    "seed7": dict(trainable_dim=2, n_tie=3, seed=7, alpha=2.0, scaling="sqrt"),
    "some": dict(trainable_dim=5, n_tie=2, target_modules=["q_proj", "v_proj", "up_proj"]),
    "xs": dict(rank=2),
}


def make_base(directory: Path, bias: bool = False, **changes) -> Path:
    """A Llama (a Qwen2, whose qkv has a bias) of two layers whose sizes divide by 2 and 3."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = {chr(code): code - 29 for code in range(32, 127)}
    vocabulary = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, **letters}, unk_token="<pad>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    vocabulary.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )  # fmt: skip
    shape = dict(
        vocab_size=192, hidden_size=192, intermediate_size=264, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False,
    ) | changes  # fmt: skip
    torch.manual_seed(0)
    kind = "Qwen2" if bias else "Llama"
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**shape))
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def load(base: Path, dtype: torch.dtype = torch.float32):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()


def tokens(base: Path) -> list[list[int]]:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    return [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


def adapt(model, kind: str):
    options = {"target_modules": LINEAR, "cache": False, **KINDS[kind]}
    if kind == "xs":
        return tk.apply_lora_xs(model, tk.LoRAXSConfig(**options), progress=False)
    return tk.apply_tiny_lora(model, tk.TinyLoRAConfig(**options), progress=False)


def randomise(model, draw: int) -> None:
    generator = torch.Generator().manual_seed(draw)
    for v in tk.trainable_vectors(model):
        v.data.copy_(torch.randn(v.shape, generator=generator) * SIZE)


def greedy(model, prompts: list[list[int]], new: int = NEW) -> list[list[int]]:
    """Our own model's text, token by token: what an engine must reproduce."""
    texts = []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        texts.append(out[0, len(prompt) :].tolist())
    return texts


def make_adapters(base: Path, directory: Path, draws: int = 2) -> dict[str, list[list[int]]]:
    """DIRECTORY/KIND-DRAW.safetensors for each kind, the first with all modules; the text of each and of "base"."""
    prompts = tokens(base)
    texts = {"base": greedy(load(base), prompts)}
    for kind in KINDS:
        model = adapt(load(base), kind)
        for draw in range(draws):
            randomise(model, draw)
            tk.save_adapter(model, directory / f"{'0' if kind == 'untied' else ''}{kind}-{draw}.safetensors")
            texts[f"{'0' if kind == 'untied' else ''}{kind}-{draw}"] = greedy(model, prompts)
    (directory / "texts.json").write_text(json.dumps(texts))
    return texts
