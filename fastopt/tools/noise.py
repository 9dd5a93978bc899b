"""How large a difference between two means of a few seeds can be by chance alone.

The measure is Student's: the standard error of the difference from the pooled variance of the two samples, his t with
n1 + n2 - 2 degrees of freedom, two-sided, and Bonferroni's correction when one winner is held against several rivals.
With as many seeds on both sides, as here, unequal variances disturb it little.
"""

import math
import statistics
from collections.abc import Sequence
from functools import lru_cache

SIMPSON_INTERVALS = 256


def half_width(
    first: Sequence[float], second: Sequence[float], confidence: float = 0.95, comparisons: int = 1
) -> float:
    """Half the width of the confidence interval of mean(second) - mean(first).

    A difference larger than this is beyond the noise. NaN when a sample has fewer than two values: then nothing is
    known.

    >>> round(half_width([1.0, 2.0, 3.0], [2.0, 3.0, 4.0]), 4)
    2.267
    """
    if min(len(first), len(second)) < 2:
        return math.nan
    freedom = len(first) + len(second) - 2
    squares = statistics.variance(first) * (len(first) - 1) + statistics.variance(second) * (len(second) - 1)
    standard_error = math.sqrt(squares / freedom * (1 / len(first) + 1 / len(second)))
    return student_quantile((1 - confidence) / comparisons, freedom) * standard_error


@lru_cache(maxsize=1024)
def student_quantile(outside: float, freedom: int) -> float:
    """The t such that Student's variable with that freedom is outside [-t, t] with probability ``outside``.

    >>> round(student_quantile(0.05, 4), 3)
    2.776
    """
    low, high = 0.0, math.pi / 2
    while high - low > 1e-13:
        middle = (low + high) / 2
        low, high = (middle, high) if _outside(middle, freedom) > outside else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _outside(angle: float, freedom: int) -> float:
    """P(|T| > t) at t = sqrt(freedom) tan(angle): then it is an integral of cos^(freedom-1). By Simpson."""
    step = (math.pi / 2 - angle) / SIMPSON_INTERVALS
    heights = [max(0.0, math.cos(angle + i * step)) ** (freedom - 1) for i in range(SIMPSON_INTERVALS + 1)]
    area = step / 3 * (heights[0] + 4 * sum(heights[1::2]) + 2 * sum(heights[2:-1:2]) + heights[-1])
    log_total = 0.5 * math.log(math.pi) + math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2) - math.log(2)
    return area / math.exp(log_total)
