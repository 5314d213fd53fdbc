"""Styles: phrases that a model over-uses and word choices, as a profile that decoding applies.

profile.py      what a profile is: the frozen dataclass, its folder, what is refused
automaton.py    phrases as an automaton over tokens, with the chance that each is completed
"""
