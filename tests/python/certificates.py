"""Authorities and certificates for tests, as files."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Files:
    """One host's: its certificate, its key, and the authority of all."""

    cert: Path
    key: Path
    ca: Path

    def environment(self) -> dict[str, str]:
        return {"REDUCER_TLS_CERT": str(self.cert), "REDUCER_TLS_KEY": str(self.key), "REDUCER_TLS_CA": str(self.ca)}

    def options(self) -> list[str]:
        """For `reducer serve` and `reducer stats`."""
        return ["--tls-cert", str(self.cert), "--tls-key", str(self.key), "--tls-ca", str(self.ca)]


def issue(
    folder: Path,
    *,
    authority: trustme.CA | None = None,
    names: tuple[str, ...] = ("127.0.0.1", "::1", "localhost"),
    lasts: datetime.timedelta = datetime.timedelta(days=1),
) -> Files:
    """A certificate for these names, of a new authority if none is given. Files that are there are replaced."""
    folder.mkdir(exist_ok=True)
    authority = authority or trustme.CA()
    now = datetime.datetime.now(datetime.timezone.utc)
    start = min(now, now + lasts) - datetime.timedelta(days=2)
    certificate = authority.issue_cert(*names, not_before=start, not_after=now + lasts)
    files = Files(folder / "cert.pem", folder / "key.pem", folder / "ca.pem")
    for path, text in (
        (files.cert, certificate.cert_chain_pems[0].bytes()),
        (files.key, certificate.private_key_pem.bytes()),
        (files.ca, authority.cert_pem.bytes()),
    ):
        fresh = path.with_suffix(".new")
        fresh.write_bytes(text)
        fresh.replace(path)
    return files
