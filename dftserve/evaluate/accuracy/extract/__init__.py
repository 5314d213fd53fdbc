"""Extract the letter, number or function that a reader would take from an answer, or a refusal.

    choice("The answer is B. A is a distractor.")        # 'B'
    number("9 * 2 = 18\\n\\n#### $1,018.00")               # '1,018.00'
    code("```python\\ndef f(): ...\\n```", "f", prompt)    # the source of a module that defines f
    refuses("I can't help with that.")                   # True

None means that the answer cannot be read, not that it is wrong. Standard library only: this also
runs in lm-eval's environment, which lacks this package's dependencies.
"""

from dftserve.evaluate.accuracy.extract.functions import code
from dftserve.evaluate.accuracy.extract.letters import choice
from dftserve.evaluate.accuracy.extract.numbers import number
from dftserve.evaluate.accuracy.extract.refusals import refuses

__all__ = ["choice", "code", "number", "refuses"]
