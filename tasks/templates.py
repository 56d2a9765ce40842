"""Templates: format strings over the fields of a row, which make its input and target."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    """The format strings of input and target, filled from the fields of a row."""

    inputs: str  # the query. It ends where the answer begins ("...answer:"), without a trailing space.
    targets: str  # the answer, without a leading space
    # The caption at the start of a query, or "". Post-processing cuts an output at its second occurrence.
    prefix: str = ""
    # The end of a query that stays whole if the text before it is shortened to fit a prompt
    # (`Evaluation.max_input_length`); "" if a query must not be shortened.
    suffix: str = ""


def labelled(question: str, answer: str, question_field: str, answer_field: str) -> Template:
    """Returns the template of two lines, for instance "Country: France" and "Capital:", from captions and fields."""
    return Template(
        inputs=f"{question}: {{{question_field}}}\n{answer}:", targets=f"{{{answer_field}}}", prefix=f"{question}:"
    )


# The form of the paper's NLI templates (table "Input templates": RTE), for a review.
TRUE_FALSE_REVIEW = Template("{text} question: Is this review positive? Is it true or false? answer:", "{answer}")
# The paper's question-answering template after a passage.
READING = Template(inputs="{passage}\nQ: {question}\nA:", targets="{answer}", prefix="Q:")

# The paper's input templates (its table 7), string for string.
TRUE_FALSE = Template("{premise} question: {hypothesis} Is it true or false? answer:", "{answer}")
TRUE_FALSE_NEITHER = Template("{premise} question: {hypothesis} Is it true or false or neither? answer:", "{answer}")
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
    """Returns the paper's translation template for two languages; its fields are `source` and `target`."""
    return Template(inputs=f"Translate {source} to {target}: {{source}}", targets="{target}", prefix="Translate")
