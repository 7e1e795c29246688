"""examples/serve_vllm.py as a person runs it: each request is answered by its adapter."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from .models import NEW, PROMPTS

PROGRAM = Path(__file__).parents[3] / "examples" / "serve_vllm.py"


def test_every_request_is_answered_by_its_adapter(base, adapters, texts):
    import transformers

    words = transformers.AutoTokenizer.from_pretrained(base)
    names = [None, "tied-0", "seed7-0"]
    requests = [({"adapter": n} if n else {}) | {"prompt": prompt} for prompt in PROMPTS for n in names]
    done = subprocess.run(
        [sys.executable, PROGRAM, *(f"{n}={adapters / n}.safetensors" for n in names if n), "--model", base,
         "--dtype", "float32", "--context", "256", "--length", str(NEW)],
        input="".join(json.dumps(request) + "\n" for request in requests), capture_output=True, text=True, timeout=580,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [{**line, "reply": 0} for line in lines] == [{**request, "reply": 0} for request in requests]
    for n in names:
        found = [line["reply"] for line in lines if line.get("adapter") == n]
        end = words.eos_token_id
        ended = [ids[: ids.index(end)] if end in ids else ids for ids in texts[n or "base"]]
        wanted = [words.decode(ids, skip_special_tokens=True) for ids in ended]
        assert found == wanted, n
