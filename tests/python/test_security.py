"""TLS and tokens between real processes: who is let in, who is not and is told why, and what never shows."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
import torch.distributed as dist
from certificates import Files, issue
from control_client import ERROR, PROTOCOL_VERSION, RESULT, Client
from ranks import RankFailure, Ranks, run_ranks
from relays import tapped
from servers import server_binary, serving, started

import reducer
from reducer import MismatchError
from reducer.options import resolve

REPOSITORY = Path(__file__).resolve().parents[2]
TOKEN = "token-" + secrets.token_hex(16)
OTHER_TOKEN = "other-" + secrets.token_hex(16)
ADMIN_TOKEN = "admin-" + secrets.token_hex(16)
NOT_ADMITTED = "this reducer does not let this worker in"
WAIT_S = 20.0


@pytest.fixture(scope="module", name="tls")
def tls_files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return issue(tmp_path_factory.mktemp("tls"))


@pytest.fixture(name="token_file")
def token_file_of(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    return path


def stats(address: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`reducer serve`'s counters, asked for by the native client."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("REDUCER_T")}
    return subprocess.run(
        [str(server_binary()), *options, "--stats", address],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
        env=clean | environment,
    )


def environment(server: str = "", **more: Any) -> dict[str, str]:
    known = {"REDUCER_SERVERS": server, "REDUCER_ALGORITHM": "server" if server else "direct"}
    return known | {"REDUCER_CONNECT_TIMEOUT": "5"} | {name: str(value) for name, value in more.items()}


def apart(rank: int, env: dict[str, str]) -> dict[str, str]:
    """On a host of its own."""
    return env | {"REDUCER_TEST_PLACE": f"host {rank}"}


def one_sum() -> tuple[float, set[str]]:
    tensor = torch.full((100_000,), float(dist.get_rank() + 1))
    dist.all_reduce(tensor)
    names = set()
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/self/task/{task}/comm") as comm:
            names.add(comm.read().strip())
    return tensor[0].item(), names


def error_of(n: int, env: dict[str, str] | list[dict[str, str]], kind: type[Exception] = RankFailure) -> str:
    """What a job of `n` ranks fails with, everything its processes printed included."""
    with pytest.raises(kind) as raised:
        run_ranks(n, one_sum, env=env)
    return str(raised.value)


# ---------------------------------------------------------------- TLS


def test_nothing_that_crosses_can_be_read(tls: Files, token_file: Path) -> None:
    for secure in (False, True):
        options = tls.options() if secure else []
        with serving("--token-file", str(token_file), *options) as server, tapped(server.address) as (address, seen):
            env = environment(address, REDUCER_TOKEN_FILE=token_file, **(tls.environment() if secure else {}))
            for value, threads in run_ranks(2, one_sum, env=env):
                assert value == 3.0
                assert ("reducer-cq" in threads) == secure  # gRPC's
        # 3.0 in float32, many times, and the token: there where there is no TLS.
        assert len(seen) > 800_000
        assert (b"\0\0\x40\x40" * 100 not in seen) == secure
        assert (TOKEN.encode() not in seen) == secure


def test_workers_and_reducers_on_their_own_hosts_meet_by_mutual_tls(tls: Files) -> None:
    with serving(*tls.options()) as server:
        port = server.address.rsplit(":", 1)[1]
        # By a name, which the certificate has to have: the address behind it is not looked at.
        env = environment(f"localhost:{port}", REDUCER_ALGORITHM="mixed", **tls.environment())
        for value, _ in run_ranks(3, one_sum, env=[apart(rank, env) for rank in range(3)]):
            assert value == 6.0


def test_on_all_interfaces_a_worker_that_said_hello_is_a_stranger_no_more(tls: Files) -> None:
    with serving(*tls.options(), listen="[::]:0") as server:
        address = f"127.0.0.1:{server.address.rsplit(':', 1)[1]}"
        with Ranks(2, environment(address, **tls.environment())) as ranks:
            assert [value for value, _ in ranks.call(one_sum)] == [3.0, 3.0]
            # A stranger's connection has two descriptors: gRPC's, and one that tells of its end.
            deadline = time.monotonic() + WAIT_S
            while True:
                held = [os.readlink(fd) for fd in Path(f"/proc/{server.process.pid}/fd").iterdir()]
                sockets = [name for name in held if name.startswith("socket:")]
                if len(set(sockets)) == len(sockets) >= 3:
                    break
                assert time.monotonic() < deadline, sockets
                time.sleep(0.02)


def sockets_to(port: int) -> int:
    """Connections of this process to that port."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as end:
            count += end.family in (socket.AF_INET, socket.AF_INET6) and end.getpeername()[1] == port
    return count


