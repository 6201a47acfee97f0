"""One digest for all files that are checked when read."""

import hashlib

from hsa_ultralong.files.checksum import file_digest, file_record


def test_the_digest_is_that_of_all_bytes(tmp_path):
    for size in (0, 5, (1 << 20) + 3):
        content = bytes(range(256)) * (size // 256 + 1)
        (tmp_path / "file").write_bytes(content[:size])
        expected = hashlib.sha256(content[:size]).hexdigest()
        assert file_digest(tmp_path / "file") == expected
        assert file_record(tmp_path / "file") == {"bytes": size, "sha256": expected}
