"""The demo: its model and data, its report, and one tiny real run."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

demo: Any = importlib.import_module("demo")
demo_rank: Any = importlib.import_module("demo_rank")
gpt: Any = importlib.import_module("gpt")


def test_the_model_is_causal_and_of_the_promised_size() -> None:
    torch.manual_seed(0)
    model = gpt.Gpt(gpt.GptConfig()).eval()
    assert 500_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 1_000_000
    tokens = torch.randint(256, (2, 16))
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 256
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, :10], after[:, :10], atol=1e-5)
    assert not torch.allclose(before[:, 10:], after[:, 10:], atol=1e-3)


def test_an_untrained_model_knows_nothing() -> None:
    torch.manual_seed(0)
    model = gpt.Gpt(gpt.GptConfig())
    tokens = torch.randint(256, (4, 64))
    loss = float(model.loss(model(tokens), tokens.roll(1, 1)).detach())
    assert abs(loss - math.log(256)) < 0.5


def test_windows_repeat_by_seed_and_differ_by_rank() -> None:
    text = gpt.standard_library_text(1 << 18)
    assert len(text) == 1 << 18

    def starts(rank: int, seed: int) -> list[int]:
        windows = gpt.Windows(text, 32, 20, rank, seed)
        inputs, targets = windows[3]
        assert len(windows) == 20 and inputs.shape == targets.shape == (32,)
        assert torch.equal(inputs[1:], targets[:-1])
        return [int(value) for value in torch.cat([windows[i][0] for i in range(20)])]

    assert starts(0, 1) == starts(0, 1)
    assert starts(0, 1) != starts(1, 1)
    assert starts(0, 1) != starts(0, 2)


def test_a_text_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no window"):
        gpt.Windows(b"short", 32, 1, 0, 0)


def test_learning_rate_rises_and_falls() -> None:
    shares = [gpt.learning_rate_share(step, 100) for step in range(100)]
    assert 0 < shares[0] < shares[5] < max(shares) <= 1.0
    assert 0.1 <= shares[-1] < 0.2
    assert all(0 < gpt.learning_rate_share(step, 1) <= 1 for step in range(2))


def result(rank: int, digest: str) -> Any:
    return demo_rank.RunResult("reducer", rank, [4.0, 2.0 + rank], [0.5, 0.5], [(1024, 0.001)], digest, 10, "")


def test_report_compares_the_weights() -> None:
    console = Console(width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    for digests, equal in ((("ab", "ab"), True), (("ab", "cd"), False)):
        ranks = {rank: result(rank, digest) for rank, digest in enumerate(digests)}
        table, all_equal = demo.report({"reducer": ranks}, 100, console)
        assert all_equal is equal and table.row_count == 1
    console.file.close()


def test_means_and_rates() -> None:
    ranks = {rank: result(rank, "ab") for rank in range(2)}
    assert demo.mean_losses(ranks) == [4.0, 2.5]
    assert demo.tokens_per_second(ranks[0], 100) == 200.0


def run_demo(output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(EXAMPLES / "demo.py"),
        "--output",
        str(output),
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)


def test_a_tiny_run_on_both_backends(tmp_path: Path) -> None:
    done = run_demo(
        tmp_path, "--steps", "3", "--workers", "2", "--reducers", "2", "--batch", "2",
        "--loader-workers", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((tmp_path / "demo.json").read_text())
    assert set(data["losses"]) == {"reducer", "gloo"}
    for backend, losses in data["losses"].items():
        assert len(losses) == 3 and losses[-1] < losses[0], backend
        assert data["collectives"][backend]
    for ours, theirs in zip(data["losses"]["reducer"], data["losses"]["gloo"], strict=True):
        assert math.isclose(ours, theirs, rel_tol=1e-3)
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "equal" in done.stdout


def test_a_rank_that_fails_ends_the_demo_with_its_error(tmp_path: Path) -> None:
    done = run_demo(tmp_path, "--steps", "1", "--workers", "2", "--backends", "nonesuch")
    assert done.returncode == 1
    assert "rank" in done.stdout and "nonesuch" in done.stdout
    assert not (tmp_path / "demo.png").exists()


def test_the_deadline_ends_the_demo(tmp_path: Path) -> None:
    done = run_demo(
        tmp_path,
        "--backends",
        "gloo",
        "--workers",
        "2",
        "--steps",
        "100000",
        "--seconds-max",
        "1",
    )
    assert done.returncode == 1 and "deadline" in done.stdout
