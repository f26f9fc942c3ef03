"""How much memory objects hold."""

import gc

from torch import Tensor


def held(root: object) -> int:
    """Bytes of all tensors that an object keeps alive, each piece of memory once."""
    seen, found, queue = set[int](), dict[int, int](), [root]
    while queue:
        x = queue.pop()
        if id(x) in seen or isinstance(x, type):
            continue
        seen.add(id(x))
        if isinstance(x, Tensor):
            storage = x.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        else:
            queue += gc.get_referents(x)
    return sum(found.values())
