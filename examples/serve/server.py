"""
Serves a K-Adapter's pipeline over HTTP, in batches: `python server.py MODEL --task entity-typing`; see docs/serving.md.

    pip install 'kadapter-hf[serve]'
    curl -d '{"inputs": {"text": "She moved to Rome.", "entity": [13, 17]}}' -H 'Content-Type: application/json' \
        localhost:8000/predict
"""

import argparse
import asyncio
import json
from contextlib import asynccontextmanager
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Response
from pydantic import BaseModel
from transformers import AutoConfig, Pipeline, pipeline

import kadapter_hf  # noqa: F401, registers the classes and the pipelines


class Request(BaseModel):
    inputs: Any  # what the pipeline takes for one text


def create_app(pipe: Pipeline, batch_size: int = 16, queue_size: int = 64) -> FastAPI:
    """An application that collects waiting requests into batches; more than `queue_size` of them are refused with 503."""
    waiting: asyncio.Queue[tuple[Any, asyncio.Future]] = asyncio.Queue(queue_size)

    def predict(inputs: list[Any]) -> list[Any]:
        """The result or the error of each input. If a batch fails, its inputs run one by one, to see which one is at fault."""
        try:
            return list(pipe(inputs, batch_size=len(inputs)))
        except Exception as error:
            return [error] if len(inputs) == 1 else [result for one in inputs for result in predict([one])]

    async def work() -> None:
        while True:
            batch = [await waiting.get()]
            while len(batch) < batch_size and not waiting.empty():
                batch.append(waiting.get_nowait())
            # In a thread, so that requests are accepted meanwhile.
            results = await asyncio.to_thread(predict, [inputs for inputs, _ in batch])
            for (_, result), value in zip(batch, results, strict=True):
                if not result.cancelled():
                    result.set_result(value)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        worker = asyncio.create_task(work())
        yield
        worker.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.post("/predict")
    async def answer(request: Request) -> Response:
        result = asyncio.get_running_loop().create_future()
        try:
            waiting.put_nowait((request.inputs, result))
        except asyncio.QueueFull:
            raise HTTPException(503, "too many requests are waiting", {"Retry-After": "1"}) from None
        value = await result
        if isinstance(value, (MemoryError, torch.OutOfMemoryError)):
            raise value
        if isinstance(value, Exception):  # about this input, as it ran alone
            raise HTTPException(422, str(value))
        # Some pipelines return NumPy's numbers.
        return Response(json.dumps(value, default=lambda number: number.item()), media_type="application/json")

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("model", help="a folder, or a repository on the Hub")
    parser.add_argument("--task", help="the pipeline's name, e.g. entity-typing; by default the model's own")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--queue_size", type=int, default=64)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    tasks = getattr(AutoConfig.from_pretrained(args.model), "custom_pipelines", None) or {}
    pipe = pipeline(args.task or next(iter(tasks), None), model=args.model)
    app = create_app(pipe, args.batch_size, args.queue_size)
    uvicorn.run(app, host=args.host, port=args.port)
