"""examples/serve: a real server on this machine, and concurrent requests."""

import asyncio
import contextlib
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import torch
from conftest import free_port, load_script
from transformers import pipeline

from kadapter_hf import KAdapterForEntityTyping, KAdapterForMaskedLM


uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

SERVE = Path(__file__).parents[2] / "examples" / "serve"
server, load = load_script(SERVE / "server.py"), load_script(SERVE / "load.py").load
WORDS = "rome paris vienna berlin italy france austria germany dante mozart".split()
ADAPTERS = [None, ["factual"], ["factual", "linguistic"], []]


def inputs(number: int) -> list[dict]:
    """Different texts of different lengths, with different adapters."""
    made = []
    for index in range(number):
        word = WORDS[index % len(WORDS)]
        text = f"{word} is {'the old ' * (index % 7)}city of {WORDS[index // len(WORDS) % len(WORDS)]}"
        made.append({"text": text, "entity": [0, len(word)], "knowledge_adapters": ADAPTERS[index % 4]})
        if made[-1]["knowledge_adapters"] is None:
            del made[-1]["knowledge_adapters"]
    return made


@pytest.fixture
def folder(build, tokenizer, tmp_path) -> str:
    build(KAdapterForEntityTyping, num_labels=4).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.fixture
def pipe(folder):
    """A pipeline that returns the scores of all labels."""
    return pipeline("entity-typing", model=folder, threshold=0.0)


@contextlib.contextmanager
def serving(app):
    """A server in a thread of this process, and its address."""
    config = uvicorn.Config(app, port=free_port(), log_level="error")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        while not running.started:
            time.sleep(0.01)
        yield running, f"http://127.0.0.1:{config.port}/predict"
    finally:
        running.should_exit = True
        thread.join()


def assert_answers(found: list, pipe, sent: list[dict]) -> None:
    """Each answer is what the pipeline says of that input alone."""
    for answer, one in zip(found, sent, strict=True):
        wanted = {entry["label"]: entry["score"] for entry in pipe(one)}
        assert {entry["label"]: entry["score"] for entry in answer} == pytest.approx(wanted, abs=1e-5)


def test_each_answer_belongs_to_its_request(pipe):
    sent = inputs(80)
    with serving(server.create_app(pipe)) as (_, url):
        found = asyncio.run(load(url, sent, concurrency=16))
    assert found["refused"] == 0
    assert_answers(found["answers"], pipe, sent)


def test_a_full_queue_refuses_requests_and_loses_none_that_it_accepted(pipe):
    sent = inputs(40)

    async def all_at_once(url: str) -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60) as client:
            return await asyncio.gather(*(client.post(url, json={"inputs": one}) for one in sent))

    with serving(server.create_app(pipe, batch_size=2, queue_size=4)) as (_, url):
        responses = asyncio.run(all_at_once(url))
    accepted = [number for number, response in enumerate(responses) if response.status_code == 200]
    refused = [response for response in responses if response.status_code == 503]
    assert len(accepted) + len(refused) == len(sent) and len(accepted) >= 4 and refused
    assert all(int(response.headers["Retry-After"]) >= 1 for response in refused)
    assert_answers([responses[number].json() for number in accepted], pipe, [sent[number] for number in accepted])


def test_a_server_that_is_stopped_answers_what_it_has_accepted(pipe):
    sent = inputs(20)

    async def stopped(running: uvicorn.Server, url: str) -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60) as client:
            requests = [asyncio.create_task(client.post(url, json={"inputs": one})) for one in sent]
            while running.server_state.total_requests < len(sent):
                await asyncio.sleep(0.001)
            running.should_exit = True  # as SIGTERM does
            return await asyncio.gather(*requests)

    with serving(server.create_app(pipe, batch_size=1)) as (running, url):
        responses = asyncio.run(stopped(running, url))
    assert_answers([response.json() for response in responses], pipe, sent)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"text": "rome", "entity": [0, 99]}, "outside the text"),
        ({"text": "rome", "entity": [0, 4], "knowledge_adapters": ["nobody"]}, "nobody"),
    ],
)
def test_an_impossible_input_is_refused_in_a_sentence_and_spoils_no_other(pipe, wrong, words):
    sent = inputs(12)

    async def together(url: str) -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60) as client:
            bodies = [*sent[:6], wrong, *sent[6:]]
            return await asyncio.gather(*(client.post(url, json={"inputs": one}) for one in bodies))

    with serving(server.create_app(pipe)) as (_, url):
        responses = asyncio.run(together(url))
    refused = responses.pop(6)
    assert refused.status_code == 422 and words in refused.json()["detail"]
    assert_answers([response.json() for response in responses], pipe, sent)


