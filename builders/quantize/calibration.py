"""Calibration: texts -> batches that fit the memory, and the pass over them. Needs PyTorch for the pass alone.

Batches have no padding: what a layer sees at padded positions would count for its scales. Short texts follow each other
in rows of equal length instead, each with its own beginning, as AWQ's and GPTQ's authors do it. AWQ tries its scales
once for each batch: few large ones take a fraction of the time.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from builders.errors import BuildFailed

# Of each token: the residual stream and what a layer makes of it, in 16 bits, with the quantizers' float32 copies.
_HIDDEN_COPIES = 24
_LOGIT_BYTES = 8  # 16 bits, and a float32 copy
_SHARE = 0.5  # of the free memory
_MAX_BATCH_TOKENS = 16_384


def tokens_of_a_batch(free_bytes: int, hidden_size: int, intermediate_size: int, vocab_size: int) -> int:
    """Return how many tokens are computed at once.

    Args:
        free_bytes: Memory that is free once the model is loaded.
        hidden_size: Of the model.
        intermediate_size: Of its widest layer.
        vocab_size: Of the model.
    """
    token_bytes = _HIDDEN_COPIES * (hidden_size + intermediate_size) + _LOGIT_BYTES * vocab_size
    return max(1, min(_MAX_BATCH_TOKENS, int(free_bytes * _SHARE) // token_bytes))


def make_batches(samples: Sequence[Sequence[int]], batch_tokens: int) -> list[list[Sequence[int]]]:
    """Lay texts one after the other into rows as long as the longest, and put as many rows together as fit.

    Args:
        samples: Token ids, none empty.
        batch_tokens: Of one batch, at most; a longer row is a batch by itself.

    Returns:
        Every token once, in order; only the last row may be shorter, and then is a batch by itself.
    """
    length = max(map(len, samples))
    tokens = [token for sample in samples for token in sample]
    rows: list[Sequence[int]] = [tokens[start : start + length] for start in range(0, len(tokens), length)]
    rest = [rows.pop()] if len(rows[-1]) < length else []
    count = max(1, batch_tokens // length)
    return [rows[start : start + count] for start in range(0, len(rows), count)] + ([rest] if rest else [])


def check_samples(samples: Iterable[Sequence[int]], vocab_size: int) -> None:
    """Check token ids against the model.

    Raises:
        BuildFailed: The tokenizer is another model's.
    """
    highest = max(max(sample) for sample in samples)
    if highest >= vocab_size:
        raise BuildFailed(
            "quantize",
            f"the tokenizer makes token {highest}, but the model has {vocab_size}; is tokenizer.json another model's?",
        )


class CalibrationPass:
    """Runs a model over all batches: what ModelOpt calls, once or several times.

    Args:
        batches: Of token ids.
        passes: How often it will be called, as far as is known.
        progress: Told rows, their number over all passes, and what is done.
        with_head: Whether the output head has to see its inputs, too.
    """

    def __init__(
        self,
        batches: Sequence[Sequence[Sequence[int]]],
        passes: int,
        progress: Callable[[int, int, str], None],
        *,
        with_head: bool = False,
    ) -> None:
        self._batches = batches
        self._progress = progress
        self._with_head = with_head
        self._total = sum(map(len, batches)) * passes
        self._done = 0

    @property
    def tokens(self) -> int:
        """Tokens of one pass."""
        return sum(len(sample) for batch in self._batches for sample in batch)

    def __call__(self, model: Any) -> None:
        """Compute all batches, and forget the outputs."""
        import torch  # a GPU library: late

        # Logits of all positions take more memory than all else, and calibrate nothing if the head stays as it is.
        body = model if self._with_head else getattr(model, model.base_model_prefix, model)
        device = model.get_input_embeddings().weight.device
        with torch.no_grad():
            for batch in self._batches:
                body(input_ids=torch.tensor(batch, device=device), use_cache=False)
                self._done += len(batch)
                self._progress(min(self._done, self._total), self._total, "calibrating")
