"""Reading into a memory, editing it, generating and asking with it."""

from hsa_ultralong.inference.ask import Answer, ask
from hsa_ultralong.inference.editor import edit
from hsa_ultralong.inference.engine import DecodingEngine
from hsa_ultralong.inference.library import Library
from hsa_ultralong.inference.prompts import as_question
from hsa_ultralong.inference.reader import append, close_document, memorize
from hsa_ultralong.inference.rebuilding import rebuild
from hsa_ultralong.inference.sharding import join, memorize_together, open_shared, share_out
from hsa_ultralong.models.fingerprint import memory_fingerprint
from hsa_ultralong.models.reading import last_logits
from hsa_ultralong.models.remembering import generate_with_memory

__all__ = [
    "Answer",
    "DecodingEngine",
    "Library",
    "append",
    "as_question",
    "ask",
    "close_document",
    "edit",
    "generate_with_memory",
    "join",
    "last_logits",
    "memorize",
    "memorize_together",
    "memory_fingerprint",
    "open_shared",
    "rebuild",
    "share_out",
]
