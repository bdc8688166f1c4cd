"""How close the simulated engine comes to published figures of TensorRT-LLM; and how fast it simulates.

    python -m benchmarks.latency_model               # about a minute
    python -m benchmarks.latency_model --calibrate   # fits the constants again: about twenty minutes

Every figure is reproduced by running its workload through the scheduler in virtual time. The constants of
`serve.engines.simulated.roofline` were fitted to the throughput tables, one set for each GPU generation; the latency
tables took no part in that.
"""

import argparse
import math
import random
import statistics
import time
from collections.abc import Iterable
from heapq import heappop, heappush

import numpy as np

from benchmarks.latency_figures import BLACKWELL, HOPPER, LATENCY, REQUESTS, Latency, Throughput
from benchmarks.report import Report
from serve.engines.simulated.hardware import Generation, Precision
from serve.engines.simulated.limits import SchedulerLimits
from serve.engines.simulated.roofline import EFFICIENCIES, Efficiency
from serve.engines.simulated.scheduler import Scheduler
from serve.engines.simulated.sequence import ScheduledSequence
from serve.engines.simulated.settings import RooflineSettings
from serve.engines.simulated.timeline import Timeline

BLOCK = 32
TABLES: tuple[tuple[Generation, list[Throughput]], ...] = (("hopper", HOPPER), ("blackwell", BLACKWELL))


def make_timeline(
    model: str, gpu: str, tensor_parallel: int, weights: Precision, efficiency: Efficiency | None
) -> Timeline[ScheduledSequence]:
    """Make an engine with TensorRT-LLM's default limits, and 95 % of the free memory for keys and values."""
    latency = RooflineSettings(
        model=model,
        gpu=gpu,
        tensor_parallel=tensor_parallel,
        weights=weights,
        kv_fraction=0.95,
        efficiency=efficiency,
    )
    limits = SchedulerLimits(
        total_blocks=latency.kv_capacity() // BLOCK,
        tokens_per_block=BLOCK,
        max_batch_size=2048,
        max_num_tokens=8192,
        share_prefixes=False,
    )
    return Timeline(Scheduler(limits, latency.make_model()))


def throughput(figure: Throughput, efficiency: Efficiency | None = None) -> tuple[float, int]:
    """Return simulated output tokens a second, and the steps that it took."""
    timeline = make_timeline(figure.model, figure.gpu, figure.tensor_parallel, figure.weights, efficiency)
    requests = REQUESTS[figure.input_tokens, figure.output_tokens]
    for number in range(requests):
        timeline.submit(
            ScheduledSequence(str(number), figure.input_tokens, [], root=0, max_tokens=figure.output_tokens), 0.0
        )
    end_s = 0.0
    while timeline.next_s < math.inf:
        end_s = timeline.advance(timeline.next_s)[-1].at_s
    return requests * figure.output_tokens / end_s, timeline.steps


def latency(figure: Latency, together: bool) -> tuple[float, float]:
    """Return simulated mean TTFT and ITL, in s, of clients that each send a request when their last one ended.

    Args:
        figure: The workload.
        together: Whether the clients begin together. All requests being alike, they then stay together, and each
            prompt waits for all others; if not, they are spread evenly over the time that a request takes.
    """
    timeline = make_timeline(figure.model, figure.gpu, figure.tensor_parallel, "fp8", None)
    left = 4 * figure.concurrency
    done: list[ScheduledSequence] = []

    def submit(now_s: float) -> None:
        timeline.submit(ScheduledSequence("", figure.input_tokens, [], root=0, max_tokens=figure.output_tokens), now_s)

    for client in range(figure.concurrency):
        at_s = 0.0 if together else client * figure.output_tokens * figure.itl_s / figure.concurrency
        timeline.advance(at_s)
        submit(at_s)
    while timeline.next_s < math.inf:
        for progress in timeline.advance(timeline.next_s):
            done += progress.finished
            for _ in progress.finished[:left]:
                left -= 1
                submit(progress.at_s)
    steady = done[figure.concurrency : -figure.concurrency]
    ttft_s = statistics.mean(s.first_token_s - s.arrived_s for s in steady)
    itl_s = statistics.mean((s.finished_s - s.first_token_s) / (s.output_tokens - 1) for s in steady)
    return ttft_s, itl_s


