"""Paged KV blocks as TensorRT-LLM keeps them: a tree of blocks by their tokens, two levels, eviction of leaves.

Reference 1.5, 2.7 and 2.8. The memory is real: a block holds keys and values, and a prefix hit copies them.
"""

from dataclasses import dataclass, field
from typing import Any

from trtllm_double.block_key import cut, v1_hash
from trtllm_double.events import EventBuffer, stored_block

_PRIORITY = 35  # KvCacheRetentionConfig's default


@dataclass(eq=False)
class Block:
    """Keys and values of consecutive tokens. Level 0 is the GPU, 1 the host."""

    tokens: tuple[int, ...] = ()
    block_hash: int = 0
    parent: "Block | None" = None
    kv: Any = None
    level: int = 0
    users: int = 0
    used_at: int = 0
    children: dict[tuple[int, ...], "Block"] = field(default_factory=dict)


@dataclass
class Holding:
    """What one sequence has: shared blocks from the tree, and private ones."""

    root: Block
    shared: list[Block] = field(default_factory=list)
    private: int = 0
    pledged: int = 0


class BlockCache:
    """All KV blocks of a rank.

    Args:
        primary, secondary: Blocks on the GPU and on the host.
        reuse, partial_reuse: As KvCacheConfig names them.
        min_offload_priority: Blocks of lower priority are not moved to the host.
    """

    def __init__(
        self,
        primary: int,
        secondary: int,
        tokens_per_block: int,
        events: EventBuffer,
        *,
        reuse: bool = True,
        partial_reuse: bool = True,
        min_offload_priority: int = 0,
    ) -> None:
        self.primary, self.secondary, self.tokens_per_block = primary, secondary, tokens_per_block
        self._events = events
        self._reuse, self._partial = reuse, partial_reuse
        self._offloads = secondary > 0 and min_offload_priority <= _PRIORITY
        self._roots: dict[tuple[int | None, int | None], Block] = {}
        self._blocks: tuple[set[Block], set[Block]] = (set(), set())  # those in the tree, by level
        self._in_use = 0  # blocks of the tree that sequences hold
        self._private = 0
        self._pledged = 0
        self._clock = 0
        self.alloc_total = self.alloc_new = self.reused = self.missed = 0

    @property
    def used(self) -> int:
        """Blocks on the GPU that sequences hold."""
        return self._in_use + self._private

    @property
    def held(self) -> int:
        """Blocks on the GPU with content, in use or not."""
        return len(self._blocks[0]) + self._private

    def match(
        self, prompt: list[int], salt_id: int | None, lora_id: int | None
    ) -> tuple[list[Block], tuple[Block, int] | None]:
        """Return the blocks that a prompt can share, and one whose first tokens it can copy. Its last token never."""
        node = self._roots.get((salt_id, lora_id))
        shared: list[Block] = []
        if not self._reuse or node is None:
            return shared, None
        for tokens in cut(prompt, self.tokens_per_block, partial=True):
            child = node.children.get(tokens) if len(tokens) == self.tokens_per_block else None
            if child is not None:
                shared.append(child)
                node = child
                continue
            best = max(node.children.values(), key=lambda b: _common(b.tokens, tokens), default=None)
            if self._partial and best is not None and (count := _common(best.tokens, tokens)):
                return shared, (best, count)
            break
        return shared, None

    def admit(
        self, prompt: list[int], salt_id: int | None, lora_id: int | None, total_tokens: int, *, pledge: bool
    ) -> "tuple[Holding, int, list[Any]] | None":
        """Take the blocks of a prompt; None if there is no room now.

        `total_tokens` includes the output; with `pledge`, room is set aside for all of it (GUARANTEED_NO_EVICT).

        Returns:
            What the sequence has, how many tokens are reused, and the keys and values to copy, in order.
        """
        shared, partial = self.match(prompt, salt_id, lora_id)
        whole, first = self.blocks_for(total_tokens), self.blocks_for(len(prompt))
        idle = sum(1 for block in shared if not block.users)
        new = (whole if pledge else first) - len(shared)
        if self.used + self._pledged + idle + new > self.primary:
            return None
        holding = Holding(self._root(salt_id, lora_id), shared)
        for block in shared:
            self._use(block)
        parts = [block.kv for block in shared]
        reused = len(shared) * self.tokens_per_block
        if partial is not None:
            parts.append(partial[0].kv[:, :, :, : partial[1]])
            reused += partial[1]
        for block in shared:
            self._onboard(block)
        self.reused += len(shared)
        self.missed += first - len(shared)
        holding.pledged = max(0, new - (first - len(shared)))
        self._pledged += holding.pledged
        self._take(holding, first - len(shared))
        return holding, reused, parts

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.tokens_per_block)

    def grow(self, holding: Holding) -> bool:
        """Take one more block for a sequence; False if there is none."""
        if holding.pledged:
            holding.pledged -= 1
            self._pledged -= 1
        elif self.used + self._pledged >= self.primary:
            return False
        self._take(holding, 1)
        return True

    def store(self, holding: Holding, tokens: list[int], kv: Any, *, partial: bool) -> None:
        """Put a sequence's computed blocks into the tree, under their tokens; private ones become shared."""
        if not self._reuse:
            return
        stored: list[dict[str, Any]] = []
        node, parent_hash = holding.root, None
        for index, part in enumerate(cut(tokens, self.tokens_per_block, partial=partial)):
            if index < len(holding.shared):
                node = holding.shared[index]
                continue
            child = node.children.get(part)
            if child is None:
                start = index * self.tokens_per_block
                block = Block(part, v1_hash(part, node.block_hash, *self._salt(holding.root)), node)
                block.kv = kv.copy_out(start, start + len(part))
                if not stored:
                    parent_hash = node.block_hash or None
                stored.append(stored_block(block.block_hash, part, 0, _PRIORITY))
                node.children[part] = child = block
                self._blocks[0].add(block)
            elif child.level:
                self._onboard(child)  # the sequence's own copy takes its place
            self._private -= 1
            holding.private -= 1
            holding.shared.append(child)
            self._use(child)
            node = child
        if stored:
            self._events.stored(parent_hash, stored)
        self._shrink()

    def release(self, holding: Holding) -> None:
        """Give back all that a sequence has; what is in the tree stays there for reuse."""
        self._private -= holding.private
        self._pledged -= holding.pledged
        holding.private = holding.pledged = 0
        for block in reversed(holding.shared):  # leaves first, so that they are evicted first
            block.users -= 1
            self._clock += 1
            block.used_at = self._clock
            if not block.users:
                self._in_use -= 1
        holding.shared = []

    def _salt(self, root: Block) -> tuple[int | None, int | None]:
        return next(key for key, value in self._roots.items() if value is root)

    def _root(self, salt_id: int | None, lora_id: int | None) -> Block:
        return self._roots.setdefault((salt_id, lora_id), Block())

    def _use(self, block: Block) -> None:
        if not block.users:
            self._in_use += 1
        block.users += 1

    def _take(self, holding: Holding, count: int) -> None:
        holding.private += count
        self._private += count
        self.alloc_total += count
        self.alloc_new += count
        self._shrink()

    def _onboard(self, block: Block) -> None:
        if block.level:
            self._blocks[1].remove(block)
            self._blocks[0].add(block)
            block.level = 0
            self._events.moved(block.block_hash, 1, 0)
            self._shrink()

    def _shrink(self) -> None:
        """Evict until everything fits: to the host if there is one, else for good."""
        while self.held > self.primary:
            block = self._oldest(0)
            if (self._offloads and not block.children) or (
                self._offloads and all(c.level for c in block.children.values())
            ):
                self._blocks[0].remove(block)
                self._blocks[1].add(block)
                block.level = 1
                self._events.moved(block.block_hash, 0, 1)
                while len(self._blocks[1]) > self.secondary:
                    self._drop(self._oldest(1))
            else:
                self._drop(block)

    def _oldest(self, level: int) -> Block:
        idle = (
            b for b in self._blocks[level] if not b.users and not any(c.level == level for c in b.children.values())
        )
        block = min(idle, key=lambda b: b.used_at, default=None)
        if block is None:
            raise MemoryError("no KV block can be evicted: the scheduler has miscounted")
        return block

    def _drop(self, block: Block) -> None:
        for child in list(block.children.values()):
            self._drop(child)
        self._blocks[block.level].discard(block)
        if block.parent is not None:
            block.parent.children.pop(block.tokens, None)
        block.kv = None
        self._events.removed(block.block_hash)


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
