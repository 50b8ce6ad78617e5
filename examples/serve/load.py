"""Sends requests to server.py, a number of them at a time, and prints how long they take: `python load.py inputs.jsonl`."""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx


async def load(url: str, inputs: Sequence[Any], concurrency: int) -> dict[str, Any]:
    """
    Sends each input once; a request that is refused with 503 waits as long as the server says and comes again.

    Returns:
        `answers` in the order of the inputs; the number that were `refused`; `per_second`, answers; and the milliseconds from
        a request that was accepted to its answer, by percentile: `p50`, `p95`, `p99`.
    """
    todo = iter(enumerate(inputs))
    answers: list[Any] = [None] * len(inputs)
    milliseconds: list[float] = []
    refused = 0

    async def send(client: httpx.AsyncClient) -> None:
        nonlocal refused
        for number, one in todo:
            while True:
                started = time.perf_counter()
                response = await client.post(url, json={"inputs": one})
                if response.status_code != 503:
                    break
                refused += 1
                await asyncio.sleep(float(response.headers["Retry-After"]))
            response.raise_for_status()
            answers[number] = response.json()
            milliseconds.append(1000 * (time.perf_counter() - started))

    started = time.perf_counter()
    async with httpx.AsyncClient(timeout=60) as client:
        await asyncio.gather(*(send(client) for _ in range(concurrency)))
    per_second = len(inputs) / (time.perf_counter() - started)
    cuts = statistics.quantiles(milliseconds, n=100, method="inclusive")
    percentiles = {f"p{percent}": cuts[percent - 1] for percent in (50, 95, 99)}
    return {"answers": answers, "refused": refused, "per_second": per_second, **percentiles}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", type=Path, help="a JSON Lines file with an input in each line")
    parser.add_argument("--url", default="http://127.0.0.1:8000/predict")
    parser.add_argument("--requests", type=int, default=500, help="the inputs are repeated up to this number")
    parser.add_argument("--concurrency", type=int, default=16)
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.inputs.read_text(encoding="utf-8").splitlines()]
    inputs = [lines[number % len(lines)] for number in range(args.requests)]
    found = asyncio.run(load(args.url, inputs, args.concurrency))
    print(
        "{per_second:.0f} answers/s; ms: p50 {p50:.0f}, p95 {p95:.0f}, p99 {p99:.0f}; refused: {refused}".format(
            **found
        )
    )


if __name__ == "__main__":
    main()
