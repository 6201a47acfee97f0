"""The words of evaluation keys: 64 adjectives x 64 nouns that no training key ever contains.

``build_shards`` leaves them out of the word bank; ``MixtureDataset`` refuses a bank that has one.
Tested in ``tests/data/test_needles.py``.
"""

from __future__ import annotations

_ADJECTIVES = """
    amber azure brave bright bronze calm clever copper coral cosmic crimson crystal curious daring eager early
    elegant emerald fearless fluffy frosty gentle gilded golden graceful hidden humble indigo ivory jolly lively lucky
    lunar marble mellow merry misty mighty noble nimble olive opal patient pearly playful polished proud purple
    quiet radiant rosy royal rustic scarlet shiny silent silver snowy solar stormy sunny velvet violet wandering
"""
_NOUNS = """
    acorn anchor badger beacon beetle blossom canyon castle cedar comet cricket dolphin dragon eagle falcon feather
    ferry forest fountain fox garden glacier harbor hawk hedgehog heron island jaguar kettle koala lagoon lantern
    lemon lighthouse lizard maple meadow mirror mountain needle ocean orchard otter owl panther parrot pebble penguin
    pepper piano pigeon planet puffin rabbit raven river rocket sailor sparrow squirrel thunder tiger turtle walrus
"""

EVALUATION_ADJECTIVES: tuple[str, ...] = tuple(_ADJECTIVES.split())
EVALUATION_NOUNS: tuple[str, ...] = tuple(_NOUNS.split())
EVALUATION_WORDS: frozenset[str] = frozenset(EVALUATION_ADJECTIVES + EVALUATION_NOUNS)
