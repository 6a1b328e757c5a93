r"""Text with separated fields: CSV as in RFC 4180, and both kinds of TSV.

Lines end at ``\n`` (or ``\r\n``) and nowhere else. ``str.splitlines``, and the ``csv`` module for ``\r``, also break at
characters that real sentences hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from bidora.data.table import Table, from_records
from bilevel.errors import DataError

_QUOTED = r'"([^"]*(?:""[^"]*)*)"'


def parse_csv(text: str, origin: str) -> Table:
    """Reads comma-separated text with a header; a field in double quotes may hold commas and line breaks.

    Raises:
        DataError: A quote is not closed, or a row does not fit the header.
    """
    records = _quoted_records(text, ",", r'(?!")[^,\n]*', origin)
    _, header = next(records)
    table = from_records(origin, header, records)
    if len(header) == 1 and re.search(r"[;\t|]", header[0]):
        raise DataError(
            f"{origin}: expected fields separated by commas, but the header is {header[0]!r}. "
            "Convert the file, or name it .tsv where it is separated by tabs."
        )
    return table


def parse_tsv(text: str, origin: str) -> Table:
    r"""Reads tab-separated text with a header.

    Two kinds exist: in plain ones a quote is a character like any other, in those that spreadsheets and pandas write
    a field with a quote, tab or line break in it is quoted. Text is taken as the second kind if every field with a
    quote in it is properly quoted and all rows fit the header, else as the first.

    Raises:
        DataError: A row does not fit the header.
    """
    if '"' in text:
        try:
            records = _quoted_records(text, "\t", r'[^"\t\n]*', origin)
            _, header = next(records)
            return from_records(origin, header, records)
        except DataError:
            pass
    lines = enumerate(text.split("\n"), 1)
    plain = ((number, line.removesuffix("\r").split("\t")) for number, line in lines)
    _, header = next(plain)
    return from_records(origin, header, plain)


def _quoted_records(text: str, separator: str, unquoted: str, origin: str) -> Iterator[tuple[int, list[str]]]:
    """Yields the rows, each with the number of its first line."""
    pattern = re.compile(rf"(?:{_QUOTED}|({unquoted}))({re.escape(separator)}|\r?\n|\Z)")
    position, line, fields = 0, 1, list[str]()
    first_line = line
    while position < len(text) or fields:
        match = pattern.match(text, position)
        if match is None:
            raise DataError(
                f"{origin}: line {line}: a field starts with a double quote that is not closed before the next "
                "separator. Close it, or write quotes inside a quoted field twice."
            )
        quoted, bare, end = match.groups()
        position = match.end()
        line += match[0].count("\n")
        fields.append(bare.removesuffix("\r") if quoted is None else quoted.replace('""', '"'))
        if end != separator:
            yield first_line, fields
            fields, first_line = [], line
