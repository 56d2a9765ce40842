"""From the columns of a user's data to inputs and targets: templates, given or chosen by the columns' names."""

import dataclasses
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from promot_jax.data.files import DataFile, DataSet, Record
from promot_jax.errors import UserError, half_character, nearest

MESSAGES = "messages"  # the column of a chat


@dataclasses.dataclass(frozen=True)
class Columns:
    """How rows become inputs and targets."""

    inputs: str  # format strings over the columns; "" for a chat, whose template is the model's
    targets: str
    prefix: str = ""  # as of `Template.prefix`
    chosen: bool = False  # by the names of the columns, not by the user

    @property
    def is_chat(self) -> bool:
        """Whether the rows are chats, in the column `MESSAGES`."""
        return not self.targets


# By the names of columns, in the order of preference. Captions tell a model what is asked where a name says it.
_KNOWN = (
    (("prompt", "completion"), Columns("{prompt}", "{completion}")),
    (("instruction", "input", "output"), Columns("{instruction}\n{input}\n", "{output}")),
    (("instruction", "output"), Columns("{instruction}\n", "{output}")),
    (("input", "target"), Columns("{input}", "{target}")),
    (("inputs", "targets"), Columns("{inputs}", "{targets}")),
    (("input", "output"), Columns("{input}", "{output}")),
    (("question", "answer"), Columns("Question: {question}\nAnswer:", "{answer}", "Question:")),
    (("text", "label"), Columns("Text: {text}\nLabel:", "{label}", "Text:")),
)


def of(settings: DataFile, data: DataSet) -> Columns:
    """Returns the templates that the user gives, or those of columns whose names are known.

    Raises:
        UserError: one template of two is given, one names no column or is no format string, or no name is known.
    """
    columns = data.columns
    # A shell passes on a line break as backslash and n.
    inputs, targets = (template.replace("\\n", "\n") for template in (settings.inputs, settings.targets))
    given = {"INPUT_TEMPLATE": inputs, "TARGET_TEMPLATE": targets}
    if any(given.values()):
        for macro, template in given.items():
            if not template:
                raise UserError(f"{macro} is missing: give INPUT_TEMPLATE and TARGET_TEMPLATE, or neither.")
            for field in _fields(macro, template):
                if field not in columns:
                    raise UserError(
                        f"{macro} names {{{field}}}, which is no column of {data.path}{nearest(field, columns)}."
                    )
        if not _fields("TARGET_TEMPLATE", targets):
            raise UserError("TARGET_TEMPLATE names no column: every target would be the same; write {column} in it.")
        return Columns(inputs, targets)
    if MESSAGES in columns:
        return Columns("", "", chosen=True)
    lower = {name.lower(): name for name in reversed(columns)}
    for names, known in _KNOWN:
        if all(name in lower for name in names):
            exact = {name: f"{{{lower[name]}}}" for name in names}
            return Columns(_format(known.inputs, exact), _format(known.targets, exact), known.prefix, chosen=True)
    shown = ", ".join(columns)
    raise UserError(
        f"The columns of {data.path} are {shown or 'none that all rows have'}, and none is known as input or target: "
        "set INPUT_TEMPLATE and TARGET_TEMPLATE, for instance --gin.INPUT_TEMPLATE='{text} Is this good or bad?' "
        "--gin.TARGET_TEMPLATE='{label}'."
    )


def filled(records: Sequence[Record], columns: Columns) -> Iterator[tuple[Record, str, str]]:
    """Yields each row with its input and target.

    Raises:
        UserError: a column of the templates has no text in some row, or no value that is text; with the rows' lines.
    """
    names = list(dict.fromkeys(_fields("", columns.inputs + columns.targets)))
    optional = _optional(names) if columns.chosen else ()
    empty: dict[str, list[str]] = {}
    for record in records:
        where = record.where
        values = {name: text_of(record.fields.get(name), f"{where}, column {name!r},") for name in names}
        missing = [name for name, value in values.items() if not value.strip()]
        for name in missing:
            if name not in optional:
                empty.setdefault(name, []).append(where)
        if not empty:
            template = columns.inputs
            for name in missing:  # without its line
                template = template.replace(f"\n{{{name}}}", "")
            yield record, _format(template, values), _format(columns.targets, values)
    for name, places in empty.items():
        more = f" and {len(places) - 5} more" if len(places) > 5 else ""
        raise UserError(
            f"There is no text in column {name!r} of {', '.join(places[:5])}{more}; fill it in or leave out those rows."
        )


def _optional(names: Sequence[str]) -> tuple[str, ...]:
    """Columns that may be empty: the input beside an instruction."""
    lower = {name.lower(): name for name in names}
    return (lower["input"],) if lower.keys() >= {"instruction", "input"} else ()


def text_of(value: Any, where: str) -> str:
    """A value of a column as text: "" for a missing one. Raises UserError for a list, an object or half a character."""
    if value is None or value != value:  # NaN, what tables have for a missing value
        return ""
    if not isinstance(value, str | int | float):
        raise UserError(f"{where} has a {type(value).__name__}, which is no text.")
    text = str(value)
    if problem := half_character(text):
        raise UserError(f"{where} {problem}.")
    return text


def _fields(macro: str, template: str) -> list[str]:
    """The columns that a template names. Raises UserError for one that is no format string of plain names."""
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(
            f"{macro} is no template ({error}): write a column as {{name}}, a brace as {{{{ or }}}}."
        ) from error
    if any(field == "" or form or conversion for _, field, form, conversion in pieces):
        raise UserError(f"{macro} has a field without a name or with a format: write {{name}}.")
    return [field for _, field, _, _ in pieces if field]


def _format(template: str, values: Mapping[str, str]) -> str:
    """The template with values in the place of its fields; no attribute or item of a value can be reached."""
    pieces = string.Formatter().parse(template)
    return "".join(text + (values[field] if field else "") for text, field, _, _ in pieces)
