"""The package inside other people's stacks: each module needs its partner, and is imported only when asked for.

    peft.py          PEFT's TinyLoRA and PSOFT layers on our ops; adapters to and from PEFT's format
    trl.py           an adapted model as the PeftModel that TRL's trainers and rollout engines know (peft_model.py)
    transformers.py  saving and loading whole adapted models
    vllm.py          vLLM's rules for LoRA adapter directories
"""
