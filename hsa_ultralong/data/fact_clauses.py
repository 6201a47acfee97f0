"""Facts in clauses of an open vocabulary: patterns of syntax x verbs and nouns, many of which are made up.

A form of ``fact_templates.py`` is learnt by its words. Here a question has its verb, nouns and preposition in common
with the statement and nothing else, so the word order and the question word must tell which part is asked for. No
pattern has the function words of a frozen evaluation form in its order (tests/eval/tasks/test_leaks.py). Called by
``fact_forms.py``; tested in ``tests/data/test_fact_clauses.py``.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from hsa_ultralong.data.fact_values import Draw

# base past participle, regular ones by their base alone
_VERBS = """
    add admire adopt advise analyse announce answer approve arrange assemble attach auction award bake balance
    bend=bent=bent bless boil bounce bow brew brush cancel capture cast=cast=cast catch=caught=caught cease
    chain change chase check clip collect colour comb compare compose copy count cover crack cultivate
    cut=cut=cut damage deal=dealt=dealt decorate deliver demand detect dig=dug=dug display divide drag dry dust
    empty enjoy escort examine exchange exhibit export fasten feed=fed=fed fetch fill filter find=found=found
    fire fix fold forge=forged=forged frame fry gather glue grab greet grind=ground=ground guess hammer
    hang=hung=hung harvest heat hoist hunt imitate inspect install invite iron join juggle kick kiss label land
    launch lay=laid=laid lead=led=led list load lock mark melt mend mention mix mount move nail name observe
    offer open pack park paste pass photograph pile plan play pour praise preserve press print promise
    protect publish pull push question race raise recite record refuse remove rent replace report rinse roast
    roll sail save scatter scratch seal seek=sought=sought select send=sent=sent serve set=set=set
    sew=sewed=sewn shake=shook=shaken share show=showed=shown sign sing=sang=sung sketch smell solve sort spill
    spin=spun=spun split=split=split spot spread=spread=spread stack stamp store stretch strike=struck=struck
    string=strung=strung supply surround swallow sweep=swept=swept swing=swung=swung take=took=taken taste
    tear=tore=torn test tie toss touch trace trade transport trap treat trim turn unload unpack unroll update
    wash watch water weave=wove=woven weigh wind=wound=wound wipe wrap
"""
_NOUNS = """
    apple arch arm attic axle barn barrel basin basket bath beam bed bell belt bench bird board boat bone book bottle
    bowl box bridge broom bucket button cabin cable cage cake candle canvas card carpet cart cave ceiling cellar chair
    chapel chest chimney church clock cloth club coat coffin coin collar column corner cottage counter court cradle
    crown cup curtain desk dish ditch dog dome drawer dress drum farm fence field file flag floor flute frame gallery
    gate glove goat grave guest guitar hall hammer handle hat hedge hill hook horse house inn jar judge kitchen knife
    ladder lake lane leg letter library lid lock log map market mast mill mine mouth nest net office oven page
    palace pan park pen pillar pillow pipe pit plate pocket pole pond porch port pot prison pump purse rack raft rail
    rider ring road robe rock roof room rope sail salon school screen seat shed shield shirt shoe shop shore
    singer soldier spade spoon stable stage staircase stall statue stone stool storm stove street string student table
    tailor tank tent throne ticket tile tower track trader train tray tree trench trunk tube tunnel valley van vase
    village wagon wall waiter watch weaver well wheel window wing worker yard
"""
_STARTS = """
    b bl br ch cl cr d dr dw f fl fr g gl gn gr h j k kl kr l m n p pl pr qu r s scr sk sl sm sn sp spl st str
    sw t thr tr tw v w wr y z
"""
_CORES = "a ai ar e ea ee er i ie il im in o oa oo or ou u un ur"
_ENDS = "b ck d ff g lk lm lp m mp n nd nk nt p rb rd rf rk rm rn rp sh sk sp st t th tt x zz"
_PREPOSITIONS = """
    above across against along among around at behind below beneath between beyond by close_to far_from
    in_front_of inside near next_to off outside over past through under underneath within without
