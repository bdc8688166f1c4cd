"""One answer that makes no sense costs its own stream, and neither the engine nor the group."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from serve.core.group_state import GroupState
from serve.core.request import GenerateRequest, SamplingParams, TokenDelta, pack_tokens
from serve.errors import StreamLost
from serve.workers.group import WorkerGroup
from serve.workers.group_settings import GroupSettings
from serve.workers.launchers.in_process import InProcessLauncher
from tests.unit.engines.trtllm.scripted_llm import RequestOutput, ScriptedLlm, make_engine

SETTINGS = GroupSettings(heartbeat_s=0.05, heartbeat_limit_s=0.2, end_grace_s=0.5, lease_s=1.0)


async def output_of(llm: ScriptedLlm, stream: AsyncGenerator[TokenDelta, None]) -> RequestOutput:
    """Begin a stream; it has read one token when this returns."""
    before = len(llm.outputs)
    reading = asyncio.ensure_future(anext(stream))
    while len(llm.outputs) == before:  # noqa: ASYNC110  # nobody announces it
        await asyncio.sleep(0.001)
    output = llm.outputs[-1]
    output.respond(7)
    assert (await reading).token_ids == (7,)
    return output


def spoil(output: RequestOutput, how: str) -> None:
    """Let the next response be one that no engine should give."""
    if how == "shrank":
        output.outputs[0].token_ids.clear()
        output.respond()
    else:
        output.cached_tokens = "many"  # type: ignore[assignment]
        output.respond(8)


@pytest.mark.parametrize("how", ["shrank", "unreadable"])
async def test_a_response_that_makes_no_sense_ends_its_stream_alone(how: str) -> None:
    llm = ScriptedLlm()
    group = WorkerGroup(InProcessLauncher(lambda _: make_engine(llm)), SETTINGS)
    await group.start()
    try:
        params = SamplingParams(max_tokens=4)
        odd, good = (group.generate(GenerateRequest(n, "m", pack_tokens([1, 2, 3]), params)) for n in ("odd", "good"))
        odd_output, good_output = await output_of(llm, odd), await output_of(llm, good)
        spoil(odd_output, how)
        with pytest.raises(StreamLost):
            await anext(odd)
        group.check_health()
        good_output.respond(9, finish="length")
        assert [delta.token_ids async for delta in good] == [(9,)]
        assert group.state is GroupState.READY
    finally:
        await group.stop()
