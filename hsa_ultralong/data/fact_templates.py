"""The tables of the grammar of facts: what is said and asked, compact, entries divided by "//".

What stands below a line "--" is of the validation split only: verbs, attributes, word orders and frames that training
never sees. No verb or frame is one of the frozen evaluation forms (tests/eval/tasks/test_leaks.py). {x} and {p} are
the subjects, {v} the value. Called by ``fact_forms.py``.
"""

from __future__ import annotations

_Lists = tuple[tuple[str, ...], tuple[str, ...]]


def _lines(text: str) -> _Lists:
    """What training says, and what validation says."""
    training, _, validation = text.partition("\n    --\n")
    parts = ([entry.strip() for entry in part.split("//") if entry.strip()] for part in (training, validation))
    trained, held_out = parts
    return tuple(trained), tuple(held_out)


# attributes: kind of the value | nouns
ATTRIBUTES = _lines("""
    number|serial number|badge number|locker number|account number|order number|flight number|seat number|secret code //
    number|access number|vault code|combination|zip code|page number|room number|raffle number|security code|score //
    long|tracking number|invoice number|passport number|licence number|card number|contract number|master code //
    price|price|rent|fee|fine|budget|salary|deposit|value //
    amount|weight|length|height|capacity|distance|depth|size|duration|width //
    percent|share|discount|tax rate|humidity|growth //
    date|deadline|delivery date|expiry date|founding date|wedding date|inspection date|due date //
    time|closing time|departure time|bedtime|lunch break|opening hour|check-in time|curfew //
    year|founding year|year of construction|vintage //
    name|owner|author|keeper|chief|director|teacher|heir|rival|landlord|designer|inventor|best friend|witness //
    place|home town|destination|headquarters|origin|next stop|branch office|hiding place|place of storage //
    word|colour|mascot|symbol|label|theme|material|shape|favourite animal|main ingredient|code word|hobby //
    pair|pass phrase|motto|title|slogan|code name|full name|favourite dish|watchword //
    code|licence plate|booking code|product key|model number|call sign|access code|voucher //
    identifier|identifier|fingerprint|hash|session key|checksum // phone|phone number|fax number|emergency number //
    address|address|e-mail|contact
    --
    number|ticket number|shelf mark // long|insurance number // price|ransom // amount|altitude // date|anniversary //
    time|alarm time // name|godmother // place|birthplace of the founder // word|pet name // pair|battle cry //
    code|prison code
""")

# statements about an attribute {a}; the last ones are records
ATTRIBUTE_FRAMES = _lines("""
    the {a} of {x} is {v} // the {a} of {x} is {v} // the {a} for {x} is {v} // {x} has the {a} {v} //
    for {x}, the {a} is {v} // {v} is the {a} of {x} // as {a}, {x} was given {v} // they set the {a} of {x} to {v} //
    the {a} that goes with {x} is {v} // if you need the {a} of {x}, use {v} // with {v} as {a}, {x} is complete //
    there is only one {a} for {x}, namely {v} // {x}, whose {a} is {v}, stands ready // {x} uses {v} as {a} //
    we chose {v} as the {a} of {x} // under {x} you will find the {a} {v} // the {a} of {x} reads {v} //
    the register gives {v} as the {a} of {x} // my notes on {x} say {a}: {v} // the {a} listed for {x} is {v} //
    somebody wrote {v} as {a} on the card of {x} // {v} was registered as the {a} of {x} //
    of all facts about {x}, keep the {a} in mind: {v} // {x} goes by the {a} {v} // speaking of {x}, the {a} is {v} //
    when asked about {x}, say that the {a} is {v} // the {a} which belongs to {x} is {v} //
    {x} would be lost without the {a} {v} // what is {v}? The {a} of {x} // the office lists {x} with the {a} {v} //
    {x} and the {a} {v} belong together // one thing about {x}: the {a} is {v} // the new {a} of {x} will be {v} //
    the {a} of {x} used to be a secret, but it is {v} // {x} was assigned {v}, which is the {a} //
    {x} ({a}: {v}) is in use // {a} of {x}: {v} // {x}: {a} = {v} // {x}, {a}: {v} // {a} ({x}) = {v} //
    {x} -> {a}: {v} // * {x}: {a} {v} // [{x}] {a} = {v} // {a}; {x}; {v} // <{a} of="{x}">{v}</{a}> //
    {{"name": "{x}", "{a}": "{v}"}} // set {a} of {x} = {v}
    --
    by decree the {a} of {x} shall be {v} // {x} got {v} for a {a} // look up {x} and you see {v} under {a} //
    the clerk filed {v} under the {a} of {x} // no {a} but {v} fits {x} // {a} @ {x} := {v}
""")
ATTRIBUTE_QUESTIONS = _lines("""
    What is the {a} of {x}? // What is the {a} of {x}? // What is the {a} for {x}? // Which {a} does {x} have? //
    Tell me the {a} of {x}. // Which {a} belongs to {x}? // Do you remember the {a} of {x}? // Give the {a} of {x}. //
    {x}: what is the {a}? // I need the {a} of {x}. // Can you look up the {a} of {x}? // What {a} was given to {x}? //
    Name the {a} of {x}. // What does the text say about the {a} of {x}? // What do we know about the {a} of {x}?
    --
    Of {x}, what is the {a}? // Say what the {a} of {x} was. // Recall the {a} of {x}, please.
""")

