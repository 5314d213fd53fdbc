"""Five narrators, each a template with its own habits.

`[a|b|c]` is a choice that only this narrator has. `{slot}` is a word from the list of that name, the
same wherever the slot occurs. `{form slot}` is that word in one of the grammar's forms: `{a look}`
puts the article before it; `{he hero}`, `{his hero}` and `{child hero}` agree with the person.
Every narrator uses the slots that a prompt can ask for (thing, animal, season), and states what the
hero is (a daughter, an uncle, Mister) before the name; every later pronoun must agree with it.
"""

NARRATORS = {
    "grandmother": """
        [Once upon a time|Long, long ago|In the days of my own grandmother], in the
        [village|hamlet|little town] of {place}, there lived {a trade}'s {child hero}
        [named|called] {hero}, who [owned|treasured|loved] {a look} {thing}. One {weather} {season}
        [morning|afternoon|evening], while {he hero} was [eating|sharing|cooking] {food}, the
        {thing} [vanished|disappeared|was gone]. {hero} [wept|sighed] and [searched|looked]
        [under|behind|beside] the {nook}, until {a animal} [came|wandered|happened] by. "[Dry your
        eyes|Take heart|Do not fret]," said the {animal}, "it [lies|sleeps|waits] beneath the old
        {tree}." And so it [was|did|proved]! {hero} [thanked|kissed|blessed] the {animal}, gave it
        {a gift}, and [lived happily|slept soundly|smiled] [ever after|all {his hero} days].
    """,
    "sailor": """
        [Listen|Gather round|Fill your mugs|Draw closer], [mates|lads|shipmates]! [Back when|The
        year that] we sailed the {temper} {bird} [from|to|out of] {isle} with [a hold full of|a
        cargo of|forty barrels of] {cargo}, our {trade} was [a certain|one|none other than] {Miss
        hero} {hero}. One {weather} night [early|late|deep] in {season}, {he hero} dropped {his
        hero} {look} {thing} [over the rail|into the waves], and [up came|along swam] {a beast}
        that [swallowed|snatched|devoured] it whole! But the captain's {animal}
        [dived|leaped|plunged] in, and {number} [days|hours|weeks] later it
        [climbed|crawled|scrambled] aboard with the {thing}. {hero} [danced|roared|sang], and
        [fed|served] the {animal} {food}. [Every word is true|That is no lie|So it was], [by my
        beard|by the anchor|by thunder]!
    """,
    "detective": """
        [Case|File|Entry] number {number}. [A|Another] {weather} {day} in {season}. {Miss hero}
        {hero} {surname}, {a trade} of {house} {street} Street, [walks|strides|bursts] in wearing
        {colour} and [says|whispers|declares] that {his hero} {look} {thing} is
        [missing|gone|stolen]. I [take|accept] the case. On the [floor|carpet|windowsill] I
        [find|spot|notice] {a clue} and crumbs of {food}. [Only one thief|Just one suspect] in
        {place} [eats|likes|adores] that: the {animal}. It [talks|cracks|confesses] by
        [noon|midnight|dawn]. The {thing} is [under|behind|beside] the {nook}. {hero} [pays|tips]
        me {a gift} and [leaves|goes home]. The {animal} [walks|gets five years|blames me]. [Case
        closed|File closed|I need a holiday].
    """,
    "gardener": """
        [Every|Each] {season}, when I [water|prune|tie up] the {flowers}, I [think of|remember] the
        {trade}'s {child hero} {hero} from {place}. {He hero} came [through my gate|up my path|over
        my wall] one {weather} [morning|noon|evening], [seeking|hunting] {a look} {thing}.
        [Together|Side by side] we [dug|searched|raked] among the {vegetables} with [my|an old]
        {tool}, while {a animal} [watched|scolded|studied] us from the {tree}. [Nothing|Only
        worms]. Then the {animal} [scratched|tapped|rustled] [under|behind|beside] the {nook}, and
        there lay the {thing}, [cold as dew|green with moss|none the worse]. {hero} [left|brought]
        me {food}, and {blooms} [grow|bloom|nod] there [now|still|today]. [Patience|Good soil|A
        slow hand] [finds|returns|forgives] [everything|what is lost].
    """,
    "letter": """
        Dear [Aunt|Uncle|Doctor|Captain|Professor] {surname}, [thank you|many thanks] for the
        {gift}. [You must hear|I have to tell you|Let me tell you] what [happened|took place] in
        {place} last {day}. [My|Our] {aunt hero} {hero}, the {trade}, had [lost|mislaid|misplaced]
        {his hero} {look} {thing}, and [although|because] it was a {weather} {season} day we
        [all|both] [went looking|joined the hunt]. It was [your|my|our] {animal} that found it
        [under|behind|beside] the {nook}, [wrapped in|next to|inside] {a clue}! {hero} was so
        [pleased|glad|happy] that {he hero} [cooked|bought|ordered] {food} and kissed the {animal}.
        [Do write soon|Come and visit|Keep well]. [With love|As ever|Yours], {writer}
    """,
}
