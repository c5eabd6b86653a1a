"""How answers are found and compared, on problems of our own making."""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poweropd.grading import answers, exact
from poweropd.grading.grader import REASONS, Grader, Rule
from poweropd.grading.shapes import lists_several


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(workers=2, timeout=10.0) as grader:
        yield grader


FOUND = [
    # the last box
    (r"First \boxed{3}, then \boxed{4}.", "4"),
    (r"So $\boxed{\frac{7}{12}}$ is it.", r"\frac{7}{12}"),
    (r"\fbox{9}", "9"),
    (r"It is $\boxed 6$.", "6"),
    (r"\boxed{\text{both } \{1, 2\}}", r"\text{both } \{1, 2\}"),
    (r"We get \boxed{x = 11", None),  # cut short
    (r"Hence $\boxed{31$.", "31"),  # a brace forgotten
    (r"First \boxed{3}, but in the end \boxed{}", None),
    (r"<think>Perhaps \boxed{1}.</think> It is \boxed{2}.", "2"),
    # an empty box, or the bare name of the command, in mid-sentence
    (r"I put it into \boxed{}. The answer is 12.", "12"),
    (r"The answer goes into \boxed{} and it is 12.", "12"),
    (r"As asked, in \boxed form: the answer is 12.", "12"),
    (r"I use \boxed. The answer is 12.", "12"),
    (r"Written in $\boxed$ it is 12", "12"),
    (r"First \boxed{} and then \boxed{12}.", "12"),
    (r"The answer is 12, in \boxed{}.", None),
    (r"The answer is 12, in \boxed", None),
    # a question that the text invents after its answer
    ("2 + 3 = 5\n#### 5\n\nQuestion: What is 3 + 4?\nAnswer: 3 + 4 = 7\n#### 7", "5"),
    ("\\boxed{5}\n\nProblem 2: What is 3 + 4?\n\\boxed{7}", "5"),
    ("Question: What is 2 + 3?\nThe answer is 5.", "5"),
    ("The answer is 5.\nQ: What is 3 + 4?\nA: 7", "5"),
    # a stated answer
    ("4 pens cost 12.\n#### 12", "12"),
    ("She pays 3 * 5 = $<<3*5=15>>15 in all.\n#### 15", "15"),
    ("The answer is $1,350.", "$1,350"),
    ("**Answer: 42 marbles**", "42 marbles"),
    ("**Answer**: 42", "42"),
    ("### Answer\n\n42", "42"),
    ("Final Answer: The final answer is $7$. I hope it is correct. 99", "$7$"),
    ("The answer is 30 because 5 times 6 is 30, not 36.", "30"),
    ("The answer is 5 + 6 = 11.", "5 + 6 = 11"),
    ("The answer is:\n$$\n23\n$$\nwhich has 2 digits.", "$$\n23\n$$"),
    ("The answers are 2 and 9.", "2 and 9"),
    ("So the answer is Rosalind.", "Rosalind"),
    ("Final answer: there are 14 seats left.", "14"),
    ("#### Step 2: add\n2 + 3 = 5\n\nHe has 5.\n#### Result\n", "5"),
    ("#### 1. Count\nThere are 8 and 9, so 17.", "17"),
    ("A: First he buys 4.\nThen he has 4 + 5 = 9 pens.", "9"),
    ("Answer: Let us count the pens. There are 4.\nWith 5 more that makes 9.", "9"),
    ("A: 9", "9"),
    ("The answer is 8.\n<|im_end|>\nThe answer is 9.", "8"),
    # the last number
    ("So he walks 2 km and then 3.5 km.", "3.5"),
    ("The total is 18.", "18"),
    ("Each of the 4 gets $2,500.00!", "$2,500.00"),
    ("The chance is 3/8.", "3/8"),
    (r"Its length is $4\sqrt{3}$.", r"$4\sqrt{3}$"),
    ("The point is (2, -7).", "(2, -7)"),
    ("It rises by 25%.", "25%"),
    ("The area is 40 m^2.", "40"),
    ("Nothing can be said.", None),
    ("", None),
]


@pytest.mark.parametrize(("completion", "answer"), FOUND)
def test_the_answer_is_found(completion: str, answer: str | None) -> None:
    assert answers.extract(completion).answer == answer