# transitive deeds of persons: base past participle | what stands before the value and behind it | kind of the value
DEEDS = _lines("""
    buy bought bought|a|at the market|word // sell sold sold|a||word // build built built|a|in the yard|word //
    repair repaired repaired|the||word // borrow borrowed borrowed|a|from a neighbour|word //
    steal stole stolen|the||word // draw drew drawn|a||word // break broke broken|the||word //
    find found found|a|in the cellar|word // lose lost lost|the|on the train|word //
    conceal concealed concealed|the|under the stairs|word // collect collected collected|every||word //
    order ordered ordered|a||word // choose chose chosen|the||word // eat ate eaten|the|at dinner|word //
    keep kept kept|a|in the drawer|word // win won won|a|in the raffle|word // drop dropped dropped|the||word //
    describe described described|the||word // clean cleaned cleaned|the||word // measure measured measured|the||word //
    restore restored restored|the||word // burn burned burned|the||word // import imported imported|the||word //
    design designed designed|a||word // study studied studied|the||pair // teach taught taught|the||word //
    forget forgot forgotten|the|at home|word // bring brought brought|a|to the party|word //
    marry married married|||name // meet met met||at the market|name // call called called|||name //
    hire hired hired|||name // help helped helped||with the harvest|name // thank thanked thanked|||name //
    follow followed followed||home|name // trust trusted trusted|||name // train trained trained|||name //
    defeat defeated defeated||at chess|name // sue sued sued|||name // visit visited visited||in hospital|name //
    spend spent spent||on a coat|price // pay paid paid||for the table|price // earn earned earned||in a week|price //
    lose lost lost||at cards|price // walk walked walked||in one go|amount // dial dialled dialled|||phone //
    type typed typed||into the machine|code // write wrote written||on the box|number //
    choose chose chosen|the number||number // remember remembered remembered|the number||long
    --
    invent invented invented|a||word // bury buried buried|the||word // wear wore worn|the|to the ball|word //
    interview interviewed interviewed|||name // rescue rescued rescued|||name //
    donate donated donated||to the choir|price // shout shouted shouted||across the hall|number
""")
DEED_ORDERS = _lines("""
    {x} {past} {v} {tail} // {x} {past} {v} {tail} // it was {v} that {x} {past} {tail} //
    what {x} {past} {tail} was {v} // {v} was {part} by {x} {tail} // {x} has {part} {v} {tail} //
    {x} did {base} {v} {tail} // {x} is the one who {past} {v} {tail} // {x} wanted to {base} {v} {tail}, and did so //
    after a while {x} {past} {v} {tail} // of all things, {x} {past} {v} {tail}
    --
    {v} is what {x} {past} {tail} // had {x} not {part} {v} {tail}, all would be well
""")
DEED_QUESTIONS = _lines("""
    {wh} did {x} {base} {tail}? // {wh} did {x} {base} {tail}? // {wh} was it that {x} {past} {tail}? //
    {wh} has {x} {part} {tail}? // {wh} was {part} by {x} {tail}? // Do you know {wh} {x} {past} {tail}? //
    Tell me {wh} {x} {past} {tail}.
    --
    According to the text, {wh} did {x} {base} {tail}? // Say {wh} {x} {past} {tail}.
""")
WHAT = {
    "word": "What", "pair": "What", "name": "Whom", "price": "How much", "amount": "How far", "number": "What number",
    "long": "What number", "phone": "What number", "code": "What code",
}  # fmt: skip

