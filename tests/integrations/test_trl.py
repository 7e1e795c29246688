"""TRL trains an adapted model as it is, and its rollout engine is sent the adapted weights, never the frozen base."""
import copy
import warnings

import pytest
import torch
from torch import nn

from tests.cases import error
from tests.integrations.tiny import VOCABULARY, llama, tokens
from tinylora_kernels import TinyLoRAConfig, adapted_layers, apply_tiny_lora, trainable_vectors
from tinylora_kernels.files.adapter import load_adapter

trl = pytest.importorskip("trl", minversion="1.16", reason="the TRL integration needs trl >= 1.16")
peft = pytest.importorskip("peft", minversion="0.21", reason="the TRL integration needs peft >= 0.21")

from accelerate import Accelerator  # noqa: E402
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402
from trl.generation import vllm_generation  # noqa: E402

from tinylora_kernels.integrations.peft import accelerate_peft, acceleration_report, from_peft  # noqa: E402
from tinylora_kernels.integrations.trl import as_peft_model  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.*:FutureWarning", "ignore:.*pin_memory.*:UserWarning",
    "ignore:.*TRLExperimentalWarning.*",
)  # fmt: skip
TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapted(std: float = 0.0, dtype=torch.float32, **changes):
    settings = dict(target_modules=TARGETS, trainable_dim=3, n_tie=2, cache=False)
    model = apply_tiny_lora(llama(attention_bias=False).to(dtype), TinyLoRAConfig(**{**settings, **changes}))
    for v in trainable_vectors(model):
        v.data.normal_(std=std, generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def prompts(count: int = 8) -> Dataset:
    return Dataset.from_dict({"prompt": [f"w{3 + i} w{5 + i} w{7 + i}" for i in range(count)]})


def reward(completions, **kwargs):
    """Even words are good words."""
    return [sum(int(word[1:]) % 2 == 0 for word in text.split() if word[1:].isdigit()) / 8 for text in completions]


SHARED = dict(
    report_to=[], use_cpu=True, bf16=False, logging_steps=1, disable_tqdm=True, learning_rate=0.05, seed=0,
    lr_scheduler_type="constant", dataloader_pin_memory=False,
)  # fmt: skip


def grpo(model, directory, tokenizer, callbacks=None, **changes):
    settings = dict(
        output_dir=str(directory), per_device_train_batch_size=4, num_generations=4, max_completion_length=6,
        max_steps=2, save_strategy="no", temperature=1.0,
    )  # fmt: skip
    return trl.GRPOTrainer(
        model=model, reward_funcs=reward, args=trl.GRPOConfig(**{**SHARED, **settings, **changes}),
        train_dataset=prompts(), processing_class=tokenizer, callbacks=callbacks,
    )  # fmt: skip


def sft(model, directory, tokenizer, **changes):
    settings = dict(
        output_dir=str(directory), per_device_train_batch_size=16, max_steps=4, save_strategy="no", max_length=16,
        gradient_checkpointing=False,
    )  # fmt: skip
    data = Dataset.from_dict({"text": [f"w{3 + i} w{4 + i} w{5 + i} w{6 + i} w{7 + i}" for i in range(16)]})
    return trl.SFTTrainer(
        model=model, args=trl.SFTConfig(**{**SHARED, **settings, **changes}), train_dataset=data, eval_dataset=data,
        processing_class=tokenizer,
    )  # fmt: skip


def vectors_of(model) -> torch.Tensor:
    return torch.cat([v.detach().float().clone() for v in trainable_vectors(model)])


def shape_of(model: nn.Module, kind: str) -> nn.Module:
    return as_peft_model(model) if kind == "as_peft_model" else model


KINDS = ["as it is", "as_peft_model"]


# Training


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8},
        {"bf16": True},
    ],
    ids=["plain", "checkpointing", "reentrant", "accumulation", "autocast"],
)
def test_sft_trains_the_vectors_and_nothing_else(tmp_path, tokenizer, kind, changes):
    model = adapted()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer = sft(shape_of(model, kind), tmp_path, tokenizer, **changes)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] and vectors_of(model).ne(0).all()
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in frozen.items())