def sockets_here_and_in_a_child(port: int) -> tuple[int, int]:
    one_sum()
    child = os.fork()
    if child == 0:
        os._exit(sockets_to(port))
    return sockets_to(port), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_forked_child_holds_no_connection_by_tls(tls: Files) -> None:
    with serving(*tls.options()) as server:
        env = environment(server.address, **tls.environment())
        port = int(server.address.rsplit(":", 1)[1])
        # A child that kept one open would hide the death of its parent from all others.
        assert run_ranks(2, sockets_here_and_in_a_child, port, env=env) == [(1, 0), (1, 0)]


def test_with_only_an_authority_the_server_is_checked_and_the_client_is_not(tls: Files) -> None:
    with serving("--tls-cert", str(tls.cert), "--tls-key", str(tls.key)) as server:
        assert stats(server.address, "--tls-ca", str(tls.ca)).returncode == 0
        assert stats(server.address, REDUCER_TLS_CA=str(tls.ca)).returncode == 0
        for value, _ in run_ranks(2, one_sum, env=environment(server.address, **tls.environment())):
            assert value == 3.0
    with serving(*tls.options()) as server:
        refused = stats(server.address, "--tls-ca", str(tls.ca))
        assert refused.returncode == 1
        assert f"{server.address} demands a certificate" in refused.stderr
        assert "REDUCER_TLS_CERT" in refused.stderr
        assert stats(server.address, *tls.options()).returncode == 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"cert": "absent.pem"}, r"certificate file '.*absent.pem' cannot be read: No such file"),
        ({"cert": "text.pem"}, r"certificate file '.*text.pem' holds no certificate in PEM"),
        ({"key": "text.pem"}, r"key file '.*text.pem' holds no private key in PEM"),
        ({"key": "other/key.pem"}, r"key '.*other/key.pem' does not belong to the certificate '.*cert.pem'"),
        ({"cert": "old/cert.pem", "key": "old/key.pem"}, r"certificate '.*old/cert.pem' expired on .* GMT; renew it"),
        ({"ca": "absent.pem"}, r"authority file '.*absent.pem' cannot be read: No such file"),
        ({"key": ""}, r"certificate '.*cert.pem' is given without its key; set REDUCER_TLS_KEY \(--tls-key\)"),
        ({"cert": "", "key": ""}, r"there is no certificate to show"),
    ],
)
def test_files_that_cannot_be_used_are_named(tls: Files, tmp_path: Path, change: dict[str, str], told: str) -> None:
    issue(tmp_path / "other")
    issue(tmp_path / "old", lasts=-datetime.timedelta(hours=1))
    (tmp_path / "text.pem").write_text("no certificate")
    chosen = {"cert": str(tls.cert), "key": str(tls.key), "ca": str(tls.ca)}
    chosen |= {what: str(tmp_path / name) if name else "" for what, name in change.items()}
    options = [text for what, path in chosen.items() if path for text in (f"--tls-{what}", path)]
    with started(*options) as server:
        assert server.wait() == 1
        assert re.search(told, server.output), server.output


def test_a_worker_names_the_file_and_all_ranks_hear_of_it(tls: Files, tmp_path: Path) -> None:
    env = environment(**tls.environment())
    text = error_of(2, [env, env | {"REDUCER_TLS_KEY": str(tmp_path / "absent.pem")}])
    for rank in (0, 1):
        assert f"[rank {rank}, group default]" in text
    assert f"the TLS key file '{tmp_path}/absent.pem' cannot be read: No such file" in text
    text = error_of(1, {name: value for name, value in env.items() if name != "REDUCER_TLS_CA"})
    assert "set REDUCER_TLS_CA" in text
    text = error_of(2, [env, {name: value for name, value in env.items() if "TLS" not in name}])
    assert "TLS (REDUCER_TLS_CERT, _KEY and _CA) is 'on' on rank 0" in text
    assert "'off' on rank 1" in text


def test_tcp_has_no_tls(tls: Files) -> None:
    with pytest.raises(ValueError, match="REDUCER_TRANSPORT is 'tcp', which has no TLS"):
        resolve(reducer.Options(transport="tcp", tls_ca=tls.ca))
    assert resolve(reducer.Options(tls_ca=tls.ca)).transport == "auto"


