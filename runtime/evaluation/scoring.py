"""The scores of answers: metrics as published benchmarks define them, and the statistics of mean scores.

A metric is a function (prediction, answers) -> 0.0 to 1.0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

RELATIVE_TOLERANCE = 0.05
ANLS_THRESHOLD = 0.5
AGREEING_PEOPLE = 3

DIGITS = {
    word: str(value)
    for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}  # fmt: skip
ARTICLES = {"a", "an", "the"}

NEGATED = "ai are ca could did do does had has have is might must need ought sha should was were wo would".split()
WITH_VE = "could i might must not should they we what where who would you".split()
WITH_RE = "they there what why you".split()
WITH_LL = "how it somebody someone something they what who why you".split()
WITH_S = "how somebody someone that there what when where who why".split()
WITH_D = "how it somebody someone something there they where who you".split()

CONTRACTIONS = {
    **{f"{stem}nt": f"{stem}n't" for stem in NEGATED},
    **{f"{stem}ve": f"{stem}'ve" for stem in WITH_VE},
    **{f"{stem}re": f"{stem}'re" for stem in WITH_RE},
    **{f"{stem}ll": f"{stem}'ll" for stem in WITH_LL},
    **{f"{stem}s": f"{stem}'s" for stem in WITH_S},
    **{f"{stem}d": f"{stem}'d" for stem in WITH_D},
    "im": "i'm",
    "oclock": "o'clock",
    "yall": "y'all",
    "maam": "ma'am",
}
"""Contractions without an apostrophe -> with it. Words with a meaning of their own (its, were, well) are left out."""

COMMA_IN_NUMBER = re.compile(r"(?<=\d),(?=\d)")
STOP = re.compile(r"(?<!\d)\.|\.(?!\d)")
PUNCTUATION = re.compile(r"""[;/\[\]"{}()=+\\_\-><@`,?!]""")

NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d{1,3})?)(%?)", re.IGNORECASE)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1 for a prediction that equals an answer except for case, spaces and a final full stop."""
    return float(_plain(prediction) in map(_plain, answers))


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Returns the agreement with the answers of several people (VQA, arXiv 1505.00468, and TextVQA).

    The score is the mean over all people of min(1, other people with this answer / 3). Nobody is compared with
    themselves. Among ten answers, one, two, three and four equal ones give 0.3, 0.6, 0.9 and 1. With fewer than four
    answers, all others must agree.
    """
    answers = [normalized_vqa_text(answer) for answer in answers]
    agreeing = answers.count(normalized_vqa_text(prediction))
    if len(answers) == 1 or agreeing == 0:
        return float(agreeing > 0)
    needed = min(AGREEING_PEOPLE, len(answers) - 1)
    inside, outside = min(1.0, (agreeing - 1) / needed), min(1.0, agreeing / needed)
    return (agreeing * inside + (len(answers) - agreeing) * outside) / len(answers)


def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1 for a number within 5 % of the answer, or for an equal string (ChartQA, arXiv 2203.10244, section 5.1).

    Strings are compared without case.
    """
    return float(any(_is_nearly(prediction.strip(), answer.strip()) for answer in answers))


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1 - edit distance / length of the longer string, for the best answer (arXiv 1907.00490, DocVQA).

    Scores below 0.5 count as 0. Case and runs of blanks do not count, as in the challenge's script.
    """
    similarity = max((_similarity(_spaced(prediction), _spaced(answer)) for answer in answers), default=0.0)
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def normalized_vqa_text(text: str) -> str:
    """Returns `text` in the form in which the VQA challenge compares answers (visualqa.org/evaluation).

    The form is lower case, with number words as digits, without articles, and with apostrophes in contractions.
    Full stops stay only in decimals, and commas between digits are left out. Other punctuation becomes a blank,
    except for apostrophes, colons and currency signs.
    """
    text = COMMA_IN_NUMBER.sub("", text.lower().replace("\u2019", "'"))
    text = PUNCTUATION.sub(" ", STOP.sub("", text))
    words = (DIGITS.get(word, word) for word in text.split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def levenshtein(one: str, other: str) -> int:
    """Returns the fewest insertions, deletions and replacements of characters that turn one string into the other."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        above, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return row[-1]


def _plain(text: str) -> str:
    return _spaced(text).rstrip(". ")


def _spaced(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(one: str, other: str) -> float:
    length = max(len(one), len(other))
    return 1.0 - levenshtein(one, other) / length if length else 1.0


def _is_nearly(prediction: str, answer: str) -> bool:
    found, wanted = _number(prediction), _number(answer)
    if found is None or wanted is None:
        return prediction.lower() == answer.lower()
    return abs(found - wanted) <= RELATIVE_TOLERANCE * abs(wanted)


def _number(text: str) -> float | None:
    """Returns the number that makes up the whole string, or None. Percent are hundredths."""
    match = NUMBER.fullmatch(text)
    if match is None:
        return None
    return float(match[1]) / (100 if match[2] else 1)


Z95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""


def wilson_interval(accuracy: float, n: int) -> tuple[float, float]:
    """Returns the 95 % interval of an accuracy measured on n questions (Wilson 1927).

    For metrics with partial credit the interval is a little too wide, as 0 and 1 are the scores that vary most.
    """
    if n == 0:
        return 0.0, 1.0
    spread = Z95**2 / n
    centre = (accuracy + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * math.sqrt(accuracy * (1 - accuracy) / n + spread / (4 * n))
    # keeps the accuracy inside despite rounding
    return max(0.0, min(accuracy, centre - half)), min(1.0, max(accuracy, centre + half))


def sign_test(better: int, worse: int) -> float:
    """Returns the two-sided p-value of a split at least as uneven, if chance alone changed the scores.

    For scores of 0 and 1 this is McNemar's exact test.
    """
    n, fewer = better + worse, min(better, worse)
    if n == 0:
        return 1.0
    # in logarithms, as 2**-n underflows after a thousand changes
    tail = sum(math.exp(_log_choose(n, k) - n * math.log(2)) for k in range(fewer + 1))
    return min(1.0, 2 * tail)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
