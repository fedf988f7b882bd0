"""A real process, on a model of a few thousand weights that is made here."""

import json
import os
import signal
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PROGRAM = str(Path(sys.executable).parent / "swarm-node")
FORKS = Path(__file__).with_name("node_forks.py")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}


class Forks:
    """The process of `node_forks.py`, started when it is first needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def ask(self, request: dict[str, Any]) -> int | None:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, FORKS],
                env={**os.environ, **ENVIRONMENT},
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            assert self._answer(self._process) == "ready"
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer: int | None = self._answer(self._process)
        return answer

    def _answer(self, process: subprocess.Popen[str]) -> Any:
        assert process.stdout is not None
        return json.loads(process.stdout.readline())

    def end(self) -> None:
        if self._process is not None:
            self._process.communicate()
            assert self._process.returncode == 0


class Fork:
    """A node that was forked, to be used as a `subprocess.Popen` is."""

    def __init__(self, forks: Forks, folder: Path, arguments: tuple[str, ...], more: dict[str, str]) -> None:
        self._forks, self._written = forks, Path(tempfile.mkdtemp(dir=folder.parent, prefix="written"))
        out, err = (str(self._written / name) for name in ("out", "err"))
        environment = {**os.environ, **ENVIRONMENT, **more}
        request = {"arguments": arguments, "folder": str(folder), "environment": environment, "out": out, "err": err}
        pid = forks.ask(request)
        assert pid is not None
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._forks.ask({"pid": self.pid})
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 240.0) -> tuple[str, str]:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < deadline, "waited too long for its end"
            time.sleep(0.01)
        return self.out(), (self._written / "err").read_text()

    def out(self) -> str:
        """What it has said so far."""
        return (self._written / "out").read_text()


@dataclass
class Workplace:
    """A folder with a model and questions, in which `swarm-node` is run."""

    path: Path
    forks: Forks

    def start(self, *arguments: str, **more: Any) -> subprocess.Popen[str]:
        """Start the program."""
        return subprocess.Popen(
            [PROGRAM, *arguments],
            cwd=self.path,
            env={**os.environ, **ENVIRONMENT, **more},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def fork(self, *arguments: str, **more: str) -> Fork:
        """Start what the program does in a process that has imported it already: this saves five seconds of CPU."""
        return Fork(self.forks, self.path, arguments, more)

    def run(self, *arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
        return self._finish(self.start(*arguments, **more))

    def run_fork(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self._finish(self.fork(*arguments))

    def _finish(self, process: subprocess.Popen[str] | Fork) -> subprocess.CompletedProcess[str]:
        out, err = process.communicate(timeout=240)
        assert process.returncode is not None
        return subprocess.CompletedProcess([], process.returncode, out, err)

    def silo(self, run_dir: str, rounds: int, *more: str) -> list[str]:
        """Return arguments of a short run that learns something."""
        settings = {
            "tasks.answer": '["whole_text"]',
            "rollout.max_new_tokens": "2",
            "rollout.num_completions": "16",
            "trainer.learning_rate": "3e-3",
            "evaluation.num_items": "8",
            "evaluation.every_rounds": "20",
            "checkpoint.interval_s": "0",
        }
        sets = [text for name, value in settings.items() for text in ("--set", f"{name}={value}")]
        source = ["--model", "model", "--tasks", "questions.jsonl", *sets]
        return ["silo", *source, "--run-dir", run_dir, "--rounds", str(rounds), *more]

    def rows(self, run_dir: str) -> list[dict[str, Any]]:
        """Return the whole lines of a run's metrics."""
        path = self.path / run_dir / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


@pytest.fixture(scope="session")
def model_and_questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a random model over single characters, and questions whose answer is one of them."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("workplace")
    characters = ["<pad>", "<eos>", *string.ascii_lowercase, " ", "\n", *string.digits]
    tokenizer = Tokenizer(models.WordLevel({text: number for number, text in enumerate(characters)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    shape = LlamaConfig(
        vocab_size=len(characters),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(shape).save_pretrained(folder / "model")
    fast.save_pretrained(folder / "model")
    lines = [
        {"question": f"say a letter {index}", "answer": "abc"[index % 3], "verifier": "exact"} for index in range(300)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    forks = Forks()
    yield forks
    forks.end()


@pytest.fixture(scope="session")
def new_workplace(
    tmp_path_factory: pytest.TempPathFactory, model_and_questions: Path, forks: Forks
) -> Callable[[], Workplace]:
    """Return a function that makes a folder with the model and the questions in it."""

    def make() -> Workplace:
        path = tmp_path_factory.mktemp("workplace")
        for name in ("model", "questions.jsonl"):
            (path / name).symlink_to(model_and_questions / name)
        return Workplace(path, forks)

    return make


@pytest.fixture
def workplace(new_workplace: Callable[[], Workplace]) -> Workplace:
    """A folder of this test's own."""
    return new_workplace()


@pytest.fixture
def stopped_by() -> Callable[[subprocess.Popen[str] | Fork, signal.Signals], tuple[float, str, str]]:
    """Return a function that sends a signal and returns the seconds until the end, stdout and stderr."""

    def stop(process: subprocess.Popen[str] | Fork, number: signal.Signals) -> tuple[float, str, str]:
        begin = time.monotonic()
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        return time.monotonic() - begin, out, err

    return stop
