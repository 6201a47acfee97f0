"""Pages of one room hold what a room of its own would hold."""

import torch

from hsa_ultralong.inference.own_chunks import PagedChunks, RowChunks
from hsa_ultralong.nn.views import Search
from hsa_ultralong.testing.factories import random_tensor, tiny_model

CPU = torch.device("cpu")


def test_pages_show_rows_what_rooms_of_their_own_show_them():
    model = tiny_model()
    rooms = RowChunks(model, 3, 4, torch.float64, CPU)
    pages = PagedChunks(model, 3, 4, 9, torch.float64, CPU)
    for row, count in enumerate((3, 2, 4)):
        pages.hold([row], [pages.take(count)])
    assert pages.free == []
    config = model.config
    for number in range(1, 5):
        places = torch.tensor([4 * number, 4 * number, 4 * number - number % 2])
        k, v = (random_tensor(3, 4, config.num_memory_heads, config.head_dim, seed=number + i) for i in (0, 50))
        landmarks = random_tensor(3, 1, 1, config.retrieval_dim, seed=number + 90)
        for one in (rooms, pages):
            one.put((k, v, landmarks), places)
    query, search = random_tensor(3, 1, 1, config.retrieval_dim, seed=7), Search(3, None)
    for at in (3, 4, 9, 16):
        positions = torch.tensor([[min(at, 12)], [min(at, 8)], [at]], dtype=torch.int32)
        (own,), (paged,) = (one.view(positions).topk(query, search) for one in (rooms, pages))
        torch.testing.assert_close(own.scores, paged.scores)
    pages.release(1)
    assert len(pages.free) == 2 and not bool((pages.storage.segments == 1).any())
    pages.move(2, 1)
    assert bool((pages.storage.segments == 1).any()) and pages.taken.keys() == {0, 1}
