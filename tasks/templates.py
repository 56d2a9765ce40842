"""How a row of a data set becomes an input and a target, as format strings over the row's fields."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    """A pair of format strings, filled from the fields of one row.

    Attributes:
      inputs: the query. It ends where the answer begins ("...answer:"), without a trailing space.
      targets: the answer, without a leading space.
      prefix: the caption that opens a query, or "". Post-processing cuts an output from its second occurrence on.
    """

    inputs: str
    targets: str
    prefix: str = ""


def labelled(question: str, answer: str, question_field: str, answer_field: str) -> Template:
    """Returns the two-line template "Country: France" / "Capital:", from the two captions and the two field names."""
    return Template(
        inputs=f"{question}: {{{question_field}}}\n{answer}:", targets=f"{{{answer_field}}}", prefix=f"{question}:"
    )


# The form of the paper's NLI templates (table "Input templates": RTE), asked about a review.
TRUE_FALSE_REVIEW = Template(
    inputs="{text} question: Is this review positive? Is it true or false? answer:", targets="{answer}"
)
# The paper's question-answering template with the passage in front, as reading needs one.
READING = Template(inputs="{passage}\nQ: {question}\nA:", targets="{answer}", prefix="Q:")
