FIRST_MM_EMBEDDING_INDEX = 1_000_000_000


class Allocator:
    next_token_index = FIRST_MM_EMBEDDING_INDEX


global_allocator = Allocator()
