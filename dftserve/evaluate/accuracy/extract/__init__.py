"""What an answer says: the letter, number or function that a reader takes from it, or a refusal.

    choice("The answer is B. A is a distractor.")        # 'B'
    number("9 * 2 = 18\\n\\n#### $1,018.00")               # '1,018.00'
    code("```python\\ndef f(): ...\\n```", "f", prompt)    # the source of a module that defines f
    refuses("I can't help with that.")                   # True

None is an answer that cannot be read, which is not a wrong one. Standard library only: lm-eval's
environment, which has not this package's dependencies, loads it too.
"""

from dftserve.evaluate.accuracy.extract.functions import code
from dftserve.evaluate.accuracy.extract.letters import choice
from dftserve.evaluate.accuracy.extract.numbers import number
from dftserve.evaluate.accuracy.extract.refusals import refuses

__all__ = ["choice", "code", "number", "refuses"]
