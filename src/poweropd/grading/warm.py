"""Loads the algebra and warms its parser, when the server that forks workers imports it.

The parser builds decision tables from what it parses; workers inherit the tables that are built
here.
"""

from poweropd.grading import comparison
from poweropd.grading.rules import Rule

_PRACTICE = [
    (r"\frac{x^{2}+1}{2 \sqrt{3}}", r"\frac{1}{2}(x^2+1)/\sqrt{3}"),
    (r"-3 \pi + 2 \sqrt[3]{7}", r"2 \cdot 7^{1/3} - 3 \pi"),
    (r"\left(\frac{3}{5}, 8\right]", r"(0.6, 16/2]"),
    (r"e^{-2 t} \cos (\omega t)", r"\cos(\omega t) e^{-2t}"),
    (r"\binom{2n}{n}", r"\frac{(2n)!}{n! n!}"),
    (r"\begin{pmatrix} 1/2 \\ -2 \end{pmatrix}", r"(\frac{1}{2}, 1-3)"),
    (r"x \in (-\infty, 2) \cup [3, \infty)", r"(-\infty, 1+1) \cup [3, \infty)"),
    (r"2x + 3y = 6", r"y = 2 - \frac{2}{3}x"),
    (r"\log_2 3", r"\frac{\ln 3}{\ln 2}"),
    (r"3 + 4i", r"4i + 3"),
    (r"\frac{A_{0} e^{-a t / 2}}{b^{2}+\omega^{2}}", r"\frac{A_0}{b^2+\omega^2} e^{-\frac{at}{2}}"),
    (r"\left\lfloor \frac{n}{2} \right\rfloor + |x - 1|", r"\lceil n / 2 \rceil - x"),
    (r"\sum_{k=1}^{n} k^{2}", r"\sum_{j=1}^{n} (j-1)^2"),
    (r"\arctan \left(\frac{\sqrt{5}-1}{2 \theta}\right)", r"\sin^{2} 2\theta \tan 3"),
    (r"5 \times 10^{-3} \ln 2", r"\frac{1}{200} \log_{10} 7 \cdot \frac{3}{4}"),
    (r"x^{2}+y^{2} \le 4", r"y \ge x - 1"),
    (r"-\frac{1}{\sqrt{2}} \left(a-b\right)^{3}", r"\frac{-(a-b)^3 \sqrt{2}}{2} + 0"),
    (r"f(x+y)=2 x y", r"k(k+1)(2k-1) = \frac{n !}{r! (n-r)!}"),
]

for _gold, _answer in _PRACTICE:
    comparison.compare(_gold, _answer, Rule())
