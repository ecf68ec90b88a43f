"""The words that the embedded model knows, and what each of them means to it.

A fact has up to three keys: a *domain* (harbour), an *office* (master) and a *place* (Veldt); what
needs no domain (the motto of Veldt) has an office alone. Words of one entry mean the same to the
model. All other words are filler: it reads them, copies them, and gives them no meaning.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


DOMAINS: dict[str, tuple[str, ...]] = {
    "harbour": ("harbour", "port", "docks", "harbor"),
    "library": ("library", "books", "archive"),
    "market": ("market", "bazaar", "stalls"),
    "mill": ("mill", "mills", "millstones"),
    "garden": ("garden", "gardens", "park"),
    "school": ("school", "schools", "academy"),
    "hospital": ("hospital", "infirmary", "clinic"),
    "bridge": ("bridge", "bridges", "viaduct"),
    "lighthouse": ("lighthouse", "beacon", "lighthouses"),
    "theatre": ("theatre", "playhouse", "stage"),
    "observatory": ("observatory", "telescope", "telescopes"),
    "prison": ("prison", "jail", "gaol"),
    "stable": ("stable", "stables", "horses"),
    "kitchen": ("kitchen", "kitchens", "galley"),
    "vineyard": ("vineyard", "vineyards", "vines"),
    "forge": ("forge", "smithy", "anvils"),
    "temple": ("temple", "shrine", "sanctuary"),
    "railway": ("railway", "railways", "trains"),
    "treasury": ("treasury", "vaults", "mint"),
    "choir": ("choir", "choirs", "chorus"),
    "orchard": ("orchard", "orchards", "apples"),
    "quarry": ("quarry", "quarries", "stonecutters"),
    "brewery": ("brewery", "breweries", "brewhouse"),
    "museum": ("museum", "museums", "exhibits"),
}
# The first two words of an office, and of what needs no domain, are nouns.
OFFICES: dict[str, tuple[str, ...]] = {
    "master": ("master", "chief", "head", "runs", "leads", "manages", "charge"),
    "clerk": ("clerk", "bookkeeper", "accounts", "ledgers"),
    "inspector": ("inspector", "examiner", "inspects", "examines"),
    "warden": ("warden", "keeper", "guards", "protects", "watches"),
    "engineer": ("engineer", "mechanic", "repairs", "mends", "maintains"),
    "founder": ("founder", "creator", "founded", "established", "began"),
    "deputy": ("deputy", "understudy", "second"),
    "painter": ("painter", "decorator", "paints", "painted", "decorates"),
}
PERSONS: dict[str, tuple[str, ...]] = {  # no domain; the value is somebody's name
    "mayor": ("mayor", "burgomaster", "governs"),
    "poet": ("poet", "bard", "verses"),
    "champion": ("champion", "victor", "unbeaten"),
}
THINGS: dict[str, tuple[str, ...]] = {  # no domain; the value is a few words
    "passphrase": ("passphrase", "password", "watchword"),
    "motto": ("motto", "slogan", "maxim"),
    "anthem": ("anthem", "hymn", "song"),
    "emblem": ("emblem", "symbol", "crest"),
    "festival": ("festival", "feast", "celebration"),
    "dish": ("dish", "meal", "speciality"),
    "treasure": ("treasure", "heirloom", "relic"),
    "mascot": ("mascot", "animal", "creature"),
}
NUMBERS: dict[str, tuple[str, ...]] = {  # no domain; the value is written in digits
    "code": ("code", "combination", "pin"),
    "altitude": ("altitude", "elevation", "height"),
}
ALONE = {**PERSONS, **THINGS, **NUMBERS}

VALUE_WORDS = _words(
    """amber anchor arrow ash badger basil basket beetle bell birch bronze bucket button candle
    canvas cedar chalk cherry clover cobalt comet copper coral cotton crane crimson crystal daisy
    dagger dawn dragon drum dusk eagle ember falcon feather fennel fern fiddle flint fox garnet
    ginger glacier goblet granite hammer harp hazel heron honey indigo iris iron ivory ivy jade
    jasmine juniper kestrel kettle lantern lark lavender lemon lichen lily linen lotus lynx magnet
    mantle maple marble meadow mistletoe moss nettle nutmeg oak obsidian olive onyx opal orchid
    otter owl oyster paper pearl pebble pepper pine plum poppy quartz quill quince raven reed
    ribbon river robin rose ruby saffron sage salt sapphire satchel scarlet shell silk silver
    sparrow spruce squirrel starling straw sulphur swallow tansy teal thimble thistle thunder
    thyme timber topaz tulip turnip velvet violet walnut wax wheat willow winter wolf wren yarrow
    zephyr zinc"""
)
ADJECTIVES = _words(
    """ancient bitter bright broad broken calm careful cheerful clear cold crooked curious damp
    dark deep distant dusty early elder empty faint faithful famous foreign fresh gentle golden
    grey hidden hollow honest humble idle kind late lonely long low merry mild modest narrow noisy
    old pale patient plain polite proud quick quiet rare restless rough rusty sharp shy slow small
    soft solemn steep steady strange sturdy sudden tall thin tidy tired warm weary wild wise
    young"""
)
NOUNS = _words(
    """alley baker balcony barrel bench bird boat bottle boy bread brother carpet carriage cart cat
    cellar chair chimney child cloak cloud coat cobbler coin corner cottage courtyard cousin
    crowd daughter dog door dream family farmer father ferry field fire fisherman floor forest
    fountain friend gate girl goat grandmother guest hat hill house inn island journey juggler
    knight ladder lake lamp lane letter map merchant messenger mine mirror moon morning
    mother mountain music neighbour night notebook opinion parcel path pilot pond pony porch
    procession puzzle quarrel rain road roof room rope rumour sailor seamstress servant shadow
    sheep ship shoe shop sister sky smoke snow soldier son spoon stairs storm story stranger
    street student summer sunset table tailor tale teacher tower town traveller tree tunnel uncle
    valley village visitor voice wagon wall wanderer weather well widow wind window wood
    woodcutter"""
)
VERBS = _words(
    """admired answered avoided borrowed bought called carried caught chased cleaned climbed
    collected counted crossed described discovered drew dropped expected feared filled followed
    forgot found greeted heard helped ignored invited kept left lifted liked lost loved measured
    missed moved noticed offered opened ordered passed praised pulled pushed questioned reached
    remembered returned saw searched sent showed sold stopped studied thanked touched trusted
    visited waited wanted warned washed welcomed wondered"""
)
ADVERBS = _words(
    """afterwards again already always anyway eagerly early everywhere finally gladly hardly
    however instead later meanwhile nearly never nowhere often once perhaps quickly quietly rarely
    sadly seldom silently slowly sometimes soon still suddenly surely together twice usually
    yesterday"""
)
OTHER_WORDS = _words(
    """a about above across after against all along also although am among an and another any are
    around as ask asked at away be because been before behind below beside between beyond both but
    by came can could day days did do does down during each either else enough even ever every
    everybody everyone few first for from full give given go goes gone good had half has have having
    he her here hers him his hour hours how i if in inside into is it its just know known last
    least less let lies like little many may me might mine more most much must my name named near
    need nobody none nor not nothing now of off on one only or other our out over own part people
    person please rather real right said same say says seem several she should since so some
    somebody someone something spoke speak still such tell than thank that the their them then there
    these they thing think this those though three through time to today told too towards travel two
    under until up upon us very want was way we week weeks well were what when where which while who
    whole whom whose why will with within without word words work would year years yes yet you
    your answer question document question facts fact called which hear remind mention mentioned
    according text written currently anyone knows hold holds job post role there's busy open closed
    crowded spring autumn flood war wide north south east west sea coast plain border"""
)
SPECIAL_TOKENS = ("<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")

_ONSETS = _words("b br c cr d dr f fl g gr h k kr l m n p pr qu r s st t th tr v w y z")
_VOWELS = _words("a e i o u ae ei ia oa")
_CODAS = _words("l ld ldt m n nd nt r rn rst s sk st th x")
_ENDINGS = ("", "", "a", "en", "ham", "is", "mere", "o", "um", "wick")
NUM_PLACES = 512


@dataclass(frozen=True, slots=True)
class Role:
    """What a fact is about at some place; ``domain`` is None for what needs no second word."""

    domain: str | None
    office: str

    @property
    def text(self) -> str:
        return self.office if self.domain is None else f"{self.domain} {self.office}"


ROLES = tuple(
    [Role(domain, office) for domain in DOMAINS for office in OFFICES]
    + [Role(None, office) for office in ALONE]
)


@cache
def concept_words() -> Mapping[str, str]:
    """Every word with a meaning to that meaning, places left out."""
    return {
        word: concept
        for table in (DOMAINS, OFFICES, ALONE)
        for concept, words in table.items()
        for word in words
    }


@cache
def filler_words() -> frozenset[str]:
    """Every known word without a meaning."""
    everything = VALUE_WORDS + ADJECTIVES + NOUNS + VERBS + ADVERBS + OTHER_WORDS
    return frozenset(everything) - set(concept_words())


@cache
def place_names() -> tuple[str, ...]:
    """Invented names, the same ones always: Veldt and its neighbours."""
    random = Random(0)
    known = filler_words() | set(concept_words())
    names = {"Veldt": None}
    while len(names) < NUM_PLACES:
        name = "".join(_pick(random, part) for part in (_ONSETS, _VOWELS, _CODAS, _ENDINGS))
        if 4 <= len(name) <= 9 and name not in known:
            names[name.capitalize()] = None
    return tuple(names)


def _pick(random: Random, choices: Sequence[str]) -> str:
    return choices[int(random.random() * len(choices))]


def made_up_names(random: Random) -> Iterator[str]:
    """First and last names of people, each new: no two are alike, none is in the vocabulary."""
    known = {name.lower() for name in place_names()} | filler_words() | set(concept_words())
    seen: set[str] = set()
    while True:
        words: list[str] = []
        while len(words) < 2:
            syllables = [
                _pick(random, "bdfghjklmnprstvwz") + _pick(random, "aeiou")
                for _ in range(2 if random.random() < 0.6 else 3)
            ]
            word = "".join(syllables) + _pick(random, ("", "l", "n", "r", "s"))
            if word not in known:
                words.append(word.capitalize())
        name = " ".join(words)
        if name not in seen:
            seen.add(name)
            yield name
