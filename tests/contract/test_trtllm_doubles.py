"""The doubles of TensorRT-LLM are as strict as it is: what upstream refuses, or punishes later, fails here too.

Numbers of sections are those of the reference sheet of upstream's API that the doubles were written from.
"""

import asyncio
import importlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.doubles.install import LineName, installed

QUICKSTART = Path(__file__).resolve().parents[2] / "serve" / "models" / "quickstart"
IN_PROCESS = {"TLLM_WORKER_USE_SINGLE_PROCESS": "1"}
PROMPT = list(range(100, 150))


class Library:
    """One line's double, imported."""

    def __init__(self, line: LineName, faults: Path) -> None:
        self.line, self.faults = line, faults
        self.made: list[Any] = []
        self.RequestError = self.named("tensorrt_llm.llmapi", "RequestError")

    def named(self, module: str, name: str) -> Any:
        return getattr(importlib.import_module(module), name)

    def config(self, name: str, **fields: Any) -> Any:
        return self.named("tensorrt_llm.llmapi.llm_args", name)(**fields)

    def params(self, **fields: Any) -> Any:
        return self.named("tensorrt_llm", "SamplingParams")(**{"end_id": -1, "max_tokens": 8, **fields})

    def llm(self, *, kv: dict[str, Any] | None = None, **keywords: Any) -> Any:
        cache = self.config("KvCacheConfig", **{"event_buffer_max_size": 1000, "tokens_per_block": 8, **(kv or {})})
        keywords = {"skip_tokenizer_init": True, "enable_iter_perf_stats": True, "kv_cache_config": cache, **keywords}
        made = self.named("tensorrt_llm", "LLM")(str(QUICKSTART), **keywords)
        self.made.append(made)
        return made

    def events(self, llm: Any) -> list[dict[str, Any]]:
        """Return all events; those of 1.2.x are pushed every 0.2 s."""
        events: list[dict[str, Any]] = llm.get_kv_cache_events(timeout=0.5)
        return events


@pytest.fixture(scope="module", params=["1.2.x", "newest"])
def line(request: pytest.FixtureRequest) -> Iterator[LineName]:
    with installed(request.param, **IN_PROCESS):
        yield request.param


@pytest.fixture
def library(line: LineName, tmp_path: Path) -> Iterator[Library]:
    before = dict(os.environ)
    os.environ["TRTLLM_DOUBLE_FAULTS"] = str(tmp_path)
    library = Library(line, tmp_path)
    yield library
    for made in library.made:
        made._shutdown()
    os.environ.clear()  # an LLM changes it
    os.environ.update(before)


def newest_only(library: Library) -> None:
    if library.line != "newest":
        pytest.skip("the newest line's")


def old_only(library: Library) -> None:
    if library.line != "1.2.x":
        pytest.skip("1.2.x's")


