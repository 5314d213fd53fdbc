"""Styles: phrases that a model over-uses and word choices, as a profile that decoding applies.

profile.py      the profile: the frozen dataclass, its folder, and its validation
automaton.py    phrases as an automaton over tokens, with the chance that each is completed
counts.py       finds phrases: runs of words that the model writes more often than people do
spellings.py    the tokenisations of a phrase, and how many of its occurrences they match
tilt.py         how much likelier people are to choose each token than the model is
build.py        builds a profile from a corpus and a model's answers
report.py       shows the contents of a profile
fit.py          corrects λ from what a server writes with the profile in force
"""