# relations: subject | what is said up to the value | auxiliary and rest of the question | kind of the value
RELATIONS = _lines("""
    person|lived in|did live|place // person|works in|does work|place // person|moved to|did move|place //
    person|grew up in|did grow up|place // person|retired to|did retire|place //
    person|travelled to|did travel|place // person|spent the winter in|did spend the winter|place //
    person|died in|did die|place // person|opened a shop in|did open a shop|place //
    person|wakes up at|does wake up|time // person|left the house at|did leave the house|time //
    person|takes the train at|does take the train|time // person|had lunch at|did have lunch|time //
    person|came home at|did come home|time // person|retired on|did retire|date //
    person|returned on|did return|date // person|signed the contract on|did sign the contract|date //
    person|left the army on|did leave the army|date // person|graduated in|did graduate|year //
    person|works for|does work|name // person|sat next to|did sit next|name //
    person|shares a flat with|does share a flat|name // person|danced with|did dance|name //
    person|voted for|did vote|name // person|was named after|was named|name //
    person|writes letters to|does write letters|name // person|is allergic to|is allergic|word //
    person|is fond of|is fond|word // person|dreams of|does dream|word // person|is afraid of|is afraid|word //
    person|is famous for|is famous|pair // person|complained about|did complain|word //
    person|can be reached at|can be reached|phone // person|gets mail at|does get mail|address //
    thing|was sold to|was sold|name // thing|belongs to|does belong|name // thing|was repaired by|was repaired|name //
    thing|was designed by|was designed|name // thing|is guarded by|is guarded|name //
    thing|was stolen by|was stolen|name // thing|is stored in|is stored|place // thing|was made in|was made|place //
    thing|was found in|was found|place // thing|was sent to|was sent|place // thing|comes from|does come|place //
    thing|was last seen in|was last seen|place // thing|opens at|does open|time // thing|closes at|does close|time //
    thing|leaves at|does leave|time // thing|is switched off at|is switched off|time //
    thing|was delivered on|was delivered|date // thing|expires on|does expire|date //
    thing|was repaired on|was repaired|date // thing|must be returned on|must be returned|date //
    thing|was built in|was built|year // thing|dates from|does date|year // thing|weighs|does weigh|amount //
    thing|holds|does hold|amount // thing|measures|does measure|amount // thing|costs|does cost|price //
    thing|was sold for|was sold|price // thing|was insured for|was insured|price // thing|is made of|is made|word //
    thing|contains|does contain|word // thing|runs on|does run|word // thing|smells of|does smell|word //
    thing|is known as|is known|pair // thing|is locked with|is locked|code // thing|answers to|does answer|code //
    thing|is filed under|is filed|number // thing|is registered under|is registered|long //
    thing|hides behind number|does hide|number // thing|is tagged as|is tagged|identifier //
    thing|lost|did lose|percent
    --
    person|hid for years in|did hide for years|place // person|goes fishing at|does go fishing|time //
    person|quarrelled with|did quarrel|name // person|was knighted on|was knighted|date //
    person|is jealous of|is jealous|word // thing|was smuggled into|was smuggled|place //
    thing|was blessed by|was blessed|name // thing|explodes at|does explode|time //
    thing|was auctioned for|was auctioned|price // thing|is wrapped in|is wrapped|word //
    thing|is catalogued under|is catalogued|number
""")
RELATION_ORDERS = _lines("""
    {x} {said} {v} // {x} {said} {v} // {x} {said} {v} // it was {prep} {v} that {x} {bare} //
    {prep} {v}, {x} {bare} // {v} is {wh} {x} {said_wh} // {x}, as the file shows, {said} {v} //
    {x} is the one that {said} {v} // {x} ({said} {v}) is on the list // of course {x} {said} {v} //
    there is {x}, which {said} {v}
    --
    {wh} {x} {said_wh} is {v} // {x}, believe it or not, {said} {v}
""")
QUESTION_WORDS = {
    "place": ("Where {q}", "{Prep} which place {q}", "{Prep} what town {q}"),
    "time": ("When {q}", "At what time {q}", "At which hour {q}"),
    "date": ("When {q}", "On what date {q}", "On which date {q}"),
    "year": ("When {q}", "{Prep} what year {q}", "{Prep} which year {q}"),
    "name": ("Who {q} {prep}", "{Prep} whom {q}", "Whom {q} {prep}"),
    "word": ("What {q} {prep}", "{Prep} what {q}"),
    "pair": ("What {q} {prep}", "{Prep} what {q}"),
    "price": ("How much {q} {prep}", "{Prep} how much {q}"),
    "amount": ("How much {q}", "What {q}"),
    "percent": ("How much {q}", "What share {q}"),
}
RELATIVES = {"place": "where", "time": "when", "date": "when", "year": "when"}