def main() -> None:
    """Print the comparison, or the calibration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrate", action="store_true", help="fit the constants to the throughput tables")
    if parser.parse_args().calibrate:
        for name, figures in TABLES:
            print(name, calibrate(figures, EFFICIENCIES[name]))
        return
    report = Report("latency_model", "python -m benchmarks.latency_model")
    _compare_throughput(report)
    _compare_latency(report)
    for block in (512, 32):
        _time_a_trace(report, block)
    report.note(
        "Errors are simulated over published, minus one. The constants were fitted to the throughput tables, one set "
        "for Hopper and one for Blackwell. The latency tables were not used; they are of another release, and measured "
        "by a client over HTTP. How long a prompt waits for others depends on how arrivals bunch, which is not "
        "published: where there are several clients, the TTFT is given for clients spread evenly, and for clients that "
        "begin together."
    )
    report.finish()


def _compare_throughput(report: Report) -> None:
    lines = [
        f"{'model':16}{'gpu':6}{'TP':>3} {'weights':8}{'in/out':>12}{'published':>11}{'simulated':>11}{'error':>8}"
    ]
    steps, cpu_s = 0, time.process_time()
    for name, figures in TABLES:
        errors = []
        for figure in figures:
            simulated, its_steps = throughput(figure)
            steps += its_steps
            errors.append(simulated / figure.output_tokens_per_s - 1)
            lengths = f"{figure.input_tokens}/{figure.output_tokens}"
            lines.append(
                f"{figure.model:16}{figure.gpu:6}{figure.tensor_parallel:3} {figure.weights:8}{lengths:>12}"
                f"{figure.output_tokens_per_s:11.0f}{simulated:11.0f}{errors[-1]:+8.1%}"
            )
        _summarize(report, f"throughput error, {name}, {len(errors)} figures", errors)
    cpu_s = time.process_time() - cpu_s
    requests = sum(REQUESTS[f.input_tokens, f.output_tokens] for f in (*HOPPER, *BLACKWELL))
    report.add("simulated steps per CPU second, batches up to 2048", steps / cpu_s, "1/s")
    report.add("simulated requests per CPU second", requests / cpu_s, "1/s")
    report.note("\n".join(["Throughput, output tokens/s", *lines, ""]))


def _compare_latency(report: Report) -> None:
    lines = [f"{'model':16}{'gpu':6}{'TP':>3}{'in/out':>11}{'clients':>8}{'TTFT ms':>9}{'simulated':>15}{'ITL ms':>9}"]
    lines[0] += f"{'simulated':>11}{'error':>8}"
    ttft_errors, itl_errors, between = [], [], []
    for figure in LATENCY:
        (spread_s, itl_s), (together_s, _) = latency(figure, together=False), latency(figure, together=True)
        itl_errors.append(itl_s / figure.itl_s - 1)
        if figure.concurrency == 1:
            ttft_errors.append(spread_s / figure.ttft_s - 1)
            simulated = f"{spread_s * 1e3:.0f}"
        else:
            between.append(spread_s <= figure.ttft_s <= together_s)
            simulated = f"{spread_s * 1e3:.0f} .. {together_s * 1e3:.0f}"
        lengths = f"{figure.input_tokens}/{figure.output_tokens}"
        lines.append(
            f"{figure.model:16}{figure.gpu:6}{figure.tensor_parallel:3}{lengths:>11}{figure.concurrency:8}"
            f"{figure.ttft_s * 1e3:9.0f}{simulated:>15}{figure.itl_s * 1e3:9.2f}{itl_s * 1e3:11.2f}"
            f"{itl_errors[-1]:+8.1%}"
        )
    _summarize(report, f"TTFT error, one client, {len(ttft_errors)} figures", ttft_errors)
    report.add("TTFT of several clients between the bounds", sum(between), f"of {len(between)}")
    _summarize(report, f"ITL error, {len(itl_errors)} figures", itl_errors)
    report.note("\n".join(["Latency", *lines, ""]))


def _time_a_trace(report: Report, block: int) -> None:
    """Take the time of an hour's traffic of long prompts on 16 engines: the shape of a trace, drawn at random."""
    rng = random.Random(0)
    requests, engines, heap = 12_000, 16, list[tuple[float, int]]()
    settings = RooflineSettings()
    limits = SchedulerLimits(total_blocks=settings.kv_capacity() // block, tokens_per_block=block)
    timelines = [Timeline[ScheduledSequence](Scheduler(limits, settings.make_model())) for _ in range(engines)]
    roots = [[rng.getrandbits(63) for _ in range(20_000 // block)] for _ in range(500)]
    cpu_s = time.process_time()
    for number in range(requests):
        now_s = number * 0.3
        while heap and heap[0][0] <= now_s:
            due_s, engine = heappop(heap)
            timelines[engine].advance(due_s)
            if timelines[engine].next_s < math.inf:
                heappush(heap, (timelines[engine].next_s, engine))
        tokens = int(min(100_000.0, rng.expovariate(1 / 12_000)) + 1)
        blocks = tokens // block
        hashes = [*rng.choice(roots)[: blocks // 2]]
        hashes += [rng.getrandbits(63) for _ in range(blocks - len(hashes))]
        engine = number % engines
        output = int(rng.expovariate(1 / 343)) + 1
        timelines[engine].submit(ScheduledSequence("", tokens, hashes, root=0, max_tokens=output), now_s)
        heappush(heap, (timelines[engine].next_s, engine))
    for timeline in timelines:
        while timeline.next_s < math.inf:
            timeline.advance(timeline.next_s)
    cpu_s = time.process_time() - cpu_s
    name = f"trace of 12,000 requests of 12k tokens on 16 engines, blocks of {block}"
    report.add(name, cpu_s, "CPU s")
    report.add(f"{name}: virtual steps", sum(timeline.steps for timeline in timelines) / cpu_s, "1/CPU s")


def _summarize(report: Report, name: str, errors: list[float]) -> None:
    report.add(f"{name}: root mean square", 100 * math.sqrt(statistics.mean(e * e for e in errors)), "%")
    report.add(f"{name}: largest", 100 * max(abs(error) for error in errors), "%")


def calibrate(figures: Iterable[Throughput], start: Efficiency, rounds: int = 3) -> Efficiency:
    """Fit the constants of dense models to all figures at once: Gauss-Newton on logarithms, with a weak prior."""
    names = [name for name in Efficiency.model_fields if name not in ("experts", "stage_loss")]
    shares = {"compute", "attention", "memory", "link"}
    origin = np.log([getattr(start, name) for name in names])

    def efficiency(point: np.ndarray) -> Efficiency:
        values = {name: float(np.exp(value)) for name, value in zip(names, point, strict=True)}
        return start.model_copy(update={name: min(1.0, v) if name in shares else v for name, v in values.items()})

    def errors(point: np.ndarray) -> np.ndarray:
        constants = efficiency(point)
        return np.array([math.log(throughput(f, constants)[0] / f.output_tokens_per_s) for f in figures])

    point, now = origin.copy(), errors(origin)
    prior = 0.0266 * math.sqrt(len(now)) * np.array([1.0 if name in shares - {"link"} else 0.5 for name in names])
    for _ in range(rounds):
        slopes = np.stack([(errors(point + 0.15 * unit) - now) / 0.15 for unit in np.eye(len(names))], axis=1)
        system = np.vstack([slopes, np.diag(prior)])
        step = np.linalg.lstsq(system, np.concatenate([-now, -prior * (point - origin)]), rcond=None)[0]
        point = point + np.clip(step, -0.5, 0.5)
        now = errors(point)
        print(f"root mean square {math.sqrt(float((now**2).mean())):.2%}", flush=True)
    return efficiency(point)


if __name__ == "__main__":
    main()