def test_checkpointing_and_accumulation_change_nothing_but_memory(tmp_path, tokenizer):
    """The same data in the same order: the same vectors after three steps."""
    runs = {
        "plain": {},
        "checkpointing": {"gradient_checkpointing": True},
        "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8},
        "wrapped": {},
    }
    ends = {}
    for name, changes in runs.items():
        model = adapted(std=0.02)
        shaped = as_peft_model(model) if name == "wrapped" else model
        sft(shaped, tmp_path / name, tokenizer, max_steps=3, **changes).train()
        ends[name] = vectors_of(model)
    for name in runs:
        assert error(ends[name], ends["plain"]) < 1e-3, name


@pytest.mark.parametrize("kind", KINDS)
def test_sft_in_bfloat16(tmp_path, tokenizer, kind):
    model = adapted(dtype=torch.bfloat16)
    sft(shape_of(model, kind), tmp_path, tokenizer, bf16=True).train()
    assert {v.dtype for v in trainable_vectors(model)} == {torch.float32} and vectors_of(model).abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_grpo_moves_the_vectors(tmp_path, tokenizer, kind):
    model = adapted()
    grpo(shape_of(model, kind), tmp_path, tokenizer).train()
    assert vectors_of(model).abs().sum() > 0


def test_the_kl_reference_is_the_adapter_that_came_in(tmp_path, tokenizer):
    model = adapted(std=0.3)
    start = vectors_of(model)
    wrapped = as_peft_model(model)
    trainer = grpo(wrapped, tmp_path, tokenizer, beta=0.1)
    trainer.train()
    history = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert history[0] == pytest.approx(0, abs=1e-5) and wrapped.active_adapter == "default"
    assert not torch.equal(vectors_of(model), start)
    wrapped.set_adapter("ref")
    assert torch.equal(vectors_of(model), start)


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_from_a_checkpoint_ends_where_an_uninterrupted_run_does(tmp_path, tokenizer, kind):
    def run(name, resume=False, steps=4):
        model = adapted(std=0.02)
        trainer = sft(
            shape_of(model, kind), tmp_path / name, tokenizer, max_steps=steps, save_strategy="steps", save_steps=2
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-2") if resume else None)
        return vectors_of(model)

    whole = run("whole")
    for leftover in (tmp_path / "whole").glob("checkpoint-4"):
        leftover.rename(tmp_path / "last")
    assert torch.equal(run("whole", resume=True), whole)

    checkpoint = tmp_path / "whole" / "checkpoint-4"
    if kind == "as_peft_model":  # a checkpoint is the adapter alone
        files = {path.name for path in checkpoint.iterdir()}
        assert "adapter_model.safetensors" in files and "model.safetensors" not in files
        fresh = load_adapter(llama(attention_bias=False), checkpoint / "adapter_model.safetensors", cache=False)
        assert torch.equal(vectors_of(fresh), whole)


def test_a_model_that_came_from_peft_trains_resumes_and_goes_back(tmp_path, tokenizer):
    torch.manual_seed(1)
    config = peft.TinyLoraConfig(r=2, u=3, target_modules=TARGETS, init_weights="uniform", init_v_bound=0.1)
    peft.get_peft_model(llama(attention_bias=False), config).save_pretrained(tmp_path / "peft")

    def run(resume):
        model = from_peft(tmp_path / "peft", llama(attention_bias=False))
        trainer = sft(
            as_peft_model(model), tmp_path / "run", tokenizer, save_strategy="steps", save_steps=2, max_steps=4
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2") if resume else None)
        return model

    whole = run(resume=False)
    assert torch.equal(vectors_of(run(resume=True)), vectors_of(whole))
    back = peft.PeftModel.from_pretrained(llama(attention_bias=False), tmp_path / "run" / "checkpoint-4").eval()
    assert error(back(tokens()).logits.detach(), whole.eval()(tokens()).logits.detach()) < 1e-5


def test_load_best_model_at_end(tmp_path, tokenizer):
    model = adapted()
    trainer = sft(
        as_peft_model(model), tmp_path, tokenizer, save_strategy="steps", save_steps=1, eval_strategy="steps",
        eval_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_loss", max_steps=2, learning_rate=3.0,
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    saved = load_adapter(llama(attention_bias=False), f"{best}/adapter_model.safetensors", cache=False)
    assert torch.equal(vectors_of(model), vectors_of(saved))


# What a rollout engine is sent


class Engine:
    """Stands where vLLM's server does: takes the weights by name, as vLLM does only those it knows, and samples."""

    def __init__(self, **kwargs):
        self.model = llama(seed=5, attention_bias=False)  # other weights: what is not sent would show
        self.synced: list[dict[str, torch.Tensor]] = []

    def init_communicator(self, device=None):
        pass

    def close_communicator(self):
        pass

    def reset_prefix_cache(self):
        pass

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, metadata, parameters):
        own = dict(self.model.named_parameters())
        received = {}
        for (name, dtype, shape), (sent, tensor) in zip(metadata, parameters, strict=True):
            assert (name, dtype, shape) == (sent, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
            if name not in own:
                raise KeyError(f"no parameter named {name!r} in the engine's model")
            own[name].data.copy_(tensor)
            received[name] = tensor.clone()
        assert received.keys() == own.keys()
        self.synced.append(received)

    def generate(self, prompts, n, temperature, max_tokens, **kwargs):
        rows = torch.tensor([ids for ids in prompts for _ in range(n)])
        with torch.no_grad():
            out = self.model.generate(
                rows, attention_mask=torch.ones_like(rows), do_sample=True, temperature=temperature, top_k=0,
                max_new_tokens=max_tokens, min_new_tokens=max_tokens, pad_token_id=0, eos_token_id=2,
            )  # fmt: skip
            log_probs = self.model(out).logits[:, rows.shape[1] - 1 : -1].log_softmax(-1)
        completions = out[:, rows.shape[1] :]
        chosen = log_probs.gather(-1, completions.unsqueeze(-1))  # [rows, length, 1]
        return {"prompt_ids": prompts, "completion_ids": completions.tolist(), "logprobs": chosen.tolist()}


@pytest.fixture
def engine(monkeypatch):
    engines = []
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(
        vllm_generation, "VLLMClient", lambda **kwargs: engines.append(Engine()) or engines[-1], raising=False
    )
    return engines


def sync(model, engines) -> Engine:
    generation = vllm_generation.VLLMGeneration(model, Accelerator(cpu=True), None, mode="server")
    generation.sync_weights()
    return engines[-1]


def peft_tiny_lora(dtype=torch.float32):
    torch.manual_seed(1)
    config = peft.TinyLoraConfig(r=2, u=3, target_modules=TARGETS, init_weights="uniform", init_v_bound=0.5)
    return accelerate_peft(peft.get_peft_model(llama(attention_bias=False).to(dtype), config))


@pytest.mark.parametrize("make", [lambda: as_peft_model(adapted(std=0.3)), peft_tiny_lora], ids=["ours", "PEFT's"])
def test_the_engine_gets_the_adapted_weights(engine, make):
    model = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    received = sync(model, engine)
    x = tokens()
    with torch.no_grad():
        wanted, bare = model(x).logits, llama(attention_bias=False)(x).logits
        assert error(received.model(x).logits, wanted) < 1e-5 and error(bare, wanted) > 1e-3
    after = dict(model.named_parameters())
    assert all(error(after[name].detach(), before[name]) < 1e-7 for name in before)


def test_syncing_ours_writes_to_no_weight_even_in_bfloat16(engine):
    """PEFT merges in place and subtracts again, which drifts in bfloat16; ours shows merged copies."""
    model = as_peft_model(adapted(std=0.3, dtype=torch.bfloat16))
    bits = {name: (p.detach().clone(), p._version) for name, p in model.named_parameters()}
    for _ in range(3):
        sync(model, engine)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, bits[name][0]) and parameter._version == bits[name][1]


def test_an_adapted_model_that_is_not_wrapped_is_refused_by_the_engine_not_rolled_out_bare(engine):
    model = adapted(std=0.3)
    sent = {name for name, _ in model.named_parameters()}
    assert not any(f"{name}.weight" in sent for name in adapted_layers(model))
    with pytest.raises(KeyError, match="no parameter named"):
        sync(model, engine)


def test_grpo_with_an_engine_is_on_policy_at_every_step(tmp_path, tokenizer, engine):
    model = adapted(std=0.3)
    trainer = grpo(
        as_peft_model(model), tmp_path, tokenizer, use_vllm=True, vllm_mode="server", max_steps=3, learning_rate=0.3
    )
    trainer.train()
    synced = engine[0].synced
    assert len(synced) == 3
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(synced[0][name], synced[1][name]) and not torch.equal(synced[1][name], synced[2][name])
    ratios = [
        entry[key] for entry in trainer.state.log_history for key in entry
        if key.startswith("sampling/importance_sampling_ratio")
    ]  # fmt: skip
    assert len(ratios) >= 9 and all(ratio == pytest.approx(1, abs=1e-4) for ratio in ratios)


def test_grpo_on_pefts_model_accelerated(tmp_path, tokenizer, engine):
    model = peft_tiny_lora()
    grpo(model, tmp_path, tokenizer, use_vllm=True, vllm_mode="server").train()
    assert len(engine[0].synced) == 2 and not any(acceleration_report(model).values())


# The wrapper itself


def test_merged_names_are_those_of_the_bare_model_tied_weights_once():
    bare = llama(attention_bias=False, tie_word_embeddings=True)
    model = as_peft_model(apply_tiny_lora(copy.deepcopy(bare), TinyLoRAConfig(target_modules=TARGETS, cache=False)))
    natural = [name for name, _ in model.named_parameters()]
    model.merge_adapter()
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in bare.named_parameters()]
    assert model.state_dict().keys() == bare.state_dict().keys()
    model.unmerge_adapter()
    assert [name for name, _ in model.named_parameters()] == natural


def test_disabling_and_leaving():
    x, inner = tokens(), adapted(std=0.3)
    model = as_peft_model(inner)
    adapted_logits = model(x).logits.detach()
    with model.disable_adapter():
        assert torch.equal(model(x).logits, llama(attention_bias=False)(x).logits)
    assert torch.equal(model(x).logits, adapted_logits)
    assert model.get_base_model() is inner and peft.PeftModel in type(model).__mro__
    assert model.get_nb_trainable_parameters()[0] == 9
    merged = as_peft_model(adapted(std=0.3)).merge_and_unload()
    assert not adapted_layers(merged) and error(merged(x).logits.detach(), adapted_logits) < 1e-5
    assert torch.equal(model.unload()(x).logits, llama(attention_bias=False)(x).logits)


def test_what_trl_would_train_wrongly_is_refused():
    with pytest.raises(ValueError, match="it has no adapter"):
        as_peft_model(llama())
    with pytest.raises(ValueError, match="lm_head is adapted, and TRL computes log-probabilities from its weight"):
        as_peft_model(adapted(target_modules=["q_proj", "lm_head"]))
    model = as_peft_model(adapted())
    with pytest.raises(ValueError, match="expected one of default, found 'other'"):
        model.set_adapter("other")
    with pytest.raises(ValueError, match="expected a new name"):
        model.add_adapter("default")


def test_whoever_collects_pefts_own_tensors_gets_an_error_and_not_an_empty_adapter():
    with pytest.raises(ValueError, match="Unknown PEFT type"):
        peft.get_peft_model_state_dict(as_peft_model(adapted()))


def test_vectors_of_named_adapters_survive_a_change_of_dtype():
    model = as_peft_model(adapted(std=0.3))
    start = vectors_of(model.get_base_model())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_adapter("ref")
        model.bfloat16()
    trainable_vectors(model.get_base_model())[0].data.zero_()
    model.set_adapter("ref")
    assert torch.equal(vectors_of(model.get_base_model()), start)