# free scenes: what is said | how it is asked | kind of the value; {x} a thing, {p} a person
SCENES = _lines("""
    inside {x} hung a sign with the number {v}|What number was on the sign inside {x}?|number //
    on the lid of {x} somebody scratched {v}|What was scratched on the lid of {x}?|number //
    {p} sold {v} copies of the book about {x}|How many copies of the book about {x} did {p} sell?|number //
    before {x} was torn down, {v} families lived in it|How many families lived in {x} before it was torn down?|number //
    while {x} burned, {p} fled to {v}|Where did {p} flee while {x} burned?|place //
    the train to {x} departs from platform {v}|From which platform does the train to {x} depart?|number //
    nowhere but in {v} can you buy {x}|Where can you buy {x}?|place //
    {p} gave {x} to {v} as a present|Who got {x} from {p} as a present?|name //
    {p} keeps {v} chickens behind {x}|How many chickens does {p} keep behind {x}?|number //
    the bus past {x} comes at {v}|When does the bus past {x} come?|time //
    only {v} knows how to open {x}|Who knows how to open {x}?|name //
    {p} will sing in {v} next summer|Where will {p} sing next summer?|place //
    the recipe of {p} needs {v} of flour|How much flour does the recipe of {p} need?|amount //
    to stop {x}, press {v}|What do you press to stop {x}?|code //
    call {v} if you find {x}|What number do you call if you find {x}?|phone //
    {v} people signed the petition about {x}|How many people signed the petition about {x}?|number //
    it took {p} {v} to climb {x}|How long did it take {p} to climb {x}?|amount //
    the twin of {p} lives in {v}|Where does the twin of {p} live?|place //
    {x} was closed by order of {v}|By whose order was {x} closed?|name //
    when {x} was weighed, the scale showed {v}|What did the scale show when {x} was weighed?|amount //
    {p} hid the key of {x} in {v}|Where did {p} hide the key of {x}?|place //
    the police found {v} coins in {x}|How many coins did the police find in {x}?|number //
    the choir of {x} has {v} members|How many members does the choir of {x} have?|number //
    {p} bet {v} on {x}|How much did {p} bet on {x}?|price //
    those who enter {x} must say {v}|What must those say who enter {x}?|pair //
    {p} calls {x} by the name {v}|By what name does {p} call {x}?|pair //
    since {v}, {x} has stood empty|Since when has {x} stood empty?|year //
    from {v} on, {p} will look after {x}|From when on will {p} look after {x}?|date //
    {x} fell from the roof on {v}|When did {x} fall from the roof?|date //
    behind {x} runs a road to {v}|Where does the road behind {x} lead?|place //
    {p} swapped {x} for a {v}|For what did {p} swap {x}?|word //
    in the opinion of {p}, {x} tastes like {v}|What does {x} taste like in the opinion of {p}?|word //
    the last person who saw {x} was {v}|Who was the last person who saw {x}?|name //
    you reach {x} by bus {v}|Which bus goes to {x}?|number //
    {x} is insured with policy {v}|With which policy is {x} insured?|code //
    the network of {x} asks for {v}|What does the network of {x} ask for?|code //
    {p} has been to {x} {v} times|How often has {p} been to {x}?|number //
    {v} saved {p} from drowning|Who saved {p} from drowning?|name //
    {v} is taller than {p}|Who is taller than {p}?|name //
    {v} won the race against {p}|Who won the race against {p}?|name //
    the prize for {x} went to {v}|To whom did the prize for {x} go?|name //
    if {x} breaks, write to {v}|To whom should one write if {x} breaks?|address //
    the moon of {x} is called {v}|What is the moon of {x} called?|word //
    after the flood, {x} was rebuilt in {v}|Where was {x} rebuilt after the flood?|place //
    {p} set the alarm of {x} to {v}|To what time did {p} set the alarm of {x}?|time //
    the concert of {p} ends at {v}|When does the concert of {p} end?|time //
    a ticket for {x} costs {v}|How much is a ticket for {x}?|price //
    {x} drinks {v} a day|How much does {x} drink a day?|amount //
    {v} bottles stand on the shelf of {p}|How many bottles stand on the shelf of {p}?|number //
    {p} asked {v} to wash {x}|Whom did {p} ask to wash {x}?|name //
    all that {p} knows about {x} is that it came from {v}|What does {p} know about the origin of {x}?|place //
    there were {v} books in {x} when {p} left|How many books were in {x} when {p} left?|number //
    the teacher made {p} copy {v} lines about {x}|How many lines about {x} did {p} copy?|number //
    a note under {x} says {v}|What does the note under {x} say?|pair
    --
    the tower of {x} leans by {v}|By how much does the tower of {x} lean?|amount //
    {p} baked {v} loaves for {x}|How many loaves did {p} bake for {x}?|number //
    nailed to the wall of {x} hung the number {v}|What number hung on the wall of {x}?|number //
    {p} pawned {x} in {v}|Where did {p} pawn {x}?|place //
    the ghost of {x} appears at {v}|At what time does the ghost of {x} appear?|time //
    {p} inherited {x} from {v}|From whom did {p} inherit {x}?|name //
    the judge fined {p} {v}|How much did the judge fine {p}?|price //
    as a child {p} was bitten by a {v}|By what was {p} bitten as a child?|word //
    the truce about {x} ended on {v}|On what date did the truce about {x} end?|date //
    the oracle of {x} answers only to {v}|To what does the oracle of {x} answer?|pair //
    {x} has {v} rooms and one stove|How many rooms does {x} have?|number //
    on its hull {x} bears {v}|What does {x} bear on its hull?|code
""")

