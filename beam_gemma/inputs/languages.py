"""Languages of a translation: their codes, from the settings or from columns of each row.

Only a chat template knows which codes there are, so that it refuses others: those of the settings
before the job starts, and those of a row as that row's error.
"""

from dataclasses import dataclass

from beam_gemma.errors import OptionsError, RecordError
from beam_gemma.inputs.row import ColumnUse, Row
from beam_gemma.inputs.template import column_value

CODES = ("source_lang_code", "target_lang_code")
"""Keys of a part of a message that a template translates."""
PROBES = ("en", "de")
"""Codes that a template is tried with where only rows have some."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageSettings:
    """The languages to translate from and to, each named once or by a column of each row.

    Models whose chat template takes them, those of TranslateGemma, get one text or picture of a
    row.
    """

    source_lang: str | None = None
    """Code of the language to translate from, as `cs`."""
    target_lang: str | None = None
    """Code of the language to translate to, as `de-DE`."""
    source_lang_column: str | None = None
    """Column with the code of the language to translate from, in place of `source_lang`."""
    target_lang_column: str | None = None
    """Column with the code of the language to translate to, in place of `target_lang`."""

    @property
    def has_languages(self) -> bool:
        """True if prompts are texts or pictures to translate."""
        return (self.source_lang or self.source_lang_column) is not None

    @property
    def language_columns(self) -> dict[str, ColumnUse]:
        """Columns that hold codes of languages."""
        columns = (self.source_lang_column, self.target_lang_column)
        return {column: "text" for column in columns if column is not None}

    @property
    def languages(self) -> tuple[str, str] | None:
        """Codes that a template is tried with; those of rows are not known yet. None for none."""
        if not self.has_languages:
            return None
        return self.source_lang or PROBES[0], self.target_lang or PROBES[1]

    def languages_of(self, row: Row) -> tuple[str, str] | None:
        """Return the codes of the languages of a row to translate from and to, or None.

        Raises:
            RecordError: a column has no code.
        """
        if not self.has_languages:
            return None
        return (
            self.source_lang or _code(row, self.source_lang_column),
            self.target_lang or _code(row, self.target_lang_column),
        )

    def check_languages(self) -> None:
        """Check that each of the two languages is said once, or neither.

        Raises:
            OptionsError: one is missing, or said twice.
        """
        said = []
        for name in ("source_lang", "target_lang"):
            given = [n for n in (name, f"{name}_column") if getattr(self, n) is not None]
            if len(given) > 1:
                raise OptionsError(
                    f"{name}: expected a code or a column of codes, got both; leave one of them out"
                )
            said += given
        if len(said) == 1:
            raise OptionsError(
                "source_lang: expected source_lang and target_lang, or columns in their place, got "
                f"{said[0]} alone"
            )


def takes_languages(source: str) -> bool:
    """Return whether a chat template takes codes of languages, as TranslateGemma's does."""
    return all(code in source for code in CODES)


def language_codes(source_lang: str, target_lang: str) -> dict[str, str]:
    """Return the keys of a part of a message that TranslateGemma translates."""
    return dict(zip(CODES, (source_lang, target_lang), strict=True))


def _code(row: Row, column: str | None) -> str:
    assert column is not None, "neither a code nor a column"
    if isinstance(row, str):
        raise RecordError(f"column {column!r}: expected in every row, got a row that is a text")
    code = column_value(row, column)
    if not isinstance(code, str) or not code:
        raise RecordError(f"column {column!r}: expected the code of a language, got {code!r}")
    return code
