"""Sends requests to server.py, a number of them at a time, and prints how long they take: `python load.py inputs.jsonl`."""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np


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
    percentiles = dict(zip(("p50", "p95", "p99"), np.percentile(milliseconds, (50, 95, 99)), strict=True))
    return {"answers": answers, "refused": refused, "per_second": per_second, **percentiles}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", type=Path, help="a JSON Lines file with an input in each line")
    parser.add_argument("--url", default="http://127.0.0.1:8000/predict")
    parser.add_argument("--requests", type=int, default=500, help="the inputs are repeated up to this number")
    parser.add_argument("--concurrency", type=int, default=16)
    args = parser.parse_args()
    try:
        lines = [json.loads(line) for line in args.inputs.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        parser.error(f"{args.inputs} can't be read: {error}")
    if not lines or min(args.requests, args.concurrency) < 1:
        parser.error("there is nothing to send: the file is empty, or --requests or --concurrency is below 1")
    inputs = [lines[number % len(lines)] for number in range(args.requests)]
    try:
        found = asyncio.run(load(args.url, inputs, args.concurrency))
    except httpx.HTTPStatusError as error:
        sys.exit(f"the server answers {error.response.status_code}: {error.response.text}")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        sys.exit(f"no answer from {args.url}: is server.py running there? ({error or type(error).__name__})")
    print(
        "{per_second:.0f} answers/s; ms: p50 {p50:.0f}, p95 {p95:.0f}, p99 {p99:.0f}; refused: {refused}".format(
            **found
        )
    )


if __name__ == "__main__":
    main()
