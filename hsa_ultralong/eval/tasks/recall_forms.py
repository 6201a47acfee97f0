"""Frozen: sentence forms, names and cities of the recall suite. No training ever uses them
(tests/eval/tasks/test_leaks.py); change nothing here, add new forms under new numbers.

{key} two evaluation words, {name} and {other} persons, {value} what is asked for, of the kind that is named.
"""

from __future__ import annotations

from typing import NamedTuple


class RecallForm(NamedTuple):
    statement: str
    question: str
    kind: str  # of the value: digits7, name, city, time, date, words2
    carriers: tuple[str, ...]  # words that no template of training holds


RECALL_FORMS: tuple[RecallForm, ...] = (
    RecallForm("They painted {value} on the door of the {key}.", "What did they paint on the door of the {key}?",
               "digits7", ("painted", "door")),
    RecallForm("{name} was born in the city of {value}.", "In which city was {name} born?", "city", ("born", "city")),
    RecallForm("The meeting with {name} starts at {value}.", "When does the meeting with {name} start?", "time",
               ("meeting", "starts")),
    RecallForm("{name} still owes the bakery {value} crowns.", "How many crowns does {name} still owe the bakery?",
               "digits7", ("owes", "bakery")),
    RecallForm("Engraved on the rim of the {key}, visitors read {value}.",
               "What do visitors read on the rim of the {key}?", "digits7", ("engraved", "rim", "visitors")),
    RecallForm("The {key} arrives by ship on {value}.", "On which day does the {key} arrive by ship?", "date",
               ("arrives", "ship")),
    RecallForm("Beside the {key}, {name} planted {value} seeds.", "How many seeds did {name} plant beside the {key}?",
               "digits7", ("beside", "planted", "seeds")),
    RecallForm('"{value}," whispered {name}, "lifts the curse of the {key}."',
               "According to {name}, what lifts the curse of the {key}?", "words2", ("whispered", "lifts", "curse")),
    RecallForm("{name} lent the {key} to {value}.", "To whom did {name} lend the {key}?", "name", ("lent",)),
    RecallForm("| {key} | {value} |", "Which entry stands in the row of the {key}?", "digits7", ("row", "entry")),
    RecallForm("Until the {key} sank, its crew counted {value} lamps aboard.",
               "How many lamps did the crew of the {key} count aboard?", "digits7", ("sank", "crew", "lamps")),
    RecallForm("Nobody but {name} noticed that the {key} had been carried off to {value}.",
               "Where was the {key} carried off to?", "city", ("nobody", "noticed", "carried")),
)  # fmt: skip

_FIRST_NAMES = """
    Adelheid Anselm Bartholomew Beatrix Casimir Clementine Cordelia Dagmar Desmond Edwina Eustace Fabiola Ferdinand
    Gwendolyn Hadrian Hildegard Ignatius Isolde Jocasta Leopold Ludmila Mordecai Nerissa Octavia Ottilie Percival
    Philippa Quincy Rosalind Sigismund Thaddeus Theodora Ursula Valentin Wilhelmina Winifred Ysolde Zebulon Zenobia
    Ambrose
"""
_FAMILY_NAMES = """
    Abernathy Blackwood Carrington Dunmore Ellsworth Fairweather Galbraith Hollingsworth Inglewood Jessop Kettleburn
    Lockhart Montague Netherby Ormsby Pemberton Quimby Ravenscroft Stanhope Thistlewood Underhill Vandermeer Whitlock
    Yarborough Zimmerman
"""
_CITIES = """
    Aberdeen Antwerp Bilbao Bratislava Cork Debrecen Edirne Freiburg Genoa Groningen Huelva Innsbruck Jena Kaunas
    Lausanne Ljubljana Maribor Nantes Odense Pilsen Regensburg Salerno Tampere Trieste Uppsala Valletta Winterthur
    Zaragoza Antofagasta Bandung Cebu Dunedin Fukuoka Guadalajara Hobart Kumasi Mombasa Nagoya Oaxaca Saskatoon
"""
_MONTHS = "January February March April May June July August September October November December"

FIRST_NAMES: tuple[str, ...] = tuple(_FIRST_NAMES.split())
FAMILY_NAMES: tuple[str, ...] = tuple(_FAMILY_NAMES.split())
CITIES: tuple[str, ...] = tuple(_CITIES.split())
MONTHS: tuple[str, ...] = tuple(_MONTHS.split())