"""
_AGENTS = """
    they people the_others some_of_us several_men the_neighbours both_sisters all_of_them the_old_man
"""
_SINGLE_AGENTS = "she he someone the_owner a_stranger the_child my_aunt"
_ADVERBS = """
    again always carefully every_day gladly in_secret last_week long_ago never once often quietly slowly soon
    twice yesterday
"""
# statement | questions, divided by a semicolon | kind of the value | subject. S agent; V, W verbs: 0 base, 1 past,
# 2 participle, 3 third person; n, m nouns, ns, ms their plurals; r preposition; a adverb. Below -- validation's
_PATTERNS_TEXT = """
    {S} {V1} {v} {r} the {n} of {x}|What did {S} {V0} {r} the {n} of {x}?|what|thing //
    {S} {V1} {v} {r} {x}|What did {S} {V0} {r} {x}?;What was it that {S} {V1} {r} {x}?|what|thing //
    {p} {V1} {v} {r} {x}|What did {p} {V0} {r} {x}?;What has {p} {V2} {r} {x}?|what|both //
    {r} {x} {S} {V1} {v}|What did {S} {V0} {r} {x}?|what|thing //
    {r} the {n} of {x}, {p} {a} {V1} {v}|What did {p} {a} {V0} {r} the {n} of {x}?|what|both //
    {v} was {V2} {r} the {n} of {x}|What was {V2} {r} the {n} of {x}?|what|thing //
    {v} was {V2} {r} {x} by {S}|What was {V2} {r} {x} by {S}?;What did {S} {V0} {r} {x}?|what|thing //
    the {n} {r} {x} {V1} {v}|What did the {n} {r} {x} {V0}?|what|thing //
    the {n} of {x} {V3} {v}|What does the {n} of {x} {V0}?|what|any //
    {V2} {r} {x}, {v} was {W2} by {S}|What was {W2} by {S} {r} {x}?|what|thing //
    what {S} {V1} {r} {x} was {v}|What did {S} {V0} {r} {x}?|what|thing //
    {p} {V1} {v} {ns}|How many {ns} did {p} {V0}?|count|person //
    {p} {V1} {v} {ns} {r} {x}|How many {ns} did {p} {V0} {r} {x}?|count|both //
    {S} {V1} {v} {ns} {r} {x}|How many {ns} did {S} {V0} {r} {x}?|count|thing //
    {v} {ns} were {V2} {r} {x}|How many {ns} were {V2} {r} {x}?|count|thing //
    {v} {ns} {V1} {x}|How many {ns} {V1} {x}?|count|any //
    there are {v} {ns} {r} the {n} of {x}|How many {ns} are there {r} the {n} of {x}?|count|thing //
    {x} has {v} {ns} and one {m}|How many {ns} does {x} have?|count|any //
    the {n} of {x} {V3} {v} {ms}|How many {ms} does the {n} of {x} {V0}?|count|any //
    the {n} of {x} was {V2} with {v} {ms}|With how many {ms} was the {n} of {x} {V2}?|count|thing //
    when {x} {V1}, its {n} {W1} {v} {ms}|How many {ms} did the {n} of {x} {W0}?|count|thing //
    before {x} was {V2}, {S} {W1} {v} {ns}|How many {ns} did {S} {W0} before {x} was {V2}?|count|thing //
    after {p} {V1}, {S} {W1} {v} {ns}|How many {ns} did {S} {W0} after {p} {V1}?|count|person //
    {p} {V1} the {n} {v} {ms} {a}|How many {ms} did {p} {V0} the {n}?|count|person //
    {p} {V1} {x} for {v}|For whom did {p} {V0} {x}?;Who did {p} {V0} {x} for?|name|both //
    {p} {V1} {x} with {v}|With whom did {p} {V0} {x}?;Who {V1} {x} with {p}?|name|both //
    {p} {V1} {x} instead of {v}|Instead of whom did {p} {V0} {x}?|name|both //
    {x} was {V2} to {v} by {p}|To whom was {x} {V2} by {p}?;Who was {x} {V2} to by {p}?|name|both //
    {x} was {V2} by {v}|By whom was {x} {V2}?;Who {V1} {x}?|name|thing //
    {v} {V1} {x} {r} the {n}|Who {V1} {x} {r} the {n}?;By whom was {x} {V2} {r} the {n}?|name|thing //
    {v} {V1} the {n} of {x}|Who {V1} the {n} of {x}?|name|any //
    the {n} of {x} was {V2} by {v}|Who {V1} the {n} of {x}?;By whom was the {n} of {x} {V2}?|name|any //
    it was {v} who {V1} {x}|Who {V1} {x}?|name|thing //
    {p} {V1} {v} {r} the {n}|Whom did {p} {V0} {r} the {n}?;Who was {V2} by {p} {r} the {n}?|name|person //
    {S} {V1} {p} and {v} {r} the {n}|Whom apart from {p} did {S} {V0} {r} the {n}?|name|person //
    the {n} {r} {x} was once {V2} by {v}|Who once {V1} the {n} {r} {x}?|name|thing //
    {p} {V1} the {n} in {v}|Where did {p} {V0} the {n}?;In which place did {p} {V0} the {n}?|place|person //
    {x} was {V2} near {v}|Where was {x} {V2}?;Near which place was {x} {V2}?|place|any //
    {p} was {V2} near the {n} of {v}|Near which {n} was {p} {V2}?;Where was {p} {V2}?|place|person //
    in the {n} of {v} {p} was {V2}|In which {n} was {p} {V2}?;Where was {p} {V2}?|place|person //
    in the {n} {v}, {S} {V1} {x}|In which {n} did {S} {V0} {x}?;Where did {S} {V0} {x}?|place|any //
    the {n} that {V1} {x} lies in {v}|Where does the {n} lie that {V1} {x}?|place|any //
    {S} {V1} {x} from {v}|From where did {S} {V0} {x}?;Where did {S} {V0} {x} from?|place|any //
    {S} {V1} {x} all the way to {v}|Where did {S} {V0} {x} to?;To which place did {S} {V0} {x}?|place|any //
    {p} {V1} that {x} had been {W2} in {v}|Where had {x} been {W2}?;Where was {x} {W2} according to {p}?|place|both //
    few {ns} {V1} that {x} was {W2} away to {v}|Where was {x} {W2} away to?|place|thing //
    it was {V2} that {x} {W1} in {v}|Where did {x} {W0}?|place|any //
    {p}, a {n}, {V1} {v} {a}|Which place did {p} {V0} {a}?;What did the {n} {p} {V0}?|place|person //
    the {n} of {p} {V3} at {v}|When does the {n} of {p} {V0}?;At what time does the {n} of {p} {V0}?|time|person //
    {x} {V3} at {v} {a}|When does {x} {V0}?;At what time does {x} {V0} {a}?|time|any //
    at {v} the {n} {r} {x} {V3}|When does the {n} {r} {x} {V0}?|time|thing //
    {S} will {V0} {x} at {v}|When will {S} {V0} {x}?|time|any //
    {x} will be {V2} on {v}|When will {x} be {V2}?;On which day will {x} be {V2}?|date|any //
    on {v}, the {n} {V1} {x}|When did the {n} {V0} {x}?;On what date did the {n} {V0} {x}?|date|any //
    {S} {V1} {x} on {v}|When did {S} {V0} {x}?;On which day did {S} {V0} {x}?|date|any //
    since {v} nothing has been {V2} {r} {x}|Since when has nothing been {V2} {r} {x}?|date|thing //
    in {v} {S} {V1} {x}|In which year did {S} {V0} {x}?;When did {S} {V0} {x}?|year|any //
    {p} {V1} {x} for {v}|For how much did {p} {V0} {x}?|price|both //
    {S} {V1} {v} of {ns} {r} {x}|How much did {S} {V0} {r} {x}?|amount|thing //
    {p} {V1}: "{v} {W3} {x}."|What {W3} {x} according to {p}?;According to {p}, what {W3} {x}?|text|both //
    {p} {V1}: "{x} {W3} {v}."|According to {p}, what does {x} {W0}?;What does {x} {W0}, as {p} {V1}?|text|both //
    "{x} {W3} {v}," {V1} {p}|According to {p}, what does {x} {W0}?|text|both //
    "the {n} of {x} is {v}," {V1} {p}|What is the {n} of {x}, according to {p}?|what|both //
    "if you {W0} {v}, {x} will {V0}," said {p}|What must one {W0} so that {x} will {V0}?|text|both //
    only {v} {V3} the {n} of {x}|What {V3} the {n} of {x}?|text|any //
    to {V0} {x}, {W0} {v}|What must one {W0} to {V0} {x}?;How does one {V0} {x}?|text|thing //
    {x} {V1} because of {v}|Because of what did {x} {V0}?;Why did {x} {V0}?|text|any //
    {x} was {V2} into a {v}|Into what was {x} {V2}?;What was {x} {V2} into?|word|any //
    {x} {V3} like a {v}|What does {x} {V0} like?|word|any //
    {x};{v};{n}|What is listed for {x}?;Which {n} is listed for {x}?|record|any //
    {n}: {x} / {v}|What is the {n} of {x}?;Which {n} belongs to {x}?|record|any //
    | {n} | {x} | {v} ||What stands in the table for {x}?;Which {n} does the table give for {x}?|record|any //
    | {x} | {n} | {v} ||What stands in the line of {x}?;Which {n} is in the line of {x}?|record|any //
    {x}\t{v}|What is written behind {x}?;Which {n} is written behind {x}?|record|any //
    {x} | {v}|What is next to {x}?;Which {n} is next to {x}?|record|any //
    {x} ..... {v}|What does the list say for {x}?;Which {n} has {x} on the list?|record|any //
    the {n} of {x}, a {m}, is {v}|What is the {n} of {x}?|what|any //
    the {n} {m} of {x} is {v}|What is the {n} {m} of {x}?;Which {n} {m} does {x} have?|what|any //
    one {n} {m} for {x} is {v}|What is the {n} {m} for {x}?;Tell me the {n} {m} for {x}.|what|any //
    the {n} {m} {x} {V3} is {v}|Which {n} {m} does {x} {V0}?|what|any
    --
    {S} {V1} {x} and found {v} {r} the {n}|What did {S} find {r} the {n} of {x}?|what|thing //
    had {p} not {V2} {v} {ns}, {x} would be lost|How many {ns} has {p} {V2}?|count|both //
    {x} was {V2} as a favour to {v}|As a favour to whom was {x} {V2}?|name|thing //
    far away in {v}, {p} {V1} a {n}|Where did {p} {V0} a {n}?|place|person //
    not before {v} will {x} {V0}|When will {x} {V0}?|time|any //
    {p} swears that {v} {V3} {x}|What {V3} {x}, as {p} swears?|text|both //
    {x} = {v} ({n})|What does {x} equal?|record|any
