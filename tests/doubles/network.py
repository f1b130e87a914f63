"""Which addresses a command and its children call."""

import ipaddress
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
CALLS = "connect,sendto,sendmsg,sendmmsg"
ADDRESS = re.compile(r'inet_addr\("([^"]+)"\)|inet_pton\(AF_INET6, "([^"]+)"')
GUARD = """
import sys

def note(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = args[1]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        address = args
    else:
        return
    if isinstance(address, tuple) and address[0]:
        with open({trace!r}, "a") as stream:
            stream.write(f"{{address[0]}}\\n")

sys.addaudithook(note)
"""
"""A module for each Python process to import at its start; it sees what Python code calls."""


def can_trace() -> bool:
    """Return whether strace is here and may trace."""
    if not (strace := shutil.which("strace")):
        return False
    return subprocess.run([strace, "-o", os.devnull, "true"], check=False).returncode == 0


def addresses_of(
    command: Sequence[str], folder: Path, env: Mapping[str, str], *, by_strace: bool
) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Run a command in the root of the checkout; return how it ended and what addresses it called.

    Args:
        command: The command.
        folder: An empty folder for what is traced.
        env: The variables of the command.
        by_strace: True to see all calls, with strace; False to see those of Python code alone.
    """
    trace = folder / "trace"
    trace.touch()
    if by_strace:
        command = ["strace", "--follow-forks", f"--trace={CALLS}", f"--output={trace}", *command]
    else:
        (folder / "sitecustomize.py").write_text(GUARD.format(trace=str(trace)))
        env = {**env, "PYTHONPATH": f"{folder}:{env.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    if by_strace:
        return done, {v4 or v6 for v4, v6 in ADDRESS.findall(trace.read_text())}
    return done, set(trace.read_text().split())


def beyond_loopback(addresses: set[str]) -> set[str]:
    """Return the addresses that are not this machine's own; a name is one unless it is known."""

    def is_here(address: str) -> bool:
        if address == "localhost":
            return True
        try:
            ip = ipaddress.ip_address(address)
        except ValueError:
            return False
        return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback

    return {address for address in addresses if not is_here(address)}
