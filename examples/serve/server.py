"""Serves a K-Adapter's pipeline over HTTP, in batches: `python server.py MODEL --task entity-typing`; see docs/serving.md."""

import argparse
import asyncio
import json
from concurrent.futures import Future
from queue import Queue
from threading import Thread
from typing import Annotated, Any

import uvicorn
from fastapi import Body, FastAPI, HTTPException, Response
from transformers import Pipeline, PreTrainedConfig, pipeline
from transformers.pipelines import PIPELINE_REGISTRY

import kadapter_hf  # noqa: F401, registers the classes and the pipelines


def create_app(pipe: Pipeline, batch_size: int = 16, queue_size: int = 64) -> FastAPI:
    """An application that collects waiting requests into batches; beyond `queue_size` of them, more are refused with 503."""
    app, waiting = FastAPI(), Queue[tuple[Any, Future]](queue_size)

    def predict(inputs: list[Any]) -> list[Any]:
        """The result or the error of each input. If a batch fails, its inputs run one by one, to see which one is at fault."""
        try:
            # A generator, as some pipelines treat a list of one text as that text.
            results = list(pipe((one for one in inputs), batch_size=len(inputs)))
            if len(results) != len(inputs):
                raise ValueError(f"the pipeline returns {len(results)} results for {len(inputs)} inputs.")
            return results
        except Exception as error:
            return [error] if len(inputs) == 1 else [result for one in inputs for result in predict([one])]

    def work() -> None:
        while True:
            batch = [waiting.get()]
            batch += [waiting.get() for _ in range(min(waiting.qsize(), batch_size - 1))]
            results = predict([inputs for inputs, _ in batch])
            for (_, answered), result in zip(batch, results, strict=True):
                if answered.set_running_or_notify_cancel():
                    answered.set_result(result)

    Thread(target=work, daemon=True).start()

    @app.post("/predict")
    async def answer(inputs: Annotated[Any, Body(embed=True)]) -> Response:  # what the pipeline takes for one text
        if waiting.full():
            raise HTTPException(503, "too many requests are waiting", {"Retry-After": "1"})
        waiting.put_nowait((inputs, answered := Future()))
        result = await asyncio.wrap_future(answered)
        if isinstance(result, Exception):  # about this input, as it ran alone, if there was memory enough
            raise HTTPException(500 if "Memory" in type(result).__name__ else 422, str(result))
        # Some pipelines return NumPy's numbers.
        return Response(json.dumps(result, default=lambda number: number.item()), media_type="application/json")

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a folder, or a repository on the Hub")
    parser.add_argument("--task", help="the pipeline's name, e.g. fill-mask; by default as the configuration says")
    parser.add_argument("--batch_size", type=int, default=16, help="1 or less is no batches")
    parser.add_argument("--queue_size", type=int, default=64, help="0 is no limit")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    task = args.task or next(iter(PreTrainedConfig.get_config_dict(args.model)[0].get("custom_pipelines", {})), None)
    if task not in PIPELINE_REGISTRY.get_supported_tasks():
        parser.error(f"there is no pipeline '{task}'." if task else "the model names no pipeline: give --task.")
    app = create_app(pipeline(task, model=args.model), args.batch_size, args.queue_size)
    uvicorn.run(app, host=args.host, port=args.port)
