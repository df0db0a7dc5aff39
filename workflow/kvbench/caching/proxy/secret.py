"""The secret of an installation, and the digests that are made with it."""

from __future__ import annotations

import hashlib
import os
import secrets
from contextlib import suppress
from pathlib import Path

from kvbench.caching.proxy.settings import Settings
from kvbench.errors import InputError

_BYTES = 32


def secret_of(settings: Settings) -> bytes:
    """Return the secret: of this process for answers in memory, from a file for others.

    Raises
    ------
    InputError
        If the file cannot be read or made, or is readable to others.
    """
    if settings.store == "memory" and settings.secret_file is None:
        return secrets.token_bytes(_BYTES)
    path = Path(settings.secret_file) if settings.secret_file else usual_place()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _make(path)
        if os.name == "posix" and path.stat().st_mode & 0o077:
            raise InputError(f"--secret-file {path}: others can read it; chmod 600 {path}")
        secret = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except (OSError, ValueError) as error:
        raise InputError(f"--secret-file {path}: cannot be used ({error})") from error
    if not 16 <= len(secret) <= 64:
        raise InputError(f"--secret-file {path}: needs 32 to 128 hexadecimal digits")
    return secret


def _make(path: Path) -> None:
    """Write a new secret, whole or not at all; another process may be faster."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(_BYTES) + "\n")
        with suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()


def usual_place() -> Path:
    """Return where the secret is kept if nothing else is said (XDG base directories)."""
    state = os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()
    return Path(state) / "kvbench" / "proxy.secret"


def digest(secret: bytes, *parts: bytes) -> bytes:
    """Return a keyed digest of parts that cannot run into each other."""
    machine = hashlib.blake2b(key=secret, digest_size=32)
    for part in parts:
        machine.update(b"%d:" % len(part) + part)
    return machine.digest()
