"""Questions in lessons: choose and check, guess and see; the same words without a kernel."""

import pytest

from evolq_lite.panels import Guess, Quiz

OPTIONS = {"`3`": "No: count *again*.", "4": "Right.", "5 < 6": "No, <b>not</b> this."}


def test_check_says_whether_the_chosen_option_is_right_and_why():
    quiz = Quiz("1. What is `2 + 2`?", OPTIONS, answer=2)
    quiz.check_button.click()
    assert quiz.words == "Choose an answer first."
    for choice, expected in ((1, "✗ No: count"), (2, "✓ Right."), (3, "✗ No, <b>not")):
        quiz.choice.value = choice
        assert quiz.words == ""  # what was said is about another choice
        quiz.check_button.click()
        assert quiz.words.startswith(expected)
    assert "&lt;b&gt;not" in quiz.status.value and 'role="status"' in quiz.status.value
    quiz.close()


def test_options_are_plain_words_and_the_question_keeps_its_code():
    quiz = Quiz("What is `2 + 2`?", OPTIONS, answer=2)
    assert [word for word, _ in quiz.choice.options] == ["3", "4", "5 < 6"]
    assert "<code>2 + 2</code>" in quiz.ui.children[0].value and quiz.choice.value is None
    quiz.close()


def test_a_page_without_a_kernel_shows_question_options_and_explanations():
    quiz = Quiz("What is `2 + 2`?", OPTIONS, answer=2)
    html = quiz._repr_mimebundle_()["text/html"]
    assert "<code>2 + 2</code>" in html and html.count("<details>") == len(OPTIONS)
    assert "<summary>5 &lt; 6</summary>" in html and "count <em>again</em>" in html
    quiz.close()


@pytest.mark.parametrize(("options", "answer"), [(OPTIONS, 0), (OPTIONS, 4), ({"one": "a"}, 1)])
def test_a_quiz_without_a_right_answer_is_refused(options, answer):
    with pytest.raises(ValueError, match="the number of the right one"):
        Quiz("What?", options, answer=answer)


def test_the_same_question_again_takes_the_place_of_the_first():
    first = Quiz("What?", OPTIONS, answer=2)
    second = Quiz("What?", OPTIONS, answer=2)
    assert first.ui.comm is None and second.ui.comm is not None
    second.close()


def test_the_truth_is_hidden_until_it_is_asked_for():
    guess = Guess("How much?", {"4 bits": 8.0, "3 bits": 34.1}, 0, 100, unit="%")
    guess.sliders["4 bits"].value = 20
    assert "truth" not in guess.view.value and "20 %" in guess.view.value and guess.words == ""
    guess.show_button.click()
    assert "The truth: 8 %, 34.1 %" in guess.view.value
    assert guess.words == "4 bits: you 20 %, truth 8 %; 3 bits: you 50 %, truth 34.1 %."
    guess.sliders["3 bits"].value = 30  # a second guess, beside the truth
    assert "3 bits: you 30 %" in guess.words
    guess.close()


def test_a_guess_without_a_kernel_folds_the_truth_away():
    guess = Guess("How much?", {"4 bits": 8.0}, 0, 100, explanation="It is little.")
    html = guess._repr_mimebundle_()["text/html"]
    assert "<summary>The truth</summary>4 bits 8. It is little.</details>" in html
    guess.close()


def test_a_truth_outside_the_range_of_the_guess_is_refused():
    with pytest.raises(ValueError, match="4 bits is 8, outside 10 to 20; widen"):
        Guess("How much?", {"4 bits": 8.0}, 10, 20)
