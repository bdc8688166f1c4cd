"""Log probabilities of a prompt, from its logits."""

import pytest
import torch

from serve.engines.trtllm.scoring import prompt_logprobs
from serve.errors import RequestError


def logits_of(tokens: int, vocab: int = 11) -> torch.Tensor:
    return torch.randn(tokens, vocab, generator=torch.Generator().manual_seed(3)) * 4


@pytest.mark.parametrize("tokens", [1, 2, 300, 513])
@pytest.mark.parametrize("count", [0, 3])
def test_each_token_is_scored_by_the_row_before_it(tokens: int, count: int) -> None:
    logits = logits_of(tokens)
    prompt = torch.randint(0, 11, (tokens,), generator=torch.Generator().manual_seed(4)).tolist()
    entries = prompt_logprobs(logits, prompt, count)
    expected = logits.log_softmax(-1)
    assert len(entries) == tokens
    assert entries[0] is None
    for i, entry in enumerate(entries[1:], 1):
        assert entry is not None
        assert entry.token_id == prompt[i]
        assert entry.logprob == pytest.approx(expected[i - 1, prompt[i]].item(), abs=1e-5)
        best = expected[i - 1].topk(count)
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_half_precision_and_a_leading_axis() -> None:
    logits = logits_of(5)
    plain = prompt_logprobs(logits, [1, 2, 3, 4, 5], 1)
    other = prompt_logprobs(logits[None].to(torch.bfloat16), [1, 2, 3, 4, 5], 1)
    for entry, half in zip(plain[1:], other[1:], strict=True):
        assert entry is not None
        assert half is not None
        assert half.logprob == pytest.approx(entry.logprob, abs=0.2)


def test_trap_logits_of_reused_blocks_are_missed() -> None:
    with pytest.raises(RequestError, match="only 3 of 5") as raised:
        prompt_logprobs(logits_of(3), [1, 2, 3, 4, 5], 1)
    assert raised.value.param == "prompt_logprobs"
