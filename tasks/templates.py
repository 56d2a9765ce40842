"""How a row of a data set becomes an input and a target, as format strings over the row's fields."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    """A pair of format strings, filled from the fields of one row.

    Attributes:
      inputs: the query. It ends where the answer begins ("...answer:"), without a trailing space.
      targets: the answer, without a leading space.
      prefix: the caption that opens a query, or "". Post-processing cuts an output from its second occurrence on.
      suffix: how a query ends that may be shortened in front of that, when it is longer than a prompt may be
        (`Evaluation.max_input_length`); "" when it has to stay whole.
    """

    inputs: str
    targets: str
    prefix: str = ""
    suffix: str = ""


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

# The paper's input templates (its table 7), string for string.
TRUE_FALSE = Template(
    inputs="{premise} question: {hypothesis} Is it true or false? answer:",
    targets="{answer}",
)
TRUE_FALSE_NEITHER = Template(
    inputs="{premise} question: {hypothesis} Is it true or false or neither? answer:",
    targets="{answer}",
)
SAME_SENSE = Template(
    inputs=(
        "{sentence1} {sentence2} question: The word {word} is used in the same way in the two sentences. "
        "Is it true or False? answer:"
    ),
    targets="{answer}",
)
CHOICES = Template(inputs="Q: {question} A) {a} B) {b} C) {c} D) {d} A:", targets="{answer}", prefix="Q:")
QUESTION = Template(inputs="Q: {question} A:", targets="{answer}", prefix="Q:")
SUMMARY = Template(
    inputs="Article: {article} One sentence summary:",
    targets="{summary}",
    prefix="Article:",
    suffix=" One sentence summary:",
)


def translation(source: str, target: str) -> Template:
    """Returns the paper's translation template, from two languages' names; the fields are `source` and `target`."""
    return Template(inputs=f"Translate {source} to {target}: {{source}}", targets="{target}", prefix="Translate")
