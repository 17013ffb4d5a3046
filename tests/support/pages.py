"""Tables of the documentation that scripts write: the lines between a marker of their own and `<!-- end -->`."""

from pathlib import Path

END = "<!-- end -->\n"


def split_page(page: Path, start: str) -> tuple[str, str, str]:
    """Return a page up to a marker and with it, the table after it, and the rest from the end of the table on."""
    head, rest = page.read_text(encoding="utf-8").split(start)
    table, tail = rest.split(END, maxsplit=1)
    return head + start, table, END + tail


def replace_table(page: Path, start: str, table: str) -> None:
    """Write a new table after a marker of a page."""
    head, _, tail = split_page(page, start)
    page.write_text(head + table + tail, encoding="utf-8")