class TestConstructor:
    """Sections 1 and 4.1."""

    def test_an_unknown_keyword_is_named(self, library: Library) -> None:
        with pytest.raises(ValueError, match="LLM got invalid argument: kv_cache_free_gpu_memory_fraction"):
            library.llm(kv_cache_free_gpu_memory_fraction=0.5)

    def test_nested_configs_forbid_unknown_fields(self, library: Library) -> None:
        for name in ("KvCacheConfig", "SchedulerConfig", "CacheTransceiverConfig", "MoeConfig", "RayPlacementConfig"):
            with pytest.raises(ValueError, match="Extra inputs are not permitted"):
                library.config(name, no_such_field=1)
        with pytest.raises(ValueError, match="Extra inputs are not permitted"):
            library.llm(scheduler_config={"no_such_field": 1})

    def test_keywords_of_the_other_line(self, library: Library) -> None:
        theirs = {"1.2.x": "model_kwargs", "newest": "sampler_type"}[library.line]
        with pytest.raises(ValueError, match=f"got invalid argument: {theirs}"):
            library.llm(**{theirs: None})
        field = {"1.2.x": "kv_cache_event_hash_algo", "newest": "onboard_blocks"}[library.line]
        with pytest.raises(ValueError, match="Extra inputs"):
            library.config("KvCacheConfig", **{field: None})

    def test_keywords_of_the_tensorrt_backend(self, library: Library) -> None:
        old_only(library)
        with pytest.raises(ValueError, match="_tensorrt_engine"):
            library.llm(build_config=None)

    def test_dataclasses_refuse_with_a_type_error(self, library: Library) -> None:
        with pytest.raises(TypeError, match="max_new_tokens"):
            library.params(max_new_tokens=3)
        other = {"1.2.x": "thinking_token_budget", "newest": "lookahead_config"}[library.line]
        with pytest.raises(TypeError, match=other):
            library.params(**{other: None})

    def test_wrong_types_and_values(self, library: Library) -> None:
        wrong: dict[str, Any] = {"tensor_parallel_size": "two", "load_format": "fast", "orchestrator_type": "slurm"}
        for name, value in wrong.items():
            with pytest.raises(ValueError, match=name):
                library.llm(**{name: value})
        with pytest.raises(ValueError, match="free_gpu_memory_fraction"):
            library.config("KvCacheConfig", free_gpu_memory_fraction=1.5)

    def test_it_needs_a_visible_gpu(self, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        with pytest.raises(RuntimeError, match="No CUDA GPUs"):
            library.llm()

    def test_it_counts_gpus_unless_ray_train_does(self, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRTLLM_DOUBLE_GPUS", "2")
        with pytest.raises(RuntimeError, match=r"Only 2 GPUs are available, but 4 are required\."):
            library.llm(tensor_parallel_size=4, gpus_per_node=4)
        monkeypatch.setenv("RAY_LOCAL_WORLD_SIZE", "4")
        assert library.llm(tensor_parallel_size=4).args.gpus_per_node == 4

    def test_ray_settings_need_the_ray_orchestrator(self, library: Library) -> None:
        with pytest.raises(ValueError, match="orchestrator_type='ray'"):
            library.llm(ray_placement_config=library.config("RayPlacementConfig"))

    def test_placement_is_checked(self, library: Library) -> None:
        with pytest.raises(ValueError, match="together"):
            library.config("RayPlacementConfig", placement_groups=[])
        with pytest.raises(ValueError, match="PlacementGroup objects"):
            library.config("RayPlacementConfig", placement_groups=["group"], placement_bundle_indices=[[0]])
        with pytest.raises(ValueError, match="per_worker_gpu_share"):
            library.config("RayPlacementConfig", per_worker_gpu_share=1.5)

    def test_a_dict_of_speculation_has_to_name_its_kind(self, library: Library) -> None:
        with pytest.raises(ValueError, match="speculative_config"):
            library.llm(speculative_config={"max_draft_len": 3})

    def test_it_changes_the_environment(self, library: Library) -> None:
        library.llm(env_overrides={"DOUBLE_WAS_HERE": "1"})
        assert os.environ["DOUBLE_WAS_HERE"] == "1"

    def test_a_variable_left_over_makes_the_next_llm_a_ray_one(
        self, library: Library, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TLLM_DISABLE_MPI", "1")
        with pytest.raises(ImportError if library.line == "1.2.x" else Exception) as raised:
            library.llm(num_postprocess_workers=1)
        if library.line == "1.2.x":
            assert "PlacementGroupSchedulingStrategy" in str(raised.value)
        else:
            assert "RayExecutor" in str(raised.value)

    def test_it_cannot_be_pickled(self, library: Library) -> None:
        with pytest.raises(RuntimeError, match="pickled"):
            pickle.dumps(library.llm())

    def test_names_of_the_newest_line(self, library: Library) -> None:
        llm = library.llm()
        newest = library.line == "newest"
        assert hasattr(llm, "get_kv_cache_capacity") == hasattr(llm, "startup_metrics") == newest
        assert hasattr(importlib.import_module("tensorrt_llm.executor"), "EngineDeadError") == newest
        assert (importlib.util.find_spec("tensorrt_llm._tensorrt_engine") is None) == newest

    def test_async_llm_takes_placement_first(self, library: Library) -> None:
        async_llm = library.named("tensorrt_llm", "AsyncLLM")
        with pytest.raises(ValueError, match="placement_groups"):
            async_llm(str(QUICKSTART))
        llm = async_llm(model=str(QUICKSTART))
        assert (llm.args.allreduce_strategy, llm.args.orchestrator_type) == ("NCCL", "ray")
        with pytest.raises(RuntimeError, match="async with"), llm:
            pass
        with pytest.raises(RuntimeError, match="shutting down"):
            llm.generate_async(PROMPT, library.params())


class TestRequests:
    """Sections 2.1 to 2.4 and 3.1."""

    async def test_keywords_of_generate_async(self, library: Library) -> None:
        llm = library.llm()
        with pytest.raises(TypeError, match="stream"):
            llm.generate_async(PROMPT, library.params(), stream=True)
        if library.line == "1.2.x":
            with pytest.raises(TypeError, match="priority"):
                llm.generate_async(PROMPT, library.params(), priority=0.5)
        else:
            await llm.generate_async(PROMPT, library.params(), priority=0.7)
            with pytest.raises(ValueError, match="priority"):
                llm.generate_async(PROMPT, library.params(), priority=2.0)

    async def test_parameters_are_checked_and_used_once(self, library: Library) -> None:
        llm, params = library.llm(), library.params()
        with pytest.raises(TypeError, match="SamplingParams"):
            llm.generate_async(PROMPT, {"max_tokens": 3})
        await llm.generate_async(PROMPT, params)
        with pytest.raises(AssertionError, match="second request"):
            llm.generate_async(PROMPT, params)

    async def test_without_a_tokenizer(self, library: Library) -> None:
        llm = library.llm()
        with pytest.raises(ValueError, match="tokenizer"):
            llm.generate_async("text", library.params())
        with pytest.raises(ValueError, match="end_id"):
            llm.generate_async(PROMPT, library.params(end_id=None))

    async def test_setup_fills_the_object_in(self, library: Library) -> None:
        params = library.params(end_id=None, stop="\n")
        await library.llm(skip_tokenizer_init=False).generate_async("Ray is", params)
        assert (params.end_id, params.pad_id) == (2, 0)

    async def test_a_long_prompt_is_refused_at_once(self, library: Library) -> None:
        long = [7] * 65
        llm = library.llm(max_num_tokens=64)
        with pytest.raises(library.RequestError, match="max_num_tokens"):
            llm.generate_async(long, library.params())
        out = await library.llm(max_num_tokens=64, enable_chunked_prefill=True).generate_async(long, library.params())
        assert out.outputs[0].length == 8

    async def test_a_stream_is_one_object_with_cumulative_tokens(self, library: Library) -> None:
        out = library.llm().generate_async(PROMPT, library.params(max_tokens=20, logprobs=1), streaming=True)
        seen: list[int] = []
        async for again in out:
            assert again is out
            seen += out.outputs[0].token_ids_diff
            assert out.outputs[0].token_ids == seen
            assert len(out.outputs[0].logprobs) == len(seen)
        assert (len(seen), out.outputs[0].finish_reason, out.finished) == (20, "length", True)

    async def test_awaiting_and_iterating_do_not_mix(self, library: Library) -> None:
        out = library.llm().generate_async(PROMPT, library.params(max_tokens=20), streaming=True)
        await anext(aiter(out))
        with pytest.raises(AssertionError, match="do not mix"):
            await out

    def test_awaiting_needs_a_loop_from_the_beginning(self, library: Library) -> None:
        out = library.llm().generate_async(PROMPT, library.params())
        with pytest.raises(AssertionError, match="event loop was not present"):
            asyncio.run(out.aresult())
        assert out.result().outputs[0].length == 8

    def test_all_requests_are_made_on_one_loop(self, library: Library) -> None:
        llm = library.llm()

        async def other_loop() -> None:
            llm.generate_async(PROMPT, library.params())

        async def first_loop() -> None:
            await llm.generate_async(PROMPT, library.params())
            with pytest.raises(AssertionError, match="one event loop"):
                await asyncio.to_thread(asyncio.run, other_loop())

        asyncio.run(first_loop())

    async def test_abort_ends_it_later(self, library: Library) -> None:
        out = library.llm().generate_async(PROMPT, library.params(max_tokens=3000), streaming=True)
        await anext(aiter(out))
        out.abort()
        assert not out.finished
        async for _ in out:
            pass
        assert out.outputs[0].finish_reason == "cancelled"

    async def test_max_tokens_0_twice_kills_the_engine(self, library: Library) -> None:
        llm = library.llm()
        await llm.generate_async(PROMPT, library.params(max_tokens=0))
        llm.generate_async(PROMPT, library.params(max_tokens=0))
        await until(lambda: llm._executor._fatal is not None)
        with pytest.raises(Exception, match="illegal memory"):
            llm.generate_async(PROMPT, library.params())

    async def test_a_stop_word_in_the_last_place_is_length(self, library: Library) -> None:
        llm = library.llm()
        free = (await llm.generate_async(PROMPT, library.params())).outputs[0].token_ids
        at = free.index(free[5])
        stopped = (await llm.generate_async(PROMPT, library.params(stop_token_ids=[free[5]]))).outputs[0]
        assert (stopped.token_ids, stopped.finish_reason, stopped.stop_reason) == (free[:at], "stop", free[5])
        params = library.params(stop_token_ids=[free[5]], max_tokens=at + 1)
        assert (await llm.generate_async(PROMPT, params)).outputs[0].finish_reason == "length"
        ended = (await llm.generate_async(PROMPT, library.params(end_id=free[5]))).outputs[0]
        assert (ended.token_ids, ended.stop_reason) == (free[: at + 1], None)

    async def test_draws_without_a_seed_are_the_same(self, library: Library) -> None:
        llm = library.llm()
        drawn = [await llm.generate_async(PROMPT, library.params(temperature=2.0)) for _ in range(2)]
        other = await llm.generate_async(PROMPT, library.params(temperature=2.0, seed=1))
        assert drawn[0].outputs[0].token_ids == drawn[1].outputs[0].token_ids != other.outputs[0].token_ids

    async def test_top_p_0_is_refused_by_the_worker(self, library: Library) -> None:
        with pytest.raises(library.RequestError, match="top_p"):
            await library.llm().generate_async(PROMPT, library.params(top_p=0.0))

    async def test_prompt_logprobs_lack_what_was_cached(self, library: Library) -> None:
        llm = library.llm()
        for cached in (0, 48):
            out = await llm.generate_async(PROMPT, library.params(prompt_logprobs=1, max_tokens=1))
            assert out.cached_tokens == pytest.approx(cached, abs=1)
            assert len(out.outputs[0].prompt_logprobs) == len(PROMPT) - out.cached_tokens


class TestErrors:
    """Sections 2.5 and 7.3."""

    async def test_a_request_fails_and_the_rest_goes_on(self, library: Library) -> None:
        llm = library.llm()
        (library.faults / "request_error").write_text("CUDA error: an illegal memory access was encountered")
        with pytest.raises(library.RequestError, match="illegal memory"):
            await llm.generate_async(PROMPT, library.params())
        await llm.generate_async(PROMPT, library.params())
        assert llm._check_health() is True

    async def test_a_background_error_shuts_down(self, library: Library) -> None:
        llm = library.llm()
        (library.faults / "crash").write_text("the loop is gone")
        out = llm.generate_async(PROMPT, library.params())
        if library.line == "newest":
            with pytest.raises(library.named("tensorrt_llm.executor", "EngineDeadError"), match="the loop is gone"):
                await out
        await until(lambda: llm._executor._fatal is not None)
        assert llm._check_health() is (library.line == "1.2.x")
        with pytest.raises(RuntimeError, match="the loop is gone"):
            llm.generate_async(PROMPT, library.params())
        with pytest.raises(RuntimeError, match="LLM is shutting down"):
            llm.generate_async(PROMPT, library.params())
        assert llm._check_health() is False

    def test_shutdown_can_block(self, library: Library) -> None:
        llm = library.llm()
        (library.faults / "block_shutdown").touch()
        blocked = threading.Thread(target=llm.shutdown)
        blocked.start()
        assert llm._check_health() or blocked.is_alive()
        (library.faults / "block_shutdown").unlink()
        blocked.join()
        assert llm._check_health() is False

    async def test_blocking_calls_on_the_loop_are_found(self, library: Library) -> None:
        llm = library.llm()
        await llm.generate_async(PROMPT, library.params())
        for call in (llm.get_stats, llm.get_kv_cache_events, llm.shutdown):
            with pytest.raises(AssertionError, match="event loop"):
                call()

    async def test_a_killed_rank(self, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TLLM_WORKER_USE_SINGLE_PROCESS")
        llm = await asyncio.to_thread(library.llm, tensor_parallel_size=2)
        out = llm.generate_async(PROMPT, library.params(max_tokens=3000), streaming=True)
        await anext(aiter(out))
        pids = llm._executor.pids()
        os.kill(pids[1], signal.SIGKILL)
        if library.line == "newest":
            with pytest.raises(library.named("tensorrt_llm.executor", "EngineDeadError"), match="rank 1"):
                await drain(out)
            assert llm._check_health() is False
            await asyncio.to_thread(llm.shutdown)
            return
        await until(lambda: out._deliveries.on_loop.is_empty)
        assert llm._check_health() is True  # nobody noticed; it would wait for ever
        os.kill(pids[0], signal.SIGKILL)
        await asyncio.to_thread(llm.shutdown)

    async def test_one_gpu_takes_a_process_too(self, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
        in_process = await library.llm().generate_async(PROMPT, library.params())
        monkeypatch.delenv("TLLM_WORKER_USE_SINGLE_PROCESS")
        llm = await asyncio.to_thread(library.llm)
        assert list(llm._executor.pids()) == [0]
        out = await llm.generate_async(PROMPT, library.params())
        assert out.outputs[0].token_ids == in_process.outputs[0].token_ids
        assert await asyncio.to_thread(llm.get_stats, 0.5)
        await asyncio.to_thread(llm.shutdown)

    def test_a_worker_that_fails_while_it_loads(self, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TLLM_WORKER_USE_SINGLE_PROCESS")
        (library.faults / "fail_start").write_text("out of memory")
        with pytest.raises(RuntimeError, match="Executor worker"):
            library.llm()


class TestStatistics:
    """Section 2.6."""

    def test_reading_drains_and_waits(self, library: Library) -> None:
        llm = library.llm()
        if library.line == "1.2.x":
            assert llm.get_stats(0.0) == []
        llm.generate(PROMPT, library.params())
        started = time.monotonic()
        records = llm.get_stats(timeout=0.4)
        assert time.monotonic() - started >= 0.4
        assert records[-1]["kvCacheStats"]["usedNumBlocks"] == 0
        assert records[0]["inflightBatchingStats"]["numContextRequests"] == 1
        assert llm.get_stats(timeout=0.3) == []

    def test_they_are_off_unless_asked_for(self, library: Library) -> None:
        llm = library.llm(enable_iter_perf_stats=False)
        llm.generate(PROMPT, library.params())
        assert llm.get_stats(timeout=0.3) == []


class TestEvents:
    """Sections 2.7 and 2.8."""

    def test_before_the_first_request(self, library: Library) -> None:
        llm = library.llm()
        if library.line == "1.2.x":
            with pytest.raises(AssertionError):
                llm.get_kv_cache_events(0.0)
        else:
            assert [event["data"]["type"] for event in llm.get_kv_cache_events(0.0)] == ["created"]

    def test_hashes_ids_and_partial_blocks(self, library: Library) -> None:
        v1_hash = library.named("trtllm_double.block_key", "v1_hash")
        llm = library.llm()
        out = llm.generate(PROMPT, library.params(max_tokens=5))
        events = library.events(llm)
        assert [event["event_id"] for event in events] == list(range(len(events)))
        assert events[0]["data"]["type"] == "created"
        assert ("hash_algo" in events[0]) == (library.line == "newest")
        told: list[int] = []
        parent = 0
        for data in (event["data"] for event in events[1:]):
            assert data["type"] == "stored"
            assert data["parent_hash"] == (parent or None)
            for block in data["blocks"]:
                tokens = [token["token_id"] for token in block["tokens"]]
                parent = v1_hash(tokens, parent)
                assert block["block_hash"] == parent
                told += tokens
        assert told == (PROMPT + out.outputs[0].token_ids)[:-1]  # the last token is in no block
        assert len(told) % 8  # so that the last block is a partial one

    def test_the_hash_has_the_published_values(self, library: Library) -> None:
        v1_hash = library.named("trtllm_double.block_key", "v1_hash")
        assert v1_hash([1, 2, 3, 4]) == 924206229973855
        assert v1_hash([5, 6, 7, 8], 924206229973855) == 2728178455351807326

    def test_a_full_buffer_drops_the_oldest(self, library: Library) -> None:
        llm = library.llm(kv={"event_buffer_max_size": 3})
        llm.generate([[i, *PROMPT] for i in range(20)], library.params(max_tokens=1))
        events = library.events(llm)
        assert len(events) == 3
        assert events[0]["event_id"] > 0

    def test_no_buffer_no_events(self, library: Library) -> None:
        llm = library.llm(kv={"event_buffer_max_size": 0})
        llm.generate(PROMPT, library.params())
        assert library.events(llm) == []

    def test_eviction_removes_or_moves_to_the_host(self, library: Library) -> None:
        for host_bytes, kind in ((0, "removed"), (1 << 20, "updated")):
            llm = library.llm(kv={"max_tokens": 128, "host_cache_size": host_bytes})
            for i in range(6):
                llm.generate([i + 1, *PROMPT], library.params())
            kinds = [event["data"]["type"] for event in library.events(llm)]
            assert kind in kinds
            if host_bytes:
                assert llm.generate([1, *PROMPT, 5], library.params()).cached_tokens >= len(PROMPT)
                diffs = [
                    event["data"]["cache_level"] for event in library.events(llm) if "cache_level" in event["data"]
                ]
                assert {"type": "event_diff", "new_value": 0, "old_value": 1} in diffs

    def test_windows_and_attention_dp(self, library: Library) -> None:
        llm = library.llm(kv={"max_attention_window": [64, 4096]}, enable_attention_dp=True)
        llm.generate(PROMPT, library.params())
        events = library.events(llm)
        assert [event["window_size"] for event in events[:2]] == [64, 4096]
        assert {event["attention_dp_rank"] for event in events} == {0}

    def test_salts_separate(self, library: Library) -> None:
        llm = library.llm()
        cached = [llm.generate(PROMPT, library.params(), cache_salt=salt).cached_tokens for salt in ("a", "b", "a")]
        assert cached[:2] == [0, 0]
        assert cached[2] > 0


class TestTensorRt:
    """Section 5."""

    def test_build_save_and_load(self, library: Library, tmp_path: Path) -> None:
        old_only(library)
        llm_class = library.named("tensorrt_llm._tensorrt_engine", "LLM")
        build = library.named("tensorrt_llm.llmapi", "BuildConfig")(max_batch_size=4, max_seq_len=256)
        plain = library.llm().generate(PROMPT, library.params()).outputs[0].token_ids
        built = llm_class(str(QUICKSTART), skip_tokenizer_init=True, build_config=build)
        built.save(tmp_path / "engine")
        built.shutdown()
        assert not built.workspace.exists() if built._temporary else True
        with pytest.raises(ValueError, match="tp_size"):
            llm_class(str(tmp_path / "engine"), tensor_parallel_size=2)
        loaded = llm_class(str(tmp_path / "engine"), max_batch_size=64)
        library.made.append(loaded)
        assert loaded.tokenizer is None
        assert loaded.generate(PROMPT, library.params()).outputs[0].token_ids == plain
        with pytest.raises(ValueError, match="gather_context_logits"):
            loaded.generate(PROMPT, library.params(prompt_logprobs=1))
        with pytest.raises(ValueError, match="max_seq_len"):
            loaded.generate(PROMPT, library.params(max_tokens=300))

    def test_what_it_refuses(self, library: Library) -> None:
        old_only(library)
        llm_class = library.named("tensorrt_llm._tensorrt_engine", "LLM")
        with pytest.raises(ValueError, match="invalid argument: enable_iter_perf_stats"):
            llm_class(str(QUICKSTART), enable_iter_perf_stats=True)
        with pytest.raises(ValueError, match="PyTorch backend"):
            llm_class(str(QUICKSTART), kv_cache_config=library.config("KvCacheConfig", dtype="fp8"))


CHILD = """
import asyncio, json, os, sys
from tensorrt_llm import LLM, SamplingParams

async def run(llm):
    out = llm.generate_async(list(range(100, 150)), SamplingParams(max_tokens=8, end_id=-1), streaming=True)
    async for _ in out:
        pass
    return out.outputs[0].token_ids

if __name__ == "__main__":
    llm = LLM(sys.argv[1], tensor_parallel_size=2, skip_tokenizer_init=True)
    ranks = llm._executor.pids()
    parents = [int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1]) for pid in ranks.values()]
    tokens = asyncio.run(run(llm))
    llm.shutdown()
    print(json.dumps({"tokens": tokens, "ranks": sorted(ranks), "ours": parents == [os.getpid()] * 2}))
"""
AS_ROOT = ("OMPI_ALLOW_RUN_AS_ROOT", "PRTE_ALLOW_RUN_AS_ROOT")
MPI_ENVIRON = {
    **{name + suffix: "1" for name in AS_ROOT for suffix in ("", "_CONFIRM")},
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "TRTLLM_DOUBLE_SPAWN": "mpi",
}


class TestProcesses:
    """Section 4: the same tokens, whoever starts the ranks."""

    def test_ranks_that_mpi_spawns(self, library: Library, tmp_path: Path) -> None:
        pytest.importorskip("mpi4py", reason="needs mpi4py and an Open MPI")
        expected = library.llm().generate(PROMPT, library.params()).outputs[0].token_ids
        script = tmp_path / "script.py"  # MPI's workers import it again
        script.write_text(CHILD)
        environ = {name: value for name, value in os.environ.items() if name not in IN_PROCESS}
        ended = subprocess.run(
            [sys.executable, str(script), str(QUICKSTART)],
            env=environ | MPI_ENVIRON,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr[-2000:]
        told = json.loads(ended.stdout.splitlines()[-1])
        assert told == {"tokens": expected, "ranks": [0, 1], "ours": False}


async def drain(out: Any) -> None:
    async for _ in out:
        pass


async def until(condition: Any) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  # nobody announces it
            await asyncio.sleep(0.01)
