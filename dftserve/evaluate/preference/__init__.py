"""Which of two texts a judge or a person prefers."""