"""
_KINDS = {
    "what": ("number", "number", "number", "word", "pair", "code", "long"),
    "count": ("number",),
    "record": ("number", "number", "word", "code", "name", "place", "date"),
    "text": ("pair", "pair", "word", "word"),
}
_SLOT = re.compile(r"\{([SVWnmra])([0-3s]?)\}")
# share of verbs and nouns that are made up
_MADE_UP = 0.45
# of the listed verbs and nouns, every so many is validation's alone
_HELD_OUT = 8


class Verb(NamedTuple):
    base: str
    past: str
    participle: str
    third: str


class Clause(NamedTuple):
    """A statement with {x}, {v} and sometimes {p}, its questions, the kinds of value and subject."""

    statement: str
    questions: tuple[str, ...]
    value: str
    subject: str


def plural(word: str) -> str:
    """With an s, as a noun's plural and a verb's third person are spelt."""
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return f"{word}es"
    return f"{word[:-1]}ies" if re.search(r"[^aeiou]y$", word) else f"{word}s"


def regular(base: str) -> Verb:
    """A verb whose past ends in -ed."""
    past = f"{base}d" if base.endswith("e") else f"{base}ed"
    if re.search(r"[^aeiou]y$", base):
        past = f"{base[:-1]}ied"
    elif re.fullmatch(r"[^aeiou]*[aeiou][bdgmnpt]", base):
        past = f"{base}{base[-1]}ed"
    return Verb(base, past, past, plural(base))


def made_up(draw: Draw) -> str:
    """A word that is none, of one or two syllables, such as "drint" or "splaboosk"."""
    first = f"{draw.pick(_BEGINNINGS)}{draw.pick(_MIDDLES)}" if draw.chance(0.4) else ""
    return f"{first}{draw.pick(_BEGINNINGS)}{draw.pick(_MIDDLES)}{draw.pick(_ENDINGS)}"


def _spaced(text: str) -> tuple[str, ...]:
    return tuple(one.replace("_", " ") for one in text.split())


def _verb(text: str) -> Verb:
    base, *others = text.split("=")
    return Verb(base, others[0], others[1], plural(base)) if others else regular(base)


def _read(text: str) -> tuple[Clause, ...]:
    found = []
    for entry in text.strip().split(" //\n"):
        statement, questions, value, subject = entry.strip().rsplit("|", 3)
        found.append(Clause(statement, tuple(questions.split(";")), value, subject))
    return tuple(found)


_BEGINNINGS, _MIDDLES, _ENDINGS = _STARTS.split(), _CORES.split(), _ENDS.split()
VERBS = tuple(_verb(one) for one in _VERBS.split())
NOUNS = tuple(_NOUNS.split())
PREPOSITIONS, AGENTS, ADVERBS = _spaced(_PREPOSITIONS), _spaced(_AGENTS), _spaced(_ADVERBS)
# of training, of validation
PATTERNS = tuple(_read(part) for part in _PATTERNS_TEXT.split("\n    --\n"))


def sample_clause(draw: Draw, split: int = 0) -> Clause:
    """A pattern of a split (0 training, 1 validation) with verbs, nouns, prepositions filled in; the split's own."""
    patterns = PATTERNS[split]
    pattern = patterns[draw.below(len(patterns))]
    words: dict[str, tuple[str, ...]] = {
        "S": (draw.pick(AGENTS),),
        "r": (draw.pick(PREPOSITIONS),),
        "a": (draw.pick(ADVERBS),),
    }
    for slot in "VW":
        words[slot] = regular(made_up(draw)) if draw.chance(_MADE_UP) else VERBS[_listed(draw, len(VERBS), split)]
    for slot in "nm":
        noun = made_up(draw) if draw.chance(_MADE_UP) else NOUNS[_listed(draw, len(NOUNS), split)]
        words[slot] = noun, plural(noun)

    def fill(text: str) -> str:
        return _SLOT.sub(lambda found: words[found[1]][_PLACES.get(found[2], 0)], text)

    kinds = _KINDS.get(pattern.value, (pattern.value,))
    # a record is a line of its own
    end = "\n" if pattern.value == "record" else ""
    return Clause(fill(pattern.statement) + end, tuple(map(fill, pattern.questions)), draw.pick(kinds), pattern.subject)


_PLACES = {"0": 0, "1": 1, "2": 2, "3": 3, "s": 1}


def _listed(draw: Draw, count: int, split: int) -> int:
    """The place of a listed word that is of the split."""
    if split:
        return _HELD_OUT * draw.below(-(-count // _HELD_OUT))
    place = draw.below(count - -(-count // _HELD_OUT))
    return place + 1 + place // (_HELD_OUT - 1)
