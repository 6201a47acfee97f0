"""Scores by hand: intervals, exact answers of a batch, and the needle study on a random model."""

import pytest
import torch

from hsa_ultralong.data import evaluation_needles
from hsa_ultralong.eval import needles as study_module
from hsa_ultralong.eval.intervals import wilson_interval
from hsa_ultralong.eval.needles import is_right, run_needles
from hsa_ultralong.eval.probes import answer_accuracy
from hsa_ultralong.testing.factories import random_tokens, tiny_model


class Letters:
    """A tokenizer of ASCII letters, bos 0 first."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [0] * add_special_tokens + [ord(letter) for letter in text]}

    def decode(self, tokens, **_):
        return "".join(chr(token) for token in tokens)


def haystack(length):
    return random_tokens(1, length, vocab_size=128)[0].int()


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=128)


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [
        # R. G. Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_are_the_published_ones(right, total, low, high):
    assert wilson_interval(right, total) == pytest.approx((low, high), abs=6e-5)
    mirrored = wilson_interval(total - right, total)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=6e-5)


def test_wilson_intervals_hold_the_share_and_narrow_with_more_samples():
    widths = []
    for total in (1, 4, 16, 64, 1024):
        for right in (0, total // 2, total):
            low, high = wilson_interval(right, total)
            assert 0 <= low <= right / total <= high <= 1 and low < high
        widths.append(high - low)
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize("answer", ["42", " 42", "42.", " 42. ", "42 ."])
def test_white_space_and_a_full_stop_do_not_matter(answer):
    assert is_right(answer, " 42")
    assert not is_right(answer + "0", "42") and not is_right("4" + answer.strip(), "42")


def by_hand(logits, tokens, mask):
    """Right answers, answers, summed loss, answer tokens: one row and one token at a time."""
    right = count = length = 0
    loss = 0.0
    for row in range(tokens.shape[0]):
        is_good = None
        for t in range(1, tokens.shape[1]):
            if mask[row, t]:
                scores = logits[row, t - 1].float()
                loss -= scores.log_softmax(-1)[tokens[row, t]].item()
                length += 1
                is_good = is_good is not False and scores.argmax() == tokens[row, t]
            if is_good is not None and (t + 1 == tokens.shape[1] or not mask[row, t + 1]):
                count, right, is_good = count + 1, right + bool(is_good), None
    return right, count, loss, length


@torch.no_grad()
def test_answer_accuracy_equals_a_count_by_hand(model):
    tokens = random_tokens(3, 32, vocab_size=128)
    mask = torch.zeros(3, 32, dtype=torch.bool)
    # answers at the end of one row and the start of the next, single tokens, neighbours with a gap of one
    for row, start, stop in ((0, 5, 8), (0, 29, 32), (1, 1, 3), (1, 10, 11), (1, 12, 13), (2, 31, 32), (2, 20, 24)):
        mask[row, start:stop] = True
    segments = torch.zeros(3, 32, dtype=torch.int32)
    for t in range(1, 32):
        # what the model would say, left to right, where an answer shall be right
        guess = model(tokens, segment_ids=segments).logits.argmax(-1)
        for row, start, stop in ((0, 29, 32), (1, 1, 3), (1, 12, 13), (2, 20, 23)):
            if start <= t < stop:
                tokens[row, t] = guess[row, t - 1]
    logits = model(tokens, segment_ids=segments).logits
    tokens[2, 23] = (logits[2, 22].argmax() + 1) % 128
    logits = model(tokens, segment_ids=segments).logits
    expected = by_hand(logits, tokens, mask)
    assert expected[:2] == (3, 7) and expected[3] == 3 + 3 + 2 + 1 + 1 + 1 + 4
    batch = {"input_ids": tokens, "segment_ids": segments, "answer_mask": mask}
    measured = answer_accuracy(model, batch, "cpu")
    assert (measured[0], measured[1], measured[3]) == (expected[0], expected[1], expected[3])
    assert measured[2] == pytest.approx(expected[2], rel=1e-5)


def test_no_answers_count_as_none(model):
    tokens = random_tokens(1, 16, vocab_size=128)
    batch = {
        "input_ids": tokens,
        "segment_ids": torch.zeros(1, 16, dtype=torch.int32),
        "answer_mask": torch.zeros(1, 16, dtype=torch.bool),
    }
    with torch.no_grad():
        assert answer_accuracy(model, batch, "cpu") == (0, 0, 0.0, 0)


def test_a_study_has_every_needle_of_every_length_at_its_depth(model, monkeypatch):
    written = []
    original = study_module.edit

    def watch(model, memory, start, stop, tokens, **options):
        written.append((start, stop, list(map(int, tokens))))
        return original(model, memory, start, stop, tokens, **options)

    monkeypatch.setattr(study_module, "edit", watch)
    text, seen = haystack(200), []
    study = run_needles(
        model, Letters(), text, lengths=[120, 200], samples=3, controls=2, seed=5, progress=lambda *x: seen.append(x)
    )
    assert (study.topk, study.seed) == (3, 5)
    assert [result.length for result in study.results] == [120, 200]
    for result in study.results:
        needles = evaluation_needles(5 + result.length, 5)
        assert [sample.depth for sample in result.samples] == pytest.approx([1 / 6, 3 / 6, 5 / 6])
        assert [sample.prompt for sample in result.samples] == [needle.question for needle in needles[:3]]
        assert [sample.expected for sample in result.samples] == [needle.value for needle in needles[:3]]
        for sample in result.samples:
            assert sample.correct == is_right(sample.answered, sample.expected) and 0 < sample.weight <= 1
        assert len(result.control_weights) == 2 and result.accuracy == 0.0
        assert result.distinct_chunks == result.length // 4 and result.memory_bytes > 0
        assert result.read_seconds > 0
    # each statement goes in at its depth, and the text of that place comes back
    assert len(written) == 12
    for (start, stop, tokens), back in zip(written[::2], written[1::2], strict=True):
        assert Letters().decode(tokens).startswith(" The secret code of the") and start >= 1
        assert back == (start, stop, text[start:stop].tolist())
    starts = [start for start, _, _ in written[6::2]]
    lengths = [stop - start for start, stop, _ in written[6::2]]
    places = [1 + (i + 0.5) / 3 * (199 - length) for i, length in enumerate(lengths)]
    assert all(abs(start - place) <= 0.5 for start, place in zip(starts, places, strict=True))
    assert seen[-1] == (200, 3, 3, 200)


def test_after_a_study_the_memory_is_that_of_the_untouched_text(model, monkeypatch):
    kept = []
    original = study_module.memorize
    monkeypatch.setattr(study_module, "memorize", lambda *a, **o: kept.append(original(*a, **o)) or kept[-1])
    text = haystack(130)
    run_needles(model, Letters(), text, lengths=[130], samples=4)
    fresh = model.memorize(text)
    assert torch.equal(kept[-1].documents[0].tokens, text)
    present = (torch.arange(4) < fresh.lengths[..., None]).flatten(1)
    for name in ("k", "v"):
        torch.testing.assert_close(
            getattr(kept[-1], name)[present], getattr(fresh, name)[present], rtol=1e-10, atol=1e-11
        )
    torch.testing.assert_close(kept[-1].landmarks, fresh.landmarks, rtol=1e-10, atol=1e-11)


def test_impossible_lengths_are_refused(model):
    with pytest.raises(ValueError, match="add more text"):
        run_needles(model, Letters(), haystack(50), lengths=[51], samples=1)
    with pytest.raises(ValueError, match="too few"):
        run_needles(model, Letters(), haystack(50), lengths=[20], samples=1)


def test_a_found_needle_is_one_whose_chunk_weighs_most(model, monkeypatch):
    places = []
    original = study_module.ask

    def watch(*arguments, **options):
        answer = original(*arguments, **options)
        places.append(answer.sources[0])
        return answer

    monkeypatch.setattr(study_module, "ask", watch)
    # a statement fills most of the text, so that a random model points at some of them
    (result,) = run_needles(model, Letters(), haystack(70), lengths=[70], samples=5).results
    for sample, source, needle in zip(result.samples, places, evaluation_needles(70, 5), strict=True):
        length = len(needle.statement)
        start = 1 + round(sample.depth * (70 - length - 1))
        assert sample.found is (source.start < start + length and start < source.stop)
        assert sample.weight == source.weight