#: gold -> (answers that equal it, answers that do not)
EQUALITIES = {
    "14": (
        [
            "14", "14.0", "+14", "014", r"\$14", r"14\text{ kg}", r"14\,\mathrm{m/s}", "14 trees",
            "x = 14", r"\frac{28}{2}", "2 \\cdot 7", "14^\\circ", "14\\%", "7 + 7 = 14", "{14}",
            r"\textbf{14}", r"\sqrt{196}", r"n \approx 14",
        ],
        [
            "13", "-14", "1,4", "1 4", "14x", "14i", "x^2 = 14", "x > 14", "14, 15", "14 or 15",
            r"14 \pm 1", "(14, 14)", r"14\frac{1}{2}", "0.14", "1400", r"\text{none}", "14^2",
        ],
    ),
    "23,450": (["23450", r"23{,}450", r"23\,450", "23 450", "23,450.00"], ["23", "23,45"]),
    r"\frac{5}{8}": (
        ["5/8", "0.625", ".625", r"\dfrac58", r"\frac{10}{16}", r"62.5\%", r"P(B) = \frac58"],
        ["0.62", r"\frac{8}{5}", "62.5", r"\frac{5}{8}x", r"0.625\%"],
    ),
    r"2\frac{3}{4}": (["11/4", "2.75", "2 3/4"], [r"\frac{3}{4}", r"\frac{6}{4}"]),
    r"\frac{2}{7}": (["0.285714", "0.28571"], ["0.2857", "0.29", "0.28572"]),
    r"40\%": (["40", r"40\%", "0.4", "40 percent"], ["4", "0.04", "60"]),
    "40": ([r"40\%"], ["0.4"]),
    r"75^\circ": (["75", "75°", r"75\text{ degrees}", r"\angle A = 75^{\circ}"], ["15"]),
    r"6\sqrt3": ([r"\sqrt{108}", r"6\cdot\sqrt{3}", r"\frac{18}{\sqrt{3}}"], [r"3\sqrt{6}"]),
    "2, 6, 9": (
        ["9, 2, 6", r"\{2, 6, 9\}", r"2, 6 \text{ and } 9", "x = 2, x = 6, x = 9", "2; 6; 9"],
        ["2, 6", "2, 6, 9, 10", "2, 6, 8", "269"],
    ),
    r"4 \pm \sqrt{7}": (
        [r"4+\sqrt{7}, 4-\sqrt{7}", r"x = 4 \pm \sqrt 7", r"\frac{8 \pm \sqrt{28}}{2}"],
        [r"4+\sqrt{7}", r"4 \pm \sqrt{6}"],
    ),
    "(4, 9)": (
        [r"\left(4,\,9\right)", "(x, y) = (4, 9)", "(4.0, 18/2)", "x = 4, y = 9"],
        ["[4, 9]", "(9, 4)", "[4, 9)", "(4, 9, 1)", r"\{4, 9\}", "13"],
    ),
    "[4, 9)": (["4 \\le x < 9", "x \\in [4, 9)"], ["(4, 9)", "[4, 9]", "4, 9", "x < 9"]),
    r"(-\infty, 1) \cup (5, \infty)": (
        [r"(5,+\infty)\cup(-\infty,1)", r"x < 1 \text{ or } x > 5"],
        [r"(-\infty, 1] \cup [5, \infty)", "(1, 5)"],
    ),
    r"\begin{pmatrix} 1/2 \\ -3 \end{pmatrix}": (
        [r"\begin{bmatrix}\frac12\\-3\end{bmatrix}", r"\frac12\begin{pmatrix}1\\-6\end{pmatrix}"],
        [r"\begin{pmatrix} 1/2 \\ 3 \end{pmatrix}", r"\begin{pmatrix} 1/2 \end{pmatrix}"],
    ),
    r"\begin{pmatrix} 1 & 0 \\ 2 & 1 \end{pmatrix}": (
        [r"\left[\begin{array}{cc}1&0\\2&1\end{array}\right]"],
        [r"\begin{pmatrix} 1 & 2 \\ 0 & 1 \end{pmatrix}"],
    ),
    "(a+3)(b-2)": (["ab - 2a + 3b - 6", "(b-2)(a+3)"], ["(a+3)(b+2)", "ab - 6"]),
    "y = 3x - 2": (["3x-2", "3x - y = 2", "y=-2+3x"], ["y = 3x + 2", "x = 3y - 2"]),
    "3x + 4y = 12": (["6x + 8y - 24 = 0"], ["3x + 4y = 11", "12"]),
    "x = 8": (["8", "x=8"], ["y = 8", "-8", "x^2 = 64"]),
    "f(n) = n^2": (["f(x) = x^2", "n^2"], ["f(n) = 2n", "f(n) = n^2 + 1"]),
    r"\tan x": ([r"\frac{\sin x}{\cos x}"], [r"\cot x"]),
    "2 - 7i": (["-7i + 2"], ["2 + 7i", "7i - 2"]),
    "314_6": (["314_{6}", "314"], ["314_7", "118"]),
    r"\text{Wednesday}": (["Wednesday", r"\textbf{wednesday}"], [r"\text{Monday}", "3"]),
    r"\text{(B)}": (["B", "(B)", r"\textbf{(B)}\ 12", "B."], ["A", "(C)", "A, B", "12"]),
    "6.2e-4": ([r"6.2 \times 10^{-4}", "0.00062"], ["6.2", "0.00063"]),
    "k \\ge 3": (["[3, \\infty)", "k \\geqslant 3"], ["k > 3", "k \\le 3", "3"]),
    "9:30": (["9:30"], ["9:20", "19"]),
    "120,180": (["180, 120", "120,180"], ["120", "180, 121"]),
    "3.25": (["3,25"], ["32,5"]),
    r"0.\overline{6}": ([r"\frac{2}{3}"], [r"\frac{3}{5}", "0.6"]),
    "E_{1}+2 E_{2}": (["2E_2 + E_1"], ["E_1 + E_2"]),
    "n!": ([r"n \cdot (n-1)!"], ["n"]),
}  # fmt: skip


