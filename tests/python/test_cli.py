"""The command `reducer`, as a person types it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from control_client import WINDOW_BYTES, Client, promised
from servers import Server, serving, started
from typer.testing import CliRunner

import reducer
from reducer import cli
from reducer import serve as native

COMMAND = [sys.executable, "-m", "reducer"]
WAIT_S = 60.0


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {name: value for name, value in os.environ.items() if not name.startswith("REDUCER_")}
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        check=False,
        env=settings | {"COLUMNS": "160"} | environment,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=WAIT_S,
    )


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(command=[*COMMAND, "serve"]) as running:
        yield running


def unused_address() -> str:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{bound.getsockname()[1]}"


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"reducer {reducer.__version__}\n")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ((), ["serve", "stats", "bench", "tune", "info", "--version"]),
        (
            ("serve",),
            [
                "--listen",
                "--threads",
                "--memory-limit",
                "--grace",
                "--congestion-control",
                "--token-file",
                "--admin-token-file",
                "REDUCER_ADMIN_TOKEN_FILE",
                "REDUCER_SERVERS",
                "4GiB",
                "0.0.0.0:7000",
            ],
        ),
        (("stats",), ["HOST:PORT", "--json", "reserved", "--token-file"]),
        (("dump",), ["PID", "reducer-JOB", "REDUCER_RECORDER_DIR", "RTMIN+5"]),
        (("blame",), ["PATH", "--verbose", "--json", "reducer dump"]),
        (("info",), ["settings in effect"]),
        (("bench",), ["--backend", "--algorithm", "--ranks", "--json", "--png", "--explain"]),
        (("rendezvous",), ["--listen", "elastic.Session"]),
        (("tune",), ["--output", "--chunks", "--reducers", "REDUCER_TUNING", "torchrun"]),
    ],
)
def test_help(command: tuple[str, ...], words: list[str]) -> None:
    done = run(*command, "--help", NO_COLOR="1", TERM="dumb")
    assert done.returncode == 0
    assert [word for word in words if word not in done.stdout] == []


def test_nothing_of_torch_is_loaded_before_it_is_needed() -> None:
    # As where the package is installed: torch itself calls on the backend then.
    program = (
        "import importlib.metadata as m, sys\n"
        "point = m.EntryPoint('reducer', 'reducer:_autoload', 'torch.backends')\n"
        "m.entry_points = lambda **_: (point,)\n"
        "import reducer.cli, reducer.serve, typer.testing\n"
        "result = typer.testing.CliRunner().invoke(reducer.cli.app, ['serve', '--help'])\n"
        "assert result.exit_code == 0, result.output\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'grpc'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=WAIT_S)


def test_serve_becomes_the_native_process(server: Server) -> None:
    executable = Path(f"/proc/{server.process.pid}/exe").resolve()
    assert executable == native.server_binary()


def test_serve_passes_its_options_on_and_drains() -> None:
    options = ("--threads", "3", "--memory-limit", "96MiB", "--grace", "5")
    with serving(*options, command=[*COMMAND, "serve"]) as running:
        assert "threads 3" in running.output
        assert "96.0 MiB" in running.output
        running.terminate()
        assert running.wait() == 0
        assert "at most 5 s" in running.output


def test_serve_on_a_port_in_use(server: Server) -> None:
    with started(listen=server.address, command=[*COMMAND, "serve"]) as second:
        assert second.wait() == 1
        assert server.address in second.output
        assert "in use" in second.output.lower()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--listen", "nowhere"),
        ("--listen", "127.0.0.1:70000"),
        ("--memory-limit", "plenty"),
        ("--threads", "0"),
        ("--threads", "many"),
        ("--grace", "-1"),
    ],
)
def test_serve_refuses_wrong_options(option: str, value: str) -> None:
    done = run("serve", option, value)
    assert (done.returncode, done.stdout) == (2, "")
    assert option in done.stderr


def test_serve_refuses_an_unknown_congestion_control() -> None:
    done = run("serve", "--listen", "127.0.0.1:0", "--congestion-control", "nosuch")
    assert done.returncode == 1
    assert "the congestion control 'nosuch' cannot be used" in done.stderr
    assert "reno" in done.stderr  # what there is instead


def test_stats_as_json(server: Server) -> None:
    done = run("stats", "--json", server.address)
    assert done.returncode == 0, done.stderr
    stats = json.loads(done.stdout)
    assert stats["protocol_version"] == 3
    assert stats["draining"] is False
    assert stats["groups"] == []
    counters = {name: value for name, value in stats.items() if name not in ("draining", "uptime_s", "groups")}
    assert all(isinstance(value, int) for value in counters.values())
    assert stats["memory_limit_bytes"] > 0


def test_stats_as_a_table(server: Server) -> None:
    with Client(server.address) as client:
        stream = client.exchange()
        stream.join(rank=1, world_size=3)
        done = run("stats", server.address)
        (group,) = native.query_stats(server.address)["groups"]
        stream.close()
    assert done.returncode == 0, done.stderr
    for text in (server.address, "serving", "1 of 3", "6.375 MiB reserved", "limit"):
        assert text in done.stdout
    assert group["reserved_bytes"] == promised(3, WINDOW_BYTES)
    assert group["job"] == b"0123456789abcdef".hex()


def test_stats_names_who_does_not_answer(server: Server) -> None:
    nobody = unused_address()
    done = run("stats", "--json", nobody, server.address)
    assert done.returncode == 1
    assert nobody in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["protocol_version"] == 3


def test_info_shows_versions_and_settings() -> None:
    done = run("info", REDUCER_ALGORITHM="ring", REDUCER_CHUNK_BYTES="64KiB")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = dict(cells for line in done.stdout.splitlines() if len(cells := line.strip("│ ").split("│")) == 2)
    found = {name.strip(): value.strip() for name, value in rows.items()}
    assert found["reducer"] == reducer.__version__
    assert found["protocol"] == "3"
    assert found["REDUCER_ALGORITHM"] == "ring"
    assert found["REDUCER_CHUNK_BYTES"] == "65536"
    assert found["REDUCER_SERVERS"] == "none (default)"
    assert found["interface lo"] == "127.0.0.1"
    assert found["instruction sets"]
    assert found["torch found"].startswith("2.13.")


def test_info_shows_servers_with_their_bandwidths() -> None:
    done = run("info", REDUCER_SERVERS="a:1@10gbit,b:2@25gbit", REDUCER_BANDWIDTH="10gbit")
    assert done.returncode == 0
    assert "a:1@10000000000bit" in done.stdout.replace("\n", "")


def test_info_says_which_setting_is_wrong() -> None:
    done = run("info", REDUCER_SERVERS="host-without-port")
    assert done.returncode == 1
    assert "host-without-port" in done.stdout
    assert "REDUCER_SERVERS" in done.stdout


def test_bench_refuses_unknown_options() -> None:
    done = run("bench", "--no-such-option")
    assert done.returncode == 2
    assert "--no-such-option" in done.stderr


def test_without_the_native_parts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(native, "__file__", "/nowhere/reducer/serve.py")
    monkeypatch.setattr(sys, "argv", ["reducer", "serve"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("reducer: /nowhere/reducer/bin/reducer-server is not there")
    assert "make setup" in message


def test_a_command_is_needed() -> None:
    result = CliRunner().invoke(cli.app, [])
    assert result.exit_code == 2
    assert "Usage" in result.output