def test_who_does_not_trust_the_other_end_says_why(tls: Files, tmp_path: Path) -> None:
    other = issue(tmp_path / "other")
    elsewhere = issue(tmp_path / "elsewhere", names=("10.11.12.13", "far.example"))
    soon_over = issue(tmp_path / "soon", lasts=datetime.timedelta(seconds=2))
    with contextlib.ExitStack() as stack:
        names = {"good": tls, "elsewhere": elsewhere, "soon": soon_over}
        servers = {name: stack.enter_context(serving(*files.options())).address for name, files in names.items()}
        plain = stack.enter_context(serving()).address
        http2 = stack.enter_context(serving("--transport", "grpc")).address

        def told(address: str, *options: str) -> str:
            asked = stats(address, *options)
            assert asked.returncode == 1, asked.stdout
            assert address in asked.stderr
            return asked.stderr

        assert f"does not come from an authority in '{other.ca}'" in told(servers["good"], "--tls-ca", str(other.ca))
        mixed = ["--tls-cert", str(other.cert), "--tls-key", str(other.key), "--tls-ca", str(tls.ca)]
        assert f"does not accept this end's certificate '{other.cert}'" in told(servers["good"], *mixed)
        assert "is for other names; make one with this address" in told(servers["elsewhere"], *elsewhere.options())
        assert "takes connections by TLS only" in told(servers["good"])
        for address in (plain, http2):
            assert "does not speak TLS" in told(address, *tls.options())
        # Workers are told the same, and by name.
        text = error_of(2, environment(servers["good"], **other.environment()))
        assert f"the certificate that {servers['good']} shows" in text
        assert f"does not come from an authority in '{other.ca}'" in text
        for transport in ("auto", "grpc"):
            text = error_of(1, environment(servers["good"], REDUCER_TRANSPORT=transport))
            assert f"{servers['good']} takes connections by TLS only" in text
        assert f"{plain} does not speak TLS" in error_of(1, environment(plain, **tls.environment()))
        deadline = time.monotonic() + WAIT_S
        while "shows (" not in (late := stats(servers["soon"], "--tls-ca", str(soon_over.ca)).stderr):
            assert time.monotonic() < deadline, late
            time.sleep(0.2)  # until the certificate's last second is over
        assert "has expired, on " in late
        assert "renew it there" in late


def test_renewed_files_serve_new_jobs_and_old_ones_go_on(tmp_path: Path) -> None:
    files = issue(tmp_path / "live")
    with serving(*files.options()) as server, Ranks(2, environment(server.address, **files.environment())) as old:
        assert [value for value, _ in old.call(one_sum)] == [3.0, 3.0]
        issue(tmp_path / "live")  # of another authority
        deadline = time.monotonic() + WAIT_S
        while (asked := stats(server.address, *files.options())).returncode != 0:
            assert time.monotonic() < deadline, asked.stderr
            time.sleep(0.1)
        assert [value for value, _ in run_ranks(2, one_sum, env=environment(server.address, **files.environment()))]
        assert [value for value, _ in old.call(one_sum)] == [3.0, 3.0]


# ---------------------------------------------------------------- tokens


def test_a_job_needs_the_token_of_its_reducers(token_file: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text(OTHER_TOKEN)
    with serving("--token-file", str(token_file)) as server:
        env = environment(server.address, REDUCER_TOKEN_FILE=token_file)
        assert [value for value, _ in run_ranks(2, one_sum, env=env)] == [3.0, 3.0]
        assert NOT_ADMITTED in error_of(2, environment(server.address))
        assert NOT_ADMITTED in error_of(2, env | {"REDUCER_TOKEN_FILE": str(wrong)})
        # Workers let only their own job's in.
        direct = {"REDUCER_SERVERS": "", "REDUCER_ALGORITHM": "direct"}
        both = [apart(0, env | direct), apart(1, env | direct | {"REDUCER_TOKEN_FILE": str(wrong)})]
        assert NOT_ADMITTED in error_of(2, both)
        # The file is read again: another team's job.
        token_file.write_text(f"{TOKEN}\n{OTHER_TOKEN}\n")
        assert [v for v, _ in run_ranks(2, one_sum, env=env | {"REDUCER_TOKEN_FILE": str(wrong)})] == [3.0, 3.0]
        assert "has 2 tokens; a worker's has one line" in error_of(1, env)


def test_whether_there_is_a_token_is_equal_on_all_ranks(token_file: Path) -> None:
    text = error_of(2, [environment(REDUCER_TOKEN_FILE=token_file), environment()])
    assert MismatchError.__name__ in text
    assert "REDUCER_TOKEN_FILE is 'set' on rank 0" in text


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("short\n", "has in line 1 a token of 5 characters; it takes 16 to 256"),
        ("\n" + "x" * 257, "has in line 2 a token of 257 characters"),
        ("sixteen letters and more", "a token with spaces"),
        ("\n", "is empty; write a token, as `openssl rand -hex 32` makes"),
        (None, "cannot be read: No such file"),
    ],
)
def test_token_files_that_cannot_be_used(tmp_path: Path, content: str | None, told: str) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content)
    with started("--token-file", str(path)) as server:
        assert server.wait() == 1
        assert f"the token file '{path}'" in server.output
        assert told in server.output
        assert "sixteen" not in server.output


