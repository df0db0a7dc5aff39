"""Compile quanto's unpacking kernels at install time, so that no timed cell waits for a compiler.

Writes what happened to ``quanto-build.json`` in the running virtual environment and always exits 0:
without a compiler everything but the quantised strategies works.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

COMPILER = "on Debian or Ubuntu: apt install g++ python3-dev, then `make rebuild-extensions`"
NO_SPACE = "PyTorch cannot link in a folder whose path contains a space; move the clone to another"


def failing_line(message: str) -> str:
    """Return the line of a build log that names the error, or else its first line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    telling = [line for line in lines if "error:" in line or "not found" in line]
    return (telling or lines or [""])[0]


def build(device: str) -> dict:
    """Unpack one byte with quanto's kernel for ``device``, which compiles it when it is missing.

    Parameters
    ----------
    device
        ``"cpu"`` or ``"cuda"``.

    Returns
    -------
    dict
        ``device``, ``available``, ``seconds`` (wall clock, s) and ``reason`` (None or one line).
    """
    import torch
    from optimum.quanto.library.extensions.extension import get_extension

    started = time.perf_counter()
    reason = None
    try:
        extension = get_extension("quanto_cpp" if device == "cpu" else "quanto_cuda")
    except KeyError:
        reason = f"optimum-quanto has no {device} extension for this PyTorch build"
        extension = None
    if reason is None and " " in extension.build_directory:
        reason = NO_SPACE
    elif reason is None and not shutil.which(os.environ.get("CXX") or "c++"):
        reason = f"no C++ compiler was found ({COMPILER})"
    elif reason is None:
        # An interrupted compilation leaves its lock behind, and PyTorch would wait for it for ever.
        with contextlib.suppress(FileNotFoundError):
            Path(extension.build_directory, "lock").unlink()
        try:
            packed = torch.tensor([0b11100100], dtype=torch.uint8, device=device)
            unpacked = torch.ops.quanto.unpack(packed, 2).tolist()
            if unpacked != [0, 1, 2, 3]:
                reason = f"the compiled kernel unpacked {unpacked} instead of [0, 1, 2, 3]"
        except Exception as error:  # whatever fails here is a reason, never a stop
            reason = f"{failing_line(str(error)) or type(error).__name__} ({COMPILER})"
    return {
        "device": device,
        "available": reason is None,
        "seconds": round(time.perf_counter() - started, 3),
        "reason": reason,
    }


def main() -> None:
    """Build for every device of this machine, print one line each and write the record."""
    # ninja is installed beside this interpreter, which need not be on PATH.
    os.environ["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    )
    try:
        import optimum.quanto  # noqa: F401
        import torch
    except ImportError as error:
        print(f"quantised strategies (quanto) will be reported as unsupported: {error}")
        return
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    builds = [build(device) for device in devices]
    for result in builds:
        if result["available"]:
            print(f"quanto's {result['device']} extension is ready ({result['seconds']:.1f} s)")
        else:
            print(
                f"quantised strategies (quanto) will be reported as unsupported on "
                f"{result['device']}: {result['reason']}"
            )
    record = {"torch": torch.__version__, "builds": builds}
    Path(sys.prefix, "quanto-build.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
