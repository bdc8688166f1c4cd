"""A naive model of TensorRT-LLM's block reuse, which tells its changes as the runtime's KV-cache events do."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from serve.core.blocks import ROOT, block_hashes
from serve.engines.trtllm.block_key import block_key

Event = dict[str, Any]


@dataclass
class Node:
    """A block that can be reused."""

    tokens: tuple[int, ...]
    path: tuple[int, ...]  # all tokens to its end
    parent: int | None
    tier: int = 0


@dataclass
class RadixCache:
    """One rank's blocks; every change appends an event.

    Attributes:
        size: Tokens of a block.
        rank: Its attention-DP rank; None without attention DP.
        window: Attention window of the pool.
        nodes: By v1 block key.
        events: All there ever were.
    """

    size: int
    rank: int | None = None
    window: int = 4096
    first_salt_id: int | None = None
    nodes: dict[int, Node] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tell({"type": "created", "num_blocks_per_cache_level": [100, 50]})

    def tell(self, data: Event) -> None:
        event: Event = {"event_id": len(self.events), "window_size": self.window, "data": data}
        if self.rank is not None:
            event["attention_dp_rank"] = self.rank
        self.events.append(event)

    def store(self, tokens: Sequence[int]) -> None:
        """Store a sequence's blocks, a partial one last; blocks on its way come back to the GPU."""
        parent: int | None = None
        fresh_parent: int | None = None
        fresh: list[int] = []
        for start in range(0, len(tokens), self.size):
            block = tuple(tokens[start : start + self.size])
            key = block_key(block, parent or 0, self.first_salt_id)
            if key in self.nodes:
                self.move(key, 0)
            else:
                if not fresh:
                    fresh_parent = parent
                self.nodes[key] = Node(block, tuple(tokens[: start + len(block)]), parent)
                fresh.append(key)
            parent = key
        if fresh:
            blocks = [_stored_block(key, self.nodes[key].tokens) for key in fresh]
            self.tell({"type": "stored", "parent_hash": fresh_parent, "blocks": blocks})

    def leaves(self) -> list[int]:
        parents = {node.parent for node in self.nodes.values()}
        return [key for key in self.nodes if key not in parents]

    def remove(self, keys: Sequence[int]) -> None:
        for key in keys:
            del self.nodes[key]
        self.tell({"type": "removed", "block_hashes": list(keys)})

    def move(self, key: int, tier: int) -> None:
        node = self.nodes[key]
        if node.tier != tier:
            change = {"type": "event_diff", "new_value": tier, "old_value": node.tier}
            self.tell({"type": "updated", "block_hash": key, "cache_level": change, "priority": None})
            node.tier = tier

    def truth(self) -> dict[int, tuple[int, int]]:
        """Return hash, parent and tier of every whole block, in our words."""
        found = {}
        for node in self.nodes.values():
            if len(node.tokens) == self.size:
                hashes = [ROOT, *block_hashes(node.path, self.size).tolist()]
                found[hashes[-1]] = (hashes[-2], node.tier)
        return found


def _stored_block(key: int, tokens: tuple[int, ...]) -> Event:
    told = [{"type": "unique_token", "token_id": token, "token_extra_id": 0} for token in tokens]
    return {"type": "stored_block", "block_hash": key, "tokens": told, "cache_level": 0, "priority": 35}
