"""Models and data of the examples. Real data, nothing to download.

The data modules use optional packages only when set up.
"""

from lightning_grad.demos.arithmetic_lm import ArithmeticJSONL, ArithmeticLM
from lightning_grad.demos.arithmetic_policy import ArithmeticPolicy, ArithmeticPrompts
from lightning_grad.demos.comparison import comparison
from lightning_grad.demos.curves import RecordLogger, RecordMetrics
from lightning_grad.demos.digits import DigitsCNN, DigitsData, DigitsMLP
from lightning_grad.demos.docstrings import DocstringData, MiniLMSentences
from lightning_grad.demos.source_text import SourceText
from lightning_grad.demos.summary import PrintSummary
from lightning_grad.demos.threads import LimitThreads
from lightning_grad.demos.tiny_gpt import TinyGPT

__all__ = [
    "ArithmeticJSONL",
    "ArithmeticLM",
    "ArithmeticPolicy",
    "ArithmeticPrompts",
    "DigitsCNN",
    "DigitsData",
    "DigitsMLP",
    "DocstringData",
    "LimitThreads",
    "MiniLMSentences",
    "PrintSummary",
    "RecordLogger",
    "RecordMetrics",
    "SourceText",
    "TinyGPT",
    "comparison",
]
