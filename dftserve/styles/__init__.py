"""Styles: phrases that a model over-uses and word choices, as a profile that decoding applies.

profile.py      what a profile is: the frozen dataclass, its folder, what is refused
automaton.py    phrases as an automaton over tokens, with the chance that each is completed
counts.py       which phrases: runs of words that the model says more often than people
spellings.py    a phrase's tokenisations, and what of it they find
tilt.py         how much likelier people take each token
build.py        from a corpus and answers to a profile
report.py       what a profile holds, for a reader
fit.py          λ, corrected on what a server writes with the profile in force
"""
