"""A small server that answers as vLLM does, from a plain Hugging Face model on real weights.

It samples, returns log-probs in either --logprobs-mode, takes weights from a folder or over a wire
(`fake_transfer`) into the model that it has, and is marked with their version, so that what is
tested against it can be wrong. `faults` is asked before each request and may take it over.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from fake_transfer import Wire
from safetensors.torch import load_file
from tiny_models import build_tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastsd.config.sections import ModelConfig, PromptConfig, RolloutConfig
from fastsd.model import load_policy
from fastsd.prompts.render import PromptRenderer
from fastsd.rollout.vllm import VllmSampler
from fastsd.types import Prompt

_QUESTIONS = ["What is 3 + 4?", "Tom has 12 apples.", "x", "Now solve it. <|im_end|>"]
PROMPTS = [Prompt(f"p{i}", ({"role": "user", "content": q},)) for i, q in enumerate(_QUESTIONS)]
LETTERS = list("abcdefghijklmnop")

TRANSFER_PATHS = (
    *("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine"),
    *("/start_weight_update", "/update_weights", "/finish_weight_update"),
)

# Takes (path, body), returns (status, body) to answer with, "drop" to hang up, or None.
Fault = Callable[[str, dict], object]

# transformers patches torch while it loads: one thread at a time.
_LOADING = threading.Lock()


class FakeVllm:
    def __init__(
        self,
        folder: Path,
        *,
        max_model_len: int = 512,
        processed: bool = False,
        backend: str | None = None,
        workers: int = 1,
    ):
        """backend: of weight transfer; workers: its members of a transfer's group."""
        self.folder, self.backend, self.workers = folder, backend, workers
        self._lock = threading.Lock()
        self.restart()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.max_model_len, self.processed = max_model_len, processed
        self.requests: list[tuple[str, dict]] = []
        self.callers: list[tuple[str, int]] = []
        self.at_once = self.most_at_once = 0
        self.faults: Fault = lambda path, body: None
        self.change: Callable[[dict], object] = lambda reply: reply
        # Tokens by version of the weights, seed and position, where runs are compared: the first to
        # ask draws, so that rounding in their weights turns none.
        self.given: dict[tuple[str, int, int], int] | None = None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def restart(self) -> None:
        """As a process that was started again: with its first weights."""
        with _LOADING:
            self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        self.version = "default"
        # As vLLM's worker keeps it: the wire to the trainer, and whether an update is under way.
        self.wire: Wire | None = None
        self.ranks: list[int] = []
        self.updating = False

    def asked(self, path: str) -> list[dict]:
        return [body for found, body in self.requests if found == path]

    def answer(self, path: str, body: dict) -> object:
        if path == "/v1/models":
            return {"data": [{"id": "tiny", "max_model_len": self.max_model_len}]}
        if path == "/tokenize":
            ids = self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
            return {"tokens": ids, "count": len(ids)}
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            files = Path(body["kwargs"]["weights_path"]).glob("*.safetensors")
            self._load({n: tensor for file in files for n, tensor in load_file(file).items()})
            return {"results": [None]}
        if path == "/get_world_size":
            return {"world_size": self.workers}
        if path.startswith("/server_info"):
            backend = self.backend and {"backend": self.backend}
            return {"vllm_config": {"weight_transfer_config": backend}}
        if path in TRANSFER_PATHS:
            getattr(self, "_" + path.removeprefix("/"))(**body or {})
            return {"message": "done"}
        if path == "/reset_prefix_cache":
            return {"success": True}
        if path == "/update_weight_version":
            self.version = body["new_version"]
            return {"success": True, "new_version": self.version}
        if path == "/weight_info":
            return {"weight_version": self.version}
        assert path == "/v1/completions"
        with self._lock:
            return self.change(self._complete(body))

    def _init_weight_transfer_engine(self, init_info: dict) -> None:
        place = init_info["master_address"], init_info["master_port"]
        self.wire = Wire.at(*place)
        self.ranks = [init_info["rank_offset"] + worker for worker in range(self.workers)]
        self.wire.join(self.ranks, init_info["world_size"])

    def _shutdown_weight_transfer_engine(self) -> None:
        if self.updating:
            raise RuntimeError("Cannot release a trainer connection during a weight update")
        self.wire = None

    def _start_weight_update(self) -> None:
        if self.updating:
            raise RuntimeError("start_weight_update called while one is already active")
        self.updating = True

    def _update_weights(self, update_info: dict) -> None:
        if not self.updating or self.wire is None:
            raise RuntimeError("start_weight_update must be called before update_weights.")
        try:
            names, types = update_info["names"], update_info["dtype_names"]
            received = {name: self.wire.receive(self.ranks) for name in names}
            found = [(str(t.dtype), list(t.shape)) for t in received.values()]
            told = [(f"torch.{t}", s) for t, s in zip(types, update_info["shapes"], strict=True)]
            assert found == told, "the trainer announced other tensors than it sent"
            self._load(received)
        except BaseException:
            self.updating = False
            raise

    def _finish_weight_update(self) -> None:
        if not self.updating:
            raise RuntimeError("finish_weight_update called without a matching start")
        self.updating = False

    def _load(self, tensors: dict[str, Tensor]) -> None:
        """Into the model that is served, all or an error, as vLLM keeps its configuration."""
        with self._lock:
            self.model.load_state_dict(tensors)

    @torch.no_grad()
    def _complete(self, body: dict) -> dict:
        n, prompt = body["n"], body["prompt"]
        generators = [torch.Generator().manual_seed(body["seed"] + i) for i in range(n)]
        ids_NT = torch.tensor([prompt] * n)
        logprobs: list[list[float]] = [[] for _ in range(n)]
        for _ in range(body["max_tokens"]):
            logits_NV = self.model(input_ids=ids_NT).logits[:, -1]
            raw_NV = logits_NV.log_softmax(-1)
            sampled_NV = (logits_NV / body["temperature"]).log_softmax(-1)
            drawn = zip(sampled_NV.exp(), generators, strict=True)
            token_N = torch.cat([torch.multinomial(p, 1, generator=g) for p, g in drawn])
            if self.given is not None:
                seeds = range(body["seed"], body["seed"] + n)
                keys = [(self.version, seed, ids_NT.shape[1]) for seed in seeds]
                given = zip(keys, token_N.tolist(), strict=True)
                token_N = torch.tensor([self.given.setdefault(*each) for each in given])
            shown_NV = sampled_NV if self.processed else raw_NV
            for row, token in enumerate(token_N.tolist()):
                logprobs[row].append(float(shown_NV[row, token]))
            ids_NT = torch.cat([ids_NT, token_N[:, None]], 1)
        stops = set(body["stop_token_ids"])
        choices = []
        for row, ids in enumerate(ids_NT[:, len(prompt) :].tolist()):
            end = next((i + 1 for i, token in enumerate(ids) if token in stops), len(ids))
            choices.append(
                {
                    "index": row,
                    "prompt_token_ids": prompt,
                    "token_ids": ids[:end],
                    "logprobs": {"token_logprobs": logprobs[row][:end]},
                    "finish_reason": "stop" if ids[end - 1] in stops else "length",
                }
            )
        return {"choices": choices[::-1]}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                self._serve({})

            def do_POST(self) -> None:
                length = int(self.headers.get("content-length") or 0)
                self._serve(json.loads(self.rfile.read(length) or b"null"))

            def _serve(self, body: dict) -> None:
                with fake._lock:
                    fake.requests.append((self.path, body))
                    fake.callers.append(self.client_address)
                    fake.at_once += 1
                    fake.most_at_once = max(fake.most_at_once, fake.at_once)
                try:
                    fault = fake.faults(self.path, body)
                    if fault == "drop":
                        self.close_connection = True
                        return
                    status, reply = fault or (200, fake.answer(self.path, body))
                except (AssertionError, RuntimeError) as error:
                    status, reply = 500, {"error": {"message": f"Worker failed: {error}"}}
                finally:
                    with fake._lock:
                        fake.at_once -= 1
                content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                with contextlib.suppress(ConnectionError):  # who asked is gone
                    self.end_headers()
                    self.wfile.write(content)
                # As vLLM's: without a word that it does.
                self.close_connection = status == 500

        return Handler


def open_tiny(policy, folder: Path, servers: Sequence[FakeVllm], **options) -> VllmSampler:
    """A sampler for the tiny models here, whose letters end a response: they rarely stop else."""
    options = {"max_new_tokens": 12, "stop": LETTERS, **options}
    config = RolloutConfig(engine="vllm", servers=[s.url for s in servers], **options)
    renderer = PromptRenderer(policy.tokenizer, PromptConfig(max_prompt_tokens=256))
    return VllmSampler(policy, renderer, config, folder / "served")


@pytest.fixture(scope="module")
def _folder(tmp_path_factory):
    return build_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def _policy(folder):
    return load_policy(ModelConfig(name=str(folder)), "cpu", torch.float32)


@pytest.fixture
def _serve(folder):
    """Starts servers, of the folder's model unless told otherwise."""
    running = []

    def start(**options) -> FakeVllm:
        running.append(FakeVllm(options.pop("folder", folder), **options))
        return running[-1]

    yield start
    for server in running:
        server.close()


# A test module takes them by their names: folder, policy, serve = FIXTURES.
FIXTURES = _folder, _policy, _serve
