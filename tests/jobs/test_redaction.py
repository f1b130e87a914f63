"""Secrets of a command: left out by the names of flags, while all else can be typed again."""

import argparse

import pytest

from beam_gemma.cli.classify_flags import classify_parser
from beam_gemma.cli.embed_flags import embed_parser
from beam_gemma.cli.flags import beam_flag_parser
from beam_gemma.cli.generate_flags import generate_parser
from beam_gemma.jobs.redaction import is_secret, without_password, without_secrets

OF_BEAM = {
    "azure_connection_string", "environment_config", "environment_option", "environment_options",
    "job_server_jvm_properties", "job_server_jvm_property", "profiler_extra_env_var",
    "profiler_extra_env_vars", "s3_access_key_id", "s3_secret_access_key", "s3_session_token",
}  # fmt: skip


def names(parser: argparse.ArgumentParser) -> set[str]:
    return {flag.lstrip("-") for flag in parser._option_string_actions}


def test_which_flags_of_beam_are_secret() -> None:
    """Beam's flags change with its version: look at the new ones when this fails."""
    found = {name for name in names(beam_flag_parser()) if is_secret(name)}
    assert found == OF_BEAM


@pytest.mark.parametrize("parser_of", [generate_parser, classify_parser, embed_parser])
def test_no_flag_of_ours_is_secret(parser_of) -> None:
    assert not {name for name in names(parser_of()) if is_secret(name)}


@pytest.mark.parametrize(
    "flag",
    [
        "password", "db_password", "db-password", "passwd", "passw", "pass", "secr", "secret",
        "client_secret", "clientSecret", "hf_token", "token", "api_key", "api-key", "apikey",
        "private.key", "sas_credentials", "credential", "google_application_cred",
        "storage_account_key", "s3_secret", "PASSWORD",
    ],
)  # fmt: skip
def test_a_flag_is_secret_by_its_name(flag: str) -> None:
    for form in ([f"--{flag}=HUSH"], [f"--{flag}", "HUSH"], [f"-{flag}=HUSH"]):
        shown = without_secrets(["python", *form, "--input", "in.parquet"])
        assert "HUSH" not in " ".join(shown)
        assert shown[0] == "python"
        assert shown[-2:] == ["--input", "in.parquet"]


@pytest.mark.parametrize(
    "word",
    [
        "--max_tokens=9", "--token_ids", "--tokenizer=x", "--key_column=id", "--passages=x",
        "--dataflow_kms_key=projects/p/keys/k", "--author=x", "--secs=3", "-c", "-",
        "--prompt=The password is --{text}", "--prompt=--password=x", "password=x", "secret",
    ],
)  # fmt: skip
def test_other_words_stay(word: str) -> None:
    assert without_secrets([word, "value"]) == [word, "value"]


def test_a_secret_flag_without_a_value_hides_no_other_flag() -> None:
    command = ["--use_secret", "--input=x", "--s3_session_token"]
    assert without_secrets(command) == command
    assert without_secrets(["--token", "", "x"]) == ["--token", "REDACTED", "x"]


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("gs://bucket/a?b=c", "gs://bucket/a?b=c"),
        ("--x=https://user:HUSH@host/p", "--x=https://REDACTED@host/p"),
        ("hdfs://user@host/p", "hdfs://user@host/p"),
        (
            "https://h/p?x=1&X-Amz-Signature=HUSH&y=2",
            "https://h/p?x=1&X-Amz-Signature=REDACTED&y=2",
        ),
        ("https://h/p?sig=HUSH", "https://h/p?sig=REDACTED"),
        ("https://h/p?access_token=HUSH", "https://h/p?access_token=REDACTED"),
    ],
)
def test_passwords_and_signatures_of_urls(uri: str, shown: str) -> None:
    assert without_password(uri) == shown
    assert without_secrets([uri]) == [shown]