def test_strangers_get_one_answer_and_jobs_stay_apart(token_file: Path) -> None:
    token_file.write_text(f"{TOKEN}\n{OTHER_TOKEN}\n")
    with serving("--token-file", str(token_file)) as server, Client(server.address) as client:
        member = client.exchange()
        member.join(rank=0, world_size=2, token=TOKEN.encode())
        texts = set()
        for hello in (
            {},  # no token
            {"token": b"x" * 32},
            {"token": TOKEN[:-1].encode()},
            {"token": OTHER_TOKEN.encode()},  # one of another job
            {"token": b"", "job": b"short"},  # that its job is wrong, too, is none of its business
            {"token": b"", "rank": 0},  # taken
            {"version": PROTOCOL_VERSION + 1},  # and nothing of this one
            {"version": PROTOCOL_VERSION + 1, "token": b"x" * 32},
        ):
            stranger = client.exchange()
            stranger.hello(**({"rank": 1, "world_size": 2} | hello))
            answer = stranger.receive()
            assert answer.kind == ERROR
            assert answer.fatal
            assert stranger.ended()
            texts.add(answer.text)
        assert len(texts) == 1
        assert NOT_ADMITTED in texts.pop()
        # Whose token is right learns of the version.
        later = client.exchange()
        later.hello(rank=1, world_size=2, token=TOKEN.encode(), version=PROTOCOL_VERSION + 1)
        assert f"speaks protocol version {PROTOCOL_VERSION}" in later.receive().text
        assert later.ended()
        # Those who were turned away changed nothing.
        other = client.exchange()
        other.join(rank=1, world_size=2, token=TOKEN.encode())
        member.push([1.0, 2.0])
        other.push([3.0, 4.0])
        assert member.receive().kind == RESULT
        for worker in (member, other):
            worker.cut()
        counted = client.call("Stats", [("reducer-token", TOKEN)])
        assert counted.refused == 9


def test_counters_and_drain_need_a_token_and_health_does_not(token_file: Path) -> None:
    with serving("--token-file", str(token_file)) as server, Client(server.address) as client:
        for method in ("Stats", "Drain"):
            for metadata in ([], [("reducer-token", OTHER_TOKEN)]):
                assert "a token of its jobs; set REDUCER_TOKEN_FILE" in denied(client, method, metadata)
        assert not client.call("Stats", with_token(TOKEN)).draining
        assert client.healthy()
        assert stats(server.address).returncode == 1
        assert "REDUCER_TOKEN_FILE" in stats(server.address).stderr
        assert stats(server.address, "--token-file", str(token_file)).returncode == 0
        assert stats(server.address, REDUCER_TOKEN_FILE=str(token_file)).returncode == 0
        # Of the only token, whose jobs are all that end.
        client.call("Drain", with_token(TOKEN))
        assert server.wait() == 0


def with_token(token: str) -> list[tuple[str, str]]:
    return [("reducer-token", token)]


def denied(client: Client, method: str, metadata: list[tuple[str, str]]) -> str:
    """What a call is told that is refused."""
    with pytest.raises(grpc.RpcError) as refused:
        client.call(method, metadata)
    assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED
    return str(refused.value.details())


@contextlib.contextmanager
def two_jobs(client: Client) -> Iterator[None]:
    """A group of each of the tokens."""
    workers = [client.exchange(), client.exchange()]
    for worker, token in zip(workers, (TOKEN, OTHER_TOKEN), strict=True):
        worker.join(job=token[:16].encode(), group=token[:5], token=token.encode())
    yield
    for worker in workers:
        worker.close()