@pytest.mark.parametrize("gold", EQUALITIES)
def test_equal_and_different_answers_are_told_apart(gold: str, grader: Grader) -> None:
    equal, different = EQUALITIES[gold]
    pending = [(a, grader.submit(gold, rf"Thus $\boxed{{{a}}}$.")) for a in equal + different]
    correct = [answer for answer, grade in pending if grade.result().correct]
    assert correct == equal


def test_neighbouring_boxes_answer_a_list(grader: Grader) -> None:
    completion = r"The roots are $x = \boxed{4}$ and $x = \boxed{-1}$."
    assert grader.grade("-1, 4", completion).correct
    assert grader.grade("-1", completion).correct  # one answer wanted: the last box
    assert not grader.grade("4", completion).correct


def test_tolerances_apply_as_stated(grader: Grader) -> None:
    two_percent = Rule(relative_tolerance=0.02)
    assert grader.grade("6.1e5", r"\boxed{6.05 \times 10^5}", rule=two_percent).correct
    assert grader.grade("2.5", r"\boxed{\sqrt{6.3}}", rule=two_percent).correct
    assert not grader.grade("6.1e5", r"\boxed{6.3 \times 10^5}", rule=two_percent).correct
    assert not grader.grade("200", r"\boxed{201}", rule=two_percent).correct  # integers are exact
    assert grader.grade("17", r"\boxed{17.08}", rule=Rule(absolute_tolerance=0.1)).correct
    assert not grader.grade("17", r"\boxed{17.2}", rule=Rule(absolute_tolerance=0.1)).correct


def test_lists_keep_their_order_where_the_rule_says(grader: Grader) -> None:
    ordered = Rule(unordered=False)
    assert grader.grade("3, 1, 2", r"\boxed{3,1,2}", rule=ordered).correct
    assert not grader.grade("3, 1, 2", r"\boxed{1,2,3}", rule=ordered).correct


@pytest.mark.parametrize(
    ("gold", "completion", "reason"),
    [
        ("5", r"\boxed{5}", "correct"),
        ("5", r"\boxed{6}", "wrong"),
        ("5", r"\boxed{}", "no_answer"),
        ("5", "I cannot tell.", "no_answer"),
        (r"\frac{", r"\boxed{x+1}", "unparsed_gold"),
        ("x+2", r"\boxed{x + \frac{}", "no_answer"),
        ("x+2", r"\boxed{x \in \frac}", "unparsed_answer"),
    ],
)
def test_reasons(gold: str, completion: str, reason: str, grader: Grader) -> None:
    grade = grader.grade(gold, completion)
    assert (grade.reason, grade.correct) == (reason, reason == "correct")
    assert reason in REASONS


@given(st.text(alphabet=r"\{}()[]$%,.^_=+-/ 0123abx" + "\n", max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_is_read_without_error(text: str) -> None:
    found = answers.extract(text)
    assert found.answer is None or found.answer.strip()
    if found.answer is not None:
        exact.quick("1, 2", found.answer, Rule())
    lists_several(text)


@given(st.fractions(max_denominator=500), st.fractions(max_denominator=500))
@settings(max_examples=200, deadline=None)
def test_fractions_compare_exactly(gold: object, answer: object) -> None:
    verdict = exact.quick(str(gold), str(answer), Rule())
    assert verdict is not None
    assert (verdict.reason == "correct") == (gold == answer)


@pytest.mark.parametrize("gold", ["x + " * 2_000, "\\boxed}" * 2_000, "{" * 6_000])
def test_a_gold_too_long_to_compare_is_right_verbatim_alone(gold: str, grader: Grader) -> None:
    same, other = grader.grade(gold, gold), grader.grade(gold, gold + "1")
    assert same.correct
    assert same.answer == gold.strip()
    assert (other.correct, other.reason) == (False, "unparsed_gold")