@pytest.mark.parametrize("number", [1, 5])
def test_a_masked_word_is_filled_in_as_by_the_pipeline_in_a_batch_of_any_size(number, build, tokenizer):
    filler = pipeline("fill-mask", model=build(KAdapterForMaskedLM), tokenizer=tokenizer)
    sent = [f"{word} is the <mask> of italy" for word in WORDS[:number]]
    with serving(server.create_app(filler)) as (_, url):
        found = asyncio.run(load(url, sent, concurrency=number))
    for answer, one in zip(found["answers"], sent, strict=True):
        assert [entry["token_str"] for entry in answer] == [entry["token_str"] for entry in filler(one)]


def test_a_pipeline_that_returns_too_few_results_is_an_error_and_not_the_end_of_the_server():
    with serving(server.create_app(lambda inputs, batch_size: [])) as (_, url):
        for _ in range(2):
            response = httpx.post(url, json={"inputs": "rome"}, timeout=10)
            assert response.status_code == 422 and "0 results for 1 inputs" in response.json()["detail"]


@pytest.mark.parametrize("error", [MemoryError("no room"), torch.OutOfMemoryError("no room")])
def test_a_lack_of_memory_is_the_fault_of_the_server(error):
    def fail(inputs, batch_size):
        raise error

    with serving(server.create_app(fail)) as (_, url):
        response = httpx.post(url, json={"inputs": "rome"}, timeout=10)
        assert response.status_code == 500 and response.json()["detail"] == "no room"


@pytest.mark.parametrize("batch_size", [0, 1])
def test_without_batches_and_a_limit_of_the_queue_each_request_is_answered(batch_size, pipe):
    sent = inputs(6)
    with serving(server.create_app(pipe, batch_size=batch_size, queue_size=0)) as (_, url):
        assert_answers(asyncio.run(load(url, sent, concurrency=6))["answers"], pipe, sent)


def test_load_of_one_request_has_percentiles(pipe):
    with serving(server.create_app(pipe)) as (_, url):
        found = asyncio.run(load(url, inputs(1), concurrency=4))
    assert len(found["answers"]) == 1 and found["p50"] == found["p99"] > 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n", "there is nothing to send: the file is empty"),
        ("{", "inputs.jsonl can't be read: Expecting"),
        (None, "inputs.jsonl can't be read: [Errno 2]"),
        ('{"text": "rome"}', "no answer from http://127.0.0.1:PORT/predict: is server.py running there?"),
    ],
)
def test_load_says_in_a_sentence_why_nothing_can_be_sent(content, message, tmp_path):
    port = free_port()
    if content is not None:
        (tmp_path / "inputs.jsonl").write_text(content)
    command = [sys.executable, str(SERVE / "load.py"), "inputs.jsonl", "--url", f"http://127.0.0.1:{port}/predict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr
    assert message.replace("PORT", str(port)) in done.stderr.splitlines()[-1]


def test_load_says_in_a_sentence_what_the_server_refuses(pipe, tmp_path):
    (tmp_path / "inputs.jsonl").write_text('{"text": "rome", "entity": [0, 99]}\n')
    with serving(server.create_app(pipe)) as (_, url):
        command = [sys.executable, str(SERVE / "load.py"), str(tmp_path / "inputs.jsonl"), "--url", url]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and re.fullmatch("the server answers 422: .*outside the text.*\n", done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "the model names no pipeline: give --task."),
        (["--task", "foo"], "there is no pipeline 'foo'."),
    ],
)
def test_the_script_says_in_a_sentence_why_it_can_not_start(flags, message, build, tmp_path):
    build(KAdapterForMaskedLM).save_pretrained(tmp_path)
    command = [sys.executable, str(SERVE / "server.py"), str(tmp_path), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.endswith(f"server.py: error: {message}\n")


@pytest.mark.slow
def test_the_script_serves_the_models_own_pipeline_under_a_load_that_is_larger_than_its_queue(folder, pipe):
    port = free_port()
    url = f"http://127.0.0.1:{port}/predict"
    command = [sys.executable, str(SERVE / "server.py"), folder, "--port", str(port)]
    process = subprocess.Popen([*command, "--queue_size", "8"], stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if "Uvicorn running" in line:
                break
        sent = inputs(400)
        found = asyncio.run(load(url, sent, concurrency=32))
        print({name: value for name, value in found.items() if name != "answers"})
        assert found["refused"] > 0 and all(answer is not None for answer in found["answers"])
        for answer, one in zip(found["answers"], sent, strict=True):
            assert {entry["label"] for entry in answer} == {
                entry["label"] for entry in pipe(one) if entry["score"] > 0.5
            }
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) in (0, -signal.SIGTERM)
        process.stderr.close()
