"""Plain notation against LaTeX, matrices and decimal commas, as gold and as answer."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from poweropd.grading.grader import Grader

DATA = Path(os.environ.get("POWEROPD_DATA", Path(__file__).parents[2] / "shared" / "data"))
CASES = DATA.parent / "cases"

#: gold -> (answers that equal it, answers that do not)
NOTATIONS = {
    r"\frac{\pi}{4}": (
        ["pi/4", "π/4", "(1/4)pi", "pi / 4", "0.25*pi", "pi/4 radians"],
        ["pi/3", "4/pi", "pi", "p/4"],
    ),
    r"2\pi r": (
        ["2*pi*r", "2 pi r", "2πr", "2pi r", "2*r*pi", "2pir"],
        ["2*pi*r^2", "2*pi", "2*p*i*r"],
    ),
    r"\sin(2x)": (
        ["sin(2*x)", "sin(2x)", "sin 2x", "2sin(x)cos(x)", "2*sin(x)*cos(x)", r"2 \sin x \cos x"],
        ["sin(x)^2", "sin(x)", "2sin(x)", "cos(2x)", "sin^2(x)"],
    ),
    r"\sin^2 x": (
        ["sin(x)^2", "sin^2(x)", "sin^2 x", "1 - cos^2(x)", "(sin(x))^2", "1-cos(x)**2"],
        ["sin(x^2)", "sin(2x)", "sin(x)"],
    ),
    r"\ln 2": (["ln(2)", "ln 2", "ln2"], ["ln(3)", "2"]),
    r"\ln(x+1)": (["ln(x+1)", "ln(1 + x)"], ["ln(x)+1"]),
    "e^{16}": (
        ["exp(16)", "e^16", "e**16", "e^(16)", "exp(2*8)"],
        ["e^{1}6", "exp(6)", "16", "e^6"],
    ),
    "e^{-x^2}": (["exp(-x^2)", "e^(-x^2)", "exp(-x**2)"], ["exp(x^2)", "e^(-x)^2"]),
    "|x|": (["abs(x)", "Abs(x)", r"\lvert x\rvert", r"\left|x\right|"], ["x", "-x", "abs(x)+1"]),
    "|x-1|+2": (["abs(x-1)+2", "2+abs(1-x)"], ["abs(x-1+2)", "abs(x+1)"]),
    "||x|-1|": (["abs(abs(x)-1)"], ["abs(x-1)"]),
    r"\lfloor n/2\rfloor": (
        ["floor(n/2)", "⌊n/2⌋", r"\left\lfloor \frac{n}{2} \right\rfloor", "floor(0.5*n)"],
        ["ceil(n/2)", "n/2", "floor(n)/2"],
    ),
    r"\lceil n/2\rceil": (["ceil(n/2)", "ceiling(n/2)"], ["floor(n/2)"]),
    r"\sqrt[3]{2}": (
        ["cbrt(2)", "∛2", "2^(1/3)", "2**(1/3)"],
        ["sqrt(2)", "3sqrt(2)", "cbrt(3)", "2^(1/2)"],
    ),
    r"\theta": (["theta", "θ"], ["phi", "t"]),
    r"2\theta": (["2theta", "2*theta", "2 theta", "2θ"], ["theta^2", "theta"]),
    r"\frac{\sqrt{3}}{2}": (
        ["sqrt(3)/2", "√3/2", "(√3)/2", "sqrt3/2", "0.5*sqrt(3)", "sqrt(3/4)", "3^(1/2)/2",
         "sqrt(3) / 2"],
        ["sqrt(3/2)", "√(3/2)", "sqrt(2)/3"],
    ),
    r"\frac{\sqrt{5}-1}{2}": (
        ["(sqrt(5)-1)/2", "(-1+sqrt(5))/2", "(√5 - 1)/2"],
        ["sqrt(5)-1/2", "(sqrt(5)+1)/2", "sqrt(5-1)/2"],
    ),
    r"2\sqrt{3}": (["2√3", "2*sqrt(3)", "2sqrt(3)", "2 sqrt 3", "sqrt(12)", "√12"], ["√6", "2√2"]),
    "e^{2x}": (["e^(2x)", "e^(2*x)", "exp(2x)"], ["e^2x", "e^(2+x)"]),
    "x^{1/3}": (["x^(1/3)", "x**(1/3)", "cbrt(x)", r"\sqrt[3]{x}"], ["x^1/3", "x^(1/2)", "x/3"]),
    "10^{-3}": (["10^(-3)", "10^-3", "1/1000", "0.001", "1e-3"], ["10^3", "-1000", "10-3"]),
    r"\sqrt{1+\sqrt{2}}": (["sqrt(1+sqrt(2))", "√(1+√2)"], ["sqrt(1)+sqrt(2)"]),
    r"\arctan(2)": (["arctan(2)", "atan(2)", "arctan 2"], ["tan(2)"]),
    r"\log_2 5": (
        ["log_2(5)", "log2(5)", "ln(5)/ln(2)", "log_{2}(5)", "log(5)/log(2)"],
        ["log_5(2)", "log(5)"],
    ),
    r"\frac{\alpha+\beta}{2}": (["(alpha+beta)/2", "(α+β)/2"], ["alpha+beta/2"]),
    r"(-\infty,1)\cup(5,\infty)": (
        ["(-oo, 1) U (5, oo)", "(-inf,1) U (5,inf)", "(-infinity, 1) union (5, infinity)"],
        ["(-oo, 1) U (4, oo)"],
    ),
    "2.125": (["2.125"], ["2,125", "2125"]),
    "2,125": (["2125"], ["2.125"]),
    "0.125": (["0,125", "1/8"], ["125"]),
    "3.14": (["3,14"], ["314"]),
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}": (
        [r"\begin{bmatrix}1&2\\3&4\end{bmatrix}",
         r"\left[\begin{array}{cc}1&2\\3&4\end{array}\right]",
         r"\left(\begin{array}{cc}1&2\\3&4\end{array}\right)",
         r"[\begin{matrix}1&2\\3&4\end{matrix}]", "[[1,2],[3,4]]", "((1,2),(3,4))"],
        [r"\begin{bmatrix}1&2\\3&5\end{bmatrix}", "[[1,2],[3,5]]",
         r"\begin{bmatrix}1&3\\2&4\end{bmatrix}"],
    ),
    r"\begin{bmatrix}1\\2\end{bmatrix}": (
        [r"\begin{pmatrix}1\\2\end{pmatrix}", r"(\begin{matrix}1\\2\end{matrix})", "(1,2)",
         "[1,2]"],
        ["(2,1)", r"\begin{pmatrix}1\\3\end{pmatrix}"],
    ),
    "(1,2)": (["(1,2)"], ["[1,2]"]),
    r"\text{beta decay}": (["beta decay", "Beta decay"], ["gamma decay"]),
    "3": (["3 beta particles"], ["3 beta", "3 pi"]),
    "x^{12}": (["x^12", "x**12", "x¹²"], ["x^1 2", "x^2"]),
    "2^{10}": (["2^10", "1024"], ["20"]),
    r"\frac{1}{\sqrt{2}}": (["1/sqrt(2)", "sqrt(2)/2", "2^(-1/2)", "1/√2"], ["1/2"]),
    r"x\cos x": (["x*cos(x)", "xcos(x)", "x cos(x)", "x cos x"], ["cos(x)", "cos(x^2)"]),
    r"\binom{n}{2}": (["n(n-1)/2", "n*(n-1)/2", "binom(n,2)", "binomial(n, 2)"], ["binom(n,3)"]),
    r"\Omega": (["Omega", "Ω"], ["omega"]),
    r"\tan^{-1}(2)": (["arctan(2)"], []),
    r"\sinh x": (["sinh(x)", "(exp(x)-exp(-x))/2", "(e^x-e^(-x))/2"], ["sin(x)", "cosh(x)"]),
    r"\frac{3\pi}{4}": (["3*pi/4", "3pi/4", "(3*pi)/4", "0.75pi"], ["3*pi/2"]),
    r"\pi r^2 h": (["pi*r^2*h", "pi r^2 h", "πr²h", "pi*r**2*h"], ["pi*r*h"]),
    r"\lambda_1": (["lambda_1", "λ_1"], ["lambda_2"]),
    r"\frac{n(n+1)}{2}": (["n*(n+1)/2", "n(n+1)/2"], ["n*(n-1)/2"]),
    r"\max(a,b)": (["max(a,b)"], ["min(a,b)"]),
    r"2\sqrt{x+1}": (["2*sqrt(x+1)", "2√(x+1)"], ["2sqrt(x)+1"]),
    r"\log 5": (["log(5)"], ["log(6)"]),
    r"\exp(2)": (["e^2", "exp(2)", r"\exp 2"], ["2"]),
    r"\operatorname{abs}(x)": (["|x|"], ["x"]),
    r"\sec^2\theta": (["sec(theta)^2", "sec^2(theta)", "1/cos(theta)^2"], ["sec(theta)"]),
    r"e^{i\pi/3}": (["e^(i*pi/3)", "exp(i*pi/3)", "exp(pi*i/3)"], ["e^(pi/3)"]),
    r"\sqrt{\pi}": (["sqrt(pi)", "√π"], ["pi"]),
    r"\frac{\ln 3}{2}": (["ln(3)/2", "(ln 3)/2", "0.5*ln(3)"], ["ln(3/2)", "ln(2)/3"]),
    r"\frac{x^2}{y^3}": (["x^2/y^3", "x**2/y**3"], ["x^3/y^2"]),
    "2^{n+1}-1": (["2^(n+1)-1", "2**(n+1) - 1"], ["2^n+1-1", "2^(n-1)-1"]),
    r"\frac{2\pi}{3}": (["2/3 pi", "2pi/3", "(2/3)π"], [r"\frac{2}{3\pi}", "3/2 pi"]),
    r"\pm\sqrt{3}": (["+/- sqrt(3)", "+-sqrt(3)", "±√3", "sqrt(3), -sqrt(3)"], ["sqrt(3)"]),
    r"\log_3 2": (["ln2/ln3", "ln(2)/ln(3)", "log_3(2)"], ["ln(2/3)", "ln3/ln2"]),
    r"6\sqrt{2}": (["6*sqrt(2) cm", "6√2 units", r"6\sqrt{2}\text{ cm}"], ["6√3 cm", "√12"]),
    r"x \ge 2": (["x >= 2", "[2, oo)", "[2, infinity)"], ["x > 2"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(workers=2, timeout=20.0) as grader:
        yield grader


@pytest.mark.parametrize("gold", NOTATIONS)
def test_notations_are_equal_both_ways(gold: str, grader: Grader) -> None:
    equal, different = NOTATIONS[gold]
    forwards = [(a, grader.submit(gold, rf"\boxed{{{a}}}")) for a in equal + different]
    backwards = [(a, grader.submit(a, rf"\boxed{{{gold}}}")) for a in equal + different]
    for pending in (forwards, backwards):
        assert [answer for answer, grade in pending if grade.result().correct] == equal


@pytest.mark.parametrize("name", ["plain_notation", "grading"])
def test_the_shared_cases(name: str, grader: Grader) -> None:
    path = CASES / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip("the cases are not here: set POWEROPD_DATA to the folder beside it")
    pending = []
    for case in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        completion = case["completion"] if "completion" in case else rf"\boxed{{{case['answer']}}}"
        pending.append((case, grader.submit(case["gold"], completion)))
    assert [c for c, grade in pending if grade.result().correct != c["expected"]] == []
