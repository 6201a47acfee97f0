"""A difference in few bits: what comes back is near, the file is small, and it is read as any other."""

import pytest
import torch
from typer.testing import CliRunner

from hsa_ultralong.cli.main import app
from hsa_ultralong.testing.factories import tiny_model
from hsa_ultralong.train.difference import difference_tensors, read_difference, write_difference
from hsa_ultralong.train.packing import pack, unpack

CONVERSION = {"source": "toy", "source_files": {"a": {"sha256": "0"}}, "options": {}}


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_numbers_come_back_within_half_a_step_of_their_block(bits):
    torch.manual_seed(0)
    tensors = {"m": torch.randn(7, 30), "zero": torch.zeros(3, 3), "v": torch.randn(5)}
    packed, about = pack(tensors, bits)
    again = unpack(packed, about)
    assert again["v"] is tensors["v"] and not again["zero"].any() and again["m"].shape == (7, 30)
    largest = torch.nn.functional.pad(tensors["m"].flatten(), (0, 46)).view(-1, 64).abs().amax(1)
    steps = (largest / ((1 << (bits - 1)) - 1)).repeat_interleave(64)[:210]
    assert ((again["m"] - tensors["m"]).abs().flatten() <= 0.58 * steps).all()
    # frequent numbers take fewer bits than rare ones; so few of them leave room for the table that says which
    assert packed["m#codes"].numel() <= 4 * 64 * bits // 8 + 80


def test_common_numbers_take_fewer_bits_than_rare_ones():
    torch.manual_seed(0)
    packed, about = pack({"m": torch.randn(300, 640)}, 7)
    assert 8 * packed["m#codes"].numel() / (300 * 640) < 6.75 and unpack(packed, about)["m"].shape == (300, 640)


def test_a_compact_file_is_read_as_the_difference_that_it_was(tmp_path):
    model, runner = tiny_model(), CliRunner()
    wide, small = tmp_path / "wide.safetensors", tmp_path / "small.safetensors"
    write_difference(wide, difference_tensors(model), CONVERSION, model.config)
    made = runner.invoke(app, ["compact", str(wide), "-o", str(small), "--bits", "6"])
    assert made.exit_code == 0 and "matrices changed by" in made.output, made.output
    (before, about), (after, again) = read_difference(wide), read_difference(small)
    assert about == again and set(before) == set(after) and small.stat().st_size < wide.stat().st_size
    for name, tensor in before.items():
        assert (after[name] - tensor.float()).norm() <= 0.05 * tensor.float().norm() + 1e-9
    once = runner.invoke(app, ["compact", str(wide), "-o", str(small)])
    assert once.exit_code == 2 and "exists" in once.output + once.stderr


def test_packed_tensors_that_do_not_fit_are_refused():
    packed, about = pack({"m": torch.ones(4, 64)}, 4)
    with pytest.raises(ValueError, match="do not fit"):
        unpack({**packed, "m#scales": packed["m#scales"][:2]}, about)
    with pytest.raises(ValueError, match="do not fit"):
        unpack(packed, '{"bits": 40, "shapes": {"m": [4, 64]}}')
    with pytest.raises(ValueError, match="do not fit"):
        unpack({**packed, "m#codes": packed["m#codes"][:9]}, about)
    more = pack({"m": torch.ones(4, 65)}, 4)[0]["m#codes"]
    for codes in (more, packed["m#codes"] ^ 6, torch.full((64,), 255, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="do not fit"):
            unpack({**packed, "m#codes": codes}, about)
    wide = pack({"m": torch.ones(4, 64)}, 8)[0]["m#codes"]
    with pytest.raises(ValueError, match="codes above 14"):
        unpack({**packed, "m#codes": wide}, about)
    with pytest.raises(ValueError, match="do not fit"):
        unpack({**packed, "n#codes": packed["m#codes"]}, about)
    with pytest.raises(ValueError, match="do not fit"):
        unpack(
            {"m#codes": packed["m#codes"][:0], "m#scales": packed["m#scales"][:0]},
            f'{{"bits": 4, "shapes": {{"m": [{2**32}, {2**32}]}}}}',
        )
    with pytest.raises(ValueError, match="bits must be one of 2 to 8, got 9"):
        pack({}, 9)
