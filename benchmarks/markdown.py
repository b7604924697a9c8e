"""Markdown tables; needs only the standard library, as the peers' environments do."""


def markdown(names, rows):
    """A Markdown table, ending in a newline. names: of the columns. rows: lists of cells."""
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]) + "\n"