def test_a_token_sees_its_own_groups_and_does_not_end_others(token_file: Path) -> None:
    token_file.write_text(f"{TOKEN}\n{OTHER_TOKEN}\n")
    with serving("--token-file", str(token_file)) as server, Client(server.address) as client:
        with two_jobs(client):
            for token in (TOKEN, OTHER_TOKEN):
                seen = client.call("Stats", with_token(token))
                assert [group.group for group in seen.groups] == [token[:5]]
                assert not seen.all_groups
                assert (seen.connections, seen.reserved_bytes) == (2, 2 * seen.groups[0].reserved_bytes)
        refused = denied(client, "Drain", with_token(TOKEN))
        assert "SIGTERM" in refused
        assert "--admin-token-file" in refused
        assert not client.call("Stats", with_token(TOKEN)).draining
        # The file is read again: now it is the only one.
        token_file.write_text(f"{TOKEN}\n")
        client.call("Drain", with_token(TOKEN))
        assert server.wait() == 0


@pytest.mark.parametrize("by_environment", [False, True])
def test_operators_see_all_groups_and_drain(
    token_file: Path, tmp_path: Path, by_environment: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    admin_file = tmp_path / "admin"
    admin_file.write_text(f"{ADMIN_TOKEN}\n")
    token_file.write_text(f"{TOKEN}\n{OTHER_TOKEN}\n")
    options = ["--token-file", str(token_file)]
    if by_environment:
        monkeypatch.setenv("REDUCER_ADMIN_TOKEN_FILE", str(admin_file))
    else:
        options += ["--admin-token-file", str(admin_file)]
    with serving(*options) as server, Client(server.address) as client:
        monkeypatch.delenv("REDUCER_ADMIN_TOKEN_FILE", raising=False)
        with two_jobs(client):
            seen = client.call("Stats", with_token(ADMIN_TOKEN))
            assert seen.all_groups
            assert {group.group for group in seen.groups} == {TOKEN[:5], OTHER_TOKEN[:5]}
            own = client.call("Stats", with_token(TOKEN))
            assert [group.group for group in own.groups] == [TOKEN[:5]]
            # The same option, for whichever token.
            for file, shown in ((admin_file, 2), (token_file, 1)):
                asked = stats(server.address, "--token-file", str(file))
                assert len(json.loads(asked.stdout)["groups"]) == shown, asked.stderr
        # An operator is no worker.
        stranger = client.exchange()
        stranger.hello(token=ADMIN_TOKEN.encode())
        assert NOT_ADMITTED in stranger.receive().text
        # Not even the only token of the file.
        token_file.write_text(f"{TOKEN}\n")
        assert "--admin-token-file" in denied(client, "Drain", with_token(TOKEN))
        for method in ("Stats", "Drain"):
            assert "a token of its jobs or operators" in denied(client, method, [])
        # This file is read again, too.
        admin_file.write_text(f"{ADMIN_TOKEN}2\n")
        assert "operators" in denied(client, "Drain", with_token(ADMIN_TOKEN))
        client.call("Drain", with_token(f"{ADMIN_TOKEN}2"))
        assert server.wait() == 0
        for secret in (TOKEN, OTHER_TOKEN, ADMIN_TOKEN):
            assert secret not in server.output


def test_with_operators_and_without_jobs_tokens_only_operators_are_answered(tmp_path: Path) -> None:
    admin_file = tmp_path / "admin"
    admin_file.write_text(f"{ADMIN_TOKEN}\n")
    with serving("--admin-token-file", str(admin_file)) as server, Client(server.address) as client:
        worker = client.exchange()
        worker.join()
        for method in ("Stats", "Drain"):
            assert "a token of its operators" in denied(client, method, [])
        assert len(client.call("Stats", with_token(ADMIN_TOKEN)).groups) == 1
        worker.close()
        client.call("Drain", with_token(ADMIN_TOKEN))
        assert server.wait() == 0


def test_the_operators_file_is_checked_and_is_none_of_stats(tmp_path: Path) -> None:
    with started("--admin-token-file", str(tmp_path / "absent")) as server:
        assert server.wait() == 1
        assert f"the token file '{tmp_path}/absent' cannot be read" in server.output
    asked = stats("127.0.0.1:1", "--admin-token-file", str(tmp_path / "absent"))
    assert asked.returncode == 2
    assert "--token-file" in asked.stderr


@pytest.mark.parametrize("protected", ["token", "operators", "mutual"])
def test_a_reducer_with_secrets_describes_itself_to_nobody(tls: Files, token_file: Path, protected: str) -> None:
    options = {
        "token": ["--token-file", str(token_file)],
        "operators": ["--admin-token-file", str(token_file)],
        "mutual": tls.options(),
    }[protected]
    with serving(*options) as server, Client(server.address, tls if protected == "mutual" else None) as client:
        with pytest.raises(grpc.RpcError) as refused:
            client.services()
        assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
        assert client.healthy()


# ---------------------------------------------------------------- what is shown, and what is not


def test_secrets_show_nowhere(tls: Files, token_file: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text(OTHER_TOKEN)
    key_line = tls.key.read_text().splitlines()[2]
    options = reducer.Options(token_file=token_file, tls_key=tls.key, tls_cert=tls.cert, tls_ca=tls.ca)
    shown = [repr(options), repr(resolve(options)), str(resolve(options).shared)]
    with serving("--token-file", str(token_file), *tls.options()) as server:
        good = environment(server.address, REDUCER_TOKEN_FILE=token_file, REDUCER_LOG="debug", **tls.environment())
        for change in (
            {"REDUCER_TOKEN_FILE": str(wrong)},
            {"REDUCER_TLS_CA": str(tls.key)},  # the wrong file, with the secret in it
            {"REDUCER_TOKEN_FILE": str(tls.key)},
            {"REDUCER_SERVERS": "127.0.0.1:1", "REDUCER_CONNECT_TIMEOUT": "0.2"},
            {"REDUCER_WINDOW_BYTES": "1TiB"},
        ):
            shown.append(error_of(2, good | change))
        with Ranks(2, good) as ranks:
            ranks.call(one_sum)
            shown.append(ranks.logs())
        asked = stats(server.address, *tls.options(), "--token-file", str(token_file))
        shown += [asked.stdout, asked.stderr, stats(server.address, *tls.options(), "--token-file", str(wrong)).stderr]
        environ = os.environ | good | {"COLUMNS": "400"}
        info = [str(server_binary().parents[2] / ".venv/bin/python"), "-m", "reducer", "info"]
        shown.append(
            subprocess.run(info, capture_output=True, text=True, timeout=WAIT_S, check=True, env=environ).stdout
        )
        assert str(token_file) in shown[-1]
        server.terminate()
        assert server.wait() == 0
        shown.append(server.output)
    for text in shown:
        for secret in (TOKEN, OTHER_TOKEN, key_line, TOKEN.encode().hex()):
            assert secret not in text


@pytest.mark.parametrize(
    ("listen", "protected", "warned"),
    [
        ("0.0.0.0:0", "", True),
        ("[::]:0", "", True),
        ("0.0.0.0:0", "server's certificate", True),
        ("0.0.0.0:0", "token", False),
        ("0.0.0.0:0", "mutual", False),
        ("127.0.0.1:0", "", False),
        ("localhost:0", "", False),
    ],
)
def test_an_open_reducer_says_so(tls: Files, token_file: Path, listen: str, protected: str, warned: bool) -> None:
    options = {
        "": [],
        "token": ["--token-file", str(token_file)],
        "mutual": tls.options(),
        "server's certificate": tls.options()[:4],
    }[protected]
    with serving(*options, listen=listen) as server:
        lines = [line for line in server.output.splitlines() if "warning" in line]
        assert len(lines) == warned
        if warned:
            assert listen in lines[0]
            assert "--token-file" in lines[0]


# ---------------------------------------------------------------- the page


def test_the_commands_of_the_page_work(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "security.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    setup = [block for block in blocks if "openssl" in block]
    assert len(setup) >= 3
    script = "set -e\n" + "\n".join(setup).replace("10.0.0.4", "127.0.0.1")
    subprocess.run(["bash", "-c", script], cwd=tmp_path, check=True, capture_output=True, timeout=WAIT_S)
    files = Files(tmp_path / "host.pem", tmp_path / "host.key", tmp_path / "ca.pem")
    token = tmp_path / "job.token"
    assert token.stat().st_mode & 0o77 == 0
    assert files.key.stat().st_mode & 0o77 == 0
    with serving("--token-file", str(token), *files.options()) as server:
        env = environment(server.address, REDUCER_TOKEN_FILE=token, **files.environment())
        assert [value for value, _ in run_ranks(2, one_sum, env=env)] == [3.0, 3.0]
