"""English forms of nouns: articles, plurals, number words; the exceptions are those of the scenes' nouns."""

from __future__ import annotations

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

# Said without an article, and the same for any number of them.
PLURAL = frozenset(
    (
        "ballet shoes", "blueberries", "cherries", "chopsticks", "crossed swords", "flexed biceps",
        "french fries", "glasses", "gloves", "grapes", "headphones", "jeans", "pancakes", "piano keys",
        "scissors", "skis", "socks", "sunglasses", "thumbs up",
    )
)  # fmt: skip
MASS = frozenset(
    (
        "bread", "broccoli", "cheese", "corn", "dna", "fire", "garlic", "popcorn", "spaghetti", "sushi",
        "toilet paper", "yarn",
    )
)  # fmt: skip
IRREGULAR = {
    "person": "people", "mouse": "mice", "tooth": "teeth", "die": "dice", "snowman": "snowmen",
    "knife": "knives", "wolf": "wolves", "maple leaf": "maple leaves", "sheep": "sheep", "deer": "deer",
    "fish": "fish", "shrimp": "shrimp", "tomato": "tomatoes", "mango": "mangoes", "volcano": "volcanoes",
    "pile of poo": "piles of poo", "bow and arrow": "bows and arrows",
    "face with sunglasses": "faces with sunglasses", "cloud with rain": "clouds with rain",
}  # fmt: skip


def plural(noun: str) -> str:
    """The plural of a noun phrase, with or without a colour before it ("red circle": "red circles")."""
    if noun in PLURAL or noun in MASS:
        return noun
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    adjective, _, rest = noun.partition(" ")
    if rest in IRREGULAR:
        return f"{adjective} {IRREGULAR[rest]}"
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def one(phrase: str, noun: str | None = None) -> str:
    """A noun phrase with its indefinite article; ``noun`` is its noun, without adjectives."""
    if (noun or phrase) in PLURAL or (noun or phrase) in MASS:
        return phrase
    vowel = phrase[0] in "aeiou" and not phrase.startswith(("unicorn", "one"))
    return f"{'an' if vowel or phrase.startswith('hourglass') else 'a'} {phrase}"


def several(count: int, noun: str) -> str:
    """``count`` of a noun: "a dog", "two dogs", "bread"."""
    if count == 1 or noun in MASS or noun in PLURAL:
        return one(noun)
    return f"{NUMBERS[count]} {plural(noun)}"


def listed(parts: list[str]) -> str:
    """ "a, b and c"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def is_or_are(count: int, noun: str) -> str:
    return "are" if (count > 1 and noun not in MASS) or noun in PLURAL else "is"
