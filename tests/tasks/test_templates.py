import pytest

from promot_jax.data import examples
from promot_jax.tasks import metrics, register, templates

ROW = {
    "id": "1",
    "text": "A {solid} film.",
    "answer": "True",
    "country": "France",
    "capital": "Paris",
    "passage": "France lies in Western Europe.",
    "question": "Where does France lie?",
}


def test_a_review_is_asked_in_the_form_of_rte() -> None:
    template = templates.TRUE_FALSE_REVIEW

    assert template.inputs == "{text} question: Is this review positive? Is it true or false? answer:"
    assert template.targets == "{answer}"
    assert template.prefix == ""


def test_labelled() -> None:
    template = templates.labelled("Country", "Capital", "country", "capital")

    assert template == templates.Template("Country: {country}\nCapital:", "{capital}", "Country:")


@pytest.mark.parametrize(
    ("template", "inputs", "targets"),
    [
        (
            templates.TRUE_FALSE_REVIEW,
            "A {solid} film. question: Is this review positive? Is it true or false? answer:",
            "True",
        ),
        (templates.READING, "France lies in Western Europe.\nQ: Where does France lie?\nA:", "True"),
        (templates.labelled("Country", "Capital", "country", "capital"), "Country: France\nCapital:", "Paris"),
        (templates.Template("{{{country}}}", "no field"), "{France}", "no field"),
    ],
)
def test_filled(registry: None, template: templates.Template, inputs: str, targets: str) -> None:
    register.register("template_filled", lambda _: [ROW], template, [metrics.exact_match])

    (example,) = examples.read("template_filled", "test")

    assert (example.inputs, example.targets, example.prefix) == (inputs, targets, template.prefix)