# how a sentence is said; {s} begins with a small letter where it is no name
FRAMES = _lines("""
    {S}. // {S}. // {S}. // {S}. // {S}. // {S}. // {S}. // {S}. // They say that {s}. // Remember that {s}. //
    Note: {s}. // As far as I know, {s}. // It is well known that {s}. // {S}, according to the report. //
    {S}, or so I heard. // I was told that {s}. // Please keep in mind that {s}. // My uncle told me that {s}. //
    The letter says that {s}. // By the way, {s}. // "{S}," said the clerk. // Fact: {s}. // (Reminder: {s}.) //
    In short, {s}. // After some debate it was agreed that {s}. // The log shows that {s}. // We found out that {s}. //
    {S}; do not forget it. // {S}, and that will not change. // Every guide mentions that {s}. //
    Rumour has it that {s}. // {S}! // Dear all, {s}. // One more fact: {s}. // Somebody wrote: {s}.
    --
    Between you and me, {s}. // The radio reported that {s}. // {S}, no doubt about it. // Mark my words: {s}.
""")
CHANGED_FRAMES = (
    "Correction: {s}.", "As of today, {s}.", "Update: {s}.", "Not any more: from now on {s}.",
    "This has changed since: {s}.", "Forget what was said before, {s}.", "The latest news is that {s}.",
)  # fmt: skip
