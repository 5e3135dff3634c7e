"""The words of the synthetic world: its names, its relations, and the sentences that state, correct and ask for them."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from functools import cached_property, lru_cache

SPLITS = ("train", "dev", "test")
MAX_HOPS = 4
UNKNOWN = "unknown"  # the gold of an unanswerable question

# Kinds of things. The three kinds of works share one pool of names.
PERSON, COMPANY, TOWN = "person", "company", "town"
NOVEL, SONG, PAINTING = "novel", "song", "painting"
INSTRUMENT = "instrument"


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Every name is one word of the first list and one of the second; no word stands in two lists.
_PERSON_WORDS = (
    _words(
        """
        Ada Agnes Albert Alma Amos Anton Astrid Basil Beth Boris Carl Celia Clara Colin Cora Dan Della Dora Edgar
        Edith Elsa Emil Ernest Esther Eva Felix Fiona Frida Gilda Greta Gwen Hanna Harold Hector Hugo Ida Igor Iris
        Ivan Jack Jonas Judith Julia Kate Lars Leo Liam Lotte Lydia Magda Marcus Mona Nadia Nils Nora Olga Oscar Otto
        Paula Quinn Ralph Rita Rosa Rufus Selma Simon Tess Ulla Vera Walter Xenia Yuri
        """
    ),
    _words(
        """
        Abbott Baker Barlow Becker Birch Boyd Brandt Brook Burke Carver Cole Conrad Cooper Cross Dalton Decker Doyle
        Draper Drummond Ellis Engel Farmer Fenton Fisher Fowler Frost Garner Gibson Graves Griffin Hagen Hale Hobbs
        Holt Hurst Jansen Keller Kemp Knox Lambert Larkin Lund Marsh Mercer Moss Nash Norris Osborn Palmer Parrish
        Pike Potter Quill Ramsey Reed Rowe Sawyer Shaw Sloan Snow Stokes Tanner Thorn Tucker Vance Voss Walsh Warner
        Webb Weston Yates York
        """
    ),
)
_TOWN_WORDS = (
    _words(
        """
        Big Black Broad Castle Cold Dry East Fair Fort Glen Great High Inner Lake Lesser Little Lone Low Lower Mid
        Middle Mount Near New North Nether Otter Outer Over Port Saint Salt Sandy Sea Short South Steep Stony Sunny
        Swan Three Twin Under Upper West White Wide Windy
        """
    ),
    _words(
        """
        Alder Ashby Barton Bourne Burgh Cliff Combe Crest Croft Dale Dene Dorf Elms Falls Ferry Field Ford Gate Grange
        Grove Haven Heath Hill Holm Hythe Keep Landing Leigh Marlow Meadow Minster Moor Mouth Oaks Pass Pines Pool
        Ridge Sands Shore Springs Stead Thorpe Tower Vale Wells Wick Wood
        """
    ),
)
_COMPANY_WORDS = (
    _words(
        """
        Acorn Amber Anchor Apex Arrow Atlas Beacon Blue Bright Bronze Central Cobalt Comet Copper Crown Crystal Delta
        Eagle Falcon Global Golden Granite Green Harbor Iron Jade Lion Lunar Maple Marble Noble Orbit Orion Pearl
        Phoenix Pioneer Polar Prime Rapid Royal Ruby Silver Solar Steel Swift Titan Union Vector
        """
    ),
    _words(
        """
        Airways Bakery Bank Boats Books Bricks Cables Carpets Chemicals Clocks Dairy Dynamics Electric Energy Engines
        Fabrics Farms Foods Forge Freight Furniture Glass Insurance Labs Leather Lighting Machines Media Metals Mills
        Mining Motors Optics Paper Partners Press Printing Railways Robotics Shipping Software Stores Studios Systems
        Telecom Textiles Tools Weavers
        """
    ),
)
_WORK_WORDS = (
    _words(
        """
        Ancient Bitter Blind Broken Burning Crimson Dancing Distant Endless Fading Falling Fearless Final Floating
        Forgotten Frozen Gentle Hidden Hollow Hungry Invisible Last Lonely Lost Midnight Narrow Peaceful Perfect Quiet
        Restless Scarlet Second Secret Seventh Shining Silent Sleeping Stolen Strange Sudden Tender Thousand Velvet
        Wandering Whispering Wild Winter Wooden
        """
    ),
    _words(
        """
        Angel Autumn Bell Bird Bridge Candle Carnival Circus Clown Cradle Crow Desert Door Dream Feather Fire Flower
        Forest Fox Garden Ghost Guitarist Horse Island Journey Kingdom Lady Lantern Letter Lighthouse Mirror Moon
        Morning Mountain Ocean Orchard Promise Queen Rain River Sailor Shadow Star Stranger Tiger Train Window Wolf
        """
    ),
)
_NAME_WORDS = {
    PERSON: _PERSON_WORDS,
    COMPANY: _COMPANY_WORDS,
    TOWN: _TOWN_WORDS,
    NOVEL: _WORK_WORDS,
    SONG: _WORK_WORDS,
    PAINTING: _WORK_WORDS,
}
INSTRUMENTS = _words(
    """
        accordion banjo bassoon bugle cello clarinet cymbals drums fiddle flute guitar harmonica harp horn lute
        mandolin oboe organ piano saxophone trombone trumpet tuba viola
        """
)


@dataclass(frozen=True)
class Relation:
    """A relation that gives a subject at most one object. Templates: `{s}` subject, `{o}` object, `{old}` wrong one."""

    name: str
    subject: str  # kind
    object: str  # kind
    statements: tuple[str, ...]  # sentences
    questions: tuple[str, ...]  # for the object
    phrases: tuple[str, ...] = ()  # noun phrases for the object; only those that end in {s} can hold another phrase
    changes: tuple[str, ...] = ()  # sentences for an object that became another; none where that cannot happen
    symmetric: bool = False  # the object then has the subject as its own object
    hinted_by: tuple[str, ...] = ()  # relations whose object could be guessed to have this one to their subject

    @cached_property
    def corrections(self) -> tuple[tuple[str, ...], ...]:
        """Groups of sentences that replace what was stated: the world changed, or the statement was wrong."""
        errors = [f"Correction: {text.replace('{o}.', '{o}, not {old}.')}" for text in self.statements]
        errors += [f"Contrary to earlier reports, {text[0].lower()}{text[1:]}" for text in self.statements]
        return (self.changes, tuple(errors)) if self.changes else (tuple(errors),)


RELATIONS = (
    Relation(
        "employer",
        PERSON,
        COMPANY,
        ("{s} works at {o}.", "{s} is employed by {o}.", "The employer of {s} is {o}.", "{s} has a job at {o}."),
        ("Where does {s} work?", "Which company employs {s}?", "What is the employer of {s}?"),
        ("the employer of {s}", "the company that employs {s}", "the company where {s} works"),
        (
            "{s} now works at {o}.",
            "{s} no longer works at {old} but at {o}.",
            "{s} has left {old} and now works at {o}.",
        ),
        hinted_by=("leader", "founder"),
    ),
    Relation(
        "home",
        PERSON,
        TOWN,
        ("{s} lives in {o}.", "The home of {s} is in {o}.", "{s} has a house in {o}."),
        ("Where does {s} live?", "In which town does {s} live?", "Which town is home to {s}?"),
        ("the town that is home to {s}", "the town where {s} lives"),
        ("{s} now lives in {o}.", "{s} no longer lives in {old} but in {o}.", "{s} has moved from {old} to {o}."),
        hinted_by=("mayor",),
    ),
    Relation(
        "birthplace",
        PERSON,
        TOWN,
        ("{s} was born in {o}.", "The birthplace of {s} is {o}.", "{s} is a native of {o}."),
        ("Where was {s} born?", "In which town was {s} born?", "What is the birthplace of {s}?"),
        ("the birthplace of {s}", "the town where {s} was born"),
    ),
    Relation(
        "spouse",
        PERSON,
        PERSON,
        ("{s} is married to {o}.", "The spouse of {s} is {o}.", "{s} lives in a happy marriage with {o}."),
        ("Who is the spouse of {s}?", "Who is married to {s}?", "To whom is {s} married?"),
        ("the spouse of {s}", "the person married to {s}"),
        ("{s} is now married to {o}.", "{s} is no longer married to {old} but to {o}."),
        symmetric=True,
    ),
    Relation(
        "sibling",
        PERSON,
        PERSON,
        ("The only sibling of {s} is {o}.", "{s} has one sibling, {o}.", "{s} grew up with one sibling, {o}."),
        ("Who is the sibling of {s}?", "Which person is the only sibling of {s}?"),
        ("the sibling of {s}", "the only sibling of {s}"),
        symmetric=True,
    ),
    Relation(
        "mentor",
        PERSON,
        PERSON,
        ("{s} is mentored by {o}.", "The mentor of {s} is {o}.", "{s} has a mentor called {o}."),
        ("Who mentors {s}?", "Who is the mentor of {s}?", "By whom is {s} mentored?"),
        ("the mentor of {s}", "the person who mentors {s}"),
        ("{s} is now mentored by {o}.", "{s} is no longer mentored by {old} but by {o}."),
    ),
    Relation(
        "doctor",
        PERSON,
        PERSON,
        ("The doctor of {s} is {o}.", "{s} is a patient of {o}.", "{s} sees a doctor called {o}."),
        ("Who is the doctor of {s}?", "Which doctor treats {s}?", "Whose patient is {s}?"),
        ("the doctor of {s}", "the doctor who treats {s}"),
        ("The doctor of {s} is now {o}.", "{s} is no longer a patient of {old} but of {o}."),
    ),
    Relation(
        "instrument",
        PERSON,
        INSTRUMENT,
        ("{s} plays the {o} well.", "The {o} is the instrument of {s}.", "{s} plays the {o} in a band."),
        ("Which instrument does {s} play?", "What is the instrument of {s}?", "What instrument is played by {s}?"),
        changes=("{s} now plays the {o}.", "{s} no longer plays the {old} but the {o}."),
    ),
    Relation(
        "favorite novel",
        PERSON,
        NOVEL,
        ("The favorite novel of {s} is {o}.", "{s} likes no novel more than {o}.", "{s} loves the novel {o} most."),
        ("What is the favorite novel of {s}?", "Which novel does {s} like best?"),
        ("the favorite novel of {s}", "the novel that {s} likes best"),
        ("The favorite novel of {s} is now {o}.", "The favorite novel of {s} is no longer {old} but {o}."),
    ),
    Relation(
        "favorite song",
        PERSON,
        SONG,
        ("The favorite song of {s} is {o}.", "{s} likes no song more than {o}.", "{s} loves the song {o} most."),
        ("What is the favorite song of {s}?", "Which song does {s} like best?"),
        ("the favorite song of {s}", "the song that {s} likes best"),
        ("The favorite song of {s} is now {o}.", "The favorite song of {s} is no longer {old} but {o}."),
    ),
    Relation(
        "seat",
        COMPANY,
        TOWN,
        ("{s} is based in {o}.", "The head office of {s} is in {o}.", "{s} has its head office in {o}."),
        ("Where is {s} based?", "In which town is {s} based?", "Where is the head office of {s}?"),
        ("the seat of {s}", "the town where {s} is based"),
        (
            "{s} is now based in {o}.",
            "{s} is no longer based in {old} but in {o}.",
            "{s} has moved its head office from {old} to {o}.",
        ),
        hinted_by=("bus company",),
    ),
    Relation(
        "leader",
        COMPANY,
        PERSON,
        ("{s} is led by {o}.", "The head of {s} is {o}.", "{o} leads {s}."),
        ("Who leads {s}?", "Who is the head of {s}?", "By whom is {s} led?"),
        ("the head of {s}", "the person who leads {s}"),
        (
            "{s} is now led by {o}.",
            "{s} is no longer led by {old} but by {o}.",
            "{o} has replaced {old} as head of {s}.",
        ),
    ),
    Relation(
        "founder",
        COMPANY,
        PERSON,
        ("{s} was founded by {o}.", "The founder of {s} is {o}.", "{o} founded {s}."),
        ("Who founded {s}?", "Who is the founder of {s}?", "By whom was {s} founded?"),
        ("the founder of {s}", "the person who founded {s}"),
    ),
    Relation(
        "mayor",
        TOWN,
        PERSON,
        ("The mayor of {s} is {o}.", "{o} is the mayor of {s}.", "{s} has a mayor called {o}."),
        ("Who is the mayor of {s}?", "Which person is the mayor of {s}?"),
        ("the mayor of {s}",),
        (
            "The mayor of {s} is now {o}.",
            "The mayor of {s} is no longer {old} but {o}.",
            "{o} has replaced {old} as mayor of {s}.",
        ),
    ),
    Relation(
        "museum painting",
        TOWN,
        PAINTING,
        ("The museum of {s} shows the painting {o}.", "The museum of {s} has the painting {o}."),
        ("Which painting does the museum of {s} show?", "Which painting is in the museum of {s}?"),
        ("the painting in the museum of {s}", "the painting that the museum of {s} shows"),
        ("The museum of {s} now shows the painting {o}.", "The museum of {s} no longer shows {old} but {o}."),
    ),
    Relation(
        "bus company",
        TOWN,
        COMPANY,
        ("The buses of {s} are run by {o}.", "{o} runs the buses of {s}.", "The bus company of {s} is {o}."),
        ("Which company runs the buses of {s}?", "What is the bus company of {s}?"),
        ("the bus company of {s}", "the company that runs the buses of {s}"),
        ("The buses of {s} are now run by {o}.", "The bus company of {s} is no longer {old} but {o}."),
    ),
    Relation(
        "author",
        NOVEL,
        PERSON,
        ("The author of {s} is {o}.", "{s} is a novel by {o}.", "The novel {s} was written by {o}."),
        ("Who wrote {s}?", "Who is the author of {s}?", "By whom was {s} written?"),
        ("the author of {s}", "the person who wrote {s}"),
    ),
    Relation(
        "setting",
        NOVEL,
        TOWN,
        ("The novel {s} is set in {o}.", "The story of {s} takes place in {o}.", "{s} tells of a summer in {o}."),
        ("Where is {s} set?", "In which town is {s} set?", "Where does the story of {s} take place?"),
        ("the setting of {s}", "the town where {s} is set"),
    ),
    Relation(
        "composer",
        SONG,
        PERSON,
        ("The composer of {s} is {o}.", "The song {s} was composed by {o}.", "The music of {s} is by {o}."),
        ("Who composed {s}?", "Who is the composer of {s}?", "By whom was {s} composed?"),
        ("the composer of {s}", "the person who composed {s}"),
    ),
    Relation(
        "singer",
        SONG,
        PERSON,
        ("The song {s} was first sung by {o}.", "The first singer of {s} was {o}.", "{o} was the first to sing {s}."),
        ("Who first sang {s}?", "Who was the first singer of {s}?"),
        ("the first singer of {s}", "the person who first sang {s}"),
    ),
    Relation(
        "painter",
        PAINTING,
        PERSON,
        ("The painter of {s} is {o}.", "The painting {s} is by {o}.", "{o} painted {s}."),
        ("Who painted {s}?", "Who is the painter of {s}?", "By whom was {s} painted?"),
        ("the painter of {s}", "the person who painted {s}"),
    ),
    Relation(
        "owner",
        PAINTING,
        COMPANY,
        ("The painting {s} belongs to {o}.", "The owner of {s} is {o}.", "{s} is owned by {o}."),
        ("Which company owns {s}?", "To which company does {s} belong?", "What company is the owner of {s}?"),
        ("the owner of {s}", "the company that owns {s}"),
        (
            "The painting {s} now belongs to {o}.",
            "{s} no longer belongs to {old} but to {o}.",
            "{o} has replaced {old} as owner of {s}.",
        ),
    ),
)

_ON_WORKS = (
    "{s} was praised for years.",
    "Few people know much about {s}.",
    "{s} won a prize.",
    "Many talk about {s}.",
)
FILLERS = {  # sentences that state no relation
    PERSON: ("{s} likes long walks.", "{s} is a good cook.", "Many people like {s}.", "{s} collects old coins."),
    COMPANY: ("{s} had a good year.", "{s} is known for good service.", "Many people like {s}.", "{s} sells a lot."),
    TOWN: ("{s} has a small market.", "The summer in {s} is warm.", "Many people visit {s}.", "{s} is an old town."),
    NOVEL: _ON_WORKS,
    SONG: _ON_WORKS,
    PAINTING: _ON_WORKS,
}


@dataclass(frozen=True)
class NamePool:
    """The full names of one split and kind, also by their first and by their last word."""

    names: tuple[str, ...]
    by_word: dict[str, tuple[str, ...]]


def split_of(name: str) -> str:
    """The split that a full name belongs to: about 70 % train, 15 % dev, 15 % test, by a hash that never changes.

    >>> split_of("Ada Abbott"), split_of("Ada Baker")
    ('train', 'dev')
    """
    share = zlib.crc32(name.encode()) % 100
    return "train" if share < 70 else "dev" if share < 85 else "test"


@lru_cache(maxsize=len(SPLITS))
def name_pools(split: str) -> dict[str, NamePool]:
    """The names of a split by kind of thing."""
    pools = {}
    for kind, (firsts, lasts) in _NAME_WORDS.items():
        names = tuple(name for first in firsts for last in lasts if split_of(name := f"{first} {last}") == split)
        by_word: dict[str, list[str]] = {word: [] for word in (*firsts, *lasts)}
        for name in names:
            for word in name.split():
                by_word[word].append(name)
        pools[kind] = NamePool(names, {word: tuple(sharing) for word, sharing in by_word.items()})
    return pools


@lru_cache(maxsize=MAX_HOPS)
def chains(hops: int) -> tuple[tuple[Relation, ...], ...]:
    """Every chain of `hops` different relations, each about the one before's object, where no link hints at the next.

    >>> [link.name for link in chains(2)[0]]
    ['employer', 'seat']
    """
    if hops == 1:
        return tuple((relation,) for relation in RELATIONS)
    return tuple(
        (*chain, relation)
        for chain in chains(hops - 1)
        for relation in RELATIONS
        if relation.subject == chain[-1].object and chain[-1].name not in relation.hinted_by and relation not in chain
    )


@lru_cache(maxsize=1)
def vocabulary() -> tuple[str, ...]:
    r"""Every word (`\w+`, case kept) that documents, questions and answers of any split can have; sorted."""
    texts = [UNKNOWN, *INSTRUMENTS]
    texts += [word for pools in _NAME_WORDS.values() for words in pools for word in words]
    texts += [text for texts_of_kind in FILLERS.values() for text in texts_of_kind]
    for relation in RELATIONS:
        texts += [*relation.statements, *relation.questions, *relation.phrases]
        texts += [text for group in relation.corrections for text in group]
    return tuple(sorted({word for text in texts for word in re.findall(r"\w+", re.sub(r"{\w+}", " ", text))}))
