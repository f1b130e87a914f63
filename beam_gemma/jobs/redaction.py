"""Leaves secrets out of a command that is shown or stored.

Beam takes keys of S3 and Azure as flags, and a program around the transforms has flags of its own,
so a flag holds a secret by the words of its name.
"""

import re
from collections.abc import Sequence
from itertools import pairwise

REDACTED = "REDACTED"
SECRET = ("secrets", "password", "passwd", "passphrase", "credentials", "apikey")
"""Words that make a flag secret, also where an abbreviation has only the first letters."""
MIN_LETTERS = 4
"""Fewest letters of an abbreviated word."""
KINDS_OF_KEY = ("access", "account", "api", "encryption", "private", "secret", "shared", "signing")
"""Words that make a flag secret with `key` after them; keys of KMS are names and no secrets."""
HOLDING_ANY = frozenset([
    "environment_config", "environment_option", "environment_options", "job_server_jvm_property",
    "job_server_jvm_properties", "profiler_extra_env_var", "profiler_extra_env_vars",
])  # fmt: skip
"""Flags of Beam whose values may be environment variables or properties of any name."""
_FLAG = re.compile(r"--?([A-Za-z][\w.-]*)")
_PASSWORD = re.compile(r"(?<=://)[^\s/@]*:[^\s/@]*(?=@)")
_SIGNATURE = re.compile(
    r"(?i)([?&](?:sig|key|[\w-]*(?:signature|token|credential|secret|password))=)[^&\s]+"
)


def without_secrets(command: Sequence[str]) -> list[str]:
    """Return a command, as a list of words, with `REDACTED` for each secret value.

    Secret are the values of flags that `is_secret`, as `--flag=value` or as `--flag value`, and
    passwords and signatures within URLs.
    """
    shown: list[str] = []
    is_value = False
    for word in command:
        flag, equals, _ = word.partition("=")
        name = _FLAG.fullmatch(flag)
        hides = name is not None and is_secret(name[1])
        if is_value and not word.startswith("--"):
            shown.append(REDACTED)
        else:
            shown.append(f"{flag}={REDACTED}" if hides and equals else without_password(word))
        is_value = hides and not equals
    return shown


def is_secret(flag: str) -> bool:
    """Return whether a flag, without its dashes, holds a secret by its name."""
    words = re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", flag).lower())
    pairs = set(pairwise(words))
    return (
        "_".join(words) in HOLDING_ANY
        or words[-1] == "token"
        or any(_abbreviates(word, secret) for word in words for secret in SECRET)
        or any((kind, "key") in pairs for kind in KINDS_OF_KEY)
        or ("connection", "string") in pairs
    )


def without_password(uri: str) -> str:
    """Return a URI, or a word that holds one, with `REDACTED` for its password or signature."""
    if "://" not in uri:
        return uri
    return _SIGNATURE.sub(rf"\1{REDACTED}", _PASSWORD.sub(REDACTED, uri))


def _abbreviates(word: str, secret: str) -> bool:
    return len(word) >= MIN_LETTERS and secret.startswith(word)
